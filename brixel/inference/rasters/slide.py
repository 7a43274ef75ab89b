"""Slides: tiled pyramids of microscopes in TIFF files (OME-TIFF, Aperio, generic), through tifffile.

Coordinates are pixels of the finest level. A level is read by its tiles: only those that a window touches are decoded.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from brixel.errors import BrixelError, ImageError
from brixel.inference.rasters.source import (
    Band,
    Geometry,
    Pixels,
    RasterFacts,
    RasterSource,
    check_block,
    check_dtype,
    only_finite,
)
from brixel.utils.extras import import_extra

ENDINGS = (".svs", ".ndpi", ".scn", ".ome.tif", ".ome.tiff", ".ome.btf")
"""Endings of files that are opened as slides without further ado."""

_TOLERANCE = 1.01
"""A level counts as fine enough up to this: micrometres in files are rounded."""

_MICROMETRES = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}
_RESOLUTION_UNITS = {2: 25_400.0, 3: 10_000.0}  # of TIFF, inches and centimetres, in micrometres
_COARSEST = 20.0  # micrometres per pixel: 1270 dpi; coarser tags are those of printers


@contextlib.contextmanager
def open_slide(
    path: Path, *, level: int | None = None, um_per_px: float | None = None, nodata: float | None = None
) -> Iterator[RasterSource]:
    """Open a level of a slide.

    Args:
        path: A file that exists.
        level: Its number, 0 for the finest.
        um_per_px: Choose the coarsest level that is at least this fine, in place of a number.
        nodata: A number that means that there is no data.

    Raises:
        ImageError: It is no TIFF, or damaged.
        BrixelError: It has no such level, or does not say its micrometres per pixel.
    """
    tifffile = import_extra("tifffile", extra="microscopy", purpose="slides")
    zarr = import_extra("zarr", extra="microscopy", purpose="slides")
    with contextlib.ExitStack() as stack:
        try:
            tiff = stack.enter_context(tifffile.TiffFile(path))
            levels = tiff.series[0].levels
        except Exception as error:  # tifffile raises nearly anything on damaged files
            raise ImageError(
                f"{path} cannot be read as a slide ({error}); expected a TIFF, such as .svs or .ome.tif"
            ) from error
        steps = _steps(path, levels, _um_per_px(tiff))
        number = _choose(path, steps, level, um_per_px)
        chosen = levels[number]
        axes = _axes(path, chosen)
        array = zarr.open(stack.enter_context(tiff.series[0].aszarr(level=number)), mode="r")
        check_dtype(path, chosen.dtype)
        check_block(path, int(np.prod(array.chunks)) * chosen.dtype.itemsize)
        yield _Slide(array, axes, _facts(path, levels, number, axes, steps[number]), nodata)


class _Slide(RasterSource):
    def __init__(self, array: Any, axes: str, facts: RasterFacts, nodata: float | None) -> None:
        super().__init__(facts)
        self._array, self._axes, self._nodata = array, axes, nodata

    def read(self, top: int, left: int, height: int, width: int, bands: Sequence[int]) -> Pixels:
        where = {"Y": slice(top, top + height), "X": slice(left, left + width)}
        try:
            if self._axes.startswith(("C", "S")):  # bands are stored one by one: only the chosen are read
                planes = [self._array[tuple(where.get(axis, band - 1) for axis in self._axes)] for band in bands]
                values = np.stack(planes)
            else:
                window = np.asarray(self._array[tuple(where.get(axis, slice(None)) for axis in self._axes)])
                window = window[None] if len(self._axes) == 2 else window.transpose(2, 0, 1)
                values = window[[band - 1 for band in bands]]
        except Exception as error:  # decoders raise nearly anything on damaged tiles, and on unknown compressions
            raise ImageError(
                f"{self.facts.path} cannot be decoded in rows {top} to {top + height} ({error}); fetch it again, or "
                "install the decoders: pip install 'brixel[microscopy]'"
            ) from error
        valid = np.ones((height, width), bool) if self._nodata is None else (values != self._nodata).all(axis=0)
        return values, only_finite(values, valid)


def _axes(path: Path, level: Any) -> str:
    """The axes of a level, such as "YXS" or "CYX". Raises BrixelError where it has others, as of depth and time."""
    axes = "".join(level.axes)
    if sorted(set(axes) - {"C", "S"}) != ["X", "Y"] or axes not in ("YX", "YXS", "SYX", "CYX", "YXC"):
        raise BrixelError(
            f"{path} has the axes {axes} of sizes {tuple(level.shape)}; expected rows and columns of one plane, with "
            "channels: write the plane that you mean as a file of its own"
        )
    return axes


def _level_hw(level: Any) -> tuple[int, int]:
    axes = "".join(level.axes)
    return level.shape[axes.index("Y")], level.shape[axes.index("X")]


def _steps(path: Path, levels: Sequence[Any], base: float | None) -> list[float | None]:
    """Micrometres per pixel of every level, None where the file does not say."""
    width = _level_hw(levels[0])[1]
    return [None if base is None else base * width / _level_hw(level)[1] for level in levels]


def _choose(path: Path, steps: Sequence[float | None], level: int | None, um_per_px: float | None) -> int:
    if level is not None:
        if level >= len(steps):
            raise BrixelError(f"level is {level}; {path} has the levels 0 to {len(steps) - 1}")
        return level
    if um_per_px is None:
        return 0
    known = [step for step in steps if step is not None]
    if not known:
        raise BrixelError(
            f"{path} does not say its micrometres per pixel (neither OME-XML nor MPP of Aperio nor tags of resolution "
            f"do); give level= one of 0 to {len(steps) - 1} in place of um_per_px="
        )
    fine = [number for number, step in enumerate(known) if step <= um_per_px * _TOLERANCE]
    if not fine:
        raise BrixelError(
            f"um_per_px is {um_per_px:g}, finer than {path}, whose finest level has {known[0]:.4g} micrometres per "
            "pixel"
        )
    return max(fine, key=lambda number: known[number])


def _facts(path: Path, levels: Sequence[Any], number: int, axes: str, um_per_px: float | None) -> RasterFacts:
    level = levels[number]
    (height, width), (full_height, full_width) = _level_hw(level), _level_hw(levels[0])
    bands = next((level.shape[axes.index(axis)] for axis in "CS" if axis in axes), 1)
    is_colour = "S" in axes and bands in (3, 4)
    colours = ("red", "green", "blue", "alpha")[:bands] if is_colour else ("",) * bands
    geometry = Geometry().with_pixels_of(full_height / height, full_width / width)
    notes = {"level": str(number), "coordinates": "pixels of level 0"}
    all_bands = [Band(colour=name) for name in colours]
    return RasterFacts(path, (height, width), level.dtype, all_bands, geometry, um_per_px, notes)


def _um_per_px(tiff: Any) -> float | None:
    """Micrometres per pixel of the finest level, from OME-XML, Aperio's description or the tags of resolution."""
    page = tiff.series[0].levels[0].keyframe
    if tiff.is_ome:
        found = _of_ome(tiff.ome_metadata)
    elif tiff.is_svs:
        match = re.search(r"\bMPP\s*=\s*([0-9.]+)", page.description)
        found = float(match[1]) if match else None
    else:
        found = _of_tags(page)
    return found if found is not None and 0 < found <= _COARSEST else None


def _of_ome(text: str) -> float | None:
    try:
        pixels = ElementTree.fromstring(text).find(".//{*}Pixels")
        stated = None if pixels is None else pixels.get("PhysicalSizeX")
        unit = "µm" if pixels is None else pixels.get("PhysicalSizeXUnit", "µm")
        return None if stated is None else float(stated) * _MICROMETRES[unit]
    except (ElementTree.ParseError, ValueError, KeyError):
        return None


def _of_tags(page: Any) -> float | None:
    unit = _RESOLUTION_UNITS.get(int(page.resolutionunit))
    per_unit = page.resolution[0]
    return None if unit is None or not per_unit else unit / per_unit
