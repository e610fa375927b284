"""The figures that textbooks and manuals print, as far as they print them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

FIGURES: list[tuple[str, Callable[[], Any], Any, float]] = [
    (
        "-ln 0.2, integer label",
        lambda: jaxce.categorical_cross_entropy_with_integer_labels(jnp.array([0.7, 0.2, 0.1]), 1),
        1.6094,
        5e-5,
    ),
    (
        "-ln 0.2, from logits",
        lambda: jaxce.softmax_cross_entropy_with_integer_labels(jnp.log(jnp.array([0.7, 0.2, 0.1])), 1),
        1.6094,
        5e-5,
    ),
    (
        "-ln 0.2, one-hot label",
        lambda: jaxce.softmax_cross_entropy(jnp.log(jnp.array([0.7, 0.2, 0.1])), jnp.array([0.0, 1.0, 0.0])),
        1.6094,
        5e-5,
    ),
    ("ln 2, a fair coin", lambda: jaxce.entropy(jnp.array([0.5, 0.5])), 0.6931, 5e-5),
    ("ln 2, no idea", lambda: jaxce.softmax_cross_entropy_with_integer_labels(jnp.zeros(2), 0), 0.6931, 5e-5),
    ("ln 2, binary", lambda: jaxce.sigmoid_binary_cross_entropy(jnp.array(0.0), jnp.array(1.0)), 0.6931, 5e-5),
    ("-log2 0.775", lambda: jaxce.surprisal(jnp.array(0.775), base=2), 0.3677, 5e-5),
    ("-log2 0.936", lambda: jaxce.surprisal(jnp.array(0.936), base=2), 0.0954, 5e-5),
    (
        "two rows, probabilities 0.1 and 0.5 at the label",
        lambda: jaxce.categorical_cross_entropy(
            jnp.array([[0.1, 0.9], [0.5, 0.5]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
        ),
        [2.30258509, 0.69314718],
        2e-7,
    ),
    ("-ln 0.7", lambda: jaxce.binary_cross_entropy(jnp.array(0.7), jnp.array(1.0)), 0.3567, 5e-5),
    ("-ln 0.7, nll", lambda: jaxce.nll(jnp.log(jnp.array([0.7, 0.2, 0.1])), 0), 0.3567, 5e-5),
    ("26 of 30 in bits", lambda: jaxce.entropy(jnp.array([26 / 30, 4 / 30]), base=2), 0.56651, 5e-6),
    ("14 of 30 in bits", lambda: jaxce.entropy(jnp.array([14 / 30, 16 / 30]), base=2), 0.9968, 5e-5),
    ("20 of 20", lambda: jaxce.entropy(jnp.array([1.0, 0.0]), base=2), 0.0, 0.0),
    ("one-hot entropy", lambda: jaxce.entropy(jnp.array([0.0, 0.0, 1.0, 0.0])), 0.0, 0.0),
    ("a die in bits", lambda: jaxce.entropy_with_logits(jnp.zeros(6), base=2), np.log2(6), 1e-6),
    ("perplexity of a die", lambda: jaxce.perplexity(jaxce.entropy_with_logits(jnp.zeros(6))), 6.0, 2e-6),
]


@pytest.mark.parametrize(("call", "expected", "tolerance"), [f[1:] for f in FIGURES], ids=[f[0] for f in FIGURES])
def test_figure(call: Callable[[], Any], expected: Any, tolerance: float) -> None:
    assert np.max(np.abs(np.asarray(call(), np.float64) - np.asarray(expected))) <= tolerance


def test_one_hot_target_makes_cross_entropy_the_divergence() -> None:
    p, q = jnp.array([0.0, 1.0, 0.0]), jnp.array([0.7, 0.2, 0.1])
    assert jaxce.cross_entropy(p, q) == jaxce.relative_entropy(p, q)
