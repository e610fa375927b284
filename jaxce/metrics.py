r"""Evaluation metrics that add up: each is a frozen pytree of sums, which batches and devices merge in any order::

    metric = Accuracy.empty()
    for logits, labels in batches:
        metric = metric.update(logits, labels)   # the same as metric.merge(Accuracy.from_batch(logits, labels))
    metric.compute()

=====================================  ===========================================================================
given                                  metrics
=====================================  ===========================================================================
losses, or any values                  `Mean`, `Perplexity`, `BitsPer`
logits [..., classes], integer labels  `Evaluation`, or `Accuracy`, `TopKAccuracy`, `Brier`, `Calibration`
binary logits, labels of 0 and 1       `BinaryEvaluation`, or `BinaryAccuracy`, `BinaryBrier`, `BinaryCalibration`
=====================================  ===========================================================================

AUROC, F1 scores and confusion matrices are not here: scikit-learn has them (`roc_auc_score`, `f1_score`,
`confusion_matrix`), for predictions gathered on the host.

Sums are kept as pairs of numbers (`Sum`), the second holding the rounding error of the first, about 48 binary digits in
float32: counts are exact to 2^48, and how the data is split changes a sum by less than 2^-44 of the sum of the terms'
sizes, hence the result by no more than its last digit. That is for given terms: XLA may round an example's own loss
differently when it compiles for another batch shape.

A metric can be the carry of ``lax.scan``, goes through ``jax.jit`` (and may be donated) and, over models, through
``jax.vmap``, and inside ``shard_map`` ``metric.psum(axis_name)`` is that of all devices' examples. In a ``clu``-style loop
write ``metrics = metrics.merge(Evaluation.from_batch(logits, labels))``; in Flax NNX hold ``metric = nnx.Variable(
Evaluation.empty())`` and write ``metric.set_value(metric.get_value().update(logits, labels))``.

Logits of classes are an array with the classes on its last axis, `LinearLogits`, or inside ``shard_map`` `ShardedLogits`,
whose metric is that of all classes. They are read once, and once more for a top-k accuracy. ``weights`` say how much an
example counts; ``where`` says which examples take part or, with as many axes as the logits, which of their entries.
Examples of weight 0, and rows without a class, are left out, so NaN in padding does no harm; NaN, or an invalid label,
in a row that counts makes the result NaN. Without any data the mean is 0, the perplexity 1 and the calibration error 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jaxce import _checks, _platforms
from jaxce._checks import ArrayLike, AxisName, compiled, pytree
from jaxce._inputs import Inputs, Spec, on_each_device, read_logits
from jaxce._logits import AnyLogits
from jaxce._measures import NLL, measure_part, replaced, sum_of
from jaxce._passes import add_up, by_rows, reading
from jaxce._reduction import bits_per
from jaxce._sigmoid import sigmoid_binary_cross_entropy, sigmoids
from jaxce._state import Ask, State, there

__all__ = [
    "Accuracy",
    "BinaryAccuracy",
    "BinaryBrier",
    "BinaryCalibration",
    "BinaryEvaluation",
    "BinaryEvaluationResult",
    "BitsPer",
    "Brier",
    "Calibration",
    "Evaluation",
    "EvaluationResult",
    "Mean",
    "Metric",
    "Perplexity",
    "ReliabilityCurve",
    "Sum",
    "TopKAccuracy",
]

_M = TypeVar("_M", bound="Metric")


# ---------------------------------------------------------------------------------------------------- sums


@pytree()
@dataclasses.dataclass(frozen=True)
class Sum:
    """A sum that keeps its rounding errors: hi + lo is meant."""

    hi: Array
    """The sum, rounded."""
    lo: Array
    """What rounding has left out."""

    @classmethod
    def empty(cls, dtype: DTypeLike, bins: int | None = None) -> Sum:
        """Of nothing; one for each of ``bins``."""
        shape = () if bins is None else (bins,)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @classmethod
    def of(cls, terms: Array, bins: int | None = None) -> Sum:
        """The sum over all axes, or over all but the last if there are ``bins`` there."""
        return _sums(terms, axes=terms.ndim - (bins is not None))[0]

    def plus(self, other: Sum) -> Sum:
        """The sum of both, in the wider dtype."""
        hi, lo, more_hi, more_lo = _checks.upcast(self.hi, self.lo, other.hi, other.lo)
        return _settled(_plus(Sum(hi, lo), Sum(more_hi, more_lo)))

    def psum(self, axis_name: AxisName) -> Sum:
        """The sum over mapped axes. Every device's pair is sent to all, in a place of its own, so that none is rounded."""
        devices = lax.psum(1, axis_name)
        here = (jnp.arange(devices, dtype=jnp.int32) == lax.axis_index(axis_name)).reshape(devices, *[1] * self.hi.ndim)
        return _reduce([lax.psum(jax.tree.map(lambda x: jnp.where(here, x, 0), self), axis_name)], 1)[0]

    @property
    def _rounded(self) -> Array:
        return self.hi + self.lo


def _plus(a: Sum, b: Sum) -> Sum:
    """The sum of both: what its hi has rounded away (Knuth's two-sum) is in its lo."""
    hi = a.hi + b.hi
    t = hi - a.hi
    return Sum(hi, (a.lo + b.lo) + ((a.hi - (hi - t)) + (b.hi - t)))


