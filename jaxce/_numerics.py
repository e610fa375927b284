"""Elementary pieces to about half an ulp: logarithms, exponentials, sums, and p log(p/q) - p + q.

XLA's own log, log1p and expm1 are short of one to five ulp (the figures stand beside the functions here that replace
them) and a difference of rounded logarithms has no digits left where its arguments are nearly equal. So numbers that
are about to be subtracted are carried as a `Pair` (hi, lo) whose exact sum is meant, |lo| <= ulp(hi) / 2 or so.

XLA may round a * b + c once or twice, and not the same way in the two kernels that compute hi and lo; the two then don't
belong together. So a product that is added to something is either exact (a power of two, or halves of the digits) or
goes through `times`. Nor is a number ever given two constants one after the other, which XLA folds into one. With that,
results don't depend on what is compiled together. On the CPU a subnormal number is 0 to XLA, and so it is here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

Pair = tuple[Array, Array]


# ---------------------------------------------------------------------------------------------------- pairs


def times(a: Array, b: Array | float) -> Array:
    """a * b, rounded before it is added to anything: XLA can't contract a product with a sum through a maximum."""
    return jnp.maximum(a * b, -float(jnp.finfo(a.dtype).max))


def two_sum(a: Array, b: Array | float) -> Pair:
    """a + b = hi + lo exactly, in any order of size; a constant goes second."""
    hi = a + b
    t = hi - a
    return hi, (a - (hi - t)) + (b - t)


def two_product(a: Array, b: Array) -> Pair:
    """a * b = hi + lo exactly while lo is normal: the halves of the factors have products that need no rounding."""
    hi = times(a, b)
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return hi, ((a1 * b1 - hi) + a1 * b2 + a2 * b1) + a2 * b2


def _halves(a: Array) -> Pair:
    bits = (8, 11) if a.dtype == jnp.float32 else (11, 25)
    top = lax.reduce_precision(a, *bits)
    return top, a - top


def single(a: Array) -> Pair:
    """A number as a pair."""
    return a, jnp.zeros_like(a)


def add(a: Pair, b: Pair) -> Pair:
    """a + b, to about twice the digits of one number."""
    hi, lo = two_sum(a[0], b[0])
    return two_sum(hi, lo + (a[1] + b[1]))


def negate(a: Pair) -> Pair:
    """-a."""
    return -a[0], -a[1]


def multiply(a: Pair, b: Pair) -> Pair:
    """a * b, to about twice the digits of one number."""
    hi, lo = two_product(a[0], b[0])
    return hi, lo + (times(a[0], b[1]) + times(a[1], b[0]))


def divide(a: Pair, b: Pair) -> Pair:
    """a / b, to about twice the digits of one number."""
    hi = a[0] / b[0]
    product, rest = two_product(hi, b[0])
    return hi, ((a[0] - product) - rest + a[1] - times(hi, b[1])) / b[0]


def times_power_of_two(a: Array, k: Array) -> Array:
    """a * 2^k, rounded once, for |k| up to twice the largest exponent. (jnp.ldexp is several times the work.)"""
    info = jnp.finfo(a.dtype)
    bits = jnp.int32 if info.bits == 32 else jnp.int64

    def power(n: Array) -> Array:
        return lax.bitcast_convert_type((n + (info.maxexp - 1)).astype(bits) << info.nmant, a.dtype)

    half = k // 2
    return a * power(half) * power(k - half)


def scale_pair(a: Pair, k: Array) -> Pair:
    """a * 2^k."""
    return times_power_of_two(a[0], k), times_power_of_two(a[1], k)


def select(condition: Array, a: Pair, b: Pair) -> Pair:
    """a where the condition holds, b elsewhere."""
    return jnp.where(condition, a[0], b[0]), jnp.where(condition, a[1], b[1])


def constant(value: float, dtype: jnp.dtype) -> Pair:
    """A Python number as a pair: to all its digits in float32, rounded (lo = 0) in float64."""
    hi = jnp.asarray(value, dtype)
    return hi, jnp.asarray(value - float(dtype.type(value)), dtype)


def _series(coefficients: Sequence[float], x: Array) -> Array:
    """c0 + c1 x + c2 x^2 + ... (Horner)."""
    total = jnp.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = times(total, x) + c
    return total


