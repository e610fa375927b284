"""How Sphinx builds the site, by ``sphinx-build -W notebooks build/site``: of the pages, notebooks and docstrings."""

import re

import jaxce

project, author, copyright = "jaxce", "The jaxce developers", "2026, the jaxce developers"
version = release = jaxce.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",
]
default_role = "py:obj"  # `LinearLogits` in a docstring is a link

html_theme = "furo"
html_title = "jaxce"
html_static_path = html_css_files = ["site.css"]
html_theme_options = {
    "top_of_page_buttons": [],
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}

nb_execution_mode = "off"  # the outputs are those that the tests compare
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text, copybutton_prompt_is_regexp = r">>> |\.\.\. ", True

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_type_aliases = {name: name for name in ("ArrayLike", "Axis", "AxisName", "AnyLogits", "DTypeLike")}
python_maximum_signature_line_length = 80
napoleon_google_docstring, napoleon_numpy_docstring = True, False


def _as_page(app, page, source):
    """Links to what lies beside this folder lead to the pages that include it; the empty line after a doctest goes."""
    for before, after in (
        ("](../README.md)", "](index.md)"),
        ("](../CONTRIBUTING.md)", "](contributing.md)"),
        ("\n\n```\n", "\n```\n"),
    ):
        source[0] = source[0].replace(before, after)


def _short_types(app, what, name, obj, options, signature, result):
    """``ArrayLike | None`` as it is written, and no constructor where ``empty`` and ``from_batch`` make the object."""
    if what == "class" and name.startswith("jaxce.metrics."):
        return "", None
    return [
        text
        and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text).replace("_M", "Self").replace("_Nll", "Array | None")
        for text in (signature, result)
    ]


def _linked_table(app, what, name, obj, options, lines):
    """The table in the docstring of jaxce, whose columns are aligned for a terminal, with a link for each function."""
    rules = [i for i, line in enumerate(lines) if line.startswith("====")]
    if name != "jaxce" or len(rules) != 3:
        return
    starts = [match.start() for match in re.finditer("=+", lines[rules[0]])]
    names = "|".join(sorted(jaxce.__all__, key=len, reverse=True))
    table = [".. list-table::", "   :header-rows: 1", "   :widths: 22 50 28", ""]
    for line in lines[rules[0] + 1 : rules[1]] + lines[rules[1] + 1 : rules[2]]:
        cells = [line[i:j].strip() for i, j in zip(starts, [*starts[1:], None], strict=True)]
        cells[1] = re.sub(rf"\b({names})\b(?!=)", r"`~jaxce.\1`\\ ", cells[1])
        cells[2] = cells[2].replace("->", "\N{RIGHTWARDS ARROW}")
        task, *rest = (cell.removeprefix("..") for cell in cells)
        table += [f"   * - {task}", *(f"     - {cell}" for cell in rest)]
    lines[rules[0] : rules[2] + 1] = [*table, ""]


def setup(app):
    """Sphinx calls this."""
    app.connect("source-read", _as_page)
    app.connect("autodoc-process-signature", _short_types)
    app.connect("autodoc-process-docstring", _linked_table)
