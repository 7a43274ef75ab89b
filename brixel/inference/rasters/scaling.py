"""From the numbers of a raster to brightness in [0, 1]: stated ranges, or percentiles of a sample. Always recorded.

Shapes: C bands, H x W pixels.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from brixel.errors import BrixelError
from brixel.inference.rasters.source import RasterSource

DEFAULT_STRETCH = (2.0, 98.0)
"""Percentiles that become 0 and 1, for everything but bytes."""

_SAMPLES = 64  # windows with data that percentiles are taken of
_SAMPLE_PX = 256  # side of such a window
_SAMPLE_STEP = 4  # every fourth row and column of it is taken, and more of a raster of few windows
_SEED = 0
_LOG = logging.getLogger("brixel")


@dataclass(frozen=True)
class Scaling:
    """What number of each band becomes 0 and what 1.

    Args:
        lows: By band.
        highs: By band.
        rule: Where they come from, in words.
    """

    lows: tuple[float, ...]
    highs: tuple[float, ...]
    rule: str

    def __str__(self) -> str:
        ranges = ", ".join(f"{low:.9g} to {high:.9g}" for low, high in zip(self.lows, self.highs, strict=True))
        return f"{self.rule}: {ranges}"

    def apply(self, values: "npt.NDArray[np.generic]") -> "npt.NDArray[np.float32]":
        """Brightness (C, H, W) of numbers (C, H, W); a band without a range is 0 below its number, 1 above."""
        wide = values.dtype.itemsize > 4 or (values.dtype.itemsize == 4 and values.dtype.kind in "iu")
        scaled = np.empty(values.shape, np.float32)
        for band, out, low, high in zip(values, scaled, self.lows, self.highs, strict=True):
            numbers = band.astype(np.float64 if wide else np.float32)
            with np.errstate(over="ignore", invalid="ignore"):  # of pixels without data
                out[:] = (numbers - low) / (high - low) if high > low else 0.5 + 0.5 * np.sign(numbers - low)
        return scaled.clip(0, 1, out=scaled)


def choose_scaling(
    source: RasterSource,
    bands: Sequence[int],
    stretch: tuple[float, float] | None,
    value_range: tuple[float, float] | None,
) -> Scaling:
    """The scaling of the chosen bands.

    Args:
        source: The raster.
        bands: The chosen bands.
        stretch: Percentiles that become 0 and 1.
        value_range: Numbers that become 0 and 1, in all bands. Without both, bytes are 0 to 255, and everything else is
            stretched by :data:`DEFAULT_STRETCH`.

    Raises:
        BrixelError: Both are given, or one is no range.
    """
    if stretch is not None and value_range is not None:
        raise BrixelError("stretch= and value_range= are two answers to one question; give one of them")
    if value_range is not None:
        if value_range[0] >= value_range[1]:
            raise BrixelError(f"value_range is {value_range}; expected two numbers, the smaller first")
        return _same(value_range, len(bands), "the given range")
    if stretch is None and source.facts.dtype == np.uint8:
        return _same((0.0, 255.0), len(bands), "bytes as they are")
    if stretch is None and source.facts.dtype.kind == "b":
        return _same((0.0, 1.0), len(bands), "bits as they are")
    percentiles = stretch or DEFAULT_STRETCH
    if not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise BrixelError(f"stretch is {percentiles}; expected two percentiles from 0 to 100, such as (2, 98)")
    return _stretched(source, bands, percentiles)


def _same(ends: tuple[float, float], count: int, rule: str) -> Scaling:
    return Scaling((ends[0],) * count, (ends[1],) * count, rule)


def _stretched(source: RasterSource, bands: Sequence[int], percentiles: tuple[float, float]) -> Scaling:
    sample = np.concatenate(list(_samples(source, bands)) or [np.zeros((len(bands), 0))], axis=1)
    if sample.shape[1] == 0:
        raise BrixelError(f"{source.facts.path} has no pixel with data in its bands {', '.join(map(str, bands))}")
    lows, highs = (tuple(map(float, row)) for row in np.percentile(sample, percentiles, axis=1))
    for band, low, high in zip(bands, lows, highs, strict=True):
        if low == high:
            _LOG.warning("band %d of %s is %g at both percentiles: it becomes grey there", band, source.facts.path, low)
    rule = f"percentiles {percentiles[0]:g} and {percentiles[1]:g} of {sample.shape[1]} sampled pixels"
    return Scaling(lows, highs, rule)


def _samples(source: RasterSource, bands: Sequence[int]) -> Iterator["npt.NDArray[np.float64]"]:
    """Numbers with data (C, n) of windows in an order that is fixed, until there are enough."""
    height, width = source.facts.image_hw
    down, across = math.ceil(height / _SAMPLE_PX), math.ceil(width / _SAMPLE_PX)
    step = min(_SAMPLE_STEP, down * across)
    found = 0
    for index in np.random.default_rng(_SEED).permutation(down * across).tolist():
        top, left = index // across * _SAMPLE_PX, index % across * _SAMPLE_PX
        values, valid = source.read(top, left, min(_SAMPLE_PX, height - top), min(_SAMPLE_PX, width - left), bands)
        values, valid = values[:, ::step, ::step], valid[::step, ::step]
        if valid.any():
            yield values[:, valid].astype(np.float64)
            found += 1
        if found == _SAMPLES:
            return
