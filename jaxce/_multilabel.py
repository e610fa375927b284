r"""One yes-or-no question for each class, few of them answered with yes: the classes that a row lists.

The loss of a row is a sum over the classes of terms that know nothing of each other, so that a pass needs no state of the
row, and a block of classes can be forgotten once its terms are added up. Whether a class is listed is found in the pass:
what a listed class costs, :math:`\log(1 + e^{-x})`, is never a difference of what all classes cost and of logits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxce import _checks
from jaxce._checks import ArrayLike, Axis, compiled
from jaxce._inputs import CLASSES, Inputs, Logits, Spec, demand_linear, on_each_device, read_logits, rows_of_a_device
from jaxce._logits import AnyLogits, LinearLogits
from jaxce._passes import add_up, along, block_of, by_rows, logits_of, masked, own_inputs
from jaxce._rules import custom_jvp, not_zero
from jaxce._sigmoid import binary_loss
from jaxce._state import beside

_BLOCK = 3 << 23
"""About how many logits a block of a mean's gradient has at most, if that leaves it `CLASSES[0]`: what both gradients are
made of then stays on a TPU's chip (8192 rows, 128256 classes: 34 megacycles, and 38 with larger blocks)."""


@compiled("axis")
def sigmoid_binary_cross_entropy_with_sparse_labels(
    logits: AnyLogits,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    class_where: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    class_groups: ArrayLike | None = None,
) -> Array:
    r"""Sum over all classes of the binary cross-entropy of their logits, where each row lists its positive classes.

    For the set Y of the labels of a row,

    .. math:: \ell = \sum_{k \in Y} \log(1 + e^{-x_k}) + \sum_{k \notin Y} \log(1 + e^{x_k}) .

    So it is ``sigmoid_binary_cross_entropy(logits, targets).sum(-1)`` without the array of targets, which would be as large
    as the logits: the loss of extreme multi-label classification, or with ``labels=jnp.arange(n)[:, None]`` that of SigLIP.
    With weights, :math:`t_k` is the sum of the weights of the labels that are k, with :math:`t_k = 0` elsewhere, and

    .. math:: \ell = \sum_k \left( -t_k \log \sigma(x_k) - (1 - t_k) \log \sigma(-x_k) \right) .

    A label of -1 is padding, so that rows may list fewer classes than others. A class that is listed twice counts once, or,
    with weights, with the sum of them. Any other label that is no class gives NaN for its row, in value and gradient,
    unless its weight is 0 or its row is masked. A masked class takes no part, also if it is listed. An infinite logit
    costs 0 where the label agrees fully, with gradient 0, and +inf otherwise.

    With groups, a class of the row's own group that the row doesn't list is left out, neither a yes nor a no: such as a
    duplicate of the row's own text.

    No term is negative (for weights that add up to at most 1) and none is a difference: each is as exact as that of
    `sigmoid_binary_cross_entropy`, as is each entry of a gradient. With `LinearLogits` neither value nor gradient needs
    memory for more than a block of logits. One pass compares each class with all labels of its row.

    Args:
      logits: log-odds, of shape [..., classes], an array, `LinearLogits` or `ShardedLogits`.
      labels: integer classes, of shape [..., k], -1 where there are fewer than k.
      weights: the share of yes that each label stands for, usually in [0, 1], of the shape of the labels; None for 1.
      axis: the class axis, or several; labels then count the classes of the flattened axes.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).
      class_where: which classes take part, of shape [classes].
      pos_weight: weight of the positive class, a number or one for each class; PyTorch's meaning.
      groups: an integer for each row, such as the id of its item.
      class_groups: an integer for each class; by default that of the row, if there are as many rows as classes.

    Returns:
      Losses of the batch shape, float32 for half precision, else the wider of the dtypes of logits and weights.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> logits = jnp.array([[2.0, -1.0, 0.5, -60.0], [40.0, -45.0, -45.0, 50.0]])
      >>> labels = jnp.array([[0, 2], [3, 0]])
      >>> print(jaxce.sigmoid_binary_cross_entropy_with_sparse_labels(logits, labels))
      [9.142667e-01 4.305797e-18]

    References:
      Zhai et al., Sigmoid Loss for Language Image Pre-Training, https://arxiv.org/abs/2303.15343.
    """
    z = _read(logits, labels, weights, axis, where, pos_weight)
    z = _with_classes(z, class_where, groups, class_groups)
    return on_each_device(partial(_losses, weights is not None), (z,))


