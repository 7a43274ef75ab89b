"""Backbones that come as modules: models of transformers, a timm-style object, a user's own; saved, loaded, trained."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from brixel import BrixelError, BrixelFeatures, CheckpointError
from brixel.backbones import TimmBackbone, TransformersBackbone
from brixel.backbones.vit_config import IMAGENET_MEAN, IMAGENET_STD, ForeignConfig
from brixel.cli.info import model_facts
from brixel.train import TrainConfig, distill

WIDTH, DEPTH, PATCH = 64, 4, 8
NORMAL = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "image_size": 32}
SIZES |= {"patch_size": PATCH, "intermediate_size": 96}
ALL = tuple(range(DEPTH))


def shaken(model):
    """Weights far enough from their start that norms and scales show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def transformers_model(family, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    return shaken(getattr(transformers, f"{family}Model")(config))


class Own(nn.Module):
    """A user's own ViT, without positions."""

    patch_px, depth, mean, std = PATCH, DEPTH, IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, width=WIDTH):
        super().__init__()
        self.width = width
        self.embed = nn.Conv2d(3, width, PATCH, PATCH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 96, batch_first=True, norm_first=True) for _ in ALL
        )
        self.norm = nn.LayerNorm(width)

    def block_maps(self, pixels, blocks):
        embedded = self.embed(pixels)
        tokens, maps = embedded.flatten(2).mT, []
        for layer in self.layers:
            tokens = layer(tokens)
            maps.append(self.norm(tokens).mT.unflatten(2, embedded.shape[2:]))
        return [maps[index] for index in blocks]


class TimmStyle(Own):
    """The same with the interface of timm's models."""

    block_maps = property()  # what `hasattr` does not find

    def __init__(self, dynamic_img_size=True):
        super().__init__()
        self.embed_dim, self.blocks, self.patch_embed = WIDTH, self.layers, nn.Module()
        self.patch_embed.patch_size = (PATCH, PATCH)
        self.dynamic_img_size = dynamic_img_size
        self.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}

    def forward_intermediates(self, pixels, indices, norm, intermediates_only, output_fmt):
        assert norm
        assert intermediates_only
        assert output_fmt == "NCHW"
        assert indices == sorted(indices)
        return Own.block_maps(self, pixels, indices)


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 3 * PATCH, 5 * PATCH, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- transformers


@pytest.mark.slow
@pytest.mark.parametrize("hw", [(56, 56), (42, 98), (14, 28)])
@pytest.mark.parametrize("registers", [0, 3])
def test_dinov2_is_the_same_as_our_own_vit(tmp_path, hw, registers):
    family = "Dinov2WithRegisters" if registers else "Dinov2"
    extra = {"num_register_tokens": registers} if registers else {}
    model = transformers_model(family, image_size=56, patch_size=14, **extra)
    model.save_pretrained(tmp_path)
    ours = BrixelFeatures.from_backbone(tmp_path, device="cpu")
    theirs = BrixelFeatures.from_backbone(model, mean=ours.config.backbone.vit.mean, std=ours.config.backbone.vit.std)
    pixels = torch.randn(2, 3, *hw)
    blocks = (3, 0, 2)
    with torch.no_grad():
        for one, other in zip(
            theirs.backbone.block_maps(pixels, blocks), ours.backbone.block_maps(pixels, blocks), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(pixels), ours(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "norm", "prefix"),
    [("CLIPVision", "post_layernorm", 1), ("ViT", "layernorm", 1), ("IJepa", "layernorm", 0)],
)
def test_other_families_go_through_their_norm(family, norm, prefix, pixels):
    model = transformers_model(family)
    options = {"pixel_values": pixels, "interpolate_pos_encoding": True}
    with torch.no_grad():
        states = model(**options, output_hidden_states=True).hidden_states
        expected = [getattr(model, norm)(states[index + 1])[:, prefix:] for index in ALL]
        dense = BrixelFeatures.from_backbone(model, **NORMAL)
        maps = dense.backbone.block_maps(pixels, ALL)
        assert dense(pixels).shape == (2, WIDTH, 12, 20)
    for one, tokens in zip(maps, expected, strict=True):
        assert one.shape == (2, WIDTH, 3, 5)
        torch.testing.assert_close(one.flatten(2).mT, tokens)


