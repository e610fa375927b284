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
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jaxce._checks import upcast
from jaxce._numerics import exp_pair, log1p, single


class Row(NamedTuple):
    """What one pass over a row of logits leaves: enough for all losses and gradients."""

    maximum: Array  # m; an infinite logit counts as the largest finite number, so that it can be subtracted
    anchor: Array  # c, the number that is subtracted before exp; see `_anchor`
    top: Array  # the first class that attains the maximum
    weight: Array  # exp(m - c), the weight of the top class
    others: Array  # the sum of exp(x_k - c) over all other classes
    present: Array  # whether any class is there, in a row that counts
    counts: Array | None  # the mask of rows; None where all of them count

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


def _finite(x: Array) -> Array:
    """X with +inf replaced by the largest finite number, in arithmetic that XLA:CPU can fuse into a reduction."""
    return jnp.minimum(x, float(jnp.finfo(x.dtype).max))


def _weights(x: Array, anchor: Array) -> Array:
    """exp(x - c), the unnormalised probabilities, in the anchor's dtype."""
    return jnp.exp(_finite(x.astype(anchor.dtype)) - anchor)


def _anchored(maximum: Array, classes: int) -> tuple[Array, Array]:
    """The maximum in the dtype to compute in, and its anchor."""
    m = _finite(upcast(maximum)[0])
    return m, _anchor(m, classes)


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


def _block_length(classes: int) -> int:
    """The smallest divisor of the number of classes from its square root on; all of them where they are few."""
    if classes <= _FEW:
        return classes
    return next(n for n in range(math.isqrt(classes - 1) + 1, classes + 1) if classes % n == 0)


_FEW = 32
"""Up to so many classes are taken one by one, in a loop over the rows. XLA:CPU reduces fast along long rows only."""


def _columns(x: Array) -> list[Array]:
    return [x[..., k] for k in range(x.shape[-1])]


