"""How Sphinx builds the site, by ``sphinx-build -W notebooks build/site``: of the pages, notebooks and docstrings."""

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
html_static_path, html_extra_path = [], ["loss.svg"]
html_theme_options = {
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


def _links(app, page, source):
    """What lies beside this folder, by the pages that include it."""
    source[0] = source[0].replace("](../README.md)", "](index.md)").replace("](../CONTRIBUTING.md)", "](contributing.md)")


def setup(app):
    """Sphinx calls this."""
    app.connect("source-read", _links)
