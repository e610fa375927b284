"""Entropies and divergences, of probabilities and of softmax distributions from their logits.

Arguments stand in mathematical order. Probabilities are taken as they are: they need not sum to one, and nothing is
clipped or renormalised. Divergences are sums of terms p log(p/q) - p + q, each of them >= 0 and each computed without
cancellation, so two distributions that differ in their last digits still have a divergence with all of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxce import _checks, _terms
from jaxce._checks import SHARE, ArrayLike, Axis, compiled
from jaxce._inputs import read_logits
from jaxce._logits import AnyLogits, NotArray
from jaxce._measures import ENTROPY, Class, Measure, Slope, measure, replaced, sum_of
from jaxce._rules import custom_jvp, largest, product


def classes_of(axis: Axis, where: ArrayLike | None, fill: float, **arguments: ArrayLike) -> tuple[Array, ...]:
    """The arguments in the first's shape and their common dtype, classes last, with ``fill`` where ``where`` is False."""
    arrays = [_checks.floating(name, value) for name, value in arguments.items()]
    first, shape = next(iter(arguments)), arrays[0].shape
    arrays = [_checks.dense(n, x, shape, x.dtype, first) for n, x in zip(arguments, arrays, strict=True)]
    class_axes = _checks.axes(axis, len(shape))
    if math.prod(shape[a] for a in class_axes) == 0:
        raise _checks.ArgumentValueError(f"{first} must have at least one class, got shape {shape}")
    upcast = _checks.upcast(*arrays)
    if where is not None:
        keep = _checks.where_entries(where, shape, class_axes)
        upcast = tuple(jnp.where(keep, a, fill) for a in upcast)
    return tuple(_checks.classes_last(a, class_axes) for a in upcast)


def _in_base(nats: Array, log_base: float | None) -> Array:
    """A number of nats in units of log_base nats each: None for nats, log 2 for bits."""
    return nats if log_base is None else nats / log_base


# ---------------------------------------------------------------------------------------------------- probabilities


@compiled("base")
def surprisal(p: ArrayLike, *, base: float | None = None) -> Array:
    """Surprisal (self-information) of an event of probability p: -log p.

    Args:
      p: probabilities, any shape.
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      -log p, elementwise: +inf at 0, where a subnormal number counts as 0. Right to 2 ulp.

    Examples:
      >>> import jaxce
      >>> print(jaxce.surprisal(0.2))
      1.6094
      >>> print(jaxce.surprisal(0.775, base=2))
      0.3677

    References:
      C. E. Shannon, A mathematical theory of communication, 1948.
    """
    log_base = _checks.log_base(base)
    (array,) = _checks.upcast(_checks.floating("p", p))
    return _in_base(_terms.neg_log(array), log_base)


@compiled("axis", "base")
def entropy(p: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, base: float | None = None) -> Array:
    """Shannon entropy: -sum_k p_k log p_k, with 0 log 0 = 0.

    Args:
      p: probabilities of the classes, which lie along ``axis``. They are not normalised.
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as p).
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per example, p's shape without ``axis``; 0 for a row with nothing left. Right to 4 ulp. A subnormal
      probability counts as 0 on the CPU. The gradient is -(1 + log p), +inf at p = 0 and 0 in
      entries that don't take part.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.entropy(jnp.array([[0.5, 0.5], [1.0, 0.0]]), base=2))
      [1. 0.]

    References:
      C. E. Shannon, A mathematical theory of communication, 1948.
    """
    log_base = _checks.log_base(base)
    (array,) = classes_of(axis, where, 0, p=p)
    return _in_base(_terms.total(_terms.neg_x_log_x(array)), log_base)


