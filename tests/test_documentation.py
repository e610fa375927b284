"""README and the pages: their code runs and prints what they say, links lead somewhere, and no function is missing."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from test_notebooks import agree

import jaxce

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "notebooks").rglob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def test_readme_is_one_page() -> None:
    assert len(README.encode()) <= 14_000


def test_readme_prints_what_it_says() -> None:
    """Its blocks, which continue one another, each before the output that follows it, if one does; with JAX's defaults."""
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, re.S)
    assert len(blocks) > 3 and ">>>" not in README
    for code, expected in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as printed, jax.numpy_dtype_promotion("standard"):
            exec(compile(code, "<README>", "exec"), names)
        assert agree(printed.getvalue(), expected), f"{code}\nprints\n{printed.getvalue()}instead of\n{expected}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        file, _, heading = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.is_file(), f"{target}: no such file"
        headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.M)
        anchors = {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}
        assert not heading or heading in anchors, f"{target}: no such heading"


def test_examples_on_eight_devices() -> None:
    """The page on meshes prints the same on eight devices as on one, which is how it is run beside the other pages."""
    program = "import jax, pytest, sys; assert jax.device_count() == 8; sys.exit(pytest.main())"
    path = [ROOT, *sys.path]
    flags = "--xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", program, "-q", "-p", "no:cacheprovider", str(ROOT / "notebooks" / "meshes.md")],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout


@pytest.mark.parametrize("where", ["README", "help", "API"])
def test_every_public_name_is_listed(where: str) -> None:
    """In README's table, in that of `help(jaxce)`, and once on the pages of the API."""
    if where == "API":
        pages = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "notebooks" / "api").glob("*.md")))
        listed = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", pages, re.M)
        assert sorted(listed) == sorted({*jaxce.__all__, *jaxce.metrics.__all__} - {"Metric", "Sum"})
    else:
        text = README if where == "README" else inspect.getdoc(jaxce) or ""
        missing = {name for name in jaxce.__all__ if not re.search(rf"\b{name}\b", text)}
        assert missing <= ({"SoftmaxStatistics", "safe_softmax_cross_entropy"} if where == "README" else set())


@pytest.mark.parametrize("name", [n for n in jaxce.__all__ if inspect.isfunction(getattr(jaxce, n))])
def test_docstrings_have_one_template(name: str) -> None:
    """A line, the definition, and then the same sections in the same order, as in Optax."""
    text = inspect.getdoc(getattr(jaxce, name)) or ""
    assert re.findall(r"^(\w+):$", text, re.M) == ["Args", "Returns", "Examples", "References"]
    lines = text.splitlines()
    assert lines[0].endswith(".") and not lines[1]
    arguments = re.findall(r"^  (\w+): ", text.partition("Args:\n")[2].partition("\nReturns:")[0], re.M)
    assert arguments == list(inspect.signature(getattr(jaxce, name)).parameters)


def test_math_is_on_one_line() -> None:
    """A role that is broken over two lines is shown with its backquotes, as text."""
    for path in [*(ROOT / "jaxce").glob("*.py"), *PAGES]:
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r":\w+:`[^`\n]*\n", text), path.name
        assert text.count("$$") % 2 == 0, path.name


def test_the_picture_is_of_measured_figures() -> None:
    """Those of README's alternative text, which are rounded, and of its list."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("picture", ROOT / "benchmarks" / "picture.py")
    assert spec and spec.loader
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    costs = picture.costs((ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8"))
    alternative = " ".join(re.findall(r"!\[(.*?)\]", README, re.S)[0].split())
    for name, cost in costs.items():
        assert f"{name} {cost.gigabytes:.1f} GB and {cost.milliseconds:.0f} ms" in alternative
    for figure in (
        f"**{costs['LinearLogits'].gigabytes:.1f} GB**",
        f"instead of {costs['Optax'].gigabytes:.1f} GB",
        f"with {costs['linear_cross_entropy'].gigabytes:.1f} GB",
    ):
        assert figure in README
