"""Second derivatives: exactly, of each row by itself, and what XLA makes of all rows of a batch together.

The first are the formulas in 60 digits, for rows on which second derivatives usually go wrong, in all orders of the modes
and in all the places in which a training step may have a loss. The last are there because XLA:CPU of jaxlib 0.10.2 compiles
``p * (v - sum(p * v))`` wrongly where p is shared by a batch of v of a certain size, 5 rows of 48 classes among them: so
the same Hessian is computed with `jax.vmap` and with `jax.lax.map`, and must agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import helpers
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from helpers import Row, quick

import jaxce

# --- each row by itself, exactly --------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Rows of five classes with a label and a distribution each, which entries are there, and logits to compare with."""

    names: list[str]
    x: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    where: np.ndarray
    other: np.ndarray


def problem(dtype: str = "float32") -> Problem:
    rng = np.random.default_rng(3)
    gaps = np.array([0.0, -8.0, -16.0, -80.0, 8.0])
    made = {
        "random": (3 * rng.normal(size=5), 1),
        "ties": (np.array([2.0, 1.0, 2.0, 2.0, -1.0]), 0),
        "right by 10": (np.array([0.0, 10, 1, -2, 0.5]), 1),
        "right by 20": (np.array([20.0, 0, 1, -3, -3]), 0),
        "right by 40": (np.array([40.0, 0, 1, -2, 3]), 0),
        "right by 60": (np.array([-2.0, 60, 0, 1, -3]), 1),
        "right by 100": (np.array([100.0, 0, 2, -3, 5]), 0),
        "wrong by 40": (np.array([40.0, 0, 1, -2, 3]), 1),
        "above half of the exponents": (np.array([50.0, 49, 48, 47, 44]), 0),
        "at 1e4": (gaps / 4 + 1e4, 1),
        "at -1e6": (gaps / 4 - 1e6, 1),
        "at 1e8": (gaps + 1e8, 1),
        "at 1e30": (np.array([0.0, 0, -1e25, 0, -1e24]) + 1e30, 1),
        "at -1e30": (np.array([0.0, 1e23, -1e25, 0, 1e23]) - 1e30, 1),
        "three there": (rng.normal(size=5), 1),
        "one there": (rng.normal(size=5), 1),
        "none there": (rng.normal(size=5), 1),
    }
    x = helpers.cast(np.stack([row for row, _ in made.values()]), dtype)
    where = np.ones(x.shape, bool)
    where[-3, [0, 3]] = False
    where[-2] = np.arange(5) == 1
    where[-1] = False
    targets = rng.dirichlet(np.ones(5), len(x))
    targets[:, 2] = 0
    targets = np.where(where, targets, 0)
    other = helpers.cast(rng.normal(size=x.shape), dtype)
    labels = np.array([y for _, y in made.values()])
    return Problem(list(made), x, labels, targets.astype(np.float32), where, other)


Matrix = list[list[tuple[Any, Any]]]
"""Entries, each with the largest magnitude that a formula has to form for it."""


def covariance(row: Row, n: Any = 1) -> Matrix:
    """n (diag(p) - p p^T): the second derivative of a cross-entropy with targets of the sum n, and of a normalizer."""
    k = range(len(row.exps))
    values = [[row.p(i) * row.not_p(i) if i == j else -row.p(i) * row.p(j) for j in k] for i in k]
    return [[(n * v, abs(n * v)) for v in line] for line in values]


def of_mean(row: Row, costs: list[Any], own: int, gaps: bool = False) -> Matrix:
    """That of sum_k p_k a_k, where a is a constant (own = 0), or log p and a constant (own = 1).

    Their mean is formed, and subtracted from each; unless they are gaps, whose mean says nothing of them.
    """
    mean = mpmath.fsum(row.p(k) * a for k, a in enumerate(costs) if row.exps[k])
    c = [a - mean if row.exps[k] else helpers.ZERO for k, a in enumerate(costs)]
    size = [abs(v) if gaps else max(abs(mean), abs(a)) for v, a in zip(c, costs, strict=True)]
    k = range(len(c))

    def entry(i: int, j: int) -> tuple[Any, Any]:
        p, q = row.p(i), row.p(j)
        if i != j:
            return -p * q * (c[i] + c[j] + own), p * q * (size[i] + size[j] + own)
        return p * (row.not_p(i) * (c[i] + own) - p * c[i]), p * (row.not_p(i) * (size[i] + own) + p * size[i])

    return [[entry(i, j) for j in k] for i in k]


