"""Entropies and divergences, of probabilities and of logits.

Arguments stand in mathematical order. Probabilities are taken as they are: they need not sum to one, and nothing is
clipped or renormalised. Divergences are sums of terms p log(p/q) - p + q, each of them >= 0 and each computed without
cancellation, so two distributions that differ in their last digits still have a divergence with all of its own.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxce import _checks, _numerics
from jaxce._checks import Axis, compiled
from jaxce._numerics import Pair


def _classes(
    function: str, axis: Axis, where: ArrayLike | None, fill: float, **arguments: ArrayLike
) -> tuple[Array, ...]:
    """The arguments in their common dtype, classes last, with ``fill`` wherever ``where`` is False."""
    arrays = [_checks.floating(function, name, value) for name, value in arguments.items()]
    (first, shape), *_ = [(name, array.shape) for name, array in zip(arguments, arrays, strict=True)]
    for name, array in zip(arguments, arrays, strict=True):
        _checks.same_shape(function, name, array, shape, f"the shape of {first}")
    class_axes = _checks.axes(function, axis, len(shape))
    rows, entries = _checks.where_mask(function, where, shape, class_axes)
    result = tuple(_checks.classes_last(a, class_axes) for a in _checks.upcast(*arrays))
    if rows is not None:
        entries = jnp.broadcast_to(rows[..., None], result[0].shape)
    if entries is None:
        return result
    return tuple(jnp.where(entries, a, jnp.full_like(a, fill)) for a in result)


# ---------------------------------------------------------------------------------------------------- probabilities


@compiled("base")
def surprisal(p: ArrayLike, *, base: float | None = None) -> Array:
    """Surprisal (self-information) of an event of probability p: -log p.

    Args:
      p: probabilities, any shape.
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      -log p, elementwise: +inf at 0, where a subnormal number counts as 0. Right to 0.6 ulp.

    >>> import jaxce
    >>> print(jaxce.surprisal(0.2))
    1.6094
    >>> print(jaxce.surprisal(0.775, base=2))
    0.3677

    Source: C. E. Shannon, A mathematical theory of communication, 1948.
    """
    log_base = _checks.log_base("surprisal", base)
    (array,) = _checks.upcast(_checks.floating("surprisal", "p", p))
    return _numerics.in_units(_numerics.negate(_numerics.log_pair(array)), log_base)


@compiled("axis", "base")
def entropy(p: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, base: float | None = None) -> Array:
    """Shannon entropy: -sum_k p_k log p_k, with 0 log 0 = 0.

    Args:
      p: probabilities of the classes, which lie along ``axis``. They are not normalised.
      axis: the class axis, or several.
      where: which entries take part, broadcastable to p; a mask of the batch shape means whole rows.
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per example, p's shape without ``axis``; 0 for a row with nothing left. Right to 1 ulp at any number of
      classes. A subnormal probability counts as 0 on the CPU. The gradient is -(1 + log p), +inf at p = 0 and 0 in
      entries that don't take part.

    >>> import jax.numpy as jnp
    >>> import jaxce
    >>> print(jaxce.entropy(jnp.array([[0.5, 0.5], [1.0, 0.0]]), base=2))
    [1. 0.]

    Source: C. E. Shannon, A mathematical theory of communication, 1948.
    """
    log_base = _checks.log_base("entropy", base)
    (array,) = _classes("entropy", axis, where, 0, p=p)
    return _numerics.in_units(_numerics.sum_pairs(*_numerics.neg_x_log_x(array)), log_base)


@compiled("axis", "base")
def cross_entropy(
    p: ArrayLike, q: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, base: float | None = None
) -> Array:
    """Cross-entropy of q relative to p: -sum_k p_k log q_k.

    A term with p_k = 0 is 0, also where q_k = 0; a term with q_k = 0 < p_k is +inf.

    Args:
      p: probabilities of the classes, which lie along ``axis``: the truth.
      q: probabilities of the same shape: the model. Neither is normalised.
      axis: the class axis, or several.
      where: which entries take part, broadcastable to p; a mask of the batch shape means whole rows.
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per example, p's shape without ``axis``; 0 for a row with nothing left. Right to 1 ulp. A subnormal
      probability counts as 0 on the CPU. The gradient is -log q for p and -p/q for q, both 0 where p = q = 0.

    >>> import jax.numpy as jnp
    >>> import jaxce
    >>> print(jaxce.cross_entropy(jnp.array([0.0, 1.0, 0.0]), jnp.array([0.2, 0.7, 0.1])))
    0.3567

    Source: T. M. Cover and J. A. Thomas, Elements of Information Theory, 2006, section 2.3: H(p) + D(p||q).
    """
    log_base = _checks.log_base("cross_entropy", base)
    a, b = _classes("cross_entropy", axis, where, 0, p=p, q=q)
    return _numerics.in_units(_numerics.sum_pairs(*_numerics.neg_x_log_y(a, b)), log_base)


@compiled("axis", "base")
def relative_entropy(
    p: ArrayLike, q: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, base: float | None = None
) -> Array:
    """Relative entropy (Kullback-Leibler divergence): sum_k p_k log(p_k / q_k) - p_k + q_k.

    Where p and q sum to one this is sum_k p_k log(p_k / q_k). Where they don't it is the generalised divergence, which
    is 0 for p = q only, and never negative: probabilities that sum to one up to rounding lose nothing by that.

    The term is q_k at p_k = 0, +inf at q_k = 0 < p_k, and 0 where both are 0.

    Args:
      p: probabilities of the classes, which lie along ``axis``.
      q: probabilities of the same shape.
      axis: the class axis, or several.
      where: which entries take part, broadcastable to p; a mask of the batch shape means whole rows.
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per example, p's shape without ``axis``; 0 for a row with nothing left. Right to 1 ulp, near-equal pairs
      included. A subnormal probability counts as 0 on the CPU. The gradient is log(p/q) for p (-inf at p = 0 < q) and
      1 - p/q for q, both 0 where p = q = 0.

    >>> import jax.numpy as jnp
    >>> import jaxce
    >>> print(jaxce.relative_entropy(jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75])))
    0.1438

    Source: I. Csiszar, Why least squares and maximum entropy?, 1991 (the generalised form).
    """
    log_base = _checks.log_base("relative_entropy", base)
    a, b = _classes("relative_entropy", axis, where, 0, p=p, q=q)
    return _numerics.in_units(_numerics.sum_pairs(*_numerics.bregman(a, b, jnp.zeros_like(b))), log_base)


@compiled("axis", "base")
def jensen_shannon_divergence(
    p: ArrayLike, q: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, base: float | None = None
) -> Array:
    """Jensen-Shannon divergence: (D(p||m) + D(q||m)) / 2 with m = (p + q) / 2 and D the `relative_entropy`.

    Symmetric, finite, 0 for p = q only, and at most log 2 for distributions.

    Args:
      p: probabilities of the classes, which lie along ``axis``.
      q: probabilities of the same shape.
      axis: the class axis, or several.
      where: which entries take part, broadcastable to p; a mask of the batch shape means whole rows.
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per example, p's shape without ``axis``; 0 for a row with nothing left. Right to 1 ulp, near-equal pairs
      included. A subnormal probability counts as 0 on the CPU. The gradient is log(p/m) / 2 for p, log(q/m) / 2 for q.

    >>> import jax.numpy as jnp
    >>> import jaxce
    >>> print(jaxce.jensen_shannon_divergence(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), base=2))
    1.0

    Source: J. Lin, Divergence measures based on the Shannon entropy, 1991.
    """
    log_base = _checks.log_base("jensen_shannon_divergence", base)
    a, b = _classes("jensen_shannon_divergence", axis, where, 0, p=p, q=q)
    return _numerics.in_units(_numerics.sum_pairs(*_numerics.jensen_shannon(a, b)), log_base)


def _marginals(joint: Array) -> tuple[Pair, Pair]:
    """The product of the marginals over the total, [..., X, Y], and the total, [...]."""
    zero = jnp.zeros_like(joint)
    x = _numerics.sum_pairs(joint, zero)
    y = _numerics.sum_pairs(jnp.swapaxes(joint, -1, -2), jnp.swapaxes(zero, -1, -2))
    total = _numerics.sum_pairs(*x)
    by = total[0][..., None]
    share = _numerics.divide(x, (jnp.where(by == 0, jnp.ones_like(by), by), total[1][..., None]))
    rows, columns = (share[0][..., None], share[1][..., None]), (y[0][..., None, :], y[1][..., None, :])
    return _numerics.multiply(rows, columns), total


@jax.custom_jvp
def _mutual_information(joint: Array) -> Pair:
    # (1/T) sum_xy b(p_xy, p_x p_y / T): the relative entropy of the table divided by its total T
    product, total = _marginals(joint)
    hi, lo = _numerics.sum_pairs(*_numerics.bregman(joint, *product))
    value = _numerics.sum_pairs(hi, lo)
    empty = total[0] == 0
    result = _numerics.divide(value, (jnp.where(empty, jnp.ones_like(total[0]), total[0]), total[1]))
    return _numerics.select(empty, _numerics.single(jnp.zeros_like(total[0])), result)


@_mutual_information.defjvp
def _mutual_information_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Pair, Pair]:
    # dI = sum_xy (log(p_xy T / (p_x p_y)) - I) dp_xy / T
    (joint,), (tangent,) = primals, tangents
    value = _mutual_information(joint)
    product, _ = lax.stop_gradient(_marginals(joint))
    x, y = jnp.sum(joint, axis=-1, keepdims=True), jnp.sum(joint, axis=-2, keepdims=True)
    total = jnp.sum(x, axis=-2, keepdims=True)
    total = jnp.where(total == 0, jnp.ones_like(total), total)
    plain = x / total * y
    # the value of the accurate product with the derivative of the plain one
    q = product[0] + (plain - lax.stop_gradient(plain))
    information = value[0] + value[1]
    slope = (_numerics.log_ratio(joint, q, product[1]) - information[..., None, None]) / total
    out = jnp.sum(_numerics.scale(slope, tangent), axis=(-2, -1))
    return value, (out, jnp.zeros_like(out))


@compiled("axis", "base")
def mutual_information(joint: ArrayLike, axis: Axis = (-2, -1), *, base: float | None = None) -> Array:
    """Mutual information of two variables: sum_xy p_xy log(p_xy / (p_x p_y)), from their joint distribution.

    That is the `relative_entropy` between the joint table and the product of its marginals. The table is divided by its
    total, so that counts will do as well as probabilities.

    Args:
      joint: probabilities or counts joint[..., x, y], >= 0.
      axis: the two axes of the table.
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per table, joint's shape without ``axis``; never negative, 0 for independent variables, 0 for a table of
      zeros or without entries. Right to 2 ulp, nearly independent variables included. The gradient is
      (log(p_xy / (p_x p_y)) - value) / total, -inf where p_xy = 0 but neither marginal is.

    >>> import jax.numpy as jnp
    >>> import jaxce
    >>> print(jaxce.mutual_information(jnp.array([[0.5, 0.0], [0.0, 0.5]]), base=2))
    1.0

    Source: T. M. Cover and J. A. Thomas, Elements of Information Theory, 2006, section 2.3.
    """
    log_base = _checks.log_base("mutual_information", base)
    (array,) = _checks.upcast(_checks.floating("mutual_information", "joint", joint))
    pair = _checks.axes("mutual_information", axis, array.ndim)
    if len(pair) != 2:
        raise ValueError(f"mutual_information: axis must name two axes, got {axis!r}")
    return _numerics.in_units(_mutual_information(jnp.moveaxis(array, pair, (-2, -1))), log_base)


@compiled("axis", "window_length", "method", "base")
def differential_entropy(
    samples: ArrayLike,
    axis: int = -1,
    *,
    window_length: int | None = None,
    method: str = "auto",
    base: float | None = None,
) -> Array:
    """Differential entropy of a continuous distribution, estimated from samples of it.

    All estimators are means of log spacings x_(i+m) - x_(i-m) of the sorted samples, m the window length; with n samples
    ``scipy.stats.differential_entropy`` gives the same numbers.

    Args:
      samples: n samples along ``axis``.
      axis: the axis of the samples.
      window_length: m, 1 <= m < n/2; None for the integer nearest to sqrt(n).
      method: "vasicek", "van es", "ebrahimi", "correa", or "auto": van Es up to 10 samples, Ebrahimi up to 1000 and
        Vasicek above.
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per sample set, samples' shape without ``axis``. Where so many samples are equal that a spacing is 0 the
      estimate is -inf. Differentiable in the samples.

    >>> import jax.numpy as jnp
    >>> import jaxce
    >>> print(jaxce.differential_entropy(jnp.linspace(0.0, 1.0, 101)))
    0.0134

    Source: H. A. Noughabi, Entropy estimation using numerical methods, 2015, and the papers that it names.
    """
    log_base = _checks.log_base("differential_entropy", base)
    (array,) = _checks.upcast(_checks.floating("differential_entropy", "samples", samples))
    given = _checks.axes("differential_entropy", axis, array.ndim)
    if len(given) != 1:
        raise ValueError(f"differential_entropy: axis must name one axis, got {axis!r}")
    x = jnp.sort(jnp.moveaxis(array, given[0], -1), axis=-1)
    n = x.shape[-1]
    m = math.floor(math.sqrt(n) + 0.5) if window_length is None else window_length
    if not isinstance(m, int) or not 2 <= 2 * m < n:
        raise ValueError(
            f"differential_entropy: window_length must be an integer of at least 1 and less than half of the {n} samples,"
            f" got {m!r}"
        )
    if method == "auto":
        method = "van es" if n <= 10 else "ebrahimi" if n <= 1000 else "vasicek"

    # x_i is the first sample for i < 1 and the last for i > n
    ends = [(0, 0)] * (x.ndim - 1) + [(m, m)]
    padded = jnp.pad(x, ends, mode="edge")
    i = jnp.arange(1, n + 1)
    if method == "vasicek":
        value = jnp.mean(jnp.log(n / (2 * m) * (padded[..., 2 * m :] - padded[..., : -2 * m])), axis=-1)
    elif method == "van es":
        constant = math.fsum(1 / k for k in range(m, n + 1)) + math.log(m) - math.log(n + 1)
        value = jnp.mean(jnp.log((n + 1) / m * (x[..., m:] - x[..., :-m])), axis=-1) + constant
    elif method == "ebrahimi":
        # fewer spacings fit in near the ends
        c = (1 + jnp.minimum(jnp.minimum(i - 1, n - i), m).astype(x.dtype) / m) * m
        spacings = padded[..., 2 * m :] - padded[..., : -2 * m]
        value = jnp.mean(jnp.log(n * spacings / jnp.broadcast_to(c, spacings.shape)), axis=-1)
    elif method == "correa":
        # slope of the line through the 2m + 1 samples around each
        j = jnp.arange(-m, m + 1)
        around = padded[..., i[:, None] + (j + m - 1)[None, :]]
        away = around - jnp.mean(around, axis=-1, keepdims=True)
        steps = jnp.broadcast_to(j.astype(x.dtype), away.shape)
        value = -jnp.mean(jnp.log(jnp.sum(away * steps, axis=-1) / (n * jnp.sum(away * away, axis=-1))), axis=-1)
    else:
        raise ValueError(
            f'differential_entropy: method must be "auto", "vasicek", "van es", "ebrahimi" or "correa", got {method!r}'
        )
    return value if log_base is None else value / log_base


# ---------------------------------------------------------------------------------------------------- logits


def _gaps(x: Array) -> tuple[Array, Pair]:
    """Which classes are there, and each logit less the largest, exactly; 0 for classes that aren't."""
    there = x != -jnp.inf
    top = jnp.max(x, axis=-1, keepdims=True, initial=-jnp.inf)
    safe = jnp.where(there, x, jnp.broadcast_to(top, x.shape))
    hi, lo = _numerics.two_sum(safe, -jnp.broadcast_to(top, x.shape))
    lowest = float(jnp.finfo(x.dtype).min) / 8
    far = hi < lowest
    gap = jnp.where(far, jnp.full_like(hi, lowest), hi), jnp.where(far, jnp.zeros_like(lo), lo)
    return there, _numerics.select(there, gap, _numerics.single(jnp.zeros_like(x)))


