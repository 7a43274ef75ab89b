"""`brixel evaluate`: how good a model is, and what it costs."""

import argparse
import functools
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from brixel.brixel_features import BrixelFeatures
from brixel.cli.options import (
    add_device_options,
    add_model_options,
    command,
    height_by_width,
    load,
    positive,
    whole,
)
from brixel.errors import BrixelError
from brixel.evaluate import cost, panel_of, read_suite, run_suite, sources_of, throughput
from brixel.evaluate.cost.memory import ARCHITECTURES, SIDES, limit_table, memory_table
from brixel.evaluate.cost.throughput import draw_images
from brixel.evaluate.cost.timing import random_model, torch_threads
from brixel.evaluate.datasets.depth_normals import DEPTH_LAYOUTS, NORMALS_LAYOUTS
from brixel.evaluate.datasets.labelled import LAYOUTS
from brixel.evaluate.feature_sources import SOURCES
from brixel.evaluate.plots import cost_figure, plots_available, save_plot
from brixel.evaluate.report import check_markdown, write_report
from brixel.evaluate.tasks import BOUNDARY_PX, COMPARED, DEFAULT_SOURCES, FIELDS, Task
from brixel.feature_maps.panel import check_panel_path, save_panel
from brixel.images.find_images import find_images
from brixel.inference.memory.planner import TileMode
from brixel.utils.devices import choose_device, choose_dtype
from brixel.utils.memory import parse_bytes

TINY = "brixel-tiny"
_REPORT_HELP = "write the report here, and its results as JSON to the same name with .json"
_TEACHER_HELP = "of the teacher's square image; the student's has a quarter of the side"
_THREADS_HELP = "threads of torch; default: its own choice"


def add(commands: Any) -> None:
    """Add the command to the parser's, with a command of its own for everything that can be evaluated."""
    parser = commands.add_parser("evaluate", help="how good a model is, and what it costs")
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    _add_images(_add_task(kinds, "fidelity", "similarity to the backbone's map of the large image"))
    one = _add_task(kinds, "segmentation", "semantic segmentation by a linear probe on frozen features")
    _add_data(one, tuple(LAYOUTS))
    _add_number(one, "--boundary-px", BOUNDARY_PX, "PX", "width of the strips along outlines for the boundary IoU")
    one = _add_task(kinds, "depth", "depth in metres by a small convolutional readout on frozen features")
    _add_data(one, tuple(DEPTH_LAYOUTS))
    one = _add_task(kinds, "normals", "surface normals by a small convolutional readout on frozen features")
    _add_data(one, tuple(NORMALS_LAYOUTS))
    _add_images(_add_task(kinds, "matching", "points of an image found in a warp of it by their features"))
    _add_cost(kinds)
    _add_throughput(kinds)
    _add_memory(kinds)
    _add_panel(kinds)
    _add_suite(kinds)


def _add_task(kinds: Any, kind: str, text: str) -> argparse.ArgumentParser:
    one = command(kinds, kind, _run, text)
    one.set_defaults(kind=kind)
    one.add_argument(
        "--teacher-px", nargs="+", type=positive, required=True, metavar="PX", help=f"sides {_TEACHER_HELP}"
    )
    _add_sources(one, DEFAULT_SOURCES[kind])
    one.add_argument("-o", "--output", type=Path, metavar="MD", help=_REPORT_HELP)
    add_model_options(one)
    return one


def _add_sources(one: argparse.ArgumentParser, default: tuple[str, ...]) -> None:
    text = f"what is compared, of {', '.join(SOURCES)}; default: {' '.join(default)}"
    one.add_argument("--sources", nargs="+", choices=SOURCES, default=default, metavar="SOURCE", help=text)


def _add_number(one: argparse.ArgumentParser, flag: str, default: int, metavar: str, text: str) -> None:
    one.add_argument(flag, type=positive, default=default, metavar=metavar, help=f"{text}; default: %(default)s")


def _add_images(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--images", nargs="+", type=Path, required=True, metavar="PATH", help="images, and folders of them"
    )


