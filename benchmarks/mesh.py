"""What crosses the network, and what each device holds, as a language model's loss goes over more devices.

    python benchmarks/mesh.py [--rows 2048] [--features 512] [--classes 65536] [--devices 1 2 4 8]

One step is the mean loss of hidden states [rows, features] and a kernel [features, classes], with the gradients of both.
The classes are sharded over the devices, the rows are on all of them. Nothing is run: the figures are of the compiled step
for simulated devices, bytes per device and step. 'hidden' and 'kernel' say what one array of each is, 'network' adds up the
results of all collectives, as often as their loops run them, and 'temporary' is XLA's own figure.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
BYTES |= {"s64": 8, "u64": 8}


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    times: int  # how often it runs


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a compiled program's text, those of a loop's body with the number of its turns."""
    bodies = {m[1]: m[2] for m in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", hlo, re.M | re.S)}
    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.M)
    assert entry is not None

    def of(name: str, times: int) -> Iterator[Collective]:
        for line in bodies[name].splitlines():
            operation = re.search(r" = (.*?) ([\w\-]+)\(", line)
            if operation is None:
                continue
            result, kind = operation[1], operation[2].removesuffix("-start")
            if kind in KINDS:
                arrays = [
                    (t, tuple(map(int, filter(None, s.split(",")))))
                    for t, s in re.findall(r"(\w+)\[([\d,]*)\]", result)
                ]
                size = sum(BYTES[t] * math.prod(s) for t, s in arrays)
                yield Collective(kind, tuple(s for _, s in arrays), size, times)
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            for called in re.findall(
                r"(?:body|to_apply|calls|computation|true_computation|false_computation)=%?([\w.\-]+)", line
            ):
                yield from of(called, times * (int(turns[1]) if turns and kind == "while" else 1))
            if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                for called in branches[1].replace("%", "").split(", "):
                    yield from of(called, times)

    return list(of(entry[1], 1))