def _pairwise(operation: Callable[[Array, Array], Array], terms: list[Array]) -> Array:
    while len(terms) > 1:
        pairs = [operation(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(terms) - len(terms) % 2 :]
    return terms[0]


def _sum(term: Callable[..., Array], *arrays: Array, rows: tuple[Array, ...] = ()) -> Array:
    """The sum over the last axis of a term, a function of the classes' values and of each row's."""
    if arrays[0].shape[-1] > _FEW:
        return jnp.sum(term(*arrays, *(r[..., None] for r in rows)), -1)
    return _pairwise(jnp.add, [term(*values, *rows) for values in zip(*map(_columns, arrays), strict=True)])


def _max(values: Array) -> Array:
    return _pairwise(jnp.maximum, _columns(values)) if values.shape[-1] <= _FEW else jnp.max(values, -1)


def _first(mask: Array) -> Array:
    """Index of the first True on the last axis. XLA:CPU has a fast minimum, of floats, and a slow argmax."""
    last = mask.shape[-1] - 1
    return jnp.min(jnp.where(mask, _places(mask.shape, np.float32), last), -1).astype(jnp.int32)


def _places(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """The index along the last axis. A constant rather than an iota, for XLA:CPU's fast reductions."""
    return jnp.broadcast_to(np.arange(shape[-1], dtype=dtype), shape)


def _sum_without_top(x: Array, maximum: Array, anchor: Array) -> tuple[Array, Array]:
    """The first class at the maximum, and the sum of the weights of all the others."""
    if x.shape[-1] > _FEW:
        top = _first(x == maximum[..., None])
        weights = jnp.put_along_axis(
            _weights(x, anchor[..., None]), top[..., None], 0, axis=-1, inplace=False, mode="clip"
        )
        return top, jnp.sum(weights, -1)
    columns = _columns(x)
    top = jnp.full(maximum.shape, len(columns) - 1, jnp.int32)
    for k in range(len(columns) - 2, -1, -1):
        top = jnp.where(columns[k] == maximum, k, top)
    return top, _pairwise(jnp.add, [jnp.where(top == k, 0, _weights(v, anchor)) for k, v in enumerate(columns)])


def _take(x: Array, index: Array, axis: int = -1) -> Array:
    """take_along_axis; 16-bit floats go by their bits, since XLA:CPU would widen the whole array to float32 first."""
    bits = lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x
    taken = jnp.take_along_axis(bits, index, axis, mode="clip")
    return lax.bitcast_convert_type(taken, x.dtype) if x.dtype.itemsize == 2 else taken


def row_pass(x: Array, rows: Array | None = None) -> Row:
    """Goes over the classes once for the maxima and once for the sums.

    Many classes are cut into about sqrt(K) blocks, and each is reduced by itself. This is where the digits come from: the
    one block that holds the top class is summed again without it, so the top's 1 is never added to what it would drown.
    And it keeps XLA:CPU's vectorised reductions inside the cache. The barriers make each reduction read ``x`` itself and
    upcast inside its loop, rather than keep an array of the size of ``x`` between them.
    """
    x = lax.stop_gradient(x)
    *batch, classes = x.shape
    length = _block_length(classes)
    if length == classes:
        maximum = _max(x)
        m, anchor = _anchored(maximum, classes)
        top, others = _sum_without_top(x, maximum, anchor)
    else:
        blocks = x.reshape(*batch, classes // length, length)
        block_maxima = lax.optimization_barrier(jnp.max(blocks, -1))
        maximum = jnp.max(block_maxima, -1)
        m, anchor = _anchored(maximum, classes)
        block = _first(block_maxima == maximum[..., None])
        top_block = _take(blocks, block[..., None, None], axis=-2)[..., 0, :]
        place, others = _sum_without_top(top_block, maximum, anchor)
        top = block * length + place
        blocks, anchor = lax.optimization_barrier((blocks, anchor))
        sums = jnp.sum(jnp.exp(blocks.astype(m.dtype) - anchor[..., None, None]), -1)
        others += jnp.sum(jnp.put_along_axis(sums, block[..., None], 0, axis=-1, inplace=False, mode="clip"), -1)

    present = m != -jnp.inf
    return Row(
        maximum=m,
        anchor=anchor,
        top=top,
        weight=jnp.where(present, exp_pair(single(jnp.where(present, m - anchor, 0)))[0], 1),
        others=others,
        present=present if rows is None else present & rows,
        counts=rows,
    )


# The derivatives. Each rule gives the tangent as a sum over the classes of a coefficient times the logit's tangent, where
# the coefficients are functions of the logits with rules of their own; so all orders and both modes work. A row is known
# from the logits that come with it and has no derivative.


def _dot(a: Array, b: Array) -> Array:
    return _sum(jnp.multiply, a, b)


def _is_class(x: Array, index: Array) -> Array:
    """Whether a class is the one with the given index; a comparison, since a gather would undo a sharded class axis."""
    return lax.broadcasted_iota(index.dtype, x.shape, x.ndim - 1) == index[..., None]


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
    p = probabilities(x, row)
    return log_normalizer(x, row), _dot(p, tangents[0].astype(p.dtype))


@jax.custom_jvp
def log_probabilities(x: Array, row: Row) -> Array:
    """log softmax(x) = -(g + L), -inf where a class is not there."""
    gaps = row.maximum[..., None] - _finite(x.astype(row.maximum.dtype))
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
    nll = (row.maximum - x_label) + row.log_sum
    return jnp.where(row.present, jnp.where(_is_valid(labels, x), nll, jnp.nan), 0)


def _is_valid(labels: Array, x: Array) -> Array:
    return (labels >= 0) & (labels < x.shape[-1])


def _label_logit(x: Array, row: Row, labels: Array) -> Array:
    return _finite(_take(x, labels[..., None])[..., 0].astype(row.maximum.dtype))


@label_nll.defjvp
def _(primals: Any, tangents: Any) -> Any:
    x, row, labels = primals
    error = _label_error(x, row, labels)
    return label_nll(x, row, labels), _dot(error, tangents[0].astype(error.dtype))


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
    rows = row.maximum, row.log_sum

    def plain(x: Array, t: Array, m: Array, log_sum: Array) -> Array:
        return t * ((m - _finite(x.astype(m.dtype))) + log_sum)

    def selecting(x: Array, t: Array, m: Array, log_sum: Array) -> Array:
        return jnp.where(t == 0, 0, plain(x, t, m, log_sum))

    def arithmetic(x: Array, t: Array, m: Array, log_sum: Array) -> Array:
        gap = m - _finite(x.astype(m.dtype))
        near = _finite(gap)
        absent = jnp.minimum(gap - near, 1)  # 1 or 0: t times the largest number is 0 or, times it again, infinite
        return t * (near + log_sum) * (1 + absent * float(jnp.finfo(m.dtype).max))

    if x.shape[-1] <= _FEW:
        return jnp.where(row.present, _sum(selecting, x, targets, rows=rows), 0)
    # XLA:CPU's fast sums can't select. The plain products are fastest, and tell by a NaN that one of them was 0 * inf.
    total = _sum(plain, x, targets, rows=rows)
    total = lax.cond(jnp.any(jnp.isnan(total)), lambda: _sum(arithmetic, x, targets, rows=rows), lambda: total)
    return jnp.where(row.present, total, 0)


@partial(dense_nll.defjvp, symbolic_zeros=True)
def _(primals: Any, tangents: Any) -> Any:
    x, row, targets = primals
    dx, _, dt = tangents
    tangent = jnp.zeros_like(row.maximum)
    if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
        error = _dense_error(x, row, targets)
        tangent += _dot(error, dx.astype(error.dtype))
    if not isinstance(dt, jax.custom_derivatives.SymbolicZero):
        absent = (targets == 0) & jnp.isneginf(x)
        tangent += _dot(jnp.where(absent, 0, row.select(-log_probabilities(x, row))), dt)
    return dense_nll(x, row, targets), tangent


@jax.custom_jvp
def _dense_error(x: Array, row: Row, targets: Array) -> Array:
    """p_j T - t_j with T = sum_k t_k; at the top class p_j (T - t_j) - (1 - p_j) t_j, both of which may be tiny."""
    top_target = _take(targets, row.top[..., None])[..., 0]
    rest = jnp.sum(targets * _differs(row.top, targets), -1)
    at_top = (row.weight * rest - row.others * top_target) / row.total
    x, targets, anchor, total, sum_, at_top = lax.optimization_barrier(
        (x, targets, row.anchor, row.total, rest + top_target, at_top)
    )
    error = _weights(x, anchor[..., None]) * sum_[..., None] / total[..., None] - targets
    return row.select(jnp.where(_is_class(x, row.top), at_top[..., None], error))


def _differs(index: Array, values: Array) -> Array:
    """1 where the place on the last axis differs from the index, else 0: a selection as XLA:CPU's fast sums take it."""
    distance = jnp.abs(_places(values.shape, values.dtype) - index[..., None].astype(values.dtype))
    return jnp.minimum(1, distance)


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
def entropy(x: Array, row: Row) -> Array:
    """H(softmax(x)) = sum_k p_k g_k + L."""
    weighted_gaps = _sum(lambda x, m, c: _weights(x, c) * _gap(x, m), x, rows=(row.maximum, row.anchor))
    return jnp.where(row.present, weighted_gaps / row.total + row.log_sum, 0)


def _gap(x: Array, maximum: Array) -> Array:
    """The gap m - x, finite also where a class is not there, so that its product with the probability 0 is 0."""
    return _finite(maximum - _finite(x.astype(maximum.dtype)))


@entropy.defjvp
def _(primals: Any, tangents: Any) -> Any:
    x, row = primals
    p = probabilities(x, row)
    gaps = jnp.where(row.present[..., None], _gap(x, row.maximum[..., None]), 0)
    return entropy(x, row), _dot(_less_mean(p, gaps, row), tangents[0].astype(p.dtype))
