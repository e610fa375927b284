r"""Softmax losses of all pairs of two sides, in both directions, without an array of all pairs.

A row's loss is a softmax over the columns, a column's one over the rows. Both are made of sums over the tiles of the array,
each computed, used and forgotten: for each line, a row or a column, with a shift, over its pairs that are no positives,

.. math:: S = \sum_k e^{x_k - \text{shift}} .

With one positive, of logit y, its loss is :math:`\log(1 + e^z)` with :math:`z = \log S + \text{shift} - y`. So a confident
pair loses no digits, nor do its derivatives. With several positives there is a sum of their exponentials, too.

The shift is known before the pass: it is the positive's own logit, from a product of its own. So a TPU makes one kernel of
the product and all sums, which it doesn't of a maximum followed by a sum. Only where S is too large for that, as another
pair is far more likely, are the sums taken again, relative to the maximum. Losses don't depend on shifts, so their
derivatives are those of the sums at fixed shifts: JAX's own, one tile at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxce import _checks, _mesh
from jaxce._checks import ArrayLike, AxisName, compiled
from jaxce._inputs import Inputs, Logits, Spec, factors, read_logits, rows_of_a_device
from jaxce._logits import LinearLogits, ShardedLogits, shape_logits
from jaxce._measures import replaced
from jaxce._passes import join_rows, logits_of, split_rows
from jaxce._rules import custom_jvp, largest, no_tangents, not_zero
from jaxce._sigmoid import softplus

_ROWS, _COLUMNS, _PAIRS = 1 << 14, 1 << 8, 1 << 24
"""How many rows of each device a tile has at most, how many columns at least, and how many pairs at most, which a TPU keeps
on the chip. A CPU wants fewer: so the columns are cut into sixteen blocks, unless these were too small or too large. A mesh
in use has as few blocks as can be: a device has few rows of all, and with automatic axes XLA adds up in each turn of a loop
what the devices find in it."""

_FAR = 2.0**90
"""How large a sum may be before its exponentials are taken again, relative to the maximum."""

_NEAR = 30
"""How near to the shift a positive must be for its exponential to be a factor of others, whose sum may be `_FAR`."""


@compiled("positives", "exclude_self", "axis_name")
def softmax_cross_entropy_of_pairs(
    logits: ArrayLike | LinearLogits,
    labels: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    class_groups: ArrayLike | None = None,
    positives: Literal["label", "group"] = "label",
    exclude_self: bool = False,
    axis_name: AxisName | None = None,
) -> tuple[Array, Array]:
    r"""Contrastive cross-entropy of all pairs of rows and columns, by rows and by columns, in nats.

    For the positives :math:`P_i` of row i, among the columns :math:`A_i` that it is compared with,

    .. math:: \ell_i = \frac{1}{|P_i|} \sum_{p \in P_i} -\log \frac{e^{x_{ip}}}{\sum_{k \in A_i} e^{x_{ik}}} ,

    and the loss of a column is the same of the transposed logits. Row i's only positive is column i, or ``labels[i]``. The
    mean over rows is InfoNCE, or in-batch softmax; the mean of the means over rows and over columns is CLIP's loss; with
    ``positives="group"`` and ``exclude_self=True`` it is SupCon. Under ``jax.jit`` losses that aren't used cost nothing.

    With `LinearLogits` of both sides' embeddings neither all pairs nor a mask of them are ever in memory, also not for
    derivatives. Their temperature divides the product and their bias. ``logits + b`` adds one number per column after
    that, such as :math:`-\log q` of a column that was sampled with probability q. Columns beyond the rows are further
    negatives.

    A row or column that takes no part, or that has no positive, has loss 0 and gradient 0. So average the columns' losses
    over those that have a positive. The loss of a row whose label is left out by ``class_where`` is +inf, and that of a row
    whose label is no column is NaN, as in `softmax_cross_entropy_with_integer_labels`, whose accuracy holds as well:
    a pair with a loss of 1e-28 has all its digits, and so has the gradient.

    Args:
      logits: scores of all pairs, of shape [rows, columns], an array or `LinearLogits`.
      labels: the integer column of each row's positive; by default 0, 1, 2 and so on.
      where: which rows take part, of shape [rows]. The others are no negatives of columns either.
      class_where: which columns take part, of shape [columns].
      groups: an integer for each row, such as the id of its item.
      class_groups: an integer for each column; by default that of the row, if there are as many rows as columns.
      positives: "label", and columns of the row's own group other than the label are left out, such as duplicates; or
        "group", all columns of the row's group.
      exclude_self: whether to leave out the pairs of row i and column i, where both sides are the same items.
      axis_name: inside `jax.shard_map`, the mesh axis over which both sides are sharded: then all arguments are this
        device's part, but ``labels``, which count the columns of all devices. The columns' embeddings are gathered once.

    Returns:
      The losses of the rows and those of the columns, float32 for half-precision logits and the logits' dtype otherwise.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> images, texts = jnp.eye(3, 4), jnp.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]])
      >>> logits = jaxce.LinearLogits(images, texts, class_axis=0, temperature=0.1)
      >>> by_image, by_text = jaxce.softmax_cross_entropy_of_pairs(logits)
      >>> print(by_image, by_text)
      [9.0795e-05 6.9317e-01 9.0795e-05] [9.0795e-05 9.0795e-05 6.9317e-01]
      >>> print((by_image.mean() + by_text.mean()) / 2)
      0.2311

    References:
      Radford et al., CLIP, https://arxiv.org/abs/2103.00020; van den Oord et al., InfoNCE, https://arxiv.org/abs/1807.03748;
      Yi et al., https://research.google/pubs/pub48840 for the bias; Khosla et al., SupCon, https://arxiv.org/abs/2004.11362.
    """
    z = _read(logits, labels, where, class_where, groups, class_groups, positives, exclude_self, axis_name)
    (rows, columns), grouped = z.shape, positives == "group"
    inputs = factors(z.spec, z.inputs)
    numbers = jnp.arange(rows, dtype=jnp.int32)
    if "kernel" in inputs and z.spec.class_axis != 0:
        inputs["kernel"] = inputs["kernel"].T
    # What a row or column holds that takes no part must not be multiplied, nor kept for a gradient.
    masks = ("kernel", "classes", 1), ("bias", "classes", ()), ("array", "rows", 1), ("array", "classes", 0)
    for name, mask, axis in masks:
        if name in inputs and mask in inputs:
            inputs[name] = jnp.where(jnp.expand_dims(inputs[mask], axis), inputs[name], 0)
    if axis_name is not None:
        numbers += columns * _mesh.index(axis_name)
        inputs |= lax.all_gather({n: inputs[n] for n in COLUMNS_FIRST if n in inputs}, axis_name, tiled=True)
    inputs = {"labels": numbers} | inputs | {"numbers": numbers}
    columns_in_all = inputs["array"].shape[1] if "array" in inputs else inputs["kernel"].shape[0]
    spec = z.spec._replace(class_axis=0, axis_name=None, classes=columns_in_all)
    options = _Options(spec, grouped, not grouped and labels is None, exclude_self, axis_name)
    of_rows, of_columns = _on_each_device(options, inputs)
    if axis_name is not None:
        of_columns = lax.dynamic_slice_in_dim(of_columns, numbers[0], columns)
    return of_rows, of_columns


def _read(
    logits: Any,
    labels: ArrayLike | None,
    where: ArrayLike | None,
    class_where: ArrayLike | None,
    groups: ArrayLike | None,
    class_groups: ArrayLike | None,
    positives: str,
    exclude_self: bool,
    axis_name: AxisName | None,
) -> Logits:
    """The logits with all that is given, checked."""
    if positives not in ("label", "group"):
        raise _checks.ArgumentValueError(f"positives must be 'label' or 'group', got {positives!r}")
    if not isinstance(exclude_self, bool):
        raise _checks.ArgumentTypeError(f"exclude_self must be True or False, got {exclude_self!r}")
    if labels is not None and np.ndim(cast(Any, labels)) == 2:
        of_both = "for the embeddings of both sides give {LinearLogits}({logits}, {labels}.T)"
        _checks.integer("labels", labels, of_both)
    pairs = _scores(logits, axis_name)
    rows, columns = pairs.shape
    grouped = positives == "group"
    if grouped and groups is None:
        raise _checks.ArgumentTypeError("groups must be given with positives='group', got None")
    if class_groups is None and rows == columns:
        class_groups = groups
    if where is not None:
        where = _checks.boolean("where", where)
        _checks.same_shape("where", where, (rows,), "one entry per row")
    z = read_logits("logits", pairs, -1, where).with_classes(class_where).with_groups(groups, class_groups)
    if grouped and labels is not None:
        raise _checks.ArgumentTypeError(f"labels must be None with positives='group', got {_checks.describe(labels)}")
    if not grouped and labels is None and (exclude_self or rows > columns):
        of = "exclude_self=True" if exclude_self else f"{rows} rows and {columns} columns"
        raise _checks.ArgumentTypeError(f"labels must be given with {of}, got None")
    return z if labels is None else z.with_labels(labels)


def _scores(logits: Any, axis_name: AxisName | None) -> Any:
    """The logits; with those of a device's part their axis_name, by which labels are read."""
    linear = isinstance(logits, LinearLogits)
    if isinstance(logits, ShardedLogits) or (linear and logits.axis_name is not None):
        raise _checks.ArgumentTypeError(
            f"logits must be an array or LinearLogits without an axis_name, got {logits!r}", "give {axis_name}="
        )
    if axis_name is not None and not linear:
        raise _checks.ArgumentTypeError(f"logits must be LinearLogits with axis_name, got {_checks.describe(logits)}")
    logits = logits if linear else _checks.floating("logits", logits)
    if linear and getattr(logits.temperature, "ndim", 0):
        raise _checks.ArgumentValueError(f"logits must have one temperature for all rows, got {logits!r}")
    if logits.ndim != 2:
        raise _checks.ArgumentValueError(f"logits must have two axes, rows and columns, got shape {logits.shape}")
    return logits if axis_name is None else dataclasses.replace(logits, axis_name=_checks.axis_name(axis_name))


