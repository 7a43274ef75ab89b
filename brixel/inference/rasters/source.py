"""What a raster is to the rest of this folder: size, bands, geometry, and windows of pixels. No file format.

Shapes: C bands, H x W pixels. Bands are counted from 1, as rasterio and GDAL count them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from brixel.errors import BrixelError

Affine = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f): a point at column x and row y lies at (a x + b y + c, d x + e y + f); rasterio's order."""

IDENTITY: Affine = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
LARGEST_BLOCK = 256 * 2**20
"""Bytes of the largest block that is decoded as a whole: a file that keeps all its pixels in one needs them all."""


@dataclass(frozen=True)
class ControlPoint:
    """A ground control point: a place in a raster, and where it lies."""

    row: float
    column: float
    x: float
    y: float
    z: float


@dataclass(frozen=True)
class Geometry:
    """Where the pixels of a raster lie.

    Args:
        transform: From columns and rows to coordinates.
        crs_wkt: The coordinate reference system, that of the control points where there are some; None without one.
        control_points: In place of a transform, for rasters that have none.
    """

    transform: Affine = IDENTITY
    crs_wkt: str | None = None
    control_points: tuple[ControlPoint, ...] = ()

    def with_pixels_of(self, height: float, width: float) -> "Geometry":
        """The geometry of a raster with the same origin and pixels of this height and width in pixels of this one."""
        a, b, c, d, e, f = self.transform
        points = tuple(
            ControlPoint(point.row / height, point.column / width, point.x, point.y, point.z)
            for point in self.control_points
        )
        return Geometry((a * width, b * height, c, d * width, e * height, f), self.crs_wkt, points)


@dataclass(frozen=True)
class Band:
    """A band in words.

    Args:
        description: What the file says of it: its name, its wavelength.
        colour: "red", "green", "blue" or "alpha"; empty where the file does not say.
    """

    description: str = ""
    colour: str = ""


@dataclass(frozen=True)
class RasterFacts:
    """What is known of a raster without reading its pixels.

    Args:
        path: Its file.
        image_hw: Height and width in pixels.
        dtype: Of its numbers.
        bands: All of them.
        geometry: Where its pixels lie.
        um_per_px: Micrometres per pixel of a slide that says so.
        notes: More of it in words, for the metadata of its features.
    """

    path: Path
    image_hw: tuple[int, int]
    dtype: "np.dtype[Any]"
    bands: Sequence[Band]
    geometry: Geometry
    um_per_px: float | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


Pixels = tuple["npt.NDArray[Any]", "npt.NDArray[np.bool_]"]
"""Numbers (C, H, W) as they are stored, and which pixels (H, W) hold data in all bands."""


class RasterSource(ABC):
    """An open raster.

    Args:
        facts: What is known of it.
    """

    def __init__(self, facts: RasterFacts) -> None:
        self.facts = facts

    @abstractmethod
    def read(self, top: int, left: int, height: int, width: int, bands: Sequence[int]) -> Pixels:
        """Read a window that lies in the raster. Raises ImageError where the file is damaged."""


def only_finite(values: "npt.NDArray[Any]", valid: "npt.NDArray[np.bool_]") -> "npt.NDArray[np.bool_]":
    """The pixels (H, W) that are valid and finite in all bands (C, H, W)."""
    return valid & np.isfinite(values).all(axis=0) if values.dtype.kind == "f" else valid


def choose_bands(facts: RasterFacts, bands: Sequence[int] | None) -> tuple[int, ...]:
    """The one or three bands that become grey or red, green and blue.

    Args:
        facts: The raster.
        bands: The user's choice; None for red, green and blue where the file names them, for the only band, or for the
            three in their order where there are no others. Bands of opacity do not count.

    Raises:
        BrixelError: The choice is none of one or three bands of the raster, or has to be made.
    """
    count = len(facts.bands)
    if bands is not None:
        wrong = [band for band in bands if band > count]
        if wrong or len(bands) not in (1, 3):
            raise BrixelError(
                f"bands are {', '.join(map(str, bands))}; expected one, which becomes grey, or three, which become red,"
                f" green and blue, of the bands of {facts.path}: {_list(facts)}"
            )
        return tuple(bands)
    colours = [band.colour for band in facts.bands]
    if all(colours.count(colour) == 1 for colour in ("red", "green", "blue")):
        return tuple(1 + colours.index(colour) for colour in ("red", "green", "blue"))
    shown = [number for number, colour in enumerate(colours, 1) if colour != "alpha"]
    if len(shown) in (1, 3):
        return tuple(shown)
    raise BrixelError(
        f"{facts.path} has {count} bands, and nothing says which are red, green and blue; give bands= one or three of "
        f"them, such as bands={','.join(map(str, shown[:3][::-1]))}: {_list(facts)}"
    )


def describe_bands(facts: RasterFacts, bands: Sequence[int]) -> str:
    """Bands in words, such as "4 (nir), 3 (red), 2 (green)"."""
    return ", ".join(_name(number, facts.bands[number - 1]) for number in bands)


def _list(facts: RasterFacts) -> str:
    most = 32
    names = [_name(number, band) for number, band in enumerate(facts.bands[:most], 1)]
    return ", ".join(names) + (f" and {len(facts.bands) - most} more" if len(facts.bands) > most else "")


def _name(number: int, band: Band) -> str:
    words = ", ".join(dict.fromkeys(filter(None, (band.description, band.colour))))
    return f"{number} ({words})" if words else str(number)


def check_dtype(path: Path, dtype: "np.dtype[Any]") -> None:
    """Raise BrixelError for numbers that are no brightness: complex ones."""
    if dtype.kind not in "uifb":
        raise BrixelError(
            f"{path} holds numbers of type {dtype}; expected whole numbers or floats: write its amplitude, or its real "
            "part, as float32"
        )


def check_block(path: Path, block_bytes: int) -> None:
    """Raise BrixelError where a file keeps so many pixels in one block that no window of it can be read alone."""
    if block_bytes > LARGEST_BLOCK:
        raise BrixelError(
            f"{path} keeps its pixels in blocks of {block_bytes / 2**20:.0f} MiB, each of which is decoded as a whole; "
            f"expected blocks of at most {LARGEST_BLOCK // 2**20} MiB: write it tiled, for instance with "
            "gdal_translate -co TILED=YES"
        )
