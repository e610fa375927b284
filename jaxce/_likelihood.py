r"""Negative log-likelihoods: how surprising is an observation to someone who believes in a distribution?

The parameters come first and are what a network emits: logits, locations, and the logarithm of whatever must be positive
(scales, rates, means, concentrations). The observation comes last. All densities are the normalised ones, in nats; all
arguments broadcast by NumPy's rules. What is outside a distribution's support, or no parameter at all, gives NaN in its
own place and nowhere else; what ``where`` leaves out gives 0, with derivatives 0, whatever it is.

Where log Gamma stands in a density, it cancels most of the rest. With what Stirling's formula leaves of it, Binet's
:math:`\mu(x) = \log\Gamma(x) - (x - \tfrac12) \log x + x - \tfrac12 \log 2\pi`, there remain small terms and a deviance,
:math:`g - k \log(1 + g / k) \ge 0`, which is formed from the gap :math:`g`. So counts of 1e9 lose nothing.

Errors are given in ulp of the largest term of a value, and of the largest number that an entry of a gradient is made of.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxce import _checks
from jaxce._checks import Axis, compiled
from jaxce._rules import custom_jvp
from jaxce._sigmoid import sigmoid_binary_cross_entropy
from jaxce._statistics import logsumexp
from jaxce._terms import polynomial

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------------------------------------------- arguments


def _arguments(
    function: str, where: ArrayLike | None, observed: str, x: ArrayLike, **parameters: ArrayLike
) -> tuple[Array | None, list[Array]]:
    """What takes part (None: everything), the parameters and the observation, in their common dtype and shape.

    What doesn't take part observes 1 where all parameters are 0, which is ordinary for every distribution.
    """
    arrays = {name: _checks.floating(function, name, value) for name, value in parameters.items()}
    arrays[observed] = _observation(function, observed, x, *arrays.values())
    *given, x = _broadcast(function, **arrays)
    keep = _checks.where_elements(function, where, x.shape)
    return keep, [*(_checks.only(keep, a, 0) for a in given), _checks.only(keep, x, 1)]


def _observation(function: str, observed: str, x: ArrayLike, *parameters: Array) -> Array:
    """An observation may be boolean or an integer as well."""
    array = jnp.asarray(x)
    if jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.bool_):
        return array.astype(_checks.compute_dtype(*parameters))
    return _checks.floating(function, observed, array)


def _broadcast(function: str, **arrays: Array) -> list[Array]:
    shape: tuple[int, ...] = ()
    for name, array in arrays.items():
        try:
            shape = jnp.broadcast_shapes(shape, array.shape)
        except ValueError:
            raise ValueError(
                f"{function}: {name} must broadcast with what precedes it, {shape}, got {_checks.describe(array)}"
            ) from None
    return [jnp.broadcast_to(array, shape) for array in _checks.upcast(*arrays.values())]


# ---------------------------------------------------------------------------------------------------- elementary pieces


def _times_exp(x: Array, exponent: Array) -> Array:
    """x exp(exponent), by two halves: 0 times what overflows is 0, in the derivative as well."""
    half = jnp.exp(exponent / 2)
    return x * half * half


def _log(ratio: Array, otherwise: Array) -> Array:
    """log(ratio), and where that is too large or small for a number what the logarithms of its parts say."""
    inside = (ratio >= float(jnp.finfo(ratio.dtype).tiny)) & (ratio < jnp.inf)
    return jnp.where(inside, jnp.log(jnp.where(inside, ratio, 1)), otherwise)


def _deviance(k: Array, gap: Array, log_ratio: Array) -> Array:
    """gap - k log(1 + gap / k) >= 0, and gap at k = 0. Where the gap is large it is formed from that logarithm."""
    total = 2 * k + gap
    near = 3 * jnp.abs(gap) < total
    # A product: XLA:CPU makes a loop of its own of a quotient that is used more than once.
    s = jnp.where(near, gap, 0) * (1 / jnp.where(near, total, 1))
    # log(1 + gap / k) = 2 (s + s^3/3 + s^5/5 + ...), and gap - 2 k s = gap s
    series = polynomial([1 / (2 * n + 3) for n in range(8 if k.dtype.itemsize == 4 else 17)], s * s)
    return jnp.where(near, s * (gap - 2 * k * s * s * series), gap - jnp.where(k == 0, 0, k * log_ratio))


@custom_jvp
def _rate_deviance(k: Array, rate: Array, log_k: Array, log_rate: Array) -> Array:
    """rate - k - k log(rate / k) >= 0, and rate at k = 0. d/dk = -log(rate / k), d/dlog_rate = rate - k."""
    return _deviance(k, rate - k, _log(rate * (1 / k), log_rate - log_k))


_rate_deviance.defslopes(
    lambda k, rate, log_k, log_rate: (-_log(rate * (1 / k), log_rate - log_k), None, None, rate - k),
)


# x mu(x) for x >= 1 as a polynomial in u = 1 / (x^2 + c), the one through its values at Chebyshev's points: c and the
# coefficients, by the size of the numbers. mu is right to 4e-11 and 2e-17, x mu'(x) to 4e-9 and 1e-16.
# fmt: off
_BINET = {
    4: (0.5, [
        0.08333333320622581, -0.002777752876605211, -0.0005961041311562421, -0.00048341846707122404,
        9.275926453577577e-05, -0.00030512568422685725, 0.00017439593806923027, -9.077837760504846e-05
    ]),
    8: (1.1, [
        0.08333333333333331, -0.002777777777754784, -0.002261904768534025, -0.002210316681233493,
        -0.001938854622687927, -0.0023747723745205064, -0.0005948064786252118, -0.008735595069824485,
        0.03203377410781319, -0.16679050272868912, 0.7036965190719772, -2.5664255142731087, 7.674173707567345,
        -18.535585079979327, 35.33026601161025, -51.839592759297595, 56.40531292062187, -42.90368329526235,
        20.396950945043717, -4.593866880581078
    ]),
}
# fmt: on


def _binet(x: Array) -> Array:
    """mu(x) for x > 0. Below 1 it is mu(x + 1) + (x + 1/2) log(1 + 1/x) - 1."""
    small = x < 1
    part, y = jnp.where(small, x, 1), jnp.where(small, x + 1, x)
    step = jnp.where(small, -(part + 0.5) * jnp.log(part / (part + 1)) - 1, 0)
    c, coefficients = _BINET[x.dtype.itemsize]
    return step + polynomial(coefficients, 1 / (y * y + c)) / y


# ---------------------------------------------------------------------------------------------------- real numbers


@compiled()
def bernoulli_nll(logits: ArrayLike, x: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    r"""Yes or no: :math:`-x \log \sigma(\ell) - (1 - x) \log \sigma(-\ell)`, with log-odds :math:`\ell`.

    `sigmoid_binary_cross_entropy`, with broadcasting: right to 2 ulp (gradient: 4) at every size of logit.

    Args:
        logits: the log-odds for yes.
        x: what happened: booleans, 0 or 1, or a probability between them; anything else gives NaN.
        where: what takes part: booleans or integers (what isn't 0) with as many axes as the result, which broadcast to it.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jax.numpy as jnp, jaxce
    >>> print(jaxce.bernoulli_nll(jnp.array([0.0, 40.0]), True))
    [6.931472e-01 4.248354e-18]

    Reference: Cox, "The Regression Analysis of Binary Sequences", JRSS B 20 (1958).
    """
    keep, (z, x) = _arguments("bernoulli_nll", where, "x", x, logits=logits)
    return _checks.only(keep, jnp.where((x >= 0) & (x <= 1), sigmoid_binary_cross_entropy(z, x), jnp.nan), 0)


@compiled("full")
def gaussian_nll(
    location: ArrayLike, log_scale: ArrayLike, x: ArrayLike, *, full: bool = True, where: ArrayLike | None = None
) -> Array:
    r"""Normal distribution: :math:`\tfrac12 z^2 + \log\sigma + \tfrac12 \log 2\pi` with :math:`z = (x - m) / \sigma`.

    The entropy is log_scale + 1.4189 (log(2 pi e) / 2). Value and gradient (by log_scale: 1 - z^2) are right to 7 ulp at
    every size of z and scale.

    Args:
        location: the mean m.
        log_scale: the logarithm of the standard deviation; half of the log-variance.
        x: the observation.
        full: whether to add the constant log(2 pi) / 2.
        where: what takes part: booleans or integers (what isn't 0) with as many axes as the result, which broadcast to it.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jaxce
    >>> print(jaxce.gaussian_nll(0.0, 0.0, 0.0), jaxce.gaussian_nll(0.0, 0.0, 2.0, full=False))
    0.9189 2.0
    >>> import jax.numpy as jnp
    >>> measured = jnp.array([0.0, jnp.nan])
    >>> print(jaxce.gaussian_nll(0.0, 0.0, measured, where=~jnp.isnan(measured)))
    [0.9189385 0. ]

    Reference: Gauss, "Theoria motus corporum coelestium" (1809), section 177.
    """
    keep, (m, s, x) = _arguments("gaussian_nll", where, "x", x, location=location, log_scale=log_scale)
    z = _times_exp(x - m, -s)
    return _checks.only(keep, 0.5 * z * z + s + (_HALF_LOG_2PI if full else 0), 0)


@compiled()
def laplace_nll(location: ArrayLike, log_scale: ArrayLike, x: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    r"""Laplace distribution: :math:`|x - m| / b + \log 2b`.

    The derivative by the location at x = m, where there is none, is 0. The entropy is log_scale + 1.6931 (log 2e). Value
    and gradient are right to 4 ulp.

    Args:
        location: the median m.
        log_scale: the logarithm of b, the mean distance from the median.
        x: the observation.
        where: what takes part: booleans or integers (what isn't 0) with as many axes as the result, which broadcast to it.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jaxce
    >>> print(jaxce.laplace_nll(0.0, 0.0, -3.0))
    3.6931

    Reference: Laplace, "Memoire sur la probabilite des causes par les evenements" (1774).
    """
    keep, (m, s, x) = _arguments("laplace_nll", where, "x", x, location=location, log_scale=log_scale)
    z = _times_exp(x - m, -s)
    return _checks.only(keep, z * lax.sign(z) + s + math.log(2), 0)  # jnp.abs has the derivative 1 at 0


def _student_t_parts(d: Array, log_scale: Array, log_df: Array) -> tuple[Array, Array, Array]:
    """log(1 + q^2), q^2 / (1 + q^2) and that divided by d, for q = d / c, c = sqrt(nu) scale."""
    # Factors that XLA doesn't join to the exponential of a sum, which is rounded, and none of which overflows before c.
    most = lax.stop_gradient(jnp.clip(log_scale, -80, 80))
    c, size = jnp.sqrt(jnp.exp(log_df)) * jnp.exp(most) * jnp.exp(log_scale - most), jnp.abs(d)
    far = size > c
    unit = jnp.maximum(jnp.where(far, size, c), float(jnp.finfo(d.dtype).tiny))
    a, b = d / unit, c / unit  # the larger is 1
    e = jnp.where(far, b * b, a * a)
    log_q = _log(jnp.where(far, size * (1 / c), 1), jnp.log(size) - (log_scale + log_df / 2))
    share = 1 / (1 + e)
    return 2 * log_q + jnp.log1p(e), a * a * share, a * share * (1 / unit)


@custom_jvp
def _student_t(d: Array, log_scale: Array, log_df: Array) -> Array:
    """(nu + 1) / 2 log(1 + z^2 / nu), z = d / scale."""
    return (jnp.exp(log_df) + 1) / 2 * _student_t_parts(d, log_scale, log_df)[0]


def _student_t_slopes(d: Array, log_scale: Array, log_df: Array) -> tuple[Array, Array, Array]:
    df, (log_total, share, by_d) = jnp.exp(log_df), _student_t_parts(d, log_scale, log_df)
    curved = _deviance(df, -df * share, -log_total)  # nu (log(1 + q^2) - share): 1 - share = 1 / (1 + q^2)
    return (df + 1) * by_d, -(df + 1) * share, (curved - share) / 2


_student_t.defslopes(_student_t_slopes)


@compiled()
def student_t_nll(
    location: ArrayLike, log_scale: ArrayLike, log_df: ArrayLike, x: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""Student's t distribution, for errors with heavy tails.

    .. math:: \tfrac{\nu + 1}{2} \log\left(1 + \tfrac{z^2}{\nu}\right) + \log\sigma
        + \log \frac{\sqrt{\nu\pi}\; \Gamma(\nu/2)}{\Gamma((\nu + 1)/2)}, \qquad z = (x - m) / \sigma

    As the degrees of freedom grow this becomes `gaussian_nll`; beyond exp(70) of them (float64: exp(650)) it is. Value and
    gradient are right to 8 ulp at every size of z; but by log_df to 16, as small z leave z^4 there, with twice z^2's error.

    Args:
        location: the median m.
        log_scale: the logarithm of the scale sigma, which is not the standard deviation.
        log_df: the logarithm of the degrees of freedom nu.
        x: the observation.
        where: what takes part: booleans or integers (what isn't 0) with as many axes as the result, which broadcast to it.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jaxce
    >>> print(jaxce.student_t_nll(0.0, 0.0, 0.0, 1.0))  # Cauchy: log(2 pi)
    1.8379

    Reference: Student, "The Probable Error of a Mean", Biometrika 6 (1908).
    """
    keep, (m, s, log_df, x) = _arguments(
        "student_t_nll", where, "x", x, location=location, log_scale=log_scale, log_df=log_df
    )
    log_df = jnp.minimum(log_df, 70.0 if x.dtype.itemsize == 4 else 650.0)
    df = jnp.exp(log_df)
    # Of the two log Gammas is left (1 - nu log(1 + 1/nu)) / 2 + mu(nu / 2) - mu((nu + 1) / 2).
    constant = _deviance(df, jnp.ones_like(df), -jnp.log(df / (df + 1))) / 2 + (_binet(df / 2) - _binet((df + 1) / 2))
    return _checks.only(keep, _student_t(x - m, s, log_df) + s + (constant + _HALF_LOG_2PI), 0)


# ---------------------------------------------------------------------------------------------------- positive numbers


@compiled()
def exponential_nll(log_rate: ArrayLike, x: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    r"""Exponential distribution: :math:`\lambda x - \log\lambda`.

    The entropy is 1 - log_rate. Value and gradient are right to 4 ulp.

    Args:
        log_rate: the logarithm of the rate, minus that of the mean.
        x: the observation, at least 0; below gives NaN.
        where: what takes part: booleans or integers (what isn't 0) with as many axes as the result, which broadcast to it.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jaxce
    >>> print(jaxce.exponential_nll(0.0, 3.0))
    3.0

    Reference: Johnson, Kotz and Balakrishnan, "Continuous Univariate Distributions" 1 (1994), chapter 19.
    """
    keep, (log_rate, x) = _arguments("exponential_nll", where, "x", x, log_rate=log_rate)
    return _checks.only(keep, jnp.where(x >= 0, _times_exp(x, log_rate) - log_rate, jnp.nan), 0)


@compiled()
def gamma_nll(
    log_concentration: ArrayLike, log_rate: ArrayLike, x: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""Gamma distribution: :math:`\beta x - \alpha \log(\beta x) + \log x + \log\Gamma(\alpha)`.

    Its mean is alpha / beta. At x = 0 it is -log_rate for alpha = 1, and infinite otherwise. Value and gradient are right
    to 6 ulp up to concentrations of 1e9; terms are beta x - alpha, alpha log(beta x / alpha) and what log Gamma leaves.

    Args:
        log_concentration: the logarithm of the concentration (shape) alpha.
        log_rate: the logarithm of the rate beta, minus that of the scale.
        x: the observation, at least 0; below gives NaN.
        where: what takes part: booleans or integers (what isn't 0) with as many axes as the result, which broadcast to it.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jaxce
    >>> print(jaxce.gamma_nll(0.0, 0.0, 3.0))  # exponential
    3.0

    Reference: Johnson, Kotz and Balakrishnan, "Continuous Univariate Distributions" 1 (1994), chapter 17.
    """
    keep, (log_a, log_rate, x) = _arguments(
        "gamma_nll", where, "x", x, log_concentration=log_concentration, log_rate=log_rate
    )
    a, positive = jnp.exp(log_a), jnp.where(x > 0, x, 1)
    log_x = jnp.log(positive)
    deviance = _rate_deviance(a, _times_exp(positive, log_rate), log_a, log_rate + log_x)
    value = deviance + (log_x - 0.5 * log_a) + (_binet(a) + _HALF_LOG_2PI)
    at_zero = jnp.where(log_a == 0, -log_rate, jnp.where(log_a > 0, jnp.inf, -jnp.inf) + log_a)
    return _checks.only(keep, jnp.where(x >= 0, jnp.where(x == 0, at_zero, value), jnp.nan), 0)


# ---------------------------------------------------------------------------------------------------- counts


def _counts(k: Array) -> tuple[Array, Array]:
    """Counts as constants, with 0, and with 1, in place of what isn't one."""
    k = lax.stop_gradient(k)
    return jnp.where(k >= 0, k, 0), jnp.where(k > 0, k, 1)


@compiled("full")
def poisson_nll(log_rate: ArrayLike, counts: ArrayLike, *, full: bool = True, where: ArrayLike | None = None) -> Array:
    r"""Poisson distribution: :math:`\lambda - k \log\lambda + \log k!`.

    Computed as the deviance :math:`\lambda - k - k \log(\lambda / k) \ge 0` and what Stirling's formula leaves of log k!.
    Value and gradient, :math:`\lambda - k`, are right to 4 ulp up to counts of 1e9; terms are lambda - k, k log(lambda / k)
    and that rest. The last bit of a log_rate of 20, which is 16 ulp of lambda, makes more of a difference.

    Args:
        log_rate: the logarithm of the rate; -inf for a rate of 0.
        counts: the observation k, at least 0 (below gives NaN), which need not be whole. It has no derivative.
        full: whether to add the constant log k!.
        where: what takes part: booleans or integers (what isn't 0) with as many axes as the result, which broadcast to it.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jax.numpy as jnp, jaxce
    >>> print(jaxce.poisson_nll(0.0, jnp.array([0, 1, 2])))
    [1. 1. 1.6931]

    Reference: Poisson, "Recherches sur la probabilite des jugements" (1837), section 81.
    """
    keep, (log_rate, k) = _arguments("poisson_nll", where, "counts", counts, log_rate=log_rate)
    rate, valid = jnp.exp(log_rate), k >= 0
    k, positive = _counts(k)
    if full:
        log_k = jnp.log(positive)
        rest = 0.5 * log_k + (_binet(positive) + _HALF_LOG_2PI)  # log k! - k log k + k
        value = _rate_deviance(k, rate, log_k, log_rate) + jnp.where(k == 0, 0, rest)
    else:
        value = rate - jnp.where(k == 0, 0, k * log_rate)
    return _checks.only(keep, jnp.where(valid, value, jnp.nan), 0)


def _negative_binomial_parts(log_mean: Array, log_r: Array, k: Array) -> tuple[Array, Array, Array, Array]:
    """r, gap = r (k - m) / (m + r), log(1 - gap / k) and log(1 + gap / r)."""
    r, over_k = jnp.exp(log_r), 1 / jnp.where(k > 0, k, 1)
    n = k + r
    large = log_mean > 0  # then numerator and denominator are divided by m
    # The minimum changes nothing, but XLA would join exp(a) exp(b) to exp(a + b), with a + b rounded.
    e = jnp.minimum(jnp.exp(jnp.where(large, -log_mean, log_mean)), 2)
    total = jnp.where(large, 1 + r * e, e + r)
    gap = r / total * jnp.where(large, k * e - 1, k - e)
    ratio, log_ratio = n * (1 / total), jnp.log(n) - jnp.log(total)
    log_k_ratio = _log(
        jnp.where(large, ratio, ratio * e) * over_k, log_ratio + jnp.minimum(log_mean, 0) + jnp.log(over_k)
    )
    log_r_ratio = _log(jnp.where(large, ratio * e, ratio), log_ratio - jnp.maximum(log_mean, 0))
    return r, gap, log_k_ratio, log_r_ratio


@custom_jvp
def _negative_binomial_deviance(log_mean: Array, log_r: Array, k: Array) -> Array:
    """k log(k / m) - (k + r) log((k + r) / (m + r)), what the count adds to it and what the concentration does."""
    r, gap, log_k_ratio, log_r_ratio = _negative_binomial_parts(log_mean, log_r, k)
    return _deviance(k, -gap, log_k_ratio) + _deviance(r, gap, log_r_ratio)


def _negative_binomial_slopes(log_mean: Array, log_r: Array, k: Array) -> tuple[Array | None, ...]:
    r, gap, _, log_r_ratio = _negative_binomial_parts(log_mean, log_r, k)
    return -gap, _deviance(r, gap, log_r_ratio), None


_negative_binomial_deviance.defslopes(_negative_binomial_slopes)


@compiled()
def negative_binomial_nll(
    log_mean: ArrayLike, log_concentration: ArrayLike, counts: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""Negative binomial distribution: counts that vary by more than a Poisson's, with variance m + m^2 / r.

    .. math:: \log\Gamma(r) + \log k! - \log\Gamma(k + r) - k \log\frac{m}{m + r} - r \log\frac{r}{m + r}

    As the concentration grows this becomes `poisson_nll`. It is the deviances of k - g from k and of r + g from r, with the
    gap g = r (k - m) / (m + r), and what Stirling's formula leaves. Value and gradient (by log_mean: -g) are right to 6 ulp
    up to counts of 1e9.

    Args:
        log_mean: the logarithm of the mean m; -inf for a mean of 0.
        log_concentration: the logarithm of the concentration r ("number of failures"). Beyond -80 and 80 (float64: 700)
            it makes no more difference.
        counts: the observation k, at least 0 (below gives NaN), which need not be whole. It has no derivative.
        where: what takes part: booleans or integers (what isn't 0) with as many axes as the result, which broadcast to it.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jaxce
    >>> print(jaxce.negative_binomial_nll(0.0, 0.0, 3))  # geometric: 4 log 2
    2.7726

    Reference: Hilbe, "Negative Binomial Regression" (2011), section 8.2 (NB2).
    """
    keep, (log_mean, log_r, k) = _arguments(
        "negative_binomial_nll", where, "counts", counts, log_mean=log_mean, log_concentration=log_concentration
    )
    limit = 80.0 if k.dtype.itemsize == 4 else 700.0
    valid, log_r = k >= 0, jnp.clip(log_r, -limit, limit)
    r, (k, positive) = jnp.exp(log_r), _counts(k)
    # Of the three log Gammas, Stirling's formula leaves log(2 pi k (k + r) / r) / 2 and mu of each.
    root = positive * jnp.sqrt(1 / positive + jnp.exp(-log_r))
    rest = (jnp.log(root) + _HALF_LOG_2PI) + _binet(positive) + (_binet(r) - _binet(positive + r))
    value = _negative_binomial_deviance(log_mean, log_r, k) + jnp.where(k == 0, 0, rest)
    return _checks.only(keep, jnp.where(valid, value, jnp.nan), 0)


# ---------------------------------------------------------------------------------------------------- vectors, mixtures


@compiled("full")
def multivariate_normal_nll(
    location: ArrayLike, scale_tril: ArrayLike, x: ArrayLike, *, full: bool = True, where: ArrayLike | None = None
) -> Array:
    r"""Normal distribution of a vector whose covariance is :math:`L L^\top`.

    .. math:: \tfrac12 |z|^2 + \sum_i \log L_{ii} + \tfrac n2 \log 2\pi, \qquad L z = x - m

    As exact as the triangular solution, whose error grows with the condition of L: 8 ulp in one dimension.

    Args:
        location: the mean m, [..., n].
        scale_tril: L, [..., n, n], lower triangular with a positive diagonal (else NaN): the Cholesky factor of the
            covariance. What stands above the diagonal is not read.
        x: the observation, [..., n]. The batch axes of all three broadcast.
        full: whether to add the constant.
        where: which vectors take part: booleans or integers (what isn't 0) with as many axes as the result, which
            broadcast to it.

    Returns:
        One value per vector, in nats; half precision is computed and returned in float32.

    >>> import jax.numpy as jnp, jaxce
    >>> print(jaxce.multivariate_normal_nll(jnp.zeros(2), jnp.eye(2), jnp.array([3.0, 4.0]), full=False))
    12.5

    Reference: Anderson, "An Introduction to Multivariate Statistical Analysis" (2003), section 2.3.
    """
    function = "multivariate_normal_nll"
    m, scale = _checks.floating(function, "location", location), _checks.floating(function, "scale_tril", scale_tril)
    x = _observation(function, "x", x, m, scale)
    for name, array in (("location", m), ("x", x)):
        if array.ndim < 1:
            raise ValueError(f"{function}: {name} must have at least one axis, got {array.dtype}[]")
    n = m.shape[-1]
    _checks.same_shape(function, "scale_tril", scale, (*scale.shape[:-2], n, n), "two last axes as long as location's")
    d = jnp.subtract(*_broadcast(function, x=x, location=m))
    _checks.same_shape(function, "x", d, (*d.shape[:-1], n), "as many entries as location")
    d, scale = _checks.upcast(d, scale)
    try:
        batch = jnp.broadcast_shapes(d.shape[:-1], scale.shape[:-2])
    except ValueError:
        raise ValueError(
            f"{function}: scale_tril must have batch axes that broadcast with {d.shape[:-1]}, got {scale.shape[:-2]}"
        ) from None
    d, scale = (jnp.expand_dims(v, range(len(batch) + core - v.ndim)) for v, core in ((d, 1), (scale, 2)))
    if (keep := _checks.where_elements(function, where, batch)) is not None:
        d = jnp.where(keep[..., None], d, 0)
        # A scale that several vectors share takes part if one of them does.
        shared = tuple(a for a in range(len(batch)) if scale.shape[a] == 1)
        identity = jnp.broadcast_to(jnp.eye(n, dtype=scale.dtype), scale.shape)
        scale = jnp.where(keep.any(shared, keepdims=True)[..., None, None], scale, identity)
    # Of z L^T = d, so that a scale that all vectors share is one solution with a right-hand side in every row.
    solve = jnp.vectorize(
        functools.partial(lax.linalg.triangular_solve, lower=True, transpose_a=True), signature="(n,n),(n)->(n)"
    )
    z = solve(jnp.tril(scale), d)
    diagonal = jnp.diagonal(scale, axis1=-2, axis2=-1)
    log_scale = jnp.sum(jnp.log(jnp.where(diagonal > 0, diagonal, jnp.nan)), axis=-1)
    value = 0.5 * jnp.sum(z * z, axis=-1) + (jnp.broadcast_to(log_scale, batch) + (n * _HALF_LOG_2PI if full else 0))
    return _checks.only(keep, value, 0)


@compiled("axis")
def mixture_nll(
    log_weights: ArrayLike, component_nll: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> Array:
    r"""Mixture of distributions: :math:`-\log \sum_k w_k p_k = \log \sum_k e^{l_k} - \log \sum_k e^{l_k - \mathrm{nll}_k}`.

    Args:
        log_weights: l, the logarithms of the weights or, the same, logits: they need not be normalised. A component at
            -inf isn't there, whatever its likelihood.
        component_nll: what the components say, of a shape that broadcasts with that of the weights. +inf is a density
            of 0.
        axis: the axis of the components, or several.
        where: what takes part, booleans or integers (what isn't 0): a mask of the batch shape says which rows, one with as
            many axes as the components, to which it broadcasts, which of these. A row with none has nll 0.

    Returns:
        One value per example, of the shape without ``axis``; half precision is computed and returned in float32.

    >>> import jax.numpy as jnp, jaxce
    >>> nll = jaxce.gaussian_nll(jnp.array([-1.0, 1.0]), jnp.array([0.0, 0.0]), 1.0)
    >>> print(jaxce.mixture_nll(jnp.log(jnp.array([0.25, 0.75])), nll))
    1.1625

    Reference: Bishop, "Mixture Density Networks" (1994).
    """
    function = "mixture_nll"
    weights = _checks.floating(function, "log_weights", log_weights)
    nll = _checks.floating(function, "component_nll", component_nll)
    weights, nll = _broadcast(function, log_weights=weights, component_nll=nll)
    axes = _checks.axes(function, axis, nll.ndim)
    if where is not None:
        weights = jnp.where(_checks.where_entries(function, where, nll.shape, axes), weights, -jnp.inf)
    joint = weights - jnp.where(weights != -jnp.inf, nll, 0)
    total = logsumexp(weights, axis)
    some = total != -jnp.inf
    return jnp.where(some, jnp.where(some, total, 0) - logsumexp(joint, axis), 0)
