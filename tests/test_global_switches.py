"""JAX's global switches change nothing but what they are for: the tables of the other tests under each of them.

The suite runs under strict promotion of dtypes and without that of ranks (see conftest.py), and so does all of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick
from test_transforms import CASES, Case, every_case

import jaxce
from jaxce import metrics

HALF = ("bfloat16", "float16")
DTYPES = ("float32", *HALF)
SIZES = [2, 10, 11, 100, 1000, 4095, 4096, 5003]
QUICK = {(11, "float32"), (100, "float16")}


def same(got: Any, expected: Any) -> None:
    """The same dtypes and, as the programs are the same, the same bits."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


def test_the_suite_runs_as_strict_as_can_be() -> None:
    assert jax.config.jax_numpy_dtype_promotion == "strict" and jax.config.jax_numpy_rank_promotion == "raise"  # pyright: ignore


# --- 64-bit numbers allowed -------------------------------------------------------------------------------------------


def pairs() -> list[Any]:
    """Each function with each dtype, of which one in turn is quick."""
    rows = []
    for i, case in enumerate(CASES):
        for dtype in DTYPES:
            marks = [pytest.mark.slow] if case.slow or dtype != DTYPES[i % 3] else []
            rows.append(pytest.param(case, dtype, marks=marks, id=f"{case.name}-{dtype}"))
    return rows


@pytest.mark.parametrize(("case", "dtype"), pairs())
def test_64_bit_numbers_are_not_used_unasked(case: Case, dtype: str) -> None:
    """Values and gradients, compiled: nothing of them is computed or returned in float64."""
    floats, integers = case.make(3, dtype)

    def both() -> Any:
        def scalar(floats: Any) -> Any:
            results = case.call(floats, integers)
            return sum(jnp.sum(r) for r in results), results

        return quick(jax.value_and_grad(scalar, has_aux=True))(floats)

    expected = both()
    with jax.enable_x64(True):
        same(both(), expected)


def of_logits(x: jax.Array, labels: jax.Array, targets: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
    """What the state of a row is asked for, in all."""
    statistics = jaxce.softmax_statistics(x, labels)
    return statistics._asdict() | {
        "modified": jaxce.softmax_cross_entropy_with_integer_labels(
            x, labels, label_smoothing=0.1, class_weights=weights, where=x > -2
        ),
        "dense": jaxce.softmax_cross_entropy(x, targets),
        "focal": jaxce.softmax_focal_loss(x, labels),
        "relative": jaxce.relative_entropy_with_logits(x, x[:, ::-1]),
        "Jensen-Shannon": jaxce.jensen_shannon_divergence_with_logits(x, x[:, ::-1]),
        "top": metrics.TopKAccuracy.from_batch(x, labels, k=3).compute(),
        "Brier": metrics.Brier.from_batch(x, labels).compute(),
        "linear": jaxce.softmax_cross_entropy_with_integer_labels(
            jaxce.LinearLogits(x[:, :2], jnp.ones((2, x.shape[1]), x.dtype), block_size=64), labels
        ),
    }


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [pytest.param(k, d, marks=() if (k, d) in QUICK else pytest.mark.slow) for k in SIZES for d in DTYPES],
)
def test_64_bit_numbers_and_any_number_of_classes(classes: int, dtype: str) -> None:
    rng = np.random.default_rng(classes)
    x = 3 * rng.normal(size=(5, classes)).astype("float32")
    x[0, 1] = x[4].max() + 20
    targets = rng.uniform(size=x.shape).astype("float32") / classes
    labels, weights = rng.integers(classes, size=5), rng.uniform(size=classes).astype("float32")

    def all_of_it() -> Any:
        def scalar(x: jax.Array) -> Any:
            results = of_logits(
                x, jnp.asarray(labels, "int32"), jnp.asarray(targets, dtype), jnp.asarray(weights, dtype)
            )
            return sum(jnp.sum(r) for r in results.values() if r.dtype != "int32"), results

        (_, results), gradient = quick(jax.value_and_grad(scalar, has_aux=True))(jnp.asarray(x, dtype))
        return results | {"gradient": gradient}

    expected = all_of_it()
    assert {r.dtype for n, r in expected.items() if n not in ("prediction", "gradient")} == {np.dtype("float32")}
    with jax.enable_x64(True):
        same(all_of_it(), expected)