class _Options(NamedTuple):
    spec: Spec
    grouped: bool  # whether all of a row's group are positives
    one_row: bool  # whether a column is the label of one row at most, of the same number
    exclude_self: bool
    axis_name: AxisName | None  # over which rows are sharded


ROWS_FIRST = "hidden", "array", "rows", "labels", "numbers", "groups", "row_shift"
COLUMNS_FIRST = "kernel", "bias", "classes", "places", "class_groups", "column_shift"
"""The inputs whose first axis is that of rows, and those whose first is that of columns. An array is one tile."""

SHIFTS = "row_shift", "column_shift"


class _Line(NamedTuple):
    """Sums over the pairs of each row, or of each column."""

    others: Array  # of exp(x - shift) over those that are no positives
    positives: Array | None  # over those that are; None where there is at most one
    total: Array  # of x - shift over the positives


Lines = tuple[_Line, _Line]
"""Those of the rows and those of the columns."""


def _on_each_device(options: _Options, inputs: Inputs) -> tuple[Array, Array]:
    """The losses of each device's rows and those of all columns, where an explicit mesh shards any input."""

    def run(parts: dict[str, Any], *arrays: Array) -> tuple[Array, Array]:
        over = _mesh.names(options.axis_name) + _mesh.names(parts.get("rows"))
        return _losses(options._replace(axis_name=over or None), dict(zip(inputs, arrays, strict=True)))

    places = [("rows" if n in ROWS_FIRST else None, *[None] * (x.ndim - 1))[: x.ndim] for n, x in inputs.items()]
    return _mesh.spread(run, [*inputs.values()], places, [("rows",), ()])


