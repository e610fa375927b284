r"""One pass over the classes: what every softmax loss needs to know of a row of logits.

For a row :math:`x` with maximum :math:`m` let the *gap* of class k be :math:`g_k = m - x_k \ge 0` and

.. math:: L = \log \sum_k e^{-g_k} = \log(1 + s), \qquad s = \sum_{k \ne \text{top}} e^{-g_k} \ge 0,

where *top* is one class that attains the maximum. Then every quantity is a sum of terms that are not negative, so that
nothing cancels, whatever the logits are:

.. math::
    -\log p_y = g_y + L, \quad \operatorname{logsumexp}(x) = m + L, \quad
    H(p) = \sum_k p_k g_k + L, \quad 1 - p_{\text{top}} = s / (1 + s).

The functions here take the classes on the last axis; a class that is masked has the logit -inf, and is absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce import _mesh
from jaxce._checks import upcast
from jaxce._numerics import exp_pair, log1p, single


class Row(NamedTuple):
    """What one pass over a row of logits leaves: enough for all losses and gradients."""

    maximum: Array  # m
    anchor: Array  # c, the number that is subtracted before exp; see `_anchor`
    weight: Array  # exp(m - c), the weight of a class that attains the maximum
    others: Array  # the sum of exp(x_k - c) over all other classes
    present: Array  # whether any class is there, in a row that counts
    counts: Array | None  # the mask of rows; None where all of them count

    @property
    def peak(self) -> Array:
        """The maximum, or the largest finite number if that is infinite, so that it can be subtracted."""
        return _finite(self.maximum)

    @property
    def log_sum(self) -> Array:
        """L, the logarithm of the sum of exp(-gap)."""
        return log1p(self.others / self.weight)

    def select(self, values: Array) -> Array:
        """Values of the classes in the rows that count, and 0 in the others, whatever those hold."""
        return values if self.counts is None else jnp.where(self.counts[..., None], values, 0)

    @property
    def total(self) -> Array:
        """The sum of exp(x_k - c) over all classes, by which each is divided."""
        return self.weight + self.others


def dominant(row: Any) -> Array:
    """The logit of the class that has well over half of the probability; NaN, which equals none, where none has."""
    return jnp.where(row.others < 0.75 * row.weight, row.maximum, jnp.nan)


def _finite(x: Array) -> Array:
    """X with +inf replaced by the largest finite number, in arithmetic that XLA:CPU can fuse into a reduction."""
    return jnp.minimum(x, float(jnp.finfo(x.dtype).max))


def _weights(x: Array, anchor: Array, infinite: bool = True) -> Array:
    """exp(x - c), the unnormalised probabilities, in the anchor's dtype; ``infinite`` says whether x may be +inf."""
    wide = x.astype(anchor.dtype)
    return jnp.exp((_finite(wide) if infinite else wide) - anchor)


def _below(x: Array, maximum: Array, one: Array, steep: Array, most: Array | None = None) -> Array:
    """1 where x is below the maximum and 0 where it attains it; for the three numbers see `_numbers`."""
    wide = x.astype(maximum.dtype)
    return jnp.minimum(one, (maximum - (wide if most is None else jnp.minimum(wide, most))) * steep)


def _numbers(like: Array, infinite: bool = True) -> tuple[Array, ...]:
    """1, 1/tiny and, if x may be +inf, the largest number; by rows, as XLA:CPU writes out constants that two sums share."""
    limits = jnp.finfo(like.dtype)
    numbers = 1, 1 / float(limits.tiny), *([float(limits.max)] if infinite else [])
    return tuple(jnp.full_like(like, number) for number in numbers)


def _anchor(maximum: Array, classes: int) -> Array:
    """The integer c for which x - c is exact and exp(x - c) neither overflows nor loses what matters.

    Subtracting the maximum itself rounds, by up to half an ulp of the gap: after exp that is up to 25 ulp of the term.
    An integer between 0 and the maximum has no digits that x lacks, hence x - c is exact for negative maxima (c is the
    maximum, rounded up) and for positive ones, as long as c <= x. So a positive maximum is brought down only as far as
    the sum of ``classes`` terms, and its inverse, demand.
    """
    headroom = math.log(float(jnp.finfo(maximum.dtype).max)) - 2.7 - math.log(max(classes, 1))
    anchor = jnp.ceil(jnp.maximum(jnp.minimum(maximum, 0), maximum - headroom))
    return jnp.where(jnp.isfinite(anchor), anchor, 0)