def test_a_last_state_that_is_normed_already_is_not_normed_again(pixels):
    """Where transformers ties the last hidden state to its output, as the config can say."""
    model = transformers_model("ViT")
    plain = TransformersBackbone(model, **NORMAL)
    model.config.tie_last_hidden_states = True
    tied = TransformersBackbone(model, **NORMAL)
    assert (plain._last_is_normed, tied._last_is_normed) == (False, True)
    with torch.no_grad():
        expected = model(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
        torch.testing.assert_close(tied.block_maps(pixels, ALL)[-1].flatten(2).mT, expected)


def test_rotary_positions_and_registers_of_dinov3(pixels):
    model = transformers_model("DINOv3ViT", num_register_tokens=4)
    backbone = TransformersBackbone(model, **NORMAL)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state[:, 5:]
        torch.testing.assert_close(backbone.block_maps(pixels, (DEPTH - 1,))[0].flatten(2).mT, expected)


def test_heads_and_text_towers_are_left_aside():
    config = transformers.ViTConfig(**SIZES)
    assert TransformersBackbone(transformers.ViTForImageClassification(config), **NORMAL).width == WIDTH
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    both = transformers.CLIPConfig(text_config={**text, "vocab_size": 20}, vision_config=SIZES)
    backbone = TransformersBackbone(transformers.CLIPModel(both), **NORMAL)
    assert (backbone.width, backbone.depth, backbone.patch_px) == (WIDTH, DEPTH, PATCH)


def test_mean_and_deviation_of_an_image_processor():
    class Processor:
        image_mean, image_std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]

    backbone = TransformersBackbone(transformers_model("ViT"), Processor())
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


# ---------------------------------------------------------------- timm, and a user's own


def test_a_timm_style_model_is_the_same_as_its_twin(pixels):
    twin, style = Own(), TimmStyle()
    style.load_state_dict(twin.state_dict() | style.state_dict() | twin.state_dict())
    style.blocks = style.layers
    model = BrixelFeatures.from_backbone(style, adapter="fresh")
    assert isinstance(model.backbone, TimmBackbone)
    assert model.config.backbone.vit == ForeignConfig(
        "TimmStyle", WIDTH, DEPTH, PATCH, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    )
    order = (3, 0, 3, 1)
    with torch.no_grad():
        ours, theirs = model.backbone.block_maps(pixels, order), twin.eval().block_maps(pixels, order)
    torch.testing.assert_close(ours, theirs)


def test_a_users_own(image_path):
    own = Own().train()
    model = BrixelFeatures.from_backbone(own, adapter="fresh", short_side_px=32)
    assert model.backbone is own
    assert not own.training
    assert not any(parameter.requires_grad for parameter in own.parameters())
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert (model.embed_dim, model.patch_px, model.device.type, model.dtype) == (WIDTH, PATCH, "cpu", torch.float32)
    features = model.extract(image_path)
    assert features.features.shape == (WIDTH, 16, 24)
    assert features.meta["backbone"] == "Own of width 64, depth 4, patch 8"


def test_a_module_stays_in_its_dtype_unless_another_is_asked_for():
    assert BrixelFeatures.from_backbone(Own().double()).dtype == torch.float64
    model = BrixelFeatures.from_backbone(Own().double(), dtype="float32", device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_our_own_vit_as_a_module(backbone_folder, tmp_path):
    vit = BrixelFeatures.from_backbone(backbone_folder, device="cpu").backbone
    model = BrixelFeatures.from_backbone(vit)
    model.save_pretrained(tmp_path, include_backbone=True)
    assert BrixelFeatures.from_pretrained(tmp_path, device="cpu").config.backbone.vit == vit.config
    assert BrixelFeatures.from_pretrained(tmp_path, backbone=vit).backbone is vit


# ---------------------------------------------------------------- wrapped, of torch.hub, NaFlex


class Averaged(nn.Module):
    """As averages of weights and trainers keep a module."""

    def __init__(self, module):
        super().__init__()
        self.register_buffer("n_averaged", torch.tensor(3))
        self.module = module

    def forward(self, *inputs, **named):
        return self.module(*inputs, **named)


def compiled(module):
    return torch.compile(module, backend="eager")


WRAPPERS = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "an average": Averaged,
    "compile of DataParallel": lambda module: compiled(nn.DataParallel(module)),
    "an average of compile of an average": lambda module: Averaged(compiled(Averaged(module))),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", [Own, TimmStyle, lambda: transformers_model("ViT")], ids=["own", "timm", "hf"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_modules_are_unwrapped(wrapper, make, pixels, tmp_path):
    module = make()
    fields = NORMAL if isinstance(module, transformers.PreTrainedModel) else {}
    plain = BrixelFeatures.from_backbone(module, **fields)
    model = BrixelFeatures.from_backbone(WRAPPERS[wrapper](module), **fields)
    assert model.config == plain.config
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), plain(pixels), rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    again = BrixelFeatures.from_pretrained(tmp_path, backbone=WRAPPERS[wrapper](module))
    assert again.config == plain.config


