"""Models onto the Hub: the real client against a server on the loopback interface; and their cards."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers import assert_same_weights, files_of
from PIL import Image

from brixel import BrixelError, BrixelFeatures, CheckpointError, UploadError
from brixel.backbones import registry
from brixel.backbones.registry import KnownBackbone
from brixel.checkpoints import load_backbone
from brixel.checkpoints.model_card import is_ours, model_card
from brixel.checkpoints.model_folder import read_config
from brixel.checkpoints.release_adapters import RELEASE, RELEASED
from brixel.cli.app import main

OURS, BACKBONE = "us/dense", "facebook/dinov2-tiny"
WRITER = "hf_writer"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client's own upload


@pytest.fixture
def backbone(hub, backbone_folder):
    """The tiny backbone in a repository; and an account that may write."""
    hub.add(BACKBONE, files_of(backbone_folder))
    hub.writers["us"] = (WRITER,)
    return BACKBONE


@pytest.fixture(scope="module")
def local_model(backbone_folder):
    """A model whose backbone is in a folder of this machine."""
    return BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu", short_side_px=28)


@pytest.fixture
def model(hub, backbone, local_model):
    """The same as it is made from the repository."""
    model = copy.deepcopy(local_model)
    commits = {BACKBONE: hub.repos[BACKBONE].commit}
    model.config = dataclasses.replace(model.config.with_sources([BACKBONE]), commits=commits)
    return model


def push(model, name=OURS, **options):
    """Upload with a panel of a small image."""
    return model.push_to_hub(name, **{"token": WRITER, "image": torch.rand(3, 28, 28), **options})


@pytest.mark.slow
def test_what_was_pushed_loads_again(hub, backbone, tmp_path):
    model = BrixelFeatures.from_backbone(backbone, adapter="fresh", device="cpu", short_side_px=28)
    name = model.push_to_hub(OURS, token=WRITER, message="A first one")
    repo = hub.repos[OURS]
    assert set(repo.files) == {".gitattributes", "README.md", "adapter.safetensors", "config.json", "panel.png"}
    assert name == f"{OURS}@{repo.commit}"
    assert hub.commits == [(OURS, "A first one")]
    loaded = BrixelFeatures.from_pretrained(name, device="cpu")
    assert_same_weights(model, loaded)
    assert loaded.config.backbone.sources == (BACKBONE,)
    assert set(loaded.config.commits) == {OURS, BACKBONE}
    (tmp_path / "panel.png").write_bytes(repo.files["panel.png"])
    with Image.open(tmp_path / "panel.png") as panel:
        assert panel.width > 500


def test_the_requests_of_a_push(hub, model):
    hub.requests.clear()
    push(model, private=True)
    assert hub.repos[OURS].private is True
    posts = [path for verb, _, path in hub.requests if verb == "POST"]
    assert [path for path in posts if "lfs" not in path] == [
        "/api/repos/create",
        "/api/validate-yaml",
        f"/api/models/{OURS}/preupload/main",
        f"/api/models/{OURS}/commit/main",
    ]
    assert len([path for verb, _, path in hub.requests if verb == "PUT"]) == 2  # the weights and the image


@pytest.mark.slow
def test_with_its_backbone_and_then_without(hub, local_model, model):
    push(local_model, include_backbone=True)
    assert "backbone.safetensors" in hub.repos[OURS].files
    assert json.loads(hub.repos[OURS].files["config.json"])["backbone"]["sources"] == []
    assert_same_weights(local_model, BrixelFeatures.from_pretrained(OURS, device="cpu"))
    assert "in this repository" in hub.repos[OURS].files["README.md"].decode()
    push(model)
    assert "backbone.safetensors" not in hub.repos[OURS].files
    assert_same_weights(model, BrixelFeatures.from_pretrained(OURS, device="cpu"))


def test_a_backbone_that_is_nowhere_is_refused(hub, backbone, backbone_folder, local_model, tmp_path):
    with pytest.raises(BrixelError, match=r"in no repository that brixel knows of .*include_backbone=True.*ORG/NAME"):
        push(local_model)
    assert hub.repos.keys() == {BACKBONE}
    local_model.save_pretrained(tmp_path)
    named = BrixelFeatures.from_pretrained(tmp_path, backbone=BACKBONE, device="cpu")  # as the message says
    assert named.config.backbone.sources[0] == BACKBONE
    push(named)
    content = json.loads(hub.repos[OURS].files["config.json"])
    assert content["backbone"]["sources"] == [BACKBONE]
    assert str(backbone_folder) not in hub.repos[OURS].files["README.md"].decode()


@pytest.mark.slow
def test_the_bundled_model(hub, tmp_path):
    """Others have its backbone in their package, so that the adapter alone can be uploaded."""
    hub.writers["us"] = (WRITER,)
    model = BrixelFeatures.from_pretrained("brixel-tiny", device="cpu")
    push(model)
    files = hub.repos[OURS].files
    assert set(files) == {".gitattributes", "README.md", "adapter.safetensors", "config.json", "panel.png"}
    assert json.loads(files["config.json"])["backbone"]["sources"] == ["brixel-tiny"]
    assert "| its weights | in the package brixel |" in files["README.md"].decode()
    assert "base_model" not in files["README.md"].decode()  # it is no repository
    loaded = BrixelFeatures.from_pretrained(OURS, device="cpu")
    assert loaded.config.backbone == model.config.backbone
    assert_same_weights(loaded, model)
    push(loaded)  # once more, from where it was loaded
    assert json.loads(files["config.json"])["backbone"]["sources"] == ["brixel-tiny"]


def test_a_module_as_backbone(hub, backbone, backbone_folder, tmp_path):
    from transformers import AutoModel

    module = AutoModel.from_pretrained(backbone_folder)
    made = BrixelFeatures.from_backbone(module, mean=(0.5,) * 3, std=(0.5,) * 3, short_side_px=28)
    with pytest.raises(BrixelError, match="was given as a module, Dinov2Model .* and cannot be included"):
        push(made, include_backbone=True)
    push(made)
    assert "backbone=backbone)" in hub.repos[OURS].files["README.md"].decode()
    assert_same_weights(made, BrixelFeatures.from_pretrained(OURS, backbone=module))


@pytest.mark.slow
def test_a_card_that_was_changed_stays(hub, model):
    push(model)
    hub.repos[OURS].files["README.md"] += b"\nmore\n"
    push(model)
    assert not hub.repos[OURS].files["README.md"].endswith(b"more\n")  # the line that allows it is still there
    hub.repos[OURS].files["README.md"] = b"# Mine\n"
    hub.repos[OURS].files["notes.txt"] = b"Mine as well\n"
    push(model)
    assert hub.repos[OURS].files["README.md"] == b"# Mine\n"
    assert hub.repos[OURS].files["notes.txt"] == b"Mine as well\n"


def test_a_saved_card_that_was_changed_stays(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert is_ours(card.read_text())
    card.write_text("# Mine\n")
    model.save_pretrained(tmp_path)
    assert card.read_text() == "# Mine\n"


# -------------------------------------------------------------------- what goes wrong


def test_nobody_is_logged_in(hub, model):
    hub.requests.clear()
    for token in (None, False, True):
        with pytest.raises(UploadError, match="nobody is logged in: run `hf auth login`"):
            model.push_to_hub(OURS, token=token)
    assert hub.requests == []


def test_offline(hub, model, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UploadError, match="HF_HUB_OFFLINE is set"):
        push(model)


@pytest.mark.parametrize("name", ["dense", "us/dense@main", "us/../dense", "", None, Path("us/dense")])
def test_no_name_of_a_repository(model, name):
    with pytest.raises(BrixelError, match=r"the repository is .*; expected ORG/NAME"):
        push(model, name)


def test_a_token_that_may_not_write(hub, model):
    with pytest.raises(UploadError, match=r"them/dense was not changed: .* answered 403, .*may not write to them"):
        push(model, "them/dense")
    assert "them/dense" not in hub.repos


@pytest.mark.slow
@pytest.mark.parametrize(("request_kind", "message"), [("upload", "answered 403"), ("commit", "answered 400")])
def test_nothing_changes_where_a_request_fails(hub, model, request_kind, message):
    push(model)
    before = dict(hub.repos[OURS].files)
    hub.refused = request_kind
    with torch.no_grad():
        next(model.adapter.parameters()).add_(1)
    with pytest.raises(UploadError, match=message) as caught:
        push(model)
    assert caught.value.__cause__ is not None
    assert hub.repos[OURS].files == before


def test_a_server_that_fails(hub, model):
    hub.status = 503
    with pytest.raises(UploadError, match=r"us/dense was not changed: .* answered 503 .*try again later"):
        push(model)


def test_no_server(hub, model):
    from huggingface_hub import close_session

    hub.stop()
    close_session()  # connections that are open would still be answered
    with pytest.raises(UploadError, match=r"us/dense was not changed: no usable answer from .* within"):
        push(model)


# -------------------------------------------------------------------- cards


def on(model, architecture, *sources, **fields):
    backbone = dataclasses.replace(model.config.backbone, architecture=architecture, sources=sources)
    return dataclasses.replace(model.config, backbone=backbone, **fields)


def test_the_card_of_what_derives_from_dinov3(model):
    known = registry.KNOWN_BACKBONES["dinov3-vits16"]
    config = on(model, known.name, *known.sources, training={"steps": "7 of 7 | quick\nones"})
    card = model_card(config, "us/dense", whole=False, panel=True)
    head = card.split("---\n")[1].splitlines()
    assert "license: other" in head
    assert "license_name: dinov3-license" in head
    assert "license_link: https://ai.meta.com/resources/models-and-libraries/dinov3-license" in head
    assert f"base_model: {known.huggingface}" in head
    assert "which also covers what is derived from its weights, such as this adapter" in card
    assert "The backbone's weights are not here." in card
    assert "| steps | 7 of 7 \\| quick ones |" in card
    assert 'BrixelFeatures.from_pretrained("us/dense")' in card
    assert "](panel.png)" in card


def test_the_front_matter_is_yaml(model):
    yaml = pytest.importorskip("yaml")
    for architecture, expected in (("dinov3-vits16", "other"), ("dinov2-vits14", "apache-2.0"), (None, None)):
        card = model_card(on(model, architecture, "us/backbone@v1.0"), "us/dense", whole=False)
        head = yaml.safe_load(card.split("---\n")[1])
        assert head["library_name"] == "brixel"
        assert head["base_model"] == "us/backbone"
        assert head.get("license") == expected


def test_the_snippet_of_a_saved_card_runs(model, image_path, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "dense", include_backbone=True)
    snippet = (tmp_path / "dense" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(snippet.replace('"photo.jpg"', repr(str(image_path))), {})


def test_the_licence_is_copied(hub, model):
    hub.repos[BACKBONE].files["LICENSE.md"] = b"Do as you like.\n"
    model.config = on(model, "dinov3-vits16", BACKBONE)
    push(model)
    assert hub.repos[OURS].files["LICENSE.md"] == b"Do as you like.\n"
    assert "a copy is in LICENSE.md" in hub.repos[OURS].files["README.md"].decode()


# -------------------------------------------------------------------- the release's files


def test_the_five_files_have_their_backbones():
    assert {name: (row.backbone, row.short_side_px) for name, row in RELEASED.items()} == {
        "vits16-256": ("dinov3-vits16", 256),
        "vitb16-256": ("dinov3-vitb16", 256),
        "vitl16-256": ("dinov3-vitl16", 256),
        "vith16plus-256": ("dinov3-vith16plus", 256),
        "vitb16-480": ("dinov3-vitb16", 480),
    }
    assert all(row.backbone in registry.KNOWN_BACKBONES for row in RELEASED.values())


@pytest.fixture
def dense_vitb(local_model, tmp_path, monkeypatch):
    """A file of the release for the tiny backbone, in place of the ViT-B, and its row of the table."""
    vit = local_model.config.backbone.vit
    row = KnownBackbone("dinov3-vitb16", vit, "dinov3-license", BACKBONE, "timm/tiny", aliases=("dinov3-base",))
    for module in (registry, load_backbone):
        monkeypatch.setattr(module, "KNOWN_BACKBONES", {row.name: row})
    torch.save(release_state(local_model), tmp_path / "dense.pth")
    return tmp_path / "dense.pth", row


def release_state(model):
    """Its weights under the authors' names, with separate offsets and weights of the attention, and all levels."""
    ours = model.upsampler.state_dict()
    state = {}
    for name, theirs in RELEASE.tensors.items():
        parts = ours[name].tensor_split([2 * len(ours[name]) // 3]) if len(theirs) == 2 else [ours[name]]
        state |= {key: part.clone() for key, part in zip(theirs, parts, strict=True)}
    state["adapter.level_embed"] = state["adapter.level_embed"].expand(3, -1).clone()
    return state


@pytest.mark.slow
def test_convert_by_name_and_push(hub, backbone, dense_vitb, tmp_path, monkeypatch, capsys):
    path, row = dense_vitb
    monkeypatch.setenv("HF_TOKEN", WRITER)
    out = tmp_path / "out"
    command = ["convert", str(path), "--release", "vitb16-480", "-o", str(out), "--push", OURS, "--private"]
    assert main(command) == 0
    assert capsys.readouterr().out.split() == [str(out), f"{OURS}@{hub.repos[OURS].commit}"]
    config = read_config(out / "config.json")
    assert config.adapter.short_side_px == 480
    assert config.backbone.sources == row.sources
    assert "dense.pth of the authors" in config.training["adapter"]
    assert "dense.pth of the authors" in hub.repos[OURS].files["README.md"].decode()
    assert hub.repos[OURS].private is True
    loaded = BrixelFeatures.from_pretrained(OURS, device="cpu")
    assert_same_weights(loaded, BrixelFeatures.from_release(path, release="vitb16-480", device="cpu"))


@pytest.mark.slow
def test_arguments_go_before_what_the_release_implies(backbone, backbone_folder, dense_vitb):
    path, _ = dense_vitb
    made = BrixelFeatures.from_release(path, backbone_folder, release="vitb16-480", short_side_px=56, device="cpu")
    assert made.config.adapter.short_side_px == 56
    assert made.config.backbone.sources[0] == str(backbone_folder.resolve())
    assert made.config.backbone.architecture == "dinov3-vitb16"
    assert BrixelFeatures.from_release(path, backbone_folder, device="cpu").config.adapter.short_side_px == 256
    for names in ({"backbone": "dinov3-base"}, {"backbone": backbone_folder, "architecture": "dinov3-base"}):
        by_alias = BrixelFeatures.from_release(path, **names, device="cpu")
        assert by_alias.config.backbone.architecture == "dinov3-vitb16"


def test_a_file_of_another_size_is_refused_before_its_backbone_is_fetched(hub, tmp_path):
    torch.save({"adapter.level_embed": torch.zeros(3, 768)}, tmp_path / "some.pth")
    hub.requests.clear()
    with pytest.raises(
        CheckpointError,
        match=r"some\.pth does not fit dinov3-vits16: it is for a backbone 768 wide, not 384: it may be vitb",
    ):
        BrixelFeatures.from_release(tmp_path / "some.pth", release="vits16-256")
    for name in ("dinov3-small", "facebook/dinov3-vits16-pretrain-lvd1689m"):
        with pytest.raises(CheckpointError, match=r"does not fit dinov3-vits16: it is for a backbone 768 wide"):
            BrixelFeatures.from_release(tmp_path / "some.pth", name)
    assert hub.requests == []


def test_a_release_must_be_named(tmp_path):
    torch.save({}, tmp_path / "some.pth")
    with pytest.raises(BrixelError, match="unknown file of the release 'vitb16-48'; did you mean 'vitb16-480'"):
        BrixelFeatures.from_release(tmp_path / "some.pth", release="vitb16-48")
    with pytest.raises(BrixelError, match="no backbone and no release: say which file this is"):
        BrixelFeatures.from_release(tmp_path / "some.pth")


def test_nothing_is_fetched_where_nothing_could_be_pushed(hub, dense_vitb, tmp_path, capsys):
    hub.requests.clear()
    command = ["convert", str(dense_vitb[0]), "--release", "vitb16-480", "-o", str(tmp_path / "out")]
    assert main([*command, "--push", OURS]) == 2
    assert "nobody is logged in" in capsys.readouterr().err
    assert main([*command, "--private"]) == 2
    assert "--private goes with --push" in capsys.readouterr().err
    assert hub.requests == []
    assert not (tmp_path / "out").exists()
