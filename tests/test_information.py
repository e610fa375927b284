"""Entropies and divergences against 60 digits from the same binary inputs, and against SciPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
from helpers import ulp_error

import jaxce

RNG = np.random.default_rng(0)


def distributions(classes: int, spread: float) -> np.ndarray:
    weights = np.exp(RNG.normal(size=classes) * spread)
    return (weights / weights.sum()).astype("float32")


def pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    p, q = distributions(7, 2), distributions(7, 2)
    near = (p * (1 + 1e-6 * RNG.normal(size=7))).astype("float32")
    return {
        "random": (p, q),
        "far": (distributions(7, 8), distributions(7, 8)),
        "near": (p, near),
        "equal": (p, p),
        "one-hot": (np.eye(7, dtype="float32")[2], q),
        "nothing in common in places": (
            np.float32([0.5, 0.5, 0, 0, 0, 0, 0]),
            np.float32([0.25, 0.5, 0.25, 0, 0, 0, 0]),
        ),
    }


PAIRS = pairs()


def bregman(p: Any, q: Any) -> Any:
    return (p * mpmath.log(p / q) if p else mpmath.mpf(0)) - p + q


def exact_relative_entropy(p: Any, q: Any) -> Any:
    return mpmath.fsum(bregman(a, b) for a, b in zip(p, q, strict=True))


def exact_jensen_shannon(p: Any, q: Any) -> Any:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (exact_relative_entropy(p, middle) + exact_relative_entropy(q, middle)) / 2


def numbers(values: np.ndarray) -> list[Any]:
    return [mpmath.mpf(float(v)) for v in values]


def softmax(values: np.ndarray) -> list[Any]:
    weights = [mpmath.exp(v) for v in numbers(values)]
    return [w / mpmath.fsum(weights) for w in weights]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    ("function", "exact"),
    [
        (jaxce.relative_entropy, exact_relative_entropy),
        (jaxce.jensen_shannon_divergence, exact_jensen_shannon),
    ],
)
def test_divergences(function: Callable[..., Any], exact: Callable[..., Any], name: str) -> None:
    p, q = PAIRS[name]
    with mpmath.workdps(60):
        # A sum of terms that are not negative, each of some roundings, an ulp of which the closed form may make 6.
        assert ulp_error(function(p, q), [exact(numbers(p), numbers(q))]) <= 16


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("scale", [1.0, 2.0**-12])
@pytest.mark.parametrize(
    ("function", "exact"),
    [
        (jaxce.relative_entropy_with_logits, exact_relative_entropy),
        (jaxce.jensen_shannon_divergence_with_logits, exact_jensen_shannon),
    ],
)
def test_divergences_of_logits(
    function: Callable[..., Any], exact: Callable[..., Any], scale: float, offset: float
) -> None:
    x = (np.float32(offset) + RNG.normal(size=7) * 3).astype("float32")
    y = (x + RNG.normal(size=7) * scale).astype("float32")
    with mpmath.workdps(60):
        assert ulp_error(function(x, y), [exact(softmax(x), softmax(y))]) <= 32


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_entropy(classes: int) -> None:
    p = distributions(classes, 3)
    with mpmath.workdps(60):
        exact = -mpmath.fsum(v * mpmath.log(v) for v in numbers(p) if v)
        assert ulp_error(jaxce.entropy(p), [exact]) <= 4
        assert ulp_error(jaxce.entropy(p, base=2), [exact / mpmath.log(2)]) <= 4


def exact_mutual_information(joint: np.ndarray) -> Any:
    table = [numbers(row) for row in joint]
    total = mpmath.fsum(v for row in table for v in row)
    rows, columns = [mpmath.fsum(row) for row in table], [mpmath.fsum(column) for column in zip(*table, strict=True)]
    cells = ((v, rows[i] * columns[k]) for i, row in enumerate(table) for k, v in enumerate(row))
    terms = (v * mpmath.log(v * total / product) for v, product in cells if v)
    return mpmath.fsum(terms) / total


@pytest.mark.parametrize("dependence", [1, 1e-2, 1e-3, 1e-4, 1e-6])
def test_mutual_information(dependence: float) -> None:
    outer = distributions(5, 3)[:, None] * distributions(4, 3)
    joint = (outer * np.exp(dependence * RNG.normal(size=(5, 4)))).astype("float32")
    with mpmath.workdps(60):
        exact = exact_mutual_information(joint)
        got = jaxce.mutual_information(joint)
        # Marginals' products are rounded by 1e-7: their square is left, times a few.
        assert ulp_error(got, [exact]) <= 16 or abs(float(got) - exact) <= 1e-13


def test_scipy() -> None:
    p, q = PAIRS["random"]
    joint = np.outer(p, q) + np.diag(p)
    joint = (joint / joint.sum()).astype("float32")
    samples = RNG.normal(size=60).astype("float32")
    outer = joint.sum(1)[:, None] * joint.sum(0)
    close = {"rtol": 2e-6}  # SciPy in float32 is the less exact of the two
    np.testing.assert_allclose(jaxce.relative_entropy(p, q), scipy.stats.entropy(p, q), **close)
    np.testing.assert_allclose(
        jaxce.jensen_shannon_divergence(p, q), scipy.spatial.distance.jensenshannon(p, q) ** 2, **close
    )
    np.testing.assert_allclose(jaxce.mutual_information(joint), scipy.special.rel_entr(joint, outer).sum(), rtol=1e-5)
    for method in ("auto", "vasicek", "van es", "ebrahimi", "correa"):
        expected = scipy.stats.differential_entropy(samples.astype("float64"), method=method)
        np.testing.assert_allclose(jaxce.differential_entropy(samples, method=method), expected, rtol=1e-5)


def test_gradients_at_zero() -> None:
    """0 log 0 = 0 in the derivative too: only an entropy's own slope at 0 is infinite."""
    p, q = PAIRS["nothing in common in places"]
    by_q = jax.grad(lambda q: jaxce.relative_entropy(jnp.asarray(p), q))(jnp.asarray(q))
    np.testing.assert_array_equal(by_q, [1 - 2.0, 0, 1, 0, 0, 0, 0])
    assert jax.grad(jaxce.entropy)(jnp.asarray(p))[2] == jnp.inf
    assert jnp.all(jax.grad(lambda p: jaxce.entropy(p, -1, p > 0))(jnp.asarray(p))[2:] == 0)


