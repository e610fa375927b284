r"""Evaluation that adds up: each metric is a frozen pytree of sums, which batches and devices merge in any order.

    metric = Accuracy.empty()
    for logits, labels in batches:
        metric = metric.update(logits, labels)   # the same as metric.merge(Accuracy.from_batch(logits, labels))
    metric.compute()

Sums are kept as pairs of numbers (`Sum`), the second holding what the first has rounded away, about 48 binary digits in
float32: counts are exact to 2^48, and how the data is split changes a sum by less than 2^-44 of the sum of the terms'
sizes, hence the result by no more than its last digit. That is for given terms: XLA may round an example's own loss in
another way when it compiles for another batch shape.

A metric can be the carry of ``lax.scan``, goes through ``jax.jit`` and, over models, through ``jax.vmap``, and inside
``shard_map`` ``metric.psum(axis_name)`` is that of all devices' examples, where `ShardedLogits` may take the place of
logits: their metric is that of all classes. In a ``clu``-style loop write
``metrics = metrics.merge(Evaluation.from_batch(logits, labels))``; in Flax NNX hold ``metric = nnx.Variable(
Evaluation.empty())`` and write ``metric.set_value(metric.get_value().update(logits, labels))``.

Classes are on the last axis. ``weights`` say how much an example counts; ``where`` says which take part. What has weight
0 is selected away, so that NaN in padding leaves no trace; NaN, or an invalid label, in a row that counts makes the
result NaN. Nothing at all has the mean 0, the perplexity 1 and the calibration error 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxce import _checks, _mesh, _numerics
from jaxce._checks import AxisName, compiled
from jaxce._logits import ShardedLogits
from jaxce._statistics import log_softmax, softmax_statistics

_M = TypeVar("_M", bound="Metric")


# ---------------------------------------------------------------------------------------------------- sums


@functools.partial(jax.tree_util.register_dataclass, data_fields=["hi", "lo"], meta_fields=[])
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
        return cls(*[jnp.zeros(() if bins is None else bins, dtype)] * 2)

    @classmethod
    def of(cls, terms: Array, bins: int | None = None) -> Sum:
        """The sum over all axes, or over all but the last if there are ``bins`` there."""
        flat = terms.reshape(-1) if bins is None else terms.reshape(-1, bins).T
        return cls(*_numerics.sum_pairs(flat, jnp.zeros_like(flat)))

    @property
    def pair(self) -> _numerics.Pair:
        """As a pair of `_numerics`."""
        return self.hi, self.lo

    def plus(self, other: Sum) -> Sum:
        """The sum of both."""
        plain = self.hi + other.hi
        finite = jnp.isfinite(plain)  # of infinities there is nothing left over
        hi, lo = _numerics.add(self.pair, other.pair)
        return Sum(jnp.where(finite, hi, plain), jnp.where(finite, lo, 0))

    def psum(self, axis_name: AxisName) -> Sum:
        """The sum over mapped axes. Every device's pair is sent to all, in a place of its own, so that none is rounded."""
        here = jnp.arange(lax.psum(1, axis_name)) == lax.axis_index(axis_name)

        def everywhere(x: Array) -> Array:
            return lax.psum(jnp.where(here, jnp.expand_dims(x, -1), 0), axis_name)

        return Sum(*_numerics.sum_pairs(everywhere(self.hi), everywhere(self.lo)))


class Metric:
    """What all metrics can do; their fields are `Sum`s, or metrics."""

    @classmethod
    def empty(cls: type[_M], *, dtype: DTypeLike = jnp.float32) -> _M:
        """The metric of no data, to start from; ``dtype`` is that of the losses: float32 for half precision."""
        return cls(**{field.name: Sum.empty(dtype) for field in dataclasses.fields(cls)})  # type: ignore

    @classmethod
    def from_batch(cls: type[_M], *args: Any, **kwargs: Any) -> _M:
        """The metric of one batch."""
        raise NotImplementedError

    def update(self: _M, *args: Any, **kwargs: Any) -> _M:
        """This metric and that of one more batch, which is what the arguments describe: see ``from_batch``."""
        return self.merge(type(self).from_batch(*args, **kwargs, **self._options()))

    def _options(self) -> dict[str, Any]:
        return {}

    @compiled()
    def merge(self: _M, other: _M) -> _M:
        """The metric of all the data of both."""
        return jax.tree.map(Sum.plus, self, other, is_leaf=_is_sum)

    def psum(self: _M, axis_name: AxisName) -> _M:
        """The metric of all devices' data, inside ``shard_map``, or ``vmap`` or ``pmap`` with this axis name."""
        return jax.tree.map(lambda s: s.psum(axis_name), self, is_leaf=_is_sum)


