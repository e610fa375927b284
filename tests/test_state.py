"""The state of a row as what it claims to be: a commutative monoid, whose numbers are those of their definition.

Whatever the split of the classes and the order in which the parts meet, the state is the same; and so it is in the two
ways over a row, with one reduction and, for XLA:CPU, with sums. The definitions are computed in float64 from the float32
logits, with 29 bits to spare.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick

from jaxce import _platforms
from jaxce._state import SHARE, Ask, Block, State, leaves, meet, meet_all, meet_devices, nothing

F32 = np.dtype(np.float32)
INF, NAN, MOST = np.inf, np.nan, float(np.finfo(F32).max)
EVERYTHING = Ask(entropy=True, squares=True, prediction=True, uniform=True, rest=True)


class Rows(NamedTuple):
    """Logits, a label for each row, targets, and a weight for each class."""

    names: list[str]
    x: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def rows(classes: int, dtype: Any = F32) -> Rows:
    """Rows at which a merge could go wrong. Targets and weights are multiples of 1/64, so that their sums are exact.

    Logits are float32, but those that another dtype can write.
    """
    rng = np.random.default_rng(classes)
    normal = 3 * rng.normal(size=(20, classes))
    some = rng.uniform(size=classes) < 0.4
    made = {
        "random": normal[0],
        "ascending": np.linspace(-40, 3, classes),
        "descending": np.linspace(3, -40, classes),
        "equal": np.full(classes, 1.5),
        "zero": np.zeros(classes),
        "tiny": 1e-24 * normal[9],
        "very negative": normal[9] - 1e4,
        "ties at the top": np.minimum(normal[1], 0.5),
        "confident": np.where(np.arange(classes) == classes // 2, 30, normal[2]),
        "offset 1e8": normal[3] * 8 + 1e8,
        "offset -1e30": normal[4] * 1e24 - 1e30,
        "spread 1e4": 1e4 * normal[5],
        "largest and least": np.where(some, MOST, -MOST),
        "least": np.where(some, -MOST, -MOST / 2),
        "some absent": np.where(some, -INF, normal[6]),
        "one there": np.where(np.arange(classes) == 1, 7, -INF),
        "all absent": np.full(classes, -INF),
        "infinite": np.where(np.arange(classes) == classes - 1, INF, normal[7]),
        "infinite twice": np.where(np.isin(np.arange(classes), [0, classes - 1]), INF, normal[8]),
        "infinite and absent": np.where(np.arange(classes) == 0, INF, -INF),
        "NaN": np.where(np.arange(classes) == classes - 2, NAN, normal[9]),
        "NaN and absent": np.where(np.arange(classes) == 0, NAN, -INF),
        "NaN and infinite": np.where(np.arange(classes) == 0, NAN, np.where(some, INF, 0)),
    }
    with np.errstate(over="ignore"):
        x = np.stack(list(made.values())).astype(F32).astype(dtype).astype(F32)
    labels = rng.integers(classes, size=len(x))
    targets = rng.integers(0, 5, size=x.shape) * rng.integers(0, 2, size=x.shape) / 64
    weights = rng.integers(0, 65, size=classes) / 64
    return Rows(list(made), x, labels.astype(np.int32), targets.astype(F32), weights.astype(F32))


def block(r: Rows, weighted: bool, first: int = 0) -> Block:
    places = first + jax.lax.broadcasted_iota(jnp.int32, r.x.shape, 1)
    weights = jnp.asarray(r.weights) if weighted else None
    return Block(jnp.asarray(r.x), first, places, jnp.asarray(r.labels), weights, jnp.asarray(r.targets))


def plain(r: Rows, weighted: bool) -> dict[str, np.ndarray]:
    """Each number of the rows by its definition, in float64."""
    x, n = r.x.astype(np.float64), np.arange(len(r.x))
    there = x > -INF
    weights = r.weights.astype(np.float64) if weighted else np.ones(x.shape[1])
    with np.errstate(invalid="ignore", over="ignore"):
        m = np.max(x, -1)
        gaps = np.where(x == m[:, None], 0, m[:, None] - x)
        gaps = np.where(gaps > MOST, INF, gaps)  # as float32 has it
        e = np.exp(-gaps)
        top = np.argmax(x, -1)
        others = np.arange(x.shape[1]) != top[:, None]
        found = {
            "m": m,
            "s": np.sum(e * others, -1),
            "squares": np.sum(e * e * others, -1),
            "h": np.sum(np.where(e == 0, 0, e * gaps), -1),
            "label": x[n, r.labels],
            "label_weight": weights[r.labels],
            "prediction": top,
            "count": SHARE * np.sum(there, -1),
        }
        for name, t in ("given", r.targets * weights), ("uniform", SHARE * there * weights):
            found[f"{name}.total"] = np.sum(t, -1)
            found[f"{name}.gap"] = np.sum(np.where(t == 0, 0, t * gaps), -1)
            found[f"{name}.rest"] = np.sum(t * others, -1)
    return found


def numbers(state: State) -> dict[str, np.ndarray]:
    """All of a state, by name."""
    found: dict[str, np.ndarray] = {}
    for name, value in state._asdict().items():
        if value is not None:
            parts = value._asdict() if hasattr(value, "_asdict") else {"": value}
            found |= {f"{name}.{part}".rstrip("."): np.asarray(v) for part, v in parts.items()}
    return found


EXACT = (
    "m",
    "label",
    "label_weight",
    "prediction",
    "count",
    "given.total",
    "uniform.total",
    "given.rest",
    "uniform.rest",
)


def check(state: State, r: Rows, weighted: bool, meetings: int, names: tuple[str, ...] | None = None) -> None:
    """That a state is its definition: a maximum, a choice and a sum of 64ths exactly, other sums to their rounding.

    A term exp(-g) of these sums is a product of one factor for each of the meetings on its way up. The gaps of the factors
    add up to g; each is rounded by half an ulp, which exp turns into eps g / 2 in all, and g is -log of the term, that of a
    square too. Beside it each meeting rounds an exp (1 ulp), a product or two and a sum (half of one each).
    """
    got, expected = numbers(state), plain(r, weighted)
    if not weighted:  # the count is the total then, and nothing else is carried
        del expected["label_weight"], expected["count"]
    assert set(got) == set(names or expected)
    nan, there = np.isnan(r.x).any(-1), (r.x > -INF).any(-1)
    ties = np.sum(r.x == r.x.max(-1, keepdims=True), -1) > 1
    eps = float(np.finfo(F32).eps)
    for name, value in got.items():
        valid = ~nan & there
        if name.endswith("rest"):  # of tied classes any may be left out
            valid &= ~ties
        with np.errstate(over="ignore"):
            wanted = expected[name].astype(F32).astype(np.float64)
        if name in EXACT:
            assert value.dtype == (np.int32 if name == "prediction" else F32)
            np.testing.assert_array_equal(value[valid], wanted[valid], err_msg=name)
            continue
        nats = np.zeros(len(wanted))
        if name in ("s", "squares", "h"):
            nats = -np.log(np.clip(expected[name], 1e-37, 1))
        limit = eps * (nats / 2 + 3 * meetings) * np.abs(expected[name]) + 1e-37  # XLA:CPU has no smaller numbers
        for row in np.flatnonzero(valid):
            same = value[row] == wanted[row] or abs(value[row] - expected[name][row]) <= limit[row]
            assert same, f"{name} of {r.names[row]}: {value[row]} instead of {wanted[row]}"
    assert np.all(np.isnan(got["m"]) == nan) and np.all(np.isnan(got["s"]) == nan)
    assert np.array_equal(state.present, nan | there)
    if "prediction" in got:
        assert np.array_equal(state.predicted, np.where(nan | ~there, 0, expected["prediction"]))


@functools.partial(jax.jit, static_argnums=1)
def parts_of(b: Block, ask: Ask) -> State:
    """The state of each class, [classes, rows]."""
    return jax.tree.map(lambda v: jnp.moveaxis(v, -1, 0), leaves(b, ask, F32))


met = jax.jit(meet)


@pytest.mark.parametrize("weighted", [True, False])
def test_any_split_in_any_order_gives_the_same(weighted: bool) -> None:
    """200 trees of meetings, of all shapes from a list to balanced, of the classes in all orders."""
    r = rows(7)
    every = parts_of(block(r, weighted), EVERYTHING)
    single = [jax.tree.map(lambda v, k=k: v[k], every) for k in range(7)]
    rng = np.random.default_rng(0)
    results = []
    for lopsided in np.linspace(0, 1, 200):
        waiting = list(single)
        while len(waiting) > 1:
            i, j = rng.permutation(len(waiting))[:2]
            if rng.uniform() < lopsided:  # what met last meets the next
                i, j = rng.permutation([len(waiting) - 1, rng.integers(len(waiting) - 1)])
            joined = met(waiting[i], waiting[j])
            waiting = [w for k, w in enumerate(waiting) if k not in (i, j)] + [joined]
        results.append(waiting[0])
    for state in results:
        check(state, r, weighted, 6)


@pytest.mark.parametrize("weighted", [True, False])
def test_laws(weighted: bool) -> None:
    """The neutral element changes no bit; a meeting has no sides; three are the same in any order, but for rounding."""
    r = rows(6)
    every = parts_of(block(r, weighted), EVERYTHING)
    single = [jax.tree.map(lambda v, k=k: v[k], every) for k in range(6)]
    a, b, c = (met(single[k], single[k + 3]) for k in range(3))
    none = jax.tree.map(lambda v, like: jnp.full_like(like, v), nothing(a), a)

    def equal(one: State, other: State) -> None:
        there = ~np.isnan(np.asarray(one.m))  # in a row with NaN the prediction is any
        np.testing.assert_array_equal(there, ~np.isnan(np.asarray(other.m)))
        chex.assert_trees_all_equal(*(jax.tree.map(lambda v: np.asarray(v)[there], s) for s in (one, other)))

    for state in a, b, c, single[0]:
        equal(met(state, none), state)
        equal(met(none, state), state)
    assert not np.any(met(none, none).present)
    equal(met(a, b), met(b, a))
    for state in met(met(a, b), c), met(a, met(b, c)):
        check(state, r, weighted, 3)


def reading(b: Block) -> Any:
    """How a block is made of its inputs, and these."""
    inputs = {
        "array": b.x,
        "first": jnp.asarray(b.first),
        "labels": b.labels,
        "targets": b.targets,
        "weights": b.weights,
    }

    def read(part: dict[str, jax.Array]) -> Block:
        places = part["first"] + jax.lax.broadcasted_iota(jnp.int32, part["array"].shape, 1)
        return Block(part["array"], part["first"], places, *(part.get(n) for n in ("labels", "weights", "targets")))

    return read, {name: x for name, x in inputs.items() if x is not None}


def over_classes(b: Block, ask: Ask) -> State:
    """As `_passes.state_of` asks for it."""
    read, inputs = reading(b)
    return jax.jit(lambda inputs: _platforms.over_classes(read, inputs, ask, F32))(inputs)


def test_what_is_not_asked_for_is_not_carried() -> None:
    r = rows(12)
    bare = Block(jnp.asarray(r.x), 0, jax.lax.broadcasted_iota(jnp.int32, r.x.shape, 1))
    asks = {"h": Ask(entropy=True), "squares": Ask(squares=True), "prediction": Ask(prediction=True)}
    for name, ask in {"": Ask(), **asks, "uniform": Ask(uniform=True)}.items():
        for make in (lambda a=ask: leaves(bare, a, F32)), (lambda a=ask: over_classes(bare, a)):
            state = jax.eval_shape(make)
            carried = {n for n, v in state._asdict().items() if v is not None}
            assert carried == {"m", "s"} | ({name} if name else set())
    labelled = jax.eval_shape(lambda: leaves(bare._replace(labels=jnp.asarray(r.labels)), Ask(), F32))
    assert {n for n, v in labelled._asdict().items() if v is not None} == {"m", "s", "label"}


# --- the orders in which the classes of a row meet --------------------------------------------------------------------


ORDERS = {
    "one after the other": lambda b: meet_all(leaves(b, EVERYTHING, F32)),
    "as on this platform": lambda b: over_classes(b, EVERYTHING),
    "as on a GPU": lambda b: _platforms._in_parts(*reading(b), EVERYTHING, F32),
}
CLASSES = [2, 10, 11, 100, 1000, 4095, 4096, 5003]  # too few to cut, even and uneven parts, a prime number
DEFAULT = {(11, "float32", True), (100, "bfloat16", False), (1000, "float16", True), (4095, "float32", False)}


@pytest.mark.parametrize(
    ("classes", "dtype", "x64"),
    [
        pytest.param(*row, marks=() if row in DEFAULT else pytest.mark.slow)
        for row in itertools.product(CLASSES, ("float32", "bfloat16", "float16"), (False, True))
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_any_order(order: str, classes: int, dtype: str, x64: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of rows, too, of which the last has fewer; and with 64-bit numbers allowed, of which none is wanted."""
    r = rows(classes, jnp.dtype(dtype))
    weighted = x64  # as well as not
    monkeypatch.setattr(_platforms, "_CACHE", 7 * classes)
    with jax.enable_x64(x64):
        compiled = quick(ORDERS[order])
        b = block(r, weighted)
        state = compiled(b._replace(x=b.x.astype(dtype)))
    # Even one class after the other, as many roundings add up as steps at random do: to the root of their number.
    check(state, r, weighted, math.isqrt(classes) + 1)


def test_devices_meet() -> None:
    """A class on each device; in one meeting."""
    r = rows(7)
    every = parts_of(block(r, True), EVERYTHING)
    states = jax.jit(jax.vmap(lambda state: meet_devices(state, "devices"), axis_name="devices"))(every)
    for device in range(7):
        check(jax.tree.map(lambda v, d=device: v[d], states), r, True, 7)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda v, d=d: v[d], states._replace(prediction=None)) for d in (0, 6)))