def _add_data(one: argparse.ArgumentParser, layouts: tuple[str, ...]) -> None:
    one.add_argument("--data", type=Path, required=True, metavar="DIR", help="the data set's folder, as unpacked")
    one.add_argument("--layout", choices=layouts, default="plain", help="the data set's layout; default: %(default)s")
    one.add_argument("--train", default="train", metavar="SPLIT", help="split that is trained on; default: %(default)s")
    one.add_argument("--val", default="val", metavar="SPLIT", help="split that is reported; default: %(default)s")
    one.add_argument("--cache", type=Path, metavar="DIR", help="keep features here, for later runs; default: in memory")
    one.add_argument("--steps", type=positive, metavar="N", help="steps of training; default: by the kind of probe")
    one.add_argument("--limit", type=positive, metavar="N", help="use only the first N images of each split")


def _add_architectures(one: argparse.ArgumentParser, default: tuple[str, ...], text: str = "") -> None:
    text = f"known backbones, with random weights{text}; default: {' '.join(default)}"
    one.add_argument("--architectures", nargs="+", default=default, metavar="NAME", help=text)


def _add_cost(kinds: Any) -> None:
    one = command(kinds, "cost", _cost, "parameters, operations, time and memory by size of image; random weights")
    _add_architectures(one, ("dinov3-vits16",))
    one.add_argument(
        "--image-px",
        nargs="+",
        type=positive,
        default=[256],
        metavar="PX",
        help="sides of the student's image; default: 256",
    )
    one.add_argument(
        "--batch-size", nargs="+", type=positive, default=[1], metavar="N", help="images per call; default: 1"
    )
    one.add_argument(
        "--rounds", type=whole, default=10, metavar="N", help="timed calls, 0 to only count; default: %(default)s"
    )
    one.add_argument("--threads", type=positive, metavar="N", help=_THREADS_HELP)
    one.add_argument("-o", "--output", type=Path, metavar="MD", help=f"{_REPORT_HELP}, and a plot with .png")
    add_device_options(one)


def _add_throughput(kinds: Any) -> None:
    one = command(kinds, "throughput", _throughput, "images per second from files to files, and of the bare model")
    _add_architectures(one, (TINY,), f", and {TINY} with its own")
    one.add_argument("--images", type=Path, metavar="DIR", help="a folder of images; default: drawings of --size")
    one.add_argument(
        "--size",
        type=height_by_width,
        default=(480, 640),
        metavar="HEIGHTxWIDTH",
        help="of the drawings in pixels; default: 480x640",
    )
    _add_number(one, "--count", 48, "N", "number of drawings")
    _add_number(one, "--rounds", 7, "N", "timed passes over all images")
    _add_number(one, "--batch-size", 1, "N", "images per call of the model")
    one.add_argument("--workers", type=whole, default=2, metavar="N", help="threads that decode; default: %(default)s")
    one.add_argument("--threads", type=positive, metavar="N", help=_THREADS_HELP)
    one.add_argument("-o", "--output", type=Path, metavar="MD", help=_REPORT_HELP)
    add_device_options(one)


def _add_memory(kinds: Any) -> None:
    one = command(kinds, "memory", _memory, "memory needed by size of image on the CPU, predicted or measured")
    _add_architectures(one, ARCHITECTURES)
    sides = " ".join(map(str, SIDES))
    one.add_argument(
        "--image-px", nargs="+", type=positive, default=SIDES, metavar="PX", help=f"sides of images; default: {sides}"
    )
    one.add_argument(
        "--measure",
        nargs="+",
        default=(),
        type=_name_and_side,
        metavar="NAME=PX",
        help="also compute images up to this side and measure, such as dinov3-vits16=512",
    )
    one.add_argument(
        "--limits",
        nargs="+",
        default=(),
        metavar="AMOUNT",
        help="instead, compute images within these limits and measure, such as 100MiB 4GiB",
    )
    one.add_argument("--dtype", default="float32", help="with --limits, of weights and maps; default: %(default)s")
    one.add_argument(
        "--tiles", choices=get_args(TileMode), default="auto", help="with --limits, use of tiles; default: %(default)s"
    )
    one.add_argument("-o", "--output", type=Path, metavar="MD", help=_REPORT_HELP)


