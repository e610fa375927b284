"""Labels as people have them: booleans and integers, one target for all rows, several classes a row, classes that weigh."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick

import jaxce

N, K = 5, 7
RNG = np.random.default_rng(3)
X = jnp.asarray(4 * RNG.normal(size=(N, K)), "float32")
LABELS = np.array([0, 6, 3, 3, 1])
ONE_HOT = np.eye(K)[LABELS]
WEIGHTS = np.array([1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 0.25], np.float32)
LOSSES = {
    "cross-entropy": jaxce.softmax_cross_entropy,
    "focal": jaxce.softmax_focal_loss,
    "poly": jaxce.poly_loss_cross_entropy,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
sparse = jaxce.softmax_cross_entropy_with_sparse_labels


@every_loss
def test_one_hot_labels_of_any_dtype(loss: Any) -> None:
    labels = [ONE_HOT.astype(dtype) for dtype in ("float32", "bool", "int8", "int32", "uint32")]
    right, *others = quick(lambda labels: [loss(X, t) for t in labels])(labels)
    for got in others:
        chex.assert_trees_all_equal(got, right)


def test_one_hot_labels_widen_nothing() -> None:
    """Integers of 64 bits count; they don't ask for 64 bits."""
    with jax.enable_x64(True):
        for dtype in ("float32", "float64", "bfloat16"):
            got = jaxce.softmax_cross_entropy(X.astype(dtype), jnp.asarray(ONE_HOT, "int64"))
            assert got.dtype == ("float64" if dtype == "float64" else "float32")


@pytest.mark.parametrize("loss", [LOSSES["cross-entropy"], LOSSES["focal"]])
@pytest.mark.parametrize(
    ("shape", "linear"),
    [
        ((N, 1), False),
        ((K,), True),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in (((), False), ((K,), False), ((1, 1), True))),
    ],
)
def test_dense_labels_broadcast_to_the_logits(loss: Any, shape: tuple[int, ...], linear: bool) -> None:
    """As if they had been broadcast before; the derivative by the labels is the sum."""
    labels = jnp.asarray(np.random.default_rng(0).uniform(size=shape), "float32")
    x = jaxce.LinearLogits(X, np.eye(K, dtype=np.float32), block_size=3) if linear else X

    def total(labels: jax.Array, broadcast: bool) -> jax.Array:
        return loss(x, jnp.broadcast_to(labels, X.shape) if broadcast else labels).sum()

    both = quick(jax.value_and_grad(total), static_argnums=1)
    got, expected = (both(labels, broadcast) for broadcast in (False, True))
    chex.assert_trees_all_close(got, expected, rtol=1e-6)  # sums of 35 numbers in another order


@every_loss
def test_logits_never_broadcast_to_labels(loss: Any) -> None:
    for shape in [(2, N, K), (N, K + 1), (N, 2 * K)]:
        with pytest.raises(ValueError, match=r"labels must have the shape of the logits, \(5, 7\), or broadcast to it"):
            loss(X, jnp.ones(shape))


def test_one_target_for_all_rows_is_not_copied_for_each() -> None:
    """With logits that aren't in memory, nothing of their size is."""
    n, d, v = 4096, 8, 8192
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, d), (d, v), (v,))]

    def loss(hidden: Any, kernel: Any, labels: Any) -> Any:
        return jaxce.softmax_cross_entropy(jaxce.LinearLogits(hidden, kernel, block_size=512), labels).sum()

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * v * 4 / 4


def dense_of(labels: Any, weights: Any) -> jax.Array:
    """Sparse labels as a scatter into dense ones, which leaves out what is no class."""
    return jnp.zeros((N, K), weights.dtype).at[jnp.arange(N)[:, None], jnp.where(labels < 0, K, labels)].add(weights)


SPARSE = np.array([[0, 1, 1], [6, -1, 3], [4, 99, 2], [3, 3, 3], [5, 0, 1]])
SHARES = np.array([[0.5, 0.25, 0.5], [1, 0, 0.5], [0.25, 0, 2], [1, 0.125, 0], [0.2, 0.3, 0.1]], np.float32)
MODIFIERS = {"plain": {}, "modified": {"label_smoothing": 0.2, "class_weights": WEIGHTS, "z_loss": 0.1}}


@pytest.mark.parametrize(("name", "scale"), [("plain", 30.0), ("modified", 1.0)])
def test_sparse_labels_are_dense_ones(name: str, scale: float) -> None:
    """In value, both gradients, and a Hessian-vector product."""
    x, options = X * scale, MODIFIERS[name]

    def of_sparse(x: Any, w: Any) -> Any:
        return sparse(x, SPARSE, w, **options)

    def of_dense(x: Any, w: Any) -> Any:
        return jaxce.softmax_cross_entropy(x, dense_of(SPARSE, w), **options)

    def orders(loss: Any, *args: Any) -> Any:
        both = jax.value_and_grad(lambda *args: (loss(*args) ** 2).sum(), (0, 1))
        return jax.jvp(both, args, (jnp.cos(args[0]), jnp.ones_like(args[1])))

    got, expected = (jax.jit(orders, static_argnums=0)(loss, x, SHARES) for loss in (of_sparse, of_dense))
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)  # sums in another order, then squared


