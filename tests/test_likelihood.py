"""Likelihoods against SciPy, PyTorch and 60 digits, in the tails and at the edges."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
from helpers import quick, ulp_error

import jaxce
from jaxce import _likelihood

mp: Any = mpmath  # its numbers may be complex, for all that pyright knows
M = mp.mpf
INF, NAN = math.inf, math.nan
ULP = 8 * 2.0**-23  # the contract: 8 ulp of float32


def logistic(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


@functools.cache
def in_digits(digits: int, function: Callable[..., Any], *args: Any) -> Any:
    with mpmath.workdps(digits):
        return function(*args)


# In 120 digits at most: more take long, and are of use only to exponentials that cancel.


def log_gamma(x: Any) -> Any:
    return in_digits(min(mp.mp.dps, 120), mpmath.loggamma, x)


def psi(n: int, x: Any) -> Any:
    if x < 1e-30:  # its pole, in all digits
        return psi(n, 1 + x) - (-1) ** n * mpmath.factorial(n) / x ** (n + 1)
    return in_digits(min(mp.mp.dps, 120), mpmath.psi, n, x)


# For each function: -log density in mpmath, term by term as it is defined. They are differentiated numerically in 60
# digits, or 200 where the terms cancel.


def gaussian(m: Any, s: Any, x: Any) -> list[Any]:
    return [((x - m) / mpmath.exp(s)) ** 2 / 2, s, mpmath.log(2 * mpmath.pi) / 2]


def laplace(m: Any, s: Any, x: Any) -> list[Any]:
    return [abs(x - m) / mpmath.exp(s), s, mpmath.log(2)]


def student_t(m: Any, s: Any, log_df: Any, x: Any) -> list[Any]:
    df = mpmath.exp(log_df)
    tail = (df + 1) / 2 * mpmath.log1p(((x - m) / mpmath.exp(s)) ** 2 / df)
    gammas = log_gamma(df / 2) - log_gamma((df + 1) / 2)
    return [tail, s, gammas + mpmath.log(df * mpmath.pi) / 2]


def exponential(log_rate: Any, x: Any) -> list[Any]:
    return [mpmath.exp(log_rate) * x, -log_rate]


def gap_and_logarithm(k: Any, gap: Any) -> list[Any]:
    """The two parts of a deviance, gap - k log(1 + gap / k)."""
    return [gap, -k * mpmath.log1p(gap / k) if k else M(0)]


def binet(x: Any) -> Any:
    """log Gamma(x) without its three largest terms."""
    if x > 1e30:
        return 1 / (12 * x)
    return log_gamma(x) - (x - 0.5) * mpmath.log(x) + x - mpmath.log(2 * mpmath.pi) / 2


def gamma(log_a: Any, log_rate: Any, x: Any) -> list[Any]:
    a = mpmath.exp(log_a)
    rest = [mpmath.log(x), -log_a / 2, mpmath.log(2 * mpmath.pi) / 2, binet(a)]
    return gap_and_logarithm(a, mpmath.exp(log_rate) * x - a) + rest


def poisson(log_rate: Any, k: Any) -> list[Any]:
    rest = [mpmath.log(2 * mpmath.pi * k) / 2, binet(k)] if k else []
    return gap_and_logarithm(k, mpmath.exp(log_rate) - k) + rest


def negative_binomial(log_mean: Any, log_r: Any, k: Any) -> list[Any]:
    m, r = mpmath.exp(log_mean), mpmath.exp(log_r)
    gap = r * (k - m) / (m + r)
    rest = [mpmath.log(2 * mpmath.pi * k * (k + r) / r) / 2, binet(k), binet(r), -binet(k + r)] if k else []
    return gap_and_logarithm(k, -gap) + gap_and_logarithm(r, gap) + rest


def bernoulli(logit: Any, x: Any) -> list[Any]:
    return [-x * mpmath.log(logistic(logit)), -(1 - x) * mpmath.log(logistic(-logit))]


def grid(*axes: list[float]) -> list[np.ndarray]:
    points = np.array(list(itertools.product(*axes)))
    return [points[:, i].copy() for i in range(len(axes))]


LOG_SCALES = [-34.5, -10.3, 0.0, 1.7, 30.0]
DISTANCES = [0.7, 0.70000005, 3.0, -1e10]
COUNTS = [0, 1, 2, 7, 8, 40, 1000, 123456, 1e9]


def counts_and_rates() -> list[np.ndarray]:
    """Every count with rates that are far, near, and as near as they can be in float32."""
    pairs = [
        (float(np.float32(math.log(max(k, 0.5)) + d)), k)
        for k in COUNTS
        for d in (-50, -3, -0.7, -0.1, -1e-3, 0, 1e-5, 0.03, 0.9, 2, 20)
    ]
    pairs = [(a, k) for a, k in pairs if a < 60]
    return [np.array(column) for column in zip(*pairs, strict=True)]


def negative_binomial_grid() -> list[np.ndarray]:
    rates, counts = counts_and_rates()
    rows = [(a, r, k) for a, k in zip(rates, counts, strict=True) for r in (-20.0, -1.0, 0.0, 3.3, 13.0, 20.7, 45.0)]
    return [np.array(column) for column in zip(*rows, strict=True)]


def gamma_grid() -> list[np.ndarray]:
    rows = []
    for log_a, log_rate, d in itertools.product(
        [-30.0, -2.0, 0.0, 0.5, 2.1, 9.0, 20.7], [-30.0, 0.3, 20.0], [-9, -0.5, 0, 1e-4, 0.7, 3]
    ):
        rows.append((log_a, log_rate, math.exp(log_a - log_rate + d)))
    return [np.array(column) for column in zip(*rows, strict=True)]


# The largest number that is subtracted in an entry of a gradient, where it is larger than the entry.


def itself(*_: float) -> float:
    return 0.0


def z_of(m: float, s: float, x: float) -> float:
    return abs(x - m) * math.exp(-s)


def by_log_df(m: float, s: float, log_df: float, x: float) -> float:
    """nu (log(1 + q^2) - q^2 / (1 + q^2)) / 2, of small q as a whole, q^2 / (1 + q^2) / 2, and a half of small nu."""
    df = math.exp(log_df)
    q = z_of(m, s, x) ** 2 / df
    share = q / (1 + q)
    part = df * (math.log1p(q) if 3 * share > 2 - share else math.log1p(q) - share)
    return max(part, share, 1 if df < 1 else 0) / 2


def by_log_concentration(log_a: float, log_rate: float, x: float) -> float:
    """alpha log(beta x / alpha), whose error is that of the ratio near 1, and the half of Stirling's formula."""
    return math.exp(log_a) * max(1, abs(log_rate + math.log(x) - log_a)) + 0.5


def by_log_mean(log_mean: float, log_r: float, k: float) -> float:
    """The two parts of r (m - k) / (m + r)."""
    m, r = math.exp(log_mean), math.exp(log_r)
    return max(m, k) * (r / (m + r))


def by_log_r(log_mean: float, log_r: float, k: float) -> float:
    """A deviance (of a small gap: what the gap's own two parts make in it), k / (k + r) / 2, and a half of small r."""
    m, r = math.exp(log_mean), math.exp(log_r)
    gap = r * (k - m) / (m + r)
    if 3 * abs(gap) > 2 * r + gap:
        return max(abs(gap), r * abs(math.log((k + r) / (m + r))))
    return max(k / 2, abs(gap) * max(m, k)) / (k + r) + (0.5 if r < 1 else 0)


