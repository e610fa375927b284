"""What the devices of a mesh know of each other, and functions that each device runs on its part."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

from jaxce import _checks
from jaxce._checks import AxisName
from jaxce._logits import LinearLogits, ShardedLogits

_F = TypeVar("_F", bound=Callable[..., Any])
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


# Arrays on a mesh with explicit axis types show in their types how they are sharded. There each device runs a function of
# logits on its own part, so that no rule for whole arrays (of a gather, a reshape, a loop over blocks) can refuse it.


def on_each_device(*results: str) -> Callable[[_F], _F]:
    """A decorator for functions of logits; results have the shape of the "batch" or the "logits", or are a "total".

    What each array of a result is, is said once; if there are several results they are a tuple.
    """

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def spread(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            linear = [x for x in given if isinstance(x, LinearLogits)]
            if not linear or not any(any(_spec(leaf)) for leaf in jax.tree.leaves(given)):
                return function(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return _run_on_each_device(function, bound.arguments, results)

        return cast(_F, spread)

    return decorate


def _spec(x: Any) -> tuple[Any, ...]:
    """Over which axes of an explicit mesh each axis of an array is sharded."""
    if not isinstance(x, jax.Array):
        return ()
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def _run_on_each_device(function: Callable[..., Any], given: dict[str, Any], results: tuple[str, ...]) -> Any:
    arrays = {name: x for name, x in given.items() if isinstance(x, jax.Array | LinearLogits)}
    leaves, tree = jax.tree.flatten(arrays)
    logits = [x for name, x in arrays.items() if name.endswith("logits")]
    shape = logits[0].shape
    axes = _checks.axes(given.get("axis", -1), len(shape))
    batch = [a for a in range(len(shape)) if a not in axes]
    places = [place for name, x in sorted(arrays.items()) for place in _places(name, x, shape, batch, axes[0])]
    mesh = next(jax.typeof(leaf).sharding.mesh for leaf in leaves if any(_spec(leaf)))
    if None in places:  # the function will say what doesn't fit
        whole = [reshard(leaf, NamedSharding(mesh, PartitionSpec())) for leaf in leaves]
        return function(**given | jax.tree.unflatten(tree, whole))

    # Each axis of the logits is sharded as they are, or else as what comes with them; and over each axis of the mesh only
    # one: the batch comes before the classes.
    parts: dict[Any, Any] = {}
    taken: set[str] = set()
    owners = [name for name, x in sorted(arrays.items()) for _ in jax.tree.leaves(x)]
    for is_logits in (True, False):
        for axis in (*batch, axes[0]):
            for owner, leaf, place in zip(owners, leaves, places, strict=True):
                part = _spec(leaf)[place.index(axis)] if axis in place else None
                names = {part} if isinstance(part, str) else set(part or ())
                if owner.endswith("logits") == is_logits and axis not in parts and names and not names & taken:
                    parts[axis] = part
                    taken |= names

    specs = [PartitionSpec(*map(parts.get, place)) for place in places]
    leaves = [reshard(leaf, NamedSharding(mesh, spec)) for leaf, spec in zip(leaves, specs, strict=True)]
    name = parts.get(axes[0])

    def part_of(x: Any) -> Any:
        if isinstance(x, LinearLogits):
            return dataclasses.replace(x, axis_name=name)
        return x if name is None else ShardedLogits(x, name)

    def run(*leaves: Array) -> Any:
        here = given | jax.tree.unflatten(tree, leaves)
        value = function(**{n: part_of(x) if n.endswith("logits") else x for n, x in here.items()})
        values = value if len(results) > 1 else (value,)
        pairs = zip(results, values, strict=True)
        values = tuple(lax.psum(v, tuple(rows)) if result == "total" and rows else v for result, v in pairs)
        return values if len(results) > 1 else values[0]

    rows = [n for a in batch for n in ([parts[a]] if isinstance(parts.get(a), str) else parts.get(a) or ())]
    kept = {"batch": batch, "logits": range(len(shape)), "total": ()}
    outs = tuple(PartitionSpec(*(parts.get(a) for a in kept[result])) for result in results)
    out = outs if len(results) > 1 else outs[0]
    explicit = all(t == AxisType.Explicit for t in mesh.axis_types)
    axis_names = set() if explicit else taken  # all of them, but those of an enclosing vmap
    return jax.shard_map(run, mesh=mesh, in_specs=tuple(specs), out_specs=out, axis_names=axis_names)(*leaves)


def _places(name: str, x: Any, shape: tuple[int, ...], batch: list[int], class_axis: int) -> list[Any]:
    """For each array of an argument the axes of the logits that its own go with, or None where its shape doesn't fit."""
    last = len(shape) - 1
    if isinstance(x, LinearLogits):
        if x.shape != shape:
            return [None]
        kernel = [last, None] if x.class_axis == 0 else [None, last]
        return [[*range(last), None], kernel] + [[last] * leaf.ndim for leaf in jax.tree.leaves(x)[2:]]
    if name in ("chosen", "shares"):
        return [[*batch, None] if x.shape[:-1] == tuple(shape[a] for a in batch) else None]
    if name == "class_weights":
        return [[class_axis] if x.ndim == 1 else None]
    if not x.ndim:  # an option
        return [[]]
    if x.shape == shape:
        return [[*range(len(shape))]]
    if x.shape == tuple(shape[a] for a in batch):
        return [batch]
    if name not in ("where", "labels") or x.ndim > len(shape):
        return [None]
    axes = range(len(shape) - x.ndim, len(shape))
    fits = all(n in (1, shape[a]) for n, a in zip(x.shape, axes, strict=True))
    return [[None if n == 1 else a for n, a in zip(x.shape, axes, strict=True)] if fits else None]


def by_rows(
    function: Callable[..., Any], axis_name: AxisName | None, inputs: dict[str, Array], of_rows: tuple[str, ...]
) -> Any:
    """function(axis_name, inputs) -> (of rows, of all): of each device's rows, if an explicit mesh shards any input.

    The inputs that have an axis of rows, their first, are sharded by it, as the first of them is that is so. All others are
    gathered.
    """
    specs = {name: _spec(x) for name, x in inputs.items()}
    if not any(map(any, specs.values())):
        return function(axis_name, inputs)
    mesh = next(jax.typeof(x).sharding.mesh for name, x in inputs.items() if any(specs[name]))
    part = next((specs[n][0] for n in of_rows if n in specs and specs[n][0]), None)
    in_specs = {name: PartitionSpec(part) if name in of_rows else PartitionSpec() for name in inputs}
    inputs = {name: reshard(x, NamedSharding(mesh, in_specs[name])) for name, x in inputs.items()}
    explicit = all(t == AxisType.Explicit for t in mesh.axis_types)
    names = set() if explicit else {part} if isinstance(part, str) else set(part or ())
    run = jax.shard_map(
        functools.partial(function, part),
        mesh=mesh,
        in_specs=(in_specs,),
        out_specs=(PartitionSpec(part), PartitionSpec()),
        axis_names=names,
    )
    return run(inputs)
