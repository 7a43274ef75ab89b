"""What the commands share: the parser with its one-line errors, flags with one meaning, the model, printed output."""

import argparse
import difflib
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, get_args

from brixel.brixel_features import BrixelFeatures
from brixel.errors import BrixelError, did_you_mean, one_line, printable
from brixel.evaluate.feature_sources import SOURCES
from brixel.images.find_images import SCENE, find_images
from brixel.images.patch_grid import NATIVE
from brixel.inference.memory.planner import TileMode
from brixel.utils.memory import format_bytes, parse_bytes
from brixel.video.frames import FrameSelection

MODEL_HELP = "a folder that save_pretrained wrote, ORG/NAME[@REVISION] on the Hub, brixel-small or brixel-tiny"

_MAX_SHOWN = 8  # images of a folder
_LOG = logging.getLogger("brixel")

_MOVED = {  # of version 0.1
    **{"benchmark": "evaluate cost", "throughput": "evaluate throughput"},
    **{"plan --table": "evaluate memory", "plan --limits": "evaluate memory --limits"},
}


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a usage error in one line, with the nearest known name or an example."""

    def __init__(self, *, example: str | None = None, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, epilog=f"example: {example}" if example else None, **settings)
        self.example = example

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, after a search for unknown options: they are reported before missing arguments are."""
        given = sys.argv[1:] if args is None else list(args)
        has_commands = self._subparsers is not None
        for argument in takewhile(lambda text: text.startswith("-") if has_commands else text != "--", given):
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag != "--" and flag not in self._option_string_actions:
                self.error(f"unknown option {flag!r}{self._nearest_flag(flag)}")
        options, rest = super().parse_known_args(given, namespace)
        if rest and not has_commands:
            several = [str(action.metavar) for action in self._actions if action.nargs == "*"]
            where = f": give every {several[0]} in one place" if several and not rest[0].startswith("-") else ""
            self.error(f"unexpected argument {rest[0]!r}{where}")
        return options, rest

    def _nearest_flag(self, flag: str) -> str:
        if moved := _MOVED.get(f"{self.prog.removeprefix('brixel ')} {flag}"):
            return f"; it is 'brixel {moved}' now"
        flags = [name for name, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]
        near = [name for name in flags if name.startswith(flag)] or difflib.get_close_matches(flag, flags, n=1)
        return f"; did you mean {near[0]!r}?" if near else f"; see '{self.prog} --help'"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        nearest = did_you_mean(str(value), map(str, action.choices))
        if isinstance(action, argparse._SubParsersAction):
            moved = _MOVED.get(str(value)) if self.prog == "brixel" else None
            self.error(f"unknown command {value!r}; " + (f"it is 'brixel {moved}' now" if moved else nearest))
        raise argparse.ArgumentError(action, f"unknown value {value!r}; {nearest}")

    def error(self, message: str) -> NoReturn:
        """Print the message as one line and exit with status 2."""
        message = message.replace("the following arguments are required:", "missing").removeprefix("argument ")
        message = re.sub(r"invalid \w+ value: (.*)", r"\1; expected a number", message, flags=re.DOTALL)
        if "; " not in message:
            message += f"; example: {self.example}" if self.example else f"; see '{self.prog} --help'"
        self.exit(2, f"brixel: error: {one_line(message)}\n")


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str | None = None
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: What ``add_subparsers`` returned.
        name: Name of the command.
        run: Does the work, from the parsed options to the exit status.
        text: What the command does, for the lists of commands and for its own help.
        example: A call of the command, for its help and for usage errors.
    """
    title = f"{text[0].upper()}{text[1:]}."
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=title, example=example)
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


# ------------------------------------------------------------------------------------------------ types of values


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


def positive_number(text: str) -> float:
    """A finite number above zero."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not (0 < found < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number above zero")
    return found


def pixels_or_native(text: str) -> int | str:
    """A number of pixels, or "native"."""
    if text != NATIVE and (not text.isdecimal() or int(text) == 0):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a positive number of pixels, or '{NATIVE}'")
    return text if text == NATIVE else int(text)


