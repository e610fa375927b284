"""What crosses the network, and what each device holds, as a language model's loss goes over more devices.

    python benchmarks/mesh.py [--rows 2048] [--features 512] [--classes 65536] [--devices 1 2 4 8]

One step is the mean loss of hidden states [rows, features] and a kernel [features, classes], with the gradients of both.
The classes are sharded over the devices, and the rows are on all of them. Nothing is run: the figures are those of the step
compiled for simulated devices, in MB per device and step. 'arguments' are its part of hidden states, kernel and labels,
'temporary' is XLA's own figure, and 'network' adds up the results of all collectives, as often as their loops run them.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce

sys.path.append(str(Path(__file__).parent))  # where this file is run by its path, too

from programs import collectives


def loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, axis_name: str | None = None) -> jax.Array:
    """The mean loss, on each device or of the whole."""
    logits = jaxce.LinearLogits(hidden, kernel, axis_name=axis_name)
    return jnp.mean(jaxce.softmax_cross_entropy_with_integer_labels(logits, labels))


def whole(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """The same of an array of logits."""
    logits = hidden @ kernel
    return jnp.mean(jaxce.softmax_cross_entropy_with_integer_labels(logits, labels))


SPECS = P(), P(None, "model"), P()


def programs(mesh: jax.sharding.Mesh) -> dict[str, Callable[..., jax.Array]]:
    """The ways to write it."""
    if mesh.axis_types[0] == AxisType.Explicit:
        return {"LinearLogits, explicit axes": loss, "array, explicit axes": whole}
    part = functools.partial(loss, axis_name="model")
    mapped = jax.shard_map(part, mesh=mesh, in_specs=SPECS, out_specs=P())
    return {"LinearLogits in shard_map": mapped, "LinearLogits, automatic axes": loss}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 2048), ("features", 512), ("classes", 65536)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    shapes = (
        ((args.rows, args.features), "float32"),
        ((args.features, args.classes), "float32"),
        ((args.rows,), "int32"),
    )
    print(f"jax {jax.__version__}, rows {args.rows}, features {args.features}, classes {args.classes}, float32\n")
    print("| program | devices | arguments MB | temporary MB | network MB | collectives |\n|---|---|---|---|---|---|")
    rows = []
    for devices in args.devices:
        for types in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((devices,), ("model",), axis_types=(types,), devices=jax.devices()[:devices])
            places = [NamedSharding(mesh, spec) for spec in SPECS]
            structs = [
                jax.ShapeDtypeStruct(shape, dtype, sharding=place)
                for (shape, dtype), place in zip(shapes, places, strict=True)
            ]
            for name, program in programs(mesh).items():
                step = jax.jit(jax.value_and_grad(program, (0, 1)), out_shardings=(None, (places[0], places[1])))
                with jax.set_mesh(mesh):
                    compiled = step.lower(*structs).compile()
                analysis, text = compiled.memory_analysis(), compiled.as_text()
                assert analysis is not None and text is not None
                found = collectives(text)
                rows.append((name, devices, analysis.argument_size_in_bytes, analysis.temp_size_in_bytes, found))
    for name, devices, held, temporary, found in sorted(rows, key=lambda row: row[0]):
        network = sum(c.bytes * c.times for c in found)
        kinds = ", ".join(f"{sum(c.times for c in found if c.kind == k)} {k}" for k in sorted({c.kind for c in found}))
        megabytes = " | ".join(f"{size / 1e6:.2f}" for size in (held, temporary, network))
        print(f"| {name} | {devices} | {megabytes} | {kinds} |")


if __name__ == "__main__":
    main()
