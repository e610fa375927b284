"""The same numbers from people we did not ask: SciPy, scikit-learn, PyTorch, Optax. And where Optax is wrong, that."""

from __future__ import annotations

from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

import jaxce

RNG = np.random.default_rng(0)
X = (3 * RNG.normal(size=(6, 7))).astype("float32")
Z = (3 * RNG.normal(size=(6, 7))).astype("float32")
Y = RNG.integers(7, size=6).astype("int32")
T = scipy.special.softmax(RNG.normal(size=(6, 7)), axis=-1).astype("float32")
W = RNG.exponential(size=7).astype("float32")
KEEP = RNG.uniform(size=X.shape) < 0.6
KEEP[np.arange(6), Y] = True


def close(got: Any, expected: Any, rtol: float = 2e-6, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(expected, np.float64), rtol=rtol, atol=atol)


# --- the plain definitions of helpers.py ---


PLACES = [(axis, masked) for axis in (-1, 0, (0, 1), (1, 0)) for masked in (False, True)]
QUICK = [((1, 0), True)]  # to run; the others on request


@pytest.mark.parametrize(
    ("axis", "masked"), [p if p in QUICK else pytest.param(*p, marks=pytest.mark.slow) for p in PLACES]
)
def test_plain_definitions(axis: Any, masked: bool) -> None:
    where = KEEP if masked else None
    classes = X.size if isinstance(axis, tuple) else X.shape[axis]
    batch = () if isinstance(axis, tuple) else (X.shape[1 + axis],) if axis == 0 else (X.shape[0],)
    labels = RNG.integers(classes, size=batch).astype("int32")
    weights = RNG.exponential(size=classes).astype("float32")
    for options in [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"class_weights": weights, "label_smoothing": 0.3}]:
        plain = helpers.plain_softmax_cross_entropy(X, T, axis, where, **options)
        close(jaxce.softmax_cross_entropy(X, T, axis, where, **options), plain)
        plain = helpers.plain_softmax_cross_entropy(X, labels, axis, where, **options)
        close(jaxce.softmax_cross_entropy_with_integer_labels(X, labels, axis, where, **options), plain)
    close(jaxce.entropy_with_logits(X, axis, where), helpers.plain_entropy_with_logits(X, axis, where))
    for target in (T, *(() if masked else (labels,))):
        plain = helpers.plain_softmax_focal_loss(X, target, axis, where)
        close(jaxce.softmax_focal_loss(X, target, axis, where), plain, rtol=1e-5, atol=1e-12)
        plain = helpers.plain_poly_loss_cross_entropy(X, target, axis=axis, where=where)
        close(jaxce.poly_loss_cross_entropy(X, target, axis=axis, where=where), plain, rtol=1e-5, atol=1e-12)


# --- SciPy, scikit-learn, PyTorch ---


def test_scipy() -> None:
    x, z = X.astype(np.float64), Z.astype(np.float64)
    p = scipy.special.softmax(x, axis=-1)
    close(jaxce.logsumexp(X), scipy.special.logsumexp(x, axis=-1))
    close(jaxce.log_softmax(X, 0), scipy.special.log_softmax(x, axis=0))
    close(jaxce.entropy_with_logits(X, base=2), scipy.stats.entropy(p, axis=-1, base=2))
    q = scipy.special.softmax(z, axis=-1)
    close(jaxce.cross_entropy_with_logits(X, Z), (scipy.special.entr(p) + scipy.special.rel_entr(p, q)).sum(-1))
    close(jaxce.softmax_cross_entropy(X, T), -(T * scipy.special.log_softmax(x, axis=-1)).sum(-1))