def test_mixed_second_derivative_of_cross_entropy_is_finite_at_zero() -> None:
    """d/dp d/dq of -p log q is -1/q, also at p = 0."""
    p, q = jnp.array([0.0, 0.5, 0.5]), jnp.array([0.25, 0.25, 0.5])
    mixed = jax.jacfwd(jax.grad(jaxce.cross_entropy, 1), 0)(p, q)
    np.testing.assert_array_equal(mixed, np.diag([-4.0, -4.0, -2.0]))


def exact_differential_entropy(x: np.ndarray, m: int, method: str) -> Any:
    """The estimators' definitions in 60 digits."""
    x, n = sorted(numbers(x)), len(x)

    def at(i: int) -> Any:
        return x[min(max(i, 0), n - 1)]

    if method == "van es":
        logs = [mpmath.log((n + 1) / mpmath.mpf(m) * (x[i + m] - x[i])) for i in range(n - m)]
        constant = mpmath.fsum(1 / mpmath.mpf(k) for k in range(m, n + 1)) + mpmath.log(m) - mpmath.log(n + 1)
        return mpmath.fsum(logs) / (n - m) + constant
    if method == "correa":
        logs = []
        for i in range(n):
            window = [at(k) for k in range(i - m, i + m + 1)]
            mean = mpmath.fsum(window) / (2 * m + 1)
            rise = mpmath.fsum((v - mean) * (k - m) for k, v in enumerate(window))
            logs.append(-mpmath.log(rise / (n * mpmath.fsum((v - mean) ** 2 for v in window))))
        return mpmath.fsum(logs) / n
    c = [2 if method == "vasicek" else 1 + mpmath.mpf(min(i, n - 1 - i, m)) / m for i in range(n)]
    return mpmath.fsum(mpmath.log(n * (at(i + m) - at(i - m)) / (c[i] * m)) for i in range(n)) / n


@pytest.mark.parametrize("method", ["vasicek", "van es", "ebrahimi", "correa"])
def test_differential_entropy_at_all_scales(method: str) -> None:
    """Of samples of any size, near 0 and beside one that is far away; and in a window whose length NumPy gives."""
    rng = np.random.default_rng(3)
    some = np.sort(rng.normal(size=20))
    rows = [some * scale for scale in (1e-33, 1e-20, 1, 1e20, 1e35, 3e38 / np.abs(some).max())]
    rows += [np.arange(20) ** 2 * 1e-30, np.append(some[:-1] * 1e-30, 1), np.append(some[:-1] * 1e-20, 1e38)]
    x = np.stack(rows).astype("float32")
    got = jaxce.differential_entropy(x, window_length=np.int64(3), method=method)
    slope = np.asarray(
        jax.jit(jax.grad(lambda x: jaxce.differential_entropy(x, method=method, window_length=3).sum()))(x)
    )
    with mpmath.workdps(60):
        exact = np.array([float(exact_differential_entropy(row, 3, method)) for row in x])
    # A mean of logarithms of up to 88, each right to an ulp of itself and of 1.
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=2e-6)
    # H(a X) = H(X) + log a, so along the samples themselves the derivative is 1: a sum of numbers of about that size, if
    # one over a spacing can be written.
    writable = np.abs(x).max(1) < 1e33
    np.testing.assert_allclose((slope.astype(float) * x).sum(1)[writable], 1, rtol=1e-4)


