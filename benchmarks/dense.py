"""Losses on arrays beside Optax's and PyTorch's: time, as ratios in one run, and temporary memory.

    python benchmarks/dense.py [--rounds 9] [--losses integer dense sigmoid entropy_with_logits] [--shapes 65536x10]
    python benchmarks/dense.py --losses probabilities --shapes 8192x1000 1024x32768

Each round runs every version once, one after the other, so that a slow moment of the machine meets all of them; the
table shows the median over the rounds of the ratio to Optax in the same round. 'value' is the mean loss and 'grad' the
mean loss with its gradient by the logits. The temporary memory of jaxce and Optax is XLA's own figure
(``compiled.memory_analysis()``). PyTorch takes part where it is installed. Entropy from logits has no function in
Optax, where it is the cross-entropy of the softmax with itself, nor in PyTorch, where it is the formula written with
log_softmax. 'probabilities' stands for the losses, entropies and divergences of probabilities and log-probabilities,
and for the divergences from logits; where Optax has none of these, the ratio is to the plain formula in float32, as in
programs.py.

On a CPU the classes of a row meet eight at a time, by chunks of rows that stay in the cache (see jaxce/_platforms.py), and
no array of the size of the logits is formed, of half precision neither. The plain formula, whose sums XLA:CPU vectorises
along the row, takes less time where a row is short enough to stay in the cache by itself and is float32.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from programs import CASES

import jaxce

torch: Any
try:
    import torch  # pyright: ignore[reportMissingImports]
    import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
except ImportError:
    torch = None

SHAPES = ["65536x10", "8192x1000", "1024x32768", "512x131072"]
DTYPES = ["float32", "bfloat16"]
ON_LOGITS = ["integer", "dense", "sigmoid", "entropy_with_logits"]
OF_LOGITS = ["cross_entropy_with_logits", "relative_entropy_with_logits", "jensen_shannon_divergence_with_logits"]
OF_LOGS = ["nll", "kl_divergence", "kl_divergence_with_log_targets", "generalized_kl_divergence"]
OF_PROBABILITIES = ["entropy", "cross_entropy", "relative_entropy", "jensen_shannon_divergence"]
PROBABILITIES = OF_LOGITS + OF_LOGS + OF_PROBABILITIES
Function = Callable[[Any, Any], Any]


def _optax_entropy(logits: jax.Array, _: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy(logits, jax.nn.softmax(logits))  # Optax has no entropy; this is how one says it


def _torch_entropy(logits: Any, _: Any) -> Any:
    log_p = F.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum(-1)


def losses() -> dict[str, dict[str, Function]]:
    """For each loss its versions, as functions of logits and labels that return one value per example."""
    table: dict[str, dict[str, Function]] = {
        "integer": {
            "optax": optax.softmax_cross_entropy_with_integer_labels,
            "jaxce": jaxce.softmax_cross_entropy_with_integer_labels,
        },
        "dense": {"optax": optax.softmax_cross_entropy, "jaxce": jaxce.softmax_cross_entropy},
        "sigmoid": {"optax": optax.sigmoid_binary_cross_entropy, "jaxce": jaxce.sigmoid_binary_cross_entropy},
        "entropy_with_logits": {"optax": _optax_entropy, "jaxce": lambda logits, _: jaxce.entropy_with_logits(logits)},
    }
    for name in PROBABILITIES:
        ours, peer = CASES[name].ours, CASES[name].peer
        one = name == "entropy"
        table[name] = {
            "optax": (lambda x, _, f=peer: f(x)) if one else peer,
            "jaxce": (lambda x, _, f=ours: f(x)) if one else ours,
        }
    if torch is not None:
        table["integer"]["torch"] = lambda x, y: F.cross_entropy(x, y, reduction="none")
        table["dense"]["torch"] = lambda x, t: F.cross_entropy(x, t.to(x.dtype), reduction="none")
        table["sigmoid"]["torch"] = lambda x, t: F.binary_cross_entropy_with_logits(x, t.to(x.dtype), reduction="none")
        table["entropy_with_logits"]["torch"] = _torch_entropy
    return table


def softmax(x: np.ndarray) -> np.ndarray:
    """Probabilities."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


