"""Means, perplexities and bits: what is left out leaves no trace, and one device or many give the same number."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxce._reduction import bits_per, perplexity, weighted_mean

INF, NAN = np.inf, np.nan


def data(shape: tuple[int, ...] = (6, 5), dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.exponential(size=shape).astype(dtype), rng.uniform(0.1, 2, size=shape).astype(dtype)


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 1), (1,)])
def test_is_numpys_average(axis: Any) -> None:
    losses, weights = data()
    # Sums of at most 30 positive numbers in float32: a few eps.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    close(weighted_mean(losses, axis=axis), losses.astype(float).mean(axis))
    close(weighted_mean(losses, weights, axis=axis), np.average(losses.astype(float), axis, weights.astype(float)))
    mask = weights > 1
    close(weighted_mean(losses, mask, axis=axis), np.average(losses.astype(float), axis, mask))
    close(weighted_mean(losses, mask.astype(np.int32) * 3, axis=axis), np.average(losses.astype(float), axis, mask))


def test_weights_may_be_narrower_and_negative() -> None:
    losses, weights = data()
    for narrow in (weights[:, :1], weights[0], weights[:1], weights[0, 0]):
        full = np.broadcast_to(narrow, losses.shape)
        for axis in (None, 1):  # a few eps: XLA adds up in another order
            got = weighted_mean(losses, narrow, axis=axis)
            np.testing.assert_allclose(got, weighted_mean(losses, full, axis=axis), rtol=1e-6)
    assert weighted_mean(jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0])) == 0.5


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_has_no_weight_leaves_no_trace(bad: float) -> None:
    losses, weights = np.float32([[[1, 2], [5, bad]], [[1, 3], [0, 0]]])
    with jax.debug_nans(True):
        assert weighted_mean(losses, weights) == 1.75
        assert weighted_mean(losses, weights > 0) == 1.5
        by_loss, by_weight = jax.grad(weighted_mean, (0, 1))(losses, weights)
        np.testing.assert_array_equal(by_loss, [[0.25, 0.75], [0, 0]])
        # (l - mean) / sum(w), for the finite loss of weight 0 as well
        np.testing.assert_allclose(by_weight, [[-0.1875, 0.0625], [0.8125, 0]], rtol=1e-6)
        for argnum, expected in enumerate((by_loss, by_weight)):
            np.testing.assert_allclose(jax.jacfwd(weighted_mean, argnum)(losses, weights), expected, rtol=1e-6)
        np.testing.assert_array_equal(weighted_mean(losses, weights, axis=1), [1.75, 0])


def test_any_number_of_losses_is_exported() -> None:
    (size,) = jax.export.symbolic_shape("n")
    exported = jax.export.export(jax.jit(weighted_mean))(jax.ShapeDtypeStruct((size,), "float32"))
    assert exported.call(jnp.arange(5.0)) == 2


def test_nothing_left_is_0() -> None:
    losses = jnp.array([NAN, 1.0, INF])
    nothing = jnp.zeros(3)
    with jax.debug_nans(True):
        assert weighted_mean(losses, nothing) == 0
        assert weighted_mean(losses, jnp.zeros(3, bool)) == 0
        for slope in jax.grad(weighted_mean, (0, 1))(losses, nothing):
            np.testing.assert_array_equal(slope, nothing)
        assert weighted_mean(jnp.zeros((0,))) == 0
        np.testing.assert_array_equal(weighted_mean(jnp.zeros((2, 0)), axis=1), [0, 0])
        assert weighted_mean(losses[1:2], normalizer=0.0) == 0
    assert np.isnan(weighted_mean(losses))  # what has weight is not repaired


def test_derivatives() -> None:
    with jax.enable_x64(True):
        losses, weights = data((4,), "float64")
        # A quotient of sums: central differences of order 2 tell 6 digits of it.
        check_grads(weighted_mean, (losses, weights), order=2, atol=1e-6, rtol=1e-6)
        check_grads(lambda x, n: weighted_mean(x, weights, normalizer=n), (losses, 3.0), order=1, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-35, 1e-20, 1e-15, 1e15, 1e20, 1e33])
def test_weights_of_any_size(size: float) -> None:
    """A mean doesn't know in what its weights are measured; its derivatives by them are that much larger."""
    losses, weights = data((2, 4))
    weights[0, 1] = 0

    @jax.jit
    def derivatives(x: Any, w: Any) -> Any:
        def mean(x: Any, w: Any) -> Any:
            return weighted_mean(x, w, axis=1).sum()

        along = jax.jvp(jax.grad(mean), (x, w), (jnp.zeros_like(x), w))[1]
        return weighted_mean(x, w, axis=1), *jax.grad(mean, (0, 1))(x, w), along

    w = (weights * np.float32(4 * size)).astype("float32")
    value, by_loss, by_weight, along = derivatives(losses, w)
    exact, x = w.astype(float), losses.astype(float)
    total = exact.sum(1, keepdims=True)
    mean = (exact * x).sum(1, keepdims=True) / total
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6)  # sums of 4 numbers, and differences of about 1
    close(value, mean[:, 0])
    close(by_loss, exact / total, atol=1e-12)
    close(np.asarray(by_weight) * total, x - mean, atol=1e-6)
    if 1e-18 < size < 1e18:  # else 1 / sum(w)^2 can't be written
        # Along the weights themselves it doesn't change: a difference of equal numbers.
        np.testing.assert_allclose(along, np.zeros_like(along), atol=1e-6)


