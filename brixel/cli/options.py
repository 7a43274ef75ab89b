"""Options that several commands share, the model that they name, and how results are told."""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from brixel.brixel_features import BrixelFeatures
from brixel.errors import BrixelError
from brixel.images.patch_grid import NATIVE
from brixel.inference.memory.planner import TileMode
from brixel.utils.atomic_files import check_folder, write_text

REPORT_HELP = "also write the report (Markdown) here"
MODEL_HELP = "a folder that save_pretrained wrote, ORG/NAME[@REVISION] of one on the Hub, or brixel-tiny"
BACKBONE_HELP = "a folder in Hugging Face or timm layout, ORG/NAME[@REVISION] of one on the Hub, or a weight file"
ARCHITECTURE_HELP = "what the backbone is, such as dinov3-vits16, where its files leave it open"


def command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    """A command's parser, with the options that all have."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Where a model is put, and in which dtype."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; default: the best there is")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16; default: by device")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model; :func:`load` loads it."""
    parser.add_argument("--model", help=f"{MODEL_HELP}; default: brixel-tiny")
    parser.add_argument("--backbone", help=f"without --model: {BACKBONE_HELP}, with a fresh adapter")
    parser.add_argument("--architecture", help=ARCHITECTURE_HELP)
    add_device_options(parser)


def add_short_side(parser: argparse.ArgumentParser) -> None:
    """The size that images are brought to."""
    parser.add_argument(
        "--short-side", type=short_side, metavar="PX", help="pixels, or 'native'; default: as the adapter was trained"
    )


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """How much memory may be used, and whether maps may be put together from tiles."""
    parser.add_argument(
        "--memory-limit", metavar="AMOUNT", help="such as 4GiB, weights included; default: what is free on the device"
    )
    parser.add_argument(
        "--tiles",
        choices=get_args(TileMode),
        default="auto",
        help="blended tiles, an approximation: where nothing exact fits (auto), never, always; default: %(default)s",
    )


def positive(text: str) -> int:
    """A positive whole number."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a positive whole number")
    return int(text)


def whole(text: str) -> int:
    """Zero or a positive whole number."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; expected zero or a positive whole number")
    return int(text)


def short_side(text: str) -> int | str:
    """A number of pixels, or "native"."""
    return NATIVE if text == NATIVE else positive(text)


def height_by_width(text: str) -> tuple[int, int]:
    """A size in pixels, such as 480x640."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}; expected height x width in pixels, such as 4096x4096")
    return int(match[1]), int(match[2])


def load(options: argparse.Namespace) -> BrixelFeatures:
    """The model that the options name; the bundled one where they name none."""
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


def print_table(rows: Mapping[str, str]) -> None:
    """Facts by name, a line each."""
    for name, value in rows.items():
        print(f"{name:20} {value}")


def check_report(output: Path | None) -> None:
    """Raise BrixelError where a report cannot be written, before the work is done."""
    if output is not None:
        check_folder(output)


def tell(text: str, output: Path | None) -> None:
    """Print a text, and write it to a file if one is named, whole or not at all."""
    print(text)
    if output is not None:
        write_text(output, text + "\n")