def _losses(options: _Options, inputs: Inputs) -> tuple[Array, Array]:
    """The losses of the rows and of all columns, of rows that may be sharded."""
    rows, columns, dtype = inputs["labels"].shape[0], options.spec.classes, options.spec.dtype
    if rows == 0:
        return jnp.zeros(0, dtype), jnp.zeros(columns, dtype)
    if "rows" in inputs:
        inputs = inputs | {"labels": jnp.where(inputs["rows"], inputs["labels"], -1)}
    valid = inputs["labels"] >= 0
    # A row whose label is no column has a loss, too, of which NaN is made.
    counts = jnp.ones(rows, dtype), _at_columns(options, inputs, valid.astype(dtype), jnp.add, 0)
    if "kernel" in inputs and not options.grouped:
        inputs = inputs | dict(zip(SHIFTS, _guesses(options, inputs), strict=True))
    # With automatic axes, too, each device has all columns: a block of sharded ones would be gathered, again in each pass.
    inputs = inputs | {n: _mesh.whole(x, 0) for n, x in inputs.items() if n in COLUMNS_FIRST}
    tiles, join = _split(options, inputs)
    if options.grouped:
        found = _over_tiles(partial(_counts_of, options), jnp.add, 0, tiles)
        counts = join((found[0], _everywhere(options, 1, found[1])))
    of_rows, of_columns = join(_sums(options, tiles)[0])
    row_losses, column_losses = map(_loss, (of_rows, of_columns), counts)
    if not options.grouped:
        wrong = ~valid & inputs.get("rows", True)
        row_losses *= jnp.where(wrong, jnp.nan, 1).astype(dtype)
    if "rows" in inputs:
        row_losses = jnp.where(inputs["rows"], row_losses, 0)
    if "classes" in inputs:
        column_losses = jnp.where(inputs["classes"], column_losses, 0)
    return row_losses, column_losses


