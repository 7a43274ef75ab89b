"""`brixel convert`: an adapter file of the authors of BRIXEL, as a model folder of ours."""

import argparse
from pathlib import Path
from typing import Any

from brixel.brixel_features import BrixelFeatures
from brixel.checkpoints.hub_upload import check_pushable
from brixel.checkpoints.release_adapters import RELEASED
from brixel.cli.options import add_flag, add_output, command, deprecated, given, positive
from brixel.errors import BrixelError
from brixel.utils.atomic_files import check_output_folder


def add(commands: Any) -> None:
    """Add the command."""
    text = "convert an adapter file of the BRIXEL authors to a model"
    parser = command(commands, "convert", _convert, text, "brixel convert adapter.pth --release vitb16-256 -o model")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="the authors' file, a .pth")
    text = "which of the released files it is; implies backbone and short side"
    parser.add_argument("--release", choices=tuple(RELEASED), help=text)
    add_flag(parser, "--backbone", usual="the one that --release implies")
    add_flag(parser, "--architecture")
    text = "the four blocks that feed the adapter, from 0, as 3,6,9,11"
    add_flag(parser, "--blocks", type=_blocks, help=text, usual="by depth")
    add_flag(parser, "--short-side-px", type=positive, usual="as --release implies, or 256")
    deprecated(parser, "--short-side", "--short-side-px")
    add_flag(parser, "--dtype", default="float32")
    add_output(parser, required=True, metavar="FOLDER")
    parser.add_argument("--include-backbone", action="store_true", help="also write the weights of the backbone")
    parser.add_argument("--push", metavar="ORG/NAME", help="also upload the model to this repository on the Hub")
    parser.add_argument("--private", action="store_true", help="with --push: create the repository as a private one")


def _blocks(text: str) -> list[int]:
    try:
        return [int(block) for block in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}; expected four numbers as 3,6,9,11") from error


def _convert(options: argparse.Namespace) -> int:
    if options.private and options.push is None:
        raise BrixelError("--private goes with --push")
    if options.architecture is not None and options.backbone is None:
        raise BrixelError("--architecture goes with --backbone")
    check_output_folder(options.output)
    if options.push is not None:
        check_pushable(options.push)
    settings = given(options, "release", "architecture", "blocks", "short_side_px", "dtype")
    model = BrixelFeatures.from_release(options.adapter, options.backbone, device="cpu", **settings)
    model.save_pretrained(options.output, include_backbone=options.include_backbone)
    print(options.output)
    if options.push is not None:
        print(
            model.push_to_hub(options.push, include_backbone=options.include_backbone, private=options.private or None)
        )
    return 0
