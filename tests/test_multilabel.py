"""Binary cross-entropy with lists of positive classes: the sum over dense targets, to the last digit, for all logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from helpers import quick, ulp_error

import jaxce

N, D, V = 3, 4, 11
loss = jaxce.sigmoid_binary_cross_entropy_with_sparse_labels
LABELS = np.array([[0, 5, 5], [10, -1, 3], [4, -1, -1]], np.int32)  # one twice, some rows with fewer
MASKS = {
    "none": None,
    "rows": np.array([True, False, True]),
    "classes": np.arange(V)[None] != 5,  # which is listed
    "entries": np.random.default_rng(3).uniform(size=(N, V)) < 0.6,
    "groups": {"groups": np.array([1, 0, 1]), "class_groups": np.arange(V) % 2, "class_where": np.arange(V) != 5},
}


def arguments() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    sizes = {"hidden": (N, D), "kernel": (D, V), "bias": V, "shares": (N, 3), "weight": V}
    made = {name: rng.uniform(0.2, 1, size) * rng.choice([-2, 2], size) for name, size in sizes.items()}
    made |= {name: abs(made[name]) / 4 for name in ("shares", "weight")}
    return {n: jnp.asarray(v) for n, v in (made | {"temperature": np.array(1.5), "soft_cap": np.array(3.0)}).items()}


def linear(a: dict[str, Any]) -> jaxce.LinearLogits:
    options = {n: a[n] for n in ("bias", "temperature", "soft_cap")}
    return jaxce.LinearLogits(a["hidden"], a["kernel"], block_size=4, **options)


def targets(a: dict[str, Any], weighted: bool) -> jax.Array:
    shares = a["shares"] if weighted else jnp.ones((N, 3))
    summed = jnp.zeros((N, V)).at[jnp.arange(N)[:, None], jnp.where(LABELS < 0, V, LABELS)].add(shares, mode="drop")
    return summed if weighted else jnp.minimum(summed, 1)


def masked(name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Which entries take part, and the arguments that say so."""
    mask = MASKS[name]
    if name == "groups":
        listed = (LABELS[..., None] == np.arange(V)).any(1)
        return (listed | (mask["groups"][:, None] != mask["class_groups"])) & mask["class_where"], mask
    if mask is None:
        return np.ones((N, V), bool), {}
    return np.broadcast_to(mask[:, None] if mask.ndim == 1 else mask, (N, V)), {"where": mask}


def plain(a: dict[str, Any], weighted: bool, keep: Any = True) -> jax.Array:
    x, t = linear(a).materialize(), targets(a, weighted)
    terms = a["weight"][None] * t * jax.nn.softplus(-x) + (1 - t) * jax.nn.softplus(x)
    return jnp.where(keep, terms, 0).sum(-1)


QUICK = {
    "linear": {("rows", False), ("entries", True), ("groups", True)},
    "array": {("none", False), ("rows", True), ("classes", True), ("entries", False)},
}


@pytest.mark.parametrize(
    ("kind", "weighted", "mask"),
    [
        pytest.param(k, w, m, marks=() if (m, w) in QUICK[k] else pytest.mark.slow)
        for k in QUICK
        for w in (False, True)
        for m in MASKS
    ],
)
def test_dense_targets_summed(kind: str, weighted: bool, mask: str) -> None:
    """Values, gradients and Hessian-vector products by everything, beside the plain formula in float64."""
    keep, masks = masked(mask)

    def ours(a: dict[str, Any]) -> jax.Array:
        x = linear(a) if kind == "linear" else linear(a).materialize()
        return loss(x, LABELS, a["shares"] if weighted else None, pos_weight=a["weight"], **masks)

    def all_of(function: Any, a: dict[str, Any]) -> Any:
        def total(a: dict[str, Any]) -> jax.Array:
            return (function(a) ** 2).sum()

        return function(a), jax.jvp(jax.grad(total), (a,), (jax.tree.map(jnp.cos, a),))

    with jax.enable_x64(True):
        got, expected = quick(lambda a: [all_of(f, a) for f in (ours, lambda a: plain(a, weighted, keep))])(arguments())
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            # Sums of some tens of terms, squared: a hundred times eps of the largest.
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=2e-14 * (1 + np.abs(y).max()))


