"""What a feature raster is written to: a tiled GeoTIFF or a Zarr array, block by block, under a temporary name.

A block is what a file keeps in one piece, so that no part is written twice. Blocks that are never written have no data.
Shapes: D bands of features, H x W cells.
"""

import contextlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from brixel.errors import BrixelError
from brixel.inference.rasters.geotiff import import_rasterio
from brixel.inference.rasters.source import IDENTITY, Geometry
from brixel.utils.extras import import_extra

_TIFF_BLOCK = 256  # cells a side
_TIFF_BANDS = 32  # bands at a time; each has blocks of its own
_ZARR_BLOCK = 64
_STEP = 16  # sides of blocks of a TIFF are multiples of it

Block = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Layout:
    """What a feature raster holds.

    Args:
        shape: (D, H, W).
        dtype: "float32" or "float16".
        geometry: Where its cells lie.
        meta: Texts by name.
    """

    shape: tuple[int, int, int]
    dtype: str
    geometry: Geometry
    meta: Mapping[str, str]


class Sink(ABC):
    """An open output file or folder."""

    endings: ClassVar[tuple[str, ...]]
    dtypes: ClassVar[tuple[str, ...]]

    def __init__(self, layout: Layout, block: tuple[int, int, int]) -> None:
        self._shape, self._block = layout.shape, block

    def blocks(self) -> Iterator[Block]:
        """The blocks, in the order that they should be written in."""
        depth, height, width = self._shape
        for top in range(0, height, self._block[1]):
            for left in range(0, width, self._block[2]):
                for first in range(0, depth, self._block[0]):
                    starts = zip((first, top, left), self._block, self._shape, strict=True)
                    bands, rows, columns = (slice(start, min(start + step, stop)) for start, step, stop in starts)
                    yield bands, rows, columns

    @classmethod
    @abstractmethod
    def check(cls) -> None:
        """Raise BrixelError where the package that writes it is missing."""

    @classmethod
    @abstractmethod
    def create(cls, path: Path, layout: Layout) -> "contextlib.AbstractContextManager[Sink]":
        """Make the file or folder, which must not exist; it is complete when the context ends."""

    @abstractmethod
    def write(self, block: Block, values: "npt.NDArray[np.floating[Any]]") -> None:
        """Write the values of a block; NaN where there is no data."""


