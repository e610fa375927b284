r"""What a loss needs of logits, as differentiable functions, once for every kind of logits.

Each has a tangent that is a sum over the classes of a coefficient times the tangent of the logit, with :math:`p` the softmax,

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

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from jaxce import _mesh
from jaxce._passes import Inputs, Spec, add_up, along, block_of, by_rows, logits_of, state_of
from jaxce._rules import custom_jvp
from jaxce._state import Ask, State, beside, targets_of, there

Values = dict[str, Array]
"""Measures of the rows, by name: "log_normalizer"; "top", the negative log-likelihood of the class with over half of the
probability, where there is one; "nll" and "weight" of the label; "given" and "uniform", the cross-entropy with such targets, and
their sums, "total given" and "total uniform"; "entropy"."""

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
    """What the probabilities of a row's classes are made of: constants, and two numbers of which only the derivatives count."""

    present: Array
    m: Array  # 0 where no class is there
    log_sum: Array
    share: Array  # of the top class
    log_normalizer: Array
    top: Array


def row_of(values: Values, state: State) -> Row:
    """The row of measured logits."""
    m = jnp.where(state.present, state.m, 0)
    return Row(state.present, m, state.log_sum, 1 / (1 + state.s), values["log_normalizer"], values["top"])


def _gap(x: Array, row: Row) -> Array:
    """m - x, 0 at the maximum, infinite or not."""
    m = beside(row.m, x)
    return jnp.where(x == m, 0, m - x)


@custom_jvp
def log_probability(x: Array, row: Row) -> Array:
    """log softmax(x) = -(g + L), -inf where a class isn't there."""
    return -(_gap(x, row) + beside(row.log_sum, x))


@log_probability.defjvp
def _(primals: Any, tangents: Any) -> Any:
    """dx less the mean of dx. At a class with over half of the probability these two cancel, and -log p has a sum of its own."""
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
    """log p - log q, large but finite where only one is there, 0 where neither is.

    The logits' own difference comes first: it is not rounded where they are nearly equal. In quarters no difference overflows.
    """
    log_p, log_q = log_probability(x, row), log_probability(y, other)
    shift = beside(row.m / 4 - other.m / 4, x), beside(row.log_sum - other.log_sum, x)
    finite = beside(jnp.isfinite(row.m) & jnp.isfinite(other.m), x)
    delta = jnp.where(finite, 4 * ((x / 4 - y / 4) - shift[0]) - shift[1], log_p - log_q)
    most = float(jnp.finfo(x.dtype).max) / 8
    in_p, in_q = there(log_p), there(log_q)
    return jnp.where(in_p & in_q, jnp.clip(delta, -most, most), jnp.where(in_p, most, jnp.where(in_q, -most, 0)))


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

    def value(name: str) -> Array:
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


def _count(state: State) -> Array:
    """By what uniform targets are divided, to be a distribution of the classes that are there."""
    count = state.uniform.total if state.count is None else state.count
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
    others = of_row(state.s / (1 + state.s))  # 1 - p of the top class
    ask = Ask(uniform="uniform" in names or "total uniform" in names)

    def targets(part: Inputs) -> Values:
        given, uniform = targets_of(block_of(spec, part, start, x), ask, spec.dtype)
        return {n: t for n, t in zip(KINDS, (given, uniform), strict=True) if t is not None}

    ts, dts = along(targets, part, dpart, "targets", "weights")
    is_label = None if block.labels is None else block.places == of_row(block.labels)

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
            cost = jnp.where(there(x), -log_p, jnp.where((ts[name] == 0) | ~of_row(state.present), 0, np.inf))
            total += jnp.sum(cost * dt, -1) / (of_row(_count(state))[..., 0] if name == "uniform" else 1)
        return total

    return {name: tangent(name) for name in names}


# --------------------------------------------------------------------------------------------------- sums over the classes


Term = Callable[..., Any]
"""Of log p and p of a softmax, or of log p, p, log q, q and log p - log q of two; then of targets, if any, and of options."""


