r"""What a loss needs of logits, as differentiable functions, once for every kind of logits.

A measure is a sum over the classes of a term of :math:`\log p_k`, with :math:`p` the softmax of the logits :math:`x`; a
term may also depend on targets, on options, and on the :math:`\log q_k` of other logits. With :math:`f_k` the derivative
of the term of class k by :math:`\log p_k`, and :math:`d \log p_k = dx_k - \sum_j p_j\, dx_j`, the derivative by a logit is

.. math:: c_k = f_k - p_k F, \qquad F = \sum_k f_k .

The :math:`c_k` add up to 0. At a class with more than half of the probability, where :math:`f_k` and :math:`p_k F` may be
nearly equal, :math:`c_k` is minus the sum of the others, which needs no difference:

.. math:: c_{\text{top}} = (1 - p_{\text{top}}) F - R, \qquad R = \sum_{k \ne \text{top}} f_k .

Here :math:`1 - p_{\text{top}} = s / (1 + s)` comes from the row's state, and R is summed without the top. An error that
all :math:`\log p_k` have in common drops out. So a measure is a record of its value, f, F and R, and this is the only
derivative rule of them all, for all orders and both modes:

====================  ============================  =================  ================  ==================================
measure               value                         :math:`f_k`        :math:`F`         :math:`R`
====================  ============================  =================  ================  ==================================
`LOG_NORMALIZER`      :math:`m + L`                 0                  -1                -1
`NLL`                 :math:`g_y + L`               :math:`-[k = y]`   -1                0 if y is the top, else -1
`GIVEN`, `UNIFORM`    :math:`A + T L`               :math:`-t_k`       :math:`-T`        -T without the top
`ENTROPY`             :math:`h / (1 + s) + L`       :math:`p_k g_k`    :math:`h/(1+s)`   not needed: f is 0 at the top
`sum_of` a term       a second sum, p being known   its derivative     another sum       another sum
====================  ============================  =================  ================  ==================================

(To all :math:`f_k` may be added a multiple of :math:`p_k`, and to F and R what these add up to: it drops out, too. That is
how the entropy comes by gaps in place of :math:`-\log p_k`.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jaxce import _mesh, _platforms
from jaxce._inputs import LOGITS, Inputs, Logits, Spec, on_each_device
from jaxce._passes import add_up, along, block_of, by_rows, logits_of, state_of
from jaxce._rules import alike, custom_jvp, largest, no_tangents, not_zero, weigh
from jaxce._state import FAR, Ask, State, Targets, beside, targets_of, there

LABELS = "labels", "targets", "chosen", "shares", "weights"

HALF, MOST = 0.5, 0.6
"""A class with more than half of the probability is left out of R. Each pass rounds probabilities in its own way: so R is
used at a class with more than the second number, which is certain to have been left out."""


@custom_jvp
def replaced(value: Array, other: Array) -> Array:
    """``value``, which stands for the same number as ``other`` with more of its digits, with the derivatives of that."""
    return value


@replaced.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return replaced(*primals), tangents[1]


# ----------------------------------------------------------------------------------------------- probabilities of a class


class Row(NamedTuple):
    """What the probabilities of a row's classes are made of: constants, but for the derivatives of the last two."""

    present: Array
    m: Array
    log_sum: Array
    share: Array  # the probability of the top class, 0 where no class is there
    others: Array  # that of all other classes
    log_normalizer: Array
    top: Array  # -log p of the top class, where it has more than half of the probability


def row_of(state: State, log_normalizer: Array, top: Array) -> Row:
    """The row of a state, with the measures `LOG_NORMALIZER` and `TOP`."""
    share, others = jnp.where(state.present, 1 / (1 + state.s), 0), state.s / (1 + state.s)
    return Row(state.present, state.m, state.log_sum, share, others, log_normalizer, top)


def _gap(x: Array, row: Row) -> Array:
    """m - x, 0 at the maximum, infinite or not; and above it, as another pass may round a product otherwise."""
    m = beside(row.m, x)
    return jnp.where(x >= m, 0, m - x)


@custom_jvp
def log_probability(x: Array, row: Row) -> Array:
    """log softmax(x) = -(g + L), -inf where a class isn't there but others are."""
    return -(_gap(x, row) + beside(row.log_sum, x))


