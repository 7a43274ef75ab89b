"""`brixel train`: distil an adapter. Every setting of `TrainConfig` is a flag."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from brixel.cli.options import SHARED, add_flag, command, deprecated, print_table
from brixel.errors import BrixelError
from brixel.train.config import PRESETS, fields, make_config, read_settings
from brixel.train.dry_run import plan
from brixel.train.trainer import distill

_REQUIRED = {"backbone": "--backbone", "images": "--images", "out": "--output"}
_FOLDERS = {"out", "cache_dir"}
_METAVARS = {int: "N", float: "X", str: "TEXT"}


def add(commands: Any) -> None:
    """Add the command."""
    example = "brixel train --backbone dinov3-small --images photos --val held-out -o run"
    text = "distil an adapter for a backbone; a second run continues where the first stopped"
    parser = command(commands, "train", _train, text, example)
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as TOML; flags override them")
    add_flag(parser, "--preset", choices=tuple(PRESETS), default="default", help="defaults of the settings")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, times and memory of the run, and stop")
    for field, kind in fields():
        _add_setting(parser, field, kind)
    deprecated(parser, "--val-pictures", "--val-images")


def _add_setting(parser: argparse.ArgumentParser, field: "dataclasses.Field[Any]", kind: Any) -> None:
    """Add a flag for a setting; one that is not given stays out of the namespace."""
    flag = f"--{field.name.replace('_', '-')}"
    flags = ("-o", flag, "--output") if field.name == "out" else (flag,)
    shared = SHARED.get(flags[-1], {})
    text = shared.get("help") or field.metadata.get("help", "").replace("%", "%%")
    if field.default not in (dataclasses.MISSING, None, (), ""):
        text = f"{text}; default: {field.default}".removeprefix("; ")
    settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
    if kind is bool:
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **settings)
    elif get_origin(kind) is tuple:
        numbers = get_args(kind)[0] is int
        of_kind = {"type": int, "metavar": "PX"} if numbers else {"metavar": "FOLDER"}
        parser.add_argument(*flags, nargs="+", **of_kind, **settings)
    elif get_origin(kind) is Literal:
        parser.add_argument(*flags, choices=get_args(kind), **settings)
    else:
        plain = next((type_ for type_ in get_args(kind) if type_ is not type(None)), kind)
        metavar = "PX" if flag.endswith("-px") else "FOLDER" if field.name in _FOLDERS else _METAVARS[plain]
        parser.add_argument(*flags, **{"type": plain, "metavar": metavar, **shared, **settings})


def _train(options: argparse.Namespace) -> int:
    settings = read_settings(options.config) if options.config is not None else {}
    settings |= {field.name: getattr(options, field.name) for field, _ in fields() if hasattr(options, field.name)}
    missing = [flag for name, flag in _REQUIRED.items() if settings.get(name) is None]
    if missing:
        raise BrixelError(f"missing {', '.join(missing)}; example: {options.parser.example}")
    config = make_config(settings, preset=options.preset)
    if options.dry_run:
        print_table(plan(config))
    else:
        distill(config)
        print(config.out)
    return 0
