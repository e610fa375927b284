"""The inputs of a function of logits: checked, named, and each device's part of them.

`read_logits` checks what a public function is given and makes `Logits` of it, arrays by name. `on_each_device` runs a
function on the part of the arrays that this device has. Which axes of an array are rows and which are classes is said once,
by its name, in the two tables here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType

from jaxce import _checks, _mesh
from jaxce._checks import ArrayLike, Axis, AxisName
from jaxce._logits import AnyLogits, LinearLogits, NotArray, ShardedLogits, is_half
from jaxce._state import Ask

Inputs = dict[str, Array]
"""What a pass goes over, by name.

The logits are an "array", or "hidden" states and a "kernel", perhaps with "bias", "temperature" and "soft_cap". With
them may come masks, True where something is there: of "rows", of "classes" and of "entries" (whose axes of rows may be
of length 1); "labels", one for each row; "targets", as "entries", or "shares" of the "chosen" classes, some for each
row, and "listed" which of these are no padding; "weights", one for each class; "example_weights", one for each row;
"groups" and "class_groups", an integer for each row and for each class.
"""

LOGITS = "array", "hidden", "kernel", "bias", "temperature", "soft_cap"

ALONG_CLASSES = {"array": -1, "kernel": None, "bias": 0, "classes": 0, "entries": -1, "targets": -1, "weights": 0}
ALONG_CLASSES |= {"class_groups": 0}
"""The axis of classes of each input that has one; that of a kernel is its own."""

OF_ROWS = {name: 1 for name in ("array", "logits", "hidden", "entries", "targets", "chosen", "shares", "listed")}
OF_ROWS |= {
    name: 0
    for name in ("rows", "labels", "label", "groups", "example_weights", "temperature", "label_smoothing", "z_loss")
}
"""The inputs that have axes of rows, and how many axes they have beside those; options may be one number for all. The
"logits" of a block are made of others, as is the "label", its logit."""

BLOCK = 1 << 26
"""About how many logits a block has at most."""

CLASSES = 2048, 8192
"""How many classes a block has at least and at most, unless the logits say it; and between these an eighth of all, or of
several strips a quarter of one, or as many as make a block of all rows. Rows too many for that come in chunks."""


class Spec(NamedTuple):
    """What is fixed while tracing."""

    dtype: np.dtype  # to compute in
    classes: int  # on this device
    class_axis: int = -1  # of the kernel
    half: bool = False  # whether hidden and kernel are bfloat16
    block_size: int | None = None  # as the logits say it
    axis_name: AxisName | None = None  # over which the classes are sharded
    adjacent: bool = True  # whether the classes of a row lie side by side in memory
    size: int = 0  # classes of a strip in a block
    strips: int = 1
    chunks: int = 1  # of rows, one after the other, where a block of all of them would be too large
    ask: Ask = Ask()

    @property
    def length(self) -> int:
        """Classes of a strip."""
        return self.classes // self.strips

    def axis(self, name: str, x: Array) -> int:
        """The axis of classes of an input that has one."""
        axis = ALONG_CLASSES[name]
        return (self.class_axis if axis is None else axis) % x.ndim


# ---------------------------------------------------------------------------------------------------------- what is given


class Logits(NamedTuple):
    """Logits of any kind, checked, with what came with them."""

    spec: Spec
    inputs: Inputs
    axes: tuple[int, ...]  # of the classes
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The dtype to compute in."""
        return self.spec.dtype

    def with_labels(self, labels: ArrayLike) -> Logits:
        """With integer labels, one for each row; -1 of one that is no class."""
        y = _checks.labels_of_rows(labels, self.shape, self.axes)
        return self.having(labels=self._class(y))

    def with_targets(self, labels: ArrayLike) -> Logits:
        """With dense labels."""
        of = "the logits" + ("" if self.spec.axis_name is None else " on each device")
        t = jnp.asarray(labels)
        if not jnp.issubdtype(t.dtype, jnp.floating):  # integers might have been meant as classes
            hints = _checks.labels_hints(t.shape, self.shape, self.axes)
            _checks.same_shape("labels", t, self.shape, f"the shape of {of}", *hints)
        whole = _checks.dense("labels", t, self.shape, self.dtype, of)
        # Axes of rows stay of length 1 where they are: a block of the logits may be all that is ever there.
        given = (1,) * (len(self.shape) - t.ndim) + t.shape
        t = whole[tuple(slice(n if a not in self.axes else None) for a, n in enumerate(given))]
        return self.having(targets=_checks.classes_last(t, self.axes))

    def with_shares(self, labels: ArrayLike, weights: ArrayLike) -> Logits:
        """With several classes for each row, and a share of its targets for each."""
        y = _checks.integer("labels", labels)
        batch = _checks.batch_shape(self.shape, self.axes)
        if y.shape[:-1] != batch or y.ndim != len(batch) + 1:
            of = f"the shape of the logits with any number of labels in place of the class axes, {(*batch, 'k')}"
            raise _checks.ArgumentValueError(f"labels must have {of}, got {_checks.describe(y)}")
        w = _checks.real("weights", weights, self.dtype)
        _checks.same_shape("weights", w, y.shape, "the shape of labels")
        return self.having(chosen=self._class(y), shares=w.astype(self.dtype))

    def _class(self, labels: Array) -> Array:
        """Integer labels, -1 where one is no class."""
        name = self.spec.axis_name
        classes = self.spec.classes * (1 if name is None else lax.axis_size(name))
        beyond = isinstance(classes, int) and classes > jnp.iinfo(labels.dtype).max  # no label is
        valid = labels >= 0 if beyond else (labels >= 0) & (labels < classes)
        return jnp.where(valid, labels.astype(jnp.int32), -1)  # of unsigned ones -1 would be a number of its own

    def with_weights(self, class_weights: ArrayLike | None) -> Logits:
        """With weights of the classes, unless these are None."""
        if class_weights is None:
            return self
        weights = _checks.real("class_weights", class_weights, self.dtype)
        _checks.same_shape("class_weights", weights, (self.spec.classes,), "one number per class")
        return self.having(weights=weights)

    def with_classes(self, class_where: ArrayLike | None) -> Logits:
        """With a mask of the classes, beside any other, unless it is None."""
        if class_where is None:
            return self
        mask = _checks.boolean("class_where", class_where)
        _checks.same_shape("class_where", mask, (self.spec.classes,), "one entry per class")
        return self.having(classes=mask & self.inputs.get("classes", True))

    def with_groups(self, groups: Any, class_groups: Any) -> Logits:
        """With groups of rows and of classes, unless both are None."""
        if groups is None and class_groups is None:
            return self
        batch, arrays = _checks.batch_shape(self.shape, self.axes), []
        for name, other, x, shape, of in (
            ("groups", "class_groups", groups, batch, "one entry per row"),
            ("class_groups", "groups", class_groups, (self.spec.classes,), "one entry per class"),
        ):
            if x is None:
                raise _checks.ArgumentTypeError(f"{name} must be given with {other}, got None")
            arrays.append(_checks.integer(name, x))
            _checks.same_shape(name, arrays[-1], shape, of)
        of_rows, of_classes = arrays
        wide = [x.dtype for x in arrays if all(np.can_cast(y.dtype, x.dtype) for y in arrays)]
        if not wide:
            raise _checks.ArgumentTypeError(
                f"class_groups must have the dtype of groups, {of_rows.dtype}, got {_checks.describe(of_classes)}"
            )
        return self.having(groups=of_rows.astype(wide[0]), class_groups=of_classes.astype(wide[0]))

    def of_rows(self, option: str, value: ArrayLike) -> Array:
        """An option that is a number, or one for each row: then 0 in rows that take no part."""
        x = jnp.asarray(value).astype(self.dtype)
        _checks.scalar_or(option, x, _checks.batch_shape(self.shape, self.axes), "one number per row")
        there = _rows_there(self.spec, self.inputs) if x.ndim else None
        return x if there is None else jnp.where(jnp.broadcast_to(there, x.shape), x, 0)

    def having(self, **inputs: Array) -> Logits:
        """With more inputs."""
        return self._replace(inputs=self.inputs | inputs)


