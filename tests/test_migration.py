"""The tables of the page on migration: in each row both calls are evaluated as they stand, and give the same numbers."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from helpers import quick

import jaxce

PAGE = (Path(__file__).parents[1] / "notebooks" / "migration.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([^|]+)` \| `([^|]+)` \|", re.M)


def section(library: str) -> str:
    return PAGE.partition(f"\n## {library}\n")[2].partition("\n## ")[0]


def rows(library: str) -> list[Any]:
    return [pytest.param(*row, id=row[0]) for row in ROW.findall(section(library))]


def example() -> dict[str, Any]:
    """What the tables' names stand for, in float32."""
    rng = np.random.default_rng(0)
    n, k = 6, 7
    y = np.array([0, 3, 0, 6, 2, 5], np.int32)
    arrays = {
        "x": 2 * rng.normal(size=(n, k)),
        "t": scipy.special.softmax(rng.normal(size=(n, k)), axis=-1),
        "q": scipy.special.softmax(rng.normal(size=(n, k)), axis=-1),
        "w": rng.uniform(0.2, 2.0, k),
        "s": rng.uniform(0.2, 2.0, n),
        "z": 2 * rng.normal(size=n),
        "b": np.array([0.0, 1.0, 1.0, 0.0, 1.0, 0.0]),
        "r": rng.uniform(0.1, 0.9, n),
        "c": np.array([0.0, 1.0, 4.0, 2.0, 0.0, 7.0]),
        "variance": rng.uniform(0.5, 2.0, n),
        "image_x": rng.normal(size=(2, k, 3, 4)),
        "h": rng.normal(size=(n, 4)),
        "e": rng.normal(size=(k, 4)),
        "bias": rng.normal(size=k),
        "l": rng.exponential(size=n),
        "pos_w": np.array(2.5),
        "u": rng.normal(size=(n, 4)),
        "m": np.zeros((n, k)),
    }
    arrays["u"] /= np.linalg.norm(arrays["u"], axis=-1, keepdims=True)
    m_list = np.array([[0, 3, 6], [1, -1, -1], [-1, -1, -1], [5, 2, -1], [6, 0, 1], [4, -1, -1]], np.int32)
    for row, listed in zip(arrays["m"], m_list, strict=True):
        row[listed[listed >= 0]] = 1
    arrays["log_q"], arrays["log_t"] = np.log(arrays["q"]), np.log(arrays["t"])
    floats = {name: array.astype(np.float32) for name, array in arrays.items()}
    return floats | {
        "y": y,
        "m_list": m_list,
        "ids": np.array([2, 0, 1, 2, 1, 0], np.int32),
        "padded_y": np.where(y == 0, np.int32(-100), y),
        "image_y": rng.integers(k, size=(2, 3, 4)).astype(np.int32),
    }


def evaluated(call: str, names: dict[str, Any]) -> np.ndarray:
    return np.asarray(quick(lambda arrays: eval(call, names | arrays))(example()))


def ours(call: str) -> np.ndarray:
    return evaluated(call, {name: getattr(jaxce, name) for name in jaxce.__all__} | {"jnp": jnp, "K": 7})


def close(got: np.ndarray, expected: Any) -> None:
    expected = np.asarray(expected)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-5)  # the peers' float32 is a few ulp off, and differences cancel


@pytest.mark.parametrize(("theirs", "call"), rows("Optax"))
def test_optax(theirs: str, call: str) -> None:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = evaluated(theirs, {"optax": optax, "jax": jax, "K": 7})
    close(ours(call), expected)


@pytest.mark.parametrize(("theirs", "call"), rows("PyTorch"))
def test_torch(theirs: str, call: str) -> None:
    torch = pytest.importorskip("torch")
    arrays = {name: torch.tensor(value) for name, value in example().items()}
    arrays |= {name: value.long() for name, value in arrays.items() if value.dtype == torch.int32}
    close(ours(call), eval(theirs, {"torch": torch, "F": torch.nn.functional} | arrays))