def of_nll(row: Row, y: int, first: Any, second: Any) -> Matrix:
    """That of f(-log p_y), of whose first two derivatives there are these."""
    slope = [row.p(k) if k != y else -row.not_p(k) for k in range(len(row.exps))]
    return [
        [
            (first * c + second * a * b, abs(first * c) + abs(second * a * b))
            for (c, _), b in zip(line, slope, strict=True)
        ]
        for line, a in zip(covariance(row), slope, strict=True)
    ]


def focal(row: Row, y: int, gamma: float = 2) -> tuple[Any, Any]:
    """The derivatives of u^gamma a, with u = 1 - p and a = -log p; of a class alone, any that are multiplied by 0."""
    a, u, p = row.nll(y), row.not_p(y), row.p(y)
    if u == 0:
        return u, u
    first = u**gamma + gamma * u ** (gamma - 1) * p * a
    return first, gamma * u ** (gamma - 2) * p * (2 * u + a * (gamma * p - 1))


def poly(row: Row, y: int) -> tuple[Any, Any]:
    """Epsilon 2: the derivatives of a + 2 u."""
    return 1 + 2 * row.p(y), -2 * row.p(y)


def of_dense(row: Row, t: list[Any], derivatives: Callable[[Row, int], tuple[Any, Any]], most: Any) -> Matrix:
    """That of sum_k t_k f(-log p_k). Each class adds t_k p_k f' to a sum that is multiplied by two probabilities."""
    terms = [(w, of_nll(row, k, *derivatives(row, k))) for k, w in enumerate(t) if w]
    added = mpmath.fsum(most * w * row.p(k) for k, w in enumerate(t))
    k = range(len(t))

    def entry(i: int, j: int) -> tuple[Any, Any]:
        value, scale = (mpmath.fsum(w * m[i][j][part] for w, m in terms) for part in (0, 1))
        return value, scale + added * row.p(i) * row.p(j)

    return [[entry(i, j) for j in k] for i in k]


def squared_normalizer(row: Row) -> Matrix:
    lse = row.logsumexp
    return [
        [
            (2 * lse * c + 2 * row.p(i) * row.p(j), abs(2 * lse * c) + 2 * row.p(i) * row.p(j))
            for j, (c, _) in enumerate(line)
        ]
        for i, line in enumerate(covariance(row))
    ]


class Second(NamedTuple):
    """A function of logits, labels, targets, other logits and a mask; and the second derivative of a row, exactly."""

    call: Callable[..., jax.Array]
    exact: Callable[[Row, int, Any, Row], Matrix]


