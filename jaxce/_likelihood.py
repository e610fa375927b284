r"""Negative log-likelihoods: how surprising is an observation to someone who believes in a distribution?

The parameters come first and are what a network emits: logits, locations, and the logarithm of whatever must be positive
(scales, rates, means, concentrations). The observation comes last. All densities are the normalised ones, in nats; all
arguments broadcast by NumPy's rules; what is outside a distribution's support, or no parameter at all, gives NaN in its
own place and nowhere else.

Factorials of large counts nearly cancel the rest of the density. So log Gamma never appears as such: with Binet's
:math:`\mu(x) = \log\Gamma(x) - (x - \tfrac12) \log x + x - \tfrac12 \log 2\pi`, which is small, what is left of the
large terms is a deviance, a sum of terms none of which is negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxce import _checks, _numerics
from jaxce._checks import Axis, compiled
from jaxce._sigmoid import sigmoid_binary_cross_entropy
from jaxce._statistics import logsumexp

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------------------------------------------- arguments


def _arguments(function: str, observed: str, x: ArrayLike, **parameters: ArrayLike) -> list[Array]:
    """The parameters and then the observation, in their common dtype and broadcast against each other."""
    arrays = {name: _checks.floating(function, name, value) for name, value in parameters.items()}
    arrays[observed] = _observation(function, observed, x, *arrays.values())
    return _broadcast(function, **arrays)


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


def _valid(condition: Array, value: Array) -> Array:
    return jnp.where(condition, value, jnp.nan)


# ---------------------------------------------------------------------------------------------------- elementary pieces


def _times_exp(x: Array, exponent: Array) -> Array:
    """x exp(exponent), by two halves: 0 times what overflows is 0, in the derivative as well."""
    half = jnp.exp(exponent / 2)
    return x * half * half


@jax.custom_jvp
def _exp_excess(x: Array) -> Array:
    """exp(x) - 1 - x >= 0, all of its digits. The derivative is exp(x) - 1."""
    near = jnp.abs(x) < 0.5
    t = jnp.where(near, x, 0)
    terms = 8 if x.dtype == jnp.float32 else 15
    series = t * t * _polynomial([1 / math.factorial(n) for n in range(2, 2 + terms)], t)
    return jnp.where(near, series, _numerics.expm1(x) - x)


@_exp_excess.defjvp
def _exp_excess_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _exp_excess(*primals), _numerics.expm1(*primals) * tangents[0]


@jax.custom_jvp
def _log_excess(x: Array) -> Array:
    """x - log(1 + x) >= 0, all of its digits. The derivative is x / (1 + x)."""
    near = jnp.abs(x) < 0.25
    t = jnp.where(near, x, 0)
    s = t / (2 + t)  # log(1 + t) = 2 atanh(s) and t - 2 s = t s
    return jnp.where(near, s * (t - 2 * s * s * _numerics._atanh_series(s * s)), x - _numerics.log1p(x))


@_log_excess.defjvp
def _log_excess_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,) = primals
    return _log_excess(x), x / (1 + x) * tangents[0]


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    total = jnp.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total


_BERNOULLI = [1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798, -174611 / 330]


def _binet(x: Array) -> Array:
    """mu(x) = log Gamma(x) - (x - 1/2) log x + x - log(2 pi) / 2 for x > 0.

    Stirling's series from 8 on; below, mu(x) - mu(x + 1) = (x + 1/2) log(1 + 1/x) - 1 = atanh(t)/t - 1, t = 1/(2x + 1).
    """
    small = x < 8
    first = jnp.where(small, x, 1)
    inverse = 1 / jnp.where(small, first + 8, x)
    count = 4 if x.dtype == jnp.float32 else 10
    coefficients = [b / ((2 * n + 1) * (2 * n + 2)) for n, b in enumerate(_BERNOULLI[:count])]
    above = inverse * _polynomial(coefficients, inverse * inverse)

    def step(x: Array) -> Array:
        u = (1 / (2 * x + 1)) ** 2
        return u * _polynomial([1 / (2 * k + 3) for k in range(9 if x.dtype == jnp.float32 else 18)], u)

    tiny = first < 1
    below = jnp.where(tiny, (first + 0.5) * (jnp.log1p(first) - jnp.log(first)) - 1, step(jnp.where(tiny, 1, first)))
    further = jnp.arange(1, 8, dtype=x.dtype).reshape((7,) + (1,) * x.ndim)
    return above + jnp.where(small, below + jnp.sum(step(first[None] + further), axis=0), 0)


def _binet_slope(x: Array) -> Array:
    return jax.jvp(_binet, (x,), (jnp.ones_like(x),))[1]


def _log_factorial_excess(k: Array) -> Array:
    """log k! - k log k + k for k >= 0: 0 at 0, and log(2 pi k) / 2 + mu(k)."""
    large, small = jnp.maximum(k, 1), jnp.clip(k, 0, 1)
    below = lax.lgamma(small + 1) - small * jnp.log(jnp.where(small == 0, 1, small)) + small
    return jnp.where(k < 1, below, 0.5 * jnp.log(large) + _HALF_LOG_2PI + _binet(large))


def _deviance(k: Array, log_ratio: Array, rate: Array) -> Array:
    """rate - k - k log(rate / k) >= 0, from log(rate / k) as well, which says more where it is small."""
    near = jnp.abs(log_ratio) < 1
    close = k * _exp_excess(jnp.where(near, log_ratio, 0))
    return jnp.where(near, close, rate - k - k * jnp.where(near, 0, log_ratio))


def _log_over(log_rate: Array, k: Array) -> Array:
    """log_rate - log k, rounded once."""
    hi, lo = _numerics.log_pair(k)
    return (log_rate - hi) - lo


# ---------------------------------------------------------------------------------------------------- real numbers


@compiled()
def bernoulli_nll(logits: ArrayLike, x: ArrayLike) -> Array:
    r"""Yes or no: :math:`-x \log \sigma(\ell) - (1 - x) \log \sigma(-\ell)`, with log-odds :math:`\ell`.

    `sigmoid_binary_cross_entropy`, with broadcasting: right to 2 ulp at every size of logit.

    Args:
        logits: the log-odds for yes.
        x: what happened: booleans, 0 or 1, or a probability between them; anything else gives NaN.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jax.numpy as jnp
    >>> import jaxce
    >>> print(jaxce.bernoulli_nll(jnp.array([0.0, 40.0]), True))
    [6.931472e-01 4.248354e-18]

    Reference: Cox, "The Regression Analysis of Binary Sequences", JRSS B 20 (1958).
    """
    z, x = _arguments("bernoulli_nll", "x", x, logits=logits)
    return _valid((x >= 0) & (x <= 1), sigmoid_binary_cross_entropy(z, x))


@compiled("full")
def gaussian_nll(location: ArrayLike, log_scale: ArrayLike, x: ArrayLike, *, full: bool = True) -> Array:
    r"""Normal distribution: :math:`\tfrac12 z^2 + \log\sigma + \tfrac12 \log 2\pi` with :math:`z = (x - m) / \sigma`.

    The entropy is log_scale + 1.4189 (log(2 pi e) / 2).

    The value is right to 3 ulp of its largest term at every size of z and scale, and the gradient to 4 ulp (by log_scale,
    where it is 1 - z^2, of the larger of these).

    Args:
        location: the mean m.
        log_scale: the logarithm of the standard deviation; half of the log-variance.
        x: the observation.
        full: whether to add the constant log(2 pi) / 2.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jaxce
    >>> print(jaxce.gaussian_nll(0.0, 0.0, 0.0), jaxce.gaussian_nll(0.0, 0.0, 2.0, full=False))
    0.9189 2.0

    Reference: Gauss, "Theoria motus corporum coelestium" (1809), section 177.
    """
    m, s, x = _arguments("gaussian_nll", "x", x, location=location, log_scale=log_scale)
    z = _times_exp(x - m, -s)
    return 0.5 * z * z + s + (_HALF_LOG_2PI if full else 0)


@compiled()
def laplace_nll(location: ArrayLike, log_scale: ArrayLike, x: ArrayLike) -> Array:
    r"""Laplace distribution: :math:`|x - m| / b + \log 2b`.

    The derivative by the location at x = m, where there is none, is 0. The entropy is log_scale + 1.6931 (log 2e).

    Value and gradient are right to 2 ulp of their largest term.

    Args:
        location: the median m.
        log_scale: the logarithm of b, the mean distance from the median.
        x: the observation.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jaxce
    >>> print(jaxce.laplace_nll(0.0, 0.0, -3.0))
    3.6931

    Reference: Laplace, "Memoire sur la probabilite des causes par les evenements" (1774).
    """
    m, s, x = _arguments("laplace_nll", "x", x, location=location, log_scale=log_scale)
    z = _times_exp(x - m, -s)
    return z * lax.sign(z) + s + math.log(2)  # jnp.abs has the derivative 1 at 0


def _log1p_square(d: Array, log_scale: Array, log_df: Array) -> Array:
    """log(1 + z^2 / nu), z = d / scale."""
    size = jnp.abs(d)
    log_ratio = jnp.log(jnp.where(size == 0, 1, size)) - (log_scale + log_df / 2)
    far = (size > 0) & (log_ratio > 0)
    ratio = jnp.where(far, jnp.exp(-jnp.abs(log_ratio)), _times_exp(_times_exp(size, -log_scale), -log_df / 2))
    return jnp.where(far, 2 * log_ratio, 0) + _numerics.log1p(ratio * ratio)


def _pull(weight: Array, d: Array, log_scale: Array, log_df: Array) -> tuple[Array, Array]:
    """weight d^2 / (d^2 + c^2) and weight d / (d^2 + c^2), c^2 = nu scale^2: divided by the larger of |d| and c first."""
    c = _times_exp(jnp.exp(log_df / 2), log_scale)
    unit = lax.stop_gradient(jnp.maximum(jnp.maximum(jnp.abs(d), c), float(jnp.finfo(d.dtype).tiny)))
    a, b = d / unit, c / unit
    total = a * a + b * b
    total = jnp.where(total == 0, 1, total)
    return weight * a * a / total, weight / unit * a / total


@jax.custom_jvp
def _student_t_log(d: Array, log_scale: Array, log_df: Array) -> Array:
    return _log1p_square(d, log_scale, log_df)


@_student_t_log.defjvp
def _student_t_log_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    share, slope = _pull(jnp.ones_like(primals[0]), *primals)
    dd, ds, ddf = tangents
    return _student_t_log(*primals), 2 * slope * dd - share * (2 * ds + ddf)


@jax.custom_jvp
def _student_t_kernel(d: Array, log_scale: Array, log_df: Array) -> Array:
    """(nu + 1) / 2 log(1 + z^2 / nu), z = d / scale."""
    return (jnp.exp(log_df) + 1) / 2 * _log1p_square(d, log_scale, log_df)


@_student_t_kernel.defjvp
def _student_t_kernel_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    df = jnp.exp(primals[2])
    share, _ = _pull(jnp.ones_like(df), *primals)
    # log(1 + a) - a / (1 + a) with a / (1 + a) = share
    near = share < 0.2
    curved = jnp.where(near, _log_excess(-jnp.where(near, share, 0)), _student_t_log(*primals) - share)
    by_scale, by_d = _pull(df + 1, *primals)
    dd, ds, ddf = tangents
    return _student_t_kernel(*primals), by_d * dd - by_scale * ds + (df * curved - share) / 2 * ddf


@compiled()
def student_t_nll(location: ArrayLike, log_scale: ArrayLike, log_df: ArrayLike, x: ArrayLike) -> Array:
    r"""Student's t distribution, for errors with heavy tails.

    .. math:: \tfrac{\nu + 1}{2} \log\left(1 + \tfrac{z^2}{\nu}\right) + \log\sigma
        + \log \frac{\sqrt{\nu\pi}\; \Gamma(\nu/2)}{\Gamma((\nu + 1)/2)}, \qquad z = (x - m) / \sigma

    As the degrees of freedom grow this becomes `gaussian_nll`; beyond exp(70) of them (float64: exp(650)) it is.

    The value is right to 5 ulp of its largest term and the gradient to 30, at every size of z.

    Args:
        location: the median m.
        log_scale: the logarithm of the scale sigma, which is not the standard deviation.
        log_df: the logarithm of the degrees of freedom nu.
        x: the observation.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jaxce
    >>> print(jaxce.student_t_nll(0.0, 0.0, 0.0, 1.0))  # Cauchy: log(2 pi)
    1.8379

    Reference: Student, "The Probable Error of a Mean", Biometrika 6 (1908).
    """
    m, s, log_df, x = _arguments("student_t_nll", "x", x, location=location, log_scale=log_scale, log_df=log_df)
    log_df = jnp.minimum(log_df, 70.0 if x.dtype == jnp.float32 else 650.0)
    df = jnp.exp(log_df)
    # of the two log Gammas is left: nu (1/nu - log(1 + 1/nu)) / 2 + mu(nu / 2) - mu((nu + 1) / 2)
    constant = df / 2 * _log_excess(1 / df) + _binet(df / 2) - _binet((df + 1) / 2)
    return _student_t_kernel(x - m, s, log_df) + s + (constant + _HALF_LOG_2PI)


# ---------------------------------------------------------------------------------------------------- positive numbers


@compiled()
def exponential_nll(log_rate: ArrayLike, x: ArrayLike) -> Array:
    r"""Exponential distribution: :math:`\lambda x - \log\lambda`.

    The entropy is 1 - log_rate.

    Value and gradient are right to 2 ulp of their largest term.

    Args:
        log_rate: the logarithm of the rate, minus that of the mean.
        x: the observation, at least 0; below gives NaN.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jaxce
    >>> print(jaxce.exponential_nll(0.0, 3.0))
    3.0

    Reference: Johnson, Kotz and Balakrishnan, "Continuous Univariate Distributions" 1 (1994), chapter 19.
    """
    log_rate, x = _arguments("exponential_nll", "x", x, log_rate=log_rate)
    return _valid(x >= 0, _times_exp(x, log_rate) - log_rate)


@compiled()
def gamma_nll(log_concentration: ArrayLike, log_rate: ArrayLike, x: ArrayLike) -> Array:
    r"""Gamma distribution: :math:`\beta x - \alpha \log(\beta x) + \log x + \log\Gamma(\alpha)`.

    Its mean is alpha / beta. At x = 0 it is -log_rate for alpha = 1, and infinite otherwise.

    The value is right to 20 ulp of its largest term once alpha log alpha has been taken out of it, at concentrations of
    1e9; the gradient by log_rate is beta x - alpha to a hundredth of an ulp of alpha, or 8 of itself.

    Args:
        log_concentration: the logarithm of the concentration (shape) alpha.
        log_rate: the logarithm of the rate beta, minus that of the scale.
        x: the observation, at least 0; below gives NaN.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jaxce
    >>> print(jaxce.gamma_nll(0.0, 0.0, 3.0))  # exponential
    3.0

    Reference: Johnson, Kotz and Balakrishnan, "Continuous Univariate Distributions" 1 (1994), chapter 17.
    """
    log_a, log_rate, x = _arguments("gamma_nll", "x", x, log_concentration=log_concentration, log_rate=log_rate)
    positive = jnp.where(x > 0, x, 1)
    log_x, log_x_rest = _numerics.log_pair(positive)
    sum_, rest = _numerics.two_sum(log_rate, log_x)
    log_ratio = (sum_ - log_a) + (rest + log_x_rest)
    a = jnp.exp(log_a)
    deviance = _deviance(a, log_ratio, _times_exp(positive, log_rate))
    value = deviance + (log_x - 0.5 * log_a) + (_binet(a) + _HALF_LOG_2PI)
    at_zero = jnp.where(log_a == 0, -log_rate, jnp.where(log_a > 0, jnp.inf, -jnp.inf) + log_a)
    return _valid(x >= 0, jnp.where(x == 0, at_zero, value))


# ---------------------------------------------------------------------------------------------------- counts


def _counts(k: Array) -> tuple[Array, Array]:
    """Counts as constants, and the same with 1 in place of what isn't positive."""
    k = lax.stop_gradient(k)
    return k, jnp.where(k > 0, k, 1)