class GeoTiffSink(Sink):
    """A tiled GeoTIFF, a band per feature, stored band by band; BigTIFF where it is large."""

    endings = (".tif", ".tiff")
    dtypes = ("float32",)

    def __init__(self, dataset: Any, layout: Layout, block: tuple[int, int, int]) -> None:
        super().__init__(layout, block)
        self._dataset = dataset

    @classmethod
    def check(cls) -> None:
        """Raise BrixelError without rasterio."""
        import_rasterio()

    @classmethod
    @contextlib.contextmanager
    def create(cls, path: Path, layout: Layout) -> Iterator["GeoTiffSink"]:
        """Make the file."""
        rasterio = import_rasterio()
        depth, height, width = layout.shape
        side = min(_TIFF_BLOCK, _STEP * -(-max(height, width) // _STEP))
        geometry = layout.geometry
        placed: dict[str, Any] = {"crs": None if geometry.crs_wkt is None else geometry.crs_wkt}
        if geometry.control_points:
            placed["gcps"] = [
                rasterio.control.GroundControlPoint(point.row, point.column, point.x, point.y, point.z)
                for point in geometry.control_points
            ]
        elif geometry.transform != IDENTITY:
            placed["transform"] = rasterio.Affine(*geometry.transform)
        options = {"tiled": True, "blockxsize": side, "blockysize": side, "interleave": "band"}
        options |= {"bigtiff": "IF_SAFER", "sparse_ok": True, "photometric": "minisblack"}
        size = {"count": depth, "height": height, "width": width, "dtype": layout.dtype, "nodata": float("nan")}
        with rasterio.open(path, "w", driver="GTiff", **size, **placed, **options) as dataset:
            dataset.update_tags(**{f"BRIXEL_{name.upper()}": text for name, text in layout.meta.items()})
            yield cls(dataset, layout, (min(_TIFF_BANDS, depth), side, side))
        _to_disk(path)

    def write(self, block: Block, values: "npt.NDArray[np.floating[Any]]") -> None:
        """Write the values of a block."""
        bands, rows, columns = block
        window = import_rasterio().windows.Window.from_slices(rows, columns)
        self._dataset.write(values, indexes=list(range(bands.start + 1, bands.stop + 1)), window=window)


class ZarrSink(Sink):
    """A Zarr array, version 3, (D, H, W) with the axes feature, y, x; every chunk has all features of its cells."""

    endings = (".zarr",)
    dtypes = ("float32", "float16")

    def __init__(self, array: Any, layout: Layout, block: tuple[int, int, int]) -> None:
        super().__init__(layout, block)
        self._array = array

    @classmethod
    def check(cls) -> None:
        """Raise BrixelError without zarr."""
        import_extra("zarr", extra="geo", purpose="Zarr arrays")

    @classmethod
    @contextlib.contextmanager
    def create(cls, path: Path, layout: Layout) -> Iterator["ZarrSink"]:
        """Make the folder."""
        zarr = import_extra("zarr", extra="geo", purpose="Zarr arrays")
        depth, height, width = layout.shape
        block = (depth, min(_ZARR_BLOCK, height), min(_ZARR_BLOCK, width))
        geometry = layout.geometry
        attributes: dict[str, Any] = {"transform": list(geometry.transform), "brixel": dict(layout.meta)}
        if geometry.crs_wkt is not None:
            attributes |= {"crs_wkt": geometry.crs_wkt, "_CRS": {"wkt": geometry.crs_wkt}}  # the second is GDAL's
        if geometry.control_points:
            attributes["control_points"] = [vars(point) for point in geometry.control_points]
        array = zarr.create_array(
            store=str(path),
            shape=layout.shape,
            chunks=block,
            dtype=layout.dtype,
            fill_value=float("nan"),
            dimension_names=("feature", "y", "x"),
            attributes=attributes,
        )
        yield cls(array, layout, block)

    def write(self, block: Block, values: "npt.NDArray[np.floating[Any]]") -> None:
        """Write the values of a block."""
        self._array[block] = values


SINKS: tuple[type[Sink], ...] = (GeoTiffSink, ZarrSink)


def choose_sink(path: Path) -> type[Sink]:
    """The sink for a path, by its ending. Raises BrixelError for others, and where its package is missing."""
    for sink in SINKS:
        if path.suffix.lower() in sink.endings:
            sink.check()
            return sink
    endings = ", ".join(ending for sink in SINKS for ending in sink.endings)
    raise BrixelError(f"{path} ends in {path.suffix!r}; a feature raster is a file or folder that ends in {endings}")


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Raise BrixelError where something lies at ``path`` that must not be replaced.

    With ``overwrite``, that is a folder that is no feature raster, or a file where a folder is written.
    """
    if not path.parent.is_dir():
        raise BrixelError(f"{path} cannot be written: its folder does not exist; give one in a folder that exists")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise BrixelError(f"{path} exists: give another name, or --overwrite")
    is_zarr = path.suffix.lower() in ZarrSink.endings
    if path.is_dir() != is_zarr or (is_zarr and not _is_array(path)):
        raise BrixelError(f"{path} is no feature raster of brixel, so it is not replaced: give another name")


def _is_array(path: Path) -> bool:
    try:
        return "brixel" in json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def put_in_place(finished: Path, path: Path) -> None:
    """Give a finished output its name; an earlier one is replaced."""
    if finished.is_dir() and path.is_dir():
        earlier = finished.with_name("earlier")
        os.replace(path, earlier)
        os.replace(finished, path)
        shutil.rmtree(earlier)
    else:
        os.replace(finished, path)


def _to_disk(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