def _loss(line: _Line, count: Array) -> Array:
    """The mean over the positives of logsumexp(all) - x, as that of the positives alone, and what the others add to it."""
    mean = line.total / jnp.maximum(count, 1)
    # Positives whose exponentials are all 0 beside the others' add nothing to the sum of all.
    y = mean if line.positives is None else jnp.where(line.positives == 0, mean, _log(line.positives))
    present = (count > 0) & ((line.others != 0) | ~jnp.isneginf(y))
    w = _log(line.others) - y
    # A logarithm of a small sum, and an exponential of that, would have its nats as errors twice.
    near = jnp.abs(y) < _NEAR
    ratio = line.others * jnp.exp(-jnp.where(near, y, 0))
    near &= ratio < 1 / jnp.finfo(ratio.dtype).eps  # of a larger one the square may overflow
    ratio = _exp(jnp.where(near, ratio, 0), jnp.where(near, w, 0))
    nearby = lax.log1p(ratio, accuracy=lax.AccuracyMode.HIGHEST)
    loss = jnp.where(near, nearby, softplus(jnp.where(present & ~near, w, 0)))
    if line.positives is not None:
        loss += jnp.where(count > 1, y - mean, 0)
    return jnp.where(present, loss, 0)


def _log(total: Array) -> Array:
    """Its logarithm, -inf of 0. In derivatives the sum is divided by itself, as its square may over- or underflow."""
    some = jnp.where(total == 0, 1, total)
    log = replaced(jnp.log(some), jnp.log(some * lax.stop_gradient(1 / some)))
    return jnp.where(total == 0, -jnp.inf, log)


@custom_jvp
def _exp(value: Array, x: Array) -> Array:
    """exp(x), as ``value`` says it more exactly."""
    return value


@_exp.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return _exp(*primals), _exp(*primals) * tangents[1]


# ---------------------------------------------------------------------------------------------------------------- shifts


def _everywhere(options: _Options, direction: int, x: Any, over: Callable[..., Any] = lax.psum) -> Any:
    """What is known of columns on one device, of all."""
    return x if direction == 0 or options.axis_name is None else over(x, options.axis_name)


