"""Builds the documentation site: `make docs`, without a network."""

import re
from importlib import import_module
from typing import Any

from bge_rerank_adapters import __version__

# Imported here, since autodoc imports with `TYPE_CHECKING` true, which hosts do not stand.
for host in ("haystack", "langchain", "llama_index", "milvus", "ray", "cross_encoder"):
    import_module(f"bge_rerank_adapters.{host}")

project = "bge_rerank_adapters"
author = project
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "fieldlist"]
myst_heading_anchors = 3
# No intersphinx: it would fetch other projects' lists of names at each build.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!bge_rerank_adapters).*"),
    # Protocols of documents and a type variable, which the texts describe.
    (r"py:.*", r"bge_rerank_adapters\.calls\.(documents\.Has\w+|base\.SettingsT)"),
]

# Docstrings write code as Markdown does.
default_role = "code"
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
autodoc_member_order = "bysource"
autodoc_typehints = "description"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False

html_theme = "sphinx_book_theme"
html_title = "bge_rerank_adapters"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
    # The side bar has the search already.
    "navbar_persistent": [],
    "footer_content_items": [],
}
html_show_copyright = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"


def setup(app: Any) -> None:
    """Read docstrings' Markdown, fences and single backticks, before napoleon does."""
    app.connect("autodoc-process-docstring", _from_markdown, priority=400)


def _from_markdown(*arguments: Any) -> None:
    lines = arguments[-1]
    fenced, done = False, []
    for line in lines:
        fence = re.fullmatch(r"(\s*)```(\w*)", line)
        if fence is None:
            done.append(f"    {line}" if fenced else CODE.sub(r"``\1``", line))
        elif fenced := not fenced:
            done += [f"{fence[1]}.. code-block:: {fence[2] or 'text'}", ""]
    lines[:] = done