@compiled("axis", "base")
def cross_entropy(
    p: ArrayLike, q: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, base: float | None = None
) -> Array:
    """Cross-entropy of q relative to p: -sum_k p_k log q_k.

    A term with p_k = 0 is 0, also where q_k = 0; a term with q_k = 0 < p_k is +inf.

    Args:
      p: probabilities of the classes, which lie along ``axis``: the truth.
      q: probabilities that broadcast to that shape: the model. Neither is normalised.
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as p).
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per example, p's shape without ``axis``; 0 for a row with nothing left. Right to 4 ulp. A subnormal
      probability counts as 0 on the CPU. The gradient is -log q for p and -p/q for q, both 0 where p = q = 0.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.cross_entropy(jnp.array([0.0, 1.0, 0.0]), jnp.array([0.2, 0.7, 0.1])))
      0.3567

    References:
      T. M. Cover and J. A. Thomas, Elements of Information Theory, 2006, section 2.3: H(p) + D(p||q).
    """
    log_base = _checks.log_base(base)
    a, b = classes_of(axis, where, 0, p=p, q=q)
    return _in_base(_terms.total(_terms.neg_x_log_y(a, b)), log_base)


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
      q: probabilities that broadcast to that shape.
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as p).
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per example, p's shape without ``axis``; 0 for a row with nothing left. Right to 16 ulp, near-equal pairs
      included. A subnormal probability counts as 0 on the CPU. The gradient is log(p/q) for p (-inf at p = 0 < q) and
      1 - p/q for q, both 0 where p = q = 0.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.relative_entropy(jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75])))
      0.1438

    References:
      I. Csiszar, Why least squares and maximum entropy?, 1991 (the generalised form).
    """
    log_base = _checks.log_base(base)
    a, b = classes_of(axis, where, 0, p=p, q=q)
    return _in_base(jnp.sum(_terms.bregman(a, b), -1), log_base)


@compiled("axis", "base")
def jensen_shannon_divergence(
    p: ArrayLike, q: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, base: float | None = None
) -> Array:
    """Jensen-Shannon divergence: (D(p||m) + D(q||m)) / 2 with m = (p + q) / 2 and D the `relative_entropy`.

    Symmetric, finite, 0 for p = q only, and at most log 2 for distributions.

    Args:
      p: probabilities of the classes, which lie along ``axis``.
      q: probabilities that broadcast to that shape.
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as p).
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per example, p's shape without ``axis``; 0 for a row with nothing left. Right to 16 ulp, near-equal pairs
      included. A subnormal probability counts as 0 on the CPU. The gradient is log(p/m) / 2 for p, log(q/m) / 2 for q.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.jensen_shannon_divergence(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), base=2))
      1.0

    References:
      J. Lin, Divergence measures based on the Shannon entropy, 1991.
    """
    log_base = _checks.log_base(base)
    a, b = classes_of(axis, where, 0, p=p, q=q)
    return _in_base(jnp.sum(_terms.jensen_shannon(a, b), -1), log_base)


def _scaled(x: Array, axes: tuple[int, ...]) -> Array:
    """x divided by a power of two, about the root of its largest magnitude, so that sums and products are in range."""
    root = jnp.sqrt(jnp.max(jnp.abs(lax.stop_gradient(x)), axes, keepdims=True, initial=0))
    power = lax.reduce_precision(root, jnp.finfo(x.dtype).nexp, 0)
    return x / jnp.where(power > 0, power, 1)


def _marginals(joint: Array) -> tuple[Array, Array, Array]:
    """p_x and p_y of each entry, and the total."""
    x, y = jnp.sum(joint, -1, keepdims=True), jnp.sum(joint, -2, keepdims=True)
    total = jnp.sum(x, -2, keepdims=True)
    return jnp.broadcast_to(x, joint.shape), jnp.broadcast_to(y, joint.shape), jnp.broadcast_to(total, joint.shape)


@custom_jvp
def _mutual_information(joint: Array) -> Array:
    x, y, total = _marginals(joint)
    terms = _terms.bregman_to_product(joint, x, y, total)
    return _terms.ratio(jnp.sum(terms, (-2, -1)), jnp.sum(joint, (-2, -1)))


@_mutual_information.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """dI = sum_xy (log(p_xy T / (p_x p_y)) - I) dp_xy / T."""
    (joint,), (tangent,) = primals, tangents
    value = _mutual_information(joint)
    x, y, total = _marginals(joint)
    slope = _terms.ratio(_terms.log_ratio_to_product(joint, x, y, total) - value[..., None, None], total)
    return value, jnp.sum(product(slope, tangent), (-2, -1))


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
      zeros or without entries. Right to 16 ulp in float32, or to 1e-13 if that is more: of nearly independent variables
      the products of the marginals, rounded as they are, leave so much. The gradient is
      (log(p_xy / (p_x p_y)) - value) / total, -inf where p_xy = 0 but neither marginal is.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.mutual_information(jnp.array([[0.5, 0.0], [0.0, 0.5]]), base=2))
      1.0

    References:
      T. M. Cover and J. A. Thomas, Elements of Information Theory, 2006, section 2.3.
    """
    log_base = _checks.log_base(base)
    (array,) = _checks.upcast(_checks.real("joint", joint))
    pair = _checks.axes(axis, array.ndim)
    if len(pair) != 2:
        raise _checks.ArgumentValueError(f"axis must name two axes, got {axis!r}")
    return _in_base(_mutual_information(_scaled(jnp.moveaxis(array, pair, (-2, -1)), (-2, -1))), log_base)


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

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.differential_entropy(jnp.linspace(0.0, 1.0, 101)))
      0.00995

    References:
      H. A. Noughabi, Entropy estimation using numerical methods, 2015, and the papers that it names.
    """
    log_base = _checks.log_base(base)
    (array,) = _checks.upcast(_checks.floating("samples", samples))
    given = _checks.axes(axis, array.ndim)
    if len(given) != 1:
        raise _checks.ArgumentValueError(f"axis must name one axis, got {axis!r}")
    x = jnp.sort(jnp.moveaxis(array, given[0], -1), axis=-1)
    n = x.shape[-1]
    m = math.floor(math.sqrt(n) + 0.5) if window_length is None else window_length
    if not isinstance(m, int | np.integer) or isinstance(m, bool) or not 2 <= 2 * m < n:
        raise _checks.ArgumentValueError(
            f"window_length must be an integer of at least 1 and less than half of the {n} samples, got {m!r}"
        )
    m = int(m)
    if method == "auto":
        method = "van es" if n <= 10 else "ebrahimi" if n <= 1000 else "vasicek"

    # A spacing of samples near the largest number may be too large for one: a quarter of it isn't.
    large = jnp.max(jnp.abs(lax.stop_gradient(x)), -1, keepdims=True) > largest(x) / 4
    x = jnp.where(large, x / 4, x)

    logs, constant = _log_spacings(x, m, method)
    value = jnp.mean(logs, axis=-1) + constant + jnp.where(large[..., 0], math.log(4), 0)
    return _in_base(value, log_base)


def _log_spacings(x: Array, m: int, method: str) -> tuple[Array, float]:
    """The logarithms of whose mean, with a constant, an estimator is made, of sorted samples."""
    n = x.shape[-1]
    # x_i is the first sample for i < 1 and the last for i > n
    padded = jnp.concatenate([*[x[..., :1]] * m, x, *[x[..., -1:]] * m], -1)
    spacings = padded[..., 2 * m :] - padded[..., : -2 * m]
    i = np.arange(1, n + 1)
    if method == "vasicek":
        return -_terms.neg_log(spacings), math.log(n / (2 * m))
    if method == "van es":
        return -_terms.neg_log(x[..., m:] - x[..., :-m]), math.fsum(1 / k for k in range(m, n + 1))
    if method == "ebrahimi":
        # fewer spacings fit in near the ends
        c = m + np.minimum(np.minimum(i - 1, n - i), m)
        return -_terms.neg_log(spacings), math.log(n) - float(np.mean(np.log(c)))
    if method == "correa":
        # slope of the line through the 2m + 1 samples around each, measured in their spacing
        j = np.arange(-m, m + 1)
        around = padded[..., i[:, None] + (j + m - 1)]
        width = lax.stop_gradient(spacings)
        away = _terms.ratio(around - around[..., :1], jnp.broadcast_to(width[..., None], around.shape))
        away -= jnp.mean(away, axis=-1, keepdims=True)
        steps = jnp.broadcast_to(j.astype(x.dtype), away.shape)
        per_step = _terms.ratio(jnp.sum(away * away, axis=-1), jnp.sum(away * steps, axis=-1))
        return -(_terms.neg_log(width) + _terms.neg_log(per_step)), math.log(n)
    raise _checks.ArgumentValueError(
        f'method must be "auto", "vasicek", "van es", "ebrahimi" or "correa", got {method!r}'
    )


# ---------------------------------------------------------------------------------------------------- from logits


def _measure(
    p_logits: AnyLogits,
    q_logits: AnyLogits,
    axis: Axis,
    where: ArrayLike | None,
    *measures: Measure,
    options: tuple[Array, ...] = (),
) -> tuple[Any, tuple[Array, ...]]:
    """The measures, and in which rows of either any class is there."""
    given = {"p_logits": p_logits, "q_logits": q_logits}
    arrays = {n: x if isinstance(x, NotArray) else _checks.floating(n, x) for n, x in given.items()}
    names = [x.axis_name if isinstance(x, NotArray) else None for x in arrays.values()]
    if names[0] != names[1]:
        raise _checks.ArgumentValueError(
            f"q_logits must be sharded over the axis_name of p_logits, {names[0]!r}, got {names[1]!r}"
        )
    p, q = arrays.values()
    if not isinstance(q, NotArray):
        q = arrays["q_logits"] = _checks.dense("q_logits", q, p.shape, q.dtype, "p_logits")
    elif p.shape != q.shape:
        raise _checks.ArgumentValueError(f"q_logits must have the shape of p_logits, {p.shape}, got shape {q.shape}")
    read = tuple(read_logits(n, x, axis, where, p, q) for n, x in arrays.items())
    values, states = measure(read, measures, *(jnp.asarray(o).astype(read[0].dtype) for o in options))
    return values, tuple(state.present for state in states)


def _of(term: Callable[..., Array]) -> Callable[[Class], Array]:
    """A term of logarithms as one of a class."""
    return lambda c: term(c.log_p, c.p, c.log_q, c.q, c.delta)


def _finite(x: Array) -> Array:
    """x, but for infinity the largest number, as of log p - log q: in a row that doesn't count it is multiplied by 0."""
    return jnp.minimum(x, largest(x))


