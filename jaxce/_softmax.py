"""Losses between the softmax of logits and labels, one per example."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxce import _checks
from jaxce._checks import Axis, compiled
from jaxce._logits import AnyLogits, LinearLogits
from jaxce._mesh import on_each_device
from jaxce._statistics import BlockLogits, Logits, Measures, read_logits


@compiled("axis", "label_smoothing", "z_loss")
@on_each_device("batch")
def softmax_cross_entropy_with_integer_labels(
    logits: AnyLogits,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: float = 0.0,
    class_weights: ArrayLike | None = None,
    z_loss: float = 0.0,
) -> Array:
    r"""Cross-entropy between integer labels and the softmax of logits, in nats.

    For the label :math:`y`, with :math:`g_k = \max_j x_j - x_k` and :math:`L = \log \sum_k e^{-g_k}`,

    .. math:: \ell = -\log \frac{e^{x_y}}{\sum_k e^{x_k}} = g_y + L .

    Both terms are at least 0 and neither is a difference, so that a loss of 1e-20 comes out as 1e-20. With label smoothing
    :math:`\alpha`, class weights :math:`w` and z-loss :math:`\zeta`, over the n classes that take part in the row,

    .. math:: (1 - \alpha)\, w_y \ell_y + \frac{\alpha}{n} \sum_k w_k \ell_k + \zeta \operatorname{logsumexp}(x)^2 .

    A class is absent if it is masked or its logit is -inf: a label there has loss +inf, and smoothing passes it over. A row
    with no class left, masked or not, has loss 0 and gradient 0, whatever else it holds. A label that is not a class, in a
    row that counts, gives NaN in value and gradient: so for a padding label of -100 give ``where=labels != -100``. An
    infinite logit counts as the largest finite number.

    Measured on CPU: values within 4 ulp against 60 digits, and within 5.5 in random rows (XLA's exp is up to
    1.1 ulp off, and the sum as much again); gradients within 4 ulp of :math:`p_k`, or of :math:`1 - p_y` at the label.
    Terms below the smallest normal number are flushed to zero by XLA:CPU.

    Args:
      logits: scores, of shape [..., classes], an array in any floating-point dtype, `LinearLogits` or `ShardedLogits`.
      labels: integer classes, of the shape of the logits without the class axes.
      axis: the class axis, or several; labels then count the classes of the flattened axes.
      where: which rows take part (a mask of the batch shape), or which entries (one that broadcasts to the logits' shape).
      label_smoothing: the share in [0, 1] that is spread evenly over the classes.
      class_weights: one number per class, by which its part of the loss is multiplied.
      z_loss: the factor of the squared log-normalizer.

    Returns:
      Losses of the batch shape, float32 for half-precision logits and the logits' dtype otherwise. Optax gives half
      precision back, wraps the label -1, and lets a masked label have a negative loss; otherwise the two agree.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> logits = jnp.array([[2.0, -1.0, 0.5], [0.0, 40.0, 0.0], [1.0, 1.0, 1.0]])
      >>> labels = jnp.array([0, 1, -100])
      >>> print(jaxce.softmax_cross_entropy_with_integer_labels(logits, labels, where=labels != -100))
      [2.4131e-01 8.4967e-18 0.0000e+00]

    Reference:
      Goodfellow, Bengio and Courville, Deep Learning, 2016, section 6.2.2.3; for label smoothing Szegedy et al.,
      https://arxiv.org/abs/1512.00567, section 7; for z-loss Chowdhery et al., https://arxiv.org/abs/2204.02311, section 5.
    """
    name = "softmax_cross_entropy_with_integer_labels"
    smoothing = _smoothing(name, "label_smoothing", label_smoothing)
    z = read_logits(name, "logits", logits, axis, where)
    weights = _class_weights(name, class_weights, z)
    known = z.measure(labels=z.integer_labels(name, labels), weights=weights, smoothing=smoothing)
    return known.loss + _z_loss(name, z_loss, known)


@compiled("axis", "label_smoothing", "z_loss")
@on_each_device("batch")
def softmax_cross_entropy(
    logits: AnyLogits,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: float = 0.0,
    class_weights: ArrayLike | None = None,
    z_loss: float = 0.0,
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
      labels: numbers of the same shape; not broadcast and not normalised.
      axis: the class axis, or several that together hold the classes.
      where: which rows take part (a mask of the batch shape), or which entries (one that broadcasts to the logits' shape).
      label_smoothing: the share in [0, 1] of the labels that is spread evenly over the classes.
      class_weights: one number per class, by which its part of the loss is multiplied.
      z_loss: the factor of the squared log-normalizer.

    Returns:
      Losses of the batch shape, in the wider dtype of logits and labels and at least float32.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> logits = jnp.array([[2.0, -1.0, 0.5], [0.0, -jnp.inf, 0.0]])
      >>> labels = jnp.array([[0.7, 0.1, 0.2], [0.5, 0.0, 0.5]])
      >>> print(jaxce.softmax_cross_entropy(logits, labels))
      [0.84131 0.69315 ]

    Reference:
      Murphy, Probabilistic Machine Learning: An Introduction, 2022, sections 6.1 and 10.3.
    """
    name = "softmax_cross_entropy"
    smoothing = _smoothing(name, "label_smoothing", label_smoothing)
    given = _checks.floating(name, "labels", labels)
    z = read_logits(name, "logits", logits, axis, where, given)
    weights = _class_weights(name, class_weights, z)
    known = z.measure(targets=z.dense_labels(name, given), weights=weights, smoothing=smoothing)
    return known.loss + _z_loss(name, z_loss, known)


safe_softmax_cross_entropy = softmax_cross_entropy
"""Optax's name for the cross-entropy that allows logits of -inf; here it is the same function, which always does."""


@compiled("axis", "gamma")
@on_each_device("batch")
def softmax_focal_loss(
    logits: AnyLogits,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    gamma: float = 2.0,
) -> Array:
    r"""Focal loss: cross-entropy in which examples count less the better they are classified.

    .. math:: \ell = \sum_k t_k (1 - p_k)^\gamma (-\log p_k)

    with p the softmax of the logits; for an integer label :math:`y` it is the term of :math:`y`. :math:`\gamma = 0` is
    cross-entropy. Masks, dtypes and bad labels are as in `softmax_cross_entropy_with_integer_labels`.

    Args:
      logits: scores, of shape [..., classes], an array, `LinearLogits` or `ShardedLogits`.
      labels: integer classes of the batch shape, or numbers of the shape of the logits.
      axis: the class axis, or several.
      where: which rows (a mask of the batch shape) or which entries of the logits take part.
      gamma: the exponent, at least 0.

    Returns:
      Losses of the batch shape.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.softmax_focal_loss(jnp.array([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]]), jnp.array([0, 1])))
      [0.01109 0.48827]

    Reference:
      Lin et al., Focal Loss for Dense Object Detection, https://arxiv.org/abs/1708.02002.
    """
    name = "softmax_focal_loss"
    gamma = _checks.number(name, "gamma", gamma, "a number of at least 0", lambda g: 0 <= g < float("inf"))
    return _by_label_dtype(name, logits, labels, axis, where, lambda nll: _focal(nll, gamma))


@compiled("axis", "epsilon")
@on_each_device("batch")
def poly_loss_cross_entropy(
    logits: AnyLogits,
    labels: ArrayLike,
    *,
    epsilon: float = 2.0,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Poly-1 loss: cross-entropy with a different first coefficient in its expansion in :math:`1 - p`.

    .. math:: \ell = \sum_k t_k \left( -\log p_k + \epsilon (1 - p_k) \right)

    with p the softmax of the logits; for an integer label :math:`y` it is the term of :math:`y`. :math:`\epsilon = 0` is
    cross-entropy. Masks, dtypes and bad labels are as in `softmax_cross_entropy_with_integer_labels`.

    Args:
      logits: scores, of shape [..., classes], an array, `LinearLogits` or `ShardedLogits`.
      labels: integer classes of the batch shape, or numbers of the shape of the logits.
      epsilon: the weight of the added term.
      axis: the class axis, or several.
      where: which rows (a mask of the batch shape) or which entries of the logits take part.

    Returns:
      Losses of the batch shape.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.poly_loss_cross_entropy(jnp.array([[2.0, -1.0, 0.5]]), jnp.array([[0.7, 0.1, 0.2]])))
      [1.66354]

    Reference:
      Leng et al., PolyLoss, https://arxiv.org/abs/2204.12511.
    """
    name = "poly_loss_cross_entropy"
    epsilon = _checks.number(name, "epsilon", epsilon, "a finite number")
    return _by_label_dtype(name, logits, labels, axis, where, lambda nll: nll - epsilon * jnp.expm1(-nll))


@compiled("alpha", "axis")
def smooth_labels(labels: ArrayLike, alpha: float, *, axis: Axis = -1, where: ArrayLike | None = None) -> Array:
    r"""Labels mixed with the uniform distribution, :math:`(1 - \alpha) t_k + \alpha / n` over the n classes that take part.

    A masked class gets 0, and a row with no class left is 0. Optax gives masked classes a share that is then lost.

    Args:
      labels: numbers of shape [..., classes], such as one-hot vectors.
      alpha: the share of the uniform distribution, in [0, 1].
      axis: the class axis, or several.
      where: which rows (a mask of the batch shape) or which entries take part.

    Returns:
      An array of the shape of the labels, in float32 for half-precision labels.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.smooth_labels(jnp.array([1.0, 0.0, 0.0, 0.0]), 0.1, where=jnp.array([True, True, False, True])))
      [0.93333 0.03333 0. 0.03333]

    Reference:
      Szegedy et al., Rethinking the Inception Architecture, https://arxiv.org/abs/1512.00567, section 7.
    """
    name = "smooth_labels"
    alpha = _smoothing(name, "alpha", alpha)
    (t,) = _checks.upcast(_checks.floating(name, "labels", labels))
    class_axes = _checks.axes(name, axis, t.ndim)
    keep = _checks.where_entries(name, where, t.shape, class_axes)
    count = jnp.sum(keep, class_axes, dtype=t.dtype, keepdims=True)
    return jnp.where(keep, (1 - alpha) * t + alpha / jnp.maximum(count, 1), 0)


def _smoothing(function: str, argument: str, value: float) -> float:
    return _checks.number(function, argument, value, "a number in [0, 1]", lambda a: 0 <= a <= 1)


def _class_weights(
    function: str, class_weights: ArrayLike | None, z: Logits | BlockLogits | LinearLogits
) -> Array | None:
    if class_weights is None:
        return None
    weights = _checks.floating(function, "class_weights", class_weights)
    _checks.same_shape(function, "class_weights", weights, (z.classes,), "one number per class")
    return weights.astype(z.dtype)


def _z_loss(function: str, z_loss: float, known: Measures) -> Array | float:
    factor = _checks.number(function, "z_loss", z_loss, "a finite number")
    if not factor:
        return 0.0
    return factor * jnp.where(known.present, known.log_normalizer, 0) ** 2


def _by_label_dtype(
    function: str,
    logits: AnyLogits,
    labels: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    term: Callable[[Array], Array],
) -> Array:
    """sum_k t_k term(-log p_k), or the label's term alone where labels are integers."""
    given = jnp.asarray(labels)
    if jnp.issubdtype(given.dtype, jnp.integer):
        z = read_logits(function, "logits", logits, axis, where)
        return term(z.measure(labels=z.integer_labels(function, given)).loss)
    given = _checks.floating(function, "labels", given)
    z = read_logits(function, "logits", logits, axis, where, given)
    return z.sum_of_terms(z.dense_labels(function, given), term)


def _focal(nll: Array, gamma: float) -> Array:
    """(1 - exp(-nll))^gamma nll, with its limits at 0 and infinity selected so that the derivatives have theirs."""
    if gamma == 0:
        return nll
    inside = (nll > 0) & (nll < jnp.inf)
    safe = jnp.where(inside, nll, 1)
    return jnp.where(nll == 0, 0, jnp.where(inside, (-jnp.expm1(-safe)) ** gamma * safe, nll))
