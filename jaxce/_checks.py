"""What a function may be given: conversions and errors at the door.

Every public function converts and checks its arguments here, once, and is plain array code from then on. All errors have
one form, ``function: argument must be ..., got ...``, and are raised while the function is traced.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

Axis = int | Sequence[int]
AxisName = str | tuple[str, ...]
_F = TypeVar("_F", bound=Callable[..., Any])


class Number(NamedTuple):
    """An option that is a number: which ones are right, and the one that makes no difference."""

    expected: str
    valid: Callable[[float], bool] = math.isfinite
    neutral: float | None = 0.0
    broadcasts: bool = False  # whether it may be an array of numbers as well


SHARE = Number("a number in [0, 1]", lambda a: 0 <= a <= 1)
FINITE = Number("a finite number")
NOT_NEGATIVE = Number("a number of at least 0", lambda g: 0 <= g < math.inf)
POSITIVE = Number("a positive number", lambda v: 0 < v < math.inf, neutral=None)


def compiled(*static: str, **numbers: Number) -> Callable[[_F], _F]:
    """``jax.jit``, with some options static, and others numbers that may be traced.

    Python numbers are checked at once, arrays only for their shape and dtype, so that a new value is no reason to
    compile again. A number that makes no difference comes in as None. What `jax.jit` would take amiss is made right, or
    an error, here: lists, integers that don't fit, names of arguments from elsewhere. Typed as the function itself, so
    that editors see its signature.
    """

    def decorate(function: _F) -> _F:
        jitted = jax.jit(function, static_argnames=static)
        parameters = inspect.signature(function).parameters
        defaults = {n: parameters[n].default for n in numbers}

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            def read(name: str, value: Any) -> Any:
                if name in numbers:
                    return option(function.__name__, name, value, numbers[name])
                if name in static:
                    return tuple(value) if isinstance(value, list) else value
                return _host_array(function.__name__, name, value)

            for name in kwargs:
                if name not in parameters:
                    instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
                    raise TypeError(f"{function.__name__}: {name} is no argument{instead}")
            if len(args) > len(parameters):
                return jitted(*args, **kwargs)  # Python says it
            given = [read(name, value) for name, value in zip(parameters, args, strict=False)]
            named = {n: v for n, v in defaults.items() if v is not inspect.Parameter.empty} | kwargs
            taken = [*parameters][: len(args)]
            return jitted(*given, **{n: read(n, v) for n, v in named.items() if n in kwargs or n not in taken})

        checked._cache_size = jitted._cache_size  # type: ignore[attr-defined]
        return cast(_F, checked)

    return decorate


_MEAN = "losses come one per example; their mean is jaxce.weighted_mean(losses)"
_INSTEAD = {
    "reduction": _MEAN,
    "reduce": _MEAN,
    "size_average": _MEAN,
    "ignore_index": "give where=labels != ignore_index",
    "ignore_class": "give where=labels != ignore_class",
    "from_logits": "functions of probabilities have other names, such as categorical_cross_entropy",
    "weight": "give class_weights=, one per class, or weight examples by jaxce.weighted_mean(losses, weights)",
    "sample_weight": "weight examples by jaxce.weighted_mean(losses, weights)",
    "weights": "weight examples by jaxce.weighted_mean(losses, weights)",
    "mask": "give where=, True for what takes part",
    "dim": "give axis=",
    "smoothing": "give label_smoothing=",
    "temperature": "divide the logits by it, or give it to jaxce.LinearLogits",
    "soft_cap": "give it to jaxce.LinearLogits",
    "target": "labels come second, f(logits, labels)",
    "targets": "labels come second, f(logits, labels)",
    "y_true": "labels come second, f(logits, labels)",
    "y_pred": "logits come first, f(logits, labels)",
    "input": "logits come first, f(logits, labels)",
}
"""What to write in place of an argument that isn't there, by the name that it has elsewhere."""