WEIGHTS = {"none": None, "floats": np.array([0.5, 0.0, 2.0]), "booleans": np.array([True, True, False])}


@pytest.mark.parametrize(
    ("given", "weighted"),
    [
        pytest.param(g, w, marks=() if (g, w) in {("none", False), ("floats", True)} else pytest.mark.slow)
        for g in WEIGHTS
        for w in (False, True)
    ],
)
def test_the_mean_is_that_of_the_losses(given: str, weighted: bool) -> None:
    """In value, gradient and both second orders by everything, also by rows' weights; a row of weight 0 has loss 0."""

    def mean(a: dict[str, Any]) -> jax.Array:
        labels_of = a["shares"] if weighted else None
        options = {"pos_weight": a["weight"]} | (MASKS["groups"] if weighted else {})
        w = a.get("rows", WEIGHTS[given])
        return jaxce.linear_sigmoid_binary_cross_entropy(linear(a), LABELS, w, label_weights=labels_of, **options)

    def of_losses(a: dict[str, Any]) -> jax.Array:
        w = a.get("rows", jnp.ones(3) if given == "none" else jnp.asarray(WEIGHTS[given], float))
        keep = masked("groups" if weighted else "none")[0]
        return (w * plain(a, weighted, keep & (w[:, None] != 0))).sum() / w.sum()

    def all_of(f: Any, a: dict[str, Any]) -> Any:
        slope = jax.grad(lambda a: 3 * f(a) ** 2)
        return [jax.jvp(f, (a,), (jax.tree.map(jnp.cos, a),)) for f in (f, slope)]

    with jax.enable_x64(True):
        a = arguments()
        if given == "floats":
            a["rows"] = jnp.asarray(WEIGHTS[given])
        got, expected = quick(lambda a: [all_of(f, a) for f in (mean, of_losses)])(a)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            # Sums of some tens of terms, squared: a hundred times eps of the largest.
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=2e-14 * (1 + np.abs(y).max()))


def test_the_mean_of_rows_that_hold_anything() -> None:
    """Rows of weight 0 have gradient 0; no weight at all gives 0; a label that is no class gives NaN if its row counts."""
    a, beside = arguments(), np.array([[False], [True], [False]])
    hidden, labels = np.where(beside, np.float32(np.nan), a["hidden"]), np.where(beside, -7, LABELS)

    @quick
    @jax.value_and_grad
    def mean(hidden: Any, weights: Any) -> jax.Array:
        return jaxce.linear_sigmoid_binary_cross_entropy(linear(a | {"hidden": hidden}), labels, weights)

    value, slope = mean(hidden, np.array([1.0, 0.0, 1.0]))
    assert np.isfinite(value) and np.isfinite(slope).all() and not slope[1].any() and slope[0].any()
    value, slope = mean(hidden, np.zeros(3))
    assert value == 0 and not slope.any()
    value, slope = mean(a["hidden"], np.ones(3))
    assert np.isnan(value) and np.isnan(slope[1]).all()
    halves = jaxce.LinearLogits(a["hidden"].astype("bfloat16"), a["kernel"].astype("bfloat16"))
    fused, of_losses = (
        (lambda x: jaxce.linear_sigmoid_binary_cross_entropy(x, LABELS)),
        lambda x: loss(x, LABELS).mean(),
    )
    slope, right = quick(lambda x: (jax.grad(fused)(x), jax.grad(of_losses)(x)))(halves)
    assert slope.hidden.dtype == slope.kernel.dtype == jnp.bfloat16
    for got, expected in ((slope.hidden, right.hidden), (slope.kernel, right.kernel)):
        np.testing.assert_allclose(got.astype("float32"), expected.astype("float32"), rtol=2e-2, atol=2e-2)  # bfloat16
    total = jaxce.linear_sigmoid_binary_cross_entropy(linear(a), LABELS, normalizer=1)
    np.testing.assert_allclose(total, loss(linear(a), LABELS).sum(), rtol=1e-6)