@log_probability.defjvp
def _(primals: Any, tangents: Any) -> Any:
    """dx less its mean. At a class with most of the probability these cancel, and -log p is a measure of its own."""
    (x, row), (dx, drow) = primals, tangents
    value = log_probability(x, row)
    mean, top = (beside(v, x) for v in (drow.log_normalizer, drow.top))
    return value, jnp.where(value > math.log(MOST), -top, dx - mean)


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
    """log p - log q: a large number where only p is there, anything finite where p is 0.

    It is the difference of the logits, not rounded where they are nearly equal, less that of the log-normalizers; or, where
    the maxima lie apart, and the logits with them, the difference of the gaps. Eighths, so that none overflows.
    """
    most = largest(x)

    def eighth(x: Array) -> Array:
        return jnp.clip(x / 8, -most / 8, most / 8)

    m, n = eighth(row.m), eighth(other.m)
    apart = jnp.abs(m - n) > 1 / 8
    a, b = (beside(jnp.where(apart, v, 0), x) for v in (m, n))
    shift = jnp.where(apart, 0, 8 * (m - n)) + (row.log_sum - other.log_sum)
    return jnp.clip(8 * ((eighth(x) - a) - (eighth(y) - b)) - beside(shift, x), -FAR, most)


@log_ratio.defjvp
def _(primals: Any, tangents: Any) -> Any:
    dp, dq = (jax.jvp(log_probability, primals[i : i + 2], tangents[i : i + 2])[1] for i in (0, 2))
    return log_ratio(*primals), jnp.where(there(primals[0]) & there(primals[2]), dp - dq, 0)


# --------------------------------------------------------------------------------------------------------------- measures


class Class(NamedTuple):
    """What a term may be made of: arrays of the classes of a block, of one softmax or of two."""

    log_p: Array
    p: Array
    log_q: Any = None
    q: Any = None
    delta: Any = None  # log p - log q
    not_p: Any = None  # 1 - p
    not_q: Any = None
    gap: Any = None  # of p's logit
    there: Any = None  # whether p's logit isn't -inf
    label: Any = None  # 1 at the label, else 0
    weight: Any = None  # of the class
    given: Any = None  # targets
    uniform: Any = None
    options: tuple[Array, ...] = ()


class Slope(NamedTuple):
    """A measure's derivatives by the log-probabilities of one of the softmaxes. F and R are functions of measures."""

    f: Callable[[Class], Array]
    total: Callable[[], Sum] | None = None  # F; None if it is summed
    rest: Callable[[], Sum] | None = None  # R; None if it is summed
    over_p: bool = False  # whether f is given over p, so that p F doesn't underflow beside p f
    rest_at: Callable[[Class], Array] | None = None  # R from the top class alone, where that needs no sum
    cancels: bool = True  # whether f and p F may be nearly equal at the top


class Measure(NamedTuple):
    """A sum over the classes."""

    value: Callable[[State], Any] | None  # None if the terms are summed
    term: Callable[[Class], Array]  # for the value, if summed, and for the derivatives by all else than log p
    slopes: tuple[Any, ...] = ()  # by each softmax, None of one that has no part
    asks: tuple[str, ...] = ()  # of the state: "entropy", "rest", or a kind of labels
    side: int = 0  # of which softmax the state is


Sum = tuple[Callable[..., Any], tuple[Measure, ...]]


def _nothing(c: Class) -> Array:
    return jnp.zeros_like(c.p)


def _number(value: float) -> Callable[[], Sum]:
    return lambda: (lambda: value, ())


def _but_top(side: int, term: Callable[[Class], Array], c: Class) -> Array:
    """A term of all classes but one with more than half of the probability.

    What it is a multiple of is 0 there, and not the term: XLA:GPU would write out terms to sum them with and without.
    """
    top = (c.p, c.q)[side] > HALF
    factors = {n: x for n in ("p", "q", "given", "uniform") if (x := getattr(c, n)) is not None}
    return term(c._replace(**{n: jnp.where(top, 0, x) for n, x in factors.items()}))