def amount(text: str) -> float:
    """Zero or a positive number, also a fraction."""
    try:
        found = float(text)
    except ValueError:
        found = -1
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; expected zero or a positive number")
    return found


def height_by_width(text: str) -> tuple[int, int]:
    """A size in pixels, such as 480x640."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}; expected height x width in pixels, such as 4096x4096")
    return int(match[1]), int(match[2])


def byte_count(text: str) -> int:
    """Bytes, from text such as 4GiB or 500MiB."""
    try:
        return parse_bytes(int(text) if text.isdecimal() else text)
    except BrixelError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a size such as 4GiB or 500MiB") from None


def shard_size(text: str) -> int:
    """Bytes of a shard; a few thousand would hold not even one map, and are rather a unit that was left out."""
    size_bytes = byte_count(text)
    if size_bytes <= 4096:
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected a size with its unit, such as 1GiB: this is {size_bytes} bytes"
        )
    return size_bytes


# ------------------------------------------------------------------------------------------------ shared flags

SHARED: Mapping[str, Mapping[str, Any]] = {
    "--model": {"help": f"saved brixel model: {MODEL_HELP}"},
    "--backbone": {
        "metavar": "BACKBONE",
        "help": "backbone: a folder in Hugging Face or timm layout, ORG/NAME[@REVISION] on the Hub, a weight file, or "
        "a name that `brixel models` lists",
    },
    "--architecture": {
        "metavar": "NAME",
        "help": "with --backbone: its architecture, such as dinov3-vits16; needed only where its files leave it open",
    },
    "--device": {"metavar": "DEVICE", "help": "device to compute on: auto, cpu, cuda, cuda:1, mps"},
    "--dtype": {"help": "dtype of the model: auto, float32, bfloat16, float16"},
    "--short-side-px": {"metavar": "PX", "help": "short side that images are resized to, in pixels"},
    "--scale": {"type": positive, "metavar": "N", "help": "cells of a map per patch, on each axis"},
    "--memory-limit": {
        "metavar": "SIZE",
        "type": byte_count,
        "help": "memory to use at most on the model's device, weights included, such as 4GiB (4G is the same, 4GB "
        "a little less)",
    },
    "--tiles": {
        "choices": get_args(TileMode),
        "help": "compute in overlapping tiles, an approximation: auto (where nothing exact fits), never, always",
    },
    "--batch-size": {"metavar": "N", "type": positive, "help": "images per batch"},
    "--workers": {"metavar": "N", "type": whole, "help": "background workers that read and decode images"},
    "--reduce": {
        "metavar": "STEPS",
        "help": "reduce every map: steps separated by commas, of pca:K, stride:PX, regions:HxW or a folder of masks, "
        "points:FILE.json, float16, bfloat16, int8 (docs/reduction.md); or a fitted reduction, FILE.safetensors",
    },
    "--output": {"type": Path, "help": "file or folder to write"},
    "--sources": {
        **{"nargs": "+", "choices": SOURCES, "metavar": "SOURCE"},
        "help": f"feature sources to compare, of {', '.join(SOURCES)}",
    },
    "--architectures": {"nargs": "+", "metavar": "NAME", "help": "known backbones, with random weights"},
    "--image-px": {"nargs": "+", "type": positive, "metavar": "PX", "help": "sides of the square images in pixels"},
    "--rounds": {"type": positive, "metavar": "N", "help": "timed rounds"},
    "--threads": {"type": positive, "metavar": "N", "help": "threads of torch; default: its own choice"},
    "--teacher": {
        "action": "store_true",
        "help": "also the backbone's map of the image at four times the size",
    },
    "--fps": {"type": positive_number, "metavar": "N", "help": "of videos, so many frames per second"},
    "--every": {"type": positive, "metavar": "N", "help": "of videos, each N-th frame"},
    "--overwrite": {"action": "store_true", "help": "write over what is there"},
    "--json": {"action": "store_true", "help": "print JSON instead of text"},
}
"""Flags that have one meaning in every command, and their description."""


def add_flag(
    parser: argparse._ActionsContainer, flag: str, *names: str, note: str = "", usual: str = "", **settings: Any
) -> None:
    """Add a flag, with its default in the description.

    Args:
        parser: The parser of the command, or a group of its flags.
        flag: The flag; settings of :data:`SHARED` need not be given.
        names: Further names of the flag, such as "-o".
        note: What the command adds to the description.
        usual: The default in words; the default value where empty.
        settings: Arguments of ``add_argument``.
    """
    settings = {**SHARED.get(flag, {}), **settings}
    default = settings.get("default")
    if isinstance(default, tuple):
        usual = usual or " ".join(map(str, default))
    elif default is not None:
        usual = usual or "%(default)s"
    settings["help"] = "; ".join(filter(None, (settings["help"], note, f"default: {usual}" if usual else "")))
    parser.add_argument(*names, flag, **settings)


def add_output(parser: argparse.ArgumentParser, **settings: Any) -> None:
    """What a command writes."""
    add_flag(parser, "--output", "-o", **settings)


def add_shown_images(parser: argparse.ArgumentParser, note: str = "") -> None:
    """The images to be looked at; :func:`shown_images` lists them."""
    text = f"images, and folders, of which the first {_MAX_SHOWN} are shown"
    text = "; ".join(filter(None, (text, note, "default: a scene that brixel contains")))
    parser.add_argument("images", nargs="*", metavar="PATH", help=text)


def add_panel_output(parser: argparse.ArgumentParser, note: str = "") -> None:
    """The image that a command draws."""
    add_output(parser, default=Path("panel.png"), metavar="IMAGE", note=note)
    add_flag(parser, "--overwrite", note="without it, brixel replaces only what it has drawn")


def add_frame_options(parser: argparse.ArgumentParser) -> None:
    """Which frames of videos are taken; :func:`frame_selection` reads them."""
    add_flag(parser, "--fps", usual="all frames")
    add_flag(parser, "--every", usual="all frames")


def frame_selection(options: argparse.Namespace) -> FrameSelection:
    """The frames that the options choose."""
    return FrameSelection(**given(options, "fps", "every"))


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """The device and the dtype of a model."""
    add_flag(parser, "--device", default="auto", usual="auto, the fastest that is available")
    add_flag(parser, "--dtype", default="auto", usual="auto, bfloat16 on CUDA devices that have it, else float32")


def add_model_names(parser: argparse.ArgumentParser) -> None:
    """The model; :func:`load` loads it, for options that also have a device and a dtype."""
    add_flag(parser, "--model", usual="brixel-small; with --backbone alone, the universal upsampler")
    add_flag(parser, "--backbone", usual="that of --model")
    add_flag(parser, "--architecture")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The model, its device and dtype; :func:`load` loads it."""
    add_model_names(parser)
    add_device_options(parser)