def _at_columns(options: _Options, inputs: Inputs, values: Array, join: Any, otherwise: float) -> Array:
    """Values of the rows at the columns that are their positives."""
    labels = inputs["labels"]
    values = jnp.where(labels < 0, otherwise, values)
    start = jnp.full(options.spec.classes, otherwise, values.dtype)
    if options.one_row:
        found = lax.dynamic_update_slice_in_dim(start, values, inputs["numbers"][0], 0)
    else:
        at = start.at[jnp.where(labels < 0, start.size, labels)]
        found = (at.add if join is jnp.add else at.max)(values, mode="drop")
    return _everywhere(options, 1, found, lax.psum if join is jnp.add else lax.pmax)


def _guesses(options: _Options, inputs: Inputs) -> tuple[Array, Array]:
    """About the logits of the positives, for rows and for columns; for a column without, so large that its sums are 0."""
    dtype, inputs = options.spec.dtype, lax.stop_gradient(inputs)
    rows = inputs["labels"].shape[0]

    def of_label(x: Array) -> Array:
        if options.one_row:
            return lax.dynamic_slice_in_dim(x, inputs["numbers"][0], rows)
        return jnp.take(x, inputs["labels"], axis=0, mode="clip")

    y = jnp.sum(inputs["hidden"].astype(dtype) * of_label(inputs["kernel"]).astype(dtype), -1)
    if "bias" in inputs:
        y += of_label(inputs["bias"]).astype(dtype)
    y = shape_logits(y, inputs.get("temperature"), inputs.get("soft_cap"))
    y = jnp.clip(jnp.where(jnp.isfinite(y) | jnp.isposinf(y), y, 0), max=largest(y))
    of_columns = _at_columns(options, inputs, y, jnp.maximum, -jnp.inf)
    return y, jnp.where(jnp.isneginf(of_columns), largest(y), of_columns)


@partial(custom_jvp, nondiff_argnums=(0,))
def _sums(options: _Options, tiles: Inputs) -> tuple[Lines, tuple[Array, Array]]:
    """The sums of all rows and of all columns; and the shifts that these are relative to, which have no derivatives."""

    def lines(shifts: Any) -> Lines:
        return _over_tiles(partial(_sums_of, options), jnp.add, 0, tiles | dict(zip(SHIFTS, shifts, strict=True)))

    def maxima(direction: int) -> Array:
        m = _over_tiles(partial(_maxima_of, options), jnp.maximum, -np.inf, tiles)[direction]
        m = _everywhere(options, direction, m, lax.pmax)
        return jnp.where(jnp.isneginf(m), 0, m)

    def again(direction: int, line: _Line) -> tuple[_Line, Array]:
        """With maxima as shifts if a sum is too large, or if the only positive is absent and so is whatever else counted.

        Each direction by itself, so that nothing is done for one that isn't used.
        """

        def body(state: Any) -> Any:
            shift = maxima(direction)
            line = lines([shift if i == direction else guesses[i] for i in (0, 1)])[direction]
            return _everywhere(options, direction, line), shift, state[2] & False

        there = tiles.get(("rows", "classes")[direction], True)
        if direction == 1 and "bias" in tiles:
            there &= tiles["bias"] > -jnp.inf
        nothing = (line.others == 0) & jnp.isneginf(line.total)
        is_far = jnp.any((line.others > _FAR) | (nothing & there))
        return lax.while_loop(lambda state: state[2], body, (line, guesses[direction], is_far))[:2]

    if SHIFTS[0] not in tiles:
        shifts = maxima(0), maxima(1)
        of_rows, of_columns = lines(shifts)
        return (of_rows, _everywhere(options, 1, of_columns)), shifts
    guesses = tuple(tiles[name] for name in SHIFTS)
    found = [again(i, _everywhere(options, i, line)) for i, line in enumerate(lines(guesses))]
    (of_rows, row_shift), (of_columns, column_shift) = found
    return (of_rows, of_columns), (row_shift, column_shift)


