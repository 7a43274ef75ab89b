"""Panels for people: the maps of several sources side by side, in one set of colours or as likeness to one point.

Shapes: T the crop's side in pixels; D channels, h x w cells of a map.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from brixel.errors import BrixelError
from brixel.evaluate.feature_cache import centre_crop
from brixel.evaluate.feature_sources import Source, features_by_name
from brixel.feature_maps.panel import HEIGHT_PX, labelled, stacked
from brixel.feature_maps.pca import PcaBasis
from brixel.images.crops import check_teacher_px


def panel_of(
    sources: Sequence[Source],
    pictures: Sequence[Path],
    teacher_px: int,
    point_yx: tuple[float, float] | None = None,
) -> Image.Image:
    """A row for each picture: its centre square, then every source's map in the colours of one PCA basis.

    ``point_yx``: a point of the square, in its T pixels; then a second row shows the cosine similarity of every cell to
    the cell at the point, black for -1 and white for 1, which is the source's own and needs no common basis.
    Raises BrixelError for a point outside, ImageError for a picture that cannot be used.
    """
    if not pictures:
        raise BrixelError("no pictures to show; expected at least one")
    if point_yx is not None and not all(0 <= each < teacher_px for each in point_yx):
        raise BrixelError(f"the point is {point_yx}; expected row and column from 0 to below {teacher_px}")
    for source in sources:
        check_teacher_px(teacher_px, source.patch_px)
    rows: list[list[Image.Image]] = []
    for picture in pictures:
        crop = centre_crop(picture, teacher_px)
        maps = {name: each[0] for name, each in features_by_name(sources, crop[None]).items()}
        rows.append(_row(crop, f"{picture.name[:24]}, {teacher_px} px", _in_colours(maps)))
        if point_yx is not None:
            rows.append(_row(_marked(crop, point_yx), "like this point", _likeness(maps, point_yx, teacher_px)))
    return stacked(rows)


def _row(crop: Tensor, title: str, tiles: Mapping[str, npt.NDArray[np.uint8]]) -> list[Image.Image]:
    picture = (crop.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    small = Image.fromarray(picture).resize((HEIGHT_PX, HEIGHT_PX), Image.Resampling.LANCZOS)
    return [labelled(np.asarray(small), title), *(labelled(tile, name) for name, tile in tiles.items())]


def _in_colours(maps: Mapping[str, Tensor]) -> dict[str, npt.NDArray[np.uint8]]:
    basis = PcaBasis.fit(list(maps.values()))
    return {_title(name, each): _enlarged(basis.project(each)) for name, each in maps.items()}


def _likeness(
    maps: Mapping[str, Tensor], point_yx: tuple[float, float], teacher_px: int
) -> dict[str, npt.NDArray[np.uint8]]:
    tiles = {}
    for name, each in maps.items():
        row, column = (int(at * cells / teacher_px) for at, cells in zip(point_yx, each.shape[1:], strict=True))
        cosine = F.cosine_similarity(each, each[:, row, column, None, None], dim=0)  # h w
        grey = ((cosine.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
        tiles[_title(name, each)] = _enlarged(np.repeat(grey[..., None], 3, axis=2))
    return tiles


def _title(name: str, features: Tensor) -> str:
    return "{} {} x {}".format(name, *features.shape[1:])


def _enlarged(colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    tile = Image.fromarray(np.ascontiguousarray(colours))
    return np.asarray(tile.resize((HEIGHT_PX, HEIGHT_PX), Image.Resampling.NEAREST))


def _marked(crop: Tensor, point_yx: tuple[float, float]) -> Tensor:
    """The square with a red spot at the point."""
    side = crop.shape[-1]
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    spot = (y - point_yx[0]) ** 2 + (x - point_yx[1]) ** 2 <= (side / 60) ** 2
    return torch.where(spot, torch.tensor([1.0, 0.0, 0.0])[:, None, None], crop)
