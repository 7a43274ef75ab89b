"""Numbers of rasters as brightness: every dtype, percentiles against NumPy's of the whole raster, constant bands."""

import numpy as np
import pytest

from brixel import BrixelError
from brixel.inference.rasters.geotiff import open_geotiff
from brixel.inference.rasters.scaling import Scaling, choose_scaling


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
def test_a_range_is_linear_in_every_dtype(dtype):
    high = 250 if dtype == "uint8" else 30_000
    values = np.linspace(0, high, 40).astype(dtype).reshape(1, 5, 8)
    low, top = 0.2 * high, 0.8 * high
    expected = ((values.astype(np.float64) - low) / (top - low)).clip(0, 1)
    scaled = Scaling((low,), (top,), "").apply(values)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, expected, rtol=0, atol=2e-6)


def test_large_whole_numbers_keep_their_differences():
    values = np.array([[[2**31 - 9, 2**31 - 5, 2**31 - 1]]], np.int64).astype(np.uint32)
    assert Scaling((2.0**31 - 9,), (2.0**31 - 1,), "").apply(values).tolist() == [[[0, 0.5, 1]]]


def test_bytes_are_as_they_are(draw):
    with open_geotiff(draw(np.arange(256, dtype=np.uint8).reshape(1, 16, 16))) as source:
        scaling = choose_scaling(source, (1,), None, None)
    assert (scaling.lows, scaling.highs, str(scaling)) == ((0.0,), (255.0,), "bytes as they are: 0 to 255")


@pytest.mark.parametrize("stretch", [None, (2, 98), (0, 100), (10, 60)])
def test_percentiles_of_a_small_raster_are_those_of_all_its_data(draw, stretch):
    generator = np.random.default_rng(3)
    values = (generator.gamma(2.0, 500.0, (3, 120, 200)) * [[[1]], [[2]], [[0.1]]]).astype(np.float32)
    valid = generator.random((120, 200)) < 0.7
    with open_geotiff(draw(np.where(valid, values, -9999), nodata=-9999)) as source:
        scaling = choose_scaling(source, (3, 1, 2), stretch, None)
    expected = np.percentile(values[[2, 0, 1]][:, valid].astype(np.float64), stretch or (2, 98), axis=1)
    np.testing.assert_allclose([scaling.lows, scaling.highs], expected, rtol=1e-12)
    assert str(scaling).startswith(f"percentiles {(stretch or (2, 98))[0]} and ")


@pytest.mark.slow
def test_percentiles_of_a_large_raster_are_near_those_of_all(draw):
    """From 64 windows of 153, with data everywhere, and with data in one corner alone."""
    y, x = np.mgrid[:2200, :4300]
    values = (1000 + x // 4 + y + np.random.default_rng(0).integers(0, 200, x.shape)).astype(np.uint16)[None]
    tiled = {"tiled": True, "blockxsize": 256, "blockysize": 256, "nodata": 0}
    for kept in (np.ones(x.shape, bool), (x < 150) & (y < 90)):
        path = draw(np.where(kept, values, 0), **tiled)
        with open_geotiff(path) as source:
            once, again = (choose_scaling(source, (1,), None, None) for _ in range(2))
        assert once == again  # the sample is a function of the raster
        low, high = np.percentile(values[0][kept], (2, 98))
        assert once.lows[0] == pytest.approx(low, abs=0.03 * (high - low))
        assert once.highs[0] == pytest.approx(high, abs=0.03 * (high - low))


def test_a_constant_band_is_grey(draw, caplog):
    values = np.full((1, 40, 40), 7, np.uint16)
    values[0, 0, 0], values[0, 0, 1] = 0, 900
    with open_geotiff(draw(values)) as source:
        scaled = choose_scaling(source, (1,), (2, 98), None).apply(values)
    assert scaled[0, 0, :3].tolist() == [0.0, 1.0, 0.5]
    assert "band 1 of" in caplog.text
    with open_geotiff(draw(values)) as source, pytest.raises(BrixelError, match="expected two percentiles"):
        choose_scaling(source, (1,), (-1, 98), None)