def test_one_sparse_label_is_an_integer_label() -> None:
    got = sparse(X, LABELS[:, None], jnp.ones((N, 1)))
    chex.assert_trees_all_close(got, jaxce.softmax_cross_entropy_with_integer_labels(X, LABELS), rtol=3e-7)  # two ulp
    confident = jnp.array([[0.0, 60.0, 1.0]])
    tiny = np.log1p(np.exp(-60.0) + np.exp(-59.0))  # no digit of which is lost
    assert sparse(confident, np.array([[1]]), np.array([[1]])) == pytest.approx(tiny, rel=1e-6)


def test_sparse_labels_mean_what_integer_labels_mean() -> None:
    """No class: NaN, unless it weighs nothing or its row is masked. A masked class: infinite. A masked row: 0."""
    w = np.ones((N, 2), np.float32)
    bad = np.array([[0, K], [0, 1], [-1, 2], [0, 1], [0, 1]])
    rows = np.array([True, True, True, False, True])
    loss, gradient = jax.value_and_grad(lambda x: sparse(x, bad, w, where=rows).sum())(X)
    assert np.isnan(sparse(X, bad, w)).tolist() == [True, False, True, False, False]
    assert np.isnan(loss) and np.isnan(gradient).all(1).tolist() == [True, False, True, False, False]
    assert not gradient[3].any() and sparse(X, bad, w, where=rows)[3] == 0
    keep = np.arange(K) != 1
    assert np.isinf(sparse(X, bad % K, w, where=keep[None])).tolist() == [False, True, False, True, True]
    assert np.isfinite(sparse(X, bad % K, w * [1, 0], where=keep[None])).all()
    assert not sparse(X, np.zeros((N, 0), int), np.zeros((N, 0))).any()  # nothing to say is no loss
    nothing = sparse(X[0], np.array([1, 2]), np.array([0.5, 0.5]))
    assert nothing.shape == ()


def test_sparse_labels_of_parts_of_the_classes() -> None:
    """As classes of all devices: an axis of vmap does for one of a mesh."""
    x = jnp.concatenate([X, jnp.full((N, 1), -jnp.inf)], -1)

    def part(x: Any) -> Any:
        return sparse(jaxce.ShardedLogits(x, "parts"), SPARSE, SHARES)

    parts = jnp.moveaxis(x.reshape(N, 4, 2), 1, 0)
    got, gradient = jax.value_and_grad(lambda p: jax.vmap(part, out_axes=None, axis_name="parts")(p).sum())(parts)
    expected, by_x = jax.value_and_grad(lambda x: sparse(x, SPARSE, SHARES).sum())(x)
    chex.assert_trees_all_close((got, jnp.moveaxis(gradient, 0, 1).reshape(x.shape)), (expected, by_x), rtol=1e-6)


@pytest.mark.parametrize("name", ["focal", "poly"])
def test_class_weights_of_the_other_losses(name: str) -> None:
    """The paper's alpha: for classes and one-hot labels the weight of the class; for soft labels it is a factor of each."""
    loss = LOSSES[name]
    plain = loss(X, LABELS)
    for labels in (LABELS, ONE_HOT):
        got = loss(X, labels, class_weights=WEIGHTS)
        chex.assert_trees_all_close(got, WEIGHTS[LABELS] * plain, rtol=1e-6)  # a product of the same, rounded twice
    soft = RNG.dirichlet(np.ones(K), N).astype("float32")
    chex.assert_trees_all_close(loss(X, soft, class_weights=WEIGHTS), loss(X, soft * WEIGHTS), rtol=1e-6)
    masked = loss(jnp.where(jnp.arange(K) == 0, -jnp.inf, X), np.zeros(N, int), class_weights=1 - np.eye(K)[0])
    assert not masked.any()  # a class of weight 0 costs nothing, also where it isn't there


def test_weights_as_integers() -> None:
    integers = np.arange(K)
    for loss in (jaxce.softmax_cross_entropy_with_integer_labels, jaxce.softmax_focal_loss):
        got, expected = (loss(X, LABELS, class_weights=integers.astype(t)) for t in ("int32", "float32"))
        chex.assert_trees_all_equal(got, expected)


def test_a_masked_label_does_not_reach_the_derivative_by_alpha() -> None:
    where = jnp.array([True, True, False])
    for bad in (jnp.nan, jnp.inf):
        assert jax.grad(lambda a, t: jaxce.smooth_labels(t, a, where=where).sum())(0.1, jnp.array([1.0, 0.0, bad])) == 0


def test_dtypes_of_results_of_wider_numbers() -> None:
    """Weights of labels may widen a loss of logits, as dense labels may; what a mean is divided by doesn't."""
    x, y, wide = jnp.ones((3, 5)), jnp.array([[0], [2], [4]]), np.ones((3, 1))
    with jax.enable_x64(True):
        for loss in (
            jaxce.softmax_cross_entropy_with_sparse_labels,
            jaxce.sigmoid_binary_cross_entropy_with_sparse_labels,
        ):
            assert loss(x, y, wide).dtype == np.float64
        z, three = jaxce.LinearLogits(x, jnp.ones((5, 5), "float32")), np.float64(3)
        assert jaxce.linear_cross_entropy(z, y[:, 0], normalizer=three).dtype == np.float32
        assert jaxce.linear_sigmoid_binary_cross_entropy(z, y, normalizer=three).dtype == np.float32
