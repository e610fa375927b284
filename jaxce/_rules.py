"""Functions with derivative rules of their own that hold wherever the function ends up.

`jax.custom_jvp` forgets its rule, up to jax 0.11, where a loop is differentiated twice: `lax.scan` partially evaluates its
body to find what doesn't change from step to step, and there replaces each such function that does by its plain body,
whose derivative is another one. Here the function is a primitive, which partial evaluation leaves whole.

This file ends when the oldest supported jax is 0.12, of which tests/test_rules.py tells.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jax.experimental.jet import jet_rules
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec, reshard

_ruled = Primitive("ruled")
_ruled.multiple_results = True


class custom_jvp:  # named as JAX's, whose place it takes
    """As `jax.custom_jvp`, of positional arguments alone."""

    def __init__(self, function: Callable[..., Any], nondiff_argnums: Sequence[int] = ()) -> None:
        functools.update_wrapper(self, function)
        self.function, self.static = function, nondiff_argnums

    def defjvp(self, rule: Callable[..., Any], symbolic_zeros: bool = False) -> Callable[..., Any]:
        """Sets rule(*static arguments, primals, tangents) -> (primals, tangents) of the results."""
        self.rule, self.symbolic_zeros = rule, symbolic_zeros
        return rule

    def defslopes(
        self,
        slopes: Callable[..., tuple[Array | None, ...]],
        times: Callable[[Array, Array], Array] | None = None,
    ) -> None:
        """Sets the derivative by each argument of an elementwise function; None by one that only says another more exactly.

        They are multiplied with tangents by `product`, unless ``times`` says otherwise. Static arguments come first.
        """

        def rule(*args: Any) -> Any:
            *static, primals, tangents = args
            pairs = zip(slopes(*static, *primals), tangents, strict=True)
            terms = [(times or product)(c, t) for c, t in pairs if c is not None and not _is_zero(t)]
            out = self(*static, *primals)
            return out, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(out)

        self.defjvp(rule, symbolic_zeros=True)

    def __call__(self, *args: Any) -> Any:
        static = tuple(args[i] for i in self.static)
        leaves, tree = jax.tree.flatten(tuple(a for i, a in enumerate(args) if i not in self.static))
        out_tree = None

        def plain(*leaves: Any) -> list[Any]:
            nonlocal out_tree
            given = iter(static), iter(tree.unflatten(leaves))
            out, out_tree = jax.tree.flatten(
                self.function(*(next(given[i not in self.static]) for i in range(len(args))))
            )
            return out

        def rule(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
            if not self.symbolic_zeros:
                tangents = [ad.instantiate_zeros(ad.Zero(t.aval)) if _is_zero(t) else t for t in tangents]
            out, dout = self.rule(*static, tree.unflatten(primals), tree.unflatten(tangents))
            return jax.tree.leaves(out), jax.tree.leaves(dout, is_leaf=_is_zero)

        out = _bind(plain, rule, leaves)
        return jax.tree.unflatten(out_tree, out)


def _zero(primal: Any) -> SymbolicZero:
    return zero_from_primal(primal, symbolic_zeros=True)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def not_zero(tangents: dict[str, Any]) -> dict[str, Array]:
    """The tangents that aren't known to be 0."""
    return {name: t for name, t in tangents.items() if not _is_zero(t)}


def no_tangents(tree: Any) -> Any:
    """For each array of a tree a tangent that is known to be 0."""
    return jax.tree.map(_zero, tree)


def _bind(plain: Callable[..., Any], rule: Callable[..., Any], args: Sequence[Any]) -> list[Any]:
    return _ruled.bind(*args, jaxpr=jax.make_jaxpr(plain)(*args), rule=rule)


def _evaluate(*args: Any, jaxpr: Any, rule: Any) -> list[Any]:
    return jaxpr_as_fun(jaxpr)(*args)


