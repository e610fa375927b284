"""From logits to statistics: the door that every function of logits shares, and what one pass over the classes gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxce import _blocks, _checks, _rows
from jaxce._checks import Axis, compiled
from jaxce._logits import AnyLogits, LinearLogits, NotArray, ShardedLogits
from jaxce._mesh import on_each_device


class Measures(NamedTuple):
    """What is asked of logits, one number per row."""

    log_normalizer: Array  # -inf where a row doesn't count
    present: Array  # whether any class is there, in a row that counts
    prediction: Array
    loss: Any  # the cross-entropy with the labels or targets given; None without
    entropy: Any  # None unless asked for


class Logits(NamedTuple):
    """Logits past the door: classes on the last axis, masked entries absent (-inf), and the pass over their classes."""

    x: Array  # half precision stays as it is, and is upcast where it is read
    row: _rows.Row
    axes: tuple[int, ...]
    entries: Array | None
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The dtype to compute in."""
        return self.row.maximum.dtype

    @property
    def classes(self) -> int:
        return self.x.shape[-1]

    def integer_labels(self, function: str, labels: ArrayLike) -> Array:
        """``labels`` as classes, one for each row, in an integer dtype that can count the classes."""
        return _integer_labels(function, labels, self.x.shape[:-1])

    def dense_labels(self, function: str, labels: Array) -> Array:
        """``labels`` as numbers for each class, on the last axis, 0 where an entry is masked."""
        _checks.same_shape(function, "labels", labels, self.shape, "the shape of the logits")
        targets = _checks.classes_last(labels, self.axes).astype(self.dtype)
        return targets if self.entries is None else jnp.where(self.entries, targets, 0)

    def measure(
        self,
        labels: Array | None = None,
        targets: Array | None = None,
        weights: Array | None = None,
        smoothing: float = 0.0,
        entropy: bool = False,
    ) -> Measures:
        """Cross-entropy with integer labels or with targets, and the rest; what isn't used costs nothing under jit."""
        loss = None
        if labels is not None:
            weight = None if weights is None else jnp.take(weights, labels, mode="clip")
            loss = _label_loss(_rows.label_nll(self.x, self.row, labels), weight)
            if smoothing:
                if weights is None:
                    uniform = _rows.uniform_nll(self.x, self.row)
                else:
                    uniform = _rows.dense_nll(self.x, self.row, _weighted(weights, self._uniform()))
                loss = _mix(loss, uniform, smoothing)
        if targets is not None:
            if smoothing:
                targets = (1 - smoothing) * targets + smoothing * self._uniform()
            loss = _rows.dense_nll(self.x, self.row, _weighted(weights, targets))
        value = _rows.log_normalizer(self.x, self.row)
        return Measures(
            log_normalizer=value if self.row.counts is None else jnp.where(self.row.counts, value, -jnp.inf),
            present=self.row.present,
            prediction=jnp.where(self.row.present, _rows.top(self.x, self.row), 0),
            loss=loss,
            entropy=_rows.entropy(self.x, self.row) if entropy else None,
        )

    def sum_of_terms(self, targets: Array, term: Callable[[Array], Array]) -> Array:
        """sum_k t_k term(-log p_k)."""
        targets = self.row.select(targets)
        nll = jnp.where(targets == 0, 0, -_rows.log_probabilities(self.x, self.row))
        return jnp.sum(targets * term(nll), -1)

    def _uniform(self) -> Array:
        """The uniform distribution over the classes that are there."""
        there = ~jnp.isneginf(self.x)
        return there.astype(self.dtype) / jnp.maximum(jnp.sum(there, -1, dtype=self.dtype, keepdims=True), 1)

    def log_probabilities(self) -> Array:
        """log p for each class."""
        values = _rows.log_probabilities(self.x, self.row)
        return values if self.row.counts is None else jnp.where(self.row.counts[..., None], values, -jnp.inf)