def test_the_mean_forms_its_gradient_from_three_products() -> None:
    """Of the logits, of hidden's gradient and of the kernel's, in one loop; that of the losses has the logits' twice."""

    def dots(mean: Any) -> int:
        slopes = jax.jit(jax.value_and_grad(lambda h, w: mean(jaxce.LinearLogits(h, w, block_size=4)), (0, 1)))
        return slopes.lower(jnp.ones((N, D)), jnp.ones((D, 12))).compile().as_text().count(" dot(")

    assert dots(lambda x: jaxce.linear_sigmoid_binary_cross_entropy(x, LABELS)) == 3
    assert dots(lambda x: loss(x, LABELS).mean()) == 5  # in three places: the value's last block comes before its loop


def test_confident_rows_keep_their_digits() -> None:
    """What all classes cost, less the logits of those listed, would be 0."""
    x = jnp.array([[40.0, -45.0, 50.0], [1e30, -1e30, 3e38]])
    labels = np.array([[0, 2], [2, 0]])
    exact = np.exp(-40.0) + np.exp(-45.0) + np.exp(-50.0)
    np.testing.assert_allclose(loss(x, labels), [exact, 0], rtol=3e-7)  # an exponential and three sums
    slope = jax.grad(lambda x: loss(x, labels).sum())(x)
    np.testing.assert_allclose(slope[0], [-np.exp(-40.0), np.exp(-45.0), -np.exp(-50.0)], rtol=3e-7)
    assert not slope[1].any()


