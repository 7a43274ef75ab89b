"""A student that takes images: any kind of them in, feature maps out, within a memory limit."""

import copy
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TypedDict, Unpack, cast, overload

import torch
from torch import Tensor

from brixel.backbones.base import Backbone
from brixel.errors import BrixelError
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.feature_table import FeatureTable
from brixel.feature_maps.memmap_writer import check_map_path, make_map_file
from brixel.feature_maps.reduction.reduce import Reduce
from brixel.images.load import ImageInput
from brixel.images.patch_grid import plan_patch_grid
from brixel.images.preprocess import ImagePlacement, Preprocessor
from brixel.inference.compiled import CompiledCall
from brixel.inference.memory.limited_forward import MemoryLimitedForward
from brixel.inference.memory.planner import Plan, Planner
from brixel.inference.memory.prediction import Job
from brixel.inference.rasters.extract_raster import RasterOptions, RasterSummary, extract_raster
from brixel.inference.stream import FeatureStream, raise_errors
from brixel.model.config import BILINEAR, AdapterConfig, BrixelConfig
from brixel.model.student import Student
from brixel.model.upsampler import AnyUpsampler, BilinearUpsampler, TrainedUpsampler, Upsampler
from brixel.utils.devices import dtype_name
from brixel.utils.fields import boolean, check_field, several, whole_number
from brixel.utils.torch_defaults import plain_defaults

_LOG = logging.getLogger("brixel")
PathLike = str | os.PathLike[str]
_SIZE = several(whole_number(1), "height and width in pixels, such as (480, 640)", count=2)


class _MapOptions(TypedDict, total=False):
    """How maps are computed, for the signatures of methods below."""

    scale: int | None
    short_side_px: int | str | None
    memory_limit: int | str | None
    tiles: str


class _StreamOptions(_MapOptions, total=False):
    batch_size: int
    workers: int