# The log-normalizers are rounded, so that all log p - log q may be off by a number c. Then the sum of p - q, which is 0,
# comes out as 2 c sum_k p q / (p + q). The relative entropy, a sum of p (e^-delta + delta - 1), is off by c times that sum
# and by c^2 / 2, a Jensen-Shannon divergence by a small multiple of c of itself and by c^2 / 8. The squares count only if
# the divergence is as small as they are, and p near q. There the sum of p q / (p + q) is 1/2, and that of p - q is c.
# It is also the sum of p delta less the relative entropy, where these are small.
#
# A weighted Jensen-Shannon divergence is a sum of w p g(log(p/m)) + (1 - w) q g(log(q/m)), g(a) = e^-a + a - 1. With
# d log(p/m) = (1 - w) q / m c, d log(q/m) = -w p / m c and g' = 1 - e^-a it is off by c w (1 - w) times the sum of
# (p - q) (w p + (1 - w) q) / m = p - q, which is 0; and, of a p near q, where log(p/m) is (1 - w) delta and log(q/m) is
# -w delta, by w (1 - w) c^2 / 2. So is its derivative by w, with the derivative of that.

_OFF = Measure(None, _of(_terms.difference_of_logs))  # 0 but for rounding, so it has no derivatives
_DRIFT = Measure(None, lambda c: c.p * c.delta)


