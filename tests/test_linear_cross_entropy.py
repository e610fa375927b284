"""The mean loss whose gradient is formed in its own pass: the mean of the losses, and Optax's of an array."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick

import jaxce
from jaxce import _linear, _platforms

EXAMPLES, FEATURES, CLASSES = 7, 5, 11
Arrays = dict[str, jax.Array]


def arguments(dtype: str = "float64", class_axis: int = -1, seed: int = 0, of_rows: bool = False) -> Arrays:
    """All that varies; ``of_rows`` gives each row a temperature and a z-loss of its own."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(FEATURES, CLASSES))
    values = {
        "hidden": rng.normal(size=(EXAMPLES, FEATURES)),
        "kernel": kernel.T if class_axis == 0 else kernel,
        "bias": rng.normal(size=CLASSES),
        "temperature": 1.3,
        "soft_cap": 4.0,
        "weights": np.array([1.0, 2.0, 0.5, 0.0, 1.0, -1.0, 3.0]),
        "class_weights": rng.uniform(size=CLASSES),
        "z_loss": 0.01,
    }
    if of_rows:
        values |= {"temperature": rng.uniform(0.5, 2, EXAMPLES), "z_loss": rng.uniform(size=EXAMPLES)}
    return {name: jnp.asarray(value, dtype) for name, value in values.items()}


LABELS = jnp.array([0, 1, 2, -100, 4, 5, 10])


def fused(a: Arrays, class_axis: int = -1, chunk_size: int | None = 3, smoothing: Any = 0.0) -> jax.Array:
    shape = {name: a[name] for name in ("bias", "temperature", "soft_cap")}
    logits = jaxce.LinearLogits(a["hidden"], a["kernel"], class_axis=class_axis, block_size=4, **shape)
    options: dict[str, Any] = {name: a[name] for name in ("class_weights", "z_loss")}
    options |= {"label_smoothing": smoothing, "chunk_size": chunk_size}
    return jaxce.linear_cross_entropy(logits, LABELS, a["weights"], **options)


def plain(a: Arrays, class_axis: int = -1, smoothing: Any = 0.0) -> jax.Array:
    """The formulas, on the logits as an array."""
    smoothing = jnp.reshape(smoothing, (-1, 1))
    x = a["hidden"] @ (a["kernel"].T if class_axis == 0 else a["kernel"]) + a["bias"][None]
    x /= a["temperature"].reshape(-1, 1)
    log_p = jax.nn.log_softmax(a["soft_cap"] * jnp.tanh(x / a["soft_cap"]))
    log_sum = jax.nn.logsumexp(a["soft_cap"] * jnp.tanh(x / a["soft_cap"]), axis=-1)
    targets = (1 - smoothing) * jax.nn.one_hot(LABELS, CLASSES, dtype=x.dtype) + smoothing / CLASSES
    losses = -jnp.sum(a["class_weights"][None] * targets * log_p, -1) + a["z_loss"] * log_sum**2
    return jnp.sum(jnp.where(a["weights"] == 0, 0, a["weights"] * losses)) / jnp.sum(a["weights"])


def close(got: Any, expected: Any, rtol: float = 1e-12, atol: float = 1e-14) -> None:
    """float64: what a few sums of some ten terms lose."""
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol)


def counted(gradient: Arrays) -> Arrays:
    """Without the derivative by the weight of the row that takes no part: its loss is 0 here, and computed there."""
    return gradient | {"weights": jnp.delete(gradient["weights"], 3)}


SMOOTHING = np.array([0.1, 0.0, 1.0, 0.3, 0.2, 0.5, 0.9])


