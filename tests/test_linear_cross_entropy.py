"""The mean loss whose gradient is formed in its own pass: the mean of the losses, and Optax's of an array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxce

EXAMPLES, FEATURES, CLASSES = 7, 5, 11
Arrays = dict[str, jax.Array]


def arguments(dtype: str = "float64", class_axis: int = -1, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(FEATURES, CLASSES))
    values = {
        "hidden": rng.normal(size=(EXAMPLES, FEATURES)),
        "kernel": kernel.T if class_axis == 0 else kernel,
        "bias": rng.normal(size=CLASSES),
        "temperature": 1.3,
        "soft_cap": 4.0,
        "weights": np.array([1.0, 2.0, 0.5, 0.0, 1.0, -1.0, 3.0]),
        "class_weights": rng.uniform(size=CLASSES),
    }
    return {name: jnp.asarray(value, dtype) for name, value in values.items()}


LABELS = jnp.array([0, 1, 2, -100, 4, 5, 10])
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01}


def fused(a: Arrays, class_axis: int = -1, chunk_size: int | None = 3) -> jax.Array:
    shape = {name: a[name] for name in ("bias", "temperature", "soft_cap")}
    logits = jaxce.LinearLogits(a["hidden"], a["kernel"], class_axis=class_axis, block_size=4, **shape)
    options = OPTIONS | {"class_weights": a["class_weights"], "chunk_size": chunk_size}
    return jaxce.linear_cross_entropy(logits, LABELS, a["weights"], **options)


def plain(a: Arrays, class_axis: int = -1) -> jax.Array:
    """The formulas, on the logits as an array."""
    x = (a["hidden"] @ (a["kernel"].T if class_axis == 0 else a["kernel"]) + a["bias"][None]) / a["temperature"]
    log_p = jax.nn.log_softmax(a["soft_cap"] * jnp.tanh(x / a["soft_cap"]))
    log_sum = jax.nn.logsumexp(a["soft_cap"] * jnp.tanh(x / a["soft_cap"]), axis=-1)
    one_hot = jax.nn.one_hot(LABELS, CLASSES, dtype=x.dtype)
    targets = (1 - OPTIONS["label_smoothing"]) * one_hot + OPTIONS["label_smoothing"] / CLASSES
    losses = -jnp.sum(a["class_weights"][None] * targets * log_p, -1) + OPTIONS["z_loss"] * log_sum**2
    return jnp.sum(jnp.where(a["weights"] == 0, 0, a["weights"] * losses)) / jnp.sum(a["weights"])


def close(got: Any, expected: Any, rtol: float = 1e-12, atol: float = 1e-14) -> None:
    """float64: what a few sums of some ten terms lose."""
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol)


def counted(gradient: Arrays) -> Arrays:
    """Without the derivative by the weight of the row that takes no part: its loss is 0 here, and computed there."""
    return gradient | {"weights": jnp.delete(gradient["weights"], 3)}


@pytest.mark.parametrize(
    ("chunk_size", "class_axis"),
    [(3, -1), (None, 0), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((3, 0), (None, -1), (1, -1), (1, 0)))],
)
def test_value_and_gradient(chunk_size: int | None, class_axis: int) -> None:
    with jax.enable_x64(True):
        a = arguments(class_axis=class_axis)
        value, gradient = jax.jit(jax.value_and_grad(lambda a: fused(a, class_axis, chunk_size)))(a)
        expected, by_formula = jax.value_and_grad(lambda a: plain(a, class_axis))(a)
        close(value, expected)
        close(counted(gradient), counted(by_formula))


def test_it_is_optax_on_the_product() -> None:
    rng = np.random.default_rng(1)
    hidden, kernel = jnp.asarray(rng.normal(size=(70, 9)), "float32"), jnp.asarray(rng.normal(size=(9, 300)), "float32")
    labels = jnp.asarray(rng.integers(300, size=(10, 7)))

    def ours(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return jaxce.linear_cross_entropy(
            jaxce.LinearLogits(hidden.reshape(10, 7, 9), kernel), labels, normalizer=jnp.array(35), chunk_size=16
        )

    def theirs(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels.reshape(-1))
        return losses.sum() / 35

    got, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, kernel) for f in (ours, theirs))
    close(got, expected, rtol=1e-5, atol=2e-6)  # float32 sums in different orders


@pytest.mark.slow
def test_derivatives_in_all_modes_and_orders() -> None:
    with jax.enable_x64(True):
        fixed = arguments()
        a = {name: value for name, value in fixed.items() if name != "weights"}
        direction = {name: value for name, value in arguments(seed=1).items() if name != "weights"}

        def orders(function: Callable[[Arrays], jax.Array]) -> Any:
            def f(a: Arrays) -> jax.Array:
                return function(fixed | a)

            def along(a: Arrays) -> jax.Array:
                return jax.jvp(f, (a,), (direction,))[1]

            return {
                "forward": along(a),
                "forward over reverse": jax.jvp(jax.grad(f), (a,), (direction,))[1],
                "reverse over forward": jax.grad(along)(a),
                "reverse over reverse": jax.grad(
                    lambda a: sum(jnp.vdot(g, direction[name]) for name, g in jax.grad(f)(a).items())
                )(a),
            }

        quickly = jax.jit(lambda: orders(fused), compiler_options={"xla_backend_optimization_level": 0})
        close(quickly(), orders(plain), rtol=1e-10, atol=1e-12)


def test_vmap_over_hidden_states_and_kernels() -> None:
    with jax.enable_x64(True):
        a = arguments()
        several = {name: jnp.stack([a[name], 0.5 * a[name]]) for name in ("hidden", "kernel")}
        both = jax.value_and_grad(lambda varying: fused(a | varying))
        single = [both({name: value[i] for name, value in several.items()}) for i in range(2)]
        close(jax.vmap(both)(several), jax.tree.map(lambda *leaves: jnp.stack(leaves), *single))


def test_a_row_of_weight_0_may_hold_anything() -> None:
    a = arguments("float32")
    spoiled = a | {"hidden": a["hidden"].at[3].set(jnp.nan)}
    got, expected = jax.value_and_grad(fused)(spoiled), jax.value_and_grad(fused)(a)
    close(got, expected, rtol=0, atol=0)
    masked = {n: a[n] for n in ("hidden", "kernel")}
    nothing = jax.grad(lambda m: fused(a | m | {"weights": jnp.zeros(EXAMPLES)}))(masked)
    assert all(not jnp.any(g) for g in nothing.values())


def test_half_precision_is_summed_in_float32() -> None:
    """Ten thousand equal parts of a kernel's gradient: a bfloat16 sum would stop growing at 2^8 of them."""
    hidden, kernel = jnp.ones((10_000, 1), "bfloat16"), jnp.zeros((1, 2), "bfloat16")
    labels = jnp.zeros(10_000, "int32")
    gradient = jax.jit(
        jax.grad(lambda k: jaxce.linear_cross_entropy(jaxce.LinearLogits(hidden, k), labels, chunk_size=7))
    )(kernel)
    assert gradient.dtype == "bfloat16"
    close(gradient, np.array([[-0.5, 0.5]]), rtol=0, atol=0)


