"""What one pass over the classes of logits gives."""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar, overload

import jax.numpy as jnp
from jax import Array

from jaxce._checks import ArrayLike, Axis, compiled
from jaxce._inputs import read_logits
from jaxce._logits import AnyLogits
from jaxce._measures import ENTROPY, LOG_NORMALIZER, NLL, log_probabilities, measure

_Nll = TypeVar("_Nll", bound=Array | None)


class SoftmaxStatistics(NamedTuple, Generic[_Nll]):
    """The result of `softmax_statistics`: nll, log_normalizer, entropy and prediction, one number of each per example."""

    nll: _Nll
    """-log softmax(logits)[label] in nats; None where no labels were given."""
    log_normalizer: Array
    """logsumexp(logits); -inf where no class takes part."""
    entropy: Array
    """The entropy of softmax(logits) in nats."""
    prediction: Array
    """The class with the largest logit, the first of several (int32); 0 if any is NaN or no class takes part."""


@overload
def softmax_statistics(
    logits: AnyLogits, labels: None = None, axis: Axis = -1, where: ArrayLike | None = None
) -> SoftmaxStatistics[None]: ...
@overload
def softmax_statistics(
    logits: AnyLogits, labels: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> SoftmaxStatistics[Array]: ...
@compiled("axis")
def softmax_statistics(
    logits: AnyLogits,
    labels: ArrayLike | None = None,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> SoftmaxStatistics[Any]:
    r"""Negative log-likelihood, log-normalizer, entropy and prediction of each example, from one pass over the classes.

    With the maximum :math:`m`, the gaps :math:`g_k = m - x_k \ge 0` and :math:`L = \log \sum_k e^{-g_k} \ge 0`,

    .. math::
        \mathrm{nll} = g_y + L, \quad \mathrm{log\_normalizer} = m + L, \quad
        \mathrm{entropy} = \sum_k p_k g_k + L, \quad \mathrm{prediction} = \arg\max_k x_k .

    All but the prediction have derivatives of any order, in forward and in reverse mode. Under ``jax.jit`` results that you
    don't use are not computed. See `softmax_cross_entropy_with_integer_labels` for labels, masks and dtypes.

    Args:
      logits: scores, of shape [..., classes], an array, `LinearLogits` or `ShardedLogits`.
      labels: integer classes, of the shape of the logits without the class axes, or None.
      axis: the class axis, or several; labels and predictions then count the classes of the flattened axes.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).

    Returns:
      `SoftmaxStatistics` with four arrays of the batch shape.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> nll, log_normalizer, entropy, prediction = jaxce.softmax_statistics(jnp.array([1.0, 2.0, 3.0]), jnp.array(2))
      >>> print(f"{nll:.4f} {log_normalizer:.4f} {entropy:.4f} {prediction}")
      0.4076 3.4076 0.8324 2

    References:
      Milakov and Gimelshein, Online normalizer calculation for softmax, https://arxiv.org/abs/1805.02867.
    """
    z = read_logits("logits", logits, axis, where)
    measures = [LOG_NORMALIZER, ENTROPY]
    if labels is not None:
        z = z.with_labels(labels)
        measures.append(NLL)
    (log_normalizer, entropy, *nll), (state,) = measure((z,), tuple(measures), prediction=True)
    return SoftmaxStatistics(nll[0] if nll else None, log_normalizer, entropy, state.predicted)


@compiled("axis")
def logsumexp(logits: AnyLogits, axis: Axis = -1, where: ArrayLike | None = None) -> Array:
    r"""The logarithm of a sum of exponentials, :math:`\log \sum_k e^{x_k} = m + L`.

    Here :math:`m` is the maximum and :math:`L = \log(1 + \sum_{k \ne \text{top}} e^{x_k - m})`, so a result near a
    maximum of 0 has all its digits; where a negative maximum nearly cancels L, it is accurate to a few ulp of the larger
    of the two. A row with no class, all masked or -inf, gives -inf, with gradient 0. The gradient is softmax(x).

    Args:
      logits: an array of floating-point numbers, `LinearLogits` or `ShardedLogits`.
      axis: the axis to sum over, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).

    Returns:
      An array without the class axes, in float32 for half-precision logits.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.logsumexp(jnp.array([0.0, -50.0])))
      1.92875e-22

    References:
      Blanchard, Higham and Higham, Accurately computing the log-sum-exp and softmax functions, IMAJNA 41, 2021.
    """
    return measure((read_logits("logits", logits, axis, where),), (LOG_NORMALIZER,))[0][0]


@compiled("axis")
def log_softmax(logits: AnyLogits, axis: Axis = -1, where: ArrayLike | None = None) -> Array:
    r"""Logarithms of the softmax probabilities, :math:`\log p_k = x_k - \operatorname{logsumexp}(x)`, never positive.

    A class that is masked, or whose logit is -inf, has the log-probability -inf. The derivative of :math:`\log p_k` by
    :math:`x_j` is :math:`[j = k] - p_j` there too, and 0 by a masked logit, so that it is minus that of the loss with this
    label. A row with no class left has gradient 0.

    Args:
      logits: scores, of shape [..., classes]; `LinearLogits` are computed whole, as the result is as large.
      axis: the class axis, or several, over which all probabilities together sum to 1.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).

    Returns:
      An array of the shape of the logits, in float32 for half-precision logits.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.log_softmax(jnp.array([0.0, 20.0])))
      [-2.0000e+01 -2.0611537e-09]

    References:
      Blanchard, Higham and Higham, Accurately computing the log-sum-exp and softmax functions, IMAJNA 41, 2021.
    """
    z = read_logits("logits", logits, axis, where)
    batch = [a for a in range(len(z.shape)) if a not in z.axes]
    order = [*batch, *z.axes]  # of the axes now
    values = log_probabilities(z).reshape([z.shape[a] for a in order])
    return jnp.transpose(values, [order.index(a) for a in range(len(order))])
