"""Strategies that compute dense maps in less and less memory: whole, in exact row chunks, in blended tiles.

Shapes: B images, D width, h x w patch grid.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from brixel.feature_maps.host_copy import to_host
from brixel.inference.memory.chunked_forward import Chunks, dense_map_in_chunks
from brixel.inference.memory.row_chunks import row_ranges
from brixel.inference.memory.tiling import Tiling, blend_weights, plan_tiling
from brixel.model.student import Student

TILE_SIDES = (64, 48, 32, 24, 16, 12, 8)
"""Sides of tiles that are tried, in patches: at 64 a ViT-B spends half its time on attention, beyond it soon more."""


class Strategy(ABC):
    """One way to compute the dense maps of a batch of images of one size."""

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    """Whether the maps are those of a whole pass but for rounding."""

    def run(
        self,
        student: Student,
        pixels: Tensor,
        outputs: Sequence[Tensor] | None = None,
        *,
        counting: bool = False,
        on_device: bool = False,
    ) -> Sequence[Tensor]:
        """Compute the maps of a batch.

        Args:
            student: The model, on any device.
            pixels: (B, 3, H, W), on the CPU.
            outputs: Where the maps are written: one tensor (D, Hf, Wf) per image, with all cells of its map or the
                upper left ones. None: new tensors on the CPU; those of a batch that a model on the CPU computed whole
                share their memory, channels last.
            counting: Compute only as many batches, chunks or tiles as need the memory of all.
            on_device: Leave new tensors on the model's device where the maps of the batch lie there anyway.

        Returns:
            The outputs.
        """
        with torch.no_grad():
            if outputs is None:
                return self._maps(student, pixels, counting, on_device)
            self._fill(student, pixels, outputs, counting)
        return outputs

    def _maps(self, student: Student, pixels: Tensor, counting: bool, on_device: bool) -> Sequence[Tensor]:
        outputs = new_outputs(student, pixels)
        self._fill(student, pixels, outputs, counting)
        return outputs

    @abstractmethod
    def _fill(self, student: Student, pixels: Tensor, outputs: Sequence[Tensor], counting: bool) -> None:
        """Write the maps to ``outputs``."""

    @abstractmethod
    def smaller(self, grid_hw: tuple[int, int], *, tiles: bool) -> "Strategy | None":
        """The strategy to try where this one ran out of memory, None after the last. ``tiles``: whether they may."""

    @abstractmethod
    def pixels_at_once(self, grid_hw: tuple[int, int], patch_px: int) -> int:
        """Pixels that go through the model at a time."""

    def describe(self, grid_hw: tuple[int, int], patch_px: int) -> str:
        """The strategy in words."""
        return self.name

    @abstractmethod
    def plan_fields(self, grid_hw: tuple[int, int], patch_px: int) -> dict[str, Any]:
        """The fields of a :class:`brixel.inference.memory.planner.Plan` that not every strategy has."""


@dataclass(frozen=True)
class Whole(Strategy):
    """Whole images, ``batch`` at a time."""

    batch: int = 1
    name = "whole"

    def _maps(self, student: Student, pixels: Tensor, counting: bool, on_device: bool) -> Sequence[Tensor]:
        if self.batch < pixels.shape[0]:
            return super()._maps(student, pixels, counting, on_device)
        maps = student(_to_model(student, pixels))  # B D 4h 4w
        return list(maps) if on_device else [to_host(dense) for dense in maps]  # on the CPU nothing is copied

    def _fill(self, student: Student, pixels: Tensor, outputs: Sequence[Tensor], counting: bool) -> None:
        for start, stop in row_ranges(pixels.shape[0], self.batch)[: 2 if counting else None]:
            maps = student(_to_model(student, pixels[start:stop]))  # b D 4h 4w
            for out, dense in zip(outputs[start:stop], maps, strict=True):
                out.copy_(dense[:, : out.shape[1], : out.shape[2]])
            del maps

    def smaller(self, grid_hw: tuple[int, int], *, tiles: bool) -> Strategy:
        """Half the batch; after a batch of one, row chunks."""
        return Whole(self.batch // 2) if self.batch > 1 else RowChunks(max(1, grid_hw[0] // 2))

    def pixels_at_once(self, grid_hw: tuple[int, int], patch_px: int) -> int:
        """Those of a batch."""
        return self.batch * grid_hw[0] * grid_hw[1] * patch_px**2

    def plan_fields(self, grid_hw: tuple[int, int], patch_px: int) -> dict[str, Any]:
        """The batch."""
        return {"micro_batch": self.batch}


@dataclass(frozen=True)
class RowChunks(Strategy):
    """One image after another, ``rows`` rows of patches at a time."""

    rows: int
    name = "row_chunks"

    def _fill(self, student: Student, pixels: Tensor, outputs: Sequence[Tensor], counting: bool) -> None:
        chunks = Chunks.split(student, patch_grid_of(student, pixels.shape[2:]), self.rows)
        images = len(outputs)
        if counting:  # of an image nothing is left but its map: one takes as much as all
            chunks, images = chunks.few(), 1
        for index in range(images):
            dense_map_in_chunks(student, pixels[index : index + 1], outputs[index], chunks)

    def smaller(self, grid_hw: tuple[int, int], *, tiles: bool) -> Strategy | None:
        """Half the rows; after a single row, tiles."""
        if self.rows > 1:
            return RowChunks(self.rows // 2)
        return next((Tiles(side) for side in TILE_SIDES if tiles and side < max(grid_hw)), None)

    def pixels_at_once(self, grid_hw: tuple[int, int], patch_px: int) -> int:
        """Those of a chunk."""
        return self.rows * grid_hw[1] * patch_px**2

    def describe(self, grid_hw: tuple[int, int], patch_px: int) -> str:
        """Such as "exact chunks of 4 rows"."""
        return f"exact chunks of {self.rows} rows"

    def plan_fields(self, grid_hw: tuple[int, int], patch_px: int) -> dict[str, Any]:
        """The rows."""
        return {"chunk_rows": self.rows}


@dataclass(frozen=True)
class Tiles(Strategy):
    """One image after another, as square tiles of ``side`` patches, blended where they overlap."""

    side: int
    name = "tiles"
    exact = False

    @property
    def overlap(self) -> int:
        """Patches that neighbouring tiles share at least: a quarter of a side."""
        return self.side // 4

    def tiling(self, grid_hw: tuple[int, int]) -> Tiling:
        """Where the tiles lie on a patch grid."""
        return plan_tiling(grid_hw, self.side, self.overlap)

    def _fill(self, student: Student, pixels: Tensor, outputs: Sequence[Tensor], counting: bool) -> None:
        tiling = self.tiling(patch_grid_of(student, pixels.shape[2:]))
        tiles, images = (1, 1) if counting else (tiling.count, len(outputs))
        for image, out in zip(pixels[:images], outputs[:images], strict=True):
            _blend_tiles(student, tiling, image, out, tiles)

    def smaller(self, grid_hw: tuple[int, int], *, tiles: bool) -> Strategy | None:
        """Half the side, down to the smallest of `TILE_SIDES`."""
        half = self.side // 2
        return Tiles(half) if half >= TILE_SIDES[-1] else None

    def pixels_at_once(self, grid_hw: tuple[int, int], patch_px: int) -> int:
        """Those of a tile."""
        return (self.side * patch_px) ** 2

    def describe(self, grid_hw: tuple[int, int], patch_px: int) -> str:
        """Such as "9 of 128x128 px, overlapping by 32 px or more"."""
        fields = self.plan_fields(grid_hw, patch_px)
        height, width = fields["tile_px"]
        return f"{fields['tiles']} of {height}x{width} px, overlapping by {fields['overlap_px']} px or more"

    def plan_fields(self, grid_hw: tuple[int, int], patch_px: int) -> dict[str, Any]:
        """Number, size and overlap."""
        tiling = self.tiling(grid_hw)
        height, width = tiling.tile_hw
        tile_px = (height * patch_px, width * patch_px)
        return {"tiles": tiling.count, "tile_px": tile_px, "overlap_px": self.overlap * patch_px}


def patch_grid_of(student: Student, padded_hw: Sequence[int]) -> tuple[int, int]:
    """The patch grid of an image of padded height and width in pixels."""
    return padded_hw[0] // student.patch_px, padded_hw[1] // student.patch_px


def new_outputs(student: Student, pixels: Tensor) -> list[Tensor]:
    """Empty tensors on the CPU for the maps of a batch: B of (D, sh, sw), of the model's dtype."""
    height, width = patch_grid_of(student, pixels.shape[2:])
    shape = (student.embed_dim, student.scale * height, student.scale * width)
    return [torch.empty(shape, dtype=student.dtype, device=pixels.device) for _ in range(pixels.shape[0])]


