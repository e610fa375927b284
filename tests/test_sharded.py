"""Losses on a mesh: on eight simulated devices, and on two processes, each in processes of their own.

XLA has as many devices as it is told before it starts, and all other tests run on one.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick

import jaxce

HERE = Path(__file__).parent
DEVICES = "--xla_force_host_platform_device_count={}"
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}


def test_parts_of_a_vmap() -> None:
    """An axis of vmap does for one of a mesh: four parts of three classes, values and gradients outside of it."""
    rng = np.random.default_rng(0)
    hidden, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 3), (3, 12)))
    labels = np.array([0, 4, 7, 11], np.int32)
    integer = jaxce.softmax_cross_entropy_with_integer_labels

    def in_parts(hidden: Any, kernel: Any) -> Any:
        def part(kernel: Any) -> Any:
            x = jaxce.LinearLogits(hidden, kernel, axis_name="parts", block_size=2)
            entropies = jaxce.entropy_with_logits(jaxce.ShardedLogits(x.materialize(), "parts"))
            return integer(x, labels) + entropies + jaxce.linear_cross_entropy(x, labels)

        return jax.vmap(part, in_axes=1, out_axes=None, axis_name="parts")(kernel.reshape(3, 4, 3))

    def whole(hidden: Any, kernel: Any) -> Any:
        losses = integer(hidden @ kernel, labels)
        return losses + jaxce.entropy_with_logits(hidden @ kernel) + jnp.mean(losses)

    @functools.partial(quick, static_argnums=0)
    def value_and_slopes(f: Any, *args: Any) -> Any:
        return f(*args), jax.grad(lambda *args: jnp.sum(f(*args)), (0, 1))(*args)

    (value, got), (expected, slopes) = (value_and_slopes(f, hidden, kernel) for f in (in_parts, whole))
    np.testing.assert_allclose(value, expected, rtol=1e-6)  # another order
    for slope, right in zip(got, slopes, strict=True):
        np.testing.assert_allclose(slope, right, rtol=1e-5, atol=1e-6)  # sums of twelve terms of both signs


def start(*command: Any, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outputs(processes: list[subprocess.Popen[str]], timeout: float) -> list[str]:
    """What they print; none of them is left behind."""
    try:
        printed = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (out, err) in zip(processes, printed, strict=True):
        assert p.returncode == 0, out[-10_000:] + err[-4_000:]
    return [out for out, _ in printed]


@pytest.mark.parametrize("rows", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(rows: str) -> None:
    command = "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", rows, HERE / "losses_on_a_mesh.py"
    outputs([start(*command, XLA_FLAGS=DEVICES.format(8))], timeout=3600)


def test_two_processes_train_as_one() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = HERE / "two_processes.py"
    pair = outputs([start(script, process, 2, port, XLA_FLAGS=DEVICES.format(4)) for process in (0, 1)], timeout=300)
    (alone,) = outputs([start(script, 0, 1, port, XLA_FLAGS=DEVICES.format(8))], timeout=300)
    first, second, one = (json.loads(out.splitlines()[-1]) for out in (*pair, alone))
    assert first == second and len(one) == 5 and all(np.isfinite(one))
    np.testing.assert_allclose(first, one, rtol=1e-6)  # the sum over processes is in another order