@compiled("full")
def poisson_nll(log_rate: ArrayLike, counts: ArrayLike, *, full: bool = True) -> Array:
    r"""Poisson distribution: :math:`\lambda - k \log\lambda + \log k!`.

    Computed as the deviance :math:`\lambda - k - k \log(\lambda / k) \ge 0` and the rest of Stirling's formula, so that
    counts of 1e9 lose nothing; the gradient is :math:`\lambda - k`, also where these nearly agree.

    The value is right to 3 ulp of the larger of the deviance and the rest, up to counts of 1e9, and the gradient to a
    hundredth of an ulp of the count, or 2 of itself.

    Args:
        log_rate: the logarithm of the rate; -inf for a rate of 0.
        counts: the observation k, at least 0 (below gives NaN), which need not be whole. It has no derivative.
        full: whether to add the constant log k!.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jax.numpy as jnp
    >>> import jaxce
    >>> print(jaxce.poisson_nll(0.0, jnp.array([0, 1, 2])))
    [1. 1. 1.6931]

    Reference: Poisson, "Recherches sur la probabilite des jugements" (1837), section 81.
    """
    log_rate, k = _arguments("poisson_nll", "counts", counts, log_rate=log_rate)
    k, positive = _counts(k)
    rate = jnp.exp(log_rate)
    value = jnp.where(k == 0, rate, _deviance(positive, _log_over(log_rate, positive), rate))
    rest = _log_factorial_excess(positive) if full else positive - positive * jnp.log(positive)
    return _valid(k >= 0, value + jnp.where(k == 0, 0, rest))


