"""Hooks of the documentation site: what its plugins leave undone."""

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """The HTML of a page without Sphinx's roles, such as :meth:`save`, and with links of notebooks to pages."""
    html = re.sub(r":(?:meth|class|func|data|attr|mod):(?=<code>)", "", html)
    return re.sub(r'href="([^":]+)\.(?:md|ipynb)(#[^"]*)?"', r'href="\1.html\2"', html)
