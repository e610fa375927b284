r"""What a loss needs of logits, as differentiable functions, once for every kind of logits.

Each has a tangent that is a sum over the classes of a coefficient times the tangent of the logit, with :math:`p` the
softmax,

=====================  ==================================================  ===========================================
measure                value                                               coefficient
=====================  ==================================================  ===========================================
log-normalizer         :math:`m + L`                                       :math:`p_k`
negative log-likelihood  :math:`g_y + L`                                   :math:`p_k - [k = y]`
cross-entropy          :math:`\sum_k t_k (g_k + L)`                        :math:`p_k \sum_j t_j - t_k`
entropy                :math:`\sum_k p_k g_k + L`                          :math:`p_k (g_k - \sum_j p_j g_j)`
=====================  ==================================================  ===========================================

where nothing cancels: :math:`1 - p` of a class that has over half of the probability comes from the sum of all others. The
coefficients are functions of the logits that have derivatives, so all orders and both modes work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from jaxce import _mesh, _platforms
from jaxce._passes import Inputs, Spec, add_up, along, block_of, by_rows, logits_of, state_of
from jaxce._rules import custom_jvp
from jaxce._state import Ask, State, beside, targets_of, there

Values = dict[str, Array]
"""Measures of the rows, by name: "log_normalizer"; "top", the negative log-likelihood of the class with over half of the
probability, where there is one; "nll" and "weight" of the label; "given" and "uniform", the cross-entropy with such
targets, and their sums, "total given" and "total uniform"; "entropy"."""

KINDS = "given", "uniform"  # of targets
LOGITS = "array", "hidden", "kernel", "bias", "temperature", "soft_cap"


@custom_jvp
def replaced(value: Array, other: Array) -> Array:
    """``value``, which stands for the same number as ``other`` with more of its digits, with the derivatives of that."""
    return value


@replaced.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return replaced(*primals), tangents[1]


class Row(NamedTuple):
    """What the probabilities of a row's classes are made of: constants, but for the derivatives of the last two."""

    present: Array
    m: Array
    log_sum: Array
    share: Array  # of the top class, 0 where no class is there
    others: Array  # that of all other classes
    log_normalizer: Array
    top: Array


def row_of(values: Values, state: State) -> Row:
    """The row of measured logits."""
    share, others = jnp.where(state.present, 1 / (1 + state.s), 0), state.s / (1 + state.s)
    return Row(state.present, state.m, state.log_sum, share, others, values["log_normalizer"], values["top"])


def _gap(x: Array, row: Row) -> Array:
    """m - x, 0 at the maximum, infinite or not."""
    m = beside(row.m, x)
    return jnp.where(x == m, 0, m - x)


@custom_jvp
def log_probability(x: Array, row: Row) -> Array:
    """log softmax(x) = -(g + L), -inf where a class isn't there but others are."""
    return -(_gap(x, row) + beside(row.log_sum, x))


@log_probability.defjvp
def _(primals: Any, tangents: Any) -> Any:
    """dx less its mean. At a class with over half of the probability these cancel, and -log p has a sum of its own."""
    (x, row), (dx, drow) = primals, tangents
    value = log_probability(x, row)
    mean, top = (beside(v, x) for v in (drow.log_normalizer, drow.top))
    return value, jnp.where(value > np.log(0.5), -top, dx - mean)


@custom_jvp
def probability(x: Array, row: Row) -> Array:
    """softmax(x) = exp(-g) / (1 + s): the gap is rounded once."""
    return jnp.exp(-_gap(x, row)) * beside(row.share, x)


@probability.defjvp
def _(primals: Any, tangents: Any) -> Any:
    p = probability(*primals)
    return p, p * jax.jvp(log_probability, primals, tangents)[1]


@custom_jvp
def log_ratio(x: Array, row: Row, y: Array, other: Row) -> Array:
    """log p - log q: large but finite where only one is there, anything finite where neither is.

    It is the difference of the logits, not rounded where they are nearly equal, less that of the log-normalizers; or, where
    the maxima lie apart, and the logits with them, the difference of the gaps. Eighths, so that none overflows.
    """
    most = float(jnp.finfo(x.dtype).max) / 8

    def eighth(x: Array) -> Array:
        return jnp.clip(x / 8, -most, most)

    m, n = eighth(row.m), eighth(other.m)
    apart = jnp.abs(m - n) > 1 / 8
    a, b = (beside(jnp.where(apart, v, 0), x) for v in (m, n))
    shift = jnp.where(apart, 0, 8 * (m - n)) + (row.log_sum - other.log_sum)
    return jnp.clip(8 * ((eighth(x) - a) - (eighth(y) - b)) - beside(shift, x), -most, most)