@pytest.fixture(scope="module")
def keras() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setenv("KERAS_BACKEND", "jax")
    yield pytest.importorskip("keras")
    patch.undo()


@pytest.mark.parametrize(("theirs", "call"), rows("Keras"))
def test_keras(keras: Any, theirs: str, call: str) -> None:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = eval(theirs, {"losses": importlib.import_module("keras.losses")} | example())
    close(ours(call), expected)


@pytest.mark.parametrize("library", ["Optax", "PyTorch", "Keras"])
def test_every_row_is_read(library: str) -> None:
    assert len(rows(library)) == len(re.findall(r"^\|", section(library), re.M)) - 2 > 10


def test_formulas() -> None:
    """What PyTorch and Keras document for an imbalance and for smoothing, also where neither is installed."""
    arrays = {name: np.asarray(value, float) for name, value in example().items()}
    x, t, w, z, b, m = (arrays[name] for name in "xtwzbm")
    # BCEWithLogitsLoss: l = -[p y log sigma(x) + (1 - y) log(1 - sigma(x))]
    log_p, log_not_p = scipy.special.log_expit(x), scipy.special.log_expit(-x)
    close(ours("sigmoid_binary_cross_entropy(x, t, pos_weight=w)"), -(w * t * log_p + (1 - t) * log_not_p))
    # BinaryCrossentropy: y (1 - s) + 0.5 s
    smooth = b * (1 - 0.1) + 0.5 * 0.1
    expected = -(smooth * scipy.special.log_expit(z) + (1 - smooth) * scipy.special.log_expit(-z))
    close(ours("sigmoid_binary_cross_entropy(z, b, label_smoothing=0.1)"), expected)
    # KLDivergence: sum of y log(y / q), also where the rows of q don't sum to 1
    (call,) = (row.values[1] for row in rows("Keras") if "KLDivergence" in str(row.values[0]))
    expected = scipy.special.xlogy(t, t / (2 * arrays["q"])).sum(-1).mean()
    close(ours(str(call).replace("(q)", "(2 * q)")), expected)
    # MultiLabelSoftMarginLoss: -1/C sum_c w_c [y_c log sigma(x_c) + (1 - y_c) log sigma(-x_c)]
    calls = {str(row.values[0]): str(row.values[1]) for row in rows("PyTorch") if "multilabel" in str(row.values[0])}
    terms = -(m * log_p + (1 - m) * log_not_p)
    for theirs, call in calls.items():
        close(ours(call), (w[None] * terms).mean(-1) if "weight" in theirs else terms.mean())
    assert len(calls) == 2 and sum("sparse" in call for call in calls.values()) == 1


def test_the_trap_of_padded_labels() -> None:
    """Weights alone leave the gradient NaN, as the row of ignore_index says; a mask in the loss as well doesn't."""
    x, y = example()["x"], example()["padded_y"]
    loss, counts = jaxce.softmax_cross_entropy_with_integer_labels, y != -100
    value, slope = quick(jax.value_and_grad(lambda x: jaxce.weighted_mean(loss(x, y), counts)))(x)
    both, right = quick(jax.value_and_grad(lambda x: jaxce.weighted_mean(loss(x, y, where=counts), counts)))(x)
    np.testing.assert_allclose(value, both, rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(slope).all(1), ~counts)
    np.testing.assert_allclose(right, np.where(counts[:, None], slope, 0), rtol=1e-6)


def test_labels_that_start_at_one() -> None:
    x, y = jnp.asarray(example()["x"]), jnp.asarray(example()["y"])
    loss = jaxce.softmax_cross_entropy_with_integer_labels
    from_one = y + 1
    np.testing.assert_array_equal(loss(x, from_one - 1), loss(x, y))
    np.testing.assert_array_equal(np.isnan(loss(x, from_one)), np.asarray(from_one) == 7)
