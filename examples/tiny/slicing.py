"""Slicing: initialise a narrow ViT from a trained wide one, as the start of its training.

After SliceGPT (arXiv 2401.15024), adapted to LayerNorm, and with smaller heads and MLPs as well. The residual stream is
projected to its first principal components, and all matrices that read or write it are projected alike. LayerNorm
subtracts the mean over channels, so the narrow channels are chosen to have mean zero. The number of attention heads
stays and their channels are halved (truncated SVD of query-key and of value-output). Of an MLP's hidden units, the more
important half stays, and the second layer is fitted anew. Learned positions are dropped: the narrow model has rotary
ones, and the strongest channels of a head become those that rotate least.

Shapes: D wide, d = D / 2 narrow, A heads, E channels of a head, C channels of any vectors.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from brixel.backbones.vit import Block, ViT
from brixel.backbones.vit_config import ViTConfig


class Moments:
    """Running mean of outer products of vectors with a 1 appended: second moments, and means in the last row."""

    def __init__(self) -> None:
        self.sum, self.count = torch.zeros(()), 0

    def add(self, vectors: Tensor) -> None:
        """``vectors``: (..., C)."""
        rows = F.pad(vectors.flatten(0, -2), (0, 1), value=1.0)
        self.sum, self.count = self.sum + rows.T @ rows, self.count + len(rows)

    @property
    def mean(self) -> Tensor:
        """(C + 1, C + 1)."""
        return self.sum / self.count


def measure(wide: ViT, batches: list[Tensor]) -> tuple[list[Moments], list[Moments]]:
    """Moments of the input of every norm (normalised, without scale), and of the hidden units of every MLP."""
    norms = [norm for block in wide.blocks for norm in (block.norm1, block.norm2)] + [wide.norm]
    streams, hidden = [Moments() for _ in norms], [Moments() for _ in wide.blocks]

    def watch(module: nn.Module, moments: Moments, prepare: Callable[[Tensor], Tensor]) -> RemovableHandle:
        return module.register_forward_pre_hook(lambda _, inputs: moments.add(prepare(inputs[0])))

    hooks = [watch(n, m, lambda x: F.layer_norm(x, x.shape[-1:])) for n, m in zip(norms, streams, strict=True)]
    hooks += [watch(b.ffn.down, m, lambda x: x) for b, m in zip(wide.blocks, hidden, strict=True)]
    with torch.no_grad():
        for pixels in batches:
            wide.block_maps(pixels, [wide.depth - 1])
    for hook in hooks:
        hook.remove()
    return streams, hidden


@torch.no_grad()
def slice_vit(wide: ViT, config: ViTConfig, batches: list[Tensor]) -> tuple[ViT, Tensor]:
    """The narrow model, and the projection (d, D) from the wide model's features to what its features approximate.

    ``batches``: normalised images (B, 3, H, W) to measure on. The projection is close to a rotation onto d of D axes.
    """
    streams, hidden = measure(wide, batches)
    basis = _basis(sum(moments.mean[:-1, :-1] for moments in streams), wide.norm.weight, config.width)  # D d
    narrow = ViT(config)
    _embed(narrow, wide, basis)
    for index, (block, source) in enumerate(zip(narrow.blocks, wide.blocks, strict=True)):
        _attention(block, source, streams[2 * index].mean, basis)
        _mlp(block, source, streams[2 * index + 1].mean, hidden[index].mean, basis)
    decode = (
        wide.norm.weight[:, None] * basis * _gain(streams[-1].mean, basis)
    )  # D d: from narrow features to wide ones
    scale = decode.norm(dim=0)
    projection = scale[:, None] * torch.linalg.pinv(decode)  # d D
    narrow.norm.weight.copy_(scale)
    narrow.norm.bias.copy_(projection @ wide.norm.bias)
    return narrow, projection


def _basis(moments: Tensor, final_scale: Tensor, width: int) -> Tensor:
    """Axes (D, d) of the narrow stream: d - 1 principal ones, rotated into d channels whose mean is zero."""
    axes = torch.linalg.eigh(moments)[1][:, -(width - 1) :]  # D d-1
    # rotated among themselves so that the final norm's scale is nearly diagonal in the narrow channels
    axes = axes @ torch.linalg.eigh(axes.T @ (final_scale.square()[:, None] * axes))[1]
    mirror = torch.eye(width)[-1] - torch.full((width,), width**-0.5)  # takes the last axis to the constant one
    mirror /= mirror.norm()
    return axes @ (torch.eye(width) - 2 * torch.outer(mirror, mirror))[:, :-1].T


def _gain(moments: Tensor, basis: Tensor) -> float:
    """The scale by which a norm of the narrow stream equals the wide one's in the basis."""
    second = moments[:-1, :-1]
    share = (basis.T @ second @ basis).trace() / second.trace()
    return float((share * basis.shape[0] / basis.shape[1]).sqrt())


