r"""What one class adds to an entropy or a divergence: plain numbers, in formulas in which nothing cancels.

Each is a function of probabilities, of log-probabilities or of both, elementwise, with its derivatives beside it: a
class that isn't there, of probability 0 in both distributions, has the value 0 and the derivatives 0. The term of a
divergence is

.. math:: b(p, q) = p \log\frac pq - p + q \ge 0 .

With :math:`\delta = \log p - \log q` it is
:math:`p (e^{-\delta} + \delta - 1) = p \delta^2 \left(\frac12 - \frac\delta6 + \frac{\delta^2}{24} - \dots\right)`.
With :math:`s = (p - q) / (p + q)` and :math:`r = \frac s3 + \frac{s^3}5 + \dots`,
:math:`\delta = 2 \operatorname{atanh} s = 2 s (1 + s r)`, and it is :math:`(p - q) s (1 + (1 + s) r)`. So nearly equal
probabilities lose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxce._rules import custom_jvp, largest, product, smallest


@custom_jvp
def log1p(x: Array) -> Array:
    """log(1 + x). XLA:CPU's own is up to 128 ulp off for x < 0 in float64. d/dx = 1 / (1 + x)."""
    return jnp.sign(x) * jnp.log1p(jnp.where(x < 0, -x / (1 + x), x))


log1p.defslopes(lambda x: (ratio(jnp.ones_like(x), 1 + x),))


def polynomial(coefficients: Sequence[float], x: Array) -> Array:
    """c0 + c1 x + c2 x^2 + ... (Horner)."""
    total = jnp.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total


def fitted(series: list[float], count: int, low: float, high: float) -> list[float]:
    """The coefficients of a shorter polynomial that is close to a power series for low <= x <= high."""
    fit = np.polynomial.Chebyshev.interpolate(np.polynomial.Polynomial(series), count - 1, domain=[low, high])
    return fit.convert(kind=np.polynomial.Polynomial).coef.tolist()


ATANH = [1 / (2 * k + 3) for k in range(50)]
"""The power series of (atanh(s) / s - 1) / u in u = s^2."""

_EXP = [(-1) ** k / math.factorial(k + 2) for k in range(17)]
"""That of (exp(-x) - 1 + x) / x^2."""

_ENTROPY = [1 / (2 * k * (2 * k - 1)) for k in range(1, 26)]
"""That of ((1 + s) log(1 + s) + (1 - s) log(1 - s)) / (2 u) in u = s^2."""

_NEAR = math.tanh(0.5)
"""(p - q) / (p + q) of numbers whose logarithms differ by 1."""

# What is taken of these, by the bytes of a number.
_ATANH_OF = {4: fitted(ATANH, 5, 0, _NEAR**2), 8: fitted(ATANH, 12, 0, _NEAR**2)}
_EXP_OF = {4: fitted(_EXP, 8, -1, 1), 8: _EXP}
_ENTROPY_OF = {4: fitted(_ENTROPY, 7, 0, 0.25), 8: _ENTROPY}


# 0 log 0 is 0. A selection would say so, but XLA:CPU can't have one inside of a sum: it writes out what it selects from.


def log_weighed(weight: Array, x: Array) -> Array:
    """log x, but some finite number where weight and x are 0."""
    return jnp.log(x + jnp.maximum(smallest(x) - jnp.abs(weight), 0))


def weighed(weight: Array, log_x: Array) -> Array:
    """log x, but some finite number where weight and x are 0."""
    most = largest(log_x)
    least = -most - jnp.minimum(jnp.abs(weight) * (1 / smallest(weight)), 1) * most  # -inf where there is a weight
    return jnp.maximum(least, log_x)


# ------------------------------------------------------------------------------------------------------------ quotients
# All derivatives of a term are made of these, so those of second order and above have their digits and their zeros, too.
# A quotient of a quotient is a product with an inverse here: XLA makes p / (q q) of p / q / q, which over- and underflows.


def there(p: Array, q: Array) -> Array:
    """1, and 0 for a class that isn't there: where both are 0."""
    return jnp.where((p == 0) & (q == 0), 0, 1).astype(p.dtype)


@custom_jvp
def ratio(p: Array, q: Array) -> Array:
    """p / q, 0 where both are 0. d/dp = 1 / q, d/dq = -(p / q) / q."""
    return p / jnp.where((p == 0) & (q == 0), 1, q)


def _ratio_slopes(p: Array, q: Array) -> tuple[Array, Array]:
    inverse = ratio(there(p, q), q)
    return inverse, -product(ratio(p, q), inverse)


ratio.defslopes(_ratio_slopes)


