"""Executes notebooks without Jupyter: the code cells in order, in one namespace, where the notebook lies.

    python tests/run_notebook.py [--output FILE] NOTEBOOK ...

writes what the cells print, return and draw into the notebooks themselves, or into FILE. It keeps of Jupyter's behaviour
what our notebooks use: a last expression is shown unless a semicolon follows, and open figures are shown after their cell.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any


def execute(notebook: dict[str, Any]) -> None:
    """Run the cells and put their outputs into ``notebook``; the first error ends it."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        cell["outputs"] = _run("".join(cell["source"]), namespace, number)
        cell["execution_count"] = number


def _run(source: str, namespace: dict[str, Any], number: int) -> list[dict[str, Any]]:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value = None
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        exec(compile(tree, f"<cell {number}>", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"<cell {number}>", "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    for name, text in (("stdout", out.getvalue()), ("stderr", err.getvalue())):
        if text:
            outputs.append({"name": name, "output_type": "stream", "text": text.splitlines(keepends=True)})
    if value is not None and not source.rstrip().endswith(";"):
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs + [
        {
            "data": {"image/png": image, "text/plain": ["<Figure>"]},
            "metadata": {"image/png": size},
            "output_type": "display_data",
        }
        for image, size in _figures()
    ]


def _figures() -> list[tuple[str, dict[str, int]]]:
    """Open figures as PNG, in 256 colours, and the size to show them in, which is that of their inches at 100 per inch."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return []
    from PIL import Image  # which matplotlib needs, too

    images = []
    for figure in map(pyplot.figure, pyplot.get_fignums()):
        full, small = io.BytesIO(), io.BytesIO()
        figure.savefig(full, format="png")
        Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
        width, height = (round(100 * inches) for inches in figure.get_size_inches())
        images.append((base64.b64encode(small.getvalue()).decode(), {"width": width, "height": height}))
    pyplot.close("all")
    return images


def main() -> None:
    """Executes the notebooks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    os.environ["MPLBACKEND"] = "Agg"
    for path in map(Path.resolve, options.notebooks):
        output = (options.output or path).resolve()
        notebook = json.loads(path.read_text(encoding="utf-8"))
        with contextlib.chdir(path.parent):
            execute(notebook)
        notebook["metadata"]["language_info"]["version"] = platform.python_version()
        output.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
