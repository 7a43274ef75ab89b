"""`brixel show`: a panel of images, the backbone's maps and the dense maps."""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from brixel.cli.options import add_map_options, add_model_options, add_panel_output, command, given, load
from brixel.feature_maps.panel import check_panel_path, save_panel
from brixel.images.find_images import SCENE, find_images
from brixel.inference.comparison_panel import comparison_panel

_MAX_IMAGES = 8
_LOG = logging.getLogger("brixel")


def add(commands: Any) -> None:
    """Add the command."""
    text = "draw images, backbone maps and dense maps side by side"
    parser = command(commands, "show", _show, text, "brixel show photo.jpg --teacher -o panel.png")
    text = f"images, and folders, of which the first {_MAX_IMAGES} are drawn; default: a scene that brixel contains"
    parser.add_argument("images", nargs="*", metavar="PATH", help=text)
    add_panel_output(parser)
    text = "also the backbone's map of the image at four times the size"
    parser.add_argument("--teacher", action="store_true", help=text)
    add_model_options(parser)
    add_map_options(parser)


def _show(options: argparse.Namespace) -> int:
    images: list[str | Path] = []
    for path in options.images or [SCENE]:
        images += _in_folder(Path(path)) if os.path.isdir(path) else [path]
    check_panel_path(options.output, images, overwrite=options.overwrite)
    settings = given(options, "scale", "short_side_px", "teacher", "memory_limit", "tiles")
    panel = comparison_panel(load(options), images, **settings)
    save_panel(panel, options.output)
    print(options.output)
    return 0


def _in_folder(folder: Path) -> list[Path]:
    found = [path for path, _ in find_images([folder])]
    if len(found) > _MAX_IMAGES:
        _LOG.warning("%s: the first %d of %d images are drawn", folder, _MAX_IMAGES, len(found))
    return found[:_MAX_IMAGES]