def _is_sum(x: Any) -> bool:
    return isinstance(x, Sum)


def _per_example(function: str, argument: str, value: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """One number for each example; 1 where nothing is given."""
    if value is None:
        return jnp.ones(shape, dtype)
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.bool_) or jnp.issubdtype(array.dtype, jnp.integer):
        array = array.astype(dtype)
    array = _checks.floating(function, argument, array).astype(dtype)
    _checks.same_shape(function, argument, array, shape, "one number for each example")
    return array


def _row_weights(function: str, shape: tuple[int, ...], dtype: Any, weights: Any, where: Any) -> Array:
    """How much each example counts."""
    w = _per_example(function, "weights", weights, shape, dtype)
    if where is None:
        return w
    mask = _checks.boolean(function, "where", where)
    _checks.same_shape(function, "where", mask, shape, "one truth value for each example")
    return jnp.where(mask, w, 0)


def _weighted(values: Array, weights: Array) -> Array:
    """The product, 0 where the weight is."""
    return _numerics.times(jnp.where(weights == 0, 0, values), weights)


# ---------------------------------------------------------------------------------------------------- means


@dataclasses.dataclass(frozen=True)
class _Ratio(Metric):
    total: Sum
    weight: Sum

    def _mean(self) -> _numerics.Pair:
        none = self.weight.hi == 0
        weight = _numerics.select(none, _numerics.single(jnp.ones_like(self.weight.hi)), self.weight.pair)
        hi, lo = _numerics.divide(self.total.pair, weight)
        infinite = ~jnp.isfinite(hi)
        return jnp.where(none, 0, hi), jnp.where(none | infinite, 0, lo)

    @compiled()
    def compute(self) -> Array:
        """The mean; 0 where nothing counts."""
        hi, lo = self._mean()
        return hi + lo


_ratio = functools.partial(jax.tree_util.register_dataclass, data_fields=["total", "weight"], meta_fields=[])


@compiled()
def _mean_of(values: ArrayLike, weights: ArrayLike | None, where: ArrayLike | None) -> tuple[Sum, Sum]:
    (x,) = _checks.upcast(_checks.floating("Mean", "values", values))
    w = _row_weights("Mean", x.shape, x.dtype, weights, where)
    return Sum.of(_weighted(x, w)), Sum.of(w)


@_ratio
class Mean(_Ratio):
    """The weighted mean of anything: of losses, for one.

    >>> import jax.numpy as jnp
    >>> from jaxce.metrics import Mean
    >>> mean = Mean.from_batch(jnp.array([1.0, 2.0])).update(jnp.array([6.0, jnp.nan]), weights=jnp.array([2.0, 0.0]))
    >>> print(mean.compute())
    3.75
    """

    @classmethod
    def from_batch(cls, values: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None) -> Mean:
        """Values of any shape; weights and where of the same."""
        return cls(*_mean_of(values, weights, where))


@_ratio
class Perplexity(_Ratio):
    """The exponential of the mean of negative log-likelihoods in nats; 1 of nothing.

    >>> import jax.numpy as jnp
    >>> from jaxce.metrics import Perplexity
    >>> print(Perplexity.from_batch(jnp.log(jnp.array([2.0, 8.0]))).compute())
    4.0
    """

    @classmethod
    def from_batch(cls, nll: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None) -> Perplexity:
        """Losses of any shape; weights and where of the same."""
        return cls(*_mean_of(nll, weights, where))

    @compiled()
    def compute(self) -> Array:
        """exp(mean)."""
        return jnp.exp(super().compute())


@compiled()
def _per_unit(nll: ArrayLike, units: ArrayLike, weights: ArrayLike | None, where: ArrayLike | None) -> tuple[Sum, Sum]:
    (x,) = _checks.upcast(_checks.floating("BitsPer", "nll", nll))
    w = _row_weights("BitsPer", x.shape, x.dtype, weights, where)
    n = _per_example("BitsPer", "units", units, x.shape, x.dtype)
    return Sum.of(_weighted(x, w)), Sum.of(_weighted(n, w))