# The sums are written for XLA:CPU, whose reductions are fast (and keep no array of the size of x) as long as they read x
# itself, through arithmetic, minima and exp alone. It is slow where it has to select or compare, at rows that are short
# or longer than _LONG, and at argmax. Where the classes may be on several devices, rows are left whole: what cuts them,
# or takes a part, would fetch it.

_FEW = 32
"""Up to so many classes are taken one by one, in a loop over the rows."""


def _few(x: Array) -> bool:
    return x.shape[-1] <= _FEW and _mesh.devices() == 1


_MANY = 2**12
"""From so many classes on the top class's block of them is told from the others."""

_LONG = 2**15
"""Rows of more classes are summed in parts."""


@jax.custom_batching.custom_vmap
def all_finite(values: Array) -> Array:
    """Whether all values, and their sum, are finite, also in the examples that `jax.vmap` hides.

    It chooses between a fast way and a slow one that is always right, so that the slow one must not run for all.
    """
    return jnp.isfinite(jnp.sum(lax.optimization_barrier(values)))


@all_finite.def_vmap
def _(_: int, __: list[bool], values: Array) -> tuple[Array, bool]:
    return all_finite(values), False


def _columns(x: Array) -> list[Array]:
    return [x[..., k] for k in range(x.shape[-1])]


def _add_up(terms: list[Array]) -> Array:
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(terms) - len(terms) % 2 :]
    return terms[0]


