"""What crosses the network, and what each device does and holds, in a step of a language model on many devices.

    pip install '.[programs]'                        # the compilers: neither TPU nor GPU has to be here
    python benchmarks/mesh.py tpu v5e:4x4            # or tpu v5e:16x16, gpu 1x1x8, cpu
    python benchmarks/mesh.py tpu v5e:4x4 --programs LinearLogits --layouts rows both --ways explicit --value
    python benchmarks/mesh.py tpu v5e:4x4 --programs CLIP SigLIP --layouts rows --rows 1024 --features 512

A step is the mean loss of hidden states [rows, features] and a kernel, in bfloat16, with the gradients of both, compiled
for a mesh of the axes "data" and "model", and not run. Each shard of the rows has as many as are given. The layouts:

rows       the rows over all devices, the kernel on each
classes    the rows over "data", the classes over "model"
features   the rows, and the kernel's features, over all devices, as FSDP has it
both       as classes, and the features over "data"
sequences  hidden states [sequences, positions, features], the sequences over "data" and the positions over "model", the
           kernel on each: two sequences for each data shard

And the ways: `jax.jit` alone on a mesh with automatic or with explicit axis types, or a `jax.shard_map`, which gathers
features by itself. The peer is Optax's loss of the product, with automatic axes. Of the functions of arrays, `integer
labels`, `softmax_statistics` and `Evaluation`, only the first two layouts are of use, and the peer is that of programs.py.
`CLIP` and `SigLIP` have rows on both sides, each of as many features, and no classes: the layout is rows.

All figures are of one device, and of a step as compiled; in brackets, the peer's are 1:

network MB      the results of all collectives, as often as their loops turn
collectives     how many these are, and of them in loops
temporary MB    XLA's own figure
arguments MB    the device's part of what is given
GB              what all kernels read and write in the device's memory
megacycles      the TPU compiler's own estimate for all kernels, in which nothing overlaps and the network takes no time
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce

sys.path.append(str(Path(__file__).parent))  # where this file is run by its path, too

import programs

AXES = "data", "model"
SHAPES = {"v5e:2x2": (2, 2), "v5e:4x4": (4, 4), "v5e:16x16": (16, 16)}


class Layout(NamedTuple):
    """The axes of the mesh over which something is sharded."""

    rows: Any
    classes: Any = None
    features: Any = None
    positions: Any = None


LAYOUTS = {
    "rows": Layout(AXES),
    "classes": Layout("data", "model"),
    "features": Layout(AXES, None, AXES),
    "both": Layout("data", "model", "data"),
    "sequences": Layout("data", positions="model"),
}
WAYS = "automatic", "explicit", "shard_map"


# Of logits, labels, and in a shard_map the axes over which rows are sharded, to what is the same on all devices.


def mean(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The mean of whatever the loss gives."""

    def total(logits: Any, labels: Any, rows: Any) -> Any:
        value = sum(jnp.mean(v.astype(jnp.float32)) for v in jax.tree.leaves(loss(logits, labels)))
        return value if rows is None else jax.lax.pmean(value, rows)

    return total


def evaluation(logits: Any, labels: Any, rows: Any) -> Any:
    """The metrics of a batch."""
    batch = jaxce.metrics.Evaluation.from_batch(logits, labels)
    return batch if rows is None else batch.psum(rows)


class Program(NamedTuple):
    """A program of the library, and the case of programs.py that has its peer."""

    ours: Callable[..., Any]
    case: str
    linear: bool = False
    pairs: bool = False


def clip(logits: Any, temperature: Any, rows: Any) -> Any:
    """The mean of both directions, of the rows of both sides."""

    def losses(logits: Any, temperature: Any) -> Any:
        return jaxce.softmax_cross_entropy_of_pairs(logits / temperature, axis_name=rows)

    return mean(losses)(logits, temperature, rows)


