"""What logits can be other than an array: a product that is never written down whole, or the part of a device."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxce import _checks
from jaxce._checks import ArrayLike, AxisName, pytree
from jaxce._rules import custom_jvp
from jaxce._state import beside


@pytree("class_axis", "block_size", "axis_name")
@_checks.named_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LinearLogits:
    r"""Logits as the product of hidden states and a kernel, for the losses to compute a block of classes at a time.

    .. math:: x = s \tanh\!\left(\frac{h W + b}{T s}\right), \qquad x = \frac{h W + b}{T} \text{ without a soft cap } s .

    Every function of logits with classes takes this in their place (not those of single binary logits, such as
    `sigmoid_binary_cross_entropy`) and gives the same value and the same derivatives, for the hidden states, the kernel,
    the bias, the temperature and the soft cap, of any order, in forward and in reverse mode. Neither the value nor a
    derivative needs memory for more than a block of logits, and the kernel is never copied whole (for a kernel in half
    precision its gradient is accumulated in float32, in an array of the kernel's shape). The classes are the last axis.
    It is a pytree: it passes through `jax.jit`, `jax.vmap`, `jax.lax.scan` and their like. ``logits[:, :-1]`` has some
    of the rows, ``logits / t`` another temperature, ``logits / t[..., None]`` one for each row, and ``logits + b``
    another bias, a number or one for each class.

    float16 and bfloat16 are multiplied as they are and summed in float32; in float32 JAX's own matmul precision holds.
    Where hidden and kernel are both bfloat16, cotangents of logits are rounded to bfloat16 before they are multiplied, and
    a block's part of the gradient of hidden after it, and these parts are summed in float32.

    Args:
      hidden: floating-point, of shape [..., features].
      kernel: floating-point, of shape [features, classes].
      bias: one number per class.
      class_axis: the kernel's axis of classes; 0 for a kernel of shape [classes, features], such as a tied embedding.
      soft_cap: a positive number that no logit's magnitude exceeds.
      temperature: a positive number by which hW + b is divided, or one for each row, of the shape of hidden without its
        features.
      block_size: how many classes at a time. By default an eighth of them, but at least 2048, at most 8192, and so few
        that a block has at most 2^26 logits. More than 32768 rows are computed in chunks of rows, one after the other.
      axis_name: inside `jax.shard_map`, the mesh axis, or axes, over which the kernel's classes are sharded: kernel and
        bias are then this device's part, and hidden is the same on all devices of the axis. See `ShardedLogits`.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> logits = jaxce.LinearLogits(jnp.ones((2, 3)), jnp.ones((3, 5)), block_size=2)
      >>> logits
      LinearLogits(float32[2,5] from hidden float32[2,3], kernel float32[3,5], block_size=2)
      >>> print(jaxce.softmax_cross_entropy_with_integer_labels(logits, jnp.array([0, 4])))
      [1.60944 1.60944]

    References:
      Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, https://arxiv.org/abs/2411.09009.
    """

    hidden: Array
    kernel: Array
    _: dataclasses.KW_ONLY
    bias: Array | None = None
    class_axis: int = -1
    soft_cap: ArrayLike | None = None
    temperature: ArrayLike | None = 1.0
    block_size: int | None = None
    axis_name: AxisName | None = None

    def __post_init__(self) -> None:
        hidden = _checks.floating("hidden", self.hidden)
        kernel = _checks.floating("kernel", self.kernel)
        if hidden.ndim < 1:
            raise _checks.ArgumentValueError(f"hidden must have an axis of features, got shape {hidden.shape}")
        if kernel.ndim != 2:
            raise _checks.ArgumentValueError(
                f"kernel must have two axes, features and classes, got shape {kernel.shape}"
            )
        if self.class_axis not in (-2, -1, 0, 1) or isinstance(self.class_axis, bool):
            raise _checks.ArgumentValueError(
                f"class_axis must be 0 or -1, an axis of the kernel, got {self.class_axis!r}"
            )
        class_axis = 0 if self.class_axis in (0, -2) else -1
        if kernel.shape[-1 - class_axis] != hidden.shape[-1]:
            other = kernel.shape[class_axis] == hidden.shape[-1]
            raise _checks.ArgumentValueError(
                f"kernel must have as many features as hidden, {hidden.shape[-1]}, on axis {-1 - class_axis}, "
                f"got shape {kernel.shape}",
                f"if its classes are on axis {-1 - class_axis}, give class_axis={-1 - class_axis}" if other else "",
            )
        if kernel.shape[class_axis] == 0:
            raise _checks.ArgumentValueError(f"kernel must have at least one class, got shape {kernel.shape}")
        bias = None
        if self.bias is not None:
            bias = _checks.floating("bias", self.bias)
            _checks.same_shape("bias", bias, (kernel.shape[class_axis],), "one number per class")
        size = self.block_size
        if size is not None:
            size = _checks.positive_integer("block_size", size, "None or a positive integer")
        temperature = _temperature(self.temperature)
        if np.ndim(temperature):
            _checks.scalar_or("temperature", temperature, hidden.shape[:-1], "one number per row")
        fields = {
            "hidden": hidden,
            "kernel": kernel,
            "bias": bias,
            "class_axis": class_axis,
            "soft_cap": _checks.option("soft_cap", self.soft_cap, _checks.POSITIVE),
            "temperature": None if isinstance(temperature, float) and temperature == 1 else temperature,
            "block_size": size,
            "axis_name": None if self.axis_name is None else _checks.axis_name(self.axis_name),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def classes(self) -> int:
        """How many classes there are, on this device if the kernel is sharded."""
        return self.kernel.shape[self.class_axis]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logits, [..., classes], on this device."""
        return (*self.hidden.shape[:-1], self.classes)

    @property
    def ndim(self) -> int:
        """How many axes the logits have."""
        return self.hidden.ndim

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the logits: the wider of hidden and kernel, at least float32."""
        return _checks.compute_dtype(self.hidden, self.kernel)

    def materialize(self) -> Array:
        """The logits as an array, with all the memory that takes; of this device's classes if the kernel is sharded."""
        x = product(self.hidden, self.kernel, self.class_axis, is_half(self.hidden, self.kernel))
        if self.bias is not None:
            x = x + jnp.broadcast_to(self.bias.astype(x.dtype), x.shape)
        return shape_logits(x, self.temperature, self.soft_cap)

    __array_ufunc__ = None  # of NumPy's arrays: that they leave sums to this class
    __iter__ = None  # else Python would take logits[0], logits[1] and so on, and JAX's indices never end

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise _checks.ArgumentTypeError("logits must be made an array by materialize(), with all the memory that takes")

    def __getitem__(self, index: Any) -> LinearLogits:
        """The logits of some rows; all classes of them."""
        given = index if isinstance(index, tuple) else (index,)
        takes = [0 if i is None or i is Ellipsis else max(1, i.ndim if _is_mask(i) else 1) for i in given]
        last = given[-1] if given else ...
        if (any(i is Ellipsis for i in given) and last is not Ellipsis) or sum(takes) >= self.ndim:
            if not (isinstance(last, slice) and last == slice(None)):
                raise IndexError(
                    f"an index must leave the axis of classes whole, got {index!r}; to take some classes "
                    "give LinearLogits a part of the kernel, or a where= to the loss"
                )
        temperature = self.temperature
        if self._temperatures is not None:
            temperature = self._temperatures[..., None][index][..., 0]
        return dataclasses.replace(self, hidden=self.hidden[index], temperature=temperature)

    def __truediv__(self, temperature: ArrayLike) -> LinearLogits:
        """The logits at a temperature; with an axis for the classes, of length 1, at one for each row."""
        self._demand_no_soft_cap("divide by a number before it is applied, give temperature=")
        t = _temperature(temperature)
        if np.ndim(t):
            of = "one number per row and an axis of length 1"
            _checks.scalar_or("temperature", t, (*self.hidden.shape[:-1], 1), of)
            t = t[..., 0]
        if self.temperature is not None:
            before, t = (jnp.asarray(t).astype(self.dtype) for t in (self.temperature, t))
            t = before * t
        return dataclasses.replace(self, temperature=t)

    def __add__(self, bias: ArrayLike) -> LinearLogits:
        """The logits with one more bias: a number, or one for each class."""
        self._demand_no_soft_cap("add a bias before it is applied, give bias=")
        more = _checks.floating("bias", bias)
        _checks.scalar_or("bias", more, (self.classes,), "one number per class")
        more = jnp.broadcast_to(more, self.classes)
        if self._temperatures is not None:
            raise _checks.ArgumentTypeError(
                "what has a temperature for each row must stay as it is; to add a bias before it divides, give bias=, "
                "else use materialize()"
            )
        if self.temperature is not None:  # by which the bias of the product is divided
            more = more.astype(self.dtype) * jnp.asarray(self.temperature).astype(self.dtype)
        if self.bias is not None:
            more, before = _checks.upcast(more, self.bias)
            more = more + before
        return dataclasses.replace(self, bias=more)

    __radd__ = __add__

    def __sub__(self, bias: ArrayLike) -> LinearLogits:
        """The logits with one bias less."""
        return self + (-_checks.floating("bias", bias))

    def _demand_no_soft_cap(self, hint: str) -> None:
        if self.soft_cap is not None:
            raise _checks.ArgumentTypeError(
                f"what has a soft cap must stay as it is; to {hint}, else use materialize()"
            )

    @property
    def _temperatures(self) -> Array | None:
        """Those of the rows, if each has its own."""
        temperature: Any = self.temperature
        return temperature if np.ndim(temperature) else None

    def __repr__(self) -> str:
        try:
            parts = [f"from hidden {_checks.describe(self.hidden)}, kernel {_checks.describe(self.kernel)}"]
            whole = f"{np.dtype(self.dtype).name}[{','.join(map(str, self.shape))}] "
        except (AttributeError, TypeError, IndexError):  # other leaves, as JAX's transformations put there
            parts, whole = [f"hidden={self.hidden!r}, kernel={self.kernel!r}"], ""
        if self.bias is not None:
            parts.append("bias")
        if self.class_axis == 0:
            parts.append("class_axis=0")
        options = {name: getattr(self, name) for name in ("soft_cap", "temperature", "block_size", "axis_name")}
        if self._temperatures is not None:
            parts.append(f"temperature={_checks.describe(options.pop('temperature'))}")
        parts += [f"{name}={value!r}" for name, value in options.items() if value is not None]
        return f"LinearLogits({whole}{', '.join(parts)})"


def _temperature(value: Any) -> Any:
    """A positive number, or an array of them."""
    return _checks.option("temperature", value, _checks.POSITIVE._replace(broadcasts=True))


def _is_mask(index: Any) -> bool:
    return hasattr(index, "dtype") and index.dtype == bool


@pytree("axis_name")
@_checks.named_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ShardedLogits:
    r"""One device's part of logits whose classes are sharded over a mesh, for use inside `jax.shard_map` (or `jax.vmap`).

    .. math:: k = i\, n + j \quad \text{ for class } j \text{ of the } n \text{ classes of device } i .

    Every function of logits with classes takes this in their place, and gives each device the numbers, and the
    derivatives, that the whole logits have. What crosses the network is a few numbers per row. What has an axis of classes
    is this device's part too: dense labels, a mask of entries, class weights, the log-probabilities of `log_softmax`.
    Integer labels and predictions count the classes of all devices, and are the same on all devices of the axis, as is
    whatever has no axis of classes: losses, masks of rows.

    If the number of classes is not a multiple of the number of devices, pad the classes and mask the padding with
    ``where``: it is ignored everywhere, also in label smoothing. (The loss of a label on it is +inf, as on any masked
    class.)

    Derivatives taken outside of the `jax.shard_map` are right, in all modes and orders. Those taken inside are too, with
    its default ``check_vma=True``. With ``check_vma=False`` JAX's transpose of a sum over devices is such a sum: a gradient
    taken inside is that of the sum of all devices' (equal) losses, larger by the number of devices of the axis, and the
    gradient of what is the same on all devices (hidden states) is only this device's part of it.

    Args:
      logits: floating-point, of shape [..., this device's classes]; as many on each device.
      axis_name: the mesh axis over which the classes are sharded; of several, the first is the slowest, as in
        `jax.sharding.PartitionSpec`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> def loss(x, labels):
      ...     logits = jaxce.ShardedLogits(x, axis_name="model")
      ...     return jaxce.softmax_cross_entropy_with_integer_labels(logits, labels)
      >>> sharded = jax.shard_map(loss, mesh=mesh, in_specs=(P(None, "model"), P()), out_specs=P())
      >>> print(jax.jit(sharded)(jnp.zeros((2, 5 * jax.device_count())), jnp.array([0, 4])) - jnp.log(jax.device_count()))
      [1.60944 1.60944]

    References:
      Shoeybi et al., Megatron-LM, https://arxiv.org/abs/1909.08053, section 3.
    """

    logits: Array
    axis_name: AxisName

    def __post_init__(self) -> None:
        logits = _checks.floating("logits", self.logits)
        if logits.ndim < 1:
            raise _checks.ArgumentValueError(f"logits must have an axis of classes, got shape {logits.shape}")
        object.__setattr__(self, "logits", logits)
        object.__setattr__(self, "axis_name", _checks.axis_name(self.axis_name))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape on this device, [..., this device's classes]."""
        return self.logits.shape

    @property
    def ndim(self) -> int:
        """How many axes the logits have."""
        return self.logits.ndim

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the logits."""
        return self.logits.dtype

    def __repr__(self) -> str:
        return f"ShardedLogits({_checks.describe(self.logits)} of each device, axis_name={self.axis_name!r})"


NotArray = LinearLogits | ShardedLogits
AnyLogits = ArrayLike | LinearLogits | ShardedLogits
"""What every function of logits takes."""


def is_half(hidden: Array, kernel: Array) -> bool:
    """Whether all products are of two bfloat16 numbers."""
    return hidden.dtype == kernel.dtype == jnp.bfloat16


def product(hidden: Array, kernel: Array, class_axis: int, half: bool) -> Array:
    """The product of hidden states with the classes of a kernel, summed in at least float32.

    A kernel with strips of classes, two axes of them, takes hidden states of their own, [strips, ..., features], and gives
    [..., strips, classes]. ``half`` says that all factors are bfloat16 numbers, though hidden may come as float32.
    """
    dtype = _checks.compute_dtype(hidden, kernel)
    factors = jnp.bfloat16 if half else dtype
    return _dot(hidden.astype(factors), kernel.astype(factors), class_axis, dtype)


@partial(custom_jvp, nondiff_argnums=(2, 3))
def _dot(hidden: Array, kernel: Array, class_axis: int, dtype: Any) -> Array:
    """The product in this dtype, of factors of one dtype.

    A policy of `jax.checkpoint` that keeps all products doesn't know this as one: it would keep all blocks of logits.
    """
    features = kernel.ndim - 1 if class_axis == 0 else 0
    if kernel.ndim == 2:
        return lax.dot_general(
            hidden, kernel, (((hidden.ndim - 1,), (features,)), ((), ())), preferred_element_type=dtype
        )
    axes = ((hidden.ndim - 1,), (features,)), ((0,), (0 if class_axis == 0 else 1,))
    return jnp.moveaxis(lax.dot_general(hidden, kernel, axes, preferred_element_type=dtype), 0, -2)


@partial(_dot.defjvp, symbolic_zeros=True)
def _(class_axis: int, dtype: Any, primals: Any, tangents: Any) -> Any:
    """Tangents of bfloat16 factors are rounded to bfloat16: so a transpose multiplies two such numbers, which is fast."""
    hidden, kernel = primals
    dh, dw = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    terms = [] if dh is None else [_dot(dh, kernel, class_axis, hidden.dtype)]
    terms += [] if dw is None else [_dot(hidden, dw, class_axis, hidden.dtype)]
    return _dot(hidden, kernel, class_axis, dtype), _kept.bind(sum(terms[1:], terms[0])).astype(dtype)


# The identity, whose transpose makes an array of the cotangent. Else XLA:TPU may compute it from the logits in both
# products with it, and there again for each tile of features: of 4096 a gradient took 1.3 of the cycles (jaxlib 0.10.2).
_kept = Primitive("kept")
_kept.def_impl(lambda x: x)
_kept.def_abstract_eval(lambda x: x)
ad.deflinear2(_kept, lambda cotangent, _: [lax.optimization_barrier(cotangent)])
batching.defvectorized(_kept)
mlir.register_lowering(_kept, lambda context, x: [x])


def shape_logits(x: Array, temperature: Any, soft_cap: Any) -> Array:
    """The logits of the products: divided by the temperature and capped, but for -inf, which a bias may be: no class."""
    if temperature is None and soft_cap is None:
        return x
    absent = jnp.isneginf(x)
    x = jnp.where(absent, 0, x)
    if temperature is not None:
        x = x / beside(jnp.asarray(temperature).astype(x.dtype), x)
    if soft_cap is not None:
        cap = jnp.asarray(soft_cap).astype(x.dtype)
        x = cap * jnp.tanh(x / cap)
    return jnp.where(absent, -jnp.inf, x)
