"""Hessians of a batch at once: what one row of them is by itself, and what XLA makes of all rows together.

XLA:CPU of jaxlib 0.10.2 compiles ``p * (v - sum(p * v))`` wrongly where p is shared by a batch of v of a certain size, 5
rows of 48 classes among them. So the same Hessian is computed with `jax.vmap` and with `jax.lax.map`, and must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

ROWS, CLASSES = 5, 48
RNG = np.random.default_rng(0)
LABELS = jnp.asarray(RNG.integers(CLASSES, size=ROWS), "int32")
TARGETS = jaxce.smooth_labels(jax.nn.one_hot(LABELS, CLASSES), 0.3)
OTHER = jnp.asarray(RNG.normal(size=(ROWS, CLASSES)), "float32")

FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "integer": lambda x: jaxce.softmax_cross_entropy_with_integer_labels(x, LABELS),
    "dense": lambda x: jaxce.softmax_cross_entropy(x, TARGETS),
    "logsumexp": jaxce.logsumexp,
    "entropy": jaxce.entropy_with_logits,
    "cross-entropy by p": lambda x: jaxce.cross_entropy_with_logits(x, OTHER),
    "relative entropy by p": lambda x: jaxce.relative_entropy_with_logits(x, OTHER),
    "relative entropy by q": lambda x: jaxce.relative_entropy_with_logits(OTHER, x),
    "Jensen-Shannon": lambda x: jaxce.jensen_shannon_divergence_with_logits(x, OTHER),
}


@pytest.mark.parametrize(
    ("name", "order"),
    [("integer", "forward over reverse"), ("entropy", "reverse over reverse")]
    + [pytest.param(name, "forward over reverse", marks=pytest.mark.slow) for name in FUNCTIONS if name != "integer"]
    + [pytest.param(name, "reverse over reverse", marks=pytest.mark.slow) for name in ("integer", "dense")],
)
def test_hessian_by_vmap_is_hessian_by_map(name: str, order: str) -> None:
    def total(x: jax.Array) -> jax.Array:
        return FUNCTIONS[name](x).sum()

    def product(x: jax.Array, v: jax.Array) -> jax.Array:
        if order == "forward over reverse":
            return jax.jvp(jax.grad(total), (x,), (v,))[1]
        return jax.grad(lambda x: jnp.vdot(jax.grad(total)(x), v))(x)

    x = jnp.asarray(3 * RNG.normal(size=(ROWS, CLASSES)), "float32")
    directions = jnp.eye(ROWS * CLASSES).reshape(-1, ROWS, CLASSES)
    together: Any = jax.jit(lambda x: jax.vmap(lambda v: product(x, v))(directions))(x)
    one_by_one: Any = jax.jit(lambda x: jax.lax.map(lambda v: product(x, v), directions))(x)
    # Entries are at most 4 here; a wrong fusion is off by 0.1 and more.
    np.testing.assert_allclose(together, one_by_one, atol=2e-5)


# The ways to read a row: one by one, whole (twice), in blocks.
@pytest.mark.parametrize("classes", [10, *(pytest.param(k, marks=pytest.mark.slow) for k in (64, 97, 4096))])
def test_derivatives_in_a_batch_are_those_of_the_plain_formula(classes: int) -> None:
    rng = np.random.default_rng(classes)
    label, soft, v = rng.integers(classes), rng.dirichlet(np.ones(classes)), rng.normal(size=classes)
    pairs: list[tuple[Callable[[Any], Any], Callable[[Any], Any]]] = [
        (
            lambda x: jaxce.softmax_cross_entropy_with_integer_labels(x, label),
            lambda x: -jax.nn.log_softmax(x)[label],
        ),
        (lambda x: jaxce.softmax_cross_entropy(x, soft), lambda x: -jnp.vdot(soft, jax.nn.log_softmax(x))),
        (jaxce.entropy_with_logits, lambda x: -jnp.vdot(jax.nn.softmax(x), jax.nn.log_softmax(x))),
    ]
    with jax.enable_x64(True):
        x = jnp.asarray(2 * rng.normal(size=(3, classes)))
        for ours, plain in pairs:
            for derivative in (
                lambda f: lambda x: (f(x), jax.jvp(jax.grad(f), (x,), (v,))),
                lambda f: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v)),
            ):
                got, expected = (jax.jit(jax.vmap(derivative(f)))(x) for f in (ours, plain))
                # Some ulp of float64, in numbers of about 1.
                jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), got, expected)
