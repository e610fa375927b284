"""LinearLogits: in place of an array of logits they change no number, under any transformation, and hold no such array."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick

import jaxce
from jaxce import _passes
from jaxce._inputs import Spec

N, D, V = 3, 4, 11  # 11 is prime: no block but 1 divides it
LABELS = np.array([0, 10, 4], np.int32)
SPARSE = np.array([[0, 1, 1], [10, -1, 3], [4, 99, 2]], np.int32)  # one twice, and two that are none
SHARES = np.array([[0.5, 0.25, 0.5], [1.0, 0.0, 0.5], [0.25, 0.0, 2.0]], np.float32)
WEIGHTS = np.array([1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 0.25, 1.0, 1.0, 2.0, 1.5], np.float32)


def softened(seed: int = 5) -> jax.Array:
    """Targets with zeros among them."""
    t = np.random.default_rng(seed).exponential(size=(N, V)) * (np.arange(V) % 3 > 0)
    return jnp.asarray(t / t.sum(-1, keepdims=True), "float32")


def other() -> jax.Array:
    """An array of logits to compare with."""
    return jnp.asarray(np.random.default_rng(6).normal(size=(N, V)), "float32")


Function = Callable[..., Any]
integer = jaxce.softmax_cross_entropy_with_integer_labels
FUNCTIONS: dict[str, Function] = {  # of logits and the options axis and where, to results of the batch shape
    "integer labels": lambda x, **k: integer(x, LABELS, **k),
    "integer labels, modified": lambda x, **k: integer(
        x, LABELS, label_smoothing=0.1, class_weights=WEIGHTS, z_loss=0.1, **k
    ),
    "integer labels, smoothing 1": lambda x, **k: integer(x, LABELS, label_smoothing=1.0, **k),
    "dense labels": lambda x, **k: jaxce.softmax_cross_entropy(x, softened(), **k),
    "dense labels, modified": lambda x, **k: jaxce.softmax_cross_entropy(
        x, softened(), label_smoothing=0.1, class_weights=WEIGHTS, z_loss=0.1, **k
    ),
    "sparse labels, modified": lambda x, **k: jaxce.softmax_cross_entropy_with_sparse_labels(
        x, SPARSE, SHARES, label_smoothing=0.1, class_weights=WEIGHTS, z_loss=0.1, **k
    ),
    "focal, one target for all": lambda x, **k: jaxce.softmax_focal_loss(x, softened()[0], class_weights=WEIGHTS, **k),
    "focal, integer": lambda x, **k: jaxce.softmax_focal_loss(x, LABELS, **k),
    "focal, dense": lambda x, **k: jaxce.softmax_focal_loss(x, softened(), gamma=1.5, **k),
    "poly, integer": lambda x, **k: jaxce.poly_loss_cross_entropy(x, LABELS, **k),
    "poly, dense": lambda x, **k: jaxce.poly_loss_cross_entropy(x, softened(), **k),
    "statistics": lambda x, **k: jaxce.softmax_statistics(x, LABELS, **k)[:3],
    "logsumexp": lambda x, **k: jaxce.logsumexp(x, **k),
    "log_softmax": lambda x, **k: jaxce.log_softmax(x, **k).sum(-1, where=jaxce.log_softmax(x, **k) > -jnp.inf),
    "entropy": lambda x, **k: jaxce.entropy_with_logits(x, base=2, **k),
    "cross-entropy, from": lambda x, **k: jaxce.cross_entropy_with_logits(x, other(), **k),
    "cross-entropy, to": lambda x, **k: jaxce.cross_entropy_with_logits(other(), x, **k),
    "relative entropy, from": lambda x, **k: jaxce.relative_entropy_with_logits(x, other(), **k),
    "relative entropy, to": lambda x, **k: jaxce.relative_entropy_with_logits(other(), x, **k),
    "Jensen-Shannon": lambda x, **k: jaxce.jensen_shannon_divergence_with_logits(x, other(), **k),
}


def some(*names: str) -> pytest.MarkDecorator:
    """These functions, and the others on request: compiling each takes seconds."""
    return pytest.mark.parametrize(
        "name", [n if n in names else pytest.param(n, marks=pytest.mark.slow) for n in FUNCTIONS]
    )


def arguments(dtype: str = "float32", seed: int = 0, size: float = 1.0) -> dict[str, jax.Array]:
    """Everything that varies."""
    rng = np.random.default_rng(seed)
    made = {
        "hidden": size * rng.normal(size=(N, D)),
        "kernel": rng.normal(size=(D, V)),
        "bias": rng.normal(size=V),
        "temperature": np.array(1.5),
        "soft_cap": np.array(3.0),
    }
    return {name: jnp.asarray(value, dtype) for name, value in made.items()}


def linear(a: dict[str, jax.Array], **options: Any) -> jaxce.LinearLogits:
    rest = {name: value for name, value in a.items() if name not in ("hidden", "kernel")}
    return jaxce.LinearLogits(a["hidden"], a["kernel"], **rest, **options)


def scalar(function: Function, x: Any, **options: Any) -> jax.Array:
    """One number in which every result counts, with weights that no symmetry cancels."""
    leaves = jax.tree.leaves(function(x, **options))
    return sum(
        (jnp.sum(leaf * jnp.sin(1 + i + jnp.arange(leaf.size, dtype=leaf.dtype))) for i, leaf in enumerate(leaves)),
        jnp.zeros((), leaves[0].dtype),
    )


def close(got: Any, expected: Any, rtol: float, atol: float) -> None:
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol)


# --- the same numbers -------------------------------------------------------------------------------------------------


@some("integer labels, modified", "cross-entropy, to")
def test_value_and_gradient(name: str) -> None:
    """In float64, where both sides are exact but for 1e-16 times the few operations of eleven classes."""
    function = FUNCTIONS[name]
    with jax.enable_x64(True):
        a = arguments("float64")

        @quick
        def both(a: Any) -> Any:
            return jax.value_and_grad(lambda a: scalar(function, linear(a, block_size=4)))(a)

        @quick
        def expected(a: Any) -> Any:
            return jax.value_and_grad(lambda a: scalar(function, linear(a).materialize()))(a)

        close(both(a), expected(a), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("rows", "features"), [(0, D), (N, 0)])
def test_no_rows_and_no_features(rows: int, features: int) -> None:
    """Blocks of no numbers, in loss and gradient, also by the labels."""

    def loss(as_logits: Any, hidden: Any, kernel: Any, labels: Any) -> jax.Array:
        return jnp.sum(jaxce.softmax_cross_entropy(as_logits(jaxce.LinearLogits(hidden, kernel, block_size=4)), labels))

    args = jnp.ones((rows, features)), jnp.ones((features, V)), softened()[:rows]
    got, expected = (
        jax.value_and_grad(loss, (1, 2, 3))(f, *args) for f in (lambda x: x, jaxce.LinearLogits.materialize)
    )
    close(got, expected, rtol=1e-6, atol=1e-6)


MODES = (
    "jvp",
    "forward over reverse",
    "reverse over reverse",
    "jacfwd",
    "jacrev",
    "reverse over forward",
    "forward over forward",
)


@some("integer labels")
@pytest.mark.parametrize("modes", [MODES[:2], pytest.param(MODES[2:], marks=pytest.mark.slow)], ids=["some", "others"])
def test_derivatives_in_all_modes_and_orders(name: str, modes: tuple[str, ...]) -> None:
    """By all that varies at once; `test_hessian.py` has all orders of those by the kernel."""
    function = FUNCTIONS[name]
    with jax.enable_x64(True):
        a, directions = arguments("float64"), arguments("float64", seed=1)

        def dot(a: Any, b: Any) -> Any:
            return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

        def orders(make: Callable[..., Any]) -> Callable[[Any], Any]:
            def f(a: Any) -> jax.Array:
                return scalar(function, make(a))

            def along(a: Any) -> Any:
                return jax.jvp(f, (a,), (directions,))[1]

            of = {
                "jvp": lambda a: jax.jvp(lambda a: function(make(a)), (a,), (directions,))[1],
                "jacfwd": jax.jacfwd(f),
                "jacrev": jax.jacrev(lambda a: function(make(a))),
                "forward over reverse": lambda a: jax.jvp(jax.grad(f), (a,), (directions,))[1],
                "reverse over forward": jax.grad(along),
                "reverse over reverse": jax.grad(lambda a: dot(jax.grad(f)(a), directions)),
                "forward over forward": lambda a: jax.jvp(along, (a,), (directions,))[1],
            }
            return quick(lambda a: {mode: of[mode](a) for mode in modes})

        got = orders(lambda a: linear(a, block_size=4))(a)
        expected = orders(lambda a: linear(a).materialize())(a)
        for mode in got:
            close(got[mode], expected[mode], rtol=1e-10, atol=1e-11)  # 100 times what is left of the cancelling sums


@pytest.mark.parametrize(
    ("block_size", "class_axis"),
    [
        *((1, -1), (4, 0), (11, -1), (None, 0)),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in ((1, 0), (4, -1), (11, 0), (64, -1), (64, 0), (None, -1))),
    ],
)
def test_block_boundaries_never_show(block_size: int | None, class_axis: int) -> None:
    """Both layouts, blocks that divide 11 classes, that don't, and that exceed them."""
    a = arguments()
    kernel = a["kernel"] if class_axis == -1 else a["kernel"].T
    x = jaxce.LinearLogits(a["hidden"], kernel, bias=a["bias"], class_axis=class_axis, block_size=block_size)
    whole = a["hidden"] @ a["kernel"] + jnp.broadcast_to(a["bias"], (N, V))
    got, expected = jaxce.softmax_statistics(x, LABELS), jaxce.softmax_statistics(whole, LABELS)
    close(got[:3], expected[:3], rtol=1e-6, atol=1e-6)  # 8 ulp: products of four terms, summed in another order
    assert jnp.array_equal(got.prediction, expected.prediction)


