"""Losses on probabilities and log-probabilities: exact sums, honest infinities, and edges with derivatives to match."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from helpers import assert_same, quick, ulp_error
from mpmath import mpf

from jaxce._probability import (
    binary_cross_entropy,
    categorical_cross_entropy,
    categorical_cross_entropy_with_integer_labels,
    generalized_kl_divergence,
    kl_divergence,
    kl_divergence_with_log_targets,
    nll,
)

INF, NAN = np.inf, np.nan
INTEGER = [categorical_cross_entropy_with_integer_labels, nll]
DENSE = [categorical_cross_entropy, kl_divergence, kl_divergence_with_log_targets, generalized_kl_divergence]


def is_log(function: Any) -> tuple[bool, bool]:
    """Whether the prediction and the target are logarithms."""
    return function not in (categorical_cross_entropy, INTEGER[0]), function is kl_divergence_with_log_targets


def distributions(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows: random, sparse, nearly equal to one part in 1e2 ... 1e7, and tiny classes; with 7 classes."""
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.ones(7), 40)
    p = rng.dirichlet(np.ones(7), 40)
    p[5:10] *= rng.uniform(size=(5, 7)) < 0.5
    for i in range(10, 30):
        p[i] = q[i] * (1 + 10.0 ** -(2 + (i - 10) // 4) * rng.normal(size=7))
    q[30:] = np.exp(rng.uniform(-60, 0, (10, 7)))
    p[35:] = np.exp(rng.uniform(-60, 0, (5, 7)))
    return p.astype(dtype), q.astype(dtype)


def exact_term(function: Any, prediction: float, target: float) -> tuple[Any, Any, Any]:
    """What one class adds, and its derivatives by prediction and target, for finite arguments."""
    x, y = mpf(prediction), mpf(target)
    if function is categorical_cross_entropy:
        return -y * mpmath.log(x), -y / x, -mpmath.log(x)
    if function is kl_divergence_with_log_targets:
        t = mpmath.exp(y)
        return t * (y - x), -t, t * (y - x + 1)
    log_t = mpmath.log(y) if y else -mpmath.inf
    ratio = log_t - x
    term = y * ratio if y else mpf(0)
    if function is kl_divergence:
        return term, -y, ratio + 1
    return term - y + mpmath.exp(x), mpmath.exp(x) - y, ratio


def exact_parts(function: Any, prediction: float, target: float) -> Any:
    """The sum of the magnitudes that a class adds and subtracts."""
    x, y = mpf(prediction), mpf(target)
    if function is categorical_cross_entropy:
        return abs(y * mpmath.log(x))
    if function is kl_divergence_with_log_targets:
        return mpmath.exp(y) * abs(y - x)
    parts = y * (abs(mpmath.log(y)) + abs(x)) if y else mpf(0)
    return parts + (abs(mpmath.exp(x) - y) if function is generalized_kl_divergence else 0)


@pytest.mark.parametrize("function", DENSE)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact(dtype: str, function: Any) -> None:
    with jax.enable_x64(dtype == "float64"):
        p, q = distributions(dtype)
        if is_log(function)[1]:
            p = np.log(np.where(p > 0, p, 1e-30)).astype(dtype)
        if is_log(function)[0]:
            q = np.log(q).astype(dtype)
        pairs = [list(zip(*r, strict=True)) for r in zip(q.tolist(), p.tolist(), strict=True)]
        terms = [[exact_term(function, a, b) for a, b in row] for row in pairs]
        exact = [mpmath.fsum(t[0] for t in row) for row in terms]
        # The sum of the terms' magnitudes is what its digits are measured in: nearly equal rows cancel.
        size = [mpmath.fsum(exact_parts(function, a, b) for a, b in row) for row in pairs]
        assert ulp_error(function(q, p), exact, size).max() <= 4
        by_q, by_p = jax.grad(lambda a, b: function(a, b).sum(), (0, 1))(q, p)
        flat = [t for row in terms for t in row]
        # One exp or one quotient, and a difference: in ulp of the larger of the two.
        size = [max(abs(t[1]), mpf(float(b))) for t, b in zip(flat, np.abs(p).ravel(), strict=True)]
        size = [t[1] for t in flat] if function is not generalized_kl_divergence else size
        assert ulp_error(by_q.ravel(), [t[1] for t in flat], size).max() <= 4
        # The logarithms and the 1 are of size 1 and more, their sum may not be.
        size = [
            abs(t[2]) + abs(mpf(x)) + (mpmath.exp(y) if is_log(function)[1] else 1)
            for t, (x, y) in zip(flat, [pair for row in pairs for pair in row], strict=True)
        ]
        zero = (p == 0).ravel()
        error = ulp_error(
            np.where(zero, 0, by_p.ravel()), [0 if z else t[2] for t, z in zip(flat, zero, strict=True)], size
        )
        assert error.max() <= 4
        assert not zero.any() or function is categorical_cross_entropy or (np.asarray(by_p).ravel()[zero] == -INF).all()


def test_near_pairs_are_never_negative() -> None:
    """Each term of the generalised divergence is at least 0, also where t and q differ in their last digit."""
    rng = np.random.default_rng(1)
    log_q = np.log(rng.dirichlet(np.ones(50), 30)).astype(np.float32)
    t = np.exp(log_q).astype(np.float32)
    t = np.nextafter(t, np.where(rng.uniform(size=t.shape) < 0.5, 0, 1).astype(np.float32))
    loss = np.asarray(generalized_kl_divergence(log_q, t))
    assert loss.min() >= 0 and loss.max() < 50 * 2.0**-40  # (t - q)^2 / 2q with t and q within some ulp
    log_t = np.log(np.float32([0.5, 0.25, 0.25]))  # q = exp(log_t) isn't these numbers, but log_targets are equal
    assert kl_divergence_with_log_targets(log_t, log_t) == 0


def test_binary_exact() -> None:
    rng = np.random.default_rng(2)
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            eps = float(np.finfo(dtype).eps)
            q = np.concatenate([rng.uniform(size=200), 10 ** rng.uniform(-30, 0, 100), [eps, 0.5, 1 - eps / 2]])
            for label in (0.0, 1.0, 0.3, 1e-6, None):
                t = (rng.uniform(size=q.size) if label is None else np.full(q.size, label)).astype(dtype)
                x = q.astype(dtype)
                x = np.minimum(x, np.asarray(1 - eps / 2, dtype))
                exact, slope = [], []
                for a, b in zip(x.tolist(), t.tolist(), strict=True):
                    a, b = mpf(a), mpf(b)
                    exact.append(-b * mpmath.log(a) - (1 - b) * mpmath.log1p(-a))
                    slope.append((1 - b) / (1 - a) - b / a)
                size = [b / mpf(a) + (1 - mpf(b)) / (1 - mpf(a)) for a, b in zip(x.tolist(), t.tolist(), strict=True)]
                # XLA's log and log1p are up to 2.3 ulp off; 1 - t, the products and the sum round once each.
                assert ulp_error(binary_cross_entropy(x, t), exact).max() <= 4
                grad = jax.grad(lambda a, t=t: binary_cross_entropy(a, t).sum())(x)
                assert ulp_error(grad, slope, size).max() <= 4  # two quotients of rounded numbers


def both_modes(function: Any, *arguments: Any) -> list[np.ndarray]:
    """The derivative by each argument, checked to be the same in reverse and forward mode."""
    result = []
    for i in range(len(arguments)):

        def total(x: Any, i: int = i) -> Any:
            return function(*arguments[:i], x, *arguments[i + 1 :]).sum()

        reverse, forward = jax.grad(total)(arguments[i]), jax.jacfwd(total)(arguments[i])
        np.testing.assert_allclose(reverse, forward, rtol=1e-6)  # the same products in another order
        result.append(np.asarray(reverse))
    return result


EDGES = {  # prediction, target: value, derivative by each, with q and t as probabilities
    kl_divergence: [
        ([0, 1], [0, 1], 0, [0, -1], [0, 1]),
        ([0.5, 0.5], [0, 1], np.log(2), [0, -1], [-INF, np.log(2) + 1]),
        ([0, 1], [0.5, 0.5], INF, [-0.5, -0.5], [INF, 1 + np.log(0.5)]),
    ],
    generalized_kl_divergence: [
        ([0, 1], [0, 1], 0, [0, 0], [0, 0]),
        ([0.5, 1], [0, 1], 0.5, [0.5, 0], [-INF, 0]),
        ([0, 1], [0.5, 1], INF, [-0.5, 0], [INF, 0]),
    ],
    kl_divergence_with_log_targets: [
        ([0, 1], [0, 1], 0, [0, -1], [0, 1]),
        ([0.5, 0.5], [0, 1], np.log(2), [0, -1], [0, np.log(2) + 1]),
        ([0, 1], [0.5, 0.5], INF, [-0.5, -0.5], [INF, 0.5 * (1 + np.log(0.5))]),
    ],
    categorical_cross_entropy: [
        ([0, 1], [0, 1], 0, [0, -1], [0, 0]),
        ([0.5, 0.5], [0, 1], np.log(2), [0, -2], [np.log(2), np.log(2)]),
        ([0, 1], [0.5, 0.5], INF, [-INF, -0.5], [INF, 0]),
    ],
}


def as_given(function: Any, q: Any, t: Any, dtype: str = "float32") -> tuple[Any, Any]:
    logs = is_log(function)
    with np.errstate(divide="ignore"):
        q, t = (np.log(np.asarray(a, float)) if log else a for a, log in zip((q, t), logs, strict=True))
    return jnp.asarray(q, dtype), jnp.asarray(t, dtype)


@pytest.mark.parametrize("function", DENSE)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_edges(dtype: str, function: Any) -> None:
    with jax.enable_x64(dtype == "float64"), jax.debug_nans(True):
        for q, t, value, by_q, by_t in EDGES[function]:
            q, t = as_given(function, q, t, dtype)
            np.testing.assert_allclose(function(q, t), value, rtol=1e-6, atol=1e-7)  # float32 of log 2, twice rounded
            slopes = both_modes(function, q, t)
            np.testing.assert_allclose(slopes[0], by_q, rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(slopes[1], by_t, rtol=1e-6, atol=1e-7)
    q, t = as_given(function, [0, 0.25, 0.75], [0, 0.5, 0.5])  # curvatures, too, of what isn't there are 0
    hvp = jax.jvp(jax.grad(lambda a: function(a, t).sum()), (q,), (jnp.ones_like(q),))[1]
    assert np.isfinite(hvp).all() and hvp[0] == 0
    hvp = jax.jvp(jax.grad(lambda a: function(q, a).sum()), (t,), (jnp.ones_like(t),))[1]
    assert np.isfinite(hvp).all() and hvp[0] == 0


def test_log_targets_that_underflow() -> None:
    assert kl_divergence_with_log_targets(jnp.array([-INF, 0.0]), jnp.array([-200.0, 0.0])) == INF


def test_binary_edges() -> None:
    q = jnp.array([0.0, 0, 1, 1, 0.5, 0.0, 1.0])
    t = jnp.array([0.0, 1, 0, 1, 0.5, 0.5, 0.5])
    with jax.debug_nans(True):
        loss = binary_cross_entropy(q, t)
        by_q, by_t = both_modes(binary_cross_entropy, q, t)
    np.testing.assert_allclose(loss, [0, INF, INF, 0, np.log(2), INF, INF], rtol=1e-6)  # float32 of log 2
    np.testing.assert_allclose(by_q, [1, -INF, INF, -1, 0, -INF, INF])
    np.testing.assert_allclose(by_t, [0, INF, -INF, 0, 0, INF, -INF])
    assert np.isnan(binary_cross_entropy(jnp.array([NAN, 0.5, -0.1, 1.1]), jnp.array([0.0, NAN, 1.0, 0.0]))).all()


@pytest.mark.parametrize("function", DENSE)
def test_nan_stays_nan(function: Any) -> None:
    q, t = as_given(function, [[0.5, 0.5], [0.5, 0.5]], [[0.0, 1.0], [0.0, 1.0]])
    assert np.isnan(function(q.at[0, 0].set(NAN), t)).tolist() == [True, False]
    assert np.isnan(function(q, t.at[0, 0].set(NAN))).tolist() == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("function", DENSE)
def test_masked_is_absent(function: Any) -> None:
    q, t = as_given(function, [[0.2, 0.3, 0.5], [0.1, 0.6, 0.3]], [[0.5, 0.4, 0.1], [0.3, 0.3, 0.4]])
    keep = jnp.array([[True, False, True], [False, False, False]])
    np.testing.assert_array_equal(function(q, t, where=keep.astype("int8") * 2), function(q, t, where=keep))
    for bad in (NAN, INF, -INF):
        x, y = jnp.where(keep, q, bad), jnp.where(keep, t, bad)
        with jax.debug_nans(True):
            loss = function(x, y, where=keep)
            slopes = both_modes(lambda a, b: function(a, b, where=keep), x, y)
        np.testing.assert_allclose(loss, [function(q[0, ::2], t[0, ::2]), 0.0], rtol=1e-7)
        for slope in slopes:
            assert (slope[~np.asarray(keep)] == 0).all() and (slope[np.asarray(keep)] != 0).all()
        rows = jnp.array([True, False])
        whole = function(q.at[1].set(bad), t, where=rows)
        np.testing.assert_allclose(whole, [function(q[0], t[0]), 0.0], rtol=1e-7)


@pytest.mark.parametrize("function", INTEGER)
def test_integer_labels(function: Any) -> None:
    q = np.asarray(as_given(function, [[0.7, 0.2, 0.1], [0.1, 0.4, 0.5], [0.0, 1.0, 0.0]], 0.0)[0])
    y = np.array([1, 2, 0], np.int32)

    @quick
    def with_derivatives(q: Any, y: Any) -> Any:
        def loss(q: Any) -> Any:
            return function(q, y)

        return loss(q), jax.grad(lambda q: loss(q)[:2].sum())(q), jax.jvp(loss, (q,), (jnp.ones_like(q),))[1]

    np.testing.assert_allclose(function(q, y), [-np.log(0.2), np.log(2), INF], rtol=1e-6)  # float32 of its inputs
    np.testing.assert_array_equal(function(q.T, y, 0), function(q, y))
    for bad in (-1, 3, 100, -100):
        labels, broken, others = y.copy(), q.copy(), np.array([False, True, True])
        labels[0], broken[0] = bad, NAN
        loss, slope, forward = with_derivatives(q, labels)
        assert np.isnan(loss).tolist() == [True, False, False]
        assert np.isnan(slope).tolist() == [[True] * 3, [False] * 3, [False] * 3]
        assert np.isnan(forward).tolist()[:2] == [True, False]
        with jax.debug_nans(True):
            assert function(broken, labels, where=others)[0] == 0
            slopes = both_modes(lambda a, y=labels, rows=others: function(a, y, where=rows)[:2], broken)
        assert (slopes[0][0] == 0).all() and slopes[0][1, 2] != 0
    masked = function(q, y, where=np.array([[True, False, True]] * 2 + [[True] * 3]))
    np.testing.assert_allclose(masked, [INF, np.log(2), INF], rtol=1e-6)
    wide = np.full((2, 1000), q[0, 1])  # a label's dtype need not hold the number of classes
    assert np.isfinite(function(wide, np.array([0, 127], np.int8))).all()
    certain, _ = as_given(function, [[1.0, 0.0]], 0.0)
    assert not np.signbit(function(certain, np.array([0])))


def test_oracles() -> None:
    rng = np.random.default_rng(3)
    q, t = (rng.dirichlet(np.ones(5), (4, 3)).astype(np.float32) for _ in range(2))
    pairs = [
        (kl_divergence, optax.losses.kl_divergence, t, -1),
        (kl_divergence, optax.losses.kl_divergence, t, 0),
        (generalized_kl_divergence, optax.losses.generalized_kl_divergence, t, -1),
        (kl_divergence_with_log_targets, optax.losses.kl_divergence_with_log_targets, np.log(t), -1),
    ]
    both = quick(lambda log_q: [(ours(log_q, t, axis), theirs(log_q, t, axis)) for ours, theirs, t, axis in pairs])
    for got, expected in both(np.log(q)):
        # Optax rounds each term, whose sum over positive and negative ones is some 10 times smaller.
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
    special = pytest.importorskip("scipy.special")
    exact_q, exact_t = np.asarray(q, float), np.asarray(t, float)
    np.testing.assert_allclose(categorical_cross_entropy(q, t), -special.xlogy(exact_t, exact_q).sum(-1), rtol=1e-7)
    with jax.enable_x64(True):
        ours = generalized_kl_divergence(np.log(exact_q), exact_t)
        np.testing.assert_allclose(ours, special.kl_div(exact_t, exact_q).sum(-1), rtol=1e-13)  # 100 ulp of SciPy's sum
    torch = pytest.importorskip("torch")
    theirs = torch.nn.functional.binary_cross_entropy(torch.tensor(exact_q), torch.tensor(exact_t), reduction="none")
    np.testing.assert_allclose(binary_cross_entropy(q, t), theirs.numpy(), rtol=2e-7)  # 2 ulp of float32


def test_several_axes_and_empty() -> None:
    rng = np.random.default_rng(4)
    q, t = (jnp.asarray(rng.dirichlet(np.ones(12), 5).reshape(5, 3, 4), jnp.float32) for _ in range(2))
    flat = kl_divergence(jnp.log(q).reshape(5, 12), t.reshape(5, 12))
    assert_same(kl_divergence(jnp.log(q), t, (1, 2)), flat)
    for function in DENSE:
        assert function(jnp.zeros((0, 4)), jnp.zeros((0, 4))).shape == (0,)
    for function in INTEGER:
        assert function(jnp.zeros((0, 4)), jnp.zeros(0, jnp.int32)).shape == (0,)


@pytest.mark.slow
def test_dtypes() -> None:
    q, t = jnp.array([0.5, 0.25, 0.25]), jnp.array([0.25, 0.5, 0.25])
    for function in (categorical_cross_entropy, generalized_kl_divergence, kl_divergence, binary_cross_entropy):
        for half in (jnp.bfloat16, jnp.float16):
            loss = function(q.astype(half), t.astype(half))  # these numbers are exact in half precision
            assert loss.dtype == jnp.float32
            np.testing.assert_array_equal(loss, function(q, t))
            np.testing.assert_array_equal(loss, function(q.astype(half), t))
    for dtype in ("int32", "bool"):
        np.testing.assert_array_equal(
            binary_cross_entropy(q, np.array([1, 0, 1], dtype)), binary_cross_entropy(q, jnp.array([1.0, 0, 1]))
        )


@pytest.mark.parametrize("function", [*DENSE, binary_cross_entropy])
def test_targets_broadcast(function: Any) -> None:
    """To the prediction: one distribution for all rows, a column, a number; derivatives by them are sums."""
    q, t = as_given(function, np.full((3, 4), 0.25), np.linspace(0.1, 0.7, 12).reshape(3, 4))
    t = np.asarray(t)
    targets = [t[0], t[:1], t[:, :1], t[0, 0]]

    @quick
    def losses_and_slopes(targets: Any) -> Any:
        def losses(targets: Any) -> Any:
            each = [function(q, t).sum() for t in targets]
            return sum(each), each

        slopes, each = jax.grad(losses, has_aux=True)(targets)
        return each, slopes

    wide = [np.broadcast_to(t, q.shape) for t in targets]
    (narrow, slopes), (right, each) = losses_and_slopes(targets), losses_and_slopes(wide)
    np.testing.assert_allclose(narrow, right, rtol=1e-6, atol=1e-6)  # sums in another order
    for slope, one, axes in zip(slopes, each, ((0,), (0,), (1,), (0, 1)), strict=True):
        np.testing.assert_allclose(slope, one.sum(axes).reshape(slope.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [categorical_cross_entropy, kl_divergence, generalized_kl_divergence])
def test_whole_targets(function: Any) -> None:
    """One-hot rows may be integers or booleans; whole numbers of fewer axes would be classes, which don't broadcast."""
    q, t = as_given(function, np.full((2, 2), 0.5), np.eye(2))
    for dtype in ("int32", "uint8", "bool"):
        np.testing.assert_array_equal(function(q, np.eye(2).astype(dtype)), function(q, t))
        hint = "nll" if is_log(function)[0] else "categorical_cross_entropy_with_integer_labels"
        with pytest.raises(
            ValueError, match=rf"{function.__name__}: .*, got {dtype}\[2\]; class numbers are for {hint}"
        ):
            function(q, np.array([0, 1]).astype(dtype))
    np.testing.assert_array_equal(function(q, np.array([[0, 1]])), function(q, jnp.array([0.0, 1.0])))


@pytest.mark.parametrize("function", [*DENSE, *INTEGER, binary_cross_entropy])
def test_bad_arguments(function: Any) -> None:
    x = jnp.full((2, 3), 0.5)
    y = jnp.zeros(2, jnp.int32) if function in INTEGER else x
    with pytest.raises(TypeError, match=rf"{function.__name__}: .*must be"):
        function(jnp.ones((2, 3), jnp.int32), y)
    wrong = [y.astype(complex)] + ([y.astype(bool), y.astype(float)] if function in INTEGER else [])
    wrong += [y.astype(int), y.astype(bool)] if function is kl_divergence_with_log_targets else []
    for labels in wrong:
        with pytest.raises(TypeError, match=rf"{function.__name__}: .*must be"):
            function(x, labels)
    for labels in [y[:1]] if function in INTEGER else [y[:, :2], y[None], y[:, 0]]:
        with pytest.raises(ValueError, match=rf"{function.__name__}: .*must have"):
            function(x, labels)
    if function is not binary_cross_entropy:
        with pytest.raises(ValueError, match=rf"{function.__name__}: axis must"):
            function(x, y, 2)
        with pytest.raises(ValueError, match=rf"{function.__name__}: where must"):
            function(x, y, where=jnp.ones((3, 3), bool))
