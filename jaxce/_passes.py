"""Passes over the classes of any kind of logits: block by block, strip by strip, device by device.

A pass finds the state of the rows (`state_of`), or adds up over the classes what a function makes of some of them and
of their tangents (`add_up`). An array is one block. `LinearLogits` are cut into blocks, each computed, used and
forgotten. Where a mesh may shard the classes without saying how, they are seen as strips, as many as there are devices:
a block has the same range of every strip, and strips meet after the loop, so that in it no device needs another.

Tangents of what has an axis of classes are cut before a loop, and each turn takes a block: so its transpose writes them
block by block, and neither adds up nor clears whole arrays. All other tangents are wide, since a transpose sums them over
the blocks.
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
from jax.interpreters import ad, batching, mlir

from jaxce import _mesh, _platforms
from jaxce._inputs import ALONG_CLASSES, Inputs, Spec, flat_rows, has_rows
from jaxce._logits import product, shape_logits
from jaxce._rules import custom_jvp
from jaxce._state import Block, State, beside, meet, meet_all, meet_devices

# ------------------------------------------------------------------------------------------------------------- one block


def _strips(spec: Spec, x: Array, axis: int) -> Array:
    """The axis of classes as two, strips and the classes of a strip."""
    return x if spec.strips == 1 else x.reshape(*x.shape[:axis], spec.strips, spec.length, *x.shape[axis + 1 :])


def _cut(spec: Spec, inputs: Inputs, start: Any, size: int) -> Inputs:
    """The inputs of a block; hidden states once for each strip, if there are several."""

    def cut(name: str, x: Array) -> Array:
        if name not in ALONG_CLASSES:
            return jnp.broadcast_to(x, (spec.strips, *x.shape)) if name == "hidden" and spec.strips > 1 else x
        axis = spec.axis(name, x)
        x = _strips(spec, x, axis)
        return x if size == spec.length else _platforms.dynamic_slice(x, start, size, axis + (spec.strips > 1))

    return {name: cut(name, x) for name, x in inputs.items()}


def masked(part: Inputs, x: Array, otherwise: float) -> Array:
    """An array of the classes of a block, with another number where something isn't there."""
    for name in ("rows", "classes", "entries"):
        if name in part:
            mask = beside(part[name], x) if name == "rows" else part[name]
            x = jnp.where(jnp.broadcast_to(mask, x.shape), x, otherwise)
    return x


def logits_of(spec: Spec, part: Inputs) -> Array:
    """The logits of a block, -inf where a class isn't there."""
    if "array" in part:
        x = part["array"]
    else:
        kernel = part["kernel"]
        if "classes" in part:  # what isn't there in any row must not be multiplied by anything
            axis = -1 if spec.class_axis == 0 else 0
            kernel = jnp.where(jnp.expand_dims(part["classes"], axis), kernel, 0)
        x = product(part["hidden"], kernel, spec.class_axis, spec.half).astype(spec.dtype)
        if "bias" in part:
            x = x + jnp.broadcast_to(part["bias"].astype(spec.dtype), x.shape)
    x = masked(part, x, -np.inf)
    return x if "array" in part else shape_logits(x, part.get("temperature"), part.get("soft_cap"))


def block_of(spec: Spec, part: Inputs, start: Any, x: Array | None = None) -> Block:
    """The logits of a block, unless they are given, with what comes with them."""
    x = logits_of(spec, part) if x is None else x
    first = _first_class(spec, start)
    places = first + _mesh.iota(x, x.ndim - 1)
    if spec.strips > 1:
        places += spec.length * _mesh.iota(x, x.ndim - 2)
    return Block(x, first, places, part.get("labels"), part.get("weights"), _targets(part, x, places))


def _first_class(spec: Spec, start: Any) -> Any:
    """The index of the first class of a block."""
    return start if spec.axis_name is None else start + lax.axis_index(spec.axis_name) * spec.classes


