"""Tables in Markdown."""

import re
from collections.abc import Mapping, Sequence


def markdown_table(headings: Mapping[str, bool] | Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table.

    Args:
        headings: Titles of the columns; as a mapping, whether each holds numbers, which are aligned to the right.
        rows: Texts, one per column. White space becomes single spaces, and bars are escaped.

    Returns:
        The heading, the line below it, and a line per row.
    """
    numeric = list(headings.values()) if isinstance(headings, Mapping) else [False] * len(headings)
    cells = [
        list(headings),
        ["---:" if each else "---" for each in numeric],
        *([_cell(each) for each in row] for row in rows),
    ]
    return [f"| {' | '.join(line)} |" for line in cells]


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
