"""Our ViT against the models of transformers: tiny, all parameters random, saved by them and read by us."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_weights
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
)
from transformers_models import Reference, images, randomise, save_references

from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ViTConfig
from brixel.checkpoints.load_backbone import load_backbone
from brixel.errors import BrixelError, CheckpointError

DEPTH = 3
GRIDS = [(4, 4), (5, 5), (3, 7), (6, 2), (1, 1)]  # 5 x 5 is native to the DINOv2 models


def dinov3(width: int = 128, heads: int = 2, *, gated: bool = False, qkv_bias: bool = True) -> DINOv3ViTModel:
    return DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=width,
            num_hidden_layers=DEPTH,
            num_attention_heads=heads,
            intermediate_size=2 * width,
            use_gated_mlp=gated,
            hidden_act="silu" if gated else "gelu",
            query_bias=qkv_bias,
            value_bias=qkv_bias,
            num_register_tokens=4,
        )
    )


def dinov2_sizes(gated: bool) -> dict[str, Any]:
    return {
        "hidden_size": 96,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 3,
        "mlp_ratio": 2,
        "image_size": 70,
        "patch_size": 14,
        "use_swiglu_ffn": gated,
    }


def dinov2(*, gated: bool = False) -> Dinov2Model:
    return Dinov2Model(Dinov2Config(**dinov2_sizes(gated)))


def dinov2_registers(*, gated: bool = False) -> Dinov2WithRegistersModel:
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**dinov2_sizes(gated), num_register_tokens=4))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "dinov3": dinov3,
    "dinov3-swiglu": lambda: dinov3(64, 1, gated=True),
    "dinov3-7b-like": lambda: dinov3(256, 2, gated=True, qkv_bias=False),  # heads of 128
    "dinov2": dinov2,
    "dinov2-swiglu": lambda: dinov2(gated=True),
    "dinov2-registers": dinov2_registers,
    "dinov2-registers-swiglu": lambda: dinov2_registers(gated=True),
}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    return save_references(MODELS, tmp_path_factory)


@pytest.fixture(scope="module")
def tiny(references: dict[str, Reference]) -> ViT:
    return load_backbone(references["dinov2-registers"][1]).vit


@torch.no_grad()
def reference_maps(model: PreTrainedModel, pixels: Tensor, grid_hw: tuple[int, int]) -> list[Tensor]:
    """Patch tokens of every block, each through the model's final norm, (B, D, h, w)."""
    hidden = model(pixels, output_hidden_states=True).hidden_states
    norm = model.norm if isinstance(model, DINOv3ViTModel) else model.layernorm
    prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    assert len(hidden) == DEPTH + 1
    return [norm(each)[:, prefix:].transpose(1, 2).unflatten(2, grid_hw) for each in hidden[1:]]


# ---- the same numbers ----


@pytest.mark.parametrize("grid_hw", GRIDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_block_as_transformers_computes_it(
    name: str, grid_hw: tuple[int, int], references: dict[str, Reference]
) -> None:
    model, folder = references[name]
    vit = load_backbone(folder).vit
    pixels = images(vit.patch_px, grid_hw)
    expected = reference_maps(model, pixels, grid_hw)
    found = vit.block_maps(pixels, range(DEPTH))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (2, vit.width, *grid_hw)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (expected[0] - expected[-1]).abs().mean() > 0.1  # the blocks do differ


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_ours(name: str, references: dict[str, Reference]) -> None:
    model, folder = references[name]
    vit = load_backbone(folder).vit
    theirs = sum(each.numel() for key, each in model.named_parameters() if "mask_token" not in key)
    key_biases = DEPTH * vit.width if vit.config.positions == "rotary" and vit.config.qkv_bias else 0
    assert sum(each.numel() for each in vit.parameters()) == theirs + key_biases
    assert not any(each.requires_grad for each in vit.parameters())
    assert not vit.training


@pytest.mark.parametrize("name", ["dinov3-7b-like", "dinov2-swiglu"])
def test_shards_hold_the_same_weights(name: str, references: dict[str, Reference], tmp_path: Path) -> None:
    model, folder = references[name]
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    sharded, single = load_backbone(tmp_path).vit, load_backbone(folder).vit
    assert sharded.config == single.config
    assert_same_weights(sharded, single)


def test_configurations_are_read(references: dict[str, Reference]) -> None:
    configs = {name: load_backbone(folder).vit.config for name, (_, folder) in references.items()}
    assert configs["dinov3-7b-like"] == ViTConfig(
        width=256,
        depth=3,
        heads=2,
        patch_px=16,
        ffn="swiglu",
        ffn_width=512,
        positions="rotary",
        norm_eps=1e-5,
        registers=4,
        qkv_bias=False,
    )
    assert configs["dinov2-registers-swiglu"] == ViTConfig(
        width=96,
        depth=3,
        heads=3,
        patch_px=14,
        ffn="swiglu",
        ffn_width=128,  # 2/3 of 192
        positions="learned",
        norm_eps=1e-6,
        registers=4,
        native_grid=5,
        position_antialias=True,
    )
    assert not configs["dinov2"].position_antialias


def test_another_base_of_the_rotary_positions(tmp_path: Path) -> None:
    config = DINOv3ViTConfig(
        hidden_size=64, num_hidden_layers=DEPTH, num_attention_heads=1, num_register_tokens=4, rope_theta=20.0
    )
    model = DINOv3ViTModel(config).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    vit = load_backbone(tmp_path).vit
    assert vit.config.rope_theta == 20
    pixels = images(16, (3, 5))
    torch.testing.assert_close(
        vit.block_maps(pixels, [DEPTH - 1])[0], reference_maps(model, pixels, (3, 5))[-1], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "activation"), [("dinov3-swiglu", "gelu"), ("dinov3", "silu"), ("dinov2", "gelu_pytorch_tanh")]
)
def test_another_activation_is_refused(name: str, activation: str, tmp_path: Path) -> None:
    """It would load, and give other numbers: transformers takes the activation from the configuration."""
    model = MODELS[name]()
    model.config.hidden_act = activation
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"hidden_act is '{activation}'"):
        load_backbone(tmp_path)