def _ends(side: int) -> tuple[Measure, Measure]:
    """m + L, which is a logit less its log p; and -log p of the class with most of the probability."""

    def likely(c: Class) -> Array:
        p = (c.p, c.q)[side]
        return -(p > HALF).astype(p.dtype)

    def measure(value: Callable[[State], Any], f: Callable[[Class], Array], rest: float) -> Measure:
        return Measure(value, _nothing, (None,) * side + (Slope(f, _number(-1.0), _number(rest)),), side=side)

    return measure(lambda state: state.m + state.log_sum, _nothing, -1), measure(lambda state: state.log_sum, likely, 0)


def _cost(kind: str, c: Class) -> Array:
    return weigh(getattr(c, kind), -c.log_p)


def _count(state: State) -> Any:
    """By what uniform targets are divided, to be a distribution of the classes that are there."""
    uniform: Any = state.uniform
    count = uniform.total if state.count is None else state.count
    return jnp.where(count == 0, 1, count)


def _with_targets(kind: str) -> Measure:
    def of(state: State) -> Targets:
        targets = getattr(state, kind)
        return jax.tree.map(lambda v: v / _count(state), targets) if kind == "uniform" else targets

    def t(c: Class) -> Array:
        return getattr(c, kind)

    total = Measure(lambda state: of(state).total, t, asks=(kind,))
    rest = Measure(lambda state: of(state).rest, partial(_but_top, 0, t), asks=(kind, "rest"))
    slope = Slope(lambda c: -t(c), lambda: (jnp.negative, (total,)), lambda: (jnp.negative, (rest,)))
    return Measure(lambda s: of(s).gap + of(s).total * s.log_sum, partial(_cost, kind), (slope,), (kind,))


def _label_gap(state: State) -> Array:
    return jnp.where(state.label == state.m, 0, state.m - state.label)


def _mean_gap(state: State) -> Array:
    return state.h / (1 + state.s)


def _finite_gap(c: Class) -> Array:
    """g, 0 of what has no part in a sum of p g, with the derivatives of -log p."""
    return replaced(jnp.where(c.p == 0, 0, c.gap), jnp.where(c.p == 0, 0, -c.log_p))


ENDS = _ends(0), _ends(1)
LOG_NORMALIZER, TOP = ENDS[0]
_UNLIKELY = Measure(lambda state: -(state.label != state.m).astype(state.m.dtype), _nothing, asks=("label",))
NLL = Measure(
    lambda state: _label_gap(state) + state.log_sum,
    partial(_cost, "label"),
    (Slope(lambda c: -c.label, _number(-1.0), lambda: (lambda rest: rest, (_UNLIKELY,))),),
    ("label",),
)
WEIGHT = Measure(lambda state: state.label_weight, lambda c: c.label * c.weight, asks=("label",))
GIVEN, UNIFORM = map(_with_targets, ("given", "uniform"))
_MEAN_GAP = Measure(_mean_gap, _nothing, asks=("entropy",))
ENTROPY = Measure(
    lambda state: _mean_gap(state) + state.log_sum,
    _nothing,
    (Slope(_finite_gap, lambda: (replaced, (_MEAN_GAP, ENTROPY)), over_p=True, cancels=False),),
    ("entropy",),
)


@functools.cache
def sum_of(term: Callable[[Class], Array], *slopes: Slope) -> Measure:
    """That of a term. Its derivatives by the log-probabilities are found from the term where they aren't given."""
    return Measure(None, term, slopes or tuple(Slope(partial(_derivative_by, side, term)) for side in (0, 1)))


def _derivative_by(side: int, term: Callable[[Class], Array], c: Class) -> Array:
    one = jnp.ones_like(c.p)
    varying = {"log_q": one, "q": c.q} if side else {"log_p": one, "p": c.p}
    return _derivative(term, c, varying if c.q is None else varying | {"delta": -one if side else one})


def _derivative(term: Callable[[Class], Array], c: Class, tangents: dict[str, Any]) -> Array:
    """That of a term along some of the fields."""
    some = {n: getattr(c, n) for n in tangents}
    return jax.jvp(lambda some: term(c._replace(**some)), (some,), (tangents,))[1]