def _log_normalizer(there: Array, gap: Pair) -> Pair:
    """log sum exp of the gaps, one per row."""
    zero = _numerics.single(jnp.zeros_like(gap[0]))
    hi, lo = _numerics.sum_pairs(*_numerics.select(there, _numerics.exp_pair(gap), zero))
    hi = jnp.where(hi == 0, jnp.ones_like(hi), hi)
    return _numerics.log_of_pair((hi, lo))


def _last(a: Pair, shape: tuple[int, ...]) -> Pair:
    """One pair per row, for all of its classes."""
    return jnp.broadcast_to(a[0][..., None], shape), jnp.broadcast_to(a[1][..., None], shape)


def _log_ratios(x_p: Array, x_q: Array) -> tuple[Array, Array, Pair, Pair, Pair]:
    """(p there, q there, log p, log q, delta = log p - log q), the last three as pairs and 0 where not all are there.

    With u = x_p - x_q less that difference at q's most probable class, delta = u - M where M = log sum_k q_k exp(u_k).
    For near-equal distributions this is log1p(sum q expm1(u)), with nothing lost; an error in M, common to all classes,
    has an effect on a divergence only as its square. Otherwise delta is the difference of the logarithms.
    """
    there_p, gap_p = _gaps(x_p)
    there_q, gap_q = _gaps(x_q)
    shape = x_p.shape
    log_p = _numerics.add(gap_p, _numerics.negate(_last(_log_normalizer(there_p, gap_p), shape)))
    log_q = _numerics.add(gap_q, _numerics.negate(_last(_log_normalizer(there_q, gap_q), shape)))
    both = there_p & there_q
    zero = _numerics.single(jnp.zeros_like(x_p))

    u = _numerics.add(gap_p, _numerics.negate(gap_q))
    anchor = jnp.argmax(jnp.where(both, gap_q[0], jnp.full_like(x_q, -jnp.inf)), axis=-1, keepdims=True)
    at = [jnp.broadcast_to(jnp.take_along_axis(v, anchor, axis=-1), shape) for v in u]
    u = _numerics.select(both, _numerics.add(u, (-at[0], -at[1])), zero)
    q = jnp.where(there_q, _numerics.exp_pair(log_q)[0], zero[0])
    small = u[0] < 1
    change = _numerics.expm1_pair(_numerics.select(small, u, zero))
    moved = _numerics.exp_pair(_numerics.add(log_q, u))[0]
    change = jnp.where(small, q * (change[0] + change[1]), moved - q)
    change = jnp.where(both, change, -q)
    total, total_lo = _numerics.sum_pairs(change, zero[0])
    near = jnp.sum(jnp.abs(change), axis=-1) < 0.1
    m = _numerics.log1p(jnp.where(near, total + total_lo, jnp.zeros_like(total)))
    delta_near = _numerics.add(u, (jnp.broadcast_to(-m[..., None], shape), zero[0]))
    delta_far = _numerics.add(log_p, _numerics.negate(log_q))
    delta = _numerics.select(jnp.broadcast_to(near[..., None], shape), delta_near, delta_far)
    return there_p, there_q, log_p, log_q, _numerics.select(both, delta, zero)