def read_logits(
    argument: str, logits: AnyLogits, axis: Axis = -1, where: ArrayLike | None = None, *others: Any
) -> Logits:
    """``logits``, checked. They are computed with in the widest dtype of them, ``others`` and float32."""
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
        if not isinstance(logits.classes, int):
            raise _checks.ArgumentValueError(f"{argument} must have a known number of classes, got {logits.classes}")
        given = {name: getattr(logits, name) for name in LOGITS if name != "array"}
        inputs = {name: jnp.asarray(value) for name, value in given.items() if value is not None}
        half = is_half(logits.hidden, logits.kernel)
        spec = Spec(dtype, logits.classes, logits.class_axis, half, logits.block_size)
    else:
        x = _checks.classes_last(logits.logits if isinstance(logits, ShardedLogits) else logits, axes)
        if x.shape[-1] == 0:
            raise _checks.ArgumentValueError(f"{argument} must have at least one class, got shape {logits.shape}")
        adjacent = axes == tuple(range(logits.ndim))[-len(axes) :]
        spec, inputs = Spec(dtype, x.shape[-1], adjacent=adjacent), {"array": x}
    if isinstance(logits, NotArray) and logits.axis_name is not None:
        _mesh.check(argument, logits.axis_name, inputs["kernel"] if "kernel" in inputs else inputs["array"])
        spec = spec._replace(axis_name=logits.axis_name)
    return Logits(spec, inputs | masks, axes, logits.shape)