def _f(side: int, slope: Slope, c: Class) -> Array:
    return slope.f(c) * (c.p, c.q)[side] if slope.over_p else slope.f(c)


@functools.cache
def _total(side: int, slope: Slope) -> Sum:
    """F."""
    return slope.total() if slope.total else (lambda total: total, (sum_of(partial(_f, side, slope)),))


@functools.cache
def _rest(side: int, slope: Slope) -> Sum | None:
    """R, if it is needed."""
    if slope.rest_at or not slope.cancels:
        return None
    if slope.rest:
        return slope.rest()
    term = partial(_but_top, side, partial(_f, side, slope))
    slopes = (Slope(partial(_derivative_by, i, term), cancels=i != side) for i in (0, 1))
    return (lambda rest: rest), (sum_of(term, *slopes),)


# --------------------------------------------------------------------------------------------------------------- the rule


class _Known(NamedTuple):
    """What is known of the rows, for a pass over their classes."""

    states: tuple[State, ...]
    rows: tuple[Row, ...]
    options: tuple[Array, ...]
    doptions: tuple[Any, ...] = ()
    totals: Any = ()  # F and R of each measure by each side that varies


def measure(
    logits: tuple[Logits, ...], measures: tuple[Measure, ...], *options: Array, prediction: bool = False
) -> tuple[tuple[Array, ...], tuple[State, ...]]:
    """The measures, which are differentiable, and the states of the rows of each softmax, which aren't."""

    def run(specs: tuple[Spec, ...], inputs: tuple[Inputs, ...], *options: Array) -> Any:
        specs = tuple(spec._replace(ask=Ask(prediction=prediction)) for spec in specs)
        return measure_part(specs, inputs, measures, *options)

    return on_each_device(run, logits, *options)


def measure_part(
    specs: tuple[Spec, ...], inputs: tuple[Inputs, ...], measures: tuple[Measure, ...], *options: Array
) -> tuple[tuple[Array, ...], tuple[State, ...]]:
    """The same of what this device has."""

    def whole(*inputs: Inputs) -> Any:
        return _measure(specs, measures, inputs, options)

    return by_rows(max(spec.chunks for spec in specs), inputs, whole)


@partial(custom_jvp, nondiff_argnums=(0, 1))
def _measure(specs: tuple[Spec, ...], measures: tuple[Measure, ...], inputs: Any, options: Any) -> Any:
    states = tuple(_state(spec, i, measures) for spec, i in zip(specs, inputs, strict=True))
    values = [m.value and m.value(states[m.side]) for m in measures]
    terms = tuple(m.term for m, v in zip(measures, values, strict=True) if v is None)
    if terms:
        rows = tuple(row_of(state, state.m + state.log_sum, state.log_sum) for state in states)
        sums = iter(_sums(specs, terms, inputs, _Known(states, rows, options)))
        values = [next(sums) if v is None else v for v in values]
    values = [
        v if m in (ENDS[0][0], ENDS[1][0]) else _present(states, v) for m, v in zip(measures, values, strict=True)
    ]
    bad = _bad(inputs[0], states)
    values = [jnp.where(bad, np.nan, v) if "label" in m.asks else v for m, v in zip(measures, values, strict=True)]
    return tuple(values), states


def _state(spec: Spec, inputs: Inputs, measures: tuple[Measure, ...]) -> State:
    asks = {kind for m in measures for kind in m.asks}
    if not asks & {"label", "given", "uniform"}:
        inputs = {n: x for n, x in inputs.items() if n not in LABELS}
    ask = spec.ask._replace(entropy="entropy" in asks, uniform="uniform" in asks, rest="rest" in asks)
    return state_of(spec._replace(ask=ask), inputs)


def _present(states: tuple[State, ...], x: Array) -> Array:
    """x, 0 in rows of which no class is there on some side."""
    present = states[0].present & states[-1].present
    return jnp.where(present, x, jnp.zeros((), x.dtype))


def _bad(inputs: Inputs, states: tuple[State, ...]) -> Any:
    """Whether a row's label is no class, and the row counts."""
    return _present(states, inputs["labels"] < 0) if "labels" in inputs else False


