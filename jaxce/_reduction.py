"""From one loss per example to one number: means that stay right with weights, masks, batches and many devices."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxce import _checks
from jaxce._checks import ArrayLike, Axis, AxisName, compiled
from jaxce._rules import alike
from jaxce._terms import ratio


def _weights(losses: Array, weights: ArrayLike) -> Array:
    w = _checks.real("weights", weights, losses.dtype)
    try:
        return jnp.broadcast_to(w, losses.shape)
    except ValueError:
        raise _checks.ArgumentValueError(
            f"weights must have the shape of losses, {losses.shape}, or broadcast to it, got {_checks.describe(w)}",
            f"give {{weights}}.reshape({losses.shape})" if w.size == losses.size else "",
        ) from None


def _ratio(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, and 0 with derivative 0 where the denominator is 0."""
    return ratio(jnp.where(denominator == 0, 0, numerator), denominator)


@compiled("axis", "axis_name")
def weighted_mean(
    losses: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    axis: Axis | None = None,
    normalizer: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Mean of losses, each counting as much as its weight says.

    .. math:: \frac{\sum_i w_i l_i}{\sum_i w_i}, \qquad 0 \text{ where the denominator is } 0

    with derivatives w_i / sum(w) by a loss and (l_i - mean) / sum(w) by a weight, all 0 where the denominator is 0.
    A loss of weight 0 may be NaN or infinite: it is replaced by 0 before anything is multiplied, and reaches neither the
    mean nor the gradient by losses and weights (its own weight has derivative 0, too). Weights may be negative. No losses
    at all have the mean 0.

    But what a NaN was computed from gets a gradient of NaN all the same: 0 times the NaN that is the loss's own
    derivative. Labels of -100 and missing targets make such losses: the mean is right, and the gradient by the logits
    NaN. So pass the mask to the loss as well, which then leaves them out before it computes anything:
    ``weighted_mean(loss(logits, labels, where=counts), counts)`` with ``counts = labels != -100``.

    On many devices (inside ``shard_map``, ``pmap`` or a ``vmap`` with that ``axis_name``) both sums are taken over all
    of them, so that the mean is that of all losses, however unevenly the weights lie. Inside ``shard_map`` with its
    default ``check_vma=True`` the gradient by local losses is w_i / sum(w), as it is on one device. With
    ``check_vma=False``, and in ``pmap`` and ``vmap``, JAX's transpose of a psum is a psum: each device differentiates
    the sum of all devices' (equal) means, and a gradient taken inside is larger by the number of devices. Differentiate
    outside, or divide by it.

    Args:
      losses: floating point, integers or booleans (hits, whose mean is an accuracy), of any shape.
      weights: booleans, integers or floating point, in the shape of losses or one that broadcasts to it.
      axis: over what to take the mean: one axis or several, or None for all.
      normalizer: a total to divide by in place of sum(w), say that of all micro-batches: a number, or one for each
        result. It is not summed over ``axis_name``.
      axis_name: names of mapped axes over which to sum as well.

    Returns:
      The mean, of the shape that is left; half precision is computed and returned in float32.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.weighted_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([3.0, 1.0, 0.0])))
      1.5
      >>> print(jaxce.weighted_mean(jnp.array([[1.0, 3.0], [5.0, 7.0]]), jnp.array([[True], [False]])))
      2.0

    References:
      Hardy, Littlewood and Polya, "Inequalities" (1934), chapter 2.
    """
    x = _checks.real("losses", losses)
    axes = tuple(range(x.ndim)) if axis is None else _checks.axes(axis, x.ndim)
    total: Any
    if weights is None:
        (x,) = _checks.upcast(x)
        total = math.prod(x.shape[a] for a in axes)
    else:
        x, w = alike(*_checks.upcast(x, _weights(*_checks.upcast(x), weights)))
        # A loss without weight still tells its weight's gradient what it would cost to let it in. One that isn't finite
        # is left out before anything is multiplied.
        lost = (w == 0) & ~jnp.isfinite(x)
        w = jnp.where(lost, lax.stop_gradient(w), w)
        x = w * jnp.where(lost, 0, x)
        total = jnp.sum(w, axis=axes)
    numerator = jnp.sum(x, axis=axes)
    if axis_name is not None:
        numerator = lax.psum(numerator, axis_name)
    if normalizer is not None:
        total = _checks.real("normalizer", normalizer, numerator.dtype)
        _checks.scalar_or("normalizer", total, numerator.shape, "the shape of the result")
        numerator, total = _checks.upcast(numerator, total)
    elif axis_name is not None:
        total = lax.psum(total, axis_name)
    return _ratio(numerator, jnp.broadcast_to(jnp.asarray(total, numerator.dtype), numerator.shape))


@compiled("base")
def perplexity(nll: ArrayLike, *, base: float | None = None) -> Array:
    r"""Perplexity: the exponential of the mean loss, the number of equally likely classes with the same uncertainty.

    .. math:: e^{\mathrm{nll}} \quad\text{or}\quad b^{\mathrm{nll}}

    1 for a loss of 0, +inf for +inf and for what is too large. Take the mean first, then this: the mean of perplexities
    is another number.

    Args:
      nll: mean negative log-likelihood, floating point, of any shape.
      base: the base of the logarithm in which nll was measured (2 for bits); None for nats.

    Returns:
      The perplexity, of the same shape; half precision is computed and returned in float32.

    Examples:
      >>> import jaxce
      >>> print(jaxce.perplexity(2.302585), jaxce.perplexity(3.0, base=2))
      10.0000 8.0

    References:
      Jelinek et al., "Perplexity, a measure of the difficulty of speech recognition tasks", JASA 62 (1977).
    """
    x = _checks.floating("nll", nll)
    log_base = _checks.log_base(base)
    (x,) = _checks.upcast(x)
    return jnp.exp(x) if log_base is None else jnp.power(jnp.asarray(base, x.dtype), x)


@compiled()
def bits_per(nll: ArrayLike, count: ArrayLike) -> Array:
    r"""A total loss in nats as bits per unit: per byte, per character, per token, whatever was counted.

    .. math:: \frac{\mathrm{nll}}{\mathrm{count} \cdot \log 2}

    0 nats over 0 units are 0 bits, with derivative 0; any other total over 0 units is infinite.

    Args:
      nll: total (not mean) negative log-likelihood in nats, floating point, of any shape.
      count: how many units it is for, floating point or integer: one number, or one for each nll.

    Returns:
      Bits per unit, in the shape of nll; half precision is computed and returned in float32.

    Examples:
      >>> import jaxce
      >>> print(jaxce.bits_per(1000.0, 512))
      2.8178

    References:
      Shannon, "A Mathematical Theory of Communication", Bell System Technical Journal 27 (1948).
    """
    x = _checks.floating("nll", nll)
    n = _checks.real("count", count, _checks.compute_dtype(x))
    _checks.scalar_or("count", n, x.shape, "the shape of nll")
    x, n = _checks.upcast(x, n)
    n = jnp.broadcast_to(n, x.shape)
    empty = (x == 0) & (n == 0)
    return jnp.where(empty, 0, x) / (jnp.where(empty, 1, n) * math.log(2))