@jax.custom_jvp
def _negative_binomial(log_mean: Array, log_r: Array, k: Array) -> Array:
    """(k + r) KL(k / (k + r) || m / (m + r)), and what Stirling's formula leaves of the three log Gammas."""
    r, (_, positive) = jnp.exp(log_r), _counts(k)
    n = positive + r
    log_ratio = _log_over(log_mean, positive)
    # the divergence is the same of both pairs of complements: q is the smaller probability
    s, x = jnp.minimum(positive, r), jnp.where(positive < r, log_ratio, -log_ratio)
    q, limit = s / n, 80.0 if k.dtype == jnp.float32 else 700.0
    odds = q * _numerics.expm1(jnp.minimum(x, limit))
    close = s * _exp_excess(x) - n * _log_excess(odds)
    medium = n * _numerics.log1p(odds) - s * x
    far = (n - s) * x + n * jnp.log(q + jnp.exp(-x))
    deviance = jnp.where(jnp.abs(x) < 1, close, jnp.where(x < limit, medium, far))
    rest = 0.5 * jax.nn.softplus(jnp.log(positive) - log_r) + (_binet(r) - _binet(n)) + _log_factorial_excess(positive)
    # r log(1 + m / r)
    mean = jnp.exp(jnp.minimum(log_mean, log_r))
    none = jnp.where(log_mean < log_r, mean - r * _log_excess(mean / r), r * jax.nn.softplus(log_mean - log_r))
    return jnp.where(k == 0, none, deviance + rest)