@custom_jvp
def one_minus_ratio(p: Array, q: Array) -> Array:
    """1 - p / q, 0 where both are 0. d/dp = -1 / q, d/dq = (p / q) / q."""
    return (q - p) / jnp.where((p == 0) & (q == 0), 1, q)


one_minus_ratio.defslopes(lambda p, q: tuple(-slope for slope in _ratio_slopes(p, q)))


# --------------------------------------------------------------------------------------------------- of one distribution


@custom_jvp
def neg_log(p: Array) -> Array:
    """-log p. d/dp = -1 / p."""
    return 0 - jnp.log(p)  # 0 of what is certain, and not -0


neg_log.defslopes(lambda p: (-ratio(jnp.ones_like(p), p),))


def total(terms: Array) -> Array:
    """Their sum over the classes: 0 of zeros, and not -0."""
    return 0 - jnp.sum(-terms, -1)


@custom_jvp
def neg_x_log_x(p: Array) -> Array:
    """-p log p, 0 at p = 0. d/dp = -(1 + log p), +inf at 0."""
    return -(p * log_weighed(p, p))  # not p (0 - log p): XLA:CPU would write out an array of that 0


neg_x_log_x.defslopes(lambda p: (neg_log(p) - 1,))


@custom_jvp
def neg_x_log_y(p: Array, q: Array) -> Array:
    """-p log q, 0 at p = 0. d/dp = -log q, d/dq = -p / q."""
    return -(p * log_weighed(p, q))


neg_x_log_y.defslopes(lambda p, q: (neg_log(jnp.where((p == 0) & (q == 0), 1, q)), -ratio(p, q)))


@custom_jvp
def neg_x_log_not_y(w: Array, q: Array) -> Array:
    """-w log(1 - q), 0 at w = 0. d/dw = -log(1 - q), d/dq = w / (1 - q)."""
    return w * (0 - log1p(-jnp.where((w == 0) & (q <= 1), 0, q)))


neg_x_log_not_y.defslopes(lambda w, q: (-log1p(-jnp.where((w == 0) & (q == 1), 0, q)), ratio(w, 1 - q)))


# ------------------------------------------------------------------------------------------ of two, from probabilities


def _in_range(p: Array, q: Array) -> tuple[Array, Array]:
    """p and q times a power of two with which their sum doesn't overflow, nor their difference underflow."""
    scale = jnp.where(p + q > 1, 2.0**-60, 2.0**60)
    return p * scale, q * scale


def _spread(p: Array, q: Array) -> Array:
    """s = (p - q) / (p + q), 0 where both are 0."""
    p, q = _in_range(p, q)
    return (p - q) / jnp.maximum(p + q, smallest(p))


def _is_near(s: Array) -> Array:
    """Whether |log p - log q| < 1."""
    return jnp.abs(s) < _NEAR


def _atanh_rest(s: Array) -> Array:
    """r = (atanh(s) / s - 1) / s, where p and q are near."""
    return s * polynomial(_ATANH_OF[s.dtype.itemsize], s * s)


def _log_of_near(s: Array) -> Array:
    """log(p / q) where they are near."""
    return 2 * s * (1 + s * _atanh_rest(s))


def _log_of_far(p: Array, q: Array) -> Array:
    """log(p / q) where they aren't near: twice a quotient of roots neither overflows nor underflows."""
    return 2 * (jnp.log(2 * jnp.sqrt(p) / jnp.sqrt(q)) - math.log(2))


@custom_jvp
def log_ratio(p: Array, q: Array) -> Array:
    """log(p / q), 0 where both are 0. d/dp = 1 / p, d/dq = -1 / q."""
    s = _spread(p, q)
    return jnp.where(_is_near(s), _log_of_near(s), _log_of_far(p, q))


log_ratio.defslopes(lambda p, q: (ratio(there(p, q), p), -ratio(there(p, q), q)))


def _bregman(p: Array, difference: Array, s: Array, far: Array) -> Array:
    """p log(p/q) - p + q from p - q, s = (p - q) / (p + q), and log(p/q) where they aren't near."""
    near = difference * s * (1 + (1 + s) * _atanh_rest(s))
    return jnp.where(_is_near(s), near, p * jnp.maximum(far, -largest(p)) - difference)


@custom_jvp
def bregman(p: Array, q: Array) -> Array:
    """p log(p/q) - p + q >= 0: q at p = 0, and +inf at q = 0 < p. d/dp = log(p/q), d/dq = 1 - p/q."""
    return _bregman(p, p - q, _spread(p, q), _log_of_far(p, q))