class Family(NamedTuple):
    """Errors are in ulp: of a value, of its largest term; of an entry of a gradient, of the number named in ``made_of``."""

    terms: Callable[..., list[Any]]
    points: list[np.ndarray]
    value: float
    gradient: float
    made_of: tuple[Callable[..., float], ...]  # for each differentiable argument


def wide(*columns: np.ndarray) -> np.ndarray:
    return np.stack(columns, -1)


def at_random(name: str, count: int = 200) -> np.ndarray:
    """Points everywhere: distances, rates and counts of all orders of magnitude, half of them close to what is expected."""
    rng = np.random.default_rng(0)

    def uniform(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, count)

    s, distance = uniform(-20, 20), rng.normal(size=count) * np.exp(uniform(-8, 8))
    close = np.where(rng.uniform(size=count) < 0.5, uniform(-6, 6), rng.normal(size=count) * np.exp(uniform(-9, 1)))
    counts = np.where(rng.uniform(size=count) < 0.4, rng.integers(0, 30, count), np.floor(np.exp(uniform(0, 20.7))))
    log_a, log_rate, rates = uniform(-20, 20.7), uniform(-20, 20), np.log(np.maximum(counts, 0.5)) + close
    match name:
        case "bernoulli_nll":
            return wide(uniform(-90, 90), uniform(0, 1))
        case "gaussian_nll" | "laplace_nll":
            return wide(0 * s, s, distance * np.exp(s))
        case "student_t_nll":
            return wide(0 * s, s / 2, uniform(-8, 25), distance * np.exp(s / 2))
        case "exponential_nll":
            return wide(log_rate, np.exp(uniform(-20, 20)))
        case "gamma_nll":
            return wide(log_a, log_rate, np.exp(log_a - log_rate + close))
        case "poisson_nll":
            return wide(rates, counts)
    return wide(rates, uniform(-20, 25), counts)


# The contract is 8 ulp. Below it is what is measured here and in 10^6 points at random; only what is named exceeds it.
# z is exp of half the scale, squared: three times an ulp or so, and its square twice that.
# By log_df, a small z leaves nu q^4, with twice the error of q^2, which has up to 7 ulp: hence 16.
FAMILIES = {
    "bernoulli_nll": Family(
        bernoulli, grid([-80.0, -20.0, -1.0, 0.0, 0.3, 40.0], [0, 1, 0.25]), 2, 4, (lambda z, x: x, itself)
    ),
    "gaussian_nll": Family(
        gaussian, grid([0.7], LOG_SCALES, DISTANCES), 7, 7, (itself, lambda *a: max(1, z_of(*a) ** 2), itself)
    ),
    "laplace_nll": Family(
        laplace, grid([0.7], LOG_SCALES, DISTANCES), 4, 4, (itself, lambda *a: max(1, z_of(*a)), itself)
    ),
    "student_t_nll": Family(
        student_t,
        grid([0.7], LOG_SCALES, [-9.0, -1.0, 0.0, 1.3, 5.0, 21.0], [0.8, 3.0, -1e10]),
        8,
        16,
        (itself, lambda *_: 1.0, by_log_df, itself),
    ),
    "exponential_nll": Family(
        exponential, grid([-60.0, -3.0, 0.0, 0.1, 20.0], [0, 1e-9, 1, 5, 1e10]), 4, 4, (lambda *_: 1.0, itself)
    ),
    "gamma_nll": Family(
        gamma,
        gamma_grid(),
        6,
        6,
        (by_log_concentration, lambda a, b, x: math.exp(a), lambda a, b, x: max(1, math.exp(a)) / x),
    ),
    "poisson_nll": Family(poisson, counts_and_rates(), 4, 4, (lambda eta, k: k,)),
    "negative_binomial_nll": Family(negative_binomial, negative_binomial_grid(), 6, 6, (by_log_mean, by_log_r)),
}


def differentiable(name: str) -> int:
    """How many arguments have derivatives, which come first: all but counts and options."""
    return sum(n not in ("counts", "full", "where") for n in inspect.signature(getattr(jaxce, name)).parameters)


LONG = {"student_t_nll", "negative_binomial_nll"}
"""Those whose Hessians take long to compile: half a minute in float64."""


def value_gradient_hessian(function: Callable[..., Any]) -> Callable[..., Any]:
    """All three from one trace, which compiles in about half the time of three."""

    def slopes(at: Any) -> Any:
        value, gradient = jax.value_and_grad(function)(at)
        return gradient, (value, gradient)

    def all_three(at: Any) -> Any:
        hessian, (value, gradient) = jax.jacfwd(slopes, has_aux=True)(at)
        return value, gradient, hessian

    return all_three


@functools.cache
def of_rows(derivatives: Callable[..., Any], name: str) -> Callable[..., Any]:
    function, count = getattr(jaxce, name), differentiable(name)
    return jax.jit(jax.vmap(lambda row: derivatives(lambda a: function(*a, *row[count:]))(row[:count])))


def evaluate(derivatives: Callable[..., Any], name: str, rows: Any, dtype: str = "float32") -> list[np.ndarray]:
    """These derivatives of each row of arguments: one program for tables of up to 1000 rows."""
    rows = np.asarray(rows, dtype)
    with jax.enable_x64(dtype == "float64"):
        found = of_rows(derivatives, name)(jnp.asarray(np.resize(rows, (1000, rows.shape[1]))))
        return [np.asarray(a)[: len(rows)] for a in found]


def derivative(name: str, family: Family, point: list[Any], i: int) -> Any:
    if name == "laplace_nll" and i != 1:
        return (1 if i else -1) * mpmath.sign(point[2] - point[0]) * mpmath.exp(-point[1])
    if name == "exponential_nll" and i == 1:
        return mpmath.exp(point[0])

    def along(v: Any) -> Any:
        return sum(family.terms(*point[:i], v, *point[i + 1 :]))

    with mpmath.workdps(120):
        return mpmath.diff(along, point[i], h=mpmath.mpf(10) ** -40 * max(1e-3, abs(point[i])))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FAMILIES)
def test_digits(name: str, dtype: str) -> None:
    """Against mpmath, at the binary numbers that the function was given."""
    family = FAMILIES[name]
    points = np.stack(family.points, -1)
    if dtype == "float32" and name == "negative_binomial_nll":
        points = points[::3]
    rows = np.concatenate([points, at_random(name)]).astype(dtype)
    got, gradient = evaluate(jax.value_and_grad, name, rows, dtype)
    points = [[M(float(v)) for v in row] for row in rows]
    with mpmath.workdps(120):
        terms = [family.terms(*point) for point in points]
    error = ulp_error(got, [sum(t) for t in terms], [max(map(abs, t)) for t in terms])
    at = int(error.argmax())
    assert error[at] <= family.value, (name, points[at], got[at])
    for i in range(differentiable(name)):
        exact = [derivative(name, family, point, i) for point in points]
        made_of = [family.made_of[i](*map(float, point)) for point in points]
        error = ulp_error(gradient[:, i], exact, [max(abs(e), f) for e, f in zip(exact, made_of, strict=True)])
        at = int(error.argmax())
        assert error[at] <= family.gradient, (name, i, points[at], gradient[at, i], float(exact[at]), error[at])


