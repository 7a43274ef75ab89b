"""What several test files need: a tiny backbone on disk, written by transformers, and a picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 with random weights as Hugging Face keeps it: width 64, four blocks, patch 14."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14, layerscale_value=0.5
    )
    model = Dinov2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path_factory.mktemp("backbone")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG of 60 x 90 pixels with some structure."""
    y, x = np.mgrid[:60, :90]
    colours = np.stack([x * 2, y * 4, 128 + 100 * np.sin(x / 7) * np.cos(y / 5)], axis=-1).clip(0, 255)
    path = tmp_path_factory.mktemp("pictures") / "waves.png"
    Image.fromarray(colours.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models here are tiny: on busy cores, threads that wait for each other make them ten times slower."""
    torch.set_num_threads(1)
