"""The notebooks run, and say what their checked-in outputs say."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = ["01_from_surprise_to_loss"]
NEEDS = {"02_training": ["flax", "equinox"]}
NUMBER = re.compile(r"(?<![\w.])-?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)(?![\w])")


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text(output: dict[str, Any]) -> str:
    return "".join(output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"])


def last_place(number: str) -> float:
    """One in the last printed digit of a decimal fraction; whole numbers are exact."""
    mantissa, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2])) if "." in mantissa else 0.0


def agree(got: str, expected: str) -> bool:
    """The same words, and numbers the same to three digits, or to one in the last digit that is printed."""
    if NUMBER.sub("#", got).split() != NUMBER.sub("#", expected).split():
        return False
    pairs = zip(NUMBER.findall(got), NUMBER.findall(expected), strict=True)
    return all(
        a == b or math.isclose(float(a), float(b), rel_tol=1e-3, abs_tol=1.01 * max(last_place(a), last_place(b)))
        for a, b in pairs
    )


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        ("loss 0.4076", "loss  0.4077\n", True),
        ("loss 0.4076", "loss 0.4096", False),
        ("loss 0.4076", "cost 0.4076", False),
        ("[1.2345e-20 inf nan]", "[1.2346e-20 inf nan]", True),
        ("[1.2345e-20]", "[1.2545e-20]", False),
        ("1797 images", "1796 images", True),
        ("20 images", "21 images", False),
        ("float32[2,3]", "float32[2,4]", False),
        ("nan", "0.5", False),
    ],
)
def test_agree(got: str, expected: str, same: bool) -> None:
    assert agree(got, expected) == same


def version(notebook: Any) -> str:
    """The Python that ran it, whose manual is the text that some are trained on."""
    return notebook["metadata"]["language_info"]["version"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_checked_in(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run in order, at once"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}, "no error"
    assert all(output.get("name") != "stderr" for output in outputs), "no warning"
    images = [output["data"]["image/png"] for output in outputs if output["output_type"] == "display_data"]
    assert images and all(len(image) < 200_000 for image in images), "figures, none of them large"
    assert notebook["cells"][0]["cell_type"] == "markdown" and notebook["cells"][0]["source"][0].startswith("# ")


@pytest.mark.parametrize(
    "path",
    [path if path.stem in QUICK else pytest.param(path, marks=pytest.mark.slow) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_notebook(path: Path, tmp_path: Path) -> None:
    for name in ["matplotlib", "sklearn", *NEEDS.get(path.stem, [])]:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_notebook.py"), str(path), "--output", str(tmp_path / path.name)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path]))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    notebook = json.loads(path.read_text(encoding="utf-8"))
    expected, got = code_cells(notebook), code_cells(json.loads((tmp_path / path.name).read_text(encoding="utf-8")))
    python = "{}.{}.".format(*sys.version_info)
    other_text = "load_text" in path.read_text(encoding="utf-8") and not version(notebook).startswith(python)
    for before, after in zip(expected, got, strict=True):
        cell = "".join(before["source"])
        outputs, checked_in = ([o for o in c["outputs"] if o.get("name") != "stderr"] for c in (after, before))
        assert [o["output_type"] for o in outputs] == [o["output_type"] for o in checked_in], cell
        if not other_text and "varies" not in before["metadata"].get("tags", []):
            for new, old in zip(outputs, checked_in, strict=True):
                assert agree(text(new), text(old)), f"{cell}\n\nprints\n{text(new)}\ninstead of\n{text(old)}"