class FSDPOfVersionOne(nn.Module):
    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


def test_weights_in_parts_are_refused():
    for module in (FSDPOfVersionOne(Own()), nn.Sequential(FSDPOfVersionOne(Own()))):
        with pytest.raises(BrixelError, match="is sharded by FSDP, .* give the plain module, with .*full_state_dict"):
            BrixelFeatures.from_backbone(module)


class HubStyle(Own):
    """The same with the interface of the models that Meta's repositories give by torch.hub."""

    block_maps = property()

    def __init__(self, chunks=False):
        super().__init__()
        self.embed_dim, self.n_blocks, self.patch_size, self.blocks = WIDTH, DEPTH, PATCH, self.layers
        if chunks:
            self.blocks = nn.ModuleList([nn.ModuleList(self.layers[:2]), nn.ModuleList(self.layers[2:])])

    def get_intermediate_layers(self, x, n=1, reshape=False, return_class_token=False, norm=True):
        assert reshape
        assert norm
        assert list(n) == sorted(n)
        return tuple(Own.block_maps(self, x, n))


@pytest.mark.parametrize("chunks", [False, True])
def test_a_model_of_torch_hub_is_the_same_as_its_twin(chunks, pixels):
    style, twin = HubStyle(chunks), Own().eval()
    twin.load_state_dict({name: style.state_dict()[name] for name in twin.state_dict()})
    model = BrixelFeatures.from_backbone(style, adapter="fresh", mean=0.5, std=(0.1, 0.2, 0.3))
    vit = ForeignConfig("HubStyle", WIDTH, DEPTH, PATCH, (0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    assert model.config.backbone.vit == vit
    order = (3, 0, 3, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone.block_maps(pixels, order), twin.block_maps(pixels, order))
    with pytest.raises(BrixelError, match="HubStyle does not say how its images are normalised; give mean="):
        BrixelFeatures.from_backbone(style)


def test_an_older_model_of_torch_hub_says_what_to_do():
    class Older(HubStyle):
        def get_intermediate_layers(self, x, n=1):
            return Own.block_maps(self, x, range(DEPTH - n, DEPTH))

    with pytest.raises(
        BrixelError, match=r"of Older has no argument norm, reshape; .*torch.save\(module.state_dict\(\)"
    ):
        BrixelFeatures.from_backbone(Older(), **NORMAL)


def test_naflex_is_the_same_as_our_own_vit(tmp_path):
    settings = {**SIZES, "num_patches": 16}
    model = shaken(transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**settings)))
    model.save_pretrained(tmp_path)
    ours = BrixelFeatures.from_backbone(tmp_path, device="cpu")
    theirs = BrixelFeatures.from_backbone(model, mean=0.5, std=0.5)
    for grid in ((4, 4), (3, 5), (1, 2)):
        pixels = torch.randn(2, 3, grid[0] * PATCH, grid[1] * PATCH)
        with torch.no_grad():
            one, other = theirs.backbone.block_maps(pixels, (3, 0)), ours.backbone.block_maps(pixels, (3, 0))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- normalisation


def test_a_mean_for_another_scale_is_refused_with_the_one_to_give():
    big = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
    for make in (lambda: transformers_model("ViT"), TimmStyle, HubStyle):
        with pytest.raises(BrixelError, match=r"for pixels from 0 to 255; .*give mean=\(0.485, 0.456, 0.406\)"):
            BrixelFeatures.from_backbone(make(), **big)
    with pytest.raises(BrixelError, match=r"Own.mean is \(123.675, .*give mean=\(0.485, 0.456, 0.406\)"):
        BrixelFeatures.from_backbone(changed(**big))