def scale(coefficient: Array, tangent: Array) -> Array:
    """coefficient * tangent, for derivative rules: an infinite coefficient times a zero tangent is 0, not NaN.

    Multiplied in two steps by finite numbers, so it stays linear in the tangent and its transpose has the same property.
    """
    infinite = jnp.isinf(coefficient)
    largest = jnp.finfo(coefficient.dtype).max
    once = jnp.where(infinite, jnp.sign(lax.stop_gradient(coefficient)) * largest, coefficient)
    return (tangent * once) * jnp.where(infinite, jnp.full_like(once, largest), jnp.ones_like(once))


def _combine(partials: Sequence[tuple[Array, Array | SymbolicZero]]) -> Array | None:
    """Sum of coefficient * tangent over the arguments that vary."""
    terms = [scale(c, t) for c, t in partials if not isinstance(t, SymbolicZero)]
    return sum(terms[1:], terms[0]) if terms else None


# ---------------------------------------------------------------------------------------------------- sums


@jax.custom_jvp
def sum_pairs(hi: Array, lo: Array) -> Pair:
    """The sum over the last axis, as a pair.

    Every addition's rounding error is kept: the result is right to the last digit at any number of classes, where plain
    float32 sums on the CPU were up to 2 ulp off over 10 classes and 1.5 over 100 to 131072.
    """

    def plus(a: Pair, b: Pair) -> Pair:
        total, error = two_sum(a[0], b[0])
        return total, (a[1] + b[1]) + error

    zero = jnp.zeros((), hi.dtype)
    total, error = lax.reduce((hi, lo), (zero, zero), plus, (hi.ndim - 1,))
    finite = jnp.isfinite(total)
    return jnp.where(finite, total, jnp.sum(hi, axis=-1)), jnp.where(finite, error, jnp.zeros_like(error))


@sum_pairs.defjvp
def _sum_pairs_jvp(primals: Pair, tangents: Pair) -> tuple[Pair, Pair]:
    return sum_pairs(*primals), (jnp.sum(tangents[0], axis=-1), jnp.sum(tangents[1], axis=-1))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def in_units(value: Pair, log_base: float | None) -> Array:
    """A number of nats, as a pair, rounded once in units of log_base nats each: None for nats, log 2 for bits."""
    if log_base is None:
        return value[0] + value[1]
    hi, lo = divide(value, constant(log_base, value[0].dtype))
    return jnp.where(jnp.isfinite(hi), hi + lo, (value[0] + value[1]) / log_base)


@in_units.defjvp
def _in_units_jvp(log_base: float | None, primals: tuple[Pair], tangents: tuple[Pair]) -> tuple[Array, Array]:
    (value,), (dvalue,) = primals, tangents
    tangent = dvalue[0] + dvalue[1]
    return in_units(value, log_base), tangent if log_base is None else tangent / log_base


# ---------------------------------------------------------------------------------------------------- logarithm


def _is_normal(x: Array) -> Array:
    return (x >= jnp.finfo(x.dtype).tiny) & (x < jnp.inf)


# atanh(s) = s + s^3 A(s^2) with A(u) = 1/3 + u/5 + u^2/7 + ...; |s| <= 0.18 wants 6 terms in float32 and 13 in float64
def _atanh_series(u: Array) -> Array:
    return _series([1 / (2 * k + 3) for k in range(6 if u.dtype == jnp.float32 else 13)], u)


def _times_log2(k: Array) -> Pair:
    # log 2 in two parts, the first so short that its product with an exponent k is exact
    if k.dtype == jnp.float32:
        return k * (0x162E4 / 2**17), times(k, 1.4286068203094173e-6)
    return k * (0x162E42FEFA38 / 2**45), times(k, 5.497923018708371e-14)


def _log_ratio(p: Array, q: Array | float) -> Pair:
    # p / q = 2^k m / n with m / n within sqrt(2) of 1, and log(m / n) = 2 atanh(s), s = (m - n) / (m + n):
    # m - n is exact and so is each power of two; no quotient can overflow.
    m, i = jnp.frexp(p)
    n, j = jnp.frexp(jnp.full_like(p, q) if isinstance(q, float) else q)
    up, down = m > math.sqrt(2) * n, m < math.sqrt(0.5) * n
    m = jnp.where(up, m / 2, jnp.where(down, m * 2, m))
    k = (i - j + jnp.where(up, 1, jnp.where(down, -1, 0))).astype(p.dtype)
    s, s_lo = divide(single(m - n), two_sum(m, n))
    k_log2, k_rest = _times_log2(k)
    hi, lo = two_sum(k_log2, 2 * s)
    return two_sum(hi, lo + (k_rest + 2 * (s_lo + times(s * (s * s), _atanh_series(s * s)))))


