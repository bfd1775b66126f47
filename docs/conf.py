"""What Sphinx is told about the site; `build_site.py` calls it."""

import re
from typing import Any

from aioloader import __version__

project = "aioloader"
author = "The aioloader authors"
project_copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "index"
exclude_patterns: list[str] = []
html_theme = "furo"
html_title = f"aioloader {version}"
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
pygments_style = "default"
pygments_dark_style = "monokai"

myst_heading_anchors = 4  # as on GitHub: the pages link to these
myst_enable_extensions = ["colon_fence"]

default_role = "py:obj"  # `name` in a docstring: a link where there is such a thing, else code
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"
autodoc_preserve_defaults = True  # `tell=print`, and not what the repr of a function is
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

CLASS = re.compile(r"<class '(?:\w+\.)*(\w+)'>")
FENCE = re.compile(r"^\s*```(\w*)$")


def fences(_app: Any, _what: str, _name: str, _of: Any, _options: Any, lines: list[str]) -> None:
    """Fenced blocks of docstrings, which editors show as code, as reStructuredText has them."""
    found: list[str] = []
    inside = False
    for line in lines:
        if fence := FENCE.match(line):
            inside = not inside
            indent = line[: len(line) - len(line.lstrip())]
            found += [f"{indent}.. code-block:: {fence[1] or 'text'}", ""] if inside else [""]
        else:
            found.append(f"    {line}" if inside and line else line)
    lines[:] = found


def signature(
    _app: Any, _what: str, _name: str, _of: Any, _options: Any, text: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Defaults as they are written: those of dataclasses are known by their reprs alone."""
    return text and CLASS.sub(r"\1", text).replace("<factory>", "..."), returns


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", fences, priority=100)  # before napoleon
