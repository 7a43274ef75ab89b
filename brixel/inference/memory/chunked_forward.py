"""The student's forward pass for one large image in pieces: the same numbers, but for rounding, in less memory.

No layer is written a second time. A piece is some rows of the patch grid, with as many more on either side as its
convolutions reach; each layer runs on it as on an image, and the rows beyond are dropped. What is whole at a time: the
backbone's maps (the first three as the tables that attention reads, half as wide), the queries, which are changed in
place, the prior, and 64 channels of them joined. The dense map leaves piece by piece. Group statistics take a pass of
their own. Method: `docs/method.md`; what is kept how long: `docs/memory.md`.

Shapes: one image, D width, h x w patch grid, S channels of the prior, T of the trunk; a piece has n rows of patches.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel.backbones.vit import ViT
from brixel.inference.memory.chunked_vit import block_maps_in_pieces
from brixel.inference.memory.row_chunks import resize_rows, row_ranges, source_rows
from brixel.model.adapter import EXTRACTORS, HEADS, PRIOR_CHANNELS, Adapter, Extractor, map_of, resize, tokens_of
from brixel.model.deformable_attention import empty_table, inner_rows
from brixel.model.head import DOWN_TAPS, SMOOTH_TAPS, Fusion, Head, fused_variance, stencil, without_autocast
from brixel.model.student import Student
from brixel.model.upsampler import UPSCALE

_HEAD_REACH = 4  # rows of the dense map: three depthwise convolutions and a grouped one
_PRIOR_REACH = 2  # rows at an eighth of the pixels: four convolutions and a pooling reach less far


@dataclass(frozen=True)
class Pieces:
    """The rows of a patch grid h x w, ``rows`` at a time. ``sketch``: most are left out; see `row_ranges`."""

    grid_hw: tuple[int, int]
    rows: int
    sketch: bool = False

    def ranges(self) -> list[tuple[int, int]]:
        """Ranges of rows of patches."""
        return row_ranges(self.grid_hw[0], self.rows, sketch=self.sketch)


@torch.no_grad()
def dense_in_pieces(student: Student, pixels: Tensor, out: Tensor, rows: int, *, sketch: bool = False) -> None:
    """Write the dense map of one image to ``out``: all of its cells, or as many as ``out`` has from the first on.

    ``pixels``: (1, 3, H, W), on any device. ``out``: (D, Hf, Wf), on any device, Hf <= 4h and Wf <= 4w. ``rows``: of
    patches, at a time. ``sketch``: leave out most pieces, for counting memory.
    """
    weight = student.head.out.weight
    pixels = pixels.to(weight.device, weight.dtype)
    patch_px = student.backbone.patch_px
    pieces = Pieces((pixels.shape[2] // patch_px, pixels.shape[3] // patch_px), rows, sketch)
    adapter, head = student.adapter, student.head
    extractors = cast("list[Extractor]", list(adapter.extractors))

    # 1. what the extractors and the head read of the backbone
    maps = _backbone_maps(student, pixels, pieces)
    base = _base(adapter, maps, pieces)
    last = maps[-1]
    tables: list[Tensor | None] = []
    while len(maps) > 1:
        tables.append(_table(extractors[len(tables)], maps.pop(0), pieces))
    tables += [None] * (EXTRACTORS - len(tables))  # of the last map, made when they are needed
    maps.clear()

    # 2. pixels to prior and queries
    prior, queries = _prior_and_queries(adapter, pixels, pieces)
    del pixels

    # 3. the refiner
    for index, extractor in enumerate(extractors):
        table, tables[index] = tables[index], None
        _extract(extractor, queries, _table(extractor, last, pieces) if table is None else table, pieces)
        del table
    del last

    # 4. the head
    scale, shift = _scale_and_shift(head.fusion, prior, queries, pieces)
    of_prior, of_queries, bias = head.fusion.weights(scale.to(prior.dtype), shift.to(prior.dtype))
    coarse = torch.empty(1, queries.shape[1], bias.shape[2], dtype=prior.dtype, device=prior.device)  # 1 2h*2w T
    for first, behind in pieces.ranges():
        part = _query_rows(first, behind, pieces)
        coarse[:, part] = torch.baddbmm(bias, queries[:, part], of_queries)
    del queries
    _write_rows(head, prior, coarse, of_prior, base, out, pieces)


def _backbone_maps(student: Student, pixels: Tensor, pieces: Pieces) -> list[Tensor]:
    if isinstance(student.backbone, ViT):
        tokens = pieces.rows * pieces.grid_hw[1]
        return block_maps_in_pieces(student.backbone, pixels, student.blocks, tokens, sketch=pieces.sketch)
    return list(student.backbone.block_maps(pixels, student.blocks))  # other people's models run as they are


def _base(adapter: Adapter, maps: list[Tensor], pieces: Pieces) -> Tensor:
    """What the head starts from: (1, D, h, w)."""
    if adapter.blend is None:
        return maps[-1]
    tokens = [tokens_of(each) for each in maps]
    base = torch.empty_like(tokens[-1])  # 1 h*w D
    for first, behind in pieces.ranges():
        part = slice(first * pieces.grid_hw[1], behind * pieces.grid_hw[1])
        base[:, part] = adapter.blend(torch.cat([each[:, part] for each in tokens], dim=-1))
    return map_of(base, pieces.grid_hw)


def _table(extractor: Extractor, features: Tensor, pieces: Pieces) -> Tensor:
    """What one extractor's attention reads of a map (1, D, h, w)."""
    attention, width = extractor.attention, pieces.grid_hw[1]
    tokens = tokens_of(features)
    table = empty_table(pieces.grid_hw, HEADS, tokens.shape[2] // 2 // HEADS, tokens)
    for first, behind in pieces.ranges():
        part = tokens[:, first * width : behind * width]
        values = attention.values(extractor.feature_norm(part)).unflatten(1, (behind - first, width))  # 1 n w A C
        inner_rows(table, first, behind).copy_(values)
    return table


def _prior_and_queries(adapter: Adapter, pixels: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """The prior (1, S, 4h, 4w) and the queries (1, 2h*2w, D) as they enter the refiner."""
    height, width = pieces.grid_hw
    image_rows = pixels.shape[2]
    quarter_rows, eighth_rows = math.ceil(image_rows / 4), math.ceil(image_rows / 8)
    prior = pixels.new_empty(1, 4 * height, 4 * width, PRIOR_CHANNELS).permute(0, 3, 1, 2)
    queries = pixels.new_empty(1, 4 * height * width, adapter.level.shape[0])
    for first, behind in pieces.ranges():
        fine, coarse = (4 * first, 4 * behind), (2 * first, 2 * behind)
        quarters = source_rows(fine, quarter_rows, 4 * height)
        eighths = source_rows(coarse, eighth_rows, 2 * height)
        start = max(0, 8 * (min(eighths[0], quarters[0] // 2) - _PRIOR_REACH))
        stop = 8 * (max(eighths[1], -(-quarters[1] // 2)) + _PRIOR_REACH)
        quarter, eighth = adapter.prior(pixels[:, :, start:stop])
        prior[:, :, fine[0] : fine[1]] = resize_rows(
            quarter, start // 4, quarter_rows, fine, (4 * height, 4 * width), pixels.dtype
        )
        eighth = resize_rows(eighth, start // 8, eighth_rows, coarse, (2 * height, 2 * width), pixels.dtype)
        queries[:, _query_rows(first, behind, pieces)] = adapter.query(tokens_of(eighth)) + adapter.level
    return prior, queries


def _query_rows(first: int, behind: int, pieces: Pieces) -> slice:
    """The queries of those rows of patches: two rows of 2w each."""
    columns = 2 * pieces.grid_hw[1]
    return slice(2 * first * columns, 2 * behind * columns)


def _extract(extractor: Extractor, queries: Tensor, table: Tensor, pieces: Pieces) -> None:
    """One extractor's change to the queries (1, 2h*2w, D), in place."""
    columns = 2 * pieces.grid_hw[1]
    for first, behind in pieces.ranges():
        part = queries[:, _query_rows(first, behind, pieces)]
        part += extractor.attention.read(extractor.query_norm(part), table, (2 * first, 2 * behind), columns)

    above = queries[:, :0]  # the row before a piece, as it was before the feed-forward changed it
    for first, behind in pieces.ranges():
        rows = _query_rows(first, behind, pieces)
        below = queries[:, rows.stop : rows.stop + columns]
        part = torch.cat([above, queries[:, rows], below], dim=1)
        branch = extractor.ffn(extractor.ffn_norm(part), (part.shape[1] // columns, columns))
        kept = above.shape[1]
        above = queries[:, rows.stop - columns : rows.stop].clone()
        queries[:, rows] += branch[:, kept : kept + rows.stop - rows.start]


def _scale_and_shift(fusion: Fusion, prior: Tensor, queries: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """What :meth:`brixel.model.head.Fusion.scale_and_shift` gives, from sums over pieces: (1, D) each."""
    wide = torch.promote_types(prior.dtype, torch.float32)
    fine, coarse_hw = fusion.fine.weight.to(wide), (2 * pieces.grid_hw[0], 2 * pieces.grid_hw[1])
    maps = map_of(queries, coarse_hw)  # 1 D 2h 2w
    cells = prior.shape[2] * prior.shape[3]
    with without_autocast(prior.device.type):
        prior_mean, query_mean = _mean(prior, 4, pieces, wide), _mean(maps, 2, pieces, wide)  # 1 C 1 1
        mean = prior_mean.flatten(1) @ fine.mT + fusion.fine.bias.to(wide) + query_mean.flatten(1)
        sums: list[Tensor] = []
        for first, behind in pieces.ranges():
            around = _framed_rows(prior, (4 * first, 4 * behind), wide) - prior_mean
            flat = tokens_of(around[:, :, 1:-1, 1:-1])  # 1 4n*4w S
            own = flat.mT @ flat
            down = tokens_of(stencil(around, DOWN_TAPS, stride=2))
            around = _framed_rows(maps, (2 * first, 2 * behind), wide) - query_mean
            part = around[:, :, 1:-1, 1:-1]
            shared, squares = down.mT @ tokens_of(part), (stencil(around, SMOOTH_TAPS, stride=1) * part).sum((2, 3))
            new = [own, shared, squares]
            sums = new if not sums else [old.add_(each) for old, each in zip(sums, new, strict=True)]
            del around, flat, down, part
        return fusion.scale_and_shift(mean, fused_variance(fine, sums[0], sums[1], sums[2], cells))


def _mean(maps: Tensor, per_patch: int, pieces: Pieces, wide: torch.dtype) -> Tensor:
    """The mean of each channel: (1, C, H, W) -> (1, C, 1, 1)."""
    ranges = [(per_patch * first, per_patch * behind) for first, behind in pieces.ranges()]
    sums = [maps[:, :, first:behind].to(wide).sum((2, 3), keepdim=True) for first, behind in ranges]
    return cast("Tensor", sum(sums)) / (maps.shape[2] * maps.shape[3])


def _framed_rows(maps: Tensor, wanted: tuple[int, int], wide: torch.dtype) -> Tensor:
    """Some rows and one more cell on all sides, the edge of the map repeated: (1, C, H, W) -> (1, C, n + 2, W + 2)."""
    rows = maps[:, :, max(0, wanted[0] - 1) : wanted[1] + 1].to(wide)
    top, bottom = int(wanted[0] == 0), int(wanted[1] == maps.shape[2])
    return F.pad(rows, (1, 1, top, bottom), mode="replicate")


def _write_rows(
    head: Head, prior: Tensor, coarse: Tensor, of_prior: Tensor, base: Tensor, out: Tensor, pieces: Pieces
) -> None:
    """The head from the joined map on. ``coarse``: (1, 2h*2w, T), the queries' part of it."""
    height, width = pieces.grid_hw
    fine_hw = (UPSCALE * height, UPSCALE * width)
    coarse_map = map_of(coarse, (2 * height, 2 * width))
    if head.residual_detour:
        base = resize(base, (max(1, height // 2), max(1, width // 2)))
    for first, behind in pieces.ranges():
        begin, end = UPSCALE * first, min(UPSCALE * behind, out.shape[1])
        if begin >= end:
            break
        around = (max(0, begin - _HEAD_REACH), min(fine_hw[0], UPSCALE * behind + _HEAD_REACH))
        joined = _resized(coarse_map, around, fine_hw)
        joined = torch.baddbmm(tokens_of(joined), tokens_of(prior[:, :, around[0] : around[1]]), of_prior)
        details = head.details(map_of(joined, (around[1] - around[0], fine_hw[1]))).to(base.dtype)
        del joined
        details = details[:, (begin - around[0]) * fine_hw[1] : (end - around[0]) * fine_hw[1]]
        rows = _resized(base, (begin, end), fine_hw)
        dense = tokens_of(rows).add_(head.out.bias).baddbmm_(details, head.out.weight.mT[None])
        out[:, begin:end] = map_of(dense, (end - begin, fine_hw[1]))[0, :, :, : out.shape[2]]
        del rows, dense, details


def _resized(maps: Tensor, wanted: tuple[int, int], new_hw: tuple[int, int]) -> Tensor:
    """The rows ``wanted`` of a map resized to ``new_hw``: (1, C, H, W) -> (1, C, wanted, W')."""
    needed = source_rows(wanted, maps.shape[2], new_hw[0])
    part = maps[:, :, needed[0] : needed[1]]
    return resize_rows(part, needed[0], maps.shape[2], wanted, new_hw, maps.dtype)
