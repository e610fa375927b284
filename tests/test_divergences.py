"""Divergences of softmax distributions: of nearly equal ones, of logits that lie apart, and of classes that one has alone.

On arrays, on `LinearLogits` and on `ShardedLogits` alike, in value and gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from helpers import assert_same
from mpmath import mpf

import jaxce

FUNCTIONS = {
    "cross-entropy": jaxce.cross_entropy_with_logits,
    "relative entropy": jaxce.relative_entropy_with_logits,
    "Jensen-Shannon": jaxce.jensen_shannon_divergence_with_logits,
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
INF = np.inf


def as_array(x: jax.Array) -> Any:
    return x


def as_linear(x: jax.Array) -> Any:
    """The same logits as a product with the identity, plus what is left of them in the bias: one row."""
    return jaxce.LinearLogits(jnp.zeros((1, 1), x.dtype), jnp.zeros((1, x.size), x.dtype), bias=x[0], block_size=3)


def sharded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of two rows of logits whose classes are on the parts of a `vmap`, padded to four of them."""

    def parts(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, -x.shape[-1] % 4)), constant_values=-INF)
        return jnp.moveaxis(padded.reshape(*x.shape[:-1], 4, -1), -2, 0)

    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        def part(x: jax.Array, y: jax.Array) -> jax.Array:
            return function(jaxce.ShardedLogits(x, "parts"), jaxce.ShardedLogits(y, "parts"))

        return jax.vmap(part, axis_name="parts", out_axes=None)(parts(x), parts(y))

    return run


def kinds(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """A function of two arrays of one row, computed with each kind of logits."""
    return {
        "array": function,
        "linear": lambda x, y: function(as_linear(x), as_linear(y)),
        "array and linear": lambda x, y: function(x, as_linear(y)),
        "sharded": sharded(function),
    }


@functools.cache
def both(name: str, kind: str) -> Callable[..., Any]:
    def total(x: jax.Array, y: jax.Array) -> Any:
        value = kinds(FUNCTIONS[name])[kind](x, y)
        return jnp.sum(value), value

    compiler_options = {"xla_backend_optimization_level": 0}  # numbers matter, not speed
    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True), compiler_options=compiler_options)


class Exact:
    """Two rows of logits as the binary numbers they are, in 60 digits; a class at -inf is not there."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.p, self.q = (self.softmax(v) for v in (x, y))
        self.pairs = list(zip(self.p, self.q, strict=True))

    @staticmethod
    def softmax(x: np.ndarray) -> list[Any]:
        weights = [mpmath.exp(mpf(float(v))) if v > -INF else mpf(0) for v in x]
        return [w / mpmath.fsum(weights) for w in weights]

    def value(self, name: str) -> Any:
        if name == "Jensen-Shannon":
            return sum(a * mpmath.log(2 * a / (a + b)) if a else mpf(0) for x in (0, 1) for a, b in self.turned(x)) / 2
        if any(a and not b for a, b in self.pairs):
            return mpmath.inf
        return sum(
            a * (mpmath.log(a / b) if name == "relative entropy" else -mpmath.log(b)) for a, b in self.pairs if a
        )

    def turned(self, i: int) -> Iterator[tuple[Any, Any]]:
        yield from ((pair[i], pair[1 - i]) for pair in self.pairs)

    def gradients(self, name: str) -> list[list[Any]]:
        if name == "Jensen-Shannon":
            result = []
            for i in (0, 1):
                logs = [mpmath.log(2 * a / (a + b)) / 2 if a else mpf(0) for a, b in self.turned(i)]
                mean = sum(pair[i] * log for pair, log in zip(self.pairs, logs, strict=True))
                result.append([pair[i] * (log - mean) for pair, log in zip(self.pairs, logs, strict=True)])
            return result
        costs = [
            (mpmath.log(a / b) if name == "relative entropy" else -mpmath.log(b)) if a else mpf(0)
            for a, b in self.pairs
        ]
        value = self.value(name)
        return [[a * (c - value) for (a, _), c in zip(self.pairs, costs, strict=True)], [b - a for a, b in self.pairs]]


@every_function
@pytest.mark.parametrize(
    "kind", ["array", "linear", pytest.param("array and linear", marks=pytest.mark.slow), "sharded"]
)
def test_nearly_equal_rows(name: str, kind: str) -> None:
    """Rows that differ by 1e-1 ... 1e-6, with offsets, in one batch of parameters: the contract's 32 ulp or 1e-4."""
    rng = np.random.default_rng(0)
    for offset in (0.0, 100.0, 1e4):
        for difference in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            x = (offset + 2 * rng.normal(size=(1, 7))).astype(np.float32)
            y = (x + np.float32(difference) * rng.normal(size=(1, 7))).astype(np.float32)
            with mpmath.workdps(60):
                exact = Exact(x[0], y[0])
                value, gradients = float(exact.value(name)), exact.gradients(name)
            (_, got), slopes = both(name, kind)(x, y)
            assert got[0] >= 0
            if value == 0:
                assert got[0] == 0
                continue
            # 32 ulp; and 1e-4 of what is as small as the square of a difference of 1e-6.
            assert abs(float(got[0]) - value) <= (32 * 2.0**-23 if difference >= 1e-3 else 1e-4) * value, (
                offset,
                difference,
            )
            for slope, right in zip(slopes, gradients, strict=True):
                right = np.array([float(r) for r in right])
                largest = np.abs(right).max()
                # In units of the largest entry; an entry is a difference of numbers of the size of p times the difference.
                limit = 1e-4 * largest + (4 * 2.0**-24 if name == "cross-entropy" else 1e-13)
                assert np.abs(np.asarray(slope[0], np.float64) - right).max() <= limit, (offset, difference)


