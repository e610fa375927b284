r"""Losses on probabilities and on log-probabilities: for models whose last layer already is a softmax or a sigmoid.

Whoever has logits is better served by the losses on logits: a probability of 1 - 1e-9 is 1 in float32, and the logits
knew. Nothing is clamped here: what has probability 0 and happens nevertheless costs +inf, and says so.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxce import _checks, _mesh, _platforms
from jaxce._checks import ArrayLike, Axis, compiled
from jaxce._rules import alike, custom_jvp, product
from jaxce._terms import (
    bregman_to_log,
    log_ratio_to_log,
    log_weighed,
    neg_log,
    neg_x_log_not_y,
    neg_x_log_y,
    ratio,
    total,
    weighed,
)

# --- terms: what one class adds ---------------------------------------------------------------------------------------


def _there(log_q: Array, t: Array) -> Array:
    """1, and 0 for a class that isn't there: where both probabilities are 0."""
    return jnp.where((t == 0) & (log_q == -jnp.inf), 0, 1).astype(t.dtype)


@custom_jvp
def _log_ratio(log_q: Array, t: Array) -> Array:
    """log(t / q), 0 where both are 0. d/dlog q = -1, d/dt = 1 / t."""
    return jnp.where(_there(log_q, t) == 0, 0, log_ratio_to_log(t, log_q))


_log_ratio.defslopes(lambda log_q, t: (-jnp.ones_like(log_q), ratio(_there(log_q, t), t)))


@custom_jvp
def _kl_term(log_q: Array, t: Array) -> Array:
    """t log(t / q), 0 at t = 0. d/dlog q = -t, d/dt = log(t / q) + 1."""
    return t * (log_weighed(t, t) - weighed(t, log_q))


@_kl_term.defjvp
def _(primals: Any, tangents: Any) -> Any:
    log_q, t = primals
    return _kl_term(log_q, t), -t * tangents[0] + product(_log_ratio(log_q, t) + _there(log_q, t), tangents[1])


@custom_jvp
def _log_target_term(log_q: Array, log_t: Array) -> Array:
    """t log(t / q), 0 at t = 0; infinite where only q is 0, also where t underflows. d/dlog t = t log(t / q) + t."""
    absent = (log_t == -jnp.inf) & (log_q < jnp.inf)
    term = jnp.exp(log_t) * (jnp.where(absent, 0, log_t) - jnp.where(absent, 0, log_q))
    return jnp.where((log_q == -jnp.inf) & (log_t > -jnp.inf), jnp.inf, term)


@_log_target_term.defjvp
def _(primals: Any, tangents: Any) -> Any:
    term, t = _log_target_term(*primals), jnp.exp(primals[1])
    return term, -t * tangents[0] + product(term + t, tangents[1])


@custom_jvp
def _generalized_kl_term(log_q: Array, t: Array) -> Array:
    """t log(t / q) - t + q >= 0, q at t = 0. d/dlog q = q - t, d/dt = log(t / q)."""
    return bregman_to_log(t, log_q)


@_generalized_kl_term.defjvp
def _(primals: Any, tangents: Any) -> Any:
    log_q, t = primals
    slope = jnp.exp(log_q) - t
    return _generalized_kl_term(log_q, t), slope * tangents[0] + product(_log_ratio(log_q, t), tangents[1])


# --- arguments --------------------------------------------------------------------------------------------------------


_INTEGER = {"probs": "categorical_cross_entropy_with_integer_labels", "log_predictions": "nll"}
"""What takes class numbers, by the name of the prediction."""


def _dense(
    names: tuple[str, str],
    prediction: ArrayLike,
    target: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    absent: tuple[float, float],
) -> tuple[Array, Array]:
    """Prediction and target with the classes last; what is masked holds ``absent``, which adds nothing."""
    x = _checks.floating(names[0], prediction)
    if names[1] == "log_targets":  # whole numbers are no logarithms
        target = _checks.floating(names[1], target)
    t = _checks.dense(names[1], target, x.shape, _checks.compute_dtype(x), names[0], _INTEGER[names[0]])
    class_axes = _checks.axes(axis, x.ndim)
    x, t = _checks.upcast(x, t)
    if where is not None:
        keep = _checks.where_entries(where, x.shape, class_axes)
        x, t = (jnp.where(keep, a, fill) for a, fill in zip((x, t), absent, strict=True))
    return _checks.classes_last(x, class_axes), _checks.classes_last(t, class_axes)


