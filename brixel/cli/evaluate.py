"""`brixel evaluate`: how good a model is."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brixel.brixel_features import BrixelFeatures
from brixel.cli.options import add_device_options, add_model_options, command, load, positive
from brixel.evaluate.cost.scaling import cost
from brixel.evaluate.cost_plot import cost_plot
from brixel.evaluate.datasets.depth_normals import DEPTH_LAYOUTS, NORMALS_LAYOUTS
from brixel.evaluate.datasets.labelled import LAYOUTS
from brixel.evaluate.feature_sources import SOURCES, STUDENT, TEACHER, sources_of
from brixel.evaluate.panels import panel_of
from brixel.evaluate.report import check_markdown, write_report
from brixel.evaluate.suite import run_suite
from brixel.evaluate.suite_file import read_suite
from brixel.evaluate.tasks import BOUNDARY_PX, DEFAULT_SOURCES, FIELDS, Task
from brixel.feature_maps.panel import check_panel_path, save_panel
from brixel.images.find_images import find_images

_SHOWN = ("bilinear", STUDENT, TEACHER)
_REPORT_HELP = "write the report here, its figures as JSON beside"


def add(commands: Any) -> None:
    """Add the command to the parser's, with a command of its own for each thing to evaluate."""
    judges = commands.add_parser("evaluate", help="how good a model is").add_subparsers(required=True, metavar="WHAT")
    one = _task(judges, "fidelity", "nearness to the backbone on the large image, beside interpolation")
    _add_images(one)

    one = _task(judges, "segmentation", "classes of pixels by a linear probe on frozen features")
    _add_data(one, tuple(LAYOUTS))
    one.add_argument("--boundary-px", type=positive, default=BOUNDARY_PX, metavar="PX", help="default: %(default)s")

    one = _task(judges, "depth", "metres to what is seen, by a small convolutional readout on frozen features")
    _add_data(one, tuple(DEPTH_LAYOUTS))

    one = _task(judges, "normals", "directions of surfaces, by a small convolutional readout on frozen features")
    _add_data(one, tuple(NORMALS_LAYOUTS))

    one = _task(judges, "matching", "points found again in a warped image by their features")
    _add_images(one)

    one = command(judges, "cost", _cost, "parameters, operations, time and memory as images grow; random weights")
    one.add_argument(
        "--architecture", nargs="+", default=["dinov3-vits16"], metavar="NAME", help="default: %(default)s"
    )
    one.add_argument("--image-px", nargs="+", type=positive, default=[256], metavar="PX", help="default: %(default)s")
    one.add_argument("--batch-size", nargs="+", type=positive, default=[1], metavar="N", help="default: %(default)s")
    one.add_argument("--rounds", type=int, default=10, help="timed; 0 to count operations alone; default: %(default)s")
    one.add_argument("-o", "--output", type=Path, metavar="MD", help=f"{_REPORT_HELP}, and a plot")
    add_device_options(one)

    one = command(judges, "panel", _panel, "images of the maps of several sources, side by side")
    one.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="images, and folders")
    one.add_argument("--teacher-px", type=positive, required=True, metavar="PX", help="side of the teacher's image")
    one.add_argument("--sources", nargs="+", choices=SOURCES, default=_SHOWN, help=f"default: {' '.join(_SHOWN)}")
    one.add_argument(
        "--point", nargs=2, type=float, metavar=("ROW", "COLUMN"), help="also the likeness of all cells to that one"
    )
    one.add_argument("-o", "--output", type=Path, default=Path("panel.png"), help="default: %(default)s")
    add_model_options(one)

    one = command(judges, "suite", _suite, "any set of models, tasks and data, as one report; goes on where it was")
    one.add_argument("suite", type=Path, metavar="TOML", help="such as examples/suite_paper.toml")
    one.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="for report.md with its plots, and report.json"
    )
    add_device_options(one)


def _task(judges: Any, kind: str, text: str) -> argparse.ArgumentParser:
    one = command(judges, kind, _run, text)
    one.set_defaults(kind=kind)
    sides = "sides of the teacher's image; the student's is a quarter"
    one.add_argument("--teacher-px", nargs="+", type=positive, required=True, metavar="PX", help=sides)
    usual = DEFAULT_SOURCES[kind]
    one.add_argument("--sources", nargs="+", choices=SOURCES, default=usual, help=f"default: {' '.join(usual)}")
    one.add_argument("-o", "--output", type=Path, metavar="MD", help=_REPORT_HELP)
    add_model_options(one)
    return one


def _add_images(one: argparse.ArgumentParser) -> None:
    one.add_argument("--images", nargs="+", type=Path, required=True, metavar="PATH", help="images, and folders")


def _add_data(one: argparse.ArgumentParser, layouts: tuple[str, ...]) -> None:
    one.add_argument("--data", type=Path, required=True, metavar="DIR", help="the data set's folder, as it unpacks")
    one.add_argument("--layout", choices=layouts, default="plain", help="how it is laid out; default: %(default)s")
    one.add_argument("--train", default="train", metavar="SPLIT", help="to fit; default: %(default)s")
    one.add_argument("--val", default="val", metavar="SPLIT", help="to report; default: %(default)s")
    one.add_argument("--cache", type=Path, metavar="DIR", help="keeps features, also for later runs; default: memory")
    one.add_argument("--steps", type=positive, help="of training; default: by the kind of probe")
    one.add_argument("--limit", type=positive, metavar="N", help="only the first N images of each split")


def _run(options: argparse.Namespace) -> int:
    check_markdown(options.output)
    given: dict[str, Any] = {name: value for name, value in vars(options).items() if name in FIELDS}
    given.update({name: tuple(value) for name, value in given.items() if isinstance(value, list)})
    task = Task(**given)
    write_report(task.run(load(options)), options.command, options.output)
    return 0


def _panel(options: argparse.Namespace) -> int:
    images = [path for path, _ in find_images(options.images)]
    check_panel_path(options.output, images)
    point = None if options.point is None else (options.point[0], options.point[1])
    made = panel_of(sources_of(load(options), options.sources), images, options.teacher_px, point)
    save_panel(made, options.output)
    print(options.output)
    return 0


def _cost(options: argparse.Namespace) -> int:
    check_markdown(options.output)
    where = {"device": options.device, "dtype": options.dtype}
    sizes = {"batch_sizes": options.batch_size, "rounds": options.rounds}
    report = cost(options.architecture, options.image_px, **sizes, **where)
    write_report(report, options.command, options.output)
    if options.output is not None:
        save_panel(cost_plot(report.rows), options.output.with_suffix(".png"))
    return 0


def _suite(options: argparse.Namespace) -> int:
    parts = read_suite(options.suite)

    def loaded(table: Mapping[str, str]) -> BrixelFeatures:
        named = {name: table.get(name) for name in ("model", "backbone", "architecture")}
        return load(argparse.Namespace(**named, device=options.device, dtype=options.dtype))

    print(run_suite(parts, options.output, options.command, loaded, lambda text: print(text, file=sys.stderr)))
    return 0