SECOND = {
    "integer": Second(
        lambda x, y, t, o, where: jaxce.softmax_cross_entropy_with_integer_labels(x, y, where=where),
        lambda row, y, t, o: covariance(row),
    ),
    "dense, smoothed": Second(
        lambda x, y, t, o, where: jaxce.softmax_cross_entropy(x, t, where=where, label_smoothing=0.25),
        lambda row, y, t, o: covariance(row, mpmath.fsum(t) * 0.75 + 0.25),
    ),
    "logsumexp": Second(
        lambda x, y, t, o, where: jaxce.logsumexp(x, where=where), lambda row, y, t, o: covariance(row)
    ),
    "log_softmax of one class": Second(
        lambda x, y, t, o, where: jnp.sum(
            jnp.where(jax.nn.one_hot(y, 5, dtype=bool), jaxce.log_softmax(x, where=where), 0), -1
        ),
        lambda row, y, t, o: covariance(row, -1),
    ),
    "entropy": Second(
        lambda x, y, t, o, where: jaxce.entropy_with_logits(x, where=where),
        lambda row, y, t, o: [
            [(-v, s) for v, s in line] for line in of_mean(row, [-row.nll(k) for k in range(len(row.exps))], 1, True)
        ],
    ),
    "squared normalizer": Second(
        lambda x, y, t, o, where: (
            jaxce.softmax_cross_entropy_with_integer_labels(x, y, where=where, z_loss=0.5)
            - jaxce.softmax_cross_entropy_with_integer_labels(x, y, where=where)
        ),
        lambda row, y, t, o: [[(v / 2, s / 2) for v, s in line] for line in squared_normalizer(row)],
    ),
    "focal": Second(
        lambda x, y, t, o, where: jaxce.softmax_focal_loss(x, y, where=where),
        lambda row, y, t, o: of_nll(row, y, *focal(row, y)),
    ),
    "poly": Second(
        lambda x, y, t, o, where: jaxce.poly_loss_cross_entropy(x, y, where=where),
        lambda row, y, t, o: of_nll(row, y, *poly(row, y)),
    ),
    "dense poly": Second(
        lambda x, y, t, o, where: jaxce.poly_loss_cross_entropy(x, t, where=where),
        lambda row, y, t, o: of_dense(row, t, poly, 2),
    ),
    "dense focal": Second(
        lambda x, y, t, o, where: jaxce.softmax_focal_loss(x, t, where=where),
        lambda row, y, t, o: of_dense(row, t, focal, 4),
    ),
    "focal, gamma 0.5": Second(
        lambda x, y, t, o, where: jaxce.softmax_focal_loss(x, y, where=where, gamma=0.5),
        lambda row, y, t, o: of_nll(row, y, *focal(row, y, 0.5)),
    ),
    "dense focal, gamma 0.5": Second(
        lambda x, y, t, o, where: jaxce.softmax_focal_loss(x, t, where=where, gamma=0.5),
        lambda row, y, t, o: of_dense(row, t, lambda row, y: focal(row, y, 0.5), 4),
    ),
    "sparse": Second(
        lambda x, y, t, o, where: jaxce.softmax_cross_entropy_with_sparse_labels(
            x, jnp.stack([y, jnp.zeros_like(y)], -1), jnp.full((*y.shape, 2), 0.5), where=where
        ),
        lambda row, y, t, o: covariance(row),
    ),
    "relative entropy by p": Second(
        lambda x, y, t, o, where: jaxce.relative_entropy_with_logits(x, o, where=where),
        lambda row, y, t, o: of_mean(row, [o.nll(k) - row.nll(k) for k in range(len(row.exps))], 1),
    ),
    "relative entropy by q": Second(
        lambda x, y, t, o, where: jaxce.relative_entropy_with_logits(o, x, where=where),
        lambda row, y, t, o: covariance(row),
    ),
    "cross-entropy by p": Second(
        lambda x, y, t, o, where: jaxce.cross_entropy_with_logits(x, o, where=where),
        lambda row, y, t, o: of_mean(row, [o.nll(k) for k in range(len(row.exps))], 0),
    ),
}


def check(name: str, p: Problem, got: Any, ulp: float = 2.0**-23, least: float = 1e-37) -> None:
    """That second derivatives are exact but for 8 ulp, twice the contract of a first, and half an ulp per nat.

    The nats are those of both probabilities. Products of two below 1e-30 only have to be of the right size: XLA:CPU flushes
    to 0 what is below the smallest normal number, and the targets by which they may be multiplied are as small as 2^-24.
    """
    assert np.array_equal(got == got, np.ones(got.shape, bool)), "NaN"
    for i, keep in enumerate(p.where):
        found = np.asarray(got[i], np.float64)
        assert not np.any(found[~keep]) and not np.any(found[:, ~keep]), p.names[i]
        if not keep.any():
            continue
        row, other = (Row(v[i][keep].astype(np.float64).tolist()) for v in (p.x, p.other))
        y, t = int(np.sum(keep[: p.labels[i]])), p.targets[i][keep].astype(np.float64).tolist()
        matrix = SECOND[name].exact(row, y, [mpmath.mpf(v) for v in t], other)
        exact, scale = (np.array([[float(entry[k]) for entry in line] for line in matrix]) for k in (0, 1))
        nats = np.array([min(800, float(g + row.log_total)) for g in row.gaps])
        nats = nats[:, None] + nats
        limit = np.where(nats < 30 * np.log(10), (8 + nats / 2) * ulp, 1) * scale + least
        errors = np.abs(found[np.ix_(keep, keep)] - exact) / limit
        assert np.max(errors) <= 1, f"{name}, {p.names[i]}:\n{found}\n{exact}"


def array(x: jax.Array) -> Any:
    return x


def linear(x: jax.Array) -> Any:
    """The same logits as products, of which a block has two classes."""
    rows = x.reshape(-1, x.shape[-1])
    return jaxce.LinearLogits(jnp.eye(len(rows), dtype=x.dtype).reshape(*x.shape[:-1], -1), rows, block_size=2)