def log_ratio_of_pairs(p: Pair, q: Pair) -> Pair:
    """log(p / q) as a pair; 0 where one of them isn't a positive normal number."""
    inside = _is_normal(p[0]) & _is_normal(q[0])
    one = single(jnp.ones_like(p[0]))
    (p_hi, p_lo), (q_hi, q_lo) = select(inside, p, one), select(inside, q, one)
    hi, lo = _log_ratio(p_hi, q_hi)
    r, t = p_lo / p_hi, q_lo / q_hi
    return hi, lo + ((r - times(r, r) / 2) - (t - times(t, t) / 2))


def log_of_pair(p: Pair) -> Pair:
    """log p of a positive normal number, as a pair."""
    r = p[1] / p[0]
    hi, lo = _log_ratio(p[0], 1.0)
    return two_sum(hi, lo + (r - times(r, r) / 2))


@jax.custom_jvp
def log_ratio(p: Array, q: Array, q_lo: Array) -> Array:
    """log(p / (q + q_lo)) to 0.6 ulp, also where the two are close; q_lo, a correction to q, has no derivative.

    d/dp = 1 / p, d/dq = -1 / q. At p = q = 0, a class that isn't there, all three are 0.
    """
    inside = _is_normal(p) & _is_normal(q)
    hi, lo = log_ratio_of_pairs(single(p), (q, q_lo))
    both, one = (p == 0) & (q == 0), jnp.ones_like(p)
    other = jnp.log(jnp.where(both, one, p)) - jnp.log(jnp.where(both, one, q))
    return jnp.where(inside, hi + lo, other)


def _log_ratio_jvp(
    primals: tuple[Array, Array, Array], tangents: Sequence[Array | SymbolicZero]
) -> tuple[Array, Array]:
    p, q, _ = primals
    out = log_ratio(*primals)
    both = (p == 0) & (q == 0)
    a, b = (jnp.where(both, jnp.full_like(p, jnp.inf), v) for v in (p, q))
    tangent = _combine([(1 / a, tangents[0]), (-1 / b, tangents[1])])
    return out, jnp.zeros_like(out) if tangent is None else tangent


log_ratio.defjvp(_log_ratio_jvp, symbolic_zeros=True)


@jax.custom_jvp
def log_pair(p: Array) -> Pair:
    """log p as a pair; (-inf, 0) at 0. d/dp = 1 / p. (jnp.log in float32 is up to 1.2 ulp off.)"""
    inside = _is_normal(p)
    hi, lo = _log_ratio(jnp.where(inside, p, jnp.ones_like(p)), 1.0)
    return select(inside, (hi, lo), single(jnp.log(p)))


@log_pair.defjvp
def _log_pair_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Pair, Pair]:
    (p,), (dp,) = primals, tangents
    return log_pair(p), single(scale(1 / p, dp))


@jax.custom_jvp
def log1p(x: Array) -> Array:
    """log(1 + x) to 0.6 ulp, with derivative 1 / (1 + x).

    jnp.log1p on the CPU is up to 2.4 ulp off in float32, 1.9 in float64 and, in jax 0.10 for x < 0 in float64, 128.
    1 + x = u + c exactly, and log(u + c) = log u + log(1 + c/u) (Kahan).
    """
    inside = (x > -1) & (x < jnp.inf)
    safe = jnp.where(inside, x, jnp.zeros_like(x))
    large, small = jnp.maximum(safe, 1), jnp.minimum(safe, 1)
    u = large + small
    c = (small - (u - large)) / u
    hi, lo = _log_ratio(u, 1.0)
    return jnp.where(inside, hi + (lo + (c - times(c, c) / 2)), jnp.log1p(x))


@log1p.defjvp
def _log1p_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return log1p(x), scale(1 / (1 + x), dx)


# ---------------------------------------------------------------------------------------------------- exponential


def _exp_parts(x: Pair) -> tuple[Array, Pair]:
    # exp(x) = 2^k (1 + e), e = expm1(r), r = x - k log 2 in [-0.35, 0.35]. e = r + r^2/2 + r^3 (1/6 + r/24 + ...)
    dtype = x[0].dtype
    terms, limit = (6, 150.0) if dtype == jnp.float32 else (13, 1100.0)
    high = jnp.clip(x[0], -limit, limit)
    k = jnp.round(high * (1 / math.log(2)))
    k_log2, k_rest = _times_log2(k)
    r, r_lo = two_sum(high - k_log2, x[1] - k_rest)
    half, half_lo = two_product(r, r / 2)
    hi, lo = two_sum(r, half)
    cubic = times(r * (r * r), _series([1 / math.factorial(n) for n in range(3, 3 + terms)], r))
    return k.astype(jnp.int32), two_sum(hi, lo + (half_lo + cubic + times(r_lo, 1 + r)))