def test_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    probabilities = scipy.special.softmax(X.astype(np.float64), axis=-1)
    weights = RNG.exponential(size=6).astype("float32")
    losses = jaxce.softmax_cross_entropy_with_integer_labels(X, Y)
    close(jaxce.weighted_mean(losses), metrics.log_loss(Y, probabilities, labels=range(7)))
    expected = metrics.log_loss(Y, probabilities, labels=range(7), sample_weight=weights)
    close(jaxce.weighted_mean(losses, weights), expected)


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x, z, t, w = (torch.tensor(a.astype(np.float64), requires_grad=True) for a in (X, Z, T, W))
    y = torch.tensor(Y.astype(np.int64))
    for alpha in (0.0, 0.1):
        for weight, theirs in ((None, None), (W, w.detach())):
            options: dict[str, Any] = {"label_smoothing": alpha, "class_weights": weight}
            expected = functional.cross_entropy(x, y, theirs, reduction="none", label_smoothing=alpha)
            close(jaxce.softmax_cross_entropy_with_integer_labels(X, Y, **options), expected.detach())
            (by_x,) = torch.autograd.grad(expected.sum(), x)
            got = jax.grad(lambda x, o=options: jaxce.softmax_cross_entropy_with_integer_labels(x, Y, **o).sum())(X)
            close(got, by_x, rtol=1e-5, atol=1e-7)
            expected = functional.cross_entropy(x, t, theirs, reduction="none", label_smoothing=alpha)
            close(jaxce.softmax_cross_entropy(X, T, **options), expected.detach())
            by_x, by_t = torch.autograd.grad(expected.sum(), (x, t))
            got = jax.grad(lambda x, t, o=options: jaxce.softmax_cross_entropy(x, t, **o).sum(), (0, 1))(X, T)
            close(got[0], by_x, rtol=1e-5, atol=1e-7)
            close(got[1], by_t, rtol=1e-5)
    entropy = torch.distributions.Categorical(logits=x).entropy()
    close(jaxce.entropy_with_logits(X), entropy.detach())
    (by_x,) = torch.autograd.grad(entropy.sum(), x)
    close(jax.grad(lambda x: jaxce.entropy_with_logits(x).sum())(X), by_x, rtol=1e-4, atol=1e-6)
    ignore = functional.cross_entropy(x, torch.where(y == y[0], -100, y), reduction="none").detach()
    labels = jnp.where(jnp.asarray(Y) == Y[0], -100, Y)
    close(jaxce.softmax_cross_entropy_with_integer_labels(X, labels, where=labels != -100), ignore)


# --- Optax where it is right ---


@pytest.mark.parametrize("axis", [pytest.param(-1, marks=pytest.mark.slow), 0])
def test_optax(axis: int) -> None:
    labels = Y if axis == -1 else RNG.integers(6, size=7).astype("int32")
    pairs = [
        (jaxce.softmax_cross_entropy, optax.losses.softmax_cross_entropy, (X, T)),
        (jaxce.safe_softmax_cross_entropy, optax.losses.softmax_cross_entropy, (X, T)),
        (
            jaxce.softmax_cross_entropy_with_integer_labels,
            optax.losses.softmax_cross_entropy_with_integer_labels,
            (X, labels),
        ),
    ]

    def value_and_slope(loss: Any, x: Any, labels: Any) -> Any:
        value, pull = jax.vjp(lambda x: loss(x, labels, axis), x)
        return value, *pull(jnp.ones_like(value))

    for *losses, args in pairs:
        (value, slope), (their_value, their_slope) = (
            jax.jit(value_and_slope, static_argnums=0)(f, *args) for f in losses
        )
        close(value, their_value, rtol=1e-5)
        close(slope, their_slope, rtol=1e-4, atol=1e-6)
    got = jaxce.softmax_cross_entropy(X, T, axis, KEEP)
    with jax.numpy_rank_promotion("allow"):
        close(got, optax.losses.softmax_cross_entropy(X, T, axis, where=jnp.asarray(KEEP)), rtol=1e-5)


def test_optax_poly_and_smoothing() -> None:
    expected = optax.losses.poly_loss_cross_entropy(X, T, epsilon=1.5)
    close(jaxce.poly_loss_cross_entropy(X, T, epsilon=1.5), expected, 1e-5)
    close(jaxce.smooth_labels(T, 0.1), optax.losses.smooth_labels(jnp.asarray(T), 0.1))


# --- Optax where it is wrong: what it says today (0.2.8), and what is true ---


def differs(theirs: Any, truth: Any) -> None:
    """Says that Optax is wrong, and lets the test be skipped on the day that it isn't."""
    if np.allclose(np.asarray(theirs, np.float64), truth, rtol=1e-5, atol=0.0):
        pytest.skip("Optax is right by now")


