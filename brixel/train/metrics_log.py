"""To watch a run: metrics as JSON lines."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brixel.utils.atomic_files import write_text


class Metrics:
    """One JSON object a line; lines of steps that a taken-up run has still to do are dropped on opening."""

    def __init__(self, path: Path, done_steps: int) -> None:
        self.path = path
        kept = [record for record in self.records() if record["step"] <= done_steps]
        text = "".join(f"{json.dumps(record)}\n" for record in kept)
        write_text(path, text)  # a run may be killed here, too

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record, which has at least a ``step``."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(record)}\n")

    def records(self) -> list[dict[str, Any]]:
        """All records; a last line that was cut off is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