@pytest.mark.parametrize(
    ("chunk_size", "class_axis", "smoothing", "of_rows"),
    [
        (3, -1, SMOOTHING, True),
        *(
            pytest.param(*p, marks=pytest.mark.slow)
            for p in (
                (3, -1, 0.0, True),
                (None, 0, 0.0, False),
                (3, 0, 0.0, False),
                (None, -1, 0.0, True),
                (1, 0, 0.0, False),
                (1, 0, 0.1, False),
            )
        ),
    ],
)
def test_value_and_gradient(chunk_size: int | None, class_axis: int, smoothing: Any, of_rows: bool) -> None:
    """Against the formulas, by everything: also with options that are one number for each row."""
    with jax.enable_x64(True):
        a = arguments(class_axis=class_axis, of_rows=of_rows)
        value, gradient = quick(jax.value_and_grad(lambda a: fused(a, class_axis, chunk_size, smoothing)))(a)
        expected, by_formula = quick(jax.value_and_grad(lambda a: plain(a, class_axis, smoothing)))(a)
        close(value, expected)
        close(counted(gradient), counted(by_formula))


# --- against float64, where the logits are hard -----------------------------------------------------------------------

ROWS, WIDTH, WORDS = 64, 32, 1000


def in_float64(a: Arrays, labels: np.ndarray) -> tuple[Any, Any, Any]:
    """The weighted sum and its gradients by hidden states and kernel [classes, features], by the formulas."""
    h, k, b, w = (np.asarray(a[name], np.float64) for name in ("hidden", "kernel", "bias", "weights"))
    h, y = np.where(w[:, None] == 0, 0, h), np.where(w == 0, 0, labels)
    x, rows = h @ k.T + b, np.arange(len(y))
    x -= x.max(-1, keepdims=True)
    e = np.exp(x)
    own, e[rows, y] = e[rows, y], 0
    others = e.sum(-1)
    p = e / (others + own)[:, None]
    p[rows, y] = -others / (others + own)
    losses = np.where(own > others, np.log1p(others / np.maximum(own, others)), np.log(others + own) - x[rows, y])
    return np.sum(w * np.where(w == 0, 0, losses)), (p * w[:, None]) @ k, (p * w[:, None]).T @ h


