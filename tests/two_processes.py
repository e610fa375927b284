"""A small language model whose batch is sharded over processes, and its classes over devices: the losses of some steps.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python tests/two_processes.py PROCESS 2 PORT

prints them on each of two processes, and with eight devices and ``0 1 0`` a process prints them alone.
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce


def main(process: int, processes: int, port: int) -> None:
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    # The classes are 57, which 4 devices don't divide: three are padding.
    rng = np.random.default_rng(0)
    features, classes, padded, rows, length = 16, 57, 60, 8, 12
    start = {"embedding": rng.normal(size=(padded, features)), "mix": rng.normal(size=(features, features))}
    specs = {"embedding": P("model"), "mix": P()}

    def place(value: np.ndarray, spec: P) -> jax.Array:
        return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index: value[index])

    def loss(model: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        """The next token from the one before, whose embedding is fetched from the device that has it."""
        embedding = model["embedding"]
        first = jax.lax.axis_index("model") * len(embedding)
        here = tokens[:, :-1] - first
        mine = (here >= 0) & (here < len(embedding))
        hidden = jnp.where(mine[..., None], jnp.take(embedding, here, axis=0, mode="clip"), 0)
        hidden = jnp.tanh(jax.lax.psum(hidden, "model") @ model["mix"])
        logits = jaxce.LinearLogits(hidden, embedding, class_axis=0, axis_name="model", block_size=8)
        there = first + jnp.arange(len(embedding)) < classes
        labels = tokens[:, 1:]
        counts = labels != 0
        losses = jaxce.softmax_cross_entropy_with_integer_labels(
            logits, labels, where=there & counts[..., None], label_smoothing=0.1
        )
        return jaxce.weighted_mean(losses, counts, axis_name=("data",))

    @jax.jit
    def step(model: dict[str, jax.Array], tokens: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        mean = jax.shard_map(loss, mesh=mesh, in_specs=(specs, P("data")), out_specs=P())
        value, slope = jax.value_and_grad(mean)(model, tokens)
        return jax.tree.map(lambda w, g: w - 0.5 * g, model, slope), value

    model = {name: place(value.astype(np.float32), specs[name]) for name, value in start.items()}
    losses = []
    for _ in range(5):
        tokens = rng.integers(0, classes, (rows, length)).astype(np.int32)
        tokens[: rows // 2, length // 2 :] = 0  # padding, all of it in the first process's rows
        model, value = step(model, place(tokens, P("data")))
        losses.append(float(value))
    print(json.dumps(losses))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