def _host_array(function: str, argument: str, value: Any) -> Any:
    """Lists as arrays, at NumPy's speed; an error for what isn't numbers, and for integers that 32 bits would change."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        traced = any(isinstance(x, Array) for x in jax.tree.leaves(value))
        value = jnp.asarray(value) if traced else np.asarray(value)
    if not isinstance(value, int | str | np.ndarray | np.integer):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "biufcV":  # V: of JAX's own dtypes
        raise TypeError(f"{function}: {argument} must be an array of numbers, got {describe(value)}")
    if array.dtype in (np.int64, np.uint64) and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        large = array[array.astype(np.int32) != array]
        if large.size:
            raise ValueError(f"{function}: {argument} must be integers of 32 bits, got {large[0]}")
    return value


def describe(value: Any) -> str:
    """``value`` as errors show it: dtype and shape of an array."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return f"{value!r}"


def _array(function: str, argument: str, value: ArrayLike, kind: Any, expected: str, hint: str = "") -> Array:
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{function}: {argument} must be {expected}, got {type(value).__name__}") from error
    if not jnp.issubdtype(array.dtype, kind):
        raise TypeError(f"{function}: {argument} must be {expected}, got {describe(array)}{hint}")
    return array


def array(function: str, argument: str, value: ArrayLike) -> Array:
    """``value`` as an array of numbers."""
    return _array(function, argument, value, np.generic, "an array of numbers")


def floating(function: str, argument: str, value: ArrayLike) -> Array:
    """``value`` as an array of floating-point numbers; a single number may be an integer."""
    hint = f"; {argument} come first, labels second" if argument in ("logits", "probs", "log_probs") else ""
    dtype = getattr(value, "dtype", type(value))
    if getattr(value, "ndim", 0) == 0 and (dtype is int or isinstance(dtype, np.dtype) and dtype.kind in "iu"):
        value = jnp.asarray(value, jnp.result_type(float))
    array = _array(function, argument, value, jnp.floating, "a floating-point array", hint)
    if array.dtype.itemsize == 1:  # neither the range nor, on every device, an exact path to float32
        raise TypeError(f"{function}: {argument} must be float16, bfloat16, float32 or float64, got {describe(array)}")
    return array


def real(function: str, argument: str, value: ArrayLike, dtype: Any = np.float32) -> Array:
    """``value`` as an array of floating-point numbers, of ``dtype`` where they are booleans or integers."""
    given = array(function, argument, value)
    return floating(function, argument, given if jnp.issubdtype(given.dtype, jnp.inexact) else given.astype(dtype))


def integer(function: str, argument: str, value: ArrayLike, hint: str = "") -> Array:
    """``value`` as an array of integers."""
    return _array(function, argument, value, jnp.integer, "an integer array", hint)


def boolean(function: str, argument: str, value: ArrayLike) -> Array:
    """``value`` as an array of booleans; of integers those that aren't 0 are True."""
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array != 0
    if jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{function}: {argument} must be a boolean or integer array, got {describe(array)}; for a mask give "
            f"{argument}=mask != 0, for weights jaxce.weighted_mean(losses, weights)"
        )
    return _array(function, argument, array, jnp.bool_, "a boolean or integer array")


def compute_dtype(*arrays: Any) -> np.dtype:
    """The dtype to compute in: the widest of the arguments' and float32. Half precision is computed in float32."""
    return functools.reduce(np.promote_types, (a.dtype for a in arrays if a.dtype.itemsize >= 4), np.dtype(np.float32))


def upcast(*arrays: Array) -> tuple[Array, ...]:
    """All arrays in their common `compute_dtype`, cast one by one so that strict promotion has nothing to object to."""
    dtype = compute_dtype(*arrays)
    return tuple(a.astype(dtype) for a in arrays)


def axes(function: str, axis: Axis, ndim: int) -> tuple[int, ...]:
    """``axis`` as non-negative integers, in the order given."""
    try:
        given = (operator.index(axis),)  # type: ignore[arg-type]
    except TypeError:
        try:
            given = tuple(operator.index(a) for a in axis)  # type: ignore[union-attr]
        except TypeError:
            raise TypeError(f"{function}: axis must be an integer or a tuple of integers, got {axis!r}") from None
    if not given or any(not -ndim <= a < ndim for a in given):
        raise ValueError(f"{function}: axis must name one or more of the {ndim} axes, got {axis!r}")
    result = tuple(a % ndim for a in given)
    if len(set(result)) != len(result):
        raise ValueError(f"{function}: axis must name each axis once, got {axis!r}")
    return result


