"""Panels: an image and its feature maps side by side, as labelled tiles of one size.

Shapes: D channels, Hf x Wf cells of a map, H x W pixels of a tile.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageDraw, ImageFont

from brixel.errors import BrixelError
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.pca import PcaBasis
from brixel.utils.atomic_files import atomic_path, check_output_file

HEIGHT_PX = 384  # of a tile, approximately; a tile is at most four times as wide
MARGIN_PX = 12
LABEL_PX = 22  # height of a label
_SOFTWARE = "brixel"  # in the metadata of panels, by which they are known

Colours = npt.NDArray[np.uint8]
"""RGB values (H, W, 3)."""


def tile_size(finest: FeatureMap) -> tuple[int, int]:
    """Height and width in pixels of a tile of the image in which the cells of ``finest`` are whole squares."""
    zoom = max(1, round(min(HEIGHT_PX / finest.grid_hw[0], 4 * HEIGHT_PX / finest.grid_hw[1])))
    height, width = (round(side / step * zoom) for side, step in zip(finest.image_hw, finest.stride, strict=True))
    return height, width


def image_tile(rgb: npt.NDArray[np.generic], size_hw: tuple[int, int], title: str) -> Image.Image:
    """Draw a tile of an image.

    Args:
        rgb: (3, H, W), uint8 or floats in [0, 1].
        size_hw: The tile's height and width in pixels, without its label.
        title: The label.
    """
    image = pil_image(rgb)
    return _labelled(np.asarray(image.resize((size_hw[1], size_hw[0]), Image.Resampling.LANCZOS)), title)


def pil_image(rgb: npt.NDArray[np.generic]) -> Image.Image:
    """An image (3, H, W), uint8 or floats in [0, 1], as a PIL image."""
    colours = rgb if rgb.dtype == np.uint8 else (rgb * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(colours.transpose(1, 2, 0)))


def map_tiles(
    maps: Mapping[str, FeatureMap], size_hw: tuple[int, int], basis: PcaBasis | None = None
) -> list[Image.Image]:
    """Tiles of several maps of one image, labelled with name and grid, in the colours of one PCA basis.

    ``basis``: fitted to these maps where None.
    """
    basis = PcaBasis.fit([feature_map.features for feature_map in maps.values()]) if basis is None else basis
    return [cells_tile(feature_map, feature_map.pca(basis), size_hw, name) for name, feature_map in maps.items()]


def cells_tile(feature_map: FeatureMap, colours: Colours, size_hw: tuple[int, int], name: str) -> Image.Image:
    """Draw a tile of a map: cells are sharp squares, cut off at the edge of the image.

    Args:
        feature_map: The map, for its geometry.
        colours: One colour per cell, (Hf, Wf, 3).
        size_hw: The tile's height and width in pixels, without its label.
        name: The label; the grid is added.
    """
    rows, columns = (
        np.minimum(((np.arange(pixels) + 0.5) * side / pixels / step).astype(int), cells - 1)
        for pixels, side, step, cells in zip(
            size_hw, feature_map.image_hw, feature_map.stride, feature_map.grid_hw, strict=True
        )
    )
    return _labelled(colours[rows[:, None], columns], "{} {} x {}".format(name, *feature_map.grid_hw))


def build_panel(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Stack rows of tiles on white; a row is as high as its highest tile."""
    heights = [max(tile.height for tile in row) for row in rows]
    width = max(sum(tile.width + MARGIN_PX for tile in row) for row in rows) + MARGIN_PX
    panel = Image.new("RGB", (width, sum(height + MARGIN_PX for height in heights) + MARGIN_PX), "white")
    top = MARGIN_PX
    for row, height in zip(rows, heights, strict=True):
        left = MARGIN_PX
        for tile in row:
            panel.paste(tile, (left, top))
            left += tile.width + MARGIN_PX
        top += height + MARGIN_PX
    return panel


def check_panel_path(path: Path, images: Sequence[str | Path] = (), *, overwrite: bool = True) -> None:
    """Raise BrixelError if no panel can be written to ``path``, or if it is one of ``images``.

    Without ``overwrite``, also if there is a file that is no panel of ours.
    """
    if any(path.resolve() == Path(image).resolve() for image in images):
        raise BrixelError(f"{path} is itself an image to be shown; give another name for the panel")
    check_output_file(path, (".png", ".jpg", ".jpeg", ".webp"), "an image")
    if not overwrite:
        check_replaceable(path)


def save_panel(panel: Image.Image, path: Path) -> None:
    """Write a panel, completely or not at all, in the format of the suffix."""
    check_panel_path(path)
    save_image(panel, path)


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image that we have drawn, completely or not at all; its metadata say so."""
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = _SOFTWARE
    with atomic_path(path) as temporary:
        image.save(temporary, exif=exif)


def check_replaceable(path: Path) -> None:
    """Raise BrixelError where there is a file that :func:`save_image` did not write."""
    if path.exists() and not _is_ours(path):
        raise BrixelError(f"{path} exists, and brixel has not drawn it; give another name, or --overwrite")


def _is_ours(path: Path) -> bool:
    """Whether a file is an image that `save_image` wrote."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            return image.getexif().get(ExifTags.Base.Software) == _SOFTWARE
    except Exception:  # Pillow's readers raise nearly anything
        return False


def _labelled(tile: Colours, text: str) -> Image.Image:
    """A tile (H, W, 3) with a label above it."""
    font = ImageFont.load_default(14)
    width = max(tile.shape[1], math.ceil(font.getlength(text)))
    labelled = Image.new("RGB", (width, tile.shape[0] + LABEL_PX), "white")
    ImageDraw.Draw(labelled).text((0, 2), text, fill="black", font=font)
    labelled.paste(Image.fromarray(np.ascontiguousarray(tile)), (0, LABEL_PX))
    return labelled