@_ratio
class BitsPer(_Ratio):
    """Bits per byte, per character, or per whatever is counted: sum(nll) / (log 2 sum(units)); 0 of nothing.

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

    @compiled()
    def compute(self) -> Array:
        """The bits per unit."""
        return _numerics.in_units(self._mean(), math.log(2))


# ---------------------------------------------------------------------------------------------------- classification


class _Rows(NamedTuple):
    """A batch, example by example."""

    nll: Array
    weights: Array
    correct: Array  # 1 or 0; NaN where the loss is NaN, as it is for an invalid label
    prediction: Array


def _rows(function: str, logits: Any, labels: ArrayLike, weights: Any, where: Any) -> _Rows:
    statistics = softmax_statistics(logits, labels)
    nll = statistics.nll
    assert nll is not None
    w = _row_weights(function, nll.shape, nll.dtype, weights, where)
    correct = (statistics.prediction == jnp.asarray(labels).astype(jnp.int32)).astype(nll.dtype)
    return _Rows(nll, w, _unless_nan(nll, correct), statistics.prediction)


def _unless_nan(nll: Array, values: Array) -> Array:
    return jnp.where(jnp.isnan(nll), nll, values)


def _per_class(function: str, logits: Any) -> tuple[Array, Array, Callable[[Array], Array]]:
    """Each class's logit and place, and the sum over the classes: all of them, or a device's part of sharded ones."""
    sharded = isinstance(logits, ShardedLogits)
    x = logits.logits if sharded else _checks.floating(function, "logits", logits)
    places = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    if not sharded:
        return x, places, lambda terms: jnp.sum(terms, -1)
    first = _mesh.index(function, logits.axis_name) * x.shape[-1]
    return x, first + places, lambda terms: lax.psum(jnp.sum(terms, -1), logits.axis_name)


def _in_top(function: str, logits: Any, labels: Array, k: int) -> Array:
    """Whether the label is among the k largest; of equal logits the first are."""
    x, places, total = _per_class(function, logits)
    label = labels[..., None].astype(jnp.int32)
    at_label = total(jnp.where(places == label, x, 0))[..., None]
    return total(((x > at_label) | (x == at_label) & (places < label)).astype(jnp.int32)) < k


def _brier(function: str, logits: Any, labels: Array, nll: Array) -> Array:
    """(1 - p_y)^2 and the squares of all other probabilities."""
    _, places, total = _per_class(function, logits)
    others = jnp.where(places == labels[..., None].astype(jnp.int32), 0, jnp.exp(log_softmax(logits)))
    return _unless_nan(nll, jnp.square(jnp.expm1(-nll)) + total(jnp.square(others)))


@compiled()
def _accuracy(logits: ArrayLike, labels: ArrayLike, weights: Any, where: Any) -> tuple[Sum, Sum]:
    rows = _rows("Accuracy", logits, labels, weights, where)
    return Sum.of(_weighted(rows.correct, rows.weights)), Sum.of(rows.weights)


@_ratio
class Accuracy(_Ratio):
    """The weighted share of examples whose label has the largest logit, the first of several; 0 of nothing.

    >>> import jax.numpy as jnp
    >>> from jaxce.metrics import Accuracy
    >>> logits, labels = jnp.array([[0.0, 1.0], [3.0, 1.0], [0.0, 0.0]]), jnp.array([1, 1, -100])
    >>> print(Accuracy.from_batch(logits, labels, where=labels != -100).compute())
    0.5
    """

    @classmethod
    def from_batch(
        cls, logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None
    ) -> Accuracy:
        """Logits [..., classes] and labels [...], weights and where as labels."""
        return cls(*_accuracy(logits, labels, weights, where))


@compiled("k")
def _top_k(logits: ArrayLike, labels: ArrayLike, weights: Any, where: Any, k: int) -> tuple[Sum, Sum]:
    rows = _rows("TopKAccuracy", logits, labels, weights, where)
    top = _in_top("TopKAccuracy", logits, jnp.asarray(labels), k).astype(rows.nll.dtype)
    return Sum.of(_weighted(_unless_nan(rows.nll, top), rows.weights)), Sum.of(rows.weights)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["total", "weight"], meta_fields=["k"])
@dataclasses.dataclass(frozen=True)
class TopKAccuracy(_Ratio):
    """The weighted share of examples whose label is among the k largest logits; of equal ones the first are.

    >>> import jax.numpy as jnp
    >>> from jaxce.metrics import TopKAccuracy
    >>> print(TopKAccuracy.from_batch(jnp.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]), jnp.array([1, 2]), k=2).compute())
    0.5
    """

    k: int = 5

    @classmethod
    def empty(cls, *, k: int = 5, dtype: DTypeLike = jnp.float32) -> TopKAccuracy:
        """The metric of no data."""
        zero = Sum.empty(dtype)
        return cls(zero, zero, _checks.positive_integer("TopKAccuracy", "k", k))

    @classmethod
    def from_batch(
        cls,
        logits: ArrayLike,
        labels: ArrayLike,
        weights: ArrayLike | None = None,
        where: ArrayLike | None = None,
        *,
        k: int = 5,
    ) -> TopKAccuracy:
        """Logits [..., classes] and labels [...], weights and where as labels."""
        k = _checks.positive_integer("TopKAccuracy", "k", k)
        return cls(*_top_k(logits, labels, weights, where, k), k)

    def _options(self) -> dict[str, Any]:
        return {"k": self.k}


@compiled()
def _brier_of(logits: ArrayLike, labels: ArrayLike, weights: Any, where: Any) -> tuple[Sum, Sum]:
    rows = _rows("Brier", logits, labels, weights, where)
    score = _brier("Brier", logits, jnp.asarray(labels), rows.nll)
    return Sum.of(_weighted(score, rows.weights)), Sum.of(rows.weights)


@_ratio
class Brier(_Ratio):
    """The Brier score: the mean of the sum over classes of (p_k - [k is the label])^2, between 0 and 2; 0 of nothing.

    >>> import jax.numpy as jnp
    >>> from jaxce.metrics import Brier
    >>> print(Brier.from_batch(jnp.zeros((3, 2)), jnp.array([0, 1, 1])).compute())
    0.5

    Source: Brier, "Verification of Forecasts Expressed in Terms of Probability", Monthly Weather Review 78 (1950).
    """

    @classmethod
    def from_batch(
        cls, logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, where: ArrayLike | None = None
    ) -> Brier:
        """Logits [..., classes] and labels [...], weights and where as labels."""
        return cls(*_brier_of(logits, labels, weights, where))


# ---------------------------------------------------------------------------------------------------- calibration


class ReliabilityCurve(NamedTuple):
    """How often the confident are right, bin by bin: plot ``accuracy`` over ``confidence`` where ``weight`` isn't 0."""

    edges: Array
    """Where the bins begin and end, [bins + 1]."""
    confidence: Array
    """Mean probability of the predicted class, [bins]; 0 in an empty bin."""
    accuracy: Array
    """Mean accuracy, [bins]; 0 in an empty bin."""
    weight: Array
    """Weight of the examples in each bin, [bins]."""


