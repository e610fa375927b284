"""Losses on meshes of eight simulated devices, their values and what they cost: test_sharded.py runs this in a process that
has them.

By hand: ``XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/losses_on_a_mesh.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce
from jaxce import _inputs

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import programs

N, D, V = 4, 3, 12
DATA, MODEL = 2, 4
Arrays = dict[str, Any]

integer = jaxce.softmax_cross_entropy_with_integer_labels
# of logits and what comes with them, to results of the batch shape; where classes have an axis, that is a device's part
FUNCTIONS: dict[str, Callable[[Any, Arrays], Any]] = {
    "integer labels": lambda x, a: integer(x, a["labels"]),
    "integer labels, modified": lambda x, a: integer(
        x, a["labels"], label_smoothing=0.1, class_weights=a["weights"], z_loss=0.1
    ),
    "dense labels": lambda x, a: jaxce.softmax_cross_entropy(x, a["soft"]),
    "dense labels, modified": lambda x, a: jaxce.softmax_cross_entropy(
        x, a["soft"], label_smoothing=0.1, class_weights=a["weights"], z_loss=0.1
    ),
    "focal, integer": lambda x, a: jaxce.softmax_focal_loss(x, a["labels"]),
    "focal, dense": lambda x, a: jaxce.softmax_focal_loss(x, a["soft"], gamma=1.5),
    "poly, integer": lambda x, a: jaxce.poly_loss_cross_entropy(x, a["labels"]),
    "poly, dense": lambda x, a: jaxce.poly_loss_cross_entropy(x, a["soft"]),
    "statistics": lambda x, a: jaxce.softmax_statistics(x, a["labels"])[:3],
    "logsumexp": lambda x, a: jaxce.logsumexp(x),
    "entropy": lambda x, a: jaxce.entropy_with_logits(x, base=2),
    "cross-entropy, from": lambda x, a: jaxce.cross_entropy_with_logits(x, a["other"]),
    "cross-entropy, to": lambda x, a: jaxce.cross_entropy_with_logits(a["other"], x),
    "relative entropy, from": lambda x, a: jaxce.relative_entropy_with_logits(x, a["other"]),
    "relative entropy, to": lambda x, a: jaxce.relative_entropy_with_logits(a["other"], x),
    "Jensen-Shannon": lambda x, a: jaxce.jensen_shannon_divergence_with_logits(x, a["other"]),
    "Jensen-Shannon, weighted": lambda x, a: jaxce.jensen_shannon_divergence_with_logits(x, a["other"], weight=0.2),
    "binary, sparse labels": lambda x, a: jaxce.sigmoid_binary_cross_entropy_with_sparse_labels(
        x,
        jnp.stack([a["labels"], a["labels"] - 1], -1),
        pos_weight=a["weights"],
        groups=a["labels"] % 2,
        class_groups=(a["bias"] > 0).astype("int32"),
    ),
}
SPECS: dict[str, P] = {
    "logits": P("data", "model"),
    "hidden": P("data"),
    "kernel": P(None, "model"),
    "bias": P("model"),
    "labels": P("data"),
    "soft": P("data", "model"),
    "weights": P("model"),
    "other": P("data", "model"),
}


def arrays(dtype: str = "float64", classes: int = V) -> Arrays:
    """Logits, as an array and as a product, and what comes with them; a label on each device's classes."""
    rng = np.random.default_rng(0)
    soft = rng.exponential(size=(N, classes)) * (np.arange(classes) % 3 > 0)
    made = {
        "logits": 2 * rng.normal(size=(N, classes)),
        "hidden": rng.normal(size=(N, D)),
        "kernel": rng.normal(size=(D, classes)),
        "bias": rng.normal(size=classes),
        "soft": soft / soft.sum(-1, keepdims=True),
        "weights": rng.exponential(size=classes),
        "other": rng.normal(size=(N, classes)),
    }
    return {n: v.astype(dtype) for n, v in made.items()} | {"labels": np.array([0, 4, 7, classes - 1], np.int32)}


BY_ROWS = P("data")


def mesh(types: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((DATA, MODEL), ("data", "model"), axis_types=(types,) * 2)


def logits_of(kind: str, a: Arrays, axis_name: Any = None) -> Any:
    """The logits of that kind: whole, or a device's part."""
    if kind == "product":
        return a["hidden"] @ a["kernel"] + a["bias"][None]
    if kind == "array":
        return a["logits"] if axis_name is None else jaxce.ShardedLogits(a["logits"], axis_name)
    size = None if kind == "linear" else 2
    return jaxce.LinearLogits(a["hidden"], a["kernel"], bias=a["bias"], block_size=size, axis_name=axis_name)


KINDS = ["array", "linear", "linear, blocks"]
PLAIN = {"array": "array", "linear": "product", "linear, blocks": "product"}  # the arrays that are compared with


def scalar(tree: Any) -> Any:
    """One number in which every result counts, with weights that no symmetry cancels."""
    leaves = jax.tree.leaves(tree)
    return sum(jnp.sum(v * jnp.sin(1 + i + jnp.arange(v.size, dtype=v.dtype))) for i, v in enumerate(leaves))


def results(names: tuple[str, ...], kind: str, a: Arrays, axis_name: Any = None) -> dict[str, Any]:
    """These functions' results."""
    if axis_name is not None:
        a = a | {"other": jaxce.ShardedLogits(a["other"], axis_name)}
    return {name: FUNCTIONS[name](logits_of(kind, a, axis_name), a) for name in names}


def on_mesh(function: Callable[[Arrays], Any], check_vma: bool = True, out_specs: Any = BY_ROWS) -> Any:
    """A function of each device's part as one of the whole."""
    return jax.shard_map(function, mesh=mesh(), in_specs=(SPECS,), out_specs=out_specs, check_vma=check_vma)


def slopes_and_values(function: Callable[[Arrays], Any], floats: Arrays, others: Arrays) -> Any:
    """The gradient of one number in which all results count, and these, from one program."""

    def loss(floats: Arrays) -> Any:
        values = function(floats | others)
        return scalar(values), values

    return quick(jax.grad(loss, has_aux=True))(floats)


def close(got: Any, expected: Any, rtol: float = 1e-12, atol: float = 1e-13) -> None:
    """In float64, where both sides are exact but for 1e-16 times the few operations of twelve classes."""
    got, expected = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (got, expected))
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        assert got[path].shape == value.shape and got[path].dtype == value.dtype
        np.testing.assert_allclose(got[path], value, rtol, atol, err_msg=jax.tree_util.keystr(path))


FLOATS = [name for name in SPECS if name != "labels"]
FEW = ("integer labels, modified",)
names = pytest.mark.parametrize(
    "names", [pytest.param(FEW, id="few"), pytest.param(tuple(FUNCTIONS), id="all", marks=pytest.mark.slow)]
)


def split(a: Arrays) -> tuple[Arrays, Arrays]:
    return {n: a[n] for n in FLOATS}, {"labels": a["labels"]}


