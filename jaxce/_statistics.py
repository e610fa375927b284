"""From logits to statistics: the door that every function of logits shares, and what one pass over the classes gives."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxce import _checks, _rows
from jaxce._checks import Axis, compiled


class Logits(NamedTuple):
    """Logits past the door: classes on the last axis, masked entries absent (-inf), and the pass over their classes."""

    x: Array  # half precision stays as it is, and is upcast where it is read
    row: _rows.Row
    axes: tuple[int, ...]
    entries: Array | None
    shape: tuple[int, ...]

    def integer_labels(self, function: str, labels: ArrayLike) -> Array:
        """``labels`` as classes, one for each row, in an integer dtype that can count the classes."""
        array = _checks.integer(function, "labels", labels)
        array = array.astype(jnp.int64 if array.dtype.itemsize == 8 else jnp.int32)
        _checks.same_shape(
            function, "labels", array, self.x.shape[:-1], "the shape of the logits without their class axes"
        )
        return array

    def dense_labels(self, function: str, labels: Array) -> Array:
        """``labels`` as numbers for each class, on the last axis, 0 where an entry is masked."""
        _checks.same_shape(function, "labels", labels, self.shape, "the shape of the logits")
        targets = _checks.classes_last(labels, self.axes).astype(self.row.maximum.dtype)
        return targets if self.entries is None else jnp.where(self.entries, targets, 0)

    def restore(self, values: Array) -> Array:
        """Values for each class, with the class axes put back where they were."""
        batch = [a for a in range(len(self.shape)) if a not in self.axes]
        order = [*batch, *self.axes]
        return jnp.transpose(
            values.reshape([self.shape[a] for a in order]), [order.index(a) for a in range(len(order))]
        )


def read_logits(
    function: str, argument: str, logits: ArrayLike, axis: Axis, where: ArrayLike | None, *others: Array
) -> Logits:
    """``logits`` past the door. They are computed with in the widest dtype of them, ``others`` and float32."""
    array = _checks.floating(function, argument, logits)
    axes = _checks.axes(function, axis, array.ndim)
    rows, entries = _checks.where_mask(function, where, array.shape, axes)
    x = _checks.classes_last(array, axes)
    if x.shape[-1] == 0:
        raise ValueError(f"{function}: {argument} must have at least one class, got shape {array.shape}")
    if _checks.compute_dtype(x, *others) != _checks.compute_dtype(x):
        x = x.astype(_checks.compute_dtype(x, *others))
    if entries is not None:
        x = jnp.where(entries, x, -jnp.inf)
    return Logits(x, _rows.row_pass(x, rows), axes, entries, array.shape)


class SoftmaxStatistics(NamedTuple):
    """What `softmax_statistics` knows of each example; a pytree."""

    nll: Array | None
    """-log softmax(logits)[label] in nats; None where no labels were given."""
    log_normalizer: Array
    """logsumexp(logits); -inf where no class takes part."""
    entropy: Array
    """The entropy of softmax(logits) in nats."""
    prediction: Array
    """The class with the largest logit, the first of several (int32)."""


@compiled("axis")
def softmax_statistics(
    logits: ArrayLike, labels: ArrayLike | None = None, axis: Axis = -1, where: ArrayLike | None = None
) -> SoftmaxStatistics:
    r"""Negative log-likelihood, log-normalizer, entropy and prediction of each example, from one pass over the classes.

    With the maximum :math:`m`, the gaps :math:`g_k = m - x_k \ge 0` and :math:`L = \log \sum_k e^{-g_k} \ge 0`,

    .. math::
        \mathrm{nll} = g_y + L, \quad \mathrm{log\_normalizer} = m + L, \quad
        \mathrm{entropy} = \sum_k p_k g_k + L, \quad \mathrm{prediction} = \arg\max_k x_k .

    All but the prediction are differentiable, to any order and in both modes. What isn't used isn't computed, under
    ``jax.jit``. See `softmax_cross_entropy_with_integer_labels` for labels, masks and dtypes.

    Args:
      logits: scores, of shape [..., classes].
      labels: integer classes, of the shape of the logits without the class axes, or None.
      axis: the class axis, or several; labels and predictions then count the classes of the flattened axes.
      where: which rows (a mask of the batch shape) or which entries of the logits take part.

    Returns:
      `SoftmaxStatistics` with four arrays of the batch shape.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> nll, log_normalizer, entropy, prediction = jaxce.softmax_statistics(jnp.array([1.0, 2.0, 3.0]), jnp.array(2))
      >>> print(f"{nll:.4f} {log_normalizer:.4f} {entropy:.4f} {prediction}")
      0.4076 3.4076 0.8324 2
    """
    z = read_logits("softmax_statistics", "logits", logits, axis, where)
    nll = None if labels is None else _rows.label_nll(z.x, z.row, z.integer_labels("softmax_statistics", labels))
    return SoftmaxStatistics(nll, _log_normalizer(z), _rows.entropy(z.x, z.row), jnp.where(z.row.present, z.row.top, 0))


def _log_normalizer(z: Logits) -> Array:
    value = _rows.log_normalizer(z.x, z.row)
    return value if z.row.counts is None else jnp.where(z.row.counts, value, -jnp.inf)


@compiled("axis")
def logsumexp(logits: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> Array:
    r"""The logarithm of a sum of exponentials, :math:`\log \sum_k e^{x_k} = m + L`.

    Here :math:`m` is the maximum and :math:`L = \log(1 + \sum_{k \ne \text{top}} e^{x_k - m})`, so a result near a maximum
    of 0 has all its digits; where a negative maximum nearly cancels L, it is right to an ulp of these two. A row with no
    class, all masked or -inf, gives -inf, with gradient 0. The gradient is softmax(x).

    Args:
      logits: an array of floating-point numbers.
      axis: the axis to sum over, or several.
      where: which rows (a mask of the batch shape) or which entries take part.

    Returns:
      An array without the class axes, in float32 for half-precision logits.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.logsumexp(jnp.array([0.0, -50.0])))
      1.92875e-22
    """
    return _log_normalizer(read_logits("logsumexp", "logits", logits, axis, where))


@compiled("axis")
def log_softmax(logits: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> Array:
    r"""Logarithms of the softmax probabilities, :math:`\log p_k = -(g_k + L)`, never positive.

    A class that is masked, or whose logit is -inf, has log-probability -inf, and gradient 0 if it is masked.

    Args:
      logits: scores, of shape [..., classes].
      axis: the class axis, or several, over which all probabilities together sum to 1.
      where: which rows (a mask of the batch shape) or which entries take part.

    Returns:
      An array of the shape of the logits, in float32 for half-precision logits.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.log_softmax(jnp.array([0.0, 20.0])))
      [-2.0000e+01 -2.0611537e-09]
    """
    z = read_logits("log_softmax", "logits", logits, axis, where)
    values = _rows.log_probabilities(z.x, z.row)
    return z.restore(values if z.row.counts is None else jnp.where(z.row.counts[..., None], values, -jnp.inf))
