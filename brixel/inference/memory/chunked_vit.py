"""The backbone in less memory: heads one by one, feed-forward some tokens at a time; the same numbers but for rounding.

What :meth:`brixel.backbones.vit.ViT.block_maps` does, for inference alone. Beside the maps it keeps the tokens, their
norm and the mixed values; of q, k, v and the hidden units only a part is there at a time.

Shapes: B batch, D width, h x w patch grid, N tokens, A heads, E = D / A.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from brixel.backbones.position_embeddings import rotate
from brixel.backbones.vit import Attention, Block, ViT
from brixel.inference.memory.row_chunks import row_ranges


def block_maps_in_pieces(vit: ViT, pixels: Tensor, blocks: Sequence[int], tokens: int, *, sketch: bool) -> list[Tensor]:
    """Maps (B, D, h, w) after the given blocks. ``tokens``: how many go through a feed-forward at a time.

    ``sketch``: leave out most pieces, for counting memory; the values are then meaningless.
    """
    x, rotary, grid_hw = vit.embed(pixels, blocks)
    maps = {}
    for index in range(max(blocks) + 1):
        _run_block(vit.blocks[index], x, rotary, tokens, sketch=sketch)  # type: ignore[arg-type]
        if index in blocks:
            maps[index] = vit.map_after(x, grid_hw)
    return [maps[index] for index in blocks]


def _run_block(block: Block, x: Tensor, rotary: tuple[Tensor, Tensor] | None, tokens: int, *, sketch: bool) -> None:
    """A block's change to ``x`` (B, N, D), in place."""
    ranges = row_ranges(x.shape[1], tokens, sketch=sketch)
    mixed = _mixed_values(block.attention, block.norm1(x), rotary, sketch=sketch)
    for first, behind in ranges:
        _add(x[:, first:behind], block.attention.out(mixed[:, first:behind]), block.scale1)
    del mixed
    for first, behind in ranges:
        part = x[:, first:behind]
        _add(part, block.ffn(block.norm2(part)), block.scale2)


def _mixed_values(
    attention: Attention, normed: Tensor, rotary: tuple[Tensor, Tensor] | None, *, sketch: bool
) -> Tensor:
    """Self-attention up to its last layer, head by head: (B, N, D) -> (B, N, D)."""
    heads, width = attention.heads, normed.shape[2]
    weights = attention.qkv.weight.view(3, heads, -1, width)  # 3 A E D
    biases = None if attention.qkv.bias is None else attention.qkv.bias.view(3, heads, -1)
    mixed = normed.new_empty(normed.shape).unflatten(-1, (heads, -1))  # B N A E
    for head in range(2 if sketch else heads):
        bias = None if biases is None else biases[:, head].flatten()
        qkv = F.linear(normed, weights[:, head].flatten(0, 1), bias).unflatten(-1, (3, 1, -1))  # B N 3 1 E
        query_key, value = qkv[:, :, :2].transpose(1, 3), qkv[:, :, 2].transpose(1, 2)  # B 1 2 N E, B 1 N E
        if rotary is not None:
            query_key = rotate(query_key, *rotary)
        query, key = query_key.unbind(2)  # B 1 N E
        mixed[:, :, head] = F.scaled_dot_product_attention(query, key, value)[:, 0]
    return mixed.flatten(2)


def _add(x: Tensor, branch: Tensor, scale: Tensor | None) -> None:
    """A branch onto its input (B, n, D), scaled per channel (D) or not, in place."""
    if scale is None:
        x.add_(branch)
    else:
        x.addcmul_(scale, branch)
