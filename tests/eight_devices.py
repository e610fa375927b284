"""Sharded logits on eight simulated devices: what test_sharded.py runs in a process that has them.

By hand: ``XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/eight_devices.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxce

N, D, V = 4, 3, 12
DATA, MODEL = 2, 4
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
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
    labels = jnp.asarray([0, 4, 7, classes - 1], "int32")
    return {name: jnp.asarray(value, dtype) for name, value in made.items()} | {"labels": labels}


def mesh(types: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((DATA, MODEL), ("data", "model"), axis_types=(types,) * 2)


def logits_of(kind: str, a: Arrays, axis_name: Any = None) -> Any:
    """The logits of that kind: whole, or a device's part."""
    if kind == "array":
        return a["logits"] if axis_name is None else jaxce.ShardedLogits(a["logits"], axis_name)
    size = None if kind == "linear" else 2
    return jaxce.LinearLogits(a["hidden"], a["kernel"], bias=a["bias"], block_size=size, axis_name=axis_name)


KINDS = ["array", "linear", "linear, blocks"]


def scalar(tree: Any) -> Any:
    """One number in which every result counts, with weights that no symmetry cancels."""
    leaves = jax.tree.leaves(tree)
    return sum(jnp.sum(v * jnp.sin(1 + i + jnp.arange(v.size, dtype=v.dtype))) for i, v in enumerate(leaves))


def results(kind: str, a: Arrays, axis_name: Any = None) -> dict[str, Any]:
    """Each function's results."""
    if axis_name is not None:
        a = a | {"other": jaxce.ShardedLogits(a["other"], axis_name)}
    return {name: function(logits_of(kind, a, axis_name), a) for name, function in FUNCTIONS.items()}


def on_mesh(function: Callable[[Arrays], Any], check_vma: bool = True, out_specs: Any = P("data")) -> Any:
    """A function of each device's part as one of the whole."""
    specs = ({name: SPECS[name] for name in arrays()},)
    return jax.shard_map(function, mesh=mesh(), in_specs=specs, out_specs=out_specs, check_vma=check_vma)


def close(got: Any, expected: Any, rtol: float = 1e-12, atol: float = 1e-13) -> None:
    """In float64, where both sides are exact but for 1e-16 times the few operations of twelve classes."""
    got, expected = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (got, expected))
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        assert got[path].shape == value.shape and got[path].dtype == value.dtype
        np.testing.assert_allclose(got[path], value, rtol, atol, err_msg=jax.tree_util.keystr(path))


FLOATS = [name for name in SPECS if name != "labels"]


def split(a: Arrays) -> tuple[Arrays, Arrays]:
    return {n: a[n] for n in FLOATS}, {"labels": a["labels"]}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, check_vma: bool) -> None:
    with jax.enable_x64(True):
        floats, labels = split(arrays())

        def both(f: Callable[[Arrays], Any]) -> Any:
            def loss(floats: Arrays) -> Any:
                values = f(floats | labels)
                return scalar(values), values

            return quick(jax.grad(loss, has_aux=True))(floats)

        close(both(on_mesh(lambda a: results(kind, a, "model"), check_vma)), both(lambda a: results(kind, a)))


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_taken_inside(kind: str) -> None:
    with jax.enable_x64(True):
        floats, labels = split(arrays())

        def slopes(floats: Arrays, labels: Arrays, axis_name: Any) -> Any:
            return jax.grad(lambda floats: scalar(results(kind, floats | labels, axis_name)))(floats)

        expected = quick(slopes, static_argnums=2)
        with_axis = jax.shard_map(
            lambda a: slopes({n: a[n] for n in FLOATS}, {"labels": a["labels"]}, "model"),
            mesh=jax.make_mesh((MODEL,), ("model",), axis_types=(AxisType.Auto,)),
            in_specs=({n: P(*(None if s == "data" else s for s in SPECS[n])) for n in SPECS},),
            out_specs={n: P(*(None if s == "data" else s for s in SPECS[n])) for n in FLOATS},
        )
        close(quick(with_axis)(floats | labels), expected(floats, labels, None))
