"""Reports: a table of results and how it was made, as Markdown and as JSON."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brixel.errors import BrixelError, printable
from brixel.utils.atomic_files import check_folder, write_text
from brixel.utils.fields import (
    Rule,
    check_field,
    check_table,
    json_table,
    number,
    optional,
    several,
    short_repr,
    table_of,
    text,
)
from brixel.utils.markdown import markdown_table
from brixel.utils.memory import format_bytes

SOURCE_COLUMNS = {"model": ("model", ""), "image_px": ("image, px", "d"), "source": ("source", "")}
"""What every report that compares feature sources begins with."""

_TEACHER_PX = "teacher_px"
_MOST_COLUMNS = 12  # of a table that has a line for each row

_OLD_KEYS = {"picture_px": "image_px", "image_px": "student_px"}  # of version 0.1, the second in reports of costs
_FORM = re.compile(r"|d|of|bytes|\+?\.\d[f%g]")


def _column(value: Any) -> tuple[str, str]:
    heading, form = value
    if not isinstance(heading, str) or not isinstance(form, str) or not _FORM.fullmatch(form):
        raise ValueError
    return heading, form


def _value(value: Any) -> Any:
    plain = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    if not all(each is None or isinstance(each, str | int | float) for each in plain):
        raise TypeError
    return value


_VALUE = Rule("a number, a text, None, or a pair of numbers", _value)
_INTERVAL = optional(several(number(finite=False), "a pair of numbers", count=2))
_TEXT = text(empty=True)
_RULES = {
    **{"task": text(), "title": _TEXT, "recipe": _TEXT},
    "columns": table_of(Rule("a heading and a format", _column), "a heading and a format by key"),
    "rows": several(json_table(), "a list of tables", single=False),
    "notes": several(_TEXT, "a list of texts", single=False),
    "details": optional(json_table()),
}
_OLD_PICTURES = re.compile(r"(?<=\d )pictures\b|(?<=% of the )pictures(?= to fit)")  # in recipes of version 0.1


@dataclass(frozen=True)
class Report:
    """A table of results, and how it was made.

    Args:
        task: What was evaluated, such as "segmentation".
        title: The heading.
        columns: By key of a row: the column's heading, and a format such as ".3f"; "" for text, "bytes" for amounts of
            memory, "of" for counts. Keys of rows without a column are in the JSON alone.
        rows: Plain JSON values: numbers, texts, None (shown as "-"), or pairs of numbers (shown as "low to high", or
            "23 of 24" for counts).
        recipe: On what data and machine.
        notes: Sentences below the table.
        details: Further JSON values, such as results by image.
    """

    task: str
    title: str
    columns: Mapping[str, tuple[str, str]]
    rows: Sequence[Mapping[str, Any]]
    recipe: str
    notes: Sequence[str] = ()
    details: Mapping[str, Any] | None = None

    def markdown(self, command: str, level: int = 1) -> str:
        """Write the report as Markdown.

        Args:
            command: The command that made the report.
            level: Level of the heading.

        Returns:
            A section with the table, notes, recipe and command.
        """
        table = self._table_by_size(level + 1) if self._is_wide else self._table()
        notes = [*(f"- {note}" for note in self.notes), ""] if self.notes else []
        heading = f"{'#' * level} {self.title}"
        return "\n".join([heading, "", *table, "", *notes, self.recipe, "Made by:", "", f"    {command}"])

    @property
    def _is_wide(self) -> bool:
        """Whether no terminal has room for a line of the table, and the rows of a size belong together."""
        return len(self.columns) > _MOST_COLUMNS and self.columns.keys() >= {*SOURCE_COLUMNS, _TEACHER_PX}

    def _table(self) -> list[str]:
        """A line for each row."""
        return markdown_table(
            [heading for heading, _ in self.columns.values()],
            [[shown(row.get(key), form) for key, (_, form) in self.columns.items()] for row in self.rows],
            numeric=[bool(form) for _, form in self.columns.values()],
        )

    def _table_by_size(self, level: int) -> list[str]:
        """For each model and size a table under a heading, with a line for each metric and a column for each source."""
        metrics = {key: column for key, column in self.columns.items() if key not in (*SOURCE_COLUMNS, _TEACHER_PX)}
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for row in self.rows:
            image_px, teacher_px = (shown(row.get(key), "d") for key in ("image_px", _TEACHER_PX))
            groups.setdefault(f"{row.get('model')}, {image_px} px, teacher {teacher_px} px", []).append(row)
        lines: list[str] = []
        for caption, rows in groups.items():
            cells = [[name, *(shown(row.get(key), form) for row in rows)] for key, (name, form) in metrics.items()]
            table = markdown_table(
                ["", *(shown(row.get("source"), "") for row in rows)],
                cells,
                numeric=[False, *(True for _ in rows)],
                pad=True,
            )
            lines += [f"{'#' * level} {' '.join(caption.split())}", "", *table, ""]
        return lines[:-1]

    def content(self, command: str) -> dict[str, Any]:
        """Convert the report to JSON values, which :meth:`from_content` reads.

        Args:
            command: The command that made the report.

        Returns:
            The fields of the report and the command, by name.
        """
        columns = {key: list(column) for key, column in self.columns.items()}
        return {
            **{"task": self.task, "title": self.title, "command": command, "recipe": self.recipe},
            **{"columns": columns, "rows": [dict(row) for row in self.rows], "notes": list(self.notes)},
            "details": None if self.details is None else dict(self.details),
        }

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> "Report":
        """Read the values that :meth:`content` returned, also in version 0.1.

        Args:
            content: The values. Rows of version 0.1 have "picture_px" in place of "image_px".

        Returns:
            The report.

        Raises:
            BrixelError: They are not those of a report.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        fields = check_table("the report", {name: content[name] for name in names if name in content}, _RULES)
        for index, row in enumerate(fields["rows"], 1):
            for key, value in row.items():
                check_field(f"{short_repr(key)} in row {index}", value, _INTERVAL if "interval" in key else _VALUE)
        columns = fields["columns"]
        if "picture_px" in columns:
            columns = {key: (head.replace("picture", "image"), form) for key, (head, form) in _renamed(columns).items()}
            fields["rows"] = [_renamed(row) for row in fields["rows"]]
            start = fields["recipe"].find(": ") + 1  # before it the data are named, which may be a path
            fields["recipe"] = fields["recipe"][:start] + _OLD_PICTURES.sub("images", fields["recipe"][start:])
            fields["notes"] = [note.replace("pictures", "images") for note in fields["notes"]]
        return cls(**{**fields, "columns": columns})


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row or the columns of version 0.1 with today's keys."""
    return {_OLD_KEYS.get(key, key): value for key, value in values.items()}


def shown(value: Any, form: str) -> str:
    """A value as the table shows it."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    between, form = (" of ", "") if form == "of" else (" to ", form)
    if isinstance(value, (list, tuple)):
        return between.join(shown(end, form) for end in value)
    try:
        return format_bytes(value) if form == "bytes" else format(value, form)
    except (ValueError, TypeError, OverflowError):  # of a report that was changed: a fraction where counts are
        return str(value)


def check_markdown(path: Path | None) -> None:
    """Raise BrixelError where no report can be written to ``path``; called before the work is done."""
    if path is not None:
        if path.suffix != ".md":
            json_path = path.with_suffix(".json")
            raise BrixelError(f"{path}: expected a name that ends in .md; the same results go to {json_path}")
        check_folder(path)
        if path.is_dir():
            raise BrixelError(f"{path} is a folder; expected the name of a file to write")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_report(report: Report, command: str, path: Path | None) -> None:
    """Print the Markdown; with a path, write it there, and the JSON to the same name with .json."""
    text = "\n".join(map(printable, report.markdown(command).split("\n")))
    print(text)
    if path is not None:
        write_json(path.with_suffix(".json"), report.content(command))
        write_text(path, text + "\n")
