"""The order in which the classes of a row meet on each platform, and nothing else: no formula depends on one.

This is the one file that knows platforms. On a TPU, and wherever nothing else is known, the classes of a row are one
reduction, with `meet` between any two.

XLA:CPU makes no vectors of such a reduction along the last axis. Along an earlier one of a few numbers it does, with one
number of the later axes in each lane of a vector. So eight parts of a row meet, class by class, and those eight in turn,
until a part would be shorter than a vector; then the few that are left of each row are put first, so that the rows are the
lanes. This is done by chunks of rows that stay in the cache, and so without arrays of the size of the logits.

A GPU's reduction is bound by its instructions rather than by what it reads, and most of them are in its exponentials, and
in what they are multiplied and added to. So eight parts of a row meet at once there, class by class: that takes one
exponential less than there are parts and no sums in between. All numbers of a state come from one kernel, which reads the
logits once. The label's logit is gathered on both rather than looked for, but for short rows on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxce import _mesh
from jaxce._inputs import Inputs, flat_rows, has_rows
from jaxce._rules import largest
from jaxce._state import Ask, Block, State, before, leaves, meet, meet_all

_PARTS = 8
"""How many classes meet at once on a GPU, and one after the other on a CPU: of sixteen XLA:CPU makes no vectors."""

_LANES = 8
"""How many classes a part of a row has at least on a CPU."""

_CACHE, _VECTOR = 1 << 18, 16
"""About how many logits a chunk of rows has on a CPU; and a multiple of so many rows, if it has as many."""

_SHORT = 512
"""Shorter rows are one reduction on a GPU."""

_FEW = 32
"""The same where the classes of a row don't lie side by side in memory, as in images of shape [images, classes, height,
width]. Of as many classes or more XLA:GPU writes the operands of a reduction to memory, if it has more than two."""

Read = Callable[[Inputs], Block]


def over_classes(
    read: Read, inputs: Inputs, ask: Ask, dtype: np.dtype, strips: int = 1, adjacent: bool = True
) -> State:
    """The state of the rows of a block of classes, its last axis: the way over a row.

    ``read`` makes the block of the inputs, so that it can make some of its rows of theirs. ``adjacent`` says whether the
    classes of a row lie side by side in memory.
    """

    def states(inputs: Inputs) -> State:
        return leaves(read(inputs), ask, dtype)

    def reduction(inputs: Inputs) -> State:
        return meet_all(states(inputs))

    def in_parts(inputs: Inputs) -> State:
        return _in_parts(read, inputs, ask, dtype)

    def in_lanes(inputs: Inputs) -> State:
        if "logits" in inputs:
            inputs = inputs | {"logits": _untransposed(inputs["logits"])}
        return _by_rows(lambda some: _in_lanes(read(some), ask, dtype), inputs, shape)

    shape = _logits(inputs).shape
    if not _is_whole(shape, strips):
        return reduction(inputs)
    at_once = shape[-1] < (_SHORT if adjacent else _FEW)
    if not adjacent:
        at_once |= len(jax.tree.leaves(jax.eval_shape(states, inputs))) <= 2
    gpu = reduction if at_once else in_parts
    return _either(inputs, cpu=in_lanes, gpu=gpu, default=reduction, like=_one_for_each_row(states))


def rank(read: Read, inputs: Inputs, label: Array, dtype: np.dtype, strips: int = 1) -> Array:
    """How many classes of a block come before the label, whose logit is given; the block is read as in `over_classes`."""

    def count(inputs: Inputs) -> Array:
        return jnp.sum(before(read(inputs), inputs["label"], dtype), -1, dtype=jnp.int32)

    inputs = inputs | {"label": label}
    shape = _logits(inputs).shape
    if not _is_whole(shape, strips):
        return count(inputs)
    return _either(inputs, cpu=lambda inputs: _by_rows(count, inputs, shape), default=count)


def _logits(inputs: Inputs) -> Array:
    """The logits of a block: what it is made of, or a product that was made before."""
    return inputs["array"] if "array" in inputs else inputs["logits"]


def _is_whole(shape: tuple[int, ...], strips: int) -> bool:
    """Whether a device has all classes of a block of this shape in one piece, and there is anything."""
    known = isinstance(shape[-1], int)  # unlike a symbolic size of jax.export
    return known and strips == 1 and _mesh.devices() == 1 and math.prod(shape) > 0


def entry(x: Array, labels: Array, otherwise: Callable[[Array, Array], Array]) -> Array:
    """The entry of each row that its label names, without derivatives: a gather on a CPU and on a GPU."""

    def gathered(x: Array, labels: Array) -> Array:
        return _take(x, labels[..., None])[..., 0]

    if _mesh.devices() > 1 or x.size == 0:
        return otherwise(x, labels)
    return _either(x, labels, cpu=gathered, gpu=gathered, default=otherwise)


def sums(arrays: tuple[Array, ...], adjacent: bool) -> tuple[Array, ...]:
    """The sums of arrays over their last axis, without derivatives.

    They are a single reduction, except on a CPU, and on a GPU where its operands would be written to memory: see `_FEW`.
    """

    def reduction(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        zeros = tuple(np.zeros((), x.dtype) for x in arrays)
        return tuple(lax.reduce(arrays, zeros, lambda a, b: tuple(map(jnp.add, a, b)), (arrays[0].ndim - 1,)))

    def one_by_one(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(jnp.sum(x, -1) for x in arrays)

    like = _one_for_each_row(lambda arrays: arrays)
    gpu = one_by_one if arrays[0].shape[-1] >= _FEW and not adjacent else reduction
    return _either(arrays, cpu=one_by_one, gpu=gpu, default=reduction, like=like)


def _one_for_each_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose results have the types that a reduction of the given one's has, and which is quicker to trace."""

    def first(*args: Any) -> Any:
        arrays = function(*args)
        arrays = _mesh.vary(arrays, _mesh.varying(arrays))  # as all results of one reduction do
        return jax.tree.map(lambda x: lax.reduce_max(x, (x.ndim - 1,)), arrays)

    return first