def _jvp(primals: Any, tangents: Any, *, jaxpr: Any, rule: Any) -> tuple[list[Any], list[Any]]:
    out, dout = rule(primals, [SymbolicZero(t.aval) if type(t) is ad.Zero else t for t in tangents])
    return out, [ad.Zero(t.aval) if _is_zero(t) else t for t in dout]


def _batch(axis: Any, args: Any, axes: Any, *, jaxpr: Any, rule: Any) -> tuple[list[Any], list[int | None]]:
    if all(a is None for a in axes):
        out = _ruled.bind(*args, jaxpr=jaxpr, rule=rule)
        return out, [None] * len(out)
    vmap = functools.partial(jax.vmap, axis_size=axis.size, axis_name=axis.name, spmd_axis_name=axis.spmd_name)
    plain = jaxpr_as_fun(jaxpr)
    out_axes = _out_axes(vmap, plain, args, axes)

    def batched(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        def one(primals: Any, tangents: Any) -> Any:
            out, dout = rule(primals, [_zero(x) if t is None else t for x, t in zip(primals, tangents, strict=True)])
            return out, [None if _is_zero(t) else t for t in dout]

        some = [None if _is_zero(t) else t for t in tangents]
        out, dout = vmap(one, (list(axes), list(axes)), (out_axes, out_axes))(list(primals), some)
        return out, [_zero(x) if t is None else t for x, t in zip(out, dout, strict=True)]

    return _bind(vmap(plain, tuple(axes), out_axes), batched, args), out_axes


def _out_axes(vmap: Any, function: Callable[..., Any], args: Any, axes: Any) -> list[int | None]:
    """0 of each result that is mapped, None of one that isn't, such as a sum over the axis."""
    mapped: dict[int, int] = {}

    def look(i: int, x: Any) -> Any:
        @jax.custom_batching.custom_vmap
        def see(x: Any) -> Any:
            return x

        @see.def_vmap
        def _(size: int, in_batched: Any, x: Any) -> Any:
            mapped[i] = 0
            return x, True

        return see(x)

    out = jax.eval_shape(vmap(lambda *args: [look(i, x) for i, x in enumerate(function(*args))], tuple(axes)), *args)
    return [mapped.get(i) for i in range(len(out))]


def _transpose(cotangents: Any, *args: Any, jaxpr: Any, rule: Any) -> list[Any]:
    """That of a function that is linear in the arguments that aren't known."""
    unknown = {i: x.aval for i, x in enumerate(args) if ad.is_undefined_primal(x)}

    def plain(*varying: Any) -> list[Any]:
        given = dict(zip(unknown, varying, strict=True))
        return jaxpr_as_fun(jaxpr)(*(given.get(i, x) for i, x in enumerate(args)))

    zeros = [ad.instantiate_zeros(ad.Zero(aval)) for aval in unknown.values()]
    found = dict(zip(unknown, jax.vjp(plain, *zeros)[1]([ad.instantiate_zeros(t) for t in cotangents]), strict=True))
    return [found.get(i) for i in range(len(args))]


def _jet(primals: Any, series: Any, *, jaxpr: Any, rule: Any) -> tuple[list[Any], list[list[Any]]]:
    """The Taylor coefficients of the function along a curve whose own are given, by its rule as often as there are some."""
    order = max(map(len, series))

    def derivatives(t: Array) -> Any:
        def point(x: Any, terms: Any) -> Any:
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                return x
            return x + sum(c * (t**k).astype(c.dtype) for k, c in enumerate(terms, 1))

        return _ruled.bind(*map(point, primals, series), jaxpr=jaxpr, rule=rule)

    out = []
    for k in range(order + 1):
        out.append([d / math.factorial(k) for d in derivatives(jnp.zeros(()))] if k else derivatives(jnp.zeros(())))
        derivatives = functools.partial(lambda f, t: jax.jvp(f, (t,), (jnp.ones(()),))[1], derivatives)
    return out[0], [list(terms) for terms in zip(*out[1:], strict=True)]


_ruled.def_impl(_evaluate)
_ruled.def_abstract_eval(lambda *args, jaxpr, rule: jaxpr.out_avals)
ad.primitive_jvps[_ruled] = _jvp
ad.primitive_transposes[_ruled] = _transpose
batching.fancy_primitive_batchers[_ruled] = _batch
jet_rules[_ruled] = _jet
mlir.register_lowering(_ruled, mlir.lower_fun(_evaluate, multiple_results=True))


def largest(x: Array) -> float:
    """The largest finite number of x's dtype."""
    return float(jnp.finfo(x.dtype).max)


def smallest(x: Array) -> float:
    """The smallest normal number of x's dtype, next to 0 to XLA."""
    return float(jnp.finfo(x.dtype).tiny)


_product = Primitive("product")


def product(x: Array, y: Array) -> Array:
    """x * y, where 0 times anything is 0, infinity and NaN included, in derivatives of every order and both modes.

    A plain product of two arrays makes NaN of 0 * inf, in the derivative as well: what has no weight has a cotangent of 0.
    A selection of the result is no way out, as it isn't linear in the tangent. So it is a bilinear primitive.
    """
    return _product.bind(*alike(*jnp.broadcast_arrays(x, y)))


def alike(*arrays: Array) -> tuple[Array, ...]:
    """Arrays of a shape, which vary over the same axes of a mesh and are sharded alike."""
    types = [jax.typeof(x) for x in arrays]
    if all(t == types[0] for t in types):
        return arrays
    own = [t.manual_axis_type.varying for t in types]
    others = [tuple(sorted(frozenset().union(*own) - axes)) for axes in own]
    arrays = tuple(lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(arrays, others, strict=True))
    shardings = [jax.typeof(x).sharding for x in arrays]
    if any(s != shardings[0] for s in shardings):
        parts = zip(*(_parts(s.spec, arrays[0].ndim) for s in shardings), strict=True)
        mesh = next(s.mesh for s in shardings if not s.mesh.empty)
        spec = PartitionSpec(*(next(filter(None, axes), None) for axes in parts))
        arrays = tuple(reshard(x, NamedSharding(mesh, spec)) for x in arrays)
    return arrays


def _parts(spec: PartitionSpec, ndim: int) -> tuple[Any, ...]:
    return tuple(spec) + (None,) * (ndim - len(spec))


def _evaluate_product(x: Array, y: Array) -> Array:
    return jnp.where((x == 0) | (y == 0), 0, x * y)


def _batch_product(args: Any, axes: Any) -> tuple[Array, int]:
    size = next(x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None)
    x, y = (
        jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0)
        for x, a in zip(args, axes, strict=True)
    )
    return product(x, y), 0


def _jet_product(primals: Any, series: Any) -> tuple[Array, list[Array]]:
    x, y = ([v, *terms] for v, terms in zip(primals, series, strict=True))
    first, *others = (functools.reduce(jnp.add, map(product, x[: k + 1], y[k::-1])) for k in range(len(x)))
    return first, others


_product.def_impl(jax.jit(_evaluate_product))
_product.def_abstract_eval(lambda x, y: x)
ad.defbilinear(_product, lambda ct, x, y: product(ct, y), lambda ct, x, y: product(x, ct))
batching.primitive_batchers[_product] = _batch_product
jet_rules[_product] = _jet_product
mlir.register_lowering(_product, mlir.lower_fun(_evaluate_product, multiple_results=False))


@custom_jvp
def times(x: Array, y: Array) -> Array:
    """x * y, and in derivatives 0 times anything is 0. Either has a derivative where the other is 0."""
    return x * y


times.defslopes(lambda x, y: (y, x))


def weigh(weight: Array, loss: Array) -> Array:
    """weight * loss, where a weight of 0 takes away an infinite loss too."""
    return times(weight, jnp.where((weight == 0) & jnp.isinf(loss), 0, loss))
