r"""The mean loss of `LinearLogits` with its gradient from one pass.

A loss per example can be weighted by anything before it is differentiated, so its derivative has to compute the logits
again: with gradients that is four products of the size of the logits for each example, class and feature. For a mean with
known weights three are enough. A chunk of examples at a time, all its logits are computed and used for both,

.. math::
    X = h W, \qquad \nabla_h \mathrel{+}= G W^\top, \quad \nabla_W \mathrel{+}= h^\top G \quad
    \text{with } G = \partial \ell / \partial X .

It is the derivative that is kept, not the logits. Second derivatives are those of the loss by blocks.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType
from jax.typing import ArrayLike

from jaxce import _checks, _mesh
from jaxce._checks import FINITE, SHARE, AxisName, compiled
from jaxce._logits import LinearLogits, ShardedLogits, product, shape_logits
from jaxce._mesh import on_each_device
from jaxce._passes import join_rows, split_rows
from jaxce._reduction import weighted_mean
from jaxce._rules import custom_jvp
from jaxce._softmax import softmax_cross_entropy_with_integer_labels

_NAME = "linear_cross_entropy"

_EXAMPLES = 512
"""How many examples a chunk has at least. By default it has as many as there are features: each chunk reads and writes the
gradient of the whole kernel, than which its own logits then aren't smaller."""


@compiled("chunk_size", label_smoothing=SHARE, z_loss=FINITE)
def linear_cross_entropy(
    logits: LinearLogits,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    normalizer: ArrayLike | None = None,
    chunk_size: int | None = None,
) -> Array:
    r"""Weighted mean of the cross-entropy between integer labels and `LinearLogits`, its gradient formed on the way.

    .. math:: \frac{\sum_i w_i \ell_i}{\sum_i w_i}, \qquad 0 \text{ where the denominator is } 0,

    with :math:`\ell_i` of `softmax_cross_entropy_with_integer_labels`. It is
    ``weighted_mean(softmax_cross_entropy_with_integer_labels(logits, labels, where=weights != 0), weights)`` in value and
    derivatives, to any order and in both modes. Where a gradient is asked for, the logits are computed once rather than
    twice: three matrix products in place of four, for the memory of a chunk of examples with all their classes in
    place of a block. Without a gradient it takes no more than the losses.

    On a mesh a chunk has examples of each device, and each sums its own part of the kernel's gradient; the devices' parts
    meet once, after all chunks, on a mesh with explicit axis types and inside of `jax.shard_map`, where the classes may be
    sharded too. With automatic axis types XLA does as much for TPU and GPU, and sums parts in float32; for a CPU it sums
    after each chunk. Inside of a `jax.shard_map` over the batch a device's mean is its own; take that of all with their
    normalizer.

    A row of weight 0 takes no part, whatever it holds: its loss is 0. So for a padding label of -100 give
    ``weights=labels != -100``. In half precision the kernel's gradient is summed in float32.

    Args:
      logits: `LinearLogits` of shape [..., classes].
      labels: integer classes, of the shape of the logits without the classes.
      weights: booleans, integers or floating point, of the shape of the labels.
      label_smoothing: the share in [0, 1] that is spread evenly over the classes.
      class_weights: one number per class, by which its part of the loss is multiplied.
      z_loss: the factor of the squared log-normalizer.
      normalizer: a number to divide by in place of the sum of the weights, say that of all micro-batches.
      chunk_size: how many examples at a time, of each device, where a gradient is formed; by default as many as there are
        features, and at least 512.

    Returns:
      A number, in the dtype of the logits and at least float32.

    Example:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> def loss(hidden, kernel):
      ...     return jaxce.linear_cross_entropy(jaxce.LinearLogits(hidden, kernel), jnp.array([0, 4, -100]),
      ...                                       jnp.array([True, True, False]))
      >>> value, gradient = jax.value_and_grad(loss)(jnp.ones((3, 2)), jnp.ones((2, 5)))
      >>> print(value)
      1.60944

    Reference:
      Hsu et al., Liger Kernel, https://arxiv.org/abs/2410.10989, section 3.2.
    """
    if not isinstance(logits, LinearLogits):
        raise TypeError(f"{_NAME}: logits must be LinearLogits, got {_checks.describe(logits)}")
    y = _checks.labels_of_rows(_NAME, labels, logits.shape, (logits.ndim - 1,))
    w = jnp.ones(y.shape, logits.dtype) if weights is None else jnp.asarray(weights)
    _checks.same_shape(_NAME, "weights", w, y.shape, "the shape of the labels")
    w = w.astype(logits.dtype)
    if chunk_size is not None:
        _checks.positive_integer(_NAME, "chunk_size", chunk_size, "None or a positive integer")

    total = _total(logits, y, w, label_smoothing, class_weights, z_loss, chunk_size)
    return weighted_mean(total, normalizer=jnp.sum(w) if normalizer is None else normalizer)


