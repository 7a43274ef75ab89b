"""Pictures for people: the photograph, the backbone's own map and the dense one side by side, in one set of colours."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from brixel.atomic import atomic_path
from brixel.dense_features import DenseFeatures
from brixel.errors import BrixelError
from brixel.feature_map import FeatureMap
from brixel.images import ImageInput, load_image
from brixel.pca import PcaBasis
from brixel.student import UPSCALE

HEIGHT_PX = 384  # of one tile, about: cells are enlarged by whole numbers, so that their edges stay sharp
MARGIN_PX = 12
LABEL_PX = 22


def show(
    model: DenseFeatures,
    images: Sequence[ImageInput],
    *,
    short_side_px: int | str | None = None,
    teacher: bool = False,
    memory_limit: int | str | None = None,
    tiles: str = "auto",
) -> Image.Image:
    """One row per picture: the picture, the backbone's map, the dense map. Maps of a row share one PCA basis.

    ``teacher``: also what the dense map should be, the backbone's map of the picture at four times the size.
    Raises ImageError for a picture that cannot be used; all others as in :meth:`BrixelFeatures.extract`.
    """
    extract = partial(model.extract, short_side_px=short_side_px, memory_limit=memory_limit, tiles=tiles)
    return stacked([_row(model, image, short_side_px, teacher, extract) for image in images])


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


def _row(
    model: DenseFeatures,
    image: ImageInput,
    short_side_px: int | str | None,
    teacher: bool,
    extract: Callable[[ImageInput], FeatureMap],
) -> list[Image.Image]:
    planes = load_image(image)
    dense = extract(planes)
    maps = {"backbone": model.extract_backbone(planes, short_side_px=short_side_px), "brixel": dense}
    if teacher:
        maps["teacher"] = model.extract_backbone(planes, short_side_px=_teacher_px(dense))
    basis = PcaBasis.fit([each.features for each in maps.values()])
    zoom = max(1, round(min(HEIGHT_PX / dense.grid_hw[0], 4 * HEIGHT_PX / dense.grid_hw[1])))
    # the last cells may reach over the picture's edge: every tile is cut where the picture ends
    height, width = (round(side / step * zoom) for side, step in zip(dense.image_hw, dense.stride, strict=True))
    tiles = [(_photograph(planes.numpy(), (height, width)), "picture {} x {}".format(*dense.image_hw))]
    for name, feature_map in maps.items():
        step = max(1, round(zoom * feature_map.stride[0] / dense.stride[0]))
        tile = enlarge(feature_map.pca(basis), step)[:height, :width]
        tiles.append((tile, "{} {} x {}".format(name, *feature_map.grid_hw)))
    return [labelled(tile, text) for tile, text in tiles]


def _teacher_px(dense: FeatureMap) -> int:
    """Four times the short side that a picture had in the model."""
    resized_hw = (int(each) for each in dense.meta["resized_hw"].split("x"))
    return UPSCALE * min(resized_hw)


def enlarge(colours: npt.NDArray[np.uint8], times: int) -> npt.NDArray[np.uint8]:
    """(H, W, 3) with every cell as a square of ``times`` x ``times`` pixels."""
    return colours.repeat(times, axis=0).repeat(times, axis=1)


def _photograph(planes: npt.NDArray[np.generic], image_hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    colours = planes if planes.dtype == np.uint8 else (planes * 255).round().astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(colours.transpose(1, 2, 0)))
    return np.asarray(picture.resize((image_hw[1], image_hw[0]), Image.Resampling.LANCZOS))


def labelled(tile: npt.NDArray[np.uint8], text: str) -> Image.Image:
    """A tile (H, W, 3) with a line of text above it."""
    font = ImageFont.load_default(14)
    width = max(tile.shape[1], math.ceil(font.getlength(text)))
    labelled = Image.new("RGB", (width, tile.shape[0] + LABEL_PX), "white")
    ImageDraw.Draw(labelled).text((0, 2), text, fill="black", font=font)
    labelled.paste(Image.fromarray(np.ascontiguousarray(tile)), (0, LABEL_PX))
    return labelled