@pytest.mark.parametrize("offset", [0.0, -1e4, 1e4, -3e38, 3e38])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 1e-20])
def test_zero_tiny_huge_and_very_negative_logits(scale: float, offset: float) -> None:
    """No class is padded in: at logits that are all alike the loss is log 11 whatever they are."""
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), "float32") * scale
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(D, V)), "float32")
    bias = jnp.full(V, offset)
    x = jaxce.LinearLogits(hidden, kernel, bias=bias, block_size=4)
    losses = integer(x, LABELS)
    # The same product, block by block: a sum of four may round otherwise in another shape.
    whole = jnp.concatenate([hidden @ kernel[:, i : i + 4] for i in (0, 4, 8)], 1) + offset
    close(losses, integer(whole, LABELS), rtol=1e-5, atol=max(1.0, abs(offset), scale) * 1e-6)
    if scale in (0.0, 1e-20):
        np.testing.assert_allclose(losses, math.log(V), rtol=2e-7)


@pytest.mark.parametrize("name", ["integer", "js"])
def test_passes_that_round_huge_logits_differently(name: str) -> None:
    """A block of another size may be summed in another order, so that a logit is above the maximum of another pass."""
    losses = {
        "integer": lambda z: jaxce.softmax_cross_entropy_with_integer_labels(z, jnp.arange(5)),
        "js": lambda z: jaxce.jensen_shannon_divergence_with_logits(z, jnp.zeros((5, 5000))),
    }
    for seed in range(6):
        r = np.random.default_rng(seed)
        hidden = jnp.asarray(r.normal(size=(5, 64)), "float32")
        kernel = jnp.asarray(r.normal(size=(64, 5000)) * 1e9, "float32")
        slopes = jax.grad(lambda h, k: losses[name](jaxce.LinearLogits(h, k)).sum(), (0, 1))(hidden, kernel)
        assert all(np.isfinite(x).all() for x in slopes)


@pytest.mark.parametrize("offset", [-1000.0, 0.0, 500.0])
@pytest.mark.parametrize("step", [0.5, -0.5])
def test_a_maximum_that_moves_from_block_to_block(step: float, offset: float) -> None:
    """What was summed from one anchor is carried to the next."""
    row = offset + step * jnp.arange(11.0)
    got = jaxce.softmax_statistics(jaxce.LinearLogits(jnp.ones((1, 1)), row[None], block_size=2), jnp.array([3]))
    expected = jaxce.softmax_statistics(row[None], jnp.array([3]))
    close(got[:3], expected[:3], rtol=5e-7, atol=0)  # the same logits: 4 ulp
    assert jnp.array_equal(got.prediction, expected.prediction)


