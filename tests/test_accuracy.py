"""How exact the softmax losses are, in units in the last place, against 60 digits computed from the same binary inputs.

They hold the contract of `helpers.contract`: 4 ulp, and half of one for each nat that the deciding classes lie below the
maximum, which is what the last bit of the logits themselves means. Gradients hold it in ulp of the largest magnitude that
the formula has to form for that entry. So a confident row's loss of 1e-20 has its digits, in every dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import helpers
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from helpers import Row, contract, ulp_error

import jaxce


class Measure(NamedTuple):
    """A function of logits, integer and soft labels; its exact value, and exact gradient with its scale, by row."""

    call: Callable[..., Any]
    value: Callable[[Row, int, Any], Any]
    gradient: Callable[[Row, int, Any], list[tuple[Any, Any]]] | None


def integer_gradient(row: Row, label: int, _: Any) -> list[tuple[Any, Any]]:
    exact = [*row.probabilities]
    exact[label] = -row.not_p(label)
    return [(e, e) for e in exact]


def dense_value(row: Row, _: int, target: Any) -> Any:
    return mpmath.fsum(t * row.nll(k) for k, t in enumerate(target) if t)


def dense_gradient(row: Row, _: int, target: Any) -> list[tuple[Any, Any]]:
    total = mpmath.fsum(target)
    result = []
    for k, t in enumerate(target):
        others, own = row.p(k) * (total - t), row.not_p(k) * t if t else helpers.ZERO
        result.append((others - own, max(others, own)))
    return result


def entropy_gradient(row: Row, _: int, __: Any) -> list[tuple[Any, Any]]:
    """p (gap - mean gap), which is p (-log p - H) with the normalizers cancelled."""
    mean = row.mean_gap
    return [
        (p * (g - mean), p * max(g, mean)) if p else (helpers.ZERO, helpers.ZERO)
        for g, p in zip(row.gaps, row.probabilities, strict=True)
    ]


def probability_gradient(row: Row, _: int, __: Any) -> list[tuple[Any, Any]]:
    return [(p, p) for p in row.probabilities]


def by_rows(logits: Any, labels: Any) -> Any:
    return jaxce.softmax_cross_entropy_of_pairs(logits, labels)[0]


def by_columns(x: Any, labels: Any) -> Any:
    """The other direction, and the other way: the classes are rows, and that of a column's label is all of its group."""
    n, k = x.shape
    return jaxce.softmax_cross_entropy_of_pairs(x.T, groups=jnp.arange(k), class_groups=labels, positives="group")[1]


MEASURES = {
    "pairs, rows": Measure(lambda x, y, t: by_rows(x, y), lambda row, y, t: row.nll(y), integer_gradient),
    "pairs, columns": Measure(lambda x, y, t: by_columns(x, y), lambda row, y, t: row.nll(y), integer_gradient),
    "integer": Measure(
        lambda x, y, t: jaxce.softmax_cross_entropy_with_integer_labels(x, y),
        lambda row, y, t: row.nll(y),
        integer_gradient,
    ),
    "dense": Measure(lambda x, y, t: jaxce.softmax_cross_entropy(x, t), dense_value, dense_gradient),
    "entropy": Measure(lambda x, y, t: jaxce.entropy_with_logits(x), lambda row, y, t: row.entropy, entropy_gradient),
    "logsumexp": Measure(lambda x, y, t: jaxce.logsumexp(x), lambda row, y, t: row.logsumexp, probability_gradient),
    "statistics.nll": Measure(
        lambda x, y, t: jaxce.softmax_statistics(x, y).nll, lambda row, y, t: row.nll(y), integer_gradient
    ),
    "statistics.log_normalizer": Measure(
        lambda x, y, t: jaxce.softmax_statistics(x, y).log_normalizer,
        lambda row, y, t: row.logsumexp,
        probability_gradient,
    ),
    "statistics.entropy": Measure(
        lambda x, y, t: jaxce.softmax_statistics(x, y).entropy, lambda row, y, t: row.entropy, entropy_gradient
    ),
}
QUICK = [("float32", 3), ("float32", 65), ("float32", 1000), ("float64", 65), ("bfloat16", 65)]
SMALL: list[Any] = [
    *QUICK,
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            *(("float32", k) for k in (2, 10, 64, 97)),
            *((d, k) for d in ("float64", "bfloat16", "float16") for k in (2, 65)),
            ("float64", 1000),
        ]
        if case not in QUICK
    ),
]
LARGE: list[Any] = [("float32", 8191), ("bfloat16", 4096)]
LARGE += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in [("float32", 29 * 1733), ("float64", 4096), ("float32", 131072)]
]
LARGE_FAMILIES = ("random", "right, 1e-12", "ties")