METRICS: dict[str, Callable[..., Any]] = {
    "Mean": lambda x, y: metrics.Mean.from_batch(x[:, 0]),
    "Perplexity": lambda x, y: metrics.Perplexity.from_batch(x[:, 0]),
    "BitsPer": lambda x, y: metrics.BitsPer.from_batch(x[:, 0], units=y),
    "Accuracy": lambda x, y: metrics.Accuracy.from_batch(x, y),
    "TopKAccuracy": lambda x, y: metrics.TopKAccuracy.from_batch(x, y, k=2),
    "Brier": lambda x, y: metrics.Brier.from_batch(x, y),
    "Calibration": lambda x, y: metrics.Calibration.from_batch(x, y),
    "Evaluation": lambda x, y: metrics.Evaluation.from_batch(x, y),
}


ONE_OF_EACH_KIND = "BitsPer", "Brier", "Evaluation"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(n, d, marks=() if n in ONE_OF_EACH_KIND and d == "float32" else pytest.mark.slow)
        for n in METRICS
        for d in DTYPES
    ],
)
def test_metrics_under_the_switches(name: str, dtype: str) -> None:
    """With 64-bit numbers allowed, nothing compiled, leaks looked for, NaN looked for."""
    x, y = (
        jnp.asarray(np.random.default_rng(0).normal(size=(6, 12)), dtype),
        jnp.asarray(np.arange(6) % 5, "int32"),
    )

    def both(x: jax.Array, y: jax.Array) -> Any:
        metric = METRICS[name](x, y).merge(METRICS[name](x[::-1], y))
        return metric, metric.compute()

    def near(got: Any) -> None:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # fused or not, a few eps of float32

    expected, eager = quick(both)(x, y), both(x, y)
    with jax.enable_x64(True):
        same(quick(lambda *args: both(*args))(x, y), expected)
    with jax.debug_nans(True):
        same(both(x, y), eager)
    with jax.disable_jit():
        near(both(x, y))
    with jax.checking_leaks():
        jax.eval_shape(both, x[:5], y[:5])  # of a shape that isn't traced yet


# --- looking for NaN, for leaks, and nothing compiled ------------------------------------------------------------------


@pytest.mark.slow
@every_case
def test_no_nan_is_formed(case: Case) -> None:
    """Values, gradients and Hessian-vector products, eager and compiled."""
    floats, integers = case.make(3, "float32")
    gradient = jax.grad(lambda f: case.scalar(f, integers))

    def product(floats: Any) -> Any:
        return jax.jvp(gradient, (floats,), (floats,))[1]

    with jax.debug_nans(True):
        for way in (lambda f: f), jax.jit:
            way(case.scalar)(floats, integers)
            way(gradient)(floats)
            way(product)(floats)


def masked() -> list[Any]:
    """The functions that take a mask; of what reduces the mask is of the entries: see test_reduction.py."""
    cases = [case for case in CASES if case.takes_where and not case.reduces]
    return [pytest.param(case, marks=[pytest.mark.slow] if case.slow else [], id=case.name) for case in cases]


