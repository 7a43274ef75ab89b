"""The ViT in less memory: attention head by head, linear layers on some tokens at a time.

Computes what :meth:`brixel.backbones.vit.ViT.block_maps` does, for inference, with the same numbers but for rounding:
`_run_block` and `_attention_values` are `Block` and `Attention` written a second time, and
`tests/inference/memory/test_chunked_forward.py` compares the two. Kept whole are the maps, the tokens, their norm and
the attention's values; of q, k, v and the hidden units only a part exists at a time.

Shapes: B batch, D width, h x w patch grid, N tokens, A heads, E = D / A.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from brixel.backbones.position_embeddings import rotate
from brixel.backbones.vit import Attention, Block, ViT
from brixel.inference.memory.row_chunks import Ranges


def block_maps_in_chunks(
    vit: ViT, pixels: Tensor, blocks: Sequence[int], tokens: Ranges, heads: Sequence[int]
) -> list[Tensor]:
    """Maps (B, D, h, w) after the given blocks.

    ``tokens``: ranges that go through a block's linear layers one after another. ``heads``: which are computed, all of
    them unless memory is counted.
    """
    x, rotary, grid_hw = vit.embed(pixels, blocks)
    maps = {}
    for index in range(max(blocks) + 1):
        _run_block(vit.blocks[index], x, rotary, tokens, heads)  # type: ignore[arg-type]
        if index in blocks:
            maps[index] = vit.map_after(x, grid_hw)
    return [maps[index] for index in blocks]


def _run_block(
    block: Block, x: Tensor, rotary: tuple[Tensor, Tensor] | None, tokens: Ranges, heads: Sequence[int]
) -> None:
    """Change ``x`` (B, N, D) in place."""
    values = _attention_values(block.attention, block.norm1(x), rotary, heads)
    for start, stop in tokens:
        _add(x[:, start:stop], block.attention.out(values[:, start:stop]), block.scale1)
    del values
    for start, stop in tokens:
        chunk = x[:, start:stop]
        _add(chunk, block.ffn(block.norm2(chunk)), block.scale2)


def _attention_values(
    attention: Attention, normed: Tensor, rotary: tuple[Tensor, Tensor] | None, heads: Sequence[int]
) -> Tensor:
    """Self-attention up to its last layer: (B, N, D) -> (B, N, D)."""
    width = normed.shape[2]
    weights = attention.qkv.weight.view(3, attention.heads, -1, width)  # 3 A E D
    biases = None if attention.qkv.bias is None else attention.qkv.bias.view(3, attention.heads, -1)
    values = normed.new_empty(normed.shape).unflatten(-1, (attention.heads, -1))  # B N A E
    for head in heads:
        bias = None if biases is None else biases[:, head].flatten()
        qkv = F.linear(normed, weights[:, head].flatten(0, 1), bias).unflatten(-1, (3, 1, -1))  # B N 3 1 E
        query_key, value = qkv[:, :, :2].transpose(1, 3), qkv[:, :, 2].transpose(1, 2)  # B 1 2 N E, B 1 N E
        if rotary is not None:
            query_key = rotate(query_key, *rotary)
        query, key = query_key.unbind(2)  # B 1 N E
        values[:, :, head] = F.scaled_dot_product_attention(query, key, value)[:, 0]
    return values.flatten(2)


def _add(x: Tensor, branch: Tensor, scale: Tensor | None) -> None:
    """Add a branch to its input (B, n, D) in place, scaled per channel (D) or not."""
    if scale is None:
        x.add_(branch)
    else:
        x.addcmul_(scale, branch)