@pytest.mark.parametrize("size", [4, 8])
def test_what_stirling_leaves(size: int) -> None:
    """The polynomial is the one through x mu(x) at Chebyshev's points, and mu and its slope are as right as it needs."""
    with jax.enable_x64(size == 8):
        c, coefficients = _likelihood._BINET[size]
        count, c = len(coefficients), M(str(c))
        end = M(1) if size == 4 else M("1.21")  # the largest 1 / x^2
        points = [(1 + mpmath.cos(mpmath.pi * (2 * j + 1) / (2 * count))) / 2 for j in range(count)]
        at = [point * end / (1 + c * end) for point in points]
        values = [mpmath.sqrt(1 / u - c) * binet(mpmath.sqrt(1 / u - c)) for u in at]
        exact = mpmath.lu_solve(mpmath.matrix([[u**n for n in range(count)] for u in at]), mpmath.matrix(values))
        np.testing.assert_allclose(coefficients, [float(a) for a in exact], rtol=1e-14)
        x = np.geomspace(1, 1e9, 91).astype(f"float{8 * size}")
        mu, slope = jax.jit(jax.vmap(jax.value_and_grad(lambda x: _likelihood._binet(1 / x))))(x)
    mus = [binet(M(float(v))) for v in x]
    # beside log(2 pi) / 2, to which it is added
    assert ulp_error(mu, mus, [0.9] * len(x)).max() <= 2
    slopes = [v * mpmath.diff(binet, v, h=M(10) ** -20 * v) for v in map(M, map(float, x))]
    assert ulp_error(x * np.asarray(slope), slopes, [0.5] * len(x)).max() <= 4  # it is added to a half


@pytest.mark.parametrize(
    ("name", "arrays"),
    [("student_t_nll", 6), pytest.param("negative_binomial_nll", 10, marks=pytest.mark.slow), ("gamma_nll", 6)],
)
def test_gradients_write_few_arrays_on_a_cpu(name: str, arrays: int) -> None:
    """5, 7 and 3; where XLA:CPU fuses nothing that is used twice 21, 29 and 10."""
    if jax.default_backend() != "cpu":
        pytest.skip("what another platform fuses is not of interest here")
    function = getattr(jaxce, name)
    names = inspect.signature(function).parameters
    args = [jax.ShapeDtypeStruct((100_000,), "float32") for n in names if n not in ("where", "full")]
    varying = tuple(i for i, n in enumerate(names) if i < len(args) and n != "counts")
    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(function(*a)), varying))
    assert gradient.lower(*args).compile().memory_analysis().temp_size_in_bytes <= arrays * 4 * 100_000


# --- extreme parameters -----------------------------------------------------------------------------------------------


class Derivatives(NamedTuple):
    """A value, gradient and Hessian (its upper triangle, by rows) as the terms that each entry is the sum of."""

    value: list[Any]
    gradient: list[list[Any]]
    hessian: list[list[Any]]


def gaussian_at(m: Any, s: Any, x: Any) -> Derivatives:
    h = mp.exp(-s)
    z = (x - m) * h
    value = [z * z / 2, s, mp.log(2 * mp.pi) / 2]
    return Derivatives(
        value, [[-z * h], [1, -z * z], [z * h]], [[h * h], [2 * z * h], [-h * h], [2 * z * z], [-2 * z * h], [h * h]]
    )


def laplace_at(m: Any, s: Any, x: Any) -> Derivatives:
    h, sign = mp.exp(-s), mp.sign(x - m)
    z = abs(x - m) * h
    return Derivatives(
        [z, s, mp.log(2)],
        [[-sign * h], [1, -z], [sign * h]],
        [[0], [sign * h], [0], [z], [-sign * h], [0]],
    )


def exponential_at(log_rate: Any, x: Any) -> Derivatives:
    rate = mp.exp(log_rate)
    return Derivatives([rate * x, -log_rate], [[rate * x, -1], [rate]], [[rate * x], [rate], [0]])


def gaussian_kl_at(m: Any, s: Any, q_m: Any, q_s: Any) -> Derivatives:
    h, delta = mp.exp(-q_s), 2 * (s - q_s)
    z, ratio = (m - q_m) * h, mp.exp(delta)
    excess = mp.expm1(delta)
    return Derivatives(
        [z * z / 2, (excess - delta) / 2],
        [[z * h], [excess], [-z * h], [-excess, -z * z]],
        [
            *([h * h], [0], [-h * h], [-2 * z * h]),
            *([2 * ratio], [0], [-2 * ratio]),
            *([h * h], [2 * z * h]),
            [2 * ratio, 2 * z * z],
        ],
    )


def student_t_at(m: Any, s: Any, log_df: Any, x: Any) -> Derivatives:
    df, d = mp.exp(log_df), x - m
    c2 = df * mp.exp(2 * s)
    both, share = c2 + d * d, d * d / (c2 + d * d)
    log_total = mp.log1p(d * d / c2)
    constant = student_t(M(0), M(0), log_df, M(0))[2]
    first = df / 2 * (psi(0, df / 2) - psi(0, (df + 1) / 2))
    second = first + df * df / 4 * (psi(1, df / 2) - psi(1, (df + 1) / 2))
    if df > 1e30:  # asymptotically
        constant, first, second = mp.log(2 * mp.pi) / 2 + 1 / (4 * df), -M(0.5) - 1 / (4 * df), 1 / (4 * df)
    curved = df / 2 * log1p_gap(d * d / c2)
    large = [curved] if d * d <= c2 else [df / 2 * log_total, -df / 2 * share]
    by_d, by_ds = [(df + 1) * d / both], [-2 * (df + 1) * d * c2 / both**2]
    by_dd = [(df + 1) * c2 / both**2, -(df + 1) * d * d / both**2]
    by_dl = [df * share * d / both, -c2 / both * d / both]
    by_sl = [share * c2 / both, -df * share * share]
    # what the constant's own terms add up to is of this size
    size = min(df, 1 / df)
    return Derivatives(
        [(df + 1) / 2 * log_total, s, constant],
        [
            negative(by_d),
            [1, -(df + 1) * share],
            [*large, -share / 2, first + M(0.5), size, -size],
            by_d,
        ],
        [
            *(by_dd, negative(by_ds), negative(by_dl), negative(by_dd)),
            *([2 * (df + 1) * share * c2 / both], by_sl, by_ds),
            *([*large, -df * share * share / 2, share * c2 / both / 2, second, size, -size], by_dl),
            by_dd,
        ],
    )


def log1p_gap(v: Any) -> Any:
    """log(1 + v) - v / (1 + v)."""
    return mp.log1p(v) - v / (1 + v) if abs(v) > 1e-30 else v * v / 2


def negative(terms: list[Any]) -> list[Any]:
    return [-t for t in terms]


def gamma_at(log_a: Any, log_rate: Any, x: Any) -> Derivatives:
    a, y = mp.exp(log_a), mp.exp(log_rate) * x
    if a >= 1:
        # the error of the ratio is that of 1, where its logarithm is small
        ratio, rest = -a * mp.log(y / a), a * (psi(0, a) - log_a)
        curvature = a * a * psi(1, a) + rest
        if a > 1e30:  # asymptotically
            rest, curvature = -M(0.5) - 1 / (12 * a), a + 1 / (12 * a)
        by_a, by_aa = [ratio, rest, a, -a], [ratio, curvature, a, -a]
    else:
        ratio, rest = -a * mp.log(y), a * psi(0, 1 + a)
        by_a, by_aa = [ratio, rest, -1], [ratio, rest, a * a * psi(1, 1 + a)]
    return Derivatives(
        gamma(log_a, log_rate, x),
        [by_a, [y, -a], [y / x, -a / x, 1 / x]],
        [by_aa, [-a], [-a / x], [y], [y / x], [a / x**2, -1 / x**2]],
    )


def poisson_at(log_rate: Any, k: Any) -> Derivatives:
    rate = mp.exp(log_rate)
    return Derivatives(poisson(log_rate, k), [[rate, -k]], [[rate]])


