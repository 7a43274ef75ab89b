"""What a user names is found, or the right call is named; a revision is never dropped; files on disk come first."""

from pathlib import Path
from typing import Any

import pytest
import torch
from weight_states import CONFIG, dinov2_state

from brixel import BrixelError, BrixelFeatures, CheckpointError
from brixel.cli.app import main


@pytest.fixture(scope="module")
def model_folder(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu").save_pretrained(folder)
    return folder


def message_of(call: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(BrixelError) as caught:
        call(*arguments, **named)
    return str(caught.value)


# ---- the wrong call ----


def test_a_backbone_where_a_model_is_wanted(
    backbone_folder: Path, tmp_path: Path, offline: None, monkeypatch: Any
) -> None:
    (tmp_path / "weights.pth").write_bytes(b"anything")
    (tmp_path / "empty").mkdir()
    names = ("dinov2-small", "facebook/dinov2-small", "timm/vit_small_patch14_dinov2.lvd142m", "dinov3-vits16")
    paths = (backbone_folder, backbone_folder / "model.safetensors", tmp_path / "weights.pth", tmp_path / "empty")
    for wrong in (*names, *paths):
        assert "use from_backbone" in message_of(BrixelFeatures.from_pretrained, wrong)


def test_a_model_where_a_backbone_is_wanted(model_folder: Path) -> None:
    adapter = model_folder / "adapter.safetensors"
    assert "use from_pretrained" in message_of(BrixelFeatures.from_backbone, model_folder)
    assert "to from_pretrained" in message_of(BrixelFeatures.from_backbone, adapter)
    assert "use from_pretrained" in message_of(BrixelFeatures.from_release, model_folder, release="vitb16-256")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vit_base_patch16_224.augreg_in21k", "give 'timm/vit_base_patch16_224.augreg_in21k'"),
        ("vit_small_patch14_dinov2", "did you mean 'vit_small_patch14_dinov2.lvd142m'"),
        ("hf-hub:timm/vit_small_patch14_dinov2.lvd142m", "alone, 'timm/vit_small_patch14_dinov2.lvd142m'"),
        ("https://hub.example/facebook/dinov2-small", "alone, 'facebook/dinov2-small'"),
        ("eva02_large_patch14_448.mim_m38m_ft_in1k", "timm.create_model"),
        ("dinov2_vits14", "did you mean 'dinov2-vits14'"),
    ],
)
def test_names_of_timm_and_torch_hub(name: str, told: str) -> None:
    assert told in message_of(BrixelFeatures.from_backbone, name)


def test_the_command_line_names_its_flags(
    model_folder: Path, backbone_folder: Path, image_path: Path, tmp_path: Path, capsys: Any
) -> None:
    out = str(tmp_path / "panel.png")
    wrong = {
        ("--model", str(backbone_folder)): "for a backbone use --backbone",
        ("--model", "dinov2-small"): "use --backbone",
        ("--backbone", str(model_folder)): "use --model",
    }
    for flags, told in wrong.items():
        assert main(["show", str(image_path), *flags, "-o", out]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert "from_" not in error


def test_another_backbone_than_the_adapters(model_folder: Path, tmp_path: Path) -> None:
    torch.save(dinov2_state(), tmp_path / "other.pth")
    message = message_of(BrixelFeatures.from_pretrained, model_folder, backbone=tmp_path / "other.pth", device="cpu")
    assert "it is not the backbone that the adapter was trained for, ViT of width 64, depth 4, patch 14:" in message
    assert f"its width is {CONFIG.width}, not 64" in message
    own = BrixelFeatures.from_pretrained(device="cpu")
    own.save_pretrained(tmp_path / "small", include_backbone=True)
    message = message_of(
        BrixelFeatures.from_pretrained, model_folder, backbone=tmp_path / "small" / "backbone.safetensors", device="cpu"
    )
    assert "not the backbone that the adapter was trained for" in message


# ---- revisions ----


def test_a_revision_is_never_dropped(model_folder: Path, backbone_folder: Path, offline: None) -> None:
    weights = backbone_folder / "model.safetensors"
    for call, name in (
        *((BrixelFeatures.from_pretrained, name) for name in ("brixel-tiny", "brixel-small", model_folder)),
        *((BrixelFeatures.from_backbone, name) for name in (backbone_folder, weights, "brixel-tiny", "dinov2-small")),
    ):
        assert f"revision='v1' goes with ORG/NAME of a repository on the Hub; {name} is" in message_of(
            call, name, revision="v1"
        )
    assert "give 'facebook/dinov2-small' with it" in message_of(
        BrixelFeatures.from_backbone, "dinov2-small", revision="v1"
    )
    assert "us/dense@v2 names another revision than revision='v1'" in message_of(
        BrixelFeatures.from_pretrained, "us/dense@v2", revision="v1"
    )
    assert "revision: not for a backbone that is a module" in message_of(
        BrixelFeatures.from_backbone, torch.nn.Linear(2, 2), revision="v1"
    )


# ---- files on disk before the network ----


def test_an_adapter_is_read_before_its_backbone_is_fetched(hub: Any, model_folder: Path, tmp_path: Path) -> None:
    for name in ("adapter.safetensors", "config.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    (tmp_path / "adapter.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"adapter.safetensors is a Git LFS pointer"):
        BrixelFeatures.from_pretrained(tmp_path, backbone="facebook/dinov2-small", device="cpu")
    (tmp_path / "vitb.pth").write_bytes(b"<html></html>")
    with pytest.raises(CheckpointError, match=r"vitb.pth is an HTML page"):
        BrixelFeatures.from_release(tmp_path / "vitb.pth", release="vitb16-256", device="cpu")
    assert hub.requests == []


def test_names_that_no_file_system_takes() -> None:
    for call in (BrixelFeatures.from_pretrained, BrixelFeatures.from_backbone):
        for name in ("a" * 5000, "a\0b", ""):
            message_of(call, name)