@functools.cache
def problem(dtype: str, classes: int) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Names, logits, integer labels and soft labels; only three rows where there are many classes."""
    names, logits, labels = helpers.families(dtype, classes, 4 if classes < 1000 else 2 if classes == 1000 else 1)
    if classes > 1000:
        chosen = [names.index(name) for name in LARGE_FAMILIES[: 2 if classes > 10000 else 3]]
        names, logits, labels = [names[i] for i in chosen], logits[chosen], labels[chosen]
    return names, logits, labels, helpers.soft_labels(names, logits, labels, dtype)


@functools.cache
def cases(dtype: str, classes: int) -> list[tuple[Row, int, list[Any]]]:
    """Exact rows, integer labels and soft labels."""
    _, logits, labels, targets = problem(dtype, classes)
    exact_targets = [[mpmath.mpf(t) if t else helpers.ZERO for t in row] for row in targets.astype(np.float64).tolist()]
    return list(zip(helpers.rows(logits), labels.tolist(), exact_targets, strict=True))


@functools.cache
def exact(name: str, dtype: str, classes: int) -> tuple[list[Any], list[Any], list[Any]]:
    """Exact values, gradients and gradient scales, flat."""
    measure = MEASURES[name]
    values = [measure.value(*case) for case in cases(dtype, classes)]
    gradients = [
        pair for case in cases(dtype, classes) for pair in (measure.gradient(*case) if measure.gradient else [])
    ]
    return values, [g for g, _ in gradients], [abs(s) for _, s in gradients]


@functools.cache
def vanishing_classes(dtype: str, classes: int) -> np.ndarray:
    """The classes whose probability is below the smallest normal number."""
    tiny = float(jnp.finfo(dtype if dtype == "float64" else "float32").tiny)
    return np.array([[row.p(k) < tiny for k in range(classes)] for row in helpers.rows(problem(dtype, classes)[1])])


def value_and_gradient(measure: Measure) -> Callable[..., Any]:
    def total(x: jax.Array, *labels: jax.Array) -> Any:
        values = measure.call(x, *labels)
        return values.sum(), values

    def both(x: jax.Array, *labels: jax.Array) -> Any:
        (_, values), gradient = jax.value_and_grad(total, has_aux=True)(x, *labels)
        return values, gradient

    return both


def test_the_reference_itself() -> None:
    for gap in (0.0, 2.0**-60, 1e-3, 0.7, 17.3, 87.9, 799.9):
        exact_gap = mpmath.mpf(gap)
        assert abs(helpers.exp_minus(exact_gap) / mpmath.exp(-exact_gap) - 1) < 1e-57


def check(name: str, dtype: str, classes: int, transform: Callable[..., Any]) -> tuple[np.ndarray, np.ndarray]:
    names, logits, labels, targets = problem(dtype, classes)
    values, gradients, scales = exact(name, dtype, classes)
    with jax.enable_x64(dtype == "float64"):
        got, got_gradient = transform(value_and_gradient(MEASURES[name]))(
            jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(targets)
        )
        got, got_gradient = np.asarray(got), np.asarray(got_gradient)
    assert got.dtype == ("float64" if dtype == "float64" else "float32")
    assert got_gradient.dtype == dtype
    scale = None
    if "logsumexp" in name or "log_normalizer" in name:  # the sum of m and L: no better than an ulp of either
        maxima = np.max(logits.astype(np.float64), -1)
        scale = [max(abs(v), abs(m)) if np.isfinite(m) else abs(v) for v, m in zip(values, maxima, strict=True)]
    failures = helpers.worst(ulp_error(got, values, scale), names, contract(values if scale is None else scale))
    assert not failures, f"value of {name}, {dtype}, {classes} classes: {failures}"
    if "logsumexp" not in name and "log_normalizer" not in name:
        assert np.all(got >= 0), f"negative: {[n for n, v in zip(names, got, strict=True) if v < 0]}"
    errors = ulp_error(got_gradient, gradients, scales)
    if "entropy" in name:
        vanishing = vanishing_classes(dtype, classes)
        errors = np.where(vanishing, helpers.vanishing_error(got_gradient, gradients), errors)
    failures = helpers.worst(errors, names, contract(scales))
    assert not failures, f"gradient of {name}, {dtype}, {classes} classes: {failures}"
    return got, got_gradient


@pytest.mark.parametrize("name", ["integer", "dense", "entropy", "logsumexp"])
@pytest.mark.parametrize(("dtype", "classes"), SMALL)
def test_up_to_1000_classes(name: str, dtype: str, classes: int) -> None:
    check(name, dtype, classes, jax.jit)


@pytest.mark.parametrize("classes", [2, 33, 64, 100, 127, 777, 1000])
def test_random_rows(classes: int) -> None:
    """Against float64, in which the same formula has digits to spare."""
    rng = np.random.default_rng(classes)
    x = 3 * rng.normal(size=(1000, classes))
    x[:, 0] = x.max(-1) + rng.uniform(0.1, 12, 1000)  # the top class
    x = x.astype(np.float32)
    exact = np.log1p(np.sum(np.exp(x[:, 1:].astype(np.float64) - x[:, :1]), -1))
    losses = jaxce.softmax_cross_entropy_with_integer_labels(jnp.asarray(x), jnp.zeros(1000, "int32"))
    errors = np.abs(np.asarray(losses, np.float64) - exact) / np.spacing(exact.astype(np.float32))
    assert np.max(errors / contract(exact)) <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_absent_classes_change_nothing(dtype: str) -> None:
    """Rows of 4096 classes are summed by blocks: eight that are there, anywhere among absent ones, are as eight alone."""
    inf = np.inf
    few = np.array(
        [
            [0, 1, 2, 3, 4, 5, 6, 7],
            [3, 3, 3, 1, 1, 1, 0, 3],
            [40, 0, 0, 0, -1, -2, -3, -4],
            [-1e4, -1e4, 0, 0, -1e4, -1, -2, -3],
            [inf, 0, 1, 2, 3, 4, 5, 6],
            [inf, inf, 1, 2, 3, 4, 5, 6],
            [-inf] * 8,
        ],
        np.float32,
    )
    places = np.array([0, 63, 64, 65, 1000, 2047, 4032, 4095])
    many = np.full((7, 4096), -inf, np.float32)
    many[:, places] = few
    targets = np.random.default_rng(0).dirichlet(np.ones(8), 7).astype(np.float32)
    spread = np.zeros_like(many)
    spread[:, places] = targets

    def measures(x: jax.Array, labels: jax.Array, t: jax.Array) -> Any:
        def total(x: jax.Array) -> Any:
            s = jaxce.softmax_statistics(x, labels)
            losses = s.nll, jaxce.softmax_cross_entropy(x, t), s.entropy, s.log_normalizer
            return sum(jnp.sum(loss) for loss in losses), (*losses, s.prediction)

        (_, values), gradient = jax.value_and_grad(total, has_aux=True)(x)
        return values, gradient

    got, slopes = jax.jit(jax.vmap(measures))(jnp.asarray(many, dtype), jnp.full(7, 63), jnp.asarray(spread))
    alone, right = jax.jit(jax.vmap(measures))(jnp.asarray(few, dtype), jnp.full(7, 1), jnp.asarray(targets))
    for value, exact in zip(got[:-1], alone[:-1], strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-6)  # the same terms, added up in another order
    there = ~np.isneginf(few).all(-1)
    assert np.array_equal(got[-1][there], places[alone[-1]][there])
    np.testing.assert_allclose(
        np.asarray(slopes, np.float32)[:, places],
        np.asarray(right, np.float32),
        rtol=1e-2 if dtype == "bfloat16" else 1e-5,
        atol=1e-6,
    )  # sums of four gradients of both signs, rounded to the logits' dtype


@pytest.mark.parametrize("name", [name for name in MEASURES if name.startswith("statistics")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics(name: str, dtype: str) -> None:
    check(name, dtype, 65, jax.jit)


@pytest.mark.parametrize("name", [name for name in MEASURES if name.startswith("pairs")])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_pairs(name: str, dtype: str) -> None:
    check(name, dtype, 65, jax.jit)


@pytest.mark.parametrize("name", ["integer", "dense", "entropy", "logsumexp"])
@pytest.mark.parametrize(("dtype", "classes"), LARGE)
def test_many_classes(name: str, dtype: str, classes: int) -> None:
    check(name, dtype, classes, jax.jit)


@pytest.mark.parametrize("name", ["integer", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dense", "entropy"))])
def test_without_jit_it_is_as_exact(name: str) -> None:
    """Compilers contract and reassociate: what is exact only when compiled, or only when not, would show here."""

    def eager(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: jax.Array) -> Any:
            with jax.disable_jit():
                return function(*args)

        return run

    check(name, "float32", 65, eager)


@pytest.mark.parametrize(("dtype", "classes"), [("float32", 10), ("float32", 1000), ("float64", 65), ("bfloat16", 65)])
def test_log_softmax(dtype: str, classes: int) -> None:
    names, logits, *_ = problem(dtype, classes)
    values = [-row.nll(k) for row in helpers.rows(logits) for k in range(classes)]
    with jax.enable_x64(dtype == "float64"):
        got = np.asarray(jaxce.log_softmax(jnp.asarray(logits)))
    assert np.all(got <= 0)
    failures = helpers.worst(ulp_error(got, values), names, contract(values))
    assert not failures, f"log_softmax, {dtype}, {classes} classes: {failures}"


@pytest.mark.parametrize(
    ("dtype", "classes"),
    [("float32", 10), ("float64", 65), ("bfloat16", 65), pytest.param("float32", 1000, marks=pytest.mark.slow)],
)
def test_cross_entropy_with_logits(dtype: str, classes: int) -> None:
    """Every row of logits against the next one: values, and gradients by both arguments."""
    names, logits, *_ = problem(dtype, classes)
    count = 2 if classes < 1000 else 1
    names, logits = names * count, np.concatenate([logits] * count)
    other = np.roll(logits, 1, axis=0)
    other[len(names) // 2 :] = logits[len(names) // 2 :]  # and against itself
    values, nats, p_nats, p_exact, p_scale, q_exact, q_scale = [], [], [], [], [], [], []
    vanishing, p_raw = [], []
    tiny = float(jnp.finfo(dtype if dtype == "float64" else "float32").tiny)
    for p, q in zip(helpers.rows(logits), helpers.rows(other), strict=True):
        value = mpmath.fsum(p.p(k) * q.nll(k) for k in range(classes) if p.exps[k])
        values.append(value)
        # How far below p's maximum the classes lie that make up the sum.
        gaps = (
            mpmath.fsum(p.p(k) * q.nll(k) * p.gaps[k] for k in range(classes) if p.exps[k])
            if value < helpers.INF
            else 0
        )
        nats.append(max(0, float(gaps / value)) if value else 0)
        for k in range(classes):
            cost, of_p = q.nll(k), p.p(k)
            p_nats.append(float(p.nll(k)) + nats[-1] if of_p else 0)
            there = of_p >= tiny and value < helpers.INF
            vanishing.append(of_p < tiny and value < helpers.INF)
            p_raw.append(of_p * (cost - value) if value < helpers.INF else helpers.ZERO)
            p_exact.append(p_raw[-1] if there else helpers.ZERO)
            p_scale.append(of_p * max(cost, value) if there else helpers.ZERO)
            more, less = q.p(k) * p.not_p(k), q.not_p(k) * of_p
            q_exact.append(more - less)
            q_scale.append(max(more, less))

    def total(p: jax.Array, q: jax.Array) -> Any:
        result = jaxce.cross_entropy_with_logits(p, q)
        return result.sum(), result

    with jax.enable_x64(dtype == "float64"):
        (_, got), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(
            jnp.asarray(logits), jnp.asarray(other)
        )
        got, by_p, by_q = map(np.asarray, (got, *gradients))
    limits = np.maximum(contract(values, nats), contract(values))
    failures = helpers.worst(ulp_error(got, values), names, limits)
    assert not failures, f"value: {failures}"
    assert np.all(got >= 0)
    finite = np.isfinite(np.array([float(v) for v in values]))  # where the loss is infinite, p's gradient is undefined
    by_p_errors = ulp_error(by_p.ravel(), p_exact, p_scale)
    by_p_errors = np.where(vanishing, helpers.vanishing_error(by_p.ravel(), p_raw), by_p_errors).reshape(by_p.shape)
    failures = helpers.worst(np.where(finite[:, None], by_p_errors, 0), names, contract(p_scale, p_nats))
    assert not failures, f"gradient by p_logits: {failures}"
    flushed = np.array([s < 2 * tiny for s in q_scale])  # or one of the two may be: there is nothing to measure
    by_q_errors = np.where(flushed, 0, ulp_error(by_q.ravel(), q_exact, q_scale))
    failures = helpers.worst(by_q_errors, names, contract(q_scale))
    assert not failures, f"gradient by q_logits: {failures}"


@pytest.mark.parametrize("loss", [1e-3, 1e-7, 1e-12, 1e-20, 1e-30])
@pytest.mark.parametrize("classes", [2, 10])
def test_confident_rows_keep_their_digits(loss: float, classes: int) -> None:
    """The example that started it: lse - x_y gives 0 here, and a gradient of 0."""
    logits = np.full(classes, np.log(loss / (classes - 1)), np.float32)
    logits[0] = 0.0
    (row,) = helpers.rows(logits[None])
    for offset in (0.0, 4.0):
        shifted = jnp.asarray(np.round(logits * 2**12) / 2**12 + offset, "float32")
        (row,) = helpers.rows(np.asarray(shifted)[None])
        got, gradient = jax.value_and_grad(jaxce.softmax_cross_entropy_with_integer_labels)(shifted, jnp.array(0))
        assert ulp_error(got, [row.nll(0)]) <= contract([row.nll(0)])
        assert ulp_error(gradient[:1], [-row.not_p(0)]) <= contract([row.not_p(0)])


def test_terms_below_the_smallest_normal_number_are_lost() -> None:
    """XLA:CPU's limit: exp(-gap) is 0 there, also in a sum that would be far above it. Nothing else is lost."""
    logits = np.full((1, 1000), -88.0, np.float32)
    logits[0, 7] = 0.0
    (row,) = helpers.rows(logits)
    got = float(jaxce.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), jnp.array([7]))[0])
    assert 0 <= got <= row.nll(7) <= got + 999 * float(jnp.finfo("float32").tiny)