def _scaled_probabilities(log_p: Pair, log_q: Pair, delta: Pair) -> tuple[Array, Pair, Pair, Pair]:
    """k and p / 2^k, q / 2^k, (p - q) / 2^k with the larger of p and q near 2^k, for classes that are in both."""
    i, p = _numerics.exp_scaled(log_p)
    j, q = _numerics.exp_scaled(log_q)
    k = jnp.maximum(i, j)
    lowest = -(2 * jnp.finfo(p[0].dtype).maxexp - 8)
    p = _numerics.scale_pair(p, jnp.maximum(i - k, lowest))
    q = _numerics.scale_pair(q, jnp.maximum(j - k, lowest))
    close = jnp.abs(delta[0]) < 0.5
    e = _numerics.expm1_pair(_numerics.select(close, delta, _numerics.single(jnp.zeros_like(delta[0]))))
    difference = _numerics.select(close, _numerics.multiply(q, e), _numerics.add(p, _numerics.negate(q)))
    return k, _numerics.select(close, _numerics.add(q, difference), p), q, difference


@jax.custom_jvp
def _compare(x_p: Array, x_q: Array) -> tuple[Array, Array, Array, Array]:
    """softmax p, softmax q, p - q and log(p/q); the last finite, hugely negative or positive where a class isn't there."""
    there_p, there_q, log_p, log_q, delta = _log_ratios(x_p, x_q)
    k, p, q, difference = _scaled_probabilities(log_p, log_q, delta)
    zero = jnp.zeros_like(x_p)
    one_p = jnp.where(there_p, sum(_numerics.exp_pair(log_p)), zero)
    one_q = jnp.where(there_q, sum(_numerics.exp_pair(log_q)), zero)
    both = there_p & there_q
    huge = jnp.full_like(x_p, float(jnp.finfo(x_p.dtype).max) / 8)
    ratio = jnp.where(both, delta[0] + delta[1], jnp.where(there_p, huge, jnp.where(there_q, -huge, zero)))
    return one_p, one_q, jnp.where(both, sum(_numerics.scale_pair(difference, k)), one_p - one_q), ratio