def _add_panel(kinds: Any) -> None:
    one = command(kinds, "panel", _panel, "an image of the maps of several sources, side by side")
    one.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="images, and folders of them")
    one.add_argument("--teacher-px", type=positive, required=True, metavar="PX", help=f"side {_TEACHER_HELP}")
    _add_sources(one, COMPARED)
    one.add_argument(
        "--point",
        nargs=2,
        type=float,
        metavar=("ROW", "COLUMN"),
        help="also show the similarity of all cells to the one at this pixel of the teacher's image",
    )
    one.add_argument("-o", "--output", type=Path, default=Path("panel.png"), help="default: %(default)s")
    add_model_options(one)


def _add_suite(kinds: Any) -> None:
    one = command(kinds, "suite", _suite, "models, tasks and data of a file as one report; continues where it stopped")
    one.add_argument("suite", type=Path, metavar="TOML", help="such as examples/suite_paper.toml")
    text = "folder for report.md with its plots, and report.json"
    one.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help=text)
    add_device_options(one)


def _name_and_side(text: str) -> tuple[str, int]:
    name, equals, side = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an architecture and a side, such as dinov3-vits16=512")
    return name, positive(side)


def _run(options: argparse.Namespace) -> int:
    check_markdown(options.output)
    given: dict[str, Any] = {name: value for name, value in vars(options).items() if name in FIELDS}
    given.update({name: tuple(value) for name, value in given.items() if isinstance(value, list)})
    task = Task(**given)
    write_report(task.run(load(options)), options.command, options.output)
    return 0


def _cost(options: argparse.Namespace) -> int:
    check_markdown(options.output)
    if options.output is not None:
        plots_available()  # a warning is of use before the work
    report = cost(
        options.architectures,
        options.image_px,
        batch_sizes=options.batch_size,
        rounds=options.rounds,
        threads=options.threads,
        device=options.device,
        dtype=options.dtype,
    )
    write_report(report, options.command, options.output)
    if options.output is not None:
        save_plot(functools.partial(cost_figure, report.rows), options.output.with_suffix(".png"))
    return 0


def _throughput(options: argparse.Namespace) -> int:
    check_markdown(options.output)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    with tempfile.TemporaryDirectory() as folder, torch_threads(options.threads):
        if options.images is None:
            draw_images(Path(folder), options.count, options.size)
        models = [_random_or_tiny(name).to(device, dtype) for name in options.architectures]
        sizes = {"rounds": options.rounds, "batch_size": options.batch_size, "workers": options.workers}
        report = throughput(models, options.images or Path(folder), **sizes)
    write_report(report, options.command, options.output)
    return 0


def _random_or_tiny(name: str) -> BrixelFeatures:
    return BrixelFeatures.from_pretrained(device="cpu") if name == TINY else random_model(name)


def _memory(options: argparse.Namespace) -> int:
    check_markdown(options.output)
    if not options.limits:
        report = memory_table(options.architectures, options.image_px, measured=dict(options.measure))
    elif options.measure:
        raise BrixelError("--measure goes without --limits, with which every image is measured")
    else:
        limits, dtype = (
            [parse_bytes(limit) for limit in options.limits],
            choose_dtype(options.dtype, torch.device("cpu")),
        )
        report = limit_table(options.architectures, options.image_px, limits, dtype=dtype, tiles=options.tiles)
    write_report(report, options.command, options.output)
    return 0


def _panel(options: argparse.Namespace) -> int:
    images = [path for path, _ in find_images(options.images)]
    check_panel_path(options.output, images)
    point = None if options.point is None else (options.point[0], options.point[1])
    panel = panel_of(sources_of(load(options), options.sources), images, options.teacher_px, point)
    save_panel(panel, options.output)
    print(options.output)
    return 0


def _suite(options: argparse.Namespace) -> int:
    parts = read_suite(options.suite)

    def load_model(table: Mapping[str, str]) -> BrixelFeatures:
        named = {name: table.get(name) for name in ("model", "backbone", "architecture")}
        return load(argparse.Namespace(**named, device=options.device, dtype=options.dtype))

    print(run_suite(parts, options.output, options.command, load_model, lambda text: print(text, file=sys.stderr)))
    return 0