def _off(total: Array, drift: Array) -> Array:
    """The sum of p - q, which counts where p is near q."""
    return jnp.where(total < 0.01, drift - total, 0)


_RELATIVE_ENTROPY = sum_of(
    _of(_terms.bregman_of_logs),
    Slope(
        lambda c: c.delta,
        lambda: (lambda total, drift: replaced(_finite(drift), total), (_RELATIVE_ENTROPY, _DRIFT)),
        over_p=True,
    ),
    Slope(
        lambda c: -_of(_terms.difference_of_logs)(c),
        lambda: (
            lambda total, drift: replaced(-_off(total, drift), jnp.zeros_like(total)),
            (_RELATIVE_ENTROPY, _DRIFT),
        ),
    ),
)
_CROSS_ENTROPY = sum_of(
    _of(_terms.neg_x_log_y_of_logs),
    Slope(lambda c: _finite(-c.log_q), lambda: (_finite, (_CROSS_ENTROPY,)), over_p=True),
    Slope(lambda c: -c.p, lambda: (lambda: -1.0, ()), rest_at=lambda c: -c.not_p),
)
_JENSEN_SHANNON = sum_of(
    _of(_terms.jensen_shannon_of_logs),
    *(Slope(lambda c, side=side: _terms.logs_to_mean(c.delta)[side] / 2, over_p=True) for side in (0, 1)),
)