@log_ratio.defjvp
def _(primals: Any, tangents: Any) -> Any:
    dp, dq = (jax.jvp(log_probability, primals[i : i + 2], tangents[i : i + 2])[1] for i in (0, 2))
    return log_ratio(*primals), jnp.where(there(primals[0]) & there(primals[2]), dp - dq, 0)


# ------------------------------------------------------------------------------------------------------ values of the rows


def measure(spec: Spec, inputs: Inputs, names: tuple[str, ...]) -> tuple[Values, State]:
    """The measures of these names, which are differentiable, and the state of the rows, which is not."""
    return by_rows(spec.chunks, (inputs,), partial(_measure, spec, names))


@partial(custom_jvp, nondiff_argnums=(0, 1))
def _measure(spec: Spec, names: tuple[str, ...], inputs: Inputs) -> tuple[Values, State]:
    ask = spec.ask._replace(entropy="entropy" in names, uniform="uniform" in names)
    state = state_of(spec._replace(ask=ask), inputs)
    return _values(names, inputs, state), state


def _values(names: tuple[str, ...], inputs: Inputs, state: State) -> Values:
    log_sum = state.log_sum

    def value(name: str) -> Any:
        match name.split():
            case ["log_normalizer"]:
                return state.m + log_sum
            case ["weight"]:
                return state.label_weight
            case ["total", kind]:
                return getattr(state, kind).total
            case ["top"]:
                value = log_sum
            case ["nll"]:
                value = jnp.where(state.label == state.m, 0, state.m - state.label) + log_sum
                value = jnp.where(inputs["labels"] < 0, np.nan, value)
            case ["entropy"]:
                value = state.h / (1 + state.s) + log_sum
            case [kind]:
                t = getattr(state, kind)
                value = (t.gap + t.total * log_sum) / (_count(state) if kind == "uniform" else 1)
        return jnp.where(state.present, value, 0)

    return {name: value(name) for name in names}


def _count(state: State) -> Any:
    """By what uniform targets are divided, to be a distribution of the classes that are there."""
    count = state.uniform.total if state.uniform and state.count is None else state.count
    return jnp.where(count == 0, 1, count)


@partial(_measure.defjvp, symbolic_zeros=True)
def _(spec: Spec, names: tuple[str, ...], primals: Any, tangents: Any) -> Any:
    (inputs,), (dinputs,) = primals, tangents
    dinputs = {name: t for name, t in dinputs.items() if not isinstance(t, SymbolicZero)}
    totals = tuple(f"total {kind}" for kind in KINDS if kind in names)
    wanted = tuple(dict.fromkeys((*names, "log_normalizer", "top", *totals)))
    values, state = _measure(spec._replace(ask=spec.ask._replace(rest=True)), wanted, inputs)
    out = add_up((spec,), (inputs,), (dinputs,), (values, state), partial(_tangents, spec, names))
    if "nll" in out:  # a bad label's derivatives are NaN, too
        out["nll"] *= jnp.where(inputs["labels"] < 0, np.nan, 1).astype(spec.dtype)
    out = jax.tree.map(lambda t: jnp.where(state.present, t, 0), out)
    if not spec.ask.rest:
        state = state._replace(**{n: t._replace(rest=None) for n in KINDS if (t := getattr(state, n)) is not None})
    return ({n: values[n] for n in names}, state), (out, zero_from_primal(state, symbolic_zeros=True))


def _tangents(spec: Spec, names: tuple[str, ...], parts: Any, dparts: Any, rows: Any, start: Any) -> Values:
    """What a block adds to the tangents."""
    (part,), (dpart,), (values, state) = parts, dparts, rows
    x, dx = along(partial(logits_of, spec), part, dpart, *LOGITS)
    block = block_of(spec, part, start, x)
    x = x.astype(spec.dtype)

    def of_row(values: Any) -> Any:
        return beside(values, x)

    row = row_of(values, state)
    log_p, p = log_probability(x, row), probability(x, row)
    likely = p > 0.5
    others = of_row(row.others)
    ask = Ask(uniform="uniform" in names or "total uniform" in names)

    def targets(part: Inputs) -> Values:
        given, uniform = targets_of(block_of(spec, part, start, x), ask, spec.dtype)
        return {n: t for n, t in zip(KINDS, (given, uniform), strict=True) if t is not None}

    ts, dts = along(targets, part, dpart, "targets", "shares", "weights")
    is_label: Any = None if block.labels is None else block.places == of_row(block.labels)

    def coefficient(name: str) -> Array:
        """That of the logit's tangent."""
        match name:
            case "log_normalizer":
                return p
            case "top":
                return replaced(jnp.where(likely, -others, p), p)
            case "nll":
                below = jnp.where(state.label == state.m, state.s, (1 - jnp.exp(state.label - state.m)) + state.s)
                return replaced(jnp.where(is_label, of_row(-below / (1 + state.s)), p), p)
            case "entropy":
                gap = jnp.minimum(_gap(x, row), float(jnp.finfo(x.dtype).max))
                return p * replaced(gap - of_row(state.h / (1 + state.s)), -(log_p + of_row(values["entropy"])))
        rest = of_row(getattr(state, name).rest / (1 + state.s))
        error = p * of_row(values[f"total {name}"]) - ts[name]
        error = replaced(jnp.where(likely, rest - others * ts[name], error), error)
        return error / of_row(_count(state)) if name == "uniform" else error

    def tangent(name: str) -> Array:
        if name == "weight":
            dw = jnp.broadcast_to(dpart["weights"], x.shape) if "weights" in dpart else jnp.zeros_like(x)
            return jnp.sum(jnp.where(is_label, dw.astype(x.dtype), 0), -1)
        dt = None if dts is None else dts.get(name.removeprefix("total "))
        total = jnp.zeros(x.shape[:-1], x.dtype)
        if not name.startswith("total") and dx is not None:
            total += jnp.sum(coefficient(name) * dx.astype(x.dtype), -1)
        if dt is not None and name.startswith("total"):
            total += jnp.sum(dt, -1)
        elif dt is not None:
            idle = (ts[name] == 0) | ~of_row(state.present)
            cost = jnp.where(there(x) | idle, jnp.where(there(x), -log_p, 0), np.inf)
            total += jnp.sum(cost * dt, -1) / (of_row(_count(state))[..., 0] if name == "uniform" else 1)
        return total

    return {name: tangent(name) for name in names}