def negative_binomial_at(log_mean: Any, log_r: Any, k: Any) -> Derivatives:
    m, r = mp.exp(log_mean), mp.exp(log_r)
    p_m, p_r = m / (m + r), r / (m + r)
    gap, w, n = k * p_r - m * p_r, m * p_r, k + r
    failures = r * mp.log1p(m / r)
    if r >= 1:
        excess = gap - r * mp.log1p(gap / r) if abs(gap / r) > 1e-30 else gap * gap / (2 * r)
        first = [r * (psi(0, r) - log_r), -r * (psi(0, n) - mp.log(n))] if k else []
        second = [r * (r * psi(1, r) - 1), -r * r * (psi(1, n) - 1 / n)] if k else []
        if r > 1e30 and k:  # asymptotically
            first = [-k / (2 * n) - 1 / (12 * r) + r / (12 * n * n)]
            second = [k * (n + r) / (2 * n * n) + 1 / (6 * r) - r * r / (6 * n**3)]
        near = [excess] if abs(gap) < r / 2 else [failures, gap]
        by_r, by_rr = [*near, sum(first)], [*near, -gap * gap / n, sum(first + second)]
        if abs(gap) >= r / 2:
            by_r.append(excess - failures - gap)
            by_rr.append(excess - failures - gap)
        size = k * r / n**2 / 2 + (1 / r if k else 0)
        by_r, by_rr = [*by_r, size, -size], [*by_rr, size, -size]
    else:
        some = 1 if k else 0
        rest = [r * psi(0, 1 + r), -r * psi(0, 1 + n)] if k else []
        more = [r * r * psi(1, 1 + r), -r * r * psi(1, 1 + n), r * k / n**2] if k else []
        by_r = [failures, gap, *rest, -M(some), some * r / n]
        by_rr = [failures, -w, p_m * gap, *rest, *more]
    return Derivatives(
        negative_binomial(log_mean, log_r, k),
        [[w, -k * p_r], by_r],
        [[p_r * k * p_m, p_r * w], [p_m * w, -p_m * k * p_r], by_rr],
    )


# Logarithms from -180 to 180 (float64: eight times that), dense where exponentials, their halves, squares and roots
# overflow and where formulas meet.
LOGS = [-180, -178, -133, -120, -89, -88.69, -88, -87, -60, -45, -44.38, -44, -20, -5, -1, -0.25, 0, 0.25, 1, 1.01, 3]
LOGS += [12, 20, 44, 44.38, 45, 64, 70, 80, 81, 88, 88.69, 89, 100, 133, 178, 180]


def extremes(name: str, dtype: str, count: int = 1000) -> list[np.ndarray]:
    """Points at random of a grid: each argument of each size, and half of them close to what is expected."""
    rng = np.random.default_rng(len(name))
    single = dtype == "float32"
    distant = name in ("gaussian_nll", "laplace_nll")  # others have more products of distances
    logs = np.array([*LOGS, -80] if distant else LOGS) * (1 if single else 8)
    s, t = rng.choice(logs, count), rng.choice(logs, count)
    t = np.where(rng.uniform(size=count) < 0.3, s + rng.choice([-3, -0.5, -1e-3, 0, 0, 1e-3, 0.5, 3], count), t)
    distance = rng.choice([0, 0.5, 1, -3.0, 1e-3, -1e3], count)
    largest = (85.0 if single else 680.0) if distant else 10.0
    distance = np.where(
        rng.uniform(size=count) < 0.3, np.exp(np.clip(s, -largest, largest)) * rng.choice([1, 0.1, -7], count), distance
    )
    observed = rng.choice([0.0, 1e-3, 0.5, 1, 3, 1e3], count)
    counts = rng.choice([0, 1, 2, 3, 17, 1000, 0.25], count)
    zero = np.zeros(count)
    match name:
        case "gaussian_nll":
            return [zero, s, distance]
        case "laplace_nll":  # whose slope is the same at any distance
            return [zero, s, np.where(rng.uniform(size=count) < 0.1, 1e-30, distance)]
        case "gaussian_relative_entropy":
            return [distance, s, zero, t]
        case "student_t_nll":
            near_df = np.where(rng.uniform(size=count) < 0.3, np.exp(np.clip(s + t / 2, -largest, largest)), distance)
            return [zero, s, t, near_df]
        case "exponential_nll":
            return [s, observed]
        case "gamma_nll":
            x = np.where(observed == 0, 1, observed)
            return [s, t, np.where(rng.uniform(size=count) < 0.3, 1.001 * np.exp(np.clip(s - t, -largest, largest)), x)]
        case "poisson_nll":
            return [s, counts]
    return [s, t, counts]


EXTREME = {
    "gaussian_nll": gaussian_at,
    "gaussian_relative_entropy": gaussian_kl_at,
    "laplace_nll": laplace_at,
    "student_t_nll": student_t_at,
    "exponential_nll": exponential_at,
    "gamma_nll": gamma_at,
    "poisson_nll": poisson_at,
    "negative_binomial_nll": negative_binomial_at,
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(n, d, marks=() if d == "float32" and n not in LONG else pytest.mark.slow)
        for d in ("float32", "float64")
        for n in EXTREME
    ],
)
def test_extreme_parameters(name: str, dtype: str) -> None:
    """Value, gradient and Hessian, each where it and the value can be written in the dtype, if its terms can or not."""
    rows = np.stack(extremes(name, dtype), -1).astype(dtype)
    value, gradient, hessian = evaluate(value_gradient_hessian, name, rows, dtype)
    varying = range(differentiable(name))
    upper = [(i, j) for i in varying for j in varying if i <= j]
    got = np.stack([value, *gradient.T, *(hessian[:, i, j] for i, j in upper)], -1)
    names = ["value", *(f"d{i}" for i in varying), *(f"d{i}d{j}" for i, j in upper)]
    most, tiny, eps = (M(float(v)) for v in (np.finfo(dtype).max, np.finfo(dtype).tiny, np.finfo(dtype).eps))
    with mpmath.workdps(120 if dtype == "float32" else 1300):  # terms of exp(1400) cancel to numbers near 1
        exact = []
        for row in rows:
            at = EXTREME[name](*(M(float(v)) for v in row))
            exact.append([(sum(t), max(map(abs, t))) for t in (at.value, *at.gradient, *at.hessian)])
        for j, entry in enumerate(names):
            sums, sizes = zip(*(row[j] for row in exact), strict=True)
            inside = np.array([abs(row[0][0]) < most and abs(s) < most for row, s in zip(exact, sums, strict=True)])
            if "d" in entry[1:]:  # the terms of a slope's derivative are up to four times those of the entry
                inside &= np.array([size < most / 8 for size in sizes])
            assert (np.abs(got[:, 0]) > float(most) / 2)[[abs(row[0][0]) >= most for row in exact]].all()
            sums, sizes = ([v for v, i in zip(c, inside, strict=True) if i] for c in (sums, sizes))
            error = ulp_error(got[inside, j], sums, [min(size, most) for size in sizes])
            beyond = [n for n, size in enumerate(sizes) if size >= most and np.isfinite(got[inside, j][n])]
            error[beyond] = [float(abs(float(got[inside, j][n]) - sums[n]) / sizes[n] / eps) for n in beyond]
            # what is below the smallest normal number is flushed to 0, also if it is then multiplied by a count or distance
            error[[abs(float(g) - s) < 2**17 * tiny for g, s in zip(got[inside, j], sums, strict=True)]] = 0
            worst = int(error.argmax())
            # the contract; a second derivative has the errors of a slope's factors and those of their derivatives
            assert error[worst] <= (12 if "d" in entry[1:] else 8), (
                entry,
                rows[inside][worst],
                got[inside, j][worst],
                error[worst],
            )


# --- libraries --------------------------------------------------------------------------------------------------------


