"""Divergences of softmax distributions: of nearly equal ones, of logits that lie apart, and of classes that one has alone.

On arrays, on `LinearLogits` and on `ShardedLogits` alike, in value and gradient.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from helpers import assert_same, gradient_and_hessian, quick
from mpmath import mpf

import jaxce

FUNCTIONS = {
    "cross-entropy": jaxce.cross_entropy_with_logits,
    "relative entropy": jaxce.relative_entropy_with_logits,
    "Jensen-Shannon": jaxce.jensen_shannon_divergence_with_logits,
}
WEIGHTS = {"Jensen-Shannon": 0.5}
for weight in (2**-3, 1 - 2**-3, 2**-15):
    WEIGHTS[f"Jensen-Shannon, {weight:.3g}"] = weight
    FUNCTIONS[f"Jensen-Shannon, {weight:.3g}"] = functools.partial(
        jaxce.jensen_shannon_divergence_with_logits, weight=weight
    )
every_function = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if WEIGHTS.get(n, 2**-3) == 2**-3 else pytest.mark.slow) for n in FUNCTIONS],
)
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

    return quick(jax.value_and_grad(total, (0, 1), has_aux=True))


class Exact:
    """Two rows of logits as the binary numbers they are, in 60 digits; a class at -inf is not there."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.p, self.q = (self.softmax(v) for v in (x, y))
        self.pairs = list(zip(self.p, self.q, strict=True))

    @staticmethod
    def softmax(x: np.ndarray) -> list[Any]:
        weights = [mpmath.exp(mpf(v)) if v > -INF else mpf(0) for v in x.tolist()]
        return [w / mpmath.fsum(weights) for w in weights]

    def value(self, name: str) -> Any:
        if name in WEIGHTS:
            return mpmath.fsum(
                pair[i] * w * log
                for i, w in self.weights(name)
                for pair, log in zip(self.pairs, self.logs(name, i), strict=True)
            )
        if any(a and not b for a, b in self.pairs):
            return mpmath.inf
        return sum(
            a * (mpmath.log(a / b) if name == "relative entropy" else -mpmath.log(b)) for a, b in self.pairs if a
        )

    def weights(self, name: str) -> list[tuple[int, Any]]:
        return [(0, mpf(WEIGHTS[name])), (1, 1 - mpf(WEIGHTS[name]))]

    def logs(self, name: str, i: int) -> list[Any]:
        """log(p/m), or log(q/m) if i is 1."""
        mean = [mpmath.fsum(w * pair[j] for j, w in self.weights(name)) for pair in self.pairs]
        return [mpmath.log(pair[i] / m) if pair[i] else mpf(0) for pair, m in zip(self.pairs, mean, strict=True)]

    def gradients(self, name: str) -> list[list[Any]]:
        if name in WEIGHTS:
            result = []
            for i, w in self.weights(name):
                logs = [w * log for log in self.logs(name, i)]
                mean = sum(pair[i] * log for pair, log in zip(self.pairs, logs, strict=True))
                result.append([pair[i] * (log - mean) for pair, log in zip(self.pairs, logs, strict=True)])
            return result
        costs = [
            (mpmath.log(a / b) if name == "relative entropy" else -mpmath.log(b)) if a else mpf(0)
            for a, b in self.pairs
        ]
        value = self.value(name)
        return [[a * (c - value) for (a, _), c in zip(self.pairs, costs, strict=True)], [b - a for a, b in self.pairs]]


@functools.cache
def nearly_equal_rows(name: str) -> list[tuple[Any, ...]]:
    """Offset, difference, the two rows, and the exact value and gradients."""
    rng, found = np.random.default_rng(0), []
    for offset, difference in itertools.product((0.0, 100.0, 1e4), (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)):
        x = (offset + 2 * rng.normal(size=(1, 7))).astype(np.float32)
        y = (x + np.float32(difference) * rng.normal(size=(1, 7))).astype(np.float32)
        with mpmath.workdps(60):
            exact = Exact(x[0], y[0])
            found.append((offset, difference, x, y, float(exact.value(name)), np.float64(exact.gradients(name))))
    return found


