"""One pass over the classes of `LinearLogits`, a block of them at a time, and its derivatives.

The formulas are those of _rows.py. A block's logits are computed, used and forgotten: in the pass that finds the maximum
and the sums, and again for each derivative. What is carried from block to block is a few numbers per row:

- the maximum m so far, the first class that attains it, and the sum of exp(x - c) over all classes but one that does, from
  an anchor c that is an integer, so that a change of anchors is exact before it is exponentiated. Where two blocks meet,
  the lesser of their maxima joins the others;
- sums of weighted gaps t_k (m - x_k) with the sum of t_k, by which they grow when m does. No term is negative.

The derivative of each statistic is a sum over the classes of a coefficient times the logit's tangent. It is taken block
by block too, and as the body of that loop is a checkpoint, its transpose computes a block's logits once more rather than
keep them. The coefficients are functions of a block's logits and of the statistics, both of which have derivatives: so
all orders and both modes work.

Where the classes are sharded, each device goes over its own, and devices meet as blocks do; each sum over the blocks is
followed by one over the devices.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from jaxce import _checks, _mesh
from jaxce._logits import LinearLogits, ShardedLogits, contract, contract_half_tangent, shape_logits
from jaxce._numerics import bregman_pair, jensen_shannon, log1p, single
from jaxce._rows import _anchor, _finite, dominant, others

_BLOCK = 1 << 22
"""How many logits a block has by default."""


class Spec(NamedTuple):
    """What is fixed while tracing."""

    size: int  # classes in a block
    strips: int  # in how many places a block is, evenly over the classes
    dtype: Any  # to compute in
    entropy: bool = False
    uniform: bool = False
    half: bool = False  # whether hidden and kernel are bfloat16
    axis_name: _checks.AxisName | None = None  # of the mesh, over which the classes are sharded


class Operands(NamedTuple):
    """The logits, and what comes with them class by class."""

    logits: Any  # LinearLogits, or an array with the classes on its last axis
    keep: Any = None  # the mask of entries, whose axes may be of length 1
    labels: Any = None
    targets: Any = None  # of the logits' shape
    weights: Any = None  # of the classes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.logits.shape


class Row(NamedTuple):
    """What the pass leaves that has no derivative. Compare `_rows.Row`."""

    maximum: Array
    anchor: Array
    top: Array
    weight: Array
    others: Array
    present: Array
    label_logit: Any
    sums: dict[str, tuple[Array, Array]]  # of t over the classes below the maximum, and over those that attain it
    count: Any  # how many classes are there
    mean_gap: Any

    @property
    def total(self) -> Array:
        return self.weight + self.others

    @property
    def log_sum(self) -> Array:
        return log1p(self.others / self.weight)


def block_size(logits: LinearLogits) -> int:
    """How many classes to take at a time, if the logits don't say it."""
    classes = logits.classes
    if logits.block_size is not None:
        return min(logits.block_size, classes)
    rows = max(1, math.prod(logits.shape[:-1]))
    most = max(256, _BLOCK // rows // 128 * 128)
    blocks = -(-classes // most)
    return min(classes, -(-classes // (blocks * 128)) * 128)


def spec_of(logits: LinearLogits | ShardedLogits | Array, op: Operands, *others: Any) -> Spec:
    """How to go over the classes: in the widest dtype of the logits, ``others`` and float32."""
    arrays = [
        leaf
        for x in (logits, *others)
        for leaf in ((x.hidden, x.kernel) if isinstance(x, LinearLogits) else jax.tree.leaves(x))
    ]
    dtype = _checks.compute_dtype(*arrays)
    if isinstance(logits, LinearLogits):
        strips = _mesh.strips(logits.classes)
        size = -(-block_size(logits) // strips) * strips
        return Spec(size, strips, dtype, half=logits.half, axis_name=logits.axis_name)
    return Spec(op.shape[-1], 1, dtype, axis_name=logits.axis_name if isinstance(logits, ShardedLogits) else None)


# ------------------------------------------------------------------------------------------------------------- one block


def _cut(spec: Spec, x: Array, start: Array, axis: int) -> Array:
    """A block of an axis of classes, from the same place in each strip."""
    axis %= x.ndim
    strips = x.reshape(*x.shape[:axis], spec.strips, x.shape[axis] // spec.strips, *x.shape[axis + 1 :])
    block = lax.dynamic_slice_in_dim(strips, start, spec.size // spec.strips, axis + 1)
    return block.reshape(*x.shape[:axis], spec.size, *x.shape[axis + 1 :])


@partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def _slice(spec: Spec, x: Array, start: Array, axis: int) -> Array:
    """`_cut`; of 16-bit floats by their bits, or XLA:CPU would widen the whole array to float32 before the loop."""
    if x.dtype.itemsize != 2:
        return _cut(spec, x, start, axis)
    bits = _cut(spec, lax.bitcast_convert_type(x, jnp.uint16), start, axis)
    return lax.bitcast_convert_type(bits, x.dtype)


@_slice.defjvp
def _(spec: Spec, axis: int, primals: Any, tangents: Any) -> Any:
    x, start = primals
    return _slice(spec, x, start, axis), _cut(spec, tangents[0], start, axis)


def _beside(values: Array, like: Array) -> Array:
    """Values of a block's classes as an array with all of the logits' axes."""
    return jnp.expand_dims(values, tuple(range(like.ndim - values.ndim)))


class Block(NamedTuple):
    """One block of logits."""

    x: Array  # -inf where a class isn't there
    there: Array | None  # which entries are not masked, and not in the block before; None for all
    places: Array  # the classes' indices, [size], counted over all devices
    start: Array  # where in each strip it starts


def _start(spec: Spec, classes: int, i: Array) -> tuple[Array, Array, Array | None]:
    """Where block i starts, its classes, and which of them are new: the last block ends with the last class."""
    length, size = classes // spec.strips, spec.size // spec.strips
    start = jnp.minimum(i * size, length - size)
    here = start + jnp.arange(size, dtype=start.dtype)
    new = None if length % size == 0 else jnp.tile(here >= i * size, spec.strips)
    first = _offset(spec, classes) + length * jnp.arange(spec.strips, dtype=start.dtype)
    return start, (first[:, None] + here[None]).reshape(-1), new


def _offset(spec: Spec, classes: int) -> Array | int:
    """The first of this device's classes."""
    return 0 if spec.axis_name is None else lax.axis_index(spec.axis_name) * classes


def _all_classes(spec: Spec, classes: int) -> int:
    """How many classes all devices have."""
    return classes if spec.axis_name is None else classes * lax.psum(1, spec.axis_name)


def _axes(spec: Spec, *operands: Operands) -> frozenset[str]:
    """The axes of the mesh over which a block of logits differs."""
    here = () if spec.axis_name is None else lax.axis_index(spec.axis_name)
    return _mesh.varying(operands, here)


def over_devices(axis_name: _checks.AxisName | None, sums: Any) -> Any:
    """Sums over this device's classes, added up over the devices."""
    return sums if axis_name is None else lax.psum(sums, axis_name)


def _there(spec: Spec, op: Operands, start: Array, new: Array | None) -> Array | None:
    mask = op.keep
    if mask is not None and mask.shape[-1] != 1:
        mask = _cut(spec, mask, start, -1)
    if new is None:
        return mask
    new = jnp.expand_dims(new, tuple(range(len(op.shape) - 1)))
    return new if mask is None else mask & new


def _kernel_block(spec: Spec, op: Operands, start: Array, there: Array | None) -> Array:
    """A block of the kernel. What a class holds that is masked in all rows must not be multiplied by anything."""
    logits = op.logits
    block = _slice(spec, logits.kernel, start, logits.class_axis % 2)
    if there is None or op.keep is None or math.prod(op.keep.shape[:-1]) != 1:
        return block
    columns = jnp.broadcast_to(there, (*there.shape[:-1], spec.size)).reshape(-1)
    return jnp.where(jnp.expand_dims(columns, 1 if logits.class_axis == 0 else 0), block, 0)


def _products(spec: Spec, op: Operands, start: Array, there: Array | None) -> Array:
    """hW + b of a block, 0 where it is not to be used."""
    logits = op.logits
    u = contract(logits.hidden, _kernel_block(spec, op, start, there), logits.class_axis, spec.half)
    u = u.astype(spec.dtype)
    if logits.bias is not None:
        bias = _slice(spec, logits.bias, start, 0).astype(spec.dtype)
        u = u + _beside(bias, u)
    return u


def _usable(u: Array, there: Array | None) -> Array:
    usable = u > -jnp.inf
    usable = usable | jnp.isnan(u)
    return usable if there is None else usable & there


def _block(spec: Spec, op: Operands, i: Array) -> Block:
    start, places, new = _start(spec, op.shape[-1], i)
    there = _there(spec, op, start, new)
    if not isinstance(op.logits, LinearLogits):
        x = _slice(spec, op.logits, start, op.logits.ndim - 1).astype(spec.dtype)
        return Block(_finite(x if there is None else jnp.where(there, x, -jnp.inf)), there, places, start)
    u = _products(spec, op, start, there)
    if there is None and op.logits.bias is None:
        x = shape_logits(u, op.logits.temperature, op.logits.soft_cap)
    else:
        usable = _usable(u, there)
        x = shape_logits(jnp.where(usable, u, 0), op.logits.temperature, op.logits.soft_cap)
        x = jnp.where(usable, x, -jnp.inf)
    return Block(_finite(x), there, places, start)


def _tangent_block(spec: Spec, op: Operands, dop: Operands, i: Array) -> tuple[Block, Array | None]:
    """A block of logits with its tangent; None where nothing in the logits varies.

    The tangents of hidden states and kernel come in float32 even where these are of half precision, so that a transpose
    sums over the blocks in float32.
    """
    block = _block(spec, op, i)
    logits, dlogits = op.logits, dop.logits
    varies = [leaf for leaf in jax.tree.leaves(dlogits, is_leaf=_is_zero) if not _is_zero(leaf)]
    if not varies:
        return block, None
    start, _, new = _start(spec, op.shape[-1], i)
    there = _there(spec, op, start, new)
    if not isinstance(logits, LinearLogits):
        dx = _cut(spec, dlogits, start, -1)
        return block, dx if there is None else jnp.where(there, dx, 0)
    axis = logits.class_axis
    u = _products(spec, op, start, there)
    usable = None if there is None and logits.bias is None else _usable(u, there)
    u = u if usable is None else jnp.where(usable, u, 0)
    du = jnp.zeros_like(u)
    w = _kernel_block(spec, op, start, there)
    dh = None if _is_zero(dlogits.hidden) else dlogits.hidden
    dw = None
    if not _is_zero(dlogits.kernel):
        dw = _cut(spec, dlogits.kernel, start, axis % 2)
    if dh is not None:
        du = du + _by_strip(spec, lambda dh, w: _product_tangent(spec, logits, w, dh, None), dh, w, axis % 2)
    if dw is not None:
        du = du + _product_tangent(spec, logits, w, None, dw)
    if logits.bias is not None and not _is_zero(dlogits.bias):
        du = du + _beside(_cut(spec, dlogits.bias, start, 0).astype(spec.dtype), u)
    numbers = [n for n in ("temperature", "soft_cap") if getattr(logits, n) is not None]
    values = [jnp.asarray(getattr(logits, n)).astype(spec.dtype) for n in numbers]
    dvalues = [
        jnp.zeros_like(v) if _is_zero(dv := getattr(dlogits, n)) else dv for n, v in zip(numbers, values, strict=True)
    ]
    if numbers:

        def shape(u: Array, *values: Array) -> Array:
            named = dict(zip(numbers, values, strict=True))
            return shape_logits(u, named.get("temperature"), named.get("soft_cap"))

        du = jax.jvp(shape, (u, *values), (du, *dvalues))[1]
    return block, du if usable is None else jnp.where(usable, du, 0)


def _product_tangent(spec: Spec, logits: LinearLogits, w: Array, dh: Array | None, dw: Array | None) -> Array:
    """The tangent of the product of the hidden states with a block w of the kernel, along one of the two."""
    if spec.half:
        return contract_half_tangent(logits.hidden, w, dh, dw, logits.class_axis).astype(spec.dtype)
    if dw is not None:
        return contract(logits.hidden.astype(spec.dtype), dw, logits.class_axis, False)
    assert dh is not None
    return contract(dh, w.astype(spec.dtype), logits.class_axis, False)


def _by_strip(spec: Spec, product: Callable[[Array, Array], Array], dh: Array, w: Array, axis: int) -> Array:
    """The product with each strip of a block of the kernel of a dh of its own.

    So a transpose adds up the gradient of the hidden states strip by strip, and XLA has no reason to add up over the
    devices before the loop has ended.
    """
    if spec.strips == 1:
        return product(dh, w)
    strips = w.reshape(*w.shape[:axis], spec.strips, -1, *w.shape[axis + 1 :])
    du = jax.vmap(product, (0, axis), -2)(dh, strips)
    return du.reshape(*du.shape[:-2], spec.size)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _widened(spec: Spec, dop: Operands) -> Operands:
    """The tangents of what the loop adds up, in the dtype to add up in; that of the hidden states once for each strip."""

    def widen(tangent: Any) -> Any:
        if _is_zero(tangent) or tangent.dtype == jax.dtypes.float0:
            return tangent
        return tangent.astype(spec.dtype)

    dop = jax.tree.map(widen, dop, is_leaf=_is_zero)
    if spec.strips == 1 or not isinstance(dop.logits, LinearLogits) or _is_zero(dop.logits.hidden):
        return dop
    dlogits = copy.copy(dop.logits)
    dlogits._set({"hidden": jnp.broadcast_to(dlogits.hidden, (spec.strips, *dlogits.hidden.shape))})
    return dop._replace(logits=dlogits)


def _sum_blocks(spec: Spec, classes: int, step: Callable[[Array], Any]) -> Any:
    """The sum of step(i) over the blocks of all devices, as a loop that keeps nothing of a step for its transpose."""
    step = jax.checkpoint(step, prevent_cse=False)
    blocks = -(-classes // spec.size)
    if blocks == 1:
        return over_devices(spec.axis_name, step(jnp.int32(0)))
    like = jax.eval_shape(step, jax.ShapeDtypeStruct((), jnp.int32))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    axes = _mesh.varying(jax.tree.leaves(like))

    def body(total: Any, i: Array) -> tuple[Any, None]:
        return _mesh.vary(jax.tree.map(jnp.add, total, step(i)), axes), None

    return over_devices(spec.axis_name, lax.scan(body, _mesh.vary(zero, axes), jnp.arange(blocks, dtype=jnp.int32))[0])


def _with_derivative_of(value: Array, other: Array) -> Array:
    """``value``, which stands for the same number as ``other`` with more of its digits, with the derivatives of that."""
    return value + (other - lax.stop_gradient(other))


# ------------------------------------------------------------------------------------------------------------- the pass


def _place_in_block(spec: Spec, op: Operands, block: Block, i: Array) -> tuple[Array, Array]:
    """Where in block i the labels are, and which of them are there, and not in the block before."""
    length, size = op.shape[-1] // spec.strips, spec.size // spec.strips
    dtype = op.labels.dtype
    here = op.labels - jnp.asarray(_offset(spec, op.shape[-1])).astype(dtype)
    strip, y = here // length, here % length
    inside = (
        (here >= 0) & (here < op.shape[-1]) & (y >= (i * size).astype(dtype)) & (y < (i * size + size).astype(dtype))
    )
    return strip * size + y - block.start.astype(dtype), inside


def _targets(spec: Spec, op: Operands, block: Block, kind: str, count: Array | None = None) -> Array:
    """t of the block's classes, by kind: what is given, or the uniform distribution; times the weights of the classes."""
    if kind == "given":
        t = _cut(spec, op.targets, block.start, -1).astype(spec.dtype)
    else:
        t = (block.x > -jnp.inf).astype(spec.dtype)
        t = t if count is None else t / jnp.maximum(count, 1)[..., None]
    if op.weights is not None:
        w = _cut(spec, op.weights, block.start, 0).astype(spec.dtype)
        t = t * _beside(w, t)
    return t if block.there is None else jnp.where(block.there, t, 0)


def _kinds(spec: Spec, op: Operands) -> tuple[str, ...]:
    return ("given",) * (op.targets is not None) + ("uniform",) * spec.uniform


def _absent_is(value: float, x: Array, values: Array) -> Array:
    return jnp.where(jnp.isneginf(x), value, values)


def measure(spec: Spec, op: Operands) -> tuple[dict[str, Array], Row]:
    """The statistics of each row by name, which are differentiable, and what their derivatives need, which is not.

    log_normalizer always; nll where there are labels; for each kind of targets the sums of t_k (g_k + L) and of t_k;
    entropy.
    """
    return _measure(spec, _mesh.vary(op, _axes(spec, op)))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _measure(spec: Spec, op: Operands) -> tuple[dict[str, Array], Row]:
    batch, here = op.shape[:-1], op.shape[-1]
    classes = _all_classes(spec, here)
    zeros = jnp.zeros(batch, spec.dtype)
    kinds = _kinds(spec, op)
    state: dict[str, Any] = {
        "maximum": jnp.full(batch, -jnp.inf, spec.dtype),
        "top": jnp.zeros(batch, jnp.int32),
        "others": zeros,
        "label": None if op.labels is None else zeros + jnp.nan,  # until it is found
        "sums": {kind: (zeros, zeros, zeros) for kind in kinds},  # of t gap; of t below the maximum; of t there
        "count": zeros if "uniform" in kinds else None,
        "gaps": zeros if spec.entropy else None,
    }

    def step(state: dict[str, Any], i: Array) -> tuple[dict[str, Any], None]:
        block = _block(spec, op, i)
        x, place = block.x, _beside(block.places, block.x)
        m1, mb = state["maximum"], jnp.max(x, -1)
        m = jnp.maximum(m1, mb)
        c1, c = _anchor(m1, classes), _anchor(m, classes)
        factor = jnp.where(m1 == -jnp.inf, 0, jnp.exp(c1 - c))
        here = others(x, jnp.where(mb == -jnp.inf, 0, mb), c, jnp.exp(mb - c), infinite=False)
        new = dict(state)
        new["maximum"] = m
        new["others"] = state["others"] * factor + (here + jnp.exp(jnp.minimum(m1, mb) - c))
        top = jnp.min(jnp.where(x == mb[..., None], place, classes - 1), -1)
        new["top"] = jnp.where(~(mb <= m1) | (mb == m1) & (top < state["top"]), top, state["top"])
        if op.labels is not None:
            y, inside = _place_in_block(spec, op, block, i)
            taken = jnp.take_along_axis(x, y[..., None], -1, mode="clip")[..., 0]
            new["label"] = jnp.where(inside, taken, state["label"])
        rise = jnp.where(m > m1, m - m1, 0)
        for kind in kinds:
            gaps, rest, top_t = state["sums"][kind]
            t = _targets(spec, op, block, kind)
            gap = _absent_is(jnp.inf, x, m[..., None] - x)
            before = rest + top_t
            gaps = gaps + jnp.where(before == 0, 0, before * rise) + jnp.sum(jnp.where(t == 0, 0, t * gap), -1)
            at_top = x == m[..., None]
            rest = rest + (jnp.sum(jnp.where(at_top, 0, t), -1) + jnp.where(m1 < m, top_t, 0))
            top_t = jnp.where(m1 < m, 0, top_t) + jnp.sum(jnp.where(at_top, t, 0), -1)
            new["sums"] = {**new["sums"], kind: (gaps, rest, top_t)}
        if state["count"] is not None:
            new["count"] = state["count"] + jnp.sum(_absent_is(0, x, jnp.ones_like(x)), -1)
        if spec.entropy:
            before = state["others"] + jnp.where(m1 == -jnp.inf, 0, jnp.exp(m1 - c1))
            before = before * factor  # first, since before times the rise may overflow
            risen = jnp.where(before == 0, 0, before * rise)
            terms = jnp.exp(x - c[..., None]) * _absent_is(0, x, m[..., None] - x)
            new["gaps"] = state["gaps"] * factor + risen + jnp.sum(terms, -1)
        return new, None

    blocks = -(-here // spec.size)
    if blocks == 1:
        state, _ = step(state, jnp.int32(0))
    else:
        state = _mesh.vary(state, _axes(spec, op))
        state, _ = lax.scan(step, state, jnp.arange(blocks, dtype=jnp.int32))
    if spec.axis_name is not None:
        state = _meet(spec, op, state, classes)

    m = state["maximum"]
    present = m != -jnp.inf
    anchor = _anchor(m, classes)
    weight = jnp.where(present, jnp.exp(m - anchor), 1)
    count = state["count"]
    sums = {kind: (rest, top) for kind, (_, rest, top) in state["sums"].items()}
    if count is not None:
        sums["uniform"] = tuple(v / jnp.maximum(count, 1) for v in sums["uniform"])
    row = Row(m, anchor, state["top"], weight, state["others"], present, state["label"], sums, count, None)
    log_sum = row.log_sum
    values = {"log_normalizer": m + log_sum}
    if op.labels is not None:
        nll = _absent_is(jnp.inf, state["label"], m - state["label"]) + log_sum
        values["nll"] = jnp.where(present, nll, 0)
    for kind, (gaps, _, _) in state["sums"].items():
        gaps = gaps if count is None or kind == "given" else gaps / jnp.maximum(count, 1)
        values[f"sum of {kind}"] = sum(sums[kind], jnp.zeros_like(m))
        values[kind] = jnp.where(present, gaps + values[f"sum of {kind}"] * log_sum, 0)
    if spec.entropy:
        row = row._replace(mean_gap=state["gaps"] / row.total)
        values["entropy"] = jnp.where(present, row.mean_gap + log_sum, 0)
    return values, row


def _meet(spec: Spec, op: Operands, state: dict[str, Any], classes: int) -> dict[str, Any]:
    """What all devices know, from what each does of its classes; they meet as two blocks do in `_measure`."""
    m1, m = state["maximum"], lax.pmax(state["maximum"], spec.axis_name)
    top = lax.pmin(jnp.where(m1 == m, state["top"], classes - 1), spec.axis_name)
    device = lax.axis_index(spec.axis_name)
    wins = device == lax.pmin(jnp.where(m1 == m, device, classes), spec.axis_name)  # one of them
    c1, c = _anchor(m1, classes), _anchor(m, classes)
    factor = jnp.where(m1 == -jnp.inf, 0, jnp.exp(c1 - c))
    rise = jnp.where(m > m1, m - m1, 0)

    def risen(gaps: Array, weight: Array) -> Array:
        return gaps + jnp.where(weight == 0, 0, weight * rise)

    new: dict[str, Any] = {
        "others": state["others"] * factor + jnp.where(wins, 0, jnp.exp(m1 - c)),
        "sums": {
            kind: (risen(gaps, rest + top_t), rest + jnp.where(m1 == m, 0, top_t), jnp.where(m1 == m, top_t, 0))
            for kind, (gaps, rest, top_t) in state["sums"].items()
        },
        "count": state["count"],
        "gaps": None,
        "label": None,
    }
    if state["gaps"] is not None:
        weight = (state["others"] + jnp.where(m1 == -jnp.inf, 0, jnp.exp(m1 - c1))) * factor
        new["gaps"] = risen(state["gaps"] * factor, weight)
    if state["label"] is not None:
        y = op.labels - jnp.asarray(_offset(spec, op.shape[-1])).astype(op.labels.dtype)
        mine = (y >= 0) & (y < op.shape[-1])
        new["label"] = jnp.where(mine, state["label"], 0), mine.astype(jnp.int32)
    new = lax.psum(new, spec.axis_name)
    if state["label"] is not None:
        label, found = new["label"]
        new["label"] = jnp.where(found > 0, label, jnp.nan)
    m = jnp.where(jnp.isnan(new["others"]), jnp.nan, m)  # not every network's maximum keeps NaN
    return new | {"maximum": m, "top": top}


@partial(_measure.defjvp, symbolic_zeros=True)
def _(spec: Spec, primals: Any, tangents: Any) -> Any:
    (op,), (dop,) = primals, tangents
    known = _measure(spec, op)
    values, row = _mesh.vary(known, _axes(spec, op))
    dop = _widened(spec, dop)
    classes = op.shape[-1]
    shift = _shift(values, row)
    total = _with_derivative_of(row.total, row.total * jnp.exp(shift))
    at_label = jnp.zeros_like(row.total)  # the gradient there, p - 1, and NaN where it isn't a class
    if op.labels is not None:
        rest = row.total - jnp.exp(row.label_logit - row.anchor)
        at_label = -jnp.where(row.label_logit == row.maximum, row.others, rest) / row.total
        at_label = jnp.where(row.present, at_label, 0)

    def step(i: Array) -> dict[str, Array]:
        block, dx = _tangent_block(spec, op, dop, i)
        x = block.x
        p = jnp.exp(x - row.anchor[..., None]) / total[..., None]
        gap = _absent_is(0, x, row.maximum[..., None] - x)
        out: dict[str, Array] = {}

        def along(coefficient: Array) -> Array:
            return jnp.zeros(x.shape[:-1], x.dtype) if dx is None else jnp.sum(coefficient * dx, -1)

        out["log_normalizer"] = along(p)
        if "nll" in values:
            is_label = _beside(block.places.astype(op.labels.dtype), x) == op.labels[..., None]
            is_label = is_label | jnp.isnan(at_label)[..., None]
            exact = jnp.where(is_label, at_label[..., None], lax.stop_gradient(p))
            out["nll"] = along(_with_derivative_of(exact, p))
        for kind in _kinds(spec, op):
            t = _targets(spec, op, block, kind, row.count)
            sum_t, (rest_t, top_t) = values[f"sum of {kind}"], row.sums[kind]
            error = p * sum_t[..., None] - t
            at_top = x == dominant(row)[..., None]
            exact = ((row.weight * rest_t - row.others * top_t) / row.total)[..., None]
            error = _with_derivative_of(jnp.where(at_top, exact, lax.stop_gradient(error)), error)
            out[kind] = along(error)
            if (dt := _target_tangents(spec, op, dop, block, kind, row.count)) is not None:
                nll = gap + (row.log_sum + shift)[..., None]
                nll = jnp.where(jnp.isneginf(x), jnp.where(t == 0, 0, jnp.inf), nll)
                out[kind] += jnp.sum(nll * dt, -1)
                out[f"sum of {kind}"] = jnp.sum(dt, -1)
        if "entropy" in values:
            difference = shift - (values["entropy"] - lax.stop_gradient(values["entropy"]))
            out["entropy"] = along(p * ((gap - row.mean_gap[..., None]) + difference[..., None]))
        return out

    out = _sum_blocks(spec, classes, step)
    zeros = {name: jnp.zeros_like(value) for name, value in known[0].items()}
    return known, (zeros | out, zero_from_primal(known[1], symbolic_zeros=True))


def _shift(values: dict[str, Array], row: Row) -> Array:
    """0 with the derivatives of the log-normalizer."""
    value = jnp.where(row.present, values["log_normalizer"], 0)
    return value - lax.stop_gradient(value)


def _target_tangents(
    spec: Spec, op: Operands, dop: Operands, block: Block, kind: str, count: Array | None
) -> Array | None:
    """The tangents of a block's targets; None where neither they nor the weights of the classes vary."""
    given = {"targets": kind == "given" and op.targets is not None, "weights": op.weights is not None}
    varies = {name: getattr(op, name) for name, there in given.items() if there and not _is_zero(getattr(dop, name))}
    if not varies:
        return None
    tangents = tuple(getattr(dop, name) for name in varies)

    def of(*values: Array) -> Array:
        return _targets(spec, op._replace(**dict(zip(varies, values, strict=True))), block, kind, count)

    return jax.jvp(of, tuple(v.astype(spec.dtype) for v in varies.values()), tangents)[1]


# ------------------------------------------------------------------------------- sums over the classes, of one or two rows


def _log_probability(block: Block, values: dict[str, Array], row: Row) -> Array:
    """log p of the block's classes, -inf where one isn't there."""
    m = jnp.where(row.present, row.maximum, 0)
    log_p = -((m[..., None] - block.x) + (row.log_sum + _shift(values, row))[..., None])
    return jnp.where(jnp.isneginf(block.x), -jnp.inf, log_p)


Known = tuple[dict[str, Array], Row]


def log_probabilities(spec: Spec, op: Operands) -> Array:
    """log p of all classes of an array, -inf where one isn't there."""
    axes = _axes(spec, op)
    op = _mesh.vary(op, axes)
    known = _mesh.vary(_measure(spec, op), axes)
    return _log_probability(_block(spec, op, jnp.int32(0)), *known)


def at_label(spec: Spec, weights: Array, labels: Array) -> Array:
    """The weight of each row's label."""
    y = labels - jnp.asarray(_offset(spec, weights.size)).astype(labels.dtype)
    weight = jnp.take(weights, y, mode="clip")
    if spec.axis_name is None:
        return weight
    return lax.psum(jnp.where((y >= 0) & (y < weights.size), weight, 0), spec.axis_name)


def sum_of_terms(
    term: Callable[..., Array], specs: tuple[Spec, ...], operands: tuple[Operands, ...]
) -> tuple[Array, tuple[Row, ...]]:
    """sum_k term(log p_k, ...) with the log-probabilities of one or two kinds of logits, and their rows.

    Where the first comes with targets, the term has t_k as its last argument.
    """
    axes = _axes(specs[0], *operands)
    operands = _mesh.vary(operands, axes)
    known = tuple(_measure(s, op._replace(targets=None)) for s, op in zip(specs, operands, strict=True))
    return _sum_of_terms(term, specs, operands, _mesh.vary(known, axes)), tuple(row for _, row in known)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _sum_of_terms(
    term: Callable[..., Array], specs: tuple[Spec, ...], operands: tuple[Operands, ...], known: tuple[Known, ...]
) -> Array:
    def step(i: Array) -> Array:
        blocks = [_block(s, op, i) for s, op in zip(specs, operands, strict=True)]
        inputs = [_log_probability(block, *k) for block, k in zip(blocks, known, strict=True)]
        if operands[0].targets is not None:
            inputs.append(_targets(specs[0], operands[0], blocks[0], "given"))
        return jnp.sum(term(*inputs), -1)

    return _sum_blocks(specs[0], operands[0].shape[-1], step)


@partial(_sum_of_terms.defjvp, symbolic_zeros=True)
def _(term: Callable[..., Array], specs: tuple[Spec, ...], primals: Any, tangents: Any) -> Any:
    operands, known = primals
    widened = [_widened(s, dop) for s, dop in zip(specs, tangents[0], strict=True)]
    shifts = [dvalues["log_normalizer"] for dvalues, _ in tangents[1]]

    def step(i: Array) -> Array:
        inputs, directions = [], []
        for s, op, dop, k, shift in zip(specs, operands, widened, known, shifts, strict=True):
            block, dx = _tangent_block(s, op, dop, i)
            log_p = _log_probability(block, *k)
            change = jnp.zeros_like(log_p) if dx is None else dx
            change = change if _is_zero(shift) else change - shift[..., None]
            inputs.append(log_p)
            directions.append(_absent_is(0, log_p, change))
            if op.targets is not None:
                inputs.append(_targets(s, op, block, "given"))
                dt = _target_tangents(s, op, dop, block, "given", None)
                directions.append(jnp.zeros_like(log_p) if dt is None else dt)
        return jnp.sum(jax.jvp(term, tuple(inputs), tuple(directions))[1], -1)

    value = _sum_of_terms(term, specs, operands, known)
    return value, _sum_blocks(specs[0], operands[0].shape[-1], step)


def _difference(log_p: Array, log_q: Array) -> Array:
    """log p - log q, large but finite where only one is there, 0 where neither is."""
    most = float(jnp.finfo(log_p.dtype).max) / 8
    there_p, there_q = ~jnp.isneginf(log_p), ~jnp.isneginf(log_q)
    both = there_p & there_q
    difference = jnp.where(both, log_p, 0) - jnp.where(both, log_q, 0)
    return jnp.where(both, difference, jnp.where(there_p, most, jnp.where(there_q, -most, 0)))


def cross_entropy_term(log_p: Array, log_q: Array) -> Array:
    """-p log q; 0 where p isn't there."""
    absent = jnp.isneginf(log_p)
    return jnp.where(absent, 0, jnp.exp(log_p) * jnp.where(absent, 0, -log_q))


@jax.custom_jvp
def relative_entropy_term(log_p: Array, log_q: Array) -> Array:
    """p log(p/q) - p + q >= 0; +inf where only p is there."""
    p, q, delta = jnp.exp(log_p), jnp.exp(log_q), _difference(log_p, log_q)
    close = jnp.abs(delta) < 0.5
    difference = jnp.where(close, q * jnp.expm1(jnp.where(close, delta, 0)), p - q)
    hi, lo = bregman_pair(single(p), single(q), single(difference), single(delta))
    value = jnp.where(p == 0, q, hi + lo)
    return jnp.where(jnp.isneginf(log_q) & ~jnp.isneginf(log_p), jnp.inf, value)


@relative_entropy_term.defjvp
def _(primals: Any, tangents: Any) -> Any:
    log_p, log_q = primals
    p, q, delta = jnp.exp(log_p), jnp.exp(log_q), _difference(log_p, log_q)
    return relative_entropy_term(log_p, log_q), p * delta * tangents[0] + (q - p) * tangents[1]


@jax.custom_jvp
def jensen_shannon_term(log_p: Array, log_q: Array) -> Array:
    """(b(p, m) + b(q, m)) / 2 with m = (p + q) / 2 and b the term above."""
    hi, lo = jensen_shannon(jnp.exp(log_p), jnp.exp(log_q))
    return hi + lo


@jensen_shannon_term.defjvp
def _(primals: Any, tangents: Any) -> Any:
    p, q, delta = jnp.exp(primals[0]), jnp.exp(primals[1]), _difference(*primals)
    g = jnp.log1p(jnp.expm1(-jnp.abs(delta)) / 2)  # log m less the larger of log p and log q
    a, b = jnp.where(delta >= 0, -g, delta - g), jnp.where(delta >= 0, -delta - g, -g)
    return jensen_shannon_term(*primals), p * a / 2 * tangents[0] + q * b / 2 * tangents[1]


def operands(
    function: str, argument: str, logits: LinearLogits | ShardedLogits | Array, axis: _checks.Axis, where: Any
) -> tuple[Operands, Array | None]:
    """``logits`` past the door, with the mask of rows."""
    axes = _checks.axes(function, axis, logits.ndim)
    name = logits.axis_name if isinstance(logits, LinearLogits | ShardedLogits) else None
    if name is not None:
        here = _mesh.index(function, name)
        whole = logits.kernel if isinstance(logits, LinearLogits) else logits
        if not _mesh.varying(here) <= _mesh.varying(whole):
            raise ValueError(
                f"{function}: {argument} must be sharded over {name!r}, which is their axis_name, "
                f"got the same {_checks.describe(whole)} on all of its devices"
            )
    if not isinstance(logits, LinearLogits):
        rows, keep = _checks.where_mask(function, where, logits.shape, axes)
        x = _checks.classes_last(logits.logits if isinstance(logits, ShardedLogits) else logits, axes)
        if x.shape[-1] == 0:
            raise ValueError(f"{function}: {argument} must have at least one class, got shape {logits.shape}")
    elif axes != (logits.ndim - 1,):
        raise ValueError(f"{function}: axis must be the last one where {argument} is computed by blocks, got {axis!r}")
    else:
        rows, keep = _mask(function, logits, where)
        x = logits
    if keep is not None:
        count = over_devices(name, jnp.sum(keep, -1, dtype=jnp.int32))
        rows = jnp.broadcast_to(count > 0, x.shape[:-1])
    if rows is not None:
        if isinstance(x, LinearLogits):
            x = dataclasses.replace(x, hidden=jnp.where(rows[..., None], x.hidden, 0))
        else:
            x = jnp.where(rows[..., None], x, 0)
    if isinstance(x, LinearLogits):  # what is summed over the blocks is summed in float32
        x = dataclasses.replace(x, hidden=_checks.upcast(x.hidden)[0])
    return Operands(x, keep), rows


def _mask(function: str, logits: LinearLogits, where: Any) -> tuple[Array | None, Array | None]:
    """``where`` as `_checks.where_mask` has it, but not broadcast."""
    if where is None:
        return None, None
    check = partial(_checks.where_mask, function, shape=logits.shape, class_axes=(logits.ndim - 1,))
    rows, _ = jax.eval_shape(check, where)
    mask = jnp.asarray(where)
    return (mask, None) if rows is not None else (None, jnp.expand_dims(mask, tuple(range(logits.ndim - mask.ndim))))
