"""Checks and conversions of the arguments of public functions.

Every public function converts and checks its arguments here, once, and is plain array code from then on. All errors have
one form, ``function: argument must be ..., got ...``, and are raised while the function is traced. A check says what is
wrong with an argument; `compiled` and `named` put the function's name before it, once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import operator
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np
from jax import Array
from jax.core import Tracer

_Entry = jax.typing.ArrayLike
ArrayLike = _Entry | Sequence[_Entry] | Sequence[Sequence[_Entry]] | Sequence[Sequence[Sequence[_Entry]]]
"""What is, or becomes, an array: lists are accepted, too."""

Axis = int | Sequence[int]
AxisName = str | tuple[str, ...]
_F = TypeVar("_F", bound=Callable[..., Any])
_C = TypeVar("_C", bound=type)


# ---------------------------------------------------------------------------------------------------- errors


class _ArgumentError(Exception):
    """What is wrong with an argument, in one line without the function's name, and hints of what to write instead.

    A hint has arguments in braces, as in ``"give {where}="``, and fits a function that has them all; ``{where:.0}``
    demands one without showing it. The first hint that fits is shown. `named._fill` says what else braces may hold.
    """

    def __init__(self, message: str, *hints: str) -> None:
        super().__init__(message)
        self.message, self.hints = message, hints

    def __reduce__(self) -> Any:
        return TypeError if isinstance(self, TypeError) else ValueError, self.args


class ArgumentTypeError(_ArgumentError, TypeError):
    """An argument has a type or a dtype that the function doesn't take. Users see a TypeError."""

    __module__, __qualname__ = "builtins", "TypeError"


class ArgumentValueError(_ArgumentError, ValueError):
    """An argument has a shape or a value that the function doesn't take. Users see a ValueError."""

    __module__, __qualname__ = "builtins", "ValueError"