@every_function
@pytest.mark.parametrize(
    "kind", ["array", "linear", pytest.param("array and linear", marks=pytest.mark.slow), "sharded"]
)
def test_nearly_equal_rows(name: str, kind: str) -> None:
    """Rows that differ by 1e-1 ... 1e-6, with offsets, in one batch of parameters: the contract's 32 ulp or 1e-4."""
    for offset, difference, x, y, value, gradients in nearly_equal_rows(name):
        (_, got), slopes = both(name, kind)(x, y)
        assert got[0] >= 0
        if value == 0:
            assert got[0] == 0
            continue
        # 32 ulp; and 1e-4 of what is as small as the square of a difference of 1e-6.
        limit = (32 * 2.0**-23 if difference >= 1e-3 else 1e-4) * value
        assert abs(float(got[0]) - value) <= limit, (offset, difference)
        for slope, right in zip(slopes, gradients, strict=True):
            # In units of the largest entry; an entry is a difference of numbers of the size of p times the difference.
            limit = 1e-4 * np.abs(right).max() + (4 * 2.0**-24 if name == "cross-entropy" else 1e-13)
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
            assert abs(float(got[0]) - value) <= 32 * 2.0**-23 * value, (offset, float(got[0]), value)
            for slope, right in zip(slopes, gradients, strict=True):
                # 4 ulp of the largest numbers of which an entry is a difference, and as much for their own errors.
                np.testing.assert_allclose(
                    slope[0],
                    [float(r) for r in right],
                    rtol=1e-6,
                    atol=8 * 2.0**-23 * max(1, value),
                    err_msg=f"{offset}",
                )


@every_function
@pytest.mark.parametrize("kind", ["array", "linear", "sharded"])
def test_gaps_up_to_the_largest_number(name: str, kind: str) -> None:
    """Classes that q masks with a large negative logit, up to the lowest there is, count as much as it says."""
    for low in (-1e30, -1e37, -1e38, -2e38, np.finfo(np.float32).min):
        x, y = (np.array([v], np.float32) for v in ([0.5, 0, -3, -1, low], [1, low, low, 0.25, 0]))
        with mpmath.workdps(120):
            exact = Exact(*(v[0].astype(np.float64) - v.max() for v in (x, y)))
            value, gradients = float(exact.value(name)), exact.gradients(name)
        (_, got), slopes = both(name, kind)(x, y)
        np.testing.assert_allclose(got[0], value, rtol=32 * 2.0**-23, err_msg=f"{low}")
        for slope, right in zip(slopes, gradients, strict=True):
            right = np.array([float(r) for r in right])
            # An entry is a difference of numbers of at most the value.
            np.testing.assert_allclose(slope[0], right, rtol=1e-5, atol=1e-6 * max(1, value), err_msg=f"{low}")


def masks() -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Which of 7 classes are there in p and in q: each class in one of the four ways, at random, and all of one kind."""
    rng = np.random.default_rng(1)
    there = np.ones(7, bool)
    some = there.copy()
    some[[1, 4]] = False
    cases = [("p", some, there), ("q", there, some), ("both", some, some), ("nothing in common", some, ~some)]
    cases += [(f"random {i}", rng.uniform(size=7) < 0.6, rng.uniform(size=7) < 0.6) for i in range(8)]
    return cases + [("nothing of p", ~there, some), ("nothing of q", some, ~there)]


@every_function
@pytest.mark.parametrize("kind", ["array", "linear", "sharded"])
def test_classes_that_are_there_in_one_alone(name: str, kind: str) -> None:
    rng = np.random.default_rng(2)
    for title, in_p, in_q in masks():
        x, y = (np.where(m, 3 * rng.normal(size=(1, 7)), -INF).astype(np.float32) for m in (in_p, in_q))
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
    anything, absent = ([jnp.where(keep, v, other) for v in (x, y)] for other in (jnp.nan, -jnp.inf))
    assert_same(FUNCTIONS[name](*anything, where=keep), FUNCTIONS[name](*absent))
    slopes = quick(jax.grad(lambda x, y: FUNCTIONS[name](x, y, where=keep).sum(), (0, 1)))(*anything)
    assert all(np.all(np.isfinite(s)) and not np.any(np.asarray(s)[~keep]) for s in slopes)


@pytest.mark.parametrize("shape", [(6,), pytest.param((1, 6), marks=pytest.mark.slow), (1, 1)])
@pytest.mark.parametrize("weighted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_q_for_all_rows(shape: tuple[int, ...], weighted: bool) -> None:
    """q broadcasts to p, in the functions of logits and in those of probabilities; p doesn't to q."""
    rng = np.random.default_rng(5)
    p, q = (jnp.asarray(rng.normal(size=s), "float32") for s in ((4, 6), shape))
    cases = [(f, p, q) for name, f in FUNCTIONS.items() if (WEIGHTS.get(name, 0.5) != 0.5) == weighted]
    if not weighted:
        of_probabilities = jaxce.cross_entropy, jaxce.relative_entropy, jaxce.jensen_shannon_divergence
        cases += [(f, jax.nn.softmax(p), jnp.exp(q)) for f in of_probabilities]

    @quick
    def values_and_slopes() -> Any:
        found = []
        for f, p, q in cases:
            total = jax.value_and_grad(lambda q, f=f, p=p: f(p, q).sum())
            found.append((total(q), total(jnp.broadcast_to(q, p.shape))))
        return found

    for (function, p, q), ((got, slope), (whole, slopes)) in zip(cases, values_and_slopes(), strict=True):
        assert slope.shape == shape
        np.testing.assert_allclose(got, whole, rtol=1e-6)  # another program
        np.testing.assert_allclose(np.sum(slope), np.sum(slopes), rtol=1e-5, atol=1e-6)  # a few eps of its terms
        name = getattr(function, "func", function).__name__
        with pytest.raises(ValueError, match=rf"^{name}: q(_logits)? must have the shape of p"):
            function(q, p) if q.ndim < 2 or q.shape[-1] > 1 else function(p[:, :2], p)