def _sums(specs: tuple[Spec, ...], terms: Any, inputs: tuple[Inputs, ...], known: _Known) -> tuple[Array, ...]:
    """The sums of terms over the classes."""

    def step(parts: Any, dparts: Any, known: Any, start: Any) -> tuple[Array, ...]:
        others = _renamed(known, "others") if len(terms) > 1 else known
        values = (
            term(_classes(specs, parts, dparts, others if n else known, start)[0]) for n, term in enumerate(terms)
        )
        return _platforms.sums(tuple(values), all(spec.adjacent for spec in specs))

    return add_up(specs, inputs, ({},) * len(inputs), known, step)


def _renamed(known: _Known, field: str) -> _Known:
    """The same, as other numbers to a GPU, which else writes out what is made of them for several results."""
    rows = (row._replace(m=_platforms.renamed(row.m, getattr(row, field))) for row in known.rows)
    return known._replace(rows=tuple(rows))


def _classes(
    specs: tuple[Spec, ...], parts: Any, dparts: Any, known: _Known, start: Any
) -> tuple[Class, list[Any], dict[str, Any]]:
    """The classes of a block, the tangents of their logits, and those of whatever else varies."""
    read = [along(partial(logits_of, s), p, d, *LOGITS) for s, p, d in zip(specs, parts, dparts, strict=True)]
    spec, block = specs[0], block_of(specs[0], parts[0], start, read[0][0])
    xs = [x.astype(spec.dtype) for x, _ in read]
    of_part = partial(_fields, spec, known.states[0], start, read[0][0])
    fields, dfields = along(of_part, parts[0], dparts[0], "targets", "shares", "weights")
    dfields = dfields or {}
    if block.labels is not None:
        fields["label"] = (block.places == beside(block.labels, xs[0])).astype(spec.dtype)
    fields["options"] = tuple(beside(o, xs[0]) for o in known.options)
    if any(d is not None for d in known.doptions):
        pairs = zip(known.options, known.doptions, strict=True)
        tangents = (jnp.zeros_like(o) if d is None else d.astype(o.dtype) for o, d in pairs)
        dfields["options"] = tuple(beside(d, xs[0]) for d in tangents)
    logs = [f(x, row) for x, row in zip(xs, known.rows, strict=True) for f in (log_probability, probability)]
    if len(xs) == 2:
        logs.append(log_ratio(xs[0], known.rows[0], xs[1], known.rows[1]))
    nots = (_not(p, row) for p, row in zip(logs[1:4:2], known.rows, strict=True))
    fields |= dict(zip(("not_p", "not_q"), nots, strict=False))
    fields |= {"gap": _gap(xs[0], known.rows[0]), "there": there(xs[0])}
    return Class(*logs, **fields), [dx for _, dx in read], dfields


def _not(p: Array, row: Row) -> Array:
    """1 - p, from the sum of the others where it is most."""
    others = beside(row.others, p) + 0 * p  # of its shape, and sharded as it is
    return replaced(jnp.where(p > MOST, others, 1 - p), 1 - p)


def _fields(spec: Spec, state: State, start: Any, x: Array, part: Inputs) -> dict[str, Array]:
    """What targets and weights give to a class."""
    block = block_of(spec, part, start, x)
    given, uniform = targets_of(block, Ask(uniform=state.uniform is not None), spec.dtype)
    fields = {} if given is None else {"given": given}
    if uniform is not None:
        fields["uniform"] = uniform / beside(_count(state), uniform)
    if block.weights is not None:
        fields["weight"] = jnp.broadcast_to(block.weights.astype(spec.dtype), block.x.shape)
    return fields


