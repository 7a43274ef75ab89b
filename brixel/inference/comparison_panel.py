"""The panel of `brixel show`: the image, the backbone's map upsampled bilinearly, the dense map; one PCA basis."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.panel import build_panel, image_tile, map_tiles, tile_size
from brixel.feature_maps.pca import PcaBasis
from brixel.images.load import ImageInput, load_image
from brixel.inference.dense_features import DenseFeatures

DENSE = "brixel"


def comparison_panel(
    model: DenseFeatures,
    images: Sequence[ImageInput],
    *,
    scale: int | None = None,
    short_side_px: int | str | None = None,
    teacher: bool = False,
    memory_limit: int | str | None = None,
    tiles: str = "auto",
) -> Image.Image:
    """Draw one row per image: the image, the backbone's map upsampled bilinearly, the dense map.

    Args:
        model: The model to show.
        images: Images of any kind that :meth:`DenseFeatures.extract` takes.
        scale: As for :meth:`DenseFeatures.extract`.
        short_side_px: As for :meth:`DenseFeatures.extract`.
        teacher: Also show the backbone's map of the image at ``scale`` times the size, which the map approximates.
        memory_limit: As for :meth:`DenseFeatures.extract`; it holds for each map that is made.
        tiles: As for :meth:`DenseFeatures.extract`.

    Returns:
        The panel, RGB.

    Raises:
        ImageError: An image cannot be read.
        MemoryLimitError: A map does not fit into ``memory_limit``.
    """
    rows = []
    for image in images:
        rgb = load_image(image)
        maps = comparison_maps(
            model,
            rgb,
            scale=scale,
            short_side_px=short_side_px,
            teacher=teacher,
            memory_limit=memory_limit,
            tiles=tiles,
        )
        rows.append(comparison_row(rgb, maps))
    return build_panel(rows)


def comparison_maps(
    model: DenseFeatures,
    rgb: Tensor,
    *,
    scale: int | None,
    short_side_px: int | str | None,
    teacher: bool,
    memory_limit: int | str | None,
    tiles: str,
) -> dict[str, FeatureMap]:
    """The maps of an image (3, H, W) that a row of the panel shows, by their labels; see :func:`comparison_panel`."""
    limits: dict[str, Any] = {"memory_limit": memory_limit, "tiles": tiles}
    dense = model.extract(rgb, scale=scale, short_side_px=short_side_px, **limits)
    backbone = model.extract_backbone(rgb, short_side_px=short_side_px, **limits)
    maps = {"backbone, bilinear": backbone.resize(dense.grid_hw), DENSE: dense}
    if teacher:
        teacher_px = _teacher_px(dense, model.at_scale(scale).scale)
        maps["teacher"] = model.extract_backbone(rgb, short_side_px=teacher_px, **limits)
    return maps


def comparison_row(
    rgb: Tensor, maps: Mapping[str, FeatureMap], basis: PcaBasis | None = None, title: str = ""
) -> list[Image.Image]:
    """The tiles of an image (3, H, W) and its maps; the basis is fitted to these maps where None."""
    size_hw = tile_size(maps[DENSE])
    title = title or "image {} x {}".format(*maps[DENSE].image_hw)
    return [image_tile(rgb.numpy(), size_hw, title), *map_tiles(maps, size_hw, basis)]


def _teacher_px(dense: FeatureMap, scale: int) -> int:
    """``scale`` times the short side that the image had in the model."""
    resized_hw = (int(side) for side in dense.meta["resized_hw"].split("x"))
    return scale * min(resized_hw)
