r"""The state of a row: what is known of its logits from some of the classes, and how such states meet.

Every number here can be had for a part of the classes and merged with that of another part, in any order. With the
maximum :math:`m`, the gaps :math:`g_k = m - x_k \ge 0` and :math:`s = \sum_{k \ne \text{top}} e^{-g_k}`, where *top* is
one class that attains the maximum, all losses are sums of terms that aren't negative, so that nothing cancels:

.. math::
    L = \log(1 + s), \quad -\log p_y = g_y + L, \quad \operatorname{logsumexp}(x) = m + L, \quad
    H(p) = \frac{h}{1 + s} + L, \quad -\sum_k t_k \log p_k = A + T L, \quad 1 - p_{\text{top}} = \frac{s}{1 + s} .

A class that is absent (masked, or with the logit -inf) has the weight 0 beside any class that isn't.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxce._checks import AxisName

SHARE = 2.0**-24
"""A uniform target: so small that gaps of huge logits add up to a finite number, and exact."""


FAR = 1000.0
"""A gap g whose exp(-g) is 0 in every dtype."""


class Targets(NamedTuple):
    """What a row's targets t, one number for each class, add up to."""

    total: Any  # T, the sum of t_k
    gap: Any  # A, the sum of t_k g_k
    rest: Any = None  # the sum of t_k over all classes but the top


class State(NamedTuple):
    """What is known of a row. What isn't asked for is None."""

    m: Any  # the maximum
    s: Any  # the sum of exp(-g_k) over all classes but one that attains the maximum; -1 of no class
    squares: Any = None  # the sum of exp(-2 g_k), as s
    h: Any = None  # the sum of exp(-g_k) g_k
    label: Any = None  # the label's logit
    label_weight: Any = None  # the label's class weight
    prediction: Any = None  # the first class that attains the maximum; any, if that is NaN
    count: Any = None  # the sum of `SHARE` over the classes that are there
    given: Targets | None = None
    uniform: Targets | None = None  # of t_k = `SHARE`, times the class weight, where class k is there

    @property
    def present(self) -> Array:
        """Whether any class is there."""
        return there(self.m)

    @property
    def predicted(self) -> Array:
        """The first class that attains the maximum; 0 where that is NaN or no class is there."""
        return jnp.where(self.m > -np.inf, self.prediction, 0)

    @property
    def log_sum(self) -> Array:
        """L."""
        return lax.log1p(self.s, accuracy=lax.AccuracyMode.HIGHEST)


def lift(part: State, m: Array) -> State:
    """What a part of the classes adds to a row whose maximum m is elsewhere."""
    fall = part.m - m
    zero = lax.full_like(fall, 0)
    fall = lax.select(part.m == m, zero, fall)
    e, rise, weight = jnp.exp(fall), -fall, part.s + 1

    def lifted(t: Targets | None) -> Targets | None:
        if t is None:
            return None
        gap = t.gap + lax.select(t.total == 0, zero, rise * t.total)
        return Targets(t.total, gap, None if t.rest is None else t.total)

    return part._replace(
        s=weight * e,
        # One factor after the other: XLA makes an exponential of its own of the product of two.
        squares=None if part.squares is None else (part.squares + 1) * e * e,
        h=None if part.h is None else (part.h + weight * jnp.minimum(rise, FAR)) * e,
        given=lifted(part.given),
        uniform=lifted(part.uniform),
    )


def meet(*states: State) -> State:
    """The state of the classes of all: the numbers of one that has the maximum, and what all others add to them."""
    # What is a plain sum takes no selection: compilers are slow to see that it is the same.
    sums = _add(*({"label": s.label, "label_weight": s.label_weight, "count": s.count} for s in states))
    states = tuple(s._replace(label=None, label_weight=None, count=None) for s in states)
    high, lows = states[0], []
    for state in states[1:]:
        first = high.m > state.m
        if high.prediction is not None:
            first |= (high.m == state.m) & (high.prediction < state.prediction)
        m = jnp.maximum(high.m, state.m)  # NaN if either is
        low = jax.tree.map(partial(lax.select, first), state, high)
        lows.append(low._replace(m=jnp.minimum(high.m, state.m)))
        high = jax.tree.map(partial(lax.select, first), high, state)._replace(m=m)
    met = _add(high, *(lift(low, high.m) for low in lows))

    def targets(kind: str) -> Targets | None:
        given = [getattr(s, kind) for s in states]
        return None if given[0] is None else getattr(met, kind)._replace(total=_add(*(t.total for t in given)))

    return met._replace(
        m=high.m, prediction=high.prediction, given=targets("given"), uniform=targets("uniform"), **sums
    )


