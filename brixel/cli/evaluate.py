"""`brixel evaluate`: how good a model is, and what it costs."""

import argparse
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from brixel.brixel_features import BrixelFeatures
from brixel.cli.options import (
    add_device_options,
    add_flag,
    add_model_options,
    add_output,
    add_panel_output,
    command,
    given,
    height_by_width,
    load,
    positive,
    whole,
)
from brixel.errors import BrixelError, printable
from brixel.evaluate import cost, panel_of, read_suite, run_suite, sources_of, throughput
from brixel.evaluate.clicks import COUNTS, clicks
from brixel.evaluate.cost.engines import ENGINES, engines
from brixel.evaluate.cost.memory import ARCHITECTURES, SIDES, limit_table, memory_table
from brixel.evaluate.cost.resident import resident_table
from brixel.evaluate.cost.scale import scale_table
from brixel.evaluate.cost.throughput import draw_images
from brixel.evaluate.cost.timing import random_model, torch_threads
from brixel.evaluate.datasets.depth_normals import DEPTH_LAYOUTS, NORMALS_LAYOUTS
from brixel.evaluate.datasets.labelled import LAYOUTS, read_labelled
from brixel.evaluate.feature_sources import BASE, STUDENT, UNIVERSAL
from brixel.evaluate.plots import cost_figure, plots_available, save_plot
from brixel.evaluate.report import Report, check_markdown, write_report
from brixel.evaluate.tasks import BOUNDARY_PX, COMPARED, DEFAULT_SOURCES, FIELDS, OF_DATA, VIDEO, Task
from brixel.feature_maps.panel import check_panel_path, save_panel
from brixel.images.find_images import find_images
from brixel.utils.atomic_files import check_output_folder
from brixel.utils.devices import choose_device, choose_dtype
from brixel.utils.memory import parse_bytes

TINY = "brixel-tiny"
_TASKS: Mapping[str, tuple[str, Iterable[str]]] = {  # by kind: what it measures, and the layouts of its data sets
    "fidelity": ("similarity to the backbone's map of the large image", ()),
    "segmentation": ("semantic segmentation by a linear probe on frozen features", LAYOUTS),
    "depth": ("depth in metres by a small convolutional readout on frozen features", DEPTH_LAYOUTS),
    "normals": ("surface normals by a small convolutional readout on frozen features", NORMALS_LAYOUTS),
    "video": ("objects of a first frame carried through videos by their features: J and F of DAVIS 2017", ()),
    "matching": ("points of an image found in a warp of it by their features", ()),
}
_TEACHER_PX: Mapping[str, Any] = {
    **{"type": positive, "required": True, "metavar": "PX"},
    "help": "side of the teacher's crops, four times the student's; in pixels",
}


def add(commands: Any) -> None:
    """Add the command to the parser's, with a command of its own for everything that can be evaluated."""
    parser = commands.add_parser(
        "evaluate", help="how good a model is, and what it costs", description="How good a model is, and what it costs."
    )
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    for kind, (text, layouts) in _TASKS.items():
        _add_task(kinds, kind, text, tuple(layouts))
    _add_clicks(kinds)
    _add_cost(kinds)
    _add_engines(kinds)
    _add_throughput(kinds)
    _add_scale(kinds)
    _add_memory(kinds)
    _add_panel(kinds)
    _add_suite(kinds)


def _add_task(kinds: Any, kind: str, text: str, layouts: tuple[str, ...]) -> None:
    one = _add_report(kinds, kind, _run, text)
    one.set_defaults(kind=kind)
    if kind in OF_DATA:
        _add_data(one, note="N videos" if kind == VIDEO else "")
    if layouts:
        add_flag(one, "--layout", choices=tuple(layouts), default="plain", help="the data set's layout")
        add_flag(one, "--train", default="train", metavar="SPLIT", help="split that is trained on")
        add_flag(one, "--cache", type=Path, metavar="DIR", help="keep features here, for later runs", usual="in memory")
        add_flag(one, "--steps", type=positive, metavar="N", help="steps of training", usual="by the kind of probe")
    if kind not in OF_DATA:
        text = "images, and folders of them"
        add_flag(one, "--images", nargs="+", type=Path, required=True, metavar="PATH", help=text)
    if kind == "fidelity":
        note = "several of them, each a row of its own"
        add_flag(one, "--reduce", nargs="+", default=(), note=note)
        text = "images, and folders of them, that bases of --reduce are fitted to; not those of --images"
        add_flag(one, "--reduce-images", nargs="+", default=(), type=Path, metavar="PATH", help=text)
    if kind == "segmentation":
        text = "width of the strips along outlines for the boundary IoU"
        add_flag(one, "--boundary-px", type=positive, default=BOUNDARY_PX, metavar="PX", help=text)
    one.add_argument("--teacher-px", nargs="+", **_TEACHER_PX)
    add_flag(one, "--sources", default=DEFAULT_SOURCES[kind])
    add_model_options(one)


