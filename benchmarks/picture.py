"""README's picture: a small loss that keeps its digits, and what the loss of a language model costs beside Optax.

    python benchmarks/picture.py [--output notebooks/loss.svg]

The losses are computed here. Memory and time are those of the rows of `RESULTS.md`, measured by `device.py` on an H100.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxce

ROOT = Path(__file__).parents[1]
ROW = (
    r"^\| {} \[V, D\] \| value and gradient \| 8192x2048x128256 bfloat16 "
    r"\| ([\d.]+) \| ([\d.]+) \| \d+ \| ([\d.]+) / ([\d.]+) \|"
)


class Cost(NamedTuple):
    """Of a loss with its gradients."""

    gigabytes: float
    milliseconds: float


def costs(results: str) -> dict[str, Cost]:
    """What the table "Time on a GPU" says of Optax and of our two ways."""
    table = results.partition("\n## Time on a GPU\n")[2].partition("\n## ")[0]
    found = {}
    for name in ("LinearLogits", "linear_cross_entropy"):
        row = re.search(ROW.format(name), table, re.M)
        assert row, f"no row of {name}"
        peer, ratio, ours, theirs = map(float, row.groups())
        found.setdefault("Optax", Cost(theirs / 1e3, peer))
        found[name] = Cost(ours / 1e3, peer * ratio)
    return found


def draw(output: Path) -> None:
    """The picture as an SVG file."""
    plt.style.use(ROOT / "notebooks" / "style.mplstyle")
    plt.rcParams.update({"svg.hashsalt": "jaxce", "font.size": 9, "axes.titlesize": 9.5})
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(8, 2.5), width_ratios=(1.5, 1, 1))

    margins = jnp.linspace(0, 60, 241)
    logits, labels = jnp.stack([margins, jnp.zeros_like(margins)], axis=-1), jnp.zeros(len(margins), int)
    ours = np.asarray(jaxce.softmax_cross_entropy_with_integer_labels(logits, labels))
    theirs = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    left.semilogy(margins, np.where(theirs > 0, theirs, np.nan), color="C6", linewidth=5, alpha=0.5, label="Optax")
    left.semilogy(margins, ours, color="C0", label="jaxce")
    zero = float(margins[np.flatnonzero(theirs)[-1] + 1])
    left.annotate(f"Optax: 0 from {zero:g} on", (zero, 1e-7), (25, 1e-4), arrowprops={"arrowstyle": "->"})
    left.set(xlabel="logit of the label; that of the other class is 0", title="Loss of a confident prediction, float32")
    left.set(yticks=[1, 1e-8, 1e-16, 1e-24], ylim=(1e-27, 10))
    left.minorticks_off()
    left.legend(loc="lower left")

    measured = costs((ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8"))
    names = [name.replace("linear_cross", "linear_\ncross") for name in measured]
    for ax, title, values, form in (
        (middle, "Temporary memory, GB", [c.gigabytes for c in measured.values()], "{:.1f}"),
        (right, "Time, ms", [c.milliseconds for c in measured.values()], "{:.0f}"),
    ):
        bars = ax.barh(names, values, color=["C6", "C0", "C0"], height=0.65)
        ax.bar_label(bars, [form.format(value) for value in values], padding=3)
        ax.set(title=title, xlim=(0, 1.15 * max(values)))
        ax.invert_yaxis()
        ax.grid(False, axis="y")
        ax.tick_params(axis="y", length=0)
    right.set_yticklabels([])
    fig.supxlabel(
        "A language model's loss and both gradients: 8192 tokens, 128256 words, bfloat16, H100",
        fontsize=8,
        x=0.99,
        ha="right",
    )
    fig.savefig(output, metadata={"Date": None})


def main() -> None:
    """Draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "notebooks" / "loss.svg")
    jax.config.update("jax_platforms", "cpu")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
