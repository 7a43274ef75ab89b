"""The windows of a raster, on the patch grid: which pixels each reads, and which cells of the feature raster it gives.

Windows are the tiles of `inference/memory/tiling.py`: equal, overlapping, spread evenly, blended by the same weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from brixel.errors import BrixelError
from brixel.images.patch_grid import NATIVE, PatchGrid, plan_patch_grid, whole_patches
from brixel.inference.memory.tiling import Tiling, blend_weights, plan_tiling
from brixel.inference.rasters.resampled import coverage


class Window(NamedTuple):
    """A window: its place among the windows, and the pixels of the raster that it reads."""

    row: int
    column: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class WindowGrid:
    """All windows of a raster.

    Args:
        patch_grid: The raster on the patch grid, at its own size.
        tiling: The windows on it, in patches.
        scale: Cells per patch, on each axis.
        overlap_px: Pixels that neighbouring windows share at least.
    """

    patch_grid: PatchGrid
    tiling: Tiling
    scale: int
    overlap_px: int

    @property
    def map_hw(self) -> tuple[int, int]:
        """Cells of the feature raster; the last ones may reach beyond the raster by a part of a cell."""
        return self.patch_grid.map_hw(self.scale)

    @property
    def stride_px(self) -> float:
        """Side of a cell in pixels of the raster."""
        return self.patch_grid.patch_px / self.scale

    @property
    def window_px(self) -> tuple[int, int]:
        """Height and width of every window, in pixels."""
        height, width = (side * self.patch_grid.patch_px for side in self.tiling.tile_hw)
        return height, width

    @property
    def window_cells(self) -> tuple[int, int]:
        """Height and width of every window, in cells."""
        return self.tiling.tile_hw[0] * self.scale, self.tiling.tile_hw[1] * self.scale

    def windows(self) -> Iterator[Window]:
        """The windows, row by row. Only the last of a row or column may be cut by the end of the raster."""
        patch_px, (image_h, image_w) = self.patch_grid.patch_px, self.patch_grid.image_hw
        for index, (top, left) in enumerate(self.tiling.tiles()):
            y, x = top * patch_px, left * patch_px
            size = min(self.window_px[0], image_h - y), min(self.window_px[1], image_w - x)
            yield Window(*divmod(index, len(self.tiling.lefts)), y, x, *size)

    def share_with_data(self, window: Window, valid: "npt.NDArray[np.bool_]") -> "npt.NDArray[np.float64]":
        """For every cell of a window, the share of its pixels in the raster that hold data; 0 where it has none."""
        stride, (height, width) = self.stride_px, self.window_cells
        down = coverage(0, window.height, stride, 0, height)
        across = coverage(0, window.width, stride, 0, width).T
        pixels = down.sum(axis=1)[:, None] * across.sum(axis=0)
        return down @ valid.astype(np.float64) @ across / np.where(pixels > 0, pixels, 1)

    def weights(self) -> tuple[Tensor, Tensor]:
        """The weights of windows: by row of windows (rows, cells), and by column."""
        (height, width), (rows, columns) = self.tiling.tile_hw, self.tiling.grid_hw
        return (
            blend_weights(self.tiling.tops, height, rows, self.scale),
            blend_weights(self.tiling.lefts, width, columns, self.scale),
        )


def plan_windows(image_hw: tuple[int, int], patch_px: int, scale: int, window: int, overlap: int) -> WindowGrid:
    """Plan the windows of a raster.

    Args:
        image_hw: Height and width of the raster in pixels.
        patch_px: Side of a patch.
        scale: Cells per patch.
        window: Side of a window in pixels; rounded to whole patches.
        overlap: Pixels that neighbours share at least; rounded up to whole patches.

    Raises:
        BrixelError: The overlap is as large as the window.
    """
    side = whole_patches(window, patch_px) // patch_px
    shared = -(-overlap // patch_px)
    if shared >= side:
        raise BrixelError(
            f"overlap is {overlap} px ({shared} patches of {patch_px} px) and window is {window} px ({side} patches); "
            "expected an overlap that is smaller than the window"
        )
    grid = plan_patch_grid(image_hw, patch_px, NATIVE)
    rows, columns = (padded // patch_px for padded in grid.padded_hw)
    return WindowGrid(grid, plan_tiling((rows, columns), side, shared), scale, shared * patch_px)