def _bin_sums(logits: Any, rows: _Rows, bins: int) -> tuple[Sum, Sum, Sum]:
    confidence = jnp.exp(-_nll_of(logits, rows.prediction))
    confidence = _unless_nan(rows.nll, confidence)
    place = jnp.ceil(jnp.where(jnp.isnan(confidence), 0, confidence) * bins).astype(jnp.int32) - 1
    mine = jnp.clip(place, 0, bins - 1)[..., None] == np.arange(bins, dtype=np.int32).reshape((1,) * place.ndim + (-1,))
    weights = jnp.where(mine, rows.weights[..., None], 0)
    parts = (_weighted(confidence[..., None], weights), _weighted(rows.correct[..., None], weights), weights)
    return tuple(Sum.of(part, bins) for part in parts)  # type: ignore[return-value]


def _nll_of(logits: Any, labels: Array) -> Array:
    nll = softmax_statistics(logits, labels).nll
    assert nll is not None
    return nll


@compiled("bins")
def _calibration(logits: Any, labels: ArrayLike, weights: Any, where: Any, bins: int) -> tuple[Sum, Sum, Sum]:
    return _bin_sums(logits, _rows("Calibration", logits, labels, weights, where), bins)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["confidence", "correct", "weight"], meta_fields=["bins"]
)
@dataclasses.dataclass(frozen=True)
class Calibration(Metric):
    """Expected calibration error: the mean over examples of their bin's |accuracy - confidence|; 0 of nothing.

    Confidence is the probability of the predicted class; bin b of B holds those in (b/B, (b+1)/B].

    >>> import jax.numpy as jnp
    >>> from jaxce.metrics import Calibration
    >>> calibration = Calibration.from_batch(jnp.array([[50.0, 0.0], [0.0, 50.0]]), jnp.array([0, 0]), bins=10)
    >>> print(calibration.compute(), calibration.curve().accuracy[-1])
    0.5 0.5

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, https://arxiv.org/abs/1706.04599.
    """

    confidence: Sum
    correct: Sum
    weight: Sum
    bins: int = 15

    @classmethod
    def empty(cls, *, bins: int = 15, dtype: DTypeLike = jnp.float32) -> Calibration:
        """The metric of no data."""
        bins = _checks.positive_integer("Calibration", "bins", bins)
        zeros = Sum.empty(dtype, bins)
        return cls(zeros, zeros, zeros, bins)

    @classmethod
    def from_batch(
        cls,
        logits: ArrayLike,
        labels: ArrayLike,
        weights: ArrayLike | None = None,
        where: ArrayLike | None = None,
        *,
        bins: int = 15,
    ) -> Calibration:
        """Logits [..., classes] and labels [...], weights and where as labels."""
        bins = _checks.positive_integer("Calibration", "bins", bins)
        return cls(*_calibration(logits, labels, weights, where, bins), bins)

    def _options(self) -> dict[str, Any]:
        return {"bins": self.bins}

    @compiled()
    def compute(self) -> Array:
        """The expected calibration error."""
        gap, rest = _numerics.add(self.correct.pair, _numerics.negate(self.confidence.pair))
        return Mean(Sum.of(jnp.abs(gap + rest)), Sum(*_numerics.sum_pairs(*self.weight.pair))).compute()

    def curve(self) -> ReliabilityCurve:
        """The bins, ready to plot."""
        edges = jnp.linspace(0, 1, self.bins + 1, dtype=self.weight.hi.dtype)
        confidence, accuracy = Mean(self.confidence, self.weight), Mean(self.correct, self.weight)
        return ReliabilityCurve(edges, confidence.compute(), accuracy.compute(), self.weight.hi + self.weight.lo)


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
    return _Options(_checks.positive_integer("Evaluation", "k", k), _checks.positive_integer("Evaluation", "bins", bins), bool(per_class))


