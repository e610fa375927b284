"""Values, gradients and all second derivatives of the functions of probabilities, where digits and derivatives get lost.

Each term is tried on pairs of numbers over the whole range of the dtype: zeros, the smallest and largest numbers, squares
of which under- and overflow, equal and nearly equal ones. A row has three such pairs, so that none may reach the others.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from helpers import quick
from mpmath import mpf

import jaxce

INF = np.inf
ZERO = mpf(0)


def log(x: Any) -> Any:
    return mpmath.log(x) if x else -mpmath.inf


def over(x: Any, y: Any) -> Any:
    """x / y for x, y >= 0; 0 / 0 is 0."""
    return (x / y if y else mpmath.inf) if x else ZERO


Number = Any
Exact = tuple[list[Number], list[Number], list[Number]]
"""The value, two first and three second derivatives of a term: by the first argument, both, the second."""


def of_cross_entropy(p: Number, q: Number) -> Exact:
    if not p and not q:
        return [ZERO], [ZERO, ZERO], [ZERO, ZERO, ZERO]
    return [p * -log(q) if p else ZERO], [-log(q), -over(p, q)], [ZERO, -over(mpf(1), q), over(over(p, q), q)]


def of_relative_entropy(p: Number, q: Number) -> Exact:
    if not p and not q:
        return [ZERO], [ZERO, ZERO], [ZERO, ZERO, ZERO]
    value = (p * (log(p) - log(q)) if p else ZERO) - p + q
    return [value], [log(p) - log(q), 1 - over(p, q)], [over(mpf(1), p), -over(mpf(1), q), over(over(p, q), q)]


def of_jensen_shannon(p: Number, q: Number) -> Exact:
    if not p and not q:
        return [ZERO], [ZERO, ZERO], [ZERO, ZERO, ZERO]
    a, b = (log(2 * x / (p + q)) for x in (p, q))
    value = sum(x * y if x else ZERO for x, y in ((p, a), (q, b))) / 2
    return [value], [a / 2, b / 2], [over(q / (p + q), p) / 2, -1 / (p + q) / 2, over(p / (p + q), q) / 2]


def of_kl_divergence(log_q: Number, t: Number) -> Exact:
    if not t and log_q == -mpmath.inf:
        return [ZERO], [ZERO, ZERO], [ZERO, mpf(-1), ZERO]
    ratio = log(t) - log_q
    return [t * ratio if t else ZERO], [-t, ratio + 1], [ZERO, mpf(-1), over(mpf(1), t)]


def of_log_targets(log_q: Number, log_t: Number) -> Exact:
    if log_t == -mpmath.inf:
        return [ZERO], [ZERO, ZERO], [ZERO, ZERO, ZERO]
    t, ratio = mpmath.exp(log_t), log_t - log_q
    return [t * ratio], [-t, t * (ratio + 1)], [ZERO, -t, t * (ratio + 2)]


def of_generalized_kl(log_q: Number, t: Number) -> Exact:
    if not t and log_q == -mpmath.inf:
        return [ZERO], [ZERO, ZERO], [ZERO, mpf(-1), ZERO]
    q, ratio = mpmath.exp(log_q), log(t) - log_q
    return [(t * ratio if t else ZERO) - t + q], [q - t, ratio], [q, mpf(-1), over(mpf(1), t)]


class Term(NamedTuple):
    """A function of two arrays of classes, what a class adds, and the sizes of what its numbers are made of."""

    call: Callable[..., jax.Array]
    exact: Callable[[Number, Number], Exact]
    logs: tuple[bool, bool] = (False, False)
    sizes: Callable[[Number, Number], list[Number]] = lambda *args: [ZERO] * 6


def sizes_of_kl(log_q: Number, t: Number) -> list[Number]:
    logs = abs(log_q) + abs(log(t))
    return [t * logs if t else ZERO, ZERO, logs + 1, ZERO, ZERO, ZERO]


def sizes_of_log_targets(log_q: Number, log_t: Number) -> list[Number]:
    t = mpmath.exp(log_t)
    part = t * (abs(log_q) + abs(log_t) + 2) if t else ZERO
    return [part, ZERO, part, ZERO, ZERO, part]


def sizes_of_generalized_kl(log_q: Number, t: Number) -> list[Number]:
    # Nearly equal numbers have log t - log q to an ulp of what is smaller, 1 or their logarithms.
    q = mpmath.exp(log_q)
    near = bool(t) and abs(log(t) - log_q) < 1
    log_size = min(mpf(1), abs(log_q) + abs(log(t))) if near else abs(log_q) + (abs(log(t)) if t else ZERO)
    return [max(t, q) * log_size if near else (t * log_size if t else ZERO) + q, max(t, q), log_size, ZERO, ZERO, ZERO]


TERMS = {
    "cross_entropy": Term(jaxce.cross_entropy, of_cross_entropy),
    "relative_entropy": Term(jaxce.relative_entropy, of_relative_entropy),
    "jensen_shannon_divergence": Term(jaxce.jensen_shannon_divergence, of_jensen_shannon),
    "categorical_cross_entropy": Term(lambda p, q: jaxce.categorical_cross_entropy(q, p), of_cross_entropy),
    "kl_divergence": Term(jaxce.kl_divergence, of_kl_divergence, (True, False), sizes_of_kl),
    "kl_divergence_with_log_targets": Term(
        jaxce.kl_divergence_with_log_targets, of_log_targets, (True, True), sizes_of_log_targets
    ),
    "generalized_kl_divergence": Term(
        jaxce.generalized_kl_divergence, of_generalized_kl, (True, False), sizes_of_generalized_kl
    ),
}


def numbers(dtype: str, logs: bool) -> np.ndarray:
    info = np.finfo(dtype)
    tiny, most = float(info.tiny), float(info.max)
    if logs:
        low = float(np.log(tiny))
        values = [-INF, 8 * low, 1.2 * low, 1.1 * low, 0.99 * low, low / 2, low / 5, -1, -0.7, -0.1, -1e-3, -1e-5, 0]
        values += [1e-3, 0.7, 7, -low / 5, -low / 2]
    else:
        values = [0, 1.9 * tiny, 9 * tiny, tiny**0.8, tiny**0.52, tiny**0.49, tiny**0.3, 1e-6, 0.2, 0.3, 0.5, 1]
        values += [1e3, most**0.4, most * 0.6, most * 0.9]
    return np.array(values).astype(dtype)


def pairs(name: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """[rows, 3] of either argument: all pairs of numbers, and nearly equal ones in all distances."""
    logs = TERMS[name].logs
    first, second = (numbers(dtype, is_log) for is_log in logs)
    made = list(itertools.product(first.tolist(), second.tolist()))
    rng = np.random.default_rng(0)
    eps = float(np.finfo(dtype).eps)
    for a, distance in itertools.product(first[np.isfinite(first)].tolist(), (0, eps, 1e-6, 1e-4, 1e-2, 0.3, 1)):
        x = np.exp(a) if logs[0] else a
        y = x * (1 + distance * float(rng.choice([-0.5, 0.5, 1])))
        made.append((a, np.log(y) if logs[1] and y else y))
    # What counts as 0 on some devices only, of the numbers and of their differences, is left out.
    most, tiny = float(np.finfo(dtype).max), float(np.finfo(dtype).tiny)
    made = [(a, b) for a, b in made if b < most and not 0 < b < 1.5 * tiny]
    made = [(a, b) for a, b in made if any(logs) or not 0 < abs(float(np.dtype(dtype).type(b)) - a) < 1.5 * tiny]
    a, b = (np.array(column).astype(dtype) for column in zip(*made, strict=True))
    return tuple(np.stack([np.roll(x, 5 * k) for k in range(3)], 1) for x in (a, b))  # type: ignore[return-value]


@functools.cache
def derivatives(name: str, order: str) -> Callable[..., Any]:
    call = TERMS[name].call
    second = jax.jacfwd if order == "forward over reverse" else jax.jacrev

    def of_row(p: jax.Array, q: jax.Array) -> Any:
        by = jax.grad(call, (0, 1))
        return call(p, q), by(p, q), second(by, (0, 1))(p, q)

    return quick(jax.vmap(of_row))


def exact_rows(name: str, p: np.ndarray, q: np.ndarray) -> tuple[list[Exact], list[list[Number]]]:
    points = list(zip(p.ravel().tolist(), q.ravel().tolist(), strict=True))
    with mpmath.workdps(80):
        return [TERMS[name].exact(mpf(a), mpf(b)) for a, b in points], [
            TERMS[name].sizes(mpf(a), mpf(b)) for a, b in points
        ]


def errors(got: np.ndarray, right: list[Number], size: list[Number]) -> np.ndarray:
    """In ulp of the size or of the right number, whichever is larger; what is smaller than any number may be 0.

    Numbers beyond the largest are infinite: those within some ulp of it either way.
    """
    info = np.finfo(got.dtype)
    most, tiny = float(info.max), 4 * float(info.tiny)
    result = []
    for g, r, s in zip(got.tolist(), right, size, strict=True):
        scale = max(abs(r), abs(s))
        if abs(r) > most * (1 - 1e-6) and (mpmath.isinf(r) or abs(r) >= scale):
            result.append(0.0 if g == (INF if r > 0 else -INF) or abs(r) < most * (1 + 1e-6) else INF)
        elif scale > most:
            result.append(0.0)  # a part that can't be written
        else:
            result.append(
                float(max(abs(mpf(g) - r) - tiny, 0) / max(scale, tiny) / float(info.eps)) if np.isfinite(g) else INF
            )
    return np.array(result)


SHOWN = 5
ORDERS = "forward over reverse", "reverse over reverse"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TERMS)
def test_exact(name: str, dtype: str, order: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        p, q = pairs(name, dtype)
        exact, sizes = exact_rows(name, p, q)
        value, first, second = jax.tree.map(np.array, derivatives(name, order)(p, q))
    rows = range(len(p))
    with mpmath.workdps(80):
        values = [mpmath.fsum(exact[3 * i + k][0][0] for k in range(3)) for i in rows]
        parts = [mpmath.fsum(max(abs(exact[3 * i + k][0][0]), sizes[3 * i + k][0]) for k in range(3)) for i in rows]
    columns = [[e[order][i] for e in exact] for order, i in ((1, 0), (1, 1), (2, 0), (2, 1), (2, 1), (2, 2))]
    scales = [[s[i] for s in sizes] for i in (1, 2, 3, 4, 4, 5)]
    blocks = [second[i][j] for i, j in itertools.product((0, 1), repeat=2)]
    diagonals = [np.stack([block[:, k, k] for k in range(3)], 1) for block in blocks]
    # An infinite slope has no second derivative that tells anything; but those of the other classes it leaves alone.
    flat = [np.isfinite(slope).ravel() for slope in first]
    # 16 ulp of terms that are not negative, as the docstrings say; of logarithms 4 and those of an atanh of a quotient of
    # rounded sums; 8 of three quotients.
    found = [("value", value, values, parts, 16, True)]
    names = "first", "second", "first twice", "first, then second", "second, then first", "second twice"
    for i, (name, got, right, size) in enumerate(zip(names, [*first, *diagonals], columns, scales, strict=True)):
        known = True if i < 2 else flat[(i - 2) // 2] & flat[(i - 2) % 2]
        found.append((name, got, right, size, 6 if i < 2 else 8, known))
    lines = []
    for name, got, right, size, limit, known in found:
        error = np.where(known, errors(got.ravel(), right, size), 0) / limit
        for i in np.argsort(-error)[:SHOWN]:
            if error[i] > 1:
                where = (p[i], q[i]) if name == "value" else (p.ravel()[i], q.ravel()[i])
                lines.append(
                    f"{name} at {where}: {got.ravel()[i]}, right {float(right[i])}, {error[i]:.3g} of the limit"
                )
    assert not lines, "\n".join(lines)
    for block in blocks:
        block[:, range(3), range(3)] = 0
        np.testing.assert_array_equal(block, 0)


# --- other functions --------------------------------------------------------------------------------------------------


def assert_exact(got: Any, right: list[Number], limit: float, size: list[Number] | None = None) -> None:
    error = errors(np.asarray(got).ravel(), right, size or [ZERO] * len(right)) / limit
    i = int(error.argmax())
    assert error[i] <= 1, f"{np.asarray(got).ravel()[i]}, right {float(right[i])}, {error[i]:.3g} of the limit ({i})"


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_surprisal_and_entropy(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        p = numbers(dtype, False)[1:]

        def of_number(p: jax.Array) -> Any:
            return [jax.jacfwd(jax.grad(f))(p) for f in (jaxce.surprisal, lambda p: jaxce.entropy(p[None]))]

        by_surprisal, by_entropy = quick(jax.vmap(of_number))(p)
        with mpmath.workdps(80):
            assert_exact(by_surprisal, [1 / mpf(x) ** 2 for x in p.tolist()], 8)
            assert_exact(by_entropy, [-1 / mpf(x) for x in p.tolist()], 8)
        # A class of probability 0 leaves those of the others alone, whatever else is.
        along = jax.jvp(jax.grad(jaxce.entropy), (jnp.array([0.5, 0.5, 0]),), (jnp.array([1.0, -1, 0]),))[1]
        np.testing.assert_array_equal(along, [-2, 2, 0])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_binary_cross_entropy(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        q = numbers(dtype, False)
        q, t = (x.ravel() for x in np.meshgrid(np.append(q[q <= 1], 1 - np.finfo(dtype).epsneg), q[q <= 1]))
        first, second = quick(
            jax.vmap(lambda *x: [d(jaxce.binary_cross_entropy, (0, 1))(*x) for d in (jax.grad, jax.hessian)])
        )(q, t)
        with mpmath.workdps(80):
            points = [(mpf(a), mpf(b)) for a, b in zip(q.tolist(), t.tolist(), strict=True)]
            yes, no = ([over(b, a) for a, b in points], [over(1 - b, 1 - a) for a, b in points])
            size = [max(a, b) for a, b in zip(yes, no, strict=True)]
            finite = np.isfinite(np.asarray(first[0])) & np.isfinite(np.asarray(first[1]))
            assert finite.sum() > 80

            def check(got: Any, right: list[Number], limit: float, size: list[Number] | None = None) -> None:
                assert_exact(
                    np.where(finite, got, 0),
                    [r if f else ZERO for r, f in zip(right, finite, strict=True)],
                    limit,
                    size,
                )

            check(first[0], [n - y for y, n in zip(yes, no, strict=True)], 4, size)
            check(second[0][0], [over(y, a) + over(n, 1 - a) for (a, _), y, n in zip(points, yes, no, strict=True)], 8)
            mixed = [-over(mpf(bool(a or b)), a) - over(mpf(a < 1 or b < 1), 1 - a) for a, b in points]
            check(second[0][1], mixed, 8)
            check(second[1][0], mixed, 8)
            check(second[1][1], [ZERO] * len(points), 1)
    assert jax.hessian(jaxce.binary_cross_entropy)(1e-20, 0) == 1


DIVERGENCES: dict[str, tuple[Callable[..., jax.Array], float]] = {
    "relative_entropy": (lambda x, y: jaxce.relative_entropy(jax.nn.softmax(x), jax.nn.softmax(y)), 1),
    "relative_entropy of q": (lambda x, y: jaxce.relative_entropy(jax.nn.softmax(y), jax.nn.softmax(x)), 1),
    "jensen_shannon_divergence": (
        lambda x, y: jaxce.jensen_shannon_divergence(jax.nn.softmax(x), jax.nn.softmax(y)),
        0.25,
    ),
    "kl_divergence": (lambda x, y: jaxce.kl_divergence(jax.nn.log_softmax(x), jax.nn.softmax(y)), 1),
    "kl_divergence_with_log_targets": (
        lambda x, y: jaxce.kl_divergence_with_log_targets(jax.nn.log_softmax(x), jax.nn.log_softmax(y)),
        1,
    ),
    "generalized_kl_divergence": (
        lambda x, y: jaxce.generalized_kl_divergence(jax.nn.log_softmax(x), jax.nn.softmax(y)),
        1,
    ),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_second_derivative_of_equal_distributions_is_the_fisher_matrix(name: str) -> None:
    """In all four blocks, and of distributions that are equal, nearly equal, or have lost a class in both."""
    divergence, factor = DIVERGENCES[name]
    x = np.float32([[0, 0, 0], [1, -2, 0.5], [0, 3, -9], [0, 1, -200]])
    y = np.concatenate([x, x + np.float32(1e-6) * np.arange(3)]).astype("float32")
    x = np.concatenate([x, x])
    if name.startswith("generalized") or name == "kl_divergence":  # logarithms of the class that is lost aren't -inf
        x, y = (np.delete(z, (3, 7), 0) for z in (x, y))
    blocks = quick(jax.vmap(jax.hessian(divergence, (0, 1))))(x, y)
    p = np.asarray(jax.nn.softmax(x.astype("float64")))
    fisher = factor * (p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :])
    for i, j in itertools.product((0, 1), repeat=2):
        # Sums and differences of numbers below 1, twice through a softmax; and distributions that are 2e-6 apart.
        np.testing.assert_allclose(blocks[i][j], fisher if i == j else -fisher, atol=4e-6, err_msg=f"{i}, {j}")


def test_classes_that_are_not_there() -> None:
    """Have no derivative of any order, in any direction: not of their own, and not of a softmax that they come from."""

    @quick
    def products(p: jax.Array, q: jax.Array, v: jax.Array) -> Any:
        of_both = jaxce.cross_entropy, jaxce.relative_entropy, jaxce.jensen_shannon_divergence
        second = [lambda p, q, f=f, i=i: jax.jvp(jax.grad(f, i), (p, q), (v, v))[1] for f in of_both for i in (0, 1)]
        return [(f(p, q), jax.jvp(f, (p, q), (v, v))[1]) for f in second]

    p, q, v = jnp.array([0.5, 0.5, 0]), jnp.array([0.25, 0.75, 0]), jnp.array([1.0, 2, -3])
    of_three, of_two = products(p, q, v), products(p[:2], q[:2], v[:2])
    for got, right in zip(jax.tree.leaves(of_three), jax.tree.leaves(of_two), strict=True):
        np.testing.assert_allclose(got, [*right, 0], rtol=1e-6)  # some roundings
    x = jnp.array([0.0, 0, -200])
    of_a_softmax = quick(jax.hessian(lambda x, q: jaxce.jensen_shannon_divergence(jax.nn.softmax(x), q)))
    hessian = of_a_softmax(x, jnp.array([0.5, 0.5, 0]))
    np.testing.assert_allclose(hessian, [[0.0625, -0.0625, 0], [-0.0625, 0.0625, 0], [0, 0, 0]], atol=1e-7)


# --- rows that don't count --------------------------------------------------------------------------------------------


GOOD = np.float32([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]), np.float32([[0.3, 0.3, 0.4], [0.1, 0.2, 0.7]])
ABSENT = (
    np.float32([[0, 1, 0], [0, 0, 0], [0.5, 0, 0.5], [1, 0, 0]]),
    np.float32([[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0, 0]]),
)


class Loss(NamedTuple):
    """Losses of rows, and their arguments: of rows that count, and of rows that don't, most of which cost +inf."""

    call: Callable[..., jax.Array]
    good: tuple[np.ndarray, ...]
    bad: tuple[np.ndarray, ...]