def test_a_gap_beyond_the_largest_number_is_infinite() -> None:
    """The gap is formed before it is multiplied, so a loss of half a gap of 6e38 is infinite too."""
    logits = jnp.array([[3e38, -3e38]], "float32")
    assert jaxce.softmax_cross_entropy(logits, jnp.array([[0.5, 0.5]], "float32")) == jnp.inf
    assert jaxce.softmax_cross_entropy(logits, jnp.array([[1.0, 0.0]], "float32")) == 0
    assert jaxce.entropy_with_logits(logits) == jnp.zeros(1)


@pytest.mark.parametrize("name", ["integer", "dense", "entropy"])
def test_unchanged_when_a_constant_is_added_exactly(name: str) -> None:
    rng = np.random.default_rng(0)
    offset = 2.0**13
    grid = float(np.spacing(np.float32(2 * offset)))
    x = (np.round(rng.normal(size=(50, 20)) * 20 / grid) * grid).astype("float32")
    shifted = x + np.float32(offset)
    assert np.array_equal(shifted.astype(np.float64), x.astype(np.float64) + offset)
    labels = rng.integers(20, size=50).astype("int32")
    targets = helpers.soft_labels(["" for _ in x], x, labels, "float32")
    both = jax.jit(value_and_gradient(MEASURES[name]))
    (before, gradient), (after, shifted_gradient) = both(x, labels, targets), both(shifted, labels, targets)
    # Each is off by its own error, at most.
    assert np.max(np.abs(np.asarray(before - after)) / np.spacing(np.abs(before)) / contract(before)) <= 2
    # So are gradients, in ulp of the largest magnitude in the formula.
    scale = np.exp(np.asarray(jaxce.log_softmax(x))) * (1 if name != "dense" else targets.sum(-1, keepdims=True))
    if name == "dense":
        scale = np.maximum(scale, targets)
    if name == "entropy":
        scale = scale * np.maximum(x.max(-1, keepdims=True) - x, 1)
    if name == "integer":
        scale = np.abs(np.asarray(gradient))
    unit = np.spacing(np.maximum(scale, 1e-30).astype("float32"))
    errors = np.abs(np.asarray(gradient - shifted_gradient)) / unit
    assert np.max(errors.ravel() / contract(np.maximum(scale, 1e-30).ravel())) <= 2