def _settled(s: Sum) -> Sum:
    """The same sum with all in hi that it can hold; of infinities there is nothing left over."""
    zero, finite = jnp.zeros_like(s.hi), jnp.isfinite(s.hi)
    t = _plus(Sum(s.hi, zero), Sum(s.lo, zero))
    return Sum(jnp.where(finite, t.hi, s.hi), jnp.where(finite, t.lo, 0))


def _reduce(sums: list[Sum], axes: int) -> list[Sum]:
    """Sums over the first axes of several arrays of them, of one shape, in a single reduction."""
    zeros = jax.tree.map(lambda x: np.zeros((), x.dtype), sums)
    dims = tuple(range(axes))
    totals = lax.reduce(lax.stop_gradient(sums), zeros, lambda a, b: list(map(_plus, a, b)), dims)
    plain = (jnp.sum(s.hi, dims) for s in sums)  # has a derivative, as such a reduction has not
    return [Sum(replaced(t.hi, p), t.lo) for t, p in zip(map(_settled, totals), plain, strict=True)]


def _sums(*terms: Array, axes: int) -> list[Sum]:
    """The sums of each of the terms over the first axes."""
    return _reduce([Sum(t, jnp.zeros_like(t)) for t in terms], axes)


class Metric(_checks.NamedMethods):
    """What all metrics can do; their fields are `Sum`s, or metrics. Each has its own arguments of a batch."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse what is called as if it took options, or a batch, with a word on what does."""
        fields = [f for f in dataclasses.fields(cls)[len(args) :] if f.default is dataclasses.MISSING]  # type: ignore
        given = [*args, *kwargs.values()]
        if any(f.name not in kwargs for f in fields) or any(isinstance(x, Array | np.ndarray) for x in given):
            name = cls.__name__
            made = f"{name}.empty() or {name}.from_batch()"
            raise _checks.ArgumentTypeError(f"a metric must be made by {made}, got {name}(...)")
        return super().__new__(cls)

    def __reduce__(self) -> Any:
        """For copies and pickles, which would call ``__new__`` without arguments."""
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore

    @classmethod
    def empty(cls: type[_M], *, dtype: DTypeLike = jnp.float32) -> _M:
        """The metric of no data, to start from; ``dtype`` is that of the losses: float32 for half precision."""
        return cls(**{field.name: Sum.empty(dtype) for field in dataclasses.fields(cls)})  # type: ignore

    @classmethod
    def from_batch(cls: type[_M], *args: Any, **kwargs: Any) -> _M:
        """The metric of one batch."""
        raise NotImplementedError

    def update(self: _M, *args: Any, **kwargs: Any) -> _M:
        """This metric and that of one more batch, given as to ``from_batch``."""
        raise NotImplementedError

    def _updated(self: _M, *batch: Any, **more: Any) -> _M:
        return self.merge(type(self).from_batch(*batch, **more, **self._options()))

    def _options(self) -> dict[str, Any]:
        return {}

    def merge(self: _M, other: _M) -> _M:
        """The metric of all the data of both, which must have the same options."""
        name = type(self).__name__
        if type(other) is not type(self):
            raise _checks.ArgumentTypeError(f"other must be of the class {name}, got {type(other).__name__}")
        if other._options() != self._options():
            raise _checks.ArgumentValueError(
                f"other must have the same options, {self._options()}, got {other._options()}"
            )
        return _merged(self, other)

    def psum(self: _M, axis_name: AxisName) -> _M:
        """The metric of all devices' data, inside ``shard_map``, or ``vmap`` or ``pmap`` with this axis name."""
        return jax.tree.map(lambda s: s.psum(axis_name), self, is_leaf=_is_sum)


@compiled()
def _merged(metric: Any, other: Any) -> Any:
    return jax.tree.map(Sum.plus, metric, other, is_leaf=_is_sum)


def _is_sum(x: Any) -> bool:
    return isinstance(x, Sum)


