r"""The mean loss of `LinearLogits` with its gradient from three matrix products.

A loss per example can be weighted by anything before it is differentiated, so its derivative has to compute the logits
again: with gradients that is four products of the size of the logits for each example, class and feature. For a mean with
known weights three are enough. A chunk of examples at a time, one pass computes the logits of all classes and keeps

.. math:: E = e^{X - r}, \qquad X = h W^\top, \quad s = \sum_k E_{\cdot k} ,

where r is a number of each row, so that E is made before the maximum is known; then both gradients are products of E and of
numbers of the rows: :math:`\nabla_h = c \, (E' W)` and :math:`\nabla_W = E'^\top (c h)` with :math:`c = w / s` and the
label's entry put right. A TPU makes the pass one kernel: logits never reach its memory, and E does in bfloat16.

r is the maximum over some of the classes. Where it turns out to be too far from the maximum of all, which is rare, the pass
is repeated with that. Second derivatives are those of the loss by blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType

from jaxce import _checks, _mesh, _platforms
from jaxce._checks import NUMBERS, SHARES, ArrayLike, AxisName, compiled
from jaxce._inputs import OF_ROWS, Inputs, Spec, demand_linear, has_rows, on_each_device, read_logits, with_temperatures
from jaxce._logits import LinearLogits, is_half, product, shape_logits
from jaxce._reduction import weighted_mean
from jaxce._rules import custom_jvp, largest, no_tangents, not_zero
from jaxce._softmax import softmax_cross_entropy_with_integer_labels
from jaxce._statistics import logsumexp

_EXAMPLES = 512
"""How many examples a chunk has at least. By default it has as many as there are features: each chunk reads and writes the
gradient of the whole kernel, than which its own logits then aren't smaller."""

_EXAMPLES_ON_TPU = 8192
"""How many it has on a TPU, which is fastest where the hidden states of a chunk fill what memory the chip has."""

_FIRST, _EVERY = 2048, 63
"""How many of the first classes, and every how many of all, are looked at for a number near the maximum of a row."""

_FAR = 2.0**90
"""How far from 1 the sum of a row's exponentials may be before they are taken again, relative to the maximum itself."""


@overload
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
    has_aux: Literal[False] = False,
) -> Array: ...


@overload
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
    has_aux: Literal[True],
) -> tuple[Array, tuple[Array, Array]]: ...


