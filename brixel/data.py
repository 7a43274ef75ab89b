"""Images for training loops of your own: a data set and a `collate_fn` for PyTorch's `DataLoader`.

>>> from torch.utils.data import DataLoader
>>> from brixel.data import ImageDataset, collate
>>> loader = DataLoader(ImageDataset(paths, model, masks), batch_size=8, shuffle=True, collate_fn=collate)
>>> for batches in loader:  # one batch for every size among eight images
...     for batch in batches:
...         batch = batch.to(model.device)
...         features = model(batch.pixels.to(model.dtype))

Shapes: B images of a batch, K channels, h x w patches of a padded image, H x W its pixels.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from brixel.errors import BrixelError
from brixel.images.load import ImageInput
from brixel.images.preprocess import ImagePlacement
from brixel.inference.dense_features import DenseFeatures

__all__ = ["Batch", "ImageDataset", "Sample", "collate"]


def __dir__() -> list[str]:
    return sorted(__all__)


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """An image as a model takes it.

    Args:
        pixels: (3, H, W), float32, normalised and padded to whole patches.
        placement: How the image lies on the pixels.
        target: What belongs to the image; a tensor where it was an array. None without targets.
        index: Its position in the data set.
    """

    pixels: Tensor
    placement: ImagePlacement
    target: Any
    index: int


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Images of one size, whatever size they had before they were resized.

    Args:
        pixels: (B, 3, H, W), float32, normalised and padded to whole patches.
        placements: How the images lie on the pixels.
        targets: What belongs to each image; not stacked, since the images themselves may differ in size.
        indices: The images' positions in the data set.
    """

    pixels: Tensor
    placements: tuple[ImagePlacement, ...]
    targets: tuple[Any, ...]
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.placements)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The batch with its pixels, and the targets that are tensors, on a device. Lightning calls this as well."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory: `DataLoader(..., pin_memory=True)` calls this."""
        return self._with(Tensor.pin_memory)

    def _with(self, moved: Callable[[Tensor], Tensor]) -> "Batch":
        targets = tuple(moved(target) if isinstance(target, Tensor) else target for target in self.targets)
        return dataclasses.replace(self, pixels=moved(self.pixels), targets=targets)

    def at_image_size(self, values: Tensor) -> list[Tensor]:
        """Resize a dense output to the images as they were given, such as the logits of a decoder to the masks.

        Bilinear between the centres of cells, without the padding. Gradients flow.

        Args:
            values: (B, K, u h, u w), u cells per side of a patch: 4 for what a model returns.

        Returns:
            A tensor (K, height, width) for each image, on the device of ``values``.

        Raises:
            BrixelError: Another shape than the patches of these images.
        """
        if values.ndim != 4 or len(values) != len(self):
            raise BrixelError(
                f"values have shape {tuple(values.shape)}; expected ({len(self)}, K, 4h, 4w) for the {len(self)} "
                "images of this batch"
            )
        maps = (
            placement.feature_map(value, as_view=True) for placement, value in zip(self.placements, values, strict=True)
        )
        return [dense.resize(dense.image_hw).features for dense in maps]


class ImageDataset(Dataset[Sample]):
    """Images of any kind and size, prepared for a model, with targets if there are any.

    It keeps what prepares images and not the model, so that workers of a `DataLoader` stay small. Images are read when
    their turn comes.

    Args:
        images: Images of any kind that :meth:`brixel.BrixelFeatures.extract` takes, or any object with ``len`` and
            ``[index]`` that gives them, such as one that augments.
        model: The model that the images are prepared for.
        targets: What belongs to the images, such as masks (H, W): a sequence of the same length, which may read lazily
            as well. Arrays become tensors, everything else is passed on.
        short_side_px: As for :meth:`brixel.BrixelFeatures.extract`.

    Raises:
        BrixelError: ``images`` or ``targets`` is no sequence, or their lengths differ.
    """

    def __init__(
        self,
        images: Sequence[ImageInput],
        model: DenseFeatures,
        targets: Sequence[Any] | None = None,
        *,
        short_side_px: int | str | None = None,
    ) -> None:
        if not isinstance(model, DenseFeatures):
            raise BrixelError(f"model is a {type(model).__name__}; expected a BrixelFeatures, which images are for")
        self.images = _sequence("images", images, 4)
        self.targets = None if targets is None else _sequence("targets", targets, 1)
        if self.targets is not None and len(self.targets) != len(self.images):
            raise BrixelError(
                f"there are {len(self.images)} images and {len(self.targets)} targets; expected one target per image, "
                "in the same order"
            )
        self._prepare = model.preparation(short_side_px)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """Read and prepare an image.

        Args:
            index: Its position; negative ones count from the end.

        Returns:
            The image with its target.

        Raises:
            IndexError: There is no such image.
            ImageError: The image cannot be used.
        """
        position = range(len(self))[index]
        pixels, placement = self._prepare(self.images[position])
        target = None if self.targets is None else self.targets[position]
        if isinstance(target, np.ndarray):
            target = torch.from_numpy(np.ascontiguousarray(target))
        return Sample(pixels, placement, target, position)


def collate(samples: Sequence[Sample]) -> list[Batch]:
    """Bring samples of one size together: the ``collate_fn`` of a `DataLoader` over an :class:`ImageDataset`.

    Nothing is padded or cropped to a common size, so that features are those of :meth:`brixel.BrixelFeatures.extract`.

    Args:
        samples: Those of one step of the loader.

    Returns:
        A batch for every size of pixels, in the order in which sizes appear; samples keep their order within it.
    """
    groups: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample.pixels.shape), []).append(sample)
    return [
        Batch(
            torch.stack([sample.pixels for sample in group]),
            tuple(sample.placement for sample in group),
            tuple(sample.target for sample in group),
            tuple(sample.index for sample in group),
        )
        for group in groups.values()
    ]


def _sequence(name: str, values: Any, least_dims: int) -> Any:
    """``values``, if it has a length and positions; a single image or the name of a folder has others."""
    is_array = isinstance(values, (np.ndarray, Tensor))
    is_one = isinstance(values, (str, bytes)) or (is_array and values.ndim < least_dims)
    if is_one or not (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
        raise BrixelError(
            f"{name} is a {type(values).__name__}{f' of shape {tuple(values.shape)}' if is_array else ''}; expected a "
            "list, or an object with len() and [index]; for a folder give sorted(Path(folder).glob('*.jpg'))"
        )
    return values