Total = Callable[[jax.Array], jax.Array]


def totals(call: Callable[..., jax.Array], make: Callable[..., Any], p: Problem) -> dict[str, Total]:
    """The sum of the losses of all rows, in the ways in which a program may come by it."""
    with_rows = tuple(map(jnp.asarray, (p.labels, p.targets, p.other, p.where)))

    def one(x: jax.Array, *rest: jax.Array) -> jax.Array:
        return call(make(x), *rest)

    def scan(one: Callable[..., jax.Array]) -> Total:
        def step(total: jax.Array, row: Any) -> tuple[jax.Array, None]:
            return total + one(*row), None

        return lambda x: jax.lax.scan(step, jnp.zeros((), jnp.float32), (x, *with_rows))[0]

    return {
        "batch": lambda x: jnp.sum(one(x, *with_rows)),
        "vmap": lambda x: jnp.sum(jax.vmap(one)(x, *with_rows)),
        "scan": scan(one),
        "checkpoint": lambda x: jnp.sum(jax.checkpoint(one)(x, *with_rows)),
        "scan of checkpoint": scan(jax.checkpoint(one)),
        "jit in scan": scan(jax.jit(one)),
    }


def hessian(total: Total, order: str) -> Callable[[jax.Array], jax.Array]:
    """Of each row by itself, [rows, classes, classes]."""

    def product(x: jax.Array, v: jax.Array) -> jax.Array:
        match order:
            case "forward over reverse":
                return jax.jvp(jax.grad(total), (x,), (v,))[1]
            case "reverse over reverse":
                return jax.grad(lambda x: jnp.vdot(jax.grad(total)(x), v))(x)
            case "reverse over forward":
                return jax.grad(lambda x: jax.jvp(total, (x,), (v,))[1])(x)
        # forward over forward: the sum over the rows has one for each, to be told apart
        units = jnp.eye(x.size, dtype=x.dtype).reshape(-1, *x.shape)
        along = jax.vmap(lambda u: jax.jvp(lambda x: jax.jvp(total, (x,), (v,))[1], (x,), (u,))[1])(units)
        return along.reshape(x.shape)

    def rows(x: jax.Array) -> jax.Array:
        directions = jnp.broadcast_to(jnp.eye(5, dtype=x.dtype)[:, None], (5, *x.shape))
        return jnp.moveaxis(jax.vmap(lambda v: product(x, v))(directions), 0, -1)

    return quick(rows)


QUICK = "integer", "log_softmax of one class", "focal", "relative entropy by q"
ORDERS = "forward over reverse", "reverse over reverse", "reverse over forward", "forward over forward"
MAKERS: dict[str, Callable[..., Any]] = {"array": array, "LinearLogits": linear}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SECOND])
def test_exact(name: str, make: str) -> None:
    p = problem()
    total = totals(SECOND[name].call, MAKERS[make], p)["batch"]
    check(name, p, hessian(total, ORDERS[0])(jnp.asarray(p.x)))


WAYS = "batch", "vmap", "scan", "checkpoint", "scan of checkpoint", "jit in scan"
SOME = {
    ("array", "vmap", "forward over forward"),
    ("array", "scan", "forward over reverse"),
    ("array", "jit in scan", "reverse over reverse"),
    ("array", "checkpoint", "reverse over forward"),
    ("LinearLogits", "scan of checkpoint", "forward over reverse"),
}


@pytest.mark.parametrize(
    ("name", "make", "way", "order"),
    [
        (name, *case) if name == "integer" and case in SOME else pytest.param(name, *case, marks=pytest.mark.slow)
        for name in ("integer", "entropy", "relative entropy by p")
        for case in itertools.product(MAKERS, WAYS, ORDERS)
    ],
)
def test_exact_wherever_the_loss_is(name: str, make: str, way: str, order: str) -> None:
    p = problem()
    total = totals(SECOND[name].call, MAKERS[make], p)[way]
    check(name, p, hessian(total, order)(jnp.asarray(p.x)))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", ["array", pytest.param("LinearLogits", marks=pytest.mark.slow)])
def test_half_precision(make: str, dtype: str) -> None:
    """The same of the numbers that 16 bits hold, then rounded to 16 bits: half an ulp, and the least number there is."""
    p = problem(dtype)
    for name in "integer", "entropy":
        got = hessian(totals(SECOND[name].call, MAKERS[make], p)["batch"], ORDERS[0])(jnp.asarray(p.x))
        assert got.dtype == dtype
        info = jnp.finfo(dtype)
        check(name, p, got.astype(jnp.float32), float(info.eps) / 8, float(info.smallest_subnormal) + 1e-37)


