"""Laws that hold for every distribution, on examples that hypothesis finds; of few shapes, to compile little."""

from __future__ import annotations

from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxce

pytestmark = pytest.mark.slow

CLASSES = 5
laws = settings(deadline=None, max_examples=25, derandomize=True, database=None)


def floats(low: float, high: float, *shape: int) -> Any:
    """Float32 arrays of the shape; zeros, repetitions and the bounds themselves are what hypothesis tries first."""
    numbers = st.floats(low, high, width=32)
    count = int(np.prod(shape))
    return st.lists(numbers, min_size=count, max_size=count).map(lambda v: np.array(v, np.float32).reshape(shape))


logits = floats(-50, 50, CLASSES)
weights = floats(0, 1, CLASSES).map(lambda w: (w + np.float32(2**-10)) / np.sum(w + np.float32(2**-10)))
labels = st.integers(0, CLASSES - 1)
permutations = st.permutations(range(CLASSES)).map(np.array)
masks = st.lists(st.booleans(), min_size=CLASSES, max_size=CLASSES).map(np.array)


def close(got: Any, expected: Any, rtol: float = 2e-6, atol: float = 1e-37) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=rtol, atol=atol)


@laws
@given(floats(-64, 64, CLASSES), labels, st.sampled_from([-4096.0, -1.0, 512.0, 8192.0]))
def test_a_constant_added_to_the_logits_changes_nothing(x: np.ndarray, y: int, c: float) -> None:
    x = np.round(x * 512) / 512  # a grid on which the sum is exact
    shifted = x + np.float32(c)
    loss = jaxce.softmax_cross_entropy_with_integer_labels
    close(loss(shifted, y), loss(x, y), rtol=3e-7)
    close(jaxce.entropy_with_logits(shifted), jaxce.entropy_with_logits(x), rtol=3e-7)
    close(jaxce.log_softmax(shifted), jaxce.log_softmax(x), rtol=3e-7)


@laws
@given(logits, weights, labels, permutations)
def test_the_order_of_the_classes_does_not_matter(x: np.ndarray, t: np.ndarray, y: int, order: np.ndarray) -> None:
    place = int(np.argwhere(order == y)[0, 0])
    integer, dense = jaxce.softmax_cross_entropy_with_integer_labels, jaxce.softmax_cross_entropy
    close(integer(x[order], place), integer(x, y))
    close(dense(x[order], t[order]), dense(x, t))
    close(jaxce.entropy_with_logits(x[order]), jaxce.entropy_with_logits(x))
    close(jaxce.log_softmax(x[order]), jaxce.log_softmax(x)[order])


@laws
@given(logits, weights, labels)
def test_integer_labels_are_one_hot_labels(x: np.ndarray, t: np.ndarray, y: int) -> None:
    one_hot = np.eye(CLASSES, dtype=np.float32)[y]
    for options in [{}, {"label_smoothing": 0.1, "z_loss": 0.5, "class_weights": t}]:
        close(
            jaxce.softmax_cross_entropy_with_integer_labels(x, y, **options),
            jaxce.softmax_cross_entropy(x, one_hot, **options),
        )
    close(jaxce.softmax_focal_loss(x, y), jaxce.softmax_focal_loss(x, one_hot))
    close(jaxce.poly_loss_cross_entropy(x, y), jaxce.poly_loss_cross_entropy(x, one_hot))


@laws
@given(logits, logits, weights)
def test_gibbs_inequality(x: np.ndarray, z: np.ndarray, t: np.ndarray) -> None:
    """Cross-entropy is never below entropy: the divergence is never negative, and 0 between equals."""
    entropy = float(jaxce.entropy_with_logits(x))
    assert 0 <= entropy <= np.log(CLASSES) * (1 + 1e-6)
    assert float(jaxce.cross_entropy_with_logits(x, z)) >= entropy * (1 - 2e-6)
    close(jaxce.cross_entropy_with_logits(x, x), entropy)
    divergence = float(jaxce.relative_entropy_with_logits(x, z))
    assert divergence >= 0
    close(jaxce.cross_entropy_with_logits(x, z), entropy + divergence)
    assert float(jaxce.softmax_cross_entropy(x, t)) >= float(jaxce.entropy(t)) * (1 - 2e-6)
    assert float(jaxce.relative_entropy_with_logits(x, x)) == 0


@laws
@given(floats(-10, 10, 3, CLASSES))
def test_chain_rule_of_entropy(x: np.ndarray) -> None:
    """H(X, Y) = H(X) + sum_x p(x) H(Y|x), all of them from logits."""
    normalizers = jaxce.logsumexp(x)
    conditional = jnp.sum(jnp.exp(jaxce.log_softmax(normalizers)) * jaxce.entropy_with_logits(x))
    close(jaxce.entropy_with_logits(x, axis=(0, 1)), jaxce.entropy_with_logits(normalizers) + conditional, rtol=5e-6)


@laws
@given(floats(-10, 10, 3, CLASSES), st.integers(0, 2), labels)
def test_chain_rule_of_surprise(x: np.ndarray, i: int, j: int) -> None:
    """-log p(x, y) = -log p(x) - log p(y|x)."""
    loss = jaxce.softmax_cross_entropy_with_integer_labels
    joint = loss(x, i * CLASSES + j, axis=(0, 1))
    close(joint, loss(jaxce.logsumexp(x), i) + loss(x[i], j), rtol=5e-6, atol=1e-6)