def reading(spec: Spec, part: Inputs, start: Any) -> tuple[Callable[[Inputs], Block], Inputs]:
    """How a block is made of its inputs, and these: all arrays there are; its products are not made again for some rows."""
    part = part | {"first": jnp.asarray(_first_class(spec, start), jnp.int32)}
    if "array" not in part:
        part |= {"logits": logits_of(spec, part)}
    spec = spec._replace(axis_name=None)
    return lambda part: block_of(spec, part, part["first"], part.get("logits")), part


def _targets(part: Inputs, x: Array, places: Array) -> Array | None:
    """The targets of a block: those given, or the shares of the classes chosen, which masks of classes can't take away."""
    given = part.get("targets", part.get("shares"))
    if given is None:
        return None
    total = (0 * places).astype(given.dtype)  # sharded as the logits are
    if "targets" in part:
        return masked(part, total + given, 0)
    for j in range(part["chosen"].shape[-1]):
        chosen, share = (beside(part[name][..., j], x) for name in ("chosen", "shares"))
        total += jnp.where(places == chosen, share, 0)
    return masked({n: m for n, m in part.items() if n == "rows"}, total, 0)


# ------------------------------------------------------------------------------------------------------------ all blocks


def _axes(specs: tuple[Spec, ...], *trees: Any) -> frozenset[str]:
    """The axes of the mesh over which a block of logits differs."""
    here = [lax.axis_index(spec.axis_name) for spec in specs if spec.axis_name is not None]
    return _mesh.varying(trees, here)


def _fold(spec: Spec, part: Callable[..., Any], join: Callable[..., Any], cuts: Any = ((), ())) -> Any:
    """part(start, size, cut) of all blocks, joined in a loop; ``cuts`` are the equal blocks', stacked, and the rest's.

    Of equal blocks without cuts the last comes before the loop: so a TPU keeps hidden states on the chip for the loop, too,
    which then takes 0.8 of the cycles (131072 classes of 2048 features; libtpu 0.0.42).
    """
    count, rest = divmod(spec.length, spec.size)
    stack, tail = cuts
    if not rest and not jax.tree.leaves(stack):
        count, rest = count - 1, spec.size

    def first(stack: Any) -> Any:
        return part(0, spec.size, jax.tree.map(lambda x: x[0], stack))

    if rest:
        total = part(count * spec.size, rest, tail)
        if count == 1:
            return join(total, first(stack))
    elif count == 1:
        return first(stack)
    else:
        like = jax.eval_shape(first, stack)
        total = _mesh.vary(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), _mesh.varying(like))
    if not count:
        return total

    def body(carry: Any, i: Array) -> tuple[Any, None]:
        total, stack = carry
        cut, stack = _take(stack, i)
        return (join(total, part(spec.size * i, spec.size, cut)), stack), None

    return _when_taken(*lax.scan(body, (total, stack), jnp.arange(count, dtype=jnp.int32))[0])


def state_of(spec: Spec, inputs: Inputs) -> State:
    """The state of each row: without derivatives, which only rules that know them may ask for."""
    inputs = own_inputs(spec, inputs)

    def part(start: Any, size: int, _: Any) -> State:
        read, cut = reading(spec, _cut(spec, inputs, start, size), start)
        return _platforms.over_classes(read, cut, spec.ask, spec.dtype, spec.strips, spec.adjacent)

    state = _fold(spec, part, meet)
    if spec.strips > 1:
        state = meet_all(state)
    return state if spec.axis_name is None else meet_devices(state, spec.axis_name)


Step = Callable[[tuple[Inputs, ...], tuple[Inputs, ...], Any, Any], Any]


def own_inputs(spec: Spec, inputs: Inputs) -> Inputs:
    """The inputs as what differs between all devices of a pass: a gradient by them is a device's part of it."""
    return _mesh.vary(inputs, _axes((spec,), inputs))


