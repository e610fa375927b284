"""What the library's functions take on the device that is here, a GPU or a TPU, beside Optax's or else the plain formula.

    python benchmarks/device.py [--only 'integer labels' entropy] [--rounds 9]

The functions, their peers and the shapes are those of programs.py, which compiles for devices that aren't here; this
program runs them. In each round every version is started as often as fills some milliseconds and then waited for, one
version after the other, so that a slow moment of the machine meets all; the table shows the peer's median time of one
run and the median over the rounds of the ratio in the same round. 'GB/s' are the arrays that go in and come out, each
once, by the time of jaxce. Short programs take as long as it takes to start them. MB is XLA's figure for temporary memory.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import optax
from dense import OF_LOGS, OF_PROBABILITIES
from programs import CASES, MODES, Case, Struct, line, program

OF_TARGETS = ["dense labels", "poly", "kl_divergence", "generalized_kl_divergence"]
SPAN = 0.005
"""Seconds that a measurement should take at least."""


class Row(NamedTuple):
    """A line of the table to be."""

    name: str
    case: Case
    shape: tuple[int, ...]
    dtype: str
    mode: str
    compiled: list[Any]  # of jaxce and of the peer

    @property
    def structs(self) -> list[Struct]:
        """Shapes and dtypes of the arguments."""
        return self.case.arrays(self.shape, self.dtype)


def rows(only: list[str]) -> Iterator[list[Row]]:
    """The rows of each case and shape, compiled side by side."""
    found = []
    for name, case in CASES.items():
        for shape, dtype in case.shapes if any(part in name for part in only) else []:
            for mode in MODES if case.by else MODES[:1]:
                found.append(Row(name, case, shape, dtype, mode, []))
    with ThreadPoolExecutor() as pool:
        started = []
        for row in found:
            args = [jax.ShapeDtypeStruct(*struct) for struct in row.structs]
            lowered = [jax.jit(program(f, row.case, row.mode)).lower(*args) for f in (row.case.ours, row.case.peer)]
            started.append([pool.submit(x.compile) for x in lowered])
        for row, futures in zip(found, started, strict=True):
            row.compiled.extend(future.result() for future in futures)
    for _, same in itertools.groupby(found, key=lambda row: (row.name, row.shape, row.dtype)):
        yield list(same)


def make(name: str, structs: list[Struct]) -> list[jax.Array]:
    """Logits of size 3, probabilities or their logarithms, and labels or as many other numbers; made on the device."""

    @jax.jit
    def all_of_them(key: jax.Array) -> list[jax.Array]:
        made = []
        for i, (shape, dtype) in enumerate(structs):
            part = jax.random.fold_in(key, i)
            if dtype == "int32":
                classes = structs[0][0][-1] if len(structs) == 2 else max(structs[1][0])
                made.append(jax.random.randint(part, shape, 0, classes, "int32"))
                continue
            x = 3 * jax.random.normal(part, shape, dtype)
            if len(structs) == 3:  # hidden states and a kernel
                x = x / (math.sqrt(structs[0][0][-1]) if i else 3)
            elif name in OF_PROBABILITIES or (i and name in OF_TARGETS):
                x = jax.nn.softmax(x.astype("float32"))
            elif name in OF_LOGS:
                x = jax.nn.log_softmax(x.astype("float32"))
            elif i and name.startswith("sigmoid"):
                x = jax.nn.sigmoid(x)
            made.append(x.astype(dtype))
        return made

    return all_of_them(jax.random.key(0))


def seconds(call: Callable[[], Any], times: int) -> float:
    """The time of one of so many runs."""
    start = time.perf_counter()
    for _ in range(times):
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / times


def measure(row: Row, args: list[jax.Array], rounds: int) -> str:
    """The line of the table."""
    calls = [lambda c=c: c(*args) for c in row.compiled]
    for call in calls:
        jax.block_until_ready(call())  # the first of all waits for much else
    times = [max(1, math.ceil(SPAN / seconds(call, 1))) for call in calls]
    measured = [[seconds(call, n) for call, n in zip(calls, times, strict=True)] for _ in range(rounds)]
    ratio = statistics.median(ours / peer for ours, peer in measured)
    ours, peer = (statistics.median(column) for column in zip(*measured, strict=True))
    out = jax.eval_shape(program(row.case.ours, row.case, row.mode), *args)
    gigabytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((args, out))) / 1e9
    megabytes = (f"{c.memory_analysis().temp_size_in_bytes / 1e6:.1f}" for c in row.compiled)
    cells = [row.name, row.mode, f"{'x'.join(map(str, row.shape))} {row.dtype}"]
    return line([*cells, f"{1e3 * peer:.3f}", f"{ratio:.2f}", f"{gigabytes / ours:.0f}", " / ".join(megabytes)])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="functions with this in their name")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()

    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, optax {optax.__version__}\n")
    print("| function | mode | shape | peer, ms | jaxce | GB/s | MB: jaxce / peer |\n|---|---|---|---|---|---|---|")
    for same in rows(args.only):
        arrays = make(same[0].name, same[0].structs)
        for row in same:
            print(measure(row, arrays, args.rounds), flush=True)
            row.compiled.clear()
        del arrays
        gc.collect()


if __name__ == "__main__":
    main()