class named:
    """A context that puts a function's name before errors about its arguments.

    Of nested functions the outermost, which the user called, has the last word. The last line that a traceback shows is
    the user's own, unless JAX's option ``jax_traceback_filtering`` is "off".
    """

    functions: set[str] = set()

    def __init__(self, function: str, parameters: Mapping[str, inspect.Parameter], method: str = "") -> None:
        self.function, self.parameters = function, parameters
        self.call = f"{function}.{method}" if method else function
        given = [p for p in parameters.values() if p.name not in ("self", "cls")]
        self.names = [p.name for p in given]
        self.positional = [p.name for p in given if p.kind is not p.KEYWORD_ONLY]
        self.required = [p.name for p in given if p.default is p.empty]
        self.takes_any = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in given)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, _ArgumentError):
            return
        hint = next((f"; {hint}" for hint in map(self._fill, error.hints) if hint), "")
        if not self.takes_any or error.args == (error.message,):  # else the method that it hands all on to is named
            error.args = (f"{self.function}: {error.message}{hint}",)
        if jax.config.jax_traceback_filtering != "off":  # type: ignore[attr-defined]
            error.__traceback__ = error.__cause__ = error.__context__ = None
            getattr(error, "__notes__", []).clear()  # JAX says there which of its frames it has left out

    def _fill(self, hint: str) -> str:
        """The hint for this function, or nothing if that lacks something that is in its braces.

        There may be arguments; ``call``, this function with the arguments that it demands, and ``second``, the second of
        these; ``weighted_mean``, for losses and entropies; ``example_weights``, this function's; ``LinearLogits``, where
        they are taken; ``dense_function`` and ``integer_function``, its twin for the other kind of labels.
        """
        words = {name: name for name in self.names} | {"call": f"{self.call}({', '.join(self.required)})"}
        is_loss = len(self.required) > 1 or {"labels", "base"} & {
            *self.names
        }  # of something with something, or an entropy
        if is_loss and not {"losses", "alpha"} & {*self.required}:
            words["weighted_mean"] = "jaxce.weighted_mean(losses, weights)"
        if "weights" in self.names and "weights" not in self.required:
            words["example_weights"] = "weights"
        if any("Logits" in str(p.annotation) for p in self.parameters.values()):
            words["LinearLogits"] = "jaxce.LinearLogits"
        if len(self.required) > 1:
            words["second"] = self.required[1]
        dense = self.function.removesuffix("_with_integer_labels")
        if dense != self.function:
            words["dense_function"] = dense
        elif f"{dense}_with_integer_labels" in self.functions:
            words["integer_function"] = f"{dense}_with_integer_labels"
        try:
            return hint.format_map(words)
        except KeyError:
            return ""

    def check_names(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """An error for arguments that the function doesn't have, or that are missing."""
        if self.takes_any:
            return
        for name in kwargs:
            if name not in self.names:
                close = difflib.get_close_matches(name, self.names, 1, 0.75)
                likely = f"did you mean {close[0]}=?" if close else ""
                raise ArgumentTypeError(f"unexpected keyword {name!r}", *_ELSEWHERE.get(name, ()), likely)
        if len(args) > len(self.positional):
            others = ", ".join(f"{name}=" for name in self.names if name not in self.positional)
            raise ArgumentTypeError(
                f"only {', '.join(self.positional)} may be given by position, got {len(args)} arguments",
                others and f"name the others: {others}",
            )
        for name in self.positional[: len(args)]:
            if name in kwargs:
                raise ArgumentTypeError(f"{name} must be given once, got it by position and by name")
        for name in self.required:
            if name not in kwargs and name not in self.positional[: len(args)]:
                raise ArgumentTypeError(f"missing argument {name!r}", "write {call}")


def named_class(cls: _C) -> _C:
    """A decorator of a class: errors about the arguments of its constructor and of its operators get its name."""
    for name in {"__init__", "__truediv__", "__add__", "__radd__", "__sub__", "__array__"} & {*vars(cls)}:
        setattr(cls, name, _naming_class(vars(cls)[name]))
    return cls


class NamedMethods:
    """A base of classes: errors about the arguments of their public methods get the name of the class in use."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, method in [*vars(cls).items()]:
            if isinstance(method, classmethod):
                setattr(cls, name, classmethod(_naming_class(method.__func__)))
            elif name == "__new__":
                setattr(cls, name, staticmethod(_naming_class(method.__func__)))
            elif inspect.isfunction(method) and not name.startswith("_"):
                setattr(cls, name, _naming_class(method))


def _naming_class(method: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(method).parameters

    @functools.wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        owner = args[0] if isinstance(args[0], type) else type(args[0])
        with (naming := named(owner.__name__, parameters, method.__name__.replace("__init__", ""))):
            naming.check_names(args[1:], kwargs)
            return method(*args, **kwargs)

    return checked


def pytree(*static: str) -> Callable[[_C], _C]:
    """A decorator of a dataclass: a pytree of its fields, but for those that are ``static``. Leaves are not checked.

    As `jax.tree_util.register_dataclass`, but trees of two classes with the same fields are different: to JAX (0.12, too)
    those are equal, and a function compiled for one of them may then return the other.
    """

    def register(cls: _C) -> _C:
        data = [f.name for f in dataclasses.fields(cls) if f.name not in static]

        def flatten(x: Any) -> Any:
            return tuple(getattr(x, name) for name in data), tuple(getattr(x, name) for name in static)

        def flatten_with_keys(x: Any) -> Any:
            children, aux = flatten(x)
            return tuple(zip(map(jax.tree_util.GetAttrKey, data), children, strict=True)), aux

        def unflatten(aux: Any, children: Any) -> Any:
            x = object.__new__(cls)
            for name, value in zip((*data, *static), (*children, *aux), strict=True):
                object.__setattr__(x, name, value)
            return x

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return register


_MEAN = ("it is a mean; for a sum give {normalizer}=1", "losses come one per example; their mean is {weighted_mean}")
_MASK = ("give {where}=, True for what takes part", "give {example_weights}=, True for what takes part")
_WEIGHTS = ("give {example_weights}=", "weight examples by {weighted_mean}")
_CLASS_WEIGHTS = ("give {class_weights}=, one per class", "give {pos_weight}=, the weight of the positive class")
_PREDICTIONS = (
    "it takes logits; probabilities are for categorical_cross_entropy or binary_cross_entropy{logits:.0}",
    "it takes probabilities; logits are for the functions with softmax or sigmoid in their names{probs:.0}",
    "it takes log-probabilities, such as jaxce.log_softmax(logits){log_predictions:.0}",
    "it takes log-probabilities; logits are for softmax_cross_entropy_with_integer_labels{log_probs:.0}",
)
_SOFT_CAP = ("give it to {LinearLogits}", "give {soft_cap}=")
_NATS = tuple(f"divide the result, in nats, by jnp.log(base){{{n}:.0}}" for n in ("logits", "probs", "log_probs", "x"))
_ORDER = ("write {call}",)
_ELSEWHERE = {
    "reduction": _MEAN,
    "reduce": _MEAN,
    "size_average": _MEAN,
    "ignore_index": (*(f"give {of}={{labels}} != ignore_index" for of in ("{where}", "{example_weights}")), *_MASK),
    "ignore_class": (*(f"give {of}={{labels}} != ignore_class" for of in ("{where}", "{example_weights}")), *_MASK),
    "mask": _MASK,
    "where": _MASK,
    "weight": (
        "give {class_weights}=, one per class, or {example_weights}=, one per example",
        *(f"{hint}, or {_WEIGHTS[1]}" for hint in _CLASS_WEIGHTS),
        *_WEIGHTS,
    ),
    "weights": _WEIGHTS,
    "sample_weight": _WEIGHTS,
    "sample_weights": _WEIGHTS,
    "class_weight": _CLASS_WEIGHTS,
    "class_weights": _CLASS_WEIGHTS,
    "pos_weight": _CLASS_WEIGHTS,
    "alpha": _CLASS_WEIGHTS,
    "from_logits": _PREDICTIONS,
    "log_target": ("logarithms of targets are for kl_divergence_with_log_targets{log_predictions:.0}{targets:.0}",),
    "dim": ("give {axis}=",),
    "axes": ("give {axis}=",),
    "axis": (
        "give {class_axis}=",
        "vectors are on the last axis{scale_tril:.0}",
        "each entry has a result of its own; sum these over the axis{where:.0}{second:.0}",
    ),
    "keepdims": ("write jnp.expand_dims(result, {axis})",),
    "keepdim": ("write jnp.expand_dims(result, {axis})",),
    "axis_name": (
        "inside of jax.shard_map give jaxce.ShardedLogits(logits, axis_name){LinearLogits:.0}{axis:.0}",
        "for the mean of all devices write jax.lax.psum of {call} with "
        "{normalizer}=jax.lax.psum(weights.sum(), axis_name)",
    ),
    "smoothing": ("give {label_smoothing}=",),
    "label_smoothing": ("smooth the labels first: jaxce.smooth_labels(labels, alpha){integer_function:.0}",),
    "z_loss_weight": ("give {z_loss}=",),
    "z_loss_multiplier": ("give {z_loss}=",),
    "logsumexp_weight": ("give {z_loss}=",),
    "temperature": (
        "divide the logits by it, or give it to {LinearLogits}{logits:.0}",
        "divide the logits by it{logits:.0}",
        "divide the logits by it, or give it to {LinearLogits}{p_logits:.0}",
    ),
    "gamma": ("it is an argument of softmax_focal_loss and sigmoid_focal_loss{labels:.0}",),
    "normalizer": ("give it to {weighted_mean}",),
    "num_classes": ("the logits say how many classes there are{logits:.0}",),
    "transpose": ("give {class_axis}=0 for a kernel of shape [classes, features]{kernel:.0}",),
    "soft_cap": _SOFT_CAP,
    "logit_cap": _SOFT_CAP,
    "softcap": _SOFT_CAP,
    "logit_soft_cap": _SOFT_CAP,
    "logits_soft_cap": _SOFT_CAP,
    "base": _NATS,
    "beta": ("give {weight}=",),
    "input": _ORDER,
    "target": _ORDER,
    "targets": _ORDER,
    "preds": _ORDER,
    "predictions": _ORDER,
    "y_true": _ORDER,
    "y_pred": _ORDER,
    "y_prob": _ORDER,
    "pk": _ORDER,
    "qk": _ORDER,
    "loc": ("give {location}=", "give {log_mean}=, its logarithm"),
    "mean": ("give {location}=", "give {log_mean}=, its logarithm"),
    "scale": ("give {log_scale}=, its logarithm", "give {temperature}=1 / scale"),
    "std": ("give {log_scale}=, its logarithm{full:.0}",),  # only of a normal distribution it is the scale
    "var": ("give {log_scale}=jnp.log(var) / 2{full:.0}",),
    "variance": ("give {log_scale}=jnp.log(variance) / 2{full:.0}",),
    "rate": ("give {log_rate}=, its logarithm",),
    "df": ("give {log_df}=, its logarithm",),
    "concentration": ("give {log_concentration}=, its logarithm",),
    "covariance": ("give {scale_tril}=jnp.linalg.cholesky(covariance)",),
    "covariance_matrix": ("give {scale_tril}=jnp.linalg.cholesky(covariance_matrix)",),
}
"""What to write in place of an argument that isn't there, by the name that it has elsewhere."""


# ---------------------------------------------------------------------------------------------------- calls


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
SHARES, NUMBERS = SHARE._replace(broadcasts=True), FINITE._replace(broadcasts=True)

_AXIS = "an integer or a tuple of integers"
_BASE = "None (nats) or a positive number other than 1"
_AXIS_NAME = "the name of a mesh axis or a tuple of names"
_STATIC = {"axis": _AXIS, "base": _BASE, "axis_name": _AXIS_NAME, "positives": "'label' or 'group'"}
_STATIC |= {name: "True or False" for name in ("full", "exclude_self", "has_aux")}
_STATIC["chunk_size"] = "None or a positive integer"


def compiled(*static: str, **numbers: Number) -> Callable[[_F], _F]:
    """``jax.jit``, with some options static, and others numbers that may be traced.

    Normalises arguments that `jax.jit` would reject (lists, arrays of 64-bit integers, NumPy's numbers as static
    options), and raises errors of the library's one form for what it can't. Python numbers are checked at once, arrays
    only for their shape and dtype, so that a new value is no reason to compile again. A number that makes no difference
    comes in as None. Typed as the function itself, so that editors see its signature.
    """

    def decorate(function: _F) -> _F:
        jitted = jax.jit(function, static_argnames=static)
        parameters = inspect.signature(function).parameters
        defaults = {n: parameters[n].default for n in numbers if parameters[n].default is not inspect.Parameter.empty}
        naming = named(function.__name__, parameters)
        method = "self" in parameters
        private = method or function.__name__.startswith("_")  # of a class, whose name errors get
        named.functions.add(function.__name__)

        def read(name: str, value: Any) -> Any:
            if name in numbers:
                return option(name, value, numbers[name])
            if value is None and name in naming.required and not private:
                raise ArgumentTypeError(f"{name} must be an array of numbers, got None")
            return _static(name, value) if name in static else _host_array(name, value)

        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            naming.check_names(args[method:], kwargs)
            given = [read(name, value) for name, value in zip(parameters, args, strict=False)]
            options = {n: v for n, v in defaults.items() if n not in naming.positional[: len(args) - method]}
            return jitted(*given, **{n: read(n, v) for n, v in (options | kwargs).items()})

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if private:
                return call(args, kwargs)
            with naming:
                return call(args, kwargs)

        checked._cache_size = jitted._cache_size  # type: ignore[attr-defined]
        return cast(_F, checked)

    return decorate


def _static(argument: str, value: Any) -> Any:
    """A static option as Python values, which can be hashed."""
    if type(value) in (list, tuple):
        value = tuple(_static(argument, v) for v in value)
    expected = f"{argument} must be {_STATIC.get(argument, 'a Python value')}"
    if isinstance(value, Tracer):
        hint = "name it in static_argnames of the jax.jit around this, as it is part of the program"
        raise ArgumentTypeError(f"{expected}, got a traced {describe(value)}", hint)
    if isinstance(value, np.generic | np.ndarray | Array) and value.ndim == 0:
        return value.item()
    if hasattr(value, "shape") or value.__hash__ is None:
        raise ArgumentTypeError(
            f"{expected}, got {describe(value)}", *(_IN_PLACE_OF_AXIS if argument == "axis" else ())
        )
    return value


_IN_PLACE_OF_AXIS = (
    "a mask is {where}=, and weights of examples are for {weighted_mean}{second:.0}",
    "joint probabilities are one array; relative_entropy compares two distributions{joint:.0}",
    "cross_entropy and relative_entropy take two distributions{p:.0}",
    "cross_entropy_with_logits and relative_entropy_with_logits take two distributions{logits:.0}{base:.0}",
)


def _host_array(argument: str, value: Any) -> Any:
    """Lists as arrays, at NumPy's speed; an error for what isn't numbers, and for integers that 32 bits would change."""
    if value is None or isinstance(value, Array):
        return value
    expected = f"{argument} must be an array of numbers"
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        traced = any(isinstance(x, Array) for x in jax.tree.leaves(value))
        try:
            value = jnp.asarray(value) if traced else np.asarray(value)
        except (TypeError, ValueError):
            raise ArgumentTypeError(f"{expected}, got {describe(value)}") from None
    bits = 64 if jax.config.jax_enable_x64 else 32  # type: ignore[attr-defined]
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        number = int(value)
        if abs(number) < 2 ** (bits - 1):
            return number
        if argument != "labels":
            return float(number)  # a count, say
        raise ArgumentValueError(f"{argument} must be integers of {bits} bits, got {number}")
    if isinstance(value, str | bytes | np.ndarray | np.generic | bool | float | complex):
        array = np.asarray(value)
        if array.dtype.kind not in "biufcV" or array.dtype.names:  # V: of JAX's own dtypes
            raise ArgumentTypeError(f"{expected}, got {describe(value)}")
        if array.dtype in (np.int64, np.uint64) and bits == 32:
            large = array[array.astype(np.int32) != array]
            if large.size:
                raise ArgumentValueError(f"{argument} must be integers of {bits} bits, got {large[0]}")
        return value
    if jax.tree_util.all_leaves([value]) and not hasattr(value, "__jax_array__"):
        kind = f"{type(value).__module__.split('.')[0]}.{type(value).__qualname__}"
        convert = f"give numpy.asarray({{{argument}}})" if hasattr(value, "__array__") else ""
        raise ArgumentTypeError(f"{expected}, got a {kind}", convert)
    return value


def describe(value: Any) -> str:
    """``value`` as errors show it: dtype and shape of an array, and the start of what is long."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return reprlib.repr(value)


def _array(argument: str, value: ArrayLike, kind: Any, expected: str, *hints: str) -> Array:
    try:  # An array stays as it is: under jax_debug_nans a copy of a traced one would be looked into.
        # What only describes an array is one for all that is asked here.
        array: Any = value if isinstance(value, jax.ShapeDtypeStruct | Array) else jnp.asarray(value)
    except (TypeError, ValueError):
        got = "None" if value is None else type(value).__name__
        hint = f"give {{{argument}}}.materialize()" if hasattr(value, "materialize") else ""
        raise ArgumentTypeError(f"{argument} must be {expected}, got {got}", hint) from None
    if not jnp.issubdtype(array.dtype, kind):
        raise ArgumentTypeError(f"{argument} must be {expected}, got {describe(array)}", *hints)
    return array


def array(argument: str, value: ArrayLike) -> Array:
    """``value`` as an array of numbers."""
    return _array(argument, value, np.generic, "an array of numbers")


def floating(argument: str, value: ArrayLike) -> Array:
    """``value`` as an array of floating-point numbers; a single number may be an integer."""
    array = _array(argument, value, np.generic, "a floating-point array")
    if array.ndim == 0 and jnp.issubdtype(array.dtype, jnp.integer):
        array = array * 1.0 if array.weak_type else array.astype(np.float32)  # a Python number decides no dtype
    order = f"{{{argument}}} come first, {{labels}} second"
    labels = "logits with integer labels are for softmax_cross_entropy_with_integer_labels{p:.0}"
    array = _array(argument, array, jnp.floating, "a floating-point array", labels if argument == "q" else order)
    if array.dtype.itemsize == 1:  # neither the range nor, on every device, an exact path to float32
        expected = "float16, bfloat16, float32 or float64"
        raise ArgumentTypeError(f"{argument} must be {expected}, got {describe(array)}")
    return array


def real(argument: str, value: ArrayLike, dtype: Any = np.float32) -> Array:
    """``value`` as an array of floating-point numbers, of ``dtype`` where they are booleans or integers."""
    given = array(argument, value)
    return floating(argument, given if jnp.issubdtype(given.dtype, jnp.inexact) else given.astype(dtype))


def integer(argument: str, value: ArrayLike, *hints: str) -> Array:
    """``value`` as an array of integers."""
    return _array(argument, value, jnp.integer, "an integer array", *hints)


def boolean(argument: str, value: ArrayLike) -> Array:
    """``value`` as an array of booleans; of integers those that aren't 0 are True."""
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array != 0
    if jnp.issubdtype(array.dtype, jnp.floating):
        mask = f"for a mask give {{{argument}}}=mask != 0"
        raise ArgumentTypeError(
            f"{argument} must be a boolean or integer array, got {describe(array)}",
            f"{mask}, for weights {{weighted_mean}}{{second:.0}}",
            mask,
        )
    return _array(argument, array, jnp.bool_, "a boolean or integer array")


def compute_dtype(*arrays: Any) -> np.dtype:
    """The dtype to compute in: the widest of the arguments' and float32. Half precision is computed in float32.

    Python numbers take part only where there is nothing else, as everywhere in JAX.
    """
    strong = [a for a in arrays if not getattr(a, "weak_type", False)] or arrays
    return functools.reduce(np.promote_types, (a.dtype for a in strong if a.dtype.itemsize >= 4), np.dtype(np.float32))


def upcast(*arrays: Array) -> tuple[Array, ...]:
    """All arrays in their common `compute_dtype`, cast one by one, as strict dtype promotion demands."""
    dtype = compute_dtype(*arrays)
    return tuple(a.astype(dtype) for a in arrays)


def axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """``axis`` as non-negative integers, in the order given."""
    try:
        given = tuple(operator.index(a) for a in (axis if isinstance(axis, Sequence) else (axis,)))
        if any(isinstance(a, bool) for a in (axis, *given)):
            raise TypeError
    except TypeError:
        raise ArgumentTypeError(f"axis must be {_AXIS}, got {describe(axis)}") from None
    if ndim == 0:
        raise ArgumentValueError(f"axis must name an axis, got {axis!r} for a scalar")
    if not given or any(not -ndim <= a < ndim for a in given):
        raise ArgumentValueError(f"axis must name one or more of the {ndim} axes, got {axis!r}")
    result = tuple(a % ndim for a in given)
    if len(set(result)) != len(result):
        raise ArgumentValueError(f"axis must name each axis once, got {axis!r}")
    return result


def axis_name(names: Any) -> AxisName:
    """Names of mesh axes, each once."""
    given = names if isinstance(names, tuple) else (names,)
    if not given or any(not isinstance(name, str) for name in given) or len(set(given)) != len(given):
        raise ArgumentValueError(f"axis_name must be {_AXIS_NAME}, got {names!r}")
    return names


def same_shape(argument: str, array: Array, shape: tuple[int, ...], of: str, *hints: str) -> None:
    """An error unless the array has exactly this shape; ``of`` says in the message whose shape it is."""
    if array.shape != shape:
        raise ArgumentValueError(f"{argument} must have {of}, {shape}, got {describe(array)}", *hints)


def scalar_or(argument: str, array: Array, shape: tuple[int, ...], of: str) -> None:
    """An error unless the array is a scalar or has exactly this shape, which is described by ``of``."""
    if array.shape not in ((), shape):
        expected = f"a scalar or have {of}, {shape}"
        raise ArgumentValueError(f"{argument} must be {expected}, got {describe(array)}")


def labels_of_rows(
    labels: ArrayLike, shape: tuple[int, ...], class_axes: tuple[int, ...], of: str = "the logits"
) -> Array:
    """One integer label for each row of something of ``shape``."""
    batch, given = batch_shape(shape, class_axes), np.shape(cast(Any, labels))
    hints = labels_hints(given, shape, class_axes)
    y = integer("labels", labels, *(("give {labels}.astype(int)",) if given == batch else hints))
    same_shape("labels", y, batch, f"the shape of {of} without their class axes", *hints)
    return y


def labels_hints(labels: tuple[int, ...], shape: tuple[int, ...], class_axes: tuple[int, ...]) -> tuple[str, ...]:
    """What to write for labels of a shape that doesn't fit logits of ``shape``, if that is likely enough."""
    batch = batch_shape(shape, class_axes)
    others = [a for a in range(len(shape)) if a not in class_axes and batch_shape(shape, (a,)) == labels]
    if labels == batch:
        return ("one class for each row is for {integer_function}",)
    if labels == shape:
        return "one number for each class is for {dense_function}", f"give {{labels}}.argmax({class_axes[0]})"
    if others:
        return (f"if the classes are on that axis, give {{axis}}={others[0]}",)
    if labels == (*batch, 1):
        return ("give {labels}[..., 0]",)
    return ()


def option(argument: str, value: Any, kind: Number) -> Any:
    """An option: a number, checked, or an array, with axes if it broadcasts; None if it makes no difference."""
    if value is None:
        return None
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        if not kind.valid(float(value)):
            raise ArgumentValueError(f"{argument} must be {kind.expected}, got {value!r}")
        return None if value == kind.neutral else float(value)
    if kind.broadcasts and not isinstance(value, jax.ShapeDtypeStruct):
        value = _host_array(argument, value)
    if not hasattr(value, "dtype"):
        raise ArgumentTypeError(f"{argument} must be {kind.expected}, got {value!r}")
    given: Any = value
    array = _array(argument, given, np.generic, kind.expected)
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(array.dtype, jnp.integer):
        raise ArgumentTypeError(f"{argument} must be {kind.expected}, got {describe(array)}")
    if array.ndim and not kind.broadcasts:
        raise ArgumentValueError(f"{argument} must be a scalar, got {describe(array)}")
    return array


def positive_integer(argument: str, value: Any, expected: str = "a positive integer") -> int:
    """An integer of at least 1, of Python or NumPy, as Python's."""
    number = _static(argument, value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ArgumentTypeError(f"{argument} must be {expected}, got {describe(value)}")
    if not (1 <= number < math.inf and number == int(number)):
        raise ArgumentValueError(f"{argument} must be {expected}, got {value!r}")
    return int(number)


def log_base(base: Any) -> float | None:
    """The natural logarithm of ``base``; None, for nats, stays None."""
    if base is None:
        return None
    if not isinstance(base, int | float) or isinstance(base, bool):
        raise ArgumentTypeError(f"base must be {_BASE}, got {describe(base)}")
    if not 0 < base < math.inf or base == 1:
        raise ArgumentValueError(f"base must be {_BASE}, got {base!r}")
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


def where_mask(where: ArrayLike, shape: tuple[int, ...], class_axes: tuple[int, ...]) -> tuple[str, Array]:
    """``where`` as a mask of "rows", of "classes" or of "entries", with the classes last.

    A mask with as many axes as the batch says which rows take part, and has the batch's shape. One with as many axes as
    ``shape`` says which entries do, and broadcasts to it; its axes of rows may stay of length 1.
    """
    mask = boolean("where", where)
    batch = batch_shape(shape, class_axes)
    if mask.shape == batch:
        return "rows", mask
    if mask.ndim != len(shape) or any(n not in (1, m) for n, m in zip(mask.shape, shape, strict=True)):
        axes = ", ".join(["None"] * (len(shape) - mask.ndim))
        raise ArgumentValueError(
            f"where must have the batch shape, {batch}, to say which rows take part, or {len(shape)} axes that "
            f"broadcast to {shape} to say which entries do, got {describe(mask)}",
            f"for a mask of classes give {{where}}[{axes}]" if 0 < mask.ndim < len(shape) else "",
        )
    if all(mask.shape[a] == 1 for a in class_axes):
        return "rows", jnp.broadcast_to(jnp.squeeze(mask, class_axes), batch)
    mask = jnp.broadcast_to(mask, [shape[a] if a in class_axes else n for a, n in enumerate(mask.shape)])
    mask = classes_last(mask, class_axes)
    return ("classes", mask.reshape(-1)) if math.prod(mask.shape[:-1]) == 1 else ("entries", mask)


def where_entries(where: ArrayLike, shape: tuple[int, ...], class_axes: tuple[int, ...]) -> Array:
    """``where`` as a mask of every entry, in place."""
    where_mask(where, shape, class_axes)
    mask = boolean("where", where)
    if mask.ndim < len(shape):
        mask = jnp.expand_dims(mask, class_axes)
    return jnp.broadcast_to(mask, shape)


def where_elements(where: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    """``where`` of an elementwise function as a mask of its result, which has this shape; None if all take part."""
    if where is None:
        return None
    mask = boolean("where", where)
    missing = len(shape) - mask.ndim
    if missing == 0 and all(n in (1, m) for n, m in zip(mask.shape, shape, strict=True)):
        return jnp.broadcast_to(mask, shape)
    new = ", ".join(["None"] * missing)
    raise ArgumentValueError(
        f"where must have as many axes as the result and broadcast to it, {shape}, got {describe(mask)}",
        f"for a mask of the first axes give {{where}}[..., {new}], of the last where[{new}]" if missing > 0 else "",
    )


def only(mask: Array | None, array: Array, otherwise: float) -> Array:
    """The array where the mask is True (None: everywhere), and elsewhere another number.

    Apply it both to the inputs and to the result of a formula: then all derivatives by what is left out are 0.
    """
    return array if mask is None else jnp.where(mask, array, otherwise)


def dense(
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
    x = array(argument, value)
    numbers = not jnp.issubdtype(x.dtype, jnp.floating) and classes is not None and x.ndim < len(shape)
    x = real(argument, x, dtype)
    fits = x.ndim <= len(shape) and all(n in (1, m) for n, m in zip(x.shape[::-1], shape[::-1], strict=False))
    if fits and not numbers:
        return jnp.broadcast_to(x, shape)
    hint = ""
    if numbers:
        hint = f"class numbers are for {classes}"
    elif [n for n in x.shape if n != 1] == [n for n in shape if n != 1]:
        hint = f"give {{{argument}}}.reshape({shape})"
    raise ArgumentValueError(
        f"{argument} must have the shape of {of}, {shape}, or broadcast to it, got {describe(value)}", hint
    )