def add_up(
    specs: tuple[Spec, ...],
    inputs: tuple[Inputs, ...],
    tangents: tuple[Inputs, ...],
    rows: Any,
    step: Step,
    own: bool = False,
) -> Any:
    """The sum over blocks, strips and devices of step(parts, their tangents, rows, start), a tree of one number for
    each row.

    ``inputs`` are those of one or several kinds of logits, which are cut alike; ``tangents`` of those among them that
    vary, and ``rows`` is whatever else the step wants, without an axis of classes. Nothing of a block is kept for a
    transpose. The sum over devices is left out of this device's ``own``.
    """
    specs = tuple(s._replace(size=_even(s)) for s in specs)
    inputs, tangents, rows = _mesh.vary((inputs, tangents, rows), _axes(specs, inputs, tangents, rows))
    wide: list[Inputs] = []
    cuts: tuple[list[Inputs], list[Inputs]] = [], []
    for s, d in zip(specs, tangents, strict=True):
        split = {n: _split(s, n, dx) for n, dx in d.items() if n in ALONG_CLASSES}
        for i, cut in enumerate(cuts):
            cut.append({n: pair[i] for n, pair in split.items()})
        wide.append(_cut(s, {n: dx.astype(s.dtype) for n, dx in d.items() if n not in split}, 0, s.length))

    def part(start: Any, size: int, along: list[Inputs]) -> Any:
        # Else XLA keeps the logits of a block outside of the loop, which each pass computes, from one pass for the next.
        outside = isinstance(start, int) and size < specs[0].length

        @partial(jax.checkpoint, prevent_cse=outside)
        def run(inputs: Any, wide: list[Inputs], along: list[Inputs], rows: Any, start: Any) -> Any:
            parts = []
            for s, whole, d in zip(specs, inputs, wide, strict=True):
                cut = _cut(s, whole, start, size)
                cut |= {n: cut[n].astype(s.dtype) for n in d}
                parts.append(cut | _platforms.reread({n: cut[n] for n in ("array", "targets") if n in cut}))
            return step(tuple(parts), tuple(d | a for d, a in zip(wide, along, strict=True)), rows, start)

        return run(inputs, wide, along, rows, start)

    spec = specs[0]
    total = _fold(spec, part, partial(jax.tree.map, jnp.add), cuts)
    if spec.strips > 1:
        total = jax.tree.map(lambda t: jnp.sum(t, -1), total)
    return total if own or spec.axis_name is None else lax.psum(total, spec.axis_name)


