"""Folders that transformers writes for models with heads, in every spelling of their configuration."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers_models import images, randomise

from brixel.checkpoints.load_backbone import load_backbone
from brixel.errors import CheckpointError

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
DINOV2 = {**SIZES, "image_size": 56, "patch_size": 14, "mlp_ratio": 2}
DINOV3 = {**SIZES, "patch_size": 16, "intermediate_size": 64, "num_register_tokens": 2}
VISION = {**SIZES, "image_size": 64, "num_patches": 16, "patch_size": 16, "intermediate_size": 64}
TEXT = {**SIZES, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 40}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def dinov2(**settings: Any) -> PreTrainedModel:
    return transformers.Dinov2Model(transformers.Dinov2Config(**{**DINOV2, **settings}))


def depth() -> PreTrainedModel:
    stages = {"out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
    config = transformers.DepthAnythingConfig(
        backbone_config=transformers.Dinov2Config(**DINOV2, **stages),
        **{"reassemble_hidden_size": 32, "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8},
    )
    return transformers.DepthAnythingForDepthEstimation(config)


def siglip(family: str) -> PreTrainedModel:
    config = getattr(transformers, f"{family}Config")(vision_config=VISION, text_config=TEXT, num_labels=3)
    return getattr(transformers, f"{family}ForImageClassification")(config)


# the model, its vision transformer, and the heads that are left aside
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[Any], Any], str]] = {
    "dinov2": (
        lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**DINOV2, num_labels=3)),
        lambda model: model.dinov2,
        "classifier",
    ),
    "dinov2 with registers": (
        lambda: transformers.Dinov2WithRegistersForImageClassification(
            transformers.Dinov2WithRegistersConfig(**DINOV2, num_labels=3)
        ),
        lambda model: model.dinov2_with_registers,
        "classifier",
    ),
    "depth": (depth, lambda model: model.backbone, "neck, head"),
    "siglip": (lambda: siglip("Siglip"), lambda model: model.vision_model, "classifier"),
    "siglip2": (lambda: siglip("Siglip2"), lambda model: model.vision_model, "classifier"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_a_head_gives_its_backbone(name: str, tmp_path: Path, caplog: Any) -> None:
    make, backbone_of, heads = MODELS[name]
    model = make().eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    vit = load_backbone(tmp_path).vit
    (message,) = [record.getMessage() for record in caplog.records if record.name == "brixel"]
    assert message.startswith(f"{tmp_path}: left aside, as not of the backbone: ")
    assert all(head in message for head in heads.split(", "))
    norm = "post_layernorm" if name.startswith("siglip") else "layernorm"
    assert torch.equal(vit.norm.weight, backbone_of(model).get_submodule(norm).weight)
    assert (vit.depth, vit.width) == (4, 32)


@pytest.mark.parametrize(
    ("stated", "native"),
    [
        ({"image_size": [56, 56]}, 4),
        ({"patch_size": [14, 14]}, 4),
        ({"image_size": {"height": 56, "width": 56}}, 4),
        ({"image_size": [28, 112], "patch_size": [14, 14]}, (2, 8)),
    ],
)
def test_sizes_as_lists_and_tables(stated: dict[str, Any], native: Any, tmp_path: Path) -> None:
    dinov2().save_pretrained(tmp_path)
    change(tmp_path / "config.json", **stated)
    vit = load_backbone(tmp_path).vit
    assert (vit.config.native_grid, vit.patch_px) == (native, 14)


def test_positions_of_an_oblong_grid(tmp_path: Path) -> None:
    """The same on their own grid; transformers itself interpolates square ones only."""
    model = dinov2(image_size=[42, 84]).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    vit = load_backbone(tmp_path).vit
    assert vit.config.native_hw == (3, 6)
    with torch.no_grad():
        positions = model.embeddings.position_embeddings[:, 1:]
        torch.testing.assert_close(vit._learned_positions((3, 6)), positions)
        assert vit.block_maps(images(14, (5, 5)), [3])[0].shape == (2, 32, 5, 5)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"patch_size": [14, 7]}, r"patch_size is \[14, 7\]; expected square patches"),
        ({"patch_size": 0}, "patch_size is 0; expected a whole number above 0"),
        ({"image_size": [56]}, r"image_size is \[56\]; expected a whole number above 0, or height and width"),
        ({"image_size": "56"}, "image_size is '56'; expected"),
        ({"mlp_ratio": 1e999}, "config.json"),
        ({"mlp_ratio": "4"}, "does not describe a dinov2 model"),
        ({"hidden_size": None}, "does not describe a dinov2 model"),
        ({"model_type": ["dinov2"]}, r"model_type \['dinov2'\]; we read"),
        ({"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}, "model_type 'llava'; we read"),
        ({"model_type": "depth_anything", "backbone_config": 5}, "model_type 'depth_anything'; we read"),
        ({"model_type": None, "pretrained_cfg": "abc"}, "pretrained_cfg is a str; expected a table"),
        ({"model_type": None, "pretrained_cfg": {"mean": 5, "std": 5}}, "give mean="),
    ],
)
def test_a_config_that_cannot_be_used(stated: dict[str, Any], message: str, tmp_path: Path) -> None:
    dinov2().save_pretrained(tmp_path)
    change(tmp_path / "config.json", **stated)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(tmp_path)


# ---- normalisation ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dinov2")
    transformers.logging.disable_progress_bar()
    dinov2().save_pretrained(path)
    return path


def with_files(folder: Path, tmp_path: Path, **files: Any) -> Path:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


NESTED = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, "processor_class": "P"}


@pytest.mark.parametrize(
    ("files", "mean", "std"),
    [
        ({"processor_config": NESTED}, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ({"preprocessor_config": NESTED}, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        (
            {"processor_config": NESTED, "preprocessor_config": {"image_mean": 0.5, "image_std": 0.5}},
            (0.1, 0.2, 0.3),
            (0.4, 0.5, 0.6),
        ),
        (
            {"processor_config": {"processor_class": "P"}, "preprocessor_config": {"image_mean": 0.5, "image_std": 1}},
            (0.5, 0.5, 0.5),
            (1.0, 1.0, 1.0),
        ),
        ({"preprocessor_config": {"size": 224}}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_where_mean_and_deviation_are_stated(
    files: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...], folder: Path, tmp_path: Path
) -> None:
    config = load_backbone(with_files(folder, tmp_path, **files)).vit.config
    assert (config.mean, config.std) == (mean, std)


def test_what_is_stated_wrongly_is_refused_unless_both_are_given(folder: Path, tmp_path: Path) -> None:
    big = {"image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]}
    path = with_files(folder, tmp_path, preprocessor_config=big)
    message = (
        r"preprocessor_config.json: image_mean is \(123.675.*give mean=\(0.485, 0.456, 0.406\), std=\(0.229, 0.224"
    )
    with pytest.raises(CheckpointError, match=message):
        load_backbone(path)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(path, fields={"mean": (0.5, 0.5, 0.5)})
    given = {"mean": (0.485, 0.456, 0.406), "std": 0.25}
    assert load_backbone(path, fields=given).vit.config.std == (0.25, 0.25, 0.25)
