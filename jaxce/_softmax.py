"""Losses between the softmax of logits and labels, one per example."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxce import _checks
from jaxce._checks import FINITE, NOT_NEGATIVE, NUMBERS, SHARE, SHARES, ArrayLike, Axis, compiled
from jaxce._inputs import Logits, read_logits
from jaxce._logits import AnyLogits
from jaxce._measures import GIVEN, LOG_NORMALIZER, NLL, UNIFORM, WEIGHT, Class, Measure, measure, replaced, sum_of
from jaxce._rules import custom_jvp, times, weigh
from jaxce._terms import log1p, polynomial


@compiled("axis", label_smoothing=SHARES, z_loss=NUMBERS)
def softmax_cross_entropy_with_integer_labels(
    logits: AnyLogits,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
) -> Array:
    r"""Cross-entropy between integer labels and the softmax of logits, in nats.

    For the label :math:`y`, with :math:`g_k = \max_j x_j - x_k` and :math:`L = \log \sum_k e^{-g_k}`,

    .. math:: \ell = -\log \frac{e^{x_y}}{\sum_k e^{x_k}} = g_y + L .

    Both terms are at least 0 and neither is a difference, so that a loss of 1e-20 comes out as 1e-20. With label smoothing
    :math:`\alpha`, class weights :math:`w` and z-loss :math:`\zeta`, over the n classes that take part in the row,

    .. math:: (1 - \alpha)\, w_y \ell_y + \frac{\alpha}{n} \sum_k w_k \ell_k + \zeta \operatorname{logsumexp}(x)^2 .

    A class is absent if it is masked or its logit is -inf: a label there has loss +inf, and smoothing passes it over. A
    row with no class left, masked or not, has loss 0 and gradient 0, whatever else it holds. A label that is not a
    class, in a row that counts, gives NaN in value and gradient: so for a padding label of -100 give
    ``where=labels != -100``. A logit of +inf has its limit: the loss is 0 if it is the label's and +inf if not, and
    several share the probability.

    Values are right to 4 ulp, plus eps/2 per nat between the maximum and the classes that dominate the result, which is
    what the last bit of the logits means; gradients as much, of :math:`p_k`, or of :math:`1 - p_y` at the label. Terms
    below the smallest normal number are flushed to zero by XLA:CPU.

    Args:
      logits: scores, of shape [..., classes], an array in any floating-point dtype, `LinearLogits` or `ShardedLogits`.
      labels: integer classes, of the shape of the logits without the class axes.
      axis: the class axis, or several; labels then count the classes of the flattened axes.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).
      label_smoothing: the share in [0, 1] that is spread evenly over the classes; a number, or one for each row.
      class_weights: one number per class, by which its part of the loss is multiplied.
      z_loss: the factor of the squared log-normalizer; a number, or one for each row.

    Returns:
      Losses of the batch shape, float32 for half-precision logits and the logits' dtype otherwise. Optax gives half
      precision back, wraps the label -1, and lets a masked label have a negative loss; otherwise the two agree.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> logits = jnp.array([[2.0, -1.0, 0.5], [0.0, 40.0, 0.0], [1.0, 1.0, 1.0]])
      >>> labels = jnp.array([0, 1, -100])
      >>> print(jaxce.softmax_cross_entropy_with_integer_labels(logits, labels, where=labels != -100))
      [2.4131e-01 8.4967e-18 0.0000e+00]

    References:
      Goodfellow, Bengio and Courville, Deep Learning, 2016, section 6.2.2.3; for label smoothing Szegedy et al.,
      https://arxiv.org/abs/1512.00567, section 7; for z-loss Chowdhery et al., https://arxiv.org/abs/2204.02311, section 5.
    """
    z = read_logits("logits", logits, axis, where)
    z = z.with_labels(labels).with_weights(class_weights)
    return _modified(z, NLL, label_smoothing, z_loss)


@compiled("axis", label_smoothing=SHARES, z_loss=NUMBERS)
def softmax_cross_entropy(
    logits: AnyLogits,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
) -> Array:
    r"""Cross-entropy between label distributions and the softmax of logits, in nats.

    For labels :math:`t`, one number per class, usually a distribution,

    .. math:: \ell = -\sum_k t_k \log \frac{e^{x_k}}{\sum_j e^{x_j}} = \sum_k t_k (g_k + L)

    with the gaps and :math:`L` of `softmax_cross_entropy_with_integer_labels`, where a class with :math:`t_k = 0` adds
    nothing, also if it is absent. Modifiers, masks, dtypes and accuracy are that function's, with
    :math:`t` in place of the label; smoothing replaces :math:`t` by :math:`(1 - \alpha) t + \alpha / n`. Differentiable by
    the labels too: the derivative by :math:`t_k` is :math:`-\log p_k`.

    Args:
      logits: scores, of shape [..., classes], an array, `LinearLogits` or `ShardedLogits`.
      labels: numbers that broadcast to the same shape, or booleans or integers of it; not normalised.
      axis: the class axis, or several that together hold the classes.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).
      label_smoothing: the share in [0, 1] of the labels that is spread evenly over the classes; a number, or one for each
        row.
      class_weights: one number per class, by which its part of the loss is multiplied.
      z_loss: the factor of the squared log-normalizer; a number, or one for each row.

    Returns:
      Losses of the batch shape, in the wider dtype of logits and labels and at least float32.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> logits = jnp.array([[2.0, -1.0, 0.5], [0.0, -jnp.inf, 0.0]])
      >>> labels = jnp.array([[0.7, 0.1, 0.2], [0.5, 0.0, 0.5]])
      >>> print(jaxce.softmax_cross_entropy(logits, labels))
      [0.84131 0.69315 ]

    References:
      Murphy, Probabilistic Machine Learning: An Introduction, 2022, sections 6.1 and 10.3.
    """
    given = _checks.array("labels", labels)
    z = read_logits("logits", logits, axis, where, _wide(given))
    z = z.with_targets(given).with_weights(class_weights)
    return _modified(z, GIVEN, label_smoothing, z_loss)


@compiled("axis", label_smoothing=SHARES, z_loss=NUMBERS)
def softmax_cross_entropy_with_sparse_labels(
    logits: AnyLogits,
    labels: ArrayLike,
    weights: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
) -> Array:
    r"""Cross-entropy between a few labels for each row, each with its weight, and the softmax of logits, in nats.

    .. math:: \ell = \sum_{j=1}^{k} w_j \left( -\log p_{y_j} \right), \qquad p = \operatorname{softmax}(x) .

    So the loss of several right answers, or of a teacher's top k classes with the rest of its probability left out,
    needs no array as large as the logits. Labels that are equal add up. Modifiers, masks, dtypes and accuracy are those
    of `softmax_cross_entropy_with_integer_labels`, with each label in place of the one; a label of weight 0 takes no
    part, also if it is no class, so that rows may have fewer than k. Differentiable by the weights too:
    :math:`-\log p_{y_j}`.

    One pass over the logits compares each with all k labels; for more than about sixteen, a sum of losses of some of
    the labels each, or dense labels, may take less time.

    Args:
      logits: scores, of shape [..., classes], an array, `LinearLogits` or `ShardedLogits`.
      labels: integer classes, of shape [..., k].
      weights: numbers of the shape of the labels; not normalised.
      axis: the class axis, or several; labels then count the classes of the flattened axes.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).
      label_smoothing: the share in [0, 1] of the weights that is spread evenly over the classes; a number, or one for
        each row.
      class_weights: one number per class, by which its part of the loss is multiplied.
      z_loss: the factor of the squared log-normalizer; a number, or one for each row.

    Returns:
      Losses of the batch shape, float32 for half precision, else the wider of the dtypes of logits and weights.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> logits = jnp.array([[2.0, -1.0, 0.5], [0.0, 40.0, 0.0]])
      >>> labels, weights = jnp.array([[0, 2], [1, -1]]), jnp.array([[0.7, 0.3], [1.0, 0.0]])
      >>> print(jaxce.softmax_cross_entropy_with_sparse_labels(logits, labels, weights))
      [6.9131e-01 8.4967e-18]

    References:
      Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531.
    """
    shares = _checks.array("weights", weights)
    z = read_logits("logits", logits, axis, where, _wide(shares))
    z = z.with_shares(labels, shares).with_weights(class_weights)
    return _modified(z, GIVEN, label_smoothing, z_loss)


def _wide(numbers: Array) -> Array:
    """Numbers that may be wider than the logits: those that aren't integers."""
    return numbers if jnp.issubdtype(numbers.dtype, jnp.floating) else jnp.zeros((), jnp.float32)


