"""A tiny DINOv2 as Meta writes it, for tests of what people put around the weights."""

import torch
from torch import Tensor

from brixel.backbones.vit_config import ViTConfig

WIDTH, HIDDEN, DEPTH, PATCH, GRID = 16, 24, 3, 4, 3
CONFIG = ViTConfig(
    width=WIDTH,
    depth=DEPTH,
    heads=2,
    patch_px=PATCH,
    ffn="mlp",
    ffn_width=HIDDEN,
    positions="learned",
    norm_eps=1e-6,
    native_grid=GRID,
    position_scale_offset=0.1,
)


def dinov2_state(seed: int = 0, grid_hw: tuple[int, int] = (GRID, GRID)) -> dict[str, Tensor]:
    """Random weights that :data:`CONFIG` describes, where the grid is its."""
    layers: dict[str, tuple[int, ...]] = {"patch_embed.proj": (WIDTH, 3, PATCH, PATCH), "norm": (WIDTH,)}
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "mask_token": (1, WIDTH),
        "pos_embed": (1, 1 + grid_hw[0] * grid_hw[1], WIDTH),
    }
    for index in range(DEPTH):
        block = f"blocks.{index}"
        layers |= {f"{block}.norm1": (WIDTH,), f"{block}.norm2": (WIDTH,)}
        layers |= {f"{block}.attn.qkv": (3 * WIDTH, WIDTH), f"{block}.attn.proj": (WIDTH, WIDTH)}
        layers |= {f"{block}.mlp.fc1": (HIDDEN, WIDTH), f"{block}.mlp.fc2": (WIDTH, HIDDEN)}
        shapes |= {f"{block}.ls1.gamma": (WIDTH,), f"{block}.ls2.gamma": (WIDTH,)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}
