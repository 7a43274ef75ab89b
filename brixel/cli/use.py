"""`brixel show`, `extract`, `info`, `models`: what one does with a model."""

import argparse
import sys
from pathlib import Path
from typing import Any

from brixel.cli.describe import describe, describe_models
from brixel.cli.options import (
    MODEL_HELP,
    add_memory_options,
    add_model_options,
    add_short_side,
    command,
    load,
    positive,
    print_table,
    whole,
)
from brixel.errors import BrixelError
from brixel.extraction import extract_files
from brixel.extraction.distributed import ProcessShare, own_device
from brixel.extraction.map_folder import verify
from brixel.feature_maps.panel import check_panel_path, save_panel
from brixel.images.find_images import SCENE, find_images
from brixel.inference.comparison_panel import comparison_panel
from brixel.utils.devices import DTYPES


def add(commands: Any) -> None:
    """Add these commands to the parser's."""
    one = command(commands, "show", _show, "a panel of images with their backbone's map and their dense map")
    one.add_argument("images", nargs="*", metavar="IMAGE", help="none: a drawing that comes with brixel")
    one.add_argument("-o", "--output", type=Path, default=Path("panel.png"), help="default: %(default)s")
    one.add_argument("--teacher", action="store_true", help="also the backbone's map of the image x 4")
    add_model_options(one)
    add_short_side(one)
    add_memory_options(one)

    one = command(commands, "extract", _extract, "the dense map of every image, in files or shards")
    one.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="images, and folders of them")
    one.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    one.add_argument("--format", choices=("safetensors", "npy"), default="safetensors", help="default: %(default)s")
    one.add_argument("--shard-gib", type=_gib, metavar="GIB", help="into shards of that size, many maps each")
    one.add_argument("--save-dtype", choices=("float32", "float16", "bfloat16"), help="default: the model's")
    one.add_argument("--batch-size", type=positive, default=1, help="images of one size at once; default: 1")
    one.add_argument("--workers", type=whole, default=2, help="threads that decode ahead; default: %(default)s")
    one.add_argument("--overwrite", action="store_true", help="do everything anew")
    one.add_argument("--verify", action="store_true", help="only check every file in DIR against its manifest")
    add_model_options(one)
    add_short_side(one)
    add_memory_options(one)

    one = command(commands, "info", _info, "what a model is made of")
    one.add_argument("model", metavar="MODEL", help=MODEL_HELP)

    one = command(commands, "models", _models, "the models that are known by name")


def _show(options: argparse.Namespace) -> int:
    images = options.images or [SCENE]
    check_panel_path(options.output, images)
    made = comparison_panel(
        load(options),
        images,
        short_side_px=options.short_side,
        teacher=options.teacher,
        memory_limit=options.memory_limit,
        tiles=options.tiles,
    )
    save_panel(made, options.output)
    print(options.output)
    return 0


def _extract(options: argparse.Namespace) -> int:
    if options.verify:
        return _verify(options.output)
    if not options.paths:
        raise BrixelError("no PATH: give images and folders of them; only --verify goes without")
    images = find_images(options.paths)
    if options.output.exists() and not options.output.is_dir():
        raise BrixelError(f"{options.output} is a file; expected a folder to write maps into")
    options.device = own_device(options.device)
    report = extract_files(
        load(options),
        images,
        options.output,
        ending=f".{options.format}",
        shard_bytes=options.shard_gib,
        save_dtype=None if options.save_dtype is None else DTYPES[options.save_dtype],
        overwrite=options.overwrite,
        batch_size=options.batch_size,
        workers=options.workers,
        short_side_px=options.short_side,
        memory_limit=options.memory_limit,
        tiles=options.tiles,
    )
    share = ProcessShare.from_environment()
    who = f"process {share.rank} of {share.processes}: " if share.processes > 1 else ""
    print(f"{who}{report.written} written, {report.skipped} already there, {len(report.failures)} failed")
    return 1 if report.failures and share.processes == 1 else 0  # torchrun would stop the other processes


def _verify(folder: Path) -> int:
    wrong = verify(folder)
    for line in wrong:
        print(f"brixel: {line}", file=sys.stderr)
    if wrong:
        print(f"{len(wrong)} files are not what the manifest says: delete them, and start the same extraction again")
    else:
        print("every file is what the manifest says")
    return 1 if wrong else 0


def _gib(text: str) -> int:
    try:
        limit_bytes = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        limit_bytes = 0
    if limit_bytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of GiB above zero, such as 1 or 0.5")
    return limit_bytes


def _info(options: argparse.Namespace) -> int:
    print_table(describe(options.model))
    return 0


def _models(options: argparse.Namespace) -> int:
    rows = describe_models()
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in [{name: name for name in widths}, *rows]:
        print("  ".join(f"{row[name]:{width}}" for name, width in widths.items()).rstrip())
    return 0