def _weights(c: Class) -> tuple[Array, Array]:
    return c.options[0], 1 - c.options[0]


def _weighted_log_to_mixture(side: int, c: Class) -> Array:
    return _weights(c)[side] * _terms.logs_to_mixture(c.delta, *_weights(c))[side]


_WEIGHTED_JENSEN_SHANNON = sum_of(
    lambda c: _terms.weighted_jensen_shannon_of_logs(c.log_p, c.p, c.log_q, c.q, c.delta, *_weights(c)),
    *(Slope(partial(_weighted_log_to_mixture, side), over_p=True) for side in (0, 1)),
)


@compiled("axis", "base")
def entropy_with_logits(
    logits: AnyLogits, axis: Axis = -1, where: ArrayLike | None = None, *, base: float | None = None
) -> Array:
    r"""Entropy of softmax(logits), the mean surprisal of a class drawn from it.

    With the gaps :math:`g_k = \max_j x_j - x_k` and :math:`L = \log \sum_k e^{-g_k}`,

    .. math:: H(p) = -\sum_k p_k \log p_k = \sum_k p_k g_k + L,

    where both terms are at least 0, so that a nearly certain distribution has an entropy with all its digits. A class
    that is masked, or whose logit is -inf, has probability 0. A row of such classes alone has entropy 0. The derivative
    by :math:`x_j` is :math:`p_j (g_j - \sum_k p_k g_k)`. Right to 4 ulp, plus eps/2 per nat between the maximum and the
    classes that dominate the result; the gradient as much, of its largest part.

    Args:
      logits: scores, of shape [..., classes], an array, `LinearLogits` or `ShardedLogits`.
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      Entropies of the batch shape, in float32 for half-precision logits.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.entropy_with_logits(jnp.array([[0.0, 0.0, 0.0, 0.0], [0.0, 50.0, 0.0, -jnp.inf]]), base=2))
      [2.0000e+00 2.8383e-20]

    References:
      Cover and Thomas, Elements of Information Theory, 2006, section 2.1.
    """
    log_base = _checks.log_base(base)
    z = read_logits("logits", logits, axis, where)
    return _in_base(measure((z,), (ENTROPY,))[0][0], log_base)


@compiled("axis", "base")
def cross_entropy_with_logits(
    p_logits: AnyLogits,
    q_logits: AnyLogits,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    base: float | None = None,
) -> Array:
    r"""Cross-entropy :math:`H(p, q) = -\sum_k p_k \log q_k` of p = softmax(p_logits) and q = softmax(q_logits).

    It is the mean surprisal under q of a class drawn from p, and :math:`H(p, q) = H(p) + D(p \| q)`. A class of
    probability 0 in p adds nothing; one that is masked or -inf in q alone makes the result +inf. A row with no class
    left in p or in q is 0.

    Args:
      p_logits: logits of the classes, which lie along ``axis``: an array, `LinearLogits` or `ShardedLogits`.
      q_logits: logits of that shape, of either kind, or an array that broadcasts to it; sharded if p_logits are.
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per example, in the wider dtype of the two and at least float32.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.cross_entropy_with_logits(jnp.array([0.0, 0.0]), jnp.array([0.0, 1.0])))
      0.81326

    References:
      Murphy, Probabilistic Machine Learning: An Introduction, 2022, section 6.1.2.
    """
    log_base = _checks.log_base(base)
    (value,), (p_there, q_there) = _measure(p_logits, q_logits, axis, where, _CROSS_ENTROPY)
    return _in_base(jnp.where(p_there & q_there, value, 0), log_base)


