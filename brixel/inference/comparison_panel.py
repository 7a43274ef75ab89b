"""The panel of `brixel show`: image, backbone map and dense map side by side, in the colours of one PCA basis."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
from PIL import Image

from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.panel import HEIGHT_PX, enlarge, labelled, stacked
from brixel.feature_maps.pca import PcaBasis
from brixel.images.load import ImageInput, load_image
from brixel.inference.dense_features import DenseFeatures
from brixel.model.upsampler import UPSCALE


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


def _photograph(planes: npt.NDArray[np.generic], image_hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    colours = planes if planes.dtype == np.uint8 else (planes * 255).round().astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(colours.transpose(1, 2, 0)))
    return np.asarray(picture.resize((image_hw[1], image_hw[0]), Image.Resampling.LANCZOS))
