"""A student that takes images: any kind of them in, feature maps out, within a limit of memory."""

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from brixel.backbones.base import Backbone
from brixel.errors import BrixelError, MemoryLimitError
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.host_copy import to_host
from brixel.feature_maps.memmap_writer import check_map_path, make_map_file
from brixel.images.load import ImageInput
from brixel.images.patch_grid import NATIVE, plan_patch_grid
from brixel.images.preprocess import ImagePlacement, Preprocessor
from brixel.inference.batching import Result, run_batches
from brixel.inference.memory.limited_forward import MemoryLimitedForward, check_host, is_out_of_memory
from brixel.inference.memory.planner import Job, Plan
from brixel.inference.prefetch import prefetch
from brixel.model.config import BrixelConfig
from brixel.model.student import Student
from brixel.model.upsampler import UPSCALE, Upsampler
from brixel.utils.devices import dtype_name
from brixel.utils.eval_mode import evaluation_mode

PathLike = str | os.PathLike[str]


class DenseFeatures(Student):
    """A student with the config that says what it is; as a module as its base, on images by the methods below."""

    def __init__(self, backbone: Backbone, upsampler: Upsampler, config: BrixelConfig) -> None:
        super().__init__(backbone, upsampler, config.adapter.blocks)
        self.config = config

    # ---------------------------------------------------------------- facts

    @property
    def embed_dim(self) -> int:
        """Channels of the maps, D."""
        return self.backbone.width

    @property
    def patch_px(self) -> int:
        """Side of a patch in pixels: H and W of the model's input must be multiples of it."""
        return self.backbone.patch_px

    @property
    def stride_px(self) -> float:
        """Distance between neighbouring cells of the dense map, in pixels of the model's input: a quarter patch."""
        return self.patch_px / UPSCALE

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.adapter.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, and so the maps'."""
        return next(self.adapter.parameters()).dtype

    # ---------------------------------------------------------------- images

    def extract(
        self,
        image: ImageInput,
        *,
        short_side_px: int | str | None = None,
        memory_limit: int | str | None = None,
        tiles: str = "auto",
        out: PathLike | None = None,
    ) -> FeatureMap:
        """Dense features of one image.

        ``image``: a path, PIL image, array (H, W, 3) or (H, W), or tensor (3, H, W). ``short_side_px``: the size that
        its short side is brought to, aspect kept; None for the size the adapter was trained on, "native" for its own.
        Then it is padded to whole patches, and the map cropped back to the image.
        ``memory_limit``: bytes or text such as "4GiB" that bounds what is allocated on the model's device, weights
        included; None for what is free there, less a margin. ``tiles``: "auto" computes the map in blended tiles, an
        approximation, where nothing exact fits; or "never", or "always". ``out``: a `.npy` file, into which the map is
        written as it is made. See `docs/memory.md`.
        Returns a :class:`FeatureMap` on the CPU, (D, Hf, Wf). Raises ImageError for an image that cannot be used,
        MemoryLimitError for one that does not fit.
        """
        run = MemoryLimitedForward(self, limit=memory_limit, tiles=tiles)
        if out is None:
            return next(_or_raise(self._stream(run, [image], short_side_px=short_side_px)))
        path = check_map_path(out)
        pixels, placement = self.preparation(short_side_px)(image, lambda hw: run.check(hw, to_file=True))

        def fill(cells: Tensor) -> Mapping[str, str]:
            with evaluation_mode(self):
                return {**placement.meta, **_told(run.fill(pixels[None], cells))}

        geometry = placement.geometry
        shape, stride = (self.embed_dim, *geometry.map_hw(UPSCALE)), geometry.map_stride(UPSCALE)
        return make_map_file(path, shape, self.dtype, fill, image_hw=geometry.image_hw, stride=stride)

    def stream(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int = 1,
        short_side_px: int | str | None = None,
        memory_limit: int | str | None = None,
        tiles: str = "auto",
        workers: int = 2,
    ) -> Iterator[FeatureMap]:
        """Dense features of many images, lazily and in order; see :meth:`extract`.

        Images that come to one size share a batch of at most ``batch_size``, fewer where the limit has no room for
        all their maps, also where a few others lie between them. ``workers`` threads decode ahead, a batch and two
        images each; 0 decodes when an image's turn comes.
        An image that cannot be used raises ImageError after the maps of those before it, one that does not fit
        MemoryLimitError.
        """
        return _or_raise(
            self.stream_all(
                images,
                batch_size=batch_size,
                short_side_px=short_side_px,
                memory_limit=memory_limit,
                tiles=tiles,
                workers=workers,
            )
        )

    def stream_all(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int = 1,
        short_side_px: int | str | None = None,
        memory_limit: int | str | None = None,
        tiles: str = "auto",
        workers: int = 2,
    ) -> Iterator[FeatureMap | Exception]:
        """:meth:`stream` that goes on: of an image that cannot be used, or does not fit, the error takes its place."""
        run = MemoryLimitedForward(self, limit=memory_limit, tiles=tiles, batch=batch_size)
        return self._stream(run, images, batch_size=batch_size, short_side_px=short_side_px, workers=workers)

    def prepare(self, image: ImageInput, *, short_side_px: int | str | None = None) -> tuple[Tensor, ImagePlacement]:
        """An image made ready for a loop of your own: pixels (3, H, W), and how the image lies on them.

        ``model(pixels[None].to(model.device, model.dtype))[0]`` is the dense map (D, 4h, 4w) of the padded image, of
        which ``placement.feature_map`` makes a :class:`FeatureMap`; call it under ``torch.no_grad()`` unless you train:
        a gradient needs several times the memory. In workers of a DataLoader use :meth:`preparation`, which
        does not carry the model. Raises ImageError for an image that cannot be used.
        """
        return self.preparation(short_side_px)(image)

    def preparation(self, short_side_px: int | str | None = None) -> Preprocessor:
        """What :meth:`prepare` does, as a small callable without the model."""
        vit = self.config.backbone.vit
        side = self.config.adapter.short_side_px if short_side_px is None else short_side_px
        return Preprocessor(self.patch_px, side, vit.mean, vit.std, self._meta())

    def plan(
        self,
        image_hw: tuple[int, int],
        *,
        batch: int = 1,
        memory_limit: int | str | None = None,
        tiles: str = "auto",
        short_side_px: int | str | None = NATIVE,
        to_file: bool = False,
    ) -> Plan:
        """How the maps of ``batch`` images of ``image_hw`` pixels would be computed, and the memory that takes.

        Nothing is computed. Arguments as for :meth:`extract`; ``to_file``: as with ``out``. Raises MemoryLimitError
        where it cannot be done.
        """
        geometry = plan_patch_grid(image_hw, self.patch_px, self.preparation(short_side_px).short_side_px)
        run = MemoryLimitedForward(self, limit=memory_limit, tiles=tiles)
        return run.plan(Job(batch, geometry.padded_hw, to_file))

    def extract_backbone(self, image: ImageInput, *, short_side_px: int | str | None = None) -> FeatureMap:
        """The frozen backbone's own map of the image, prepared as in :meth:`extract`: what brixel starts from."""

        def forward(pixels: Tensor) -> list[Tensor]:
            return [to_host(each) for each in self.backbone_features(pixels.to(self.device, self.dtype))]

        return next(_or_raise(self._stream(forward, [image], short_side_px=short_side_px)))

    def _stream(
        self,
        forward: Callable[[Tensor], Sequence[Tensor]],
        images: Iterable[ImageInput],
        *,
        batch_size: int = 1,
        short_side_px: int | str | None,
        workers: int = 0,
    ) -> Iterator[FeatureMap | Exception]:
        _check_whole("batch_size", batch_size, 1)
        _check_whole("workers", workers, 0)
        bounded = forward if isinstance(forward, MemoryLimitedForward) else None
        check = check_host if bounded is None else bounded.check
        preparation = self.preparation(short_side_px)

        def prepare(image: ImageInput) -> tuple[Tensor | None, ImagePlacement | Exception]:
            try:
                return preparation(image, check)
            except (BrixelError, FileNotFoundError) as error:
                return None, error
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            return None, _not_made_ready(image)  # outside the except block, whose traceback holds what was decoded

        def room() -> int:
            return sys.maxsize if bounded is None else bounded.room() // 2

        def window() -> int:
            return sys.maxsize if bounded is None else bounded.window()

        def together(padded_hw: tuple[int, int]) -> int:
            return sys.maxsize if bounded is None else bounded.together(padded_hw)

        def run(pixels: Tensor) -> Sequence[Result]:
            with evaluation_mode(self):
                return _each_or_error(forward, pixels)

        def finish(features: Result | None, placement: ImagePlacement | Exception) -> FeatureMap | Exception:
            if isinstance(features, Exception):
                return features
            if features is None or isinstance(placement, Exception):
                assert isinstance(placement, Exception)
                return placement
            tiles = "" if bounded is None else bounded.tiles_of(features)
            return placement.feature_map(features, meta=_told(tiles), in_place=True)

        prepared = prefetch(
            prepare,
            images,
            workers=workers,
            depth=batch_size + 2 * workers,
            at_once=_in_memory,
            size=_pixel_bytes,
            room=room,
        )
        results = run_batches(run, prepared, batch_size=batch_size, window=window, together=together)
        return itertools.starmap(finish, results)

    def _meta(self) -> Mapping[str, str]:
        """What makes the maps, kept in their files."""
        facts = {"backbone": self.config.backbone.title, "dtype": dtype_name(self.dtype)}
        commits = ", ".join(f"{name}@{commit}" for name, commit in self.config.commits.items())
        return {**facts, "commits": commits} if commits else facts


