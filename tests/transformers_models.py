"""Models of transformers as references: all parameters random, and saved by transformers."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Reference = tuple[PreTrainedModel, Path]
"""A model, and the folder that it was saved to."""


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Move every parameter away from its initial value, so that all of them change the output."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "lambda1" in name:
            parameter.copy_(0.5 + 0.2 * noise)
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif "token" in name or "position" in name:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))


def save_references(
    models: Mapping[str, Callable[[], PreTrainedModel]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Reference]:
    """Each model, in evaluation mode (in training mode DINOv3 rescales its rotary positions at random), and a copy."""
    made = {}
    for name, build in models.items():
        model = build().eval()
        randomise(model)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        made[name] = (model, folder)
    return made


def images(patch_px: int, grid_hw: tuple[int, int], seed: int = 0) -> Tensor:
    """Two images of noise for a patch grid, (2, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, grid_hw[0] * patch_px, grid_hw[1] * patch_px, generator=generator)