@_compare.defjvp
def _compare_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[tuple[Array, Array, Array, Array], tuple[Array, Array, Array, Array]]:
    p, q, difference, ratio = _compare(*primals)
    huge = float(jnp.finfo(p.dtype).max) / 16
    centred = []
    for weight, x, tangent in zip((p, q), primals, tangents, strict=True):
        there = x != -jnp.inf
        t = jnp.where(there, tangent, jnp.zeros_like(tangent))
        centred.append(jnp.where(there, t - jnp.sum(weight * t, axis=-1, keepdims=True), jnp.zeros_like(t)))
    dp, dq = p * centred[0], q * centred[1]
    dratio = jnp.where(jnp.abs(ratio) < huge, centred[0] - centred[1], jnp.zeros_like(ratio))
    return (p, q, difference, ratio), (dp, dq, dp - dq, dratio)


@jax.custom_jvp
def _relative_entropy(x_p: Array, x_q: Array) -> Pair:
    there_p, there_q, log_p, log_q, delta = _log_ratios(x_p, x_q)
    k, p, q, difference = _scaled_probabilities(log_p, log_q, delta)
    term = _numerics.scale_pair(_numerics.bregman_pair(p, q, difference, delta), k)
    zero, infinity = (_numerics.single(jnp.full_like(x_p, v)) for v in (0.0, jnp.inf))
    only_q = _numerics.select(there_q, _numerics.exp_pair(log_q), zero)
    term = _numerics.select(there_p, _numerics.select(there_q, term, infinity), only_q)
    term = _numerics.select(jnp.broadcast_to(jnp.any(there_p, axis=-1, keepdims=True), x_p.shape), term, zero)
    return _numerics.sum_pairs(*term)


