"""Losses on a mesh: eight simulated devices and two processes, each in processes of their own; and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_on_eight_devices() -> None:
    """XLA has as many devices as it is told before it starts, and all other tests run on one."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "eight_devices.py")]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