def _pick(
    name: str,
    prediction: ArrayLike,
    labels: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    impossible: float,
    certain: float,
) -> Array:
    """The entry of each row that its label names: ``impossible`` if masked, ``certain`` if no entry is left."""
    x = _checks.floating(name, prediction)
    class_axes = _checks.axes(axis, x.ndim)
    y = _checks.labels_of_rows(labels, x.shape, class_axes, name)
    x = _checks.classes_last(x, class_axes)
    y = y.astype(jnp.result_type(int))  # which holds all classes, as the labels' own dtype may not
    valid = (y >= 0) & (y < x.shape[-1])
    (picked,) = _checks.upcast(_entry(x, y))
    if where is None:
        return picked * jnp.where(valid, 1, jnp.nan).astype(picked.dtype)
    keep = _checks.classes_last(_checks.where_entries(where, x.shape, class_axes), class_axes)
    counts = keep.any(axis=-1)
    # Multiplied by NaN, not replaced by it, so that a bad label has a derivative of NaN, too.
    picked *= jnp.where(valid | ~counts, 1, jnp.nan).astype(picked.dtype)
    picked = jnp.where((_entry(keep.astype(np.int8), y) != 0) | ~valid, picked, impossible)
    return jnp.where(counts, picked, certain)


@custom_jvp
def _entry(x: Array, labels: Array) -> Array:
    """The entry of each row that its label names; anything if none does, with derivatives by all."""
    return _platforms.entry(x, labels, _found)


@_entry.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return _entry(*primals), _found(tangents[0], primals[1])


def _found(x: Array, labels: Array) -> Array:
    """The same by comparing: not a scatter in the gradient, nor a gather where classes may lie on several devices."""
    y = jnp.broadcast_to(labels[..., None], x.shape)
    x, y = alike(x, y)
    hit = _mesh.iota(x, x.ndim - 1).astype(y.dtype) == y
    return jnp.sum(jnp.where(hit | (y < 0) | (y >= x.shape[-1]), x, jnp.zeros_like(x)), -1, dtype=x.dtype)


# --- losses on probabilities ------------------------------------------------------------------------------------------