LOGITS = {
    "random": lambda r, yes: 3 * r,
    "spread": lambda r, yes: 60 * r,
    "confident": lambda r, yes: np.where(yes, 40, -40) + r,
    "right, 1e-30": lambda r, yes: np.where(yes, 70, -70) + r,
    "all but one label right": lambda r, yes: np.where(yes & (np.arange(V) > 0), 50, -50) + r,
    "wrong": lambda r, yes: np.where(yes, -90, 90) + r,
    "tiny": lambda r, yes: 1e-30 * r,
    "huge": lambda r, yes: np.where(yes, 1e30, -1e30) * np.abs(r),
    "huge and wrong": lambda r, yes: np.where(yes, -1e30, 1e30) * np.abs(r),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float64", marks=pytest.mark.slow)])
def test_exact(dtype: str) -> None:
    """Values and gradients, of arrays and of blocks, in ulp of 60 digits: terms of 2 and sums of eleven without signs."""
    yes = np.stack([np.isin(np.arange(V), row) for row in LABELS])
    with jax.enable_x64(dtype == "float64"):
        made = [make(np.random.default_rng(i).normal(size=(N, V)), yes) for i, make in enumerate(LOGITS.values())]
        x = jnp.asarray(np.concatenate(made), dtype)
        labels, signs = np.tile(LABELS, (len(LOGITS), 1)), np.where(np.tile(yes, (len(LOGITS), 1)), -1, 1)
        exact = [mpmath.mpf(v) for v in (signs * np.asarray(x, np.float64)).ravel().tolist()]
        terms = [mpmath.log1p(mpmath.exp(v)) for v in exact]
        values = [mpmath.fsum(terms[i : i + V]) for i in range(0, len(terms), V)]
        slopes = [s / (1 + mpmath.exp(-v)) for v, s in zip(exact, signs.ravel().tolist(), strict=True)]

        def of_blocks(x: jax.Array) -> jax.Array:
            return loss(jaxce.LinearLogits(x, jnp.eye(V, dtype=x.dtype), block_size=4), labels)

        def of_array(x: jax.Array) -> jax.Array:
            return loss(x, labels)

        for f in (of_array, of_blocks):
            got, slope = quick(lambda x, f=f: (f(x), jax.grad(lambda x: f(x).sum())(x)))(x)
            assert ulp_error(got, values).max() <= 2 + V / 2  # half an ulp for each sum
            assert ulp_error(np.asarray(slope).ravel(), slopes).max() <= 4


def test_infinite_logits_and_labels_that_are_no_class() -> None:
    x = jnp.array([[jnp.inf, -jnp.inf, 0.0]] * 2 + [[1.0, 2.0, 3.0]] * 3)
    labels = np.array([[0], [1], [7], [-1], [-2]])
    value, gradient = quick(jax.value_and_grad(lambda x: loss(x, labels)[jnp.array([0, 2, 3])].sum()))(x)
    assert np.isnan(value) and np.isnan(gradient[2]).all() and np.isfinite(gradient[0]).all()
    got = np.asarray(loss(x, labels))
    np.testing.assert_allclose(got[[0, 3]], [np.log(2), np.logaddexp(0, [1, 2, 3]).sum()], rtol=3e-7)
    assert np.isinf(got[1]) and np.isnan(got[[2, 4]]).all()
    assert np.isfinite(loss(x, labels, where=np.array([True, False, False, True, False]))).all()
    np.testing.assert_allclose(loss(x[3:], np.zeros((2, 0), int)), got[[3, 3]])  # nothing listed


def test_the_last_class_of_unsigned_labels_is_no_padding() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 256)), "float32")
    for dtype in ("uint8", "uint32", "int16"):
        np.testing.assert_array_equal(loss(x, np.array([[255], [3]], dtype)), loss(x, np.array([[255], [3]])))


def test_big_visions_formula() -> None:
    """SigLIP: each image's own text is yes, all others no, with a learned temperature and bias."""
    rng = np.random.default_rng(0)
    images, texts = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in rng.normal(size=(2, 7, 4)))
    t, b = 10.0, -3.0
    eye = np.eye(7)
    expected = -(-np.logaddexp(0, -(2 * eye - 1) * (images @ texts.T * t + b))).sum(-1).mean()
    images, texts = (jnp.asarray(v, "float32") for v in (images, texts))
    logits = jaxce.LinearLogits(images, texts, class_axis=0, temperature=1 / t, block_size=3) + jnp.full(7, b)
    np.testing.assert_allclose(loss(logits, np.arange(7)[:, None]).mean(), expected, rtol=1e-6)


def soft_margin() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(N, V)).astype("float32")
    return x, np.asarray(targets(arguments(), False))


def test_the_formula_of_torchs_multilabel_soft_margin_loss() -> None:
    x, t = soft_margin()
    plain = (t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x)).mean(-1)
    np.testing.assert_allclose(loss(x, LABELS) / V, plain, rtol=1e-6)


def test_torchs_multilabel_soft_margin_loss() -> None:
    torch = pytest.importorskip("torch")
    x, t = soft_margin()
    theirs = torch.nn.functional.multilabel_soft_margin_loss(torch.tensor(x), torch.tensor(t), reduction="none")
    np.testing.assert_allclose(loss(x, LABELS) / V, theirs, rtol=1e-6)