@_negative_binomial.defjvp
def _negative_binomial_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    log_mean, log_r, k = primals
    r, (_, positive) = jnp.exp(log_r), _counts(k)
    log_ratio = _log_over(log_mean, positive)
    near = (k > 0) & (jnp.abs(log_ratio) < 1)
    below, above = jax.nn.sigmoid(log_r - log_mean), jax.nn.sigmoid(log_mean - log_r)
    # r (m - k) / (m + r)
    above = jnp.where(log_mean < log_r, jnp.exp(log_mean) * below, r * above)
    by_mean = jnp.where(near, positive * _numerics.expm1(jnp.where(near, log_ratio, 0)) * below, above - k * below)
    # r (log(1 + a) - a / (1 + a)) with 1 + a = (1 + m / r) / (1 + k / r)
    share = by_mean / r
    flat = jnp.abs(share) < 0.2
    log_n = jnp.where(k > 0, jax.nn.softplus(jnp.log(positive) - log_r), 0)
    curved = r * (jax.nn.softplus(log_mean - log_r) - log_n) - by_mean
    by_r = jnp.where(flat, r * _log_excess(-jnp.where(flat, share, 0)), curved)
    by_r = by_r - 0.5 * k / (k + r) + r * (_binet_slope(r) - _binet_slope(k + r))
    return _negative_binomial(*primals), by_mean * tangents[0] + by_r * tangents[1]


