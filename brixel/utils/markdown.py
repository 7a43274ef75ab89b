"""Markdown tables."""

import re
from collections.abc import Mapping, Sequence


def markdown_table(headings: Mapping[str, bool] | Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format the lines of a table.

    Args:
        headings: Titles of the columns. A mapping says which columns hold numbers, which are aligned to the right.
        rows: One text per column; white space is collapsed, and bars are escaped.

    Returns:
        The headings, the delimiter row, and one line per row.
    """
    numeric = list(headings.values()) if isinstance(headings, Mapping) else [False] * len(headings)
    cells = [
        list(headings),
        ["---:" if is_numeric else "---" for is_numeric in numeric],
        *([_cell(text) for text in row] for row in rows),
    ]
    return [f"| {' | '.join(line)} |" for line in cells]


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
