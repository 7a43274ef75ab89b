"""The Vision Transformer of DINOv3, DINOv2 and SigLIP for inference: images in, normalised maps of any blocks out.

One model for all families; they differ only in the fields of :class:`ViTConfig`. The backbone is frozen, so masking,
drop path, the random rescaling of rotary positions in training and pooling heads are left out.
Papers: DINOv3 arXiv 2508.10104, DINOv2 arXiv 2304.07193, registers arXiv 2309.16588, SigLIP arXiv 2303.15343, SigLIP 2
arXiv 2502.14786. Facts: `docs/backbones.md`.

Shapes: B batch, D width, h x w patch grid, N = prefix + h*w tokens (prefix: class token, registers), A attention
heads, E = D / A.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from brixel.backbones.position_embeddings import interpolate_positions, rotary_periods, rotary_table, rotate
from brixel.backbones.vit_config import ViTConfig
from brixel.errors import BrixelError
from brixel.utils.tensor_kinds import not_plain


class Attention(nn.Module):
    """Multi-head self-attention with fused q, k, v."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, N, D) -> (B, N, D); ``rotary`` is what :func:`rotary_table` returns, or None."""
        qkv = rearrange(self.qkv(x), "B N (qkv A E) -> B A qkv N E", qkv=3, A=self.heads)  # a view
        query_key, value = qkv[:, :, :2], qkv[:, :, 2]  # B A 2 N E, B A N E
        if rotary is not None:
            query_key = rotate(query_key, *rotary)
        query, key = query_key.unbind(2)  # B A N E
        mixed = F.scaled_dot_product_attention(query, key, value)  # B A N E
        return self.out(rearrange(mixed, "B A N E -> B N (A E)"))


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.approximate = "tanh" if config.gelu == "tanh" else "none"
        self.up = nn.Linear(config.width, config.ffn_width)
        self.down = nn.Linear(config.ffn_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class SwiGlu(nn.Module):
    """A gated feed-forward: down(silu(gate) * up), gate and up fused in one layer, gate first."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.ffn_width)
        self.down = nn.Linear(config.ffn_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each scaled per channel (LayerScale) if the family has it."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.scale1 = _layer_scale(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.ffn = Mlp(config) if config.ffn == "mlp" else SwiGlu(config)
        self.scale2 = _layer_scale(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = _add(x, self.attention(self.norm1(x), rotary), self.scale1)
        return _add(x, self.ffn(self.norm2(x)), self.scale2)


def _layer_scale(config: ViTConfig) -> nn.Parameter | None:
    return nn.Parameter(torch.ones(config.width)) if config.layer_scale else None


def _add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """A branch added to its input (B, N, D), scaled per channel (D) or not."""
    return x + branch if scale is None else torch.addcmul(x, scale, branch)


class ViT(nn.Module):
    """The backbone. `checkpoints/backbone_key_maps.py` maps the parameter names of other formats to these."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.width, self.depth, self.patch_px = config.width, config.depth, config.patch_px
        self.mean, self.std = config.mean, config.std
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_px, config.patch_px)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        if config.registers:
            self.registers = nn.Parameter(torch.zeros(1, config.registers, config.width))
        if config.positions == "learned":
            rows, columns = config.native_hw
            self.positions = nn.Parameter(torch.zeros(1, config.class_token + rows * columns, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def block_maps(self, pixels: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Compute the patch tokens after the given blocks, each through the final LayerNorm, as maps.

        Args:
            pixels: (B, 3, H, W), normalised, H and W multiples of ``patch_px``.
            blocks: Indices of blocks, from 0, in any order; no block after the last of them is computed.

        Returns:
            One map (B, D, h, w) per entry of ``blocks``, in that order; a view of the tokens, channels last in memory.

        Raises:
            BrixelError: An index is not a block's, or the pixels have another shape, dtype or device.
        """
        x, rotary, grid_hw = self.embed(pixels, blocks)
        maps = {}
        for index in range(max(blocks) + 1):
            x = self.blocks[index](x, rotary)
            if index in blocks:
                maps[index] = self.map_after(x, grid_hw)
        return [maps[index] for index in blocks]

    def embed(
        self, pixels: Tensor, blocks: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None, tuple[int, int]]:
        """The input of the first block (B, N, D), the rotary tables or None, and the patch grid.

        Checks ``pixels`` and ``blocks``, which are those of :meth:`block_maps`.
        """
        self._check(pixels, blocks)
        grid_hw = (pixels.shape[2] // self.patch_px, pixels.shape[3] // self.patch_px)
        x = self._embed(pixels, grid_hw)  # B N D
        return x, self._rotary(grid_hw, x) if self.config.positions == "rotary" else None, grid_hw

    def map_after(self, x: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """The patch tokens of ``x`` (B, N, D), through the final norm, as a map (B, D, h, w)."""
        patches = self.norm(x[:, self.config.prefix :])
        return rearrange(patches, "B (h w) D -> B D h w", h=grid_hw[0], w=grid_hw[1])

    def _check(self, pixels: Tensor, blocks: Sequence[int]) -> None:
        if not blocks or any(not 0 <= index < self.depth for index in blocks):
            raise BrixelError(f"blocks are {list(blocks)}; expected indices from 0 to {self.depth - 1}")
        if not isinstance(pixels, Tensor):
            raise BrixelError(f"pixels are a {type(pixels).__name__}; expected a tensor (B, 3, H, W)")
        if not pixels.is_meta and (problem := not_plain(pixels)):
            raise BrixelError(f"pixels: the tensor {problem}")
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise BrixelError(f"pixels have shape {tuple(pixels.shape)}; expected (B, 3, H, W)")
        weight = self.norm.weight
        cast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        if pixels.device != weight.device or (pixels.dtype != weight.dtype and not cast):
            raise BrixelError(
                f"pixels are {pixels.dtype} on {pixels.device}, the model is {weight.dtype} on {weight.device}; "
                "give pixels.to(model.device, model.dtype)"
            )
        height, width = pixels.shape[2:]
        if height % self.patch_px or width % self.patch_px or not pixels.shape[0] * height * width:
            raise BrixelError(
                f"pixels have shape {tuple(pixels.shape)}; expected at least one image, H and W positive "
                f"multiples of the patch, {self.patch_px} px: pad or resize the image, or let extract() do so"
            )

    def _embed(self, pixels: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """Prefix tokens, then patches with their positions: (B, N, D)."""
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)  # B h*w D
        learned = self.config.positions == "learned"
        if learned:
            patches = patches + self._learned_positions(grid_hw)
        prefix: list[Tensor] = []
        if self.config.class_token:
            prefix.append(self.cls_token + self.positions[:, :1] if learned else self.cls_token)
        if self.config.registers:
            prefix.append(self.registers)  # without a position
        return torch.cat([*(tokens.expand(pixels.shape[0], -1, -1) for tokens in prefix), patches], dim=1)

    def _learned_positions(self, grid_hw: tuple[int, int]) -> Tensor:
        positions = self.positions[:, self.config.class_token :].float()  # without the class token's
        positions = rearrange(positions, "1 (h0 w0) D -> 1 D h0 w0", h0=self.config.native_hw[0])
        resized = interpolate_positions(
            positions,
            grid_hw,
            antialias=self.config.position_antialias,
            scale_offset=self.config.position_scale_offset,
            mode=self.config.position_mode,
        )
        return resized.flatten(2).transpose(1, 2).to(self.positions.dtype)  # 1 h*w D

    def _rotary(self, grid_hw: tuple[int, int], tokens: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        rounding = torch.bfloat16 if config.rope_rounding == "bfloat16" else torch.float32
        periods = rotary_periods(config.width // config.heads, config.rope_theta, rounding).to(tokens.device)
        cosine, sine = rotary_table(grid_hw, periods, prefix=config.prefix)
        return cosine.to(tokens.dtype), sine.to(tokens.dtype)