@on_each_device("total")
def _total(
    logits: LinearLogits,
    labels: Array,
    weights: Array,
    label_smoothing: ArrayLike,
    class_weights: ArrayLike | None,
    z_loss: ArrayLike,
    chunk_size: int | None,
) -> Array:
    """The weighted sum of the losses."""
    axis_name, counts = logits.axis_name, weights != 0
    given = {"label_smoothing": label_smoothing, "z_loss": z_loss, "class_weights": class_weights}
    modifiers: Any = {name: value for name, value in given.items() if value is not None}
    if "class_weights" in modifiers:
        modifiers["class_weights"] = _checks.real(_NAME, "class_weights", modifiers["class_weights"])
        of = "one number per class"
        _checks.same_shape(_NAME, "class_weights", modifiers["class_weights"], (logits.classes,), of)

    # What a row holds that takes no part must not be multiplied by anything, even 0.
    hidden, labels = jnp.where(counts[..., None], logits.hidden, 0), jnp.where(counts, labels, 0)
    fields = {name: getattr(logits, name) for name in ("bias", "soft_cap", "temperature")}
    fields["kernel"] = _mesh.gather_features(logits.kernel, logits.class_axis)
    fields |= {"hidden": hidden.reshape(labels.size, hidden.shape[-1]), "weights": weights.reshape(labels.size)}
    inputs = {name: jnp.asarray(value) for name, value in (fields | modifiers).items() if value is not None}
    inputs = {
        name: value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(logits.dtype)
        for name, value in inputs.items()
    }
    if axis_name is not None:
        _mesh.check(_NAME, "logits", axis_name, inputs["kernel"])
    inputs = _mesh.vary(inputs, _mesh.varying(inputs, labels))
    options = _Options(chunk_size, logits.class_axis, logits.block_size, axis_name)
    share = _weighted_sum(options, labels.reshape(labels.size), inputs)
    return share if axis_name is None else lax.psum(share, axis_name)


class _Options(NamedTuple):
    chunk_size: int | None
    class_axis: int
    block_size: int | None
    axis_name: AxisName | None


Inputs = dict[str, Array]  # what the loss is differentiated by, with all examples on one axis

# Where devices share the classes each knows the losses, and the sum of the devices' equal shares of them is what is
# differentiated: by inputs that count as different on each device, so that a gradient is the part that a device's classes
# have in it. The sum over devices comes last, once.


def _sum_of_losses(options: _Options, logits: LinearLogits | Array, labels: Array, inputs: Inputs) -> Array:
    """The weighted sum of the losses of logits, whole or a device's part; of devices that share the classes a share."""
    name = options.axis_name
    modifiers: Any = {name: inputs[name] for name in ("label_smoothing", "z_loss", "class_weights") if name in inputs}
    known = ShardedLogits(logits, name) if name is not None and isinstance(logits, Array) else logits
    losses = softmax_cross_entropy_with_integer_labels(known, labels, **modifiers)
    total = jnp.sum(inputs["weights"] * jnp.where(inputs["weights"] == 0, 0, losses))
    if name is None:
        return total
    count = lax.axis_size(name) + 0 * lax.axis_index(name)  # a number of each device, also of those of a vmap
    return total / count.astype(total.dtype)


def _sum_by_blocks(options: _Options, labels: Array, inputs: Inputs) -> Array:
    """The definition, whose derivatives compute the logits again."""
    logits = LinearLogits(
        inputs["hidden"],
        inputs["kernel"],
        class_axis=options.class_axis,
        block_size=options.block_size,
        bias=inputs.get("bias"),
        soft_cap=inputs.get("soft_cap"),
        temperature=inputs.get("temperature"),
        axis_name=options.axis_name,
    )
    return _sum_of_losses(options, logits, labels, inputs)


