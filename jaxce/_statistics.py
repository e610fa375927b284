"""From logits to statistics: the door that every function of logits shares, and what one pass over the classes gives."""

from __future__ import annotations

import math
from typing import Any, Generic, NamedTuple, TypeVar, overload

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType

from jaxce import _checks, _mesh
from jaxce._checks import ArrayLike, Axis, compiled
from jaxce._logits import AnyLogits, LinearLogits, NotArray, ShardedLogits
from jaxce._measures import ENTROPY, LOG_NORMALIZER, NLL, Measure, log_probabilities, measure
from jaxce._mesh import on_each_device
from jaxce._passes import Inputs, Spec
from jaxce._state import Ask, State

BLOCK = 1 << 26
"""About how many logits a block has at most."""

CLASSES = 2048, 8192
"""How many classes a block has at least and at most, unless the logits say it; and between these an eighth of all, or of
several strips a quarter of one. Rows too many for that come in chunks."""


class Logits(NamedTuple):
    """Logits of any kind past the door."""

    spec: Spec
    inputs: Inputs
    axes: tuple[int, ...]  # of the classes
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The dtype to compute in."""
        return self.spec.dtype

    @property
    def classes(self) -> int:
        """How many classes there are, on this device."""
        return self.spec.classes

    def with_labels(self, labels: ArrayLike) -> Logits:
        """With integer labels, one for each row; -1 of one that is no class."""
        y = _checks.labels_of_rows(labels, self.shape, self.axes)
        return self._with(labels=self._class(y))

    def with_targets(self, labels: ArrayLike) -> Logits:
        """With dense labels."""
        of = "the logits" + ("" if self.spec.axis_name is None else " on each device")
        t = jnp.asarray(labels)
        if not jnp.issubdtype(t.dtype, jnp.floating):  # integers might have been meant as classes
            hint = _checks.labels_hint(t.shape, self.shape, self.axes)
            _checks.same_shape("labels", t, self.shape, f"the shape of {of}", hint)
        whole = _checks.dense("labels", t, self.shape, self.dtype, of)
        # Axes of rows stay of length 1 where they are: a block of the logits may be all that is ever there.
        given = (1,) * (len(self.shape) - t.ndim) + t.shape
        t = whole[tuple(slice(n if a not in self.axes else None) for a, n in enumerate(given))]
        return self._with(targets=_checks.classes_last(t, self.axes))

    def with_shares(self, labels: ArrayLike, weights: ArrayLike) -> Logits:
        """With several classes for each row, and a share of its targets for each."""
        y = _checks.integer("labels", labels)
        batch = _checks.batch_shape(self.shape, self.axes)
        if y.shape[:-1] != batch or y.ndim != len(batch) + 1:
            of = f"the shape of the logits with any number of labels in place of the class axes, {(*batch, 'k')}"
            raise _checks.ArgumentValueError(f"labels must have {of}, got {_checks.describe(y)}")
        w = _checks.real("weights", weights, self.dtype)
        _checks.same_shape("weights", w, y.shape, "the shape of labels")
        chosen = self._class(y)
        for name, mask in self.inputs.items():  # a row that takes no part has no weight, whatever it holds
            if name in ("rows", "entries"):
                w = jnp.where((mask if name == "rows" else mask.any(-1))[..., None], w, 0)
        bad = (chosen < 0) & (w != 0)
        shares = jnp.where(bad, jnp.nan, w).astype(self.dtype)
        return self._with(chosen=jnp.where(bad, 0, chosen), shares=shares)

    def _class(self, labels: Array) -> Array:
        """Integer labels, -1 where one is no class."""
        name = self.spec.axis_name
        classes = self.classes * (1 if name is None else lax.axis_size(name))
        beyond = isinstance(classes, int) and classes > jnp.iinfo(labels.dtype).max  # no label is
        valid = labels >= 0 if beyond else (labels >= 0) & (labels < classes)
        return jnp.where(valid, labels, -1).astype(jnp.int32)

    def with_weights(self, class_weights: ArrayLike | None) -> Logits:
        """With weights of the classes, unless these are None."""
        if class_weights is None:
            return self
        weights = _checks.real("class_weights", class_weights, self.dtype)
        _checks.same_shape("class_weights", weights, (self.classes,), "one number per class")
        return self._with(weights=weights)

    def _with(self, **inputs: Array) -> Logits:
        return self._replace(inputs=self.inputs | inputs)

    def measure(
        self, *measures: Measure, options: tuple[Array, ...] = (), prediction: bool = False
    ) -> tuple[tuple[Array, ...], State]:
        """The measures, and the state of the rows."""
        spec = self.spec._replace(ask=Ask(prediction=prediction))
        values, (state,) = measure((spec,), (self.inputs,), measures, *options)
        return values, state


def read_logits(argument: str, logits: AnyLogits, axis: Axis, where: ArrayLike | None, *others: Any) -> Logits:
    """``logits`` past the door. They are computed with in the widest dtype of them, ``others`` and float32."""
    if not isinstance(logits, NotArray):
        logits = _checks.floating(argument, logits)
    axes = _checks.axes(axis, logits.ndim)
    masks = {} if where is None else dict([_checks.where_mask(where, logits.shape, axes)])
    dtype = _checks.compute_dtype(logits, *others)
    if isinstance(logits, LinearLogits):
        if axes != (logits.ndim - 1,):
            raise _checks.ArgumentValueError(
                f"axis must be the last one where {argument} is computed by blocks, got {axis!r}"
            )
        there = masks.get("rows", masks["entries"].any(-1) if "entries" in masks else None)
        spec, inputs = _read_linear(logits, dtype, there)
    else:
        x = _checks.classes_last(logits.logits if isinstance(logits, ShardedLogits) else logits, axes)
        if x.shape[-1] == 0:
            raise _checks.ArgumentValueError(f"{argument} must have at least one class, got shape {logits.shape}")
        spec, inputs = Spec(dtype, x.shape[-1], x.shape[-1]), {"array": x}
    if isinstance(logits, NotArray) and logits.axis_name is not None:
        _mesh.check(argument, logits.axis_name, inputs["kernel"] if "kernel" in inputs else inputs["array"])
        spec = spec._replace(axis_name=logits.axis_name)
    return Logits(spec, inputs | masks, axes, logits.shape)


def _read_linear(logits: LinearLogits, dtype: np.dtype, there: Array | None) -> tuple[Spec, Inputs]:
    named = {name: getattr(logits, name) for name in ("hidden", "kernel", "bias", "temperature", "soft_cap")}
    inputs = {name: jnp.asarray(value) for name, value in named.items() if value is not None}
    if there is not None:  # what a row holds that takes no part must not be multiplied by anything
        there = jnp.broadcast_to(there, logits.shape[:-1])
        inputs["hidden"] = jnp.where(there[..., None], inputs["hidden"], 0)
    inputs["kernel"] = _mesh.whole(inputs["kernel"], -1 - logits.class_axis)
    inputs["hidden"] = _mesh.whole(inputs["hidden"], -1)
    strips = _mesh.strips(logits.classes)
    length = logits.classes // strips
    known = all(isinstance(n, int) for n in logits.shape[:-1])  # unlike the symbolic sizes of jax.export
    rows = max(1, math.prod(logits.shape[:-1]) // _mesh.devices(AxisType.Auto)) if known else 1
    if logits.block_size is None:
        least, most = CLASSES
        part = max(least // strips, -(-length // (1024 if strips == 1 else 512)) * 128)
        size = min(length, most, part, max(most // strips, 128, BLOCK // (rows * strips) // 128 * 128))
        chunks = -(-rows * strips * size // BLOCK)
    else:
        size, chunks = min(length, -(-logits.block_size // strips)), 1
    return Spec(dtype, logits.classes, size, strips, logits.class_axis, logits.half, chunks=chunks), inputs


_Nll = TypeVar("_Nll", bound=Array | None)


class SoftmaxStatistics(NamedTuple, Generic[_Nll]):
    """What `softmax_statistics` knows of each example; a pytree."""

    nll: _Nll
    """-log softmax(logits)[label] in nats; None where no labels were given."""
    log_normalizer: Array
    """logsumexp(logits); -inf where no class takes part."""
    entropy: Array
    """The entropy of softmax(logits) in nats."""
    prediction: Array
    """The class with the largest logit, the first of several (int32); 0 if any is NaN or no class takes part."""


@overload
def softmax_statistics(
    logits: AnyLogits, labels: None = None, axis: Axis = -1, where: ArrayLike | None = None
) -> SoftmaxStatistics[None]: ...
@overload
def softmax_statistics(
    logits: AnyLogits, labels: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> SoftmaxStatistics[Array]: ...
@compiled("axis")
@on_each_device("batch")
def softmax_statistics(
    logits: AnyLogits,
    labels: ArrayLike | None = None,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> SoftmaxStatistics[Any]:
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
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).

    Returns:
      `SoftmaxStatistics` with four arrays of the batch shape.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> nll, log_normalizer, entropy, prediction = jaxce.softmax_statistics(jnp.array([1.0, 2.0, 3.0]), jnp.array(2))
      >>> print(f"{nll:.4f} {log_normalizer:.4f} {entropy:.4f} {prediction}")
      0.4076 3.4076 0.8324 2
    """
    z = read_logits("logits", logits, axis, where)
    measures = [LOG_NORMALIZER, ENTROPY]
    if labels is not None:
        z = z.with_labels(labels)
        measures.append(NLL)
    (log_normalizer, entropy, *nll), state = z.measure(*measures, prediction=True)
    return SoftmaxStatistics(nll[0] if nll else None, log_normalizer, entropy, state.predicted)


