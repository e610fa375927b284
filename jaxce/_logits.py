"""What logits can be other than an array: a product that is never written down whole."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jaxce import _checks


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LinearLogits:
    r"""Logits as the product of hidden states and a kernel, for the losses to compute a block of classes at a time.

    .. math:: x = s \tanh\!\left(\frac{h W + b}{T s}\right), \qquad x = \frac{h W + b}{T} \text{ without a soft cap } s .

    Every function of jaxce that takes logits takes this in their place and gives the same value and the same derivatives,
    for the hidden states, the kernel, the bias, the temperature and the soft cap, to any order and in both modes. Neither
    the value nor a derivative needs memory for more than a block of logits, and the kernel is never copied whole (for a
    kernel in half precision its gradient is accumulated in float32, in an array of the kernel's shape). The classes
    are the last axis. It is a pytree: it passes through `jax.jit`, `jax.vmap`, `jax.lax.scan` and their like.

    float16 and bfloat16 are multiplied as they are and summed in float32; in float32 JAX's own matmul precision holds.
    Where hidden and kernel are both bfloat16, cotangents of logits are rounded to bfloat16 before they are multiplied, and
    a block's part of the gradient of hidden after it, and these parts are summed in float32.

    Args:
      hidden: floating-point, of shape [..., features].
      kernel: floating-point, of shape [features, classes].
      bias: one number per class.
      class_axis: the kernel's axis of classes; 0 for a kernel of shape [classes, features], such as a tied embedding.
      soft_cap: a positive number that no logit's magnitude exceeds.
      temperature: a positive number by which hW + b is divided.
      block_size: how many classes at a time. By default as many as make 2^22 logits with all rows, at least 256,
        evened out so that the last block is hardly smaller than the others.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> logits = jaxce.LinearLogits(jnp.ones((2, 3)), jnp.ones((3, 5)), block_size=2)
      >>> logits
      LinearLogits(float32[2,5] from hidden float32[2,3], kernel float32[3,5], block_size=2)
      >>> print(jaxce.softmax_cross_entropy_with_integer_labels(logits, jnp.array([0, 4])))
      [1.60944 1.60944]

    Reference:
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

    def __post_init__(self) -> None:
        name = "LinearLogits"
        hidden = _checks.floating(name, "hidden", self.hidden)
        kernel = _checks.floating(name, "kernel", self.kernel)
        if hidden.ndim < 1:
            raise ValueError(f"{name}: hidden must have an axis of features, got shape {hidden.shape}")
        if kernel.ndim != 2:
            raise ValueError(f"{name}: kernel must have two axes, features and classes, got shape {kernel.shape}")
        if self.class_axis not in (-2, -1, 0, 1) or isinstance(self.class_axis, bool):
            raise ValueError(f"{name}: class_axis must be 0 or -1, an axis of the kernel, got {self.class_axis!r}")
        class_axis = 0 if self.class_axis in (0, -2) else -1
        if kernel.shape[-1 - class_axis] != hidden.shape[-1]:
            raise ValueError(
                f"{name}: kernel must have as many features as hidden, {hidden.shape[-1]}, on axis {-1 - class_axis}, "
                f"got shape {kernel.shape}"
            )
        if kernel.shape[class_axis] == 0:
            raise ValueError(f"{name}: kernel must have at least one class, got shape {kernel.shape}")
        bias = None
        if self.bias is not None:
            bias = _checks.floating(name, "bias", self.bias)
            _checks.same_shape(name, "bias", bias, (kernel.shape[class_axis],), "one number per class")
        size = self.block_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1):
            raise ValueError(f"{name}: block_size must be None or a positive integer, got {size!r}")
        temperature = _positive(name, "temperature", self.temperature)
        fields = {
            "hidden": hidden,
            "kernel": kernel,
            "bias": bias,
            "class_axis": class_axis,
            "soft_cap": _positive(name, "soft_cap", self.soft_cap),
            "temperature": None if isinstance(temperature, float) and temperature == 1 else temperature,
            "block_size": None if size is None else int(size),
        }
        self._set(fields)

    def _set(self, fields: dict[str, Any]) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """The arrays, by name, and what is static."""
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in _CHILDREN)
        return children, (self.class_axis, self.block_size)

    @classmethod
    def tree_unflatten(cls, static: tuple[int, int | None], children: Any) -> LinearLogits:
        """The logits of any leaves: JAX puts other things than arrays there, so nothing is checked."""
        logits = object.__new__(cls)
        logits._set(dict(zip((*_CHILDREN, "class_axis", "block_size"), (*children, *static), strict=True)))
        return logits

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return self.kernel.shape[self.class_axis]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logits, [..., classes]."""
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
        """The logits as an array, with all the memory that takes."""
        x = contract(self.hidden, self.kernel, self.class_axis, self.half)
        if self.bias is not None:
            x = x + jnp.broadcast_to(self.bias.astype(x.dtype), x.shape)
        return shape_logits(x, self.temperature, self.soft_cap)

    @property
    def half(self) -> bool:
        """Whether all products are of two bfloat16 numbers."""
        return self.hidden.dtype == self.kernel.dtype == jnp.bfloat16

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
        options = {name: getattr(self, name) for name in ("soft_cap", "temperature", "block_size")}
        parts += [f"{name}={value}" for name, value in options.items() if value is not None]
        return f"LinearLogits({whole}{', '.join(parts)})"


_CHILDREN = ("hidden", "kernel", "bias", "soft_cap", "temperature")


def _positive(function: str, argument: str, value: Any) -> Any:
    """A positive number, checked where it is one already, or an array without axes."""
    if value is None:
        return None
    if isinstance(value, int | float | np.number):
        return _checks.number(function, argument, value, "a positive number", lambda v: 0 < v < math.inf)
    array = _checks.floating(function, argument, value)
    _checks.same_shape(function, argument, array, (), "no axes")
    return array


def contract(hidden: Array, kernel: Array, class_axis: int, half: bool) -> Array:
    """The product of hidden and (a block of) the kernel, summed in at least float32.

    ``half`` says that all factors are bfloat16 numbers, though hidden may come as float32: then a transpose, which sums
    over the blocks, sums in float32 what are products of bfloat16s.
    """
    if half:
        return _contract_half(hidden, kernel, class_axis)
    dtype = _checks.compute_dtype(hidden, kernel)
    return _dot(hidden.astype(dtype), kernel.astype(dtype), class_axis, dtype)


def _dot(hidden: Array, kernel: Array, class_axis: int, dtype: Any) -> Array:
    axes = ((hidden.ndim - 1,), (1 if class_axis == 0 else 0,))
    return lax.dot_general(hidden, kernel, (axes, ((), ())), preferred_element_type=dtype)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _contract_half(hidden: Array, kernel: Array, class_axis: int) -> Array:
    return _dot(hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), class_axis, jnp.float32)


@partial(_contract_half.defjvp, symbolic_zeros=True)
def _(class_axis: int, primals: Any, tangents: Any) -> Any:
    hidden, kernel = primals
    dh, dw = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    return _contract_half(hidden, kernel, class_axis), contract_half_tangent(hidden, kernel, dh, dw, class_axis)


def contract_half_tangent(hidden: Array, kernel: Array, dh: Array | None, dw: Array | None, class_axis: int) -> Array:
    """The tangent of a product of bfloat16s, rounded to bfloat16: so a transpose multiplies two of those, which is fast."""
    hidden, kernel = hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    terms = [] if dh is None else [_dot(dh, kernel, class_axis, jnp.bfloat16)]
    terms += [] if dw is None else [_dot(hidden, dw, class_axis, jnp.bfloat16)]
    return sum((t.astype(jnp.float32) for t in terms[1:]), terms[0].astype(jnp.float32))


def shape_logits(x: Array, temperature: Any, soft_cap: Any) -> Array:
    """The logits of the products: divided by the temperature and capped, but for -inf, which a bias may be: no class."""
    if temperature is None and soft_cap is None:
        return x
    absent = jnp.isneginf(x)
    x = jnp.where(absent, 0, x)
    if temperature is not None:
        x = x / jnp.asarray(temperature).astype(x.dtype)
    if soft_cap is not None:
        cap = jnp.asarray(soft_cap).astype(x.dtype)
        x = cap * jnp.tanh(x / cap)
    return jnp.where(absent, -jnp.inf, x)
