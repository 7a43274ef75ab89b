"""`brixel show`: a panel of images, the backbone's maps and the dense maps."""

import argparse
from typing import Any

from brixel.cli.options import (
    add_flag,
    add_map_options,
    add_model_options,
    add_panel_output,
    add_shown_images,
    command,
    given,
    load,
    shown_images,
)
from brixel.feature_maps.panel import check_panel_path, save_panel
from brixel.inference.comparison_panel import comparison_panel


def add(commands: Any) -> None:
    """Add the command."""
    text = "draw images, backbone maps and dense maps side by side"
    parser = command(commands, "show", _show, text, "brixel show photo.jpg --teacher -o panel.png")
    add_shown_images(parser)
    add_panel_output(parser)
    add_flag(parser, "--teacher")
    add_model_options(parser)
    add_map_options(parser)


def _show(options: argparse.Namespace) -> int:
    images = shown_images(options.images)
    check_panel_path(options.output, images, overwrite=options.overwrite)
    settings = given(options, "scale", "short_side_px", "teacher", "memory_limit", "tiles")
    panel = comparison_panel(load(options), images, **settings)
    save_panel(panel, options.output)
    print(options.output)
    return 0