def siglip(logits: Any, temperature: Any, rows: Any) -> Any:
    """The mean over the rows, of which each device has all columns."""
    columns, own = logits.kernel, jnp.arange(logits.shape[0])
    if rows is not None:
        columns = jax.lax.all_gather(columns, rows, tiled=True)
        own += jax.lax.axis_index(rows) * logits.shape[0]
    elif not jax.typeof(columns).sharding.spec[0]:  # with automatic axes
        columns = jax.lax.with_sharding_constraint(columns, P())
    logits = jaxce.LinearLogits(logits.hidden, columns, class_axis=0, temperature=temperature)
    return mean(jaxce.linear_sigmoid_binary_cross_entropy)(logits, own[:, None], rows)


PROGRAMS = {
    "LinearLogits": Program(mean(jaxce.softmax_cross_entropy_with_integer_labels), "LinearLogits [V, D]", linear=True),
    "linear_cross_entropy": Program(mean(jaxce.linear_cross_entropy), "LinearLogits [V, D]", linear=True),
    "CLIP": Program(clip, "CLIP, all pairs", linear=True, pairs=True),
    "SigLIP": Program(siglip, "SigLIP, mean", linear=True, pairs=True),
    "integer labels": Program(mean(jaxce.softmax_cross_entropy_with_integer_labels), "integer labels"),
    "softmax_statistics": Program(mean(jaxce.softmax_statistics), "softmax_statistics"),
    "Evaluation": Program(evaluation, "Evaluation.update"),
}


class Figures(NamedTuple):
    """Those of the table, of one device."""

    network: float
    temporary: float
    arguments: float
    gigabytes: float
    megacycles: float
    collectives: list[programs.Collective]

    @property
    def looping(self) -> int:
        """How many collectives run in loops, each as often as it does."""
        return sum(c.times for c in self.collectives if c.times > 1)


def devices(kind: str, topology: str | None) -> np.ndarray:
    """The devices of the mesh: of a TPU's topology, or eight."""
    found = jax.devices("cpu")[:8] if kind == "cpu" else programs.devices(kind, topology)
    return np.array(found).reshape(SHAPES.get(str(topology), (2, 4)))