@compiled()
def negative_binomial_nll(log_mean: ArrayLike, log_concentration: ArrayLike, counts: ArrayLike) -> Array:
    r"""Negative binomial distribution: counts that vary by more than a Poisson's, with variance m + m^2 / r.

    .. math:: \log\Gamma(r) + \log k! - \log\Gamma(k + r) - k \log\frac{m}{m + r} - r \log\frac{r}{m + r}

    As the concentration grows this becomes `poisson_nll`.

    The value is right to 20 ulp up to counts of 1e9. So is the gradient by log_mean, r (m - k) / (m + r), also where m and
    k nearly agree; that by log_concentration is right to 40 ulp of the smaller of k and r, or of 1.

    Args:
        log_mean: the logarithm of the mean m; -inf for a mean of 0.
        log_concentration: the logarithm of the concentration r ("number of failures"). Beyond -80 and 80 (float64: 700)
            it makes no more difference.
        counts: the observation k, at least 0 (below gives NaN), which need not be whole. It has no derivative.

    Returns:
        One value per element, in nats; half precision is computed and returned in float32.

    >>> import jaxce
    >>> print(jaxce.negative_binomial_nll(0.0, 0.0, 3))  # geometric: 4 log 2
    2.7726

    Reference: Hilbe, "Negative Binomial Regression" (2011), section 8.2 (NB2).
    """
    log_mean, log_r, k = _arguments(
        "negative_binomial_nll", "counts", counts, log_mean=log_mean, log_concentration=log_concentration
    )
    limit = 80.0 if k.dtype == jnp.float32 else 700.0
    k = lax.stop_gradient(k)
    safe = jnp.where(k >= 0, k, 0)
    return _valid(k >= 0, _negative_binomial(log_mean, jnp.clip(log_r, -limit, limit), safe))


