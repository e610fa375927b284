"""The state of a row in the ways that are fast on XLA:CPU, from plain maxima and sums, and on XLA:GPU, in blocks.

This is the one file that knows a platform; a single reduction of the classes' states is the way of all others.

XLA:CPU can't vectorise a reduction with several operands, which takes five times as long there as the sums by themselves,
but for rows of a few classes, where it is the fastest. What its sums taught:

- arithmetic, minima, maxima and exp are fast inside of a sum; a comparison or a selection makes it several times slower;
- what two sums share is written out as an array of all classes, constants among it. So each sum has a barrier of its own,
  through which constants come as numbers of the rows;
- minimum(a, b) is b where either is NaN, and maxima lose NaN. Only a sum keeps it;
- rows are summed as one list of blocks, two axes in all: three are several times slower, and so are rows that are longer
  than the cache.

On a GPU the reduction is bound by its arithmetic, and XLA cuts long rows into pieces of which a thread has eight classes,
almost as few as the times that the threads of a warp meet. So long rows are cut here, into pieces of which a thread has
sixteen; and the label's logit is gathered rather than looked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxce import _mesh
from jaxce._state import SHARE, Ask, Block, State, Targets, before, leaves, meet, meet_all, targets_of

_FEW = 10
"""Up to so many classes go through the reduction with several operands, which XLA:CPU unrolls for so few."""

_MANY = 4096
"""From so many classes on rows are cut into blocks."""

_LONG, _SHORT = 4096, 512
"""Rows that are longer than the first are cut into blocks on a GPU, none shorter than the second."""


def over_classes(block: Block, ask: Ask, dtype: np.dtype, strips: int = 1) -> State:
    """The state of the rows of a block of classes, its last axis: the way over a row."""

    def reduction(block: Block) -> State:
        return meet_all(leaves(block, ask, dtype))

    if not _is_whole(block, strips):
        return reduction(block)
    cpu, gpu = (lambda block, way=way: way(block, ask, dtype) for way in (_from_sums, _in_blocks))
    return lax.platform_dependent(block, cpu=cpu, cuda=gpu, rocm=gpu, default=reduction)


def rank(block: Block, label: Array, dtype: np.dtype, strips: int = 1) -> Array:
    """How many classes of a block come before the label, whose logit is given."""

    def count(block: Block, label: Array) -> Array:
        return jnp.sum(before(block, label, dtype), -1, dtype=jnp.int32)

    if not _is_whole(block, strips):
        return count(block, label)
    return lax.platform_dependent(
        block, label, cpu=lambda block, label: _rank_from_sum(block, label, dtype), default=count
    )


def entry(x: Array, labels: Array, otherwise: Callable[[Array, Array], Array]) -> Array:
    """The entry of each row that its label names, without derivatives: a gather on a CPU and on a GPU."""

    def gathered(x: Array, labels: Array) -> Array:
        return _take(x, labels[..., None])[..., 0]

    if _mesh.devices() > 1 or x.size == 0:
        return otherwise(x, labels)
    return lax.platform_dependent(x, labels, cpu=gathered, cuda=gathered, rocm=gathered, default=otherwise)


def _is_whole(block: Block, strips: int) -> bool:
    """Whether a device has all of its classes in one piece, and more than a few."""
    *batch, classes = block.x.shape
    known = isinstance(classes, int)  # unlike a symbolic size of jax.export
    return known and classes > _FEW and strips == 1 and _mesh.devices() == 1 and math.prod(batch) > 0


def sums(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """The sums of arrays over their last axis, without derivatives: a single reduction, but on a CPU."""

    def reduction(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        zeros = tuple(np.zeros((), x.dtype) for x in arrays)
        return tuple(lax.reduce(arrays, zeros, lambda a, b: tuple(map(jnp.add, a, b)), (arrays[0].ndim - 1,)))

    return lax.platform_dependent(arrays, cpu=lambda arrays: tuple(jnp.sum(x, -1) for x in arrays), default=reduction)


def reread(x: Any) -> Any:
    """The same arrays, to be read once more on a CPU, where else what is made of them twice would be kept."""
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def renamed(x: Array, finite: Array) -> Array:
    """The same numbers, as others to a GPU: it knows no barriers, and would keep what is made of them twice."""

    def other(x: Array, finite: Array) -> Array:
        return x + 0 * finite

    return lax.platform_dependent(x, finite, cuda=other, rocm=other, default=lambda x, _: x)


def dynamic_slice(x: Array, start: Any, size: int, axis: int) -> Array:
    """lax.dynamic_slice_in_dim; on a CPU reread, or a product of 16-bit floats would have all of them widened first."""
    return reread(lax.dynamic_slice_in_dim(x, start, size, axis))


# --- XLA:GPU ----------------------------------------------------------------------------------------------------------


def _in_blocks(block: Block, ask: Ask, dtype: np.dtype) -> State:
    """The reduction, of long rows in two steps or of four classes at a time, with the label gathered."""
    classes = block.x.shape[-1]
    states = leaves(block._replace(labels=None), ask, dtype)
    alone = all(v is None for v in states[2:])
    if alone and block.x.dtype.itemsize == 2 and classes >= _SHORT:
        state = _in_fours(block.x, dtype)
    else:
        blocks = next((n for n in range(-(-classes // _LONG), classes // _SHORT + 1) if classes % n == 0), 1)
        if blocks > 1:
            states = meet_all(jax.tree.map(lambda x: x.reshape(*x.shape[:-1], blocks, -1), states))
        state = meet_all(states)
    return state if block.labels is None else state._replace(**_at_label(block, dtype))


def _in_fours(x: Array, dtype: np.dtype) -> State:
    """The maximum and the sum of exponentials alone, of four classes at a time.

    That is half of the instructions. Wider logits than 16-bit floats take as long to read either way; and of those, or if
    there were more to sum, XLA:GPU would write out what the four have in common.
    """
    size, rest = divmod(x.shape[-1], 4)
    m, *others = (lax.slice_in_dim(x, i * size, (i + 1) * size, axis=-1).astype(dtype) for i in range(4))
    lesser = []  # all but the maximum, in no order
    for y in others:
        lesser.append(jnp.minimum(m, y))
        m = jnp.maximum(m, y)
    most = float(jnp.finfo(dtype).max)
    peak = jnp.clip(m, -most, most)
    a, b, c = (_weight(y, peak) for y in lesser)
    state = meet_all(State(m, a + b + c))
    if not rest:
        return state
    last = lax.slice_in_dim(x, 4 * size, None, axis=-1).astype(dtype)
    return meet(state, meet_all(State(last, jnp.zeros_like(last))))


# --- XLA:CPU ----------------------------------------------------------------------------------------------------------


class _Sums:
    """Sums over the last axis of arrays of two, each behind a barrier of its own."""

    def __init__(self, peak: Array) -> None:
        self.peak = self.last = peak

    def __call__(self, term: Callable[..., Array], *arrays: Array, constants: tuple[ArrayLike, ...] = ()) -> Array:
        """The sums of term(values of the classes, peak, constants)."""
        rows = self.peak, *(jnp.full_like(self.peak, c) for c in constants)
        # With the last sum, so that no two of the barriers are the same.
        arrays, rows, _ = lax.optimization_barrier((arrays, rows, self.last))
        wide = (a.astype(self.peak.dtype) for a in arrays)
        self.last = lax.optimization_barrier(jnp.sum(term(*wide, *(r[:, None] for r in rows)), -1))
        return self.last


# Terms of such sums. The peak comes first in each minimum, so that NaN stays.


def _weight(x: Array, peak: Array) -> Array:
    """exp(-g): 0 of what is absent, and 1 of +inf."""
    return jnp.exp(jnp.minimum(peak, x) - peak)


def _below(x: Array, peak: Array, steep: Array, one: Array, zero: Array) -> Array:
    """1 where x is below the maximum, 0 where it attains it."""
    return jnp.maximum(zero, jnp.minimum(one, steep * (peak - x)))


def _lesser(x: Array, peak: Array, steep: Array, one: Array) -> Array:
    """exp(-g) where x is below the maximum, 0 where it attains it, -inf at +inf."""
    return jnp.exp(x - peak) * jnp.minimum(one, steep * (peak - x))


def _weight_squared(x: Array, peak: Array) -> Array:
    return jnp.square(_weight(x, peak))


def _lesser_squared(x: Array, peak: Array, steep: Array, one: Array) -> Array:
    return jnp.exp(x - peak) * _lesser(x, peak, steep, one)


def _weighted_gap(x: Array, peak: Array, most: Array) -> Array:
    """exp(-g) g, -inf at +inf."""
    return jnp.exp(x - peak) * jnp.minimum(most, peak - x)


def _target_gap(x: Array, t: Array, peak: Array, most: Array, one: Array) -> Array:
    """t g: infinite where g is, unless t is 0."""
    gap = peak - jnp.minimum(peak, x)
    near = jnp.minimum(most, gap)
    return t * near * (one + jnp.minimum(one, gap - near) * most)


def _there(x: Array, _: Array, one: Array, least: Array, quarter: Array) -> Array:
    """1 where a class is there, else 0; quarters tell the least finite number from -inf."""
    return jnp.minimum(one, jnp.maximum(quarter * x, least) - least)


def _gap_there(x: Array, peak: Array, one: Array, least: Array, quarter: Array, most: Array, share: Array) -> Array:
    """t g of a uniform target t where a class is there, else 0."""
    return share * jnp.minimum(most, peak - jnp.minimum(peak, x)) * _there(x, peak, one, least, quarter)


def _before(
    x: Array, label: Array, y: Array, steep: Array, one: Array, zero: Array, quarter: Array, most: Array
) -> Array:
    """1 of a class that comes before the label, else 0; quarters tell the largest numbers from the infinities."""
    ahead = y - lax.broadcasted_iota(y.dtype, x.shape, 1)
    lower, other = jnp.maximum(zero, jnp.minimum(one, ahead)), jnp.minimum(one, jnp.abs(ahead))
    x, label = (jnp.maximum(zero - most, jnp.minimum(most, quarter * v)) for v in (x, label))
    # The difference counts for at least 1, unless it is 0.
    return jnp.maximum(zero, jnp.minimum(other, steep * (x - label) + lower))


def _rank_from_sum(block: Block, label: Array, dtype: np.dtype) -> Array:
    most, tiny = float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).tiny)
    y = (block.labels - block.first).astype(dtype).reshape(-1)
    x = block.x.reshape(y.size, block.x.shape[-1])
    count = _Sums(label.reshape(-1))(_before, x, constants=(y, 1 / tiny, 1.0, 0.0, 0.25, 0.3 * most))
    return count.astype(jnp.int32).reshape(label.shape)


def _from_sums(block: Block, ask: Ask, dtype: np.dtype) -> State:
    *batch, classes = block.x.shape
    most, tiny = float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).tiny)
    length = _length(classes)
    rows, blocks = math.prod(batch), classes // length
    x = block.x.reshape(rows * blocks, length)

    maxima = lax.optimization_barrier(jnp.max(x, -1)).astype(dtype).reshape(rows, blocks)
    m = jnp.max(maxima, -1)
    peak = lax.optimization_barrier(jnp.clip(m, -most, most))
    of_blocks, of_top = _Sums(jnp.broadcast_to(peak[:, None], (rows, blocks)).reshape(-1)), _Sums(peak)
    top = jnp.argmax(maxima, -1)

    def total(*args: Any, **constants: Any) -> Array:
        return jnp.sum(of_blocks(*args, **constants).reshape(rows, blocks), -1)

    def but_top(*args: Any) -> Array:
        """The sum over all blocks but the one with the top; in that, the top has to be left out of the sum."""
        if blocks == 1:
            return jnp.zeros(())
        return jnp.sum(
            jnp.where(np.arange(blocks)[None] == top[:, None], 0, of_blocks(*args).reshape(rows, blocks)), -1
        )

    def take_top(values: Array) -> Array:
        return values if blocks == 1 else _take(values.reshape(rows, blocks, length), top[:, None, None], 1)[:, 0]

    x_top, step = take_top(x), (1 / tiny, 1.0, 0.0)
    ties = length - of_top(_below, x_top, constants=step)

    def all_but_one(lesser: Any, weight: Any) -> Array:
        others = of_top(lesser, x_top, constants=step[:2])
        others = jnp.where(jnp.isneginf(others), 0, others)
        # A selection also keeps XLA from making one loop of the two sums, which would write out what they share.
        return jnp.where(ties > 1, others + (ties - 1), others) + but_top(weight, x)

    state = State(
        m, all_but_one(_lesser, _weight), all_but_one(_lesser_squared, _weight_squared) if ask.squares else None
    )

    def infinite(gap: Array) -> Array:
        """Gaps below an infinite maximum are infinite; they were measured from the largest number."""
        return jnp.where(jnp.isposinf(m) & (gap != 0), gap * np.inf, gap)

    def targets(t: Array | None) -> Targets | None:
        if t is None:
            return None
        t = t.reshape(rows * blocks, length)
        rest = None
        if ask.rest:
            rest = of_top(lambda x, t, *rows: t * _below(x, *rows), x_top, take_top(t), constants=step)
            rest += but_top(lambda t, _: t, t)
        gap = total(_target_gap, x, t, constants=(most, 1.0))
        return Targets(total(lambda t, _: t, t), infinite(gap), rest)

    if ask.entropy:
        h = total(_weighted_gap, x, constants=(most,))
        state = state._replace(h=jnp.where(jnp.isneginf(h), 0, h))
    given, uniform = targets_of(block, ask._replace(uniform=ask.uniform and block.weights is not None), dtype)
    state = state._replace(given=targets(given), uniform=targets(uniform))
    if ask.uniform:
        constants = 1.0, -0.3 * most, 0.25
        count = SHARE * total(_there, x, constants=constants)
        if block.weights is None:
            gap = total(_gap_there, x, constants=(*constants, most, SHARE))
            state = state._replace(uniform=Targets(count, infinite(gap), count - SHARE if ask.rest else None))
        else:
            state = state._replace(count=count)
    if ask.prediction:
        places = np.arange(length, dtype=dtype)[None]
        steps = (jnp.full((1, 1), c, dtype) for c in step)
        first = jnp.min(places + length * _below(x_top.astype(dtype), peak[:, None], *steps), -1)
        prediction = block.first + (top * length + jnp.clip(first, 0, length - 1).astype(top.dtype)).astype(jnp.int32)
        state = state._replace(prediction=prediction)
    state = state._replace(m=jnp.where(jnp.isnan(state.s), jnp.nan, m))
    state = jax.tree.map(lambda v: v.reshape(batch), state)
    return state if block.labels is None else state._replace(**_at_label(block, dtype))


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


def _length(classes: int) -> int:
    """How many classes a block has: of many about the square root, if some such number divides them, else all."""
    least = classes if classes < _MANY else math.isqrt(classes)
    return next((n for n in range(least, classes // 2 + 1) if classes % n == 0), classes)


def _take(x: Array, index: Array, axis: int = -1) -> Array:
    """take_along_axis; of 16-bit floats by their bits, or XLA:CPU would widen the whole array first."""
    bits = lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x
    taken = jnp.take_along_axis(bits, index, axis, mode="clip")
    return lax.bitcast_convert_type(taken, x.dtype) if x.dtype.itemsize == 2 else taken