@compiled()
def linear_sigmoid_binary_cross_entropy(
    logits: LinearLogits,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    label_weights: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    class_groups: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> Array:
    r"""Weighted mean of the binary cross-entropy of lists of labels and `LinearLogits`, with gradients from three products.

    .. math:: \frac{\sum_i w_i \ell_i}{\sum_i w_i}, \qquad 0 \text{ where the denominator is } 0,

    with :math:`\ell_i` of `sigmoid_binary_cross_entropy_with_sparse_labels`. It is ``weighted_mean(losses, weights)`` of
    ``losses = sigmoid_binary_cross_entropy_with_sparse_labels(logits, labels, label_weights, where=weights != 0)``, with
    the other arguments as they are, in value and derivatives of any order, in forward and in reverse mode. Where a
    gradient is asked for, it is formed in the pass that forms the value: the logits are computed once rather than twice,
    a block of classes at a time.

    A row of weight 0 takes no part, whatever it holds: its loss is 0, and so is the gradient of its hidden states.
    Inside `jax.shard_map` it is the mean of this device's examples; `linear_cross_entropy` says how to take that of all
    devices.

    Args:
      logits: `LinearLogits` of shape [..., classes].
      labels: integer classes, of shape [..., k], -1 where there are fewer than k.
      weights: of the examples: booleans, integers or floating point, of the shape of the logits without the classes.
      label_weights: the share of yes that each label stands for, of the shape of the labels; None for 1.
      class_where: which classes take part, of shape [classes].
      pos_weight: weight of the positive class, a number or one for each class.
      groups: an integer for each row; an unlisted class of the row's own group is left out.
      class_groups: an integer for each class; by default that of the row, if there are as many rows as classes.
      normalizer: a number to divide by in place of the sum of the weights, say that of all micro-batches.

    Returns:
      A number, in the dtype of the logits and at least float32.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> def loss(images, texts, scale, bias):  # SigLIP: each image's own text is a yes, all others are a no
      ...     logits = jaxce.LinearLogits(images, texts, class_axis=0, temperature=1 / scale) + bias
      ...     return jaxce.linear_sigmoid_binary_cross_entropy(logits, jnp.arange(len(images))[:, None])
      >>> value, gradient = jax.value_and_grad(loss, argnums=(2, 3))(jnp.eye(3), jnp.eye(3), 10.0, -10.0)
      >>> print(value, *gradient)
      0.69324 -0.50000 -0.49991

    References:
      Zhai et al., Sigmoid Loss for Language Image Pre-Training, https://arxiv.org/abs/2303.15343.
    """
    demand_linear(logits)
    w = jnp.ones(logits.shape[:-1], logits.dtype) if weights is None else _checks.real("weights", weights, logits.dtype)
    _checks.same_shape("weights", w, logits.shape[:-1], "the shape of the logits without the classes")
    z = _read(
        logits, labels, label_weights, -1, None if weights is None else w.astype(bool), pos_weight, "label_weights"
    )
    z = _with_classes(z, class_where, groups, class_groups)
    w = w.astype(z.dtype)
    total = jnp.sum(w) if normalizer is None else _checks.real("normalizer", normalizer, z.dtype).astype(z.dtype)
    _checks.scalar_or("normalizer", total, (), "no axes")
    # Divided here, so that in half precision a gradient is rounded once, and not again when it is divided.
    w = jnp.where(total == 0, 0, w / jnp.where(total == 0, 1, total))
    run = partial(_weighted_sum, label_weights is not None)
    return on_each_device(run, (z.having(example_weights=w),), results=("total",))[0]


def _read(
    logits: AnyLogits,
    labels: ArrayLike,
    weights: ArrayLike | None,
    axis: Axis,
    where: ArrayLike | None,
    pos_weight: ArrayLike | None,
    of_labels: str = "weights",
) -> Logits:
    """The logits with their labels, whose weights are "shares"."""
    y = _checks.integer("labels", labels)
    w = jnp.ones(y.shape, jnp.float32) if weights is None else _checks.real(of_labels, weights)
    _checks.same_shape(of_labels, w, y.shape, "the shape of labels")
    z = read_logits("logits", logits, axis, where, *(() if weights is None else (w,)))
    padding = (y < 0) & (y == -1)  # as an unsigned integer -1 would be another number
    z = z.with_shares(jnp.where(padding, 0, y), w).having(listed=~padding)
    if pos_weight is None:
        return z
    factor = _checks.real("pos_weight", pos_weight, z.dtype)
    _checks.scalar_or("pos_weight", factor, (z.spec.classes,), "one number per class")
    return z.having(weights=jnp.broadcast_to(factor, (z.spec.classes,)))


def _with_classes(z: Logits, class_where: Any, groups: Any, class_groups: Any) -> Logits:
    """The logits with what is said of their classes."""
    if class_groups is None and z.spec.axis_name is None and z.shape == (z.spec.classes,) * 2:
        class_groups = groups
    return z.with_classes(class_where).with_groups(groups, class_groups)


def _labeled(weighted: bool, inputs: Inputs) -> tuple[Inputs, Array]:
    """The inputs of a pass; and 1 for each row, or NaN where a label is no class."""
    shares = jnp.where(inputs["listed"], inputs["shares"], 0)
    labels = {"chosen": jnp.where(inputs["listed"] if weighted else shares == 1, inputs["chosen"], -1)}
    if weighted:  # else a class counts once, however often it is listed
        labels["shares"] = shares
    factor = jnp.where(jnp.isnan(shares).any(-1), np.nan, 1)
    return {name: x for name, x in inputs.items() if name not in ("listed", "shares")} | labels, factor


def _in_blocks(spec: Spec, inputs: Inputs) -> Spec:
    """With smaller blocks, unless the logits say their size."""
    if spec.block_size is not None:
        return spec
    rows = -(-rows_of_a_device(inputs["hidden"].shape[:-1]) // spec.chunks) * spec.strips
    return spec._replace(size=min(spec.size, max(CLASSES[0] // spec.strips, _BLOCK // rows // 128 * 128)))


def _losses(weighted: bool, specs: tuple[Spec], given: tuple[Inputs]) -> Array:
    (spec,) = specs
    inputs, factor = _labeled(weighted, *given)
    return by_rows(spec.chunks, (inputs,), partial(_total, spec, False)) * factor.astype(spec.dtype)


def _weighted_sum(weighted: bool, specs: tuple[Spec], given: tuple[Inputs]) -> tuple[Array]:
    (spec,) = specs
    inputs, factor = _labeled(weighted, *given)
    w = inputs["example_weights"] * factor.astype(spec.dtype)
    # Each device that shares the classes differentiates its own part, by inputs that count as its own.
    total = _sum(spec, own_inputs(spec, inputs | {"example_weights": w}))
    return (total if spec.axis_name is None else lax.psum(total, spec.axis_name),)


def _sum_of_losses(spec: Spec, inputs: Inputs) -> Array:
    """The weighted sum over the rows, of this device's classes."""
    return jnp.sum(by_rows(spec.chunks, (inputs,), partial(_total, spec, True)))


_sum = custom_jvp(_sum_of_losses, nondiff_argnums=(0,))


@partial(_sum.defjvp, symbolic_zeros=True)
def _(spec: Spec, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (inputs,) = primals
    spec = _in_blocks(spec, inputs)
    varying = not_zero(tangents[0])
    gradient = _gradient(spec, (*varying, "example_weights"), inputs)
    terms = (jnp.sum(gradient[name].astype(spec.dtype) * t.astype(spec.dtype)) for name, t in varying.items())
    value = jnp.sum(inputs["example_weights"] * gradient["example_weights"])
    return value, sum(terms, jnp.zeros_like(value))


def _gradient_of_losses(spec: Spec, names: tuple[str, ...], inputs: Inputs) -> Inputs:
    """All derivatives at once, which a pass backwards forms without one forwards: that by a row's weight is its loss."""
    some = {name: inputs[name] for name in names}
    return jax.grad(lambda some: _sum_of_losses(spec, inputs | some))(some)


# With a rule of its own: else JAX takes constants of a block's size out of the loop, and a GPU reads them in each turn.
_gradient = custom_jvp(_gradient_of_losses, nondiff_argnums=(0, 1))


@partial(_gradient.defjvp, symbolic_zeros=True)
def _(spec: Spec, names: tuple[str, ...], primals: Any, tangents: Any) -> tuple[Inputs, Inputs]:
    (inputs,) = primals
    varying = not_zero(tangents[0])
    return along(partial(_gradient_of_losses, spec, names), inputs, varying, *varying)


def _block(spec: Spec, start: Any, part: Inputs) -> Array:
    """What the classes of a block cost."""
    x = logits_of(spec, part).astype(spec.dtype)
    block = block_of(spec, part, start, x)
    weight = None if block.weights is None else jnp.broadcast_to(block.weights.astype(spec.dtype), x.shape)
    # Both less the first: what a row has one of is cheaper to subtract from than what an entry has.
    index, listed = block.places - block.first, jnp.zeros_like(x, bool)
    for j in range(part["chosen"].shape[-1]):
        listed |= index == beside(part["chosen"][..., j] - block.first, x)
    if "groups" in part:
        others = beside(part["groups"], x) != jnp.broadcast_to(part["class_groups"], x.shape)
        part = part | {"entries": (listed | others) & part.get("entries", True)}
        x = masked(part, x, -np.inf)
    yes = listed if block.targets is None else block.targets.astype(spec.dtype)
    cost = jnp.sum(masked(part, binary_loss(x, yes, weight), 0), -1)
    return beside(part["example_weights"], cost) * cost if "example_weights" in part else cost


@partial(custom_jvp, nondiff_argnums=(0, 1))
def _total(spec: Spec, own: bool, inputs: Inputs) -> Array:
    """What all classes cost, or those of this device alone; times the row's weight, if it is given."""

    def step(parts: tuple[Inputs, ...], _: Any, rows: Any, start: Any) -> Array:
        return _block(spec, start, parts[0])

    return add_up((spec,), (inputs,), ({},), (), step, own)


@partial(_total.defjvp, symbolic_zeros=True)
def _(spec: Spec, own: bool, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (inputs,) = primals
    varying = not_zero(tangents[0])

    def step(parts: tuple[Inputs, ...], dparts: tuple[Inputs, ...], rows: Any, start: Any) -> Array:
        return along(partial(_block, spec, start), parts[0], dparts[0], *dparts[0])[1]

    return _total(spec, own, inputs), add_up((spec,), (inputs,), (varying,), (), step, own)