def some(*chosen: tuple[Any, ...]) -> Any:
    """Kinds of logits with and without account of what varies; the others on request."""
    return pytest.mark.parametrize(
        ("kind", "check_vma"),
        [pytest.param(k, c, marks=() if (k, c) in chosen else pytest.mark.slow) for k in KINDS for c in (True, False)],
    )


# --- inside of shard_map ----------------------------------------------------------------------------------------------


@names
@some(("linear, blocks", True), ("array", False))
def test_values_and_gradients(names: tuple[str, ...], kind: str, check_vma: bool) -> None:
    with jax.enable_x64(True):
        args = split(arrays())
        sharded = on_mesh(lambda a: results(names, kind, a, "model"), check_vma)
        close(slopes_and_values(sharded, *args), slopes_and_values(lambda a: results(names, PLAIN[kind], a), *args))


@some()
def test_higher_orders(kind: str, check_vma: bool) -> None:
    """Forward over reverse, reverse over forward, and vmap."""
    with jax.enable_x64(True):
        floats, labels = split(arrays())
        directions = {n: jnp.cos(1 + jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape) for n, v in floats.items()}

        def orders(f: Callable[[Arrays], Any]) -> Any:
            def value(floats: Arrays) -> Any:
                return scalar(f(floats | labels))

            def along(floats: Arrays) -> Any:
                return jax.jvp(value, (floats,), (directions,))[1]

            def all_orders(floats: Arrays) -> Any:
                twice = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), floats)
                return (
                    jax.jvp(jax.grad(value), (floats,), (directions,)),
                    jax.grad(along)(floats),
                    jax.vmap(value)(twice),
                )

            return quick(all_orders)(floats)

        sharded = on_mesh(lambda a: FUNCTIONS["statistics"](logits_of(kind, a, "model"), a), check_vma)
        whole = orders(lambda a: FUNCTIONS["statistics"](logits_of(PLAIN[kind], a), a))
        close(orders(sharded), whole, rtol=1e-11, atol=1e-12)


@names
@pytest.mark.parametrize("kind", [pytest.param("array", marks=pytest.mark.slow), "linear, blocks"])
def test_derivatives_taken_inside(names: tuple[str, ...], kind: str) -> None:
    """First and second: what is the same on all devices of an axis (hidden states) has all of its own on each of them."""
    with jax.enable_x64(True):
        a = arrays()
        specs = {n: P(*(None if part == "data" else part for part in SPECS[n])) for n in SPECS}

        def slopes(a: Arrays, axis_name: Any = None) -> Any:
            floats, labels = split(a)
            chosen = PLAIN[kind] if axis_name is None else kind
            slope = jax.grad(lambda floats: scalar(results(names, chosen, floats | labels, axis_name)))
            return jax.jvp(slope, (floats,), (jax.tree.map(jnp.cos, floats),))

        out_specs = ({n: specs[n] for n in FLOATS},) * 2
        inside = jax.shard_map(lambda a: slopes(a, "model"), mesh=mesh(), in_specs=(specs,), out_specs=out_specs)
        close(quick(inside)(a), quick(slopes)(a))