def _even(spec: Spec) -> int:
    """The size of equal blocks, if they need be no smaller than half: what is left would be copied with the tangents.

    One of whole tiles of a TPU's memory if there is one, which has sixteen rows of 16-bit numbers. Never an odd one:
    with it a TPU's compiler takes 40 seconds for a gradient (51865 classes of 2048 features; libtpu 0.0.42).
    """
    if spec.size == spec.length:
        return spec.size
    fewest, most = -(-spec.length // spec.size), spec.length // max(1, spec.size // 2)
    equal = (spec.length // count for count in range(fewest, most + 1) if spec.length % (2 * count) == 0)
    return max(equal, key=lambda n: (math.gcd(n, 16), n), default=spec.size)


def _split(spec: Spec, name: str, x: Array) -> tuple[Array, Array]:
    """All equal blocks, stacked, and what is left of each strip."""
    axis = spec.axis(name, x)
    x = _strips(spec, x, axis)
    axis += spec.strips > 1
    count, rest = divmod(spec.length, spec.size)
    whole, tail = lax.split(x, (count * spec.size, rest), axis)
    return jnp.moveaxis(whole.reshape(*x.shape[:axis], count, spec.size, *x.shape[axis + 1 :]), axis, 0), tail


# Blocks could be what a scan goes over. But then its transpose would first fill what it stacks with zeros, in one more pass
# over the memory of a gradient. So they are carried, and each turn takes one: in the transpose it writes one, into memory
# that nobody has filled.


def _take(stacks: Any, i: Array) -> tuple[Any, Any]:
    """Block i of each stack; and the stacks, from which it is taken."""
    leaves, tree = jax.tree.flatten(stacks)
    pairs = [_take_p.bind(x, i) for x in leaves]
    return tree.unflatten([block for block, _ in pairs]), tree.unflatten([rest for _, rest in pairs])


def _block_and_rest(stack: Array, i: Array) -> list[Array]:
    return [lax.dynamic_index_in_dim(stack, i, keepdims=False), stack]


def _take_jvp(primals: Any, tangents: Any) -> Any:
    (stack, i), (tangent, _) = primals, tangents
    return _take_p.bind(stack, i), _take_p.bind(ad.instantiate_zeros(tangent), i)


def _take_transpose(cotangents: Any, stack: Any, i: Array) -> Any:
    block, rest = map(ad.instantiate_zeros, cotangents)
    return [lax.dynamic_update_index_in_dim(rest, block, i, 0), None]


def _take_batch(args: Any, axes: Any) -> Any:
    stack, i = args
    return _take_p.bind(jnp.moveaxis(stack, axes[0], 1), i), [0, 1]


_take_p = Primitive("take_block")
_take_p.multiple_results = True
_take_p.def_impl(_block_and_rest)
_take_p.def_abstract_eval(lambda stack, i: [stack.update(shape=stack.shape[1:]), stack])
mlir.register_lowering(_take_p, mlir.lower_fun(_block_and_rest, multiple_results=True))
ad.primitive_jvps[_take_p] = _take_jvp
ad.primitive_transposes[_take_p] = _take_transpose
batching.primitive_batchers[_take_p] = _take_batch


def _when_taken(total: Any, stacks: Any) -> Any:
    """``total``, after all blocks of the stacks have been taken."""
    leaves, tree = jax.tree.flatten(total)
    rest = jax.tree.leaves(stacks)
    # XLA doesn't know how to shard memory that nobody has filled.
    known = {"count": len(leaves), "empty": _mesh.devices() == 1}
    return tree.unflatten(_taken_p.bind(*leaves, *rest, **known)) if rest else total


def _first(*args: Array, count: int, empty: bool) -> list[Array]:
    return list(args[:count])


def _taken_transpose(cotangents: Any, *args: Any, count: int, empty: bool) -> Any:
    def unwritten(x: Any) -> Array:
        if empty:
            return _unwritten_p.bind(aval=x.aval)
        return _mesh.vary(jnp.zeros(x.aval.shape, x.aval.dtype), x.aval.manual_axis_type.varying)

    return [*cotangents, *map(unwritten, args[count:])]


def _taken_jvp(primals: Any, tangents: Any, **known: Any) -> Any:
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    return _taken_p.bind(*primals, **known), _taken_p.bind(*tangents, **known)


def _empty(aval: Any) -> Array:
    """`lax.empty`, but the same for all of what `jax.vmap` maps over."""
    return lax.empty(aval.shape, aval.dtype)


_unwritten_p = Primitive("unwritten")
_unwritten_p.def_impl(_empty)
_unwritten_p.def_abstract_eval(lambda aval: aval)
mlir.register_lowering(_unwritten_p, mlir.lower_fun(_empty, multiple_results=False))

_taken_p = Primitive("when_taken")
_taken_p.multiple_results = True
_taken_p.def_impl(_first)
_taken_p.def_abstract_eval(_first)
mlir.register_lowering(_taken_p, mlir.lower_fun(_first, multiple_results=True))
ad.primitive_jvps[_taken_p] = _taken_jvp
ad.primitive_transposes[_taken_p] = _taken_transpose
batching.primitive_batchers[_taken_p] = lambda args, axes, **known: (
    _taken_p.bind(*args, **known),
    axes[: known["count"]],
)


def along(function: Callable[[Inputs], Any], part: Inputs, dpart: Inputs, *names: str) -> tuple[Any, Any]:
    """function(part), and its tangent along those of the inputs named that vary; None if none does."""
    tangents = {n: dpart[n] for n in names if n in dpart}
    if not tangents:
        return function(part), None
    return jax.jvp(lambda varying: function(part | varying), ({n: part[n] for n in tangents},), (tangents,))


# ------------------------------------------------------------------------------------------------------- chunks of rows


def split_rows(x: Array, chunks: int, axis: int = 0, fill: float = 0) -> Array:
    """Rows [..., rows, ...] as [chunks, ..., rows of a chunk, ...], the last filled up with a number.

    A chunk has every so many rows, a part of what each device holds of them.
    """
    size = -(-x.shape[axis] // chunks)
    pads = [(0, size * chunks - n if a == axis else 0) for a, n in enumerate(x.shape)]
    x = jnp.pad(x, pads, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], size, chunks, *x.shape[axis + 1 :]), axis + 1, 0)


def join_rows(x: Array, rows: int, axis: int = 0) -> Array:
    """What `split_rows` has split."""
    x = lax.collapse(jnp.moveaxis(x, 0, axis + 1), axis, axis + 2)
    return lax.slice_in_dim(x, 0, rows, axis=axis)


def by_rows(chunks: int, inputs: tuple[Inputs, ...], function: Callable[..., Any]) -> Any:
    """function(*inputs), whose results have the axes of rows, by chunks of the rows.

    Fewer classes a block would do without. But a TPU keeps a chunk's hidden states on the chip: for 131072 rows of 256
    features and 32768 classes blocks of 512 classes take 1.3 of the cycles (values) and 1.5 (gradients).

    Several axes of rows of hidden states are merged, for fewer copies: (4, 2048) rows of 2048 features, with a kernel
    [features, 128256], take 0.6 rather than 0.86 GB on a TPU. Not where a mesh may shard them: devices would then have to
    exchange rows.
    """
    first = inputs[0]
    batch = (first["hidden"] if "hidden" in first else first["array"]).shape[:-1]
    if len(batch) > 1 and _mesh.devices() == 1 and (chunks > 1 or "hidden" in first):
        inputs = tuple({n: flat_rows(n, x, batch) if has_rows(n, x) else x for n, x in i.items()} for i in inputs)
        return jax.tree.map(lambda x: x.reshape(batch), by_rows(chunks, inputs, function))
    if chunks == 1:
        return function(*inputs)
    axis = max(range(len(batch)), key=batch.__getitem__)

    def is_split(name: str, x: Array) -> bool:
        return has_rows(name, x) and x.shape[axis] == batch[axis]

    axes = _mesh.varying(inputs)  # so that a gradient by the classes is summed over devices once, after all chunks
    inputs = tuple({n: _mesh.vary(x, axes) if n in ALONG_CLASSES else x for n, x in i.items()} for i in inputs)
    fill = {"temperature": 1}  # by which logits are divided
    chunked = tuple(
        {n: split_rows(x, chunks, axis, fill.get(n, 0)) for n, x in i.items() if is_split(n, x)} for i in inputs
    )
    whole = tuple({n: x for n, x in i.items() if not is_split(n, x)} for i in inputs)
    sums = tuple({n: _accumulator(x) for n, x in i.items() if x.dtype in (jnp.bfloat16, jnp.float16)} for i in whole)

    def of_chunk(chunk: tuple[Inputs, ...]) -> Any:
        read = (w | {n: _accumulated(w[n], total) for n, total in s.items()} for w, s in zip(whole, sums, strict=True))
        return function(*(c | w for c, w in zip(chunk, read, strict=True)))

    return jax.tree.map(lambda x: join_rows(x, batch[axis], axis), lax.map(of_chunk, chunked))


# The gradient by what all chunks read is a sum over the chunks, which a transpose forms in the dtype of what they read. For
# half precision that is a float32 accumulator beside it, with its derivative.


@custom_jvp
def _accumulator(x: Array) -> Array:
    """Zeros in float32, with the derivative of x."""
    return _mesh.vary(jnp.zeros_like(x, dtype=jnp.float32), _mesh.varying(x))


@_accumulator.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return _accumulator(*primals), tangents[0].astype(jnp.float32)


@custom_jvp
def _accumulated(x: Array, accumulator: Array) -> Array:
    """x, with the derivative of the accumulator."""
    return x


@_accumulated.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[0], tangents[1].astype(primals[0].dtype)
