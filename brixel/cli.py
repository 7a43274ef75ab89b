"""The command line: parses, calls, prints. `brixel COMMAND --help` tells the options."""

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from brixel import __version__, panel
from brixel.atomic import atomic_path
from brixel.benchmark import DEFAULT_ARCHITECTURES, benchmark
from brixel.benchmark import report as benchmark_report
from brixel.describe import describe, describe_models
from brixel.errors import BrixelError
from brixel.evaluate.fidelity import fidelity
from brixel.evaluate.fidelity import report as fidelity_report
from brixel.extraction import extract_files
from brixel.features import BrixelFeatures
from brixel.geometry import NATIVE
from brixel.pictures import find_pictures
from brixel.train.config import PRESETS, fields, make_config, read_settings
from brixel.train.loop import distill
from brixel.train.plan import plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. Errors are one line on standard error, with ``--debug`` a traceback."""
    options = _parser().parse_args(arguments)
    options.command = shlex.join(["brixel", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("brixel: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if options.debug:
            raise
        kind = "" if isinstance(error, (BrixelError, OSError)) else f"{type(error).__name__}: "
        print(f"brixel: error: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="brixel", description="Dense features of pictures from frozen ViTs.")
    parser.add_argument("--version", action="version", version=f"brixel {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_using(commands)
    _add_making(commands)
    return parser


def _add_using(commands: Any) -> None:
    one = _command(commands, "show", _show, "a panel of pictures with their backbone's map and their dense map")
    one.add_argument("images", nargs="+", metavar="IMAGE")
    one.add_argument("-o", "--output", type=Path, default=Path("panel.png"), help="default: %(default)s")
    one.add_argument("--teacher", action="store_true", help="also the backbone's map of the picture x 4")
    _add_model_options(one)
    _add_short_side(one)

    one = _command(commands, "extract", _extract, "the dense map of every picture, a file each")
    one.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="pictures, and folders of them")
    one.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    one.add_argument("--format", choices=("safetensors", "npy"), default="safetensors", help="default: %(default)s")
    one.add_argument("--batch-size", type=_positive, default=1, help="pictures of one size at once; default: 1")
    one.add_argument("--overwrite", action="store_true", help="also where the output exists")
    _add_model_options(one)
    _add_short_side(one)

    one = _command(commands, "info", _info, "what a model is made of")
    one.add_argument("model", metavar="MODEL", help=_MODEL_HELP)

    one = _command(commands, "models", _models, "the models that are known by name")


def _add_making(commands: Any) -> None:
    one = _command(commands, "convert", _convert, "the authors' adapter file into a model folder of ours")
    one.add_argument("adapter", type=Path, metavar="ADAPTER.pth")
    one.add_argument("--blocks", type=_blocks, help="four blocks from 0, as 3,6,9,11; default: by depth")
    one.add_argument("--include-backbone", action="store_true", help="also write the backbone's weights")
    one.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    one.add_argument("--backbone", required=True, help=_BACKBONE_HELP)
    one.add_argument("--architecture", help=_ARCHITECTURE_HELP)
    one.add_argument("--short-side", type=_positive, default=256, help="pixels that it was trained on; default: 256")
    one.add_argument("--dtype", default="float32", help="of the weights that are written; default: %(default)s")

    one = _command(commands, "train", _train, "distil an adapter for a backbone, or take up a run that was cut off")
    one.add_argument("--config", type=Path, metavar="FILE.toml", help="settings; those given as flags come before them")
    one.add_argument("--preset", choices=tuple(PRESETS), default="default", help="default: %(default)s")
    one.add_argument("--dry-run", action="store_true", help="tell sizes, times and memory, and stop")
    for field, kind in fields():
        _add_setting(one, field, kind)

    one = _command(commands, "benchmark", _benchmark, "time, operations and memory of students with random weights")
    one.add_argument("--architectures", nargs="+", default=DEFAULT_ARCHITECTURES, metavar="NAME")
    one.add_argument("--image-px", type=_positive, default=256, help="side of the picture; default: 256")
    one.add_argument("--rounds", type=_positive, default=20, help="default: 20")
    one.add_argument("--threads", type=_positive, help="default: torch's own choice")
    one.add_argument("-o", "--output", type=Path, help=_REPORT_HELP)
    _add_device_options(one)

    judges = commands.add_parser("evaluate", help="how good a model is").add_subparsers(required=True, metavar="WHAT")
    one = _command(judges, "fidelity", _fidelity, "nearness to the backbone on the large picture, beside interpolation")
    one.add_argument("--images", nargs="+", type=Path, required=True, metavar="PATH", help="pictures, and folders")
    one.add_argument("--teacher-px", nargs="+", type=_positive, required=True, metavar="PX", help="sides, in pixels")
    one.add_argument("-o", "--output", type=Path, help=_REPORT_HELP)
    _add_model_options(one)


_REPORT_HELP = "also write the report (Markdown) here"
_MODEL_HELP = "a folder that save_pretrained wrote, ORG/NAME[@REVISION] of one on the Hub, or brixel-tiny"
_BACKBONE_HELP = "a folder in Hugging Face or timm layout, ORG/NAME[@REVISION] of one on the Hub, or a weight file"
_ARCHITECTURE_HELP = "what the backbone is, such as dinov3-vits16, where its files leave it open"


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; default: the best there is")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16; default: by device")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"{_MODEL_HELP}; default: brixel-tiny")
    parser.add_argument("--backbone", help=f"without --model: {_BACKBONE_HELP}, with a fresh adapter")
    parser.add_argument("--architecture", help=_ARCHITECTURE_HELP)
    _add_device_options(parser)


def _add_short_side(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--short-side", type=_short_side, metavar="PX", help="pixels, or 'native'; default: as the adapter was trained"
    )


def _add_setting(parser: argparse.ArgumentParser, field: "dataclasses.Field[Any]", kind: Any) -> None:
    """A flag for a setting of a training run; what is not given stays out of the namespace."""
    flag = f"--{field.name.replace('_', '-')}"
    default = None if field.default is dataclasses.MISSING else field.default
    text = "" if default in (None, ()) else f"default: {default}"
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
    elif get_origin(kind) is tuple:
        parser.add_argument(flag, nargs="+", metavar="DIR", default=argparse.SUPPRESS, help=text)
    elif get_origin(kind) is Literal:
        parser.add_argument(flag, choices=get_args(kind), default=argparse.SUPPRESS, help=text)
    else:
        plain = next((each for each in get_args(kind) if each is not type(None)), kind)
        parser.add_argument(flag, type=plain, metavar=plain.__name__, default=argparse.SUPPRESS, help=text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a positive whole number")
    return int(text)


def _short_side(text: str) -> int | str:
    return NATIVE if text == NATIVE else _positive(text)


def _blocks(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}; expected four numbers as 3,6,9,11") from error


def _load(options: argparse.Namespace) -> BrixelFeatures:
    where = {"device": options.device, "dtype": options.dtype}
    if options.model is not None:
        if options.architecture is not None:
            raise BrixelError("--architecture goes with --backbone alone; a model folder says what its backbone is")
        return BrixelFeatures.from_pretrained(options.model, backbone=options.backbone, **where)
    if options.backbone is None:
        if options.architecture is not None:
            raise BrixelError("--architecture goes with --backbone; without it the model is the bundled brixel-tiny")
        return BrixelFeatures.from_pretrained(**where)
    model = BrixelFeatures.from_backbone(options.backbone, architecture=options.architecture, **where)
    print("brixel: no --model: a fresh adapter, so the dense map is the backbone's own, upsampled", file=sys.stderr)
    return model


def _show(options: argparse.Namespace) -> int:
    panel.check_output(options.output, options.images)
    made = panel.show(_load(options), options.images, short_side_px=options.short_side, teacher=options.teacher)
    panel.save(made, options.output)
    print(options.output)
    return 0


def _extract(options: argparse.Namespace) -> int:
    pictures = find_pictures(options.paths)
    if options.output.exists() and not options.output.is_dir():
        raise BrixelError(f"{options.output} is a file; expected a folder to write maps into")
    report = extract_files(
        _load(options),
        pictures,
        options.output,
        ending=f".{options.format}",
        overwrite=options.overwrite,
        batch_size=options.batch_size,
        short_side_px=options.short_side,
    )
    for _, error in report.failures:
        print(f"brixel: skipped: {error}", file=sys.stderr)
    print(f"{report.written} written, {report.skipped} already there, {len(report.failures)} unreadable")
    return 1 if report.failures else 0


def _info(options: argparse.Namespace) -> int:
    _print_table(describe(options.model))
    return 0


def _models(options: argparse.Namespace) -> int:
    rows = describe_models()
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in [{name: name for name in widths}, *rows]:
        print("  ".join(f"{row[name]:{width}}" for name, width in widths.items()).rstrip())
    return 0


def _convert(options: argparse.Namespace) -> int:
    model = BrixelFeatures.from_release(
        options.adapter,
        options.backbone,
        architecture=options.architecture,
        blocks=options.blocks,
        short_side_px=options.short_side,
        device="cpu",
        dtype=options.dtype,
    )
    model.save_pretrained(options.output, include_backbone=options.include_backbone)
    print(options.output)
    return 0


def _train(options: argparse.Namespace) -> int:
    given = {field.name: getattr(options, field.name) for field, _ in fields() if hasattr(options, field.name)}
    settings = read_settings(options.config) if options.config is not None else {}
    config = make_config({**settings, **given}, preset=options.preset)
    if options.dry_run:
        _print_table(plan(config))
    else:
        distill(config)
        print(config.out)
    return 0


def _print_table(rows: Mapping[str, str]) -> None:
    for name, value in rows.items():
        print(f"{name:20} {value}")


def _benchmark(options: argparse.Namespace) -> int:
    _check_report(options.output)
    results = benchmark(
        options.architectures,
        image_px=options.image_px,
        rounds=options.rounds,
        threads=options.threads,
        device=options.device,
        dtype=options.dtype,
    )
    _tell(benchmark_report(results, options.command), options.output)
    return 0


def _fidelity(options: argparse.Namespace) -> int:
    _check_report(options.output)
    pictures = [path for path, _ in find_pictures(options.images)]
    _tell(fidelity_report(fidelity(_load(options), pictures, options.teacher_px), options.command), options.output)
    return 0


def _check_report(output: Path | None) -> None:
    if output is not None:
        panel.check_folder(output)


def _tell(text: str, output: Path | None) -> None:
    print(text)
    if output is not None:
        with atomic_path(output) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