def test_one_number_stands_for_three(pixels):
    plain = BrixelFeatures.from_backbone(transformers_model("ViT"), mean=(0.5,) * 3, std=(0.25,) * 3)
    for half, quarter in (
        (0.5, 0.25),
        (torch.tensor(0.5), torch.full((3,), 0.25)),
        (np.full(3, 0.5), np.float32(0.25)),
    ):
        model = BrixelFeatures.from_backbone(transformers_model("ViT"), mean=half, std=quarter)
        assert model.config == plain.config
    own = BrixelFeatures.from_backbone(changed(mean=0.5, std=1))
    assert (own.config.backbone.vit.mean, own.config.backbone.vit.std) == ((0.5,) * 3, (1.0,) * 3)


def test_a_processor_that_does_not_rescale():
    class Processor:
        do_rescale, image_mean, image_std = False, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]

    class Both:
        image_processor = Processor()

    for processor in (Processor(), Both(), {"image_mean": 1.0, "image_std": 1.0, "rescale_factor": 1 / 127.5}):
        backbone = TransformersBackbone(transformers_model("ViT"), processor)
        expected = (0.5, 0.5, 0.5) if isinstance(processor, dict) else (0.485, 0.456, 0.406)
        assert backbone.mean == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- saved and loaded, trained


@pytest.mark.slow
@pytest.mark.parametrize("make", [Own, TimmStyle, lambda: transformers_model("Dinov2")])
def test_saved_and_loaded(make, tmp_path, pixels):
    module = make()
    fields = NORMAL if isinstance(module, transformers.PreTrainedModel) else {}
    model = BrixelFeatures.from_backbone(module, adapter="fresh", blocks=(0, 0, 1, 3), **fields)
    shaken(model.head)
    model.save_pretrained(tmp_path)
    again = BrixelFeatures.from_pretrained(tmp_path, backbone=module)
    assert again.config == model.config
    with torch.no_grad():
        torch.testing.assert_close(again(pixels), model(pixels), rtol=0, atol=0)
    saved = json.loads((tmp_path / "config.json").read_text())["backbone"]
    assert saved["vit"]["class_name"] == type(module).__name__
    assert saved["fingerprint"]
    facts = model_facts(tmp_path)
    assert (facts["width"], facts["depth"]) == (64, 4)


@pytest.mark.slow
def test_a_short_run(tmp_path):
    (tmp_path / "images").mkdir()
    for shade in (30, 120, 210):
        Image.linear_gradient("L").resize((140, 90)).point(lambda v, s=shade: (v + s) % 256).convert("RGB").save(
            tmp_path / "images" / f"{shade}.png"
        )
    settings = {"steps": 2, "batch_size": 2, "warmup": 1, "workers": 0, "device": "cpu", "teacher_px": 64, "fit": 4}
    images = (str(tmp_path / "images"),)
    config = TrainConfig(backbone="my own", images=images, val=images, out=str(tmp_path / "out"), **settings)
    own = Own()
    before = {name: weight.clone() for name, weight in own.state_dict().items()}
    model = distill(config, model=BrixelFeatures.from_backbone(own, adapter="fresh"))
    torch.testing.assert_close(own.state_dict(), before, rtol=0, atol=0)
    again = BrixelFeatures.from_pretrained(tmp_path / "out", backbone=own)
    assert again.config.adapter.short_side_px == 16
    torch.testing.assert_close(again.head.state_dict(), model.head.state_dict(), rtol=0, atol=0)


# ---------------------------------------------------------------- errors


def changed(**attributes):
    own = Own()
    for name, value in attributes.items():
        setattr(own, name, value)
    return own


