"""`brixel convert`, `train`: how models come about."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from brixel.brixel_features import BrixelFeatures
from brixel.checkpoints.hub_upload import check_pushable
from brixel.checkpoints.release_adapters import RELEASED
from brixel.cli.options import ARCHITECTURE_HELP, BACKBONE_HELP, command, positive, print_table
from brixel.errors import BrixelError
from brixel.train.config import PRESETS, fields, make_config, read_settings
from brixel.train.dry_run import plan
from brixel.train.trainer import distill


def add(commands: Any) -> None:
    """Add these commands to the parser's."""
    one = command(commands, "convert", _convert, "the authors' adapter file into a model folder of ours")
    one.add_argument("adapter", type=Path, metavar="ADAPTER.pth")
    one.add_argument("--blocks", type=_blocks, help="four blocks from 0, as 3,6,9,11; default: by depth")
    one.add_argument("--include-backbone", action="store_true", help="also write the backbone's weights")
    one.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    one.add_argument("--release", choices=tuple(RELEASED), help="which file it is; says backbone and short side")
    one.add_argument("--backbone", help=f"{BACKBONE_HELP}; needed without --release")
    one.add_argument("--architecture", help=ARCHITECTURE_HELP)
    one.add_argument(
        "--short-side", type=positive, help="pixels that it was trained on; default: as --release says, or 256"
    )
    one.add_argument("--dtype", default="float32", help="of the weights that are written; default: %(default)s")
    one.add_argument("--push", metavar="ORG/NAME", help="also upload it to a repository of yours on the Hub")
    one.add_argument("--private", action="store_true", help="with --push: make the repository a private one")

    one = command(commands, "train", _train, "distil an adapter for a backbone, or take up a run that was cut off")
    one.add_argument("--config", type=Path, metavar="FILE.toml", help="settings; those given as flags come before them")
    one.add_argument("--preset", choices=tuple(PRESETS), default="default", help="default: %(default)s")
    one.add_argument("--dry-run", action="store_true", help="tell sizes, times and memory, and stop")
    for field, kind in fields():
        _add_setting(one, field, kind)


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


def _blocks(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}; expected four numbers as 3,6,9,11") from error


def _convert(options: argparse.Namespace) -> int:
    if options.private and options.push is None:
        raise BrixelError("--private goes with --push")
    if options.push is not None:
        check_pushable(options.push)
    model = BrixelFeatures.from_release(
        options.adapter,
        options.backbone,
        release=options.release,
        architecture=options.architecture,
        blocks=options.blocks,
        short_side_px=options.short_side,
        device="cpu",
        dtype=options.dtype,
    )
    model.save_pretrained(options.output, include_backbone=options.include_backbone)
    print(options.output)
    if options.push is not None:
        private = True if options.private else None
        print(model.push_to_hub(options.push, include_backbone=options.include_backbone, private=private))
    return 0


def _train(options: argparse.Namespace) -> int:
    given = {field.name: getattr(options, field.name) for field, _ in fields() if hasattr(options, field.name)}
    settings = read_settings(options.config) if options.config is not None else {}
    config = make_config({**settings, **given}, preset=options.preset)
    if options.dry_run:
        print_table(plan(config))
    else:
        distill(config)
        print(config.out)
    return 0
