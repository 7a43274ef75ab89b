"""The public class, on a tiny backbone that transformers wrote."""

import copy
import dataclasses
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_weights
from PIL import Image
from safetensors.torch import load_file, save_file

from brixel import BrixelError, BrixelFeatures, CheckpointError, FeatureMap, ImageError
from brixel.checkpoints.model_folder import read_config
from brixel.inference.memory.strategies import RowChunks
from brixel.model.upsampler import Upsampler


@pytest.fixture(scope="module")
def untrained(backbone_folder):
    return BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu")


@pytest.fixture(scope="module")
def model(backbone_folder):
    """As if trained: the last layer is not zero, running statistics are not those of the start."""
    made = BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu")
    torch.manual_seed(1)
    torch.nn.init.normal_(made.head.out.weight, std=0.1)
    for module in made.adapter.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return made


def test_facts(untrained):
    assert (untrained.embed_dim, untrained.patch_px, untrained.stride_px) == (64, 14, 3.5)
    assert (untrained.dtype, untrained.device) == (torch.float32, torch.device("cpu"))
    assert untrained.config.adapter.blocks == (0, 1, 2, 3)
    assert untrained.config.adapter.short_side_px == 16 * 14
    assert untrained.config.backbone.vit.native_grid == 4
    assert not untrained.training


def test_untrained_models_are_the_backbone_upsampled(untrained, backbone_folder):
    pixels = torch.randn(2, 3, 42, 70)
    bilinear = BrixelFeatures.from_backbone(backbone_folder, adapter="bilinear", device="cpu")
    universal = BrixelFeatures.from_backbone(backbone_folder, device="cpu")
    assert universal.config.adapter.kind == "universal"
    with torch.no_grad():
        low = untrained.backbone_features(pixels)
        assert torch.equal(bilinear(pixels), F.interpolate(low, size=(12, 20), mode="bilinear"))
        assert torch.equal(untrained(pixels), universal(pixels))
        assert (universal(pixels) - bilinear(pixels)).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "scale"),
    [
        *(("universal", 2), ("bilinear", 1), ("fresh", 8)),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("universal", 8), ("fresh", 1), ("fresh", 2))),
    ],
)
def test_other_scales(backbone_folder, image_path, adapter, scale):
    model = BrixelFeatures.from_backbone(backbone_folder, adapter=adapter, device="cpu")
    usual, other = model.extract(image_path), model.extract(image_path, scale=scale)
    rows, columns = (cells * scale // 4 for cells in usual.grid_hw)
    assert abs(other.grid_hw[0] - rows) <= 1
    assert abs(other.grid_hw[1] - columns) <= 1
    assert other.stride == tuple(4 / scale * stride for stride in usual.stride)
    pixels, placement = model.prepare(image_path)
    with torch.no_grad():
        expected = placement.feature_map(model.at_scale(scale)(pixels[None])[0])
    assert torch.equal(other.features, expected.features)
    (chunked,) = RowChunks(3).run(model.at_scale(scale), pixels[None])
    torch.testing.assert_close(placement.feature_map(chunked).features, other.features, rtol=0, atol=1e-4)
    assert model.plan((224, 336), scale=scale, memory_limit="1GiB", short_side_px="native").strategy == "whole"


def test_a_scale_that_is_none_is_refused(untrained, image_path):
    for scale in (0, 33, 2.5, "4", True):
        with pytest.raises(BrixelError, match="scale is .*; expected a whole number of cells per patch, 1 to 32"):
            untrained.extract(image_path, scale=scale)
    config = dataclasses.replace(untrained.config.adapter, generation=1, grids=())
    first = BrixelFeatures(untrained.backbone, Upsampler(64, config), untrained.config)
    with pytest.raises(BrixelError, match="scale is 2; this model's adapter was trained for 4 cells per patch alone"):
        first.extract(image_path, scale=2)


def test_other_adapters_are_refused(backbone_folder):
    with pytest.raises(BrixelError, match="adapter is 'bicubic'; expected one of 'universal', 'bilinear', 'fresh'"):
        BrixelFeatures.from_backbone(backbone_folder, adapter="bicubic")
    with pytest.raises(BrixelError, match=r"blocks=\(0, 1, 2, 3\) goes with adapter='fresh'"):
        BrixelFeatures.from_backbone(backbone_folder, blocks=(0, 1, 2, 3))


@pytest.mark.parametrize("adapter", ["universal", "bilinear", "fresh"])
def test_models_of_every_kind_are_saved_and_loaded(backbone_folder, image_path, tmp_path, adapter):
    model = BrixelFeatures.from_backbone(backbone_folder, adapter=adapter, device="cpu", short_side_px=42)
    model.save_pretrained(tmp_path)
    again = BrixelFeatures.from_pretrained(tmp_path, device="cpu")
    assert again.config == model.config
    assert torch.equal(again.extract(image_path).features, model.extract(image_path).features)


def test_weights_of_eight_bits(backbone_folder, image_path, tmp_path):
    model = BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=42)
    model.save_pretrained(tmp_path / "float", include_backbone=True)
    model.save_pretrained(tmp_path / "int8", include_backbone=True, weights="int8")
    sizes = [(tmp_path / kind / "backbone.safetensors").stat().st_size for kind in ("float", "int8")]
    assert sizes[1] < sizes[0] / 2
    again = BrixelFeatures.from_pretrained(tmp_path / "int8", device="cpu")
    assert again.config.backbone.int8
    for name, weight in model.backbone.state_dict().items():
        step = weight.abs().amax(-1, keepdim=True) / 127 if name.endswith("weight") and weight.ndim == 2 else 0
        # half a step, and float16's rounding
        assert ((again.backbone.state_dict()[name] - weight).abs() <= 0.5 * step + 1e-3 * weight.abs()).all(), name
    cosine = F.cosine_similarity(again.extract(image_path).features, model.extract(image_path).features, dim=0)
    assert cosine.mean() > 0.99
    again.save_pretrained(tmp_path / "again", include_backbone=True)  # as floats, which are not exactly the backbone's
    assert BrixelFeatures.from_pretrained(tmp_path / "again", device="cpu").config == again.config
    given = BrixelFeatures.from_pretrained(tmp_path / "int8", backbone=backbone_folder, device="cpu")
    assert torch.equal(given.extract(image_path).features, model.extract(image_path).features)