@compiled("chunk_size", "has_aux", label_smoothing=SHARES, z_loss=NUMBERS)
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
    has_aux: bool = False,
) -> Any:
    r"""Weighted mean of the cross-entropy between integer labels and `LinearLogits`, with gradients from three products.

    .. math:: \frac{\sum_i w_i \ell_i}{\sum_i w_i}, \qquad 0 \text{ where the denominator is } 0,

    with :math:`\ell_i` of `softmax_cross_entropy_with_integer_labels`. It is
    ``weighted_mean(softmax_cross_entropy_with_integer_labels(logits, labels, where=weights != 0), weights)`` in value
    and derivatives of any order, in forward and in reverse mode. Where a gradient is asked for, the logits are computed
    once rather than twice: three matrix products in place of four, for the memory of a chunk of examples with all their
    classes, in bfloat16 where hidden and kernel are, in place of a block. Without a gradient it takes no more than the
    losses. With ``label_smoothing`` it is those losses, with four products: what smoothing subtracts can be nearly all
    of a derivative, which would lose its digits if it were subtracted afterwards.

    A row of weight 0 takes no part, whatever it holds: its loss is 0, and so is the gradient of its hidden states. So for a
    padding label of -100 give ``weights=labels != -100``. Nor does it take time where a gradient is asked for: rows that
    count are moved to the front, and only as many chunks are computed as they fill.

    On a mesh a chunk has examples of each device, and each sums its own part of the kernel's gradient; the devices'
    parts meet once, after all chunks, on a mesh with explicit axis types and inside of `jax.shard_map`, where the
    classes may be sharded too. With automatic axis types XLA does as much for TPU and GPU, and sums parts in float32;
    for a CPU it sums after each chunk. Inside `jax.shard_map` it is the mean of this device's examples. That of all
    devices is ``lax.psum(linear_cross_entropy(logits, labels, w, normalizer=lax.psum(w.sum(), axis_name)), axis_name)``.
    In half precision the kernel's gradient is summed in float32.

    Args:
      logits: `LinearLogits` of shape [..., classes].
      labels: integer classes, of the shape of the logits without the classes.
      weights: booleans, integers or floating point, of the shape of the labels.
      label_smoothing: the share in [0, 1] that is spread evenly over the classes; a number, or one for each example.
      class_weights: one number per class, by which its part of the loss is multiplied.
      z_loss: the factor of the squared log-normalizer; a number, or one for each example.
      normalizer: a number to divide by in place of the sum of the weights, say that of all micro-batches.
      chunk_size: how many examples at a time, of each device, where a gradient is formed. By default 8192 on a TPU, and
        elsewhere as many as there are features, and at least 512.
      has_aux: whether to return the losses and log-normalizers of the examples, too.

    Returns:
      A number, in the dtype of the logits and at least float32. With ``has_aux`` a pair of it and of two arrays of the
      shape of the labels, as `jax.value_and_grad` takes it with its own ``has_aux``: each example's loss and its
      log-normalizer :math:`\operatorname{logsumexp}(x)`, both 0 where the weight is 0, and without derivatives. They cost
      nothing where the gradient takes three products, and one more product with ``label_smoothing``.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> def loss(hidden, kernel):
      ...     return jaxce.linear_cross_entropy(jaxce.LinearLogits(hidden, kernel), jnp.array([0, 4, -100]),
      ...                                       jnp.array([True, True, False]), has_aux=True)
      >>> (value, (losses, log_normalizers)), gradient = jax.value_and_grad(loss, has_aux=True)(
      ...     jnp.ones((3, 2)), jnp.ones((2, 5)))
      >>> print(value, losses, log_normalizers)
      1.60944 [1.60944 1.60944 0. ] [3.60944 3.60944 0. ]

    References:
      Hsu et al., Liger Kernel, https://arxiv.org/abs/2410.10989, section 3.2.
    """
    demand_linear(logits)
    z = read_logits("logits", logits).with_labels(labels).with_weights(class_weights)
    y = z.inputs["labels"]
    w = jnp.ones(y.shape, z.dtype) if weights is None else _checks.real("weights", weights, z.dtype).astype(z.dtype)
    _checks.same_shape("weights", w, y.shape, "the shape of the labels")
    if chunk_size is not None:
        chunk_size = _checks.positive_integer("chunk_size", chunk_size, "None or a positive integer")
    if not isinstance(has_aux, bool):
        raise _checks.ArgumentTypeError(f"has_aux must be True or False, got {has_aux!r}")

    z = z.having(example_weights=w, **({} if weights is None else {"rows": w != 0}))
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    z = z.having(**{name: z.of_rows(name, value) for name, value in options.items() if value is not None})
    total, aux = on_each_device(partial(_total, chunk_size, has_aux), (z,), results=("total", "rows"))
    weight = jnp.sum(w) if normalizer is None else _checks.real("normalizer", normalizer, z.dtype).astype(z.dtype)
    mean = weighted_mean(total, normalizer=weight)
    return (mean, aux) if has_aux else mean