# --- at random --------------------------------------------------------------------------------------------------------

Wide = np.longdouble  # 64 bits: the oracle for many rows at once


@functools.cache
def random_pairs(classes: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows: spreads of 0.1 to 30, noise of 1e-4 to 60 on all or few classes, offsets, either cut to its top k."""
    rng = np.random.default_rng(classes)
    rows = []
    for i in range(count):
        x = 10 ** rng.uniform(-1, 1.5) * rng.normal(size=classes) + rng.choice([0, 0, 1e2, 1e4])
        some = rng.uniform(size=classes) < rng.choice([0.2, 1])
        y = x + 10 ** rng.uniform(-4, 1.78) * rng.normal(size=classes) * some
        pair = [x.astype(np.float32), y.astype(np.float32)]
        if cut := i % 4:
            source = pair[cut - 1 if cut < 3 else 1]
            top = np.argsort(np.argsort(-source)) < rng.integers(1, classes + 1)
            pair[0 if cut == 2 else 1] = np.where(top, source, np.float32(-INF))
        rows.append(pair)
    x, y = zip(*rows, strict=True)
    return np.stack(x), np.stack(y)


def exact_by_log(name: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """The values, the derivatives f_k / p_k by the log-probabilities of either, and the probabilities."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        d = x.astype(Wide) - x.max(-1, keepdims=True)
        return d - np.log(np.exp(d).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(x), log_softmax(y)
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(all="ignore"):
        delta = log_p - log_q
        if name in WEIGHTS:
            w = WEIGHTS[name]
            by_p = np.where(p > 0, -w * np.log1p((1 - w) * np.expm1(-delta)), 0)
            by_q = np.where(q > 0, (w - 1) * np.log1p(w * np.expm1(delta)), 0)
            # Terms that are at least 0: with log(p/m) = a a sum of w p (e^-a + a - 1), and so for q.
            gaps = [
                v * (np.expm1(-np.where(v > 0, f / v, 0)) + np.where(v > 0, f / v, 0))
                for v, f in ((w, by_p), (1 - w, by_q))
            ]
            value = np.where(p > 0, p * gaps[0], w * (1 - w) * q) + np.where(q > 0, q * gaps[1], w * (1 - w) * p)
            return value.sum(-1), [by_p, by_q], [p, q]
        by_p = np.where(p > 0, delta if name == "relative entropy" else -log_q, 0)
        return np.where(p > 0, p * by_p, 0).sum(-1), [by_p, np.where(q > 0, -p / q, 0)], [p, q]


@every_function
@pytest.mark.parametrize("classes", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 10, 100)), 1000])
def test_random_pairs(name: str, classes: int) -> None:
    x, y = random_pairs(classes, 4000 if classes <= 10 else 400)
    value, by_log, probabilities = exact_by_log(name, x, y)
    log_sums = -sum(np.log(p.max(-1)) for p in probabilities)
    (_, got), slopes = both(name, "array")(x, y)
    np.testing.assert_array_equal(np.isinf(got), np.isinf(value))
    counts = np.isfinite(value)
    small = value[counts].astype(np.float64)
    # 32 ulp, or 1e-4 of results down to 1e-12
    assert np.all(np.abs(np.asarray(got, np.float64)[counts] - small) <= np.maximum(1e-4 * small, 1e-16))
    for slope, f, p in zip(slopes, by_log, probabilities, strict=True):
        slope, f, p = np.asarray(slope, np.float64)[counts], f[counts], p[counts]
        total = np.where(p > 0, p * f, 0).sum(-1, keepdims=True)
        right = np.where(p > 0, p * (f - total), 0)
        rows, top = np.arange(len(p)), p.argmax(-1)
        # What an entry is made of: p times f and F, and the log-sums and gaps of which log p - log q is a difference.
        gaps = -np.log(np.maximum(p / p.max(-1, keepdims=True), 1e-300))
        size = p * (np.abs(f) + np.abs(total) + log_sums[counts][:, None] + gaps / 16)
        others = right.copy()
        others[rows, top] = size[rows, top] = 0
        right[rows, top] = -others.sum(-1)
        size[rows, top] = size.sum(-1)  # the entry of the top class is the sum of the others
        # 16 ulp of those numbers, 8 and half an ulp per nat of either probability, and what XLA:CPU flushes to 0.
        nats = -np.log(np.maximum(np.abs(right), 1e-45))
        limit = 2.0**-23 * (16 * size + (8 + nats) * np.abs(right)) + 1e-35
        worst = np.unravel_index(np.argmax(np.abs(slope - right) / limit), p.shape)
        assert abs(slope - right)[worst] <= limit[worst], (worst, slope[worst[0]], right[worst[0]], p[worst[0]])