safe_softmax_cross_entropy = softmax_cross_entropy
"""Optax's name for the cross-entropy that allows logits of -inf; here it is the same function, which always does."""


@compiled("axis", gamma=NOT_NEGATIVE)
def softmax_focal_loss(
    logits: AnyLogits,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    gamma: ArrayLike = 2.0,
    class_weights: ArrayLike | None = None,
) -> Array:
    r"""Focal loss: cross-entropy that down-weights examples that are already classified well.

    .. math:: \ell = \sum_k w_k t_k (1 - p_k)^\gamma (-\log p_k)

    with p the softmax of the logits; for an integer label :math:`y` it is the term of :math:`y`. The class weights w,
    the paper's :math:`\alpha`, are 1 where none are given. :math:`\gamma = 0` is cross-entropy. Masks, dtypes and bad
    labels are as in `softmax_cross_entropy_with_integer_labels`.

    Args:
      logits: scores, of shape [..., classes], an array, `LinearLogits` or `ShardedLogits`.
      labels: integer classes of the batch shape, or one number per class, as those of `softmax_cross_entropy`.
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).
      gamma: the exponent, at least 0.
      class_weights: one number per class, by which its part of the loss is multiplied.

    Returns:
      Losses of the batch shape.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.softmax_focal_loss(jnp.array([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]]), jnp.array([0, 1])))
      [0.01109 0.48827]

    References:
      Lin et al., Focal Loss for Dense Object Detection, https://arxiv.org/abs/1708.02002.
    """
    return _by_label_dtype(logits, labels, axis, where, class_weights, _focal, gamma)


