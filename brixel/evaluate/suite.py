"""Suites: any set of models, tasks and data as one report with plots.

A part is one model at one size of one run. Its report is kept as JSON in `OUT/parts/`, so that a suite that was
interrupted goes on with the next part, and one that was changed runs what is new.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from brixel.brixel_features import BrixelFeatures
from brixel.errors import BrixelError
from brixel.evaluate.plots import plots_available, report_figure, save_plot
from brixel.evaluate.report import Report, write_json
from brixel.evaluate.suite_file import Part
from brixel.utils.atomic_files import write_text
from brixel.utils.fields import check_field, check_table, json_table, one_of, text, whole_number
from brixel.utils.structured_files import checking_content, read_json_value

_DAY = re.compile(r"\d{4}-\d\d-\d\d(?=\.$)")  # the date at a recipe's end; names of data may contain dates too
_SMALL = 2**26  # files of a model up to so many bytes are read to see whether the model changed
_FINGERPRINT = "model_files"  # in a part's JSON
_MOST_BYTES = 2**29  # of a part, which holds the results of every image
_ROW_RULES = {"model": text(), "image_px": whole_number(1, 2**31), "source": text()}  # what plots need of every row

Load = Callable[[Mapping[str, str]], BrixelFeatures]


def run_suite(parts: Sequence[Part], out: Path, command: str, load: Load, say: Callable[[str], None]) -> str:
    """Run the parts that are not done yet, then write the report of all.

    Everything that can be checked in advance is checked before the first part is run. Where a part fails all the same,
    the report is written of the parts that are done, and the error is raised.

    Args:
        parts: Of :func:`read_suite`.
        out: The folder for `report.md` with its plots, `report.json` and `parts/`; made if it is missing.
        command: The command line, for the report.
        load: From a table of the suite's models, such as ``{"model": "folder"}``, to the model.
        say: Called with a line of text when a part begins.

    Returns:
        The report, as Markdown.

    Raises:
        BrixelError: Data, images, sources or models are not as expected; the message lists all that is wrong.
    """
    folder = out / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [part for part in parts if not _is_done(folder, part)]
    _say_done(folder, parts, missing, say)
    _check(missing, load)
    plots_available()  # a warning is of use now, not after hours of work
    loaded: tuple[str, BrixelFeatures] | None = None
    try:
        for number, part in enumerate(parts, 1):
            if part not in missing:
                continue
            say(f"{number} of {len(parts)}: {part.task.kind}, {part.name}, {part.task.teacher_px[0]} px")
            if loaded is None or loaded[0] != part.name:
                loaded = None  # free the last model before the next is loaded
                loaded = part.name, load(part.model)
            content = part.task.run(loaded[1], part.name).content(command)
            write_json(folder / f"{part.key}.json", {**content, _FINGERPRINT: fingerprint_of(part.model)})
    except Exception:
        if done := [part for part in parts if _is_done(folder, part)]:
            _write(done, out, command)
            say(f"the report in {out} contains the {len(done)} parts that are done")
        raise
    return _write(parts, out, command)


def fingerprint_of(model: Mapping[str, str]) -> str | None:
    """A hash of the files of a local model, which shows whether it changed; None for other models."""
    folder = Path(model.get("model", ""))
    if "model" not in model or not folder.is_dir():
        return None
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.stat().st_size <= _SMALL]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode("utf-8", "surrogateescape") + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _content(folder: Path, part: Part) -> dict[str, Any] | None:
    """What was kept of a part that is done; None where it is not."""
    path = folder / f"{part.key}.json"
    if not path.exists():
        return None
    with checking_content(path, "the report of a part", "delete it to run the part again"):
        content = read_json_value(path, finite=False, most_bytes=_MOST_BYTES)
        report = Report.from_content(check_field("the file", content, json_table()))
        check_field("task", report.task, one_of(part.task.kind))
        for number, row in enumerate(report.rows, 1):
            check_table(f"row {number}", {name: row.get(name) for name in _ROW_RULES}, _ROW_RULES)
        return dict(content)


def _is_done(folder: Path, part: Part) -> bool:
    """Whether there is a report of the part, with the model as it is now."""
    content = _content(folder, part)
    return content is not None and content.get(_FINGERPRINT) in (None, fingerprint_of(part.model))


def _say_done(folder: Path, parts: Sequence[Part], missing: Sequence[Part], say: Callable[[str], None]) -> None:
    if done := len(parts) - len(missing):
        say(f"{done} of {len(parts)} parts are done and kept in {folder}; delete those to be run again")
    if changed := [part.name for part in missing if _content(folder, part) is not None]:
        names = ", ".join(dict.fromkeys(changed))
        say(f"{len(changed)} parts are run again, because their model has changed: {names}")


def _check(parts: Sequence[Part], load: Load) -> None:
    """Raise one BrixelError for everything that is wrong with the parts' data, images, sources and models."""
    errors: dict[str, None] = {}
    for task in dict.fromkeys(replace(part.task, teacher_px=(1,)) for part in parts):
        try:
            task.check()
        except (BrixelError, OSError) as error:
            errors[str(error)] = None
    for name, table in {part.name: part.model for part in parts}.items():
        try:
            model = load(table)
            for part in parts:
                if part.name == name:
                    part.task.check_sides(model)
        except (BrixelError, OSError) as error:
            errors[f"model {name!r}: {error}"] = None
    if errors:
        raise BrixelError("\n- ".join(["nothing was run, because it would have failed:", *errors]))


def _write(parts: Sequence[Part], out: Path, command: str) -> str:
    contents = [content for part in parts if (content := _content(out / "parts", part))]
    reports = list(merged([Report.from_content(content) for content in contents]))
    sections = []
    for report, name in zip(reports, _plot_names(reports), strict=True):
        sections.append(report.markdown(command, level=2))
        if save_plot(functools.partial(report_figure, report), out / name):
            sections.append(f"![{report.title}]({name})")
    text = "\n\n".join(["# Evaluation", *sections])
    write_json(out / "report.json", [report.content(command) for report in reports])
    write_text(out / "report.md", text + "\n")
    return text


def _plot_names(reports: Sequence[Report]) -> list[str]:
    """File names by task, numbered from the second report of a task."""
    tasks = [report.task for report in reports]
    counts = [tasks[: number + 1].count(task) for number, task in enumerate(tasks)]
    return [f"{task}.png" if count == 1 else f"{task}-{count}.png" for task, count in zip(tasks, counts, strict=True)]


def merged(reports: Sequence[Report]) -> Iterator[Report]:
    """Join the reports of one task whose recipes are equal but for the date: rows in order, first and last date.

    The columns are those of the report that has most: earlier versions wrote fewer.
    """
    groups: dict[tuple[str, str], list[Report]] = {}
    for report in reports:
        groups.setdefault((report.task, _DAY.sub("", report.recipe)), []).append(report)
    for group in groups.values():
        rows = [row for report in group for row in report.rows]
        days = sorted({day for report in group for day in _DAY.findall(report.recipe)})
        recipe = _DAY.sub(" to ".join({days[0]: 0, days[-1]: 0}), group[0].recipe) if days else group[0].recipe
        columns = max((report.columns for report in group), key=len)
        details = {"parts": [report.details for report in group]}
        yield replace(group[0], columns=columns, rows=rows, recipe=recipe, details=details)