@_relative_entropy.defjvp
def _relative_entropy_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Pair, Pair]:
    # d/dx_p = p (log(p/q) - D), d/dx_q = q - p
    value = _relative_entropy(*primals)
    p, _, difference, ratio = _compare(*primals)
    divergence = (value[0] + value[1])[..., None]
    slope = jnp.where(p == 0, jnp.zeros_like(p), p * (ratio - divergence))
    terms = _numerics.scale(slope, tangents[0]) - difference * tangents[1]
    tangent = jnp.sum(terms, axis=-1)
    return value, (tangent, jnp.zeros_like(tangent))


@compiled("axis", "base")
def relative_entropy_with_logits(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    base: float | None = None,
) -> Array:
    """Relative entropy (Kullback-Leibler divergence) D(p||q) of p = softmax(p_logits) from q = softmax(q_logits).

    A logit of -inf is a class that isn't there: the term is 0 where p's is, and +inf where only q's is.

    Args:
      p_logits: logits of the classes, which lie along ``axis``.
      q_logits: logits of the same shape.
      axis: the class axis, or several.
      where: which entries take part, broadcastable to p_logits; a mask of the batch shape means whole rows.
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per example, p_logits' shape without ``axis``; never negative; 0 for a row with nothing left in p. Right
      to 2 ulp, near-equal logits with a large offset included. The gradient is p (log(p/q) - D) for p_logits and q - p
      for q_logits.

    >>> import jax.numpy as jnp
    >>> import jaxce
    >>> print(jaxce.relative_entropy_with_logits(jnp.array([0.0, 0.0]), jnp.array([0.0, 1.0])))
    0.1201

    Source: S. Kullback and R. A. Leibler, On information and sufficiency, 1951.
    """
    name = "relative_entropy_with_logits"
    log_base = _checks.log_base(name, base)
    a, b = _classes(name, axis, where, -math.inf, p_logits=p_logits, q_logits=q_logits)
    return _numerics.in_units(_relative_entropy(a, b), log_base)


