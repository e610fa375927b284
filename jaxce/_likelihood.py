r"""Negative log-likelihoods of observations under probability distributions.

The parameters come first, as a network emits them: logits, locations, and the logarithm of whatever must be positive
(scales, rates, means, concentrations). The observation comes last. All densities are normalised, in nats, and computed
element by element. An observation outside the distribution's support gives NaN for its own element only. Elements that
``where`` leaves out (False, or the integer 0) give 0, with derivatives of 0 of every order, whatever they hold.

Arguments with the same number of axes broadcast by NumPy's rules, and an argument with fewer axes is repeated to the shape
of those. What would make the result larger than every argument, such as predictions [N, 1] and observations [N], is an
error, since the result [N, N] is rarely meant. For a mixture give observations an axis of their own: ``x[:, None]``.

Values and derivatives are exact over the whole range of the log-parameters for which they are finite numbers of the
dtype, such as scales of exp(-170) in float32; second derivatives as long as the largest of their terms is below an eighth
of the largest number. Where a value is infinite, its derivatives may be NaN. Errors are given in ulp (units in the last
place) of the largest term of a value, and of the largest term of an entry of a gradient.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxce import _checks, _mesh, _platforms
from jaxce._checks import ArrayLike, Axis, compiled
from jaxce._rules import alike, custom_jvp, product, smallest
from jaxce._sigmoid import sigmoid_binary_cross_entropy
from jaxce._statistics import logsumexp
from jaxce._terms import polynomial

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------------------------------------------- arguments


def _arguments(where: ArrayLike | None, observed: str | None, **given: ArrayLike) -> tuple[Array | None, list[Array]]:
    """The mask (None: all elements), and the arguments in their common dtype and shape.

    Masked elements observe 1 where all parameters are 0, which is ordinary for every distribution.
    """
    arrays = {name: _checks.floating(name, value) for name, value in given.items() if name != observed}
    if observed is not None:
        arrays[observed] = _checks.real(observed, given[observed], _checks.compute_dtype(*arrays.values()))
    arrays = dict(zip(arrays, _broadcast(**arrays), strict=True))
    keep = _checks.where_elements(where, next(iter(arrays.values())).shape)
    return keep, [_checks.only(keep, a, float(name == observed)) for name, a in arrays.items()]


def _broadcast(**arrays: Array) -> list[Array]:
    """The arrays in their common dtype and shape, which no array with fewer axes than others may enlarge."""
    shape = _common_shape({name: (a, a.shape) for name, a in arrays.items()})
    return list(alike(*(jnp.broadcast_to(a, shape) for a in _upcast(*arrays.values()))))


def _upcast(*arrays: Array) -> tuple[Array, ...]:
    """As `_checks.upcast`, but Python numbers, which are weakly typed, take the dtype of the arrays."""
    strong = [a for a in arrays if not jax.typeof(a).weak_type]
    return tuple(a.astype(_checks.compute_dtype(*(strong or arrays))) for a in arrays)


def _common_shape(arrays: dict[str, tuple[Array, tuple[int, ...]]]) -> tuple[int, ...]:
    """The shape to which all broadcast. Each array comes with the shape of its batch."""
    shape: tuple[int, ...] = ()
    before: list[str] = []
    for name, (array, own) in arrays.items():
        try:
            shape = jnp.broadcast_shapes(shape, own)
        except ValueError:
            raise _checks.ArgumentValueError(
                f"{name} must broadcast with {' and '.join(before)}, {shape}, got {_checks.describe(array)}"
            ) from None
        before.append(name)
    full = [own for _, own in arrays.values() if len(own) == len(shape)]
    written = jnp.broadcast_shapes(*full)  # what arrays of all axes make: their 1s were written on purpose
    if 0 in shape or any((1,) * (len(shape) - len(own)) + own == shape for _, own in arrays.values()):
        return shape
    for name, (array, own) in arrays.items():
        if np.broadcast_shapes(written, own) != written:
            other = next(n for n, (_, s) in arrays.items() if len(s) == len(shape))
            new = ", ".join(["None"] * (len(shape) - len(own)))
            fits = math.prod(own) == math.prod(written)
            hint = f"{name}.reshape({written}) to pair it with {other}, or " if fits else ""
            raise _checks.ArgumentValueError(
                f"{name} must have {len(shape)} axes, as {other} {_checks.describe(arrays[other][0])} has, or "
                f"broadcast to its shape, got {_checks.describe(array)}, which would make the result {shape}; give {hint}"
                f"{name}[{new}] for all combinations"
            )
    return shape


# ---------------------------------------------------------------------------------------------------- elementary functions
#
# Between exp(-180) and exp(180) a float32 overflows twice over, and its squares four times. The functions here don't, nor
# do their derivatives, where the result is a number: scales are products of mantissas and powers of two, logarithms have
# derivatives by logarithms, and a reciprocal's derivative multiplies twice instead of squaring.


def _times_exp(x: Array, *exponents: Array) -> Array:
    """x exp(e1) exp(e2) ...: no factor or partial product over- or underflows unless the result does; 0 times all is 0."""
    # log 2 as high + low, so that the multiples of high are exact
    if x.dtype.itemsize == 4:
        high, low, most, digits, bias, integer = 2839 / 2**12, 3.1946184945309417e-05, 1e3, 23, 127, jnp.int32
    else:
        high, low, most, digits, bias, integer = 190530846196 / 2**38, 1.6465949582897081e-12, 1e4, 52, 1023, jnp.int64
    exponents = tuple(lax.clamp(jnp.asarray(-most, x.dtype), e, jnp.asarray(most, x.dtype)) for e in exponents)
    powers = [lax.stop_gradient(jnp.round(e * (1 / math.log(2)))) for e in exponents]
    power = sum(powers[1:], powers[0])
    # what is left of opposite exponents is exactly 0
    left = [e - n * high for e, n in zip(exponents, powers, strict=True)]
    mantissa = sum(left[1:], left[0]) - power * low
    # 2^power in four steps, which over- or underflow only in the direction of the result
    power = jnp.clip(power - 2, -4 * (bias - 4), 4 * (bias - 4))
    quarter = jnp.floor(power / 4)
    step, last = (
        lax.bitcast_convert_type((n.astype(integer) + bias) << digits, x.dtype) for n in (quarter, power - 3 * quarter)
    )
    return _times_mantissa(x * step * step * step * last, mantissa)


@custom_jvp
def _mantissa(x: Array) -> Array:
    """4 exp(x) > 1 of up to three remainders: so no product before this one is larger than the result."""
    return 4 * _platforms.fused(jnp.exp(x))


_mantissa.defslopes(lambda x: (_mantissa(x),))


@custom_jvp
def _times_mantissa(x: Array, exponent: Array) -> Array:
    """4 x exp(exponent): a plain product, which XLA:CPU fuses, as neither is 0 where the other is infinite."""
    return x * _mantissa(exponent)


@_times_mantissa.defjvp
def _times_mantissa_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    value = _times_mantissa(*primals)
    return value, product(tangents[0], _mantissa(primals[1])) + product(value, tangents[1])


def _exp(*exponents: Array) -> Array:
    return _times_exp(jnp.ones_like(exponents[0]), *exponents)


@custom_jvp
def _reciprocal(x: Array) -> Array:
    """1 / x."""
    return _platforms.fused(1 / x)


@_reciprocal.defjvp
def _reciprocal_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = _reciprocal(*primals)
    return inverse, -product(product(tangents[0], inverse), inverse)


@custom_jvp
def _log(x: Array) -> Array:
    """log x, x > 0."""
    return _platforms.fused(jnp.log(x))


_log.defslopes(lambda x: (_reciprocal(x),))


@custom_jvp
def _log_of(x: Array, sum_of_logs: Array) -> Array:
    """log x, given also as a sum of logarithms: its value where x is too large or small, and its derivatives everywhere."""
    inside = (x >= smallest(x)) & (x < jnp.inf)
    return jnp.where(inside, jnp.log(jnp.where(inside, x, 1)), sum_of_logs)


_log_of.defslopes(lambda x, sum_of_logs: (None, jnp.ones_like(x)))


def _odds(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """exp(-|a - b|), exp(a) / (exp(a) + exp(b)) and exp(b) / (exp(a) + exp(b))."""
    larger = a > b
    sign = jnp.where(larger, -1, 1).astype(a.dtype)
    e = _exp(sign * a, -sign * b)
    most = _reciprocal(1 + e)
    return e, jnp.where(larger, most, e * most), jnp.where(larger, e * most, most)


def _times_share(x: Array, a: Array, b: Array) -> Array:
    """x exp(a) / (exp(a) + exp(b))."""
    larger = a > b
    most = _reciprocal(1 + _odds(a, b)[0])
    return _times_exp(product(x, most), jnp.where(larger, 0, a), jnp.where(larger, 0, -b))


def _atanh_series(u: Array) -> Array:
    """(atanh(s) / s - 1) / u = 1/3 + u/5 + u^2/7 + ..., u = s^2 <= 1/9."""
    return polynomial([1 / (2 * n + 3) for n in range(9 if u.dtype.itemsize == 4 else 18)], u)


def _log1p_over(v: Array) -> Array:
    """log(1 + v) / v for 0 <= v <= 1."""
    half = _reciprocal(2 + v)
    s = v * half
    return 2 * half * (1 + s * s * _atanh_series(s * s))


def _log1p(v: Array) -> Array:
    """log(1 + v) for 0 <= v <= 1."""
    return v * _log1p_over(v)


def _log1p_any(v: Array) -> Array:
    """log(1 + v) for v >= 0."""
    small = v <= 1
    return _log1p(jnp.where(small, v, 0)) + jnp.log(jnp.where(small, 1, 1 + v))


def _log1p_excess(v: Array) -> Array:
    """(log(1 + v) - v / (1 + v)) / v^2 for 0 <= v <= 1."""
    half = _reciprocal(2 + v)
    s = v * half
    return 2 * half * half * (_reciprocal(1 + s) + s * _atanh_series(s * s))


# ---------------------------------------------------------------------------------------------------- deviances, log Gamma
#
# Where log Gamma stands in a density, it cancels most of the rest. With what Stirling's formula leaves of it, Binet's
# mu(x) = log Gamma(x) - (x - 1/2) log x + x - log(2 pi) / 2, there remain small terms and a deviance,
# k (s - log(1 + s)) >= 0, which is formed from the gap s. So counts of 1e9 lose nothing.


def _deviance(s: Array, square: Array, far: Array) -> Array:
    """k (s - log(1 + s)) from square = k s^2 where s is small, and ``far``, the same as it stands, where it isn't."""
    near = (s > -0.5) & (s < 1)
    s = jnp.where(near, s, 0)
    # log(1 + s) = 2 (u + u^3/3 + u^5/5 + ...) with u = s / (2 + s), and s - 2 u = s u
    half = _reciprocal(2 + s)
    u = s * half
    return jnp.where(near, square * half * (1 - 2 * u * _atanh_series(u * u) * half), far)


