"""The edges of the softmax losses: labels and masks that are wrong or extreme, infinities, axes, and memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

integer = jaxce.softmax_cross_entropy_with_integer_labels
dense = jaxce.softmax_cross_entropy
RNG = np.random.default_rng(1)
INF, NAN = np.inf, np.nan

OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"class_weights": np.ones(4, np.float32)},
]
LABELLED: dict[str, Callable[..., Any]] = {
    **{
        f"integer, {', '.join(o) or 'plain'}": (lambda x, y, where=None, o=o: integer(x, y, where=where, **o))
        for o in OPTIONS
    },
    "focal": lambda x, y, where=None: jaxce.softmax_focal_loss(x, y, where=where),
    "poly": lambda x, y, where=None: jaxce.poly_loss_cross_entropy(x, y, where=where),
    "statistics": lambda x, y, where=None: jaxce.softmax_statistics(x, y, where=where).nll,
}
T = np.array([[0.5, 0.25, 0.0, 0.25]] * 3, np.float32)
UNLABELLED: dict[str, Callable[..., Any]] = {
    **{
        f"dense, {', '.join(o) or 'plain'}": (lambda x, where=None, o=o: dense(x, T, where=where, **o)) for o in OPTIONS
    },
    "dense focal": lambda x, where=None: jaxce.softmax_focal_loss(x, T, where=where),
    "dense poly": lambda x, where=None: jaxce.poly_loss_cross_entropy(x, T, where=where),
    "entropy": lambda x, where=None: jaxce.entropy_with_logits(x, where=where),
    "cross-entropy": lambda x, where=None: jaxce.cross_entropy_with_logits(x, x[:, ::-1], where=where),
    "relative entropy": lambda x, where=None: jaxce.relative_entropy_with_logits(x, x[:, ::-1], where=where),
    "Jensen-Shannon": lambda x, where=None: jaxce.jensen_shannon_divergence_with_logits(x, x[:, ::-1], where=where),
    "logsumexp": lambda x, where=None: jaxce.logsumexp(x, where=where),
    "log_softmax": lambda x, where=None: jaxce.log_softmax(x, where=where),
    "statistics.entropy": lambda x, where=None: jaxce.softmax_statistics(x, where=where).entropy,
    "statistics.log_normalizer": lambda x, where=None: jaxce.softmax_statistics(x, where=where).log_normalizer,
}
EVERYTHING = {
    **{n: (lambda x, where=None, f=f: f(x, np.array([0, 1, 3]), where)) for n, f in LABELLED.items()},
    **UNLABELLED,
}


INTEGERS = "int8", "uint8", "int16", "uint16", "int32", "uint32"
QUICK = "integer, label_smoothing", "dense, plain", "entropy"


def some(values: Iterable[Any], *quick: Any) -> list[Any]:
    """All values of a parameter, of which those not named are for a slow run."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]


@functools.cache
def derivatives(function: Callable[..., Any]) -> Callable[..., Any]:
    """Value, gradient of the sum, and tangent along ones, compiled once for each of the functions above."""

    def compute(x: jax.Array, *args: Any) -> Any:
        value, pullback = jax.vjp(lambda x: function(x, *args), x)
        _, along = jax.jvp(lambda x: function(x, *args), (x,), (jnp.ones_like(x),))
        return value, pullback(jnp.ones_like(value))[0], along

    return helpers.quick(compute)


def value_and_grad(function: Callable[..., Any], x: Any, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    value, gradient, _ = derivatives(function)(jnp.asarray(x, "float32"), *args)
    return np.asarray(value), np.asarray(gradient)


def tangent(function: Callable[..., Any], x: Any, *args: Any) -> np.ndarray:
    return np.asarray(derivatives(function)(jnp.asarray(x, "float32"), *args)[2])


# --- labels ---


@pytest.mark.parametrize("name", some(LABELLED, *QUICK))
def test_a_label_that_is_no_class_gives_nan_in_its_row_only(name: str) -> None:
    x = RNG.normal(size=(6, 4))
    labels = np.array([0, -1, 4, 3, -100, 2**31 - 1], np.int32)
    bad = (labels < 0) | (labels >= 4)
    value, gradient = value_and_grad(LABELLED[name], x, labels)
    assert np.array_equal(np.isnan(value), bad)
    assert np.array_equal(np.isnan(gradient), np.broadcast_to(bad[:, None], gradient.shape))
    assert np.array_equal(np.isnan(tangent(LABELLED[name], x, labels)), bad)
    value, gradient = value_and_grad(LABELLED[name], x, labels, ~bad)
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(gradient))
    assert np.all(value[bad] == 0) and np.all(gradient[bad] == 0)


