"""What the last layer of a language model and its loss take, as compiled for a TPU, beside Optax and beside trainers' own.

    pip install '.[programs]'          # the compiler: no TPU has to be here
    python benchmarks/heads.py         # all tables, in some minutes; or some of: words, shares, trainers

Each program is the loss of hidden states and a kernel in bfloat16 with the gradients of both, compiled for a TPU v5e and
counted as `programs.py` counts; nothing is run. Megacycles are the compiler's estimate, MB the temporary memory.

words       8192 tokens of 2048 features, against the size of the vocabulary
shares      32768 tokens of 2048 features, against the share of them that count. `linear_cross_entropy` computes 8192 of
            those that count in each turn of a loop, whose turns are counted here; for the others all tokens are alike.
trainers    4 sequences of 2048 tokens, 2048 features, 128256 words: the loss as trainers compute it, written from their
            formulas, with logits in float32, and what the page on migration writes in its place
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

import jaxce

sys.path.append(str(Path(__file__).parent))  # where this file is run by its path, too

import programs
from programs import Report, array, line, report

FEATURES = 2048
WORDS = [2**14, 2**15, 2**16, 2**17, 2**18]
SHARES = [Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), Fraction(1)]
CHUNK = 8192
"""The tokens of a turn, which `linear_cross_entropy` has on a TPU."""

# ------------------------------------------------------------------------------------------- of words and of shares


def _logits(hidden: Array, kernel: Array) -> Array:
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


def _optax(hidden: Array, kernel: Array, labels: Array, counts: Array) -> Array:
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(_logits(hidden, kernel.T), labels)
    return jnp.sum(jnp.where(counts, losses, 0)) / jnp.sum(counts, dtype=jnp.float32)


def _each(hidden: Array, kernel: Array, labels: Array, counts: Array) -> Array:
    logits = jaxce.LinearLogits(hidden, kernel, class_axis=0)
    return jaxce.weighted_mean(jaxce.softmax_cross_entropy_with_integer_labels(logits, labels, where=counts), counts)


def _mean(hidden: Array, kernel: Array, labels: Array, counts: Array) -> Array:
    return jaxce.linear_cross_entropy(jaxce.LinearLogits(hidden, kernel, class_axis=0), labels, counts)


LOSSES: dict[str, Callable[..., Array]] = {"Optax": _optax, "LinearLogits": _each, "linear_cross_entropy": _mean}


def head(place: Any, name: str, tokens: int, words: int) -> Report:
    """The program of a loss and its gradients."""
    structs = (
        ((tokens, FEATURES), "bfloat16"),
        ((words, FEATURES), "bfloat16"),
        ((tokens,), "int32"),
        ((tokens,), "bool"),
    )
    return report(jax.value_and_grad(LOSSES[name], (0, 1)), *(array(place, *struct) for struct in structs))


def row(tokens: int, words: int, share: str, name: str, megacycles: float, megabytes: float) -> str:
    """A line of the table."""
    return line([str(tokens), str(words), share, name, f"{megacycles:.1f}", f"{megabytes:.1f}"])


def print_words(place: Any) -> None:
    """Rows for each size of the vocabulary."""
    for words in WORDS:
        for name in LOSSES:
            found = head(place, name, 8192, words)
            print(row(8192, words, "any" if name != "linear_cross_entropy" else "1", name, *_cost(found)), flush=True)


def print_shares(place: Any, words: int = 2**16) -> None:
    """Rows for each share of the tokens that count."""
    tokens = 4 * CHUNK
    for name in LOSSES:
        found = head(place, name, tokens, words)
        if name == "linear_cross_entropy":
            for share in SHARES:
                megacycles, megabytes = _cost(found, math.ceil(share * tokens / CHUNK))
                print(row(tokens, words, str(share), name, megacycles, megabytes), flush=True)
        else:
            print(row(tokens, words, "any", name, *_cost(found)), flush=True)


def _cost(found: Report, turns: int = 0) -> tuple[float, float]:
    """Megacycles, with so many turns of the outermost loop that turns as the data says, and temporary MB."""
    return found.megacycles + (turns * found.turns[0].megacycles if turns else 0), found.temporary_mb


# ------------------------------------------------------------------------------------------------------ of trainers


# Losses of hidden states [B, T, D], a kernel [D, V], tokens [B, T] and weights [B, T] give what is differentiated, and what
# else is told.

Loss = Callable[[Array, Array, Array, Array], tuple[Array, Any]]


@jax.custom_vjp
def _stable(x: Array, targets: Array, z_loss: float) -> tuple[Array, Array]:
    """Cross-entropy with a z-loss, and that apart, as T5X and MaxText have it."""
    return _stable_forward(x, targets, z_loss)[0]


def _stable_forward(x: Array, targets: Array, z_loss: float) -> Any:
    top = jnp.max(x, -1, keepdims=True)
    powers = jnp.exp(x - top)
    total = jnp.sum(powers, -1, keepdims=True)
    log_p = x - top - jnp.log(total)
    normalizer = (jnp.log(total) + top)[..., 0]
    extra = z_loss * normalizer**2
    return (extra - jnp.sum(targets * log_p, -1), extra), (powers, total, log_p, normalizer, targets, z_loss)


def _stable_backward(kept: Any, cotangents: tuple[Array, Array]) -> Any:
    powers, total, log_p, normalizer, targets, z_loss = kept
    g = cotangents[0][..., None]
    return g * ((1 + 2 * z_loss * normalizer)[..., None] * powers / total - targets), -g * log_p, 0.0


_stable.defvjp(_stable_forward, _stable_backward)


def _t5x(hidden: Array, kernel: Array, tokens: Array, weights: Array) -> tuple[Array, Any]:
    targets = jax.nn.one_hot(tokens, kernel.shape[-1])
    losses, extra = _stable(_logits(hidden, kernel), targets, 1e-4)
    return jnp.sum(losses * weights), (jnp.sum(extra * weights), jnp.sum(weights))


def _mean_t5x(
    hidden: Array, kernel: Array, tokens: Array, weights: Array, chunk_size: int | None = None
) -> tuple[Array, Any]:
    total, (_, log_normalizers) = jaxce.linear_cross_entropy(
        jaxce.LinearLogits(hidden, kernel),
        tokens,
        weights,
        z_loss=1e-4,
        normalizer=1,
        chunk_size=chunk_size,
        has_aux=True,
    )
    return total, (1e-4 * jnp.sum(weights * log_normalizers**2), jnp.sum(weights))


def _each_t5x(hidden: Array, kernel: Array, tokens: Array, weights: Array) -> tuple[Array, Any]:
    statistics = jaxce.softmax_statistics(jaxce.LinearLogits(hidden, kernel), tokens)
    extra = 1e-4 * statistics.log_normalizer**2
    of_tokens = functools.partial(jaxce.weighted_mean, weights=weights, normalizer=1)
    return of_tokens(statistics.nll + extra), (of_tokens(extra), jnp.sum(weights))


def _lm1b(hidden: Array, kernel: Array, tokens: Array, weights: Array) -> tuple[Array, Any]:
    targets = jax.nn.one_hot(tokens, kernel.shape[-1])
    losses = -jnp.sum(targets * jax.nn.log_softmax(_logits(hidden, kernel)), -1)
    return jnp.sum(losses * weights), jnp.sum(weights)


def _mean_lm1b(hidden: Array, kernel: Array, tokens: Array, weights: Array) -> tuple[Array, Any]:
    total = jaxce.linear_cross_entropy(jaxce.LinearLogits(hidden, kernel), tokens, weights, normalizer=1)
    return total, jnp.sum(weights)


def _each_lm1b(hidden: Array, kernel: Array, tokens: Array, weights: Array) -> tuple[Array, Any]:
    losses = jaxce.softmax_cross_entropy_with_integer_labels(jaxce.LinearLogits(hidden, kernel), tokens)
    return jaxce.weighted_mean(losses, weights, normalizer=1), jnp.sum(weights)


def _scan(step: Callable[..., Any], axis: int, tiles: int, hidden: Array, *others: Array) -> Any:
    """What a step gives of each of some tiles along an axis of tokens; its logits are computed again for the gradient."""

    def tiled(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(*x.shape[:axis], tiles, -1, *x.shape[axis + 1 :]), axis, 0)

    return lax.scan(lambda _, xs: (None, jax.checkpoint(step)(*xs)), None, (tiled(hidden), *map(tiled, others)))[1]


def _maxtext(hidden: Array, kernel: Array, tokens: Array, weights: Array) -> tuple[Array, Any]:
    """With num_vocab_tiling=8: tiles of 1024 tokens. Their rule for its gradient does what `jax.checkpoint` does here."""

    def tile(h: Array, y: Array, w: Array) -> tuple[Array, Array]:
        losses, extra = _stable(_logits(h, kernel), jax.nn.one_hot(y, kernel.shape[-1]), 1e-4)
        return jnp.sum(jnp.where(w != 0, losses, 0)), jnp.sum(jnp.where(w != 0, extra, 0))

    flat = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1), weights.reshape(-1)
    total, extra = _scan(tile, 0, 8, *flat)
    return jnp.sum(total), (jnp.sum(extra), jnp.sum(weights))


def _easylm(hidden: Array, kernel: Array, tokens: Array, weights: Array) -> tuple[Array, Any]:
    x, length = _logits(hidden, kernel), jnp.maximum(jnp.sum(weights, -1), 1e-10)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(x), tokens[..., None], -1)[..., 0]
    right = ((weights > 0) & (jnp.argmax(x, -1) == tokens)).astype(jnp.float32)
    return -jnp.mean(jnp.sum(jnp.where(weights > 0, log_p, 0), -1) / length), jnp.mean(jnp.sum(right, -1) / length)


def _each_easylm(hidden: Array, kernel: Array, tokens: Array, weights: Array) -> tuple[Array, Any]:
    statistics = jaxce.softmax_statistics(jaxce.LinearLogits(hidden, kernel), tokens, where=weights > 0)
    right = (statistics.prediction == tokens).astype(jnp.float32)

    def mean(values: Array) -> Array:
        return jaxce.weighted_mean(values, weights > 0, axis=-1).mean()

    return mean(statistics.nll), mean(right)


def _tunix(hidden: Array, kernel: Array, tokens: Array, weights: Array) -> tuple[Array, Any]:
    """With chunks of 256 tokens of each sequence."""

    def step(h: Array, y: Array) -> tuple[Array, Array]:
        x = _logits(h, kernel)
        log_p = jax.nn.log_softmax(x)
        nll = jax.nn.logsumexp(x, -1) - jnp.take_along_axis(x, y[..., None], -1)[..., 0]
        return -nll, -jnp.sum(jnp.exp(log_p) * log_p, -1)

    found = _scan(step, 1, hidden.shape[1] // 256, hidden, tokens)
    log_p, entropy = (jnp.moveaxis(v, 0, 1).reshape(tokens.shape) for v in found)
    return jnp.sum((log_p + entropy) * weights), (log_p, entropy)


def _each_tunix(hidden: Array, kernel: Array, tokens: Array, weights: Array) -> tuple[Array, Any]:
    statistics = jaxce.softmax_statistics(jaxce.LinearLogits(hidden, kernel), tokens)
    return jnp.sum((statistics.entropy - statistics.nll) * weights), (-statistics.nll, statistics.entropy)


MEAN = "linear_cross_entropy"
TRAINERS: dict[str, dict[str, Loss]] = {
    "T5X": {"its own": _t5x, MEAN: _mean_t5x, "LinearLogits": _each_t5x},
    "lm1b": {"its own": _lm1b, MEAN: _mean_lm1b, "LinearLogits": _each_lm1b},
    "MaxText": {
        "its own": _maxtext,
        MEAN: _mean_t5x,
        f"{MEAN}, chunk_size=2048": functools.partial(_mean_t5x, chunk_size=2048),
        "LinearLogits": _each_t5x,
    },
    "EasyLM": {"its own": _easylm, "LinearLogits": _each_easylm},
    "Tunix": {"its own": _tunix, "LinearLogits": _each_tunix},
}


def print_trainers(place: Any) -> None:
    """Rows for each trainer."""
    tokens = 4, 2048
    structs = (
        ((*tokens, FEATURES), "bfloat16"),
        ((FEATURES, 128256), "bfloat16"),
        (tokens, "int32"),
        (tokens, "float32"),
    )
    args = [array(place, *struct) for struct in structs]
    found: dict[Loss, Report] = {}
    for trainer, losses in TRAINERS.items():
        for name, loss in losses.items():
            if loss not in found:
                found[loss] = report(jax.value_and_grad(loss, (0, 1), has_aux=True), *args)
            turns = 4 if "chunk_size" in name else 0  # of a loop where there is more than one chunk
            print(line([trainer, name, *(f"{cost:.1f}" for cost in _cost(found[loss], turns))]), flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=["words", "shares", "trainers"])
    args = parser.parse_args()
    place = programs.devices("tpu")[0]
    heading = ["tokens", "words", "share that counts", "loss", "megacycles", "temporary MB"]
    trainers = ["trainer", "loss", "megacycles", "temporary MB"]
    for table, columns, show in (
        ("words", heading, print_words),
        ("shares", heading, print_shares),
        ("trainers", trainers, print_trainers),
    ):
        if table in args.tables:
            print(f"\n{line(columns)}\n{'|---' * len(columns)}|", flush=True)
            show(place)


if __name__ == "__main__":
    main()