# x mu(x) for x >= 1 as a polynomial in u = 1 / (x^2 + c), the one through its values at Chebyshev's points: c and the
# coefficients, by the size of the numbers. mu is right to 4e-11 and 4e-18, x mu'(x) to 4e-9 and 2e-17. For 8 bytes the
# points go on to 1 / x = 1.1, as at an end a second derivative would lose digits; that by log x is right to 6e-16.
# fmt: off
_BINET = {
    4: (0.5, [
        0.08333333320622581, -0.002777752876605211, -0.0005961041311562421, -0.00048341846707122404,
        9.275926453577577e-05, -0.00030512568422685725, 0.00017439593806923027, -9.077837760504846e-05
    ]),
    8: (1.1, [
        0.08333333333333333, -0.002777777777775703, -0.0022619047626908813, -0.0022103173392161576,
        -0.001938814862092844, -0.0023762614831388295, -0.0005571345992992676, -0.009416759612919547,
        0.04118871293714904, -0.2608594000583972, 1.457968343243563, -7.356765312992347, 32.02505447095957,
        -118.28746928032817, 365.7594679138561, -937.0370496462566, 1967.5604636537198, -3342.518940877319,
        4515.019555157412, -4731.30971552384, 3705.7718863245614, -2041.3822057758332, 705.6862067363312,
        -115.30196539204688
    ]),
}
# fmt: on


