"""What the devices of a mesh know of each other, and functions that each device runs on its part of some arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

from jaxce import _checks
from jaxce._checks import AxisName

_T = TypeVar("_T")


def index(axis_name: AxisName) -> Array:
    """This device's place on the axis."""
    try:
        return lax.axis_index(axis_name)
    except NameError:
        raise _checks.ArgumentValueError(
            f"axis_name must be an axis that is mapped where the function is called, as inside of "
            f"jax.shard_map, got {axis_name!r}"
        ) from None


def check(argument: str, axis_name: AxisName, classes: Array) -> None:
    """Demand that what has an axis of classes is sharded over the mesh axis."""
    if not varying(index(axis_name)) <= varying(classes):
        raise _checks.ArgumentValueError(
            f"{argument} must be sharded over {axis_name!r}, which is their axis_name, "
            f"got the same {_checks.describe(classes)} on all of its devices"
        )


def varying(*trees: Any) -> frozenset[str]:
    """The axes over which some leaf differs from device to device, as far as JAX keeps account (``check_vma=True``)."""

    def of(leaf: Any) -> frozenset[str]:
        # JAX asserts too much of the type of a struct in a shard_map over some axes of a mesh.
        known = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
        return frozenset() if known.manual_axis_type is None else known.manual_axis_type.varying

    return frozenset().union(*map(of, jax.tree.leaves(trees)))


def vary(tree: _T, axes: frozenset[str]) -> _T:
    """The same numbers, as something that differs over at least these axes.

    The transpose is a sum over devices: here, once, rather than wherever the numbers meet others that differ.
    """

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(axes - varying(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def iota(like: Array, axis: int) -> Array:
    """The place of each number along an axis of an array, sharded as that is."""
    sharding = jax.typeof(like).sharding
    return lax.broadcasted_iota(jnp.int32, like.shape, axis, out_sharding=sharding if any(sharding.spec) else None)


def devices(*types: AxisType) -> int:
    """On how many devices an array may lie: those of the mesh in use, if one is set; inside of `jax.shard_map`, one.

    With ``types``, as far as axes of the mesh of these types shard it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() if mesh.empty else math.prod(_sizes(*types or (AxisType.Auto, AxisType.Explicit)))


def _sizes(*types: AxisType) -> list[int]:
    mesh = jax.sharding.get_abstract_mesh()
    return [n for n, t in zip(mesh.axis_sizes, mesh.axis_types, strict=True) if t in types]


def in_use() -> bool:
    """Whether a mesh of several devices is set, or this is inside of `jax.shard_map` on one."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def strips(classes: int) -> int:
    """In how many equal strips to see the classes, so that a block with a bit of each strip is a bit of each device's part.

    How a mesh with automatic axis types shards the classes isn't known while tracing. Of a mesh in use they are taken to
    lie along one of its axes, whichever; else on any devices. XLA would gather what is cut otherwise.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.gcd(classes, jax.device_count() if mesh.empty else math.lcm(*_sizes(AxisType.Auto)))


def whole(x: Array, axis: int) -> Array:
    """An array that isn't sharded along an axis, whatever mesh with automatic axis types it may lie on; so its gradient.

    Where features are sharded XLA would add up over the network the logits of each block instead.
    """
    return x if devices(AxisType.Auto) == 1 else _whole.bind(x, axis=axis % x.ndim)


# A sharding constraint that names no axis of a mesh: `lax.with_sharding_constraint` wants a mesh, which programs with
# automatic axis types need not set.


def _lower_whole(context: Any, x: Any, *, axis: int) -> Any:
    if not jax.config.jax_use_shardy_partitioner:  # type: ignore[attr-defined]
        return [x]
    parts = ", ".join("{}" if a == axis else "{?}" for a in range(context.avals_in[0].ndim))
    sharding = mlir.ir.Attribute.parse(f"#sdy.sharding<mesh<[]>, [{parts}]>")
    return mlir.ir.Operation.create("sdy.sharding_constraint", [x.type], [x], {"sharding": sharding}).results


def _batch_whole(args: Any, axes: Any, *, axis: int) -> Any:
    return _whole.bind(*args, axis=axis + (axes[0] <= axis)), axes[0]


_whole = Primitive("whole")
_whole.def_impl(lambda x, axis: x)
_whole.def_abstract_eval(lambda x, axis: x)
ad.deflinear2(_whole, lambda cotangent, x, axis: [_whole.bind(cotangent, axis=axis)])
batching.primitive_batchers[_whole] = _batch_whole
mlir.register_lowering(_whole, _lower_whole)


# Arrays on a mesh with explicit axis types show in their types how they are sharded.


def names(part: Any) -> tuple[str, ...]:
    """The axes of the mesh over which an axis of an array is sharded."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def _spec(x: Any) -> tuple[Any, ...]:
    """That of each axis."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


Place = tuple[Any, ...]
"""A name for each axis of an array, or None for one that stays whole, as do axes of length 1. Axes of a name are sharded
alike."""


def _parts(arrays: list[Array], places: list[Place]) -> dict[Any, Any]:
    """How devices share some arrays: by the name of an axis, over which axes of the mesh it is sharded.

    That is as in the first array that is sharded there; over each axis of the mesh only one is.
    """
    found: dict[Any, Any] = {}
    for x, place in zip(arrays, places, strict=True):
        for axis, part in zip(place, _spec(x), strict=True):
            taken = {n for other in found.values() for n in names(other)}
            if axis is not None and axis not in found and names(part) and not taken & {*names(part)}:
                found[axis] = part
    return found


def spread(function: Callable[..., Any], arrays: list[Array], places: list[Place], results: Any) -> Any:
    """function(parts, *arrays) of each device's part of the arrays, if any is sharded over a mesh with explicit types.

    ``parts`` says how devices share them, as `_parts` does. The results have axes of these names, too: ``results`` is the
    place of all of them, or a list of places.
    """
    sharded = [x for x in arrays if any(_spec(x))]
    if not sharded:
        return function({}, *arrays)
    pairs = zip(arrays, places, strict=True)
    places = [tuple(a if n > 1 else None for a, n in zip(place, x.shape, strict=True)) for x, place in pairs]
    parts = _parts(arrays, places)

    def spec(place: Place) -> PartitionSpec:
        return PartitionSpec(*map(parts.get, place))

    specs, out = tuple(map(spec, places)), tuple(map(spec, results)) if isinstance(results, list) else spec(results)
    mesh = jax.typeof(sharded[0]).sharding.mesh
    placed = [reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    used = {name for spec in specs for part in spec for name in names(part)}
    explicit = all(t == AxisType.Explicit for t in mesh.axis_types)
    over = set() if explicit else used  # all of them, but those of an enclosing vmap
    run = jax.shard_map(partial(function, parts), mesh=mesh, in_specs=specs, out_specs=out, axis_names=over)
    return run(*placed)
