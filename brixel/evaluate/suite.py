"""Any set of models, tasks and data as one report with plots.

Every model at every size of every run is a part of its own, kept as JSON in `OUT/parts/` as soon as it is there: a
suite that was killed goes on with the next, and one that was changed runs what is new.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from brixel.brixel_features import BrixelFeatures
from brixel.errors import BrixelError
from brixel.evaluate.report import Report, write_json
from brixel.evaluate.report_plot import report_plot
from brixel.evaluate.suite_file import Part
from brixel.feature_maps.panel import save_panel
from brixel.utils.atomic_files import write_text

_DAY = re.compile(r"\d{4}-\d\d-\d\d(?=\.$)")  # with which a recipe ends; names of data may have days of their own
_SMALL = 2**26  # bytes of a model's file that is looked into to see whether the model changed
_FINGERPRINT = "model_files"  # in a part's JSON

Load = Callable[[Mapping[str, str]], BrixelFeatures]


@dataclass(frozen=True)
class _Kept:
    """What is there of a suite."""

    folder: Path

    def path(self, part: Part) -> Path:
        return self.folder / f"{part.key}.json"

    def content(self, part: Part) -> dict[str, Any] | None:
        path = self.path(part)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def holds(self, part: Part) -> bool:
        """Whether a part is there, of the model as it is now."""
        content = self.content(part)
        return content is not None and content.get(_FINGERPRINT) in (None, fingerprint_of(part.model))


def run_suite(parts: Sequence[Part], out: Path, command: str, load: Load, say: Callable[[str], None]) -> str:
    """Run what is not there yet, then write `report.md`, its plots and `report.json` into ``out``; the report.

    ``load``: from a table of the suite's models to the model. ``say``: told what begins. All that can be known before
    is checked first; where a part fails all the same, the report is of those that are there.
    """
    kept = _Kept(out / "parts")
    kept.folder.mkdir(parents=True, exist_ok=True)
    missing = [part for part in parts if not kept.holds(part)]
    _tell_kept(kept, parts, missing, say)
    _check(missing, load)
    loaded: tuple[str, BrixelFeatures] | None = None
    try:
        for number, part in enumerate(parts, 1):
            if part not in missing:
                continue
            say(f"{number} of {len(parts)}: {part.task.kind}, {part.name}, {part.task.teacher_px[0]} px")
            if loaded is None or loaded[0] != part.name:
                loaded = None  # not two at once
                loaded = part.name, load(part.model)
            content = part.task.run(loaded[1], part.name).content(command)
            write_json(kept.path(part), {**content, _FINGERPRINT: fingerprint_of(part.model)})
    except Exception:
        if there := [part for part in parts if kept.holds(part)]:
            _write(kept, there, out, command)
            say(f"the report in {out} is of the {len(there)} parts that are there")
        raise
    return _write(kept, parts, out, command)


def fingerprint_of(model: Mapping[str, str]) -> str | None:
    """Of the files of a local model, by which it is seen to have changed; None for others."""
    folder = Path(model.get("model", ""))
    if "model" not in model or not folder.is_dir():
        return None
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.stat().st_size <= _SMALL]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode("utf-8", "surrogateescape") + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _tell_kept(kept: _Kept, parts: Sequence[Part], missing: Sequence[Part], say: Callable[[str], None]) -> None:
    there = len(parts) - len(missing)
    if there:
        say(f"{there} of {len(parts)} parts are in {kept.folder} and kept; delete those to be run again")
    if changed := [part.name for part in missing if kept.content(part) is not None]:
        say(f"{len(changed)} parts are run again, since the model is another now: {', '.join(dict.fromkeys(changed))}")


def _check(parts: Sequence[Part], load: Load) -> None:
    """Raise BrixelError for all that is wrong with the parts' data, images, sources and models, together."""
    wrong: dict[str, None] = {}
    for task in dict.fromkeys(replace(part.task, teacher_px=(1,)) for part in parts):
        try:
            task.check()
        except (BrixelError, OSError) as error:
            wrong[str(error)] = None
    for name, table in {part.name: part.model for part in parts}.items():
        try:
            model = load(table)
            for part in parts:
                if part.name == name:
                    part.task.check_sides(model)
        except (BrixelError, OSError) as error:
            wrong[f"model {name!r}: {error}"] = None
    if wrong:
        raise BrixelError("\n- ".join(["nothing was run, since it would have failed:", *wrong]))


def _write(kept: _Kept, parts: Sequence[Part], out: Path, command: str) -> str:
    reports = list(merged([Report.from_content(content) for part in parts if (content := kept.content(part))]))
    sections = []
    for report, name in zip(reports, _names(reports), strict=True):
        save_panel(report_plot(report), out / name)
        sections += [report.markdown(command, level=2), f"![{report.title}]({name})"]
    text = "\n\n".join(["# Evaluation", *sections])
    write_json(out / "report.json", [report.content(command) for report in reports])
    write_text(out / "report.md", text + "\n")
    return text


def _names(reports: Sequence[Report]) -> list[str]:
    """Of the plots: by task, numbered from the second on."""
    tasks = [report.task for report in reports]
    counts = [tasks[: number + 1].count(task) for number, task in enumerate(tasks)]
    return [f"{task}.png" if count == 1 else f"{task}-{count}.png" for task, count in zip(tasks, counts, strict=True)]


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
