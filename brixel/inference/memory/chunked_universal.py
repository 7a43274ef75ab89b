"""The universal upsampler some rows of low-resolution cells at a time: less memory, the same numbers but for rounding.

What of a window or of an output cell has many numbers exists for a chunk of rows only. Kept whole are the features,
the guide and what the network keeps per low-resolution cell. Convolutions on the output grid run on some rows more on
either side than a chunk has, which are dropped.

Shapes: one image, D width, h x w low-resolution grid, H x W output grid, C and C' channels.
"""

import torch
from torch import Tensor

from brixel.inference.memory.row_chunks import Ranges, resize_rows, source_rows
from brixel.model.universal import (
    ATTENTION_CHANNELS,
    BLOCKS,
    GUIDE_PX,
    KERNEL,
    LOW_CHANNELS,
    OutputGrid,
    UniversalUpsampler,
    cell_table,
    inner_products,
    mean_length,
    resize_guide,
    weighted_sums,
    window_cells,
)

_TRUNK_REACH = BLOCKS * (KERNEL // 2)  # rows of the output grid
_STEM_REACH = 1  # row above, of the output grid: two convolutions of stride 2


@torch.no_grad()
def universal_in_chunks(
    universal: UniversalUpsampler,
    features: Tensor,
    guide: Tensor,
    out: Tensor,
    size_hw: tuple[int, int],
    rows: Ranges,
    similar: Tensor | None = None,
) -> None:
    """Upsample the features of one image.

    Args:
        universal: The network.
        features: (1, D, h, w).
        guide: (1, 3, any, any), RGB in [0, 1].
        out: Where the map is written: (D, Hf, Wf), on any device, Hf <= H and Wf <= W.
        size_hw: H and W.
        rows: Ranges of rows of ``features`` that are computed at a time.
        similar: Features (1, any, h, w) whose weights are used; ``features`` themselves where None.
    """
    grid_hw = (features.shape[2], features.shape[3])
    whole = OutputGrid(grid_hw, size_hw, features.device)
    table = cell_table(features if similar is None else similar)
    summed = table if similar is None else cell_table(features)
    del features, similar
    guide = resize_guide(guide, size_hw)
    low = _low_map(universal, table, guide, grid_hw, size_hw, rows)
    unpooled = universal.unpool(low).permute(0, 3, 1, 2)  # 1 C h w

    def trunk_rows(grid: OutputGrid) -> Tensor:
        top, bottom = grid.output_rows
        start, stop = max(0, top - _TRUNK_REACH), min(size_hw[0], bottom + _TRUNK_REACH)
        x = _stem_rows(universal, guide, start, stop) + universal.place_map(whole, start, stop)
        source = source_rows((start, stop), grid_hw[0], size_hw[0])
        resized = resize_rows(
            unpooled[:, :, source[0] : source[1]], source[0], grid_hw[0], (start, stop), size_hw, x.dtype
        )
        x = universal.trunk(x + resized.permute(0, 2, 3, 1))
        return x[:, top - start : bottom - start]

    height, width = grid_hw
    keys = low.new_empty(1, height * width, ATTENTION_CHANNELS)
    for start, stop in rows:
        grid = OutputGrid(grid_hw, size_hw, table.device, (start, stop))
        keys[:, start * width : stop * width] = universal.keys(trunk_rows(grid), low[:, start:stop], grid)
    for chunk in rows:
        grid = OutputGrid(grid_hw, size_hw, table.device, chunk)
        top, bottom = grid.output_rows
        if top >= out.shape[1]:
            break
        cells = window_cells(table, grid)
        weights = universal.weights_of(trunk_rows(grid), keys, inner_products(cells), grid)
        if summed is not table:
            cells = window_cells(summed, grid)
        dense = weighted_sums(cells, weights, grid)[0]  # D rows W
        del cells, weights
        kept = min(bottom, out.shape[1])
        out[:, top:kept] = dense[:, : kept - top, : out.shape[2]]
        del dense


def _low_map(
    universal: UniversalUpsampler,
    table: Tensor,
    guide: Tensor,
    grid_hw: tuple[int, int],
    size_hw: tuple[int, int],
    rows: Ranges,
) -> Tensor:
    """What the network's `low` gives: (1, h, w, C')."""
    typical = mean_length(table)
    seen = table.new_empty(1, *grid_hw, LOW_CHANNELS, dtype=guide.dtype)
    for start, stop in rows:
        grid = OutputGrid(grid_hw, size_hw, table.device, (start, stop))
        alike = universal.alike_map(inner_products(window_cells(table, grid)), typical)
        seen[:, start:stop] = alike + universal.pooled(_stem_rows(universal, guide, *grid.output_rows), grid)
    low: Tensor = universal.low(seen)
    return low


def _stem_rows(universal: UniversalUpsampler, guide: Tensor, start: int, stop: int) -> Tensor:
    """The stem's rows ``start`` to ``stop`` of the output grid: (1, rows, W, C)."""
    above = min(start, _STEM_REACH)
    pixels = guide[:, :, GUIDE_PX * (start - above) : GUIDE_PX * stop]
    return universal.stem_map(pixels)[:, above:]