def raising(pixels, blocks):
    raise KeyError("positions")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Linear(2, 2),
            "Linear has no width, patch_px, depth, mean, std, block_maps; expected a module with",
        ),
        (
            lambda: type("Half", (nn.Module,), {"block_maps": raising, "width": 64})(),
            "Half has no patch_px, depth, mean, std;",
        ),
        (lambda: Own(80), "the backbone is 80 wide; a trained adapter needs a multiple of 32"),
        (lambda: changed(width="64"), "Own.width is '64'; expected a whole number from 1 to"),
        (lambda: changed(mean=(0.5, 0.5)), r"Own.mean is \(0.5, 0.5\); expected three numbers"),
        (lambda: changed(std=(0, 1, 1)), r"Own.std is \(0, 1, 1\); expected three numbers"),
        (lambda: changed(depth=3), "a backbone of 3 blocks has no default choice"),
        (lambda: changed(width=96), r"gave shapes \[\(1, 64, 1, 2\), .*; expected a list of 4 tensors \(1, 96, 1, 2\)"),
        (lambda: changed(block_maps=lambda pixels, blocks: pixels), "gave a Tensor; expected a list of 4 tensors"),
        (lambda: changed(block_maps=lambda pixels, blocks: [1, 2]), "gave a list; expected a list of 4 tensors"),
        (
            lambda: changed(block_maps=raising),
            r"\(1, 3, 8, 16\) and blocks \[0, 1, 2, 3\] raised KeyError: 'positions'",
        ),
        (lambda: TimmStyle(dynamic_img_size=False), "one size; give dynamic_img_size=True to timm.create_model"),
        (lambda: transformers_model("ViT"), "ViTModel does not say how its images are normalised; give mean="),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(BrixelError, match=message):
        BrixelFeatures.from_backbone(make(), adapter="fresh")


def test_models_of_another_kind_are_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=20))
    with pytest.raises(BrixelError, match="BertModel has no patch_size; expected a vision transformer"):
        BrixelFeatures.from_backbone(text, **NORMAL)
    oblong = transformers_model("ViT")
    oblong.config.patch_size = (8, 4)
    with pytest.raises(BrixelError, match=r"patches of \(8, 4\) px; expected square ones"):
        BrixelFeatures.from_backbone(oblong, **NORMAL)
    shallow = transformers_model("ViT")
    shallow.config.num_hidden_layers = 6
    with pytest.raises(BrixelError, match="ViTModel gave as hidden states 5, .*; expected 7 of"):
        BrixelFeatures.from_backbone(shallow, adapter="fresh", **NORMAL)


def test_what_is_no_module():
    with pytest.raises(BrixelError, match="the backbone is a dict; expected a path or a name, or a torch module"):
        BrixelFeatures.from_backbone({})


def test_settings_of_files_are_refused_for_modules():
    with pytest.raises(
        BrixelError, match="revision, architecture, rope_theta: not for a backbone that is a module, Own"
    ):
        BrixelFeatures.from_backbone(Own(), revision="main", architecture="dinov2-small", rope_theta=1.0)
    with pytest.raises(BrixelError, match="Own has mean and std of its own"):
        BrixelFeatures.from_backbone(Own(), mean=IMAGENET_MEAN)


@pytest.mark.parametrize("make", [lambda: transformers_model("ViT"), TimmStyle])
def test_pixels_that_are_no_whole_patches(make):
    module = make()
    fields = NORMAL if isinstance(module, transformers.PreTrainedModel) else {}
    model = BrixelFeatures.from_backbone(module, adapter="fresh", **fields)
    with pytest.raises(
        BrixelError, match=r"pixels have shape \(1, 3, 8, 12\); expected \(B, 3, H, W\), H and W multiples"
    ):
        model(torch.zeros(1, 3, 8, 12))


def test_a_folder_without_its_module(tmp_path):
    own = Own()
    model = BrixelFeatures.from_backbone(own)
    with pytest.raises(BrixelError, match="Own of width 64, depth 4, patch 8, and cannot be included"):
        model.save_pretrained(tmp_path / "whole", include_backbone=True)
    assert not (tmp_path / "whole").exists()
    model.save_pretrained(tmp_path)
    for given in (None, tmp_path):
        with pytest.raises(CheckpointError, match="holds an adapter for Own of width 64, .* backbone=module"):
            BrixelFeatures.from_pretrained(tmp_path, backbone=given)
    with pytest.raises(CheckpointError, match="whose patch_px is 8; that of the Own given is 16"):
        BrixelFeatures.from_pretrained(tmp_path, backbone=changed(patch_px=16))
    with pytest.raises(
        CheckpointError, match="backbone=Own has the shape of Own .* but other weights than the adapter"
    ):
        BrixelFeatures.from_pretrained(tmp_path, backbone=Own())
    assert BrixelFeatures.from_pretrained(tmp_path, backbone=own.bfloat16()).dtype == torch.bfloat16