# --- a batch together -------------------------------------------------------------------------------------------------


ROWS, CLASSES = 5, 48
RNG = np.random.default_rng(0)
LABELS = jnp.asarray(RNG.integers(CLASSES, size=ROWS), "int32")
TARGETS = jaxce.smooth_labels(jax.nn.one_hot(LABELS, CLASSES), 0.3)
OTHER = jnp.asarray(RNG.normal(size=(ROWS, CLASSES)), "float32")

FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "integer": lambda x: jaxce.softmax_cross_entropy_with_integer_labels(x, LABELS),
    "dense": lambda x: jaxce.softmax_cross_entropy(x, TARGETS),
    "logsumexp": jaxce.logsumexp,
    "entropy": jaxce.entropy_with_logits,
    "cross-entropy by p": lambda x: jaxce.cross_entropy_with_logits(x, OTHER),
    "relative entropy by p": lambda x: jaxce.relative_entropy_with_logits(x, OTHER),
    "relative entropy by q": lambda x: jaxce.relative_entropy_with_logits(OTHER, x),
    "Jensen-Shannon": lambda x: jaxce.jensen_shannon_divergence_with_logits(x, OTHER),
}


@pytest.mark.parametrize(
    ("name", "order"),
    [("integer", "forward over reverse"), ("entropy", "reverse over reverse")]
    + [pytest.param(name, "forward over reverse", marks=pytest.mark.slow) for name in FUNCTIONS if name != "integer"]
    + [pytest.param(name, "reverse over reverse", marks=pytest.mark.slow) for name in ("integer", "dense")],
)
def test_hessian_by_vmap_is_hessian_by_map(name: str, order: str) -> None:
    def total(x: jax.Array) -> jax.Array:
        return FUNCTIONS[name](x).sum()

    def product(x: jax.Array, v: jax.Array) -> jax.Array:
        if order == "forward over reverse":
            return jax.jvp(jax.grad(total), (x,), (v,))[1]
        return jax.grad(lambda x: jnp.vdot(jax.grad(total)(x), v))(x)

    x = jnp.asarray(3 * RNG.normal(size=(ROWS, CLASSES)), "float32")
    directions = jnp.eye(ROWS * CLASSES).reshape(-1, ROWS, CLASSES)
    together: Any = jax.jit(lambda x: jax.vmap(lambda v: product(x, v))(directions))(x)
    one_by_one: Any = jax.jit(lambda x: jax.lax.map(lambda v: product(x, v), directions))(x)
    # Entries are at most 4 here; a wrong fusion is off by 0.1 and more.
    np.testing.assert_allclose(together, one_by_one, atol=2e-5)


# The ways to read a row: as it is, whole, in blocks.
@pytest.mark.parametrize(
    ("classes", "loss"),
    [
        case if case == (97, 0) else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product((10, 64, 97, 4096), range(3))
    ],
)
def test_derivatives_in_a_batch_are_those_of_the_plain_formula(classes: int, loss: int) -> None:
    rng = np.random.default_rng(classes)
    label, soft, v = rng.integers(classes), rng.dirichlet(np.ones(classes)), rng.normal(size=classes)
    pairs: list[tuple[Callable[[Any], Any], Callable[[Any], Any]]] = [
        (
            lambda x: jaxce.softmax_cross_entropy_with_integer_labels(x, label),
            lambda x: -jax.nn.log_softmax(x)[label],
        ),
        (lambda x: jaxce.softmax_cross_entropy(x, soft), lambda x: -jnp.vdot(soft, jax.nn.log_softmax(x))),
        (jaxce.entropy_with_logits, lambda x: -jnp.vdot(jax.nn.softmax(x), jax.nn.log_softmax(x))),
    ]
    with jax.enable_x64(True):
        x = jnp.asarray(2 * rng.normal(size=(3, classes)))
        for derivative in (
            lambda f: lambda x: (f(x), jax.jvp(jax.grad(f), (x,), (v,))),
            lambda f: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v)),
        ):
            got, expected = (jax.jit(jax.vmap(derivative(f)))(x) for f in pairs[loss])
            # Some ulp of float64, in numbers of about 1.
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), got, expected)
