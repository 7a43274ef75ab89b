"""The TOML file of a suite: read and checked, so that a mistake is told before days of work and not after.

Paths are taken from the folder one works in. `examples/suite_paper.toml` shows the format.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from brixel.errors import BrixelError, did_you_mean
from brixel.evaluate.tasks import KINDS, PROBES, Task
from brixel.utils.toml import read_toml

_MODEL_KEYS = ("model", "backbone", "architecture")
_TEXTS, _NUMBERS = "texts", "whole numbers above zero"  # of which lists are made; one stands for a list of one
_TEXT, _NUMBER = "a text", "a whole number above zero"
_COMMON = {"task": _TEXT, "models": _TEXTS, "teacher_px": _NUMBERS, "sources": _TEXTS}
_OF_PROBES = {"data": _TEXT, "layout": _TEXT, "train": _TEXT, "val": _TEXT, "steps": _NUMBER, "limit": _NUMBER}


@dataclass(frozen=True)
class Part:
    """One model at one size of one run."""

    name: str
    model: Mapping[str, str]
    task: Task

    @property
    def key(self) -> str:
        """A file name that follows from all settings that are not the usual ones, but for where features are kept."""
        usual = {field.name: field.default for field in dataclasses.fields(Task)}
        given = {name: value for name, value in vars(self.task).items() if name != "cache" and value != usual[name]}
        settings = repr((sorted(self.model.items()), sorted(given.items())))
        digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
        return f"{self.task.kind}-{self.name}-{self.task.teacher_px[0]}-{digest}"


def read_suite(path: Path) -> list[Part]:
    """The parts of a suite in its order. Raises BrixelError for a key, a value or a model that is not as expected."""
    content = read_toml(path, "suite")
    _check_keys(content, ("models", "run", "cache"), str(path))
    models, runs = content.get("models", {}), content.get("run", [])
    if not _is_table(models) or not isinstance(runs, list) or not models or not runs:
        raise BrixelError(f"{path} lacks models or runs; expected tables [models.NAME] and [[run]] (two brackets)")
    for name, each in models.items():
        where = f"[models.{name}] of {path}"
        if not _is_table(each):
            raise BrixelError(f'{where} is {each!r}; expected a table with model = "..." or backbone = "..."')
        _check_keys(each, _MODEL_KEYS, where)
        for key, value in each.items():
            _checked(value, _TEXT, f"{key} in {where}")
    return [part for number, run in enumerate(runs, 1) for part in _parts(content, run, f"run {number} of {path}")]


def _parts(content: Mapping[str, Any], run: Mapping[str, Any], where: str) -> Iterator[Part]:
    fields = _fields(run, where)
    models = content["models"]
    names = fields.pop("models", tuple(models))
    if "cache" in content:
        fields["cache"] = Path(_checked(content["cache"], _TEXT, "cache"))
    task = Task(**{"teacher_px": (), **fields})
    for name in names:
        if name not in models:
            raise BrixelError(f"{where} names the model {name!r}; {did_you_mean(name, models)}")
        for side in task.teacher_px:
            yield Part(name, models[name], replace(task, teacher_px=(side,)))


def _fields(run: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a run says, as fields of a task, and its models."""
    kind = run.get("task", "")
    if kind not in KINDS:
        raise BrixelError(f"{where} has the unknown task {kind!r}; {did_you_mean(str(kind), KINDS)}")
    expected = {**_COMMON, **(_OF_PROBES if kind in PROBES else {"images": _TEXTS})}
    expected |= {"boundary_px": _NUMBER} if kind == "segmentation" else {}
    _check_keys(run, tuple(expected), f"{where} ({kind})")
    fields = {key: _checked(value, expected[key], f"{key} in {where}") for key, value in run.items()}
    fields["kind"] = fields.pop("task")
    fields |= {"data": Path(fields["data"])} if "data" in fields else {}
    return fields | ({"images": tuple(map(Path, fields["images"]))} if "images" in fields else {})


def _checked(value: Any, expected: str, where: str) -> Any:
    """The value; a tuple of them where several are expected."""
    several = expected in (_TEXTS, _NUMBERS)
    values = value if several and isinstance(value, list) else [value]
    if expected in (_TEXT, _TEXTS):
        right = all(isinstance(each, str) and each for each in values)
    else:
        right = all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in values)
    if not right or not values:
        raise BrixelError(f"{where} is {value!r}; expected {expected}")
    return tuple(values) if several else value


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := [key for key in table if key not in known]:
        raise BrixelError(f"{where} has the unknown key {unknown[0]!r}; {did_you_mean(unknown[0], known)}")