def samples(count: int = 50) -> Any:
    rng = np.random.default_rng(0)
    return rng.normal(size=count), rng.normal(size=count), rng.normal(size=count), rng.poisson(4, size=count)


def test_scipy() -> None:
    """In float64; SciPy's own log Gamma differences have some 1e-14."""
    a, b, x, k = samples()
    st: Any = scipy.stats
    expected = {
        "bernoulli_nll": ((a, k > 4), -st.bernoulli.logpmf(k > 4, scipy.special.expit(a))),
        "gaussian_nll": ((a, b, x), -st.norm.logpdf(x, a, np.exp(b))),
        "laplace_nll": ((a, b, x), -st.laplace.logpdf(x, a, np.exp(b))),
        "student_t_nll": ((a, b, a + 1, x), -st.t.logpdf(x, np.exp(a + 1), a, np.exp(b))),
        "exponential_nll": ((a, abs(x)), -st.expon.logpdf(abs(x), scale=np.exp(-a))),
        "gamma_nll": ((a, b, abs(x)), -st.gamma.logpdf(abs(x), np.exp(a), scale=np.exp(-b))),
        "poisson_nll": ((a, k), -st.poisson.logpmf(k, np.exp(a))),
        "negative_binomial_nll": ((a, b, k), -st.nbinom.logpmf(k, np.exp(b), 1 / (1 + np.exp(a - b)))),
    }
    with jax.enable_x64(True):
        for name, (args, value) in expected.items():
            np.testing.assert_allclose(getattr(jaxce, name)(*args), value, rtol=1e-12, atol=1e-12, err_msg=name)


def vectors() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    scale = np.tril(rng.normal(size=(5, 3, 3)), -1) + np.eye(3) * rng.uniform(0.1, 3, size=(5, 3, 1))
    return rng.normal(size=3), scale, rng.normal(size=(2, 5, 3))


def test_multivariate_normal() -> None:
    m, scale, x = vectors()
    with jax.enable_x64(True):
        got = jaxce.multivariate_normal_nll(m, scale, x)
    for i, j in np.ndindex(2, 5):
        expected = -scipy.stats.multivariate_normal.logpdf(x[i, j], m, scale[j] @ scale[j].T)
        np.testing.assert_allclose(got[i, j], expected, rtol=1e-10)  # SciPy goes by eigenvalues
    without = jaxce.multivariate_normal_nll(jnp.zeros(3), jnp.eye(3), jnp.zeros(3), full=False)
    assert without == 0
    # one dimension, in the tails
    for d, scale1 in [(1e10, 1.0), (1e-15, 1e-15), (3.0, 1e10)]:
        args = jnp.zeros(1), jnp.full((1, 1), scale1), jnp.full(1, d)
        alike = jaxce.gaussian_nll(0.0, math.log(scale1), d)
        np.testing.assert_allclose(jaxce.multivariate_normal_nll(*args), alike, rtol=1e-5)  # exp(log) of 35
        gradient = jax.grad(jaxce.multivariate_normal_nll, (0, 1, 2))(*args)
        np.testing.assert_allclose(gradient[2][0], d / scale1**2, rtol=ULP)
        np.testing.assert_allclose(gradient[1][0, 0], 1 / scale1 - d * d / scale1**3, rtol=ULP, atol=ULP / scale1)


def test_vectors_share_a_scale() -> None:
    """One solution for all: the same numbers as one for each, in every way that batch axes can broadcast."""
    m, scale, x = (jnp.asarray(a, "float32") for a in vectors())
    each = jnp.stack([jaxce.multivariate_normal_nll(m, s, x[:, i]) for i, s in enumerate(scale)], -1)
    np.testing.assert_allclose(jaxce.multivariate_normal_nll(m, scale, x), each, rtol=ULP)
    assert jaxce.multivariate_normal_nll(m, scale, x[0, 0]).shape == (5,)
    assert jaxce.multivariate_normal_nll(x[:, :1], scale[None], m).shape == (2, 5)


def test_what_stands_above_the_diagonal_is_not_read() -> None:
    m, scale, x = (jnp.asarray(a, "float32") for a in vectors())
    dirty = scale + jnp.triu(jnp.full((3, 3), jnp.nan), 1)[None]
    plain = jax.value_and_grad(lambda s: jaxce.multivariate_normal_nll(m, s, x).sum())
    (value, gradient), (dirty_value, dirty_gradient) = plain(scale), plain(dirty)
    assert value == dirty_value and jnp.array_equal(gradient, dirty_gradient)
    assert jnp.all(jnp.triu(gradient, 1) == 0)


@pytest.mark.slow
def test_torch() -> None:
    torch = pytest.importorskip("torch")
    a, b, x, k = samples()
    t = {name: torch.tensor(v) for name, v in zip("abxk", (a, b, x, k * 1.0), strict=True)}
    d = torch.distributions
    functional = torch.nn.functional
    w, c = np.stack([a, b], -1), np.stack([b, x], -1)
    mixture = d.MixtureSameFamily(
        d.Categorical(logits=torch.tensor(w)), d.Normal(torch.tensor(c), torch.ones_like(torch.tensor(c)))
    )
    m, scale, v = vectors()
    with jax.enable_x64(True):
        pairs = [
            (jaxce.student_t_nll(a, b, x, b), -d.StudentT(t["x"].exp(), t["a"], t["b"].exp()).log_prob(t["b"])),
            (jaxce.gamma_nll(a, b, abs(x)), -d.Gamma(t["a"].exp(), t["b"].exp()).log_prob(t["x"].abs())),
            (
                jaxce.negative_binomial_nll(a, b, k),
                -d.NegativeBinomial(t["b"].exp(), logits=t["a"] - t["b"]).log_prob(t["k"]),
            ),
            (jaxce.poisson_nll(a, k), -d.Poisson(t["a"].exp()).log_prob(t["k"])),
            (
                jaxce.poisson_nll(a, k, full=False),
                functional.poisson_nll_loss(t["a"], t["k"], full=False, reduction="none"),
            ),
            (
                jaxce.gaussian_nll(a, b, x, full=False),
                functional.gaussian_nll_loss(t["a"], t["x"], (2 * t["b"]).exp(), reduction="none"),
            ),
            (jaxce.mixture_nll(w, jaxce.gaussian_nll(c, 0.0, x[:, None])), -mixture.log_prob(t["x"])),
            (
                jaxce.multivariate_normal_nll(m, scale, v),
                -d.MultivariateNormal(torch.tensor(m), scale_tril=torch.tensor(scale)).log_prob(torch.tensor(v)),
            ),
        ]
    for i, (got, expected) in enumerate(pairs):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-12, atol=1e-12, err_msg=str(i))


# --- mixtures ---------------------------------------------------------------------------------------------------------


def test_mixture_gradients_are_responsibilities() -> None:
    """d/d nll_k is the probability of component k given the observation; d/d l_k is its weight less that."""
    rng = np.random.default_rng(2)
    w, nll = (jnp.asarray(rng.normal(size=(4, 3)), "float32") for _ in range(2))
    by_w, by_nll = jax.grad(lambda *a: jaxce.mixture_nll(*a).sum(), (0, 1))(w, nll)
    posterior = scipy.special.softmax(np.asarray(w - nll, np.float64), -1)
    np.testing.assert_allclose(by_nll, posterior, rtol=0, atol=ULP)  # of 1, as the weights are at most that
    np.testing.assert_allclose(by_w, scipy.special.softmax(np.asarray(w, np.float64), -1) - posterior, rtol=0, atol=ULP)