@compiled("options")
def _evaluate(logits: Any, labels: ArrayLike, weights: Any, where: Any, units: Any, options: _Options) -> Evaluation:
    rows = _rows("Evaluation", logits, labels, weights, where)
    nll, w = rows.nll, rows.weights
    n = _per_example("Evaluation", "units", units, nll.shape, nll.dtype)

    def total(values: Array) -> Sum:
        return Sum.of(_weighted(values, w))

    top = brier = None
    if options.per_class:
        y = jnp.asarray(labels)
        top = total(_unless_nan(nll, _in_top("Evaluation", logits, y, options.k).astype(nll.dtype)))
        brier = total(_brier("Evaluation", logits, y, nll))
    bins = Calibration(*_bin_sums(logits, rows, options.bins), options.bins)
    return Evaluation(total(nll), Sum.of(w), total(n), total(rows.correct), bins, top, brier, options)


_FIELDS = ["nll", "weight", "units", "correct", "calibration", "top_k", "brier"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=_FIELDS, meta_fields=["options"])
@dataclasses.dataclass(frozen=True)
class Evaluation(Metric):
    """All of the above from one pass over the logits.

    The logits may be whatever `softmax_statistics` takes. Top-k accuracy and Brier score look at every class of an array;
    ``per_class=False`` leaves them out. (The confidence is a second call of `softmax_statistics`, with the predictions
    for labels; on an array, XLA computes what the two share once.)

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
        zero = Sum.empty(dtype)
        rest = (zero, zero) if per_class else (None, None)
        return cls(zero, zero, zero, zero, Calibration.empty(bins=options.bins, dtype=dtype), *rest, options)

    @classmethod
    def from_batch(
        cls,
        logits: Any,
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
            where: which examples take part, [...].
            units: how many bytes or characters each example stands for, [...]; 1 if not given.
            k: for the top-k accuracy.
            bins: for the calibration error.
            per_class: whether top-k accuracy and Brier score are wanted.
        """
        return _evaluate(logits, labels, weights, where, units, _options_of(k, bins, per_class))

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