def _in_memory(image: ImageInput) -> bool:
    """Whether an image is no file: its owner may fill the same array again, or seek to another frame."""
    return not isinstance(image, (str, os.PathLike))


def _not_made_ready(image: ImageInput) -> MemoryLimitError:
    name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"one image, a {type(image).__name__}"
    return MemoryLimitError(
        f"{name}: memory ran out while it was decoded and made ready; close other programs, let fewer workers decode "
        "at a time, or make the image smaller"
    )


def _each_or_error(forward: Callable[[Tensor], Sequence[Tensor]], pixels: Tensor) -> Sequence[Result]:
    """The maps of a batch; where memory is too short for it, of each image alone, or the error in its place."""
    try:
        return forward(pixels)
    except MemoryLimitError as error:
        if len(pixels) == 1:
            return [error.with_traceback(None)]  # which would hold the pixels
    return [result for each in pixels.split(1) for result in _each_or_error(forward, each)]


def _pixel_bytes(prepared: tuple[Tensor | None, object]) -> int:
    return 0 if prepared[0] is None else prepared[0].nbytes


def _told(tiles: str) -> Mapping[str, str]:
    return {"tiles": tiles} if tiles else {}


def _or_raise(results: Iterator[FeatureMap | Exception]) -> Iterator[FeatureMap]:
    for result in results:
        if isinstance(result, Exception):
            raise result
        yield result
        del result  # not held while the next is computed


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        expected = "a positive whole number" if least else "zero or a positive whole number"
        raise BrixelError(f"{name} is {value!r}; expected {expected}")