# ---------------------------------------------------------------------------------------------------- vectors, mixtures


@compiled("full")
def multivariate_normal_nll(location: ArrayLike, scale_tril: ArrayLike, x: ArrayLike, *, full: bool = True) -> Array:
    r"""Normal distribution of a vector whose covariance is :math:`L L^\top`.

    .. math:: \tfrac12 |z|^2 + \sum_i \log L_{ii} + \tfrac n2 \log 2\pi, \qquad L z = x - m

    In one dimension the gradient has 8 ulp of its largest term from standard deviations of 1e-15 to 1e10; in more it is
    as exact as the triangular solution, whose error grows with the condition of L.

    Args:
        location: the mean m, [..., n].
        scale_tril: L, [..., n, n], lower triangular with a positive diagonal (else NaN): the Cholesky factor of the
            covariance. What stands above the diagonal is not read.
        x: the observation, [..., n]. The batch axes of all three broadcast.
        full: whether to add the constant.

    Returns:
        One value per vector, in nats; half precision is computed and returned in float32.

    >>> import jax.numpy as jnp
    >>> import jaxce
    >>> print(jaxce.multivariate_normal_nll(jnp.zeros(2), jnp.eye(2), jnp.array([3.0, 4.0]), full=False))
    12.5

    Reference: Anderson, "An Introduction to Multivariate Statistical Analysis" (2003), section 2.3.
    """
    function = "multivariate_normal_nll"
    m, scale = _checks.floating(function, "location", location), _checks.floating(function, "scale_tril", scale_tril)
    x = _observation(function, "x", x, m, scale)
    if m.ndim < 1:
        raise ValueError(f"{function}: location must have at least one axis, got {m.dtype}[]")
    if x.ndim < 1:
        raise ValueError(f"{function}: x must have at least one axis, got {x.dtype}[]")
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
    lower = jnp.broadcast_to(jnp.tril(scale), (*batch, n, n))
    z = jax.scipy.linalg.solve_triangular(lower, jnp.broadcast_to(d, (*batch, n))[..., None], lower=True)[..., 0]
    diagonal = jnp.diagonal(lower, axis1=-2, axis2=-1)
    log_scale = jnp.sum(jnp.log(_valid(diagonal > 0, diagonal)), axis=-1)
    return 0.5 * jnp.sum(z * z, axis=-1) + log_scale + (n * _HALF_LOG_2PI if full else 0)


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
        where: which rows (a mask of the batch shape) or which components take part. A row with none has nll 0.

    Returns:
        One value per example, of the shape without ``axis``; half precision is computed and returned in float32.

    >>> import jax.numpy as jnp
    >>> import jaxce
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
    mask = ~jnp.isneginf(weights)
    if where is not None:
        mask &= _checks.where_entries(function, where, nll.shape, axes)
    joint = jnp.where(mask, weights - jnp.where(mask, nll, 0), -jnp.inf)
    total, some = logsumexp(weights, axis, mask), jnp.any(mask, axes)
    return jnp.where(some, jnp.where(some, total, 0) - logsumexp(joint, axis), 0)