def _add_clicks(kinds: Any) -> None:
    text = "segmentation of an image from a few clicks a class, by a probe on frozen features, and on colours"
    one = _add_report(kinds, "clicks", _clicks, text)
    _add_data(one)
    add_flag(one, "--layout", choices=tuple(LAYOUTS), default="plain", help="the data set's layout")
    add_flag(one, "--counts", nargs="+", type=positive, default=COUNTS, metavar="N", help="numbers of clicks a class")
    add_flag(one, "--cache", type=Path, metavar="DIR", help="keep features here, for later runs", usual="in memory")
    one.add_argument("--teacher-px", nargs="+", **_TEACHER_PX)
    add_flag(one, "--sources", default=(BASE, UNIVERSAL, STUDENT))
    add_model_options(one)


def _add_data(one: Any, note: str = "") -> None:
    """The data set, and which part of it."""
    add_flag(one, "--data", type=Path, required=True, metavar="DIR", help="the data set's folder, as unpacked")
    add_flag(one, "--val", default="val", metavar="SPLIT", help="split that is reported")
    text = "use only the first N images of each split"
    add_flag(one, "--limit", type=positive, metavar="N", help=text, note=note)


def _add_report(kinds: Any, name: str, make: Callable[[argparse.Namespace], Report], text: str) -> Any:
    """Add a command that prints the report that ``make`` makes, and writes it where ``--output`` says."""
    one = command(kinds, name, functools.partial(_report, make), text)
    add_output(one, metavar="MD", note="the report as Markdown; its results go to the same name with .json")
    return one


def _add_cost(kinds: Any) -> None:
    one = _add_report(kinds, "cost", _cost, "parameters, operations, time and memory by size of image; random weights")
    add_flag(one, "--architectures", default=("dinov3-vits16",))
    add_flag(one, "--image-px", default=(256,), note="of the student's image")
    add_flag(one, "--batch-size", nargs="+", default=(1,))
    add_flag(one, "--rounds", type=whole, default=10, note="0 to only count")
    add_flag(one, "--threads")
    add_device_options(one)


def _add_engines(kinds: Any) -> None:
    text = "time and memory in eager torch, torch.compile, ONNX Runtime and OpenVINO on the CPU, and their differences"
    one = _add_report(kinds, "engines", _engines, text)
    text = f"{TINY}, brixel-small, and architectures, with random weights"
    add_flag(one, "--models", nargs="+", default=(TINY,), metavar="NAME", help=text)
    add_flag(one, "--image-px", default=(256,), note="of the student's image")
    add_flag(one, "--batch-size", nargs="+", default=(1,))
    add_flag(one, "--engines", nargs="+", default=ENGINES, metavar="ENGINE", help="engines to compare")
    add_flag(one, "--rounds", default=7)
    add_flag(one, "--threads")


def _add_throughput(kinds: Any) -> None:
    text = "images per second from files to files, and of the bare model"
    one = _add_report(kinds, "throughput", _throughput, text)
    add_flag(one, "--architectures", default=(TINY,), note=f"{TINY} with its own")
    add_flag(one, "--images", type=Path, metavar="DIR", help="a folder of images", usual="drawings of --size")
    text = "size of the drawings in pixels"
    add_flag(
        one, "--size", type=height_by_width, default=(480, 640), metavar="HEIGHTxWIDTH", help=text, usual="480x640"
    )
    add_flag(one, "--count", type=positive, default=48, metavar="N", help="number of drawings")
    add_flag(one, "--rounds", default=7)
    add_flag(one, "--batch-size", default=1)
    add_flag(one, "--workers", default=2)
    add_flag(one, "--threads")
    add_device_options(one)


def _add_scale(kinds: Any) -> None:
    text = "images per second of brixel extract by one process, and by the actors of Ray on this machine's CPU"
    one = _add_report(kinds, "scale", _scale, text)
    add_flag(one, "--model", default=TINY)
    add_flag(one, "--ray-actors", nargs="+", type=positive, default=(1, 2), metavar="N", help="numbers of actors")
    size = {"help": "size of the drawings in pixels", "usual": "480x640", "metavar": "HEIGHTxWIDTH"}
    add_flag(one, "--size", type=height_by_width, default=(480, 640), **size)
    add_flag(one, "--count", type=positive, default=64, metavar="N", help="number of drawings")
    add_flag(one, "--rounds", default=3)


def _add_memory(kinds: Any) -> None:
    one = _add_report(kinds, "memory", _memory, "memory needed by size of image on the CPU, predicted or measured")
    add_flag(one, "--architectures", default=ARCHITECTURES)
    add_flag(one, "--image-px", default=SIDES)
    text = "also compute images up to this side and measure, such as dinov3-vits16=512"
    add_flag(one, "--measure", nargs="+", default=(), type=_name_and_side, metavar="NAME=PX", help=text)
    text = "instead, compute images within these limits and measure, such as 100MiB 4GiB"
    add_flag(one, "--limits", nargs="+", default=(), metavar="AMOUNT", help=text)
    text = "instead, extract images within limits, each in a new process, and measure its resident memory"
    one.add_argument("--resident", action="store_true", help=text)
    add_flag(one, "--dtype", default="float32", note="with --limits or --resident")
    add_flag(one, "--tiles", default="auto", note="with --limits")


