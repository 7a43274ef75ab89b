"""The head: computes details from the prior and the refined queries, and adds them to the upsampled base.

Sections "fusion", "residual path" and "head" of `docs/method.md` (arXiv 2511.05168). Difference from the text: the
fused map f = fine(prior) + upsampled queries, (B, D, 4h, 4w), is never formed. Only its group statistics and a linear
map of it are needed, and both follow from its two parts, which are far smaller (:class:`Fusion`).

Shapes: B batch, D width, h x w patch grid, S channels of the prior, T = 64 channels of the trunk.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from brixel.model.adapter import NORM_EPS, PRIOR_CHANNELS, map_of, resize, tokens_of

TRUNK_CHANNELS = 64
TRUNK_BLOCKS = 3
GROUPS = 32
DOWN_TAPS, SMOOTH_TAPS = (0.25, 0.75, 0.75, 0.25), (0.375, 1.25, 0.375)  # U' and U'U along an axis, see Fusion


class Fusion(nn.Module):
    """align(group_norm(fine(prior) + upsample(queries))), without forming the sum.

    With A and b the weight and bias of ``fine``, U the bilinear upsampling from 2h x 2w to 4h x 4w, and p, q the
    centred prior and queries:

    - the mean of channel c is A_c mean(prior) + b_c + mean(queries_c), since U keeps means;
    - its variance is A_c (p p') A_c' + 2 A_c (U'p q_c') + q_c U'U q_c', divided by the number of cells;
    - U'x is x with its edge repeated, weighted (1, 3, 3, 1) / 4 at every second cell; U'U q likewise (3, 10, 3) / 8.

    The norm is then one scale and shift per channel, which are merged into the weights of ``align``, before U.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = nn.Linear(PRIOR_CHANNELS, width)
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-5)
        self.align = nn.Linear(width, TRUNK_CHANNELS)

    def forward(self, prior: Tensor, queries: Tensor) -> Tensor:
        """``prior`` (B, S, 4h, 4w), ``queries`` (B, D, 2h, 2w) -> (B, T, 4h, 4w)."""
        fine_hw, coarse_hw = (prior.shape[2], prior.shape[3]), (queries.shape[2], queries.shape[3])
        scale, shift = self._scale_and_shift(prior, queries)  # B D
        prior_weight, query_weight, bias = self.weights(scale, shift)

        coarse = torch.baddbmm(bias, tokens_of(queries), query_weight)  # B 2h*2w T
        coarse = resize(map_of(coarse, coarse_hw), fine_hw)
        joined = torch.baddbmm(tokens_of(coarse), tokens_of(prior), prior_weight)  # B 4h*4w T
        return map_of(joined, fine_hw)

    def weights(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``align`` merged with the norm: weights of the prior (B, S, T) and the queries (B, D, T), bias (B, 1, T)."""
        align = self.align.weight * scale[:, None]  # B T D
        bias = shift @ self.align.weight.mT + self.align.bias  # B T
        return (align @ self.fine.weight).mT, align.mT, bias[:, None]

    def _scale_and_shift(self, prior: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The group norm as a scale and a shift (B, D) of A prior + U queries, which lacks the bias of ``fine``."""
        wide = torch.promote_types(prior.dtype, torch.float32)
        fine, bias = self.fine.weight.to(wide), self.fine.bias.to(wide)
        with without_autocast(prior.device.type):
            mean, variance = fused_moments(prior.to(wide), queries.to(wide), fine, bias)  # B D
        scale, shift = self.scale_and_shift(mean, variance)
        return scale.to(prior.dtype), shift.to(prior.dtype)

    def scale_and_shift(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """The group norm as a scale and a shift (B, D), from the mean and variance (B, D) of every channel.

        They apply to channels without the bias of ``fine``; ``mean`` includes it.
        """
        mean, variance = (rearrange(moment, "B (G c) -> B G c", G=GROUPS) for moment in (mean, variance))
        group_mean = reduce(mean, "B G c -> B G 1", "mean")
        group_variance = reduce(variance + (mean - group_mean).square(), "B G c -> B G 1", "mean")
        fine_bias, norm_weight, norm_bias = (
            rearrange(parameter, "(G c) -> G c", G=GROUPS)
            for parameter in (self.fine.bias.to(mean.dtype), self.norm.weight, self.norm.bias)
        )
        scale = torch.rsqrt(group_variance + self.norm.eps) * norm_weight  # B G c
        shift = (fine_bias - group_mean) * scale + norm_bias
        return rearrange(scale, "B G c -> B (G c)"), rearrange(shift, "B G c -> B (G c)")


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Switch autocast off, on devices that have it: products keep the dtype of their operands."""
    available = torch.amp.autocast_mode.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def fused_moments(prior: Tensor, queries: Tensor, fine: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, D) of the channels of ``fine(prior) + U queries`` over the 4h x 4w cells."""
    cells = prior.shape[2] * prior.shape[3]
    prior_mean, query_mean = prior.mean((2, 3), keepdim=True), queries.mean((2, 3), keepdim=True)
    prior, queries = prior - prior_mean, queries - query_mean
    mean = prior_mean.flatten(1) @ fine.mT + bias + query_mean.flatten(1)

    flat, down = tokens_of(prior), tokens_of(stencil(_framed(prior), DOWN_TAPS, stride=2))
    prior_products = einsum(flat, flat, "B N S, B N S2 -> B S S2")
    cross_products = einsum(down, tokens_of(queries), "B N S, B N D -> B S D")
    query_squares = (stencil(_framed(queries), SMOOTH_TAPS, stride=1) * queries).sum((2, 3))  # B D
    return mean, fused_variance(fine, prior_products, cross_products, query_squares, cells)


def fused_variance(
    fine: Tensor, prior_products: Tensor, cross_products: Tensor, query_squares: Tensor, cells: int
) -> Tensor:
    """The variance (B, D) from the sums over cells of p p' (B, S, S), U'p q' (B, S, D) and q U'U q (B, D)."""
    cross = (cross_products * fine.mT).sum(1)
    variance = (((fine @ prior_products) * fine).sum(-1) + 2 * cross + query_squares) / cells
    return variance.clamp_min(0)  # rounding may make it negative


def _framed(maps: Tensor) -> Tensor:
    """Repeat the edge once on all four sides: (B, C, H, W) -> (B, C, H + 2, W + 2)."""
    return F.pad(maps, (1, 1, 1, 1), mode="replicate")


def stencil(maps: Tensor, taps: tuple[float, ...], stride: int) -> Tensor:
    """Filter with ``taps`` along both axes: (B, C, H, W) -> (B, C, (H - taps) / s + 1, (W - taps) / s + 1)."""
    line = torch.tensor(taps, dtype=maps.dtype, device=maps.device)
    channels = maps.shape[1]
    weight = (line[:, None] * line).expand(channels, 1, -1, -1)
    return F.conv2d(maps, weight, stride=stride, groups=channels)


class TrunkBlock(nn.Module):
    """LayerNorm over channels, depthwise 3x3, GELU, 1x1, GELU, 1x1; with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise1 = nn.Linear(channels, channels)
        self.pointwise2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, T) -> (B, H, W, T)."""
        y = self.depthwise(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.pointwise2(F.gelu(self.pointwise1(F.gelu(y))))


class Head(nn.Module):
    """Prior, queries and base (the backbone's last map, or a blend of four) in, the dense map out.

    A fresh head adds nothing: its output is the upsampled base.

    Args:
        width: Channels of the dense map, D.
        residual_detour: Halve the base before it is upsampled to the 4h x 4w grid, as in the released heads; new heads
            upsample it directly.
    """

    def __init__(self, width: int, *, residual_detour: bool) -> None:
        super().__init__()
        self.residual_detour = residual_detour
        self.fusion = Fusion(width)
        self.trunk = nn.Sequential(*(TrunkBlock(TRUNK_CHANNELS) for _ in range(TRUNK_BLOCKS)))
        self.mix = nn.Conv2d(TRUNK_CHANNELS, TRUNK_CHANNELS, 3, padding=1, groups=4)
        self.norm = nn.LayerNorm(TRUNK_CHANNELS, eps=NORM_EPS)
        self.out = nn.Linear(TRUNK_CHANNELS, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, prior: Tensor, queries: Tensor, base: Tensor) -> Tensor:
        """``prior`` (B, S, 4h, 4w), ``queries`` (B, D, 2h, 2w), ``base`` (B, D, h, w) -> (B, D, 4h, 4w)."""
        details = self.details(self.fusion(prior, queries))

        # bilinear interpolation keeps constants, so the bias is added to the small map
        base = self._upsampled(base + self.out.bias[:, None, None])  # B D 4h 4w
        # autocast may have widened the base
        weight = self.out.weight.to(base.dtype).mT.expand(details.shape[0], -1, -1)
        dense = tokens_of(base).baddbmm_(details.to(base.dtype), weight)
        return map_of(dense, (base.shape[2], base.shape[3]))

    def residual(self, prior: Tensor, queries: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """What :meth:`forward` adds to the upsampled base, interpolated to another grid: (B, D, H, W)."""
        fine_hw = (prior.shape[2], prior.shape[3])
        details = map_of(self.details(self.fusion(prior, queries)), fine_hw)
        return map_of(self.out(tokens_of(resize(details, size_hw))), size_hw)

    def details(self, joined: Tensor) -> Tensor:
        """The input of the last layer: (B, T, H, W) -> (B, H*W, T); a cell depends on cells up to four away."""
        aligned = joined.permute(0, 2, 3, 1)  # B H W T
        mixed = self.mix((aligned + self.trunk(aligned)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(mixed).flatten(1, 2)

    def _upsampled(self, base: Tensor) -> Tensor:
        height, width = base.shape[2:]
        if self.residual_detour and torch.compiler.is_compiling():  # a size of height // 2 may be 1: a graph of its own
            rows, columns = (_detour_weights(cells).to(base) for cells in (height, width))
            return (rows @ base @ columns.mT).contiguous(memory_format=torch.channels_last)
        if self.residual_detour:
            base = resize(base, (max(1, height // 2), max(1, width // 2)))
        return resize(base, (4 * height, 4 * width))


def _detour_weights(cells: int) -> Tensor:
    """Weights (4 cells, cells) of bilinear resizing to half the cells, and from these to four times, along an axis."""
    count = torch.full((), cells, dtype=torch.float64, device="cpu")
    half = (count / 2).floor().clamp_min(1)
    fine = torch.arange(4 * cells, dtype=torch.float64, device="cpu")
    halves, half_weights = _two_taps(fine, half / (4 * count), half)  # 4 cells, 2
    taps, weights = _two_taps(halves, count / half, count)  # 4 cells, 2, 2
    weights = (weights * half_weights[..., None]).flatten(1)
    return weights.new_zeros(4 * cells, cells).scatter_add(1, taps.flatten(1).long(), weights)


def _two_taps(targets: Tensor, step: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """The two of ``cells`` that bilinear interpolation reads for each target, and their weights: (..., 2)."""
    source = (targets + 0.5) * step - 0.5
    left = source.floor()
    right_weight = source - left
    taps = torch.stack([left, left + 1], -1)
    return taps.clamp_min(0).minimum(cells - 1), torch.stack([1 - right_weight, right_weight], -1)
