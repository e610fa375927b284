"""Settings of the whole suite: JAX as strict as it can be, and nothing downloaded."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can say `import helpers` however pytest was started

gc.set_threshold(20_000, 50, 100)  # traces are millions of objects: looking through them took a fifteenth of the time
jax.config.update("jax_enable_x64", False)  # tests that need float64 say so with `jax.enable_x64(True)`
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if jax.default_backend() != "cpu":  # where products of float32 have fewer digits by default
    jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits longest for processes of its own comes first, so that in the end no worker waits for another."""
    items.sort(key=lambda item: item.path.name != "test_sharded.py")