# --- second derivatives -----------------------------------------------------------------------------------------------


def second_rows() -> dict[str, tuple[list[float], list[float]]]:
    """Rows that agree in all, some or one of their classes, and rows with gaps, in either or in both."""
    rows = {
        "agree": ([1.0, 0, -1, 0.5], [1.0, 0, -1, 0.5]),
        "agree but for an offset": ([1.0, 0, -1, 0.5], [3.0, 2, 1, 2.5]),
        "agree in two": ([1.0, 0.25, -1, 0.5], [0.25, 1, -1, 0.5]),
        "agree in one": ([0.0, 1, 2, 0], [0.0, 2, 1, -30]),
        "uniform": ([0.0, 0, 0, 0], [0.0, 0, 0, 0]),
        "one absent in both": ([1.0, 0, -INF, 0.5], [0.5, 1, -INF, 0]),
        "agree, one absent": ([1.0, 0, -INF, 0.5], [1.0, 0, -INF, 0.5]),
        "absent in p": ([1.0, 0, -INF, 0.5], [0.5, 1, 2, 0]),
    }
    for gap in (5.0, 10.0, 20.0, 30.0, 60.0):
        rows[f"p by {gap:g}"] = ([gap, 0, 1, -3], [1.0, 2, 0, 0])
        rows[f"q by {gap:g}"] = ([1.0, 2, 0, 0], [gap, 0, 1, -3])
        rows[f"both by {gap:g}"] = ([gap, 0, 1, -3], [gap, 1, 0.5, -3])
        rows[f"both by {gap:g}, not of one class"] = ([gap, 0, 1, -3], [1.0, 2, gap, 0])
    return rows


def exact_hessian(name: str, x: list[float], y: list[float]) -> np.ndarray:
    """By differences of the gradient in 100 digits; 0 by what is absent."""
    z, h = np.array([mpf(v) for v in x + y]), mpf(10) ** -25

    def gradient(z: np.ndarray) -> np.ndarray:
        return np.concatenate(Exact(*np.split(z, 2)).gradients(name))

    steps = h * np.eye(len(z), dtype=int)
    return np.array([(gradient(z + step) - gradient(z - step)) / (2 * h) for step in steps]).astype(float)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        pytest.param(n, m, marks=() if m is as_array and WEIGHTS.get(n, 0.5) == 0.5 else pytest.mark.slow)
        for n in FUNCTIONS
        for m in (as_array, as_linear)
    ],
)
def test_second_derivatives(name: str, make: Callable[..., Any]) -> None:
    """All four blocks: the Fisher matrix where two rows agree, and the top class as exact as the others."""
    rows = second_rows()
    z = np.array([x + y for x, y in rows.values()], np.float32)

    def total(z: jax.Array) -> jax.Array:
        return FUNCTIONS[name](make(z[None, :4]), make(z[None, 4:]))[0]

    columns = quick(lambda direction: jax.vmap(lambda z: jax.jvp(jax.grad(total), (z,), (direction,))[1])(z))
    got = np.stack([columns(direction) for direction in np.eye(8, dtype=np.float32)], -1)
    for i, (title, (x, y)) in enumerate(rows.items()):
        with mpmath.workdps(100):
            exact, of_row = exact_hessian(name, x, y), Exact(np.array(x), np.array(y))
            p = np.array([float(v) for v in of_row.p + of_row.q])
            less = [
                float(mpmath.fsum(w for j, w in enumerate(side) if j != k))
                for side in (of_row.p, of_row.q)
                for k in range(4)
            ]
        size = np.minimum(p, less)  # of a probability or of all others: what entries of a row are multiples of
        far = 1 + max(abs(a - b) for a, b in zip(x, y, strict=True) if max(a, b) > -INF and min(a, b) > -INF)
        # An entry of two classes is a multiple of both; but of one by p and the other by q only after a difference of q's.
        most = np.tile(np.maximum(p[:4], p[4:]), 2)
        scale = p[:, None] * p
        scale[:4, 4:] = size[:4, None] * most[4:]
        scale[4:, :4] = size[4:, None] * most[:4]
        same = np.arange(8) % 4
        scale = np.where(same[:, None] == same, np.maximum(size[:, None], size), np.maximum(scale, scale.T))
        for j, side in enumerate((p[:4], p[4:])):  # an entry of the top class is minus the sum of the others'
            k = int(side.argmax()) + 4 * j
            column = np.delete(np.abs(exact), k, 0)[4 * j : 4 * j + 3].sum(0)
            scale[k], scale[:, k] = np.maximum(scale[k], column), np.maximum(scale[:, k], column)
        # 16 ulp of the numbers that an entry is made of, and half an ulp for each nat of two of them.
        limit = 2.0**-23 * (16 + 2 * far) * (far * scale + np.abs(exact)) + 1e-35
        error = np.abs(got[i] - exact)
        assert np.all(error <= limit), f"{title}:\n{got[i]}\n{exact}\n{np.round(error / limit, 1)}"