def sum_of_terms(term: Term, specs: tuple[Spec, ...], inputs: tuple[Inputs, ...], *options: Array) -> tuple[Any, tuple[Array, ...]]:
    """sum_k term(log p_k, p_k, ...), and in which rows any class is there.

    A class that isn't there has log p of -inf, but in a row that has none, where it is 0.
    """

    def whole(*inputs: Inputs) -> tuple[Any, tuple[Array, ...]]:
        inputs = tuple(_widened(spec, i) for spec, i in zip(specs, inputs, strict=True))
        rows = []
        for spec, i in zip(specs, inputs, strict=True):
            logits = {n: x for n, x in i.items() if n not in ("targets", "labels", "weights")}
            rows.append(row_of(*_measure(spec, ("log_normalizer", "top"), logits)))
        return _sum_of_terms(term, specs, inputs, tuple(rows), options), tuple(row.present for row in rows)

    return by_rows(max(spec.chunks for spec in specs), inputs, whole)


def _widened(spec: Spec, inputs: Inputs) -> Inputs:
    """With an array in the dtype to compute in, since its gradient is a sum of two, which is rounded once."""
    return inputs | {n: x.astype(spec.dtype) for n, x in inputs.items() if n == "array"}


@partial(custom_jvp, nondiff_argnums=(0, 1))
def _sum_of_terms(term: Term, specs: tuple[Spec, ...], inputs: Any, rows: Any, options: Any) -> Any:
    def step(parts: Any, _: Any, rows: Any, start: Any) -> Any:
        return _terms(term, *_classes(specs, parts, start), *rows)

    return add_up(specs, inputs, ({},) * len(inputs), (rows, options), step)


def _classes(specs: tuple[Spec, ...], parts: tuple[Inputs, ...], start: Any) -> tuple[Any, Any]:
    """Logits and targets of a block."""
    blocks = [block_of(spec, part, start) for spec, part in zip(specs, parts, strict=True)]
    dtype = specs[0].dtype
    return tuple(b.x.astype(dtype) for b in blocks), tuple(b.targets.astype(dtype) for b in blocks if b.targets is not None)


def _terms(term: Term, xs: Any, ts: Any, rows: Any, options: Any) -> Any:
    known: list[Array] = []
    for x, row in zip(xs, rows, strict=True):
        present = beside(row.present, x)
        known += [jnp.where(present, log_probability(x, row), 0), jnp.where(present, probability(x, row), 1)]
    if len(xs) == 2:
        known.append(log_ratio(xs[0], rows[0], xs[1], rows[1]))
    terms = term(*known, *ts, *(beside(option, xs[0]) for option in options))
    return jax.tree.map(lambda t: jnp.sum(t, -1), terms)


@partial(_sum_of_terms.defjvp, symbolic_zeros=True)
def _(term: Term, specs: tuple[Spec, ...], primals: Any, tangents: Any) -> Any:
    inputs, *known = primals
    dinputs = tuple({n: t for n, t in d.items() if not isinstance(t, SymbolicZero)} for d in tangents[0])
    dknown = dict(enumerate(jax.tree.leaves(tangents[1:], is_leaf=lambda t: isinstance(t, SymbolicZero))))
    dknown = {i: t for i, t in dknown.items() if not isinstance(t, SymbolicZero)}

    def step(parts: Any, dparts: Any, rows: Any, start: Any) -> Any:
        (known, dknown), tree = rows, jax.tree.structure(rows[0])

        def terms(dparts: Any, dknown: dict[int, Array]) -> Any:
            classes = _classes(specs, tuple(p | v for p, v in zip(parts, dparts, strict=True)), start)
            leaves = [dknown.get(i, leaf) for i, leaf in enumerate(jax.tree.leaves(known))]
            return _terms(term, *classes, *tree.unflatten(leaves))

        varying = tuple({n: p[n] for n in d} for p, d in zip(parts, dparts, strict=True))
        some = {i: leaf for i, leaf in enumerate(jax.tree.leaves(known)) if i in dknown}
        return jax.jvp(terms, (varying, some), (dparts, dknown))[1]

    return _sum_of_terms(term, specs, *primals), add_up(specs, inputs, dinputs, (known, dknown), step)


def log_probabilities(spec: Spec, inputs: Inputs) -> Array:
    """log p of all classes of an array, -inf where one isn't there."""
    inputs = _widened(spec, inputs)
    values, state = measure(spec, inputs, ("log_normalizer", "top"))
    x = logits_of(spec, inputs)
    return log_probability(*_mesh.vary((x, row_of(values, state)), _mesh.varying(x, values)))