@every_function
@pytest.mark.parametrize(
    "kind", ["array", "linear", pytest.param("array and linear", marks=pytest.mark.slow), "sharded"]
)
def test_rows_that_lie_apart(name: str, kind: str) -> None:
    """A softmax doesn't know where its logits are: beside logits of 1e30 those near 0 have all their digits."""
    rng = np.random.default_rng(4)
    for offset in (3.0, 1e4, -1e6, 1e8, -1e30):
        grid = max(2.0**-6, float(np.spacing(np.float32(abs(offset)))))  # of numbers around the offset
        gaps = np.float32(grid) * rng.integers(0, 3 if grid > 1 else int(8 / grid), size=(1, 7)).astype(np.float32)
        far = np.float32(np.round(offset / grid) * grid) - gaps
        near = 2 * rng.normal(size=(1, 7)).astype(np.float32)
        for x, y in (far, near), (near, far):
            with mpmath.workdps(120):  # of which 60 are behind the point
                exact = Exact(*(v[0].astype(np.float64) - v.max() for v in (x, y)))
                value, gradients = float(exact.value(name)), exact.gradients(name)
            (_, got), slopes = both(name, kind)(x, y)
            assert abs(float(got[0]) - value) <= 32 * 2.0**-23 * value, offset
            for slope, right in zip(slopes, gradients, strict=True):
                # 4 ulp of the largest numbers of which an entry is a difference, and as much for their own errors.
                np.testing.assert_allclose(
                    slope[0],
                    [float(r) for r in right],
                    rtol=1e-6,
                    atol=8 * 2.0**-23 * max(1, value),
                    err_msg=f"{offset}",
                )


def masks() -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Which of 6 classes are there in p and in q: each class in one of the four ways, at random, and all of one kind."""
    rng = np.random.default_rng(1)
    there = np.ones(6, bool)
    some = there.copy()
    some[[1, 4]] = False
    cases = [("p", some, there), ("q", there, some), ("both", some, some), ("nothing in common", some, ~some)]
    cases += [(f"random {i}", rng.uniform(size=6) < 0.6, rng.uniform(size=6) < 0.6) for i in range(8)]
    return cases + [("nothing of p", ~there, some), ("nothing of q", some, ~there)]


@every_function
@pytest.mark.parametrize("kind", ["array", "linear", "sharded"])
def test_classes_that_are_there_in_one_alone(name: str, kind: str) -> None:
    rng = np.random.default_rng(2)
    for title, in_p, in_q in masks():
        x, y = (np.where(m, 3 * rng.normal(size=(1, 6)), -INF).astype(np.float32) for m in (in_p, in_q))
        (_, got), slopes = both(name, kind)(x, y)
        if not in_p.any() or name != "relative entropy" and not in_q.any():
            assert got[0] == 0 and not any(np.any(np.asarray(s)) for s in slopes), title
            continue
        if not in_q.any():
            assert got[0] == INF, title
            continue
        with mpmath.workdps(60):
            exact = Exact(x[0], y[0])
            value, gradients = float(exact.value(name)), exact.gradients(name) if exact.value(name) < INF else None
        np.testing.assert_allclose(got[0], value, rtol=32 * 2.0**-23, atol=1e-12, err_msg=title)
        for slope, right in zip(slopes, gradients or [], strict=False):
            right = np.array([float(r) for r in right])
            # Differences of numbers that are at most the value and 1.
            np.testing.assert_allclose(slope[0], right, rtol=1e-5, atol=1e-6 * max(1, value), err_msg=title)


@every_function
def test_a_mask_is_what_is_there(name: str) -> None:
    """``where`` takes classes from both, whatever they hold."""
    rng = np.random.default_rng(3)
    x, y = (jnp.asarray(3 * rng.normal(size=(4, 6)), "float32") for _ in range(2))
    keep = jnp.asarray(rng.uniform(size=(4, 6)) < 0.7).at[:, 0].set(True)
    function = FUNCTIONS[name]
    got = function(jnp.where(keep, x, jnp.nan), jnp.where(keep, y, jnp.nan), where=keep)
    expected = function(jnp.where(keep, x, -jnp.inf), jnp.where(keep, y, -jnp.inf))
    assert_same(got, expected)
    slopes = jax.grad(lambda x, y: function(x, y, where=keep).sum(), (0, 1))(jnp.where(keep, x, jnp.nan), y)
    assert all(np.all(np.isfinite(s)) and not np.any(np.asarray(s)[~keep]) for s in slopes)
