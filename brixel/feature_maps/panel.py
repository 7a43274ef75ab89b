"""Pictures for people: the photograph, the backbone's own map and the dense one side by side, in one set of colours."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from brixel.errors import BrixelError
from brixel.utils.atomic_files import atomic_path

HEIGHT_PX = 384  # of one tile, about: cells are enlarged by whole numbers, so that their edges stay sharp
MARGIN_PX = 12
LABEL_PX = 22


def stacked(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of tiles, below each other on white, each as high as its highest tile."""
    width = max(sum(tile.width + MARGIN_PX for tile in row) for row in rows) + MARGIN_PX
    panel = Image.new("RGB", (width, sum(_height(row) + MARGIN_PX for row in rows) + MARGIN_PX), "white")
    top = MARGIN_PX
    for row in rows:
        left = MARGIN_PX
        for tile in row:
            panel.paste(tile, (left, top))
            left += tile.width + MARGIN_PX
        top += _height(row) + MARGIN_PX
    return panel


def _height(row: Sequence[Image.Image]) -> int:
    return max(tile.height for tile in row)


def check_output(path: Path, images: Sequence[str | Path] = ()) -> None:
    """Raise BrixelError where no picture can be written to ``path``, or it is one of ``images``; asked at the start."""
    if any(path.resolve() == Path(image).resolve() for image in images):
        raise BrixelError(f"{path} is itself a picture to be shown; give another name for the panel")
    check_folder(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise BrixelError(f"{path}: expected a name that ends in .png, .jpg or .webp")


def check_folder(path: Path) -> None:
    """Raise BrixelError where the folder to write ``path`` into is missing."""
    if not path.parent.is_dir():
        raise BrixelError(f"no folder {path.parent} to write {path.name} into")


def save(panel: Image.Image, path: Path) -> None:
    """Write a picture, whole or not at all; the ending chooses the format."""
    check_output(path)
    with atomic_path(path) as temporary:
        panel.save(temporary)


def enlarge(colours: npt.NDArray[np.uint8], times: int) -> npt.NDArray[np.uint8]:
    """(H, W, 3) with every cell as a square of ``times`` x ``times`` pixels."""
    return colours.repeat(times, axis=0).repeat(times, axis=1)


def labelled(tile: npt.NDArray[np.uint8], text: str) -> Image.Image:
    """A tile (H, W, 3) with a line of text above it."""
    font = ImageFont.load_default(14)
    width = max(tile.shape[1], math.ceil(font.getlength(text)))
    labelled = Image.new("RGB", (width, tile.shape[0] + LABEL_PX), "white")
    ImageDraw.Draw(labelled).text((0, 2), text, fill="black", font=font)
    labelled.paste(Image.fromarray(np.ascontiguousarray(tile)), (0, LABEL_PX))
    return labelled