def _total(chunk_size: int | None, has_aux: bool, specs: tuple[Spec], given: tuple[Inputs]) -> tuple[Array, Aux | None]:
    """The weighted sum of the losses, and what is told of each example."""
    (spec,), (own,) = specs, given
    labels = jnp.where(own["rows"], own["labels"], 0) if "rows" in own else own["labels"]
    inputs = {name: x for name, x in own.items() if name not in ("labels", "rows")}
    inputs = {name: x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(spec.dtype) for name, x in inputs.items()}
    options = _Options(chunk_size, spec.class_axis, spec.block_size, spec.axis_name, has_aux, "rows" not in own)
    by_blocks = "label_smoothing" in inputs
    rows = _axes_of_rows(labels.shape, options.all_count or by_blocks)
    for name, x in inputs.items():
        if name in OF_ROWS and x.ndim == labels.ndim + OF_ROWS[name]:
            inputs[name] = x.reshape(*rows, *x.shape[labels.ndim :])
    inputs = _mesh.vary(inputs, _mesh.varying(inputs, labels))
    total, aux = (_sum_by_blocks if by_blocks else _weighted_sum)(options, labels.reshape(rows), inputs)
    if spec.axis_name is not None:
        first = lax.axis_index(spec.axis_name) == 0  # all devices know the same of an example
        total, aux = lax.psum((total, jax.tree.map(lambda x: jnp.where(first, x, 0), aux)), spec.axis_name)
    return total, jax.tree.map(lambda x: x.reshape(labels.shape), aux)


def _axes_of_rows(batch: tuple[int, ...], in_order: bool) -> tuple[int, ...]:
    """All axes of the batch as one, unless a mesh with automatic axis types may shard several of them.

    XLA would gather all but the first of these to merge them. Where rows that count come first, axes are merged all the
    same if the first can be shared by all devices: whole sequences let more chunks be left out than parts of them.
    """
    devices = _mesh.devices(AxisType.Auto)
    if len(batch) < 2 or devices == 1 or (batch[0] % devices == 0 and not in_order):
        return (math.prod(batch),)
    return batch


class _Options(NamedTuple):
    chunk_size: int | None
    class_axis: int
    block_size: int | None
    axis_name: AxisName | None
    has_aux: bool
    all_count: bool  # whether no weights were given


# What the loss is differentiated by are `Inputs` whose examples have the axes of `_axes_of_rows`.

Aux = tuple[Array, Array]
"""The loss and the log-normalizer of each example, 0 where its weight is."""

# Where devices share the classes each knows the losses, and the sum of the devices' equal shares of them is what is
# differentiated: by inputs that count as different on each device, so that a gradient is the part that a device's classes
# have in it. The sum over devices comes last, once.


def _share(options: _Options, x: Array) -> Array:
    """A device's share of what all devices that share the classes know."""
    name = options.axis_name
    if name is None:
        return x
    count = lax.axis_size(name) + 0 * lax.axis_index(name)  # a number of each device, also of those of a vmap
    return x / count.astype(x.dtype)


def _sum_by_blocks(options: _Options, labels: Array, inputs: Inputs) -> tuple[Array, Aux | None]:
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
    modifiers: Any = {name: inputs[name] for name in ("label_smoothing", "z_loss") if name in inputs}
    weights = inputs["example_weights"]

    def counted(x: Array) -> Array:
        return jnp.where(weights == 0, 0, x)

    losses = counted(
        softmax_cross_entropy_with_integer_labels(logits, labels, class_weights=inputs.get("weights"), **modifiers)
    )
    aux = lax.stop_gradient((losses, counted(logsumexp(logits)))) if options.has_aux else None
    return _share(options, jnp.sum(weights * losses)), aux


@partial(custom_jvp, nondiff_argnums=(0,))
def _weighted_sum(options: _Options, labels: Array, inputs: Inputs) -> tuple[Array, Aux | None]:
    return _sum_by_blocks(options, labels, inputs)


@partial(_weighted_sum.defjvp, symbolic_zeros=True)
def _(options: _Options, primals: Any, tangents: Any) -> Any:
    labels, inputs = primals
    varying = not_zero(tangents[1])
    total, gradient, aux = _sum_and_gradient(options, tuple(varying), labels, inputs)
    terms = (jnp.sum(gradient[name] * varying[name].astype(total.dtype)) for name in varying)
    return (total, aux), (sum(terms, jnp.zeros_like(total)), no_tangents(aux))


