"""The metrics of a run as JSON lines."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brixel.utils.atomic_files import write_text


class Metrics:
    """A file with one JSON object per line. Opening it drops the lines of steps after ``done_steps``."""

    def __init__(self, path: Path, done_steps: int) -> None:
        self.path = path
        records = [record for record in self.records() if record["step"] <= done_steps]
        write_text(path, "".join(f"{json.dumps(record)}\n" for record in records))

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record, which must have a ``step``."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(record)}\n")

    def records(self) -> list[dict[str, Any]]:
        """All records, without a last line that was cut off."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