@pytest.mark.parametrize("absent", ["weight", "where"])
def test_a_component_that_is_not_there(absent: str) -> None:
    w, nll = jnp.array([[0.3, -jnp.inf if absent == "weight" else jnp.nan, 1.0]]), jnp.array([[2.0, jnp.nan, 90.0]])
    where = None if absent == "weight" else jnp.array([[1, 0, 2]])  # what isn't 0 takes part
    value, gradient = jax.value_and_grad(lambda *a: jaxce.mixture_nll(*a, where=where).sum(), (0, 1))(w, nll)
    expected = jaxce.mixture_nll(w[:, ::2], nll[:, ::2])
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    assert all(jnp.all(jnp.isfinite(g)) and g[0, 1] == 0 for g in gradient)


COLLAPSED = {
    # parameters of a component far from the observation, which comes last
    "bernoulli_nll": [(-1e30, 1), (INF, 0)],
    "gaussian_nll": [(1.0, -50.0, 0.5), (1.0, -100.0, 0.5), (1.0, -180.0, 0.5), (1e30, -30.0, 0.5)],
    "laplace_nll": [(1.0, -88.0, 0.5), (1.0, -100.0, 0.5), (1.0, -180.0, 0.5)],
    "student_t_nll": [(1.0, -100.0, 80.0, 0.5), (1.0, -100.0, 180.0, 0.5), (1.0, -180.0, 90.0, 0.5)],
    "exponential_nll": [(88.0, 3.0), (100.0, 3.0), (180.0, 3.0)],
    "gamma_nll": [(0.0, 100.0, 3.0), (-100.0, 100.0, 3.0), (180.0, 0.0, 3.0), (90.0, 90.0, 3.0)],
    "poisson_nll": [(88.0, 3), (100.0, 3), (180.0, 3)],
    "negative_binomial_nll": [(100.0, 100.0, 3), (180.0, 90.0, 3), (90.0, 180.0, 3)],
}
ORDINARY = {
    "bernoulli_nll": (0.3,),
    "gaussian_nll": (0.3, 0.1),
    "laplace_nll": (0.3, 0.1),
    "student_t_nll": (0.3, 0.1, 0.2),
    "exponential_nll": (0.3,),
    "gamma_nll": (0.3, 0.1),
    "poisson_nll": (0.3,),
    "negative_binomial_nll": (0.3, 0.1),
}


SLOW = "negative_binomial_nll", "student_t_nll", "gamma_nll"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in COLLAPSED])
def test_a_collapsed_component_adds_nothing(name: str) -> None:
    """Its derivatives may be infinite, but its weight is 0: the gradient and Hessian are those of the other component."""
    function, bad = getattr(jaxce, name), np.array(COLLAPSED[name], "float32")
    count = len(ORDINARY[name])

    @quick
    @jax.vmap
    def derivatives(row: Any) -> Any:
        def loss(components: Any) -> Any:
            return jaxce.mixture_nll(jnp.zeros(2), function(*components, row[-1]))

        def alone(parameters: Any) -> Any:
            return function(*parameters, row[-1]) + math.log(2)

        components = [jnp.stack([jnp.float32(o), p]) for o, p in zip(ORDINARY[name], row[:-1], strict=True)]
        ordinary = [jnp.float32(o) for o in ORDINARY[name]]
        return value_gradient_hessian(loss)(components), value_gradient_hessian(alone)(ordinary)

    (value, gradient, hessian), (one, slope, curvature) = derivatives(bad)
    np.testing.assert_allclose(value, one, rtol=1e-6)
    for i in range(count):
        np.testing.assert_array_equal(gradient[i][:, 1], 0)
        np.testing.assert_allclose(gradient[i][:, 0], slope[i], rtol=1e-6)
        for j in range(count):
            np.testing.assert_array_equal(np.asarray(hessian[i][j])[:, [0, 1, 1], [1, 0, 1]], 0)
            np.testing.assert_allclose(hessian[i][j][:, 0, 0], curvature[i][j], rtol=1e-5, atol=1e-6)


def test_weights_that_may_be_zero() -> None:
    """With the line of the docstring, the gradient at a weight of 0 is that of the formula."""
    nll = jnp.array([0.3, 1.0, 2.0])
    gradient = jax.grad(lambda w: jaxce.mixture_nll(jnp.log(w + 1e-30), nll))(jnp.array([0.5, 0.5, 0.0]))
    p = np.exp(-np.asarray(nll, float))
    # the last bit of log(1e-30) is 64 ulp of 1e-30
    np.testing.assert_allclose(gradient, 1 - p / (p[:2].sum() / 2), rtol=64 * 2.0**-24)


def test_mixture_of_nothing() -> None:
    nan = jnp.full((2, 3), jnp.nan)
    where = jnp.array([False, False])
    assert jnp.array_equal(jaxce.mixture_nll(nan, nan, where=where), jnp.zeros(2))
    gradient = jax.grad(lambda *a: jaxce.mixture_nll(*a, where=where).sum(), (0, 1))(nan, nan)
    assert all(jnp.all(g == 0) for g in gradient)
    with pytest.raises(ValueError, match="mixture_nll: component_nll must have at least one component"):
        jaxce.mixture_nll(jnp.zeros((2, 0)), jnp.zeros((2, 0)))
    # a density of 0 everywhere
    assert jaxce.mixture_nll(jnp.zeros(3), jnp.full(3, jnp.inf)) == jnp.inf


def test_mixture_shares_weights() -> None:
    rng = np.random.default_rng(3)
    w, nll = jnp.asarray(rng.normal(size=3), "float32"), jnp.asarray(rng.normal(size=(5, 3)), "float32")
    shared = jaxce.mixture_nll(w, nll)
    assert jnp.array_equal(shared, jaxce.mixture_nll(jnp.broadcast_to(w, (5, 3)), nll))
    np.testing.assert_allclose(jaxce.mixture_nll(w[:, None], nll.T, axis=0), shared, rtol=1e-6)


# --- edges ------------------------------------------------------------------------------------------------------------


EDGES = [
    # function, arguments, value, gradient by the parameters
    ("poisson_nll", (-INF, 0), 0, (0,)),
    ("poisson_nll", (-INF, 3), INF, (-3,)),
    ("poisson_nll", (80.0, 0), math.exp(80), (math.exp(80),)),
    ("poisson_nll", (-100.0, 3), 300 + math.log(6), (-3,)),
    ("poisson_nll", (100.0, 3), INF, None),
    ("negative_binomial_nll", (-INF, 0.0, 0), 0, (0, 0)),
    ("negative_binomial_nll", (-INF, 0.0, 3), INF, None),
    ("negative_binomial_nll", (100.0, 0.0, 3), 100, (1, 100 - 17 / 6)),
    ("negative_binomial_nll", (-100.0, 0.0, 3), 300, (-3, 3 - 11 / 6)),
    ("negative_binomial_nll", (0.0, 100.0, 3), 1 + math.log(6), (-2, 0)),
    ("exponential_nll", (0.0, 0.0), 0, (-1,)),
    ("exponential_nll", (100.0, 0.0), -100, (-1,)),
    ("exponential_nll", (-INF, 1.0), INF, (-1,)),
    ("gamma_nll", (0.0, -100.0, 1.0), 100, (100 - 0.5772157, -1)),
    ("gamma_nll", (0.0, 2.0, 0.0), -2, None),
    ("gamma_nll", (1.0, 2.0, 0.0), INF, None),
    ("gamma_nll", (-1.0, 2.0, 0.0), -INF, None),
    ("gaussian_nll", (0.0, -100.0, 0.0), -100 + 0.9189385, (0, 1)),
    ("gaussian_nll", (0.0, 0.0, INF), INF, None),
    ("laplace_nll", (0.0, -100.0, 0.0), -100 + 0.6931472, (0, 1)),
    ("student_t_nll", (0.0, -100.0, 1.0, 1.0), None, (-(math.e + 1), -math.e)),
    ("student_t_nll", (0.0, -100.0, 1.0, 0.0), None, (0, 1)),
    ("student_t_nll", (0.0, 0.0, INF, 2.0), 2 + 0.9189385, (-2, -3)),
    ("bernoulli_nll", (INF, 1), 0, (0,)),
    ("bernoulli_nll", (INF, 0), INF, None),
    ("poisson_nll", (20.723266, 10**9), None, None),
]


