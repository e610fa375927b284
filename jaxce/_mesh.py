"""What the devices of a mesh know of each other, inside of `jax.shard_map`."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce._checks import AxisName

_T = TypeVar("_T")


def index(function: str, axis_name: AxisName) -> Array:
    """This device's place on the axis."""
    try:
        return lax.axis_index(axis_name)
    except NameError:
        raise ValueError(
            f"{function}: axis_name must be an axis that is mapped where the function is called, as inside of "
            f"jax.shard_map, got {axis_name!r}"
        ) from None


def varying(*trees: Any) -> frozenset[str]:
    """The axes over which some leaf differs from device to device, as far as JAX keeps account (``check_vma=True``)."""
    axes = (jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(trees))
    return frozenset().union(*axes)


def vary(tree: _T, axes: frozenset[str]) -> _T:
    """The same numbers, as something that differs over at least these axes.

    The transpose is a sum over devices: here, once, rather than wherever the numbers meet others that differ.
    """

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(axes - varying(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)