def _cut(x: Array) -> Array | None:
    """Many classes in about sqrt(K) blocks of about sqrt(K), if K can be divided so; else None."""
    *batch, classes = x.shape
    if classes < _MANY or _mesh.devices() > 1:
        return None
    length = next(n for n in range(math.isqrt(classes - 1) + 1, classes + 1) if classes % n == 0)
    return x.reshape(*batch, classes // length, length) if classes // length >= 4 else None


def _sum_last(term: Callable[..., Array], arrays: tuple[Array, ...], rows: tuple[Array, ...]) -> Array:
    """The sums over the last axis, with all other axes as one: at three axes XLA:CPU is several times slower."""
    *batch, classes = arrays[0].shape
    size = math.prod(batch)
    arrays = tuple(a.reshape(size, classes) for a in arrays)
    rows = tuple(jnp.broadcast_to(r, batch).reshape(size) for r in rows)
    arrays, rows = lax.optimization_barrier((arrays, rows))
    return lax.optimization_barrier(jnp.sum(term(*arrays, *(r[:, None] for r in rows)), -1)).reshape(batch)


def _sum(term: Callable[..., Array], *arrays: Array, rows: tuple[Array, ...] = ()) -> Array:
    """The sum over the last axis of a term, a function of the classes' values and of each row's."""
    *batch, classes = arrays[0].shape
    if _few(arrays[0]):
        return _add_up([term(*values, *rows) for values in zip(*map(_columns, arrays), strict=True)])
    if _mesh.devices() > 1:
        arrays, rows = lax.optimization_barrier((arrays, rows))
        return jnp.sum(term(*arrays, *(r[..., None] for r in rows)), -1)
    parts = next((n for n in range(1, classes + 1) if classes % n == 0 and 128 <= classes // n <= _LONG), 1)
    arrays = tuple(a.reshape(*batch, parts, classes // parts) for a in arrays)
    return jnp.sum(_sum_last(term, arrays, tuple(r[..., None] for r in rows)), -1)


def _first(mask: Array) -> Array:
    """Index of the first True on the last axis."""
    places = lax.broadcasted_iota(jnp.float32, mask.shape, mask.ndim - 1)
    return jnp.min(jnp.where(mask, places, mask.shape[-1] - 1), -1).astype(jnp.int32)


def _is_class(x: Array, index: Array) -> Array:
    """Whether a class is the one with the given index; a comparison, since a gather would undo a sharded class axis."""
    return lax.broadcasted_iota(index.dtype, x.shape, x.ndim - 1) == index[..., None]


def _take(x: Array, index: Array, axis: int = -1) -> Array:
    """take_along_axis; 16-bit floats go by their bits, since XLA:CPU would widen the whole array to float32 first."""
    bits = lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x
    taken = jnp.take_along_axis(bits, index, axis, mode="clip")
    return lax.bitcast_convert_type(taken, x.dtype) if x.dtype.itemsize == 2 else taken


def top(x: Array, row: Row) -> Array:
    """The first class that attains the maximum."""
    classes, m = x.shape[-1], row.peak[..., None]
    # The indices are hidden from XLA, which would write them out for all rows.
    places = lax.optimization_barrier(jnp.arange(classes, dtype=m.dtype)).reshape((1,) * (x.ndim - 1) + (-1,))
    return jnp.minimum(jnp.min(places + classes * _below(x, m, *_numbers(m)), -1), classes - 1).astype(jnp.int32)


def others(x: Array, maximum: Array, anchor: Array, weight: Array, infinite: bool) -> Array:
    """The sum of exp(x_k - c) over all classes but one that attains the maximum.

    That one is not subtracted from the sum of all, which would leave few digits where it outweighs the others.
    """

    def lesser(x: Array, c: Array, *numbers: Array) -> Array:
        return _weights(x, c, infinite) * _below(x, *numbers)

    numbers = maximum, *_numbers(maximum, infinite)
    ties = x.shape[-1] - 1 - _sum(_below, x, rows=numbers)
    return _sum(lesser, x, rows=(anchor, *numbers)) + ties * weight


def row_pass(x: Array, rows: Array | None = None) -> Row:
    """Goes over the classes for the maximum, and for the sum of the others' weights."""
    x = lax.stop_gradient(x)
    blocks = _cut(x)
    maxima = None if blocks is None else lax.optimization_barrier(jnp.max(blocks, -1))
    maximum = jnp.max(x if maxima is None else maxima, -1)
    (wide,) = upcast(maximum)
    m = _finite(wide)
    anchor = _anchor(m, x.shape[-1])
    present = m != -jnp.inf
    weight = jnp.where(present, exp_pair(single(jnp.where(present, m - anchor, 0)))[0], 1)

    def other_weights(infinite: bool) -> Array:
        if blocks is None or maxima is None:
            return others(x, m, anchor, weight, infinite)
        # Only in the block of the top class does it have to be left out.
        block = _first(maxima == maximum[..., None])
        own = _take(blocks, block[..., None, None], axis=-2)[..., 0, :]
        sums = _sum_last(lambda x, c: _weights(x, c, infinite), (blocks,), (anchor[..., None],))
        far = _sum(lambda s: s, jnp.where(_is_class(sums, block), 0, sums))
        return far + others(own, m, anchor, weight, infinite)

    # Infinite logits are rare, and the test for them in the sums is not free.
    finite = all_finite(jnp.maximum(wide, 0))
    return Row(
        maximum=wide,
        anchor=anchor,
        weight=weight,
        others=jnp.where(present, lax.cond(finite, lambda: other_weights(False), lambda: other_weights(True)), 0),
        present=present if rows is None else present & rows,
        counts=rows,
    )


# The derivatives. Each rule gives the tangent as a sum over the classes of a coefficient times the logit's tangent, where
# the coefficients are functions of the logits with rules of their own; so all orders and both modes work. A row is known
# from the logits that come with it and has no derivative.


def _dot(coefficients: Array, tangent: Array) -> Array:
    return jnp.sum(coefficients * tangent.astype(coefficients.dtype), -1)


@jax.custom_jvp
def probabilities(x: Array, row: Row) -> Array:
    """softmax(x), 0 where a row is masked."""
    x, anchor, total = lax.optimization_barrier((x, row.anchor, row.total))
    return row.select(_weights(x, anchor[..., None]) / total[..., None])


@probabilities.defjvp
def _(primals: Any, tangents: Any) -> Any:
    x, row = primals
    p = probabilities(x, row)
    return p, _less_mean(p, tangents[0].astype(p.dtype), row)


def _less_mean(p: Array, v: Array, row: Row) -> Array:
    """p (v - sum_k p_k v_k).

    The selection changes nothing. It keeps XLA:CPU from compiling all of this into one fusion, as jaxlib 0.10.2 does
    wrongly where p is shared by a batch of v, as it is in a Hessian.
    """
    mean = jnp.where(row.present, _dot(p, v), 0)
    return p * (v - mean[..., None])


@jax.custom_jvp
def log_normalizer(x: Array, row: Row) -> Array:
    """logsumexp(x) = m + L; -inf where no class is there."""
    return row.maximum + row.log_sum


@log_normalizer.defjvp
def _(primals: Any, tangents: Any) -> Any:
    x, row = primals
    return log_normalizer(x, row), _dot(probabilities(x, row), tangents[0])


@jax.custom_jvp
def log_probabilities(x: Array, row: Row) -> Array:
    """log softmax(x) = -(g + L), -inf where a class is not there."""
    gaps = _gap(x.astype(row.maximum.dtype), row.maximum[..., None])
    return jnp.where(jnp.isneginf(x), -jnp.inf, -(gaps + row.log_sum[..., None]))


@log_probabilities.defjvp
def _(primals: Any, tangents: Any) -> Any:
    x, row = primals
    p = probabilities(x, row)
    dx = tangents[0].astype(p.dtype)
    return log_probabilities(x, row), row.select(dx - _dot(p, dx)[..., None])


@jax.custom_jvp
def label_nll(x: Array, row: Row, labels: Array) -> Array:
    """-log softmax(x)[label] = g_label + L; NaN where the label is not a class."""
    x_label = _label_logit(x, row, labels)
    nll = _gap(x_label, row.maximum) + row.log_sum
    return jnp.where(row.present, jnp.where(_is_valid(labels, x), nll, jnp.nan), 0)


def _is_valid(labels: Array, x: Array) -> Array:
    return (labels >= 0) & (labels < x.shape[-1])


def _label_logit(x: Array, row: Row, labels: Array) -> Array:
    return _take(x, labels[..., None])[..., 0].astype(row.maximum.dtype)


def _gap(x: Array, maximum: Array) -> Array:
    """m - x; 0 at a top class, even if that is infinite."""
    return jnp.where(x == maximum, 0, maximum - x)


@label_nll.defjvp
def _(primals: Any, tangents: Any) -> Any:
    x, row, labels = primals
    return label_nll(x, row, labels), _dot(_label_error(x, row, labels), tangents[0])


@jax.custom_jvp
def _label_error(x: Array, row: Row, labels: Array) -> Array:
    """softmax(x) - onehot(label), with p - 1 at the label formed as -(the others' share): no 1 is subtracted."""
    x_label = _label_logit(x, row, labels)
    rest = jnp.where(x_label == row.maximum, row.others, row.total - jnp.exp(x_label - row.anchor))
    total = jnp.where(_is_valid(labels, x) | ~row.present, row.total, jnp.nan)
    x, anchor, total, at_label = lax.optimization_barrier((x, row.anchor, total, -rest / total))
    p = _weights(x, anchor[..., None]) / total[..., None]
    return row.select(jnp.where(_is_class(x, labels), at_label[..., None], p))


@_label_error.defjvp
def _(primals: Any, tangents: Any) -> Any:
    x, row, labels = primals
    p = probabilities(x, row)
    return _label_error(x, row, labels), _less_mean(p, tangents[0].astype(p.dtype), row)


@jax.custom_jvp
def dense_nll(x: Array, row: Row, targets: Array) -> Array:
    """sum_k t_k (g_k + L), where a class with t = 0 adds nothing, even at infinite distance."""

    def plain(x: Array, t: Array, m: Array, log_sum: Array) -> Array:
        return t * ((m - x.astype(m.dtype)) + log_sum)

    def careful(x: Array, t: Array, m: Array, log_sum: Array, infinite: Array, *numbers: Array) -> Array:
        gap = m - _finite(x.astype(m.dtype))
        near = _finite(gap)
        # 1 at an infinite distance, else 0: t times the largest number is 0 or, times it again, infinite.
        far = jnp.maximum(jnp.minimum(gap - near, 1), infinite * _below(x, m, *numbers))
        return t * (near + log_sum) * (1 + far * float(jnp.finfo(m.dtype).max))

    rows = row.peak, row.log_sum
    infinite = jnp.isposinf(row.maximum).astype(row.maximum.dtype)
    total = _sum(plain, x, targets, rows=rows)
    total = lax.cond(
        all_finite(total), lambda: total, lambda: _sum(careful, x, targets, rows=(*rows, infinite, *_numbers(infinite)))
    )
    return jnp.where(row.present, total, 0)


@partial(dense_nll.defjvp, symbolic_zeros=True)
def _(primals: Any, tangents: Any) -> Any:
    x, row, targets = primals
    dx, _, dt = tangents
    tangent = jnp.zeros_like(row.maximum)
    if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
        tangent += _dot(_dense_error(x, row, targets), dx)
    if not isinstance(dt, jax.custom_derivatives.SymbolicZero):
        absent = (targets == 0) & jnp.isneginf(x)
        tangent += _dot(jnp.where(absent, 0, row.select(-log_probabilities(x, row))), dt)
    return dense_nll(x, row, targets), tangent


@jax.custom_jvp
def _dense_error(x: Array, row: Row, targets: Array) -> Array:
    """p_j T - t_j with T = sum_k t_k; at a dominant class p_j (T - t_j) - (1 - p_j) t_j, both of which may be tiny."""
    sum_ = _sum(lambda t: t, targets)
    rest = _sum(lambda x, t, *rows: t * _below(x, *rows), x, targets, rows=(row.peak, *_numbers(row.peak)))
    at_top = jnp.where(row.present, (row.weight * rest - row.others * (sum_ - rest)) / row.total, 0)
    rows = row.anchor, sum_ / row.total, dominant(row).astype(x.dtype), at_top
    x, (anchor, share, level, at_top) = lax.optimization_barrier((x, tuple(r[..., None] for r in rows)))
    return row.select(jnp.where(x == level, at_top, _weights(x, anchor) * share - targets))


@partial(_dense_error.defjvp, symbolic_zeros=True)
def _(primals: Any, tangents: Any) -> Any:
    x, row, targets = primals
    dx, _, dt = tangents
    p = probabilities(x, row)
    tangent = jnp.zeros_like(p)
    if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
        tangent += jnp.sum(targets, -1)[..., None] * _less_mean(p, dx.astype(p.dtype), row)
    if not isinstance(dt, jax.custom_derivatives.SymbolicZero):
        tangent += p * jnp.sum(dt, -1)[..., None] - row.select(dt)
    return _dense_error(x, row, targets), tangent


@jax.custom_jvp
def uniform_nll(x: Array, row: Row) -> Array:
    """The mean of g_k + L over the classes that are there: dense_nll with uniform targets, which are not written down."""
    gap = _even_gap(x, row)[0]
    gap = jnp.where(jnp.isposinf(row.maximum) & (gap > 0), jnp.inf, gap)
    return jnp.where(row.present, gap + row.log_sum, 0)


def _even_gap(x: Array, row: Row) -> tuple[Array, Array]:
    """The mean of g_k over the classes that are there, and how many these are (at least 1)."""

    def plain(x: Array, m: Array) -> Array:
        return m - x.astype(m.dtype)

    # Quarters, so that -inf can be told from the least finite number. Numbers come as rows: XLA:CPU would write out more
    # than a few constants as arrays of the size of x.
    def there(x: Array, one: Array, least: Array, quarter: Array) -> Array:
        return jnp.minimum(jnp.maximum(quarter * x.astype(one.dtype), least) - least, one)

    def careful(x: Array, m: Array, most: Array, share: Array, *numbers: Array) -> Array:
        _, least, quarter = numbers
        inside = jnp.minimum(jnp.maximum(quarter * x.astype(m.dtype), least), most)
        return (m - inside) * share * there(x, *numbers)

    classes, largest = x.shape[-1], float(jnp.finfo(row.maximum.dtype).max)
    m = jnp.where(row.present, row.peak, 0)
    most, share, *numbers = (jnp.full_like(m, n) for n in (largest / 4, 1 / classes, 1.0, -0.3 * largest, 0.25))

    def some_absent() -> tuple[Array, Array]:
        count = jnp.maximum(_sum(there, x, rows=tuple(numbers)), 1)
        return _sum(careful, x, rows=(m / 4, most, share, *numbers)) * (4 * classes / count), count

    total = _sum(plain, x, rows=(m,))
    return lax.cond(all_finite(total), lambda: (total / classes, jnp.full_like(total, classes)), some_absent)


@uniform_nll.defjvp
def _(primals: Any, tangents: Any) -> Any:
    x, row = primals
    return uniform_nll(x, row), _dot(_uniform_error(x, row), tangents[0])


@jax.custom_jvp
def _uniform_error(x: Array, row: Row) -> Array:
    """p_j - 1/n, and 0 where a class is absent; at a dominant class as in `_dense_error`."""
    share = 1 / _even_gap(x, row)[1]
    at_top = jnp.where(row.present, (row.weight * (1 - share) - row.others * share) / row.total, 0)
    rows = row.anchor, row.total, share, dominant(row).astype(x.dtype), at_top
    x, (anchor, total, share, level, at_top) = lax.optimization_barrier((x, tuple(r[..., None] for r in rows)))
    error = jnp.where(jnp.isneginf(x), 0, _weights(x, anchor) / total - share)
    return row.select(jnp.where(x == level, at_top, error))


@_uniform_error.defjvp
def _(primals: Any, tangents: Any) -> Any:
    x, row = primals
    p = probabilities(x, row)
    return _uniform_error(x, row), _less_mean(p, tangents[0].astype(p.dtype), row)


@jax.custom_jvp
def entropy(x: Array, row: Row) -> Array:
    """H(softmax(x)) = sum_k p_k g_k + L."""
    return jnp.where(row.present, _mean_gap(x, row) + row.log_sum, 0)


def _mean_gap(x: Array, row: Row) -> Array:
    """sum_k p_k g_k."""

    def plain(x: Array, m: Array, c: Array) -> Array:
        wide = x.astype(m.dtype)
        return jnp.exp(wide - c) * (m - jnp.maximum(wide, float(jnp.finfo(m.dtype).min)))

    def careful(x: Array, m: Array, c: Array) -> Array:
        return _weights(x, c) * _finite_gap(x, m)

    rows = row.peak, row.anchor
    total = _sum(plain, x, rows=rows)
    return lax.cond(all_finite(total), lambda: total, lambda: _sum(careful, x, rows=rows)) / row.total


def _finite_gap(x: Array, peak: Array) -> Array:
    """The gap, finite also where a class is not there, so that its product with the probability 0 is 0."""
    return _finite(peak - _finite(x.astype(peak.dtype)))


@entropy.defjvp
def _(primals: Any, tangents: Any) -> Any:
    x, row = primals
    return entropy(x, row), _dot(_entropy_slope(x, row), tangents[0])


@jax.custom_jvp
def _entropy_slope(x: Array, row: Row) -> Array:
    """p_j (g_j - sum_k p_k g_k)."""
    values = jnp.where(row.present, _mean_gap(x, row), 0), jnp.where(row.present, row.peak, 0), row.anchor, row.total
    x, (mean, peak, anchor, total) = lax.optimization_barrier((x, tuple(v[..., None] for v in values)))
    return row.select(_weights(x, anchor) / total * (_finite_gap(x, peak) - mean))


@_entropy_slope.defjvp
def _(primals: Any, tangents: Any) -> Any:
    x, row = primals
    peak = jnp.where(row.present, row.peak, 0)[..., None]
    _, tangent = jax.jvp(lambda x: _less_mean(probabilities(x, row), _finite_gap(x, peak), row), (x,), (tangents[0],))
    return _entropy_slope(x, row), tangent