@pytest.mark.parametrize("name", dict.fromkeys(name for name, *_ in EDGES))
def test_edges(name: str) -> None:
    rows = [row for row in EDGES if row[0] == name]
    values, gradients = evaluate(jax.value_and_grad, name, [args for _, args, _, _ in rows])
    for row, got, slopes in zip(rows, values, gradients, strict=True):
        _, _, value, gradient = row
        if value is not None:
            np.testing.assert_allclose(got, value, rtol=1e-6, err_msg=str(row))
        if gradient is not None:
            np.testing.assert_allclose(slopes[: len(gradient)], gradient, rtol=1e-6, atol=1e-7, err_msg=str(row))
        assert value in (INF, -INF) or not np.isnan(slopes[0]), row


def test_gamma_of_shape_1_is_exponential_at_0() -> None:
    np.testing.assert_allclose(jax.grad(jaxce.gamma_nll, 2)(0.0, 1.0, 0.0), math.e, rtol=1e-6)


CURVATURES = [
    # function, arguments, of which one, second derivative: at points where formulas meet
    ("student_t_nll", (0.0, 0.0, 0.0, 1.0), 3, 0),  # (2 - 2 x^2) / (1 + x^2)^2
    ("student_t_nll", (0.0, 0.0, 0.0, 0.0), 3, 2),
    ("poisson_nll", (math.log(3), 3), 0, 3),
    ("poisson_nll", (math.log(6), 3), 0, 6),
    ("poisson_nll", (2.0, 0), 0, math.exp(2)),
    ("negative_binomial_nll", (0.0, 0.0, 3), 0, 1),  # r m (k + r) / (m + r)^2
    ("negative_binomial_nll", (0.0, 0.0, 0), 0, 0.25),
    ("gamma_nll", (0.0, 0.0, 1.0), 0, math.pi**2 / 6 - 0.5772157),  # alpha^2 psi' + alpha (psi - log(beta x))
    ("gamma_nll", (0.0, 0.0, 1.0), 1, 1),
    ("laplace_nll", (0.0, 0.0, 2.0), 1, 2),
]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in dict.fromkeys(n for n, *_ in CURVATURES)],
)
def test_curvature(name: str) -> None:
    rows = [row for row in CURVATURES if row[0] == name]
    _, _, hessians = evaluate(value_gradient_hessian, name, [args for _, args, _, _ in rows])
    for row, hessian in zip(rows, hessians, strict=True):
        _, _, which, value = row
        np.testing.assert_allclose(hessian[which, which], value, rtol=2e-6, atol=1e-6, err_msg=str(row))


@pytest.mark.parametrize("name", ["poisson_nll", pytest.param("negative_binomial_nll", marks=pytest.mark.slow)])
def test_a_count_of_nan_spoils_no_gradient(name: str) -> None:
    """Under a weight of 0 it adds neither to the loss nor to its gradient."""
    counts, weights = jnp.array([2.0, jnp.nan]), jnp.array([1.0, 0.0])

    def loss(parameters: list[Any]) -> Any:
        return jaxce.weighted_mean(getattr(jaxce, name)(*parameters, counts), weights)

    gradient = quick(jax.grad(loss))([jnp.array([0.3, 0.3])] * differentiable(name))
    assert all(g[0] != 0 and g[1] == 0 for g in gradient)


BAD = {
    # observations and parameters that there cannot be
    "bernoulli_nll": [(0.0, 2.0), (0.0, -1.0), (NAN, 1.0), (0.0, NAN)],
    "gaussian_nll": [(NAN, 0.0, 1.0), (0.0, NAN, 1.0), (0.0, 0.0, NAN)],
    "laplace_nll": [(NAN, 0.0, 1.0), (0.0, NAN, 1.0), (0.0, 0.0, NAN)],
    "student_t_nll": [(0.0, NAN, 0.0, 1.0), (0.0, 0.0, NAN, 1.0), (0.0, 0.0, 0.0, NAN)],
    "exponential_nll": [(0.0, -1.0), (NAN, 1.0), (0.0, NAN)],
    "gamma_nll": [(0.0, 0.0, -1.0), (NAN, 0.0, 1.0), (0.0, NAN, 1.0), (0.0, 0.0, NAN)],
    "poisson_nll": [(0.0, -1.0), (NAN, 1.0), (0.0, NAN)],
    "negative_binomial_nll": [(0.0, 0.0, -1.0), (NAN, 0.0, 1.0), (0.0, NAN, 1.0), (0.0, 0.0, NAN)],
}


@pytest.mark.parametrize(
    "name",
    [n if n in ("gaussian_nll", "poisson_nll") else pytest.param(n, marks=pytest.mark.slow) for n in BAD],
)
def test_bad_numbers_stay_in_their_place(name: str) -> None:
    """NaN for the value and for no other element's value or gradient."""
    bad = BAD[name]
    good = (0.0,) * (len(bad[0]) - 1) + (1.0,)
    columns = [jnp.array(c) for c in zip(*[good, *bad, good], strict=True)]
    function = getattr(jaxce, name)

    @quick
    def value_and_gradients(columns: Any) -> Any:
        gradients = jax.grad(lambda *a: function(*a).sum(), tuple(range(len(good) - 1)))
        return function(*columns), gradients(*columns)

    value, gradients = value_and_gradients(columns)
    assert jnp.array_equal(jnp.isnan(value), jnp.array([False, *[True] * len(bad), False]))
    assert all(not jnp.isnan(g[0]) and g[0] == g[-1] for g in gradients)


def test_a_bad_scale_spoils_its_own_vector() -> None:
    scale = jnp.stack([jnp.eye(2), -jnp.eye(2), jnp.eye(2) * jnp.array([[1.0], [0.0]]), jnp.eye(2)])
    value = jaxce.multivariate_normal_nll(jnp.zeros(2), scale, jnp.ones(2))
    assert jnp.array_equal(jnp.isnan(value), jnp.array([False, True, True, False]))


def test_arguments_broadcast() -> None:
    a, b = jnp.zeros((3, 1)), jnp.ones((1, 4))
    for name in ("bernoulli_nll", "gaussian_nll"):  # the others share the door
        count = len(BAD[name][0])
        value = getattr(jaxce, name)(a, *[0.0] * (count - 2), b)
        assert value.shape == (3, 4)
        assert getattr(jaxce, name)(a, *[0] * (count - 2), jnp.ones((3, 4), "int32")).dtype == "float32"
        with pytest.raises(ValueError, match=f"^{name}: x must broadcast with .*, .*, got float32"):
            getattr(jaxce, name)(jnp.zeros(3), *[0.0] * (count - 2), jnp.ones(4))


