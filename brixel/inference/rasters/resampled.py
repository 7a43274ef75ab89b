"""A raster with coarser pixels: each is the mean of what it covers. Exact, and the same in every window."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from brixel.inference.rasters.source import Pixels, RasterSource


def coverage(start: int, stop: int, cell: float, first: int, last: int) -> "npt.NDArray[np.float64]":
    """How much of each cell each pixel covers along one axis.

    Args:
        start: First pixel.
        stop: Pixel after the last.
        cell: Length of a cell in pixels; the first cell of all begins at pixel 0.
        first: First cell.
        last: Cell after the last.

    Returns:
        (last - first, stop - start), in pixels.
    """
    pixels = np.arange(start, stop, dtype=np.float64)
    cells = np.arange(first, last, dtype=np.float64)[:, None]
    overlap = np.minimum((cells + 1) * cell, pixels + 1) - np.maximum(cells * cell, pixels)
    return np.clip(overlap, 0, None)


class ResampledSource(RasterSource):
    """Another raster with pixels of ``step`` of its pixels, from 1 up; those at its end may cover less.

    A pixel holds data where at least half of what it covers does, and is the mean of that.
    """

    def __init__(self, source: RasterSource, step: float) -> None:
        facts = source.facts
        height, width = (math.ceil(side / step - 1e-6) for side in facts.image_hw)
        super().__init__(
            dataclasses.replace(
                facts,
                image_hw=(height, width),
                geometry=facts.geometry.with_pixels_of(step, step),
                um_per_px=None if facts.um_per_px is None else facts.um_per_px * step,
                notes={**facts.notes, "resampled": f"pixels are means of {step:.6g} pixels a side"},
            )
        )
        self._source, self._step = source, step

    def read(self, top: int, left: int, height: int, width: int, bands: Sequence[int]) -> Pixels:
        """Read what the window covers, and average it."""
        rows, columns = (
            (math.floor(start * self._step), min(math.ceil((start + length) * self._step), side))
            for start, length, side in zip((top, left), (height, width), self._source.facts.image_hw, strict=True)
        )
        values, valid = self._source.read(rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0], bands)
        down = coverage(*rows, self._step, top, top + height)
        across = coverage(*columns, self._step, left, left + width).T
        kept = np.where(valid, values, 0)
        covered = down @ valid.astype(np.float64) @ across
        sums = np.stack([down @ band.astype(np.float64) @ across for band in kept])
        whole = down.sum(axis=1)[:, None] * across.sum(axis=0)
        means = sums / np.where(covered > 0, covered, 1)
        return means.astype(np.float32), covered >= 0.5 * whole
