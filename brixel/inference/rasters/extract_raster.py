"""Features of a raster: read, computed and kept window by window, then blended into a feature raster.

    raster --read--> numbers --scale--> brightness --normalise--> pixels --model--> cells --blend--> feature raster

A cell has data where at least half of its pixels do. Pixels without data are shown to the model as the mean colour of
its training; windows without any are not computed.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brixel.checkpoints.fingerprint import digest
from brixel.errors import BrixelError, MemoryLimitError, MissingFileError
from brixel.inference.memory.limited_forward import MemoryLimitedForward
from brixel.inference.rasters.assemble import assemble
from brixel.inference.rasters.geotiff import CACHE_BYTES, open_geotiff, small_cache
from brixel.inference.rasters.resampled import ResampledSource
from brixel.inference.rasters.scaling import Scaling, choose_scaling
from brixel.inference.rasters.sink import Layout, check_replaceable, choose_sink, put_in_place
from brixel.inference.rasters.slide import ENDINGS, open_slide
from brixel.inference.rasters.source import RasterSource, choose_bands, describe_bands
from brixel.inference.rasters.window_files import WindowFiles, open_window_files
from brixel.inference.rasters.windows import Window, WindowGrid, plan_windows
from brixel.model.config import BrixelConfig
from brixel.model.student import Student
from brixel.utils.devices import DTYPES, dtype_name
from brixel.utils.fields import boolean, check_fields, number, optional, path_like, several, whole_number
from brixel.utils.memory import format_bytes, parse_bytes
from brixel.utils.progress import progress_bar
from brixel.utils.torch_defaults import plain_defaults

_LEAST_SHARE = 0.5  # of a cell's pixels with data
_SAME_STEP = 1.01  # a level that is finer by less is taken as it is
_LOG = logging.getLogger("brixel")
_BANDS = several(whole_number(1), "numbers of bands from 1 up, such as (4, 3, 2)", least=1)
_PERCENTILES = several(number(), "two percentiles from 0 to 100, such as (2, 98)", count=2)
_RANGE = several(number(), "two numbers, such as (0, 3000)", count=2)
_RULES = {
    **{"path": path_like(), "out": path_like(), "window": whole_number(1), "overlap": whole_number(0)},
    **{"bands": optional(_BANDS), "stretch": optional(_PERCENTILES), "value_range": optional(_RANGE)},
    **{"nodata": optional(number(finite=False)), "level": optional(whole_number(0))},
    **{"um_per_px": optional(number(above=0)), "overwrite": boolean()},
}


@dataclass(frozen=True)
class RasterOptions:
    """The arguments of :meth:`brixel.BrixelFeatures.extract_raster`, checked."""

    path: Path
    out: Path
    window: int = 1024
    overlap: int = 128
    bands: tuple[int, ...] | None = None
    stretch: tuple[float, float] | None = None
    value_range: tuple[float, float] | None = None
    nodata: float | None = None
    level: int | None = None
    um_per_px: float | None = None
    memory_limit: int | str | None = None
    save_dtype: str | torch.dtype = "float32"
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_fields(self, _RULES)
        if self.level is not None and self.um_per_px is not None:
            raise BrixelError("level= and um_per_px= are two answers to one question; give one of them")
        if not self.path.is_file():
            kind = "is a folder" if self.path.is_dir() else "does not exist"
            raise MissingFileError(f"{self.path} {kind}; expected the file of a raster on this machine", str(self.path))
        if os.path.realpath(self.path) == os.path.realpath(self.out):
            raise BrixelError(f"{self.out} is the raster itself; give another name for its features")

    @property
    def dtype(self) -> str:
        """The dtype of the features that are written, checked against what the output can hold."""
        sink = choose_sink(self.out)
        dtype = DTYPES.get(self.save_dtype) if isinstance(self.save_dtype, str) else self.save_dtype
        if not isinstance(dtype, torch.dtype) or dtype_name(dtype) not in sink.dtypes:
            raise BrixelError(
                f"save_dtype is {self.save_dtype!r}; expected {' or '.join(map(repr, sink.dtypes))} for "
                f"{self.out.suffix}"
                + ("" if "float16" in sink.dtypes else ": GDAL has no float16 before 3.11; write .zarr for that")
            )
        return dtype_name(dtype)


@dataclass(frozen=True)
class RasterSummary:
    """What was written.

    Args:
        path: The feature raster.
        shape: (D, H, W) of its cells.
        stride_px: Side of a cell in pixels of the raster that was read.
        window_px: Height and width of the windows, in pixels.
        overlap_px: Pixels that neighbouring windows share at least.
        windows: Number of windows.
        computed: Windows that were computed in this run.
        resumed: Windows that an earlier run had finished.
        empty: Windows without data, which were not computed.
        bands: The bands that became grey, or red, green and blue, in words.
        scaling: How their numbers became brightness, in words.
    """

    path: Path
    shape: tuple[int, int, int]
    stride_px: float
    window_px: tuple[int, int]
    overlap_px: int
    windows: int
    computed: int
    resumed: int
    empty: int
    bands: str
    scaling: str

    def __str__(self) -> str:
        depth, height, width = self.shape
        counts = f"{self.computed} computed, {self.resumed} of an earlier run, {self.empty} without data"
        return (
            f"{self.path}: {depth} features, {height}x{width} cells of {self.stride_px:g} px; {self.windows} windows "
            f"of {self.window_px[0]}x{self.window_px[1]} px: {counts}; bands {self.bands}; {self.scaling}"
        )


@plain_defaults()
def extract_raster(
    student: Student, config: BrixelConfig, meta: Mapping[str, str], options: RasterOptions
) -> RasterSummary:
    """Write the feature raster of a raster; see :meth:`brixel.BrixelFeatures.extract_raster`.

    Args:
        student: The model, at the scale that is wanted.
        config: Of the model.
        meta: What the model is, in words.
        options: Everything else.
    """
    sink, dtype = choose_sink(options.out), options.dtype
    check_replaceable(options.out, overwrite=options.overwrite)
    with _open(options) as source:
        bands = choose_bands(source.facts, options.bands)
        grid = plan_windows(source.facts.image_hw, student.patch_px, student.scale, options.window, options.overlap)
        forward = _forward(student, options.memory_limit, grid)
        scaling = choose_scaling(source, bands, options.stretch, options.value_range)
        words = {"bands": describe_bands(source.facts, bands), "scaling": str(scaling), **source.facts.notes}
        _LOG.info("bands %s; %s", words["bands"], words["scaling"])
        settings = {**_settings(student, config, options, grid), **words}
        shape = (student.embed_dim, *grid.window_cells)
        kept_dtype = "float16" if student.dtype == torch.float16 else "float32"
        partial = options.out.with_name(f"{options.out.name}.partial")
        with (
            _disk_errors_explained(partial),
            open_window_files(partial, settings, shape, kept_dtype, overwrite=options.overwrite) as files,
        ):
            check_replaceable(options.out, overwrite=options.overwrite)  # another run may have finished meanwhile
            run = _Run(source, bands, scaling, grid, forward, config, files)
            computed, resumed = run.compute_windows()
            layout = Layout(
                (student.embed_dim, *grid.map_hw),
                dtype,
                source.facts.geometry.with_pixels_of(grid.stride_px, grid.stride_px),
                {**meta, **words, **_written_facts(source, grid)},
            )
            finished = partial / f"output{options.out.suffix}"
            _remove(finished)
            with sink.create(finished, layout) as output:
                assemble(grid, files, output)
            put_in_place(finished, options.out)
            empty = sum(files.is_empty(window) for window in grid.windows())
    if empty == grid.tiling.count:
        _LOG.warning("%s has no data in its bands %s: neither has %s", options.path, words["bands"], options.out)
    return RasterSummary(
        options.out,
        layout.shape,
        grid.stride_px,
        grid.window_px,
        grid.overlap_px,
        grid.tiling.count,
        computed,
        resumed,
        empty,
        words["bands"],
        words["scaling"],
    )


@contextlib.contextmanager
def _open(options: RasterOptions) -> Iterator[RasterSource]:
    """The raster; for micrometres per pixel that no level has, a finer level that is averaged."""
    asks_for_level = options.level is not None or options.um_per_px is not None
    if not asks_for_level and not options.path.name.lower().endswith(ENDINGS):
        with small_cache(), open_geotiff(options.path, options.nodata) as raster:
            yield raster
        return
    with open_slide(options.path, level=options.level, um_per_px=options.um_per_px, nodata=options.nodata) as slide:
        found, wanted = slide.facts.um_per_px, options.um_per_px
        if found is not None and wanted is not None and wanted > found * _SAME_STEP:
            yield ResampledSource(slide, wanted / found)
        else:
            yield slide


@dataclass(frozen=True)
class _Run:
    """The parts of a run, while it lasts."""

    source: RasterSource
    bands: tuple[int, ...]
    scaling: Scaling
    grid: WindowGrid
    forward: MemoryLimitedForward
    config: BrixelConfig
    files: WindowFiles

    def compute_windows(self) -> tuple[int, int]:
        """Compute what is not finished; numbers of windows that were computed, and that had been finished with data."""
        windows = list(self.grid.windows())
        pending = [window for window in windows if not self.files.is_finished(window)]
        finished = set(windows) - set(pending)
        resumed, computed = sum(not self.files.is_empty(window) for window in finished), 0
        with progress_bar(total=len(windows), initial=len(finished), unit="window") as bar:
            for window in pending:
                cells = self._cells(window)
                self.files.add(window, None if cells is None else cells.numpy())
                computed += cells is not None
                del cells  # not held while the next is computed
                bar.update()
        return computed, resumed

    def _cells(self, window: Window) -> Tensor | None:
        """The cells (D, h, w) of a window, NaN where there is no data; None where there is none at all."""
        values, valid = self.source.read(*window[2:], self.bands)
        has_data = self.grid.share_with_data(window, valid) >= _LEAST_SHARE
        if not has_data.any():
            return None
        pixels = self._pixels(self.scaling.apply(values), valid)
        del values
        (computed,) = self.forward(pixels[None])
        cells = computed.features if computed.features.dtype == torch.float16 else computed.features.float()
        cells[:, ~torch.from_numpy(has_data)] = torch.nan
        return cells.contiguous()

    def _pixels(self, brightness: "npt.NDArray[np.float32]", valid: "npt.NDArray[np.bool_]") -> Tensor:
        """Normalised pixels (3, H, W) of whole patches; the end of the raster is repeated into the last patches."""
        vit = self.config.backbone.vit
        height, width = valid.shape
        pixels = torch.empty(3, *self.grid.window_px, dtype=torch.float32, device="cpu")
        is_empty = torch.from_numpy(~valid)
        for channel, target in enumerate(pixels):
            inner = target[:height, :width]
            inner.copy_(torch.from_numpy(brightness[channel if len(brightness) == 3 else 0]))
            inner.sub_(vit.mean[channel]).div_(vit.std[channel])
            inner[is_empty] = 0
            target[:height, width:] = inner[:, -1:]
            target[height:] = target[height - 1]
        return pixels


def _forward(student: Student, limit: int | str | None, grid: WindowGrid) -> MemoryLimitedForward:
    """The model within a limit; on the CPU, what GDAL keeps counts as well. Raises MemoryLimitError."""
    if limit is not None:
        limit = max(1, parse_bytes(limit) - (CACHE_BYTES if student.device.type == "cpu" else 0))
    forward = MemoryLimitedForward(student, limit=limit, tiles="never")
    try:
        forward.check(grid.window_px)
    except MemoryLimitError as error:
        height, width = grid.window_px
        smaller = max(height, width) // 2
        given = (
            "what is free" if limit is None else f"what the limit leaves to it, {format_bytes(int(limit), up=False)}"
        )
        raise MemoryLimitError(
            f"a window of {height}x{width} px does not fit into {given}; give a smaller window=, such as {smaller}, or "
            "allow more memory"
        ) from error
    return forward


def _settings(student: Student, config: BrixelConfig, options: RasterOptions, grid: WindowGrid) -> dict[str, str]:
    """All that the cells of windows depend on, but for bands and scaling."""
    stat = options.path.stat()
    return {
        "brixel": version("brixel"),
        "backbone": f"{config.backbone.title} {config.backbone.fingerprint[:4]}",
        "weights": digest(student.upsampler.children()),
        "dtype": dtype_name(student.dtype),
        "cells per patch": str(student.scale),
        "raster": f"{options.path.name}, {stat.st_size} bytes, written at {stat.st_mtime_ns} ns",
        "nodata": str(options.nodata),
        "micrometres": str(options.um_per_px),
        "size": "x".join(map(str, grid.patch_grid.image_hw)),
        "windows": f"{grid.tiling.tile_hw[0]}x{grid.tiling.tile_hw[1]} patches at rows {grid.tiling.tops}, columns "
        f"{grid.tiling.lefts}",
    }


def _written_facts(source: RasterSource, grid: WindowGrid) -> dict[str, str]:
    """What the feature raster says of how it was made."""
    step = source.facts.um_per_px
    return {
        **({} if step is None else {"um_per_px": f"{step:.6g}"}),
        "source": source.facts.path.name,
        "source_hw": "x".join(map(str, source.facts.image_hw)),
        "stride_px": repr(grid.stride_px),
        "windows": f"{grid.window_px[0]}x{grid.window_px[1]} px, overlapping by {grid.overlap_px} px or more, blended",
        "nodata": f"cells of which less than {_LEAST_SHARE:g} of the pixels hold data",
        "version": version("brixel"),
    }


def _remove(path: Path) -> None:
    """Remove what an assembly that was stopped has left."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_errors_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except BrixelError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith("rasterio"):
            raise
        raise BrixelError(
            f"cannot write into {folder} ({error}); the windows that were finished are kept: free some space, and "
            "start the same command again"
        ) from error
