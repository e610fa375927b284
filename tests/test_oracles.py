"""The same numbers from people we did not ask: SciPy, scikit-learn, PyTorch, Optax."""

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
    options = [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"class_weights": weights, "label_smoothing": 0.3}]
    targets = (T,) if masked else (T, labels)

    @helpers.quick
    def ours(x: Any) -> Any:
        dense, integer = jaxce.softmax_cross_entropy, jaxce.softmax_cross_entropy_with_integer_labels
        cross_entropies = [[f(x, t, axis, where, **o) for o in options] for f, t in ((dense, T), (integer, labels))]
        entropy = jaxce.entropy_with_logits(x, axis, where)
        focal = [jaxce.softmax_focal_loss(x, t, axis, where) for t in targets]
        return (
            cross_entropies,
            entropy,
            focal,
            [jaxce.poly_loss_cross_entropy(x, t, axis=axis, where=where) for t in targets],
        )

    cross_entropies, entropy, focal, poly = ours(X)
    for t, found in zip((T, labels), cross_entropies, strict=True):
        for o, got in zip(options, found, strict=True):
            close(got, helpers.plain_softmax_cross_entropy(X, t, axis, where, **o))
    close(entropy, helpers.plain_entropy_with_logits(X, axis, where))
    for t, by_focal, by_poly in zip(targets, focal, poly, strict=True):
        close(by_focal, helpers.plain_softmax_focal_loss(X, t, axis, where), rtol=1e-5, atol=1e-12)
        close(by_poly, helpers.plain_poly_loss_cross_entropy(X, t, axis=axis, where=where), rtol=1e-5, atol=1e-12)


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

    found = helpers.quick(lambda: [[value_and_slope(f, *args) for f in losses] for *losses, args in pairs])()
    for (value, slope), (their_value, their_slope) in found:
        close(value, their_value, rtol=1e-5)
        close(slope, their_slope, rtol=1e-4, atol=1e-6)
    got = jaxce.softmax_cross_entropy(X, T, axis, KEEP)
    with jax.numpy_rank_promotion("allow"):
        close(got, helpers.quick(optax.losses.softmax_cross_entropy, static_argnums=2)(X, T, axis, KEEP), rtol=1e-5)


def test_optax_poly_and_smoothing() -> None:
    def both(losses: Any) -> Any:
        return helpers.quick(
            lambda: (losses.poly_loss_cross_entropy(X, T, epsilon=1.5), losses.smooth_labels(T, 0.1))
        )()

    (poly, smoothed), (their_poly, their_smoothed) = both(jaxce), both(optax.losses)
    close(poly, their_poly, 1e-5)
    close(smoothed, their_smoothed)


def test_confident_rows_and_half_precision_by_numpy() -> None:
    """Where Optax's loss is 0, and where it is rounded to bfloat16."""
    integer, x = jaxce.softmax_cross_entropy_with_integer_labels, jnp.array([[0.0, -46.0]])
    close(integer(x, np.array([0])), np.log1p(np.exp(-46.0)), rtol=3e-7)
    assert jax.grad(lambda x: integer(x, np.array([0])).sum())(x)[0, 0] < 0
    half = jnp.asarray(X, "bfloat16")
    got = integer(half, Y)
    assert got.dtype == "float32"
    close(got, helpers.plain_softmax_cross_entropy(np.asarray(half, np.float64), Y))