def predictions(loss: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Logits, probabilities or their logarithms."""
    x = (3 * rng.normal(size=shape)).astype(np.float32)
    if loss in OF_PROBABILITIES:
        return softmax(x)
    return np.log(softmax(x)) if loss in OF_LOGS else x


def labels(loss: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Labels of the form that the loss takes, or a second distribution."""
    if loss in OF_LOGITS:
        return (3 * rng.normal(size=shape)).astype(np.float32)
    if loss == "kl_divergence_with_log_targets":
        return np.log(softmax(3 * rng.normal(size=shape)))
    if loss == "dense" or loss in PROBABILITIES and loss != "nll":
        return softmax(3 * rng.normal(size=shape))
    if loss == "sigmoid":
        return rng.integers(0, 2, shape).astype(np.float32)
    return rng.integers(0, shape[1], shape[0])


def _jax_program(function: Function, gradient: bool) -> Callable[..., Any]:
    def mean(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(function(x, y))

    return jax.jit(jax.value_and_grad(mean) if gradient else mean)


def _torch_program(function: Function, gradient: bool) -> Callable[..., Any]:
    def program(x: Any, y: Any) -> Any:
        if not gradient:
            with torch.no_grad():
                return function(x, y).mean()
        x = x.detach().requires_grad_()
        value = function(x, y).mean()
        return value, torch.autograd.grad(value, x)

    return program


def programs(
    loss: str, x: np.ndarray, y: np.ndarray, dtype: str, gradient: bool
) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """Name, call and temporary MB of each version."""
    on_jax = jnp.asarray(x, dtype), jnp.asarray(y)
    for name, function in losses()[loss].items():
        if name == "torch":
            on_torch = torch.tensor(x).to(getattr(torch, dtype)), torch.tensor(y)
            program = _torch_program(function, gradient)
            yield name, lambda program=program, args=on_torch: program(*args), float("nan")
        else:
            compiled = _jax_program(function, gradient).lower(*on_jax).compile()
            temporary = compiled.memory_analysis().temp_size_in_bytes / 1e6
            yield name, lambda compiled=compiled: jax.block_until_ready(compiled(*on_jax)), temporary


def row(
    loss: str, shape: tuple[int, int], dtype: str, gradient: bool, rounds: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """Median ratios to Optax, temporary MB, and Optax's median time in seconds."""
    rng = np.random.default_rng(0)
    x = predictions(loss, shape, rng)
    versions = list(programs(loss, x, labels(loss, shape, rng), dtype, gradient))
    times: dict[str, list[float]] = {name: [] for name, _, _ in versions}
    for round_ in range(rounds + 1):
        for name, call, _ in versions:
            start = time.perf_counter()
            call()
            if round_:  # the first warms up
                times[name].append(time.perf_counter() - start)
    ratios = {n: statistics.median(a / b for a, b in zip(t, times["optax"], strict=True)) for n, t in times.items()}
    return ratios, {name: mb for name, _, mb in versions}, statistics.median(times["optax"])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--losses", nargs="+", default=ON_LOGITS, choices=[*losses(), "probabilities"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    args = parser.parse_args()

    print(f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0]}, Python {platform.python_version()}")
    print(
        f"jax {jax.__version__}, optax {optax.__version__}, torch {torch.__version__ if torch else 'not installed'}\n"
    )
    print("| loss | mode | shape | dtype | Optax, ms | jaxce | torch | temporary MB: Optax | jaxce |")
    print("|---|---|---|---|---|---|---|---|---|")
    means: dict[tuple[str, str], list[float]] = {}
    for loss in PROBABILITIES if args.losses == ["probabilities"] else args.losses:
        for dtype in DTYPES:
            for shape in args.shapes:
                n, k = (int(size) for size in shape.split("x"))
                for gradient in (False, True):
                    ratios, mb, seconds = row(loss, (n, k), dtype, gradient, args.rounds)
                    means.setdefault((loss, dtype), []).append(ratios["jaxce"])
                    print(
                        f"| {loss} | {'grad' if gradient else 'value'} | {shape} | {dtype} | {1e3 * seconds:.1f} "
                        f"| {ratios['jaxce']:.2f} | {ratios.get('torch', float('nan')):.2f} "
                        f"| {mb['optax']:.0f} | {mb['jaxce']:.0f} |",
                        flush=True,
                    )
    print("\nGeometric means of jaxce's ratios:")
    for (loss, dtype), values in means.items():
        print(f"  {loss}, {dtype}: {statistics.geometric_mean(values):.2f}")


if __name__ == "__main__":
    main()
