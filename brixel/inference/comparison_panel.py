"""The maps that are compared by `brixel show` and `brixel view`, and the panel of `brixel show`."""

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
    image: ImageInput,
    *,
    scale: int | None = None,
    short_side_px: int | str | None = None,
    teacher: bool = False,
    memory_limit: int | str | None = None,
    tiles: str = "auto",
) -> dict[str, FeatureMap]:
    """Compute the backbone's own map of an image and the dense map, and the teacher's where asked for.

    Args:
        model: The model.
        image: An image of any kind.
        scale: As for :func:`comparison_panel`, as all other arguments.
        short_side_px: The short side in pixels after resizing.
        teacher: Whether the teacher's map is wanted.
        memory_limit: Bytes or text such as "4GiB".
        tiles: "auto", "never" or "always".

    Returns:
        The maps "backbone", "brixel" and, where asked for, "teacher".

    Raises:
        ImageError: The image cannot be read.
        MemoryLimitError: A map does not fit into ``memory_limit``.
    """
    rgb = load_image(image)
    limits: dict[str, Any] = {"memory_limit": memory_limit, "tiles": tiles}
    dense = model.extract(rgb, scale=scale, short_side_px=short_side_px, **limits)
    maps = {"backbone": model.extract_backbone(rgb, short_side_px=short_side_px, **limits), "brixel": dense}
    if teacher:
        teacher_px = _teacher_px(dense, model.at_scale(scale).scale)
        maps["teacher"] = model.extract_backbone(rgb, short_side_px=teacher_px, **limits)
    return maps


def comparison_row(
    rgb: Tensor, maps: Mapping[str, FeatureMap], basis: PcaBasis | None = None, title: str = ""
) -> list[Image.Image]:
    """The tiles of an image (3, H, W) and of what :func:`comparison_maps` gives, the backbone's map upsampled.

    ``basis``: of the colours, fitted to these maps where None. ``title``: of the image; its size where empty.
    """
    dense = maps["brixel"]
    upsampled = {
        "backbone, bilinear" if name == "backbone" else name: each.resize(dense.grid_hw) if name == "backbone" else each
        for name, each in maps.items()
    }
    size_hw = tile_size(dense)
    title = title or "image {} x {}".format(*dense.image_hw)
    return [image_tile(rgb.numpy(), size_hw, title), *map_tiles(upsampled, size_hw, basis)]


def _teacher_px(dense: FeatureMap, scale: int) -> int:
    """``scale`` times the short side that the image had in the model."""
    resized_hw = (int(side) for side in dense.meta["resized_hw"].split("x"))
    return scale * min(resized_hw)
