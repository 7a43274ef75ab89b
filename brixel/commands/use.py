"""`brixel show`, `extract`, `info`, `models`: what one does with a model."""

import argparse
import sys
from pathlib import Path
from typing import Any

from brixel import panel
from brixel.commands.options import (
    MODEL_HELP,
    add_memory_options,
    add_model_options,
    add_short_side,
    command,
    load,
    positive,
    print_table,
)
from brixel.describe import describe, describe_models
from brixel.errors import BrixelError
from brixel.extraction import extract_files
from brixel.pictures import SCENE, find_pictures


def add(commands: Any) -> None:
    """Add these commands to the parser's."""
    one = command(commands, "show", _show, "a panel of pictures with their backbone's map and their dense map")
    one.add_argument("images", nargs="*", metavar="IMAGE", help="none: a drawing that comes with brixel")
    one.add_argument("-o", "--output", type=Path, default=Path("panel.png"), help="default: %(default)s")
    one.add_argument("--teacher", action="store_true", help="also the backbone's map of the picture x 4")
    add_model_options(one)
    add_short_side(one)
    add_memory_options(one)

    one = command(commands, "extract", _extract, "the dense map of every picture, a file each")
    one.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="pictures, and folders of them")
    one.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    one.add_argument("--format", choices=("safetensors", "npy"), default="safetensors", help="default: %(default)s")
    one.add_argument("--batch-size", type=positive, default=1, help="pictures of one size at once; default: 1")
    one.add_argument("--overwrite", action="store_true", help="also where the output exists")
    add_model_options(one)
    add_short_side(one)
    add_memory_options(one)

    one = command(commands, "info", _info, "what a model is made of")
    one.add_argument("model", metavar="MODEL", help=MODEL_HELP)

    one = command(commands, "models", _models, "the models that are known by name")


def _show(options: argparse.Namespace) -> int:
    images = options.images or [SCENE]
    panel.check_output(options.output, images)
    made = panel.show(
        load(options),
        images,
        short_side_px=options.short_side,
        teacher=options.teacher,
        memory_limit=options.memory_limit,
        tiles=options.tiles,
    )
    panel.save(made, options.output)
    print(options.output)
    return 0


def _extract(options: argparse.Namespace) -> int:
    pictures = find_pictures(options.paths)
    if options.output.exists() and not options.output.is_dir():
        raise BrixelError(f"{options.output} is a file; expected a folder to write maps into")
    report = extract_files(
        load(options),
        pictures,
        options.output,
        ending=f".{options.format}",
        overwrite=options.overwrite,
        batch_size=options.batch_size,
        short_side_px=options.short_side,
        memory_limit=options.memory_limit,
        tiles=options.tiles,
    )
    for _, error in report.failures:
        print(f"brixel: skipped: {error}", file=sys.stderr)
    print(f"{report.written} written, {report.skipped} already there, {len(report.failures)} unreadable")
    return 1 if report.failures else 0


def _info(options: argparse.Namespace) -> int:
    print_table(describe(options.model))
    return 0


def _models(options: argparse.Namespace) -> int:
    rows = describe_models()
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in [{name: name for name in widths}, *rows]:
        print("  ".join(f"{row[name]:{width}}" for name, width in widths.items()).rstrip())
    return 0
