"""How many ulp float32 losses are off at worst in random rows, against float64, in which the formulas have digits to spare.

    python benchmarks/accuracy.py [--rows 100000] [--classes 3 10 33 100 200 1000]

Half of the labels are the first class, whose logit is from 3 below to 12 above that of the others' largest.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import jaxce


@jax.jit
def losses(x: jax.Array, labels: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    """The losses to measure."""
    return (
        jaxce.softmax_cross_entropy_with_integer_labels(x, labels),
        jaxce.softmax_cross_entropy(x, targets),
        jaxce.entropy_with_logits(x),
    )


def worst(rows: int, classes: int, rng: np.random.Generator) -> list[float]:
    """The largest error of each loss."""
    x = 3 * rng.normal(size=(rows, classes))
    x[:, 0] = x.max(-1) + rng.uniform(-3, 12, rows)
    x, targets = x.astype(np.float32), rng.dirichlet(np.ones(classes), rows).astype(np.float32)
    labels = np.where(np.arange(rows) % 2, rng.integers(0, classes, rows), 0)

    gaps = x.max(-1, keepdims=True).astype(np.float64) - x
    weights = np.exp(-gaps)
    others = weights.copy()
    others[np.arange(rows), x.argmax(-1)] = 0
    log_sum = np.log1p(others.sum(-1))
    exact = (
        gaps[np.arange(rows), labels] + log_sum,
        np.sum(targets * (gaps + log_sum[:, None]), -1, dtype=np.float64),
        np.sum(weights * gaps, -1) / np.sum(weights, -1) + log_sum,
    )
    got = losses(jnp.asarray(x), jnp.asarray(labels), jnp.asarray(targets))
    return [
        float(np.max(np.abs(np.asarray(g, np.float64) - e) / np.spacing(e.astype(np.float32))))
        for g, e in zip(got, exact, strict=True)
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 10, 33, 100, 200, 1000])
    args = parser.parse_args()
    print("| classes | integer labels | dense labels | entropy |\n|---|---|---|---|")
    rng = np.random.default_rng(0)
    for classes in args.classes:
        parts = [worst(20_000, classes, rng) for _ in range(-(-args.rows // 20_000))]
        print(f"| {classes} | " + " | ".join(f"{error:.1f}" for error in np.max(parts, 0)) + " |", flush=True)


if __name__ == "__main__":
    main()