@partial(_sums.defjvp, symbolic_zeros=True)
def _(options: _Options, primals: Any, tangents: Any) -> Any:
    """The tangents of the sums at the shifts found, tile by tile, of which a transpose keeps nothing."""
    (tiles,), (dtiles,) = primals, tangents
    found, shifts = _sums(options, tiles)
    tiles = tiles | dict(zip(SHIFTS, shifts, strict=True))
    varying = {n: t for n, t in not_zero(dtiles).items() if n not in SHIFTS}
    # Wide, as a transpose adds them up; but columns, where there is one tile of rows, of which it does so once.
    once = ("kernel",) if tiles["labels"].shape[0] == 1 else ()
    varying = {n: t if n in once else t.astype(options.spec.dtype) for n, t in varying.items()}
    if "temperature" in varying:  # as much of hidden and bias, so that no product is multiplied once more
        t = tiles["temperature"].astype(options.spec.dtype)
        change = -varying.pop("temperature") / t
        for name in ("hidden", "bias"):
            if name in tiles:
                x = tiles[name].astype(t.dtype)
                more = jnp.where(jnp.isinf(x), 0, x) * change
                varying[name] = varying[name].astype(t.dtype) + more if name in varying else more
    tiles, varying = _mesh.vary((tiles, varying), _mesh.varying(tiles, varying))

    @partial(jax.checkpoint, prevent_cse=False)
    def step(part: Inputs, dpart: Inputs) -> Lines:
        some = {n: part[n].astype(t.dtype) for n, t in dpart.items()}
        return jax.jvp(lambda some: _sums_of(options, part | some), (some,), (dpart,))[1]

    of_rows, of_columns = _over_tiles(step, jnp.add, 0, tiles, varying)
    return (found, shifts), ((of_rows, _everywhere(options, 1, of_columns)), no_tangents(shifts))


# -------------------------------------------------------------------------------------------------------------- one tile


def _positive(options: _Options, part: Inputs) -> Array:
    """Which pairs are positives."""
    if not options.grouped:
        return part["labels"][:, None] == part["places"][None]
    positive = part["groups"][:, None] == part["class_groups"][None]
    if options.exclude_self:
        positive &= part["numbers"][:, None] != part["places"][None]
    return positive & part["rows"][:, None] & part["classes"][None]


@custom_jvp
def _multiplied(x: Array, factor: Array) -> Array:
    """Their product; a pair that isn't there, or is infinite, doesn't depend on the factor."""
    return x * factor


_multiplied.defslopes(lambda x, factor: (factor, jnp.where(jnp.isinf(x), 0, x)), jnp.multiply)


def _pairs(options: _Options, part: Inputs) -> tuple[Array, Array]:
    """The logits, -inf where a pair isn't there, and which pairs are positives."""
    x = logits_of(options.spec, {n: v for n, v in part.items() if n not in ("temperature", "soft_cap")})
    x = x.astype(options.spec.dtype)
    if "temperature" in part:  # by which a division would take a TPU longer
        x = _multiplied(x, jnp.broadcast_to(1 / part["temperature"].astype(x.dtype), x.shape))
    x = shape_logits(x, None, part.get("soft_cap"))
    x = jnp.where(jnp.isposinf(x), largest(x), x)
    positive = _positive(options, part)
    if options.exclude_self:
        x = jnp.where(part["numbers"][:, None] == part["places"][None], -jnp.inf, x)
    if "groups" in part and not options.grouped:
        x = jnp.where((part["groups"][:, None] == part["class_groups"][None]) & ~positive, -jnp.inf, x)
    return x, positive


def _sums_of(options: _Options, part: Inputs) -> Lines:
    x, positive = _pairs(options, part)
    others = jnp.where(positive, -jnp.inf, x)

    def line(axis: int, one: bool) -> _Line:
        shift = jnp.expand_dims(part[SHIFTS[1 - axis]], axis)
        positives = None if one else jnp.sum(jnp.exp(jnp.where(positive, x, -jnp.inf) - shift), axis)
        total = jnp.sum(jnp.where(positive, x - shift, 0), axis)
        return _Line(jnp.sum(jnp.exp(others - shift), axis), positives, total)

    return line(1, not options.grouped), line(0, options.one_row)


def _maxima_of(options: _Options, part: Inputs) -> tuple[Array, Array]:
    x, _ = _pairs(options, part)
    return jnp.max(x, 1), jnp.max(x, 0)