def test_classes_of_several_devices() -> None:
    """An axis of vmap does for one of a mesh."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, 12)), "float32")
    parts = jnp.moveaxis(x.reshape(N, 3, 4), 1, 0)

    def part(x: jax.Array) -> jax.Array:
        return loss(jaxce.ShardedLogits(x, "parts"), LABELS)

    got = jax.vmap(part, out_axes=None, axis_name="parts")(parts)
    np.testing.assert_allclose(got, loss(x, LABELS), rtol=1e-6)


def test_of_equal_texts_only_the_own_one_is_asked() -> None:
    """With groups of rows alone, of which there are as many as classes; and what is left out may hold anything."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), "float32").at[0, 2].set(jnp.nan).at[2, 0].set(jnp.inf)
    ids, own = np.array([7, 3, 7, 5]), np.arange(4)[:, None]
    keep = (ids[:, None] != ids) | np.eye(4, dtype=bool)
    got, slope = jax.value_and_grad(lambda x: loss(x, own, groups=ids).sum())(x)
    expected, right = jax.value_and_grad(lambda x: loss(x, own, where=keep).sum())(x)
    assert np.isfinite(got) and np.isfinite(slope).all()
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(slope, right)


def test_a_policy_keeps_no_more() -> None:
    """The temporaries of a gradient under `jax.checkpoint`, which could keep each product."""

    def temporaries(function: Any) -> int:
        shapes = jax.ShapeDtypeStruct((512, 16), "float32"), jax.ShapeDtypeStruct((16, 16384), "float32")
        gradient = quick(jax.grad(function, (0, 1)))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    def mean(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        logits = jaxce.LinearLogits(hidden, kernel, block_size=1024)
        return jaxce.linear_sigmoid_binary_cross_entropy(logits, np.arange(512)[:, None])

    policy = jax.checkpoint_policies.dots_saveable
    assert temporaries(jax.checkpoint(mean, policy=policy)) <= 1.2 * temporaries(mean) < 4 * 512 * 16384


def test_any_number_of_rows_is_exported() -> None:
    a = jax.tree.map(lambda x: x.astype("float32"), arguments())

    def both(hidden: jax.Array, labels: jax.Array) -> Any:
        def mean(hidden: jax.Array) -> jax.Array:
            return jaxce.linear_sigmoid_binary_cross_entropy(linear(a | {"hidden": hidden}), labels)

        return loss(linear(a | {"hidden": hidden}), labels), jax.value_and_grad(mean)(hidden)

    (rows,) = jax.export.symbolic_shape("n")
    shapes = ((rows, D), "float32"), ((rows, 3), "int32")
    exported = jax.export.export(jax.jit(both))(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    got, expected = (quick(f)(a["hidden"], LABELS) for f in (exported.call, both))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, expected)  # sums of another order


@pytest.mark.parametrize(
    ("wrong", "error", "argument"),
    [
        ({"groups": np.arange(N)}, TypeError, "class_groups"),
        ({"class_groups": np.arange(V)}, TypeError, "groups"),
        ({"groups": np.arange(V), "class_groups": np.arange(V)}, ValueError, "groups"),
        ({"groups": np.arange(N), "class_groups": np.arange(N)}, ValueError, "class_groups"),
        (
            {"groups": np.arange(N, dtype="int32"), "class_groups": np.arange(V, dtype="uint32")},
            TypeError,
            "class_groups",
        ),
        ({"class_where": np.ones((N, V), bool)}, ValueError, "class_where"),
        ({"class_where": np.ones(V)}, TypeError, "class_where"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=f"^sigmoid_binary_cross_entropy_with_sparse_labels: {argument} must "):
        loss(jnp.zeros((N, V)), LABELS, **wrong)


def test_integer_weights_are_as_exact_as_the_logits() -> None:
    with jax.enable_x64(True):
        logits = jaxce.LinearLogits(jnp.ones((2, 3)), jnp.arange(12.0).reshape(3, 4))

        def loss(weights: list[float], dtype: str) -> Any:
            w, labels = jnp.array(weights, dtype), jnp.zeros((2, 1), int)
            return jaxce.linear_sigmoid_binary_cross_entropy(logits, labels, w, normalizer=1.0)

        assert loss([2**24 + 1, 1], "int32") == loss([2**24 + 1, 1], "float64")