# --------------------------------------------------------------------------------------------------- sums over the classes


Term = Callable[..., Array]
"""Of log p and p of a softmax, or of log p, p, log q, q and log p - log q of two; then of targets, if any, and of
options."""


Slopes = Callable[..., tuple[Any, Any]]
"""Of the sums of all terms, to what the derivatives of the first by log p, and those by log q, add up to.

Either may be a pair: that number, and a function to what those of all other classes add up to, of a term's arguments and
1 - p of the top class of each softmax; it is for a sum so much smaller than the first that a difference would lose it.
"""


def sum_of_terms(
    terms: tuple[Term, ...],
    specs: tuple[Spec, ...],
    inputs: tuple[Inputs, ...],
    *options: Array,
    slopes: Slopes | None = None,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """sum_k term(log p_k, p_k, ...) of each term, of which the first has derivatives, and in which rows any class is there.

    A class that isn't there has log p of -inf and p of 0; a row that has none has p of 0.
    """

    def whole(*inputs: Inputs) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        rows = []
        for spec, i in zip(specs, inputs, strict=True):
            logits = {n: x for n, x in i.items() if n not in ("targets", "labels", "weights")}
            rows.append(row_of(*_measure(spec, ("log_normalizer", "top"), logits)))
        return _sum_of_terms(1, terms, specs, slopes, inputs, tuple(rows), options), tuple(row.present for row in rows)

    return by_rows(max(spec.chunks for spec in specs), inputs, whole)


@partial(custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _sum_of_terms(
    count: int,
    terms: tuple[Term, ...],
    specs: tuple[Spec, ...],
    slopes: Slopes | None,
    inputs: Any,
    rows: Any,
    options: Any,
) -> tuple[Array, ...]:
    """With derivatives of the first ``count``, by the inputs; those by the rows are among them."""

    def step(parts: Any, _: Any, known: Any, start: Any) -> tuple[Array, ...]:
        blocks = [block_of(spec, part, start) for spec, part in zip(specs, parts, strict=True)]
        targets = [targets_of(b, Ask(), s.dtype)[0] for s, b in zip(specs, blocks, strict=True)]
        args = _arguments(specs[0].dtype, [b.x for b in blocks], targets, *known)
        return _platforms.sums(tuple(term(*args) for term in terms))

    return add_up(specs, inputs, ({},) * len(inputs), (rows, options), step)


def _arguments(dtype: np.dtype, xs: Any, targets: Any, rows: Any, options: Any) -> list[Array]:
    """The arguments of a term."""
    xs = [x.astype(dtype) for x in xs]
    known = [f(x, row) for x, row in zip(xs, rows, strict=True) for f in (log_probability, probability)]
    if len(xs) == 2:
        known.append(log_ratio(xs[0], rows[0], xs[1], rows[1]))
    return [
        *known,
        *(t for t in targets if t is not None),
        *(beside(option, xs[0]) for option in options),
    ]


@partial(_sum_of_terms.defjvp, symbolic_zeros=True)
def _(
    count: int, terms: tuple[Term, ...], specs: tuple[Spec, ...], slopes: Slopes | None, primals: Any, tangents: Any
) -> Any:
    r"""The coefficient of dx_k is the derivative by log p_k, f_k, less p_k F with F the sum of all f.

    For a class with over half of the probability it is f_k (1 - p_k) - p_k (F - f_k), where less cancels.
    """
    inputs, rows, options = primals
    dinputs = tuple({n: t for n, t in d.items() if not isinstance(t, SymbolicZero)} for d in tangents[0])
    doptions = [None if isinstance(t, SymbolicZero) else t for t in tangents[2]]
    sides = [i for i, d in enumerate(dinputs) if any(n in LOGITS for n in d)]
    pairs = [(side, partial(_slope, term, len(specs), side)) for term in terms[:count] for side in sides]
    more = () if slopes else tuple(slope for _, slope in pairs)
    sums = _sum_of_terms(count + len(more), (*terms[:count], *more, *terms[count:]), specs, slopes, *primals)
    of_slopes, sums = sums[count : count + len(more)], (*sums[:count], *sums[count + len(more) :])
    rests: dict[int, Callable[..., Array]] = {}
    if slopes:
        given = [slopes(*sums)[side] for side in sides]
        rests = {i: g[1] for i, g in enumerate(given) if isinstance(g, tuple)}
        given = [g[0] if isinstance(g, tuple) else g for g in given]
        of_slopes = [jnp.broadcast_to(g, sums[0].shape) for g in given]

    def step(parts: Any, dparts: Any, known: Any, start: Any) -> tuple[Array, ...]:
        rows, options, doptions, of_slopes = known
        read = [along(partial(logits_of, s), p, d, *LOGITS) for s, p, d in zip(specs, parts, dparts, strict=True)]

        def targets(spec: Spec, x: Array, part: Inputs) -> Array | None:
            return targets_of(block_of(spec, part, start, x), Ask(), spec.dtype)[0]

        weighed = [
            along(partial(targets, s, x), p, d, "targets", "weights")
            for s, p, d, (x, _) in zip(specs, parts, dparts, read, strict=True)
        ]
        rows = tuple(row._replace(m=_platforms.renamed(row.m, row.log_sum)) for row in rows)
        args = _arguments(specs[0].dtype, [x for x, _ in read], [t for t, _ in weighed], rows, options)
        others = [dt for t, dt in weighed if t is not None] + [
            None if d is None else beside(d, args[0]) for d in doptions
        ]
        varying = {len(args) - len(others) + i: d.astype(args[0].dtype) for i, d in enumerate(others) if d is not None}

        none = jnp.zeros(args[0].shape[:-1], args[0].dtype)
        total = [jnp.sum(_derivative(term, args, varying), -1) if varying else none for term in terms[:count]]
        for i, (side, slope) in enumerate(pairs):
            p, f = args[2 * side + 1], slope(*args)
            all_f, others = (beside(v, p) for v in (of_slopes[i], rows[side].others))
            coefficient = f - p * all_f
            rest = rests[i](*args, *(beside(row.others, p) for row in rows)) if i in rests else all_f - f
            coefficient = replaced(jnp.where(p > 0.5, f * others - p * rest, coefficient), coefficient)
            total[i // len(sides)] += jnp.sum(coefficient * read[side][1].astype(p.dtype), -1)
        return tuple(total)

    out = add_up(specs, inputs, dinputs, (rows, options, doptions, of_slopes), step)
    # The selection also keeps XLA:CPU from compiling p (v - sum p v) into one fusion, as jaxlib 0.10.2 does wrongly
    # where p is shared by a batch of v, as it is in a Hessian.
    out = [jnp.where(rows[0].present & rows[-1].present, t, 0) for t in out]
    return sums, (*out, *(zero_from_primal(x, symbolic_zeros=True) for x in sums[count:]))


def _slope(term: Term, count: int, side: int, *args: Array) -> Array:
    """The derivative of a term by log p or, of the other side, log q."""
    one = jnp.ones_like(args[0])
    along = {2 * side: one, 2 * side + 1: args[2 * side + 1]}
    return _derivative(term, args, along if count == 1 else along | {4: -one if side else one})


def _derivative(term: Term, args: Sequence[Array], tangents: dict[int, Array]) -> Array:
    """That of a term along some of its arguments."""

    def of(some: dict[int, Array]) -> Array:
        return term(*(some.get(i, x) for i, x in enumerate(args)))

    return jax.jvp(of, ({i: args[i] for i in tangents},), (tangents,))[1]


def log_probabilities(spec: Spec, inputs: Inputs) -> Array:
    """log p of all classes of an array, -inf where one isn't there."""
    # An array is widened, since its gradient is a sum of two, which is to be rounded once.
    inputs = inputs | {"array": inputs["array"].astype(spec.dtype)}
    values, state = measure(spec, inputs, ("log_normalizer", "top"))
    x, row = _mesh.vary((logits_of(spec, inputs), row_of(values, state)), _mesh.varying(inputs, values))
    return jnp.where(there(x), log_probability(x, row), -np.inf)
