"""Cross-attention from the output grid to all low-resolution cells, after JAFAR (arXiv 2506.11136).

Queries come from the image alone. Keys come from the image on the low-resolution grid, scaled and shifted by the
backbone's features. The values are these features themselves. Written from the paper, with as many channels as make it
about as large as the universal upsampler; the parts that read features are of one width, so it belongs to one backbone.

Shapes: B batch, D width, h x w low-resolution grid, H x W output grid, C channels, A heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brixel.model.universal import resize_guide

HEADS = 4


class JafarLike(nn.Module):
    """Features (B, D, h, w) and an image in [0, 1] in, features (B, D, H, W) out.

    Args:
        width: Channels of the features, D.
        channels: Of queries and keys, C.
    """

    def __init__(self, width: int, channels: int = 96) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, padding=1), nn.GELU(), nn.Conv2d(32, channels, 3, 2, padding=1), nn.GELU()
        )
        self.query = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, channels, 1)
        )
        self.key = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, channels, 1)
        )
        self.modulation = nn.Conv2d(width, 2 * channels, 1)
        self.query_norm, self.key_norm = nn.GroupNorm(1, channels), nn.GroupNorm(1, channels)

    def forward(self, features: Tensor, guide: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """Upsample."""
        height, width = features.shape[2:]
        seen = self.encoder(resize_guide(guide, size_hw))  # B C H W
        query = self.query_norm(self.query(seen))
        pooled = F.adaptive_avg_pool2d(seen, (height, width))
        scale, shift = self.modulation(features).chunk(2, 1)
        key = self.key_norm(self.key(pooled) * (1 + scale) + shift)
        query, key = (_turned_by_place(maps) for maps in (query, key))  # B A n c
        values = features.flatten(2).mT[:, None]  # B 1 h*w D
        # the heads' maps are averaged: each of them is a weighted mean of the features
        weights = (query @ key.mT / key.shape[-1] ** 0.5).softmax(-1).mean(1, keepdim=True)
        return (weights @ values)[:, 0].mT.unflatten(2, size_hw)


def _turned_by_place(maps: Tensor) -> Tensor:
    """Rotary positions in units of the image: (B, C, H, W) -> (B, A, H*W, C/A)."""
    batch, channels, height, width = maps.shape
    pairs = channels // HEADS // 4  # of sine and cosine, for each axis
    frequencies = 100 ** torch.linspace(0, 1, pairs) * torch.pi / 2
    y, x = ((torch.arange(cells) + 0.5) / cells for cells in (height, width))
    angles = torch.cat(
        [
            (y[:, None, None] * frequencies).expand(height, width, pairs),
            (x[:, None] * frequencies).expand(height, width, pairs),
        ],
        -1,
    ).flatten(0, 1)  # H*W c/2
    tokens = maps.view(batch, HEADS, channels // HEADS, -1).mT  # B A H*W c
    first, second = tokens.chunk(2, -1)
    sine, cosine = angles.sin().to(tokens), angles.cos().to(tokens)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