def test_weights_of_eight_bits_of_another_backbone_are_noticed(backbone_folder, tmp_path):
    model = BrixelFeatures.from_backbone(backbone_folder, device="cpu")
    model.save_pretrained(tmp_path / "int8", include_backbone=True, weights="int8")
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.copy_(parameter.flip(0))
    model.save_pretrained(tmp_path / "other", include_backbone=True, weights="int8")
    (tmp_path / "other" / "backbone.safetensors").replace(tmp_path / "int8" / "backbone.safetensors")
    with pytest.raises(CheckpointError, match="other weights than the adapter was made for"):
        BrixelFeatures.from_pretrained(tmp_path / "int8", device="cpu")


def test_weights_of_eight_bits_need_the_backbone(untrained, tmp_path):
    with pytest.raises(BrixelError, match="weights='int8' is how the backbone is stored; expected include_backbone"):
        untrained.save_pretrained(tmp_path, weights="int8")
    with pytest.raises(BrixelError, match="weights is 'int4'; expected one of 'float', 'int8'"):
        untrained.save_pretrained(tmp_path, include_backbone=True, weights="int4")


def test_extract_gives_the_map_of_the_prepared_image(model, image_path):
    """The size and the values are those of an image that is prepared by hand, where nothing is padded."""
    image = Image.open(image_path).crop((0, 0, 70, 42))
    rgb = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = model((rgb - mean) / std)[0]
    feature_map = model.extract(image, short_side_px="native")
    torch.testing.assert_close(feature_map.features, expected)
    assert (feature_map.image_hw, feature_map.stride) == ((42, 70), (3.5, 3.5))
    assert feature_map.features.is_contiguous()


def test_padding_is_cut_off(model, image_path):
    """60 x 90 at its own size: 5 x 7 patches of 14 hold it; 18 x 26 of the cells of 3.5 px cover it."""
    feature_map = model.extract(image_path, short_side_px="native")
    assert feature_map.grid_hw == (18, 26)
    assert model.extract_backbone(image_path, short_side_px="native").grid_hw == (5, 7)
    image = np.asarray(Image.open(image_path))
    padded = np.pad(image, ((0, 10), (0, 8), (0, 0)), mode="edge")
    whole = model.extract(padded, short_side_px="native")
    torch.testing.assert_close(feature_map.features, whole.features[:, :18, :26])