def _add(*trees: Any) -> Any:
    return reduce(partial(jax.tree.map, jnp.add), trees)


def meet_all(states: State, axis: int = -1) -> State:
    """The state of the classes of all states along an axis: one reduction, of as many operands as it has numbers."""
    return lax.reduce(states, nothing(states), meet, (axis % states.m.ndim,))


def nothing(like: State) -> State:
    """The state of no class, with which any state meets unchanged: numbers of the dtypes of a state's."""
    zero = jax.tree.map(lambda x: np.zeros((), x.dtype), like)
    most = None if like.prediction is None else np.int32(np.iinfo(np.int32).max)
    squares = None if like.squares is None else zero.squares - 1
    return zero._replace(m=zero.m - np.inf, s=zero.s - 1, squares=squares, prediction=most)


def meet_devices(state: State, axis_name: AxisName) -> State:
    """The state of the classes of all devices of an axis, on each of them: a maximum and a sum over the network."""
    m = lax.pmax(state.m, axis_name)
    top = state.m == m
    parts = jax.tree.map(lambda x, y: jnp.where(top, x, y), state, lift(state, m))
    total, tops = lax.psum((parts._replace(m=None, prediction=None), top.astype(m.dtype)), axis_name)
    prediction = state.prediction
    if prediction is not None:
        prediction = lax.pmin(jnp.where(top, prediction, np.iinfo(np.int32).max), axis_name)
    s = total.s + (tops - 1)  # all tops but one
    squares = None if total.squares is None else total.squares + (tops - 1)
    # Not every network's maximum keeps NaN.
    return total._replace(m=jnp.where(jnp.isnan(s), jnp.nan, m), s=s, squares=squares, prediction=prediction)


class Block(NamedTuple):
    """Logits of some classes, with what comes with them. Rows are the leading axes; classes the last, or last two."""

    x: Array  # -inf where a class isn't there; may be narrower than the dtype to compute in
    first: Any  # the index of the first class
    places: Array  # the index of each, an array like x
    labels: Any = None  # one index for each row; one that no class has is -1
    weights: Any = None  # one for each class
    targets: Any = None  # as x


class Ask(NamedTuple):
    """What is asked of a row beside what comes with its logits."""

    entropy: bool = False
    squares: bool = False
    prediction: bool = False
    uniform: bool = False
    rest: bool = False  # of the targets


def beside(values: Array, like: Array) -> Array:
    """Values of the rows as an array with all of the axes of an array of classes."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def there(x: Array) -> Array:
    """Whether a class is there."""
    return x != -np.inf


def targets_of(block: Block, ask: Ask, dtype: np.dtype) -> tuple[Array | None, Array | None]:
    """The targets given and the uniform ones, of each class that is there. Both times the weights of the classes."""
    given = None if block.targets is None else block.targets.astype(dtype)
    uniform = SHARE * there(block.x).astype(dtype) if ask.uniform else None
    if block.weights is not None:
        weights = jnp.broadcast_to(block.weights.astype(dtype), block.x.shape)
        # Whatever the weight of a class that isn't there is, it has no part, but where a target says so.
        counts = there(block.x)
        uniform = None if uniform is None else uniform * jnp.where(counts, weights, 0)
        given = None if given is None else given * jnp.where(counts | (given != 0), weights, 0)
    return given, uniform


def before(block: Block, label: Array, dtype: np.dtype) -> Array:
    """Whether a class comes before the label, whose logit is given: a larger one, and of equal ones the first."""
    x, place = block.x.astype(dtype), block.places
    label, y = beside(label, x), beside(block.labels, x)
    # The label itself doesn't, even if its logit was rounded otherwise in another pass.
    return jnp.where(place < y, x >= label, x > label) & (place != y)


def leaves(block: Block, ask: Ask, dtype: np.dtype) -> State:
    """The state of each class by itself."""
    x = block.x.astype(dtype)
    zero = jnp.zeros_like(x)
    label = label_weight = None
    if block.labels is not None:
        is_label = block.places == beside(block.labels, x)
        label = jnp.where(is_label, x, 0)
        if block.weights is not None:
            label_weight = jnp.where(is_label, jnp.broadcast_to(block.weights.astype(dtype), x.shape), 0)
    given, uniform = (
        None if t is None else Targets(t, zero, zero if ask.rest else None) for t in targets_of(block, ask, dtype)
    )
    return State(
        m=x,
        s=zero,
        squares=zero if ask.squares else None,
        h=zero if ask.entropy else None,
        label=label,
        label_weight=label_weight,
        prediction=block.places if ask.prediction else None,
        count=SHARE * there(x).astype(dtype) if ask.uniform and block.weights is not None else None,
        given=given,
        uniform=uniform,
    )