def _per_example(argument: str, value: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """One number for each example; 1 where nothing is given."""
    if value is None:
        return jnp.ones(shape, dtype)
    array = _checks.real(argument, value, dtype).astype(dtype)
    _checks.same_shape(argument, array, shape, "one number for each example")
    return array


def _row_weights(shape: tuple[int, ...], dtype: Any, weights: Any, where: Any) -> Array:
    """How much each example counts."""
    w = _per_example("weights", weights, shape, dtype)
    if where is None:
        return w
    mask = _checks.boolean("where", where)
    _checks.same_shape("where", mask, shape, "one truth value for each example")
    return jnp.where(mask, w, 0)


def _weighted(values: Array, weights: Array) -> Array:
    """The product, rounded before it is added to anything, and 0 where the weight is."""
    return jnp.where(weights == 0, 0, values * weights)


# ---------------------------------------------------------------------------------------------------- means


@dataclasses.dataclass(frozen=True)
class _Ratio(Metric):
    total: Sum
    weight: Sum

    @compiled()
    def compute(self) -> Array:
        """The mean; 0 where nothing counts."""
        weight = self.weight._rounded
        return jnp.where(weight == 0, 0, self.total._rounded / jnp.where(weight == 0, 1, weight))


@compiled("argument")
def _mean_of(values: ArrayLike, weights: ArrayLike | None, where: ArrayLike | None, argument: str) -> list[Sum]:
    (x,) = _checks.upcast(_checks.floating(argument, values))
    w = _row_weights(x.shape, x.dtype, weights, where)
    return _sums(_weighted(x, w), w, axes=x.ndim)


@pytree()
class Mean(_Ratio):
    """Weighted mean of any values, such as losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxce.metrics import Mean
      >>> mean = Mean.from_batch(jnp.array([1.0, 2.0])).update(jnp.array([6.0, jnp.nan]), weights=jnp.array([2.0, 0.0]))
      >>> print(mean.compute())
      3.75
    """

    @classmethod
    def from_batch(cls, values: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None) -> Mean:
        """Values of any shape; weights and where of the same shape."""
        return cls(*_mean_of(values, weights, where, "values"))

    def update(self, values: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None) -> Mean:
        """This metric and that of one more batch, given as to ``from_batch``."""
        return self._updated(values, weights, where)


@pytree()
class Perplexity(_Ratio):
    """Exponential of the mean of negative log-likelihoods in nats; 1 without data.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxce.metrics import Perplexity
      >>> print(Perplexity.from_batch(jnp.log(jnp.array([2.0, 8.0]))).compute())
      4.0
    """

    @classmethod
    def from_batch(cls, nll: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None) -> Perplexity:
        """Losses of any shape; weights and where of the same shape."""
        return cls(*_mean_of(nll, weights, where, "nll"))

    def update(self, nll: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None) -> Perplexity:
        """This metric and that of one more batch, given as to ``from_batch``."""
        return self._updated(nll, weights, where)

    @compiled()
    def compute(self) -> Array:
        """exp(mean)."""
        return jnp.exp(super().compute())


@compiled()
def _per_unit(nll: ArrayLike, units: ArrayLike, weights: ArrayLike | None, where: ArrayLike | None) -> list[Sum]:
    (x,) = _checks.upcast(_checks.floating("nll", nll))
    w = _row_weights(x.shape, x.dtype, weights, where)
    n = _per_example("units", units, x.shape, x.dtype)
    return _sums(_weighted(x, w), _weighted(n, w), axes=x.ndim)


@pytree()
class BitsPer(_Ratio):
    """Bits per byte, per character, or per whatever is counted: sum(nll) / (log 2 sum(units)).

    It is 0 without data, and infinite where nats are of no units.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxce.metrics import BitsPer
      >>> print(BitsPer.from_batch(jnp.log(jnp.array([2.0, 8.0])), units=jnp.array([1, 3])).compute())
      1.0
    """

    @classmethod
    def from_batch(
        cls, nll: ArrayLike, units: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None
    ) -> BitsPer:
        """Losses in nats, and how many bytes (or characters) each is for; all of one shape."""
        return cls(*_per_unit(nll, units, weights, where))

    def update(
        self, nll: ArrayLike, units: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None
    ) -> BitsPer:
        """This metric and that of one more batch, given as to ``from_batch``."""
        return self._updated(nll, units, weights, where)

    @compiled()
    def compute(self) -> Array:
        """The bits per unit, by `jaxce.bits_per`."""
        return bits_per(self.total._rounded, self.weight._rounded)


# ---------------------------------------------------------------------------------------------------- classification


class _Rows(NamedTuple):
    """A batch, example by example. What isn't asked for is None."""

    present: Array  # whether any class is there
    nll: Array
    correct: Array  # 1 or 0
    confidence: Array  # the probability of the prediction
    brier: Array | None
    top: Array | None  # 1 where the label is among the k largest logits, else 0


def _rows(
    logits: Any, labels: Any, weights: Any, where: Any, k: int | None = None, brier: bool = False
) -> tuple[_Rows, Array]:
    """The examples and their weights."""

    def run(specs: tuple[Spec], inputs: tuple[Inputs]) -> _Rows:
        spec = specs[0]._replace(chunks=1, ask=Ask(prediction=True, squares=brier))
        return by_rows(specs[0].chunks, inputs, functools.partial(_rows_of, spec, k))

    rows = on_each_device(run, (read_logits("logits", logits, -1, where).with_labels(labels),))
    return rows, jnp.where(rows.present, _per_example("weights", weights, rows.nll.shape, rows.nll.dtype), 0)


_SQUARES = sum_of(lambda c: c.p * c.p)


def _rows_of(spec: Spec, k: int | None, inputs: Inputs) -> _Rows:
    (nll,), (state,) = measure_part((spec,), (inputs,), (NLL,))
    correct = (state.predicted == inputs["labels"]).astype(spec.dtype)
    # From the state, with the derivatives of what says the same and is computed for nothing else.
    top = measure_part((spec,), (inputs | {"labels": state.predicted},), (NLL,))[0][0]
    confidence = replaced(1 / (1 + state.s), jnp.exp(-top))
    brier = None
    if spec.ask.squares:
        (squares,), _ = measure_part((spec,), (inputs,), (_SQUARES,))
        brier = replaced(_brier(state), squares - 2 * jnp.exp(-nll))
    in_top = None
    if k is not None:  # a class that isn't there is in no top k
        in_top = ((_rank(spec, inputs, state.label) < k) & there(state.label)).astype(spec.dtype)
    return _Rows(state.present, nll, correct, confidence, brier, in_top)


def _brier(state: State) -> Array:
    """(1 - p_y)^2 and the squares of all other probabilities: sums of terms that aren't negative, over (1 + s)^2."""
    e = jnp.where(state.label == state.m, 1, jnp.exp(state.label - state.m))
    error, others = (1 - e) + state.s, (1 - e) * (1 + e) + state.squares
    return (error * error + others) / jnp.square(1 + state.s)


def _rank(spec: Spec, inputs: Inputs, label: Array) -> Array:
    """How many classes come before the label, whose logit is given."""

    def step(parts: Any, _: Any, label: Any, start: Any) -> Array:
        read, part = reading(spec, parts[0], start)
        return _platforms.rank(read, part, label, spec.dtype, spec.strips)

    inputs = {name: lax.stop_gradient(x) for name, x in inputs.items() if name != "rows"}  # others don't count anyway
    return add_up((spec,), (inputs,), ({},), label, step)


def _totals(rows: _Rows | _Answers, w: Array, *values: Array, bins: int | None = None) -> list[Sum]:
    """The sums of the values and, last, of the weights, of all examples, or in each of as many bins of confidence.

    Those of values are NaN if a loss that counts is, as it is for an invalid label.
    """
    terms = [*(_weighted(v, w) for v in values), w]
    if bins is not None:
        place = jnp.clip(jnp.ceil(rows.confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
        inside = place[..., None] == lax.broadcasted_iota(jnp.int32, (*w.shape, bins), w.ndim)
        terms = [jnp.where(inside, t[..., None], 0) for t in terms]
    *totals, weight = _sums(*terms, axes=w.ndim)
    bad = jnp.any(jnp.isnan(rows.nll) & (w != 0))
    return [*(Sum(jnp.where(bad, jnp.nan, t.hi), t.lo) for t in totals), weight]


@compiled("of", "k")
def _score(logits: Any, labels: Any, weights: Any, where: Any, of: str, k: int | None) -> list[Sum]:
    rows, w = _rows(logits, labels, weights, where, k, of == "brier")
    return _totals(rows, w, getattr(rows, of))


class _Score(_Ratio):
    _of: ClassVar[str]  # the number of the rows that is averaged

    @classmethod
    def from_batch(
        cls: type[_S],
        logits: AnyLogits,
        labels: ArrayLike,
        weights: ArrayLike | None = None,
        where: ArrayLike | None = None,
    ) -> _S:
        """Logits [..., classes] and labels [...], weights as labels, where as labels or logits."""
        return cls(*_score(logits, labels, weights, where, cls._of, None))

    def update(
        self: _S, logits: AnyLogits, labels: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None
    ) -> _S:
        """This metric and that of one more batch, given as to ``from_batch``."""
        return self._updated(logits, labels, weights, where)


_S = TypeVar("_S", bound=_Score)


@pytree()
class Accuracy(_Score):
    """Weighted share of examples whose label has the largest logit, the first of equal ones; 0 without data.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxce.metrics import Accuracy
      >>> logits, labels = jnp.array([[0.0, 1.0], [3.0, 1.0], [0.0, 0.0]]), jnp.array([1, 1, -100])
      >>> print(Accuracy.from_batch(logits, labels, where=labels != -100).compute())
      0.5
    """

    _of = "correct"


@pytree("k")
@dataclasses.dataclass(frozen=True)
class TopKAccuracy(_Score):
    """Weighted share of examples whose label is among the k largest logits, of equal ones the first; 0 without data.

    A class that is masked, or whose logit is -inf, is never among them.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxce.metrics import TopKAccuracy
      >>> print(TopKAccuracy.from_batch(jnp.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]), jnp.array([1, 2]), k=2).compute())
      0.5
    """

    _of = "top"
    k: int = 5

    @classmethod
    def empty(cls, *, k: int = 5, dtype: DTypeLike = jnp.float32) -> TopKAccuracy:
        """The metric of no data."""
        return cls(Sum.empty(dtype), Sum.empty(dtype), _checks.positive_integer("k", k))

    @classmethod
    def from_batch(
        cls,
        logits: AnyLogits,
        labels: ArrayLike,
        weights: ArrayLike | None = None,
        where: ArrayLike | None = None,
        *,
        k: int = 5,
    ) -> TopKAccuracy:
        """Logits [..., classes] and labels [...], weights as labels, where as labels or logits."""
        k = _checks.positive_integer("k", k)
        return cls(*_score(logits, labels, weights, where, cls._of, k), k=k)

    def _options(self) -> dict[str, Any]:
        return {"k": self.k}


@pytree()
class Brier(_Score):
    """The Brier score: the mean of the sum over classes of (p_k - [k is the label])^2, between 0 and 2; 0 without data.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxce.metrics import Brier
      >>> print(Brier.from_batch(jnp.zeros((3, 2)), jnp.array([0, 1, 1])).compute())
      0.5

    References:
        Brier, "Verification of Forecasts Expressed in Terms of Probability", Monthly Weather Review 78 (1950).
    """

    _of = "brier"


# ---------------------------------------------------------------------------------------------------- calibration


class ReliabilityCurve(NamedTuple):
    """A reliability diagram: plot ``accuracy`` over ``confidence`` where ``weight`` isn't 0."""

    edges: Array
    """Edges of the bins, [bins + 1]."""
    confidence: Array
    """Mean probability of the predicted class (of yes, if binary), [bins]; 0 in an empty bin."""
    accuracy: Array
    """Mean accuracy (share of yes, if binary), [bins]; 0 in an empty bin."""
    weight: Array
    """Weight of the examples in each bin, [bins]."""


NORMS = ("l1", "l2", "max")


@dataclasses.dataclass(frozen=True)
class _Bins(Metric):
    confidence: Sum
    correct: Sum
    weight: Sum
    bins: int = 15

    @classmethod
    def empty(cls: type[_B], *, bins: int = 15, dtype: DTypeLike = jnp.float32) -> _B:
        """The metric of no data."""
        bins = _checks.positive_integer("bins", bins)
        return cls(*(Sum.empty(dtype, bins) for _ in range(3)), bins=bins)

    def _options(self) -> dict[str, Any]:
        return {"bins": self.bins}

    def compute(self, norm: str = "l1") -> Array:
        """The calibration error: of the gaps between the bins' accuracy and confidence, weighted by their examples.

        Args:
          norm: "l1", the mean of the gaps (the expected calibration error), "l2", the root of the mean of their squares,
            or "max", the largest (the maximum calibration error).
        """
        if norm not in NORMS:
            raise _checks.ArgumentValueError(f"norm must be one of {NORMS}, got {norm!r}")
        return _calibration_error(self, norm)

    def curve(self) -> ReliabilityCurve:
        """The bins, ready to plot."""
        edges = jnp.linspace(0, 1, self.bins + 1, dtype=self.weight.hi.dtype)
        confidence, accuracy = Mean(self.confidence, self.weight), Mean(self.correct, self.weight)
        return ReliabilityCurve(edges, confidence.compute(), accuracy.compute(), self.weight._rounded)


_B = TypeVar("_B", bound=_Bins)


@compiled("norm")
def _calibration_error(metric: Any, norm: str) -> Array:
    gap = jnp.abs((metric.correct.hi - metric.confidence.hi) + (metric.correct.lo - metric.confidence.lo))
    weight = metric.weight._rounded
    if norm == "l1":
        return Mean(*_sums(gap, weight, axes=1)).compute()
    relative = jnp.where(weight == 0, 0, gap / jnp.where(weight == 0, 1, weight))
    if norm == "max":
        return jnp.max(relative)
    square = Mean(*_sums(gap * relative, weight, axes=1)).compute()
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


@compiled("bins")
def _calibration(logits: Any, labels: ArrayLike, weights: Any, where: Any, bins: int) -> list[Sum]:
    rows, w = _rows(logits, labels, weights, where)
    return _totals(rows, w, rows.confidence, rows.correct, bins=bins)


@pytree("bins")
class Calibration(_Bins):
    """Calibration error of the predicted class: how far the accuracy of examples is from their confidence; 0 without data.

    Confidence is the probability of the predicted class. Examples are put in bins of confidence, bin b of B holding those
    in (b/B, (b+1)/B]. ``compute()`` is the expected calibration error, the mean over examples of their bin's
    abs(accuracy - confidence), ``compute("l2")`` and ``compute("max")`` other norms.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxce.metrics import Calibration
      >>> calibration = Calibration.from_batch(jnp.array([[50.0, 0.0], [0.0, 50.0]]), jnp.array([0, 0]), bins=10)
      >>> print(calibration.compute(), calibration.compute("max"), calibration.curve().accuracy[-1])
      0.5 0.5 0.5

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, https://arxiv.org/abs/1706.04599.
        Kumar, Liang and Ma, "Verified Uncertainty Calibration", NeurIPS 2019, https://arxiv.org/abs/1909.10155 (l2).
    """

    @classmethod
    def from_batch(
        cls,
        logits: AnyLogits,
        labels: ArrayLike,
        weights: ArrayLike | None = None,
        where: ArrayLike | None = None,
        *,
        bins: int = 15,
    ) -> Calibration:
        """Logits [..., classes] and labels [...], weights as labels, where as labels or logits."""
        bins = _checks.positive_integer("bins", bins)
        return cls(*_calibration(logits, labels, weights, where, bins), bins=bins)

    def update(
        self, logits: AnyLogits, labels: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None
    ) -> Calibration:
        """This metric and that of one more batch, given as to ``from_batch``."""
        return self._updated(logits, labels, weights, where)


# ---------------------------------------------------------------------------------------------------- all of them


class EvaluationResult(NamedTuple):
    """What `Evaluation.compute` gives."""

    nll: Array
    """Mean negative log-likelihood in nats."""
    perplexity: Array
    """exp(nll)."""
    bits_per_unit: Array
    """Bits per byte or character, or per example where no units were given."""
    accuracy: Array
    """Share of examples with the largest logit at the label."""
    calibration_error: Array
    """Expected calibration error."""
    reliability: ReliabilityCurve
    """Its bins, ready to plot."""
    top_k_accuracy: Array | None
    """Share of examples with the label among the k largest logits; None without ``per_class``."""
    brier: Array | None
    """Brier score; None without ``per_class``."""


class _Options(NamedTuple):
    k: int
    bins: int
    per_class: bool


def _options_of(k: int, bins: int, per_class: bool) -> _Options:
    k, bins = (_checks.positive_integer(name, n) for name, n in (("k", k), ("bins", bins)))
    return _Options(k, bins, bool(per_class))


@compiled("options")
def _evaluate(logits: Any, labels: ArrayLike, weights: Any, where: Any, units: Any, options: _Options) -> Evaluation:
    k = options.k if options.per_class else None
    rows, w = _rows(logits, labels, weights, where, k, brier=options.per_class)
    n = _per_example("units", units, w.shape, w.dtype)
    asked = (values for values in (rows.top, rows.brier) if values is not None)
    nll, n, correct, *rest, weight = _totals(rows, w, rows.nll, n, rows.correct, *asked)
    bins = Calibration(*_totals(rows, w, rows.confidence, rows.correct, bins=options.bins), bins=options.bins)
    top_k, brier = rest or (None, None)
    return Evaluation(nll, weight, n, correct, bins, top_k, brier, options)


@pytree("options")
@dataclasses.dataclass(frozen=True)
class Evaluation(Metric):
    """All metrics of classes in two passes over the logits; ``per_class=False`` leaves out top-k accuracy and Brier score.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxce.metrics import Evaluation
      >>> evaluation = Evaluation.empty(k=2)
      >>> for labels in ([0, 2], [1, -100]):
      ...     y = jnp.array(labels)
      ...     evaluation = evaluation.update(jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), y, where=y != -100)
      >>> result = evaluation.compute()
      >>> print(f"{result.nll:.4f} {result.accuracy:.4f} {result.top_k_accuracy:.4f} {result.brier:.4f}")
      0.7409 0.6667 1.0000 0.4604
    """

    nll: Sum
    weight: Sum
    units: Sum
    correct: Sum
    calibration: Calibration
    top_k: Sum | None
    brier: Sum | None
    options: _Options

    @classmethod
    def empty(cls, *, k: int = 5, bins: int = 15, per_class: bool = True, dtype: DTypeLike = jnp.float32) -> Evaluation:
        """The evaluation of no data."""
        options = _options_of(k, bins, per_class)
        nll, weight, units, correct, top_k, brier = (Sum.empty(dtype) for _ in range(6))
        calibration = Calibration.empty(bins=options.bins, dtype=dtype)
        rest = (top_k, brier) if per_class else (None, None)
        return cls(nll, weight, units, correct, calibration, *rest, options)

    @classmethod
    def from_batch(
        cls,
        logits: AnyLogits,
        labels: ArrayLike,
        weights: ArrayLike | None = None,
        where: ArrayLike | None = None,
        *,
        units: ArrayLike | None = None,
        k: int = 5,
        bins: int = 15,
        per_class: bool = True,
    ) -> Evaluation:
        """The evaluation of one batch.

        Args:
          logits: [..., classes].
          labels: integer classes, [...].
          weights: how much each example counts, [...]: booleans, integers or floating point.
          where: which examples take part, [...], or which entries of the logits.
          units: how many bytes or characters each example stands for, [...]; 1 if not given.
          k: for the top-k accuracy.
          bins: for the calibration error.
          per_class: whether top-k accuracy and Brier score are wanted.
        """
        return _evaluate(logits, labels, weights, where, units, _options_of(k, bins, per_class))

    def update(
        self,
        logits: AnyLogits,
        labels: ArrayLike,
        weights: ArrayLike | None = None,
        where: ArrayLike | None = None,
        *,
        units: ArrayLike | None = None,
    ) -> Evaluation:
        """This evaluation and that of one more batch, given as to ``from_batch``."""
        return self._updated(logits, labels, weights, where, units=units)

    def _options(self) -> dict[str, Any]:
        return self.options._asdict()

    @compiled()
    def compute(self) -> EvaluationResult:
        """The results."""
        nll = Mean(self.nll, self.weight).compute()
        return EvaluationResult(
            nll,
            jnp.exp(nll),
            BitsPer(self.nll, self.units).compute(),
            Mean(self.correct, self.weight).compute(),
            self.calibration.compute(),
            self.calibration.curve(),
            None if self.top_k is None else Mean(self.top_k, self.weight).compute(),
            None if self.brier is None else Mean(self.brier, self.weight).compute(),
        )


# ---------------------------------------------------------------------------------------------------- yes or no


class _Answers(NamedTuple):
    """A batch of yes-or-no questions, element by element."""

    nll: Array
    correct: Array  # 1 or 0
    confidence: Array  # the probability of yes
    brier: Array
    yes: Array  # 1 or 0


def _answers(logits: Any, labels: Any, weights: Any, where: Any, threshold: float) -> tuple[_Answers, Array]:
    """The elements and their weights."""
    (x,) = _checks.upcast(_checks.floating("logits", logits))
    y = _checks.real("labels", labels, x.dtype).astype(x.dtype)
    hint = f"give {{labels}}.reshape({x.shape})" if y.size == x.size else ""
    _checks.same_shape("labels", y, x.shape, "the shape of the logits", hint)
    w = jnp.ones_like(x)
    if weights is not None:
        w = _checks.real("weights", weights, x.dtype).astype(x.dtype)
        fits = w.ndim == x.ndim and all(n in (1, m) for n, m in zip(w.shape, x.shape, strict=True))
        _checks.same_shape("weights", w, x.shape if not fits else w.shape, "the shape of the logits or 1s in it")
        w = jnp.broadcast_to(w, x.shape)
    keep = _checks.where_elements(where, x.shape)
    x, y, w = (_checks.only(keep, a, 0) for a in (x, y, w))
    p, not_p = sigmoids(x)
    miss = jnp.where(y == 1, not_p, p)  # the probability of the other answer
    yes = x > math.log(threshold) - math.log1p(-threshold)
    nll = jnp.where((y == 0) | (y == 1), sigmoid_binary_cross_entropy(x, y), jnp.nan)
    return _Answers(nll, (yes == (y == 1)).astype(x.dtype), p, miss * miss, y), w


def _threshold(threshold: float) -> float:
    if isinstance(threshold, bool) or not isinstance(threshold, int | float | np.number):
        raise _checks.ArgumentTypeError(f"threshold must be a number in (0, 1), got {_checks.describe(threshold)}")
    if not 0 < threshold < 1:
        raise _checks.ArgumentValueError(f"threshold must be a number in (0, 1), got {threshold!r}")
    return float(threshold)


@compiled("of", "threshold")
def _binary_score(logits: Any, labels: Any, weights: Any, where: Any, of: str, threshold: float) -> list[Sum]:
    answers, w = _answers(logits, labels, weights, where, threshold)
    return _totals(answers, w, getattr(answers, of))


@pytree("threshold")
@dataclasses.dataclass(frozen=True)
class BinaryAccuracy(_Ratio):
    """Weighted share of right answers, where the answer is yes if its probability exceeds ``threshold``; 0 without data.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxce.metrics import BinaryAccuracy
      >>> logits, labels = jnp.array([-1.0, 0.5, 2.0]), jnp.array([0, 0, 1])
      >>> print(BinaryAccuracy.from_batch(logits, labels).compute().round(4))
      0.6667
      >>> print(BinaryAccuracy.from_batch(logits, labels, threshold=0.8).compute())
      1.0
    """

    threshold: float = 0.5

    @classmethod
    def empty(cls, *, threshold: float = 0.5, dtype: DTypeLike = jnp.float32) -> BinaryAccuracy:
        """The metric of no data."""
        return cls(Sum.empty(dtype), Sum.empty(dtype), _threshold(threshold))

    @classmethod
    def from_batch(
        cls,
        logits: ArrayLike,
        labels: ArrayLike,
        weights: ArrayLike | None = None,
        where: ArrayLike | None = None,
        *,
        threshold: float = 0.5,
    ) -> BinaryAccuracy:
        """Logits (log-odds of yes) of any shape, labels of 0 and 1 of the same; weights and where broadcast to it."""
        threshold = _threshold(threshold)
        sums = _binary_score(logits, labels, weights, where, "correct", threshold)
        return cls(*sums, threshold=threshold)

    def update(
        self, logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None
    ) -> BinaryAccuracy:
        """This metric and that of one more batch, given as to ``from_batch``."""
        return self._updated(logits, labels, weights, where)

    def _options(self) -> dict[str, Any]:
        return {"threshold": self.threshold}


@pytree()
class BinaryBrier(_Ratio):
    """Brier score of yes-or-no questions: the mean of (p - y)^2, between 0 and 1; 0 without data.

    That is half of the sum over both classes, which `Brier` has.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxce.metrics import BinaryBrier
      >>> print(BinaryBrier.from_batch(jnp.zeros(3), jnp.array([0, 1, 1])).compute())
      0.25

    References:
        Brier, "Verification of Forecasts Expressed in Terms of Probability", Monthly Weather Review 78 (1950).
    """

    @classmethod
    def from_batch(
        cls, logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None
    ) -> BinaryBrier:
        """Logits (log-odds of yes) of any shape, labels of 0 and 1 of the same; weights and where broadcast to it."""
        return cls(*_binary_score(logits, labels, weights, where, "brier", 0.5))

    def update(
        self, logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None
    ) -> BinaryBrier:
        """This metric and that of one more batch, given as to ``from_batch``."""
        return self._updated(logits, labels, weights, where)


@compiled("bins")
def _binary_calibration(logits: Any, labels: Any, weights: Any, where: Any, bins: int) -> list[Sum]:
    answers, w = _answers(logits, labels, weights, where, 0.5)
    return _totals(answers, w, answers.confidence, answers.yes, bins=bins)


@pytree("bins")
class BinaryCalibration(_Bins):
    """Calibration error of yes-or-no questions: how far the share of yes is from its probability; 0 without data.

    Questions are put in bins of the probability of yes, bin b of B holding those in (b/B, (b+1)/B]. ``compute()`` is the
    mean over questions of their bin's abs(share of yes - mean probability), ``compute("l2")`` and ``compute("max")`` other
    norms.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxce.metrics import BinaryCalibration
      >>> calibration = BinaryCalibration.from_batch(jnp.array([0.0, 0.0, 50.0]), jnp.array([1, 0, 0]), bins=10)
      >>> print(calibration.compute().round(4), calibration.compute("max"))
      0.3333 1.0

    References:
        Kumar, Liang and Ma, "Verified Uncertainty Calibration", NeurIPS 2019, https://arxiv.org/abs/1909.10155.
    """

    @classmethod
    def from_batch(
        cls,
        logits: ArrayLike,
        labels: ArrayLike,
        weights: ArrayLike | None = None,
        where: ArrayLike | None = None,
        *,
        bins: int = 15,
    ) -> BinaryCalibration:
        """Logits (log-odds of yes) of any shape, labels of 0 and 1 of the same; weights and where broadcast to it."""
        bins = _checks.positive_integer("bins", bins)
        return cls(*_binary_calibration(logits, labels, weights, where, bins), bins=bins)

    def update(
        self, logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None
    ) -> BinaryCalibration:
        """This metric and that of one more batch, given as to ``from_batch``."""
        return self._updated(logits, labels, weights, where)


class BinaryEvaluationResult(NamedTuple):
    """What `BinaryEvaluation.compute` gives."""

    nll: Array
    """Mean negative log-likelihood (binary cross-entropy) in nats."""
    accuracy: Array
    """Share of right answers."""
    brier: Array
    """Brier score, the mean of (p - y)^2."""
    calibration_error: Array
    """Expected calibration error (l1)."""
    reliability: ReliabilityCurve
    """Its bins, ready to plot."""


@compiled("bins", "threshold")
def _evaluate_answers(
    logits: Any, labels: Any, weights: Any, where: Any, bins: int, threshold: float
) -> BinaryEvaluation:
    answers, w = _answers(logits, labels, weights, where, threshold)
    nll, correct, brier, weight = _totals(answers, w, answers.nll, answers.correct, answers.brier)
    calibration = BinaryCalibration(*_totals(answers, w, answers.confidence, answers.yes, bins=bins), bins=bins)
    return BinaryEvaluation(nll, correct, brier, weight, calibration, threshold)


@pytree("threshold")
@dataclasses.dataclass(frozen=True)
class BinaryEvaluation(Metric):
    """All metrics of yes-or-no questions, such as those of multi-label classification, where each label is one.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxce.metrics import BinaryEvaluation
      >>> logits, labels = jnp.array([[2.0, -1.0], [0.5, 3.0]]), jnp.array([[1, 0], [0, -1]])
      >>> result = BinaryEvaluation.empty().update(logits, labels, where=labels != -1).compute()
      >>> print(f"{result.nll:.4f} {result.accuracy:.4f} {result.brier:.4f}")
      0.4714 0.6667 0.1579
    """

    nll: Sum
    correct: Sum
    brier: Sum
    weight: Sum
    calibration: BinaryCalibration
    threshold: float = 0.5

    @classmethod
    def empty(cls, *, bins: int = 15, threshold: float = 0.5, dtype: DTypeLike = jnp.float32) -> BinaryEvaluation:
        """The evaluation of no data."""
        bins = _checks.positive_integer("bins", bins)
        sums = (Sum.empty(dtype) for _ in range(4))
        calibration = BinaryCalibration.empty(bins=bins, dtype=dtype)
        threshold = _threshold(threshold)
        return cls(*sums, calibration=calibration, threshold=threshold)

    @classmethod
    def from_batch(
        cls,
        logits: ArrayLike,
        labels: ArrayLike,
        weights: ArrayLike | None = None,
        where: ArrayLike | None = None,
        *,
        bins: int = 15,
        threshold: float = 0.5,
    ) -> BinaryEvaluation:
        """The evaluation of one batch.

        Args:
          logits: the log-odds of yes, of any shape, such as [N] or [N, K].
          labels: 0 and 1, or booleans, of the same shape; anything else makes the result NaN where it counts.
          weights: how much each question counts; with as many axes as the logits, to which they broadcast.
          where: which questions take part: booleans or integers with as many axes as the logits, to which they broadcast.
          bins: for the calibration error.
          threshold: the probability above which the answer is yes, for the accuracy.
        """
        bins = _checks.positive_integer("bins", bins)
        return _evaluate_answers(logits, labels, weights, where, bins, _threshold(threshold))

    def update(
        self, logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None
    ) -> BinaryEvaluation:
        """This evaluation and that of one more batch, given as to ``from_batch``."""
        return self._updated(logits, labels, weights, where)

    def _options(self) -> dict[str, Any]:
        return {"bins": self.calibration.bins, "threshold": self.threshold}

    @compiled()
    def compute(self) -> BinaryEvaluationResult:
        """The results."""
        return BinaryEvaluationResult(
            Mean(self.nll, self.weight).compute(),
            Mean(self.correct, self.weight).compute(),
            Mean(self.brier, self.weight).compute(),
            self.calibration.compute(),
            self.calibration.curve(),
        )
