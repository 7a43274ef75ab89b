"""Many images in, their feature maps out: decoded ahead, computed in batches, in order."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from brixel.errors import BrixelError, MemoryLimitError
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.feature_table import FeatureTable
from brixel.feature_maps.reduction.reduce import Reduce
from brixel.images.frame import Frame
from brixel.images.load import ImageInput
from brixel.images.preprocess import ImagePlacement, Preprocessor
from brixel.inference.batching import run_batches
from brixel.inference.memory.limited_forward import ComputedMap, MemoryLimitedForward
from brixel.inference.prefetch import prefetch
from brixel.utils.fields import Rule, check_field, short_repr, whole_number
from brixel.utils.out_of_memory import is_out_of_memory

Result = TypeVar("Result")
_POSITIVE = Rule("a positive whole number", whole_number(1).convert)
_ZERO_OR_POSITIVE = Rule("zero or a positive whole number", whole_number().convert)


class _Image(NamedTuple):
    """The path of an image, "" for one in memory, and its placement, or what is wrong with it."""

    name: str
    placement: ImagePlacement | Exception


_Computed = ComputedMap | FeatureMap | FeatureTable | Exception
"""What waits until it is yielded: a map as the model gave it, or a reduced one."""


class FeatureStream:
    """Computes the dense maps of many images, lazily and in order.

    Args:
        forward: Computes the maps of a batch, and says how many images may wait for it.
        preprocessor: Makes pixels of an image.
        batch_size: Images of one size that share a batch at most.
        workers: Threads that decode ahead; 0 decodes when an image's turn comes.
        reduce: What becomes of every map, at once and on the model's device where the map lies there.

    Raises:
        BrixelError: ``batch_size`` or ``workers`` is out of range.
    """

    def __init__(
        self,
        forward: MemoryLimitedForward,
        preprocessor: Preprocessor,
        *,
        batch_size: int,
        workers: int,
        reduce: Reduce | None = None,
    ) -> None:
        self._forward = forward
        self._preprocessor = preprocessor
        self._batch_size = check_field("batch_size", batch_size, _POSITIVE)
        self._workers = check_field("workers", workers, _ZERO_OR_POSITIVE)
        self._reduce = reduce

    def maps_or_errors(self, images: Iterable[ImageInput]) -> Iterator[FeatureMap | FeatureTable | Exception]:
        """The map of every image, reduced if asked for, or its error where it cannot be used or does not fit."""
        budget = self._forward.budget
        prepared = prefetch(
            self._prepare,
            several_images(images),
            workers=self._workers,
            depth=self._batch_size + 2 * self._workers,
            in_consumer=_in_memory,
            size=_pixel_bytes,
            max_bytes=lambda: budget.spare_bytes() // 2,
        )
        results = run_batches(
            self._compute,
            prepared,
            batch_size=self._batch_size,
            max_in_flight=budget.max_in_flight,
            max_batch=budget.max_batch,
            finish=_as_computed if self._reduce is None else functools.partial(self._reduced, self._reduce),
        )
        return itertools.starmap(self._finish, results)

    def _prepare(self, image: ImageInput) -> tuple[Tensor | None, _Image]:
        name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else ""
        try:
            pixels, placement = prepare_image(self._preprocessor, image, self._forward.check)
        except BrixelError as error:
            return None, _Image(name, error)
        return pixels, _Image(name, placement)

    def _compute(self, pixels: Tensor) -> Sequence[_Computed]:
        """The maps of a batch; where it does not fit, of each image alone, or its error."""
        try:
            return self._forward(pixels, on_device=self._reduce is not None)
        except MemoryLimitError as error:
            if len(pixels) == 1:
                return [error.with_traceback(None)]  # which would hold the pixels
        return [result for image in pixels.split(1) for result in self._compute(image)]

    def _reduced(self, reduce: Reduce, computed: _Computed, image: _Image) -> _Computed:
        """The reduced map on the CPU, which shares no memory with the batch; an error as it is, or that of the step."""
        if not isinstance(computed, ComputedMap):
            return computed
        assert isinstance(image.placement, ImagePlacement)
        whole = image.placement.feature_map(computed.features, meta=computed.meta, as_view=True)
        try:
            return _alone_on_host(_on_any_device(reduce, whole, image.name))
        except BrixelError as error:
            return error.with_traceback(None)  # which would hold the map

    def _finish(self, computed: _Computed | None, image: _Image) -> FeatureMap | FeatureTable | Exception:
        if computed is None:
            assert isinstance(image.placement, Exception)
            return image.placement
        if not isinstance(computed, ComputedMap):
            return computed
        assert isinstance(image.placement, ImagePlacement)
        return image.placement.feature_map(computed.features, meta=computed.meta, in_place=True)


def _as_computed(computed: _Computed, image: _Image) -> _Computed:
    return computed


def _on_any_device(reduce: Reduce, whole: FeatureMap, name: str) -> FeatureMap | FeatureTable:
    """The reduced map, computed on the CPU where the device has too little memory for it."""
    try:
        return reduce(whole, name)
    except Exception as error:
        if whole.features.device.type == "cpu" or not is_out_of_memory(error):
            raise
    return reduce(whole.to("cpu"), name)  # outside the except block, where the traceback would hold what was computed


def _alone_on_host(reduced: FeatureMap | FeatureTable) -> FeatureMap | FeatureTable:
    """The same on the CPU, in memory of its own."""
    features = reduced.features.cpu()
    if features.untyped_storage().nbytes() > features.nbytes:
        features = features.clone(memory_format=torch.contiguous_format)
    return dataclasses.replace(reduced, features=features)


def several_images(images: Iterable[ImageInput]) -> Iterable[ImageInput]:
    """The images as they are; BrixelError for a single one, whose letters or rows would be taken for images."""
    is_path = isinstance(images, str | bytes | os.PathLike)
    is_one = isinstance(images, Image.Image) or (isinstance(images, Tensor | np.ndarray) and images.ndim < 4)
    if is_path or is_one or isinstance(images, Mapping) or not isinstance(images, Iterable):
        given = short_repr(images) if is_path or not is_one else f"one {type(images).__name__}"
        raise BrixelError(f"images are {given}; expected several, such as a list: give [image], or call extract")
    return images


def raise_errors(results: Iterable[Result | Exception]) -> Iterator[Result]:
    """The results, such as maps; an error in the place of one is raised in its turn."""
    for result in results:
        if isinstance(result, Exception):
            raise result
        yield result
        del result  # not held while the next is computed


def prepare_image(
    preprocessor: Preprocessor, image: ImageInput, check: Callable[[tuple[int, int]], None]
) -> tuple[Tensor, ImagePlacement]:
    """Pixels and placement of an image; where memory runs out meanwhile, MemoryLimitError says for which image.

    ``check``: raises where an image of that padded size does not fit, before its pixels exist.
    """
    try:
        return preprocessor(image, check)
    except BrixelError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # outside the except block, where the traceback holds what was decoded
    name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"one image, a {type(image).__name__}"
    raise MemoryLimitError(
        f"{name}: memory ran out while it was decoded and made ready; close other programs, let fewer workers decode "
        "at a time, or make the image smaller"
    )


def _in_memory(image: ImageInput) -> bool:
    """Whether an image is neither a file nor a frame: its owner may fill the same array again, or seek in it."""
    return not isinstance(image, (str, os.PathLike, Frame))


def _pixel_bytes(prepared: tuple[Tensor | None, object]) -> int:
    return 0 if prepared[0] is None else prepared[0].nbytes