@laws
@given(logits, weights, masks, labels)
def test_masked_classes_are_classes_that_are_not_there(x: np.ndarray, t: np.ndarray, keep: np.ndarray, y: int) -> None:
    keep = keep.copy()
    keep[y] = True
    spoilt = np.where(keep, x, np.float32(np.nan))  # what is masked may hold anything
    spoilt_t = np.where(keep, t, np.float32(np.nan))
    less, less_t, place = x[keep], t[keep], int(np.sum(keep[:y]))
    options: dict[str, Any] = {"label_smoothing": 0.2, "z_loss": 0.25}
    integer, dense = jaxce.softmax_cross_entropy_with_integer_labels, jaxce.softmax_cross_entropy
    pairs = [
        (integer(spoilt, y, where=keep, **options), integer(less, place, **options)),
        (dense(spoilt, spoilt_t, where=keep, **options), dense(less, less_t, **options)),
        (jaxce.entropy_with_logits(spoilt, where=keep), jaxce.entropy_with_logits(less)),
        (jaxce.logsumexp(spoilt, where=keep), jaxce.logsumexp(less)),
        (jaxce.log_softmax(spoilt, where=keep)[keep], jaxce.log_softmax(less)),
        (jaxce.softmax_focal_loss(spoilt, y, where=keep), jaxce.softmax_focal_loss(less, place)),
        (jaxce.poly_loss_cross_entropy(spoilt, y, where=keep), jaxce.poly_loss_cross_entropy(less, place)),
        (jaxce.smooth_labels(spoilt_t, 0.3, where=keep)[keep], jaxce.smooth_labels(less_t, 0.3)),
    ]
    for masked, deleted in pairs:
        close(masked, deleted, atol=1e-6 * (options["z_loss"] > 0))
    gradient = jax.grad(lambda x: integer(x, y, where=keep, **options))(spoilt)
    assert np.all(np.asarray(gradient)[~keep] == 0)
    close(
        np.asarray(gradient)[keep],
        jax.grad(lambda x: integer(x, place, **options))(less),
        rtol=1e-5,
        atol=1e-6,
    )


@laws
@given(logits, labels, st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_smoothing_is_the_dense_formula(x: np.ndarray, y: int, alpha: float) -> None:
    one_hot = np.eye(CLASSES, dtype=np.float32)[y]
    smooth = jaxce.smooth_labels(one_hot, alpha)
    close(smooth, (1 - alpha) * one_hot + alpha / CLASSES)
    expected = jaxce.softmax_cross_entropy(x, smooth)
    close(jaxce.softmax_cross_entropy_with_integer_labels(x, y, label_smoothing=alpha), expected)
    close(jaxce.softmax_cross_entropy(x, one_hot, label_smoothing=alpha), expected)


@laws
@given(logits, weights, labels, weights, st.sampled_from([0.0, 0.1, 1.0]))
def test_class_weights(x: np.ndarray, t: np.ndarray, y: int, w: np.ndarray, alpha: float) -> None:
    """Every class's term is weighted, the smoothed ones too: sum_k w_k t_k (-log p_k)."""
    plain = helpers.plain_softmax_cross_entropy
    options: dict[str, Any] = {"class_weights": w, "label_smoothing": alpha}
    integer, dense = jaxce.softmax_cross_entropy_with_integer_labels, jaxce.softmax_cross_entropy
    close(integer(x, y, **options), plain(x, np.array(y), **options), rtol=5e-6, atol=1e-12)
    close(dense(x, t, **options), plain(x, t, **options), rtol=5e-6, atol=1e-12)


@laws
@given(logits, weights, labels)
def test_z_loss_is_added(x: np.ndarray, t: np.ndarray, y: int) -> None:
    added = 0.25 * jaxce.logsumexp(x) ** 2
    integer, dense = jaxce.softmax_cross_entropy_with_integer_labels, jaxce.softmax_cross_entropy
    close(integer(x, y, z_loss=0.25), integer(x, y) + added)
    close(dense(x, t, z_loss=0.25), dense(x, t) + added)


@laws
@given(logits, weights, labels, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_focal_and_poly_are_their_formulas(x: np.ndarray, t: np.ndarray, y: int, option: float) -> None:
    focal, poly = helpers.plain_softmax_focal_loss, helpers.plain_poly_loss_cross_entropy
    for label in (np.array(y), t):
        close(jaxce.softmax_focal_loss(x, label, gamma=option), focal(x, label, gamma=option), rtol=1e-5, atol=1e-12)
        got = jaxce.poly_loss_cross_entropy(x, label, epsilon=option)
        close(got, poly(x, label, epsilon=option), rtol=1e-5, atol=1e-12)


@laws
@given(logits)
def test_bases_are_units(x: np.ndarray) -> None:
    close(jaxce.entropy_with_logits(x, base=2), jaxce.entropy_with_logits(x) / np.log(2))
    z = x[::-1].copy()
    close(jaxce.cross_entropy_with_logits(x, z, base=10), jaxce.cross_entropy_with_logits(x, z) / np.log(10))