def axis_name(function: str, names: Any) -> AxisName:
    """Names of mesh axes, each once."""
    given = names if isinstance(names, tuple) else (names,)
    if not given or any(not isinstance(name, str) for name in given) or len(set(given)) != len(given):
        raise ValueError(f"{function}: axis_name must be the name of a mesh axis or a tuple of names, got {names!r}")
    return names


def same_shape(function: str, argument: str, array: Array, shape: tuple[int, ...], of: str, hint: str = "") -> None:
    """Demand exactly ``shape``, which is ``of`` something that the message can name: nothing is broadcast."""
    if array.shape != shape:
        raise ValueError(f"{function}: {argument} must have {of}, {shape}, got {describe(array)}{hint}")


def labels_of_rows(
    function: str, labels: ArrayLike, shape: tuple[int, ...], class_axes: tuple[int, ...], of: str = "the logits"
) -> Array:
    """One integer label for each row of something of ``shape``."""
    batch, given = batch_shape(shape, class_axes), np.shape(labels)
    hint = labels_hint(given, shape, class_axes)
    y = integer(function, "labels", labels, "; give labels.astype(int)" if given == batch else hint)
    same_shape(function, "labels", y, batch, f"the shape of {of} without their class axes", hint)
    return y


def labels_hint(labels: tuple[int, ...], shape: tuple[int, ...], class_axes: tuple[int, ...]) -> str:
    """What to write for labels of a shape that doesn't fit logits of ``shape``, if that is likely enough."""
    batch = batch_shape(shape, class_axes)
    others = [a for a in range(len(shape)) if a not in class_axes and batch_shape(shape, (a,)) == labels]
    if labels == batch:
        return "; one class for each row is for the function with_integer_labels in its name"
    if labels == shape:
        return "; one number for each class is for the function without integer_labels in its name"
    if others:
        return f"; if the classes are on that axis, give axis={others[0]}"
    if labels == (*batch, 1):
        return "; give labels[..., 0]"
    return ""


def option(function: str, argument: str, value: Any, kind: Number) -> Any:
    """An option: a Python number, checked, or an array, with axes if it broadcasts; None if it makes no difference."""
    if value is None:
        return None
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        if not kind.valid(float(value)):
            raise ValueError(f"{function}: {argument} must be {kind.expected}, got {value!r}")
        return None if value == kind.neutral else float(value)
    if kind.broadcasts:
        value = _host_array(function, argument, value)
    if not hasattr(value, "dtype"):
        raise TypeError(f"{function}: {argument} must be {kind.expected}, got {value!r}")
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{function}: {argument} must be {kind.expected}, got {describe(array)}")
    if not kind.broadcasts:
        same_shape(function, argument, array, (), "no axes")
    return array


def positive_integer(function: str, argument: str, value: Any, expected: str = "a positive integer") -> int:
    """A Python integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{function}: {argument} must be {expected}, got {describe(value)}")
    if value < 1 or value != int(value):
        raise ValueError(f"{function}: {argument} must be {expected}, got {value!r}")
    return int(value)


def log_base(function: str, base: Any) -> float | None:
    """The natural logarithm of ``base``; None, for nats, stays None."""
    if base is None:
        return None
    expected = "None (nats) or a positive number other than 1"
    if not isinstance(base, int | float | np.number) or isinstance(base, bool):
        raise TypeError(f"{function}: base must be {expected}, got {describe(base)}")
    if not 0 < base < math.inf or base == 1:
        raise ValueError(f"{function}: base must be {expected}, got {base!r}")
    return math.log(base)


def classes_last(array: Array, class_axes: tuple[int, ...]) -> Array:
    """The class axes moved to the end, in the order given, and flattened into one."""
    batch = tuple(a for a in range(array.ndim) if a not in class_axes)
    moved = jnp.transpose(array, batch + class_axes)
    if len(class_axes) == 1:
        return moved
    return moved.reshape(*moved.shape[: len(batch)], math.prod(moved.shape[len(batch) :]))


def batch_shape(shape: tuple[int, ...], class_axes: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` without its class axes."""
    return tuple(n for a, n in enumerate(shape) if a not in class_axes)


