"""Panels: the maps of several sources side by side, in common colours or as similarity to one point.

Shapes: T the crop's side in pixels; D channels, h x w cells of a map.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from brixel.errors import BrixelError
from brixel.evaluate.feature_cache import centre_crop
from brixel.evaluate.feature_sources import FeatureSource, features_by_name
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.panel import HEIGHT_PX, Colours, build_panel, cells_tile, image_tile, map_tiles
from brixel.images.crops import check_teacher_px


def panel_of(
    sources: Sequence[FeatureSource],
    images: Sequence[Path],
    teacher_px: int,
    point_yx: tuple[float, float] | None = None,
) -> Image.Image:
    """Draw the maps of several sources.

    Args:
        sources: The sources.
        images: Paths of images.
        teacher_px: Side of the centre square, T.
        point_yx: A point of the square in pixels, row and column from 0 to below T. A second row per image then shows
            the cosine similarity of every cell to the cell at the point, black for -1 and white for 1.

    Returns:
        A row per image: its centre square, then every source's map in the colours of one PCA basis.

    Raises:
        BrixelError: There is no image, the point is outside, or T is not a multiple of four patches.
        ImageError: An image cannot be used.
    """
    if not images:
        raise BrixelError("no images to show; expected at least one")
    if point_yx is not None and not all(0 <= at < teacher_px for at in point_yx):
        raise BrixelError(f"the point is {point_yx}; expected row and column from 0 to below {teacher_px}")
    for source in sources:
        check_teacher_px(teacher_px, source.patch_px)
    rows: list[list[Image.Image]] = []
    size_hw = (HEIGHT_PX, HEIGHT_PX)
    for image in images:
        crop = centre_crop(image, teacher_px)
        features = features_by_name(sources, crop[None])
        maps = {name: _feature_map(batch[0], teacher_px) for name, batch in features.items()}
        title = f"{image.name[:24]}, {teacher_px} px"
        rows.append([image_tile(crop.clamp(0, 1).numpy(), size_hw, title), *map_tiles(maps, size_hw)])
        if point_yx is not None:
            marked = image_tile(_marked(crop, point_yx).numpy(), size_hw, "similarity to this point")
            greys = {name: _greys(one_map, point_yx) for name, one_map in maps.items()}
            rows.append([marked, *(cells_tile(maps[name], greys[name], size_hw, name) for name in maps)])
    return build_panel(rows)


def _feature_map(features: Tensor, teacher_px: int) -> FeatureMap:
    height, width = features.shape[1:]
    return FeatureMap(features, (teacher_px, teacher_px), (teacher_px / height, teacher_px / width))


def _greys(feature_map: FeatureMap, point_yx: tuple[float, float]) -> Colours:
    """Cosine similarity of every cell to the cell at the point, black for -1 and white for 1: (h, w, 3)."""
    features = feature_map.features
    row, column = (int(at / step) for at, step in zip(point_yx, feature_map.stride, strict=True))
    cosine = F.cosine_similarity(features, features[:, row, column, None, None], dim=0)  # h w
    return ((cosine.clamp(-1, 1) + 1) * 127.5).round().byte()[..., None].expand(-1, -1, 3).numpy()


def _marked(crop: Tensor, point_yx: tuple[float, float]) -> Tensor:
    """The square with a red spot at the point."""
    side = crop.shape[-1]
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    spot = (y - point_yx[0]) ** 2 + (x - point_yx[1]) ** 2 <= (side / 60) ** 2
    return torch.where(spot, torch.tensor([1.0, 0.0, 0.0])[:, None, None], crop.clamp(0, 1))