def logs(arrays: tuple[np.ndarray, ...], *which: int) -> tuple[np.ndarray, ...]:
    with np.errstate(divide="ignore"):
        return tuple(np.log(a) if i in which else a for i, a in enumerate(arrays))


def yes_and_no(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A row's sum of the losses of its questions."""
    return lambda *args, where=None, **options: loss(
        *args, where=None if where is None else where[:, None], **options
    ).sum(-1)


SIGMOID = np.float32([[2, -1, 0.5], [-3, 0, 1]]), np.float32([[1, 0, 0.3], [0, 1, 0.5]])
FAR = (
    np.float32([[INF, -INF, 1e30], [INF, 200, -200], [-INF, -1e30, 90], [INF, -INF, 0]]),
    np.float32([[0, 1, 0], [0.5, 0, 1], [0.5, 1, 0], [1, 0, 0]]),
)
OPTIONS = np.float32([[0.25], [0.5]]), np.float32([[2], [0.5]])
MORE = np.float32([[0.25], [0], [1], [0.5]]), np.float32([[2], [0.5], [0.3], [1]])


LOSSES = {
    "entropy": Loss(jaxce.entropy, GOOD[:1], ABSENT[:1]),
    "cross_entropy": Loss(jaxce.cross_entropy, GOOD, ABSENT),
    "relative_entropy": Loss(jaxce.relative_entropy, GOOD, ABSENT),
    "jensen_shannon_divergence": Loss(jaxce.jensen_shannon_divergence, GOOD, ABSENT),
    "categorical_cross_entropy": Loss(jaxce.categorical_cross_entropy, GOOD, ABSENT),
    "kl_divergence": Loss(jaxce.kl_divergence, logs(GOOD, 0), logs(ABSENT, 0)),
    "kl_divergence_with_log_targets": Loss(jaxce.kl_divergence_with_log_targets, logs(GOOD, 0, 1), logs(ABSENT, 0, 1)),
    "generalized_kl_divergence": Loss(jaxce.generalized_kl_divergence, logs(GOOD, 0), logs(ABSENT, 0)),
    "binary_cross_entropy": Loss(yes_and_no(jaxce.binary_cross_entropy), GOOD, ABSENT),
    "sigmoid_binary_cross_entropy": Loss(yes_and_no(jaxce.sigmoid_binary_cross_entropy), SIGMOID, FAR),
    "sigmoid_binary_cross_entropy, weighted": Loss(
        lambda x, t, w, where=None: yes_and_no(jaxce.sigmoid_binary_cross_entropy)(x, t, where=where, pos_weight=w),
        (*SIGMOID, OPTIONS[1]),
        (*FAR, MORE[0]),
    ),
    "sigmoid_focal_loss": Loss(
        lambda x, t, a, g, where=None: yes_and_no(jaxce.sigmoid_focal_loss)(x, t, alpha=a, gamma=g, where=where),
        (*SIGMOID, *OPTIONS),
        (*FAR, *MORE),
    ),
}


@pytest.mark.parametrize("by", ["where", "mean", pytest.param("both", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_do_not_count_leave_no_trace(name: str, by: str) -> None:
    """In no derivative, by anything: not if their loss is +inf, and `where` may even leave out NaN."""
    call, good, bad = LOSSES[name]
    counts = np.array([True, False, False, True, False, False])
    every = tuple(np.zeros((6, *a.shape[1:]), "float32") for a in good)
    for a, few, others in zip(every, good, bad, strict=True):
        a[counts], a[~counts] = few, others
        if by == "where":
            a[2] = np.nan
    rng = np.random.default_rng(0)
    along = tuple(rng.normal(size=a.shape).astype("float32") for a in every)

    @quick
    def derivatives(args: Any, v: Any, where: Any) -> Any:
        def mean(*args: Any) -> Any:
            return jaxce.weighted_mean(call(*args) if by == "mean" else call(*args, where=where), where)

        first = jax.grad(mean, tuple(range(len(args))))
        back = jax.grad(
            lambda *args: sum(jnp.vdot(a, b) for a, b in zip(first(*args), v, strict=True)), tuple(range(len(args)))
        )
        return *jax.jvp(first, args, v), back(*args), jax.jvp(mean, args, v)[1]

    got = derivatives(every, along, counts)
    # In the same program, the rows that count, each three times: a third of every derivative by one of them.
    good, along = (tuple(np.tile(a, (3, 1)) for a in arrays) for arrays in (good, [v[counts] for v in along]))
    right = derivatives(good, along, np.ones(6, bool))
    for parts, expected in zip(got[:3], right[:3], strict=True):
        for a, b in zip(parts, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[~counts], 0)
            np.testing.assert_allclose(np.asarray(a)[counts], 3 * b[:2], rtol=1e-5, atol=1e-6)  # sums of products
    if by != "mean":
        np.testing.assert_allclose(got[3], right[3], rtol=1e-5, atol=1e-6)