class DenseFeatures(Student):
    """A student with its config. As a module it takes tensors, as its base does; the methods below take images.

    Args:
        backbone: The frozen vision transformer.
        upsampler: The upsampler.
        config: What they are; saved with them.
    """

    def __init__(self, backbone: Backbone, upsampler: AnyUpsampler, config: BrixelConfig) -> None:
        super().__init__(backbone, upsampler, config.adapter.blocks)
        self.config = config
        self._is_checked = False  # whether the adapter is trained

    def compile(self, **options: Any) -> None:
        """Compile the model with `torch.compile`, in place, for images of any size.

        From then on calls of the model, :meth:`extract` and :meth:`stream` run the compiled model: the first call takes
        a minute or more, and so does the first of several images; how long is logged. Where the compiler fails, for
        instance since there is no C++ compiler, the model runs as it is, with a warning. With a ``memory_limit`` it
        also runs as it is: what compiled code allocates is not known before. On CPUs compiled models were slower
        (`docs/results/engines.md`).

        Args:
            **options: Arguments of ``torch.compile``.
        """
        self._compiled_call_impl = CompiledCall(self, options)
        self._compile_options = options
        self._scaled: dict[int, Self] = {}

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`compile` was called."""
        return self._compiled_call_impl is not None

    def at_scale(self, scale: int | None) -> Self:
        """As :meth:`Student.at_scale`; of a compiled model, a compiled one."""
        if not self.is_compiled or scale not in self._scaled:
            scaled = super().at_scale(scale)
            if not self.is_compiled or scaled is self:
                return scaled
            scaled.compile(**self._compile_options)
            self._scaled[scaled.scale] = scaled
        return self._scaled[cast("int", scale)]

    def _to_run(self, scale: int | None, memory_limit: int | str | None) -> Self:
        """The model at a scale, as it is where memory is limited."""
        scaled = self.at_scale(scale)
        return copy.copy(scaled) if memory_limit is not None else scaled  # a copy is not compiled

    @property
    def stride_px(self) -> float:
        """Distance between neighbouring cells of the dense map, in pixels of the model's input: a quarter patch."""
        return self.patch_px / self.scale

    @overload
    def extract(
        self, image: ImageInput, *, reduce: None = None, out: PathLike | None = None, **options: Unpack[_MapOptions]
    ) -> FeatureMap: ...
    @overload
    def extract(self, image: ImageInput, *, reduce: Reduce | str, **options: Unpack[_MapOptions]) -> Any: ...
    def extract(
        self,
        image: ImageInput,
        *,
        scale: int | None = None,
        short_side_px: int | str | None = None,
        memory_limit: int | str | None = None,
        tiles: str = "auto",
        reduce: Reduce | str | None = None,
        out: PathLike | None = None,
    ) -> FeatureMap | FeatureTable:
        """Compute the dense features of one image.

        The image is resized, then padded to whole patches; the map is cropped back to the image.

        Args:
            image: A path, PIL image, array (H, W, 3) or (H, W), tensor (3, H, W), or frame of a video.
            scale: Cells of the map per patch, on each axis; 4 where None. Trained adapters of the first generation have
                4 only.
            short_side_px: The short side in pixels after resizing, aspect kept; None for the size the adapter was
                trained on, "native" for the image's own.
            memory_limit: Bytes or text such as "4GiB" that bounds what is allocated on the model's device, weights
                included; None for what is free there, less a margin. See `docs/memory.md`.
            tiles: "auto" computes the map in blended tiles, an approximation, where nothing exact fits; "never" raises
                instead; "always" takes tiles for every image that is larger than one.
            reduce: What becomes of the map before it is returned, such as "stride:8,int8" or a fitted
                :class:`brixel.Reduce` (`docs/reduction.md`).
            out: A `.npy` file that the map is written to while it is computed, for maps larger than memory.

        Returns:
            The map on the CPU, features (D, Hf, Wf); a :class:`brixel.FeatureTable` where ``reduce`` keeps points or
            regions of masks.

        Raises:
            ImageError: The image cannot be used.
            MemoryLimitError: The image does not fit into the limit.
            BrixelError: An argument is out of range, or ``out`` cannot be written, or ``reduce`` not be done.
        """
        if out is None:
            results = self._results(
                [image],
                scale=scale,
                short_side_px=short_side_px,
                memory_limit=memory_limit,
                tiles=tiles,
                reduce=reduce,
                workers=0,
            )
            maps: Iterator[FeatureMap | FeatureTable] = raise_errors(results)
            return next(maps)
        if reduce is not None:
            raise BrixelError(
                "a map that is written to out= while it is computed is never there as a whole to be reduced; leave out "
                "one of both"
            )
        self._say_if_untrained()
        scaled = self._to_run(scale, memory_limit)
        forward = MemoryLimitedForward(scaled, limit=memory_limit, tiles=tiles)
        preprocessor, path = self.preparation(short_side_px), check_map_path(out)
        pixels, placement = preprocessor(image, lambda padded_hw: forward.check(padded_hw, to_file=True))

        def fill(cells: Tensor) -> Mapping[str, str]:
            return {**placement.meta, **forward.fill(pixels[None], cells)}

        geometry = placement.patch_grid
        shape, stride = (self.embed_dim, *geometry.map_hw(scaled.scale)), geometry.map_stride(scaled.scale)
        return make_map_file(path, shape, self.dtype, fill, image_hw=geometry.image_hw, stride=stride)

    def extract_raster(
        self,
        path: PathLike,
        out: PathLike,
        *,
        window: int = 1024,
        overlap: int = 128,
        bands: Sequence[int] | int | None = None,
        stretch: tuple[float, float] | None = None,
        value_range: tuple[float, float] | None = None,
        nodata: float | None = None,
        level: int | None = None,
        um_per_px: float | None = None,
        scale: int | None = None,
        memory_limit: int | str | None = None,
        save_dtype: str | torch.dtype = "float32",
        overwrite: bool = False,
    ) -> RasterSummary:
        """Compute the dense features of a georeferenced raster or a slide of any size, window by window, into a file.

        The raster keeps its own resolution, and is never in memory as a whole. The feature raster has its reference
        system; its cells lie where their pixels do, and have no data (NaN) where less than half of their pixels have.
        A run that was stopped goes on when the same call is made again. See `docs/rasters.md`.

        Args:
            path: A GeoTIFF or another file that rasterio reads (extra `geo`); with ``level`` or ``um_per_px``, or an
                ending such as .svs or .ome.tif, a slide that tifffile reads (extra `microscopy`).
            out: The feature raster, `.tif` (a band per feature) or `.zarr` (D, H, W).
            window: Side of the windows in pixels, rounded to whole patches.
            overlap: Pixels that neighbouring windows share at least, over which they are blended; rounded up to whole
                patches.
            bands: The band that becomes grey, or the three that become red, green and blue, counted from 1; None for
                what the file says.
            stretch: Percentiles of each band that become black and white, measured on a sample of the raster.
            value_range: Numbers that become black and white, in place of percentiles. Where neither is given, bytes
                are taken from 0 to 255, and everything else is stretched from the 2nd percentile to the 98th.
            nodata: A number that means that there is no data, beside what the file says.
            level: Level of a slide, 0 for the finest.
            um_per_px: Micrometres per pixel: the coarsest level that is at least as fine, averaged to them.
            scale: As for :meth:`extract`.
            memory_limit: As for :meth:`extract`, for a window. A window is never cut into tiles.
            save_dtype: "float32", or "float16" for `.zarr`.
            overwrite: Whether an earlier output, or windows of a run with other settings, may be replaced.

        Returns:
            What was written, with the bands and the scaling that were chosen.

        Raises:
            ImageError: The file is no raster, or damaged.
            MemoryLimitError: A window does not fit into the limit.
            BrixelError: An argument is out of range, the bands have to be chosen, ``out`` exists, another run writes
                it, or one with other settings was stopped.
        """
        options = RasterOptions(
            path,  # type: ignore[arg-type]  # they are checked and converted
            out,  # type: ignore[arg-type]
            window,
            overlap,
            bands,  # type: ignore[arg-type]
            stretch,
            value_range,
            nodata,
            level,
            um_per_px,
            memory_limit,
            save_dtype,
            overwrite,
        )
        self._say_if_untrained()
        return extract_raster(self._to_run(scale, memory_limit), self.config, self._meta(), options)

    @overload
    def stream(
        self, images: Iterable[ImageInput], *, reduce: None = None, **options: Unpack[_StreamOptions]
    ) -> Iterator[FeatureMap]: ...
    @overload
    def stream(
        self, images: Iterable[ImageInput], *, reduce: Reduce | str, **options: Unpack[_StreamOptions]
    ) -> Iterator[Any]: ...
    def stream(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int = 1,
        scale: int | None = None,
        short_side_px: int | str | None = None,
        memory_limit: int | str | None = None,
        tiles: str = "auto",
        reduce: Reduce | str | None = None,
        workers: int = 2,
    ) -> Iterator[FeatureMap] | Iterator[FeatureMap | FeatureTable]:
        """Compute the dense features of many images, lazily and in order.

        Args:
            images: Images of any kind that :meth:`extract` takes.
            batch_size: Images that share a batch at most. They must have one size after resizing; a few of other sizes
                may lie between them. Fewer share one where the limit is too small for all their maps.
            scale: As for :meth:`extract`.
            short_side_px: As for :meth:`extract`.
            memory_limit: As for :meth:`extract`; it also bounds images and maps that wait.
            tiles: As for :meth:`extract`.
            reduce: As for :meth:`extract`; every map is reduced at once, so that only reduced ones wait.
            workers: Threads that decode ahead, by a batch and two images per thread; 0 decodes when an image's turn
                comes.

        Yields:
            The map of every image, or its :class:`brixel.FeatureTable`.

        Raises:
            ImageError: An image cannot be used; raised after the maps of those before it.
            MemoryLimitError: An image does not fit into the limit; raised likewise.
            BrixelError: An argument is out of range.
        """
        results = self._results(
            images,
            batch_size=batch_size,
            scale=scale,
            short_side_px=short_side_px,
            memory_limit=memory_limit,
            tiles=tiles,
            reduce=reduce,
            workers=workers,
        )
        return raise_errors(results)

    @overload
    def stream_all(
        self, images: Iterable[ImageInput], *, reduce: None = None, **options: Unpack[_StreamOptions]
    ) -> Iterator[FeatureMap | Exception]: ...
    @overload
    def stream_all(
        self, images: Iterable[ImageInput], *, reduce: Reduce | str, **options: Unpack[_StreamOptions]
    ) -> Iterator[Any]: ...
    def stream_all(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int = 1,
        scale: int | None = None,
        short_side_px: int | str | None = None,
        memory_limit: int | str | None = None,
        tiles: str = "auto",
        reduce: Reduce | str | None = None,
        workers: int = 2,
    ) -> Iterator[FeatureMap | Exception] | Iterator[FeatureMap | FeatureTable | Exception]:
        """Do what :meth:`stream` does, but go on after an image that cannot be used or does not fit.

        Args:
            images: As for :meth:`stream`, as all other arguments.
            batch_size: Images that share a batch at most.
            scale: Cells of the map per patch, on each axis.
            short_side_px: The short side in pixels after resizing.
            memory_limit: Bytes or text such as "4GiB".
            tiles: "auto", "never" or "always".
            reduce: Such as "stride:8,int8", or a fitted :class:`brixel.Reduce`.
            workers: Threads that decode ahead.

        Yields:
            The map of every image, or the error in its place.

        Raises:
            BrixelError: An argument is out of range.
        """
        return self._results(
            images,
            batch_size=batch_size,
            scale=scale,
            short_side_px=short_side_px,
            memory_limit=memory_limit,
            tiles=tiles,
            reduce=reduce,
            workers=workers,
        )

    def _results(
        self,
        images: Iterable[ImageInput],
        *,
        reduce: Reduce | str | None,
        batch_size: int = 1,
        scale: int | None,
        short_side_px: int | str | None,
        memory_limit: int | str | None,
        tiles: str,
        workers: int,
    ) -> Iterator[FeatureMap | FeatureTable | Exception]:
        """What :meth:`stream_all` yields."""
        self._say_if_untrained()
        fitted = None if reduce is None else Reduce.of(reduce).fitted()
        if fitted is not None:
            fitted.check_model(self.config.backbone.title, self.embed_dim)
        scaled = self._to_run(scale, memory_limit)
        forward = MemoryLimitedForward(scaled, limit=memory_limit, tiles=tiles, batch=batch_size)
        prepare = self.preparation(short_side_px)
        stream = FeatureStream(forward, prepare, batch_size=batch_size, workers=workers, reduce=fitted)
        return stream.maps_or_errors(images)

    def prepare(self, image: ImageInput, *, short_side_px: int | str | None = None) -> tuple[Tensor, ImagePlacement]:
        """Make an image ready for a loop of your own.

        ``model(pixels[None].to(model.device, model.dtype))[0]`` is the dense map (D, 4h, 4w) of the padded image, and
        ``placement.feature_map`` makes a :class:`FeatureMap` of it. Call the model under ``torch.no_grad()`` unless you
        train: a gradient needs several times the memory. In workers of a DataLoader use :meth:`preparation`, which does
        not carry the model.

        Args:
            image: As for :meth:`extract`.
            short_side_px: As for :meth:`extract`.

        Returns:
            Pixels (3, H, W), float32, normalised and padded, and how the image lies on them.

        Raises:
            ImageError: The image cannot be used.
        """
        return self.preparation(short_side_px)(image)

    def preparation(self, short_side_px: int | str | None = None) -> Preprocessor:
        """What :meth:`prepare` does, as a small callable without the model.

        Args:
            short_side_px: As for :meth:`extract`.

        Returns:
            A callable from an image to pixels and placement, which can be pickled.
        """
        vit = self.config.backbone.vit
        side = self.config.adapter.short_side_px if short_side_px is None else short_side_px
        return Preprocessor(self.patch_px, side, vit.mean, vit.std, self._meta())

    @plain_defaults()
    def plan(
        self,
        image_hw: tuple[int, int],
        *,
        batch: int = 1,
        scale: int | None = None,
        memory_limit: int | str | None = None,
        tiles: str = "auto",
        short_side_px: int | str | None = None,
        to_file: bool = False,
    ) -> Plan:
        """Say how :meth:`extract` would compute maps, and the memory that takes; nothing is computed.

        Args:
            image_hw: Height and width of the images in pixels.
            batch: Number of images at once.
            scale: As for :meth:`extract`.
            memory_limit: As for :meth:`extract`.
            tiles: As for :meth:`extract`.
            short_side_px: As for :meth:`extract`.
            to_file: Whether the maps go to files, as with ``out``.

        Returns:
            The plan.

        Raises:
            MemoryLimitError: Nothing fits into the limit.
            BrixelError: An argument is out of range.
        """
        size = check_field("image_hw", image_hw, _SIZE)
        job = {
            "batch": check_field("batch", batch, whole_number(1)),
            "to_file": check_field("to_file", to_file, boolean()),
        }
        geometry = plan_patch_grid(size, self.patch_px, self.preparation(short_side_px).short_side_px)
        scaled = self.at_scale(scale)
        return Planner(scaled, memory_limit, tiles).plan(Job(padded_hw=geometry.padded_hw, **job))

    def extract_backbone(
        self,
        image: ImageInput,
        *,
        short_side_px: int | str | None = None,
        memory_limit: int | str | None = None,
        tiles: str = "auto",
    ) -> FeatureMap:
        """Compute the frozen backbone's own map of one image, which brixel starts from.

        Args:
            image: As for :meth:`extract`.
            short_side_px: As for :meth:`extract`.
            memory_limit: As for :meth:`extract`.
            tiles: As for :meth:`extract`.

        Returns:
            The map on the CPU, features (D, h, w): one cell per patch.

        Raises:
            ImageError: The image cannot be used.
            MemoryLimitError: The image does not fit into the limit.
            BrixelError: An argument is out of range.
        """
        side = self.config.adapter.short_side_px
        adapter = AdapterConfig(self.blocks[-1:], residual_detour=False, short_side_px=side, kind=BILINEAR)
        alone = DenseFeatures(self.backbone, BilinearUpsampler(), dataclasses.replace(self.config, adapter=adapter))
        return alone.extract(image, scale=1, short_side_px=short_side_px, memory_limit=memory_limit, tiles=tiles)

    def _say_if_untrained(self) -> None:
        """Warn once where the adapter adds nothing yet."""
        upsampler = self.upsampler
        if self._is_checked or not isinstance(upsampler, TrainedUpsampler):
            return
        self._is_checked = True
        if not upsampler.head.out.weight.any():
            base = "bilinear interpolation" if isinstance(upsampler, Upsampler) else "the universal upsampler"
            _LOG.warning("the adapter is not trained yet: its maps are those of %s alone; train it, or load one", base)

    def _meta(self) -> Mapping[str, str]:
        """What makes the maps, kept in their files."""
        meta = {"backbone": self.config.backbone.title, "dtype": dtype_name(self.dtype)}
        commits = ", ".join(f"{name}@{commit}" for name, commit in self.config.commits.items())
        return {**meta, "commits": commits} if commits else meta