# The other way round, or XLA on a GPU would keep what the value and its derivative have in common.
bregman.defslopes(lambda p, q: (-log_ratio(q, p), one_minus_ratio(p, q)))


def _less_product(p: Array, x: Array, y: Array) -> Array:
    """p - x y without the rounding of the product, which would be all that is left where p is near: by halves of digits."""
    info = jnp.finfo(p.dtype)
    x1, y1 = (lax.reduce_precision(z, info.nexp, info.nmant // 2) for z in (x, y))
    return p - x1 * y1 - x1 * (y - y1) - (x - x1) * y1 - (x - x1) * (y - y1)


def _parts_of_product(p: Array, x: Array, y: Array, total: Array) -> tuple[Array, Array, Array]:
    """p - q and (p - q) / (p + q) with q = x y / total, which may underflow; and log(p / q) where they aren't near."""
    share = ratio(x, total)
    difference = _less_product(p, share, y)
    s = difference / jnp.maximum(p + share * y, smallest(p))
    p, x, y, total = map(jnp.sqrt, (p, x, y, total))  # quotients of roots neither overflow nor underflow
    return difference, s, 2 * jnp.log(ratio(p, x) * ratio(total, y))


@custom_jvp
def log_ratio_to_product(p: Array, x: Array, y: Array, total: Array) -> Array:
    """log(p/q) with q = x y / total, 0 where p and x or y are 0."""
    _, s, far = _parts_of_product(p, x, y, total)
    near = jnp.where(p == 0, jnp.minimum(x, y) == 0, _is_near(s))
    return jnp.where(near, _log_of_near(s), far)


def _log_ratio_to_product_slopes(p: Array, x: Array, y: Array, total: Array) -> tuple[Array, Array, Array, Array]:
    one = there(p, jnp.minimum(x, y))
    return ratio(one, p), -ratio(one, x), -ratio(one, y), ratio(one, total)


log_ratio_to_product.defslopes(_log_ratio_to_product_slopes)


def bregman_to_product(p: Array, x: Array, y: Array, total: Array) -> Array:
    """p log(p/q) - p + q >= 0 with q = x y / total."""
    difference, s, far = _parts_of_product(p, x, y, total)
    return _bregman(p, difference, s, far)


def log_ratio_to_log(p: Array, log_q: Array) -> Array:
    """log(p/q), right to an ulp of the logarithms; where they are near, of 1 or the logarithms if those are less."""
    s, difference = _spread(p, jnp.exp(log_q)), jnp.log(p) - log_q
    return jnp.where((jnp.abs(difference) < 1) & (jnp.abs(log_q) > 1), _log_of_near(s), difference)


def bregman_to_log(p: Array, log_q: Array) -> Array:
    """p log(p/q) - p + q >= 0: q at p = 0, and +inf at q = 0 < p."""
    q = jnp.exp(log_q)
    return _bregman(p, p - q, _spread(p, q), jnp.log(p) - log_q)


def _exp_gap(x: Array) -> Array:
    """exp(-x) - 1 + x, for |x| <= 1."""
    return x * x * polynomial(_EXP_OF[x.dtype.itemsize], x)


def bregman_from(delta: Array, p: Array, difference: Array) -> Array:
    """p log(p/q) - p + q >= 0 from delta = log p - log q and p - q, which may be more exact than p and q."""
    return jnp.where(jnp.abs(delta) < 1, p * _exp_gap(delta), p * jnp.maximum(delta, -largest(p)) - difference)


def _entropy_gap(s: Array) -> Array:
    """((1 + s) log(1 + s) + (1 - s) log(1 - s)) / 2, for |s| <= 1/2."""
    return s * s * polynomial(_ENTROPY_OF[s.dtype.itemsize], s * s)


@custom_jvp
def log_ratios_to_mean(p: Array, q: Array) -> tuple[Array, Array]:
    """log(p/m) and log(q/m) with m = (p + q) / 2, 0 where both are 0: log(1 + s) and log(1 - s)."""
    s, far = _spread(p, q), _log_of_far(p, q)
    of_p, of_q = (log1p(jnp.maximum(x, -0.5)) for x in (s, -s))
    return jnp.where(s < -0.5, of_q + far, of_p), jnp.where(s > 0.5, of_p - far, of_q)


@log_ratios_to_mean.defjvp
def _(primals: Any, tangents: Any) -> Any:
    """d log(p/m) = q / (p (p + q)) dp - dq / (p + q), and as much for q."""

    def along(p: Array, q: Array, dp: Array, dq: Array) -> Array:
        one = there(p, q)
        return product(product(ratio(q, p + q), ratio(one, p)), dp) - product(ratio(one, p + q), dq)

    (p, q), (dp, dq) = primals, tangents
    return log_ratios_to_mean(p, q), (along(p, q, dp, dq), along(q, p, dq, dp))


@custom_jvp
def jensen_shannon(p: Array, q: Array) -> Array:
    """(b(p, m) + b(q, m)) / 2 >= 0 with m = (p + q) / 2. d/dp = log(p/m) / 2, d/dq = log(q/m) / 2."""
    s = _spread(p, q)
    # log(p/m) = log(1 + s) and log(q/m) = log(1 - s). What is rounded off there is little, times the smaller of the two.
    least = float(jnp.finfo(p.dtype).epsneg)
    far = p * jnp.log(jnp.maximum(1 + s, least)) + q * jnp.log(jnp.maximum(1 - s, least))
    return jnp.where(jnp.abs(s) < 0.5, (p / 2 + q / 2) * _entropy_gap(s), far / 2)


jensen_shannon.defslopes(lambda p, q: tuple(x / 2 for x in log_ratios_to_mean(p, q)))


# -------------------------------------------------------------------------------------- of two, from log-probabilities
# These come with the probabilities and with delta = log p - log q, which may be more exact than what rounded logarithms
# give. Where only one of the two is there, delta is large but finite, and 0 where neither is.


@custom_jvp
def bregman_of_logs(log_p: Array, p: Array, log_q: Array, q: Array, delta: Array) -> Array:
    """p log(p/q) - p + q >= 0: q where p isn't there, +inf where q alone isn't. d/dlog p = p log(p/q), d/dlog q = q - p."""
    term = jnp.where(jnp.abs(delta) < 1, p * _exp_gap(delta), p * delta - (p - q))
    return jnp.where((log_q == -np.inf) & (log_p != -np.inf), jnp.inf, term)


@custom_jvp
def difference_of_logs(log_p: Array, p: Array, log_q: Array, q: Array, delta: Array) -> Array:
    """p - q. d/dlog p = p, d/dlog q = -q."""
    return (p + q) * jnp.tanh(delta / 2)


difference_of_logs.defslopes(lambda log_p, p, log_q, q, delta: (p, None, -q, None, None), jnp.multiply)


def _bregman_of_logs_slopes(log_p: Array, p: Array, log_q: Array, q: Array, delta: Array) -> tuple[Array | None, ...]:
    return p * delta, None, -difference_of_logs(log_p, p, log_q, q, delta), None, None


bregman_of_logs.defslopes(_bregman_of_logs_slopes, jnp.multiply)


def logs_to_mean(delta: Array) -> tuple[Array, Array]:
    """log(p/m) and log(q/m), with m = (p + q) / 2, from log p - log q."""
    size = jnp.where(delta >= 0, delta, -delta)  # jnp.abs has no derivative at 0
    larger = -log1p(jnp.expm1(-size) / 2)
    return jnp.where(delta >= 0, larger, larger - size), jnp.where(delta >= 0, larger - size, larger)


@custom_jvp
def jensen_shannon_of_logs(log_p: Array, p: Array, log_q: Array, q: Array, delta: Array) -> Array:
    """(b(p, m) + b(q, m)) / 2 >= 0 with m = (p + q) / 2. d/dlog p = p log(p/m) / 2, d/dlog q = q log(q/m) / 2."""
    s = jnp.tanh(delta / 2)
    near = jnp.abs(s) < 0.5
    a, b = logs_to_mean(delta)
    return jnp.where(near, (p + q) / 2 * _entropy_gap(jnp.where(near, s, 0)), (p * a + q * b) / 2)


def _jensen_shannon_of_logs_slopes(
    log_p: Array, p: Array, log_q: Array, q: Array, delta: Array
) -> tuple[Array | None, ...]:
    a, b = logs_to_mean(delta)
    return p * a / 2, None, q * b / 2, None, None


jensen_shannon_of_logs.defslopes(_jensen_shannon_of_logs_slopes, jnp.multiply)


# A weighted mean m = w p + (1 - w) q. Both weights come as arguments, of which the second is 1 less the first and has no
# derivative of its own.


def _in_mixture(delta: Array, w: Array, not_w: Array) -> tuple[Array, Array, Array]:
    """w p/m, (1 - w) q/m and (p - q)/m with m = w p + (1 - w) q, from log p - log q."""
    p_larger = delta >= 0
    size = jnp.where(p_larger, delta, -delta)  # jnp.abs has no derivative at 0
    smaller, less = jnp.exp(-size), jnp.expm1(-size)  # the smaller over the larger, and less 1
    of_larger, of_smaller = jnp.where(p_larger, w, not_w), jnp.where(p_larger, not_w, w) * smaller
    m = jnp.maximum(of_larger + of_smaller, smallest(delta))
    in_p, in_q = jnp.where(p_larger, of_larger, of_smaller), jnp.where(p_larger, of_smaller, of_larger)
    return in_p / m, in_q / m, jnp.where(p_larger, -less, less) / m


@custom_jvp
def logs_to_mixture(delta: Array, w: Array, not_w: Array) -> tuple[Array, Array]:
    """log(p/m) and log(q/m), with m = w p + (1 - w) q, from log p - log q."""
    p_larger, size = delta >= 0, jnp.abs(delta)
    smaller, less = jnp.exp(-size), jnp.expm1(-size)
    of_larger, of_smaller = jnp.where(p_larger, w, not_w), jnp.where(p_larger, not_w, w)
    m = of_larger + of_smaller * smaller  # over the larger of p and q
    larger = jnp.minimum(jnp.where(m < 0.5, -jnp.log(m), -log1p(jnp.maximum(of_smaller * less, -0.5))), size)
    more = -of_larger * less  # m less the smaller
    near = more < smaller
    small = jnp.where(near, -log1p(more / jnp.where(near, smaller, 1)), larger - size)
    return jnp.where(p_larger, larger, small), jnp.where(p_larger, small, larger)


@logs_to_mixture.defjvp
def _(primals: Any, tangents: Any) -> Any:
    in_p, in_q, slope = _in_mixture(*primals)
    ddelta, dw, _ = tangents
    return logs_to_mixture(*primals), (in_q * ddelta - slope * dw, -in_p * ddelta - slope * dw)


def _bregmans_to_mixture(p: Array, q: Array, delta: Array, w: Array, not_w: Array) -> tuple[Array, Array]:
    """b(p, m) and b(q, m)."""
    (a, b), difference = logs_to_mixture(delta, w, not_w), (p + q) * jnp.tanh(delta / 2)
    return bregman_from(a, p, not_w * difference), bregman_from(b, q, -w * difference)


@custom_jvp
def weighted_jensen_shannon_of_logs(
    log_p: Array, p: Array, log_q: Array, q: Array, delta: Array, w: Array, not_w: Array
) -> Array:
    """w b(p, m) + (1 - w) b(q, m) >= 0. d/dlog p = w p log(p/m), d/dlog q = (1 - w) q log(q/m)."""
    of_p, of_q = _bregmans_to_mixture(p, q, delta, w, not_w)
    return w * of_p + not_w * of_q


@custom_jvp
def _by_weight(log_p: Array, p: Array, log_q: Array, q: Array, delta: Array, w: Array, not_w: Array) -> Array:
    """The derivative by w: b(p, m) - b(q, m).

    With s = (p - q) / m, d/dlog p = p (log(p/m) - w s), d/dlog q = -q (log(q/m) + (1 - w) s), d/dw = -(p - q) s.
    """
    of_p, of_q = _bregmans_to_mixture(p, q, delta, w, not_w)
    return of_p - of_q


def _weighted_jensen_shannon_of_logs_slopes(*args: Array) -> tuple[Array | None, ...]:
    _, p, _, q, delta, w, not_w = args
    a, b = logs_to_mixture(delta, w, not_w)
    return w * p * a, None, not_w * q * b, None, None, _by_weight(*args), None


def _by_weight_slopes(*args: Array) -> tuple[Array | None, ...]:
    _, p, _, q, delta, w, not_w = args
    (a, b), (_, _, s) = logs_to_mixture(delta, w, not_w), _in_mixture(delta, w, not_w)
    by_w = -difference_of_logs(*args[:5]) * s
    return p * (a - w * s), None, -q * (b + not_w * s), None, None, by_w, None


weighted_jensen_shannon_of_logs.defslopes(_weighted_jensen_shannon_of_logs_slopes, jnp.multiply)
_by_weight.defslopes(_by_weight_slopes, jnp.multiply)


@custom_jvp
def neg_x_log_y_of_logs(log_p: Array, p: Array, log_q: Array, q: Array, delta: Array) -> Array:
    """-p log q: 0 where p isn't there, +inf where q alone isn't. d/dlog p = -p log q, d/dlog q = -p."""
    # One selection after the other: XLA:GPU would write out what is compared twice.
    return jnp.where(log_p == -np.inf, 0, jnp.where(log_q == -np.inf, np.inf, p * -log_q))


neg_x_log_y_of_logs.defslopes(lambda *logs: (neg_x_log_y_of_logs(*logs), None, -logs[1], None, None), jnp.multiply)
