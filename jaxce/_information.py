"""Entropies and divergences of probabilities.

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


def classes_of(
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
    if result[0].shape[-1] == 0:
        raise ValueError(f"{function}: {first} must have at least one class, got shape {shape}")
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
    (array,) = classes_of("entropy", axis, where, 0, p=p)
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
    a, b = classes_of("cross_entropy", axis, where, 0, p=p, q=q)
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
    a, b = classes_of("relative_entropy", axis, where, 0, p=p, q=q)
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
    a, b = classes_of("jensen_shannon_divergence", axis, where, 0, p=p, q=q)
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
    0.00995

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