# --- the choice -------------------------------------------------------------------------------------------------------
#
# `lax.platform_dependent` of functions without derivatives. Of these only the one that is compiled is ever traced.


def _either(*args: Any, **ways: Callable[..., Any]) -> Any:
    """The way for the platform, "cpu", "gpu" or by "default", of arguments that hold all arrays it needs.

    The way "like", if there is one, is quicker to trace than the default, and only tells the types of the results.
    """
    leaves, tree = jax.tree.flatten(args)

    def flat(way: Callable[..., Any], *leaves: Any) -> list[Any]:
        return jax.tree.leaves(way(*tree.unflatten(leaves)))

    jaxpr, out = jax.make_jaxpr(ways.get("like", ways["default"]), return_shape=True)(*args)
    ways = {name: partial(flat, way) for name, way in ways.items()}
    return jax.tree.unflatten(jax.tree.structure(out), _either_p.bind(*leaves, avals=tuple(jaxpr.out_avals), **ways))


def _choose(platform: str, *args: Any, avals: Any, **ways: Callable[..., Any]) -> Any:
    return ways.get(platform, ways["default"])(*args)


def _batch(axis: Any, args: Any, axes: Any, *, avals: Any, **ways: Callable[..., Any]) -> Any:
    if all(a is None for a in axes):
        found = _either_p.bind(*args, avals=avals, **ways)
        return found, [None] * len(found)
    found = _either(*args, **{name: jax.vmap(way, axes, axis_size=axis.size) for name, way in ways.items()})
    return found, [0] * len(found)


_either_p = Primitive("either")
_either_p.multiple_results = True
_either_p.def_impl(lambda *args, **params: _choose(jax.default_backend(), *args, **params))
_either_p.def_abstract_eval(lambda *args, avals, **ways: list(avals))
batching.fancy_primitive_batchers[_either_p] = _batch
for _platform in "default", "cpu", "gpu":
    _lower = mlir.lower_fun(partial(_choose, _platform))
    mlir.register_lowering(_either_p, _lower, platform=None if _platform == "default" else _platform)


# --- XLA:GPU ----------------------------------------------------------------------------------------------------------