def _binet(w: Array) -> Array:
    """mu(x) for x = 1 / w >= 1."""
    c, coefficients = _BINET[w.dtype.itemsize]
    return polynomial(coefficients, w * w * _reciprocal(1 + c * w * w)) * w


def _log_gamma_1p(x: Array) -> Array:
    """log Gamma(1 + x) for 0 <= x < 1 or so, to an ulp or two of 1."""
    return (x + 0.5) * _log1p(x) - x - (1 - _HALF_LOG_2PI) + _binet(_reciprocal(1 + x))


def _stirling(k: Array) -> Array:
    """log k! - k log k + k of counts, 0 at 0."""
    many, part = jnp.where(k >= 1, k, 1), jnp.where(k > 0, jnp.where(k < 1, k, 1), 1)
    few = _log_gamma_1p(part) - part * _log(part) + part
    large = 0.5 * _log(many) + (_binet(_reciprocal(many)) + _HALF_LOG_2PI)
    return jnp.where(k >= 1, large, jnp.where(k > 0, few, 0))


# ---------------------------------------------------------------------------------------------------- real numbers


@compiled()
def bernoulli_nll(logits: ArrayLike, x: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    r"""Negative log-likelihood of a Bernoulli distribution, of yes or no.

    .. math:: -x \log \sigma(\ell) - (1 - x) \log \sigma(-\ell)

    This is `sigmoid_binary_cross_entropy` with the broadcasting of likelihoods. It is right to 2 ulp (gradient: 4) for
    logits of every size.

    Args:
      logits: the log-odds of yes.
      x: the observation: booleans, 0 or 1, or a probability in between; anything else gives NaN.
      where: which elements take part: a mask with as many axes as the result, to which it broadcasts.

    Returns:
      One value per element, in nats; half precision is computed and returned in float32.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.bernoulli_nll(jnp.array([0.0, 40.0]), True))
      [6.931472e-01 4.248354e-18]

    References:
      Cox, "The Regression Analysis of Binary Sequences", JRSS B 20 (1958).
    """
    keep, (z, x) = _arguments(where, "x", logits=logits, x=x)
    return _checks.only(keep, jnp.where((x >= 0) & (x <= 1), sigmoid_binary_cross_entropy(z, x), jnp.nan), 0)


@compiled("full")
def gaussian_nll(
    location: ArrayLike, log_scale: ArrayLike, x: ArrayLike, *, full: bool = True, where: ArrayLike | None = None
) -> Array:
    r"""Negative log-likelihood of a normal distribution.

    .. math:: \tfrac12 z^2 + \log\sigma + \tfrac12 \log 2\pi, \qquad z = (x - m) / \sigma

    The entropy is log_scale + 1.4189 (log(2 pi e) / 2). The gradient by log_scale is 1 - z^2. Value and gradient are right
    to 7 ulp.

    Args:
      location: the mean m.
      log_scale: the logarithm of the standard deviation, which is half of the log-variance.
      x: the observation.
      full: whether to include the constant log(2 pi) / 2.
      where: which elements take part: a mask with as many axes as the result, to which it broadcasts.

    Returns:
      One value per element, in nats; half precision is computed and returned in float32.

    Examples:
      >>> import jaxce
      >>> print(jaxce.gaussian_nll(0, 0, 0), jaxce.gaussian_nll(0.0, 0.0, 2.0, full=False))
      0.9189 2.0

      Missing observations, here NaN, are left out by ``where``:

      >>> import jax.numpy as jnp
      >>> measured = jnp.array([0.0, jnp.nan])
      >>> print(jaxce.gaussian_nll(0.0, 0.0, measured, where=~jnp.isnan(measured)))
      [0.9189385 0.       ]

    References:
      Gauss, "Theoria motus corporum coelestium" (1809), section 177.
    """
    keep, (m, s, x) = _arguments(where, "x", location=location, log_scale=log_scale, x=x)
    z = _times_exp(x - m, -s)
    return _checks.only(keep, product(0.5 * z, z) + s + (_HALF_LOG_2PI if full else 0), 0)


@compiled()
def gaussian_relative_entropy(
    p_location: ArrayLike,
    p_log_scale: ArrayLike,
    q_location: ArrayLike = 0.0,
    q_log_scale: ArrayLike = 0.0,
    *,
    where: ArrayLike | None = None,
) -> Array:
    r"""Relative entropy (Kullback-Leibler divergence) of two normal distributions.

    .. math:: D(p \| q) = \log\frac{\sigma_q}{\sigma_p} + \frac{\sigma_p^2 + (m_p - m_q)^2}{2 \sigma_q^2} - \frac12

    With the standard normal distribution as q, the default, the sum over the latent variables is the term that a
    variational autoencoder adds to its reconstruction loss. It is computed as
    :math:`\tfrac12 z^2 + \tfrac12 (e^{2\delta} - 1 - 2\delta)`, with :math:`z = (m_p - m_q) / \sigma_q` and
    :math:`\delta = \log\sigma_p - \log\sigma_q`. Neither part is negative, so nothing is lost where the distributions are
    nearly equal. Value and gradient are right to 8 ulp.

    Args:
      p_location: the mean of p.
      p_log_scale: the logarithm of the standard deviation of p, which is half of the log-variance.
      q_location: the mean of q.
      q_log_scale: the logarithm of the standard deviation of q.
      where: which elements take part: a mask with as many axes as the result, to which it broadcasts.

    Returns:
      One value per element, in nats; half precision is computed and returned in float32.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> location, log_scale = jnp.array([[0.0, 1.0]]), jnp.array([[0.0, -1.0]])
      >>> print(jaxce.gaussian_relative_entropy(location, log_scale).sum(-1))
      [1.0676676]

    References:
      Kullback and Leibler, "On Information and Sufficiency", Annals of Mathematical Statistics 22 (1951);
      Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014, https://arxiv.org/abs/1312.6114.
    """
    keep, (m, s, q_m, q_s) = _arguments(
        where,
        None,
        p_location=p_location,
        p_log_scale=p_log_scale,
        q_location=q_location,
        q_log_scale=q_log_scale,
    )
    z, log_ratio = _times_exp(m - q_m, -q_s), 2 * (s - q_s)
    near = jnp.abs(log_ratio) < 1
    x = jnp.where(near, log_ratio, 0)
    terms = 13 if x.dtype.itemsize == 4 else 21
    series = x * x * polynomial([0.5 / math.factorial(n + 2) for n in range(terms)], x)
    excess = jnp.where(near, series, _times_exp(jnp.full_like(s, 0.5), 2 * s, -2 * q_s) - 0.5 - 0.5 * log_ratio)
    return _checks.only(keep, product(0.5 * z, z) + excess, 0)


@compiled()
def laplace_nll(location: ArrayLike, log_scale: ArrayLike, x: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    r"""Negative log-likelihood of a Laplace distribution.

    .. math:: |x - m| / b + \log 2b

    The derivative by the location at x = m, where there is a kink, is 0. The entropy is log_scale + 1.6931 (log 2e). Value
    and gradient are right to 4 ulp.

    Args:
      location: the median m.
      log_scale: the logarithm of b, the mean absolute deviation from the median.
      x: the observation.
      where: which elements take part: a mask with as many axes as the result, to which it broadcasts.

    Returns:
      One value per element, in nats; half precision is computed and returned in float32.

    Examples:
      >>> import jaxce
      >>> print(jaxce.laplace_nll(0.0, 0.0, -3.0))
      3.6931

    References:
      Laplace, "Memoire sur la probabilite des causes par les evenements" (1774).
    """
    keep, (m, s, x) = _arguments(where, "x", location=location, log_scale=log_scale, x=x)
    d = x - m
    z = product(_times_exp(d, -s), lax.sign(d))  # jnp.abs has the derivative 1 at 0
    return _checks.only(keep, z + s + math.log(2), 0)


def _student_t_parts(d: Array, log_scale: Array, log_df: Array) -> tuple[Array, ...]:
    """Whether q^2 = z^2 / nu <= 1, z = d / scale; then z and q, else 1 / |d|, 1 / q and log(1 + q^2). The others are 0."""
    z, q = _times_exp(d, -log_scale), _times_exp(d, -log_scale, -log_df / 2)
    near = jnp.abs(q) <= 1
    size = jnp.abs(jnp.where(near, 1, d))
    over = jnp.where(near, 0, _times_exp(_reciprocal(size), log_scale, log_df / 2))
    log_q = jnp.where(near, 0, _log_of(jnp.abs(q), _log(size) - log_scale - log_df / 2))
    log_total = 2 * log_q + _log1p(product(over, over))
    return near, jnp.where(near, z, 0), jnp.where(near, q, 0), jnp.where(near, 0, _reciprocal(size)), over, log_total


@custom_jvp
def _student_t_tail(d: Array, log_scale: Array, log_df: Array) -> Array:
    """(nu + 1) / 2 log(1 + q^2)."""
    _, z, q, _, _, log_total = _student_t_parts(d, log_scale, log_df)
    half = 0.5 * log_total
    return (0.5 * z * z + 0.5 * q * q) * _log1p_over(q * q) + (_times_exp(half, log_df) + half)


def _student_t_tail_slopes(d: Array, log_scale: Array, log_df: Array) -> tuple[Array, Array, Array]:
    """(nu + 1) q^2 / (1 + q^2) / d, the same times -d, and (nu log(1 + q^2) - (nu + 1) q^2 / (1 + q^2)) / 2."""
    near, z, q, over_d, over, log_total = _student_t_parts(d, log_scale, log_df)
    q2 = product(q, q)
    none, share = _reciprocal(1 + q2), jnp.where(near, 0, _reciprocal(1 + product(over, over)))
    # z^2 / (1 + q^2) as z^2 - z^2 q^2 / (1 + q^2), and nu share likewise: these have the right derivatives where q^2 is too
    # small for a number and z^2 or nu large. They are at most twice the difference, of which half is taken first.
    zq, half = product(z, q), 0.5 * z
    root = jnp.where(near, 0, _times_exp(over_d, log_scale, log_df))
    lost = product(product(root, root), share)
    far = 2 * (_times_exp(0.5 * over_d, log_df) - product(0.5 * over_d, lost)) + product(over_d, share)
    by_d = 2 * (_times_exp(half, -log_scale) - product(product(0.5 * zq, _times_exp(q, -log_scale)), none))
    by_d = by_d + product(_times_exp(q, -log_scale, -log_df / 2), none) + product(far, lax.sign(d))
    by_scale = product(half, z) - product(product(0.5 * zq, zq), none)
    by_scale = by_scale + (jnp.where(near, 0, _times_exp(jnp.full_like(d, 0.5), log_df)) - 0.5 * lost)
    by_scale = 2 * by_scale + (product(q2, none) + share)
    curved = product(product(0.5 * zq, zq), _log1p_excess(q2)) + _times_exp(0.5 * (log_total - share), log_df)
    return by_d, -by_scale, curved - 0.5 * (product(q2, none) + share)


_student_t_tail.defslopes(_student_t_tail_slopes)


def _student_t_constant(log_df: Array) -> Array:
    """log(sqrt(nu pi) Gamma(nu / 2) / Gamma((nu + 1) / 2))."""
    large = log_df >= 1
    # nu >= e: (1 - nu log(1 + 1/nu)) / 2 + mu(nu / 2) - mu((nu + 1) / 2) + log(2 pi) / 2
    i = _exp(-jnp.where(large, log_df, 1))
    many = _deviance(i, i, i) / 2 + _HALF_LOG_2PI
    # below: Gamma(1 + nu / 2) and Gamma(1 + (nu + 1) / 2), which have no poles at nu = 0
    log_few = jnp.where(large, 1, log_df)
    df = _exp(log_few)
    a, b = 1 + df / 2, 1.5 + df / 2
    few = (a - 0.5) * _log(a) - (b - 0.5) * _log(b) + (0.5 + 0.5 * math.log(math.pi))
    few = few + (_log1p_any(df) - log_few / 2)
    rest = _binet(jnp.where(large, 2 * i, _reciprocal(a))) - _binet(
        jnp.where(large, 2 * i * _reciprocal(1 + i), _reciprocal(b))
    )
    return jnp.where(large, many, few) + rest


@compiled()
def student_t_nll(
    location: ArrayLike, log_scale: ArrayLike, log_df: ArrayLike, x: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""Negative log-likelihood of Student's t distribution, for errors with heavy tails.

    .. math:: \tfrac{\nu + 1}{2} \log\left(1 + \tfrac{z^2}{\nu}\right) + \log\sigma
        + \log \frac{\sqrt{\nu\pi}\; \Gamma(\nu/2)}{\Gamma((\nu + 1)/2)}, \qquad z = (x - m) / \sigma

    As the degrees of freedom grow, this becomes `gaussian_nll`. Value and gradient are right to 8 ulp.

    Args:
      location: the median m.
      log_scale: the logarithm of the scale sigma, which is not the standard deviation.
      log_df: the logarithm of the degrees of freedom nu.
      x: the observation.
      where: which elements take part: a mask with as many axes as the result, to which it broadcasts.

    Returns:
      One value per element, in nats; half precision is computed and returned in float32.

    Examples:
      >>> import jaxce
      >>> print(jaxce.student_t_nll(0.0, 0.0, 0.0, 1.0))  # Cauchy: log(2 pi)
      1.8379

    References:
      Student, "The Probable Error of a Mean", Biometrika 6 (1908).
    """
    keep, (m, s, log_df, x) = _arguments(where, "x", location=location, log_scale=log_scale, log_df=log_df, x=x)
    return _checks.only(keep, _student_t_tail(x - m, s, log_df) + s + _student_t_constant(log_df), 0)


# ---------------------------------------------------------------------------------------------------- positive numbers


@compiled()
def exponential_nll(log_rate: ArrayLike, x: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    r"""Negative log-likelihood of an exponential distribution.

    .. math:: \lambda x - \log\lambda

    The entropy is 1 - log_rate. Value and gradient are right to 4 ulp.

    Args:
      log_rate: the logarithm of the rate, which is minus the logarithm of the mean.
      x: the observation, at least 0; below gives NaN.
      where: which elements take part: a mask with as many axes as the result, to which it broadcasts.

    Returns:
      One value per element, in nats; half precision is computed and returned in float32.

    Examples:
      >>> import jaxce
      >>> print(jaxce.exponential_nll(0.0, 3.0))
      3.0

    References:
      Johnson, Kotz and Balakrishnan, "Continuous Univariate Distributions" 1 (1994), chapter 19.
    """
    keep, (log_rate, x) = _arguments(where, "x", log_rate=log_rate, x=x)
    return _checks.only(keep, jnp.where(x >= 0, _times_exp(x, log_rate) - log_rate, jnp.nan), 0)


def _gamma_ratio(log_a: Array, log_rate: Array, x: Array) -> tuple[Array, Array]:
    """y / a - 1, exactly 0 where all arguments say so, and log(y / a)."""
    ratio = _times_exp(x, log_rate, -log_a)
    return ratio - 1, _log_of(ratio, log_rate + _log(x) - log_a)


@custom_jvp
def _gamma_deviance(log_a: Array, log_rate: Array, x: Array) -> Array:
    """y - a - a log(y / a) >= 0 for y = x exp(log_rate) and a = exp(log_a) >= 1.

    d/dlog_a = -a log(y / a), d/dlog_rate = y - a, d/dx = (y - a) / x.
    """
    s, log_ratio = _gamma_ratio(log_a, log_rate, x)
    return _times_exp(_deviance(s, s * s, s - log_ratio), log_a)


@custom_jvp
def _gamma_gap(log_a: Array, log_rate: Array, x: Array) -> Array:
    """y - a."""
    return _times_exp(_gamma_ratio(log_a, log_rate, x)[0], log_a)


@custom_jvp
def _gamma_gap_over_x(log_a: Array, log_rate: Array, x: Array) -> Array:
    """(y - a) / x. d/dx = a / x^2, as y is proportional to x."""
    return _times_exp(product(_gamma_ratio(log_a, log_rate, x)[0], _reciprocal(x)), log_a)


def _gamma_deviance_slopes(*args: Array) -> tuple[Array, ...]:
    return _times_exp(-_gamma_ratio(*args)[1], args[0]), _gamma_gap(*args), _gamma_gap_over_x(*args)


def _gamma_gap_slopes(log_a: Array, log_rate: Array, x: Array) -> tuple[Array, ...]:
    return -_exp(log_a), _times_exp(x, log_rate), _exp(log_rate)


def _gamma_gap_over_x_slopes(log_a: Array, log_rate: Array, x: Array) -> tuple[Array, ...]:
    over = _reciprocal(x)
    return -_times_exp(over, log_a), _exp(log_rate), _times_exp(product(over, over), log_a)


_gamma_deviance.defslopes(_gamma_deviance_slopes)
_gamma_gap.defslopes(_gamma_gap_slopes)
_gamma_gap_over_x.defslopes(_gamma_gap_over_x_slopes)


@compiled()
def gamma_nll(
    log_concentration: ArrayLike, log_rate: ArrayLike, x: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""Negative log-likelihood of a gamma distribution.

    .. math:: \beta x - \alpha \log(\beta x) + \log x + \log\Gamma(\alpha)

    The mean is alpha / beta. At x = 0 the value is -log_rate for alpha = 1, +inf above and -inf below. For alpha >= 1 it is
    computed as beta x - alpha - alpha log(beta x / alpha) >= 0 and what Stirling's formula leaves of log Gamma. Value and
    gradient are right to 6 ulp of the largest of these terms, up to concentrations of 1e9.

    Args:
      log_concentration: the logarithm of the concentration (shape) alpha.
      log_rate: the logarithm of the rate beta, which is minus the logarithm of the scale.
      x: the observation, at least 0; below gives NaN.
      where: which elements take part: a mask with as many axes as the result, to which it broadcasts.

    Returns:
      One value per element, in nats; half precision is computed and returned in float32.

    Examples:
      >>> import jaxce
      >>> print(jaxce.gamma_nll(0.0, 0.0, 3.0))  # exponential
      3.0

    References:
      Johnson, Kotz and Balakrishnan, "Continuous Univariate Distributions" 1 (1994), chapter 17.
    """
    keep, (log_a, log_rate, x) = _arguments(where, "x", log_concentration=log_concentration, log_rate=log_rate, x=x)
    positive = jnp.where(x > 0, x, 1)
    log_x = _log(positive)
    # alpha >= 1
    log_many = jnp.where(log_a >= 0, log_a, 0)
    many = _gamma_deviance(log_many, log_rate, positive)
    many = many + (log_x - 0.5 * log_many) + (_binet(_exp(-log_many)) + _HALF_LOG_2PI)
    # alpha < 1: log Gamma(alpha) = log Gamma(1 + alpha) - log alpha
    log_few = jnp.where(log_a >= 0, 0, log_a)
    a, y = _exp(log_few), _times_exp(positive, log_rate)
    few = (y - product(a, _log_of(y, log_rate + log_x))) + (log_x - log_few) + _log_gamma_1p(a)
    at_zero = jnp.where(log_a == 0, -log_rate, jnp.where(log_a > 0, jnp.inf, -jnp.inf) + log_a)
    at_zero += _times_exp(jnp.where(x == 0, x, 0), log_rate)  # adds 0, and the rate to the derivative by x
    value = jnp.where(x == 0, at_zero, jnp.where(log_a >= 0, many, few))
    return _checks.only(keep, jnp.where(x >= 0, value, jnp.nan), 0)


# ---------------------------------------------------------------------------------------------------- counts


@custom_jvp
def _poisson_deviance(log_rate: Array, k: Array) -> Array:
    """rate - k - k log(rate / k) >= 0, the rate for k = 0. d/dlog_rate = rate - k."""
    rate, some = _exp(log_rate), jnp.where(k == 0, 1, k)
    gap, over = rate - k, _reciprocal(some)
    s = gap * over
    far = gap - product(k, _log_of(rate * over, log_rate - _log(some)))
    return _deviance(jnp.where(k == 0, jnp.inf, s), gap * s, far)


_poisson_deviance.defslopes(lambda log_rate, k: (_exp(log_rate) - k, None))


@compiled("full")
def poisson_nll(log_rate: ArrayLike, counts: ArrayLike, *, full: bool = True, where: ArrayLike | None = None) -> Array:
    r"""Negative log-likelihood of a Poisson distribution, of counts.

    .. math:: \lambda - k \log\lambda + \log k!

    It is computed as the deviance :math:`\lambda - k - k \log(\lambda / k) \ge 0` and what Stirling's formula leaves of
    log k!. Value and gradient, :math:`\lambda - k`, are right to 4 ulp up to counts of 1e9; the terms are lambda - k,
    k log(lambda / k) and that rest.

    Args:
      log_rate: the logarithm of the rate (the expected count); -inf for a rate of 0.
      counts: the observation k, at least 0 (below gives NaN), not necessarily a whole number. It has no derivative.
      full: whether to include the constant log k!.
      where: which elements take part: a mask with as many axes as the result, to which it broadcasts.

    Returns:
      One value per element, in nats; half precision is computed and returned in float32.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.poisson_nll(0.0, jnp.array([0, 1, 2])))
      [1.        1.        1.6931472]

    References:
      Poisson, "Recherches sur la probabilite des jugements" (1837), section 81.
    """
    keep, (log_rate, k) = _arguments(where, "counts", log_rate=log_rate, counts=counts)
    valid = k >= 0
    k = lax.stop_gradient(jnp.where(valid, k, 0))
    value = _poisson_deviance(log_rate, k) + _stirling(k) if full else _exp(log_rate) - product(k, log_rate)
    return _checks.only(keep, jnp.where(valid, value, jnp.nan), 0)


def _negative_binomial_gap(log_mean: Array, log_r: Array, k: Array) -> tuple[Array, ...]:
    """g = r (k - m) / (m + r), g / r, m / (m + r), m r / (m + r) and r / (m + r), for r >= 1 or k = 0."""
    _, m_share, r_share = _odds(log_mean, log_r)
    both = _times_exp(jnp.maximum(m_share, r_share), jnp.minimum(log_mean, log_r))
    large = (log_mean > 0) | (k == 0)  # then k - m is divided by m
    d = jnp.where(large, product(k, _exp(-jnp.maximum(log_mean, 0))) - 1, k - _exp(jnp.minimum(log_mean, 0)))
    gap = d * jnp.where(large, both, r_share)
    return gap, d * jnp.where(large, m_share, r_share * _exp(-log_r)), m_share, both, r_share


@custom_jvp
def _negative_binomial_slope(log_mean: Array, log_r: Array, k: Array) -> Array:
    """g. d/dlog_mean = -(k m / (m + r) + m r / (m + r)) r / (m + r), d/dlog_r = g m / (m + r)."""
    return _negative_binomial_gap(log_mean, log_r, k)[0]


def _negative_binomial_slope_slopes(log_mean: Array, log_r: Array, k: Array) -> tuple[Array | None, ...]:
    gap, _, m_share, both, _ = _negative_binomial_gap(log_mean, log_r, k)
    return -_times_share(k * m_share + both, log_r, log_mean), _times_share(gap, log_mean, log_r), None


_negative_binomial_slope.defslopes(_negative_binomial_slope_slopes)


@custom_jvp
def _negative_binomial_excess(log_mean: Array, log_r: Array, k: Array) -> Array:
    """r (g / r - log(1 + g / r)). d/dlog_mean = -g m / (m + r), d/dlog_r = itself - g^2 / (k + r)."""
    gap, s, _, _, r_share = _negative_binomial_gap(log_mean, log_r, k)
    over_r = product(k, _exp(-log_r))
    e = _odds(log_mean, log_r)[0]
    log_ratio = _log_of((1 + over_r) * r_share, _log1p_any(over_r) - jnp.maximum(log_mean - log_r, 0) - _log1p(e))
    root = _times_exp(gap, -log_r / 2)
    return _deviance(s, product(root, root), _times_exp(s - log_ratio, log_r))


def _negative_binomial_excess_slopes(log_mean: Array, log_r: Array, k: Array) -> tuple[Array | None, ...]:
    gap = _negative_binomial_gap(log_mean, log_r, k)[0]
    root = _times_exp(gap, -log_r / 2)
    square = product(root, root) * _reciprocal(1 + product(k, _exp(-log_r)))
    return -_times_share(gap, log_mean, log_r), _negative_binomial_excess(log_mean, log_r, k) - square, None


_negative_binomial_excess.defslopes(_negative_binomial_excess_slopes)


@custom_jvp
def _negative_binomial_deviance(log_mean: Array, log_r: Array, k: Array) -> Array:
    """k log(k / m) - (k + r) log((k + r) / (m + r)), for r >= 1 or k = 0.

    d/dlog_mean = -g, d/dlog_r the part of r in it.
    """
    gap, _, _, both, _ = _negative_binomial_gap(log_mean, log_r, k)
    some = jnp.where(k == 0, 1, k)
    over = _reciprocal(some)
    per_count = over + _exp(-log_r)
    e = _odds(log_mean, log_r)[0]
    log_ratio = _log_of(both * per_count, _log(per_count) + jnp.minimum(log_mean, log_r) - _log1p(e))
    s = -gap * over
    of_count = _deviance(jnp.where(k == 0, jnp.inf, s), -gap * s, -gap - product(k, log_ratio))
    return of_count + _negative_binomial_excess(log_mean, log_r, k)


_negative_binomial_deviance.defslopes(
    lambda log_mean, log_r, k: (
        -_negative_binomial_slope(log_mean, log_r, k),
        _negative_binomial_excess(log_mean, log_r, k),
        None,
    ),
)


@compiled()
def negative_binomial_nll(
    log_mean: ArrayLike, log_concentration: ArrayLike, counts: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""Negative log-likelihood of a negative binomial distribution, of counts that vary by more than a Poisson's.

    .. math:: \log\Gamma(r) + \log k! - \log\Gamma(k + r) - k \log\frac{m}{m + r} - r \log\frac{r}{m + r}

    The variance is m + m^2 / r; as the concentration grows, this becomes `poisson_nll`. For r >= 1 it is computed as the
    deviances of k - g from k and of r + g from r, with the gap g = r (k - m) / (m + r), and what Stirling's formula leaves.
    Value and gradient (by log_mean: -g) are right to 6 ulp of the largest of these terms, up to counts of 1e9.

    Args:
      log_mean: the logarithm of the mean m; -inf for a mean of 0.
      log_concentration: the logarithm of the concentration r ("number of failures").
      counts: the observation k, at least 0 (below gives NaN), not necessarily a whole number. It has no derivative.
      where: which elements take part: a mask with as many axes as the result, to which it broadcasts.

    Returns:
      One value per element, in nats; half precision is computed and returned in float32.

    Examples:
      >>> import jaxce
      >>> print(jaxce.negative_binomial_nll(0.0, 0.0, 3))  # geometric: 4 log 2
      2.7726

    References:
      Hilbe, "Negative Binomial Regression" (2011), section 8.2 (NB2).
    """
    keep, (log_mean, log_r, k) = _arguments(
        where, "counts", log_mean=log_mean, log_concentration=log_concentration, counts=counts
    )
    valid = k >= 0
    k = lax.stop_gradient(jnp.where(valid, k, 0))
    # r >= 1: of the three log Gammas, Stirling's formula leaves log(2 pi k (k + r) / r) / 2 and mu of each
    large = (log_r >= 0) | (k == 0)
    log_many = jnp.where(large, log_r, 0)
    i = _exp(jnp.where(log_r >= 0, -log_r, 0))
    rest = _stirling(k) + 0.5 * _log1p_any(k * i) + (_binet(i) - _binet(i * _reciprocal(1 + k * i)))
    many = _negative_binomial_deviance(log_mean, log_many, k) + jnp.where(k == 0, 0, rest)  # k = 0: for all r
    # r < 1: k log((m + r) / m) + r log((m + r) / r), and log Gammas of 1 + r, 1 + k and 1 + k + r
    log_few = jnp.where(large, 0, log_r)
    e, _, r_share = _odds(log_mean, log_few)
    r, log_odds, log1p_e, a, b = _exp(log_few), log_mean - log_few, _log1p(e), 1 + k, 1 + k + _exp(log_few)
    log_failure = jnp.where(log_odds > 0, log_odds, 0) + log1p_e  # log((m + r) / r)
    successes = product(k, jnp.where(log_odds > 0, 0, -log_odds) + log1p_e)
    failures = product(r, 1 - _log_of(a * r_share, _log(a) - log_failure))
    gammas = (_log(k + r) - log_few) + _log_gamma_1p(r)
    over = _reciprocal(a)
    gammas = gammas - (b - 0.5) * _log1p(r * over) + (_binet(over) - _binet(_reciprocal(b)))
    few = successes + failures + gammas
    return _checks.only(keep, jnp.where(valid, jnp.where(large, many, few), jnp.nan), 0)


# ---------------------------------------------------------------------------------------------------- vectors, mixtures


@compiled("full")
def multivariate_normal_nll(
    location: ArrayLike, scale_tril: ArrayLike, x: ArrayLike, *, full: bool = True, where: ArrayLike | None = None
) -> Array:
    r"""Negative log-likelihood of a multivariate normal distribution with covariance :math:`L L^\top`.

    .. math:: \tfrac12 |z|^2 + \sum_i \log L_{ii} + \tfrac n2 \log 2\pi, \qquad L z = x - m

    It is as exact as the triangular solve, whose error grows with the condition number of L: 8 ulp in one dimension.

    Args:
      location: the mean m, [..., n].
      scale_tril: L, [..., n, n], lower triangular with a positive diagonal (else NaN): the Cholesky factor of the
        covariance. Entries above the diagonal are ignored.
      x: the observation, [..., n]. The batch axes of all three broadcast.
      full: whether to include the constant n log(2 pi) / 2.
      where: which vectors take part: a mask with as many axes as the result, to which it broadcasts.

    Returns:
      One value per vector, in nats; half precision is computed and returned in float32.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.multivariate_normal_nll(jnp.zeros(2), jnp.eye(2), jnp.array([3.0, 4.0]), full=False))
      12.5

    References:
      Anderson, "An Introduction to Multivariate Statistical Analysis" (2003), section 2.3.
    """
    m, scale = _checks.floating("location", location), _checks.floating("scale_tril", scale_tril)
    x = _checks.real("x", x, _checks.compute_dtype(m, scale))
    for name, array in (("location", m), ("x", x)):
        if array.ndim < 1:
            raise _checks.ArgumentValueError(f"{name} must have at least one axis, got {array.dtype}[]")
    n = m.shape[-1]
    _checks.same_shape("scale_tril", scale, (*scale.shape[:-2], n, n), "two last axes as long as location's")
    _checks.same_shape("x", x, (*x.shape[:-1], n), "as many entries as location")
    vectors = {"location": (m, m.shape), "scale_tril": (scale, scale.shape[:-1]), "x": (x, x.shape)}
    batch = _common_shape(vectors)[:-1]
    m, scale, x = _upcast(m, scale, x)
    m, scale, x = (jnp.expand_dims(v, range(len(batch) + core - v.ndim)) for v, core in ((m, 1), (scale, 2), (x, 1)))
    keep = _checks.where_elements(where, batch)
    given = [m, scale, x] if keep is None else [m, scale, x, keep]
    constant = n * _HALF_LOG_2PI if full else 0
    rows = tuple(range(len(batch)))
    places = [(*rows, *[None] * (v.ndim - len(rows))) for v in given]
    return _mesh.spread(lambda _, *here: _multivariate_normal_nll(constant, *here), given, places, rows)


def _multivariate_normal_nll(constant: float, m: Array, scale: Array, x: Array, keep: Array | None = None) -> Array:
    """The same of arrays that have all axes of the batch."""
    d = x - m
    batch = jnp.broadcast_shapes(d.shape[:-1], scale.shape[:-2])
    if keep is not None:
        d = jnp.where(keep[..., None], d, 0)
        # A scale that several vectors share takes part if one of them does.
        shared = tuple(a for a in range(len(batch)) if scale.shape[a] == 1)
        identity = jnp.broadcast_to(jnp.eye(scale.shape[-1], dtype=scale.dtype), scale.shape)
        scale = jnp.where(keep.any(shared, keepdims=True)[..., None, None], scale, identity)
    # Of z L^T = d, so that a scale that all vectors share is one solution with a right-hand side in every row.
    solve = jnp.vectorize(
        functools.partial(lax.linalg.triangular_solve, lower=True, transpose_a=True), signature="(n,n),(n)->(n)"
    )
    z = solve(jnp.tril(scale), d)
    diagonal = jnp.diagonal(scale, axis1=-2, axis2=-1)
    log_scale = jnp.sum(_log(jnp.where(diagonal > 0, diagonal, jnp.nan)), axis=-1)
    value = 0.5 * jnp.sum(product(z, z), axis=-1) + (jnp.broadcast_to(log_scale, batch) + constant)
    return _checks.only(keep, value, 0)


@compiled("axis")
def mixture_nll(
    log_weights: ArrayLike, component_nll: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> Array:
    r"""Negative log-likelihood of a mixture of distributions.

    .. math:: -\log \frac{\sum_k w_k p_k}{\sum_k w_k} = \log \sum_k e^{l_k} - \log \sum_k e^{l_k - \mathrm{nll}_k}

    The gradient by component_nll is the posterior probability of each component (its responsibility). A component whose
    posterior probability is 0 adds exactly 0 to every gradient, also when its own likelihood has an infinite one.

    Args:
      log_weights: the logarithms of the weights w; logits do as well, as weights are normalised. A component at -inf is
        ignored, whatever its likelihood. For weights that may be 0 write ``jnp.log(w + 1e-30)``, as the gradient of
        ``jnp.log(w)`` at 0 is NaN in JAX.
      component_nll: the negative log-likelihood of each component, which broadcasts with log_weights. +inf is a density
        of 0.
      axis: the axis of the components, or several.
      where: what takes part, booleans or integers (nonzero is True): a mask of the batch shape says which rows do, one
        with as many axes as component_nll, to which it broadcasts, which components. A row with none has the value 0.

    Returns:
      One value per example, of the shape without ``axis``; half precision is computed and returned in float32.

    Examples:
      Observations get an axis for the components, ``x[:, None]``:

      >>> import jax.numpy as jnp, jaxce
      >>> x = jnp.array([1.0, 3.0])
      >>> log_weights = jnp.log(jnp.array([[0.25, 0.75]]))
      >>> nll = jaxce.gaussian_nll(jnp.array([[-1.0, 1.0]]), 0.0, x[:, None])
      >>> print(jaxce.mixture_nll(log_weights, nll).round(4))
      [1.1625 3.2058]

    References:
      Bishop, "Mixture Density Networks" (1994).
    """
    weights = _checks.floating("log_weights", log_weights)
    nll = _checks.floating("component_nll", component_nll)
    weights, nll = _broadcast(log_weights=weights, component_nll=nll)
    axes = _checks.axes(axis, nll.ndim)
    if math.prod(nll.shape[a] for a in axes) == 0:
        raise _checks.ArgumentValueError(f"component_nll must have at least one component, got shape {nll.shape}")
    if where is not None:
        weights = jnp.where(_checks.where_entries(where, nll.shape, axes), weights, -jnp.inf)
    # Weights that aren't normalised may be large: both sums would be, too, and their difference have lost its digits.
    most = jnp.max(lax.stop_gradient(weights), axes, keepdims=True)
    weights -= jnp.where(jnp.isfinite(most), most, 0)
    joint = weights - jnp.where(weights != -jnp.inf, nll, 0)
    # Components whose posterior is 0 in this dtype are selected away, as their tangents may be infinite.
    least = jnp.max(lax.stop_gradient(joint), axes, keepdims=True) + math.log(smallest(joint))
    joint = jnp.where(joint < least, -jnp.inf, joint)
    total = logsumexp(weights, axis)
    some = total != -jnp.inf
    return jnp.where(some, jnp.where(some, total, 0) - logsumexp(joint, axis), 0)