@pytest.mark.parametrize("kind", [pytest.param("array", marks=pytest.mark.slow), "linear, blocks"])
def test_padded_classes_do_not_count(kind: str) -> None:
    """Eleven classes on four devices, the twelfth NaN and masked, also where it is smoothed over."""

    def loss(a: Arrays, where: Any = None, axis_name: Any = None) -> Any:
        x = logits_of(PLAIN[kind] if axis_name is None else kind, a, axis_name)
        value = integer(x, a["labels"], where=where, label_smoothing=0.1, class_weights=a["weights"], z_loss=0.1)
        return value, jaxce.entropy_with_logits(x, where=where)

    with jax.enable_x64(True):
        a = arrays(classes=V - 1)
        padded = {
            n: np.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, 1)], constant_values=np.nan) if "model" in SPECS[n] else v
            for n, v in a.items()
        }

        def part(a: Arrays) -> Any:
            place = jax.lax.axis_index("model") * (V // MODEL) + jnp.arange(V // MODEL, dtype="int32")
            return loss(a, (place < V - 1)[None], "model")

        name = "logits" if kind == "array" else "kernel"
        (slope, values), (right, expected) = (
            slopes_and_values(f, {name: given[name]}, given) for f, given in ((on_mesh(part), padded), (loss, a))
        )
        close(values, expected)
        close(slope[name][:, :-1], right[name])
        assert not slope[name][:, -1].any()


def test_mean_loss_of_a_part_of_the_batch() -> None:
    """Data-parallel alone: each device's mean formed in one pass, with its gradient."""
    a = arrays("float32")

    def part(a: Arrays) -> Any:
        return jax.lax.pmean(jaxce.linear_cross_entropy(logits_of("linear", a), a["labels"], chunk_size=1), "data")

    by_rows = jax.shard_map(part, mesh=mesh(), in_specs=(LAYOUTS["batch"],), out_specs=P())
    got = quick(jax.value_and_grad(lambda w: by_rows(a | {"kernel": w})))(a["kernel"])
    right = quick(jax.value_and_grad(lambda w: jnp.mean(integer(a["hidden"] @ w + a["bias"][None], a["labels"]))))
    for value, expected in zip(got, right(a["kernel"]), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)  # float32, sums in another order


WAYS = ["shard_map", "Explicit", "Auto", "no account"]
DEFAULT = [("z_loss", way) for way in WAYS[:2]]
MORE = [*(("z_loss", way) for way in WAYS[2:]), *(("label_smoothing", way) for way in WAYS)]


def orders(f: Callable[[Arrays], Any], a: Arrays, has_aux: bool = False) -> Any:
    """Value, gradient and their derivative in a direction, and those of what comes beside the value."""

    @quick
    def all_orders(floats: Arrays, labels: Any) -> Any:
        slopes = jax.value_and_grad(lambda x: f(x | {"labels": labels}), has_aux=has_aux)
        return jax.jvp(slopes, (floats,), (jax.tree.map(jnp.cos, floats),))

    return jax.device_get(all_orders({n: v for n, v in a.items() if n != "labels"}, a["labels"]))


def orders_on_mesh(way: str, f: Callable[..., Any], a: Arrays, has_aux: bool = False) -> Any:
    """Those of a function of parts, to a mean and what is told of each row; or of arrays, as they are sharded."""
    specs = {n: SPECS.get(n, P("data")) for n in a}
    if way in ("Auto", "Explicit"):
        return orders(
            f, {n: jax.device_put(v, NamedSharding(mesh(AxisType[way]), specs[n])) for n, v in a.items()}, has_aux
        )
    part = functools.partial(f, axis_name="model")
    out_specs = (P(), P("data")) if has_aux else P()
    check_vma = way == "shard_map"
    return orders(
        jax.shard_map(part, mesh=mesh(), in_specs=(specs,), out_specs=out_specs, check_vma=check_vma), a, has_aux
    )


def with_rows() -> Arrays:
    """Logits as a product, and weights of the rows."""
    a, names = arrays(), ("hidden", "kernel", "bias", "weights", "labels")
    return {n: a[n] for n in names} | {"rows": np.array([1.0, 5.0, 0.5, 2.0])}


def rows_with_options() -> Arrays:
    """Enough rows for several chunks of those of each device, with options for each."""
    a = with_rows() | {"temperature": np.array([0.5, 1.0, 2.0, 0.8]), "option": np.array([0.1, 0.2, 0.3, 0.0])}
    of_rows = ("hidden", "rows", "labels", "temperature", "option")
    return a | {n: np.concatenate([np.roll(a[n], i, 0) for i in range(4)]) for n in of_rows}


@functools.cache
def mean_by_formula(option: str) -> Any:
    def mean(a: Arrays) -> Any:
        weights = jnp.where(a["labels"] == 4, 0, a["rows"])
        x = (a["hidden"] @ a["kernel"] + a["bias"][None]) / a["temperature"][:, None]
        smoothing, z_loss = (a["option"] * float(option == name) for name in ("label_smoothing", "z_loss"))
        smoothing = smoothing[:, None]
        targets = (1 - smoothing) * jax.nn.one_hot(a["labels"], V, dtype=weights.dtype) + smoothing / V
        log_normalizers = jax.nn.logsumexp(x, -1)
        losses = -jnp.sum(a["weights"][None] * targets * jax.nn.log_softmax(x), -1) + z_loss * log_normalizers**2
        aux = tuple(jnp.where(weights == 0, 0, v) for v in (losses, log_normalizers))
        return jnp.sum(weights * losses) / 3, jax.lax.stop_gradient(aux)

    return orders(mean, rows_with_options(), has_aux=True)


@pytest.mark.parametrize(("option", "way"), DEFAULT + [pytest.param(*p, marks=pytest.mark.slow) for p in MORE])
def test_mean_loss(option: str, way: str) -> None:
    """In chunks of rows, with options for each: its value, gradient, second derivative and what it tells of each row."""

    def mean(a: Arrays, axis_name: Any = None) -> Any:
        weights = jnp.where(a["labels"] == 4, 0, a["rows"])
        options = {option: a["option"], "class_weights": a["weights"], "normalizer": 3.0}
        logits = dataclasses.replace(logits_of("linear", a, axis_name), temperature=a["temperature"])
        total, aux = jaxce.linear_cross_entropy(logits, a["labels"], weights, chunk_size=1, has_aux=True, **options)
        return (total if axis_name is None else jax.lax.psum(total, "data")), aux

    with jax.enable_x64(True):
        close(orders_on_mesh(way, mean, rows_with_options(), has_aux=True), mean_by_formula(option), rtol=1e-11)


@pytest.mark.parametrize("types", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)])
@pytest.mark.parametrize("loss", ["mean, weighted", "mean", "each"])
def test_sequences_cut_into_parts(loss: str, types: AxisType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences sharded over one axis of a mesh, their positions over the other, in chunks: the formula of all rows."""
    monkeypatch.setattr(_inputs, "BLOCK", 8)
    flat = rows_with_options()
    of_rows = [n for n in flat if flat[n].shape[:1] == (16,)]

    def weights_of(a: Arrays) -> Any:
        return jnp.ones_like(a["rows"]) if loss == "mean" else jnp.where(a["labels"] == 4, 0, a["rows"])

    def mean(a: Arrays) -> Any:
        logits = dataclasses.replace(logits_of("linear", a), temperature=a["temperature"])
        options = {"z_loss": a["option"], "class_weights": a["weights"]}
        if loss == "each":
            losses = integer(logits, a["labels"], **options)
            return jnp.sum(weights_of(a) * losses) / 3, losses
        given = {} if loss == "mean" else {"weights": weights_of(a)}
        total, aux = jaxce.linear_cross_entropy(
            logits, a["labels"], **given, normalizer=3.0, chunk_size=1, has_aux=True, **options
        )
        return total, aux[0]

    def plain(a: Arrays) -> Any:
        weights = weights_of(a)
        x = logits_of("product", a) / a["temperature"][:, None]
        losses = optax.softmax_cross_entropy_with_integer_labels(x, a["labels"]) * a["weights"][a["labels"]]
        losses += a["option"] * jax.nn.logsumexp(x, -1) ** 2
        told = jnp.where((weights == 0) & (loss != "each"), 0, losses)
        return jnp.sum(weights * losses) / 3, told if loss == "each" else jax.lax.stop_gradient(told)

    with jax.enable_x64(True):
        right = orders(plain, flat, has_aux=True)
        cut = {
            n: jax.device_put(
                v.reshape(2, 8, *v.shape[1:]) if n in of_rows else v,
                NamedSharding(mesh(types), P("data", "model") if n in of_rows else P()),
            )
            for n, v in flat.items()
        }
        got = orders(mean, cut, has_aux=True)
        close(jax.tree.map(lambda x, like: x.reshape(like.shape), got, right), right, rtol=1e-11)


@functools.cache
def mean_of_lists_by_formula() -> Any:
    def mean(a: Arrays) -> Any:
        x, labels = a["hidden"] @ a["kernel"] + a["bias"][None], jnp.stack([a["labels"], a["labels"] // 2], -1)
        t = jax.nn.one_hot(labels, V, dtype=x.dtype).max(-2)
        losses = (a["weights"][None] * t * jax.nn.softplus(-x) + (1 - t) * jax.nn.softplus(x)).sum(-1)
        return jnp.sum(a["rows"] * losses) / 3

    return orders(mean, with_rows())


@pytest.mark.parametrize("way", ["shard_map", "Auto", pytest.param("Explicit", marks=pytest.mark.slow)])
def test_mean_loss_of_lists_of_labels(way: str) -> None:
    """Its gradients and a second derivative, with classes and rows sharded, are the formula's."""

    def mean(a: Arrays, axis_name: Any = None) -> Any:
        labels = jnp.stack([a["labels"], a["labels"] // 2], -1)
        logits = logits_of("linear", a, axis_name)
        total = jaxce.linear_sigmoid_binary_cross_entropy(
            logits, labels, a["rows"], pos_weight=a["weights"], normalizer=3.0
        )
        return total if axis_name is None else jax.lax.psum(total, "data")

    with jax.enable_x64(True):
        close(orders_on_mesh(way, mean, with_rows()), mean_of_lists_by_formula(), rtol=1e-11)


def test_masks_and_labels() -> None:
    """Rows that don't count lie on one device, a device has no class in some row, and labels are anywhere or nowhere."""
    a = arrays("float32")
    x = a["logits"]
    x[1, 3:6] = -np.inf  # no class of the second device
    x[0] = np.nan
    x[3, [2, 5]] = 9.0  # the first of two devices with the maximum
    a["labels"] = np.array([-100, 7, 12, 5], np.int32)
    rows = np.array([False, True, True, True])

    def part(a: Arrays, rows: Any) -> Any:
        return jaxce.softmax_statistics(jaxce.ShardedLogits(a["logits"], "model"), a["labels"], where=rows)

    def whole(a: Arrays, rows: Any) -> Any:
        return jaxce.softmax_statistics(a["logits"], a["labels"], where=rows)

    def slope_and_statistics(of: Any) -> Any:
        def entropies(x: Any) -> Any:
            statistics = of(a | {"logits": x}, rows)
            return jnp.sum(statistics.entropy), statistics

        return jax.device_get(quick(jax.grad(entropies, has_aux=True))(x))

    sharded = jax.shard_map(part, mesh=mesh(), in_specs=({n: SPECS[n] for n in a}, P("data")), out_specs=P("data"))
    (gradient, got), (right, expected) = slope_and_statistics(sharded), slope_and_statistics(whole)
    for value, same in zip(got, expected, strict=True):
        np.testing.assert_allclose(value, same, rtol=1e-6)  # twelve classes in float32
    assert np.isnan(got.nll[2]) and got.prediction[3] == 2
    np.testing.assert_allclose(gradient, right, rtol=3e-6, atol=1e-7)


def test_confident_rows_keep_their_digits() -> None:
    """Whichever device has the top class, and whichever the label: the loss and the gradient to the last few ulp."""
    classes = 64
    rows, labels = [], []
    rng = np.random.default_rng(1)
    for loss in (1e-7, 1e-20, 1e-30):
        for top in (0, 15, 16, 63):
            row = helpers.cast(rng.normal(size=classes) + math.log(loss / classes), "float32")
            row[top] = 0.0
            rows += [row + 3, row]
            labels += [top, (top + 20) % classes]
    x, y = np.stack(rows).astype(np.float32), np.array(labels)

    def losses(x: Any, y: Any) -> Any:
        return integer(jaxce.ShardedLogits(x, "model"), y)

    @jax.jit
    def losses_and_slopes(x: Any, y: Any) -> Any:
        return sharded(x, y), jax.grad(lambda x: jnp.sum(sharded(x, y)))(x)

    sharded = jax.shard_map(losses, mesh=mesh(), in_specs=(P("data", "model"), P("data")), out_specs=P("data"))
    exact = helpers.rows(x)
    value, slope = jax.device_get(losses_and_slopes(x, y))
    error = helpers.ulp_error(value, [r.nll(k) for r, k in zip(exact, labels, strict=True)])
    assert error.max() <= 4  # of the sums of 16 exps each and the change of anchor; measured 1.6
    error = helpers.ulp_error(slope[np.arange(len(y)), y], [-r.not_p(k) for r, k in zip(exact, labels, strict=True)])
    assert error.max() <= 5  # as on one device


def test_log_softmax_of_a_part() -> None:
    def both(a: Arrays, axis_name: Any = None) -> Any:
        return [jaxce.log_softmax(logits_of(kind, a, axis_name)) for kind in ("array", "linear")]

    a = arrays("float32")
    sharded = on_mesh(functools.partial(both, axis_name="model"), out_specs=P("data", "model"))
    close(quick(sharded)(a), quick(both)(a), rtol=1e-5)  # logits in another order


def test_classes_on_any_axis_and_several_mesh_axes() -> None:
    x = np.random.default_rng(0).normal(size=(3, 8, 2)).astype(np.float32)
    y = np.array([[0, 7], [3, 4], [5, 6]], np.int32)
    part = jax.shard_map(
        lambda x, y: integer(jaxce.ShardedLogits(x, ("data", "model")), y, axis=1),
        mesh=mesh(),
        in_specs=(P(None, ("data", "model")), P()),
        out_specs=P(),
    )
    np.testing.assert_allclose(jax.jit(part)(x, y), integer(x, y, axis=1), rtol=1e-6)  # eight classes in float32


@functools.cache
def evaluated() -> Any:
    a = arrays("float32")
    return quick(lambda x, y: jaxce.metrics.Evaluation.from_batch(x, y, k=2).compute())(a["logits"], a["labels"])


def test_metrics_of_sharded_logits() -> None:
    def part(a: Arrays) -> Any:
        x = jaxce.ShardedLogits(a["logits"], "model")
        return jaxce.metrics.Evaluation.from_batch(x, a["labels"], k=2).psum("data").compute()

    got = quick(on_mesh(part, out_specs=P()))(arrays("float32"))
    close(jax.tree.leaves(got), jax.tree.leaves(evaluated()), rtol=2e-6)  # a handful of float32 operations


def test_metrics_on_an_explicit_mesh() -> None:
    a = arrays("float32")
    x, y = (jax.device_put(a[n], NamedSharding(mesh(AxisType.Explicit), SPECS[n])) for n in ("logits", "labels"))
    got = quick(lambda x, y: jaxce.metrics.Evaluation.from_batch(x, y, k=2).compute())(x, y)
    close(jax.tree.leaves(got), jax.tree.leaves(evaluated()), rtol=2e-6)  # a handful of float32 operations


# --- under jit alone --------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, P]] = {
    "batch": {n: P(*(None if part == "model" else part for part in s)) for n, s in SPECS.items()},
    "class": {n: P(*(None if part == "data" else part for part in s)) for n, s in SPECS.items()},
    "both": SPECS,
    "features": SPECS | {"hidden": P("data"), "kernel": P("data", "model")},
    "one axis for batch and classes": SPECS | {"kernel": P(None, "data"), "bias": P("data")},
}


def table() -> list[Any]:
    rows = []
    for types in (AxisType.Auto, AxisType.Explicit):
        for layout in LAYOUTS:
            for name in WITH_LOG_SOFTMAX:
                for kind in ("array", "linear, blocks"):
                    if layout not in ("batch", "class", "both") and kind == "array":
                        continue
                    quickly = (types, layout, name, kind) in DEFAULT
                    marks = () if quickly else pytest.mark.slow
                    rows.append(
                        pytest.param(types, layout, name, kind, marks=marks, id=f"{types.name}-{layout}-{name}-{kind}")
                    )
    return rows


WITH_LOG_SOFTMAX = FUNCTIONS | {"log_softmax": lambda x, a: jaxce.log_softmax(x)}
DEFAULT = [
    (AxisType.Explicit, "both", "cross-entropy, to", "array"),
    (AxisType.Explicit, "both", "statistics", "linear, blocks"),
    (AxisType.Explicit, "features", "integer labels", "linear, blocks"),
    (AxisType.Auto, "both", "dense labels", "array"),
    (AxisType.Auto, "features", "integer labels", "linear, blocks"),
]


def four_features() -> Arrays:
    a = arrays()
    return a | {"hidden": np.pad(a["hidden"], ((0, 0), (0, 1))), "kernel": np.pad(a["kernel"], ((0, 1), (0, 0)))}


def slopes_under_jit(name: str, kind: str, a: Arrays) -> Any:
    def both(floats: Arrays, labels: Arrays) -> Any:
        def loss(floats: Arrays) -> Any:
            everything = floats | labels
            value = WITH_LOG_SOFTMAX[name](logits_of(kind, everything), everything)
            return sum(jnp.sum(v * jnp.cos(v)) for v in jax.tree.leaves(value)), value

        return jax.grad(loss, has_aux=True)(floats)

    return jax.device_get(quick(both)(*split(a)))


@functools.cache
def slopes_on_one_device(name: str, kind: str) -> Any:
    return slopes_under_jit(name, kind, four_features())


@pytest.mark.parametrize(("types", "layout", "name", "kind"), table())
def test_arrays_sharded_under_jit(types: AxisType, layout: str, name: str, kind: str) -> None:
    m = mesh(types)
    with jax.enable_x64(True):
        placed = {n: jax.device_put(v, NamedSharding(m, LAYOUTS[layout][n])) for n, v in four_features().items()}
        close(slopes_under_jit(name, kind, placed), slopes_on_one_device(name, PLAIN[kind]))


def test_vmap_over_an_axis_sharded_explicitly() -> None:
    """Where Optax's loss raises."""
    a = arrays("float32")
    m = mesh(AxisType.Explicit)
    x = jax.device_put(a["logits"], NamedSharding(m, P("data", "model")))
    y = jax.device_put(a["labels"], NamedSharding(m, P("data")))
    got = jax.jit(jax.vmap(integer))(x, y)
    assert jax.typeof(got).sharding.spec == P("data")
    np.testing.assert_allclose(got, integer(a["logits"], a["labels"]), rtol=1e-6)  # twelve classes in float32


def test_options_leave_explicit_axes_as_they_are() -> None:
    a = arrays("float32")
    placed = {n: jax.device_put(a[n], NamedSharding(mesh(AxisType.Explicit), SPECS[n])) for n in SPECS if n in a}
    options = {"class_weights": placed["weights"], "label_smoothing": 0.1, "z_loss": np.float32(0.1)}
    for kind in ("array", "linear, blocks"):
        got = jax.eval_shape(lambda a, k=kind: integer(logits_of(k, a), a["labels"], **options), placed)
        assert got.sharding.spec == P("data")


@pytest.mark.parametrize("kind", ["array", "linear, blocks"])
def test_several_labels_and_one_target_for_all_rows_on_an_explicit_mesh(kind: str) -> None:
    """Labels, weights and a distribution that have not the logits' axes, in value and gradient."""
    a = arrays("float32")
    several = np.stack([a["labels"], a["labels"][::-1]], -1)
    shares = np.tile(np.float32([0.75, 0.5]), (len(several), 1))

    def loss(a: Arrays, several: Any, shares: Any, target: Any, kind: str = kind) -> Any:
        x = logits_of(kind, a)
        sparse = jaxce.softmax_cross_entropy_with_sparse_labels(x, several, shares, label_smoothing=0.1)
        return (sparse + jaxce.softmax_cross_entropy(x, target) + jaxce.softmax_focal_loss(x, target)).sum()

    specs = {n: SPECS[n] for n in ("logits", "hidden", "kernel", "bias") if n in a}
    floats = {n: a[n] for n in specs}
    target = a["weights"] / a["weights"].sum()
    m = mesh(AxisType.Explicit)
    placed = [
        jax.device_put(x, NamedSharding(m, P(*s)))
        for x, s in ((several, ("data",)), (shares, ("data",)), (target, ("model",)))
    ]
    on_devices = {n: jax.device_put(x, NamedSharding(m, specs[n])) for n, x in floats.items()}
    plain = functools.partial(loss, kind=PLAIN[kind])
    got = quick(jax.value_and_grad(loss, (0, 2, 3)))(on_devices, *placed)
    right = quick(jax.value_and_grad(plain, (0, 2, 3)))(floats, several, shares, target)
    close(got, right, rtol=1e-5, atol=1e-5)  # sums of some dozens of float32 numbers in another order


def test_arrays_sharded_in_other_ways_than_the_logits() -> None:
    """Explicit axes: what comes with `LinearLogits` may be sharded by rows over another axis, or not at all."""
    a = arrays("float32")
    m = mesh(AxisType.Explicit)
    a["temperature"] = np.float32([0.5, 1.0, 2.0, 0.8])
    several, shares = np.stack([a["labels"], a["labels"][::-1]], -1), np.full((N, 2), 0.5, np.float32)
    rows, entries = np.arange(N) != 1, np.arange(V)[None] % 3 != np.arange(N)[:, None] % 3

    def losses(a: Arrays, several: Any, shares: Any, rows: Any, entries: Any) -> Any:
        x = dataclasses.replace(logits_of("linear, blocks", a), temperature=a["temperature"])
        for where in (rows, entries):
            yield jaxce.softmax_cross_entropy_with_sparse_labels(x, several, shares, where=where)
            yield jaxce.sigmoid_binary_cross_entropy_with_sparse_labels(x, several, shares, where=where)
            yield integer(x, several[:, 0], where=where)
            yield jaxce.softmax_cross_entropy(x, a["soft"], where=where)
        yield jaxce.linear_cross_entropy(x, several[:, 0], shares[:, 0])
        yield jaxce.linear_sigmoid_binary_cross_entropy(x, several, shares[:, 0], label_weights=shares)

    def put(x: Any, *spec: Any) -> Any:
        return jax.device_put(x, NamedSharding(m, P(*spec)))

    linear = {"hidden": put(a["hidden"], "data"), "kernel": put(a["kernel"]), "bias": put(a["bias"])}
    linear |= {"soft": put(a["soft"], "model", "data"), "temperature": put(a["temperature"], "model")}
    all_losses = quick(lambda *args: list(losses(*args)))
    got = all_losses(linear, put(several, "model"), put(shares), put(rows, "model"), put(entries, None, "model"))
    close(got, all_losses(a, several, shares, rows, entries), rtol=1e-5)  # twelve classes in float32, in another order


def test_masks_of_entries_with_sharded_classes() -> None:
    """A label on a masked class has loss +inf, also where its device has no other class of the row; no class is NaN."""
    a = arrays("float32")
    entries = np.arange(V)[None] < V // MODEL  # the other devices have no class that takes part
    several, shares = np.array([[0, V - 1], [0, 1], [0, V], [1, -3]], np.int32), np.full((4, 2), 0.5, np.float32)

    def losses(x: Any, entries: Any) -> Any:
        where = jnp.broadcast_to(entries, (4, entries.shape[-1]))
        return jaxce.softmax_cross_entropy_with_sparse_labels(x, several, shares, where=where)

    def part(x: Any, entries: Any) -> Any:
        return losses(jaxce.ShardedLogits(x, "model"), entries)

    by_hand = jax.shard_map(part, mesh=mesh(), in_specs=(P(None, "model"),) * 2, out_specs=P())
    got, expected = (quick(f)(a["logits"][:4], entries) for f in (by_hand, losses))
    assert np.isposinf(expected[0]) and np.isnan(expected[2:]).all()
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.slow
def test_labels_and_weights_that_are_sharded_otherwise() -> None:
    m = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    x, labels = jax.nn.log_softmax(np.random.default_rng(0).normal(size=(8, 6)).astype("float32")), np.arange(8) % 6
    where, weights = np.arange(6)[None] < 5, np.arange(8.0, dtype="float32")
    losses = {
        "nll": lambda x, y, where, _: jaxce.nll(x, y, where=where),
        "ce": lambda x, y, where, _: jaxce.categorical_cross_entropy_with_integer_labels(jnp.exp(x), y, where=where),
        "mean": lambda x, y, _, w: jaxce.weighted_mean(x, w[:, None]),
    }
    for loss in losses.values():
        slope = jax.value_and_grad(lambda x, *more, loss=loss: jnp.nan_to_num(loss(x, *more), posinf=0).sum())
        expected = slope(x, labels, where, weights)
        for axes in (("data",), ("data", "model"), (None, "model")):
            with jax.set_mesh(m):
                put = jax.device_put(x, P(*axes))
                got = slope(put, labels, jax.device_put(where, P()), jax.device_put(weights, P("data")))
            # Sums in another order: a few ulp.
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


OTHERS = np.random.default_rng(1).normal(size=(8, 8)).astype("float32")
BESIDE_SHARDED = {
    "integer": lambda x, put: integer(x, put(np.arange(8), "data")),
    "dense": lambda x, put: jaxce.softmax_cross_entropy(x, put(np.eye(8, dtype="float32"), "data")),
    "relative entropy of q": lambda x, put: jaxce.relative_entropy_with_logits(put(OTHERS, "data"), x),
    "relative entropy of p": lambda x, put: jaxce.relative_entropy_with_logits(x, put(OTHERS, None, "model")),
    "cross-entropy": lambda x, put: jaxce.cross_entropy_with_logits(put(OTHERS, None, "model"), x),
    "Jensen-Shannon": lambda x, put: jaxce.jensen_shannon_divergence_with_logits(x, put(OTHERS, "data")),
    "gamma": lambda x, put: jaxce.gamma_nll(x, 0.0, put(np.exp(OTHERS), "data")),
    "gamma, one shape": lambda x, put: jaxce.gamma_nll(x[0, 0], 0.0, put(np.exp(OTHERS), "data")),
    "multivariate normal": lambda x, put: jaxce.multivariate_normal_nll(
        x, np.eye(8, dtype="float32"), put(OTHERS, "data")
    ),
    "multivariate normal, scale": lambda x, put: jaxce.multivariate_normal_nll(
        put(OTHERS, "data"), jnp.tril(x) + 3 * jnp.eye(8), put(np.stack([OTHERS] * 4), "model", "data")
    ),
    "multivariate normal, scales": lambda x, put: jaxce.multivariate_normal_nll(
        x,
        put(np.stack([np.tril(OTHERS) + 3 * np.eye(8, dtype="float32")] * 8), "data"),
        put(OTHERS, "model"),
        where=put(np.arange(8) % 3 > 0, "model"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BESIDE_SHARDED)
def test_whole_logits_beside_sharded_arrays(name: str) -> None:
    """Value, gradient and Hessian product by an array that isn't sharded, of a loss of others that are, explicitly."""
    m = mesh(AxisType.Explicit)
    x = np.random.default_rng(0).normal(size=(8, 8)).astype("float32")

    def derivatives(put: Callable[..., Any]) -> Any:
        slope = jax.value_and_grad(lambda x: BESIDE_SHARDED[name](x, put).sum())
        here = put(x)
        return slope(here), jax.jvp(lambda x: slope(x)[1], (here,), (here,))[1]

    expected = derivatives(lambda array, *axes: array)
    with jax.set_mesh(m):
        got = derivatives(lambda array, *axes: jax.device_put(array, P(*axes)))
    chex.assert_trees_all_close(got, expected, rtol=2e-6, atol=2e-6)  # sums in another order


@pytest.mark.slow
def test_differential_entropies_of_sharded_rows() -> None:
    m = mesh(AxisType.Explicit)
    for method in ("vasicek", "van es", "ebrahimi", "correa"):
        expected = jaxce.differential_entropy(OTHERS, method=method)
        with jax.set_mesh(m):
            got = jaxce.differential_entropy(jax.device_put(OTHERS, P("data")), method=method)
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.slow
def test_a_mesh_of_automatic_and_explicit_axes() -> None:
    a = arrays("float32")
    m = jax.make_mesh((DATA, MODEL), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Explicit))
    x = jax.device_put(a["logits"], NamedSharding(m, P("data", "model")))
    y = jax.device_put(a["labels"], NamedSharding(m, P("data")))
    got = jax.jit(jax.grad(lambda x: jnp.sum(integer(x, y))))(x)
    expected = jax.grad(lambda x: jnp.sum(integer(x, a["labels"])))(a["logits"])
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-7)  # twelve classes in float32


def test_bad_shapes_are_refused_on_an_explicit_mesh() -> None:
    x = jax.device_put(np.zeros((4, 8), np.float32), NamedSharding(mesh(AxisType.Explicit), P("data", "model")))
    with pytest.raises(ValueError, match="softmax_cross_entropy_with_integer_labels: labels must have"):
        integer(x, np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="softmax_cross_entropy: labels must have"):
        jaxce.softmax_cross_entropy(x, np.zeros((3, 8), np.float32))
    with pytest.raises(ValueError, match="logsumexp: where must have"):
        jaxce.logsumexp(x, where=np.ones(3, bool))


# --- what crosses the network -----------------------------------------------------------------------------------------


def compiled(function: Callable[..., Any], *args: tuple[tuple[int, ...], P], types: AxisType = AxisType.Auto) -> Any:
    """The collectives of a float32 function of arrays with these shapes, sharded so. They and the memory, which XLA plans
    before it has machine code made, are the same in a `quick` program."""
    m = mesh(types)
    structs = [jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(m, spec)) for shape, spec in args]
    with jax.set_mesh(m) if types == AxisType.Explicit else contextlib.nullcontext():
        return programs.collectives(quick(function).lower(*structs).compile().as_text())


ROWS, FEATURES, CLASSES = 64, 16, 1024


def language_model(types: AxisType | None) -> Callable[..., Any]:
    """The mean loss by itself, or in a shard_map."""
    labels = np.arange(ROWS, dtype=np.int32) * 7

    def loss(hidden: Any, kernel: Any, y: Any, axis_name: Any = None) -> Any:
        logits = jaxce.LinearLogits(hidden, kernel, block_size=64, axis_name=axis_name)
        return integer(logits, y)

    if types is not None:
        return lambda hidden, kernel: jnp.mean(loss(hidden, kernel, labels))
    specs = P("data"), P(None, "model"), P("data")
    part = jax.shard_map(functools.partial(loss, axis_name="model"), mesh=mesh(), in_specs=specs, out_specs=P("data"))
    return lambda hidden, kernel: jnp.mean(part(hidden, kernel, labels))


@pytest.mark.parametrize("types", [None, AxisType.Explicit])
def test_bytes_on_the_network(types: AxisType | None) -> None:
    """A few [N] vectors, and with the gradient that of the hidden states and, over the batches, that of the kernel."""
    args = ((ROWS, FEATURES), P("data")), ((FEATURES, CLASSES), P(None, "model"))
    found = compiled(jax.value_and_grad(language_model(types), (0, 1)), *args, types=types or AxisType.Auto)
    assert {c.kind for c in found} == {"all-reduce"} and all(c.times == 1 for c in found)
    row = 4 * ROWS // DATA
    hidden, kernel = row * FEATURES, 4 * FEATURES * CLASSES // MODEL
    vectors = sum(c.bytes for c in found) - hidden - kernel
    assert 0 < vectors <= 6 * row + 8  # maximum, top class, label, whether it was found, others; and the mean


@pytest.mark.parametrize("kind", ["array", "linear"])
def test_nothing_large_is_gathered_with_automatic_axes(kind: str) -> None:
    """XLA decides. Each device's state of the rows, and each gradient once."""
    labels = np.arange(ROWS, dtype=np.int32)
    if kind == "array":
        args: Any = (((ROWS, CLASSES), P("data", "model")),)
        found = compiled(jax.value_and_grad(lambda x: jnp.mean(integer(x, labels))), *args)
    else:
        args = ((ROWS, FEATURES), P("data")), ((FEATURES, CLASSES), P(None, "model"))
        found = compiled(jax.value_and_grad(language_model(AxisType.Auto), (0, 1)), *args)
    row = 4 * ROWS // DATA
    gradients = 0 if kind == "array" else row * FEATURES + 4 * FEATURES * CLASSES // MODEL
    assert {c.kind for c in found} == {"all-reduce", "all-gather"}
    # The maximum, the sum and the label's logit, of each part of the classes; and the mean.
    assert 0 < sum(c.bytes * c.times for c in found) - gradients <= 3 * MODEL * row + 4


PLACES: dict[str, tuple[P, P]] = {  # of hidden states [rows, features] and of a kernel [features, classes]
    "rows": (P("data"), P()),
    "all axes for rows": (P(("data", "model")), P()),
    "classes": (P("data"), P(None, "model")),
    "all axes for classes": (P(), P(None, ("data", "model"))),
    "one axis for rows and classes": (P("data"), P(None, "data")),
    "features of the kernel": (P("data"), P("model")),
    "features of the kernel over all axes": (P(("data", "model")), P(("data", "model"))),
    "features of both": (P("data", "model"), P("model")),
    "features and classes": (P("data"), P("data", "model")),
}
USES: dict[str, Callable[[Any], Any]] = {
    "no mesh": lambda m: contextlib.nullcontext(),
    "jax.set_mesh": jax.set_mesh,
    "with mesh": lambda m: m,
}


@pytest.mark.filterwarnings("ignore:.*with mesh:DeprecationWarning")
@pytest.mark.parametrize(
    ("place", "use"),
    [
        pytest.param(
            place,
            use,
            marks=()
            if (place, use) in (("features of both", "no mesh"), ("features and classes", "with mesh"))
            else pytest.mark.slow,
        )
        for place in PLACES
        for use in USES
        # How a mesh in use shards the classes isn't known while tracing: along one axis, it is taken.
        if (place, use) != ("all axes for classes", "jax.set_mesh")
    ],
)
def test_blocks_cost_a_device_no_more_than_the_array(place: str, use: str) -> None:
    """Of memory and of the network: the kernel and its gradient cross it once each, and nothing as large as the logits."""
    rows, features, classes = 2048, 32, 8192
    m = mesh()
    hidden, kernel = (
        jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(m, spec))
        for shape, spec in zip(((rows, features), (features, classes)), PLACES[place], strict=True)
    )

    def program(loss: Callable[..., Any]) -> Any:
        gradient = jax.value_and_grad(lambda h, w: jnp.mean(integer(loss(h, w), jnp.arange(rows))), (0, 1))
        outputs = NamedSharding(m, P()), (hidden.sharding, kernel.sharding)
        return quick(gradient, out_shardings=outputs).lower(hidden, kernel).compile()

    array = program(jnp.matmul)
    with USES[use](m):
        blocks = program(jaxce.LinearLogits)
    assert blocks.memory_analysis().temp_size_in_bytes <= array.memory_analysis().temp_size_in_bytes
    found = programs.collectives(blocks.as_text())
    inputs = 4 * features * (rows + classes)
    assert sum(c.bytes * c.times for c in found) <= 2 * inputs + 4 * rows * MODEL * 4  # and parts of the rows' states


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_shard_map_over_some_axes(check_vma: bool) -> None:
    """The features of the kernel lie along the other axis, which XLA partitions; gradients taken inside and outside."""
    a = arrays("float32")
    m = mesh()
    hidden = jax.device_put(np.pad(a["hidden"], ((0, 0), (0, 1))), NamedSharding(m, P("data")))
    kernel = jax.device_put(np.pad(a["kernel"], ((0, 1), (0, 0))), NamedSharding(m, P("model")))

    def total(hidden: Any, kernel: Any, labels: Any) -> Any:
        return jnp.sum(integer(jaxce.LinearLogits(hidden, kernel, block_size=5), labels))

    def part(hidden: Any, kernel: Any, labels: Any) -> Any:
        losses, pull = jax.vjp(lambda h: integer(jaxce.LinearLogits(h, kernel, block_size=5), labels), hidden)
        return losses, pull(jnp.ones_like(losses))[0]

    of_rows = jax.shard_map(
        part,
        mesh=m,
        in_specs=(P("data"), P(), P("data")),
        out_specs=(P("data"), P("data")),
        axis_names={"data"},
        check_vma=check_vma,
    )
    inside = quick(of_rows)(hidden, kernel, a["labels"])[1]
    outside = quick(jax.grad(lambda h, w: jnp.sum(of_rows(h, w, a["labels"])[0]), (0, 1)))(hidden, kernel)
    right = quick(jax.grad(total, (0, 1)))(*jax.device_get((hidden, kernel)), a["labels"])
    for got, expected in ((inside, right[0]), *zip(outside, right, strict=True)):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)  # sums of a dozen terms of both signs


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(message: str, function: Callable[[Arrays], Any], a: Arrays | None = None, check_vma: bool = True) -> None:
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(on_mesh(function, check_vma), arrays("float32") if a is None else a)


