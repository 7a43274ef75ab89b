"""The adapter: a small CNN reads the pixels, six extractor blocks move the backbone's features onto a finer grid.

Section 1 of the graph of arXiv 2511.05168 (`docs/method.md`), without its unused parts, in units of the patch grid, so
that patch size and aspect do not matter. Differences from the text: offsets and attention logits come from one linear
layer; the prior is resized before its 1x1 convolution, not after (both are linear: same numbers). Fresh adapters also
blend the four maps into the base of the head; in the released ones the base is the last map.

Shapes: B batch, D width, h x w patch grid, N = 2h*2w queries, A heads, P points, S channels of the prior.
In memory channels come last everywhere, so that maps and tokens are the same bytes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from brixel.model.deformable_attention import pad_table, read_table

PRIOR_CHANNELS = 64
HEADS, POINTS = 16, 4
EXTRACTORS = 6
DROP_PATH = 0.3
NORM_EPS = 1e-6


def tokens_of(maps: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, h*w, D), without a copy where channels come last in memory."""
    return maps.flatten(2).transpose(1, 2)


def map_of(tokens: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """(B, h*w, D) -> (B, D, h, w), a view."""
    return tokens.unflatten(1, grid_hw).permute(0, 3, 1, 2)


def resize(maps: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Resize (B, D, h, w) bilinearly, cell centres at +0.5; the same values if it is on that grid already."""
    return F.interpolate(maps, size=grid_hw, mode="bilinear", align_corners=False)


class ConvNormRelu(nn.Module):
    """3x3 convolution, batch norm, ReLU. In evaluation mode the norm is folded into the convolution on the fly."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        if self.training:
            return F.relu_(self.norm(self.conv(x)))
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        weight = self.conv.weight * scale[:, None, None, None]
        bias = norm.bias - norm.running_mean * scale
        return F.relu_(F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding))


class SpatialPrior(nn.Module):
    """The CNN on the pixels: features at a quarter and at an eighth of their resolution."""

    def __init__(self) -> None:
        super().__init__()
        channels = PRIOR_CHANNELS
        self.stem = nn.Sequential(
            ConvNormRelu(3, channels, 2), ConvNormRelu(channels, channels, 1), ConvNormRelu(channels, channels, 1)
        )
        self.down = ConvNormRelu(channels, 2 * channels, 2)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (B, S, H/4, W/4) and (B, 2S, H/8, W/8), rounded up."""
        quarter = F.max_pool2d(self.stem(pixels.contiguous(memory_format=torch.channels_last)), 3, 2, padding=1)
        return quarter, self.down(quarter)


def _rays() -> Tensor:
    """Offsets (A, P, 2), x before y, along A directions; the larger coordinate is 1 to P cells."""
    angles = torch.arange(HEADS, dtype=torch.float32, device="cpu") * (2 * torch.pi / HEADS)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)  # A 2
    directions = directions / directions.abs().amax(-1, keepdim=True)
    return directions[:, None] * torch.arange(1, POINTS + 1, device="cpu")[:, None]


_RAYS = _rays()  # computed once: it would take a third of the time of building a model on the meta device


class DeformableAttention(nn.Module):
    """Queries on the 2h x 2w grid read a map on the h x w grid, at points near their own cells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Linear(width, width // 2)
        self.offsets_and_logits = nn.Linear(width, HEADS * POINTS * 3)
        self.out = nn.Linear(width // 2, width)
        # as in Deformable DETR: every head starts with its own direction, its points one cell apart
        nn.init.zeros_(self.offsets_and_logits.weight)
        with torch.no_grad():
            self.offsets_and_logits.bias[: HEADS * POINTS * 2] = _RAYS.flatten()
            self.offsets_and_logits.bias[HEADS * POINTS * 2 :] = 0

    def forward(self, queries: Tensor, features: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """``queries`` (B, N, D), ``features`` (B, h*w, D) -> (B, N, D)."""
        table = pad_table(self.values(features).unflatten(1, grid_hw))
        return self.read(queries, table, (0, 2 * grid_hw[0]), 2 * grid_hw[1])

    def values(self, features: Tensor) -> Tensor:
        """The values of ``features`` (B, n, D), split into heads: (B, n, A, D/2A)."""
        return rearrange(self.value(features), "B n (A C) -> B n A C", A=HEADS)

    def read(self, queries: Tensor, table: Tensor, rows: tuple[int, int], columns: int) -> Tensor:
        """Attention of the queries (B, n, D) in rows ``rows[0]`` to ``rows[1]`` of their grid: (B, n, D).

        ``table``: the values on the h x w grid, padded by :func:`brixel.model.deformable_attention.pad_table`.
        """
        sampling = self.offsets_and_logits(queries)
        offsets, logits = sampling.split([HEADS * POINTS * 2, HEADS * POINTS], dim=-1)
        # half precision has too few digits for positions on a grid
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        x, y = rearrange(offsets, "B n (A P xy) -> xy B n A P", A=HEADS, P=POINTS)
        centres_x, centres_y = _cell_centres(rows, columns, offsets)
        # softmax along a strided axis is several times faster than along one of four numbers
        by_head = logits.flatten(0, 1).unflatten(-1, (HEADS, POINTS)).mT.contiguous()  # B*n P A
        weights = by_head.softmax(-2).mT.unflatten(0, x.shape[:2])  # B n A P
        return self.out(read_table(table, x + centres_x, y + centres_y, weights))


def _cell_centres(rows: tuple[int, int], columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of the queries of some rows, in cells of the h x w grid: x and y, (n, 1, 1) each."""
    y = torch.arange(*rows, dtype=like.dtype, device=like.device) * 0.5 + 0.25
    x = torch.arange(columns, dtype=like.dtype, device=like.device) * 0.5 + 0.25
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return grid_x.reshape(-1, 1, 1), grid_y.reshape(-1, 1, 1)


class ConvFfn(nn.Module):
    """A narrow feed-forward with a depthwise 3x3 convolution of its hidden map on the query grid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = width // 4
        self.down = nn.Linear(width, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.up = nn.Linear(hidden, width)

    def forward(self, queries: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """(B, N, D) -> (B, N, D); ``grid_hw`` is the query grid, 2h x 2w."""
        hidden = self.depthwise(map_of(self.down(queries), grid_hw))
        return self.up(F.gelu(tokens_of(hidden)))


class Extractor(nn.Module):
    """Queries attend to one of the backbone's maps, then mix with their neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.feature_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = DeformableAttention(width)
        self.ffn_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.ffn = ConvFfn(width)
        self.drop_path = DROP_PATH  # a trainer may change it; unused in evaluation mode

    def forward(self, queries: Tensor, features: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """``queries`` (B, N, D), ``features`` (B, h*w, D) on the grid h x w -> (B, N, D)."""
        queries = queries + self.attention(self.query_norm(queries), self.feature_norm(features), grid_hw)
        branch = self.ffn(self.ffn_norm(queries), (2 * grid_hw[0], 2 * grid_hw[1]))
        return queries + _drop_path(branch, self.drop_path if self.training else 0.0)


def _drop_path(branch: Tensor, rate: float) -> Tensor:
    """Stochastic depth (arXiv 1603.09382): drop the branch for random samples of the batch."""
    if not rate:
        return branch
    kept = torch.empty(branch.shape[0], 1, 1, dtype=branch.dtype, device=branch.device).bernoulli_(1 - rate)
    return branch * kept / (1 - rate)


class Adapter(nn.Module):
    """Pixels and the backbone's four maps in; the three inputs of :class:`brixel.model.head.Head` out.

    These are the prior on the 4h x 4w grid, the refined queries on the 2h x 2w grid, and the base on the h x w grid.

    Args:
        width: Channels of the backbone's maps, D.
        blend: Whether the base is a linear map of all four maps, which starts as the last of them; else it is the last.
    """

    def __init__(self, width: int, *, blend: bool = False) -> None:
        super().__init__()
        self.prior = SpatialPrior()
        self.query = nn.Linear(2 * PRIOR_CHANNELS, width)
        self.level = nn.Parameter(torch.zeros(width))
        self.extractors = nn.ModuleList(Extractor(width) for _ in range(EXTRACTORS))
        self.blend = _blend_of_four(width) if blend else None

    def forward(self, pixels: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """``pixels`` (B, 3, H, W), ``maps`` four of (B, D, h, w) -> (B, S, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w)."""
        height, width = maps[0].shape[2:]
        quarter, eighth = self.prior(pixels)
        quarter = resize(quarter, (4 * height, 4 * width))
        eighth = resize(eighth, (2 * height, 2 * width))
        queries = self.query(tokens_of(eighth)) + self.level  # B N D

        # one extractor on each of the four maps, then the rest on the last
        features = [tokens_of(block_map) for block_map in maps]
        features += [features[-1]] * (EXTRACTORS - len(features))
        for extractor, feature in zip(self.extractors, features, strict=True):
            queries = extractor(queries, feature, (height, width))
        return quarter, map_of(queries, (2 * height, 2 * width)), self.base(maps)

    def base(self, maps: Sequence[Tensor]) -> Tensor:
        """The map that the head adds to: four of (B, D, h, w) -> (B, D, h, w)."""
        if self.blend is None:
            return maps[-1]
        tokens = torch.cat([tokens_of(block_map) for block_map in maps], dim=-1)  # B h*w 4D
        return map_of(self.blend(tokens), (maps[-1].shape[2], maps[-1].shape[3]))


def _blend_of_four(width: int) -> nn.Linear:
    """A linear layer on the channels of four maps; it starts as a copy of the last map."""
    layer = nn.Linear(4 * width, width)
    nn.init.zeros_(layer.bias)
    nn.init.zeros_(layer.weight)
    layer.weight.data[:, 3 * width :].diagonal().fill_(1)  # init.eye_ on meta would import torch._dynamo, for a second
    return layer