def test_a_confident_row_keeps_its_digits() -> None:
    """A loss of 1e-20 and its gradient, with the top class in the first, a middle and the last block."""
    for top in (0, 6, 10):
        kernel = jnp.zeros((1, V)).at[0, top].set(48.0)

        def loss(hidden: jax.Array, kernel: jax.Array, top: int = top) -> jax.Array:
            return integer(jaxce.LinearLogits(hidden, kernel, block_size=4), jnp.array([top]))[0]

        exact = 10 * math.exp(-48.0)
        np.testing.assert_allclose(loss(jnp.ones((1, 1)), kernel), exact, rtol=1e-6)
        gradient = jax.grad(loss, 1)(jnp.ones((1, 1)), kernel)[0]
        np.testing.assert_allclose(gradient, np.where(np.arange(V) == top, -exact, exact / 10), rtol=1e-6)
    dense = jaxce.softmax_cross_entropy(
        jaxce.LinearLogits(jnp.ones((1, 1)), kernel, block_size=4), jnp.zeros((1, V)).at[0, 10].set(1.0)
    )
    np.testing.assert_allclose(dense, exact, rtol=1e-6)


# --- masks and labels -------------------------------------------------------------------------------------------------


MASKS = {
    "rows": np.array([True, False, True]),
    "classes": np.arange(V)[None] % 4 != 1,
    "entries": np.random.default_rng(3).uniform(size=(N, V)) < 0.6,
    "entries, one row empty": (np.random.default_rng(3).uniform(size=(N, V)) < 0.6) & (np.arange(N) != 1)[:, None],
    "a column": np.array([[True], [False], [True]]),
}


@some("entropy")
def test_masks(name: str) -> None:
    def with_masks(x: Any) -> Any:
        return [FUNCTIONS[name](x, where=jnp.asarray(mask)) for mask in MASKS.values()]

    a = arguments()
    got = quick(lambda a: with_masks(linear(a, block_size=4)))(a)
    expected = quick(lambda a: with_masks(linear(a).materialize()))(a)
    close(got, expected, rtol=4e-6, atol=2e-6)  # logits up to 3 differ by an ulp or two, and one is squared


@pytest.mark.parametrize("mask", ["rows", "entries, one row empty"])
def test_a_masked_row_may_hold_anything(mask: str) -> None:
    a = arguments()
    a["hidden"] = np.where(np.arange(N)[:, None] == 1, np.float32(np.nan), a["hidden"])
    labels = np.array([0, -100, 4], np.int32)

    def loss(a: Any) -> Any:
        losses = integer(linear(a, block_size=4), labels, where=MASKS[mask], label_smoothing=0.1, z_loss=0.1)
        return jnp.sum(jnp.where(jnp.isfinite(losses), losses, 0)), losses

    gradient, losses = quick(jax.grad(loss, has_aux=True))(a)
    assert not any(np.any(np.isnan(g)) for g in jax.tree.leaves(gradient))
    assert np.all(np.asarray(gradient["hidden"])[1] == 0) and np.asarray(losses)[1] == 0


def test_a_masked_class_may_hold_anything() -> None:
    a = arguments()
    there = np.arange(V) != 5
    a |= {name: np.where(there, a[name], np.float32(np.nan)) for name in ("kernel", "bias")}

    def loss(a: Any) -> jax.Array:
        return jnp.sum(integer(linear(a, block_size=4), LABELS, where=there[None]))

    value, gradient = quick(jax.value_and_grad(loss))(a)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
    assert np.all(np.asarray(gradient["kernel"])[:, 5] == 0)


def test_entropy_of_huge_logits_in_blocks() -> None:
    """A maximum that rises by thousands from block to block: what came before it weighs nothing, and isn't NaN."""
    hidden, kernel = jnp.array([[1.0], [-1.0]]), jnp.arange(7.0)[None] * 1e4
    logits = jaxce.LinearLogits(hidden, kernel, block_size=3)
    entropy, gradient = quick(
        jax.value_and_grad(lambda h: jnp.sum(jaxce.entropy_with_logits(jaxce.LinearLogits(h, kernel, block_size=3))))
    )(hidden)
    assert entropy == 0 and np.all(np.asarray(gradient) == 0)
    np.testing.assert_array_equal(jaxce.softmax_statistics(logits).entropy, [0, 0])


@pytest.mark.parametrize("block_size", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 5))])
def test_every_class_may_be_the_label(block_size: int) -> None:
    """Also one that the last block, which ends with the last class, shares with the block before it."""
    rng = np.random.default_rng(0)
    hidden, kernel = jnp.asarray(rng.normal(size=(7, 2)), "float32"), jnp.asarray(rng.normal(size=(2, 7)), "float32")
    labels = jnp.arange(7)

    def loss(hidden: jax.Array, kernel: jax.Array, size: int | None) -> jax.Array:
        logits = jaxce.LinearLogits(hidden, kernel, block_size=size)
        return jnp.sum(integer(logits if size else logits.materialize(), labels))

    got, expected = (
        jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)(hidden, kernel, size) for size in (block_size, None)
    )
    # A few ulp of float32, in sums of 7 numbers of about 1.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, expected)


def test_absent_classes_and_wrong_labels() -> None:
    a = arguments()
    a["bias"] = a["bias"].at[4].set(-jnp.inf)
    del a["soft_cap"]

    def losses(a: Any, labels: Any) -> jax.Array:
        return integer(linear(a, block_size=4), labels)

    values = losses(a, jnp.array([4, 11, -1]))
    assert values[0] == jnp.inf and np.all(np.isnan(values[1:]))
    gradient_of = quick(jax.grad(lambda a, labels: jnp.sum(losses(a, labels))))
    gradient = gradient_of(a, jnp.array([0, 1, 2]))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
    gradient = gradient_of(a, jnp.array([0, 1, 11]))["hidden"]
    assert np.all(np.isfinite(gradient[:2])) and np.all(np.isnan(gradient[2]))


# --- transformations --------------------------------------------------------------------------------------------------