def test_mutual_information_at_all_scales() -> None:
    """It doesn't know in what a table is counted; and its marginals may be as small as numbers get."""
    rng = np.random.default_rng(4)
    tables = [
        rng.uniform(0.1, 1, size=(3, 4)),
        rng.uniform(size=(3, 4)) * [[1], [1e-12], [1e-18]] * [1, 1e-15, 1, 1e-12],
    ]
    tables.append(np.float32([[1, 0, 0, 0], [0, 1e-18, 0, 0], [0, 0, 1e-18, 1e-19]]))
    joint = np.stack([(t * s).astype("float32") for t in tables for s in (1e-2, 1e-1, 1, 1e18, 1e37)])
    joint = np.concatenate([joint, (tables[0] * np.float32([[[1.2e-37]], [[3.3e38]]])).astype("float32")])
    far = np.zeros((2, 3, 4), "float32")  # entries whose quotients can't be written
    far[:, :2, :2] = [[[1e15, 1e-24], [1, 1e-20]], [[1e20, 1e-17], [1, 1e-10]]]
    joint = np.concatenate([joint, far])
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(jaxce.mutual_information)))(joint)
    with mpmath.workdps(60):
        exact = [exact_mutual_information(row) for row in joint]
        close = np.abs(np.array([float(v - e) for v, e in zip(value.tolist(), exact, strict=True)])) <= 1e-13
        assert (close | (ulp_error(value, exact) <= 16)).all()
        for row, got, right in zip(joint, np.asarray(slope), exact, strict=True):
            x, y, total = row.astype(float).sum(1), row.astype(float).sum(0), row.astype(float).sum()
            with np.errstate(divide="ignore", invalid="ignore"):
                logs = np.log(row.astype(float) / x[:, None]) - np.log(y / total)
            # Logarithms of up to 88, and their mean.
            expected = (logs - float(right)) / total
            keep = (np.abs(expected) < 3e38) & (np.abs(expected) > 2e-38) & np.isfinite(logs)
            np.testing.assert_allclose(got[keep], expected[keep], rtol=2e-6, atol=1e-6 / total)
            np.testing.assert_array_equal(got[logs == -np.inf], -np.inf)
    counts = np.array([[3, 1], [2, 5]])
    assert jaxce.mutual_information(counts) == jaxce.mutual_information(counts.astype("float32"))


def test_second_derivatives_of_mutual_information() -> None:
    """(delta_xx' delta_yy' / p_xy - delta_xx' / p_x - delta_yy' / p_y + 1) / T, less the slopes over T, for each pair."""
    joint = np.random.default_rng(5).uniform(size=(2, 3)).astype("float32")
    product = joint.sum(1, keepdims=True) * joint.sum(0) / joint.sum()
    for table in (joint, product.astype("float32"), joint * np.float32(1e-15), joint * np.float32([[1], [0]])):
        got = np.asarray(jax.jit(jax.hessian(jaxce.mutual_information))(table)).astype(float)
        p = table.astype(float)
        x, y, total = p.sum(1), p.sum(0), p.sum()
        with np.errstate(all="ignore"):
            slope = (np.log(p * total / (x[:, None] * y)) - float(exact_mutual_information(table))) / total
            of_entry = np.einsum("ac,bd,ab->abcd", np.eye(2), np.eye(3), 1 / p)
            of_rows, of_columns = np.einsum("ac,a->ac", np.eye(2), 1 / x), np.einsum("bd,b->bd", np.eye(3), 1 / y)
            right = of_entry - of_rows[:, None, :, None] - of_columns[None, :, None, :] + 1 / total
            right = (right - slope[:, :, None, None] - slope[None, None]) / total
        assert np.isfinite(got).all()
        keep = np.isfinite(right)
        np.testing.assert_allclose(got[keep], right[keep], rtol=1e-5, atol=1e-5 / total**2)  # differences of quotients


def test_numbers_may_be_integers() -> None:
    for given in (1, np.int32(1), np.int64(1), jnp.int32(1)):
        assert jaxce.surprisal(given) == 0
    assert jaxce.binary_cross_entropy(1, 1) == 0 and jaxce.binary_cross_entropy(0, 1) == jnp.inf
