"""GeoTIFF and the other rasters that rasterio reads, by windows.

A raster is opened by its path on this machine: addresses are not fetched. Some formats (VRT) name other files, which
GDAL then opens.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brixel.errors import BrixelError, ImageError
from brixel.inference.rasters.source import (
    Band,
    ControlPoint,
    Geometry,
    Pixels,
    RasterFacts,
    RasterSource,
    check_block,
    check_dtype,
    only_finite,
)
from brixel.utils.extras import import_extra

CACHE_BYTES = 32 * 2**20
"""Decoded blocks that GDAL keeps, in place of its own 5 % of all memory."""

_COLOURS = ("red", "green", "blue", "alpha")  # of GDAL's names, those that say something: "gray" is the default
_LOG = logging.getLogger("brixel")


def import_rasterio() -> Any:
    """The package, or a BrixelError that names the extra."""
    return import_extra("rasterio", extra="geo", purpose="rasters")


@contextlib.contextmanager
def small_cache() -> Iterator[None]:
    """GDAL keeps at most :data:`CACHE_BYTES` of decoded blocks meanwhile."""
    with import_rasterio().Env(GDAL_CACHEMAX=CACHE_BYTES):
        yield


@contextlib.contextmanager
def open_geotiff(path: Path, nodata: float | None = None) -> Iterator[RasterSource]:
    """Open a raster.

    Args:
        path: A file that exists.
        nodata: A number that means that there is no data, beside what the file itself says.

    Raises:
        ImageError: It is no raster, or damaged.
        BrixelError: It is one of a kind that has no brightness: complex numbers, a palette.
    """
    rasterio = import_rasterio()
    with contextlib.ExitStack() as stack:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
                dataset = stack.enter_context(rasterio.open(path.absolute()))
                facts = _facts(dataset, path)
        except rasterio.errors.RasterioError as error:
            raise ImageError(
                f"{path} cannot be read as a raster ({error}); expected a GeoTIFF or another file that GDAL reads"
            ) from error
        yield _GeoTiff(dataset, facts, nodata)


class _GeoTiff(RasterSource):
    def __init__(self, dataset: Any, facts: RasterFacts, nodata: float | None) -> None:
        super().__init__(facts)
        self._dataset, self._nodata = dataset, nodata

    def read(self, top: int, left: int, height: int, width: int, bands: Sequence[int]) -> Pixels:
        rasterio = import_rasterio()
        window = rasterio.windows.Window(left, top, width, height)
        try:
            values = self._dataset.read(list(bands), window=window)
            valid = self._dataset.read_masks(list(bands), window=window).all(axis=0)
        except rasterio.errors.RasterioError as error:
            where = f"rows {top} to {top + height}, columns {left} to {left + width}"
            raise ImageError(f"{self.facts.path} cannot be read in {where} ({error}); fetch it again") from error
        if self._nodata is not None:
            valid &= (values != self._nodata).all(axis=0)
        return values, only_finite(values, valid)


def _facts(dataset: Any, path: Path) -> RasterFacts:
    if dataset.count == 0:
        first = next(iter(dataset.subdatasets), path)
        raise BrixelError(
            f"{path} has no bands of its own, but holds {len(dataset.subdatasets)} rasters; write one as a file, for "
            f"instance with gdal_translate {first} one.tif"
        )
    colours = [colour.name for colour in dataset.colorinterp]
    if "palette" in colours:
        raise BrixelError(
            f"{path} holds numbers of colours in a palette; expand it first: gdal_translate -expand rgb {path.name} "
            "rgb.tif"
        )
    types = {np.dtype(name) for name in dataset.dtypes if not name.startswith("complex_int")}
    dtype = np.result_type(*types) if types else np.dtype("complex64")
    check_dtype(path, dtype)
    for (rows, columns), name in zip(dataset.block_shapes, dataset.dtypes, strict=True):
        check_block(path, rows * columns * np.dtype(name).itemsize)
    bands = [
        Band(_words(description, dataset.tags(number)), colour if colour in _COLOURS else "")
        for number, (description, colour) in enumerate(zip(dataset.descriptions, colours, strict=True), 1)
    ]
    return RasterFacts(path, (dataset.height, dataset.width), dtype, bands, _geometry(dataset, path))


def _words(description: str | None, tags: dict[str, str]) -> str:
    """The name of a band, and its wavelength where a tag has it."""
    wavelengths = [f"{name} {value}" for name, value in tags.items() if "wavelength" in name.lower()]
    return ", ".join([*([description] if description else []), *wavelengths])


def _geometry(dataset: Any, path: Path) -> Geometry:
    points, points_crs = dataset.gcps
    if dataset.rpcs is not None:
        _LOG.warning("%s has rational polynomial coefficients, which its feature raster does not get", path)
    if points and dataset.transform.is_identity:
        kept = tuple(ControlPoint(point.row, point.col, point.x, point.y, point.z or 0.0) for point in points)
        return Geometry(crs_wkt=_wkt(points_crs), control_points=kept)
    return Geometry(tuple(dataset.transform)[:6], _wkt(dataset.crs))


def _wkt(crs: Any) -> str | None:
    """A reference system as text, in the version of it that can say all of them."""
    return crs.to_wkt(version="WKT2_2019") if crs else None
