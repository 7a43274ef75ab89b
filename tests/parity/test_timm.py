"""Our ViT against timm's, on goldens that timm made: `tests/golden/timm_*.safetensors`.

Each file holds a tiny model with random weights ("weights."), images and the normalised maps of its blocks ("io."),
and in its metadata the sizes ("dims"), the versions ("made") and the script that wrote it ("recipe").
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from safetensors import safe_open
from safetensors.torch import save_file

from brixel.backbones import registry as model_table
from brixel.backbones.registry import KnownBackbone
from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ViTConfig
from brixel.checkpoints import load_backbone as loading
from brixel.checkpoints.load_backbone import load_backbone

GOLDEN = ROOT / "tests" / "golden"
NAMES = ("dinov3_swiglu_qkvb", "dinov2", "dinov2_reg4", "siglip", "siglip_naflex")
GRIDS = {"native": (5, 5), "wide": (3, 8)}


def read_golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Weights, inputs and maps, sizes."""
    with safe_open(GOLDEN / f"timm_{name}.safetensors", framework="pt") as file:
        facts = file.metadata()
        content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    weights = {key.removeprefix("weights."): each for key, each in content.items() if key.startswith("weights.")}
    io = {key.removeprefix("io."): each for key, each in content.items() if key.startswith("io.")}
    assert len(weights) + len(io) == len(content)
    assert facts["made"].startswith("made with timm 1.0.31")
    return weights, io, json.loads(facts["dims"])


def assert_same_maps(vit: ViT, io: Mapping[str, torch.Tensor]) -> None:
    for grid, grid_hw in GRIDS.items():
        maps = vit.block_maps(io[f"{grid}.input"], range(vit.depth))
        for block, found in enumerate(maps):
            assert found.shape == (1, vit.width, *grid_hw)
            torch.testing.assert_close(found, io[f"{grid}.block{block}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_block_as_timm_computes_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, io, dims = read_golden(name)
    save_file(weights, tmp_path / "model.safetensors")
    # recognised by its shapes, so that the settings of timm's files (antialiased positions) come from the key map
    row = KnownBackbone("tiny", ViTConfig(**dims), "mit", "us/tiny", "timm/tiny")
    for module in (loading, model_table):
        monkeypatch.setattr(module, "KNOWN_BACKBONES", {"tiny": row})
    loaded = load_backbone(tmp_path / "model.safetensors")
    assert loaded.architecture == "tiny"
    assert_same_maps(loaded.vit, io)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        *((name, {"position_antialias": True}, {"position_antialias": False}) for name in NAMES[1:]),
        ("siglip_naflex", {"position_mode": "bilinear"}, {"position_mode": "bicubic"}),
    ],
)
def test_the_golden_tells_the_position_rules_apart(
    name: str, right: dict[str, Any], wrong: dict[str, Any], tmp_path: Path
) -> None:
    weights, io, dims = read_golden(name)
    save_file(weights, tmp_path / "model.safetensors")
    other = ViTConfig(**{**dims, **wrong})
    maps = load_backbone(tmp_path, architecture=other).vit.block_maps(io["wide.input"], [1])[0]
    assert (maps - io["wide.block1"]).abs().max() > 0.01
    assert_same_maps(load_backbone(tmp_path, architecture=dataclasses.replace(other, **right)).vit, io)


def test_the_biases_matter(tmp_path: Path) -> None:
    weights, io, dims = read_golden("dinov3_swiglu_qkvb")
    without = {key: each for key, each in weights.items() if not key.endswith(("q_bias", "v_bias"))}
    assert len(weights) - len(without) == 4
    save_file(without, tmp_path / "model.safetensors")
    found = load_backbone(tmp_path, architecture=ViTConfig(**dims)).vit.block_maps(io["wide.input"], [1])[0]
    assert (found - io["wide.block1"]).abs().max() > 0.01