def _embed(narrow: ViT, wide: ViT, basis: Tensor) -> None:
    small, large = wide.patch_px, narrow.patch_px
    image = torch.eye(small * small).view(-1, 1, small, small)
    enlarged = F.interpolate(image, (large, large), mode="bicubic", align_corners=False).flatten(1)  # small^2 large^2
    kernels = wide.patch_embed.weight.flatten(2) @ torch.linalg.pinv(enlarged).T  # as in FlexiViT (arXiv 2212.08013)
    narrow.patch_embed.weight.copy_(
        rearrange(torch.einsum("ok,oci->kci", basis, kernels), "k c (h w) -> k c h w", h=large)
    )
    positions = wide.positions[0]
    narrow.patch_embed.bias.copy_((wide.patch_embed.bias + positions[1:].mean(0)) @ basis)
    narrow.cls_token.copy_((wide.cls_token + positions[:1]) @ basis)
    if narrow.config.registers:
        nn.init.normal_(narrow.registers, std=0.02)


def _attention(block: Block, source: Block, moments: Tensor, basis: Tensor) -> None:
    reads, spread = _reader(source.norm1, source.attention.qkv, basis), _spread(moments, basis)
    block.norm1.weight.fill_(_gain(moments, basis))
    block.norm1.bias.zero_()
    reads[:, :-1] *= block.norm1.weight
    queries, keys, values = rearrange(reads, "(qkv a e) d -> qkv a e d", qkv=3, a=source.attention.heads)  # A E d+1
    writes = basis.T @ (source.scale1[:, None] * source.attention.out.weight)  # d D
    channels = basis.shape[1] // block.attention.heads
    order = _slowest_first(channels)
    new, out = torch.zeros(3, block.attention.heads, channels, reads.shape[1]), []
    root, unroot = spread, torch.linalg.pinv(spread)
    sharper = (channels / queries.shape[1]) ** 0.25  # a score is divided by the root of the head's channels
    for head, written in enumerate(writes.unflatten(1, (block.attention.heads, -1)).unbind(1)):
        left, size, right = torch.linalg.svd(root @ queries[head].T @ keys[head] @ root)
        strength = size[:channels].sqrt() * sharper
        new[0, head, order] = strength[:, None] * (left[:, :channels].T @ unroot)
        new[1, head, order] = strength[:, None] * (right[:channels] @ unroot)
        left, size, right = torch.linalg.svd(written @ values[head] @ root)
        out.append(left[:, :channels] * size[:channels].sqrt())
        new[2, head] = size[:channels].sqrt()[:, None] * (right[:channels] @ unroot)
    flat = rearrange(new, "qkv a e d -> (qkv a e) d")
    flat[:, :-1] /= block.norm1.weight
    block.attention.qkv.weight.copy_(flat[:, :-1])
    block.attention.qkv.bias.copy_(flat[:, -1])
    block.attention.out.weight.copy_(torch.cat(out, dim=1))
    block.attention.out.bias.copy_(basis.T @ (source.scale1 * source.attention.out.bias))


def _mlp(block: Block, source: Block, moments: Tensor, hidden: Tensor, basis: Tensor) -> None:
    kept_count = block.ffn.up.out_features
    writes = source.scale2[:, None] * source.ffn.down.weight  # D hidden
    kept = (hidden.diagonal()[:-1] * writes.square().sum(0)).topk(kept_count).indices
    reads = _reader(source.norm2, source.ffn.up, basis)[kept]
    block.norm2.weight.fill_(_gain(moments, basis))
    block.norm2.bias.zero_()
    block.ffn.up.weight.copy_(reads[:, :-1])
    block.ffn.up.bias.copy_(reads[:, -1])
    # least squares: predict the output of all units from the units that stay and a constant
    known = torch.cat([kept, torch.tensor([len(hidden) - 1])])
    whole = basis.T @ torch.cat([writes, (source.scale2 * source.ffn.down.bias)[:, None]], dim=1)  # d hidden+1
    ridge = 1e-4 * hidden.diagonal().mean() * torch.eye(len(known))
    fitted = torch.linalg.solve(hidden[known][:, known] + ridge, hidden[known] @ whole.T).T  # d kept+1
    block.ffn.down.weight.copy_(fitted[:, :-1])
    block.ffn.down.bias.copy_(fitted[:, -1])


def _reader(norm: nn.LayerNorm, layer: nn.Linear, basis: Tensor) -> Tensor:
    """The layer after a norm, reading the narrow stream, with its bias as last column: (out, d + 1)."""
    bias = layer.weight @ norm.bias + layer.bias
    return torch.cat([layer.weight * norm.weight @ basis, bias[:, None]], dim=1)


def _spread(moments: Tensor, basis: Tensor) -> Tensor:
    """Square root of the second moments of the normalised narrow stream with a 1 appended: (d + 1, d + 1)."""
    wider = torch.block_diag(basis / _gain(moments, basis), torch.ones(1, 1))
    values, axes = torch.linalg.eigh(wider.T @ moments @ wider)
    return axes * values.clamp_min(0).sqrt() @ axes.T


def _slowest_first(channels: int) -> Tensor:
    """Channels of a head, those that rotary positions rotate least first; c is paired with c + channels / 2."""
    quarter = channels // 4
    return torch.tensor([c + part * quarter for c in reversed(range(quarter)) for part in (0, 2, 1, 3)])
