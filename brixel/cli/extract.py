"""`brixel extract`: the dense maps of many images, written into a folder."""

import argparse
import sys
from pathlib import Path
from typing import Any

from brixel.cli.options import (
    add_flag,
    add_map_options,
    add_model_options,
    add_output,
    byte_count,
    command,
    deprecated,
    given,
    load,
)
from brixel.errors import BrixelError
from brixel.extraction import extract_files
from brixel.extraction.distributed import ProcessShare, own_device
from brixel.extraction.map_folder import verify
from brixel.images.find_images import find_images
from brixel.utils.devices import DTYPES


def add(commands: Any) -> None:
    """Add the command."""
    text = "write the dense map of every image into a folder; a second run continues where the first stopped"
    parser = command(commands, "extract", _extract, text, "brixel extract photos -o maps")
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="images, and folders of images")
    add_output(parser, required=True, metavar="FOLDER")
    add_flag(parser, "--format", choices=("safetensors", "npy"), default="safetensors", help="file format")
    text = "write many maps per file, into files of this size, such as 1GiB"
    add_flag(parser, "--shard-size", type=byte_count, metavar="SIZE", help=text, usual="one map per file")
    deprecated(parser, "--shard-gib", "--shard-size", type=lambda text: byte_count(f"{text}GiB"))
    dtypes = ("float32", "float16", "bfloat16")
    add_flag(
        parser, "--save-dtype", choices=dtypes, help="dtype of the maps that are written", usual="that of the model"
    )
    add_flag(parser, "--batch-size", default=1)
    add_flag(parser, "--workers", default=2)
    parser.add_argument("--overwrite", action="store_true", help="compute every map again")
    parser.add_argument("--verify", action="store_true", help="only compare the files in FOLDER with its manifest")
    add_model_options(parser)
    add_map_options(parser)


def _extract(options: argparse.Namespace) -> int:
    if options.verify:
        return _verify(options.output)
    if not options.paths:
        raise BrixelError("no PATH: give images, or folders of images; only --verify needs none")
    images = find_images(options.paths)
    if options.output.exists() and not options.output.is_dir():
        raise BrixelError(f"{options.output} is a file; expected a folder to write maps into")
    options.device = own_device(options.device)
    summary = extract_files(
        load(options),
        images,
        options.output,
        ending=f".{options.format}",
        shard_bytes=options.shard_size,
        save_dtype=None if options.save_dtype is None else DTYPES[options.save_dtype],
        **given(options, "overwrite", "batch_size", "workers", "scale", "short_side_px", "memory_limit", "tiles"),
    )
    share = ProcessShare.from_environment()
    process = f"process {share.rank} of {share.processes}: " if share.processes > 1 else ""
    print(f"{process}{summary.written} written, {summary.skipped} already there, {len(summary.failures)} failed")
    return 1 if summary.failures and share.processes == 1 else 0  # torchrun would stop the other processes


def _verify(folder: Path) -> int:
    problems = verify(folder)
    for problem in problems:
        print(f"brixel: {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} files differ from the manifest: delete them, and run the same extraction again")
    else:
        print("every file matches the manifest")
    return 1 if problems else 0
