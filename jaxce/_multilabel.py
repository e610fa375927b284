r"""One yes-or-no question for each class, few of them answered with yes: the classes that a row lists.

The loss of a row is a sum over the classes of terms that know nothing of each other, so that a pass needs no state of the
row, and a block of classes can be forgotten once its terms are added up. Whether a class is listed is found in the pass:
what a listed class costs, :math:`\log(1 + e^{-x})`, is never a difference of what all classes cost and of logits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jaxce import _checks
from jaxce._checks import ArrayLike, Axis, compiled
from jaxce._inputs import Inputs, Spec, on_each_device, read_logits
from jaxce._logits import AnyLogits
from jaxce._passes import add_up, along, block_of, by_rows, logits_of, masked
from jaxce._rules import custom_jvp
from jaxce._sigmoid import binary_loss
from jaxce._state import beside


@compiled("axis")
def sigmoid_binary_cross_entropy_with_sparse_labels(
    logits: AnyLogits,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    pos_weight: ArrayLike | None = None,
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

    No term is negative (for weights that add up to at most 1) and none is a difference: each is as exact as that of
    `sigmoid_binary_cross_entropy`, as is each entry of a gradient. With `LinearLogits` neither value nor gradient needs
    memory for more than a block of logits. One pass compares each class with all labels of its row.

    Args:
      logits: log-odds, of shape [..., classes], an array, `LinearLogits` or `ShardedLogits`.
      labels: integer classes, of shape [..., k], -1 where there are fewer than k.
      weights: the share of yes that each label stands for, usually in [0, 1], of the shape of the labels; None for 1.
      axis: the class axis, or several; labels then count the classes of the flattened axes.
      where: which rows take part (a mask of the batch shape) or which entries (one with as many axes as the logits).
      pos_weight: weight of the positive class, a number or one for each class; PyTorch's meaning.

    Returns:
      Losses of the batch shape, float32 for half-precision logits and the logits' dtype otherwise.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> logits = jnp.array([[2.0, -1.0, 0.5, -60.0], [40.0, -45.0, -45.0, 50.0]])
      >>> labels = jnp.array([[0, 2], [3, 0]])
      >>> print(jaxce.sigmoid_binary_cross_entropy_with_sparse_labels(logits, labels))
      [9.142667e-01 4.305797e-18]

    References:
      Zhai et al., Sigmoid Loss for Language Image Pre-Training, https://arxiv.org/abs/2303.15343.
    """
    y = _checks.integer("labels", labels)
    w = jnp.ones(y.shape, jnp.float32) if weights is None else _checks.real("weights", weights)
    z = read_logits("logits", logits, axis, where, *(() if weights is None else (w,)))
    padding = (y < 0) & (y == -1)  # as an unsigned integer -1 would be another number
    z = z.with_shares(jnp.where(padding, 0, y), w).having(listed=~padding)
    if pos_weight is not None:
        factor = _checks.real("pos_weight", pos_weight, z.dtype)
        _checks.scalar_or("pos_weight", factor, (z.spec.classes,), "one number per class")
        z = z.having(weights=jnp.broadcast_to(factor, (z.spec.classes,)))
    return on_each_device(partial(_losses, weights is not None), (z,))


def _losses(weighted: bool, specs: tuple[Spec], given: tuple[Inputs]) -> Array:
    (spec,), (inputs,) = specs, given
    shares = jnp.where(inputs["listed"], inputs["shares"], 0)
    known = ~jnp.isnan(shares).any(-1)
    # Without weights a class counts once, however often it is listed.
    labels = {"shares": shares} if weighted else {"chosen": jnp.where(shares == 1, inputs["chosen"], -1)}
    inputs = {name: x for name, x in inputs.items() if name not in ("listed", "shares")} | labels
    total = by_rows(spec.chunks, (inputs,), partial(_total, spec))
    return total * jnp.where(known, 1, np.nan).astype(spec.dtype)


def _block(spec: Spec, start: Any, part: Inputs) -> Array:
    """What the classes of a block cost."""
    x = logits_of(spec, part).astype(spec.dtype)
    block = block_of(spec, part, start, x)
    weight = None if block.weights is None else jnp.broadcast_to(block.weights.astype(spec.dtype), x.shape)
    if block.targets is None:
        yes = block.places < 0
        for j in range(part["chosen"].shape[-1]):
            yes |= block.places == beside(part["chosen"][..., j], x)
    else:
        yes = block.targets.astype(spec.dtype)
    return jnp.sum(masked(part, binary_loss(x, yes, weight), 0), -1)


@partial(custom_jvp, nondiff_argnums=(0,))
def _total(spec: Spec, inputs: Inputs) -> Array:
    """What all classes cost."""

    def step(parts: tuple[Inputs, ...], _: Any, rows: Any, start: Any) -> Array:
        return _block(spec, start, parts[0])

    return add_up((spec,), (inputs,), ({},), (), step)


@partial(_total.defjvp, symbolic_zeros=True)
def _(spec: Spec, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (inputs,) = primals
    varying = {name: t for name, t in tangents[0].items() if not isinstance(t, SymbolicZero)}

    def step(parts: tuple[Inputs, ...], dparts: tuple[Inputs, ...], rows: Any, start: Any) -> Array:
        return along(partial(_block, spec, start), parts[0], dparts[0], *dparts[0])[1]

    return _total(spec, inputs), add_up((spec,), (inputs,), (varying,), (), step)