def exp_scaled(x: Pair) -> tuple[Array, Pair]:
    """exp(x) = 2^k y for finite x, as (k, y), y a pair between 0.7 and 1.5: nothing is lost below the normal numbers."""
    k, (e, e_lo) = _exp_parts(x)
    hi, lo = two_sum(e, 1.0)
    return k, two_sum(hi, lo + e_lo)


def exp_pair(x: Pair) -> Pair:
    """exp(x) as a pair for finite x, 0 from where it isn't normal. (jnp.exp is up to 1.0 ulp off, 1.6 in float64.)"""
    k, value = exp_scaled(x)
    return scale_pair(value, k)


def expm1_pair(x: Pair) -> Pair:
    """exp(x) - 1 as a pair, for finite x."""
    k, (e, e_lo) = _exp_parts(x)
    hi, lo = two_sum(times_power_of_two(e, k), times_power_of_two(jnp.ones_like(e), k) - 1)
    return hi, lo + times_power_of_two(e_lo, k)


@jax.custom_jvp
def expm1(x: Array) -> Array:
    """exp(x) - 1 to 0.6 ulp, with derivative exp(x). jnp.expm1 on the CPU is up to 5.6 ulp off in jax 0.10."""
    finite = jnp.abs(x) < (80 if x.dtype == jnp.float32 else 700)
    hi, lo = expm1_pair(single(jnp.where(finite, x, jnp.zeros_like(x))))
    return jnp.where(finite & (x != 0), hi + lo, jnp.expm1(x))


@expm1.defjvp
def _expm1_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return expm1(x), jnp.exp(x) * dx


# ---------------------------------------------------------------------------------------------------- p log p


@jax.custom_jvp
def neg_x_log_x(p: Array) -> Pair:
    """-p log p as a pair, 0 at p = 0. d/dp = -(1 + log p), +inf at 0."""
    inside = _is_normal(p)
    safe = jnp.where(inside, p, jnp.ones_like(p))
    m, k = jnp.frexp(safe)  # p = 2^k m: nothing is lost below the normal numbers
    hi, lo = multiply(log_pair(safe), single(-m))
    other = jnp.where(p == 0, jnp.zeros_like(p), -p * jnp.log(jnp.where(p == 0, jnp.ones_like(p), p)))
    return select(inside, scale_pair((hi, lo), k), single(other))


@neg_x_log_x.defjvp
def _neg_x_log_x_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Pair, Pair]:
    (p,), (dp,) = primals, tangents
    hi, lo = log_pair(p)
    return neg_x_log_x(p), single(scale(-((hi + 1) + lo), dp))


@jax.custom_jvp
def neg_x_log_y(p: Array, q: Array) -> Pair:
    """-p log q as a pair, 0 at p = 0. d/dp = -log q, d/dq = -p / q, both 0 at p = q = 0."""
    empty = (p == 0) & (q >= 0)
    hi, lo = log_pair(jnp.where(empty, jnp.ones_like(q), q))
    inside = _is_normal(p) & jnp.isfinite(hi)
    m, k = jnp.frexp(jnp.where(inside, p, jnp.ones_like(p)))
    product = multiply(select(inside, (hi, lo), single(jnp.ones_like(hi))), single(-m))
    other = jnp.where(empty, jnp.zeros_like(p), -p * hi)
    return select(inside, scale_pair(product, k), single(other))


def _neg_x_log_y_jvp(primals: Pair, tangents: Sequence[Array | SymbolicZero]) -> tuple[Pair, Pair]:
    p, q = primals
    out = neg_x_log_y(p, q)
    empty = (p == 0) & (q == 0)
    hi, lo = log_pair(jnp.where(empty, jnp.ones_like(q), q))
    by_q = jnp.where(empty, jnp.zeros_like(p), p / jnp.where(empty, jnp.ones_like(q), q))
    tangent = _combine([(-(hi + lo), tangents[0]), (-by_q, tangents[1])])
    return out, single(jnp.zeros_like(p) if tangent is None else tangent)


neg_x_log_y.defjvp(_neg_x_log_y_jvp, symbolic_zeros=True)


# ---------------------------------------------------------------------------------------------------- Bregman term


