"""Models of four blocks that all tests of inference share: predictions of memory are kept per model."""

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from brixel import BrixelFeatures
from brixel.backbones.registry import known_backbone
from brixel.backbones.vit import ViT
from brixel.model.config import AdapterConfig, BackboneConfig, BrixelConfig
from brixel.model.upsampler import make_upsampler


@pytest.fixture(scope="session")
def tiny() -> BrixelFeatures:
    """The bundled model with four of its twelve blocks, as a prediction takes its time block by block."""
    bundled = BrixelFeatures.from_pretrained("brixel-tiny", device="cpu")
    adapter = dataclasses.replace(bundled.config.adapter, blocks=(0, 1, 2, 3))
    vit = dataclasses.replace(bundled.config.backbone.vit, depth=4)
    config = dataclasses.replace(
        bundled.config, adapter=adapter, backbone=dataclasses.replace(bundled.config.backbone, vit=vit)
    )
    backbone, state = ViT(vit), bundled.backbone.state_dict()
    backbone.load_state_dict({name: state[name] for name in backbone.state_dict()})
    gc.freeze()  # loading imports much of torch, and every attempt that fails searches for garbage
    return BrixelFeatures(backbone, bundled.upsampler, config).eval()


@pytest.fixture(scope="session")
def random_model() -> Callable[..., BrixelFeatures]:
    """Makes a small model in which every weight matters: width 64, four blocks; images of two patches a side."""

    def make(architecture: str, *, blend: bool = False, detour: bool = False, **fields: Any) -> BrixelFeatures:
        torch.manual_seed(0)
        vit = dataclasses.replace(known_backbone(architecture).vit, depth=4, width=64, heads=4)
        blocks = (0, 1, 2, 3) if fields.get("kind", "trained") == "trained" else (3,)
        adapter = AdapterConfig(blocks, detour, short_side_px=2 * vit.patch_px, blend=blend, **fields)
        config = BrixelConfig(BackboneConfig(None, (), vit, ()), adapter)
        model = BrixelFeatures(ViT(vit), make_upsampler(vit, adapter), config)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
        return model

    return make


@pytest.fixture(scope="session")
def patch14(random_model) -> BrixelFeatures:
    """A random DINOv2: patches of 14 px, learned positions, a fresh adapter's blend."""
    return random_model("dinov2-vits14", blend=True, detour=False)


@pytest.fixture(scope="session")
def guided(random_model) -> BrixelFeatures:
    """A random DINOv2 with the universal upsampler, of random weights."""
    return random_model("dinov2-vits14", kind="universal")


@pytest.fixture(scope="session")
def second(random_model) -> BrixelFeatures:
    """A random DINOv3 with a trained upsampler of the second generation."""
    return random_model("dinov3-vits16", blend=True, generation=2, grids=(2, 4))


@pytest.fixture(scope="session")
def waves() -> np.ndarray:
    """An image of 130 x 260 pixels with some structure."""
    y, x = np.mgrid[:130, :260]
    colours = np.stack([x * 0.9, y * 1.9, 128 + 100 * np.sin(x / 7) * np.cos(y / 5)], axis=-1).clip(0, 255)
    return colours.astype(np.uint8)
