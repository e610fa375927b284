# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""Calls as users write them, for type checkers: `.ci/run` holds pyright to it under strict, with the wheel installed.

Arrays are arguments here, as jax's own functions aren't typed for strict.
"""

from __future__ import annotations

from typing import Any, assert_type

import jax
import numpy as np

import jaxce
from jaxce import LinearLogits, ShardedLogits, SoftmaxStatistics
from jaxce.metrics import Accuracy, BinaryEvaluation, Evaluation, EvaluationResult, TopKAccuracy

Vector = np.ndarray[Any, np.dtype[np.float32]]


def losses(logits: jax.Array, labels: jax.Array, counts: jax.Array, rate: jax.Array, one_hot: Vector) -> jax.Array:
    """Options as floats, as integers and as arrays; labels of NumPy and of JAX."""
    each = jaxce.softmax_cross_entropy_with_integer_labels(logits, labels, where=counts, label_smoothing=0.1)
    assert_type(each, jax.Array)
    jaxce.softmax_cross_entropy_with_integer_labels(logits, labels, -1, counts, label_smoothing=rate, z_loss=1e-4)
    jaxce.softmax_cross_entropy(logits, one_hot, label_smoothing=np.float32(0.1), class_weights=np.ones(3, np.float32))
    jaxce.softmax_cross_entropy(logits, one_hot, label_smoothing="a lot")  # pyright: ignore[reportArgumentType]
    jaxce.softmax_cross_entropy(logits, one_hot, smoothing=0.1)  # pyright: ignore[reportCallIssue]
    jaxce.softmax_focal_loss(logits, labels, where=counts, gamma=2)
    jaxce.sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=rate)
    jaxce.poly_loss_cross_entropy(logits, one_hot, epsilon=1.0, axis=(-1,))
    assert_type(jaxce.perplexity(each, base=2), jax.Array)
    return jaxce.weighted_mean(each, counts, normalizer=3)


def logits_that_are_no_array(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, cap: jax.Array) -> jax.Array:
    """Wherever logits go."""
    logits = LinearLogits(hidden, kernel, temperature=0.7, soft_cap=cap)
    statistics = jaxce.softmax_statistics(logits, labels)
    assert_type(statistics, SoftmaxStatistics[jax.Array])
    assert_type(statistics.nll, jax.Array)
    assert_type(statistics.entropy, jax.Array)
    assert_type(jaxce.softmax_statistics(logits).nll, None)
    assert_type(jaxce.logsumexp(ShardedLogits(hidden, axis_name="model")), jax.Array)
    assert_type(jaxce.relative_entropy_with_logits(logits, logits, base=2), jax.Array)
    return jaxce.linear_cross_entropy(logits, labels, label_smoothing=0.1)


def evaluate(logits: jax.Array, labels: jax.Array) -> float:
    """A metric is empty, updated, merged and computed."""
    evaluation = Evaluation.empty(k=2).update(logits, labels, where=labels != -100)
    assert_type(evaluation, Evaluation)
    assert_type(Accuracy.from_batch(logits, labels).update(logits, labels), Accuracy)
    Accuracy.empty().update(logits, labels, mask=labels)  # pyright: ignore[reportCallIssue]
    Accuracy.from_batch(logits)  # pyright: ignore[reportCallIssue]
    TopKAccuracy.empty(k=2).update(logits, labels, k=2)  # pyright: ignore[reportCallIssue]
    BinaryEvaluation.from_batch(logits, labels, threshold=0.4).update(logits, labels, weights=labels)
    result = evaluation.merge(Evaluation.empty(k=2)).compute()
    assert_type(result, EvaluationResult)
    return float(result.accuracy)


def lists(logits: jax.Array) -> jax.Array:
    """Lists, of numbers and of lists, wherever arrays go."""
    jaxce.softmax_cross_entropy_with_integer_labels([[1.0, 2.0], [0.5, -1.0]], [0, 1], where=[True, False])
    jaxce.softmax_cross_entropy(logits, "labels")  # pyright: ignore[reportArgumentType]
    jaxce.entropy([0.5, 0.5], base=2)
    return jaxce.weighted_mean([1.0, 2.0], weights=[1, 2])
