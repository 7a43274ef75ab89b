"""Any set of models, tasks and data as one report, written down in a TOML file.

Every model at every size of every run is a part of its own, kept as JSON in `OUT/parts/` as soon as it is there: a
suite that was killed goes on with the next, and one that was changed runs what is new. Paths are taken from the folder
one works in. `examples/suite_paper.toml` shows the format.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from brixel.atomic import write_text
from brixel.errors import BrixelError, did_you_mean
from brixel.evaluate.report import Report, write_json
from brixel.evaluate.tasks import FIELDS, Task
from brixel.features import BrixelFeatures
from brixel.toml_file import read_toml

_MODEL_KEYS = ("model", "backbone", "architecture")
_PATHS = ("data", "cache")
_DAY = re.compile(r"\d{4}-\d\d-\d\d(?=\.$)")  # with which a recipe ends; names of data may have days of their own


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
    """The parts of a suite in its order. Raises BrixelError for a key or a model that is not known."""
    content = read_toml(path, "suite")
    _check_keys(content, ("models", "run", "cache"), str(path))
    models, runs = content.get("models", {}), content.get("run", [])
    if not models or not runs:
        raise BrixelError(f"{path} has {len(models)} models and {len(runs)} runs; expected [models.NAME] and [[run]]")
    for name, each in models.items():
        _check_keys(each, _MODEL_KEYS, f"[models.{name}] of {path}")
    return [part for number, run in enumerate(runs, 1) for part in _parts(content, run, f"run {number} of {path}")]


def _parts(content: Mapping[str, Any], run: Mapping[str, Any], where: str) -> Iterator[Part]:
    models = content["models"]
    _check_keys(run, ("task", "models", *(name for name in FIELDS if name not in ("kind", "cache"))), where)
    names = run.get("models", list(models))
    fields = {
        key: value for key, value in {**run, "kind": run.get("task", "")}.items() if key not in ("task", "models")
    }
    fields.update({key: Path(fields[key]) for key in _PATHS if key in fields})
    fields.update({key: tuple(fields[key]) for key in ("teacher_px", "sources") if key in fields})
    fields["images"] = tuple(Path(each) for each in fields.get("images", ()))
    task = Task(**{"teacher_px": (), **fields, "cache": Path(content["cache"]) if "cache" in content else None})
    for name in names:
        if name not in models:
            raise BrixelError(f"{where} names the model {name!r}; {did_you_mean(name, models)}")
        for side in task.teacher_px:
            yield Part(name, models[name], replace(task, teacher_px=(side,)))


def run_suite(
    parts: list[Part],
    out: Path,
    command: str,
    load: Callable[[Mapping[str, str]], BrixelFeatures],
    say: Callable[[str], None],
) -> str:
    """Run what is not there yet, then write `report.md` and `report.json` into ``out``; the report.

    ``load``: from a table of the suite's models to the model. ``say``: told what begins.
    """
    folder = out / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    loaded: tuple[str, BrixelFeatures] | None = None
    for number, part in enumerate(parts, 1):
        path = folder / f"{part.key}.json"
        if path.exists():
            continue
        say(f"{number} of {len(parts)}: {part.task.kind}, {part.name}, {part.task.teacher_px[0]} px")
        if loaded is None or loaded[0] != part.name:
            loaded = part.name, load(part.model)
        write_json(path, part.task.run(loaded[1], part.name).content(command))
    contents = [json.loads((folder / f"{part.key}.json").read_text(encoding="utf-8")) for part in parts]
    reports = list(merged([Report.from_content(each) for each in contents]))
    text = "\n\n".join(["# Evaluation", *(report.markdown(command, level=2) for report in reports)])
    write_json(out / "report.json", [report.content(command) for report in reports])
    write_text(out / "report.md", text + "\n")
    return text


def merged(reports: list[Report]) -> Iterator[Report]:
    """Reports of one task on one data set as one, rows in order; of several days where they differ in that alone."""
    groups: dict[tuple[str, str], list[Report]] = {}
    for report in reports:
        groups.setdefault((report.task, _DAY.sub("", report.recipe)), []).append(report)
    for group in groups.values():
        rows = [row for report in group for row in report.rows]
        days = sorted({day for report in group for day in _DAY.findall(report.recipe)})
        recipe = _DAY.sub(" to ".join({days[0]: 0, days[-1]: 0}), group[0].recipe) if days else group[0].recipe
        yield replace(group[0], rows=rows, recipe=recipe, details={"parts": [report.details for report in group]})


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := [key for key in table if key not in known]:
        raise BrixelError(f"{where} has the unknown key {unknown[0]!r}; {did_you_mean(unknown[0], known)}")