def add_map_options(parser: argparse.ArgumentParser, usual: str = "as the adapter was trained") -> None:
    """The size that images are resized to, how much memory may be used, and whether maps may be blended from tiles."""
    note = f"{NATIVE} keeps the size of an image"
    add_flag(parser, "--short-side-px", type=pixels_or_native, note=note, usual=usual)
    deprecated(parser, "--short-side", "--short-side-px")
    add_flag(parser, "--scale", usual="4; trained adapters of the first generation have no other")
    add_flag(parser, "--memory-limit", usual="what is free, less a tenth")
    add_flag(parser, "--tiles", default="auto")


def deprecated(parser: argparse.ArgumentParser, old: str, new: str, **settings: Any) -> None:
    """Keep an old name of a flag: it sets the new flag, with a DeprecationWarning, and is in no help text."""
    current = parser._option_string_actions[new]
    settings = {"type": current.type, "dest": current.dest, "default": argparse.SUPPRESS, **settings}
    parser.add_argument(old, action=_Deprecated, const=new, help=argparse.SUPPRESS, **settings)


class _Deprecated(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        text = f"{option_string} is deprecated; use {self.const}"
        # Python's default filters show this category for the module "__main__" alone
        warnings.warn_explicit(text, DeprecationWarning, "brixel", 0, module="__main__")
        setattr(namespace, self.dest, values)


# ------------------------------------------------------------------------------------------------ images


def shown_images(paths: Sequence[str]) -> list[str | Path]:
    """The images at some paths, the first of a folder; the bundled scene where there are no paths."""
    images: list[str | Path] = []
    for path in paths or [str(SCENE)]:
        images += _in_folder(Path(path)) if os.path.isdir(path) else [path]
    return images


def _in_folder(folder: Path) -> list[Path]:
    found = [path for path, _ in find_images([folder])]
    if len(found) > _MAX_SHOWN:
        _LOG.warning("%s: the first %d of %d images are shown", folder, _MAX_SHOWN, len(found))
    return found[:_MAX_SHOWN]


# ------------------------------------------------------------------------------------------------ the model


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The values of options by name: arguments of a function that calls them the same."""
    return {name: getattr(options, name) for name in names}


def load(options: argparse.Namespace) -> BrixelFeatures:
    """The model that the options name; the bundled one where they name none."""
    return loader(options)()


def loader(options: argparse.Namespace) -> Callable[[], BrixelFeatures]:
    """What loads the model that the options name; it can be pickled, for other machines."""
    where = given(options, "device", "dtype")
    if options.architecture is not None and (options.model is not None or options.backbone is None):
        raise BrixelError("--architecture goes with --backbone, without --model: a saved model knows its architecture")
    if options.model is not None:
        return partial(BrixelFeatures.from_pretrained, options.model, backbone=options.backbone, **where)
    if options.backbone is None:
        return partial(BrixelFeatures.from_pretrained, **where)
    return partial(BrixelFeatures.from_backbone, options.backbone, architecture=options.architecture, **where)


# ------------------------------------------------------------------------------------------------ output


def print_json(value: Any) -> None:
    """Print plain values as JSON, as ASCII where they hold characters that steer a terminal."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    is_plain = all(printable(line) == line for line in text.split("\n"))
    print(text if is_plain else json.dumps(value, indent=2))


def print_table(rows: Mapping[str, Any]) -> None:
    """Print values by name, one per line; suffixes of the names say the units, as in ``peak_bytes``."""
    labels = {name: re.sub("_(px|hw|bytes)$", "", name).replace("_", " ") for name in rows}
    width = max(map(len, labels.values()))
    for name, value in rows.items():
        print(printable(f"{labels[name]:{width}}  {_as_text(name, value)}"))


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith(("_px", "_hw")):
        sides = value if isinstance(value, list | tuple) else [value]
        return " x ".join(f"{side:g}" for side in sides) + " px"
    if name.endswith("_bytes"):
        return format_bytes(value, up=name != "limit_bytes")
    if name.endswith("parameters"):
        return f"{value / 1e6:.2f} M"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# what the command line has for the calls that load a model
_CALLS = {"from_pretrained": "--model", "from_backbone": "--backbone", "from_release": "`brixel convert`"}


def in_flags(message: str, parser: argparse.ArgumentParser) -> str:
    """The message with the arguments of Python in it as flags: ``backbone=`` becomes ``--backbone``."""
    for action in parser._actions:
        flag, name = (action.option_strings or [""])[-1], action.dest
        if flag.startswith("--"):
            message = re.sub(rf"(?<![\w/.-]){name}=(?:True\b|(?=[\s,.;)]|$))", flag, message)
            message = re.sub(rf"(?<![\w/.-]){name}=(?=')", f"{flag} ", message)
            message = re.sub(rf"^{name}(?= (is|are) )", flag, message)
            if "_" in name:  # no word of a sentence
                message = re.sub(rf"(?<![\w/.'-]){name}(?![\w/.='-])", flag, message)
    for call, words in _CALLS.items():
        known = not words.startswith("--") or words in parser._option_string_actions
        message = re.sub(rf"(?<![\w/.-]){call}(?![\w(])", words if known else f"`brixel show {words}`", message)
    return message
