"""Sphinx's settings for `make site`; docs/pages.py writes the sources."""

import os
import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = "hdkd_lib"
author = "The hdkd_lib authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "index"

nb_execution_mode = "off"  # notebooks are shown as they are committed
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
default_role = "literal"  # `name` in a docstring
highlight_language = "none"  # where a block does not name its language
napoleon_use_ivar = True

html_math_renderer = "mathml"

html_theme = "sphinx_book_theme"
html_copy_source = False
html_use_index = False
html_title = "hdkd_lib"
html_static_path = [os.path.join(os.path.dirname(__file__), "static")]
html_css_files = ["site.css"]
html_theme_options = {"show_navbar_depth": 1, "home_page_in_toc": True, "navbar_persistent": [], "use_download_button": False}
if repository := os.environ.get("HDKD_REPOSITORY"):  # https://HOST/OWNER/NAME, for the link in the header
    html_theme_options |= {"repository_url": repository, "use_repository_button": True}


def _as_written(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text: `*`, `|` and `_` mean themselves, and an indented paragraph is shown as it is written."""
    section, paragraphs = False, []
    for paragraph in "\n".join(lines).split("\n\n"):
        if not paragraph.startswith(" "):
            section = bool(re.match(r"(Args|Attributes|Raises|Returns|Yields):\n", paragraph))
        if section or not re.search(r"^ ", paragraph, re.MULTILINE) or re.match(r"(- |\d\. )", paragraph):
            marks = r"(``.+?``|`[^`]+`)|([*|]|_(?!\w))"
            paragraphs.append(re.sub(marks, lambda found: found[1] or "\\" + found[2], paragraph))
        else:
            paragraphs.append("::\n\n" + re.sub(r"^(?=.)", "    ", paragraph, flags=re.MULTILINE))
    lines[:] = "\n\n".join(paragraphs).split("\n")


def _mathml(display: str):
    """Formulas as MathML, which browsers show without a script from elsewhere."""

    def visit(translator, node) -> None:
        tag = "span" if display == "inline" else "div"  # which scrolls where the formula is wider than the page
        translator.body.append(f'<{tag} class="formula">{convert(node.astext(), display=display)}</{tag}>')
        raise SkipNode

    return visit, None


def setup(app) -> None:
    app.add_html_math_renderer("mathml", _mathml("inline"), _mathml("block"))
    app.connect("autodoc-process-docstring", _as_written, priority=400)  # before napoleon reads the sections
