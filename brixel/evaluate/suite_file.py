"""The TOML file of a suite, read and checked before anything is run.

Paths are relative to the working directory. `examples/suite_paper.toml` shows the format.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from brixel.errors import BrixelError
from brixel.evaluate.tasks import KINDS, PROBES, VIDEO, Task
from brixel.utils.fields import check_field, check_names, several, short_repr, text, whole_number
from brixel.utils.structured_files import read_toml

_LONGEST_NAME = 160  # bytes of a model's name in a file name
_TEXTS = several(text(), "texts", least=1)
_NUMBERS = several(whole_number(1, 2**16), "whole numbers from 1 to below 65536", least=1)
_MODEL_KEYS = {"model": text(), "backbone": text(), "architecture": text()}
_COMMON_KEYS = {"task": text(), "models": _TEXTS, "teacher_px": _NUMBERS, "sources": _TEXTS}
_PROBE_KEYS = {
    **{"data": text(), "layout": text(), "train": text(), "val": text()},
    **{"steps": whole_number(1), "limit": whole_number(1)},
}
_VIDEO_KEYS = {name: _PROBE_KEYS[name] for name in ("data", "val", "limit")}


@dataclass(frozen=True)
class Part:
    """One model at one size of one run."""

    name: str
    model: Mapping[str, str]
    task: Task

    @property
    def key(self) -> str:
        """A file name that depends on all settings that differ from the defaults, except ``cache``."""
        defaults = {field.name: field.default for field in dataclasses.fields(Task)}
        given = {name: value for name, value in vars(self.task).items() if name != "cache" and value != defaults[name]}
        parts: tuple[object, ...] = (sorted(self.model.items()), sorted(given.items()))
        name = re.sub(r"[^\w.-]", "_", self.name)
        if name != self.name or len(name.encode()) > _LONGEST_NAME:  # others might become the same
            name, parts = name[: _LONGEST_NAME // 4], (*parts, self.name)
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
        return f"{self.task.kind}-{name}-{self.task.teacher_px[0]}-{digest}"


def read_suite(path: Path) -> list[Part]:
    """Read the file of a suite.

    Args:
        path: A TOML file with tables ``[models.NAME]`` and ``[[run]]``.

    Returns:
        The parts in the file's order: for :func:`run_suite`.

    Raises:
        BrixelError: The file is missing, or a key, a value or the name of a model is not as expected.
    """
    content = read_toml(path, "suite")
    check_names(content, ("models", "run", "cache"), f"{path} has the unknown key")
    models, runs = content.get("models", {}), content.get("run", [])
    if not isinstance(models, dict) or not isinstance(runs, list) or not models or not runs:
        raise BrixelError(f"{path} lacks models or runs; expected tables [models.NAME] and [[run]] (two brackets)")
    for name, table in models.items():
        where = f"[models.{name}] of {path}"
        if not isinstance(table, dict):
            raise BrixelError(
                f'{where} is {short_repr(table)}; expected a table with model = "..." or backbone = "..."'
            )
        check_names(table, _MODEL_KEYS, f"{where} has the unknown key")
        for key, value in table.items():
            check_field(f"{key} in {where}", value, _MODEL_KEYS[key])
    return [part for number, run in enumerate(runs, 1) for part in _parts(content, run, f"run {number} of {path}")]


def _parts(content: Mapping[str, Any], run: object, where: str) -> Iterator[Part]:
    fields = _task_fields(run, where)
    models = content["models"]
    names = fields.pop("models", tuple(models))
    check_names(names, models, f"{where} names the model")
    if "cache" in content:
        fields["cache"] = Path(check_field("cache", content["cache"], text()))
    task = Task(**{"teacher_px": (), **fields})
    for name in names:
        for side in task.teacher_px:
            yield Part(name, models[name], replace(task, teacher_px=(side,)))


def _task_fields(run: object, where: str) -> dict[str, Any]:
    """The settings of a run as fields of a task, and the names of its models."""
    if not isinstance(run, dict):
        raise BrixelError(f"{where} is {short_repr(run)}; expected a table, [[run]]")
    kind = run.get("task", "")
    check_names([kind], KINDS, f"{where} has the unknown task")
    own_keys = _PROBE_KEYS if kind in PROBES else _VIDEO_KEYS if kind == VIDEO else {"images": _TEXTS}
    rules = _COMMON_KEYS | own_keys
    rules |= {"boundary_px": whole_number(1)} if kind == "segmentation" else {}
    check_names(run, rules, f"{where} ({kind}) has the unknown key")
    fields = {key: check_field(f"{key} in {where}", value, rules[key]) for key, value in run.items()}
    fields["kind"] = fields.pop("task")
    fields |= {"data": Path(fields["data"])} if "data" in fields else {}
    return fields | ({"images": tuple(map(Path, fields["images"]))} if "images" in fields else {})
