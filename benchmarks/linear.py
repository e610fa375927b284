"""The mean loss of hidden states and a kernel, beside Optax's and PyTorch's: time, as ratios in one run, and memory.

    python benchmarks/linear.py [--rounds 5] [--shapes 512x128x8192 2048x512x32768] [--dtypes float32 bfloat16] [--growth 3]

A shape is rows x features x classes. Each round runs every version once, one after the other, so that a slow moment of the
machine meets all of them; the table shows the median over the rounds of the ratio to Optax on the whole product in the
same round. 'value' is the mean loss and 'grad' the mean loss with its gradients by hidden states and kernel. 'matmuls' are
the products alone, over blocks of 4096 classes: one for the value, three with the gradients. 'One pass' is the weighted
mean `linear_cross_entropy`, and 'a quarter' the same where every fourth row counts. The temporary memory of the
JAX versions is XLA's own figure (``compiled.memory_analysis()``). ``--growth n`` doubles rows and classes together n times,
from the first shape on. PyTorch takes part where it is installed, with its chunked loss where it has one. ``--versions``
leaves out what is not to be run, so that there may be logits that would not fit in memory:

    python benchmarks/linear.py --shapes 16384x8x1572864 --dtypes float32 --rounds 1 --versions jaxce
"""

from __future__ import annotations

import argparse
import functools
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
from jax import lax

import jaxce

torch: Any
try:
    import torch  # pyright: ignore[reportMissingImports]
    import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
except ImportError:
    torch = None

Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]


def _optax(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels).astype(jnp.float32))


def _jaxce(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jaxce.softmax_cross_entropy_with_integer_labels(jaxce.LinearLogits(hidden, kernel), labels))