@pytest.mark.parametrize("hw", [(60, 90), (90, 60), (1, 1), (7, 300)])
def test_the_short_side_is_resized_to_the_given_size(model, hw):
    feature_map = model.extract(np.full((*hw, 3), 200, np.uint8), short_side_px=28)
    assert min(feature_map.grid_hw) == 8
    assert feature_map.image_hw == hw
    assert feature_map.meta == {
        "backbone": "ViT of width 64, depth 4, patch 14",
        "resized_hw": "x".join(str(round(side * 28 / min(hw))) for side in hw),
        "dtype": "float32",
    }


def test_the_default_size_is_the_adapter_s(model, image_path):
    assert min(model.extract(image_path).grid_hw) == 16 * 4


def test_stream_keeps_order_over_sizes_and_batches(model, image_path):
    image = np.asarray(Image.open(image_path))
    images = [image, image[::-1], image[:40], image[:, ::-1], image_path]
    one_by_one = [model.extract(image, short_side_px=28) for image in images]
    for batch_size in (1, 2, 8):
        streamed = list(model.stream(images, batch_size=batch_size, short_side_px=28))
        for ours, expected in zip(streamed, one_by_one, strict=True):
            assert ours.image_hw == expected.image_hw
            torch.testing.assert_close(ours.features, expected.features, rtol=1e-5, atol=1e-5)


def test_stream_is_lazy(model, image_path):
    def images():
        yield image_path
        raise AssertionError("read too far")

    stream = model.stream(images(), short_side_px=28)
    with pytest.raises(AssertionError, match="too far"):
        assert isinstance(next(stream), FeatureMap)
        next(stream)


def test_extract_is_in_evaluation_mode_and_leaves_the_mode_alone(model, image_path):
    expected = model.extract(image_path, short_side_px=28)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    try:
        ours = model.extract(image_path, short_side_px=28)
        assert model.training
        assert model.adapter.training
    finally:
        model.eval()
    assert torch.equal(ours.features, expected.features)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_parts_keep_their_own_modes(model, image_path):
    model.train()
    model.adapter.prior.eval()  # as a user does who freezes batch norm
    modes = {name: part.training for name, part in model.named_modules()}
    try:
        model.extract(image_path, short_side_px=28)
        assert {name: part.training for name, part in model.named_modules()} == modes
    finally:
        model.eval()


@pytest.mark.slow
def test_threads_may_extract_while_the_model_is_in_training_mode(model, image_path):
    expected = model.extract(image_path, short_side_px=28).features
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    try:
        with ThreadPoolExecutor(4) as pool:
            maps = list(pool.map(lambda _: model.extract(image_path, short_side_px=28).features, range(24)))
    finally:
        assert model.training
        model.eval()
    for features in maps:  # threads of a pool split sums in other ways
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_pixels_of_another_dtype_say_what_to_do(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    with pytest.raises(BrixelError, match=r"float32 on cpu, the model is torch\.bfloat16 .*pixels\.to\(model\.device"):
        half(torch.zeros(1, 3, 28, 28))
    for wrong, message in (
        (torch.zeros(1, 3, 28, 28, dtype=torch.uint8), "uint8"),
        (np.zeros((1, 3, 28, 28)), "ndarray"),
        (None, "NoneType"),
        (torch.zeros(0, 3, 28, 28), "at least one image"),
        (torch.zeros(3, 28, 28), r"expected \(B, 3, H, W\)"),
    ):
        with pytest.raises(BrixelError, match=message):
            model(wrong)


def test_the_backbone_stays_frozen(model):
    made = copy.deepcopy(model).requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in made.backbone.parameters())
    assert all(parameter.requires_grad for parameter in made.head.parameters())


def test_models_can_be_copied_and_pickled(model, image_path):
    expected = model.extract(image_path, short_side_px=28).features
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert made.config == model.config
        assert torch.equal(made.extract(image_path, short_side_px=28).features, expected)


