"""A picture made ready for a model, and a map made of what the model gives: for those with a loop of their own."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from brixel.errors import BrixelError, ImageError, MemoryLimitError
from brixel.feature_map import FeatureMap
from brixel.geometry import Geometry, plan_geometry
from brixel.images import ImageInput, opened, preprocess
from brixel.ways import crop


@dataclass(frozen=True)
class Placement:
    """How a picture lies on the patch grid, and what a map of it tells of how it was made."""

    geometry: Geometry
    meta: Mapping[str, str] = field(default_factory=dict)

    def feature_map(
        self, features: Tensor, *, meta: Mapping[str, str] | None = None, in_place: bool = False
    ) -> FeatureMap:
        """The map of the picture, on the CPU, from the features (D, u h, u w) of its padded h x w patches.

        ``u`` cells to a patch's side: 4 of the dense map, 1 of the backbone's own. ``meta``: more to tell.
        ``in_place``: ``features`` are not needed any more, and may be cut without a second copy of them.
        Raises BrixelError where the features are not those of this picture's size.
        """
        geometry = self.geometry
        patches_hw = tuple(side // geometry.patch_px for side in geometry.padded_hw)
        upscale = features.shape[-1] // patches_hw[1] if features.ndim == 3 else 0
        if upscale < 1 or features.shape[1:] != (upscale * patches_hw[0], upscale * patches_hw[1]):
            raise BrixelError(
                f"features have shape {tuple(features.shape)}; expected (D, 4h, 4w) for the {patches_hw[0]} x "
                f"{patches_hw[1]} patches of this picture, without a batch's axis: give features[i]"
            )
        height, width = geometry.map_hw(upscale)
        cells = crop(features, (height, width)) if in_place else features[:, :height, :width].detach().cpu().clone()
        return FeatureMap(cells, geometry.image_hw, geometry.map_stride(upscale), {**self.meta, **(meta or {})})


@dataclass(frozen=True)
class Preparation:
    """What is done to every picture before a model: a small callable without the model, for workers of a DataLoader.

    ``short_side_px``: pixels, or "native".
    """

    patch_px: int
    short_side_px: int | str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    meta: Mapping[str, str] = field(default_factory=dict)

    def __call__(
        self, image: ImageInput, check: Callable[[tuple[int, int]], None] | None = None
    ) -> tuple[Tensor, Placement]:
        """Normalised pixels (3, H, W), float32, H and W whole patches, and how the picture lies on them.

        ``check`` may refuse that size before the pixels are made. Raises ImageError for a picture that cannot be used.
        """
        with opened(image) as picture:
            try:
                geometry = plan_geometry(picture.image_hw, self.patch_px, self.short_side_px)
                if check is not None:
                    check(geometry.padded_hw)
            except (ImageError, MemoryLimitError) as error:  # which know of a size alone
                if not isinstance(image, (str, os.PathLike)):
                    raise
                raise type(error)(f"{os.fspath(image)}: {error}") from error
            planes = picture.read(geometry.resized_hw)
        del picture  # what Pillow decoded is free before the planes are worked on
        height, width = geometry.resized_hw
        placement = Placement(geometry, {**self.meta, "resized_hw": f"{height}x{width}"})
        return preprocess(planes, geometry, self.mean, self.std), placement