@pytest.mark.parametrize("name", some(LABELLED, *QUICK))
@pytest.mark.parametrize("how", ["where", "-inf"])
def test_a_label_on_a_class_that_is_not_there_has_infinite_loss(name: str, how: str) -> None:
    x = RNG.normal(size=(3, 4))
    keep = np.ones((3, 4), bool)
    keep[1, 2] = False
    args: tuple[Any, ...] = (np.array([0, 2, 3]),)
    if how == "where":
        args += (keep,)
    else:
        x = np.where(keep, x, -INF)
    value, gradient = value_and_grad(LABELLED[name], x, *args)
    assert value[1] == INF
    assert np.all(np.isfinite(value[[0, 2]])) and np.all(np.isfinite(gradient[[0, 2]]))
    assert not np.any(np.isnan(value))


def linear(x: jax.Array) -> jaxce.LinearLogits:
    return jaxce.LinearLogits(x, jnp.eye(4, dtype=x.dtype))


def each(function: Callable[..., Any]) -> Callable[..., Any]:
    """What takes a batch, of each row by itself."""
    return lambda x, y: jnp.stack([function(x[i : i + 1], y[i : i + 1]) for i in range(len(y))])


OF_LABELS: dict[str, Callable[..., Any]] = {
    **{n: LABELLED[n] for n in ("integer, plain", "integer, label_smoothing", "focal", "poly", "statistics")},
    "linear": lambda x, y: integer(linear(x), y),
    "nll": lambda x, y: jaxce.nll(jax.nn.log_softmax(x), y),
    "categorical": lambda x, y: jaxce.categorical_cross_entropy_with_integer_labels(jax.nn.softmax(x), y),
    "sparse": lambda x, y: jaxce.softmax_cross_entropy_with_sparse_labels(
        x, y[:, None], np.ones((len(y), 1), "float32")
    ),
    "binary, sparse": lambda x, y: jaxce.sigmoid_binary_cross_entropy_with_sparse_labels(x, y[:, None]),
    "binary mean": each(lambda x, y: jaxce.linear_sigmoid_binary_cross_entropy(linear(x), y[:, None])),
    "mean": each(lambda x, y: jaxce.linear_cross_entropy(linear(x), y)),
    "smoothed mean": each(lambda x, y: jaxce.linear_cross_entropy(linear(x), y, label_smoothing=0.1)),
    "pairs": lambda x, y: jaxce.softmax_cross_entropy_of_pairs(x, y)[0],
    "accuracy": each(lambda x, y: jaxce.metrics.Accuracy.from_batch(x, y).compute()),
    "evaluation": each(lambda x, y: jaxce.metrics.Evaluation.from_batch(x, y).compute().nll),
}


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=() if d == "uint8" else pytest.mark.slow) for d in INTEGERS])
def test_no_dtype_makes_a_class_of_a_label_that_is_none(dtype: str) -> None:
    """Also the mask of a picture, whose unlabelled places are 255."""
    labels = np.array([3, 4, np.iinfo(dtype).max], dtype)
    bad = labels > 3
    x = jnp.asarray(RNG.normal(size=(3, 4)), "float32")

    @helpers.quick
    def found(x: jax.Array) -> Any:
        return {n: (f(x, labels), jax.grad(lambda x, f=f: f(x, labels).sum())(x)) for n, f in OF_LABELS.items()}

    for name, (value, slope) in found(x).items():
        np.testing.assert_array_equal(np.isnan(value), bad, err_msg=name)
        if name != "accuracy":
            np.testing.assert_array_equal(np.isnan(slope), np.broadcast_to(bad[:, None], slope.shape), err_msg=name)