def bregman_pair(p: Pair, q: Pair, difference: Pair, log_of_ratio: Pair) -> Pair:
    """p log(p/q) - p + q >= 0 from positive p and q, p - q and log(p/q); the last need not be right where it is small.

    With s = (p - q) / (p + q), log(p/q) = 2 atanh(s) and p = (p + q)(1 + s) / 2, so the term is
    (p - q) s (1 + s (1 + s) A(s^2)): for s near 0 nothing is left to cancel.
    """
    total = add(p, q)
    s = divide(difference, select(total[0] > 0, total, single(jnp.ones_like(total[0]))))
    near = jnp.abs(s[0]) < 0.18
    t = jnp.where(near, s[0], jnp.zeros_like(s[0]))
    factor = two_sum(times(t * (1 + t), _atanh_series(t * t)), 1.0)
    close = multiply(multiply(difference, select(near, s, single(t))), factor)
    return select(near, close, add(multiply(p, log_of_ratio), negate(difference)))


def _bregman(p: Array, q: Array, q_lo: Array) -> Pair:
    inside = _is_normal(p) & _is_normal(q)
    one = jnp.ones_like(p)
    a, b = jnp.where(inside, p, one), jnp.where(inside, q, one)
    b_lo = jnp.where(inside, q_lo, jnp.zeros_like(q_lo))
    ratio = log_ratio_of_pairs(single(a), (b, b_lo))
    # scaled so that the larger is near 1 and no lo is lost below the normal numbers
    k = jnp.frexp(jnp.maximum(a, b))[1]
    a, b, b_lo = (times_power_of_two(x, -k) for x in (a, b, b_lo))
    hi, lo = two_sum(a, -b)
    value = bregman_pair(single(a), (b, b_lo), two_sum(hi, lo - b_lo), ratio)
    # outside: q where p is 0, +inf where only q is, NaN from anything below 0 or NaN
    other = jnp.where(p == 0, q, jnp.where((q == 0) & (p > 0), jnp.full_like(p, jnp.inf), p + q))
    other = jnp.where((p >= 0) & (q >= 0), other, jnp.full_like(p, jnp.nan))
    return select(inside, scale_pair(value, k), single(other))


@jax.custom_jvp
def bregman(p: Array, q: Array, q_lo: Array) -> Pair:
    """p log(p/q) - p + q >= 0 as a pair: q at p = 0, +inf at q = 0 < p, 0 at p = q = 0.

    q_lo is a correction to q, for a q that was computed, and has no derivative. d/dp = log(p/q), -inf at p = 0 < q;
    d/dq = (q - p) / q; both 0 at p = q = 0.
    """
    return _bregman(p, q, q_lo)


def _bregman_jvp(primals: tuple[Array, Array, Array], tangents: Sequence[Array | SymbolicZero]) -> tuple[Pair, Pair]:
    p, q, q_lo = primals
    out = bregman(p, q, q_lo)
    both = (p == 0) & (q == 0)
    one, zero = jnp.ones_like(q), jnp.zeros_like(q)
    by_q = jnp.where(both, zero, ((q - p) + q_lo) / jnp.where(both, one, q))
    tangent = _combine([(log_ratio(p, q, q_lo), tangents[0]), (by_q, tangents[1])])
    return out, single(zero if tangent is None else tangent)


bregman.defjvp(_bregman_jvp, symbolic_zeros=True)


@jax.custom_jvp
def jensen_shannon(p: Array, q: Array) -> Pair:
    """(b(p, m) + b(q, m)) / 2 >= 0 as a pair, m = (p + q) / 2 and b the term above. d/dp = log(p/m) / 2; 0 at p = q = 0."""
    # m would round, so 2 m = p + q as a pair; b(p, m) = b(2p, 2m) / 2
    m, m_lo = two_sum(p, q)
    hi, lo = add(_bregman(2 * p, m, m_lo), _bregman(2 * q, m, m_lo))
    return hi / 4, lo / 4


def _jensen_shannon_jvp(primals: Pair, tangents: Sequence[Array | SymbolicZero]) -> tuple[Pair, Pair]:
    p, q = primals
    m, m_lo = p + q, lax.stop_gradient(two_sum(p, q)[1])
    tangent = _combine([(log_ratio(2 * p, m, m_lo) / 2, tangents[0]), (log_ratio(2 * q, m, m_lo) / 2, tangents[1])])
    return jensen_shannon(p, q), single(jnp.zeros_like(p) if tangent is None else tangent)


jensen_shannon.defjvp(_jensen_shannon_jvp, symbolic_zeros=True)