def test_bad_images_and_settings_say_so(model, image_path, tmp_path):
    (tmp_path / "notes.jpg").write_text("no image")
    with pytest.raises(ImageError, match=r"notes\.jpg"):
        model.extract(tmp_path / "notes.jpg")
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        model.extract(tmp_path / "missing.png")
    with pytest.raises(BrixelError, match="short_side_px"):
        model.extract(image_path, short_side_px="big")
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(BrixelError, match="batch_size"):
            model.stream([image_path], batch_size=wrong)
    with pytest.raises(BrixelError, match=r"shape \(1, 3, 30, 28\).*positive multiples of the patch, 14 px"):
        model(torch.zeros(1, 3, 30, 28))


# -------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("include_backbone", [False, True])
def test_save_and_load_give_the_same_bits(model, image_path, tmp_path, include_backbone):
    model.save_pretrained(tmp_path / "made" / "model", include_backbone=include_backbone)
    names = {"config.json", "adapter.safetensors", "README.md"} | (
        {"backbone.safetensors"} if include_backbone else set()
    )
    assert {path.name for path in (tmp_path / "made" / "model").iterdir()} == names
    again = BrixelFeatures.from_pretrained(tmp_path / "made" / "model", device="cpu")
    assert again.config == model.config
    assert_same_weights(again, model)
    assert torch.equal(
        again.extract(image_path, short_side_px=28).features, model.extract(image_path, short_side_px=28).features
    )


def test_a_folder_with_its_backbone_needs_no_other(model, backbone_folder, tmp_path):
    moved = tmp_path / "backbone"
    shutil.copytree(backbone_folder, moved)
    BrixelFeatures.from_backbone(moved, device="cpu").save_pretrained(tmp_path / "whole", include_backbone=True)
    BrixelFeatures.from_backbone(moved, device="cpu").save_pretrained(tmp_path / "part")
    shutil.rmtree(moved)
    BrixelFeatures.from_pretrained(tmp_path / "whole", device="cpu")
    with pytest.raises(CheckpointError, match=r"without its backbone, ViT of width 64.*Give the backbone's folder"):
        BrixelFeatures.from_pretrained(tmp_path / "part")
    BrixelFeatures.from_pretrained(tmp_path / "part", backbone=backbone_folder, device="cpu")


@pytest.mark.slow
def test_a_model_saved_over_another_leaves_nothing_of_it(model, untrained, image_path, tmp_path):
    model.save_pretrained(tmp_path, include_backbone=True)
    untrained.save_pretrained(tmp_path)
    assert not (tmp_path / "backbone.safetensors").exists()
    again = BrixelFeatures.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(again.extract(image_path).features, untrained.extract(image_path).features)


def test_changed_blocks_are_noticed(model, tmp_path):
    model.save_pretrained(tmp_path, include_backbone=True)
    state = load_file(tmp_path / "backbone.safetensors")
    state["blocks.2.attention.qkv.weight"] += 0.1
    save_file(state, tmp_path / "backbone.safetensors")
    with pytest.raises(CheckpointError, match="other weights than the adapter was made for"):
        BrixelFeatures.from_pretrained(tmp_path, device="cpu")


def test_other_weights_of_the_same_shape_are_noticed(model, backbone_folder, tmp_path):
    model.save_pretrained(tmp_path / "model")
    other = tmp_path / "other"
    shutil.copytree(backbone_folder, other)
    state = load_file(other / "model.safetensors")
    state["layernorm.weight"] += 0.5
    torch.save(state, other / "weights.pth")
    with pytest.raises(CheckpointError, match="other weights than the adapter was made for"):
        BrixelFeatures.from_pretrained(tmp_path / "model", backbone=other / "weights.pth", device="cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_copies_of_the_backbone_pass(model, backbone_folder, tmp_path, dtype):
    model.save_pretrained(tmp_path / "model")
    state = load_file(backbone_folder / "model.safetensors")
    torch.save({key: value.to(dtype) for key, value in state.items()}, tmp_path / "half.pth")
    again = BrixelFeatures.from_pretrained(tmp_path / "model", backbone=tmp_path / "half.pth", device="cpu")
    assert again.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2e-2), ("bfloat16", 1e-1)])