@partial(custom_jvp, nondiff_argnums=(0,))
def _weighted_sum(options: _Options, labels: Array, inputs: Inputs) -> Array:
    return _sum_by_blocks(options, labels, inputs)


@partial(_weighted_sum.defjvp, symbolic_zeros=True)
def _(options: _Options, primals: Any, tangents: Any) -> Any:
    labels, inputs = primals
    varying = {name: tangent for name, tangent in tangents[1].items() if not isinstance(tangent, SymbolicZero)}
    total, gradient = _sum_and_gradient(options, tuple(varying), labels, inputs)
    terms = (jnp.sum(gradient[name] * varying[name].astype(total.dtype)) for name in varying)
    return total, sum(terms, jnp.zeros_like(total))


@partial(custom_jvp, nondiff_argnums=(0, 1))
def _sum_and_gradient(options: _Options, names: tuple[str, ...], labels: Array, inputs: Inputs) -> tuple[Array, Inputs]:
    """The sum and its derivatives by the inputs with these names, in the dtype of the logits."""
    kernel, class_axis = inputs["kernel"], options.class_axis % 2
    half = inputs["hidden"].dtype == kernel.dtype == jnp.bfloat16
    dtype = _checks.compute_dtype(inputs["hidden"], kernel)
    examples = labels.size
    chunk_size = options.chunk_size or max(_EXAMPLES, inputs["hidden"].shape[-1])
    known = examples if isinstance(examples, int) else 1  # unlike the symbolic sizes of jax.export
    chunks = max(1, -(-known // (chunk_size * _mesh.devices(AxisType.Auto))))

    def loss_of(of_examples: Inputs, of_all: Inputs, labels: Array) -> Array:
        x = of_examples["products"]
        if "bias" in of_all:
            x = x + jnp.broadcast_to(of_all["bias"].astype(dtype), x.shape)
        x = shape_logits(x, of_all.get("temperature"), of_all.get("soft_cap"))
        return _sum_of_losses(options, x, labels, of_examples | of_all)

    def multiply(a: Array, a_axis: int, b: Array, b_axis: int) -> Array:
        a, b = (v.astype(jnp.bfloat16 if half else dtype) for v in (a, b))
        return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=dtype)

    of_all = {name: value for name, value in inputs.items() if name not in ("hidden", "kernel", "weights")}
    sums = {name: jnp.zeros(inputs[name].shape, dtype) for name in names if name not in ("hidden", "weights")}

    def step(carry: tuple[Array, Inputs], chunk: tuple[Array, ...]) -> Any:
        total, sums = carry
        hidden, weights, labels = chunk
        of_examples = {"products": product(hidden, kernel, options.class_axis, half), "weights": weights}
        value, (of_examples, parts) = jax.value_and_grad(loss_of, (0, 1))(of_examples, of_all, labels)
        g = of_examples.pop("products")
        if "hidden" in names:
            of_examples["hidden"] = multiply(g, 1, kernel, class_axis)
        if "kernel" in names:
            parts["kernel"] = multiply(hidden, 0, g, 0) if class_axis == 1 else multiply(g, 0, hidden, 0)
        sums = {name: sums[name] + parts[name].astype(dtype) for name in sums}
        return (total + value, sums), {name: of_examples[name] for name in of_examples if name in names}

    chunked = tuple(split_rows(x, chunks) for x in (inputs["hidden"], inputs["weights"], labels))
    start = _mesh.vary((jnp.zeros((), dtype), sums), _mesh.varying(inputs))
    (total, sums), of_examples = lax.scan(step, start, chunked)
    return total, sums | {name: join_rows(value, examples) for name, value in of_examples.items()}


@_sum_and_gradient.defjvp
def _(options: _Options, names: tuple[str, ...], primals: Any, tangents: Any) -> Any:
    labels, inputs = primals

    def by_blocks(inputs: Inputs) -> tuple[Array, Inputs]:
        def value(varying: Inputs) -> Array:
            return _sum_by_blocks(options, labels, inputs | varying)

        total, gradient = jax.value_and_grad(value)({name: inputs[name] for name in names})
        return total, {name: g.astype(total.dtype) for name, g in gradient.items()}

    return _sum_and_gradient(options, names, labels, inputs), jax.jvp(by_blocks, (inputs,), (tangents[1],))[1]