def where_mask(
    function: str, where: ArrayLike, shape: tuple[int, ...], class_axes: tuple[int, ...]
) -> tuple[str, Array]:
    """``where`` as a mask of "rows", of "classes" or of "entries", with the classes last.

    A mask with as many axes as the batch says which rows take part, and has the batch's shape. One with as many axes as
    ``shape`` says which entries do, and broadcasts to it; its axes of rows may stay of length 1.
    """
    mask = boolean(function, "where", where)
    batch = batch_shape(shape, class_axes)
    if mask.shape == batch:
        return "rows", mask
    if mask.ndim != len(shape) or any(n not in (1, m) for n, m in zip(mask.shape, shape, strict=True)):
        axes = ", ".join(["None"] * (len(shape) - mask.ndim))
        hint = f"; for a mask of classes give where[{axes}]" if 0 < mask.ndim < len(shape) else ""
        raise ValueError(
            f"{function}: where must have the batch shape, {batch}, to say which rows take part, or {len(shape)} axes that "
            f"broadcast to {shape} to say which entries do, got {describe(mask)}{hint}"
        )
    if all(mask.shape[a] == 1 for a in class_axes):
        return "rows", jnp.broadcast_to(jnp.squeeze(mask, class_axes), batch)
    mask = jnp.broadcast_to(mask, [shape[a] if a in class_axes else n for a, n in enumerate(mask.shape)])
    mask = classes_last(mask, class_axes)
    return ("classes", mask.reshape(-1)) if math.prod(mask.shape[:-1]) == 1 else ("entries", mask)


def where_entries(function: str, where: ArrayLike, shape: tuple[int, ...], class_axes: tuple[int, ...]) -> Array:
    """``where`` as a mask of every entry, in place."""
    where_mask(function, where, shape, class_axes)
    mask = boolean(function, "where", where)
    if mask.ndim < len(shape):
        mask = jnp.expand_dims(mask, class_axes)
    return jnp.broadcast_to(mask, shape)


def where_elements(function: str, where: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    """``where`` of an elementwise function as a mask of its result, which has this shape; None if all take part."""
    if where is None:
        return None
    mask = boolean(function, "where", where)
    missing = len(shape) - mask.ndim
    if missing == 0 and all(n in (1, m) for n, m in zip(mask.shape, shape, strict=True)):
        return jnp.broadcast_to(mask, shape)
    new = ", ".join(["None"] * missing)
    hint = f"; for a mask of the first axes give where[..., {new}], of the last where[{new}]" if missing > 0 else ""
    raise ValueError(
        f"{function}: where must have as many axes as the result and broadcast to it, {shape}, got {describe(mask)}{hint}"
    )


def only(mask: Array | None, array: Array, otherwise: float) -> Array:
    """The array where the mask is True (None: everywhere), and elsewhere another number.

    Of what goes into a formula as of what comes out: only then are all derivatives of what was left out 0.
    """
    return array if mask is None else jnp.where(mask, array, otherwise)


def dense(
    function: str,
    argument: str,
    value: ArrayLike,
    shape: tuple[int, ...],
    dtype: Any,
    of: str,
    classes: str | None = None,
) -> Array:
    """Labels or weights, a number for each entry of something of this shape, named in ``of``; they broadcast to it.

    Booleans and integers come out in ``dtype``. Where integers with fewer axes would be class numbers, which are never
    broadcast, ``classes`` names the function that takes those.
    """
    x = array(function, argument, value)
    numbers = not jnp.issubdtype(x.dtype, jnp.floating) and classes is not None and x.ndim < len(shape)
    x = real(function, argument, x, dtype)
    fits = x.ndim <= len(shape) and all(n in (1, m) for n, m in zip(x.shape[::-1], shape[::-1], strict=False))
    if fits and not numbers:
        return jnp.broadcast_to(x, shape)
    hint = ""
    if numbers:
        hint = f"; class numbers are for {classes}"
    elif [n for n in x.shape if n != 1] == [n for n in shape if n != 1]:
        hint = f"; give {argument}.reshape({shape})"
    raise ValueError(
        f"{function}: {argument} must have the shape of {of}, {shape}, or broadcast to it, got {describe(value)}{hint}"
    )