def test_what_is_refused() -> None:
    def part(a: Arrays) -> Any:
        return jaxce.ShardedLogits(a["logits"], "model")

    def whole(a: Arrays) -> Any:
        return jax.lax.all_gather(a["soft"], "model", axis=1, tiled=True)

    def same(a: Arrays) -> Any:
        return jaxce.LinearLogits(a["hidden"], jnp.zeros((D, V)), axis_name="model")

    refused(
        "axis_name must be an axis that is mapped", lambda a: jaxce.logsumexp(jaxce.ShardedLogits(a["logits"], "mode"))
    )
    refused("labels must have the shape of the logits without", lambda a: integer(part(a), a["labels"][:1]))
    refused(
        "labels must have the shape of the logits on each", lambda a: jaxce.softmax_cross_entropy(part(a), whole(a))
    )
    refused("class_weights must have one number", lambda a: integer(part(a), a["labels"], class_weights=jnp.ones(V)))
    compare = jaxce.relative_entropy_with_logits
    refused("q_logits must be sharded over", lambda a: compare(part(a), a["other"]))
    refused("q_logits must be sharded over", lambda a: compare(part(a), jaxce.ShardedLogits(a["other"], "data")))
    refused("q_logits must have the shape", lambda a: compare(part(a), jaxce.ShardedLogits(a["other"][:, :2], "model")))
    refused(
        "kernel must have as many features",
        lambda a: jaxce.LinearLogits(a["hidden"][:, 1:], a["kernel"], axis_name="model"),
    )
    refused("logits must be sharded over 'model'", lambda a: jaxce.logsumexp(same(a)))


