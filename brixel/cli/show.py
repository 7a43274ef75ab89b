"""`brixel show`: a panel of images, the backbone's maps and the dense maps."""

import argparse
from pathlib import Path
from typing import Any

from brixel.cli.options import add_map_options, add_model_options, add_output, command, given, load
from brixel.feature_maps.panel import check_panel_path, save_panel
from brixel.images.find_images import SCENE
from brixel.inference.comparison_panel import comparison_panel


def add(commands: Any) -> None:
    """Add the command."""
    text = "draw images, backbone maps and dense maps side by side"
    parser = command(commands, "show", _show, text, "brixel show photo.jpg --teacher -o panel.png")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files; default: a scene that brixel contains")
    add_output(parser, default=Path("panel.png"), metavar="IMAGE")
    text = "also the backbone's map of the image at four times the size"
    parser.add_argument("--teacher", action="store_true", help=text)
    add_model_options(parser)
    add_map_options(parser)


def _show(options: argparse.Namespace) -> int:
    images = options.images or [SCENE]
    check_panel_path(options.output, images)
    settings = given(options, "scale", "short_side_px", "teacher", "memory_limit", "tiles")
    panel = comparison_panel(load(options), images, **settings)
    save_panel(panel, options.output)
    print(options.output)
    return 0