def test_derivative_by_loss_and_weight_where_the_weight_is_0() -> None:
    """1 / sum(w) by a loss and its own weight, also at 0, where learning to reweight starts; less w_i / sum(w)^2."""
    losses, weights = jnp.array([3.0, 1.0, 5.0, INF]), jnp.array([0.0, 2.0, 2.0, 0.0])
    right = np.eye(4)[:, :3] / 4 - np.asarray(weights)[:, None] / 16
    right[3] = 0
    for mixed in (
        jax.jit(jax.jacfwd(jax.grad(weighted_mean), 1))(losses, weights),
        jax.jit(jax.jacrev(jax.grad(weighted_mean), 1))(losses, weights),
        jax.jit(jax.jacfwd(jax.grad(weighted_mean, 1)))(losses, weights).T,
    ):
        np.testing.assert_allclose(mixed, np.append(right, np.zeros((4, 1)), 1), atol=1e-7)


def test_mean_of_hits() -> None:
    """Booleans and integers have a mean, too: an accuracy."""
    hits = np.array([True, False, True, True])
    for given in (hits, jnp.asarray(hits), hits.astype("int32"), hits.tolist()):
        mean = weighted_mean(given)
        assert mean == 0.75 and mean.dtype == jnp.float32
    assert weighted_mean(hits, [1, 1, 0, 2]) == 0.75
    assert weighted_mean(jnp.asarray(hits), jnp.asarray([1.0, 1, 0, 2], "bfloat16")) == 0.75


def test_normalizer_makes_micro_batches_add_up() -> None:
    losses, weights = data()
    whole = weighted_mean(losses, weights)
    total = weights.sum()
    parts = jax.jit(lambda n: sum(weighted_mean(x, w, normalizer=n) for x, w in zip(losses, weights, strict=True)))(
        total
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-6)  # 30 numbers in another order
    assert weighted_mean(jnp.array([1.0, 2.0]), normalizer=6) == 0.5
    np.testing.assert_array_equal(weighted_mean(jnp.ones((2, 3)), axis=1, normalizer=jnp.array([1.0, 2.0])), [3, 1.5])