integer = jaxce.softmax_cross_entropy_with_integer_labels
optax_integer = optax.losses.softmax_cross_entropy_with_integer_labels


def test_optax_takes_label_minus_one_for_the_last_class() -> None:
    x, y = jnp.asarray(X), jnp.full(6, -1, "int32")
    assert np.all(np.isnan(integer(x, y)))
    assert np.all(np.isnan(jax.grad(lambda x: integer(x, y).sum())(x)))
    close(optax_integer(x, y), optax_integer(x, jnp.full(6, 6)))  # Optax: finite, a class that nobody named


def test_optax_gives_a_finite_gradient_for_a_label_that_does_not_exist() -> None:
    x, y = jnp.asarray(X), jnp.full(6, 7, "int32")
    assert np.all(np.isnan(jax.grad(lambda x: integer(x, y).sum())(x)))
    differs(jax.grad(lambda x: optax_integer(x, y).sum())(x), np.full(X.shape, np.nan))


def test_optax_loss_of_a_masked_label_is_negative() -> None:
    x, y = jnp.array([[5.0, 1.0, 1.2]]), jnp.array([0])
    keep = jnp.array([[False, True, True]])
    assert integer(x, y, where=keep) == jnp.full(1, jnp.inf)
    theirs = optax_integer(x, y, where=keep)
    differs(theirs, np.inf)
    assert theirs[0] < 0


def test_optax_loses_confident_rows() -> None:
    x, y = jnp.array([[0.0, -46.0]]), jnp.array([0])
    truth = np.log1p(np.exp(-46.0))
    close(integer(x, y), truth, rtol=3e-7)
    differs(optax_integer(x, y), truth)
    assert jax.grad(lambda x: integer(x, y).sum())(x)[0, 0] < 0


def test_optax_dense_loss_is_nan_beside_an_absent_class() -> None:
    x, t = jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.array([[1.0, 0.0, 0.0]])
    for ours in (jaxce.softmax_cross_entropy, jaxce.safe_softmax_cross_entropy):
        close(ours(x, t), np.log(2))
        close(jax.grad(lambda x, f=ours: f(x, t).sum())(x), [[-0.5, 0.5, 0.0]])
        close(jax.jvp(lambda x, f=ours: f(x, t), (x,), (jnp.ones_like(x),))[1], [0.0], atol=1e-7)
    close(jaxce.poly_loss_cross_entropy(x, t), np.log(2) + 1)
    differs(optax.losses.softmax_cross_entropy(x, t), np.log(2))


def test_optax_safe_loss_is_nan_in_forward_mode() -> None:
    x, t = jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.array([[1.0, 0.0, 0.0]])
    tangent = jnp.array([[1.0, 0.0, 0.0]])
    close(jax.jvp(lambda x: jaxce.safe_softmax_cross_entropy(x, t), (x,), (tangent,))[1], [-0.5])
    differs(jax.jvp(lambda x: optax.losses.safe_softmax_cross_entropy(x, t), (x,), (tangent,))[1], -0.5)


def test_jax_log_softmax_of_a_row_with_nothing_left_is_nan() -> None:
    x, keep = jnp.asarray(X), jnp.zeros(X.shape, bool)
    for ours in (jaxce.entropy_with_logits, lambda x, where: integer(x, Y, where=where)):
        assert np.all(np.asarray(ours(x, where=keep)) == 0)
        assert np.all(np.asarray(jax.grad(lambda x, f=ours: f(x, where=keep).sum())(x)) == 0)
    assert np.all(np.asarray(jax.grad(lambda x: jaxce.log_softmax(x, where=keep).sum())(x)) == 0)
    differs(jax.grad(lambda x: jax.nn.log_softmax(x, where=keep).sum())(x), np.zeros(X.shape))


def test_optax_half_precision_is_returned_in_half_precision() -> None:
    x = jnp.asarray(X, "bfloat16")
    truth = helpers.plain_softmax_cross_entropy(np.asarray(x, np.float64), Y)
    assert integer(x, Y).dtype == "float32"
    close(integer(x, Y), truth)
    differs(optax_integer(x, Y).astype("float32"), truth)