def _one_pass(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    return jaxce.linear_cross_entropy(jaxce.LinearLogits(hidden, kernel), labels)


def _a_quarter(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    counts = jnp.arange(len(labels)) % 4 == 0
    return jaxce.linear_cross_entropy(jaxce.LinearLogits(hidden, kernel), labels, counts)


def _matmuls(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, gradient: bool, size: int = 4096) -> Any:
    size = min(size, kernel.shape[1])
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    def step(state: Any, i: jax.Array) -> Any:
        total, dh, dw = state
        block = lax.dynamic_slice_in_dim(kernel, i * size, size, 1)
        x = product(hidden, block)
        total += jnp.sum(x)
        if gradient:
            g = x.astype(hidden.dtype)
            dh = dh + product(g, block.T)
            dw = lax.dynamic_update_slice_in_dim(dw, product(hidden.T, g).astype(dw.dtype), i * size, 1)
        return (total, dh, dw), None

    start = jnp.zeros(()), jnp.zeros(hidden.shape), jnp.zeros_like(kernel) if gradient else jnp.zeros(())
    return lax.scan(step, start, jnp.arange(kernel.shape[1] // size))[0]


def _torch_loss(chunked: bool) -> Callable[..., Any]:
    def loss(hidden: Any, kernel: Any, labels: Any) -> Any:
        if chunked:
            return F.linear_cross_entropy(hidden, kernel, labels)
        return F.cross_entropy(F.linear(hidden, kernel).float(), labels)

    return loss


def _torch_program(loss: Callable[..., Any], inputs: Inputs, dtype: str, gradient: bool) -> Callable[[], Any]:
    hidden, kernel = (torch.tensor(a).to(getattr(torch, dtype)) for a in (inputs[0], inputs[1].T.copy()))
    labels = torch.tensor(inputs[2])

    def program() -> Any:
        if not gradient:
            with torch.no_grad():
                return loss(hidden, kernel, labels)
        h, w = hidden.detach().requires_grad_(), kernel.detach().requires_grad_()
        return torch.autograd.grad(loss(h, w, labels), (h, w))

    return program


def programs(
    inputs: Inputs, dtype: str, gradient: bool, names: list[str] | None = None
) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """Name, call and temporary MB of each version."""
    args = jnp.asarray(inputs[0], dtype), jnp.asarray(inputs[1], dtype), jnp.asarray(inputs[2])
    losses: dict[str, Callable[..., Any]] = {"optax": _optax, "optax, checkpoint": jax.checkpoint(_optax)}
    losses |= {"jaxce": _jaxce, "jaxce, one pass": _one_pass, "jaxce, a quarter": _a_quarter}
    on_jax = {n: jax.value_and_grad(f, (0, 1)) if gradient else f for n, f in losses.items()}
    on_jax["matmuls"] = functools.partial(_matmuls, gradient=gradient)
    for name, function in on_jax.items():
        if names is None or name in names:
            compiled = jax.jit(function).lower(*args).compile()
            analysis = compiled.memory_analysis()
            megabytes = analysis.temp_size_in_bytes / 1e6 if analysis else float("nan")
            yield name, lambda compiled=compiled: jax.block_until_ready(compiled(*args)), megabytes
    if torch is not None:
        for name, chunked in (("torch", False), ("torch, chunked", True)):
            if (names is None or name in names) and (hasattr(F, "linear_cross_entropy") or not chunked):
                yield name, _torch_program(_torch_loss(chunked), inputs, dtype, gradient), float("nan")


def make(n: int, d: int, v: int) -> Inputs:
    """Hidden states, a kernel that makes logits of size 3, and labels."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(n, d)).astype(np.float32)
    kernel = (3 * rng.standard_normal(size=(d, v), dtype=np.float32) / np.sqrt(d)).astype(np.float32)
    return hidden, kernel, rng.integers(0, v, n)


def measure(versions: list[tuple[str, Callable[[], Any], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each version in each round, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name, _, _ in versions}
    for round_ in range(rounds + 1):
        for name, call, _ in versions:
            start = time.perf_counter()
            call()
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=["512x128x8192"], metavar="NxDxV")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--growth", type=int, default=0)
    parser.add_argument("--versions", nargs="+", metavar="VERSION")
    args = parser.parse_args()
    shapes = [tuple(int(size) for size in shape.split("x")) for shape in args.shapes]

    print(f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0]}, Python {platform.python_version()}")
    print(f"jax {jax.__version__}, optax {optax.__version__}, torch {torch.__version__ if torch else 'none'}\n")
    print("| shape | dtype | mode | version | ratio to Optax | ms | temporary MB |\n|---|---|---|---|---|---|---|")
    for n, d, v in shapes:
        for dtype in args.dtypes:
            for gradient in (False, True):
                versions = list(programs(make(n, d, v), dtype, gradient, args.versions))
                times = measure(versions, args.rounds)
                base = times["optax"] if "optax" in times else [float("nan")] * args.rounds
                for name, _, megabytes in versions:
                    ratio = statistics.median(a / b for a, b in zip(times[name], base, strict=True))
                    print(
                        f"| {n}x{d}x{v} | {dtype} | {'grad' if gradient else 'value'} | {name} | {ratio:.2f} "
                        f"| {1e3 * statistics.median(times[name]):.0f} | {megabytes:.1f} |",
                        flush=True,
                    )
    small = "optax", "jaxce", "jaxce, one pass"
    if args.growth:
        print(
            "\n| rows, classes | jaxce, ms with gradient | temporary MB: "
            + " | ".join(small)
            + " |\n|---|---|---|---|---|"
        )
    for k in range(args.growth + 1 if args.growth else 0):
        n, d, v = shapes[0][0] << k, shapes[0][1], shapes[0][2] << k
        versions = list(programs(make(n, d, v), args.dtypes[0], True, list(small)))
        times = measure([version for version in versions if version[0] == "jaxce"], args.rounds)
        megabytes = " | ".join(f"{version[2]:.1f}" for version in versions)
        print(f"| {n}, {v} | {1e3 * statistics.median(times['jaxce']):.0f} | {megabytes} |", flush=True)


if __name__ == "__main__":
    main()
