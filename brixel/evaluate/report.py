"""A table of figures that says how it was made: Markdown for people and the same numbers as JSON."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brixel.errors import BrixelError
from brixel.utils.atomic_files import check_folder, write_text


@dataclass(frozen=True)
class Report:
    """Rows of plain JSON values, and what of them is shown.

    ``columns``: by key of a row, its heading and a format such as ".3f", empty for text; keys without a column are in
    the JSON alone. A value may be a number, a text, None (shown as "-") or a pair of numbers (shown as "low to high").
    ``recipe``: on what data and machine; ``notes``: sentences below the table. ``details``: further JSON values, such
    as figures by image.
    """

    task: str
    title: str
    columns: Mapping[str, tuple[str, str]]
    rows: Sequence[Mapping[str, Any]]
    recipe: str
    notes: Sequence[str] = ()
    details: Mapping[str, Any] | None = None

    def markdown(self, command: str, level: int = 1) -> str:
        """A section with the table, the recipe and the command; ``level`` of its heading."""
        table = [
            [heading for heading, _ in self.columns.values()],
            ["---:" if form else "---" for _, form in self.columns.values()],
            *([shown(row.get(key), form) for key, (_, form) in self.columns.items()] for row in self.rows),
        ]
        lines = [f"{'#' * level} {self.title}", "", *(f"| {' | '.join(cells)} |" for cells in table), ""]
        notes = [*(f"- {note}" for note in self.notes), ""] if self.notes else []
        return "\n".join([*lines, *notes, self.recipe, "Made by:", "", f"    {command}"])

    def content(self, command: str) -> dict[str, Any]:
        """The same as JSON values; :meth:`from_content` turns it back."""
        columns = {key: list(each) for key, each in self.columns.items()}
        return {
            **{"task": self.task, "title": self.title, "command": command, "recipe": self.recipe},
            **{"columns": columns, "rows": [dict(row) for row in self.rows], "notes": list(self.notes)},
            "details": None if self.details is None else dict(self.details),
        }

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> "Report":
        """What :meth:`content` gave."""
        fields = {field.name: content[field.name] for field in dataclasses.fields(cls)}
        columns = {key: (heading, form) for key, (heading, form) in content["columns"].items()}
        return cls(**{**fields, "columns": columns})


def shown(value: Any, form: str) -> str:
    """A value as it stands in the table."""
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return " to ".join(shown(each, form) for each in value)
    return format(value, form)


def check_markdown(path: Path | None) -> None:
    """Raise BrixelError where no report can be written to ``path``; asked before the work is done."""
    if path is None:
        return
    if path.suffix != ".md":
        raise BrixelError(
            f"{path}: expected a name that ends in .md; the same figures go to {path.with_suffix('.json')}"
        )
    check_folder(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_report(report: Report, command: str, path: Path | None) -> None:
    """Print the Markdown; where a path is given, write it there, and the JSON beside it."""
    text = report.markdown(command)
    print(text)
    if path is not None:
        write_json(path.with_suffix(".json"), report.content(command))
        write_text(path, text + "\n")
