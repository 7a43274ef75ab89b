"""The geometry of windows: a table, and what has to hold for all sizes."""

import numpy as np
import pytest

from brixel import BrixelError
from brixel.inference.rasters.resampled import ResampledSource, coverage
from brixel.inference.rasters.source import Band, Geometry, RasterFacts, RasterSource
from brixel.inference.rasters.windows import Window, plan_windows


@pytest.mark.parametrize(
    ("image_hw", "patch_px", "window", "overlap", "expected"),
    [
        ((2048, 1024), 16, 1024, 128, ((3, 1), (1024, 1024), 128)),
        ((100, 100), 16, 1024, 128, ((1, 1), (112, 112), 128)),  # one window, no larger than the raster
        ((3000, 5000), 14, 1024, 128, ((4, 6), (1022, 1022), 140)),  # rounded to patches of 14 px
        ((64, 64), 16, 16, 0, ((4, 4), (16, 16), 0)),
    ],
)
def test_numbers_and_sizes_of_windows(image_hw, patch_px, window, overlap, expected):
    grid = plan_windows(image_hw, patch_px, 4, window, overlap)
    assert ((len(grid.tiling.tops), len(grid.tiling.lefts)), grid.window_px, grid.overlap_px) == expected


@pytest.mark.parametrize("image_hw", [(37, 200), (130, 260), (16, 16), (1, 300)])
@pytest.mark.parametrize(("patch_px", "scale"), [(14, 4), (16, 4), (16, 8), (14, 3)])
def test_windows_cover_every_pixel_and_cell(image_hw, patch_px, scale):
    grid = plan_windows(image_hw, patch_px, scale, 4 * patch_px, patch_px)
    pixels, cells = np.zeros(image_hw, int), np.zeros(tuple(scale * side for side in grid.tiling.grid_hw), int)
    for window in grid.windows():
        assert window.top % patch_px == window.left % patch_px == 0
        pixels[window.top : window.top + window.height, window.left : window.left + window.width] += 1
        top, left = (scale * start // patch_px for start in (window.top, window.left))
        cells[top : top + grid.window_cells[0], left : left + grid.window_cells[1]] += 1
        assert 0 < window.height <= grid.window_px[0]
        assert 0 < window.width <= grid.window_px[1]
    assert pixels.min() >= 1
    assert cells.min() >= 1
    down, across = grid.weights()
    total = np.zeros(cells.shape)
    for window in grid.windows():
        top, left = (scale * start // patch_px for start in (window.top, window.left))
        block = total[top : top + grid.window_cells[0], left : left + grid.window_cells[1]]
        block += down[window.row].numpy()[:, None] * across[window.column].numpy()
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_the_overlap_is_smaller_than_the_window():
    with pytest.raises(BrixelError, match=r"overlap is 65 px \(5 patches of 16 px\) and window is 80 px \(5 patches\)"):
        plan_windows((500, 500), 16, 4, 80, 65)


def test_shares_of_cells_with_data_count_pixels_of_the_raster_alone():
    grid = plan_windows((10, 21), 14, 4, 14, 0)
    valid = np.ones((10, 7), bool)
    valid[:, 0] = False
    share = grid.share_with_data(Window(0, 1, 0, 14, 10, 7), valid)
    assert share.shape == (4, 4)
    np.testing.assert_allclose(share[:3, :2], [[2.5 / 3.5, 1]] * 3)
    assert not share[3].any()  # below the raster
    assert not share[:, 2:].any()


@pytest.mark.parametrize("cell", [1.0, 2.0, 3.5, 1.97])
def test_coverage_counts_every_pixel_once(cell):
    cells = int(np.ceil(20 / cell))
    found = coverage(0, 20, cell, 0, cells)
    np.testing.assert_allclose(found.sum(axis=0), 1)
    np.testing.assert_allclose(found.sum(axis=1)[:-1], cell)
    np.testing.assert_allclose(coverage(5, 12, cell, 2, 4), found[2:4, 5:12])


class ArraySource(RasterSource):
    """A raster in memory."""

    def __init__(self, values, valid):
        super().__init__(RasterFacts("array", values.shape[1:], values.dtype, [Band()], Geometry()))
        self.values, self.valid = values, valid

    def read(self, top, left, height, width, bands):
        where = slice(top, top + height), slice(left, left + width)
        return self.values[(slice(None), *where)], self.valid[where]


def test_resampled_pixels_are_means_of_what_holds_data():
    generator = np.random.default_rng(0)
    values, valid = generator.random((2, 12, 18)), generator.random((12, 18)) < 0.7
    coarse = ResampledSource(ArraySource(values, valid), 3)
    assert coarse.facts.image_hw == (4, 6)
    assert coarse.facts.geometry.transform == (3, 0, 0, 0, 3, 0)
    means, kept = coarse.read(0, 0, 4, 6, (1, 2))
    for row, column in np.ndindex(4, 6):
        where = slice(3 * row, 3 * row + 3), slice(3 * column, 3 * column + 3)
        assert kept[row, column] == (valid[where].mean() >= 0.5)
        if valid[where].any():
            expected = values[(slice(None), *where)][:, valid[where]].mean(axis=1)
            np.testing.assert_allclose(means[:, row, column], expected, rtol=1e-6)


def test_resampled_windows_are_parts_of_the_whole():
    values = np.random.default_rng(0).random((1, 50, 71)).astype(np.float32)
    coarse = ResampledSource(ArraySource(values, np.ones((50, 71), bool)), 1.979)
    height, width = coarse.facts.image_hw
    assert (height, width) == (26, 36)
    whole, _ = coarse.read(0, 0, height, width, (1,))
    part, kept = coarse.read(7, 11, 19, 25, (1,))
    np.testing.assert_allclose(part, whole[:, 7:26, 11:36], rtol=1e-6)
    assert kept.all()