def _in_parts(read: Read, inputs: Inputs, ask: Ask, dtype: np.dtype) -> State:
    """Eight parts of the classes meet at once, class by class; then one reduction. The label is gathered."""
    block = read(inputs)
    classes = block.x.shape[-1]
    size = classes // _PARTS

    def of(first: int, last: int, inputs: Inputs) -> State:
        """The states of some of the classes."""
        states = leaves(read(inputs)._replace(labels=None), ask, dtype)
        return jax.tree.map(lambda v: lax.slice_in_dim(v, first, last, axis=-1), states)

    @jax.jit  # to be traced once
    def parts(inputs: Inputs) -> State:
        return meet(*(of(i * size, (i + 1) * size, inputs) for i in range(_PARTS)))

    numbers, tree = jax.tree.flatten(jax.eval_shape(parts, inputs))
    numbers = [jax.tree.leaves(parts(jax.tree.map(partial(_named, n), inputs)))[n] for n in range(len(numbers))]
    state = meet_all(jax.tree.unflatten(tree, numbers))
    if classes % _PARTS:
        state = meet(state, meet_all(of(_PARTS * size, classes, inputs)))
    return state if block.labels is None else state._replace(**_at_label(block, dtype))


# --- XLA:CPU ----------------------------------------------------------------------------------------------------------


