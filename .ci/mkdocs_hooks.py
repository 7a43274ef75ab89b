"""Hooks of the documentation site: roles of Sphinx in docstrings, such as :meth:`save`, become plain code."""

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """The HTML of a page without the names of roles."""
    return re.sub(r":(?:meth|class|func|data|attr|mod):(?=<code>)", "", html)