@jax.custom_jvp
def _jensen_shannon(x_p: Array, x_q: Array) -> Pair:
    # with 2m = p + q, b(p, m) = b(2p, 2m) / 2, and 2p - 2m = p - q
    there_p, there_q, log_p, log_q, delta = _log_ratios(x_p, x_q)
    k, p, q, difference = _scaled_probabilities(log_p, log_q, delta)
    twice = _numerics.add(p, q)
    terms = []
    for part, sign in ((p, 1), (q, -1)):
        doubled = 2 * part[0], 2 * part[1]
        ratio = _numerics.log_ratio_of_pairs(doubled, twice)
        terms.append(_numerics.bregman_pair(doubled, twice, (sign * difference[0], sign * difference[1]), ratio))
    hi, lo = _numerics.scale_pair(_numerics.add(*terms), k)
    term = hi / 4, lo / 4
    zero = _numerics.single(jnp.zeros_like(x_p))
    # where only one is there, b(p, m) + b(0, m) = p log 2
    alone = _numerics.select(there_p, _numerics.exp_pair(log_p), _numerics.exp_pair(log_q))
    half_log_2 = _numerics.constant(math.log(2) / 2, x_p.dtype)
    alone = _numerics.multiply(alone, (jnp.full_like(x_p, half_log_2[0]), jnp.full_like(x_p, half_log_2[1])))
    term = _numerics.select(there_p & there_q, term, _numerics.select(there_p | there_q, alone, zero))
    rows = jnp.any(there_p, axis=-1, keepdims=True) & jnp.any(there_q, axis=-1, keepdims=True)
    return _numerics.sum_pairs(*_numerics.select(jnp.broadcast_to(rows, x_p.shape), term, zero))


