"""Binary losses on logits: exact at every size of logit, with gradients and curvatures to match, in a single pass."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from helpers import assert_same, quick, ulp_error

from jaxce._sigmoid import sigmoid_binary_cross_entropy, sigmoid_focal_loss

INF = np.inf
LABELS = (0.0, 1.0, 1e-30, 1e-6, 0.5, 1 - 2.0**-24, None)  # None: random
GAMMAS = (0.3, 0.5, 1.0, 1.5, 2.0, 3.0)


def logits(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    sizes = np.array([1e-30, 1e-10, 1e-3, 0.5, 0.88, 1, 2, 16, 17, 20, 80, 86, 1e3, 1e30, 3e38])
    spread = 10 ** rng.uniform(-9, 9, 100) * rng.choice([-1, 1], 100)
    usual = [3 * rng.normal(size=300), 87 * rng.uniform(-1, 1, 300)]
    return np.concatenate([[0.0], sizes, -sizes, *usual, spread]).astype(dtype)


def labels(x: np.ndarray, label: float | None) -> np.ndarray:
    rng = np.random.default_rng(1)
    return (rng.uniform(size=x.shape) if label is None else np.full(x.shape, label)).astype(x.dtype)


@functools.cache
def sigmoid(x: float) -> Any:
    return 1 / (1 + mpmath.exp(-mpmath.mpf(x))) if x > -2000 else mpmath.mpf(0)


@functools.cache
def softplus(x: float) -> Any:
    return mpmath.log1p(mpmath.exp(mpmath.mpf(x))) if x > -2000 else mpmath.mpf(0)


def exact_loss(x: float, t: float) -> Any:
    """Of x and t as they are."""
    against = (1 - mpmath.mpf(t)) * x if x > 0 else -mpmath.mpf(t) * x
    return against + softplus(-abs(x))


def total(f: Any, *rest: Any) -> Any:
    return lambda x: f(x, *rest).sum()


@jax.jit
def summed(x: Any, t: Any) -> Any:
    return sigmoid_binary_cross_entropy(x, t).sum(axis=1)


@jax.jit
def derivatives(x: Any, t: Any) -> Any:
    """By the logits, and twice by them in both modes."""
    grad, ones = jax.grad(total(sigmoid_binary_cross_entropy, t)), jnp.ones_like(x)
    return grad(x), jax.jvp(grad, (x,), (ones,))[1], jax.grad(lambda a: jnp.vdot(grad(a), ones))(x)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact(dtype: str, label: float | None) -> None:
    with jax.enable_x64(dtype == "float64"):
        x = logits(dtype)
        t = labels(x, label)
        pairs = list(zip(x.tolist(), t.tolist(), strict=True))
        loss = [exact_loss(*p) for p in pairs]
        # Promised: 2 ulp. Measured: 1.7, of which exp has 0.9 (1.25 in float64) and four roundings the rest.
        assert ulp_error(sigmoid_binary_cross_entropy(x, t), loss).max() <= 2

        # What a reduction makes of it is compiled by another part of XLA:CPU: the second column costs exactly 0.
        both = np.stack([x, np.full(x.shape, INF, dtype)], axis=1)
        right = np.stack([t, np.ones(x.shape, dtype)], axis=1)
        assert ulp_error(summed(both, right), loss).max() <= 2

        p = [sigmoid(a) for a in x.tolist()]
        grad, *hvps = derivatives(x, t)
        slope = [a - mpmath.mpf(b) for a, (_, b) in zip(p, pairs, strict=True)]
        # Promised: 4 ulp of the larger of sigma(x) and t, which is what the difference has to form. Measured: 2.6.
        assert ulp_error(grad, slope, [max(a, b) for a, (_, b) in zip(p, pairs, strict=True)]).max() <= 4

        curvature = [a * sigmoid(-b) for a, b in zip(p, x.tolist(), strict=True)]
        for hvp in hvps:
            assert ulp_error(hvp, curvature).max() <= 5  # two exponentials (0.9 to 1.25 each) and four roundings


def test_without_jit() -> None:
    x = logits("float32")[:60]
    t = labels(x, None)
    with jax.disable_jit():
        loss = sigmoid_binary_cross_entropy(x, t)
    assert ulp_error(loss, [exact_loss(*p) for p in zip(x.tolist(), t.tolist(), strict=True)]).max() <= 2


def along_ones(loss: Any, x: Any) -> Any:
    """Value and slope of each, and the derivative of both, with the tangents of all at once."""

    def both(x: Any) -> Any:
        value, pull = jax.vjp(loss, x)
        return value, *pull(jnp.ones_like(value))

    return jax.tree.map(np.asarray, jax.jvp(both, (x,), (jnp.ones_like(x),)))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_infinite_logits(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"), jax.debug_nans(True):
        x = jnp.array([INF, -INF, INF, -INF, INF, -INF, INF, -INF], dtype)
        t = jnp.array([1, 0, 0, 1, 0.5, 0.25, 1 - 2.0**-24, 1e-30], dtype)
        loss = [0, 0, INF, INF, INF, INF, INF, INF]
        slope = np.asarray([0, 0, 1, -1, 0.5, -0.25, 2.0**-24, -1e-30], dtype)
        (value, backward), (forward, curvature) = along_ones(lambda a: sigmoid_binary_cross_entropy(a, t), x)
        np.testing.assert_array_equal(value, loss)
        np.testing.assert_array_equal(backward, slope)
        np.testing.assert_array_equal(forward, slope)
        np.testing.assert_array_equal(curvature, np.zeros(8))
        # Both arguments given a tangent, that of the labels 0: its infinite slope must not meet it.
        both = jax.jvp(sigmoid_binary_cross_entropy, (x, t), (jnp.ones_like(x), jnp.zeros_like(t)))[1]
        np.testing.assert_array_equal(both, slope)


def test_nan_stays_nan() -> None:
    x, t = jnp.array([np.nan, 1.0, np.nan, 2.0]), jnp.array([0.0, np.nan, 1.0, 1.0])
    np.testing.assert_array_equal(np.isnan(sigmoid_binary_cross_entropy(x, t)), [True, True, True, False])
    np.testing.assert_array_equal(np.isnan(sigmoid_focal_loss(x, t)), [True, True, True, False])


def test_derivative_by_the_label() -> None:
    x = jnp.array([-3.0, 0.0, 2.0, 90.0])
    t = jnp.array([0.0, 1.0, 0.5, 1.0])
    np.testing.assert_array_equal(jax.grad(lambda a: sigmoid_binary_cross_entropy(x, a).sum())(t), -x)


def test_oracles() -> None:
    rng = np.random.default_rng(2)
    x = (rng.normal(size=(20, 3)) * 4).astype(np.float32)
    t = rng.uniform(0.1, 0.9, size=(20, 3)).astype(np.float32)

    def losses(binary: Any, focal: Any, x: Any, t: Any) -> Any:
        options = (None, 2.0), (0.25, 1.5), (0.9, 0.0)
        return binary(x, t), *(focal(x, t, alpha=alpha, gamma=gamma) for alpha, gamma in options)

    all_losses = quick(losses, static_argnums=(0, 1))
    binary, *focal = all_losses(sigmoid_binary_cross_entropy, sigmoid_focal_loss, x, t)
    their_binary, *their_focal = all_losses(optax.sigmoid_binary_cross_entropy, optax.losses.sigmoid_focal_loss, x, t)
    # Optax and torch are right here to about 2 and 4 ulp; the focal loss has a power and three products more.
    np.testing.assert_allclose(binary, their_binary, rtol=1e-6)
    for ours, theirs in zip(focal, their_focal, strict=True):
        # Optax subtracts p_t from 1, which costs it eps / (1 - p_t); 1 - p_t is above 0.1 for these labels.
        np.testing.assert_allclose(ours, theirs, rtol=3e-5)
    torch = pytest.importorskip("torch")
    logit, label = torch.tensor(np.asarray(x)), torch.tensor(np.asarray(t))
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(logit, label, reduction="none")
    np.testing.assert_allclose(sigmoid_binary_cross_entropy(x, t), theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_focal_exact(dtype: str, gamma: float) -> None:
    with jax.enable_x64(dtype == "float64"):
        x = logits(dtype)[::3]
        power = mpmath.mpf(float(np.dtype(dtype).type(gamma)))
        for label in (0.0, 1.0, None):
            t = labels(x, label)
            exact = [
                ((1 - mpmath.mpf(b)) * sigmoid(a) + b * sigmoid(-a)) ** power * exact_loss(a, b)
                for a, b in zip(x.tolist(), t.tolist(), strict=True)
            ]
            # 1 - p_t is good to 3 ulp and the loss to 1.7; the power multiplies the former by gamma.
            assert ulp_error(sigmoid_focal_loss(x, t, gamma=gamma), exact).max() <= 3 + 3 * gamma


@jax.jit
def focal_derivatives(x: Any, t: Any, gamma: Any) -> Any:
    def f(x: Any, t: Any) -> Any:
        return sigmoid_focal_loss(x, t, gamma=gamma).sum()

    by_x, ones = jax.grad(f), jnp.ones_like(x)
    forward_over_reverse = jax.jvp(lambda v: by_x(v, t), (x,), (ones,))[1]
    reverse_over_reverse = jax.grad(lambda v: by_x(v, t).sum())(x)
    mixed = jax.jvp(lambda v: by_x(x, v), (t,), (ones,))[1]
    return by_x(x, t), forward_over_reverse, reverse_over_reverse, jax.grad(f, 1)(x, t), mixed


@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal_derivatives(gamma: float) -> None:
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        x, t = 3 * rng.normal(size=8), np.array([0, 1, 1, 0, 0.5, 0.3, 0.9, 1.0])
        x[0] = 0.0

        def exact(a: Any, b: Any) -> Any:
            p, not_p = 1 / (1 + mpmath.exp(-a)), 1 / (1 + mpmath.exp(a))
            loss = b * mpmath.log1p(mpmath.exp(-a)) + (1 - b) * mpmath.log1p(mpmath.exp(a))
            return ((1 - b) * p + b * not_p) ** mpmath.mpf(gamma) * loss

        def exactly(n: tuple[int, int], keep: slice) -> np.ndarray:
            points = zip(x[keep].tolist(), t[keep].tolist(), strict=True)
            return np.array([float(mpmath.diff(exact, p, n)) for p in points])

        by_x, forward, reverse, by_t, mixed = focal_derivatives(x, t, gamma)
        everything, soft = slice(None), slice(4, 7)
        close = functools.partial(
            np.testing.assert_allclose, rtol=1e-12, atol=1e-13
        )  # terms of size 1 to 50, nearly equal
        close(by_x, exactly((1, 0), everything))
        close(forward, exactly((2, 0), everything))
        close(reverse, exactly((2, 0), everything))
        close(by_t[soft], exactly((0, 1), soft))
        close(mixed[soft], exactly((1, 1), soft))


def exact_focal(x: float, t: float, gamma: float) -> list[list[Any]]:
    """The parts of the derivatives by x, t, x twice, x and t, t twice; m is 1 - p_t and c the cross-entropy."""
    b, g = mpmath.mpf(t), mpmath.mpf(gamma)
    p, not_p = 1 / (1 + mpmath.exp(-mpmath.mpf(x))), 1 / (1 + mpmath.exp(mpmath.mpf(x)))
    c = b * mpmath.log1p(mpmath.exp(-mpmath.mpf(x))) + (1 - b) * mpmath.log1p(mpmath.exp(mpmath.mpf(x)))
    m, m_x, m_t = (1 - b) * p + b * not_p, (1 - 2 * b) * p * not_p, not_p - p
    m_xx, m_xt = m_x * m_t, -2 * p * not_p
    c_x, c_t, c_xx = (1 - b) * p - b * not_p, -mpmath.mpf(x), p * not_p
    f = m**g
    d, dd = g * f / m, g * (g - 1) * f / m / m
    return [
        [d * m_x * c, f * c_x],
        [d * m_t * c, f * c_t],
        [dd * m_x * m_x * c, d * m_xx * c, 2 * d * m_x * c_x, f * c_xx],
        [dd * m_x * m_t * c, d * m_xt * c, d * m_x * c_t, d * m_t * c_x, -f],
        [dd * m_t * m_t * c, 2 * d * m_t * c_t],
    ]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_focal_derivatives_in_the_tails(dtype: str) -> None:
    """As far as they can be written, which is beyond where p can; by hard labels, too, and in both modes."""

    @quick
    def derivatives(x: Any, t: Any, g: Any) -> Any:
        first = jax.grad(lambda x, t: sigmoid_focal_loss(x, t, gamma=g).sum(), (0, 1))
        one, zero = jnp.ones_like(x), jnp.zeros_like(x)
        (xx, tx), (xt, tt) = (jax.jvp(first, (x, t), v)[1] for v in ((one, zero), (zero, one)))
        reverse = [jax.grad(lambda x, t, i=i: first(x, t)[i].sum(), (0, 1))(x, t) for i in (0, 1)]
        return [*first(x, t), xx, xt, tx, tt, *reverse[0], *reverse[1]]

    with jax.enable_x64(dtype == "float64"):
        far = 87 if dtype == "float32" else 708  # e^far is about the largest number
        sizes = far * np.array([0.003, 0.03, 0.1, 0.2, 0.33, 0.36, 0.4, 0.5, 0.502, 0.51, 0.63, 0.7, 0.9, 0.98, 1.2, 3])
        grid = list(itertools.product([*sizes, *-sizes], (0, 1, 0.25, 0.75), (*GAMMAS, 0)))
        x, t, g = (np.array(column, dtype) for column in zip(*grid, strict=True))
        # 1 - p_t is good to 3 ulp, and to a power gamma times; half an ulp for each nat of the power beyond what p can be,
        # and in float64, as XLA:CPU's powers have there.
        limit = 12 + 6 * g + np.where((abs(x) > far) | (dtype == "float64"), abs(x) * (g + 1) / 2, 0)
        with mpmath.workdps(60 if dtype == "float32" else 700):
            exact = [exact_focal(*point) for point in zip(x.tolist(), t.tolist(), g.tolist(), strict=True)]
            most = float(jnp.finfo(dtype).max)
            for got, i in zip(derivatives(x, t, g), (0, 1, 2, 3, 3, 4, 2, 3, 3, 4), strict=True):
                right, size = ([f(parts[i]) for parts in exact] for f in (mpmath.fsum, lambda v: sum(map(abs, v))))
                right = [
                    mpmath.mpf(0) if i == 4 and abs(r) > most else r for r in right
                ]  # an infinite one tells nothing
                error = ulp_error(got, right, size) / limit
                worst = int(error.argmax())
                assert error[worst] <= 1, (i, grid[worst], got[worst], float(right[worst]))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal_by_gamma_in_the_tails(gamma: float) -> None:
    """Where 1 - p_t is close to 0, or to 1 with a small logarithm; and how that changes with the logit."""
    grid = list(itertools.product([*np.linspace(-40, 40, 33)], (0, 1, 0.25)))
    x, t = (np.array(column, np.float32) for column in zip(*grid, strict=True))

    def by_gamma(x: Any) -> Any:
        one, g = jnp.ones_like(x), jnp.full_like(x, gamma)
        return jax.jvp(lambda g: sigmoid_focal_loss(x, t, gamma=g), (g,), (one,))[1]

    got, mixed = jax.jit(lambda x: jax.jvp(by_gamma, (x,), (jnp.ones_like(x),)))(x)
    exact, slopes = [], []
    for a, b in zip(x.tolist(), t.tolist(), strict=True):
        a, g = mpmath.mpf(a), mpmath.mpf(gamma)
        p, not_p = 1 / (1 + mpmath.exp(-a)), 1 / (1 + mpmath.exp(a))
        m, c = (1 - b) * p + b * not_p, b * mpmath.log1p(mpmath.exp(-a)) + (1 - b) * mpmath.log1p(mpmath.exp(a))
        log_m = mpmath.log(m) if m < 0.5 else mpmath.log1p(-(b * p + (1 - b) * not_p))
        log_slope = (1 - 2 * b) * p * not_p / m
        exact.append(m**g * c * log_m)
        parts = m**g * ((1 - b) * p - b * not_p) * log_m, m**g * c * log_slope, g * m**g * c * log_m * log_slope
        slopes.append((mpmath.fsum(parts), sum(map(abs, parts))))
    limit = 12 + 6 * gamma  # as of the derivatives by the logit
    assert ulp_error(got, exact).max() <= limit
    assert ulp_error(mixed, *zip(*slopes, strict=True)).max() <= limit


@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal_tails(gamma: float) -> None:
    x = jnp.array([INF, -INF, INF, -INF, INF, 95, 88, 60, 40, -95, -60, 3e38, -3e38, 95, -3e38])
    t = jnp.array([1.0, 0, 0, 1, 0.5, 1, 1, 1, 1, 0, 0, 1, 0, 0, 1])
    loss = functools.partial(sigmoid_focal_loss, gamma=gamma)
    with jax.debug_nans(True):
        (value, slope), (forward, curvature) = along_ones(lambda a: loss(a, t), x)
        jax.grad(lambda a: loss(x, a).sum())(t)
    np.testing.assert_array_equal(value[:5], [0, 0, INF, INF, INF])
    np.testing.assert_allclose(slope, forward, rtol=1e-6)  # the same products in another order
    np.testing.assert_array_equal(slope[[0, 1, 2, 3, 13, 14]], [0, 0, 1, -1, 1, -1])
    # Where the label is right the loss is e^(-(1 + gamma) |x|) to first order, and its derivatives some times that.
    for i in (7, 8, 10):
        expected = np.exp(-(1 + gamma) * abs(float(x[i])))
        if expected > 1e-36:
            np.testing.assert_allclose(abs(slope[i]), (1 + gamma) * expected, rtol=1e-6)  # 8 ulp
            np.testing.assert_allclose(curvature[i], (1 + gamma) ** 2 * expected, rtol=1e-6)


def test_focal_without_gamma() -> None:
    x = logits("float32")
    t = labels(x, None)
    plain = sigmoid_binary_cross_entropy(x, t)
    np.testing.assert_array_equal(sigmoid_focal_loss(x, t, gamma=0.0), plain)
    np.testing.assert_array_equal(
        jax.grad(total(lambda a: sigmoid_focal_loss(a, t, gamma=0)))(x),
        jax.grad(total(sigmoid_binary_cross_entropy, t))(x),
    )


def test_focal_alpha_ignores_infinities_without_weight() -> None:
    x, t = jnp.array([INF, -INF, 1.0]), jnp.array([0.0, 1.0, 1.0])
    assert sigmoid_focal_loss(x, t, alpha=1.0)[0] == 0
    assert sigmoid_focal_loss(x, t, alpha=0.0)[1] == 0
    assert jax.grad(lambda a: sigmoid_focal_loss(a, t, alpha=1.0).sum())(x)[0] == 0


def test_focal_options_of_each_question() -> None:
    """alpha and gamma may be arrays that broadcast to the logits: as many calls of numbers; with derivatives."""
    rng = np.random.default_rng(7)
    x, t = (jnp.asarray(a, jnp.float32) for a in (rng.normal(size=(4, 3)), rng.uniform(size=(4, 3))))
    alpha: Any = [0.25, 0.5, 1.0]
    gamma = np.float32([0, 1.5, 2])
    got = sigmoid_focal_loss(x, t, alpha=alpha, gamma=gamma)
    for k in range(3):
        one = sigmoid_focal_loss(x[:, k], t[:, k], alpha=alpha[k], gamma=float(gamma[k]))
        np.testing.assert_allclose(got[:, k], one, rtol=1e-6)  # of constants XLA makes other products
    np.testing.assert_array_equal(
        sigmoid_focal_loss(x, t, alpha=jnp.full((4, 1), 0.5)), sigmoid_focal_loss(x, t, alpha=0.5)
    )
    slopes = jax.grad(lambda a, g: sigmoid_focal_loss(x, t, alpha=a, gamma=g).sum(), (0, 1))(jnp.asarray(alpha), gamma)
    p = 1 / (1 + np.exp(-np.float64(x)))
    label, plain = np.float64(t), np.float64(sigmoid_focal_loss(x, t, gamma=gamma))
    by_gamma = np.float64(got) * np.log((1 - label) * p + label * (1 - p))
    for slope, right in zip(slopes, ((2 * label - 1) * plain, by_gamma), strict=True):
        np.testing.assert_allclose(slope, right.sum(0), rtol=1e-5, atol=1e-6)  # sums of 4
    wrong: Any
    for wrong in ([0.25, 0.5], np.ones((1, 4, 3)), ["a", "b", "c"]):
        for option in ("alpha", "gamma"):
            with pytest.raises((TypeError, ValueError), match=f"sigmoid_focal_loss: {option} must"):
                sigmoid_focal_loss(x, t, **{option: wrong})


def test_dtypes() -> None:
    x = jnp.array([-2.0, 0.5, 3.0])
    t = jnp.array([1, 0, 1])
    exact = sigmoid_binary_cross_entropy(x, t.astype(x.dtype))
    for half in (jnp.bfloat16, jnp.float16):
        loss = sigmoid_binary_cross_entropy(x.astype(half), t)  # these logits are exact in half precision
        assert loss.dtype == jnp.float32
        np.testing.assert_array_equal(loss, exact)
        assert jax.grad(total(sigmoid_binary_cross_entropy, t))(x.astype(half)).dtype == half
    np.testing.assert_array_equal(sigmoid_binary_cross_entropy(x, t.astype(jnp.int8)), exact)


@pytest.mark.parametrize("function", [sigmoid_binary_cross_entropy, sigmoid_focal_loss])
def test_bad_arguments(function: Any) -> None:
    name = function.__name__
    for bad in (jnp.array([1, 2]), jnp.array([True, False])):
        with pytest.raises(TypeError, match=f"{name}: logits must be"):
            function(bad, jnp.zeros(2))
    for bad in (jnp.array([1j, 0]), ["yes", "no"]):
        with pytest.raises(TypeError, match=f"{name}: labels must be"):
            function(jnp.zeros(2), bad)
    for shape, hint in (((3,), r"(\n|$)"), ((2, 2), r"(\n|$)"), ((2, 1), r"; give labels.reshape\(\(2,\)\)")):
        with pytest.raises(ValueError, match=rf"{name}: labels must have .* \(2,\), .*, got float32\[.*\]{hint}"):
            function(jnp.zeros(2), jnp.zeros(shape))
    with pytest.raises(ValueError, match=rf"{name}: labels must have"):  # logits are never broadcast to the labels
        function(jnp.zeros((2, 1)), jnp.zeros((2, 3)))
    with pytest.raises(TypeError, match=f"{name}: where must be .* where=mask != 0"):
        function(jnp.zeros(2), 1, where=jnp.ones(2))
    for mask in (np.ones(3, bool), np.ones(2, bool), True):
        with pytest.raises(
            ValueError, match=rf"{name}: where must have .* give where\[\.\.\., None.*\], .* where\[None"
        ):
            function(jnp.zeros((2, 3)), 1, where=mask)
    with pytest.raises(ValueError, match=f"{name}: where must have"):
        function(jnp.zeros((2, 3)), 1, where=np.ones((2, 2), bool))
    assert function(jnp.zeros((0, 3)), jnp.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("function", [sigmoid_binary_cross_entropy, sigmoid_focal_loss])
def test_labels_of_any_dtype_broadcast(function: Any) -> None:
    x = np.random.default_rng(4).normal(size=(3, 4)).astype(np.float32)
    yes = np.random.default_rng(5).uniform(size=(3, 4)) < 0.5

    @jax.jit  # once for all
    def of_all(labels: Any) -> Any:
        return [function(x, t) for t in labels]

    for loss in of_all([yes.astype(dtype) for dtype in ("float32", "bool", "int8", "uint32", "float16")]):
        assert_same(loss, function(x, yes.astype("float32")))
    ones = np.ones((3, 4))
    for loss in of_all([True, 1, 1.0, ones[0], ones[:, :1], ones[:1, :1].astype(bool)]):
        np.testing.assert_allclose(loss, function(x, ones), rtol=1e-6)  # of constant labels XLA makes other products

    quarters = [np.full(shape, 0.25, np.float32) for shape in ((3, 4), (), (3, 1), (4,))]
    each, *summed = quick(jax.grad(lambda labels: sum(loss.sum() for loss in of_all(labels))))(quarters)
    for got, axes in zip(summed, ((0, 1), (1,), (0,)), strict=True):
        np.testing.assert_allclose(got, each.sum(axes).reshape(got.shape), rtol=1e-6)  # sums in another order


def exact_weighted(x: float, t: float, w: float, a: float) -> list[tuple[Any, Any]]:
    """The loss, its derivatives by x, t, w and a, and twice by x: each with the larger of its two parts."""
    b, factor, share = map(mpmath.mpf, (t, w, a))
    yes, no = (1 - share) * b + share / 2, (1 - share) * (1 - b) + share / 2
    cost_yes, cost_no = softplus(-x), softplus(x)
    p, not_p = sigmoid(x), sigmoid(-x)
    by_label, size = factor * cost_yes - cost_no, max(factor * cost_yes, cost_no)
    loss, curvature = factor * yes * cost_yes + no * cost_no, (no + factor * yes) * p * not_p
    return [
        (loss, loss),
        (no * p - factor * yes * not_p, max(no * p, factor * yes * not_p)),
        ((1 - share) * by_label, (1 - share) * size),
        (yes * cost_yes, yes * cost_yes),
        ((0.5 - b) * by_label, abs(0.5 - b) * size),
        (curvature, curvature),
    ]


@jax.jit
def weighted_derivatives(x: Any, t: Any, w: Any, a: Any) -> list[Any]:
    """The same, and twice by x in both modes; by a of each entry."""

    def f(x: Any, t: Any, w: Any, a: Any) -> Any:
        return sigmoid_binary_cross_entropy(x, t, pos_weight=w, label_smoothing=a)

    by_x = jax.grad(lambda x: f(x, t, w, a).sum())
    value, back = jax.vjp(lambda *args: f(*args, a), x, t, w)
    by_a = jax.jvp(lambda a: f(x, t, w, a), (a,), (jnp.ones_like(a),))[1]
    forward, reverse = jax.jvp(by_x, (x,), (jnp.ones_like(x),))[1], jax.grad(lambda x: by_x(x).sum())(x)
    return [value, *back(jnp.ones_like(x)), by_a, forward, reverse]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_weighted_exact(dtype: str) -> None:
    """With pos_weight and label_smoothing neither part loses digits to the other."""
    with jax.enable_x64(dtype == "float64"):
        grid = itertools.product(logits(dtype)[::5].tolist(), (0, 1, 0.3), (0, 0.5, 10))
        x, t, w = (np.array(column, dtype) for column in zip(*grid, strict=True))
        for share in np.array([0, 1e-3, 0.3], dtype):
            points = zip(x.tolist(), t.tolist(), w.tolist(), strict=True)
            exact = list(zip(*(exact_weighted(*point, float(share)) for point in points), strict=True))
            got = weighted_derivatives(x, t, w, jnp.asarray(share))
            for i, column in enumerate([*exact, exact[-1]]):
                error = ulp_error(got[i], *zip(*column, strict=True))
                # Of a curvature's two parts XLA flushes one to 0 that is below the smallest normal number.
                lost = np.abs(np.asarray(got[i], float) - np.array([float(c[0]) for c in column]))
                error = np.where(lost < float(jnp.finfo(dtype).tiny), 0, error)
                # Promised: 4. Measured: 3.3, and 3.9 of curvatures, whose p and 1 - p have an exponential each.
                assert error.max() <= (5 if i > 4 else 4), (i, share)


def test_weighted_infinite_logits() -> None:
    """What has no weight costs nothing; in debug mode no NaN is met on the way, either."""
    points = list(itertools.product((INF, -INF), (0.0, 1.0, 0.3), (0.0, 0.5, 10.0)))
    x, t, w = (jnp.array(column) for column in zip(*points, strict=True))
    with jax.debug_nans(True):
        loss = functools.partial(sigmoid_binary_cross_entropy, pos_weight=w)
        (value, slope), (_, curvature) = along_ones(lambda a: loss(a, t), x)
        smoothed = sigmoid_binary_cross_entropy(x, t, label_smoothing=0.1)
    costs = [INF if (z > 0 and b < 1) or (z < 0 and b * factor > 0) else 0 for z, b, factor in points]
    np.testing.assert_array_equal(value, costs)
    slopes = np.array([1 - b if z > 0 else -factor * b for z, b, factor in points], np.float32)
    np.testing.assert_allclose(slope, slopes, rtol=1e-7)  # products rounded once
    np.testing.assert_array_equal(curvature, 0)
    np.testing.assert_array_equal(smoothed, INF)
    for mode in (jax.grad, jax.jacfwd):  # by one weight for all
        pair = jnp.array([-INF, 0.0]), jnp.array([0.0, 1.0])
        by_weight = mode(lambda w, pair=pair: sigmoid_binary_cross_entropy(*pair, pos_weight=w).sum())(2.0)
        np.testing.assert_allclose(by_weight, np.log(2), rtol=1e-7)
    for label in (0.3, jnp.full((), 0.3)):  # whose factor XLA joins to others
        np.testing.assert_array_equal(sigmoid_binary_cross_entropy(jnp.array([INF, -INF, INF]), label), INF)


def test_weighted_options() -> None:
    """Neutral options change nothing; a number, an array that broadcasts and a traced value are the same."""
    rng = np.random.default_rng(6)
    x, t = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), jnp.asarray(rng.uniform(size=(3, 4)), jnp.float32)
    plain = sigmoid_binary_cross_entropy(x, t)
    np.testing.assert_array_equal(sigmoid_binary_cross_entropy(x, t, label_smoothing=0), plain)
    np.testing.assert_array_equal(sigmoid_binary_cross_entropy(x, t, pos_weight=None, label_smoothing=0.0), plain)
    np.testing.assert_allclose(sigmoid_binary_cross_entropy(x, t, pos_weight=1), plain, rtol=5e-7)  # 4 ulp
    three = sigmoid_binary_cross_entropy(x, t, pos_weight=3)
    for weight in (3.0, np.full(4, 3), jnp.full((3, 1), 3.0), jnp.asarray(3, "int32")):
        np.testing.assert_array_equal(sigmoid_binary_cross_entropy(x, t, pos_weight=weight), three)
    soft = sigmoid_binary_cross_entropy(x, t, label_smoothing=0.2)
    np.testing.assert_allclose(soft, sigmoid_binary_cross_entropy(x, 0.8 * t + 0.1), rtol=1e-6)  # rounded otherwise
    traced = jax.jit(lambda a: sigmoid_binary_cross_entropy(x, t, label_smoothing=a))
    np.testing.assert_allclose(traced(0.2), soft, rtol=1e-6)
    np.testing.assert_allclose(traced(0.0), plain, rtol=5e-7)
    half = sigmoid_binary_cross_entropy(x.astype("bfloat16"), True, pos_weight=3, label_smoothing=0.2)
    assert half.dtype == jnp.float32
    for wrong, shape in ((np.ones(3), "3"), (np.ones((2, 3, 4)), "2,3,4")):
        with pytest.raises(ValueError, match=rf"pos_weight must have .* \(3, 4\), .* got float\d+\[{shape}\]"):
            sigmoid_binary_cross_entropy(x, t, pos_weight=wrong)
    with pytest.raises(TypeError, match="pos_weight must be"):
        sigmoid_binary_cross_entropy(x, t, pos_weight=1j)
    for share in (-0.1, 1.5, np.nan):
        with pytest.raises(ValueError, match="label_smoothing must be"):
            sigmoid_binary_cross_entropy(x, t, label_smoothing=share)


@pytest.mark.parametrize("options", [{"gamma": -1.0}, {"gamma": INF}, {"alpha": 1.5}, {"alpha": -1.0}])
def test_bad_options(options: Any) -> None:
    with pytest.raises(ValueError, match=f"sigmoid_focal_loss: {next(iter(options))} must be"):
        sigmoid_focal_loss(jnp.zeros(2), jnp.zeros(2), **options)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about what XLA:CPU fuses")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mean_and_gradient_need_no_copy(dtype: str) -> None:
    x = jnp.zeros((2048, 100), dtype)
    for reduce in (jnp.mean, jnp.sum):
        run = jax.value_and_grad(lambda a, b, reduce=reduce: reduce(sigmoid_binary_cross_entropy(a, b)))
        memory = jax.jit(run).lower(x, x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < x.nbytes / 10