def measure(
    places: np.ndarray,
    name: str,
    layout: Layout,
    way: str,
    class_axis: int,
    shape: tuple[int, ...],
    value: bool = False,
) -> Figures:
    """A program's figures; ``shape`` is (rows of a data shard, features, classes), and the way "peer" is Optax'."""
    mesh = Mesh(places, AXES, axis_types=(AxisType.Explicit if way == "explicit" else AxisType.Auto,) * 2)
    rows, features, classes = shape
    over = layout.rows if layout.positions is None else (layout.rows, layout.positions)
    rows *= math.prod(mesh.shape[a] for a in AXES if a in over)
    sequences = 2 * mesh.shape["data"]
    batch, of_rows = ((rows,), [over]) if layout.positions is None else ((sequences, rows // sequences), [*over])
    program = PROGRAMS[name]
    flip = slice(None) if class_axis == 0 else slice(None, None, -1)
    structs = [(*batch, features), (classes, features)[flip], batch]
    specs = [P(*of_rows), P(*(layout.classes, layout.features)[flip]), P(*of_rows)]
    if not program.linear:
        structs, specs = [(*batch, classes), batch], [P(*of_rows, layout.classes), P(*of_rows)]
    if program.pairs:
        structs, specs = [(rows, features), (rows, features), ()], [P(layout.rows), P(layout.rows), P()]
    last = "float32" if program.pairs else "int32"
    args = [
        programs.array(NamedSharding(mesh, spec), struct, dtype)
        for struct, spec, dtype in zip(structs, specs, ["bfloat16"] * (len(structs) - 1) + [last], strict=True)
    ]

    def whole(*arrays: Any) -> Any:
        logits = jaxce.LinearLogits(*arrays[:2], class_axis=class_axis) if program.linear else arrays[0]
        return program.ours(logits, arrays[-1], None)

    def part(*arrays: Any) -> Any:
        logits, name = arrays[0], layout.classes
        if program.linear:
            hidden, kernel, _ = arrays
            if layout.features is not None:
                kernel = jax.lax.all_gather(kernel, layout.features, axis=1 if class_axis == 0 else 0, tiled=True)
            logits = jaxce.LinearLogits(hidden, kernel, class_axis=class_axis, axis_name=name)
        elif name is not None:
            logits = jaxce.ShardedLogits(logits, name)
        return program.ours(logits, arrays[-1], over)

    function: Callable[..., Any] = whole
    if way == "peer":
        case = programs.CASES[program.case if class_axis == 0 else program.case.replace("[V, D]", "[D, V]")]
        function = case.peer if case.whole else lambda *a: mean(lambda *_: case.peer(*a))(None, None, None)
    elif way == "shard_map":
        function = jax.shard_map(part, mesh=mesh, in_specs=tuple(specs), out_specs=P())
    if not value and name != "Evaluation":
        by = (0, 1) if program.linear else 0
        gradients = tuple(a.sharding for a in args[:2]) if program.linear else args[0].sharding
        function = jax.jit(jax.value_and_grad(function, by), out_shardings=(NamedSharding(mesh, P()), gradients))
    with jax.set_mesh(mesh):
        report = programs.report(function, *args)
    held = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in args)
    network = sum(c.bytes * c.times for c in report.collectives)
    return Figures(
        network / 1e6, report.temporary_mb, held / 1e6, report.gigabytes, report.megacycles, report.collectives
    )


def row(title: list[str], ours: Figures, peer: Figures | None, kind: str) -> str:
    """A line of the table."""

    def cell(name: str) -> str:
        of = f"{getattr(ours, name):.{3 if name == 'gigabytes' else 1}f}"
        return (
            of if peer is None or not getattr(peer, name) else f"{of} ({getattr(ours, name) / getattr(peer, name):.2f})"
        )

    total = str(sum(c.times for c in ours.collectives))
    cells = [cell("network"), f"{total}, {ours.looping}" if ours.looping else total, cell("temporary")]
    cells += [f"{ours.arguments:.0f}", cell("gigabytes")] + ([cell("megacycles")] if kind == "tpu" else [])
    return programs.line(title + cells)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["tpu", "gpu", "cpu"])
    parser.add_argument("topology", nargs="?", help="of a TPU one of " + ", ".join(SHAPES) + "; of a GPU 1x1x8")
    for name, default in (("rows", 8192), ("features", 2048), ("classes", 128256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    linear = [name for name, program in PROGRAMS.items() if program.linear and not program.pairs]
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=linear)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--class-axes", nargs="+", type=int, choices=[0, -1], default=[0])
    parser.add_argument("--value", action="store_true", help="without gradients")
    args = parser.parse_args()
    topology = args.topology or {"tpu": "v5e:4x4", "gpu": "1x1x8"}.get(args.kind)
    places, shape = devices(args.kind, topology), (args.rows, args.features, args.classes)

    def measured(program: str, layout: Layout, way: str, class_axis: int) -> Figures:
        return measure(places, program, layout, way, class_axis, shape, args.value)

    titles = ["layout", "class_axis", "program", "way"]
    columns = ["network MB", "collectives, in loops", "temporary MB", "arguments MB", "GB"]
    columns += ["megacycles"] if args.kind == "tpu" else []
    print(f"jax {jax.__version__}, {args.kind} {topology or ''} as {AXES} of {places.shape}", end=", ")
    print(f"{args.rows} rows a data shard, {args.features} features, {args.classes} classes, bfloat16\n")
    print(programs.line(titles + columns) + "\n" + "|---" * len(titles + columns) + "|", flush=True)
    for name, class_axis in itertools.product(args.layouts, args.class_axes):
        peers: dict[str, Figures] = {}
        for program in args.programs:
            title, case = [name, str(class_axis)], PROGRAMS[program].case
            if case not in peers:
                peers[case] = measured(program, LAYOUTS[name], "peer", class_axis)
                print(
                    row(
                        [*title, "Optax" if PROGRAMS[program].linear else "peer", "automatic"],
                        peers[case],
                        None,
                        args.kind,
                    )
                )
            for way in args.ways:
                ours = measured(program, LAYOUTS[name], way, class_axis)
                print(row([*title, program, way], ours, peers[case], args.kind), flush=True)


if __name__ == "__main__":
    main()