@pytest.mark.parametrize("case", masked())
def test_no_nan_is_formed_of_rows_that_do_not_count(case: Case) -> None:
    """Rows full of NaN, with labels of -100, that a mask leaves out."""
    floats, integers = case.make(3, "float32")
    where = np.array([True, False, True])

    def spoiled(a: Any, value: Any) -> Any:
        return np.where(where.reshape(3, *[1] * (a.ndim - 1)), a, np.asarray(value, a.dtype))

    floats, integers = tuple(spoiled(f, np.nan) for f in floats), tuple(spoiled(n, -100) for n in integers)

    def total(floats: Any) -> Any:
        def counts(r: Any) -> Any:  # but columns, which no mask leaves out
            return where.reshape(3, *[1] * (r.ndim - 1)) if len(r) == 3 else True

        return sum(jnp.sum(jnp.where(counts(r), r, 0)) for r in case.call(floats, integers, where))

    with jax.debug_nans(True):
        both = jax.value_and_grad(total)
        quick(both)(floats)
        results = jax.jvp(both, (floats,), (tuple(np.ones_like(f) for f in floats),))
    assert all(np.all(np.isfinite(r)) for r in jax.tree.leaves(results))


@every_case
def test_no_tracer_leaks(case: Case) -> None:
    floats, integers = case.make(5, "float32")  # of a shape that isn't traced yet
    with jax.checking_leaks():
        jax.make_jaxpr(jax.grad(case.scalar))(floats, integers)


@pytest.mark.slow
@every_case
def test_nothing_compiled(case: Case) -> None:
    floats, integers = case.make(3, "float32")
    expected = jax.jit(jax.value_and_grad(case.scalar))(floats, integers)
    with jax.disable_jit():
        got = jax.value_and_grad(case.scalar)(floats, integers)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # as compiled and not in test_transforms.py


def test_no_nan_of_masked_products() -> None:
    """Rows of hidden states, and columns of pairs, that take no part and are full of NaN, compiled and not."""
    there, one = np.arange(4) != 2, np.ones((4, 3), "float32")
    spoiled = np.where(there[:, None], one, np.float32(np.nan))
    kernel, labels = np.ones((3, 8), "float32"), np.array([0, 1, -100, 3])

    def linear(hidden: Any) -> Any:
        x = jaxce.LinearLogits(hidden, kernel, block_size=4)
        sparse = jaxce.sigmoid_binary_cross_entropy_with_sparse_labels(x, labels[:, None], where=there)
        mean = jaxce.linear_cross_entropy(x, labels, there)
        mean += jaxce.linear_sigmoid_binary_cross_entropy(x, labels[:, None], there)
        return mean + jnp.sum(sparse + jaxce.softmax_cross_entropy_with_integer_labels(x, labels, where=there))

    def of_pairs(columns: Any) -> Any:
        x = jaxce.LinearLogits(one, columns, class_axis=0, block_size=2)
        return sum(jnp.sum(v) for v in jaxce.softmax_cross_entropy_of_pairs(x, where=there, class_where=there))

    with jax.debug_nans(True):
        for loss in (linear, of_pairs):
            both = jax.value_and_grad(loss)
            results, along = jax.jvp(both, (spoiled,), (one,))
            assert all(np.all(np.isfinite(r)) for r in along)
            for value, gradient in (results, quick(both)(spoiled)):
                assert np.isfinite(value) and np.all(np.isfinite(gradient)) and not np.any(gradient[2])


def test_blocks_that_are_not_compiled() -> None:
    """The gradient by a kernel is written block by block, into memory that nobody has filled."""
    rng = np.random.default_rng(0)
    hidden, kernel = (rng.normal(size=shape).astype("float32") for shape in ((4, 3), (3, 8)))

    def loss(hidden: Any, kernel: Any) -> Any:
        x, labels = jaxce.LinearLogits(hidden, kernel, block_size=4), np.arange(4)
        mean = jaxce.linear_sigmoid_binary_cross_entropy(x, labels[:, None])
        return mean + jnp.sum(jaxce.softmax_cross_entropy_with_integer_labels(x, labels))

    gradient = jax.grad(loss, (0, 1))
    expected = jax.jit(gradient)(hidden, kernel)
    with jax.disable_jit():
        got = gradient(hidden, kernel)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # float32, sums in another order
