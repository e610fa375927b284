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
    terms = (
        v * mpmath.log(v * total / (rows[i] * columns[k])) for i, row in enumerate(table) for k, v in enumerate(row)
    )
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