def _counts_of(options: _Options, part: Inputs) -> tuple[Array, Array]:
    positive = _positive(options, part).astype(options.spec.dtype)
    return jnp.sum(positive, 1), jnp.sum(positive, 0)


# ------------------------------------------------------------------------------------------------------------- all tiles


def _split(options: _Options, inputs: Inputs) -> tuple[Inputs, Callable[[Any], Any]]:
    """The inputs as tiles of rows and blocks of columns, and how to join what is found of rows and of columns."""
    rows, columns = inputs["labels"].shape[0], options.spec.classes
    given, tiles, blocks = options.spec.block_size, 1, 1
    if "array" not in inputs:
        local = rows_of_a_device((rows,))
        tiles = -(-local // _ROWS)
        size = columns if _mesh.in_use() else max(_COLUMNS, columns // 16)
        blocks = -(-columns // (given or min(size, _PAIRS // -(-local // tiles))))
    size = -(-columns // blocks)
    if blocks > 1 and given is None:
        size = -(-size // 128) * 128  # as a TPU likes it
    if options.grouped or rows % tiles:
        inputs = {"rows": jnp.ones(rows, bool)} | inputs
    if options.grouped or columns != size * blocks:
        inputs = {"classes": jnp.ones(columns, bool)} | inputs

    def split(name: str, x: Array) -> Array:
        if name in ROWS_FIRST:
            return split_rows(x, tiles)
        if name not in COLUMNS_FIRST:
            return x
        more = [(0, size * blocks - columns)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, more).reshape(blocks, size, *x.shape[1:])

    def join(found: Any) -> Any:
        of_rows, of_columns = found
        of_rows = jax.tree.map(lambda x: join_rows(x, rows), of_rows)
        return of_rows, jax.tree.map(lambda x: x.reshape(-1)[:columns], of_columns)

    split_inputs = {name: split(name, x) for name, x in inputs.items()}
    split_inputs["places"] = jnp.arange(size * blocks, dtype=jnp.int32).reshape(blocks, size)
    if "rows" in inputs:
        split_inputs["labels"] = jnp.where(split_inputs["rows"], split_inputs["labels"], -1)
    return split_inputs, join


def _over_tiles(step: Callable[..., Any], join: Callable[..., Array], empty: float, *trees: Inputs) -> tuple[Any, Any]:
    """step(*parts) -> (of rows, of columns), of all tiles: what is found of rows or columns is joined over the others."""

    def named(names: tuple[str, ...]) -> tuple[Inputs, ...]:
        return tuple({n: x for n, x in tree.items() if n in names} for tree in trees)

    whole = tuple({n: x for n, x in tree.items() if n not in (*ROWS_FIRST, *COLUMNS_FIRST)} for tree in trees)

    def of_rows(rows: tuple[Inputs, ...]) -> tuple[Any, Any]:
        def of_block(columns: tuple[Inputs, ...]) -> tuple[Any, Any]:
            return step(*(w | r | c for w, r, c in zip(whole, rows, columns, strict=True)))

        return _fold(of_block, join, empty, named(COLUMNS_FIRST))[::-1]

    return _fold(of_rows, join, empty, named(ROWS_FIRST))[::-1]


def _fold(step: Callable[..., Any], join: Callable[..., Array], empty: float, xs: Any) -> tuple[Any, Any]:
    """step(x) -> (a, b) of all x: the a joined, the b stacked."""
    first = jax.tree.map(lambda x: x[0], xs)
    if len(jax.tree.leaves(xs)[0]) == 1:
        total, stacked = step(first)
        return total, jax.tree.map(lambda b: b[None], stacked)
    like = jax.eval_shape(step, first)[0]
    start = jax.tree.map(lambda a: jnp.full(a.shape, empty, a.dtype), like)

    def body(total: Any, x: Any) -> tuple[Any, Any]:
        more, stacked = step(x)
        return jax.tree.map(join, total, more), stacked

    return lax.scan(body, _mesh.vary(start, _mesh.varying(like)), xs)