@partial(_measure.defjvp, symbolic_zeros=True)
def _(specs: tuple[Spec, ...], measures: tuple[Measure, ...], primals: Any, tangents: Any) -> Any:
    inputs, options = primals
    dinputs = tuple(map(not_zero, tangents[0]))
    doptions = tuple(None if isinstance(t, SymbolicZero) else t for t in tangents[1])
    sides = [i for i, d in enumerate(dinputs) if any(n in LOGITS for n in d)]
    varying = tuple((m, i) for m in measures for i in sides if m.slopes[i : i + 1] not in ((), (None,)))
    totals = [(_total(i, m.slopes[i]), _rest(i, m.slopes[i])) for m, i in varying]
    ends = ENDS[: len(specs)]
    found = [m for pair in totals for total in pair if total for m in total[1]]
    wanted = tuple(dict.fromkeys([*measures, *(m for pair in ends for m in pair), *found]))
    values, states = _measure(specs, wanted, inputs, options)
    value = dict(zip(wanted, values, strict=True))
    rows = tuple(row_of(state, *(value[m] for m in pair)) for state, pair in zip(states, ends, strict=True))

    def of_rows(total: Sum) -> Array:
        function, found = total
        return jnp.broadcast_to(function(*(value[m] for m in found)), states[0].m.shape).astype(specs[0].dtype)

    known = _Known(states, rows, options, doptions, [tuple(t and of_rows(t) for t in pair) for pair in totals])
    out = add_up(specs, inputs, dinputs, known, partial(_tangents, specs, measures, varying))
    # The selection also keeps XLA:CPU from compiling p (v - sum p v) into one fusion, as jaxlib 0.10.2 does wrongly
    # where p is shared by a batch of v, as it is in a Hessian.
    out = [_present(states, t) for t in out]
    bad = jnp.where(_bad(inputs[0], states), np.nan, 1).astype(specs[0].dtype)
    out = [t * bad if "label" in m.asks else t for m, t in zip(measures, out, strict=True)]
    if not any("rest" in m.asks for m in measures):
        states = tuple(s._replace(given=_without_rest(s.given), uniform=_without_rest(s.uniform)) for s in states)
    return (tuple(value[m] for m in measures), states), (tuple(out), no_tangents(states))


def _without_rest(targets: Targets | None) -> Targets | None:
    return None if targets is None else targets._replace(rest=None)


Varying = tuple[tuple[Measure, int], ...]
"""Measures, each with a side: the softmax by whose log-probabilities it is differentiated."""


def _tangents(
    specs: tuple[Spec, ...],
    measures: tuple[Measure, ...],
    varying: Varying,
    parts: Any,
    dparts: Any,
    known: _Known,
    start: Any,
) -> tuple[Array, ...]:
    """What a block adds to the tangents of the measures."""
    if any(m.value is None for m in measures):
        known = _renamed(known, "log_sum")
    c, dxs, dfields = _classes(specs, parts, dparts, known, start)
    total: Any = {
        m: jnp.sum(_derivative(m.term, c, dfields), -1) if dfields else jnp.zeros(c.p.shape[:-1], c.p.dtype)
        for m in measures
    }
    for (m, side), (of_f, rest) in zip(varying, known.totals, strict=True):
        slope, p, of_f = m.slopes[side], (c.p, c.q)[side], beside(of_f, c.p)
        coefficient = p * (slope.f(c) - of_f) if slope.over_p else slope.f(c) - p * of_f
        if slope.cancels:
            rest = beside(rest, p) if slope.rest_at is None else slope.rest_at(c)
            top = (c.not_p, c.not_q)[side] * of_f - rest
            likely, top, coefficient = alike(p, top, coefficient)
            coefficient = jnp.where(likely > MOST, top, coefficient)
        total[m] += jnp.sum(coefficient * dxs[side].astype(p.dtype), -1)
    return tuple(total[m] for m in measures)


def log_probabilities(logits: Logits) -> Array:
    """log p of all classes, -inf where one isn't there, with the classes last."""

    def run(specs: tuple[Spec, ...], inputs: tuple[Inputs, ...]) -> Array:
        (spec,), (own,) = specs, inputs
        # An array is widened, since its gradient is a sum of two, which is to be rounded once.
        whole = {n: x for n, x in own.items() if n not in LOGITS} | {"array": logits_of(spec, own).astype(spec.dtype)}
        spec = spec._replace(size=spec.classes, strips=1, chunks=1)
        values, (state,) = measure_part((spec,), (whole,), (LOG_NORMALIZER, TOP))
        x, row = _mesh.vary((logits_of(spec, whole), row_of(state, *values)), _mesh.varying(whole, values))
        return jnp.where(beside(row.present, x), log_probability(x, row), -np.inf)

    return on_each_device(run, (logits,), results="logits")
