"""Builds the documentation site: `make docs`, without a network."""

from bge_rerank_adapters import __version__

project = "bge_rerank_adapters"
author = "The authors of bge_rerank_adapters"
project_copyright = author
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "fieldlist"]
myst_heading_anchors = 3
# No intersphinx: it would fetch other projects' lists of names at each build.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r".*")]

# Docstrings write code in single backticks, as Markdown does.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
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
}
copybutton_exclude = ".linenos, .gp, .go"