@compiled("axis", epsilon=FINITE)
def poly_loss_cross_entropy(
    logits: AnyLogits,
    labels: ArrayLike,
    *,
    epsilon: ArrayLike = 2.0,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
) -> Array:
    r"""Poly-1 loss: cross-entropy with a different first coefficient in its expansion in :math:`1 - p`.

    .. math:: \ell = \sum_k w_k t_k \left( -\log p_k + \epsilon (1 - p_k) \right)

    with p the softmax of the logits; for an integer label :math:`y` it is the term of :math:`y`. The class weights w
    are 1 where none are given. :math:`\epsilon = 0` is cross-entropy. Masks, dtypes and bad labels are as in
    `softmax_cross_entropy_with_integer_labels`.

    Args:
      logits: scores, of shape [..., classes], an array, `LinearLogits` or `ShardedLogits`.
      labels: integer classes of the batch shape, or one number per class, as those of `softmax_cross_entropy`.
      epsilon: the weight of the added term.
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).
      class_weights: one number per class, by which its part of the loss is multiplied.

    Returns:
      Losses of the batch shape.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.poly_loss_cross_entropy(jnp.array([[2.0, -1.0, 0.5]]), jnp.array([[0.7, 0.1, 0.2]])))
      [1.66354]

    References:
      Leng et al., PolyLoss, https://arxiv.org/abs/2204.12511.
    """
    return _by_label_dtype(logits, labels, axis, where, class_weights, _poly, epsilon)


@compiled("axis", alpha=SHARE)
def smooth_labels(labels: ArrayLike, alpha: ArrayLike, *, axis: Axis = -1, where: ArrayLike | None = None) -> Array:
    r"""Labels mixed with the uniform distribution, :math:`(1 - \alpha) t_k + \alpha / n` over the n classes that take part.

    A masked class gets 0, and a row with no class left is 0. Optax gives masked classes a share that is then lost.

    Args:
      labels: floating point or booleans of shape [..., classes], such as one-hot vectors.
      alpha: the share of the uniform distribution, in [0, 1].
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the labels).

    Returns:
      An array of the shape of the labels, in float32 for half-precision labels.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.smooth_labels(jnp.array([1.0, 0.0, 0.0, 0.0]), 0.1, where=jnp.array([True, True, False, True])))
      [0.93333 0.03333 0. 0.03333]

    References:
      Szegedy et al., Rethinking the Inception Architecture, https://arxiv.org/abs/1512.00567, section 7.
    """
    given = _checks.array("labels", labels)
    if jnp.issubdtype(given.dtype, jnp.integer):  # most likely one class for each row
        got, hint = _checks.describe(given), "give jax.nn.one_hot({labels}, classes)"
        raise _checks.ArgumentTypeError(f"labels must be floating-point or boolean, got {got}", hint)
    (t,) = _checks.upcast(_checks.real("labels", given))
    class_axes = _checks.axes(axis, t.ndim)
    share = jnp.zeros((), t.dtype) if alpha is None else jnp.asarray(alpha).astype(t.dtype)
    keep = jnp.ones(t.shape, bool) if where is None else _checks.where_entries(where, t.shape, class_axes)
    count = jnp.sum(keep, class_axes, dtype=t.dtype, keepdims=True)
    return jnp.where(keep, (1 - share) * jnp.where(keep, t, 0) + share / jnp.maximum(count, 1), 0)