def test_vmap_with_axis_name() -> None:
    losses, weights = data()
    mapped = jax.vmap(lambda x, w: weighted_mean(x, w, axis_name="i"), axis_name="i")(losses, weights)
    np.testing.assert_allclose(mapped, np.full(6, weighted_mean(losses, weights)), rtol=1e-6)  # another order
    mapped = jax.vmap(lambda x: weighted_mean(x, axis_name="i"), axis_name="i")(losses)
    np.testing.assert_allclose(mapped, np.full(6, weighted_mean(losses)), rtol=1e-6)
    mapped = jax.vmap(lambda x: weighted_mean(x, normalizer=2.0, axis_name="i"), axis_name="i")(losses)
    np.testing.assert_allclose(mapped, np.full(6, losses.sum() / 2), rtol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("weighted", ["evenly", "unevenly", "by one vector for all"])
def test_shard_map(weighted: str, check_vma: bool) -> None:
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    losses, weights = data((2 * count, 5))
    if weighted == "by one vector for all":
        weights = weights[0]
    spec = P() if weights.ndim == 1 else P("data")

    def mean(x: Any, w: Any, axis_name: Any = "data") -> Any:
        return weighted_mean(x, None if weighted == "evenly" else w, axis_name=axis_name)

    def on_mesh(f: Any, out_specs: P) -> Any:
        return jax.shard_map(f, mesh=mesh, in_specs=(P("data"), spec), out_specs=out_specs, check_vma=check_vma)

    @quick
    def results(x: Any, w: Any) -> Any:
        plain = functools.partial(mean, axis_name=None)
        outside, inside = jax.value_and_grad(on_mesh(mean, P())), on_mesh(jax.grad(mean), P("data"))
        return jax.value_and_grad(plain)(x, w), outside(x, w), inside(x, w)

    (right, slope), (value, outside), inside = jax.device_get(results(losses, weights))
    np.testing.assert_allclose(value, right, rtol=1e-6)  # another order
    np.testing.assert_allclose(outside, slope, rtol=1e-6)
    factor = 1 if check_vma else count  # as the docstring says
    np.testing.assert_allclose(inside, factor * slope, rtol=1e-6)


def test_perplexity() -> None:
    nll = jnp.array([0.0, 1.0, 2.302585, INF, 1000.0])
    np.testing.assert_allclose(perplexity(nll), [1, np.e, 10, INF, INF], rtol=4e-7)  # |nll| eps / 2 more than exp
    np.testing.assert_array_equal(perplexity(jnp.array([0.0, 3.0, 10.0, INF]), base=2), [1, 8, 1024, INF])
    np.testing.assert_allclose(perplexity(jnp.array([2.0, 0.5]), base=10), [100, 10**0.5], rtol=2e-7)  # 2 ulp
    np.testing.assert_allclose(jax.grad(lambda x: perplexity(x, base=10))(2.0), 100 * np.log(10), rtol=4e-7)
    for base in (0, -1.0, 1, INF):
        with pytest.raises(ValueError, match="perplexity: base must"):
            perplexity(1.0, base=base)


def test_bits_per() -> None:
    nats = jnp.array([10.0, 0.0, 0.0, 3.0])
    counts = jnp.array([4, 7, 0, 0])
    with jax.debug_nans(True):
        np.testing.assert_allclose(bits_per(nats, counts), [2.5 / np.log(2), 0, 0, INF], rtol=2e-7)  # 2 ulp
        slope = jax.grad(lambda x: bits_per(x, counts[:3]).sum())(nats[:3])
        np.testing.assert_allclose(slope, [0.25 / np.log(2), 1 / 7 / np.log(2), 0], rtol=2e-7)
    assert bits_per(512, 8) == bits_per(512.0, np.int64(8)) and perplexity(3, base=2) == 8
    np.testing.assert_allclose(bits_per(nats, 5.0), nats / 5 / np.log(2), rtol=2e-7)


def test_dtypes() -> None:
    losses = jnp.full(70000, 1.0, jnp.float16)  # their sum is beyond float16
    assert weighted_mean(losses) == 1 and weighted_mean(losses).dtype == jnp.float32
    assert weighted_mean(losses, losses).dtype == jnp.float32
    assert weighted_mean(losses, jnp.ones(70000, jnp.float32)) == 1
    assert jax.grad(weighted_mean)(losses).dtype == jnp.float16
    assert perplexity(losses).dtype == bits_per(losses, 70000).dtype == jnp.float32
    np.testing.assert_allclose(bits_per(losses, 70000)[0], 1 / 70000 / np.log(2), rtol=2e-7)


def test_bad_arguments() -> None:
    x = jnp.ones((2, 3))
    for shape in ((3, 3), (2,), (1, 2, 3), (4, 2, 3)):
        with pytest.raises(ValueError, match="weighted_mean: weights must have the shape of losses"):
            weighted_mean(x, jnp.ones(shape))
    with pytest.raises(ValueError, match="weighted_mean: normalizer must"):
        weighted_mean(x, axis=0, normalizer=jnp.ones(2))
    with pytest.raises(ValueError, match="weighted_mean: axis must"):
        weighted_mean(x, axis=2)
    with pytest.raises(TypeError, match="weighted_mean: losses must"):
        weighted_mean(jnp.ones(3, jnp.complex64))
    with pytest.raises(TypeError, match="weighted_mean: weights must"):
        weighted_mean(x, jnp.ones(3, jnp.complex64))
    with pytest.raises(TypeError, match="perplexity: nll must"):
        perplexity(jnp.array([1]))
    with pytest.raises(ValueError, match="bits_per: count must"):
        bits_per(x, jnp.ones(3))