@pytest.mark.slow
def test_unsigned_and_small_labels() -> None:
    """Comparisons and offsets must not wrap: 200 classes and int8, 300 and uint8."""
    for classes, dtype, label in [(200, "int8", 127), (200, "int8", -1), (300, "uint8", 255), (130, "int8", 5)]:
        x = RNG.normal(size=(1, classes)).astype("float32")
        value, gradient = value_and_grad(integer, x, np.array([label], dtype))
        if label < 0:
            assert np.isnan(value).all() and np.isnan(gradient).all()
        else:
            np.testing.assert_allclose(value, helpers.plain_softmax_cross_entropy(x, np.array([label])), rtol=1e-6)
            assert gradient[0, label] < 0


# --- masks ---


@pytest.mark.parametrize("name", some(EVERYTHING, *QUICK))
@pytest.mark.parametrize("mask", ["rows", "entries"])
def test_rows_with_nothing_left_are_zero_whatever_they_hold(name: str, mask: str) -> None:
    x = RNG.normal(size=(3, 4))
    counts = np.array([True, False, True])
    where = counts if mask == "rows" else np.repeat(counts[:, None], 4, axis=1)
    expected, expected_gradient = value_and_grad(EVERYTHING[name], x)
    for spoiler in (0.0, NAN, INF, -INF):
        spoilt = np.where(counts[:, None], x, spoiler)
        value, gradient = value_and_grad(EVERYTHING[name], spoilt, where)
        if name in ("logsumexp", "statistics.log_normalizer", "log_softmax"):
            assert np.all(value[1] == -INF)
        else:
            assert np.all(value[1] == 0), spoiler
        assert np.all(gradient[1] == 0), spoiler
        np.testing.assert_allclose(value[[0, 2]], expected[[0, 2]], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(gradient[[0, 2]], expected_gradient[[0, 2]], rtol=1e-5, atol=1e-6)
        assert np.all(np.isfinite(np.delete(tangent(EVERYTHING[name], spoilt, where), 1, axis=0)))
        assert np.all(tangent(EVERYTHING[name], spoilt, where)[1] == 0), spoiler


@pytest.mark.slow
def test_a_masked_row_may_hold_soft_labels_of_any_kind() -> None:
    x, counts = RNG.normal(size=(3, 4)), np.array([True, False, True])
    labels = np.where(counts[:, None], T, np.float32(NAN))
    for loss in (dense, jaxce.softmax_focal_loss):
        value, gradient = value_and_grad(lambda x, f=loss: f(x, labels, where=counts), x)
        assert value[1] == 0 and np.all(gradient[1] == 0) and np.all(np.isfinite(value))
        by_labels = jax.grad(lambda t, f=loss: f(jnp.asarray(x, "float32"), t, where=counts).sum())(labels)
        assert np.all(by_labels[1] == 0) and np.all(np.isfinite(by_labels))


@pytest.mark.parametrize("shape", some([(1, 4), (3, 1), (3, 4), (1, 1)], (1, 4)))
def test_a_mask_with_the_axes_of_the_logits_broadcasts_to_them(shape: tuple[int, ...]) -> None:
    x = RNG.normal(size=(3, 4)).astype("float32")
    mask = np.arange(np.prod(shape, dtype=int)).reshape(shape) != 1
    got = jaxce.entropy_with_logits(x, where=mask)
    np.testing.assert_allclose(got, helpers.plain_entropy_with_logits(x, where=mask), rtol=1e-6)
    assert jnp.array_equal(got, jaxce.entropy_with_logits(x, where=mask.astype("int32") * 3))


def test_a_mask_with_the_axes_of_the_batch_masks_rows() -> None:
    """Also of [K, K] logits, where classes might have been meant; and what broadcasts to neither says how to mask
    classes."""
    x, mask = RNG.normal(size=(4, 4)).astype("float32"), np.array([True, True, False, True])
    assert np.asarray(jaxce.entropy_with_logits(x, where=mask))[2] == 0
    got = np.asarray(jaxce.entropy_with_logits(x, where=mask[None]))
    np.testing.assert_allclose(got, helpers.plain_entropy_with_logits(x[:, mask]), rtol=1e-6)
    with pytest.raises(ValueError, match=r"where\[None\]"):
        jaxce.entropy_with_logits(x[:3], where=mask)
    for shape in ((), (1,), (1, 4, 4), (2, 4)):
        with pytest.raises(ValueError, match="where must have the batch shape"):
            jaxce.entropy_with_logits(x, where=np.ones(shape, bool))


# --- infinities and NaN ---


@pytest.mark.slow
def test_absent_classes_have_no_gradient() -> None:
    """A class with logit -inf is a class that isn't there: the others' values and gradients are those without it."""
    x = np.array([[0.3, -INF, 2.0, -1.0]] * 3)
    for name, function in EVERYTHING.items():
        if name in ("cross-entropy", "relative entropy", "log_softmax"):  # infinite, or with an infinite entry
            continue
        if name.startswith("dense") or "smoothing" in name:  # with a label there
            continue
        args = (np.array([0, 2, 3]),) if name in LABELLED else ()
        value, gradient = value_and_grad(LABELLED.get(name, function), x, *args)
        assert np.all(np.isfinite(value)), name
        assert np.all(np.isfinite(gradient)) and np.all(gradient[:, 1] == 0), name
    without = np.array([[0.5, 0.0, 0.25, 0.25]] * 3, np.float32)
    for loss in (dense, jaxce.softmax_focal_loss, jaxce.poly_loss_cross_entropy):
        value, gradient = value_and_grad(lambda x, f=loss: f(x, without), x)
        assert np.all(np.isfinite(value)) and np.all(np.isfinite(gradient)) and np.all(gradient[:, 1] == 0)
        by_labels = jax.grad(lambda t, f=loss: f(jnp.asarray(x, "float32"), t).sum())(without)
        assert not np.any(np.isnan(by_labels))
    equal = np.zeros((3, 4))
    equal[:, 1:3] = -INF
    got = jaxce.cross_entropy_with_logits(equal.astype("float32"), equal.astype("float32"))
    np.testing.assert_allclose(got, np.log(2), rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_log_softmax_at_an_absent_class_is_minus_the_loss_with_that_label(masked: bool) -> None:
    """In value and derivative: [j = k] - p_j by the logit j, but 0 by one that is masked."""
    x, keep = jnp.array([1.0, 5.0 if masked else -jnp.inf, 0.0, 2.0]), jnp.array([True, not masked, True, True])

    def loss(x: jax.Array) -> jax.Array:
        return jaxce.softmax_cross_entropy_with_integer_labels(x, jnp.array(1), where=keep)

    def minus_log_p(x: jax.Array) -> jax.Array:
        return -jaxce.log_softmax(x, where=keep)[1]

    (value, slope), (expected, other) = (jax.value_and_grad(f)(x) for f in (minus_log_p, loss))
    assert value == expected == jnp.inf
    p = jax.nn.softmax(jnp.where(jnp.arange(4) == 1, -jnp.inf, x))
    np.testing.assert_allclose(slope, np.asarray(p) - (not masked) * (np.arange(4) == 1), rtol=1e-6)
    np.testing.assert_allclose(other, slope, rtol=1e-6)


@pytest.mark.slow
def test_second_derivatives_beside_an_absent_class_are_those_without_it() -> None:
    x = jnp.array([0.3, -jnp.inf, 2.0, -1.0])
    keep = np.array([0, 2, 3])
    t = jnp.array([0.5, 0.0, 0.25, 0.25])
    for full, less in [
        (lambda x: integer(x, 2), lambda x: integer(x, 1)),
        (lambda x: dense(x, t), lambda x: dense(x, t[keep])),
        (jaxce.entropy_with_logits, jaxce.entropy_with_logits),
        (jaxce.logsumexp, jaxce.logsumexp),
    ]:
        hessian = np.asarray(jax.hessian(full)(x))
        np.testing.assert_allclose(hessian[np.ix_(keep, keep)], jax.hessian(less)(x[keep]), rtol=1e-5, atol=1e-6)
        assert np.all(hessian[1] == 0) and np.all(hessian[:, 1] == 0)


def test_an_infinite_logit_is_certain() -> None:
    x = np.array([[0.0, INF, 3.0], [0.0, INF, 3.0]])
    value, gradient = value_and_grad(integer, x, np.array([1, 2]))
    assert value[0] == 0 and value[1] == INF
    np.testing.assert_array_equal(gradient, [[0, 0, 0], [0, 1, -1]])
    value, _ = value_and_grad(dense, x, np.array([[0, 1, 0], [0, 0.5, 0.5]], np.float32))
    assert value[0] == 0 and value[1] == INF
    assert np.array_equal(jaxce.logsumexp(jnp.asarray(x)), [INF, INF])
    value, gradient = value_and_grad(jaxce.entropy_with_logits, x)
    assert np.all(value == 0) and np.all(gradient == 0)
    np.testing.assert_array_equal(jaxce.log_softmax(jnp.asarray(x))[0], [-INF, 0, -INF])


@pytest.mark.parametrize("classes", some([3, 11, 97, 1000, 3 * 2**14, 2**15 + 3], 11))  # each way to read a row
def test_two_infinite_logits_are_a_tie(classes: int) -> None:
    """Each counts as the largest finite number; and rows beside an infinite logit are none the worse for it."""
    x = np.zeros((3, classes), np.float32)
    x[0, [0, -1]] = INF
    x[1, 1] = INF
    labels = np.array([0, 1, 2])
    expected = np.array([np.log(2), 0, np.log(classes)], np.float32)
    for function in (integer, jax.vmap(integer)):
        np.testing.assert_allclose(function(x, labels), expected, rtol=3e-7)  # 2 ulp
    assert np.all(np.asarray(integer(x, np.array([1, 0, 2])))[:2] == INF)
    soft = np.asarray(jax.nn.one_hot(labels, classes))
    np.testing.assert_allclose(dense(x, soft), expected, rtol=3e-7)
    np.testing.assert_allclose(jaxce.entropy_with_logits(x), expected, rtol=3e-7)
    np.testing.assert_array_equal(jaxce.softmax_statistics(x).prediction, [0, 1, 0])


@pytest.mark.parametrize("classes", [3, 40])
def test_the_prediction_of_a_row_with_a_nan_is_class_0(classes: int) -> None:
    """Wherever it is, and whatever else is in the row; and so is that of a row without any class."""
    x = np.tile(np.linspace(-1, 1, classes, dtype=np.float32), (4, 1))
    x[0, 0] = x[1, classes // 2] = x[2, -1] = NAN
    x[1, -1] = INF
    x[3] = -INF
    np.testing.assert_array_equal(jaxce.softmax_statistics(x).prediction, 0)


@pytest.mark.parametrize("name", some(EVERYTHING, *QUICK))
def test_nan_spreads_in_rows_that_count_and_no_further(name: str) -> None:
    x = RNG.normal(size=(3, 4))
    spoilt = x.copy()
    spoilt[1, 2] = NAN
    value, gradient = value_and_grad(EVERYTHING[name], spoilt)
    expected, expected_gradient = value_and_grad(EVERYTHING[name], x)
    assert np.all(np.isnan(value[1]))
    np.testing.assert_allclose(value[[0, 2]], expected[[0, 2]], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(gradient[[0, 2]], expected_gradient[[0, 2]], rtol=1e-5, atol=1e-6)
    assert np.all(np.isnan(gradient[1]))
    keep = ~np.isnan(spoilt)
    if name in ("cross-entropy", "relative entropy", "Jensen-Shannon"):  # whose second argument is the first reversed
        keep &= keep[:, ::-1]
    value, gradient = value_and_grad(EVERYTHING[name], spoilt, keep)
    if name != "log_softmax":  # which is -inf there
        assert np.all(np.isfinite(value))
        assert np.all(np.isfinite(gradient))
    assert not np.any(np.isnan(value))


def test_everything_absent_without_a_mask() -> None:
    """A row of -inf has no class that could be the label: nothing is left of it, as if it were masked."""
    x = np.full((3, 4), -INF)
    for name in ("entropy", "statistics.entropy"):
        value, gradient = value_and_grad(EVERYTHING[name], x)
        assert np.all(value == 0) and np.all(gradient == 0), name
    assert np.all(np.asarray(jaxce.logsumexp(jnp.asarray(x, "float32"))) == -INF)
    _, gradient = value_and_grad(jaxce.logsumexp, x)
    assert not np.any(np.isnan(gradient))


# --- shapes ---


@pytest.mark.parametrize(
    "axis", some([0, 1, 2, -1, -3, (0, 1), (1, 0), (2, 0), (-1, -2), (0, 1, 2), (2, 0, 1)], (2, 0))
)
def test_classes_on_any_axes_in_any_order(axis: Any) -> None:
    x = RNG.normal(size=(2, 3, 4)).astype("float32")
    t = np.exp(RNG.normal(size=x.shape)).astype("float32")
    axes = tuple(a % 3 for a in (axis if isinstance(axis, tuple) else (axis,)))
    batch = tuple(n for a, n in enumerate(x.shape) if a not in axes)
    classes = x.size // int(np.prod(batch, initial=1))
    labels = RNG.integers(classes, size=batch).astype("int32")
    keep = RNG.uniform(size=x.shape) < 0.7
    keep.reshape(-1)[0] = True
    weights = RNG.exponential(size=classes).astype("float32")
    plain = helpers.plain_softmax_cross_entropy
    for where in (None, keep, RNG.uniform(size=batch) < 0.5):
        got = integer(x, labels, axis, where, class_weights=weights)
        np.testing.assert_allclose(got, plain(x, labels, axis, where, class_weights=weights), rtol=2e-6)
        got = dense(x, t, axis, where, class_weights=weights, label_smoothing=0.1)
        expected = plain(x, t, axis, where, class_weights=weights, label_smoothing=0.1)
        np.testing.assert_allclose(got, expected, rtol=2e-6)
        got = jaxce.entropy_with_logits(x, axis, where)
        np.testing.assert_allclose(got, helpers.plain_entropy_with_logits(x, axis, where), rtol=2e-6, atol=1e-7)
    log_p = jaxce.log_softmax(x, axis)
    assert log_p.shape == x.shape
    np.testing.assert_allclose(jnp.exp(log_p).sum(axis), np.ones(batch), rtol=1e-5)
    gradient = jax.grad(lambda x: integer(x, labels, axis).sum())(x)
    one_hot = jnp.exp(log_p) - gradient  # p - (p - onehot)
    flat = np.asarray(one_hot).transpose(*(a for a in range(3) if a not in axes), *axes).reshape(*batch, classes)
    np.testing.assert_allclose(flat, np.eye(classes)[labels], atol=1e-6)


@pytest.mark.parametrize("shape", some([(0, 4), (0, 64), (0, 2**17), (3, 0, 4), (1,), (1, 1), (2, 1)], (0, 64), (1, 1)))
def test_nothing_and_one(shape: tuple[int, ...]) -> None:
    """An empty batch gives an empty answer; a single class is certain."""
    x, labels = jnp.ones(shape), jnp.zeros(shape[:-1], "int32")
    for value in (integer(x, labels), dense(x, jnp.ones(shape)), jaxce.entropy_with_logits(x)):
        assert value.shape == shape[:-1]
        assert shape[-1] != 1 or np.all(np.asarray(value) == 0)
    gradient = jax.grad(lambda x: integer(x, labels).sum())(x)
    assert gradient.shape == shape and np.all(np.asarray(gradient) == 0)


def test_no_classes_at_all() -> None:
    """Zero classes are a mistake, and said to be one."""
    with pytest.raises(ValueError, match="entropy_with_logits: logits must"):
        jaxce.entropy_with_logits(jnp.zeros((3, 0)))
    with pytest.raises(ValueError, match="softmax_cross_entropy: logits must"):
        dense(jnp.zeros((3, 0)), jnp.zeros((3, 0)))
    with pytest.raises(ValueError, match="relative_entropy_with_logits: p_logits must have at least one class"):
        jaxce.relative_entropy_with_logits(jnp.zeros((2, 0)), jnp.zeros((2, 0)))


def test_statistics() -> None:
    x, labels = RNG.normal(size=(3, 4, 5)).astype("float32"), RNG.integers(4, size=(3, 5)).astype("int32")
    got = jaxce.softmax_statistics(x, labels, axis=1)
    assert isinstance(got, jaxce.SoftmaxStatistics)
    np.testing.assert_array_equal(got.prediction, x.argmax(1))
    assert jnp.issubdtype(got.prediction.dtype, jnp.integer)
    np.testing.assert_allclose(got.nll, integer(x, labels, 1), rtol=1e-6)
    np.testing.assert_allclose(got.entropy, jaxce.entropy_with_logits(x, 1), rtol=1e-6)
    np.testing.assert_allclose(got.log_normalizer, jaxce.logsumexp(x, 1), rtol=1e-6)
    assert jaxce.softmax_statistics(x).nll is None
    ties = jnp.array([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(jaxce.softmax_statistics(ties).prediction, [1, 0])
    masked = jaxce.softmax_statistics(ties, where=jnp.array([[True, False, True, True], [False, False, True, True]]))
    np.testing.assert_array_equal(masked.prediction, [2, 2])


# --- label smoothing ---


@pytest.mark.slow
@pytest.mark.parametrize("classes", [3, 37, 40])
def test_smoothing_of_integer_labels_is_that_of_their_one_hot_rows(classes: int) -> None:
    """Absent, infinite, huge and least logits; 3, a prime and a number that divides into blocks are read in three ways."""
    rng = np.random.default_rng(classes)
    x = 3 * rng.normal(size=(6, classes)).astype("float32")
    largest = float(np.finfo("float32").max)
    x[0, 0] = -np.inf
    x[1] = -np.inf
    x[2, 1] = np.inf
    x[3] = np.clip(x[3] * 1e37, -largest / 2, largest / 2)
    x[4, 0] = -largest
    y = rng.integers(1, classes, size=6)
    uniform = np.isfinite(x) | (x > 0)
    uniform = uniform / np.maximum(uniform.sum(-1, keepdims=True), 1)
    targets = jnp.asarray(0.9 * np.eye(classes)[y] + 0.1 * uniform, "float32")

    def both(loss: Callable[..., jax.Array]) -> tuple[jax.Array, jax.Array]:
        losses = loss(jnp.asarray(x))
        gradient = jax.grad(lambda x: jnp.where(jnp.isfinite(losses), loss(x), 0).sum())(jnp.asarray(x))
        return losses, gradient

    got, got_gradient = both(lambda x: integer(x, jnp.asarray(y), label_smoothing=0.1))
    expected, expected_gradient = both(lambda x: jaxce.softmax_cross_entropy(x, targets))
    assert got[1] == 0 and got[2] == np.inf and jnp.isfinite(got[3]) and got[4] > largest / 1000
    # float32: sums of up to 40 terms in another order; the targets above are rounded too
    np.testing.assert_allclose(got, expected, rtol=2e-6)
    np.testing.assert_allclose(got_gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    assert not jnp.any(got_gradient[1]), "a row without classes has gradient 0"


# --- memory ---


@pytest.mark.parametrize("dtype", some(["float32", "bfloat16"], "bfloat16"))
@pytest.mark.parametrize("form", some(["integer", "integer, masked", "integer, smoothed"], "integer, smoothed"))
def test_value_and_gradient_need_little_beyond_the_gradient(dtype: str, form: str) -> None:
    """No [N, K] temporary: the compiled program's own account says so, without a device to measure on."""
    n, k = 512, 8192
    options = {"label_smoothing": 0.1} if "smoothed" in form else {}

    def mean(x: jax.Array, labels: jax.Array, where: jax.Array) -> jax.Array:
        return integer(x, labels, where=where if "masked" in form else None, **options).mean()

    x = jax.ShapeDtypeStruct((n, k), dtype)
    labels, where = jax.ShapeDtypeStruct((n,), "int32"), jax.ShapeDtypeStruct((n,), bool)
    memory = jax.jit(jax.value_and_grad(mean)).lower(x, labels, where).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * k * 4 / 4