def test_pairs() -> None:
    """Losses of all pairs and their gradients, where both sides are sharded: by types, by hand, by XLA."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 16, 4)).astype("float32")

    def losses(a: jax.Array, b: jax.Array, t: jax.Array, **given: Any) -> Any:
        logits = jaxce.LinearLogits(a, b, class_axis=0, temperature=t, block_size=3)
        return jaxce.softmax_cross_entropy_of_pairs(logits, **given)

    def plain(a: jax.Array, b: jax.Array, t: jax.Array) -> Any:
        x = a @ b.T / t
        return [jax.nn.logsumexp(x, axis) - jnp.diagonal(x) for axis in (1, 0)]

    def scalar(of: Callable[..., Any], *args: Any) -> jax.Array:
        rows, columns = of(*args)
        weights = jnp.sin(1 + jnp.arange(16, dtype=rows.dtype))
        return jnp.sum(weights * columns) + jnp.sum(rows * rows)

    def check(of: Callable[..., Any], *args: Any) -> None:
        got = quick(jax.value_and_grad(functools.partial(scalar, of), (0, 1, 2)))(*args)
        for x, y in zip(jax.tree.leaves(got), expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)  # some eps of the largest terms, in another order

    t = jnp.float32(0.3)
    expected = jax.tree.leaves(quick(jax.value_and_grad(functools.partial(scalar, plain), (0, 1, 2)))(a, b, t))
    for types in (AxisType.Auto, AxisType.Explicit):
        m = jax.make_mesh((8,), ("x",), axis_types=(types,))
        with jax.set_mesh(m):
            check(losses, *(jax.device_put(v, NamedSharding(m, P("x"))) for v in (a, b)), t)
    m = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    by_hand = functools.partial(losses, axis_name="x")
    check(jax.shard_map(by_hand, mesh=m, in_specs=(P("x"), P("x"), P()), out_specs=P("x")), a, b, t)


@pytest.mark.parametrize("spec", [P("data", "model"), P(("data", "model"), None)], ids=["features", "rows"])
def test_pairs_sharded_by_hand_over_some_axes_of_an_explicit_mesh(spec: P) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 16, 4)).astype("float32")

    def losses(a: jax.Array, b: jax.Array) -> Any:
        return jaxce.softmax_cross_entropy_of_pairs(jaxce.LinearLogits(a, b, class_axis=0), axis_name="data")

    m = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(m):
        by_hand = jax.shard_map(losses, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
        got = quick(by_hand)(*(jax.device_put(v, NamedSharding(m, spec)) for v in (a, b)))
    x = a @ b.T
    for axis, found in zip((1, 0), got, strict=True):
        np.testing.assert_allclose(found, jax.nn.logsumexp(x, axis) - np.diagonal(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["Auto", pytest.param("Explicit", marks=pytest.mark.slow), "shard_map"])
@pytest.mark.parametrize("program", ["CLIP", "SigLIP"])
def test_pairs_cross_the_network_once(program: str, way: str) -> None:
    """The columns are gathered and their gradient is summed, once each, and beside these a few numbers of each column."""
    n, features, axes = 512, 64, ("data", "model")
    m = mesh(AxisType.Explicit if way == "Explicit" else AxisType.Auto)
    rows, everywhere = NamedSharding(m, P(axes)), NamedSharding(m, P())
    structs = [jax.ShapeDtypeStruct((n, features), "float32", sharding=rows)] * 2
    structs.append(jax.ShapeDtypeStruct((n,), "int32", sharding=rows))

    def clip(a: jax.Array, b: jax.Array, groups: jax.Array, axis_name: Any = None) -> jax.Array:
        logits = jaxce.LinearLogits(a, b, class_axis=0, temperature=0.1)
        means = map(jnp.mean, jaxce.softmax_cross_entropy_of_pairs(logits, groups=groups, axis_name=axis_name))
        total = sum(means, jnp.zeros(()))
        return total if axis_name is None else jax.lax.pmean(total, axis_name)

    def siglip(a: jax.Array, b: jax.Array, groups: jax.Array, axis_name: Any = None) -> jax.Array:
        first, all_groups = jnp.zeros((), jnp.int32), groups
        if axis_name is not None:
            first = jax.lax.axis_index(axis_name) * len(a)
            b, all_groups = (jax.lax.all_gather(x, axis_name, tiled=True) for x in (b, groups))
        elif way == "Auto":
            b = jax.lax.with_sharding_constraint(b, P())
        logits = jaxce.LinearLogits(a, b, class_axis=0, temperature=0.1)
        own = first + jnp.arange(len(a))[:, None]
        options = {"groups": groups, "class_groups": all_groups}
        total = jaxce.linear_sigmoid_binary_cross_entropy(logits, own, **options)
        return total if axis_name is None else jax.lax.pmean(total, axis_name)

    loss: Callable[..., Any] = {"CLIP": clip, "SigLIP": siglip}[program]
    if way == "shard_map":
        part = functools.partial(loss, axis_name=axes)
        loss = jax.shard_map(part, mesh=m, in_specs=(P(axes),) * 3, out_specs=P())
    gradient = quick(jax.value_and_grad(loss, (0, 1)), out_shardings=(everywhere, (rows, rows)))
    rng = np.random.default_rng(0)
    inputs = [*(rng.normal(size=(2, n, features)).astype("float32") / 8), np.arange(n, dtype="int32") // 2]
    with jax.set_mesh(m):
        step = gradient.lower(*structs).compile()
        got = step(*(jax.device_put(x, rows) for x in inputs))
    found = programs.collectives(step.as_text())
    assert all(c.times == 1 for c in found), found
    column, side = 4 * n, 4 * n * features
    large = sorted((c.kind, c.bytes / side) for c in found if c.bytes > 4 * column)
    total = ("reduce-scatter", 1 / 8) if way == "shard_map" else ("all-reduce", 1)
    assert [kind for kind, _ in large] == ["all-gather", total[0]], found
    few = 0 if program == "CLIP" else 12 * column / side  # of SigLIP XLA puts other sums into that of the gradient
    np.testing.assert_allclose([size for _, size in large], [1, total[1]], rtol=few)
    # Numbers of the columns: of the positive, its shift, groups, sums for each direction and again at another shift.
    assert sum(c.bytes for c in found) <= 2 * side + 12 * column, found

    def plain(a: jax.Array, b: jax.Array) -> jax.Array:
        """The formulas, of which an item's duplicate is left out."""
        x, own = a @ b.T / 0.1, jnp.eye(n, dtype=bool)
        there = own | (inputs[2][:, None] != inputs[2])
        if program == "SigLIP":
            return jnp.sum(jnp.where(there, jax.nn.softplus(jnp.where(own, -x, x)), 0)) / n
        means = (jax.nn.logsumexp(x, axis, where=there) - jnp.diagonal(x) for axis in (0, 1))
        return sum(map(jnp.mean, means), jnp.zeros(()))

    expected = quick(jax.value_and_grad(plain, (0, 1)))(*inputs[:2])
    # Sums of 512 terms in other orders; a gradient's entries are differences of numbers up to its largest.
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5 * np.abs(y).max())