def test_dtypes_change_little(model, image_path, tmp_path, dtype, bound):
    """Largest difference over all cells, relative to the map's largest value; weights and arithmetic both rounded."""
    model.save_pretrained(tmp_path)
    half = BrixelFeatures.from_pretrained(tmp_path, device="cpu", dtype=dtype)
    ours, expected = (made.extract(image_path, short_side_px=28).features for made in (half, model))
    assert str(ours.dtype) == f"torch.{dtype}"
    assert (ours.float() - expected).abs().max() < bound * expected.abs().max()


def test_moving_through_another_dtype_and_back_keeps_exact_weights(model, image_path, tmp_path):
    model.save_pretrained(tmp_path)
    moved = BrixelFeatures.from_pretrained(tmp_path, device="cpu").double().float()
    expected = model.extract(image_path, short_side_px=28)
    assert torch.equal(moved.extract(image_path, short_side_px=28).features, expected.features)


@pytest.mark.gpu
def test_the_gpu_gives_what_the_cpu_gives(model, image_path, tmp_path):
    model.save_pretrained(tmp_path)
    moved = BrixelFeatures.from_pretrained(tmp_path, device="cuda", dtype="float32")
    assert moved.device.type == "cuda"
    ours, expected = (made.extract(image_path, short_side_px=28).features for made in (moved, model))
    assert ours.device.type == "cpu"
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)  # TF32 may be on
    back = moved.to("cpu").extract(image_path, short_side_px=28).features
    assert torch.equal(back, expected)


