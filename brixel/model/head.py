"""The head: joins the prior with the refined queries, and adds what it makes of them to the base, upsampled.

Sections "fusion", "residual path" and "head" of `docs/method.md` (arXiv 2511.05168). Difference from the text: the
fused map f = fine(prior) + upsampled queries, (B, D, 4h, 4w), is never formed. Only its group statistics and one
linear image of it are needed, and both follow from its two parts, which are far smaller (:class:`Fusion`).

Shapes: B batch, D width, h x w patch grid, S channels of the prior, T = 64 channels of the trunk.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brixel.model.adapter import NORM_EPS, PRIOR_CHANNELS, map_of, resize, tokens_of

TRUNK_CHANNELS = 64
TRUNK_BLOCKS = 3
GROUPS = 32
DOWN_TAPS, SMOOTH_TAPS = (0.25, 0.75, 0.75, 0.25), (0.375, 1.25, 0.375)  # U' and U'U along an axis: see Fusion


class Fusion(nn.Module):
    """align(group_norm(fine(prior) + upsample(queries))), without forming the sum.

    With A and b of ``fine``, U the bilinear step from 2h x 2w to 4h x 4w, and p, q the centred prior and queries:

    - mean of channel c: A_c mean(prior) + b_c + mean(queries_c), as U keeps means;
    - its variance: A_c (p p') A_c' + 2 A_c (U'p q_c') + q_c U'U q_c', all over the number of cells;
    - U'x is x with its edge repeated, weighted (1, 3, 3, 1) / 4 at every second cell; U'U q likewise (3, 10, 3) / 8.

    The norm is then one scale and shift per channel, which ``align`` takes into its weights, before U.
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
        of_prior, of_queries, bias = self.weights(scale, shift)

        coarse = torch.baddbmm(bias, tokens_of(queries), of_queries)  # B 2h*2w T
        coarse = resize(map_of(coarse, coarse_hw), fine_hw)
        joined = torch.baddbmm(tokens_of(coarse), tokens_of(prior), of_prior)  # B 4h*4w T
        return map_of(joined, fine_hw)

    def weights(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``align`` after that scale and shift: of the prior (B, S, T), of queries (B, D, T), bias (B, 1, T)."""
        align = self.align.weight * scale[:, None]  # B T D
        bias = shift @ self.align.weight.mT + self.align.bias  # B T
        return (align @ self.fine.weight).mT, align.mT, bias[:, None]

    def _scale_and_shift(self, prior: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The group norm as a scale and a shift of A prior + U queries, less the bias of ``fine``: (B, D) each."""
        wide = torch.promote_types(prior.dtype, torch.float32)
        fine, bias = self.fine.weight.to(wide), self.fine.bias.to(wide)
        with without_autocast(prior.device.type):
            mean, variance = fused_moments(prior.to(wide), queries.to(wide), fine, bias)  # B D
        scale, shift = self.scale_and_shift(mean, variance)
        return scale.to(prior.dtype), shift.to(prior.dtype)

    def scale_and_shift(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of channels with these moments (B, D), as a scale and a shift, less the bias of ``fine``: (B, D)."""
        bias = self.fine.bias.to(mean.dtype)
        groups = (GROUPS, -1)
        group_mean = mean.unflatten(1, groups).mean(2, keepdim=True)  # B G 1
        spread = (mean.unflatten(1, groups) - group_mean).square()
        group_variance = (variance.unflatten(1, groups) + spread).mean(2, keepdim=True)
        scale = torch.rsqrt(group_variance + self.norm.eps) * self.norm.weight.unflatten(0, groups)  # B G D/G
        shift = (bias.unflatten(0, groups) - group_mean) * scale + self.norm.bias.unflatten(0, groups)
        return scale.flatten(1), shift.flatten(1)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Products in the dtype of their operands, also inside an autocast region; the meta device knows none."""
    available = torch.amp.autocast_mode.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def fused_moments(prior: Tensor, queries: Tensor, fine: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over the 4h x 4w cells of every channel of ``fine(prior) + U queries``: (B, D) each."""
    cells = prior.shape[2] * prior.shape[3]
    prior_mean, query_mean = prior.mean((2, 3), keepdim=True), queries.mean((2, 3), keepdim=True)
    prior, queries = prior - prior_mean, queries - query_mean
    mean = prior_mean.flatten(1) @ fine.mT + bias + query_mean.flatten(1)

    flat = tokens_of(prior)  # B 4h*4w S
    own = flat.mT @ flat  # B S S
    shared = tokens_of(stencil(_framed(prior), DOWN_TAPS, stride=2)).mT @ tokens_of(queries)  # B S D
    smooth = stencil(_framed(queries), SMOOTH_TAPS, stride=1)
    return mean, fused_variance(fine, own, shared, (smooth * queries).sum((2, 3)), cells)


def fused_variance(fine: Tensor, own: Tensor, shared: Tensor, squares: Tensor, cells: int) -> Tensor:
    """The variance (B, D) from the sums over cells of p p' (B, S, S), U'p q' (B, S, D) and q U'U q (B, D)."""
    cross = (shared * fine.mT).sum(1)
    return ((((fine @ own) * fine).sum(-1) + 2 * cross + squares) / cells).clamp_min(0)  # rounding may go below


def _framed(maps: Tensor) -> Tensor:
    """One more cell on all four sides, the edge repeated: (B, C, H, W) -> (B, C, H + 2, W + 2)."""
    return F.pad(maps, (1, 1, 1, 1), mode="replicate")


def stencil(maps: Tensor, taps: tuple[float, ...], stride: int) -> Tensor:
    """Weigh neighbours by ``taps`` along both axes: (B, C, H, W) -> (B, C, (H - taps) / s + 1, (W - taps) / s + 1)."""
    line = torch.tensor(taps, dtype=maps.dtype, device=maps.device)
    channels = maps.shape[1]
    weight = (line[:, None] * line).expand(channels, 1, -1, -1)
    return F.conv2d(maps, weight, stride=stride, groups=channels)


class TrunkBlock(nn.Module):
    """LayerNorm over channels, depthwise 3x3, GELU, 1x1, GELU, 1x1; added to its input."""

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
    """Prior, queries and base (the backbone's last map, or a blend of four) -> the dense map. Starts as the base alone.

    ``residual_detour``: the base goes down by two before it goes up by four. The released heads were trained
    so; new ones take it straight up.
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
        details = self.details(self.fusion(prior, queries)).to(base.dtype)  # autocast may have made it wider

        # the bias joins the small map: bilinear interpolation keeps constants
        base = self._upsampled(base + self.out.bias[:, None, None])  # B D 4h 4w
        dense = tokens_of(base).baddbmm_(details, self.out.weight.mT.expand(details.shape[0], -1, -1))
        return map_of(dense, (base.shape[2], base.shape[3]))

    def details(self, joined: Tensor) -> Tensor:
        """What the last layer reads: (B, T, H, W) -> (B, H*W, T); a cell depends on those up to four away."""
        aligned = joined.permute(0, 2, 3, 1)  # B H W T
        mixed = self.mix((aligned + self.trunk(aligned)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(mixed).flatten(1, 2)

    def _upsampled(self, base: Tensor) -> Tensor:
        height, width = base.shape[2:]
        if self.residual_detour:
            base = resize(base, (torch.sym_max(1, height // 2), torch.sym_max(1, width // 2)))
        return resize(base, (4 * height, 4 * width))
