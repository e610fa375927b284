"""Losses of all pairs: the formula in float64, the formulas of other libraries, and pairs on which losses go wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from helpers import quick

import jaxce
from jaxce import _pairs

of_pairs = jaxce.softmax_cross_entropy_of_pairs
Arrays = dict[str, Any]
RNG = np.random.default_rng(0)


def plain(x: np.ndarray, labels: Any = None, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The formula, one row and one column at a time; what isn't there is -inf."""
    n, k = x.shape
    own = np.arange(n)[:, None] == np.arange(k)[None]
    positive = own if labels is None else np.asarray(labels)[:, None] == np.arange(k)[None]
    rows, columns = (np.asarray(options.get(m, np.ones(s, bool))) for m, s in (("where", n), ("class_where", k)))
    there = rows[:, None] & columns[None]
    if options.get("exclude_self"):
        there = there & ~own
    if "groups" in options:
        same = (
            np.asarray(options["groups"])[:, None] == np.asarray(options.get("class_groups", options["groups"]))[None]
        )
        if options.get("positives") == "group":
            positive = same & there
        else:
            there = there & (~same | positive)
    positive = positive & rows[:, None]

    def lines(x: np.ndarray, there: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
        x, found = np.where(there, x, -np.inf), np.zeros(len(x))
        for i in np.flatnonzero(counts & positive.any(-1) & there.any(-1)):
            m = x[i].max()
            found[i] = np.mean(m + np.log(np.exp(x[i] - m).sum()) - x[i][positive[i]])
        return found

    return lines(x, there, positive, rows), lines(x.T, there.T, positive.T, columns)


def embeddings(n: int = 9, k: int = 9, dtype: str = "float64") -> Arrays:
    made = {"a": RNG.normal(size=(n, 4)), "b": RNG.normal(size=(k, 4)), "bias": RNG.normal(size=k), "t": np.array(0.3)}
    return {name: np.asarray(v, dtype) for name, v in made.items()}


def linear(e: Arrays, block_size: int | None = 4) -> jaxce.LinearLogits:
    return jaxce.LinearLogits(e["a"], e["b"], class_axis=0, bias=e["bias"], temperature=e["t"], block_size=block_size)


def whole(e: Arrays) -> Any:
    return (e["a"] @ e["b"].T + e["bias"][None]) / e["t"]


def close(got: Any, expected: Any, rtol: float = 1e-11, atol: float = 1e-12) -> None:
    """In float64: what sums of some ten terms lose, over a temperature of 0.3."""
    for g, v in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float64), np.asarray(v, np.float64), rtol, atol)


def scalar(losses: Any) -> jax.Array:
    """One number in which every loss counts, with weights that no symmetry cancels."""
    return sum(jnp.vdot(jnp.sin(1 + i + jnp.arange(v.size, dtype=v.dtype)), v) for i, v in enumerate(losses))


def losses_and_slopes(losses: Callable[..., Any]) -> Callable[..., Any]:
    """The losses of rows and of columns, and the gradient of all by the first argument."""

    def total(*args: Any) -> Any:
        found = losses(*args)
        return scalar(found), found

    return lambda *args: jax.grad(total, has_aux=True)(*args)[::-1]