def _modified(z: Logits, loss: Measure, label_smoothing: Any, z_loss: Any) -> Array:
    """A loss with its modifiers, of which those that are None make no difference."""
    weighted = loss is NLL and "weights" in z.inputs
    asked = {WEIGHT: weighted, UNIFORM: label_smoothing is not None, LOG_NORMALIZER: z_loss is not None}
    measures = loss, *(m for m, wanted in asked.items() if wanted)
    found, (state,) = measure((z,), measures)
    values = dict(zip(measures, found, strict=True))
    total = values[loss]

    def there(numbers: Array) -> Array:
        return jnp.where(state.present, numbers, 0) if numbers.ndim else numbers

    if weighted:
        total = weigh(values[WEIGHT], total)
    if label_smoothing is not None:
        share = there(z.of_rows("label_smoothing", label_smoothing))
        total = weigh(1 - share, total) + weigh(share, values[UNIFORM])
    if z_loss is not None:
        log_normalizer = jnp.where(state.present, values[LOG_NORMALIZER], 0)
        total += weigh(there(z.of_rows("z_loss", z_loss)), weigh(log_normalizer, log_normalizer))
    return total


Loss = Callable[[Array, Array], Array]
"""A function of -log p and an option."""


def _by_label_dtype(
    logits: AnyLogits,
    labels: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    class_weights: ArrayLike | None,
    loss: Loss,
    option: Any,
) -> Array:
    """sum_k w_k t_k loss(-log p_k), or the label's term where labels are classes; cross-entropy if the option is None."""
    given = _checks.array("labels", labels)
    z = read_logits("logits", logits, axis, where, _wide(given)).with_weights(class_weights)
    option = None if option is None else jnp.asarray(option).astype(z.dtype)
    if jnp.issubdtype(given.dtype, jnp.integer) and given.shape != z.shape:
        z = z.with_labels(given)
        (nll, *weight), _ = measure((z,), (NLL,) if class_weights is None else (NLL, WEIGHT))
        value = nll if option is None else loss(nll, option)
        return weigh(weight[0], value) if weight else value
    z = z.with_targets(given)
    if option is None:
        return measure((z,), (GIVEN,))[0][0]
    return measure((z,), (_of_targets(loss),), option)[0][0]


@functools.cache
def _of_targets(loss: Loss) -> Measure:
    """sum_k t_k loss(-log p_k)."""

    def term(c: Class) -> Array:
        cost = jnp.where((c.given != 0) | c.there, -c.log_p, 0)
        return times(c.given, loss(cost, c.options[0]))

    return sum_of(term)


def _not_p(nll: Array) -> Array:
    """1 - exp(-nll). That exp is also its derivative; expm1's, expm1 + 1, would have lost what a small p is."""
    return replaced(-jnp.expm1(-nll), 1 - jnp.exp(-nll))


def _poly(nll: Array, epsilon: Array) -> Array:
    return nll + epsilon * _not_p(nll)


def _focal(nll: Array, gamma: Array) -> Array:
    """(1 - p)^gamma nll, with its limits at 0 and infinity selected so that the derivatives have theirs.

    The derivatives are those of (1 - p)^(gamma + 1) nll / (1 - p), of which the third is the first to divide by (1 - p)^2.
    """
    inside = (nll > 0) & (nll < jnp.inf)
    safe = jnp.where(inside, nll, 1)
    gamma = jnp.broadcast_to(gamma, safe.shape)
    value = replaced(_not_p(safe) ** gamma * safe, _power_of_not_p(0, safe, gamma + 1) * _over_not_p(safe))
    return jnp.where(inside, value, jnp.where(nll == 0, 0, nll))


@partial(custom_jvp, nondiff_argnums=(0,))
def _power_of_not_p(order: int, nll: Array, exponent: Array) -> Array:
    """(1 - p)^exponent, for 0 < nll < infinity; of an order above 0 its derivative by the exponent."""
    log_not_p = jnp.where(nll < 1, jnp.log(-jnp.expm1(-nll)), log1p(-jnp.exp(-nll)))
    return _not_p(nll) ** exponent * log_not_p**order


def _power_slopes(order: int, nll: Array, exponent: Array) -> tuple[Array, Array]:
    slope = exponent * _power_of_not_p(order, nll, exponent - 1)
    if order:
        slope += order * _power_of_not_p(order - 1, nll, exponent - 1)
    return slope * jnp.exp(-nll), _power_of_not_p(order + 1, nll, exponent)


_power_of_not_p.defslopes(_power_slopes, jnp.multiply)


def _over_not_p(nll: Array) -> Array:
    """nll / (1 - p), for 0 < nll < infinity; of a small one by the series of its inverse."""
    near = nll < 1
    count = 12 if nll.dtype.itemsize == 4 else 20
    inverse = polynomial([(-1) ** k / math.factorial(k + 1) for k in range(count)], jnp.where(near, nll, 0))
    far = jnp.where(near, 1, nll)
    return jnp.where(near, 1 / inverse, far / _not_p(far))
