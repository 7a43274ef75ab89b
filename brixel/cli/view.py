"""`brixel view`: a page in which one points at images and sees what is similar."""

import argparse
from pathlib import Path
from typing import Any

from brixel.cli.options import (
    add_flag,
    add_map_options,
    add_model_options,
    add_output,
    add_shown_images,
    command,
    given,
    load,
    shown_images,
)
from brixel.feature_maps.viewer.page import check_page_path
from brixel.inference.comparison_panel import comparison_maps
from brixel.inference.view import view


def add(commands: Any) -> None:
    """Add the command."""
    text = "write a page in which one points at images and sees what is similar"
    parser = command(commands, "view", _view, text, "brixel view photo.jpg another.jpg -o view.html")
    add_shown_images(parser)
    add_output(parser, default=Path("view.html"), metavar="PAGE")
    add_flag(parser, "--overwrite", note="without it, brixel replaces only pages that it has written")
    add_flag(parser, "--teacher")
    add_model_options(parser)
    add_map_options(parser)


def _view(options: argparse.Namespace) -> int:
    images = shown_images(options.images)
    check_page_path(options.output, overwrite=options.overwrite)
    model = load(options)
    settings = given(options, "scale", "short_side_px", "teacher", "memory_limit", "tiles")
    view([comparison_maps(model, image, **settings) for image in images], options.output, images=images)
    print(options.output)
    return 0
