"""Steps of a reduction that keep only points or regions of an image, which may differ from image to image.

Shapes: N points or regions, D channels, H x W pixels.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from brixel.errors import BrixelError
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.feature_table import FeatureTable
from brixel.feature_maps.reduction.steps import Step
from brixel.utils.contained_paths import path_below
from brixel.utils.fields import short_repr
from brixel.utils.structured_files import read_json_value

Array = npt.NDArray[Any]
Places = Array | Mapping[str, Array] | Callable[[str], Array] | Path
"""Points or masks: the same for all images, by the name of the image, from a function of the name, or in files."""

_DIGEST_LETTERS = 12


@dataclass(frozen=True, eq=False)
class Points(Step):
    """The features at points (y, x) in pixels of the image.

    Args:
        points: (N, 2) for all images; or by name, as a mapping, a function, or the path of a JSON file of either kind.
    """

    points: Places
    _by_file: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        content = read_json_value(self.points) if isinstance(self.points, Path) else self.points
        if not isinstance(content, (Mapping, list, np.ndarray)) and not callable(content):
            raise BrixelError(
                f"points are {short_repr(content)}; expected rows of (y, x), or those of every image by its name"
            )
        object.__setattr__(self, "_by_file", content)

    @property
    def spec(self) -> str:
        """Such as "points:points.json"; "points" of those that were given in Python."""
        return f"points:{self.points}" if isinstance(self.points, Path) else "points"

    @property
    def identity(self) -> str:
        """The spec, and a digest of the points."""
        return _identity(self.spec, self._by_file)

    def apply(self, source: FeatureMap | FeatureTable, name: str) -> FeatureTable:
        """The features at the points of the image, bilinearly between cells; those of no points are empty."""
        assert isinstance(source, FeatureMap)
        points = _as_points(_of_image(self._by_file, name, "points"))
        features = source.at(points)
        labels = torch.arange(len(points))
        return FeatureTable(
            features, torch.from_numpy(points), labels, source.image_hw, source.meta, basis=source.basis
        )


@dataclass(frozen=True, eq=False)
class MaskRegions(Step):
    """The mean features of the regions of masks of the image's size.

    Args:
        masks: (H, W) of whole numbers, 0 where there is no region, or (N, H, W) of booleans, for all images; by name,
            as a mapping or a function; or a folder with a PNG file for each image, "cats/7.png" for "cats/7.jpg".
    """

    masks: Places

    def __post_init__(self) -> None:
        if isinstance(self.masks, Path) and not self.masks.is_dir():
            raise BrixelError(f"regions:{self.masks}: no such folder; expected one of masks, or a grid such as 16x16")
        if not isinstance(self.masks, (Path, Mapping, np.ndarray)) and not callable(self.masks):
            raise BrixelError(
                f"masks are {short_repr(self.masks)}; expected an array, or one for every image by its name"
            )

    @property
    def spec(self) -> str:
        """Such as "regions:masks"; "regions" of masks that were given in Python."""
        return f"regions:{self.masks}" if isinstance(self.masks, Path) else "regions"

    @property
    def identity(self) -> str:
        """The spec, and a digest of masks that were given in Python."""
        return self.spec if isinstance(self.masks, Path) else _identity(self.spec, self.masks)

    def apply(self, source: FeatureMap | FeatureTable, name: str) -> FeatureTable:
        """The means over the regions, in the order of their labels; every pixel has the features of its cell."""
        assert isinstance(source, FeatureMap)
        masks = self.masks
        mask = _read_mask(masks, name) if isinstance(masks, Path) else np.asarray(_of_image(masks, name, "masks"))
        regions = _regions(mask, source.image_hw, name)
        cells = _cell_of_pixels(source)
        features = source.features.flatten(1)  # D cells
        means, centres = [], []
        for _, region in regions:
            counts = np.bincount(cells[region], minlength=features.shape[1])
            inside = np.flatnonzero(counts)
            weights = torch.from_numpy(counts[inside] / counts.sum())
            means.append(_weighted_mean(features, torch.from_numpy(inside), weights))
            centres.append(np.mean(np.nonzero(region), axis=1) + 0.5)
        table = torch.stack(means) if means else features.new_empty((0, len(features)))
        points = torch.from_numpy(np.array(centres, np.float64).reshape(-1, 2))
        labels = torch.tensor([label for label, _ in regions], dtype=torch.int64)
        return FeatureTable(table, points, labels, source.image_hw, source.meta, basis=source.basis)


def _weighted_mean(features: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
    """The mean of some cells of (D, cells): (D,), in their dtype, computed in float32 or wider."""
    wide = torch.promote_types(features.dtype, torch.float32)
    mean = features[:, cells.to(features.device)].to(wide) @ weights.to(features.device, wide)
    return mean.to(features.dtype)


def _cell_of_pixels(source: FeatureMap) -> npt.NDArray[np.int64]:
    """The index of the cell that the centre of every pixel lies in: (H, W)."""
    rows, columns = (
        np.minimum((np.arange(side) + 0.5) // stride, cells - 1).astype(np.int64)
        for side, stride, cells in zip(source.image_hw, source.stride, source.grid_hw, strict=True)
    )
    return rows[:, None] * source.grid_hw[1] + columns


def _regions(mask: Array, image_hw: tuple[int, int], name: str) -> list[tuple[int, npt.NDArray[np.bool_]]]:
    """Labels and pixels (H, W) of the regions of a mask."""
    title = f"the mask of {name}" if name else "the mask"
    if mask.ndim not in (2, 3) or mask.dtype.kind not in "biu":
        raise BrixelError(
            f"{title} is {mask.shape} {mask.dtype}; expected (H, W) of whole numbers or (N, H, W) of bools"
        )
    if mask.shape[-2:] != image_hw:
        height, width = mask.shape[-2:]
        raise BrixelError(
            f"{title} has {height} x {width} pixels, the image {image_hw[0]} x {image_hw[1]}; expected the same"
        )
    if mask.ndim == 3:
        regions = [(label, layer.astype(bool)) for label, layer in enumerate(mask)]
        if empty := [label for label, region in regions if not region.any()]:
            raise BrixelError(f"region {empty[0]} of {title} has no pixels; leave it out")
        return regions
    return [(int(label), mask == label) for label in np.unique(mask) if label != 0]


def _read_mask(folder: Path, name: str) -> Array:
    if not name:
        raise BrixelError("regions of a folder of masks need the name of the image: reduce(feature_map, 'cats/7.jpg')")
    path = path_below(folder, Path(name).with_suffix(".png").as_posix(), "the reduction")
    if not path.is_file():
        raise BrixelError(f"no mask {path} for {name}; expected one for every image")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            mask = np.asarray(image)
    except Exception as error:  # Pillow's readers raise nearly anything
        raise BrixelError(f"{path} cannot be read as a PNG file ({error})") from error
    if mask.ndim != 2:
        raise BrixelError(
            f"{path} is a mask in colour; expected one channel, with the number of the region in every pixel"
        )
    return mask


def _of_image(places: Any, name: str, what: str) -> Any:
    """What belongs to an image, of what is the same for all or given by name."""
    if callable(places):
        return places(name)
    if not isinstance(places, Mapping):
        return places
    if name not in places:
        given = f"none for {name}" if name else "no name of the image"
        raise BrixelError(f"{what} by name, and {given}; expected one of {short_repr(sorted(places))}")
    return places[name]


def _as_points(points: Any) -> npt.NDArray[np.float64]:
    try:
        array = np.asarray(points.detach().cpu() if isinstance(points, Tensor) else points, np.float64)
    except (TypeError, ValueError) as error:
        raise BrixelError(f"points are not rows of numbers ({error}); give (y, x) pairs") from error
    return array.reshape(0, 2) if array.size == 0 else array


def _identity(spec: str, places: Any) -> str:
    """The spec with a digest of points or masks; of those from a function, the spec alone."""
    if callable(places):
        return spec
    digest = hashlib.sha256()
    for name, values in sorted(places.items()) if isinstance(places, Mapping) else [("", places)]:
        array = np.ascontiguousarray(np.asarray(values))
        digest.update(f"{name} {array.shape} {array.dtype}".encode("utf-8", "surrogateescape") + array.tobytes())
    return f"{spec} {digest.hexdigest()[:_DIGEST_LETTERS]}"