@pytest.mark.parametrize(
    ("shapes", "result"),
    [  # of location, log_scale and x; None is an error
        (((5, 1), (), (5,)), None),  # predictions of a network with one output
        (((5,), (5,), (5, 1)), None),
        (((5, 1), (5,), (5, 1)), None),
        (((5, 1), (5, 1), (4,)), None),
        (((2, 1, 3), (), (2, 3)), None),
        (((5, 1), (), (1, 5)), (5, 5)),  # written on purpose
        (((1, 4), (1, 4), (5, 1)), (5, 4)),
        (((5, 4), (4,), (5, 1)), (5, 4)),  # a mixture: x[:, None]
        (((4,), (), (5, 4)), (5, 4)),
        (((1,), (1,), (5, 1)), (5, 1)),
        (((), (), (5,)), (5,)),
    ],
)
def test_no_silent_outer_product(shapes: Any, result: Any) -> None:
    """No result is larger than each argument, but where arrays of all axes say so by axes of length 1."""
    args = [jnp.zeros(shape) for shape in shapes]
    if result is not None:
        assert jaxce.gaussian_nll(*args).shape == result
        return
    with pytest.raises(
        ValueError, match=r"^gaussian_nll: (location|log_scale|x) must have \d axes, as .* give "
    ) as error:
        jaxce.gaussian_nll(*args)
    if shapes[0] == (5, 1) and shapes[2] == (5,):
        assert "give x.reshape((5, 1)) to pair it with location, or x[None] for all combinations" in str(error.value)


def test_no_silent_outer_product_of_vectors_and_components() -> None:
    m, x = jnp.zeros((5, 1, 2)), jnp.zeros((5, 2))
    with pytest.raises(ValueError, match="^multivariate_normal_nll: x must have"):
        jaxce.multivariate_normal_nll(m, jnp.eye(2), x)
    assert jaxce.multivariate_normal_nll(m, jnp.eye(2), x[None]).shape == (5, 5)
    with pytest.raises(ValueError, match="^mixture_nll: log_weights must have"):
        jaxce.mixture_nll(jnp.zeros(5), jnp.zeros((5, 1)))


def test_numbers_may_be_integers() -> None:
    """Python's and NumPy's, as parameters too."""
    for one in (1, np.int64(1), np.int32(1), jnp.int32(1)):
        assert jaxce.gaussian_nll(0, one, one) == jaxce.gaussian_nll(0.0, 1.0, 1.0)
        assert jaxce.poisson_nll(one, one) == jaxce.poisson_nll(1.0, 1.0)
        assert jaxce.gaussian_relative_entropy(one, one, one, one) == 0
    with jax.enable_x64(True):
        many = 2**30 + 1  # which is no float32
        assert jaxce.poisson_nll(np.float64(3.0), np.array(many)) == jaxce.poisson_nll(
            np.float64(3.0), np.float64(many)
        )
        # a Python number takes the dtype of the arrays
        assert jaxce.gaussian_nll(0.0, 1, jnp.zeros(2, "float32")).dtype == "float32"


# --- where ------------------------------------------------------------------------------------------------------------

WHERE = {  # the number of arguments, of which the last is observed
    "sigmoid_binary_cross_entropy": 2,
    "sigmoid_focal_loss": 2,
    "binary_cross_entropy": 2,
    "gaussian_relative_entropy": 4,
    **{name: len(args[0]) for name, args in BAD.items()},
}


QUICK = "sigmoid_binary_cross_entropy", "poisson_nll"


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in WHERE])
def test_what_where_leaves_out(name: str) -> None:
    """It is left out before anything is computed: whatever it is, the value and all derivatives are those of the rest."""
    rng = np.random.default_rng(4)
    function, count = getattr(jaxce, name), WHERE[name]
    keep = np.array([[True, False, True, False], [False, True, True, False]])
    good = [rng.uniform(0.2, 0.8, keep.shape).astype("float32") for _ in range(count)]
    bad = [np.where(keep, a, rng.permuted([[NAN, INF, -INF, -3.0]] * 2, axis=1)).astype("float32") for a in good]
    ones = [np.ones_like(a) for a in good]

    @quick
    def derivatives(args: Any, where: Any) -> Any:
        def f(*args: Any) -> Any:
            return function(*args, where=where)

        def gradient(*args: Any) -> Any:
            return jax.grad(lambda *args: f(*args).sum(), tuple(range(count)))(*args)

        value, tangent = jax.jvp(f, args, ones)
        products = jax.jvp(gradient, args, ones)[1]
        back = jax.grad(lambda *args: sum(g.sum() for g in gradient(*args)), tuple(range(count)))(*args)
        return value, tangent, *gradient(*args), *products, *back

    everything = derivatives(good, np.ones(keep.shape, "int8"))
    for got, expected in zip(derivatives(bad, keep.astype("int8")), everything, strict=True):
        np.testing.assert_allclose(got, np.where(keep, expected, 0), rtol=1e-5, atol=1e-6)  # another program's rounding
        assert (np.asarray(got)[~keep] == 0).all()
    columns = function(*good, where=keep[:1])
    np.testing.assert_array_equal(columns, np.where(keep[:1], function(*good), 0))
    with pytest.raises(
        ValueError, match=rf"{name}: where must have .* \(2, 4\), got bool\[2\].* where\[\.\.\., None\]"
    ):
        function(*good, where=keep[:, 0])
    with pytest.raises(TypeError, match=f"{name}: where must be"):
        function(*good, where=keep.astype("float32"))


def test_where_of_vectors() -> None:
    """A mask of vectors, each with a scale of its own or all with one."""
    m, scale, x = (jnp.asarray(a, "float32") for a in vectors())
    keep = jnp.asarray(np.random.default_rng(5).uniform(size=(2, 5)) < 0.5).at[:, 3].set(False)
    bad_x = jnp.where(keep[..., None], x, jnp.nan)
    bad_scale = scale.at[3].set(jnp.nan)  # which no vector that counts has

    @quick
    def values_and_gradients(args: Any, bad: Any) -> Any:
        def masked(*args: Any) -> Any:
            return jaxce.multivariate_normal_nll(*args, where=keep)

        def plain(*args: Any) -> Any:
            return jnp.where(keep, jaxce.multivariate_normal_nll(*args), 0)

        return [
            (f(*a), jax.grad(lambda *a, f=f: f(*a).sum(), (0, 1, 2))(*a)) for f, a in ((masked, bad), (plain, args))
        ]

    for scales, bad in ((scale, bad_scale), (scale[0], scale[0])):
        got, expected = values_and_gradients((m, scales, x), (m, bad, bad_x))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # sums of numbers up to 100, in another order
    with pytest.raises(ValueError, match=r"multivariate_normal_nll: where must have .* \(2, 5\), got bool\[5\]"):
        jaxce.multivariate_normal_nll(m, scale, x, where=keep[0])


def test_large_log_weights_cost_a_mixture_no_digits() -> None:
    for weights, nll in (([20.0, 0.0], [0.0, 30.0]), ([10.0, 0.0], [0.0, 1.0]), ([-300.0, -290.0], [2.0, 0.0])):
        w, c = (np.asarray(x, np.longdouble) for x in (weights, nll))
        exact = -np.log1p((np.exp(w - w.max()) * np.expm1(-c)).sum() / np.exp(w - w.max()).sum())
        # Two sums of at least 1/2 of it, each rounded to 2 ulp.
        np.testing.assert_allclose(jaxce.mixture_nll(jnp.array(weights), jnp.array(nll)), float(exact), rtol=5e-7)


def test_mixtures_of_any_number_of_rows_are_exported() -> None:
    rows, classes = jax.export.symbolic_shape("b, c")
    shapes = (jax.ShapeDtypeStruct(s, "float32") for s in ((1, classes), (rows, classes)))
    exported = jax.export.export(jax.jit(jaxce.mixture_nll))(*shapes)
    np.testing.assert_allclose(exported.call(jnp.zeros((1, 2)), jnp.ones((3, 2))), np.ones(3))