CASES: dict[str, tuple[int, int, Arrays]] = {
    "square": (9, 9, {}),
    "more columns": (7, 13, {}),
    "labels": (7, 11, {"labels": np.array([3, 10, 0, 5, 4, 8, 1])}),
    "labels that are equal": (7, 11, {"labels": np.array([3, 3, 0, 5, 3, 0, 1]), "class_where": np.arange(11) != 7}),
    "masks": (9, 9, {"where": np.arange(9) % 4 != 1, "class_where": np.arange(9) % 4 != 1}),
    "rows masked": (8, 10, {"where": np.arange(8) % 3 != 1}),
    "duplicates": (9, 9, {"groups": np.array([0, 1, 2, 0, 3, 1, 4, 5, 0])}),
    "groups": (9, 9, {"groups": np.arange(9) // 2 % 3, "positives": "group"}),
    "SupCon": (9, 9, {"groups": np.arange(9) % 4, "positives": "group", "exclude_self": True}),
    "two views": (10, 10, {"labels": (np.arange(10) + 5) % 10, "exclude_self": True}),
    "all": (
        9,
        13,
        {
            "groups": np.arange(9) % 4,
            "class_groups": np.arange(13) % 5,
            "where": np.arange(9) != 2,
            "class_where": np.arange(13) % 5 != 3,
            "positives": "group",
            "exclude_self": True,
        },
    ),
}
QUICK = {"square", "labels that are equal", "duplicates", "all"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_values_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays and blocks of columns, with tiles of rows that don't divide them, are the formula; their gradients agree."""
    monkeypatch.setattr(_pairs, "_ROWS", 4)
    n, k, options = CASES[name]
    with jax.enable_x64(True):
        e = embeddings(n, k)
        expected = plain(whole(e), **options)
        both = [losses_and_slopes(lambda e, f=f: of_pairs(f(e), **options)) for f in (whole, linear)]
        (of_array, slopes), (of_blocks, same) = quick(lambda e: [f(e) for f in both])(e)
        close((of_array, of_blocks), (expected, expected))
        close(slopes, same)


def test_derivatives_in_all_modes_and_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pairs, "_ROWS", 4)
    with jax.enable_x64(True):
        e = embeddings(7, 9)  # no size of a block or tile divides these
        direction = jax.tree.map(lambda x: np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape), e)

        def orders(logits: Any) -> Any:
            def f(e: Arrays) -> jax.Array:
                return scalar(of_pairs(logits(e)))

            def along(e: Arrays) -> jax.Array:
                return jax.jvp(f, (e,), (direction,))[1]

            hessian = jax.jvp(jax.grad(f), (e,), (direction,))[1]
            return hessian, jax.grad(along)(e), jax.jvp(along, (e,), (direction,))

        close(quick(lambda: orders(linear))(), quick(lambda: orders(whole))(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [30.0, 45.0, 55.0, 70.0, 80.0])
@pytest.mark.parametrize("kind", ["array", "linear"])
def test_second_derivatives_of_pairs_far_apart(size: float, kind: str) -> None:
    """Where squares of the sums of exponentials, or of their inverses, would over- or underflow in float32."""
    noise, groups = np.random.default_rng(3).normal(size=(5, 5)), np.array([0, 0, 1, 1, 1])

    def second(x: np.ndarray) -> np.ndarray:  # -p q of two classes; those of a class add up to 0
        p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        h = -p[:, None] * p * (1 - np.eye(5))
        return h - np.diag(h.sum(1))

    for sign, grouped, side in itertools.product((1, -1), (False, True), (0, 1)):
        positive = groups[:, None] == groups[None] if grouped else np.eye(5, dtype=bool)
        options: Any = {"positives": "group", "groups": groups} if grouped else {}
        x = np.float32(noise + sign * size * positive)

        def loss(x: Any, options: Any = options, side: int = side) -> jax.Array:
            logits = x if kind == "array" else jaxce.LinearLogits(x, jnp.eye(5, dtype=x.dtype), class_axis=0)
            return jaxce.softmax_cross_entropy_of_pairs(logits, **options)[side].sum()

        got = np.asarray(jax.hessian(loss)(jnp.asarray(x)), np.float64)
        lines = x.astype(np.float64) if side == 0 else x.astype(np.float64).T
        got = got if side == 0 else got.transpose(1, 0, 3, 2)
        for i in range(5):
            exact = second(lines[i])
            # Of numbers of up to 80 nats, rounded to float32 before they are exponentials: 80 / 2 ulp.
            np.testing.assert_allclose(got[i, :, i], exact, rtol=1e-5, atol=5e-6 * np.abs(exact).max())


def test_a_masked_column_may_have_any_bias() -> None:
    def loss(t: Any, bias: list[float]) -> Any:
        logits = jaxce.LinearLogits(jnp.ones((2, 2)), jnp.ones((2, 3)), bias=jnp.array(bias), temperature=t)
        return jaxce.softmax_cross_entropy_of_pairs(logits, class_where=jnp.array([True, True, False]))[0].sum()

    assert jax.grad(loss)(1.0, [0.0, 1.0, jnp.nan]) == jax.grad(loss)(1.0, [0.0, 1.0, 0.0])


def test_second_derivatives_beside_a_column_that_is_not_there() -> None:
    """By the temperature, of which -inf is no multiple: a bias of -inf is as a mask of the column."""
    e = embeddings(5, 7, "float32")
    there = np.arange(7) < 6
    t, h = np.float64(e["t"]), 1e-4

    def rows(t: jax.Array) -> jax.Array:
        return of_pairs(linear(e | {"t": t, "bias": jnp.where(there, e["bias"], -jnp.inf)}))[0].sum()

    def exact(t: Any) -> Any:  # whose second differences have 6 digits
        wide = {n: np.asarray(v, np.float64) for n, v in e.items()} | {"t": t}
        return plain(whole(wide), class_where=there)[0].sum()

    got = quick(lambda t: (jax.grad(jax.grad(rows))(t), jax.jacfwd(jax.jacfwd(rows))(t)))(e["t"])
    close(got, [(exact(t + h) - 2 * exact(t) + exact(t - h)) / h**2] * 2, rtol=1e-5)  # float32


# --- formulas of others -----------------------------------------------------------------------------------------------


def test_it_is_open_clips_loss() -> None:
    """ClipLoss: the mean of cross_entropy(scale a b^T, arange) and of its transpose's."""
    with jax.enable_x64(True):
        a, b = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (embeddings()["a"], embeddings()["b"]))
        x, y = 20 * a @ b.T, np.arange(9)
        cross_entropy = quick(optax.losses.softmax_cross_entropy_with_integer_labels)
        expected = (cross_entropy(x, y).mean() + cross_entropy(x.T, y).mean()) / 2
        by_row, by_column = of_pairs(jaxce.LinearLogits(a, b, class_axis=0, temperature=1 / 20))
        close((by_row.mean() + by_column.mean()) / 2, expected)


def test_it_is_optax_ntxent() -> None:
    """Of two views of each item, one after the other in the batch."""
    with jax.enable_x64(True):
        z = embeddings(10)["a"]
        labels = np.arange(10) % 5
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            expected = quick(optax.losses.ntxent)(z, labels, temperature=0.2)

        @quick
        def ours(z: jax.Array) -> tuple[jax.Array, jax.Array]:
            z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
            logits = jaxce.LinearLogits(z, z, class_axis=0, temperature=0.2)
            by_label, _ = of_pairs(logits, (np.arange(10) + 5) % 10, exclude_self=True)
            by_group, _ = of_pairs(logits, groups=labels, positives="group", exclude_self=True)
            return by_label.mean(), by_group.mean()

        close(ours(z), (expected, expected), rtol=1e-9)  # it adds 1e-8 to norms


# --- pairs on which losses go wrong -----------------------------------------------------------------------------------


def exact(x: np.ndarray) -> tuple[list[Any], list[list[Any]]]:
    """The losses of the rows and the slopes of their sum, in 60 digits."""
    losses, slopes = [], []
    for i, row in enumerate(x.tolist()):
        ratios = [mpmath.exp(mpmath.mpf(v) - mpmath.mpf(row[i])) for v in row]
        others = mpmath.fsum(r for j, r in enumerate(ratios) if j != i)
        losses.append(mpmath.log1p(others))
        slopes.append([-others / (1 + others) if j == i else r / (1 + others) for j, r in enumerate(ratios)])
    return losses, slopes


HARD = {
    "confident, 1e-28": lambda r: 64 * np.eye(6) + r,
    "confident, offset": lambda r: 60 * np.eye(6) + r - 300,
    "tied": lambda r: np.full((6, 6), 7.0),
    "near the switch": lambda r: np.where(np.eye(6), -30, 30) + r,
    "another 100 above": lambda r: 100 * np.roll(np.eye(6), 1, 1) + r,
    "another 3000 above": lambda r: 3000 * np.roll(np.eye(6), 1, 1) + r,
    "huge": lambda r: 1e30 * (r > 0) + 1e30 * np.eye(6),
    "all sorts": lambda r: 200 * r,
}


def test_hard_pairs() -> None:
    """Losses and their slopes to some ulp of float32, plus half an eps for each nat, in both directions and both ways."""
    tile = np.eye(6, dtype="float32")

    def by_array(x: jax.Array) -> Any:
        return of_pairs(x)

    def by_blocks(x: jax.Array) -> Any:
        return of_pairs(jaxce.LinearLogits(x, jnp.asarray(tile), class_axis=0, block_size=2))

    def by_labels(x: jax.Array) -> Any:
        return of_pairs(x, jnp.arange(6))

    def by_groups(x: jax.Array) -> Any:
        return of_pairs(x, groups=jnp.arange(6), positives="group")

    ways = (by_array, 0), (by_array, 1), (by_blocks, 0), (by_blocks, 1), (by_groups, 0), (by_labels, 1)

    def one_direction(f: Callable[..., Any], i: int) -> Callable[..., Any]:
        def total(x: jax.Array) -> Any:
            losses = f(x)[i]
            return losses.sum(), losses

        return jax.grad(total, has_aux=True)

    in_all_ways = jax.jit(lambda x: [one_direction(*way)(x) for way in ways])
    for name, make in HARD.items():
        x = make(np.random.default_rng(1).normal(size=(6, 6))).astype("float32")
        rights = exact(x.astype("float64")), exact(x.astype("float64").T)
        for (_, i), (slope, got) in zip(ways, in_all_ways(x), strict=True):
            losses, slopes = rights[i]
            for g, right in ((got, losses), (slope.T if i else slope, slopes)):
                right = np.array(right, np.float64)
                small = np.abs(right) < 1e-37
                with np.errstate(divide="ignore"):
                    nats = np.clip(np.abs(np.log(np.abs(right))), 0, 90)
                bound = (8 + nats) * np.finfo("float32").eps * np.abs(right)
                assert np.all((np.abs(g - right) <= bound) | small & (np.abs(g) < 1e-37)), (name, g, right)


def test_positives_far_below_the_others() -> None:
    """Several positives are dense labels of rows and of columns, also where their exponentials are 0 beside others."""
    x, groups = RNG.normal(size=(8, 8)).astype("float32"), np.array([0, 0, 0, 1, 1, 2, 2, 3])
    targets = np.equal(groups[:, None], groups[None]).astype("float32")
    targets /= targets.sum(1, keepdims=True)

    def ours(x: jax.Array) -> Any:
        return of_pairs(x, groups=groups, positives="group")

    def dense(x: jax.Array) -> Any:
        return jaxce.softmax_cross_entropy(x, targets), jaxce.softmax_cross_entropy(x.T, targets)

    both = quick(lambda x: [losses_and_slopes(f)(x) for f in (ours, dense)])
    for size in (1, 30, 150, 3e4, 1e30):
        close(*both(size * x), 1e-5, 1e-5)  # the sum of a few roundings


def test_groups_of_any_integers() -> None:
    with jax.enable_x64(True):
        x, groups = whole(embeddings()), np.array([0, 1, 2, 0, 3, 1, 4, 5, 0])
        expected = plain(x, groups=groups)
        for dtypes in (("int64", "int32"), ("int16", "int64"), ("uint8", "int32")):
            close(of_pairs(x, groups=groups.astype(dtypes[0]), class_groups=groups.astype(dtypes[1])), expected)
        with pytest.raises(TypeError, match="class_groups must have the dtype of groups, uint64, got int64"):
            of_pairs(x, groups=groups.astype("uint64"), class_groups=groups)


def test_absent_and_invalid_pairs() -> None:
    e = embeddings(5, 6, "float32")
    all_rows, all_columns = np.ones(5, bool), np.ones(6, bool)
    rows, columns = np.arange(5) != 3, np.arange(6) != 3

    @quick
    @losses_and_slopes
    def compiled(e: Arrays, rows: Any, columns: Any) -> Any:
        return of_pairs(linear(e, 2), where=rows, class_where=columns)

    def both(*args: Any) -> Any:
        return jax.device_get(compiled(*args))

    def but_3(x: np.ndarray, value: float) -> np.ndarray:
        return np.where((np.arange(len(x)) == 3).reshape(-1, *[1] * (x.ndim - 1)), np.float32(value), x)

    spoiled = e | {"a": but_3(e["a"], np.nan), "b": but_3(e["b"], np.inf)}
    (got, slopes), (right, right_slopes) = both(spoiled, rows, columns), both(e, rows, columns)
    close(got, right, 0, 0)
    close(slopes, right_slopes, 1e-6, 1e-6)
    assert got[0][3] == got[1][3] == got[1][5] == 0 and not np.any(slopes["a"][3]) and not np.any(slopes["b"][3])
    (by_row, by_column), _ = both(e, all_rows, columns)
    assert np.isposinf(by_row).tolist() == [False] * 3 + [True, False] and np.all(np.isfinite(by_column))
    assert not any(np.any(x) for x in both(e, np.zeros(5, bool), all_columns)[0])

    with_bias = quick(lambda bias: of_pairs(linear(e | {"bias": bias}, 2)))
    close(with_bias(but_3(e["bias"], -np.inf)), (by_row, by_column), 1e-6, 1e-6)
    most = np.asarray(with_bias(but_3(e["bias"], np.inf))[0])
    assert most[3] == 0 and np.all(most[[0, 1, 2, 4]] > 1e37)
    assert with_bias(e["bias"])[1][5] == 0


def test_labels_that_are_no_column() -> None:
    e = embeddings(5, 6, "float32")

    @quick
    @losses_and_slopes
    def both(e: Arrays, labels: Any, rows: Any) -> Any:
        return of_pairs(linear(e, 2), labels, where=rows)

    for label in (-1, 6, 1000):
        labels = np.array([0, 1, label, 3, 4])
        (by_row, _), slope = both(e, labels, np.ones(5, bool))
        assert np.isnan(by_row).tolist() == np.isnan(slope["a"]).any(-1).tolist() == [i == 2 for i in range(5)]
        (masked, _), slope = both(e, labels, np.arange(5) != 2)
        assert masked[2] == 0 and np.all(np.isfinite(masked)) and np.all(np.isfinite(slope["a"]))


def test_half_precision_and_kernels_by_columns() -> None:
    e = embeddings(6, 8, "float32")
    a, b, t = e["a"].astype("bfloat16"), e["b"].astype("bfloat16"), e["t"]

    def half(a: jax.Array, b: jax.Array, t: jax.Array) -> Any:
        return of_pairs(jaxce.LinearLogits(a, b.T, temperature=t))

    def wide(a: jax.Array, b: jax.Array, t: jax.Array) -> Any:
        return of_pairs(jaxce.LinearLogits(a.astype("float32"), b.astype("float32"), class_axis=0, temperature=t))

    got, expected = quick(lambda *args: (half(*args), wide(*args)))(a, b, t)
    assert all(g.dtype == "float32" for g in got)
    close(got, expected, 1e-6, 1e-6)
    slopes = jax.eval_shape(jax.grad(lambda *args: scalar(half(*args)), (0, 1, 2)), a, b, t)
    assert [g.dtype for g in slopes] == ["bfloat16", "bfloat16", "float32"]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_numbers_are_the_same_with_x64(dtype: str) -> None:
    e = embeddings(6, 8, dtype)
    both = quick(losses_and_slopes(lambda e: of_pairs(linear(e))))
    expected = both(e)
    with jax.enable_x64(True):
        got = both(e)
    for g, v in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert g.dtype == v.dtype
        np.testing.assert_array_equal(np.asarray(g, np.float64), np.asarray(v, np.float64))


# --- programs ---------------------------------------------------------------------------------------------------------


def test_memory_and_what_is_not_used() -> None:
    """Far from an array of all pairs; and a direction that isn't used takes no time."""
    n, d = 2048, 16
    struct = jax.ShapeDtypeStruct((n, d), "float32")

    def loss(both: bool, a: jax.Array, b: jax.Array) -> jax.Array:
        losses = of_pairs(jaxce.LinearLogits(a, b, class_axis=0, temperature=0.1))
        return sum(jnp.sum(v) for v in losses[: 1 + both])

    compiled = [
        jax.jit(jax.value_and_grad(lambda a, b, both=both: loss(both, a, b), (0, 1))).lower(struct, struct).compile()
        for both in (True, False)
    ]
    assert compiled[0].memory_analysis().temp_size_in_bytes < 4 * n * n * 0.7
    exponentials = [c.as_text().count(" exponential(") for c in compiled]
    assert exponentials[1] < exponentials[0]


def test_vmap_is_stacking() -> None:
    with jax.enable_x64(True):
        e = [embeddings(5, 6) for _ in range(2)]
        e[1] = e[1] | {"a": 300 * e[1]["a"]}  # of which one takes its sums again
        stacked = jax.tree.map(lambda *v: np.stack(v), *e)
        both = losses_and_slopes(lambda e: of_pairs(linear(e, 3)))
        one_by_one = jax.tree.map(lambda *v: np.stack(v), *map(quick(both), e))
        close(quick(jax.vmap(both))(stacked), one_by_one, 1e-10, 1e-10)  # of logits of some thousands


@pytest.mark.parametrize(
    ("wrong", "error", "argument"),
    [
        ({"logits": jnp.zeros(3)}, ValueError, "logits"),
        ({"logits": jaxce.ShardedLogits(jnp.zeros((2, 3)), "x")}, TypeError, "logits"),
        ({"axis_name": "x"}, TypeError, "logits"),
        ({"logits": jnp.zeros((4, 3))}, TypeError, "labels"),
        ({"exclude_self": True}, TypeError, "labels"),
        ({"labels": jnp.zeros(3, "int32")}, ValueError, "labels"),
        ({"where": jnp.ones(3, bool)}, ValueError, "where"),
        ({"class_where": jnp.ones(2, bool)}, ValueError, "class_where"),
        ({"groups": jnp.ones(2, "int32")}, TypeError, "class_groups"),
        ({"groups": jnp.ones(3, "int32")}, ValueError, "groups"),
        ({"positives": "group"}, TypeError, "groups"),
        ({"positives": "both"}, ValueError, "positives"),
        ({"exclude_self": 1}, TypeError, "exclude_self"),
        ({"exclude_self": np.ones(2, bool)}, TypeError, "exclude_self"),
        ({"positives": np.ones(2)}, TypeError, "positives"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_arguments(wrong: Arrays, error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=f"^softmax_cross_entropy_of_pairs: {argument} must (?!be a Python value)"):
        of_pairs(**({"logits": jnp.zeros((2, 3))} | wrong))


@pytest.mark.parametrize("kind", ["array", "linear"])
def test_any_number_of_rows_is_exported(kind: str) -> None:
    """Of arrays any number of columns, too; blocks of columns are cut while tracing."""
    a, b = embeddings(5, 5, "float32")["a"], embeddings(5, 5, "float32")["b"]

    @losses_and_slopes
    def both(sides: tuple[jax.Array, jax.Array], labels: jax.Array) -> Any:
        a, b = sides
        return of_pairs(a @ b.T if kind == "array" else jaxce.LinearLogits(a, b, class_axis=0), labels)

    rows, columns = jax.export.symbolic_shape("n, k")
    shapes = (rows, 4), (columns if kind == "array" else 5, 4)
    structs = tuple(jax.ShapeDtypeStruct(s, "float32") for s in shapes), jax.ShapeDtypeStruct((rows,), "int32")
    labels = jnp.array([3, 1, 0, 4, 2], "int32")
    exported = jax.export.export(jax.jit(both))(*structs)
    close(quick(exported.call)((a, b), labels), quick(both)((a, b), labels), 1e-6, 1e-6)