def _blend_tiles(student: Student, tiling: Tiling, image: Tensor, out: Tensor, count: int) -> None:
    """Write the map of one image (3, H, W) to ``out`` as the blended maps of its first ``count`` tiles."""
    patch_px, scale = student.patch_px, student.scale
    down, across = (
        blend_weights(starts, tile, cells, scale).to(out.dtype)
        for starts, tile, cells in zip((tiling.tops, tiling.lefts), tiling.tile_hw, tiling.grid_hw, strict=True)
    )
    height_px, width_px = (patch_px * cells for cells in tiling.tile_hw)
    out.zero_()
    for index, (top, left) in enumerate(itertools.islice(tiling.tiles(), count)):
        y, x = top * patch_px, left * patch_px
        tile = _to_model(student, image[None, :, y : y + height_px, x : x + width_px])
        dense = student(tile)[0]  # D st st
        cells = out[:, scale * top :, scale * left :][:, : dense.shape[1], : dense.shape[2]]
        weights = down[index // len(tiling.lefts), :, None] * across[index % len(tiling.lefts)]  # st st
        dense, weights = dense[:, : cells.shape[1], : cells.shape[2]], weights[: cells.shape[1], : cells.shape[2]]
        cells.addcmul_(dense.to(out.device, out.dtype), weights)
        del tile, dense


def _to_model(student: Student, pixels: Tensor) -> Tensor:
    return pixels.to(student.device, student.dtype)