def demand_linear(logits: Any) -> None:
    """An error unless the logits are `LinearLogits`."""
    if not isinstance(logits, LinearLogits):
        got = f"logits must be LinearLogits, got {_checks.describe(logits)}"
        raise _checks.ArgumentTypeError(got, "give {LinearLogits}(hidden, kernel)")


def _rows_there(spec: Spec, inputs: Inputs) -> Array | None:
    """Which rows take part; None: all."""
    if "entries" not in inputs:
        return inputs.get("rows")
    there = inputs["entries"].any(-1)
    if spec.axis_name is None:
        return there
    return lax.pmax(there.astype(jnp.int32), spec.axis_name) > 0  # another device may have the row's only classes


def has_rows(name: str, x: Array) -> bool:
    """Whether an input has axes of rows."""
    return name in OF_ROWS and x.ndim > OF_ROWS[name]


def flat_rows(name: str, x: Array, batch: tuple[int, ...]) -> Array:
    """An input that has axes of rows, with one in place of them: of length 1 if all rows have the same."""
    axes = x.ndim - OF_ROWS[name]
    trailing = x.shape[axes:]
    if math.prod(x.shape[:axes]) == 1:
        return x.reshape(1, *trailing)
    return jnp.broadcast_to(x, (*batch, *trailing)).reshape(math.prod(batch), *trailing)


# ---------------------------------------------------------------------------------------------------- what a device has


def on_each_device(
    function: Callable[..., Any], logits: tuple[Logits, ...], *options: Array, results: Any = "rows"
) -> Any:
    """function(specs, inputs, *options) of logits that are cut alike, with what this device has of them.

    Arrays on a mesh with explicit axis types show in their types how they are sharded. There each device runs the function
    on its part, so that no rule for whole arrays (of a gather, a reshape, a loop over blocks) can refuse it. An array of
    logits needs no such thing. Arrays of the results have the axes of "rows" or of "logits", or are a "total".
    """
    specs, inputs = tuple(z.spec for z in logits), tuple(z.inputs for z in logits)
    names = [(i, name) for i, own in enumerate(inputs) for name in sorted(own, key=lambda name: name not in LOGITS)]
    arrays = [inputs[i][name] for i, name in names]
    if all("array" in own for own in inputs):
        return function(*_prepared(specs, inputs), *options)

    rows = tuple(range(len(logits[0].shape) - len(logits[0].axes)))
    places = [_place(specs[i], name, x, rows) for (i, name), x in zip(names, arrays, strict=True)]

    def run(parts: dict[Any, Any], *arrays: Array) -> Any:
        here: tuple[Inputs, ...] = tuple({} for _ in specs)
        for (i, name), x in zip(names, arrays, strict=False):
            here[i][name] = x
        shards = parts.get("classes")
        own = specs if shards is None else tuple(_sharded(spec, shards) for spec in specs)
        value = function(*_prepared(own, here), *arrays[len(names) :])
        over = tuple(n for axis in rows for n in _mesh.names(parts.get(axis)))
        if "total" in results and over:
            value = tuple(lax.psum(v, over) if of == "total" else v for of, v in zip(results, value, strict=True))
        return value

    place = {"rows": rows, "logits": (*rows, "classes"), "total": ()}
    out = place[results] if isinstance(results, str) else [place[of] for of in results]
    return _mesh.spread(run, [*arrays, *options], [*places, *(() for _ in options)], out)