def test_bfloat16_stays_near_float32(references: dict[str, Reference]) -> None:
    folder = references["dinov3"][1]
    vit = load_backbone(folder, dtype=torch.bfloat16).vit
    assert {each.dtype for each in vit.parameters()} == {torch.bfloat16}
    pixels = images(16, (4, 4))
    found = vit.block_maps(pixels.bfloat16(), [DEPTH - 1])[0]
    expected = load_backbone(folder).vit.block_maps(pixels, [DEPTH - 1])[0]
    assert found.dtype == torch.bfloat16
    assert torch.cosine_similarity(found.float(), expected).min() > 0.99


# ---- which blocks ----


@pytest.mark.parametrize("blocks", [[2, 0], [1, 1], [0, 2, 1, 2], [2]])
def test_blocks_in_the_order_asked(tiny: ViT, blocks: list[int]) -> None:
    pixels = images(14, (3, 4))
    every = tiny.block_maps(pixels, [0, 1, 2])
    found = tiny.block_maps(pixels, blocks)
    assert len(found) == len(blocks)
    assert all(torch.equal(ours, every[index]) for ours, index in zip(found, blocks, strict=True))


@pytest.mark.parametrize(("blocks", "computed"), [([0], [0]), ([1, 0], [0, 1]), ([1, 1], [0, 1]), ([2], [0, 1, 2])])
def test_no_block_after_the_last_is_computed(tiny: ViT, blocks: list[int], computed: list[int]) -> None:
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, block in enumerate(tiny.blocks)
    ]
    tiny.block_maps(images(14, (2, 2)), blocks)
    for hook in hooks:
        hook.remove()
    assert ran == computed


def test_each_image_for_itself(tiny: ViT) -> None:
    pixels = images(14, (3, 4))
    together = tiny.block_maps(pixels, [2])[0]
    for index in range(2):
        alone = tiny.block_maps(pixels[index : index + 1], [2])[0]
        torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-5)


def test_channels_come_last_in_memory(tiny: ViT) -> None:
    assert tiny.block_maps(images(14, (3, 4)), [2])[0].permute(0, 2, 3, 1).is_contiguous()


# ---- refused ----


@pytest.mark.parametrize("blocks", [[], [3], [-1], [0, 7]])
def test_blocks_that_are_not_there(tiny: ViT, blocks: list[int]) -> None:
    with pytest.raises(BrixelError, match="expected indices from 0 to 2"):
        tiny.block_maps(images(14, (2, 2)), blocks)


@pytest.mark.parametrize("hw", [(28, 30), (15, 28), (0, 28), (13, 13)])
def test_sizes_off_the_patch_grid(tiny: ViT, hw: tuple[int, int]) -> None:
    with pytest.raises(BrixelError, match=rf"{hw[0]}, {hw[1]}\); expected .* positive multiples of the patch, 14 px"):
        tiny.block_maps(torch.zeros(1, 3, *hw), [0])


@pytest.mark.parametrize("shape", [(1, 4, 28, 28), (1, 1, 28, 28), (3, 28, 28), (1, 28, 28, 3)])
def test_pixels_of_another_shape(tiny: ViT, shape: tuple[int, ...]) -> None:
    with pytest.raises(BrixelError, match=r"expected \(B, 3, H, W\)"):
        tiny.block_maps(torch.zeros(shape), [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width is 0; expected a whole number from 1 to"),
        ({"depth": 2.0}, "depth is 2.0; expected a whole number from 1 to"),
        ({"ffn": "gelu"}, "ffn is 'gelu'; expected one of 'mlp', 'swiglu'"),
        ({"gelu": "relu"}, "gelu is 'relu'; expected one of 'exact', 'tanh'"),
        ({"class_token": 1}, "class_token is 1; expected True or False"),
        ({"position_mode": "nearest"}, "expected one of 'bicubic', 'bilinear'"),
        ({"positions": "none"}, "expected one of 'rotary', 'learned'"),
        ({"rope_rounding": "float16"}, "expected one of 'float32', 'bfloat16'"),
        ({"heads": 5}, "width 96 does not divide into 5 heads"),
        ({"heads": 48, "positions": "rotary"}, "multiple of four channels"),
    ],
)
def test_configurations_that_cannot_be(tiny: ViT, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BrixelError, match=message):
        dataclasses.replace(tiny.config, **change)


def test_heads_are_split_without_a_copy(tiny: ViT, monkeypatch: pytest.MonkeyPatch) -> None:
    attend, storages = F.scaled_dot_product_attention, []

    def record(*query_key_value: Tensor) -> Tensor:
        storages.append({tensor.untyped_storage().data_ptr() for tensor in query_key_value})
        return attend(*query_key_value)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    with torch.no_grad():
        tiny.block_maps(images(14, (2, 3)), [0])
    assert [len(pointers) for pointers in storages] == [1]
