"""Markdown tables."""

import re
from collections.abc import Sequence

from brixel.errors import printable


def markdown_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numeric: Sequence[bool] | None = None,
    pad: bool = False,
) -> list[str]:
    """The lines of a table.

    Args:
        headings: Titles of the columns.
        rows: Texts, one per column. White space becomes single spaces, and bars are escaped.
        numeric: Whether each column holds numbers, which are aligned to the right; None for none.
        pad: Whether the columns are made as wide as their widest cell, for people who read the lines as they are.

    Returns:
        The headings, the delimiter row, and one line per row.
    """
    numeric = numeric or [False] * len(headings)
    marks = ["---:" if aligned else "---" for aligned in numeric]
    cells = [[_cell(text) for text in headings], marks, *([_cell(text) for text in row] for row in rows)]
    if pad:
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells[1] = [
            "-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, numeric, strict=True)
        ]
        cells = [
            [
                text.rjust(width) if right else text.ljust(width)
                for text, width, right in zip(line, widths, numeric, strict=True)
            ]
            for line in cells
        ]
    return [f"| {' | '.join(line)} |" for line in cells]


def _cell(text: str) -> str:
    return printable(re.sub(r"\s+", " ", text)).replace("|", "\\|")
