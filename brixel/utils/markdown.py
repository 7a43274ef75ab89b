"""Markdown tables."""

import re
from collections.abc import Sequence

from brixel.errors import printable


def markdown_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[bool] | None = None
) -> list[str]:
    """The lines of a table.

    Args:
        headings: Titles of the columns.
        rows: Texts, one per column. White space becomes single spaces, and bars are escaped.
        numeric: Whether each column holds numbers, which are aligned to the right; None for none.

    Returns:
        The headings, the delimiter row, and one line per row.
    """
    marks = ["---:" if aligned else "---" for aligned in numeric or [False] * len(headings)]
    cells = [[_cell(text) for text in headings], marks, *([_cell(text) for text in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in cells]


def _cell(text: str) -> str:
    return printable(re.sub(r"\s+", " ", text)).replace("|", "\\|")