@_jensen_shannon.defjvp
def _jensen_shannon_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Pair, Pair]:
    # d/dx_p = p (a - sum p a) / 2 with a = log(p/m) = -log((1 + exp(-delta)) / 2), and the same for q with -delta
    value = _jensen_shannon(*primals)
    p, q, _, delta = _compare(*primals)
    less = jnp.where(delta >= 0, -delta, delta)
    g = _numerics.log1p(_numerics.expm1(less) / 2)
    a = jnp.where(delta >= 0, -g, delta - g)
    b = jnp.where(delta >= 0, -delta - g, -g)
    total = jnp.zeros_like(value[0])
    for weight, logs, tangent in ((p, a, tangents[0]), (q, b, tangents[1])):
        logs = jnp.where(weight == 0, jnp.zeros_like(logs), logs)
        slope = weight * (logs - jnp.sum(weight * logs, axis=-1, keepdims=True)) / 2
        total = total + jnp.sum(slope * tangent, axis=-1)
    return value, (total, jnp.zeros_like(total))


@compiled("axis", "base")
def jensen_shannon_divergence_with_logits(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    base: float | None = None,
) -> Array:
    """Jensen-Shannon divergence of softmax(p_logits) and softmax(q_logits); see `jensen_shannon_divergence`.

    A logit of -inf is a class that isn't there.

    Args:
      p_logits: logits of the classes, which lie along ``axis``.
      q_logits: logits of the same shape.
      axis: the class axis, or several.
      where: which entries take part, broadcastable to p_logits; a mask of the batch shape means whole rows.
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per example, p_logits' shape without ``axis``; never negative; 0 for a row with nothing left in one of
      the two. Right to 2 ulp, near-equal logits with a large offset included.

    >>> import jax.numpy as jnp
    >>> import jaxce
    >>> print(jaxce.jensen_shannon_divergence_with_logits(jnp.array([0.0, 0.0]), jnp.array([0.0, 1.0])))
    0.0277

    Source: J. Lin, Divergence measures based on the Shannon entropy, 1991.
    """
    name = "jensen_shannon_divergence_with_logits"
    log_base = _checks.log_base(name, base)
    a, b = _classes(name, axis, where, -math.inf, p_logits=p_logits, q_logits=q_logits)
    return _numerics.in_units(_jensen_shannon(a, b), log_base)
