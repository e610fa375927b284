"""Derivatives of the losses from logits by everything that they depend on, to second order, with each mixed one.

By logits, dense labels, weights of labels and of classes, options, and what `LinearLogits` are made of: against the plain
formulas in float64, where many of these are 0, which is a number like any other. And rows that don't count have no part in
any of them, whether a mask or whatever is made of the losses leaves them out, also if their loss is infinite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gradient_and_hessian

import jaxce

Inputs = dict[str, Any]
RNG = np.random.default_rng(0)
INF = np.inf
N, K, D = 4, 5, 3
X = np.concatenate([2 * RNG.normal(size=(N - 1, K)), [[0.5, 1, 9, -1, 0]]])
OTHER = 2 * RNG.normal(size=(N, K))
Y = np.array([0, 3, 4, 2])
SPARSE = np.stack([Y, (Y + 1) % K, (Y + 3) % K], -1)
T = np.array([[0.5, 0.25, 0, 0.25, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0.75, 0.25, 0, 0]])
S = np.array([[1, 0, 0], [0.5, 0.5, 0], [0, 0.25, 0.75], [0, 0, 0]])
W = np.array([1, 0, 2, 0.5, 0])
HIDDEN, KERNEL, BIAS = RNG.normal(size=(N, D)), RNG.normal(size=(D, K)), RNG.normal(size=K)
HIDDEN[0, 1] = KERNEL[1, 2] = 0


class Case(NamedTuple):
    """The losses of logits and of other inputs, by the library and by the plain formula, and those inputs."""

    loss: Callable[..., jax.Array]
    plain: Callable[..., jax.Array]
    inputs: Inputs


def plain(x: jax.Array, t: jax.Array, w: Any, term: Callable[..., jax.Array], a: Any = 0.0, z: Any = 0.0) -> jax.Array:
    """sum_k ((1 - a) t_k + a / K) w_k term(-log p_k) + z logsumexp^2."""
    cost = term(-jax.nn.log_softmax(x))
    return jnp.sum(((1 - a) * t + a / K) * w * cost, -1) + z * jax.nn.logsumexp(x, -1) ** 2


def identity(cost: jax.Array) -> jax.Array:
    return cost


def one_hot(y: Any) -> Any:
    return jax.nn.one_hot(y, K, dtype=float)


def focal(gamma: Any) -> Callable[[jax.Array], jax.Array]:
    return lambda cost: (-jnp.expm1(-cost)) ** gamma * cost


def poly(epsilon: Any) -> Callable[[jax.Array], jax.Array]:
    return lambda cost: cost - epsilon * jnp.expm1(-cost)


def kl(x: jax.Array, o: jax.Array) -> jax.Array:
    return jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - jax.nn.log_softmax(o)), -1)


def js(x: jax.Array, o: jax.Array) -> jax.Array:
    p, q = jax.nn.softmax(x), jax.nn.softmax(o)
    return jnp.sum(p * jnp.log(p) + q * jnp.log(q) - (p + q) * jnp.log((p + q) / 2), -1) / 2


integer = jaxce.softmax_cross_entropy_with_integer_labels
sparse = jaxce.softmax_cross_entropy_with_sparse_labels
MODIFIERS: Inputs = {"w": W, "a": 0.0, "z": 0.0}
CASES = {
    "integer": Case(
        lambda x, y=Y, **m: integer(x, y, **options(m)),
        lambda x, w, a, z: plain(x, one_hot(Y), w, identity, a, z),
        MODIFIERS,
    ),
    "dense": Case(
        lambda x, t, **m: jaxce.softmax_cross_entropy(x, t, **options(m)),
        lambda x, t, w, a, z: plain(x, t, w, identity, a, z),
        {"t": T, **MODIFIERS},
    ),
    "sparse": Case(
        lambda x, s, y=SPARSE, **m: sparse(x, y, s, **options(m)),
        lambda x, s, w, a, z: plain(x, jnp.sum(one_hot(SPARSE) * s[..., None], -2), w, identity, a, z),
        {"s": S, **MODIFIERS},
    ),
    "focal, integer": Case(
        lambda x, gamma, w, y=Y: jaxce.softmax_focal_loss(x, y, gamma=gamma, class_weights=w),
        lambda x, gamma, w: plain(x, one_hot(Y), w, focal(gamma)),
        {"gamma": 2.0, "w": W},
    ),
    "focal, dense": Case(
        lambda x, t, gamma, w: jaxce.softmax_focal_loss(x, t, gamma=gamma, class_weights=w),
        lambda x, t, gamma, w: plain(x, t, w, focal(gamma)),
        {"t": T, "gamma": 2.0, "w": W},
    ),
    "poly, integer": Case(
        lambda x, epsilon, w, y=Y: jaxce.poly_loss_cross_entropy(x, y, epsilon=epsilon, class_weights=w),
        lambda x, epsilon, w: plain(x, one_hot(Y), w, poly(epsilon)),
        {"epsilon": 0.0, "w": W},
    ),
    "poly, dense": Case(
        lambda x, t, epsilon, w: jaxce.poly_loss_cross_entropy(x, t, epsilon=epsilon, class_weights=w),
        lambda x, t, epsilon, w: plain(x, t, w, poly(epsilon)),
        {"t": T, "epsilon": 0.0, "w": W},
    ),
    "relative entropy": Case(lambda x, o: jaxce.relative_entropy_with_logits(x, o), kl, {"o": OTHER}),
    "cross-entropy": Case(
        lambda x, o: jaxce.cross_entropy_with_logits(x, o),
        lambda x, o: -jnp.sum(jax.nn.softmax(x) * jax.nn.log_softmax(o), -1),
        {"o": OTHER},
    ),
    "Jensen-Shannon": Case(lambda x, o: jaxce.jensen_shannon_divergence_with_logits(x, o), js, {"o": OTHER}),
    "entropy": Case(jaxce.entropy_with_logits, lambda x: kl(x, jnp.zeros_like(x)) * -1 + np.log(K), {}),
    "log_softmax": Case(
        lambda x, t: jnp.sum(t * jaxce.log_softmax(x), -1),
        lambda x, t: jnp.sum(t * jax.nn.log_softmax(x), -1),
        {"t": T},
    ),
}


def options(m: Inputs) -> Inputs:
    return {{"w": "class_weights", "a": "label_smoothing", "z": "z_loss"}[n]: v for n, v in m.items()}


def linear(parts: Inputs) -> Any:
    return jaxce.LinearLogits(
        parts["h"], parts["W"], bias=parts["b"], temperature=parts["T"], soft_cap=parts["c"], block_size=2
    )


def plain_linear(parts: Inputs) -> jax.Array:
    return parts["c"] * jnp.tanh((parts["h"] @ parts["W"] + parts["b"]) / (parts["T"] * parts["c"]))


LINEAR: Inputs = {"h": HIDDEN, "W": KERNEL, "b": BIAS, "T": 0.75, "c": 4.0}
SLOW = {
    "array": {"focal, integer", "poly, dense"},  # the other labels of the same loss are quick
    "linear": CASES.keys() - {"integer", "focal, dense"},
}
KINDS = [pytest.param(k, name, marks=pytest.mark.slow if name in SLOW[k] else ()) for k in SLOW for name in CASES]


def derivatives(total: Callable[[Inputs], jax.Array], inputs: Inputs, dtype: Any) -> Any:
    return gradient_and_hessian(total, jax.tree.map(lambda v: np.asarray(v, dtype), inputs))


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_by_everything(kind: str, name: str) -> None:
    case = CASES[name]
    weights = np.array([1, 0.5, 2, -1])  # of the rows
    inputs = {"x": X if kind == "array" else LINEAR, **case.inputs}

    def total(loss: Any, make: Any, inputs: Inputs) -> jax.Array:
        return jnp.sum(
            weights.astype(jnp.float32) * loss(make(inputs["x"]), **{n: v for n, v in inputs.items() if n != "x"})
        )

    makers = (lambda x: x, lambda x: x) if kind == "array" else (linear, plain_linear)
    got = derivatives(lambda i: total(case.loss, makers[0], i), inputs, jnp.float32)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exact = derivatives(lambda i: total(case.plain, makers[1], i), inputs, jnp.float64)
    # Entries are sums over rows and classes of numbers around 1 to 100, of which some cancel.
    chex.assert_trees_all_close(got, exact, rtol=2e-5, atol=2e-5)


def infinite(case: Case) -> Inputs:
    """Inputs of which the second and the last row have an infinite loss: their labels, or whatever else, are at -inf."""
    x = np.where((np.arange(N)[:, None] % 2 == 1) & (np.arange(K) > 1), -INF, X)
    x[:, 0] = np.where(np.arange(N) % 2, 1, x[:, 0])
    inputs = {"x": x, **case.inputs}
    for n in inputs.keys() & {"t", "s"}:
        inputs[n] = np.where(inputs[n] == 0, 0.25, inputs[n])
    return inputs


NEVER_INFINITE = "entropy", "log_softmax", "Jensen-Shannon"
QUICK = "integer", "dense", "sparse", "relative entropy"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES if n not in NEVER_INFINITE]
)
def test_rows_left_out_after_the_loss(name: str) -> None:
    """Rows whose loss is +inf have no part in a derivative of what is made of the others."""
    case, some = CASES[name], np.arange(N) % 2 == 0
    inputs = infinite(case)
    inputs = {n: np.where(v == 0, 0.5, v) for n, v in inputs.items()}
    if "o" in inputs:  # absent in q alone
        inputs["x"], inputs["o"] = X, np.where(np.isinf(inputs["x"]), -INF, OTHER)
    of_rows = [n for n in inputs if np.ndim(inputs[n]) == 2]
    rows_of_labels = {} if "y" not in case.loss.__code__.co_varnames else {"y": SPARSE if "s" in inputs else Y}

    def losses(inputs: Inputs, labels: Inputs) -> jax.Array:
        return case.loss(**inputs, **labels)

    def left_out(inputs: Inputs) -> jax.Array:
        found = losses(inputs, rows_of_labels)
        return jnp.sum(jnp.where(some, found, 0))

    def cut(inputs: Inputs) -> jax.Array:
        of_some = {n: v[some] if n in of_rows else v for n, v in inputs.items()}
        return jnp.sum(losses(of_some, {n: v[some] for n, v in rows_of_labels.items()}))

    if rows_of_labels:
        rows_of_labels = {
            n: np.where(np.isinf(inputs["x"]).any(-1).reshape(-1, *[1] * (v.ndim - 1)), 2, v)
            for n, v in rows_of_labels.items()
        }
    assert not np.any(
        np.isfinite(losses({n: jnp.asarray(v, jnp.float32) for n, v in inputs.items()}, rows_of_labels)[1::2])
    )
    got, expected = (derivatives(total, inputs, jnp.float32) for total in (left_out, cut))
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