class BlockLogits(NamedTuple):
    """`LinearLogits` or `ShardedLogits` past the door, with the methods of `Logits`."""

    operands: _blocks.Operands
    rows: Array | None  # the mask of rows; None where all of them count
    spec: _blocks.Spec
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The dtype to compute in."""
        return self.spec.dtype

    @property
    def classes(self) -> int:
        return self.operands.shape[-1]

    def integer_labels(self, function: str, labels: ArrayLike) -> Array:
        """As `Logits.integer_labels`."""
        return _integer_labels(function, labels, self.operands.shape[:-1])

    def dense_labels(self, function: str, labels: Array) -> Array:
        """``labels`` with the classes last: a block is cast and masked where it is read."""
        of = "the shape of the logits" if self.spec.axis_name is None else "the shape of the logits on each device"
        _checks.same_shape(function, "labels", labels, self.shape, of)
        return _checks.classes_last(labels, self.axes)

    def measure(
        self,
        labels: Array | None = None,
        targets: Array | None = None,
        weights: Array | None = None,
        smoothing: float = 0.0,
        entropy: bool = False,
    ) -> Measures:
        """As `Logits.measure`, all in one pass over the classes."""
        if smoothing == 1:
            targets = None
        if labels is not None and self.rows is not None:
            labels = jnp.where(self.rows, labels, 0)
        spec = self.spec._replace(entropy=entropy, uniform=smoothing > 0)
        of_classes = weights if targets is not None or smoothing else None
        values, row = _blocks.measure(spec, self.operands._replace(labels=labels, targets=targets, weights=of_classes))
        loss = None
        if labels is not None:
            weight = None if weights is None else _blocks.at_label(self.spec, weights, labels)
            loss = _label_loss(values["nll"], weight)
        elif targets is not None:
            loss = values["given"]
        if smoothing:
            loss = _mix(values["uniform"] if loss is None else loss, values["uniform"], smoothing)
        present = row.present if self.rows is None else row.present & self.rows
        return Measures(
            log_normalizer=self._select(values["log_normalizer"], -jnp.inf),
            present=present,
            prediction=self._select(row.top, 0),
            loss=None if loss is None else self._select(loss, 0),
            entropy=self._select(values["entropy"], 0) if entropy else None,
        )

    def sum_of_terms(self, targets: Array, term: Callable[[Array], Array]) -> Array:
        """As `Logits.sum_of_terms`."""

        def weighted(log_p: Array, t: Array) -> Array:
            return t * term(jnp.where(t == 0, 0, -log_p))

        operands = self.operands._replace(targets=targets)
        value, (row,) = _blocks.sum_of_terms(weighted, (self.spec,), (operands,))
        return self._select(jnp.where(row.present, value, 0), 0)

    def log_probabilities(self) -> Array:
        """As `Logits.log_probabilities`, of the classes of this device."""
        values = _blocks.log_probabilities(self.spec, self.operands)
        return values if self.rows is None else jnp.where(self.rows[..., None], values, -jnp.inf)

    def _select(self, values: Array, otherwise: float) -> Array:
        return values if self.rows is None else jnp.where(self.rows, values, otherwise)


def _integer_labels(function: str, labels: ArrayLike, shape: tuple[int, ...]) -> Array:
    array = _checks.integer(function, "labels", labels)
    array = array.astype(jnp.int64 if array.dtype.itemsize == 8 else jnp.int32)
    _checks.same_shape(function, "labels", array, shape, "the shape of the logits without their class axes")
    return array


def _label_loss(nll: Array, weight: Array | None) -> Array:
    """weight * nll, where a weight of 0 takes away an infinite loss too."""
    return nll if weight is None else weight * jnp.where((weight == 0) & jnp.isposinf(nll), 0, nll)


def _weighted(weights: Array | None, targets: Array) -> Array:
    return targets if weights is None else jnp.broadcast_to(weights, targets.shape) * targets


def _mix(loss: Array, uniform: Array, smoothing: float) -> Array:
    return (1 - smoothing) * loss + smoothing * uniform if smoothing < 1 else uniform


def read_logits(
    function: str,
    argument: str,
    logits: AnyLogits,
    axis: Axis,
    where: ArrayLike | None,
    *others: Array,
) -> Logits | BlockLogits:
    """``logits`` past the door. They are computed with in the widest dtype of them, ``others`` and float32."""
    if isinstance(logits, NotArray):
        operands, rows = _blocks.operands(function, argument, logits, axis, where)
        axes = _checks.axes(function, axis, logits.ndim)
        return BlockLogits(operands, rows, _blocks.spec_of(logits, operands, *others), axes, logits.shape)
    array = _checks.floating(function, argument, logits)
    axes = _checks.axes(function, axis, array.ndim)
    rows, entries = _checks.where_mask(function, where, array.shape, axes)
    x = _checks.classes_last(array, axes)
    if x.shape[-1] == 0:
        raise ValueError(f"{function}: {argument} must have at least one class, got shape {array.shape}")
    if _checks.compute_dtype(x, *others) != _checks.compute_dtype(x):
        x = x.astype(_checks.compute_dtype(x, *others))
    if entries is not None:
        x = jnp.where(entries, x, -jnp.inf)
    return Logits(x, _rows.row_pass(x, rows), axes, entries, array.shape)


class SoftmaxStatistics(NamedTuple):
    """What `softmax_statistics` knows of each example; a pytree."""

    nll: Array | None
    """-log softmax(logits)[label] in nats; None where no labels were given."""
    log_normalizer: Array
    """logsumexp(logits); -inf where no class takes part."""
    entropy: Array
    """The entropy of softmax(logits) in nats."""
    prediction: Array
    """The class with the largest logit, the first of several (int32)."""


@compiled("axis")
@on_each_device("batch")
def softmax_statistics(
    logits: AnyLogits,
    labels: ArrayLike | None = None,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> SoftmaxStatistics:
    r"""Negative log-likelihood, log-normalizer, entropy and prediction of each example, from one pass over the classes.

    With the maximum :math:`m`, the gaps :math:`g_k = m - x_k \ge 0` and :math:`L = \log \sum_k e^{-g_k} \ge 0`,

    .. math::
        \mathrm{nll} = g_y + L, \quad \mathrm{log\_normalizer} = m + L, \quad
        \mathrm{entropy} = \sum_k p_k g_k + L, \quad \mathrm{prediction} = \arg\max_k x_k .

    All but the prediction are differentiable, to any order and in both modes. What isn't used isn't computed, under
    ``jax.jit``. See `softmax_cross_entropy_with_integer_labels` for labels, masks and dtypes.

    Args:
      logits: scores, of shape [..., classes], an array, `LinearLogits` or `ShardedLogits`.
      labels: integer classes, of the shape of the logits without the class axes, or None.
      axis: the class axis, or several; labels and predictions then count the classes of the flattened axes.
      where: which rows (a mask of the batch shape) or which entries of the logits take part.

    Returns:
      `SoftmaxStatistics` with four arrays of the batch shape.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> nll, log_normalizer, entropy, prediction = jaxce.softmax_statistics(jnp.array([1.0, 2.0, 3.0]), jnp.array(2))
      >>> print(f"{nll:.4f} {log_normalizer:.4f} {entropy:.4f} {prediction}")
      0.4076 3.4076 0.8324 2
    """
    z = read_logits("softmax_statistics", "logits", logits, axis, where)
    known = z.measure(None if labels is None else z.integer_labels("softmax_statistics", labels), entropy=True)
    return SoftmaxStatistics(known.loss, known.log_normalizer, known.entropy, known.prediction)


@compiled("axis")
@on_each_device("batch")
def logsumexp(logits: AnyLogits, axis: Axis = -1, where: ArrayLike | None = None) -> Array:
    r"""The logarithm of a sum of exponentials, :math:`\log \sum_k e^{x_k} = m + L`.

    Here :math:`m` is the maximum and :math:`L = \log(1 + \sum_{k \ne \text{top}} e^{x_k - m})`, so a result near a maximum
    of 0 has all its digits; where a negative maximum nearly cancels L, it is right to an ulp of these two. A row with no
    class, all masked or -inf, gives -inf, with gradient 0. The gradient is softmax(x).

    Args:
      logits: an array of floating-point numbers, `LinearLogits` or `ShardedLogits`.
      axis: the axis to sum over, or several.
      where: which rows (a mask of the batch shape) or which entries take part.

    Returns:
      An array without the class axes, in float32 for half-precision logits.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.logsumexp(jnp.array([0.0, -50.0])))
      1.92875e-22
    """
    return read_logits("logsumexp", "logits", logits, axis, where).measure().log_normalizer


@compiled("axis")
@on_each_device("logits")
def log_softmax(logits: AnyLogits, axis: Axis = -1, where: ArrayLike | None = None) -> Array:
    r"""Logarithms of the softmax probabilities, :math:`\log p_k = -(g_k + L)`, never positive.

    A class that is masked, or whose logit is -inf, has log-probability -inf, and gradient 0 if it is masked.

    Args:
      logits: scores, of shape [..., classes]; `LinearLogits` are computed whole, as the result is as large.
      axis: the class axis, or several, over which all probabilities together sum to 1.
      where: which rows (a mask of the batch shape) or which entries take part.

    Returns:
      An array of the shape of the logits, in float32 for half-precision logits.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.log_softmax(jnp.array([0.0, 20.0])))
      [-2.0000e+01 -2.0611537e-09]
    """
    if isinstance(logits, LinearLogits):  # as large as the logits
        whole = logits.materialize()
        logits = whole if logits.axis_name is None else ShardedLogits(whole, logits.axis_name)
    z = read_logits("log_softmax", "logits", logits, axis, where)
    batch = [a for a in range(len(z.shape)) if a not in z.axes]
    order = [*batch, *z.axes]  # of the axes now
    values = z.log_probabilities().reshape([z.shape[a] for a in order])
    return jnp.transpose(values, [order.index(a) for a in range(len(order))])