def hard() -> dict[str, tuple[Arrays, np.ndarray]]:
    """Logits for which a number from some of the classes is far from the maximum, or all that there is to subtract."""
    rng = np.random.default_rng(0)
    labels = rng.integers(60, WORDS, ROWS)
    base = {
        "hidden": rng.normal(size=(ROWS, WIDTH)),
        "kernel": 0.5 * rng.normal(size=(WORDS, WIDTH)),
        "bias": np.zeros(WORDS),
        "weights": np.where(np.arange(ROWS) % 5 == 0, 0, rng.uniform(0.5, 2, ROWS)),
    }
    far = base["hidden"].copy(), base["kernel"].copy()
    far[0][:, 0] = 10
    steady = np.zeros((ROWS, WIDTH))
    steady[:, 0] = 1
    sure = 0.01 * base["kernel"]

    def above(logit: float) -> dict[str, Any]:
        far[1][950] = 0
        far[1][950, 0] = logit / 10
        return {"hidden": far[0], "kernel": far[1].copy()}

    def confident(logit: float) -> dict[str, Any]:
        sure[:, 0] = 0
        sure[950, 0] = logit
        return {"hidden": steady, "kernel": sure.copy()}

    order = np.arange(WORDS)
    invalid = np.where(base["weights"][:, None] == 0, [[np.nan, np.inf] * (WIDTH // 2)], base["hidden"])
    changed: dict[str, tuple[dict[str, Any], np.ndarray]] = {
        "plain": ({}, labels),
        "a class 60 above": (above(60), labels),
        "a class 80 above": (above(80), labels),
        "a class 300 above": (above(300), labels),
        "frequent first": ({"bias": -order / 20}, labels),
        "frequent last": ({"bias": order / 5}, labels),
        "first classes absent": ({"bias": np.where(order < 60, -np.inf, 0)}, labels),
        "two classes": ({"bias": np.where((order == 70) | (order == 900), 0, -np.inf)}, labels % 2 * 830 + 70),
        "offset 500": ({"bias": np.full(WORDS, 500.0)}, labels),
        "offset -500": ({"bias": np.full(WORDS, -500.0)}, labels),
        "1 - p of 1e-20": (confident(52), np.full(ROWS, 950)),
        "1 - p of 1e-30": (confident(75), np.full(ROWS, 950)),
        "no row counts": ({"weights": np.zeros(ROWS)}, labels),
        "one row counts": ({"weights": 1.0 * (np.arange(ROWS) == 17)}, labels),
        "rows of weight 0 hold anything": ({"hidden": invalid}, np.where(base["weights"] == 0, -100, labels)),
    }
    return {name: (base | change, y) for name, (change, y) in changed.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_hard_logits(dtype: str) -> None:
    """As exact as the gradient from four products, which has no number to subtract but the maximum."""

    def logits(a: Arrays) -> Any:
        return jaxce.LinearLogits(a["hidden"], a["kernel"], class_axis=0, bias=a["bias"], block_size=256)

    def ours(varying: Arrays, a: Arrays, labels: jax.Array) -> jax.Array:
        return jaxce.linear_cross_entropy(logits(a | varying), labels, a["weights"], normalizer=1.0, chunk_size=16)

    def theirs(varying: Arrays, a: Arrays, labels: jax.Array) -> jax.Array:
        counts = a["weights"] != 0
        losses = jaxce.softmax_cross_entropy_with_integer_labels(logits(a | varying), labels, where=counts)
        return jnp.sum(a["weights"] * losses)

    ways = [jax.jit(jax.value_and_grad(f)) for f in (ours, theirs)]
    eps = float(jnp.finfo("float32").eps)
    for name, (numbers, y) in hard().items():
        a = {n: jnp.asarray(v, dtype if n in ("hidden", "kernel") else "float32") for n, v in numbers.items()}
        expected = in_float64(a, y)
        errors = []
        for way in ways:
            value, gradient = way({n: a[n] for n in ("hidden", "kernel")}, a, jnp.asarray(y, "int32"))
            got = value, gradient["hidden"], gradient["kernel"]
            assert not np.any(np.asarray(gradient["hidden"])[numbers["weights"] == 0]), name
            sizes = (max(np.linalg.norm(v), 1e-300) for v in expected)
            pairs = zip(got, expected, sizes, strict=True)
            errors.append([np.linalg.norm(np.asarray(g, np.float64) - v) / size for g, v, size in pairs])
        # Sums in another order lose an ulp or two more. In bfloat16 both factors of the kernel's gradient are rounded; the
        # errors of a single row are as they fall, and below a quarter eps at most what its last rounding makes.
        least = 4 * eps if dtype == "float32" else float(jnp.finfo(dtype).eps) / 4
        bounds = (1, 4 * eps), (1.1, least), (1.3, least)
        for what, mine, other, (times, floor) in zip(("value", "hidden", "kernel"), *errors, bounds, strict=True):
            assert mine <= max(times * other + 4 * eps, floor), (name, what, mine, other)


@pytest.mark.parametrize("chunk_size", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_rows_without_a_loss(chunk_size: int | None) -> None:
    """A label that is no class gives NaN, one whose class is absent +inf, a row without classes 0, if the row counts."""
    hidden, kernel = jnp.ones((4, 2)), jnp.ones((2, 5))

    @quick
    @functools.partial(jax.value_and_grad, has_aux=True)
    def of_arrays(hidden: jax.Array, labels: jax.Array, weights: jax.Array, bias: jax.Array) -> Any:
        logits = jaxce.LinearLogits(hidden, kernel, bias=bias)
        return jaxce.linear_cross_entropy(logits, labels, weights, normalizer=1.0, chunk_size=chunk_size, has_aux=True)

    def slopes(hidden: jax.Array, labels: Any, weights: Any, bias: Any) -> Any:
        return of_arrays(hidden, np.array(labels), np.array(weights, "float32"), np.array(bias, "float32"))

    for label in (-1, 5, -100):
        (value, (losses, _)), by_hidden = slopes(hidden, [0, label, 2, 4], [1, 1, 1, 0], [0] * 5)
        assert jnp.isnan(value)
        assert [bool(b) for b in jnp.isnan(losses)] == [bool(b) for b in jnp.isnan(by_hidden).any(-1)] == [0, 1, 0, 0]
        (value, _), by_hidden = slopes(hidden, [0, label, 2, 4], [1, 0, 1, 1], [0] * 5)
        close((value, by_hidden), (3 * np.log(5), np.zeros((4, 2))), rtol=1e-6, atol=1e-6)
    absent = [0, 0, -jnp.inf, 0, 0]
    (value, (losses, _)), by_hidden = slopes(hidden, [0, 1, 2, 3], [1, 1, 1, 0], absent)
    assert value == jnp.inf and jnp.isposinf(losses).tolist() == [False, False, True, False]
    assert jnp.isfinite(by_hidden).all()
    (value, (losses, log_normalizers)), by_hidden = slopes(hidden, [0, 1, 2, 3], [1, 1, 1, 0], [-jnp.inf] * 5)
    assert value == 0 and not losses.any() and not by_hidden.any()
    assert log_normalizers.tolist() == [-jnp.inf] * 3 + [0]


def test_ways_of_putting_in_the_label() -> None:
    """Of all platforms alike; a label that is no class of this device's changes nothing."""
    x, labels, values = jnp.zeros((5, 3)), jnp.array([0, -1, 2, 3, 1]), jnp.arange(1.0, 6)
    expected = [[1, 0, 0], [0, 0, 0], [0, 0, 3], [0, 0, 0], [0, 5, 0]]
    for way in (_platforms.with_entries, _platforms._select_entries, _platforms._scatter_entries):
        assert way(x, labels, values).tolist() == expected


def test_only_chunks_with_rows_that_count_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(options: Any, names: Any, labels: jax.Array, inputs: Arrays) -> Any:
        return jnp.ones(()), {}, None

    monkeypatch.setattr(_linear, "_chunk", one)
    options = _linear._Options(None, -1, None, None, False, False)
    rest = {"hidden": jnp.ones((12, 2)), "kernel": jnp.ones((2, 3))}

    def turns(weights: jax.Array) -> jax.Array:
        labels = jnp.zeros(12, "int32")
        return _linear._by_chunks(options, (), 4, labels, rest | {"example_weights": weights})[0]

    counts = [0, 1, 3, 4, 7, 12]
    several = np.array([np.roll(np.arange(12) < n, n) for n in counts], "float32")
    alone, together = quick(turns), quick(jax.vmap(turns))
    assert [int(alone(w)) for w in several] == [0, 1, 1, 2, 3, 4]
    assert together(several).tolist() == [4] * 6  # a loop for all of them


@pytest.mark.parametrize("smoothing", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_what_is_told_of_each_example(smoothing: float) -> None:
    """The losses and log-normalizers of the functions for these, with a gradient and without."""
    rng = np.random.default_rng(2)
    hidden, kernel = jnp.asarray(rng.normal(size=(2, 5, 3)), "float32"), jnp.asarray(rng.normal(size=(3, 8)), "float32")
    labels = jnp.asarray(rng.integers(8, size=(2, 5)))
    weights = jnp.array([[1.0, 0, 2, 1, 1], [0, 3, 1, 0, 0]])  # in two of three chunks, one with rows that don't count
    options: Any = {"z_loss": 1.0, "label_smoothing": smoothing}

    def loss(hidden: jax.Array, kernel: jax.Array) -> Any:
        logits = jaxce.LinearLogits(hidden, kernel)
        return jaxce.linear_cross_entropy(logits, labels, weights, chunk_size=4, has_aux=True, **options)

    def right(hidden: jax.Array, kernel: jax.Array) -> Any:
        logits = jaxce.LinearLogits(hidden, kernel)
        losses = jaxce.softmax_cross_entropy_with_integer_labels(logits, labels, where=weights != 0, **options)
        return jaxce.weighted_mean(losses, weights), (losses, jnp.where(weights == 0, 0, jaxce.logsumexp(logits)))

    got, expected = (quick(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, kernel) for f in (loss, right))
    close(got, expected, rtol=1e-5, atol=1e-6)

    @quick
    def alone(hidden: jax.Array, kernel: jax.Array) -> Any:
        return loss(hidden, kernel), jax.jvp(lambda h: loss(h, kernel)[1], (hidden,), (hidden,))[1]

    value, tangents = alone(hidden, kernel)
    assert value[1][0].shape == (2, 5) and not any(jnp.any(t) for t in tangents)
    close(value, expected[0], rtol=1e-6, atol=1e-6)  # float32, sums in another order


def test_in_loops_and_under_checkpoint() -> None:
    """Micro-batches in a scan, of which each has another number of rows that count; alone, under vmap and recomputed."""
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(3, 8, 5)), "float32")
    kernel = jnp.asarray(rng.normal(size=(5, 40)), "float32")
    labels = jnp.asarray(rng.integers(40, size=(3, 8)))
    weights = jnp.asarray(np.arange(8)[None] < np.array([[8], [3], [0]]), "float32")

    def one(kernel: jax.Array, batch: Any) -> jax.Array:
        h, y, w = batch
        return jaxce.linear_cross_entropy(jaxce.LinearLogits(h, kernel), y, w, normalizer=11.0, chunk_size=2)

    def scanned(kernel: jax.Array, of: Any) -> jax.Array:
        return jax.lax.scan(lambda total, b: (total + of(kernel, b), None), 0.0, (hidden, labels, weights))[0]

    def mapped(kernel: jax.Array) -> jax.Array:
        return jnp.sum(jax.vmap(one, (None, 0))(kernel, (hidden, labels, weights)))

    def whole(kernel: jax.Array) -> jax.Array:
        logits = jaxce.LinearLogits(hidden, kernel)
        return jaxce.weighted_mean(jaxce.softmax_cross_entropy_with_integer_labels(logits, labels), weights)

    ways = whole, mapped, lambda k: scanned(k, one), lambda k: scanned(k, jax.checkpoint(one))
    expected, *others = quick(lambda k: [jax.value_and_grad(way)(k) for way in ways])(kernel)
    for got in others:
        close(got, expected, rtol=1e-5, atol=1e-6)  # float32, in another order


@pytest.mark.parametrize(
    ("left", "right"), [("bfloat16", "float32"), pytest.param("float16", "bfloat16", marks=pytest.mark.slow)]
)
def test_mixed_dtypes(left: str, right: str) -> None:
    """Products of float32, and gradients in the dtypes that came; labels of fewer bits than there are classes."""
    rng = np.random.default_rng(4)
    hidden, kernel = jnp.asarray(rng.normal(size=(6, 5)), left), jnp.asarray(rng.normal(size=(5, 300)), right)

    def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return jaxce.linear_cross_entropy(jaxce.LinearLogits(hidden, kernel), jnp.arange(6, dtype="uint8"))

    both = quick(jax.value_and_grad(loss, (0, 1)))
    value, got = both(hidden, kernel)
    assert value.dtype == jnp.float32 and [g.dtype for g in got] == [left, right]
    _, expected = both(hidden.astype("float32"), kernel.astype("float32"))
    for g, e in zip(got, expected, strict=True):  # rounded once more, at the end
        close(g, e, rtol=float(jnp.finfo(g.dtype).eps) / 2 + 1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "chunk_size"), [pytest.param(70, 16, marks=pytest.mark.slow), (800, None)])
def test_it_is_optax_on_the_product(rows: int, chunk_size: int | None) -> None:
    rng = np.random.default_rng(1)
    hidden, kernel = (jnp.asarray(rng.normal(size=shape), "float32") for shape in ((rows, 9), (9, 300)))
    labels = jnp.asarray(rng.integers(300, size=(10, rows // 10)))

    def ours(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return jaxce.linear_cross_entropy(
            jaxce.LinearLogits(hidden.reshape(*labels.shape, 9), kernel),
            labels,
            normalizer=jnp.array(rows / 2),
            chunk_size=chunk_size,
        )

    def theirs(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels.reshape(-1))
        return losses.sum() / (rows / 2)

    got, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, kernel) for f in (ours, theirs))
    close(got, expected, rtol=1e-5, atol=2e-6)  # float32 sums in different orders


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_derivatives_in_all_modes_and_orders(smoothing: float) -> None:
    with jax.enable_x64(True):
        fixed = arguments()
        a = {name: value for name, value in fixed.items() if name != "weights"}
        direction = {name: value for name, value in arguments(seed=1).items() if name != "weights"}

        def orders(function: Callable[..., jax.Array]) -> Any:
            def f(a: Arrays) -> jax.Array:
                return function(fixed | a, smoothing=smoothing)

            def along(a: Arrays) -> jax.Array:
                return jax.jvp(f, (a,), (direction,))[1]

            return {
                "forward": along(a),
                "forward over reverse": jax.jvp(jax.grad(f), (a,), (direction,))[1],
                "reverse over forward": jax.grad(along)(a),
                "reverse over reverse": jax.grad(
                    lambda a: sum(jnp.vdot(g, direction[name]) for name, g in jax.grad(f)(a).items())
                )(a),
            }

        close(*(quick(lambda f=f: orders(f))() for f in (fused, plain)), rtol=1e-10, atol=1e-12)


def test_vmap_over_hidden_states_and_kernels() -> None:
    with jax.enable_x64(True):
        a = arguments()
        a["soft_cap"] = jnp.full((), 1e3)
        sizes = 1, 0.5, 30  # with the last a class is far above those that are looked at first
        several = {name: jnp.stack([size * a[name] for size in sizes]) for name in ("hidden", "kernel")}
        both = jax.value_and_grad(lambda varying: fused(a | varying))
        alone = quick(both)
        single = [alone({name: value[i] for name, value in several.items()}) for i in range(3)]
        close(quick(jax.vmap(both))(several), jax.tree.map(lambda *leaves: jnp.stack(leaves), *single))


def test_memory_under_vmap() -> None:
    """That of all examples at once: a loop for each of them would choose between arrays of all logits."""
    shapes = (4, 64, 8), (8, 4096), (4, 64)
    hidden, kernel, labels = map(jax.ShapeDtypeStruct, shapes, ("float32", "float32", "int32"))

    def mean(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return jaxce.linear_cross_entropy(jaxce.LinearLogits(hidden, kernel), labels)

    def means(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(mean, (0, None, 0))(hidden, kernel, labels))

    whole, mapped = (
        jax.jit(jax.value_and_grad(f, (0, 1))).lower(hidden, kernel, labels).compile().memory_analysis()
        for f in (mean, means)
    )
    # The CPU's product for each sequence copies the exponentials, one of two arrays.
    assert mapped.temp_size_in_bytes < 1.6 * whole.temp_size_in_bytes


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_vmap_over_nothing(chunk_size: int | None) -> None:
    def loss(hidden: jax.Array, weights: jax.Array) -> jax.Array:
        logits = jaxce.LinearLogits(hidden, jnp.ones((3, 4)))
        return jaxce.linear_cross_entropy(logits, jnp.array([0, 1]), weights, chunk_size=chunk_size)

    slopes = jax.vmap(jax.grad(loss, (0, 1)))(jnp.ones((0, 2, 3)), jnp.ones((0, 2)))
    assert [g.shape for g in slopes] == [(0, 2, 3), (0, 2)]


def test_a_row_of_weight_0_may_hold_anything() -> None:
    a = arguments("float32")
    spoiled = a | {"hidden": a["hidden"].at[3].set(jnp.nan)}
    both = quick(jax.value_and_grad(fused))
    close(both(spoiled), both(a), rtol=0, atol=0)
    _, nothing = both(a | {"weights": jnp.zeros(EXAMPLES)})
    assert not jnp.any(nothing["hidden"]) and not jnp.any(nothing["kernel"])


def test_half_precision_is_summed_in_float32() -> None:
    """Ten thousand equal parts of a kernel's gradient: a bfloat16 sum would stop growing at 2^8 of them."""
    hidden, kernel = jnp.ones((10_000, 1), "bfloat16"), jnp.zeros((1, 2), "bfloat16")
    labels = jnp.zeros(10_000, "int32")
    gradient = jax.jit(
        jax.grad(lambda k: jaxce.linear_cross_entropy(jaxce.LinearLogits(hidden, k), labels, chunk_size=7))
    )(kernel)
    assert gradient.dtype == "bfloat16"
    close(gradient, np.array([[-0.5, 0.5]]), rtol=0, atol=0)


def test_memory_is_a_chunk_and_the_gradient() -> None:
    n, d, v, chunk = 512, 8, 4096, 32
    arrays = jax.ShapeDtypeStruct((n, d), "float32"), jax.ShapeDtypeStruct((d, v), "float32")
    labels = jax.ShapeDtypeStruct((n,), "int32")

    def loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return jaxce.linear_cross_entropy(jaxce.LinearLogits(hidden, kernel), labels, chunk_size=chunk)

    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays, labels).compile()
    temporary = program.memory_analysis().temp_size_in_bytes
    # Two arrays of a chunk's logits and the gradients, twice for what is small: far from the logits of all examples.
    assert temporary < 2 * 4 * (2 * chunk * v + n * d + d * v) < 4 * n * v / 3


def test_an_empty_batch() -> None:
    def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return jaxce.linear_cross_entropy(jaxce.LinearLogits(hidden, kernel), jnp.zeros((0,), "int32"))

    value, (by_hidden, by_kernel) = jax.value_and_grad(loss, (0, 1))(jnp.ones((0, 2)), jnp.ones((2, 3)))
    assert value == 0 and by_hidden.shape == (0, 2) and not jnp.any(by_kernel)


@pytest.mark.parametrize(
    ("wrong", "error", "argument"),
    [
        ({"logits": jnp.zeros((2, 3))}, TypeError, "logits"),
        ({"labels": jnp.zeros(2)}, TypeError, "labels"),
        ({"labels": jnp.zeros(3, "int32")}, ValueError, "labels"),
        ({"weights": jnp.zeros(3)}, ValueError, "weights"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"has_aux": 1}, TypeError, "has_aux"),
        ({"has_aux": jnp.ones(2)}, TypeError, "has_aux"),
        ({"chunk_size": jnp.ones(2)}, TypeError, "chunk_size"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing"),
        ({"class_weights": jnp.zeros(2)}, ValueError, "class_weights"),
        ({"z_loss": float("nan")}, ValueError, "z_loss"),
        ({"normalizer": jnp.zeros(2)}, ValueError, "normalizer"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], argument: str) -> None:
    right = {"logits": jaxce.LinearLogits(jnp.zeros((2, 4)), jnp.zeros((4, 3))), "labels": jnp.zeros(2, "int32")}
    with pytest.raises(error, match=f"(linear_cross_entropy|weighted_mean): .*{argument} must (?!be a Python value)"):
        jaxce.linear_cross_entropy(**(right | wrong))


def test_wrong_options_of_sharded_classes() -> None:
    """Errors name the function that was called, also where it takes the losses of another."""

    def loss(kernel: jax.Array) -> jax.Array:
        logits = jaxce.LinearLogits(jnp.zeros((2, 4)), kernel, axis_name="parts")
        return jaxce.linear_cross_entropy(logits, jnp.zeros(2, "int32"), label_smoothing=2.0)

    with pytest.raises(ValueError, match="linear_cross_entropy: label_smoothing must"):
        jax.vmap(loss, axis_name="parts")(jnp.zeros((2, 4, 3)))
