"""Every public function under every transformation: one table of functions, crossed with one list of transformations.

A new function is one row of `CASES`: how to call it, and how to make arguments for a batch of a given size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick

import jaxce

K = 4
Arrays = tuple[np.ndarray, ...]


# Makers of arguments: (generator, batch shape) -> float64 or integer array


def reals(*trailing: int) -> Callable[..., np.ndarray]:
    return lambda rng, batch: rng.normal(size=(*batch, *trailing))


def positive(*trailing: int) -> Callable[..., np.ndarray]:
    return lambda rng, batch: rng.uniform(0.5, 2, size=(*batch, *trailing))


def probabilities(*trailing: int) -> Callable[..., np.ndarray]:
    """Distributions over all the trailing axes together."""

    def make(rng: np.random.Generator, batch: tuple[int, ...]) -> np.ndarray:
        weights = rng.uniform(0.2, 1, size=(*batch, *trailing))
        return weights / weights.sum(axis=tuple(range(-len(trailing), 0)), keepdims=True)

    return make


def log_probabilities(*trailing: int) -> Callable[..., np.ndarray]:
    return lambda rng, batch: np.log(probabilities(*trailing)(rng, batch))


def unit(*trailing: int) -> Callable[..., np.ndarray]:
    """Probabilities of one event each."""
    return lambda rng, batch: rng.uniform(0.1, 0.9, size=(*batch, *trailing))


def distinct(rng: np.random.Generator, batch: tuple[int, ...]) -> np.ndarray:
    """Samples that stay in order when they are moved a little."""
    return rng.permuted(np.arange(9.0) ** 2 / 8 + rng.uniform(-0.03, 0.03, size=(*batch, 9)), axis=-1)


def cholesky(rng: np.random.Generator, batch: tuple[int, ...]) -> np.ndarray:
    return np.tril(rng.normal(size=(*batch, 2, 2)), -1) + np.eye(2) * rng.uniform(0.5, 2, size=(*batch, 2, 1))


def classes(rng: np.random.Generator, batch: tuple[int, ...]) -> np.ndarray:
    return rng.integers(K, size=batch).astype(np.int32)


def two_classes(rng: np.random.Generator, batch: tuple[int, ...]) -> np.ndarray:
    return rng.integers(K, size=(*batch, 2)).astype(np.int32)


class Case(NamedTuple):
    """``function(*floats, *integers, **options)``: ``floats`` are differentiated, everything is mapped over."""

    function: str
    floats: tuple[Callable[..., np.ndarray], ...]
    integers: tuple[Callable[..., np.ndarray], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    last: int = 0  # how many of the floats come after the integers
    reduces: bool = False  # whether it makes one number of the whole batch
    coupled: bool = False  # whether rows need each other; a mask is of rows
    slow: bool = False  # to compile

    @property
    def name(self) -> str:
        """What pytest shows."""
        kinds = ["integer labels"] if self.integers and self.function in ("softmax_focal_loss",) else []
        return ", ".join([self.function, *kinds, *(f"{k}={v}" for k, v in self.options if not hasattr(v, "shape"))])

    @property
    def public(self) -> Callable[..., Any]:
        return getattr(jaxce, self.function)

    @property
    def takes_where(self) -> bool:
        return "where" in inspect.signature(self.public).parameters

    def make(self, batch: int | None, dtype: str, seed: int = 0) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        rng = np.random.default_rng(seed)
        shape = () if batch is None else (batch,)
        return (
            tuple(jnp.asarray(maker(rng, shape), dtype) for maker in self.floats),
            tuple(jnp.asarray(maker(rng, shape)) for maker in self.integers),
        )

    def call(self, floats: Any, integers: Any, where: Any = None) -> tuple[jax.Array, ...]:
        """The floating-point results, as a tuple."""
        options = {k: v for k, v in self.options} | ({} if where is None else {"where": where})
        first = len(floats) - self.last
        result = self.public(*floats[:first], *integers, *floats[first:], **options)
        return tuple(leaf for leaf in jax.tree.leaves(result) if jnp.issubdtype(leaf.dtype, jnp.floating))

    def scalar(self, floats: Any, integers: Any, where: Any = None) -> jax.Array:
        """One number in which every result counts, with weights that no symmetry cancels."""
        total = jnp.zeros((), floats[0].dtype if floats[0].dtype.itemsize >= 4 else "float32")
        for i, leaf in enumerate(self.call(floats, integers, where)):
            total += jnp.sum(leaf * jnp.sin(1 + i + jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)))
        return total


# Where the numbers matter and not how fast they come.


def options(**kwargs: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(kwargs.items())


WEIGHTS = np.array([1.0, 0.5, 2.0, 0.0], np.float32)
x, p, log_p = reals(K), probabilities(K), log_probabilities(K)
CASES = [
    # logits
    Case("logsumexp", (x,), slow=True),
    Case("log_softmax", (x,)),
    Case("softmax_statistics", (x,), (classes,)),
    Case("softmax_statistics", (x,), options=options(labels=None), slow=True),
    # losses on logits
    Case("softmax_cross_entropy", (x, p)),
    Case("softmax_cross_entropy", (x, p), options=options(label_smoothing=0.1, z_loss=0.1), slow=True),
    Case("safe_softmax_cross_entropy", (x, p), slow=True),
    Case("softmax_cross_entropy_with_integer_labels", (x,), (classes,), slow=True),
    Case("softmax_cross_entropy_with_integer_labels", (x,), (classes,), options(label_smoothing=0.1, z_loss=0.1)),
    Case("softmax_cross_entropy_with_sparse_labels", (x, positive(2)), (two_classes,), last=1),
    Case("softmax_focal_loss", (x,), (classes,), slow=True),
    Case("softmax_focal_loss", (x, p), options=options(gamma=1.5), slow=True),
    Case("poly_loss_cross_entropy", (x,), (classes,), slow=True),
    Case("poly_loss_cross_entropy", (x, p), options=options(epsilon=0.5)),
    Case("smooth_labels", (p,), options=options(alpha=0.1)),
    Case("sigmoid_binary_cross_entropy", (reals(), unit())),
    Case("sigmoid_binary_cross_entropy_with_sparse_labels", (x,), (two_classes,), options(pos_weight=2.0)),
    Case("sigmoid_binary_cross_entropy_with_sparse_labels", (x, unit(2)), (two_classes,), last=1, slow=True),
    Case("sigmoid_focal_loss", (reals(), unit())),
    Case("sigmoid_focal_loss", (reals(), unit()), options=options(alpha=0.25, gamma=1.5), slow=True),
    # losses on probabilities
    Case("categorical_cross_entropy", (p, p), slow=True),
    Case("categorical_cross_entropy_with_integer_labels", (p,), (classes,)),
    Case("binary_cross_entropy", (unit(), unit())),
    # losses on log-probabilities
    Case("kl_divergence", (log_p, p)),
    Case("kl_divergence_with_log_targets", (log_p, log_p), slow=True),
    Case("generalized_kl_divergence", (log_p, p), slow=True),
    Case("nll", (log_p,), (classes,)),
    # information
    Case("surprisal", (unit(),), options=options(base=2)),
    Case("entropy", (p,)),
    Case("entropy", (p,), options=options(base=2), slow=True),
    Case("cross_entropy", (p, p), slow=True),
    Case("relative_entropy", (p, p)),
    Case("jensen_shannon_divergence", (p, p), slow=True),
    Case("mutual_information", (probabilities(2, 3),), slow=True),
    Case("differential_entropy", (distinct,)),
    Case("differential_entropy", (distinct,), options=options(method="ebrahimi", window_length=2), slow=True),
    Case("entropy_with_logits", (x,), options=options(base=2)),
    Case("cross_entropy_with_logits", (x, x), slow=True),
    Case("relative_entropy_with_logits", (x, x), slow=True),
    Case("jensen_shannon_divergence_with_logits", (x, x), slow=True),
    # likelihoods
    Case("bernoulli_nll", (reals(), unit()), slow=True),
    Case("gaussian_nll", (reals(), reals(), reals())),
    Case("gaussian_relative_entropy", (reals(), reals(), reals(), reals()), slow=True),
    Case("laplace_nll", (reals(), reals(), reals()), slow=True),
    Case("student_t_nll", (reals(), reals(), reals(), reals()), slow=True),
    Case("exponential_nll", (reals(), positive()), slow=True),
    Case("gamma_nll", (reals(), reals(), positive()), slow=True),
    Case("poisson_nll", (reals(),), (classes,), slow=True),
    Case("negative_binomial_nll", (reals(), reals()), (classes,), slow=True),
    Case("multivariate_normal_nll", (reals(2), cholesky, reals(2)), slow=True),
    Case("mixture_nll", (x, x), slow=True),
    # reduction
    Case("weighted_mean", (reals(), positive()), reduces=True),
    Case("perplexity", (positive(),)),
    Case("bits_per", (positive(), positive()), slow=True),
    # pairs
    Case("softmax_cross_entropy_of_pairs", (x,), (classes,), coupled=True),
]
every_case = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c.slow else c for c in CASES], ids=lambda case: case.name
)
MASKED = [c for c in CASES if c.takes_where]
every_masked_case = pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)


def close(got: Any, expected: Any, rtol: float, atol: float) -> None:
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol)


@functools.cache
def in_float64(case: Case) -> tuple[Any, Any, Any]:
    """Arguments in float32, and value and gradient of `Case.scalar` at just these numbers in float64."""
    floats, integers = case.make(3, "float32")
    with jax.enable_x64(True):
        wide = tuple(f.astype("float64") for f in floats)
        value, gradient = quick(jax.value_and_grad(case.scalar))(wide, integers)
        assert value.dtype == "float64" and all(g.dtype == "float64" for g in gradient)
        assert all(leaf.dtype == "float64" for leaf in case.call(wide, integers))
        return (floats, integers), np.asarray(value), tuple(map(np.asarray, gradient))


def test_the_table_covers_every_public_function() -> None:
    functions = {n for n in jaxce.__all__ if callable(getattr(jaxce, n)) and not isinstance(getattr(jaxce, n), type)}
    tested_elsewhere = {"linear_cross_entropy", "linear_sigmoid_binary_cross_entropy"}  # in files of their own
    assert functions == {case.function for case in CASES} | tested_elsewhere


@pytest.mark.slow
@every_case
def test_eager_and_jit(case: Case) -> None:
    """Compiled alone, inside another function, and not at all: the same numbers, in float32."""
    (floats, integers), value, gradient = in_float64(case)
    results = case.call(floats, integers)
    assert results and all(leaf.dtype == "float32" for leaf in results)
    compiled = jax.jit(jax.value_and_grad(case.scalar))(floats, integers)
    close(compiled, (value, gradient), rtol=1e-5, atol=1e-5)
    close(case.scalar(floats, integers), value, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@every_case
def test_without_jit(case: Case) -> None:
    floats, integers = case.make(3, "float32")
    compiled = case.call(floats, integers)
    with jax.disable_jit():
        close(case.call(floats, integers), compiled, rtol=2e-6, atol=1e-6)


@every_case
def test_vmap_is_stacking(case: Case) -> None:
    floats, integers = case.make(3, "float32")
    whole = case.reduces or case.coupled
    if whole:  # over rows of a batch of batches
        floats, integers = (tuple(np.stack([f, f[::-1]]) for f in given) for given in (floats, integers))
    mapped, call = quick(jax.vmap(case.call))(floats, integers), quick(case.call)
    single = [call(*jax.tree.map(lambda a, i=i: np.asarray(a)[i], (floats, integers))) for i in range(len(floats[0]))]
    close(mapped, [np.stack(leaves) for leaves in zip(*single, strict=True)], rtol=2e-6, atol=1e-6)
    if not whole:
        close(mapped, call(floats, integers), rtol=2e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in MASKED if not c.coupled], ids=lambda case: case.name)
def test_vmap_over_masks(case: Case) -> None:
    floats, integers = case.make(3, "float32")
    masks = jnp.array([True, False, True])
    mapped = jax.vmap(case.call)(floats, integers, masks)
    close(mapped, case.call(floats, integers, masks), rtol=2e-6, atol=1e-6)


@every_case
def test_derivatives(case: Case) -> None:
    """Both modes, both orders and finite differences, in float64, where finite differences mean something."""
    with jax.enable_x64(True):
        floats, integers = case.make(2, "float64")
        directions = case.make(2, "float64", seed=1)[0]
        function = functools.partial(case.scalar, integers=integers)
        gradient_of = jax.grad(function)

        def with_tangent(f: Any, floats: Any) -> Any:
            return jax.jvp(f, (floats,), (directions,))

        def tangent_along(floats: Any) -> Any:
            return with_tangent(function, floats)[1]

        def dot(a: Any, b: Any) -> Any:
            return sum(jnp.vdot(left, right) for left, right in zip(a, b, strict=True))

        @quick
        def all_orders(floats: Any) -> Any:
            call = functools.partial(case.call, integers=integers)
            gradient, forward_over_reverse = with_tangent(gradient_of, floats)
            tangent, forward_over_forward = with_tangent(tangent_along, floats)
            return {
                "value": function(floats),
                "gradient": gradient,
                "jvp": tangent,
                "jacfwd": jax.jacfwd(call)(floats),
                "jacrev": jax.jacrev(call)(floats),
                "forward over reverse": forward_over_reverse,
                "reverse over forward": jax.grad(tangent_along)(floats),
                "reverse over reverse": jax.grad(lambda f: dot(gradient_of(f), directions))(floats),
                "forward over forward": forward_over_forward,
            }

        step = 1e-5
        ahead, behind = (
            all_orders(tuple(f + sign * step * d for f, d in zip(floats, directions, strict=True))) for sign in (1, -1)
        )
        difference = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
        results = all_orders(floats)
        along = dot(results["gradient"], directions)
        close(along, difference["value"], rtol=1e-7, atol=1e-8)
        close(results["jvp"], along, rtol=1e-12, atol=1e-13)
        close(results["jacfwd"], results["jacrev"], rtol=1e-12, atol=1e-13)
        close(results["forward over reverse"], difference["gradient"], rtol=1e-6, atol=1e-7)
        close(results["reverse over forward"], results["forward over reverse"], rtol=1e-10, atol=1e-12)
        close(results["reverse over reverse"], results["forward over reverse"], rtol=1e-10, atol=1e-12)
        close(results["forward over forward"], dot(results["forward over reverse"], directions), rtol=1e-10, atol=1e-12)


@every_case
def test_half_precision(case: Case) -> None:
    """bfloat16 in, float32 out, computed from the exact bfloat16 numbers; gradients come back in bfloat16."""
    floats, integers = case.make(3, "bfloat16")
    wide = tuple(f.astype("float32") for f in floats)

    @quick
    def both(floats: Any) -> Any:
        return case.call(floats, integers), jax.grad(case.scalar)(floats, integers)

    (results, gradient), (wide_results, wide_gradient) = both(floats), both(wide)
    assert all(leaf.dtype == "float32" for leaf in results) and all(g.dtype == "bfloat16" for g in gradient)
    close(results, wide_results, rtol=2e-6, atol=1e-6)
    # A gradient of one term is rounded once; the terms of a sum are rounded one by one, by up to 2^-9 of each.
    several = case.function == "softmax_statistics" or "z_loss" in case.name or "smoothing" in case.name
    close(gradient, wide_gradient, rtol=2**-8, atol=8e-3 if several else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if len(c.floats) == 2], ids=lambda case: case.name)
def test_mixed_precision(case: Case) -> None:
    """Each argument may have its own dtype, and the suite runs under strict promotion."""
    (first, second), integers = case.make(3, "float32")
    for args in [(first.astype("bfloat16"), second), (first, second.astype("float16"))]:
        assert all(leaf.dtype == "float32" for leaf in case.call(args, integers))
        gradient = jax.grad(lambda floats: sum(leaf.sum() for leaf in case.call(floats, integers)))(args)
        assert tuple(g.dtype for g in gradient) == tuple(a.dtype for a in args)


@pytest.mark.slow
@every_case
def test_standard_promotion_changes_nothing(case: Case) -> None:
    floats, integers = case.make(3, "bfloat16")
    strict = case.call(floats, integers)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        relaxed = case.call(floats, integers)
    for a, b in zip(strict, relaxed, strict=True):
        assert a.dtype == b.dtype and jnp.array_equal(a, b)


@pytest.mark.slow
@every_case
def test_empty_batch(case: Case) -> None:
    floats, integers = case.make(0, "float32")
    results = case.call(floats, integers)
    full = case.call(*case.make(2, "float32"))
    for empty, two in zip(results, full, strict=True):
        assert empty.shape == tuple(0 if i == 0 and n == 2 else n for i, n in enumerate(two.shape))
        assert np.all(np.asarray(empty) == 0)
    gradient = jax.grad(case.scalar)(floats, integers)
    assert all(g.shape == f.shape for g, f in zip(gradient, floats, strict=True))


@pytest.mark.slow
@every_masked_case
@pytest.mark.parametrize(
    "content", ["nan", *(pytest.param(c, marks=pytest.mark.slow) for c in ("as it was", "inf", "-inf"))]
)
def test_all_masked(case: Case, content: str) -> None:
    """Nothing left: value 0 (-inf, where the answer is the logarithm of nothing) and gradient 0, whatever is inside."""
    floats, integers = case.make(2, "float32")
    if content != "as it was":
        floats = tuple(jnp.full(f.shape, float(content)) for f in floats)
        integers = tuple(jnp.full(n.shape, -100) for n in integers)

    def both(floats: Any, where: jax.Array) -> Any:
        values = case.call(floats, integers, where)
        tangents = jax.jvp(lambda f: case.call(f, integers, where), (floats,), (floats,))[1]
        return values, jax.grad(lambda f: sum(v.sum() for v in case.call(f, integers, where)))(floats), tangents

    of_rows = case.function == "multivariate_normal_nll" or case.coupled  # which a mask leaves out whole
    masks = [jnp.zeros(floats[0].shape[:-1] if of_rows else floats[0].shape, bool)]
    if not case.reduces and not of_rows:
        masks.append(jnp.zeros(2, bool))
    for where in masks:
        values, gradient, tangents = both(floats, where)
        assert not any(np.any(np.isnan(v)) for v in values)
        if case.function not in ("logsumexp", "log_softmax", "softmax_statistics"):
            assert all(np.all(np.asarray(v) == 0) for v in values)
        assert all(np.all(np.asarray(g) == 0) for g in gradient)
        if content == "as it was":  # the tangents given are numbers
            assert all(np.all(np.asarray(t) == 0) for t in tangents)


AWKWARD: dict[str, Any] = {
    # function: floats at which a careless 0 * inf, inf - inf or 0 / 0 shows, though the answer and its gradient exist
    "softmax_cross_entropy": ([[0.0, -np.inf, 90.0], [1e30, 1e30, 0.0]], [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]),
    "safe_softmax_cross_entropy": ([[0.0, -np.inf, 90.0], [1e30, 1e30, 0.0]], [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]),
    "softmax_cross_entropy_with_integer_labels": ([[0.0, -np.inf, 90.0], [-3e38, 3e38, 0.0]],),
    "softmax_focal_loss": ([[0.0, -np.inf, 90.0], [-3e38, 3e38, 0.0]],),
    "poly_loss_cross_entropy": ([[0.0, -np.inf, 90.0], [-3e38, 3e38, 0.0]],),
    "softmax_statistics": ([[0.0, -np.inf, 90.0], [-3e38, 3e38, 0.0]],),
    "entropy_with_logits": ([[0.0, -np.inf, 90.0], [-3e38, 3e38, 0.0], [-np.inf] * 3],),
    "logsumexp": ([[0.0, -np.inf, 90.0], [-3e38, 3e38, 0.0]],),
    "sigmoid_binary_cross_entropy": ([np.inf, -np.inf, 0.0, 3e38], [1.0, 0.0, 0.5, 1.0]),
    "entropy": ([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]],),
    "relative_entropy": ([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]], [[0.0, 1.0, 0.0], [0.25, 0.25, 0.5]]),
    "jensen_shannon_divergence": ([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]], [[0.0, 0.0, 1.0], [0.5, 0.5, 0.0]]),
    "cross_entropy": ([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]], [[0.0, 1.0, 0.0], [0.25, 0.25, 0.5]]),
    "weighted_mean": ([1.0, np.inf], [1.0, 0.0]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AWKWARD)
def test_debug_nans_at_awkward_points(name: str) -> None:
    """No NaN inside either: `jax.debug_nans` would point at it."""
    floats = tuple(jnp.asarray(f, "float32") for f in AWKWARD[name])
    integers = next(c for c in CASES if c.function == name).integers and (jnp.array([2, 1]),)
    case = Case(name, (), integers)
    with jax.debug_nans(True):
        assert not any(np.any(np.isnan(v)) for v in case.call(floats, integers))
        gradient = jax.grad(lambda x: sum(v.sum() for v in case.call((x, *floats[1:]), integers)))(floats[0])
        assert not np.any(np.isnan(gradient))


@pytest.mark.slow
@every_case
def test_debug_nans_at_ordinary_points(case: Case) -> None:
    floats, integers = case.make(3, "float32")
    with jax.debug_nans(True):
        jax.grad(case.scalar)(floats, integers)
        jax.jvp(lambda f: case.scalar(f, integers), (floats,), (floats,))


@pytest.mark.slow
@every_case
def test_it_is_compiled_once(case: Case) -> None:
    """A second eager call with the same shapes traces nothing: the function is quick to call."""
    floats, integers = case.make(3, "float32")
    size = getattr(case.public, "_cache_size", None)
    assert size is not None, "a public function is jax.jit-compiled"
    case.call(floats, integers)
    before = size()
    case.call(floats, integers)
    assert size() == before