def loss_of(hidden: jax.Array, kernel: jax.Array, labels: Any = LABELS, **options: Any) -> jax.Array:
    return integer(jaxce.LinearLogits(hidden, kernel, block_size=4, **options), labels)


def whole_loss(hidden: jax.Array, kernel: jax.Array, labels: Any = LABELS) -> jax.Array:
    return integer(hidden @ kernel, labels)


def test_vmap_over_tokens_kernels_and_both() -> None:
    a = jax.device_get(arguments())
    hidden = np.stack([a["hidden"], 2 * a["hidden"]])
    kernel = np.stack([a["kernel"], a["kernel"][:, ::-1]])

    def mapped(function: Function) -> Any:
        both = jax.value_and_grad(lambda h, w: jnp.sum(function(h, w)), (0, 1))
        pairs = (hidden, a["kernel"]), (a["hidden"], kernel), (hidden, kernel)
        return [jax.vmap(both, axes)(*args) for axes, args in zip(((0, None), (None, 0), (0, 0)), pairs, strict=True)]

    got, expected = (quick(mapped, static_argnums=0)(f) for f in (loss_of, whole_loss))
    close(got, expected, rtol=1e-5, atol=2e-6)  # sums of three rows' ulps
    nested = np.asarray(quick(jax.vmap(jax.vmap(loss_of, (0, None)), (None, 0)))(hidden, kernel))
    assert nested.shape == (2, 2, N)
    close(nested[1, 0], whole_loss(hidden[0], kernel[1]), rtol=1e-5, atol=1e-6)


def test_batch_axes_of_any_number() -> None:
    a = arguments()
    hidden = jnp.stack([a["hidden"], -a["hidden"]])
    got = quick(loss_of)(hidden, a["kernel"], jnp.stack([LABELS, LABELS]))
    close(got, jnp.stack([whole_loss(h, a["kernel"]) for h in hidden]), rtol=1e-5, atol=1e-6)
    close(quick(loss_of)(hidden[0, 0], a["kernel"], LABELS[0]), got[0, 0], rtol=1e-6, atol=1e-6)


def test_as_a_pytree() -> None:
    """It goes in and out of jit, donated and as a carry, and comes back the same kind of thing."""
    x = jaxce.LinearLogits(jnp.ones((N, D)), jnp.ones((D, V)), block_size=4, soft_cap=2.0)
    doubled = jax.jit(lambda x: jax.tree.map(lambda leaf: 2 * leaf, x))(x)
    assert isinstance(doubled, jaxce.LinearLogits) and doubled.block_size == 4 and doubled.soft_cap == 4.0
    assert doubled.shape == (N, V) and doubled.ndim == 2 and doubled.dtype == jnp.float32

    def step(x: jaxce.LinearLogits, _: Any) -> tuple[jaxce.LinearLogits, jax.Array]:
        return jax.tree.map(lambda leaf: 0.5 * leaf, x), jnp.mean(integer(x, LABELS))

    _, losses = jax.lax.scan(step, doubled, None, length=2)
    close(losses[1], jnp.mean(integer(x, LABELS)), rtol=1e-6, atol=0)
    gradient = quick(jax.grad(lambda x: jnp.sum(integer(x, LABELS))))(x)
    assert isinstance(gradient, jaxce.LinearLogits) and gradient.kernel.shape == (D, V)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(x)]
    assert paths == [".hidden", ".kernel", ".soft_cap"]