def _by_rows(function: Callable[[Inputs], Any], inputs: Inputs, shape: tuple[int, ...]) -> Any:
    """function(inputs), one number or several for each row of a shape, by chunks of rows that stay in the cache."""
    batch, classes = shape[:-1], shape[-1]
    rows, size = math.prod(batch), _rows_of_a_chunk(classes)
    if not isinstance(rows, int) or size >= rows:
        return function(inputs)

    whole = {n: x for n, x in inputs.items() if not has_rows(n, x)}
    split = {n: flat_rows(n, x, batch) for n, x in inputs.items() if has_rows(n, x)}

    def chunk(start: Array) -> Any:
        here, at = _in_this_turn(split, start)
        return function(
            whole | {n: x if x.shape[0] == 1 else lax.dynamic_slice_in_dim(x, at, size) for n, x in here.items()}
        )

    chunks = -(-rows // size)
    starts = jnp.minimum(size * np.arange(chunks, dtype=np.int32), rows - size)  # the last ends with the last row
    results = lax.map(chunk, starts)

    def join(x: Array) -> Array:
        return jnp.concatenate([x[:-1].reshape(-1), x[-1, chunks * size - rows :]]).reshape(batch)

    return jax.tree.map(join, results)


def _rows_of_a_chunk(classes: int) -> int:
    """As many as are about `_CACHE` logits, in whole vectors."""
    size = max(1, _CACHE // classes)
    return size if size < _VECTOR else size // _VECTOR * _VECTOR


def _in_lanes(block: Block, ask: Ask, dtype: np.dtype) -> State:
    """Eight parts of the classes meet, class by class, and so on; the last few of each row with the rows as lanes."""
    states, rest = leaves(block._replace(labels=None), ask, dtype), []
    while states.m.shape[-1] >= _PARTS * _LANES:
        states, left = _fold(states, -1)
        rest.append(left)
    few, *rest = (jax.tree.map(lambda v: jnp.moveaxis(v, -1, 0), s) for s in (states, *rest))
    while few.m.shape[0] > _PARTS:
        few, left = _fold(few, 0)
        rest.append(left)
    state = meet(*(meet_all(some, axis=0) for some in (few, *rest) if some.m.shape[0]))
    return state if block.labels is None else state._replace(**_at_label(block, dtype))


def _fold(states: State, axis: int) -> tuple[State, State]:
    """The states of an axis after eight equal parts of it have met, and those that are left over."""
    axis %= states.m.ndim
    count = states.m.shape[axis]
    size = count // _PARTS

    def part(first: int, last: int) -> State:
        return jax.tree.map(lambda v: lax.slice_in_dim(v, first, last, axis=axis), states)

    parts = jax.tree.map(
        lambda v: v.reshape(*v.shape[:axis], _PARTS, size, *v.shape[axis + 1 :]), part(0, _PARTS * size)
    )
    return meet_all(parts, axis), part(_PARTS * size, count)


def _at_label(block: Block, dtype: np.dtype) -> dict[str, Array]:
    """The label's logit and weight, 0 where it is none of these classes."""
    place = block.labels - block.first
    inside = (place >= 0) & (place < block.x.shape[-1])

    def at_label(values: Array) -> Array:
        return jnp.where(inside, _take(values, place[..., None])[..., 0].astype(dtype), 0)

    found = {"label": at_label(block.x)}
    if block.weights is not None:
        found["label_weight"] = jnp.where(inside, jnp.take(block.weights, place, mode="clip").astype(dtype), 0)
    return found


# --- quirks of XLA ----------------------------------------------------------------------------------------------------
#
# What stands here is the identity, or a function of JAX's in other words; each says what XLA does without it, as seen with
# jaxlib 0.10.2.


def reread(x: Any) -> Any:
    """The same arrays, to be read once more on a CPU, where else what is made of them twice would be kept."""
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def fused(x: Array) -> Array:
    """x > -inf, an exponential, logarithm or quotient that is used more than once.

    XLA:CPU writes out such an array, and with it most of what it is computed from, but not a maximum.
    """
    return lax.platform_dependent(x, cpu=lambda x: jnp.maximum(x, -largest(x)), default=lambda x: x)


def renamed(x: Array, finite: Array) -> Array:
    """The same numbers, as others to a GPU: it knows no barriers, and would keep what is made of them twice."""

    def other(x: Array, finite: Array) -> Array:
        return x + 0 * finite

    return lax.platform_dependent(x, finite, cuda=other, rocm=other, default=lambda x, _: x)


def dynamic_slice(x: Array, start: Any, size: int, axis: int) -> Array:
    """lax.dynamic_slice_in_dim; on a CPU reread, or a product of 16-bit floats would have all of them widened first."""
    return reread(lax.dynamic_slice_in_dim(x, start, size, axis))


def _in_this_turn(arrays: Inputs, start: Array) -> tuple[Inputs, Array]:
    """The same, for a turn of a loop on a CPU, which else widens all of an array of 16-bit floats before the loop.

    XLA:CPU slices these as float32; of what depends on the turn, as with the barrier, no more than the slice is widened.
    """
    return lax.optimization_barrier((arrays, start))


def _untransposed(x: Array) -> Array:
    """The same product. XLA:CPU merges one of bfloat16 numbers and a transpose after it into one that it can't run."""
    return lax.optimization_barrier(x)


def _named(n: int, x: Array) -> Array:
    """The same numbers under another name: XLA:GPU writes out what is made of the same ones for several results.

    No bit is set: what is left of a shift by as many bits less n + 1 has none from n + 1 on. LLVM knows that, XLA doesn't.
    """
    width = 8 * x.dtype.itemsize
    if n == 0 or n + 1 >= width or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    one = np.ones((), f"uint{width}")
    bits = lax.bitcast_convert_type(x, one.dtype)
    bits |= (bits >> (one * (width - 1 - n)).astype(one.dtype)) & (one << (one * (1 + n)).astype(one.dtype))
    return lax.bitcast_convert_type(bits, x.dtype)


def _take(x: Array, index: Array) -> Array:
    """take_along_axis of the last axis; of 16-bit floats by their bits, or XLA:CPU would widen the whole array first."""
    bits = lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x
    taken = jnp.take_along_axis(bits, index, -1, mode="clip")
    return lax.bitcast_convert_type(taken, x.dtype) if x.dtype.itemsize == 2 else taken


def on_tpu(tpu: Callable[..., Any], otherwise: Callable[..., Any], *args: Any) -> Any:
    """tpu(*args) on a TPU, and otherwise(*args) elsewhere."""
    return lax.platform_dependent(*args, tpu=tpu, default=otherwise)


def with_entries(x: Array, labels: Array, values: Array) -> Array:
    """x [..., classes] with another number where the label of each row is; on a GPU without another array.

    The rows of a single device have one axis.
    """
    if _mesh.devices() > 1:
        return _select_entries(x, labels, values)
    ways = {"cuda": _scatter_entries, "rocm": _scatter_entries, "default": _select_entries}
    return lax.platform_dependent(x, labels, values, **ways)


def _select_entries(x: Array, labels: Array, values: Array) -> Array:
    index = lax.broadcasted_iota(labels.dtype, x.shape, x.ndim - 1)
    return jnp.where(index == labels[..., None], values[..., None], x)


def _scatter_entries(x: Array, labels: Array, values: Array) -> Array:
    places = jnp.where(labels < 0, x.shape[1], labels)  # a negative index would count from the end
    return x.at[jnp.arange(x.shape[0]), places].set(values, mode="drop", unique_indices=True)
