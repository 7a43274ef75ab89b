"""Blends the finished windows of a raster, block by block, into its feature raster.

Every cell is a sum over the windows that it lies in, always in the same order. So the result does not depend on the
order in which windows were computed, nor on where a run was stopped.
"""

import numpy as np
import torch

from brixel.inference.rasters.sink import Block, Sink
from brixel.inference.rasters.window_files import WindowFiles
from brixel.inference.rasters.windows import WindowGrid
from brixel.utils.progress import progress_bar


def assemble(grid: WindowGrid, files: WindowFiles, sink: Sink) -> None:
    """Write all blocks that have data.

    Args:
        grid: The windows.
        files: All of them, finished.
        sink: What is written to.
    """
    blending = _Blending(grid, files)
    for block in progress_bar(list(sink.blocks()), desc="blending", unit="block"):
        values = blending.block(block)
        if values is not None:
            sink.write(block, values.numpy())


class _Blending:
    def __init__(self, grid: WindowGrid, files: WindowFiles) -> None:
        self._files, self._scale, self._tiling = files, grid.scale, grid.tiling
        self._cells_hw = grid.window_cells
        self._weights = grid.weights()
        columns = len(grid.tiling.lefts)
        windows = list(grid.windows())
        self._windows = [windows[start : start + columns] for start in range(0, len(windows), columns)]

    def block(self, block: Block) -> torch.Tensor | None:
        """The values of a block, NaN where there is no data; None where there is none at all."""
        bands, *sides = block
        starts = (self._tiling.tops, self._tiling.lefts)
        rows, columns = (
            [
                (index, overlap)
                for index, start in enumerate(firsts)
                if (overlap := _overlap(side, start * self._scale, length))
            ]
            for side, firsts, length in zip(sides, starts, self._cells_hw, strict=True)
        )
        out = torch.zeros(*(part.stop - part.start for part in block), dtype=torch.float32, device="cpu")
        is_covered = torch.zeros(out.shape[1:], dtype=torch.bool, device="cpu")
        down, across = self._weights
        for row, (y, cell_y) in rows:
            for column, (x, cell_x) in columns:
                window = self._windows[row][column]
                if self._files.is_empty(window):
                    continue
                cells = torch.from_numpy(self._files.cells(window)[bands, cell_y, cell_x].astype(np.float32))
                out[:, y, x].addcmul_(cells, down[row, cell_y, None] * across[column, cell_x])
                is_covered[y, x] = True
        out[:, ~is_covered] = torch.nan
        return None if out[0].isnan().all() else out


def _overlap(side: slice, start: int, length: int) -> tuple[slice, slice] | None:
    """Where a window that begins at a cell lies in a part of the raster: cells of the part, and of the window."""
    first, last = max(side.start, start), min(side.stop, start + length)
    if first >= last:
        return None
    return slice(first - side.start, last - side.start), slice(first - start, last - start)
