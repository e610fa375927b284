"""What holds the package together: the reading order of its files, and what every public name owes its reader."""

from __future__ import annotations

import ast
import inspect
import re
import typing
from pathlib import Path

import pytest

import jaxce

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxce"
FILES = sorted(PACKAGE.glob("*.py"))
PUBLIC = sorted(jaxce.__all__)


def reading_order() -> list[str]:
    """The files in the order in which the page on the layout lists them, without ``__init__.py``."""
    page = (ROOT / "notebooks" / "layout.md").read_text(encoding="utf-8")
    picture = page[page.index("jaxce/\n") :].split("```")[0]
    return [name for name in re.findall(r"^\s+(\w+\.py)\b", picture, re.M) if name != "__init__.py"]


def imports(tree: ast.AST) -> set[str]:
    """The names of jaxce's modules that the code imports; "" is the package itself."""
    found: set[str] = set()
    modules = {path.stem for path in FILES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["jaxce" if node.level else "", node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "jaxce":
                module = name.split(".")[1] if "." in name else ""
                found.add(module if module in modules else "")
    return found


def test_layout_lists_every_file() -> None:
    order = reading_order()
    assert len(order) == len(set(order))
    assert set(order) == {path.name for path in FILES} - {"__init__.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_only_from_files_above(path: Path) -> None:
    order = [Path(name).stem for name in reading_order()]
    used = imports(ast.parse(path.read_text(encoding="utf-8")))
    if path.name == "__init__.py":
        allowed = set(order) - {"__main__"}
    elif path.name == "__main__.py":  # a user like any other: the public names only
        allowed = {""}
    else:
        allowed = set(order[: order.index(path.stem)])
    assert used <= allowed, f"{path.name} imports {sorted(used - allowed)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_optax_is_for_the_demonstration_only(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert path.name == "__main__.py" or "optax" not in {name.split(".")[0] for name in names}


def test_init_only_reexports() -> None:
    body = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant), "a docstring comes first"
    for node in body[1:]:
        assigned = (
            [target.id for target in node.targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.Assign)
            else []
        )
        assert isinstance(node, ast.ImportFrom) or assigned in (["__all__"], ["__version__"]), ast.unparse(node)


def test_all_is_what_is_imported() -> None:
    public = {name for name, value in vars(jaxce).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public - {"annotations"} == set(PUBLIC)
    assert len(PUBLIC) == len(set(PUBLIC))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_documented_and_typed(name: str) -> None:
    public = getattr(jaxce, name)
    doc = inspect.getdoc(public) or ""
    assert doc.splitlines()[0].strip().endswith("."), "the first line is a sentence"
    if not inspect.isclass(public):
        assert ">>> " in doc, "an example that runs"
    function = inspect.unwrap(public)
    if inspect.isclass(function):
        assert typing.get_type_hints(function), "typed fields"
        return
    signature = inspect.signature(function)
    missing = [p.name for p in signature.parameters.values() if p.annotation is inspect.Parameter.empty]
    assert not missing, f"{missing} without a type"
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_errors_about_arguments_are_raised_without_a_name(path: Path) -> None:
    """`compiled` and `named` put the function's name before them, once."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            assert ast.unparse(node.exc.func) not in ("TypeError", "ValueError"), ast.unparse(node)
            assert "{function}" not in ast.unparse(node), ast.unparse(node)
