"""The student's forward pass for one large image in row chunks: less memory, the same numbers but for rounding.

A chunk is some rows of the patch grid, with as many more on either side as its convolutions reach; a layer runs on it
as on an image, and the extra rows are dropped. Kept whole are the backbone's maps (the first three as the tables that
attention reads, half as wide), the queries, which are changed in place, the prior, and 64 channels of them joined. The
dense map leaves chunk by chunk. Group statistics take a pass of their own. Method: `docs/method.md`; memory:
`docs/memory.md`.

Most layers are called as they are. Written a second time are the blend (`_base`), the fusion's moments
(`_scale_and_shift`), the tail of the head (`_write_rows`) and the ViT's block (`chunked_vit`): who changes one of these
changes both; `tests/inference/memory/test_chunked_forward.py` holds them to the same numbers.

Shapes: one image, D width, h x w patch grid, S channels of the prior, T of the trunk; a chunk has n rows of patches.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel.backbones.vit import ViT
from brixel.inference.memory.chunked_universal import universal_in_chunks
from brixel.inference.memory.chunked_vit import block_maps_in_chunks
from brixel.inference.memory.row_chunks import Ranges, resize_rows, row_ranges, source_rows
from brixel.model.adapter import HEADS, PRIOR_CHANNELS, Adapter, Extractor, map_of, resize, tokens_of
from brixel.model.deformable_attention import empty_table, inner_rows
from brixel.model.head import (
    DOWN_TAPS,
    SMOOTH_TAPS,
    TRUNK_CHANNELS,
    Fusion,
    Head,
    fused_variance,
    stencil,
    without_autocast,
)
from brixel.model.student import Student
from brixel.model.upsampler import UPSCALE, GuidedUpsampler, MixedUpsampler, SecondUpsampler, Upsampler

_HEAD_REACH = 4  # rows of the dense map: three depthwise convolutions and a grouped one
_PRIOR_REACH = 2  # rows at an eighth of the pixels: four convolutions and a pooling reach less far


@dataclass(frozen=True)
class Chunks:
    """What of an image is computed, one part after another.

    ``rows``: ranges of rows of patches, for the adapter and the head. ``tokens``, ``heads``: as in
    :func:`block_maps_in_chunks`; empty for a backbone that is no :class:`ViT`, which runs whole.
    """

    rows: Ranges
    tokens: Ranges
    heads: Sequence[int]

    @classmethod
    def split(cls, student: Student, grid_hw: tuple[int, int], rows: int) -> "Chunks":
        """All parts of an image, ``rows`` rows of patches at a time."""
        backbone, (height, width) = student.backbone, grid_hw
        if not isinstance(backbone, ViT):
            return cls(row_ranges(height, rows), (), ())
        tokens = row_ranges(backbone.config.prefix + height * width, rows * width)
        return cls(row_ranges(height, rows), tokens, range(backbone.config.heads))

    def few(self) -> "Chunks":
        """As many parts as need the memory of all: the first, one in the middle, the last."""
        rows, tokens = (
            [ranges[0], ranges[len(ranges) // 2], ranges[-1]] if len(ranges) > 3 else ranges
            for ranges in (self.rows, self.tokens)
        )
        return Chunks(rows, tokens, self.heads[:1])


@torch.no_grad()
def dense_map_in_chunks(student: Student, pixels: Tensor, out: Tensor, chunks: Chunks) -> None:
    """Write the dense map of one image to ``out``: all of its cells, or the upper left ones that ``out`` covers.

    ``pixels``: (1, 3, H, W), on any device. ``out``: (D, Hf, Wf), on any device, Hf <= sh and Wf <= sw for the scale s.
    """
    pixels = pixels.to(student.device, student.dtype)
    maps = _backbone_maps(student, pixels, chunks)
    upsampler = student.upsampler
    if isinstance(upsampler, Upsampler):
        share = None
        if isinstance(upsampler, MixedUpsampler):
            last, share = maps[-1], upsampler.own_share
            size_hw = (UPSCALE * last.shape[2], UPSCALE * last.shape[3])
            universal_in_chunks(upsampler.universal, last, upsampler.guide(pixels), out, size_hw, chunks.rows)
            del last
        _first_in_chunks(upsampler, pixels, maps, out, chunks.rows, share)
        return
    size_hw = (student.scale * maps[-1].shape[2], student.scale * maps[-1].shape[3])
    if isinstance(upsampler, SecondUpsampler):
        _second_in_chunks(upsampler, pixels, maps, out, size_hw, chunks.rows)
        return
    (last,) = maps
    if isinstance(upsampler, GuidedUpsampler):
        universal_in_chunks(upsampler.universal, last, upsampler.guide(pixels), out, size_hw, chunks.rows)
        return
    for start, stop in chunks.rows:
        top, bottom = student.scale * start, min(student.scale * stop, out.shape[1])
        if top < bottom:
            out[:, top:bottom] = _resized(last, (top, bottom), size_hw)[0, :, :, : out.shape[2]]


def _first_in_chunks(
    upsampler: Upsampler, pixels: Tensor, maps: list[Tensor], out: Tensor, rows: Ranges, share: float | None
) -> None:
    """The first generation of trained upsamplers; ``share``: of its map, where ``out`` holds another already."""
    prior, queries, base = _adapter_in_chunks(upsampler.adapter, pixels, maps, rows)
    del pixels
    fused = _fuse(upsampler.head.fusion, prior, queries, rows)
    del queries
    _write_rows(upsampler.head, fused, base, out, rows, share)


def _second_in_chunks(
    upsampler: SecondUpsampler,
    pixels: Tensor,
    maps: list[Tensor],
    out: Tensor,
    size_hw: tuple[int, int],
    rows: Ranges,
) -> None:
    """The second generation: what the universal upsampler gives is written first, and the residual is added to it."""
    last, guide = maps[-1], upsampler.guide(pixels)
    gain = upsampler.gain((last.shape[2], last.shape[3])).to(last.dtype)
    prior, queries, base = _adapter_in_chunks(upsampler.adapter, pixels, maps, rows)
    del pixels
    fused = _fuse(upsampler.head.fusion, prior, queries, rows)
    del queries
    details = prior.new_empty(1, *prior.shape[2:], TRUNK_CHANNELS).permute(0, 3, 1, 2)  # 1 T 4h 4w
    for (top, bottom), part in _detail_rows(upsampler.head, fused, rows):
        details[:, :, top:bottom] = part
    del prior, fused
    base = upsampler.mixed(last, base, gain)
    universal_in_chunks(upsampler.universal, base, guide, out, size_hw, rows, similar=last)
    del base, last, guide
    scale = (gain * upsampler.feature_std)[:, None, None].to(out.device)
    for start, stop in rows:
        top, bottom = (row * size_hw[0] // rows[-1][1] for row in (start, stop))
        kept = min(bottom, out.shape[1])
        if top >= kept:
            break
        part = tokens_of(_resized(details, (top, kept), size_hw))
        residual = map_of(upsampler.head.out(part), (kept - top, size_hw[1]))[0, :, :, : out.shape[2]]
        out[:, top:kept].addcmul_(residual.to(out.device, out.dtype), scale.to(out.dtype))


def _adapter_in_chunks(
    adapter: Adapter, pixels: Tensor, maps: list[Tensor], rows: Ranges
) -> tuple[Tensor, Tensor, Tensor]:
    """What :class:`Adapter` gives: prior, queries (1, 2h*2w, D) and base. Empties ``maps``."""
    extractors = cast("list[Extractor]", list(adapter.extractors))

    # 1. what the extractors and the head read of the backbone
    grid_hw = (maps[0].shape[2], maps[0].shape[3])
    columns = 2 * grid_hw[1]  # of the query grid
    base = _base(adapter, maps, rows)
    last = maps[-1]
    tables: list[Tensor] = []  # of the maps before the last, whose tables are made when they are needed
    while len(maps) > 1:
        tables.append(_table(extractors[len(tables)], maps.pop(0), rows))
    maps.clear()

    # 2. pixels to prior and queries
    prior, queries = _prior_and_queries(adapter, pixels, grid_hw, rows)

    # 3. the refiner
    for extractor in extractors:
        table = tables.pop(0) if tables else _table(extractor, last, rows)
        _extract(extractor, queries, table, columns, rows)
        del table
    return prior, queries, base


@dataclass(frozen=True)
class _Fused:
    """The two parts that the fusion adds: the prior (1, S, 4h, 4w) with its weights, and a map (1, T, 2h, 2w)."""

    prior: Tensor
    of_prior: Tensor
    coarse: Tensor


def _fuse(fusion: Fusion, prior: Tensor, queries: Tensor, rows: Ranges) -> _Fused:
    scale, shift = _scale_and_shift(fusion, prior, queries, rows)
    of_prior, of_queries, bias = fusion.weights(scale.to(prior.dtype), shift.to(prior.dtype))
    columns = prior.shape[3] // 2
    coarse = torch.empty(1, queries.shape[1], bias.shape[2], dtype=prior.dtype, device=prior.device)  # 1 2h*2w T
    for start, stop in rows:
        chunk = _query_rows(start, stop, columns)
        coarse[:, chunk] = torch.baddbmm(bias, queries[:, chunk], of_queries)
    return _Fused(prior, of_prior, map_of(coarse, (prior.shape[2] // 2, columns)))


def _backbone_maps(student: Student, pixels: Tensor, chunks: Chunks) -> list[Tensor]:
    if isinstance(student.backbone, ViT):
        return block_maps_in_chunks(student.backbone, pixels, student.blocks, chunks.tokens, chunks.heads)
    return list(student.backbone.block_maps(pixels, student.blocks))


def _base(adapter: Adapter, maps: list[Tensor], rows: Ranges) -> Tensor:
    """What the head starts from: (1, D, h, w)."""
    if adapter.blend is None:
        return maps[-1]
    height, width = maps[-1].shape[2:]
    tokens = [tokens_of(features) for features in maps]
    base = torch.empty_like(tokens[-1])  # 1 h*w D
    for start, stop in rows:
        chunk = slice(start * width, stop * width)
        base[:, chunk] = adapter.blend(torch.cat([features[:, chunk] for features in tokens], dim=-1))
    return map_of(base, (height, width))


def _table(extractor: Extractor, features: Tensor, rows: Ranges) -> Tensor:
    """What one extractor's attention reads of a map (1, D, h, w)."""
    attention, (height, width) = extractor.attention, features.shape[2:]
    tokens = tokens_of(features)
    table = empty_table((height, width), HEADS, tokens.shape[2] // 2 // HEADS, tokens)
    for start, stop in rows:
        chunk = tokens[:, start * width : stop * width]
        values = attention.values(extractor.feature_norm(chunk)).unflatten(1, (stop - start, width))  # 1 n w A C
        inner_rows(table, start, stop).copy_(values)
    return table


def _prior_and_queries(
    adapter: Adapter, pixels: Tensor, grid_hw: tuple[int, int], rows: Ranges
) -> tuple[Tensor, Tensor]:
    """The prior (1, S, 4h, 4w) and the queries (1, 2h*2w, D) as they enter the refiner."""
    height, width = grid_hw
    image_rows = pixels.shape[2]
    quarter_rows, eighth_rows = math.ceil(image_rows / 4), math.ceil(image_rows / 8)
    prior = pixels.new_empty(1, 4 * height, 4 * width, PRIOR_CHANNELS).permute(0, 3, 1, 2)
    queries = pixels.new_empty(1, 4 * height * width, adapter.level.shape[0])
    for start, stop in rows:
        fine, coarse = (4 * start, 4 * stop), (2 * start, 2 * stop)
        quarters = source_rows(fine, quarter_rows, 4 * height)
        eighths = source_rows(coarse, eighth_rows, 2 * height)
        top = max(0, 8 * (min(eighths[0], quarters[0] // 2) - _PRIOR_REACH))
        bottom = 8 * (max(eighths[1], -(-quarters[1] // 2)) + _PRIOR_REACH)
        quarter, eighth = adapter.prior(pixels[:, :, top:bottom])
        prior[:, :, fine[0] : fine[1]] = resize_rows(
            quarter, top // 4, quarter_rows, fine, (4 * height, 4 * width), pixels.dtype
        )
        eighth = resize_rows(eighth, top // 8, eighth_rows, coarse, (2 * height, 2 * width), pixels.dtype)
        queries[:, _query_rows(start, stop, 2 * width)] = adapter.query(tokens_of(eighth)) + adapter.level
    return prior, queries


def _query_rows(start: int, stop: int, columns: int) -> slice:
    """The queries of some rows of patches: two rows of ``columns`` queries per row of patches."""
    return slice(2 * start * columns, 2 * stop * columns)


def _extract(extractor: Extractor, queries: Tensor, table: Tensor, columns: int, rows: Ranges) -> None:
    """One extractor's change to the queries (1, 2h*2w, D), in place; ``columns``: 2w."""
    for start, stop in rows:
        chunk = queries[:, _query_rows(start, stop, columns)]
        chunk += extractor.attention.read(extractor.query_norm(chunk), table, (2 * start, 2 * stop), columns)

    above = queries[:, :0]  # the row above a chunk, as it was before the feed-forward changed it
    for start, stop in rows:
        chunk_rows = _query_rows(start, stop, columns)
        below = queries[:, chunk_rows.stop : chunk_rows.stop + columns]
        chunk = torch.cat([above, queries[:, chunk_rows], below], dim=1)
        branch = extractor.ffn(extractor.ffn_norm(chunk), (chunk.shape[1] // columns, columns))
        skipped = above.shape[1]
        above = queries[:, chunk_rows.stop - columns : chunk_rows.stop].clone()
        queries[:, chunk_rows] += branch[:, skipped : skipped + chunk_rows.stop - chunk_rows.start]


def _scale_and_shift(fusion: Fusion, prior: Tensor, queries: Tensor, rows: Ranges) -> tuple[Tensor, Tensor]:
    """What :meth:`brixel.model.head.Fusion.scale_and_shift` gives, from sums over chunks: (1, D) each."""
    wide = torch.promote_types(prior.dtype, torch.float32)
    fine, coarse_hw = fusion.fine.weight.to(wide), (prior.shape[2] // 2, prior.shape[3] // 2)
    maps = map_of(queries, coarse_hw)  # 1 D 2h 2w
    cells = prior.shape[2] * prior.shape[3]
    with without_autocast(prior.device.type):
        prior_mean, query_mean = _mean(prior, 4, rows, wide), _mean(maps, 2, rows, wide)  # 1 C 1 1
        mean = prior_mean.flatten(1) @ fine.mT + fusion.fine.bias.to(wide) + query_mean.flatten(1)
        sums: list[Tensor] = []
        for start, stop in rows:
            framed = _framed_rows(prior, (4 * start, 4 * stop), wide) - prior_mean
            flat = tokens_of(framed[:, :, 1:-1, 1:-1])  # 1 4n*4w S
            own = flat.mT @ flat
            down = tokens_of(stencil(framed, DOWN_TAPS, stride=2))
            framed = _framed_rows(maps, (2 * start, 2 * stop), wide) - query_mean
            chunk = framed[:, :, 1:-1, 1:-1]
            shared, squares = down.mT @ tokens_of(chunk), (stencil(framed, SMOOTH_TAPS, stride=1) * chunk).sum((2, 3))
            new = [own, shared, squares]
            sums = new if not sums else [total.add_(term) for total, term in zip(sums, new, strict=True)]
            del framed, flat, down, chunk
        return fusion.scale_and_shift(mean, fused_variance(fine, sums[0], sums[1], sums[2], cells))


def _mean(maps: Tensor, per_patch: int, rows: Ranges, wide: torch.dtype) -> Tensor:
    """The mean of each channel: (1, C, H, W) -> (1, C, 1, 1)."""
    chunks = [maps[:, :, per_patch * start : per_patch * stop] for start, stop in rows]
    sums = [chunk.to(wide).sum((2, 3), keepdim=True) for chunk in chunks]
    return cast("Tensor", sum(sums)) / (maps.shape[2] * maps.shape[3])


def _framed_rows(maps: Tensor, wanted: tuple[int, int], wide: torch.dtype) -> Tensor:
    """Some rows and one more cell on all sides, the map's edge repeated: (1, C, H, W) -> (1, C, n + 2, W + 2)."""
    rows = maps[:, :, max(0, wanted[0] - 1) : wanted[1] + 1].to(wide)
    top, bottom = int(wanted[0] == 0), int(wanted[1] == maps.shape[2])
    return F.pad(rows, (1, 1, top, bottom), mode="replicate")


def _detail_rows(head: Head, fused: _Fused, rows: Ranges) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """The input of the head's last layer by chunk: rows of the dense map, and their details (1, T, rows, 4w)."""
    fine_hw = (fused.prior.shape[2], fused.prior.shape[3])
    for start, stop in rows:
        top, bottom = UPSCALE * start, UPSCALE * stop
        reached = (max(0, top - _HEAD_REACH), min(fine_hw[0], bottom + _HEAD_REACH))
        joined = _resized(fused.coarse, reached, fine_hw)
        joined = torch.baddbmm(tokens_of(joined), tokens_of(fused.prior[:, :, reached[0] : reached[1]]), fused.of_prior)
        details = head.details(map_of(joined, (reached[1] - reached[0], fine_hw[1])))
        del joined
        kept = details[:, (top - reached[0]) * fine_hw[1] : (bottom - reached[0]) * fine_hw[1]]
        del details
        yield (top, bottom), map_of(kept, (bottom - top, fine_hw[1]))


def _write_rows(head: Head, fused: _Fused, base: Tensor, out: Tensor, rows: Ranges, share: float | None) -> None:
    """The head of the first generation after the fusion's norm."""
    height, width = base.shape[2:]
    fine_hw = (UPSCALE * height, UPSCALE * width)
    if head.residual_detour:
        base = resize(base, (max(1, height // 2), max(1, width // 2)))
    needed = [(start, stop) for start, stop in rows if UPSCALE * start < out.shape[1]]
    for (top, bottom), details in _detail_rows(head, fused, needed):
        bottom = min(bottom, out.shape[1])
        upsampled = _resized(base, (top, bottom), fine_hw)
        part = tokens_of(details[:, :, : bottom - top]).to(base.dtype)
        dense = tokens_of(upsampled).add_(head.out.bias).baddbmm_(part, head.out.weight.mT[None])
        made = map_of(dense, (bottom - top, fine_hw[1]))[0, :, :, : out.shape[2]].to(out.device, out.dtype)
        if share is None:
            out[:, top:bottom] = made
        else:
            out[:, top:bottom].lerp_(made, share)
        del made, upsampled, dense, details, part


def _resized(maps: Tensor, wanted: tuple[int, int], new_hw: tuple[int, int]) -> Tensor:
    """The rows ``wanted`` of a map resized to ``new_hw``: (1, C, H, W) -> (1, C, wanted, W')."""
    start, stop = source_rows(wanted, maps.shape[2], new_hw[0])
    return resize_rows(maps[:, :, start:stop], start, maps.shape[2], wanted, new_hw, maps.dtype)
