"""What a function may be given: conversions and errors at the door.

Every public function converts and checks its arguments here, once, and is plain array code from then on. All errors have
one form, ``function: argument must be ..., got ...``, and are raised while the function is traced.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

Axis = int | Sequence[int]
AxisName = str | tuple[str, ...]
_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(*options: str) -> Callable[[_F], _F]:
    """``jax.jit`` with the named options static, typed as the function itself so that editors still see its signature."""
    return cast(Callable[[_F], _F], functools.partial(jax.jit, static_argnames=options))


def describe(value: Any) -> str:
    """``value`` as errors show it: dtype and shape of an array."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return f"{value!r}"


def _array(function: str, argument: str, value: ArrayLike, kind: Any, expected: str) -> Array:
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{function}: {argument} must be {expected}, got {type(value).__name__}") from error
    if not jnp.issubdtype(array.dtype, kind):
        raise TypeError(f"{function}: {argument} must be {expected}, got {describe(array)}")
    return array


def floating(function: str, argument: str, value: ArrayLike) -> Array:
    """``value`` as an array of floating-point numbers."""
    array = _array(function, argument, value, jnp.floating, "a floating-point array")
    if (
        array.dtype.itemsize == 1
    ):  # 8-bit floats have neither range nor an exact path to float32 arithmetic on every device
        raise TypeError(f"{function}: {argument} must be float16, bfloat16, float32 or float64, got {describe(array)}")
    return array


def integer(function: str, argument: str, value: ArrayLike) -> Array:
    """``value`` as an array of integers."""
    return _array(function, argument, value, jnp.integer, "an integer array")


def boolean(function: str, argument: str, value: ArrayLike) -> Array:
    """``value`` as an array of booleans."""
    return _array(function, argument, value, jnp.bool_, "a boolean array")


def compute_dtype(*arrays: Array) -> np.dtype:
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


def same_shape(function: str, argument: str, array: Array, shape: tuple[int, ...], of: str) -> None:
    """Demand exactly ``shape``, which is ``of`` something that the message can name: labels are never broadcast."""
    if array.shape != shape:
        raise ValueError(f"{function}: {argument} must have {of}, {shape}, got {describe(array)}")


def number(
    function: str, argument: str, value: Any, expected: str, valid: Callable[[float], bool] = math.isfinite
) -> float:
    """An option that is a Python number and fixed while tracing."""
    try:
        result = float(value)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError) as error:
        raise TypeError(f"{function}: {argument} must be {expected}, got {describe(value)}") from error
    if isinstance(value, bool) or not valid(result):
        raise ValueError(f"{function}: {argument} must be {expected}, got {value!r}")
    return result


def log_base(function: str, base: Any) -> float | None:
    """The natural logarithm of ``base``; None, for nats, stays None."""
    if base is None:
        return None
    expected = "None (nats) or a positive number other than 1"
    return math.log(number(function, "base", base, expected, lambda b: 0 < b < math.inf and b != 1))


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
    function: str, where: ArrayLike | None, shape: tuple[int, ...], class_axes: tuple[int, ...]
) -> tuple[Array | None, Array | None]:
    """``where`` as a pair (rows, entries), of which at most one is not None.

    A mask of the batch shape says which rows take part; any other must broadcast to ``shape`` and says which entries do,
    and is returned with the classes last.
    """
    if where is None:
        return None, None
    mask = boolean(function, "where", where)
    if mask.shape == batch_shape(shape, class_axes):
        return mask, None
    try:
        full = jnp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(
            f"{function}: where must have the batch shape, {batch_shape(shape, class_axes)}, or broadcast to the full "
            f"shape, {shape}, got {describe(mask)}"
        ) from None
    return None, classes_last(full, class_axes)


def where_entries(function: str, where: ArrayLike | None, shape: tuple[int, ...], class_axes: tuple[int, ...]) -> Array:
    """``where`` as a mask of every entry, in place."""
    rows, entries = where_mask(function, where, shape, class_axes)
    if where is None:
        return jnp.ones(shape, bool)
    if rows is not None:
        return jnp.broadcast_to(jnp.expand_dims(rows, class_axes), shape)
    return jnp.broadcast_to(where, shape)