def test_inside_a_training_loop() -> None:
    """Under scan, checkpoint and donation at once, the loss of each step is that of the array's."""
    a = arguments()

    def train(loss: Function) -> Function:
        def step(kernel: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            value, gradient = jax.value_and_grad(lambda w: jnp.mean(jax.checkpoint(loss)(hidden, w)))(kernel)
            return kernel - gradient, value

        return jax.jit(lambda kernel, batches: jax.lax.scan(step, kernel, batches), donate_argnums=0)

    batches = jnp.stack([a["hidden"], -a["hidden"]])
    got = train(loss_of)(a["kernel"].copy(), batches)
    close(got, train(whole_loss)(a["kernel"].copy(), batches), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_export_linearize_cond_and_leaks() -> None:
    from jax import export

    a = arguments()
    function = jax.jit(jax.value_and_grad(lambda h, w: jnp.sum(loss_of(h, w)), (0, 1)))
    (classes,) = export.symbolic_shape("v")
    with pytest.raises(ValueError, match="logits must have a known number of classes, got v"):
        export.export(function)(a["hidden"], jax.ShapeDtypeStruct((D, classes), "float32"))
    exported = export.export(function)(a["hidden"], a["kernel"])
    close(exported.call(a["hidden"], a["kernel"]), function(a["hidden"], a["kernel"]), rtol=1e-6, atol=1e-6)
    value, push = jax.linearize(loss_of, a["hidden"], a["kernel"])
    directions = jnp.ones((N, D)), jnp.ones((D, V))
    tangent = jax.jvp(loss_of, (a["hidden"], a["kernel"]), directions)[1]
    close(push(*directions), tangent, rtol=1e-5, atol=1e-6)
    pull = jax.linear_transpose(push, a["hidden"], a["kernel"])
    close(pull(jnp.ones(N)), jax.vjp(loss_of, a["hidden"], a["kernel"])[1](jnp.ones(N)), rtol=1e-5, atol=1e-6)
    chosen = jax.lax.cond(jnp.array(True), loss_of, lambda h, w: 2 * loss_of(h, w), a["hidden"], a["kernel"])
    close(chosen, value, rtol=1e-6, atol=1e-6)
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda h, w: jnp.sum(loss_of(h, w, soft_cap=3.0))))(a["hidden"], a["kernel"])
    policy = jax.checkpoint_policies.everything_saveable
    saved = jax.grad(jax.checkpoint(lambda h, w: jnp.sum(loss_of(h, w)), policy=policy), (0, 1))
    close(saved(a["hidden"], a["kernel"]), function(a["hidden"], a["kernel"])[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("class_axis", [-1, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("given", "block_size"), [("products alone", None), ("products alone", 4), ("all", 4)])
@some("integer labels", "entropy")
def test_half_precision(name: str, given: str, block_size: int | None, class_axis: int, dtype: str) -> None:
    """Values are those of the exact products in float32; gradients are float32's, rounded once.

    In bfloat16 the gradients of the logits are rounded before they are multiplied, by 2^-9 each: over eleven or three
    terms of size up to 3 that is at most 0.03.
    """
    function, a = FUNCTIONS[name], arguments(dtype)
    a["kernel"] = a["kernel"] if class_axis == -1 else a["kernel"].T
    a = a if given == "all" else {"hidden": a["hidden"], "kernel": a["kernel"]}
    wide = jax.tree.map(lambda leaf: leaf.astype("float32"), a)

    def both(a: Any) -> Any:
        return jax.value_and_grad(lambda a: scalar(function, linear(a, class_axis=class_axis, block_size=block_size)))(
            a
        )

    (value, gradient), (expected, wide_gradient) = quick(both)(a), quick(both)(wide)
    assert value.dtype == "float32" and all(g.dtype == dtype for g in jax.tree.leaves(gradient))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    rounded = jax.tree.map(lambda g: g.astype("float32"), gradient)
    close(rounded, wide_gradient, rtol=2**-7, atol=0.03 if dtype == "bfloat16" else 1e-3)


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    """Of 4096 blocks each adds 1/4096 to the gradient of a hidden state: in bfloat16 the sum stops near 2^8 such steps."""
    classes, rows = 4096, 1
    hidden, kernel = jnp.zeros((rows, 1), "bfloat16"), jnp.ones((1, classes), "bfloat16")
    gradient = jax.jit(jax.grad(lambda h: jnp.sum(jaxce.logsumexp(jaxce.LinearLogits(h, kernel, block_size=1)))))(
        hidden
    )
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), 1.0)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_chunks_of_rows_are_summed_in_float32(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What 64 chunks add to the kernel's gradient is rounded each, by as much as of all rows at once; not their sums."""
    rng, (rows, features, classes) = np.random.default_rng(0), (1024, 8, 32)
    hidden, kernel = (rng.normal(size=shape).astype(dtype) for shape in ((rows, features), (classes, features)))
    labels = rng.integers(0, classes, rows).astype("int32")

    def gradient(hidden: Any, kernel: Any) -> Any:
        return jax.grad(lambda w: integer(jaxce.LinearLogits(hidden, w, class_axis=0), labels).sum())(kernel)

    exact = quick(gradient)(hidden.astype("float32"), kernel.astype("float32"))
    monkeypatch.setattr("jaxce._inputs.BLOCK", rows * classes // 64)
    error = np.asarray(quick(lambda *args: gradient(*args))(hidden, kernel), "float32") - exact
    # A number is rounded by 2^-9 or 2^-12 of it at most: that of the logits, of its part in a chunk and of the result.
    assert np.sqrt(np.mean(error**2) / np.mean(exact**2)) < jnp.finfo(dtype).eps / 2


def test_mixed_precision_and_float64_targets() -> None:
    a = arguments()
    got = loss_of(a["hidden"].astype("bfloat16"), a["kernel"])
    close(got, loss_of(a["hidden"].astype("bfloat16").astype("float32"), a["kernel"]), rtol=1e-6, atol=1e-6)
    with jax.enable_x64(True):
        x = jaxce.LinearLogits(jnp.asarray(a["hidden"]), jnp.asarray(a["kernel"]), block_size=4)
        assert jaxce.softmax_cross_entropy(x, softened().astype("float64")).dtype == "float64"
        assert integer(x, LABELS).dtype == "float32"


def test_shapes_in_place_of_arrays() -> None:
    """For `jax.eval_shape` and `jax.jit(...).lower`."""
    hidden, kernel, bias = (jax.ShapeDtypeStruct(s, "bfloat16") for s in ((N, D), (D, V), (V,)))
    x = jaxce.LinearLogits(hidden, kernel, bias=bias)
    assert (x.shape, x.dtype) == ((N, V), "float32")
    assert jax.eval_shape(lambda x: integer(x, LABELS), x).shape == (N,)
    with pytest.raises(TypeError, match="LinearLogits: kernel must be a floating-point array"):
        jaxce.LinearLogits(hidden, jax.ShapeDtypeStruct((D, V), "int32"))


ROWS_OF: dict[str, Any] = {
    "all but the last": np.s_[:, :-1],
    "the first": 0,
    "one": (0, 1),
    "an ellipsis": np.s_[..., :1, :],
    "an ellipsis at the end": np.s_[0, ...],
    "every axis": np.s_[:, :1, :],
    "a new axis": np.s_[:, None],
    "some": np.array([1, 0]),
    "a mask": np.array([[True, False, True], [False, True, True]]),
}


def test_indices_of_rows() -> None:
    a = arguments()
    x = linear(a | {"hidden": jnp.stack([a["hidden"], -a["hidden"]])})
    got = quick(lambda x: {name: (x[rows].hidden, x[rows].materialize()) for name, rows in ROWS_OF.items()})(x)
    whole = np.asarray(x.materialize())
    for name, rows in ROWS_OF.items():
        hidden, logits = got[name]
        np.testing.assert_array_equal(hidden, np.asarray(x.hidden)[rows], err_msg=name)
        np.testing.assert_allclose(logits, whole[rows], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("in_chunks", [False, True], ids=["all rows at once", "two chunks of rows"])
@some("integer labels, modified", "relative entropy, from")
def test_a_temperature_for_each_row(name: str, in_chunks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the formula of the logits, by everything that varies: in blocks, and in chunks that aren't full."""
    function = FUNCTIONS[name]
    if in_chunks:
        monkeypatch.setattr("jaxce._inputs.BLOCK", 2 * V)  # of the three rows two, and one
    with jax.enable_x64(True):
        a = arguments("float64") | {"temperature": jnp.array([0.5, 1.5, 3.0])}

        def plain(a: Any) -> jax.Array:
            x = (a["hidden"] @ a["kernel"] + a["bias"][None]) / a["temperature"][:, None]
            return scalar(function, a["soft_cap"] * jnp.tanh(x / a["soft_cap"]))

        expected = quick(jax.value_and_grad(plain))(a)
        size = None if in_chunks else 4
        got = quick(jax.value_and_grad(lambda a: scalar(function, linear(a, block_size=size))))(a)
        close(got, expected, 1e-12, 1e-13)


def test_rows_of_temperatures() -> None:
    """Slices, operators, vmap, and what is said where there are other numbers than rows."""
    a = {name: np.asarray(value) for name, value in arguments().items() if name != "soft_cap"}
    a["temperature"], t = np.float32([[0.5, 1.5, 3.0], [2.0, 1.0, 4.0]])
    product = a["hidden"] @ a["kernel"]
    whole = (product + a["bias"]) / a["temperature"][:, None]
    x, bare = linear(a), jaxce.LinearLogits(a["hidden"], a["kernel"])
    mask, order = np.array([True, False, True]), np.array([2, 0])
    indices = (slice(1, None), (slice(1, None), slice(None)), (..., slice(None)), mask, order, None, 1)

    @quick
    def materialized() -> Any:
        return [v.materialize() for v in (x, *(x[index] for index in indices), x / t[:, None], bare / t[:, None] / 2)]

    right = [whole, *(whole[index] for index in indices), whole / t[:, None], product / t[:, None] / 2]
    close(materialized(), right, rtol=1e-6, atol=1e-6)
    twice = np.stack([t, 2 * t])

    @quick
    def losses(hidden: Any, labels: Any, temperature: Any) -> Any:
        return integer(jaxce.LinearLogits(hidden, a["kernel"], temperature=temperature, block_size=4), labels)

    at_once = losses(np.stack([a["hidden"]] * 2), np.stack([LABELS] * 2), twice)
    close(at_once, np.stack([losses(a["hidden"], LABELS, s) for s in twice]), rtol=1e-6, atol=1e-6)
    assert repr(bare / t[:, None]).endswith("temperature=float32[3])")
    for call, error, message in [
        (
            lambda: x / t,
            ValueError,
            r"a scalar or have one number per row and an axis of length 1, \(3, 1\), got float32",
        ),
        (
            lambda: x + a["bias"],
            TypeError,
            "a temperature for each row must stay as it is; to add a bias .* give bias=",
        ),
        (
            lambda: linear(a | {"temperature": t[:2]}),
            ValueError,
            r"temperature must be a scalar or have one .* \(3,\), got",
        ),
        (lambda: jaxce.softmax_cross_entropy_of_pairs(x), ValueError, "logits must have one temperature for all rows"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_temperatures_and_biases_by_operators() -> None:
    a = arguments()
    del a["soft_cap"]
    more = jnp.cos(jnp.arange(V, dtype="float32"))
    for x in (linear(a), linear({n: a[n] for n in ("hidden", "kernel")})):
        whole = x.materialize()
        for got, right in [
            (x / 3, whole / 3),
            (x / jnp.float32(3), whole / 3),
            (x + more, whole + more[None]),
            (more + x, whole + more[None]),
            (x - more, whole - more[None]),
            (x + 2, whole + 2),
            (jnp.float32(2) + x, whole + 2),
            (np.asarray(more) + x / 2, whole / 2 + more[None]),
        ]:
            assert isinstance(got, jaxce.LinearLogits)
            close(got.materialize(), right, rtol=1e-5, atol=1e-6)  # a temperature divides after the bias is added
    half = jaxce.LinearLogits(jnp.zeros((1, 2), "bfloat16"), jnp.zeros((2, 3), "bfloat16")) / 0.07
    bias = jnp.array([9.8125, 1, -3], "bfloat16")  # by how much the temperature multiplies it isn't rounded to 16 bits
    close((half + bias).materialize()[0], bias.astype("float32"), rtol=2.0**-22, atol=0)


def test_what_operators_refuse() -> None:
    x, capped = jaxce.LinearLogits(H, W), jaxce.LinearLogits(H, W, soft_cap=2.0)
    for call, error, message in [
        (lambda: x[..., 0], IndexError, "an index must leave the axis of classes whole, .* give LinearLogits a part"),
        (lambda: x[:, :2], IndexError, "an index must leave the axis of classes whole"),
        (lambda: x[0, 0, 0], IndexError, "an index must leave the axis of classes whole"),
        (lambda: x + W[:, 0], ValueError, "bias must be a scalar or have one number per class"),
        (lambda: x - W[:, 0], ValueError, "bias must be a scalar or have one number per class"),
        (lambda: x / 0, ValueError, "temperature must be a positive number"),
        (lambda: x / x, TypeError, "temperature must be a positive number, got LinearLogits"),
        (lambda: x / W[0], ValueError, "temperature must be a scalar or have one number per row and an axis"),
        (lambda: capped / 2, TypeError, "give temperature="),
        (lambda: capped + W[0], TypeError, "give bias="),
        (lambda: W[0] + capped, TypeError, "give bias="),
        (lambda: capped - 1, TypeError, "give bias="),
        (lambda: np.asarray(x), TypeError, "made an array by materialize()"),
        (lambda: jnp.asarray(x), TypeError, "made an array by materialize()"),
    ]:
        with pytest.raises(error, match=message if error is IndexError else f"^LinearLogits: .*{message}"):
            call()
    with pytest.raises(TypeError, match="not iterable"):
        list(x)


# --- memory -----------------------------------------------------------------------------------------------------------


def sizes(jaxpr: Any) -> Iterator[int]:
    """The number of elements of every value inside, of the inner programs too."""
    for equation in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape"))
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


ROWS, FEATURES, CLASSES, BLOCK = 512, 8, 4099, 64  # 4099 is prime
MIXED = "bfloat16", "float32"


@pytest.mark.parametrize(
    ("mode", "class_axis"),
    [
        *(("value", 0), ("gradient", 0), ("gradient", -1)),
        *(
            pytest.param(*p, marks=pytest.mark.slow)
            for p in [("value", -1), *((m, a) for m in ("jvp", "hvp 0", "hvp 1", "hvp 2") for a in (-1, 0))]
        ),
    ],
)
def test_no_array_of_all_logits(mode: str, class_axis: int) -> None:
    """A block and the kernel have 1/64 of the logits each: a derivative holds a few of either, a second one some more."""
    hidden = jnp.ones((ROWS, FEATURES))
    kernel = jnp.ones((FEATURES, CLASSES) if class_axis == -1 else (CLASSES, FEATURES))
    labels = jnp.zeros(ROWS, "int32")

    def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        x = jaxce.LinearLogits(hidden, kernel, class_axis=class_axis, block_size=BLOCK)
        where = jnp.arange(CLASSES)[None] > 3
        return jnp.sum(sum(jaxce.softmax_statistics(x, labels, where=where)[:3]))

    gradient = jax.grad(loss, (0, 1))
    args = (hidden, kernel)

    def dot(pair: Any) -> jax.Array:
        return sum((jnp.sum(g) for g in pair), jnp.zeros(()))

    program = {
        "value": loss,
        "gradient": gradient,
        "jvp": lambda *a: jax.jvp(loss, a, args)[1],
        "hvp 0": lambda *a: jax.jvp(gradient, a, args)[1],
        "hvp 1": lambda *a: jax.grad(lambda *a: jax.jvp(loss, a, args)[1], (0, 1))(*a),
        "hvp 2": lambda *a: jax.grad(lambda *a: dot(gradient(*a)), (0, 1))(*a),
    }[mode]
    assert max(sizes(jax.make_jaxpr(program)(*args).jaxpr)) <= 2 * ROWS * BLOCK
    temporary = jax.jit(program).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert temporary <= 4 * ROWS * CLASSES * (0.3 if mode.startswith("hvp") else 0.15)


OPTIONS = jax.checkpoint_policies
POLICIES = {
    "dots_saveable": OPTIONS.dots_saveable,
    "dots_with_no_batch_dims_saveable": OPTIONS.dots_with_no_batch_dims_saveable,
    "offload_dot_with_no_batch_dims": OPTIONS.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "save_only_these_names": OPTIONS.save_only_these_names("some"),
    "save_any_names_but_these": OPTIONS.save_any_names_but_these("some"),
    "save_from_both_policies": OPTIONS.save_from_both_policies(
        OPTIONS.dots_saveable, OPTIONS.save_only_these_names("some")
    ),
}
"""Those of `jax.checkpoint_policies` that keep products or what has a name; the others keep nothing, or everything."""
CONTEXTS: dict[str, Function] = {  # of a mean, and where it is then called
    "plain": lambda f: f,
    "scan": lambda f: lambda h, w: jax.lax.scan(lambda c, h: (c + f(h, w), None), 0.0, jnp.stack([h, h]))[0],
    "vmap": lambda f: lambda h, w: jnp.sum(jax.vmap(f, (0, None))(jnp.stack([h, h]), w)),
}


@pytest.mark.parametrize(
    ("policy", "context", "dtypes"),
    [
        ("dots_saveable", "scan", ("float32", "float32")),
        *(pytest.param(p, "vmap", ("float32", "float32"), marks=pytest.mark.slow) for p in POLICIES),
        *(pytest.param("dots_saveable", "plain", d, marks=pytest.mark.slow) for d in (("bfloat16",) * 2, MIXED)),
    ],
)
def test_a_policy_of_checkpoint_changes_nothing(policy: str, context: str, dtypes: tuple[str, str]) -> None:
    """It finds no product and no name to keep: the programs are those without one, so are their temporaries."""
    hidden, kernel = jnp.ones((ROWS, FEATURES), dtypes[0]), jnp.ones((FEATURES, CLASSES), dtypes[1])

    def program(policy: Any) -> str:
        def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
            return jnp.sum(integer(jaxce.LinearLogits(hidden, kernel, block_size=BLOCK), jnp.zeros(ROWS, "int32")))

        f = CONTEXTS[context](jax.checkpoint(loss, policy=policy))

        def orders(*args: jax.Array) -> Any:
            along = jax.value_and_grad(lambda *args: jax.jvp(f, args, args)[1], (0, 1))
            return jax.jvp(jax.value_and_grad(f, (0, 1)), args, args), along(*args)

        return jax.jit(orders).lower(hidden, kernel).as_text()

    assert program(POLICIES[policy]) == program(None)


@pytest.mark.parametrize(
    ("mode", "class_axis", "dtypes"),
    [
        ("jvp", 0, ("float32", "float32")),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                *((m, 0, ("float32", "float32")) for m in ("value", "gradient", "hvp")),
                *((m, -1, d) for m in ("value", "gradient", "jvp", "hvp") for d in (("bfloat16",) * 2, MIXED)),
            )
        ),
    ],
)
def test_temporaries_of_the_default_blocks(mode: str, class_axis: int, dtypes: tuple[str, str]) -> None:
    """In parts of the logits: a block has an eighth of them, and its tangent or its derivative is another block.

    XLA:CPU multiplies bfloat16 as float32: there it holds copies, too.
    """
    rows, features, classes = 2048, 64, 16384
    hidden = jnp.ones((rows, features), dtypes[0])
    kernel = jnp.ones((features, classes) if class_axis == -1 else (classes, features), dtypes[1])

    def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(integer(jaxce.LinearLogits(hidden, kernel, class_axis=class_axis), jnp.zeros(rows, "int32")))

    gradient = jax.grad(loss, (0, 1))
    program, limit = {
        "value": (loss, 0.2),
        "gradient": (gradient, 0.25),
        "jvp": (lambda *args: jax.jvp(loss, args, args)[1], 0.35),
        "hvp": (lambda *args: jax.jvp(gradient, args, args)[1], 0.7),
    }[mode]
    memory = jax.jit(program).lower(hidden, kernel).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 4 * rows * classes * limit


@pytest.mark.parametrize(("classes", "block_size"), [(110, 50), (110, 55), (109, 60)])
@pytest.mark.parametrize(("by", "products"), [((0, 1), 4), (0, 3), (1, 3)])
def test_a_block_outside_of_the_loop_is_multiplied_again(by: Any, products: int, classes: int, block_size: int) -> None:
    """Else its logits would be kept from the loss for the gradient. A loop has the code of one block."""

    def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(integer(jaxce.LinearLogits(hidden, kernel, block_size=block_size), jnp.zeros(8, "int32")))

    program = jax.jit(jax.grad(loss, by)).lower(jnp.ones((8, 64)), jnp.ones((64, classes))).compile()
    all_in_loop = block_size == 55 and by != 0  # of the gradient, whose tangents are cut into equal blocks
    assert program.as_text().count(" dot(") == 2 * products - (products - 1) * all_in_loop


def test_losses_of_classes_that_fit_nowhere() -> None:
    """2^18 rows of 2^18 classes would be 256 GiB of logits: it compiles into a program with less than 1/400 of it."""
    shapes = jax.ShapeDtypeStruct((2**18, 8), "float32"), jax.ShapeDtypeStruct((8, 2**18), "float32")
    labels = jax.ShapeDtypeStruct((2**18,), "int32")
    program = jax.grad(lambda h, w, y: jnp.sum(integer(jaxce.LinearLogits(h, w), y)), (0, 1))
    memory = quick(program).lower(*shapes, labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 2**36 / 400


# --- wrong arguments --------------------------------------------------------------------------------------------------


H, W = jnp.ones((2, 3)), jnp.ones((3, 5))
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": jnp.ones((2, 3), "int32")}, TypeError, "hidden"),
    ({"hidden": jnp.ones(())}, ValueError, "hidden"),
    ({"kernel": jnp.ones((3, 5), "int32")}, TypeError, "kernel"),
    ({"kernel": jnp.ones(3)}, ValueError, "kernel"),
    ({"kernel": jnp.ones((5, 3))}, ValueError, "kernel"),
    ({"kernel": jnp.ones((3, 0))}, ValueError, "kernel"),
    ({"class_axis": 0}, ValueError, "kernel"),
    ({"class_axis": 2}, ValueError, "class_axis"),
    ({"bias": jnp.ones(3)}, ValueError, "bias"),
    ({"bias": jnp.ones(5, "int32")}, TypeError, "bias"),
    ({"soft_cap": 0.0}, ValueError, "soft_cap"),
    ({"soft_cap": jnp.ones(2)}, ValueError, "soft_cap"),
    ({"soft_cap": np.array([None])}, TypeError, "soft_cap"),
    ({"temperature": -1.0}, ValueError, "temperature"),
    ({"temperature": "hot"}, TypeError, "temperature"),
    ({"block_size": 0}, ValueError, "block_size"),
    ({"block_size": 2.5}, ValueError, "block_size"),
    ({"axis_name": 0}, ValueError, "axis_name"),
    ({"axis_name": ("a", "a")}, ValueError, "axis_name"),
]


@pytest.mark.parametrize(("wrong", "error", "argument"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], argument: str) -> None:
    with pytest.raises(error) as caught:
        jaxce.LinearLogits(**({"hidden": H, "kernel": W} | wrong))
    assert str(caught.value).startswith(f"LinearLogits: {argument} must ") and ", got " in str(caught.value)


def test_wrong_arguments_of_sharded_logits() -> None:
    for args, error, argument in [
        ((jnp.ones((2, 3), "int32"), "model"), TypeError, "logits"),
        ((jnp.ones(()), "model"), ValueError, "logits"),
        ((W, None), ValueError, "axis_name"),
        ((W, ()), ValueError, "axis_name"),
    ]:
        with pytest.raises(error) as caught:
            jaxce.ShardedLogits(*args)
        assert str(caught.value).startswith(f"ShardedLogits: {argument} must ") and ", got " in str(caught.value)
    for logits in (jaxce.ShardedLogits(W, "model"), jaxce.LinearLogits(H, W, axis_name=("data", "model"))):
        with pytest.raises(ValueError, match="^logsumexp: axis_name must be an axis that is mapped .*, got .*model"):
            jaxce.logsumexp(logits)  # outside of a shard_map


def test_wrong_arguments_of_losses() -> None:
    x = jaxce.LinearLogits(H, W)
    for call, start in [
        (lambda: integer(x, jnp.zeros(3, "int32")), "softmax_cross_entropy_with_integer_labels: labels "),
        (lambda: integer(x, jnp.zeros(2, "int32"), axis=0), "softmax_cross_entropy_with_integer_labels: axis "),
        (lambda: jaxce.logsumexp(x, where=jnp.ones(3, bool)), "logsumexp: where "),
        (lambda: jaxce.softmax_cross_entropy(x, W[:2, :4]), "softmax_cross_entropy: labels "),
        (lambda: jaxce.relative_entropy_with_logits(x, W), "relative_entropy_with_logits: q_logits "),
    ]:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(start)


def test_repr() -> None:
    x = jaxce.LinearLogits(H, W.T, class_axis=0, bias=jnp.zeros(5), soft_cap=30.0)
    expected = (
        "LinearLogits(float32[2,5] from hidden float32[2,3], kernel float32[5,3], bias, class_axis=0, soft_cap=30.0)"
    )
    assert repr(x) == expected
    sharded = jaxce.ShardedLogits(W, ("data", "model"))
    assert repr(sharded) == "ShardedLogits(float32[3,5] of each device, axis_name=('data', 'model'))"
    for x in (sharded, jaxce.LinearLogits(H, W, axis_name="model")):
        name = type(x).__name__
        assert name in repr(jax.tree.map(lambda _: None, x)) and name in repr(jax.tree.structure(x))


@pytest.mark.parametrize(
    ("classes", "size", "equal"),
    [
        *((1_000_000, 3072, 2000), (128256, 8192, 8016), (12, 4, 4), (12, 5, 4), (12, 3, 2)),
        *((classes, size, size) for classes, size in ((14, 7), (50257, 8192), (51865, 8192))),
    ],
)
def test_blocks_of_one_size(classes: int, size: int, equal: int) -> None:
    """The largest even one that divides the classes, if possible of whole tiles, from half of the size; else the size."""
    assert _passes._even(Spec(np.dtype("float32"), classes, size=size)) == equal


def test_axes_of_rows_cost_no_more_than_one() -> None:
    """Of hidden states [batch, length, features] and a kernel [features, classes], as a language model has them."""

    def temporaries(*batch: int) -> int:
        def mean(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
            logits = jaxce.LinearLogits(hidden, kernel, block_size=1024)
            return jaxce.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        shapes = ((*batch, 32), "float32"), ((32, 8192), "float32"), (batch, "int32")
        gradient = jax.jit(jax.grad(mean, (0, 1))).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        return gradient.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4, 64) <= 1.05 * temporaries(256)