@compiled("axis", "base")
def relative_entropy_with_logits(
    p_logits: AnyLogits,
    q_logits: AnyLogits,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    base: float | None = None,
) -> Array:
    """Relative entropy (Kullback-Leibler divergence) D(p||q) of p = softmax(p_logits) from q = softmax(q_logits).

    A class with the logit -inf has probability 0: its term is 0 if that is p's logit, and +inf if it is q's alone.

    Args:
      p_logits: logits of the classes, which lie along ``axis``: an array, `LinearLogits` or `ShardedLogits`.
      q_logits: logits of that shape, of either kind, or an array that broadcasts to it; sharded if p_logits are.
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per example, p_logits' shape without ``axis``; never negative; 0 for a row with nothing left in p. Right
      to 32 ulp, or in float32 to a relative error of 1e-4 for results down to 1e-12, near-equal logits with a large offset
      included. The gradient is p (log(p/q) - D) for p_logits and q - p for q_logits.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.relative_entropy_with_logits(jnp.array([0.0, 0.0]), jnp.array([0.0, 1.0])))
      0.1201

    References:
      S. Kullback and R. A. Leibler, On information and sufficiency, 1951.
    """
    log_base = _checks.log_base(base)
    (total, drift), (p_there, q_there) = _measure(p_logits, q_logits, axis, where, _RELATIVE_ENTROPY, _DRIFT)
    value = replaced(jnp.maximum(total - _off(total, drift) ** 2 / 2, 0), total)
    return _in_base(jnp.where(p_there, jnp.where(q_there, value, jnp.inf), 0), log_base)


@compiled("axis", "base", weight=SHARE._replace(neutral=0.5))
def jensen_shannon_divergence_with_logits(
    p_logits: AnyLogits,
    q_logits: AnyLogits,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    weight: ArrayLike = 0.5,
    base: float | None = None,
) -> Array:
    r"""Jensen-Shannon divergence of p = softmax(p_logits) and q = softmax(q_logits), with a weight.

    .. math:: w\, D(p \| m) + (1 - w)\, D(q \| m), \qquad m = w p + (1 - w) q,

    with D the `relative_entropy` and w = 1/2, as in `jensen_shannon_divergence`, unless given. A class with the
    logit -inf has probability 0.

    For the ``beta`` of generalised knowledge distillation (GKD) give
    ``jensen_shannon_divergence_with_logits(teacher, student, weight=beta)``. For w = 0 and w = 1 the divergence is 0. TRL
    and Liger have there what the divergence over w (1 - w) goes to: for 0 the relative entropy
    ``relative_entropy_with_logits(teacher, student)``, and for 1 ``relative_entropy_with_logits(student, teacher)``.

    Args:
      p_logits: logits of the classes, which lie along ``axis``: an array, `LinearLogits` or `ShardedLogits`.
      q_logits: logits of that shape, of either kind, or an array that broadcasts to it; sharded if p_logits are.
      axis: the class axis, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).
      weight: w, the weight of p, a number in [0, 1], also a traced one.
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per example, p_logits' shape without ``axis``; never negative; 0 for a row with nothing left in one of
      the two. Right to 32 ulp, or in float32 to a relative error of 1e-4 for results down to 1e-12, near-equal logits with
      a large offset included.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.jensen_shannon_divergence_with_logits(jnp.array([0.0, 0.0]), jnp.array([0.0, 1.0])))
      0.02854

    References:
      J. Lin, Divergence measures based on the Shannon entropy, 1991.
    """
    log_base = _checks.log_base(base)
    if weight is None:
        (total, off), there = _measure(p_logits, q_logits, axis, where, _JENSEN_SHANNON, _OFF)
        of_both: Any = 1 / 8
    else:
        w = jnp.asarray(weight)
        (total, off), there = _measure(p_logits, q_logits, axis, where, _WEIGHTED_JENSEN_SHANNON, _OFF, options=(w,))
        w = w.astype(total.dtype)
        of_both = w * (1 - w) / 2
    value = total - lax.stop_gradient(off) ** 2 * of_both
    value = replaced(jnp.maximum(value, 0), value)
    return _in_base(jnp.where(there[0] & there[1], value, 0), log_base)