def _sharded(spec: Spec, axis_name: AxisName) -> Spec:
    return spec._replace(axis_name=axis_name, classes=spec.classes // lax.axis_size(axis_name))


def _place(spec: Spec, name: str, x: Array, rows: tuple[int, ...]) -> _mesh.Place:
    """What each axis of an input goes along: one of the rows' axes, the "classes", or nothing that others share."""
    place: list[Any] = [None] * x.ndim
    if has_rows(name, x):
        place[: len(rows)] = rows
    if name in ALONG_CLASSES and spec.axis_name is None:
        place[spec.axis(name, x)] = "classes"
    return tuple(place)


def _prepared(specs: tuple[Spec, ...], inputs: tuple[Inputs, ...]) -> tuple[tuple[Spec, ...], tuple[Inputs, ...]]:
    """With the size of blocks, and without what rows hold that take no part."""
    specs = tuple(map(_in_blocks, specs, inputs))
    size, strips = min(spec.size for spec in specs), max(spec.strips for spec in specs)
    inputs = tuple(_shares(spec, factors(spec, own)) for spec, own in zip(specs, inputs, strict=True))
    return tuple(s._replace(size=size, strips=strips) for s in specs), inputs


def _in_blocks(spec: Spec, inputs: Inputs) -> Spec:
    """With the size of blocks that suits the rows of a device."""
    if "array" in inputs:
        return spec._replace(size=spec.classes)
    strips, batch = _mesh.strips(spec.classes), inputs["hidden"].shape[:-1]
    length = spec.classes // strips
    if spec.block_size is not None:
        return spec._replace(size=min(length, -(-spec.block_size // strips)), strips=strips)
    rows = rows_of_a_device(batch)
    least, most = CLASSES
    part = max(least // strips, -(-length // (1024 if strips == 1 else 512)) * 128)
    fits = BLOCK // (rows * strips) // 128 * 128
    size = min(length, most, part, fits if fits * strips >= least else max(most // strips, 128))
    return spec._replace(size=size, strips=strips, chunks=-(-rows * strips * size // BLOCK))


def rows_of_a_device(batch: tuple[int, ...]) -> int:
    """How many of the rows a device has; 1 for the symbolic sizes of jax.export."""
    known = all(isinstance(n, int) for n in batch)
    return max(1, math.prod(batch) // _mesh.devices(AxisType.Auto)) if known else 1


def factors(spec: Spec, inputs: Inputs) -> Inputs:
    """With the factors of the product as it needs them, on any mesh and with any mask."""
    if "array" in inputs:
        return inputs
    hidden, there = inputs["hidden"], _rows_there(spec, inputs)
    if there is not None:  # what a row holds that takes no part must not be multiplied by anything
        there = jnp.broadcast_to(there, hidden.shape[:-1])
        hidden = jnp.where(there[..., None], hidden, 0)
        inputs = with_temperatures(inputs, there)
    features = -1 - spec.class_axis
    return inputs | {"hidden": _mesh.whole(hidden, -1), "kernel": _mesh.whole(inputs["kernel"], features)}


def with_temperatures(inputs: Inputs, there: Array) -> Inputs:
    """With a temperature of 1 in rows that take no part, if each row has its own."""
    temperature = inputs.get("temperature")
    if temperature is None or not has_rows("temperature", temperature):
        return inputs
    return inputs | {"temperature": jnp.where(there, temperature, 1)}


def _shares(spec: Spec, inputs: Inputs) -> Inputs:
    """With shares of 0 in rows that take no part, and of NaN where a class that counts is none."""
    if "shares" not in inputs:
        return inputs
    chosen, shares, there = inputs["chosen"], inputs["shares"], _rows_there(spec, inputs)
    if there is not None:
        shares = jnp.where(there[..., None], shares, 0)
    bad = (chosen < 0) & (shares != 0)
    return inputs | {"chosen": jnp.where(bad, 0, chosen), "shares": jnp.where(bad, jnp.nan, shares)}