@compiled("axis")
@on_each_device("batch")
def logsumexp(logits: AnyLogits, axis: Axis = -1, where: ArrayLike | None = None) -> Array:
    r"""The logarithm of a sum of exponentials, :math:`\log \sum_k e^{x_k} = m + L`.

    Here :math:`m` is the maximum and :math:`L = \log(1 + \sum_{k \ne \text{top}} e^{x_k - m})`, so a result near a maximum
    of 0 has all its digits; where a negative maximum nearly cancels L, it is right to some ulp of these two. A row with no
    class, all masked or -inf, gives -inf, with gradient 0. The gradient is softmax(x).

    Args:
      logits: an array of floating-point numbers, `LinearLogits` or `ShardedLogits`.
      axis: the axis to sum over, or several.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).

    Returns:
      An array without the class axes, in float32 for half-precision logits.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.logsumexp(jnp.array([0.0, -50.0])))
      1.92875e-22
    """
    return read_logits("logits", logits, axis, where).measure(LOG_NORMALIZER)[0][0]


@compiled("axis")
@on_each_device("logits")
def log_softmax(logits: AnyLogits, axis: Axis = -1, where: ArrayLike | None = None) -> Array:
    r"""Logarithms of the softmax probabilities, :math:`\log p_k = -(g_k + L)`, never positive.

    A class that is masked, or whose logit is -inf, has the log-probability -inf. The derivative of :math:`\log p_k` by
    :math:`x_j` is :math:`[j = k] - p_j` there too, and 0 by a masked logit, so that it is minus that of the loss with this
    label. A row with no class left has gradient 0.

    Args:
      logits: scores, of shape [..., classes]; `LinearLogits` are computed whole, as the result is as large.
      axis: the class axis, or several, over which all probabilities together sum to 1.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).

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
    z = read_logits("logits", logits, axis, where)
    batch = [a for a in range(len(z.shape)) if a not in z.axes]
    order = [*batch, *z.axes]  # of the axes now
    values = log_probabilities(z.spec, z.inputs).reshape([z.shape[a] for a in order])
    return jnp.transpose(values, [order.index(a) for a in range(len(order))])