def test_memory_is_a_chunk_and_the_gradient() -> None:
    n, d, v, chunk = 512, 8, 4096, 32
    arrays = jax.ShapeDtypeStruct((n, d), "float32"), jax.ShapeDtypeStruct((d, v), "float32")
    labels = jax.ShapeDtypeStruct((n,), "int32")

    def loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return jaxce.linear_cross_entropy(jaxce.LinearLogits(hidden, kernel), labels, chunk_size=chunk)

    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays, labels).compile()
    temporary = program.memory_analysis().temp_size_in_bytes
    # Two arrays of a chunk's logits and the gradients, twice for what is small: far from the logits of all examples.
    assert temporary < 2 * 4 * (2 * chunk * v + n * d + d * v) < 4 * n * v / 3


def test_an_empty_batch() -> None:
    def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return jaxce.linear_cross_entropy(jaxce.LinearLogits(hidden, kernel), jnp.zeros((0,), "int32"))

    value, (by_hidden, by_kernel) = jax.value_and_grad(loss, (0, 1))(jnp.ones((0, 2)), jnp.ones((2, 3)))
    assert value == 0 and by_hidden.shape == (0, 2) and not jnp.any(by_kernel)


@pytest.mark.parametrize(
    ("wrong", "error", "argument"),
    [
        ({"logits": jnp.zeros((2, 3))}, TypeError, "logits"),
        ({"labels": jnp.zeros(2)}, TypeError, "labels"),
        ({"labels": jnp.zeros(3, "int32")}, ValueError, "labels"),
        ({"weights": jnp.zeros(3)}, ValueError, "weights"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing"),
        ({"class_weights": jnp.zeros(2)}, ValueError, "class_weights"),
        ({"z_loss": float("nan")}, ValueError, "z_loss"),
        ({"normalizer": jnp.zeros(2)}, ValueError, "normalizer"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], argument: str) -> None:
    right = {"logits": jaxce.LinearLogits(jnp.zeros((2, 4)), jnp.zeros((4, 3))), "labels": jnp.zeros(2, "int32")}
    with pytest.raises(error, match=f"(linear_cross_entropy|weighted_mean): .*{argument} must"):
        jaxce.linear_cross_entropy(**(right | wrong))


def test_wrong_options_of_sharded_classes() -> None:
    """Errors name the function that was called, also where it takes the losses of another."""

    def loss(kernel: jax.Array) -> jax.Array:
        logits = jaxce.LinearLogits(jnp.zeros((2, 4)), kernel, axis_name="parts")
        return jaxce.linear_cross_entropy(logits, jnp.zeros(2, "int32"), label_smoothing=2.0)

    with pytest.raises(ValueError, match="linear_cross_entropy: label_smoothing must"):
        jax.vmap(loss, axis_name="parts")(jnp.zeros((2, 4, 3)))