def generalised(student: jax.Array, teacher: jax.Array, beta: Any) -> jax.Array:
    """The loss of TRL's GKD trainer and of Liger's JSD, of each row, but at the ends."""
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    log_m = jnp.logaddexp(jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q)
    of_p, of_q = (jnp.sum(jnp.exp(v) * (v - log_m), -1) for v in (log_p, log_q))
    return beta * of_p + (1 - beta) * of_q


def generalised_at_an_end(student: jax.Array, teacher: jax.Array, beta: int) -> jax.Array:
    """What these two take for a ``beta`` of 0 or 1."""
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    a, b = (log_p, log_q) if beta == 0 else (log_q, log_p)
    return jnp.sum(jnp.exp(a) * (a - b), -1)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.7, 1])
def test_generalised_knowledge_distillation(beta: float) -> None:
    rng = np.random.default_rng(0)
    function = jaxce.jensen_shannon_divergence_with_logits
    with jax.enable_x64(True):
        student, teacher = jnp.asarray(rng.normal(0, 3, (2, 5, 11)))
        if beta not in (0, 1):
            right = generalised(student, teacher, beta)
            np.testing.assert_allclose(function(teacher, student, weight=beta), right, rtol=1e-12)
            return
        np.testing.assert_array_equal(function(teacher, student, weight=beta), 0)
        pair, w = ((teacher, student), 1e-6) if beta == 0 else ((student, teacher), 1 - 1e-6)
        limit = jaxce.relative_entropy_with_logits(*pair)
        np.testing.assert_allclose(limit, generalised_at_an_end(student, teacher, int(beta)), rtol=1e-12)
        near = function(teacher, student, weight=w) / (w * (1 - w))
        np.testing.assert_allclose(near, limit, rtol=1e-3)  # which w is that near to


def rows_and_weight() -> tuple[np.ndarray, ...]:
    x, y = np.random.default_rng(1).normal(0, 2, (2, 1, 5))
    y[0, :2] = x[0, :2]
    return x, y, np.array(0.3)


@functools.cache
def plain_derivatives_by_the_weight() -> Any:
    return gradient_and_hessian(lambda x, y, w: generalised(y, x, w)[0], *rows_and_weight())


@pytest.mark.parametrize(
    "kind", ["array", "linear", pytest.param("array and linear", marks=pytest.mark.slow), "sharded"]
)
def test_derivatives_by_the_weight(kind: str) -> None:
    """Gradient and Hessian of one row by both logits and the weight, together, beside the plain formula's."""

    def loss(x: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
        function = functools.partial(jaxce.jensen_shannon_divergence_with_logits, weight=w)
        return kinds(function)[kind](x, y)[0]

    with jax.enable_x64(True):
        got = gradient_and_hessian(loss, *rows_and_weight())
        # the plain formula's own errors
        chex.assert_trees_all_close(got, plain_derivatives_by_the_weight(), rtol=1e-10, atol=1e-12)