def _add_panel(kinds: Any) -> None:
    one = command(kinds, "panel", _panel, "an image of the maps of several sources, side by side")
    one.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="images, and folders of them")
    one.add_argument("--teacher-px", **_TEACHER_PX)
    add_flag(one, "--sources", default=COMPARED)
    text = "also show the similarity of all cells to the one at this pixel of the teacher's image"
    add_flag(one, "--point", nargs=2, type=float, metavar=("ROW", "COLUMN"), help=text)
    add_panel_output(one)
    add_model_options(one)


def _add_suite(kinds: Any) -> None:
    one = command(kinds, "suite", _suite, "models, tasks and data of a file as one report; continues where it stopped")
    one.add_argument("suite", type=Path, metavar="TOML", help="such as examples/suite_paper.toml")
    add_output(one, required=True, metavar="DIR", note="report.md with its plots, and report.json")
    add_device_options(one)


def _name_and_side(text: str) -> tuple[str, int]:
    name, equals, side = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an architecture and a side, such as dinov3-vits16=512")
    return name, positive(side)


def _report(make: Callable[[argparse.Namespace], Report], options: argparse.Namespace) -> int:
    check_markdown(options.output)
    report = make(options)
    write_report(report, options.command, options.output)
    if options.output is not None and report.task == "cost":
        save_plot(functools.partial(cost_figure, report.rows), options.output.with_suffix(".png"))
    return 0


def _run(options: argparse.Namespace) -> Report:
    settings = given(options, *(name for name in FIELDS if name in options))
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    return Task(**settings | lists).run(load(options))


def _clicks(options: argparse.Namespace) -> Report:
    model = load(options)
    data = read_labelled(options.layout, options.data, options.val).first(options.limit)
    data = dataclasses.replace(data, name=f"{options.data.as_posix()} ({options.val})")
    name = model.config.backbone.title if options.model is None else options.model
    settings = given(options, "counts", "cache")
    return clicks(sources_of(model, options.sources), data, options.teacher_px, model=name, **settings)


def _cost(options: argparse.Namespace) -> Report:
    if options.output is not None:
        plots_available()  # a warning is of use before the work
    settings = given(options, "rounds", "threads", "device", "dtype")
    return cost(options.architectures, options.image_px, batch_sizes=options.batch_size, **settings)


def _engines(options: argparse.Namespace) -> Report:
    settings = given(options, "rounds", "threads")
    return engines(options.models, options.image_px, batch_sizes=options.batch_size, kinds=options.engines, **settings)


def _throughput(options: argparse.Namespace) -> Report:
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    with tempfile.TemporaryDirectory() as folder, torch_threads(options.threads):
        if options.images is None:
            draw_images(Path(folder), options.count, options.size)
        tiny = functools.partial(BrixelFeatures.from_pretrained, TINY, device="cpu")
        models = [(tiny() if name == TINY else random_model(name)).to(device, dtype) for name in options.architectures]
        settings = given(options, "rounds", "batch_size", "workers")
        return throughput(models, options.images or Path(folder), **settings)


def _scale(options: argparse.Namespace) -> Report:
    settings = given(options, "count", "rounds")
    with torch_threads(1):  # as in each actor
        return scale_table(options.model, actors=options.ray_actors, image_hw=options.size, **settings)


def _memory(options: argparse.Namespace) -> Report:
    dtype = choose_dtype(options.dtype, torch.device("cpu"))
    if options.resident:
        if options.measure or options.limits:
            raise BrixelError("--resident goes without --measure and --limits")
        return resident_table(options.architectures, options.image_px, dtype)
    if not options.limits:
        return memory_table(options.architectures, options.image_px, measured=dict(options.measure))
    if options.measure:
        raise BrixelError("--measure goes without --limits, with which every image is measured")
    limits = [parse_bytes(limit) for limit in options.limits]
    return limit_table(options.architectures, options.image_px, limits, dtype=dtype, tiles=options.tiles)


def _panel(options: argparse.Namespace) -> int:
    images = [path for path, _ in find_images(options.images)]
    check_panel_path(options.output, images, overwrite=options.overwrite)
    point_yx = options.point and tuple(options.point)
    panel = panel_of(sources_of(load(options), options.sources), images, options.teacher_px, point_yx)
    save_panel(panel, options.output)
    print(options.output)
    return 0


def _suite(options: argparse.Namespace) -> int:
    parts = read_suite(options.suite)
    check_output_folder(options.output)

    def load_model(table: Mapping[str, str]) -> BrixelFeatures:
        named = {name: table.get(name) for name in ("model", "backbone", "architecture")}
        return load(argparse.Namespace(**named, device=options.device, dtype=options.dtype))

    print(
        run_suite(
            parts, options.output, options.command, load_model, lambda text: print(printable(text), file=sys.stderr)
        )
    )
    return 0