@compiled("axis")
def categorical_cross_entropy(
    probs: ArrayLike, labels: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> Array:
    r"""Cross-entropy of predicted probabilities and label probabilities.

    .. math:: -\sum_k t_k \log q_k, \qquad 0 \log 0 = 0

    with derivatives -t/q by the probabilities and -log q by the labels, both 0 where t = q = 0. A class with q = 0 < t
    makes the loss +inf: nothing is clamped. Rows need not sum to 1, and are not normalised. Entries that ``where``
    masks, and rows without any entry left, add 0 and have gradient 0, whatever they hold. An empty batch gives an empty
    result.

    Args:
      probs: predicted probabilities q, floating point.
      labels: label probabilities t, of the same shape or one that broadcasts to it: floating point, or with as many axes
        integers or booleans (one-hot).
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as probs).

    Returns:
      One value per row in nats, of the batch shape: float32 for half precision, else the wider of the two dtypes.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.categorical_cross_entropy(jnp.array([0.7, 0.2, 0.1]), jnp.array([0.0, 1.0, 0.0])))
      1.6094

    References:
      Good, "Rational Decisions", JRSS B 14 (1952).
    """
    q, t = _dense(("probs", "labels"), probs, labels, axis, where, (1.0, 0.0))
    return total(neg_x_log_y(t, q))


@compiled("axis")
def categorical_cross_entropy_with_integer_labels(
    probs: ArrayLike, labels: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> Array:
    r"""Negative logarithm of the probability that was given to the label.

    .. math:: -\log q_y

    with derivative -1/q at the label and 0 elsewhere; +inf for q = 0. A label outside [0, K) gives NaN, in value and
    gradient, and the label of a masked class +inf. Masks are as in `categorical_cross_entropy`.

    Args:
      probs: predicted probabilities q, floating point.
      labels: class numbers y, integer, of the batch shape.
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as probs).

    Returns:
      One value per row in nats, of the batch shape: float32 for half precision, else the wider of the two dtypes.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> probs = jnp.array([[0.7, 0.2, 0.1], [0.1, 0.4, 0.5]])
      >>> print(jaxce.categorical_cross_entropy_with_integer_labels(probs, jnp.array([1, 2])))
      [1.6094 0.6931]

    References:
      Good, "Rational Decisions", JRSS B 14 (1952).
    """
    return neg_log(_pick("probs", probs, labels, axis, where, 0.0, 1.0))


@compiled()
def binary_cross_entropy(probs: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    r"""Cross-entropy of independent yes-or-no questions with predicted probabilities of yes.

    .. math:: -t \log q - (1 - t) \log(1 - q), \qquad 0 \log 0 = 0

    with derivative (q - t) / (q (1 - q)) by the probability, which is 1 at q = t = 0 and -1 at q = t = 1. A certain
    prediction that is wrong costs +inf: nothing is clamped. By the label the derivative is log(1 - q) - log q, of which
    the part whose weight and probability both are 0 counts as 0. An empty array gives an empty array.

    Args:
      probs: predicted probabilities of yes, floating point, of any shape.
      labels: probabilities of yes, floating point, integer or boolean, of the same shape or one that broadcasts to it.
      where: what takes part: booleans or integers (what isn't 0) with as many axes as probs, which broadcast to
        them. The rest has loss 0 and gradient 0, whatever it holds.

    Returns:
      The loss of each entry in nats: float32 for half precision, else the wider of the two dtypes.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.binary_cross_entropy(jnp.array([0.7, 0.2, 1.0]), jnp.array([1, 0, 1])))
      [0.3567 0.2231 0. ]

    References:
      Good, "Rational Decisions", JRSS B 14 (1952).
    """
    q = _checks.floating("probs", probs)
    t = _checks.dense("labels", labels, q.shape, _checks.compute_dtype(q), "probs")
    keep = _checks.where_elements(where, q.shape)
    q, t = _checks.upcast(q, t)
    q, t = _checks.only(keep, q, 0.5), _checks.only(keep, t, 1)
    return _checks.only(keep, neg_x_log_y(t, q) + neg_x_log_not_y(1 - t, q), 0)


# --- losses on log-probabilities --------------------------------------------------------------------------------------


@compiled("axis")
def kl_divergence(
    log_predictions: ArrayLike, targets: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> Array:
    r"""Kullback-Leibler divergence of targets from predicted log-probabilities.

    .. math:: \sum_k t_k (\log t_k - \log q_k), \qquad 0 \log 0 = 0

    with derivatives -t by log q, and log(t / q) + 1 by the target: -inf at t = 0 < q, and 0 where t = q = 0. A class
    with q = 0 < t makes it +inf. It is the sum for the numbers as they are given, right to 4 ulp of the sum of its
    terms' sizes; so where the numbers don't sum to 1 to their last digit, it may be as far below 0 as they are off, and
    `generalized_kl_divergence` may not. Masks are as in `categorical_cross_entropy`.

    Args:
      log_predictions: log q, floating point.
      targets: probabilities t, of the same shape or one that broadcasts to it: floating point, or with as many axes
        integers or booleans (one-hot).
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as log_predictions).

    Returns:
      One value per row in nats, of the batch shape: float32 for half precision, else the wider of the two dtypes.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.kl_divergence(jnp.log(jnp.array([0.25, 0.75, 0.0])), jnp.array([0.5, 0.5, 0.0])))
      0.1438

    References:
      Kullback and Leibler, "On Information and Sufficiency", Ann. Math. Stat. 22 (1951).
    """
    names = ("log_predictions", "targets")
    return total(_kl_term(*_dense(names, log_predictions, targets, axis, where, (0.0, 1.0))))


@compiled("axis")
def kl_divergence_with_log_targets(
    log_predictions: ArrayLike, log_targets: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> Array:
    r"""Kullback-Leibler divergence of targets from predictions, both as log-probabilities.

    .. math:: \sum_k e^{l_k} (l_k - \log q_k)

    with derivatives -t by log q and t (l - log q + 1) by the log-target l, t being exp(l); where l is -inf everything
    is 0. A class with log q = -inf < l makes it +inf. The inputs are not normalised, as in `kl_divergence`. Masks are
    as in `categorical_cross_entropy`.

    Args:
      log_predictions: log q, floating point.
      log_targets: l = log t, floating point, of the same shape or one that broadcasts to it.
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as log_predictions).

    Returns:
      One value per row in nats, of the batch shape: float32 for half precision, else the wider of the two dtypes.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> q, t = jnp.array([0.25, 0.75]), jnp.array([0.5, 0.5])
      >>> print(jaxce.kl_divergence_with_log_targets(jnp.log(q), jnp.log(t)))
      0.1438

    References:
      Kullback and Leibler, "On Information and Sufficiency", Ann. Math. Stat. 22 (1951).
    """
    names = ("log_predictions", "log_targets")
    return total(_log_target_term(*_dense(names, log_predictions, log_targets, axis, where, (0.0, 0.0))))


@compiled("axis")
def generalized_kl_divergence(
    log_predictions: ArrayLike, targets: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> Array:
    r"""Kullback-Leibler divergence of targets and predictions that need not sum to 1.

    .. math:: \sum_k t_k (\log t_k - \log q_k) - t_k + q_k, \qquad 0 \log 0 = 0

    Never negative, and 0 exactly where the two agree: for nearly equal numbers each term is formed as (t - q)^2 / (t +
    q) times a series, in which nothing cancels. Derivatives: q - t by log q and log(t / q) by the target, -inf at t = 0
    < q and 0 where t = q = 0. A class with q = 0 < t makes it +inf. Masks are as in `categorical_cross_entropy`.

    Args:
      log_predictions: log q, floating point.
      targets: t >= 0, of the same shape or one that broadcasts to it: floating point, or with as many axes integers or
        booleans.
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as log_predictions).

    Returns:
      One value per row in nats, of the batch shape: float32 for half precision, else the wider of the two dtypes.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.generalized_kl_divergence(jnp.log(jnp.array([0.5, 2.0])), jnp.array([1.0, 2.0])))
      0.1931

    References:
      Csiszar, "Why Least Squares and Maximum Entropy?", Ann. Stat. 19 (1991).
    """
    names = ("log_predictions", "targets")
    terms = _generalized_kl_term(*_dense(names, log_predictions, targets, axis, where, (0.0, 1.0)))
    return total(terms)


@compiled("axis")
def nll(log_probs: ArrayLike, labels: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> Array:
    r"""Negative log-likelihood of integer labels under log-probabilities: the entry that the label names, negated.

    .. math:: -\log q_y

    with derivative -1 at the label and 0 elsewhere; +inf for log q = -inf. The log-probabilities are taken as they are:
    logits want `softmax_cross_entropy_with_integer_labels`. A label outside [0, K) gives NaN, in value and gradient,
    and the label of a masked class +inf. Masks are as in `categorical_cross_entropy`.

    Args:
      log_probs: log q, floating point.
      labels: class numbers y, integer, of the batch shape.
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as log_probs).

    Returns:
      One value per row in nats, of the batch shape: float32 for half precision, else the wider of the two dtypes.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> log_probs = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.4, 0.5]]))
      >>> print(jaxce.nll(log_probs, jnp.array([1, -1]), where=jnp.array([True, False])))
      [1.6094 0. ]

    References:
      Good, "Rational Decisions", JRSS B 14 (1952).
    """
    return 0 - _pick("log_probs", log_probs, labels, axis, where, -jnp.inf, 0.0)