def test_saving_over_a_file_and_failing_midway_leave_files_whole(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BrixelError, match="is a file; expected a folder"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def fail(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("brixel.checkpoints.weight_files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


# -------------------------------------------------------------------- config.json and wrong folders


def edited(model, tmp_path, edit):
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    edit(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("format_version"), "no brixel model's, it lacks format_version"),
        (lambda c: c.update(format_version=99), "format 99, newer than 1.*update brixel"),
        (lambda c: c["adapter"].update(stride=4), "AdapterConfig has no 'stride'"),
        (lambda c: c["adapter"].pop("blocks"), "blocks"),
        (lambda c: c["adapter"].update(blocks=[3, 2, 1, 0]), "ascending"),
        (lambda c: c["adapter"].update(blocks=[0, 1, 1, 2]), "the last must be the backbone's last, 3"),
        (lambda c: c["backbone"]["vit"].update(widht=64), "ViTConfig has no 'widht'; did you mean 'width'"),
        (lambda c: c["backbone"]["vit"].update(width=96), "does not fit"),
        (lambda c: c.update(extra=1), "has unknown parts: extra"),
        (lambda c: c.update(format_version=True), "lacks format_version"),
        (
            lambda c: c["adapter"].update(residual_detour="no"),
            "AdapterConfig.residual_detour is 'no'; expected True",
        ),
        (lambda c: c["adapter"].update(blocks=[0.0, 1, 2, 3]), "expected four indices"),
        (lambda c: c["adapter"].update(blocks=[True, 1, 2, 3]), "expected four indices"),
        (lambda c: c["adapter"].update(blocks=11), "blocks is .11., for a trained adapter; expected four blocks"),
        (lambda c: c["adapter"].update(short_side_px=0), "short_side_px is 0"),
        (lambda c: c["backbone"].update(fingerprint=[]), "other weights"),
        (lambda c: c["backbone"].update(fingerprint=c["backbone"]["fingerprint"][1:], int8=True), "other weights"),
        (
            lambda c: c["backbone"].update(fingerprint=["a"] * 12),
            r"BackboneConfig.fingerprint is \[.*; expected a list of",
        ),
        (lambda c: c["backbone"]["vit"].update(qkv_bias="false"), "qkv_bias is 'false'; expected True or False"),
        (lambda c: c["backbone"]["vit"].update(registers=-1), "registers is -1; expected a whole number from 0 to"),
        (
            lambda c: c["backbone"]["vit"].update(norm_eps="1e-6"),
            "ViTConfig.norm_eps is '1e-6'; expected a finite number",
        ),
        (lambda c: c["backbone"]["vit"].update(std=[0.5, 0, 0.5]), "std is .*; expected three numbers"),
        (lambda c: c["backbone"]["vit"].update(std=[float("nan")] * 3), "not JSON .the number NaN is not finite"),
        (lambda c: c.pop("adapter"), "adapter is None; expected a table"),
        (lambda c: c.update(backbone="abc"), "backbone is 'abc'; expected a table"),
        (lambda c: c["backbone"].update(vit=[1]), r"backbone.vit is \[1\]; expected a table"),
        (lambda c: c["backbone"].update(fingerprint=[10**400]), "fingerprint is .10000.*; expected a list of finite"),
        (
            lambda c: c["backbone"].update(fingerprint=[1e300] * 12),
            "fingerprint is .1e.300",
        ),
        (
            lambda c: c["backbone"].update(architecture="dinov2-small"),
            "names the architecture dinov2-vits14, whose width",
        ),
        (lambda c: c["backbone"].update(architecture=["x"]), "architecture is .'x'.; expected a text"),
        (lambda c: c["backbone"].update(sources={"a": 1}), "sources is .'a': 1.; expected a list"),
        (lambda c: c["backbone"]["vit"].update(depth=10**9), "depth is 1000000000; expected a whole number"),
        (lambda c: c["backbone"]["vit"].update(width=3 * 10**9), "width is 3000000000; expected a whole number"),
        (lambda c: c["backbone"]["vit"].update(ffn_width=2**62), "ffn_width is 46.*; expected a whole number"),
        (lambda c: c["backbone"]["vit"].update(native_grid=10**6), "native_grid is 1000000; expected a whole number"),
        (lambda c: c["backbone"]["vit"].update(rope_theta=0), "rope_theta is 0; expected a finite number above 0"),
        (lambda c: c["backbone"]["vit"].update(depth=1000), "its depth is 4, not 1000"),
        (lambda c: c["backbone"]["vit"].update(ffn_width=2**19), "its feed-forward width is 256, not 524288"),
        (lambda c: c["backbone"]["vit"].update(width=2**16), "its width is 64, not 65536"),
        (lambda c: c["backbone"]["vit"].update(patch_px=1000), "its patch side is 14, not 1000"),
        (lambda c: c["backbone"]["vit"].update(native_grid=4000), "position_embeddings.*model has .1, 16000001, 64"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(model, tmp_path, edit, message):
    with pytest.raises(BrixelError, match=message):
        BrixelFeatures.from_pretrained(edited(model, tmp_path, edit), device="cpu")


def test_the_config_goes_through_its_file_unchanged(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert read_config(tmp_path / "config.json") == model.config


def test_wrong_paths_say_what_was_expected(model, backbone_folder, tmp_path):
    with pytest.raises(BrixelError, match="no model at 'nowhere'"):
        BrixelFeatures.from_pretrained("nowhere")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        BrixelFeatures.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="for a backbone use from_backbone"):
        BrixelFeatures.from_pretrained(backbone_folder)
    with pytest.raises(BrixelError, match="no backbone at 'nowhere'"):
        BrixelFeatures.from_backbone("nowhere")
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        BrixelFeatures.from_pretrained(tmp_path)


def test_an_adapter_of_another_backbone_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path, include_backbone=True)
    state = load_file(tmp_path / "adapter.safetensors")
    del state["head.out.bias"]
    state["adapter.level"] = torch.zeros(32)
    save_file(state, tmp_path / "adapter.safetensors")
    message = r"1 missing: head\.out\.bias; 1 of another shape: adapter\.level \(32,\)"
    with pytest.raises(CheckpointError, match=message):
        BrixelFeatures.from_pretrained(tmp_path, device="cpu")


def test_settings_of_the_vit_can_be_given(backbone_folder):
    given = BrixelFeatures.from_backbone(
        backbone_folder,
        adapter="fresh",
        device="cpu",
        position_antialias=True,
        mean=(0.5, 0.5, 0.5),
        blocks=(0, 0, 1, 3),
        short_side_px=98,
    )
    assert given.config.backbone.vit.position_antialias
    assert given.config.backbone.vit.mean == (0.5, 0.5, 0.5)
    assert given.config.adapter.blocks == (0, 0, 1, 3)
    assert given.config.adapter.short_side_px == 98
    with pytest.raises(BrixelError, match="no setting 'position_antialiasing'; did you mean 'position_antialias'"):
        BrixelFeatures.from_backbone(backbone_folder, position_antialiasing=True)
    with pytest.raises(BrixelError, match="four indices"):
        BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", blocks=(1, 2, 3))
