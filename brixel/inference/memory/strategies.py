"""Ways to compute dense maps that need less and less memory: whole, in exact pieces, in blended tiles.

Shapes: B images, D width, h x w patch grid. Results are wanted on the CPU; see :func:`run_way`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from brixel.feature_maps.host_copy import to_host
from brixel.inference.memory.chunked_forward import dense_in_pieces
from brixel.inference.memory.tiling import Tiling, blend_weights, plan_tiling
from brixel.model.student import Student
from brixel.model.upsampler import UPSCALE

TILE_SIDES = (64, 48, 32, 24, 16, 12, 8)
"""Tiles that are tried, in patches: at 64 attention is as dear as all else of a ViT-B, beyond it soon dearer."""


@dataclasses.dataclass(frozen=True)
class Way:
    """``kind`` is "whole", ``batch`` images at a time; or, an image after another, "pieces", ``rows`` of patches at
    a time, or "tiles", squares of ``side`` patches.
    """

    kind: Literal["whole", "pieces", "tiles"]
    batch: int = 1
    rows: int = 0
    side: int = 0

    @property
    def overlap(self) -> int:
        """Patches that neighbouring tiles share at least: a quarter of a side."""
        return self.side // 4

    def tiling(self, grid_hw: tuple[int, int]) -> Tiling:
        """How the tiles lie on a patch grid."""
        return plan_tiling(grid_hw, self.side, self.overlap)


def smaller(way: Way, grid_hw: tuple[int, int], *, tiles: bool) -> Way | None:
    """The way to try where this one ran out of memory: half the batch, the rows or the tile; None after the last."""
    if way.kind == "whole":
        half = way.batch // 2
        return Way("whole", batch=half) if half else Way("pieces", rows=max(1, grid_hw[0] // 2))
    if way.kind == "pieces":
        if way.rows > 1:
            return Way("pieces", rows=way.rows // 2)
        return next((Way("tiles", side=side) for side in TILE_SIDES if tiles and side < max(grid_hw)), None)
    half = way.side // 2
    return Way("tiles", side=half) if half >= TILE_SIDES[-1] else None


def new_results(student: Student, pixels: Tensor) -> list[Tensor]:
    """Room on the CPU for the maps of a batch: B tensors (D, 4h, 4w) of the model's dtype."""
    grid_hw, weight = _grid_hw(student, pixels), student.head.out.weight
    shape = (weight.shape[0], UPSCALE * grid_hw[0], UPSCALE * grid_hw[1])
    return [torch.empty(shape, dtype=weight.dtype) for _ in range(pixels.shape[0])]


@torch.no_grad()
def maps_of(student: Student, way: Way, pixels: Tensor, *, sketch: bool = False) -> list[Tensor]:
    """The maps (D, 4h, 4w) of ``pixels`` (B, 3, H, W), both on the CPU.

    Those of a batch that a model on the CPU computed whole share their memory, channels last. ``sketch``: see
    :func:`run_way`.
    """
    if way.kind == "whole" and way.batch >= pixels.shape[0]:
        weight = student.head.out.weight
        return [to_host(each) for each in student(pixels.to(weight.device, weight.dtype))]
    results = new_results(student, pixels)
    run_way(student, way, pixels, results, sketch=sketch)
    return results


@torch.no_grad()
def run_way(student: Student, way: Way, pixels: Tensor, results: Sequence[Tensor], *, sketch: bool = False) -> None:
    """Fill ``results`` with the maps of ``pixels`` (B, 3, H, W), which lie on the CPU.

    ``results``: one tensor (D, Hf, Wf) for each image, with all cells of its map or as many as it has room for.
    ``sketch``: leave out most parts of a batch, pieces and tiles, for counting memory.
    """
    weight = student.head.out.weight
    if way.kind != "whole" and sketch:  # nothing is left of an image but its map: one takes as much as each
        pixels, results = pixels[:1], results[:1]
    if way.kind == "whole":
        for first in range(0, pixels.shape[0], way.batch)[: 2 if sketch else None]:
            dense = student(pixels[first : first + way.batch].to(weight.device, weight.dtype))  # b D 4h 4w
            for result, each in zip(results[first : first + way.batch], dense, strict=True):
                result.copy_(each[:, : result.shape[1], : result.shape[2]])
            del dense
    elif way.kind == "pieces":
        for index, result in enumerate(results):
            dense_in_pieces(student, pixels[index : index + 1], result, way.rows, sketch=sketch)
    else:
        tiling = way.tiling(_grid_hw(student, pixels))
        for image, result in zip(pixels, results, strict=True):
            _run_tiles(student, tiling, image, result, sketch=sketch)


def _run_tiles(student: Student, tiling: Tiling, image: Tensor, result: Tensor, *, sketch: bool) -> None:
    """The map of one image (3, H, W) as the blended maps of its tiles."""
    patch_px, weight = student.backbone.patch_px, student.head.out.weight
    down, across = (
        blend_weights(starts, tile, cells, UPSCALE).to(result.dtype)
        for starts, tile, cells in zip((tiling.tops, tiling.lefts), tiling.tile_hw, tiling.grid_hw, strict=True)
    )
    height_px, width_px = (patch_px * cells for cells in tiling.tile_hw)
    result.zero_()
    for index, (top, left) in enumerate(tiling.tiles()[: 2 if sketch else None]):
        y, x = top * patch_px, left * patch_px
        part = image[None, :, y : y + height_px, x : x + width_px].to(weight.device, weight.dtype)
        dense = student(part)[0]  # D 4t 4t
        cells = result[:, UPSCALE * top :, UPSCALE * left :][:, : dense.shape[1], : dense.shape[2]]
        share = down[index // len(tiling.lefts), :, None] * across[index % len(tiling.lefts)]  # 4t 4t
        dense, share = dense[:, : cells.shape[1], : cells.shape[2]], share[: cells.shape[1], : cells.shape[2]]
        cells.addcmul_(dense.to(result.device, result.dtype), share)
        del part, dense


def _grid_hw(student: Student, pixels: Tensor) -> tuple[int, int]:
    patch_px = student.backbone.patch_px
    return pixels.shape[2] // patch_px, pixels.shape[3] // patch_px