@partial(custom_jvp, nondiff_argnums=(0, 1))
def _sum_and_gradient(
    options: _Options, names: tuple[str, ...], labels: Array, inputs: Inputs
) -> tuple[Array, Inputs, Aux | None]:
    """The sum and its derivatives by the inputs with these names, in the dtype of the logits."""
    rows, features = labels.size, inputs["hidden"].shape[-1]

    known = rows if isinstance(rows, int) else 1  # unlike the symbolic sizes of jax.export

    def in_chunks(size: int) -> int:
        return max(1, -(-known // (size * _mesh.devices(AxisType.Auto))))

    sizes = (options.chunk_size,) * 2 if options.chunk_size else (_EXAMPLES_ON_TPU, max(_EXAMPLES, features))
    on_tpu, elsewhere = map(in_chunks, sizes)
    ways = [partial(_by_chunks, options, names, chunks) for chunks in (on_tpu, elsewhere)]
    return ways[0](labels, inputs) if on_tpu == elsewhere else _platforms.on_tpu(*ways, labels, inputs)


@partial(_sum_and_gradient.defjvp, symbolic_zeros=True)
def _(options: _Options, names: tuple[str, ...], primals: Any, tangents: Any) -> Any:
    labels, inputs = primals
    varying = not_zero(tangents[1])

    def by_blocks(some: Inputs) -> tuple[Array, Inputs]:
        def value(differentiated: Inputs) -> Array:
            return _sum_by_blocks(options._replace(has_aux=False), labels, inputs | some | differentiated)[0]

        total, gradient = jax.value_and_grad(value)({name: (inputs | some)[name] for name in names})
        return total, {name: g.astype(total.dtype) for name, g in gradient.items()}

    out = _sum_and_gradient(options, names, labels, inputs)
    tangent = jax.jvp(by_blocks, ({name: inputs[name] for name in varying},), (varying,))[1]
    return out, (*tangent, no_tangents(out[2]))


# --- chunks of the rows that count ------------------------------------------------------------------------------------


def _by_chunks(
    options: _Options, names: tuple[str, ...], chunks: int, labels: Array, inputs: Inputs
) -> tuple[Array, Inputs, Aux | None]:
    """The sum, a chunk of rows at a time. Rows that count come first, and the loop turns as often as they fill chunks.

    The last axis of rows is seen as groups, as many as devices of a mesh with automatic axis types may share it: a chunk
    has as many rows of each, so that no device needs another's.
    """
    if chunks == 1:
        return _chunk(options, names, labels, inputs)
    (*outer, rows), dtype = labels.shape, inputs["example_weights"].dtype
    groups = _mesh.strips(rows) if outer else math.gcd(rows, _mesh.devices(AxisType.Auto))
    length = rows // groups
    size = -(-length // chunks)
    axis = len(outer) + 1  # of the length
    given = {"labels": labels} | inputs
    of_rows = {n: x.reshape(*outer, groups, length, *x.shape[axis:]) for n, x in given.items() if has_rows(n, x)}
    counts = None if options.all_count else of_rows["example_weights"] != 0
    turns, ordered_of, restored = _order(counts, axis, length, size, chunks)
    ordered = {name: ordered_of(x) for name, x in of_rows.items()}

    def cut(i: Array, x: Array) -> Array:
        part = lax.dynamic_slice_in_dim(x, i * size, size, axis)
        return part.reshape(*outer, groups * size, *x.shape[axis + 1 :])

    def put(i: Array, whole: Array, x: Array) -> Array:
        part = x.reshape(*outer, groups, size, *x.shape[axis:])
        return lax.dynamic_update_slice_in_dim(whole, part, i * size, axis)

    def turn(i: Array, state: Any) -> Any:
        total, sums, found = state
        part = {name: cut(i, x) for name, x in ordered.items()}
        value, gradient, aux = _chunk(options, names, part.pop("labels"), inputs | part)
        sums = {name: sums[name] + gradient[name] for name in sums}
        of_examples = {name: aux if name == "aux" else gradient[name] for name in found}
        return _mesh.vary((total + value, sums, jax.tree.map(partial(put, i), found, of_examples)), varying)

    def zeros(*shape: int) -> Array:
        return jnp.zeros(shape, dtype)

    found: dict[str, Any] = {name: zeros(*ordered[name].shape) for name in names if name in ordered}
    sums = {name: zeros(*inputs[name].shape) for name in names if name not in found}
    if options.has_aux:
        found["aux"] = (zeros(*outer, groups, size * chunks),) * 2
    varying = _mesh.varying(labels, inputs)
    start = _mesh.vary((zeros(), sums, found), varying)
    total, sums, found = lax.fori_loop(0, turns, turn, start)
    found = jax.tree.map(lambda x: restored(x).reshape(*labels.shape, *x.shape[axis + 1 :]), found)
    aux = found.pop("aux", None)
    return total, sums | found, aux


Reorder = Callable[[Array], Array]


def _order(counts: Array | None, axis: int, length: int, size: int, chunks: int) -> tuple[Any, Reorder, Reorder]:
    """How often the loop turns; and how rows of groups, [..., groups, length, ...], come into its chunks, and back."""
    if counts is None:

        def fill_up(x: Array) -> Array:
            return jnp.pad(x, [(0, size * chunks - length if a == axis else 0) for a in range(x.ndim)])

        return chunks, fill_up, lambda x: lax.slice_in_dim(x, 0, length, axis=axis)
    # By sums and a scatter of integers: a sort takes a TPU's compiler a minute.
    index = jnp.arange(length, dtype=jnp.int32)
    rank = jnp.cumsum(counts, axis, dtype=jnp.int32)
    places = jnp.where(counts, rank - 1, rank[..., -1:] + lax.broadcasted_iota(jnp.int32, rank.shape, axis) - rank)
    nowhere = jnp.full(size * chunks, length, jnp.int32)

    def of_groups(function: Callable[..., Array]) -> Callable[..., Array]:
        return reduce(lambda f, _: jax.vmap(f), range(axis), function)

    order = of_groups(lambda p: nowhere.at[p].set(index, unique_indices=True))(places)

    def take(places: Array, x: Array) -> Array:
        return of_groups(lambda x, p: jnp.take(x, p, axis=0, mode="fill", fill_value=0))(x, places)

    return _most(jnp.max(-(-rank[..., -1] // size))), partial(take, order), partial(take, places)


@jax.custom_batching.custom_vmap
def _most(turns: Array) -> Array:
    """How often a loop turns; under `jax.vmap` as often as for the most: else it would select from all that it changes."""
    return turns


@_most.def_vmap
def _(size: int, in_batched: Any, turns: Array) -> Any:
    return _most(jnp.max(turns, initial=0)), False


# --- one chunk --------------------------------------------------------------------------------------------------------

# The exponentials of a row are relative to a number r that is nearly its maximum. With e_k = exp(x_k - r) for all classes
# but the label y, s their sum and t = s + e_y, the loss v nll + z lse^2 of weight w has the derivatives by the products u
#
#     c e_k dx_k/du_k       where c = w f / t and f = v + 2 z lse, numbers of the row, and at the label
#     c a dx_y/du_y         where a = (2 z lse e_y - v s) / f, in which nothing cancels.
#
# So one array of e_k dx_k/du_k, with the label's entry put in, makes all gradients.


class _Labels(NamedTuple):
    """Where the labels are, for a device that may have a part of the classes."""

    place: Array  # among the classes of this device
    here: Array  # whether it is one of these
    valid: Array  # whether it is one of any device's: -1 is none


class _Pass(NamedTuple):
    """What a pass over the classes tells of each row."""

    kept: Array | None  # e_k dx_k/du_k
    others: Array  # s
    label: Array  # u_y
    slopes: dict[str, Array]  # the sums of e_k dx_k/dn for numbers n, of this device's classes


class _Rows(NamedTuple):
    """Numbers of the rows, for the gradients: those in the comment above, and what a loss is made of."""

    takes_part: Array  # whether the row counts and has a class
    coefficient: Array  # c
    entry: Array  # a
    nll: Array
    log_normalizer: Array
    loss: Array


def _chunk(
    options: _Options, names: tuple[str, ...], labels: Array, inputs: Inputs
) -> tuple[Array, Inputs, Aux | None]:
    """The sum over some rows, and its derivatives, from three products."""
    inputs = with_temperatures(inputs, inputs["example_weights"] != 0)  # that of rows that fill a chunk is 0
    at = _labels(options, labels, inputs)
    found, r = _pass_near_the_maximum(options, names, at, inputs)
    rows = _rows(options, at, inputs, found, r)
    gradient = _gradient(options, names, at, inputs, found, rows)
    aux = None
    if options.has_aux:
        log_normalizer = jnp.where(rows.takes_part, rows.log_normalizer, -jnp.inf)
        aux = rows.loss, jnp.where(inputs["example_weights"] == 0, 0, log_normalizer)
    return _share(options, jnp.sum(inputs["example_weights"] * rows.loss)), gradient, aux


def _everywhere(options: _Options, x: Any) -> Any:
    """The sum over the devices that share the classes."""
    return x if options.axis_name is None else lax.psum(x, options.axis_name)


def _labels(options: _Options, labels: Array, inputs: Inputs) -> _Labels:
    place, classes = labels, inputs["kernel"].shape[options.class_axis]
    if options.axis_name is not None:
        place = labels - classes * lax.axis_index(options.axis_name).astype(labels.dtype)
    return _Labels(place, (place >= 0) & (place < classes), labels >= 0)


def _pass_near_the_maximum(
    options: _Options, names: tuple[str, ...], at: _Labels, inputs: Inputs
) -> tuple[_Pass, Array]:
    """A pass, and the numbers that its exponentials are relative to."""
    counts, varying = inputs["example_weights"] != 0, _mesh.varying(at, inputs)

    def relative_to(maximum: Array) -> tuple[_Pass, Array]:
        if options.axis_name is not None:
            maximum = lax.pmax(maximum, options.axis_name)
        # A whole number, as the difference from logits above it is exact; 0 of a row without classes. The exponentials of
        # a row that doesn't count are all 0.
        r = jnp.where(jnp.isneginf(maximum), 0, jnp.floor(maximum))
        r = jnp.where(counts, r, largest(r))
        # Without the barrier the maximum and the pass would share a product, in memory, of all classes and some again.
        r, hidden = lax.optimization_barrier((r, inputs["hidden"]))
        found = _pass(options, names, at.place, inputs | {"hidden": hidden}, r)
        others, label = _everywhere(options, (found.others, found.label))
        return _mesh.vary((found._replace(others=others, label=label), r), varying)

    def is_far(found: _Pass, r: Array) -> Array:
        total = found.others + jnp.exp(_logits(inputs, found.label) - r)
        far = jnp.any(counts & ((total >= _FAR) | (total <= 1 / _FAR)))
        return _mesh.vary(_most(_everywhere(options, far.astype(jnp.int32))) > 0, varying)

    def again(state: Any) -> Any:
        return *relative_to(_maximum(options, inputs)), state[2] & False

    found, r = relative_to(_maximum_of_some(options, inputs))
    found, r, _ = lax.while_loop(lambda state: state[2], again, (found, r, is_far(found, r)))
    return found, r


def _rows(options: _Options, at: _Labels, inputs: Inputs, found: _Pass, r: Array) -> _Rows:
    weights, x = inputs["example_weights"], _logits(inputs, found.label)
    dtype, gap = weights.dtype, x - r
    own = jnp.exp(gap)
    total = found.others + own
    takes_part = (weights != 0) & (total != 0)
    total = jnp.where(takes_part, total, 1)
    near = gap >= -20  # where the exponential of the gap and the others' sum can be far apart
    ratio = found.others * jnp.exp(-jnp.maximum(gap, -20))
    nll = jnp.where(near, lax.log1p(ratio, accuracy=lax.AccuracyMode.HIGHEST), jnp.log(total) - gap)
    log_normalizer = jnp.where(near, x, r) + jnp.where(near, nll, jnp.log(total))
    log_normalizer = jnp.where(takes_part, log_normalizer, 0)

    class_weight = jnp.ones_like(weights)
    if "weights" in inputs:
        taken = jnp.take(inputs["weights"].astype(dtype), at.place, mode="clip")
        class_weight = _everywhere(options, jnp.where(at.here, taken, 0))
    class_weight = jnp.where(at.valid, class_weight, jnp.nan)
    nll = jnp.where((class_weight == 0) & jnp.isposinf(nll), 0, nll)
    loss, factor, entry = class_weight * nll, class_weight, -found.others
    if "z_loss" in inputs:
        z = inputs["z_loss"].astype(dtype)
        loss += z * log_normalizer**2
        slope = 2 * z * log_normalizer
        factor = class_weight + slope
        # A factor that isn't 0, by which the entry is divided.
        least = jnp.finfo(dtype).eps * (1 + jnp.abs(class_weight))
        factor = jnp.where(jnp.abs(factor) < least, least, factor)
        entry = (slope * own - class_weight * found.others) / factor
    coefficient = jnp.where(takes_part, weights * factor / total, 0)
    return _Rows(takes_part, coefficient, entry, nll, log_normalizer, jnp.where(takes_part, loss, 0))


def _gradient(
    options: _Options, names: tuple[str, ...], at: _Labels, inputs: Inputs, found: _Pass, rows: _Rows
) -> Inputs:
    kernel, weights, class_axis = inputs["kernel"], inputs["example_weights"], options.class_axis % 2
    dtype, gradient = weights.dtype, {}

    def total(name: str, x: Array) -> Array:
        x = jnp.where(rows.takes_part, x, 0)
        return x if has_rows(name, inputs[name]) else jnp.sum(x)

    if found.kept is not None:
        entry = (rows.entry * _slope(inputs, found.label, "products")).astype(found.kept.dtype)
        g = _platforms.with_entries(found.kept, at.place, entry)

        def multiply(a: Array, b: Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...]) -> Array:
            a, b = a.astype(g.dtype), b.astype(g.dtype)
            return lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=dtype)

        axes = tuple(range(at.place.ndim))
        if "hidden" in names:
            gradient["hidden"] = multiply(g, kernel, (g.ndim - 1,), (class_axis,)) * rows.coefficient[..., None]
        if "kernel" in names:
            # Without the barrier a TPU would make it again for each part of the product.
            h = lax.optimization_barrier((inputs["hidden"].astype(dtype) * rows.coefficient[..., None]).astype(g.dtype))
            gradient["kernel"] = multiply(*((h, g) if class_axis == 1 else (g, h)), axes, axes)
        if "bias" in names:
            parts = [rows.coefficient.astype(g.dtype)]
            if g.dtype != dtype:  # two parts, as one has too few digits: a product is faster than a sum
                parts.append((rows.coefficient - parts[0].astype(dtype)).astype(g.dtype))
            gradient["bias"] = jnp.sum(multiply(jnp.stack(parts), g, tuple(a + 1 for a in axes), axes), 0)
    for name, others in found.slopes.items():
        of_label = jnp.where(at.here, rows.entry * _slope(inputs, found.label, name), 0)
        gradient[name] = total(name, rows.coefficient * (others + of_label))
    if "example_weights" in names:
        gradient["example_weights"] = _share(options, rows.loss)
    if "z_loss" in names:
        gradient["z_loss"] = _share(options, total("z_loss", weights * rows.log_normalizer**2))
    if "weights" in names:
        zeros = jnp.zeros(inputs["weights"].shape, dtype)
        place = jnp.where(at.here, at.place, zeros.size)  # as a negative index would count from the end
        gradient["weights"] = zeros.at[place].add(jnp.where(rows.takes_part, weights * rows.nll, 0), mode="drop")
    return gradient


def _pass(options: _Options, names: tuple[str, ...], place: Array, inputs: Inputs, r: Array) -> _Pass:
    u = _products(options, inputs)
    is_label = lax.broadcasted_iota(place.dtype, u.shape, u.ndim - 1) == place[..., None]
    e = jnp.where(is_label, 0, jnp.exp(_logits(inputs, u) - r[..., None]))
    kept = None
    if not {"hidden", "kernel", "bias"}.isdisjoint(names):
        half = is_half(inputs["hidden"], inputs["kernel"])
        kept = (e * _slope(inputs, u, "products")).astype(jnp.bfloat16 if half else e.dtype)
    slopes = {name: jnp.sum(e * _slope(inputs, u, name), -1) for name in ("temperature", "soft_cap") if name in names}
    # The barrier makes one array of what is kept, which XLA would else compute again for each product.
    return lax.optimization_barrier(_Pass(kept, jnp.sum(e, -1), jnp.sum(jnp.where(is_label, u, 0), -1), slopes))


def _products(options: _Options, inputs: Inputs) -> Array:
    hidden, kernel, dtype = inputs["hidden"], inputs["kernel"], inputs["example_weights"].dtype
    u = product(hidden, kernel, options.class_axis, is_half(hidden, kernel)).astype(dtype)
    if "bias" not in inputs:
        return u
    bias = jnp.minimum(inputs["bias"].astype(u.dtype), largest(u))
    return u + jnp.expand_dims(bias, range(u.ndim - 1))


def _logits(inputs: Inputs, products: Array) -> Array:
    """The logits of products; an infinite one counts as the largest number."""
    x = shape_logits(products, inputs.get("temperature"), inputs.get("soft_cap"))
    return jnp.minimum(x, largest(x))


def _slope(inputs: Inputs, products: Array, name: str) -> Array:
    """The derivative of the logits by the "products", the "temperature" or the "soft_cap"."""

    def logits(x: Array) -> Array:
        given = inputs | {"products": products} | {name: x}
        return shape_logits(given["products"], given.get("temperature"), given.get("soft_cap"))

    x = products if name == "products" else inputs[name]
    return jax.jvp(logits, (x,), (jnp.ones_like(x),))[1]


def _maximum(options: _Options, inputs: Inputs) -> Array:
    return jnp.max(_logits(inputs, _products(options, inputs)), -1)


def _maximum_of_some(options: _Options, inputs: Inputs) -> Array:
    """The largest logit of the first classes and of some of all, of each strip of classes alike."""
    classes, class_axis = inputs["kernel"].shape[options.class_axis], options.class_axis % 2
    strips = _mesh.strips(classes)
    length = classes // strips
    size = max(1, min(_FIRST, classes // 16) // strips)

    def cut(name: str, x: Array, *part: int) -> Array:
        axis = {"kernel": class_axis, "bias": 0}.get(name)
        if axis is None:
            return x
        seen = x.reshape(*x.shape[:axis], strips, length, *x.shape[axis + 1 :])
        seen = lax.slice_in_dim(seen, *part, axis=axis + 1)
        return lax.collapse(seen, axis, axis + 2)

    parts = (0, size), (0, length, _EVERY)
    return jnp.maximum(*(_maximum(options, {n: cut(n, x, *part) for n, x in inputs.items()}) for part in parts))
