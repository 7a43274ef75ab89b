"""Models and backbones from the Hub: the real client against a server on the loopback interface."""

import json
import logging
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import assert_same_weights, files_of
from huggingface_hub import constants, split_torch_state_dict_into_shards
from safetensors.torch import load_file, save

from brixel import BrixelError, BrixelFeatures, CheckpointError, DownloadError, FeatureMap
from brixel.backbones import registry
from brixel.backbones.registry import KnownBackbone
from brixel.checkpoints import hub_download, load_backbone
from brixel.checkpoints.backbone_key_maps import DINOV2_TIMM
from brixel.checkpoints.hub_download import Access, Repository, Snapshot, parse_repository
from brixel.checkpoints.model_folder import read_config
from brixel.cli.app import main

MODEL, BACKBONE = "us/dense", "facebook/dinov2-tiny"
GATED, FREE = "facebook/dinov3-vits16-pretrain-lvd1689m", "timm/vit_small_patch16_dinov3.lvd1689m"


def write_files(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def backbone_files(backbone_folder):
    return files_of(backbone_folder)


@pytest.fixture(scope="module")
def saved(backbone_folder, tmp_path_factory):
    """Two folders of one model, with its backbone and without, whose sources are a gated repository and a free one."""
    whole, part = (tmp_path_factory.mktemp("saved") / name for name in ("whole", "part"))
    model = BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu", short_side_px=28)
    model.config = model.config.with_sources([GATED, FREE])
    model.save_pretrained(whole, include_backbone=True)
    model.save_pretrained(part)
    return files_of(whole), files_of(part)


def naming(files, *sources):
    """A model's files, its config naming these sources."""
    content = json.loads(files["config.json"])
    content["backbone"]["sources"] = list(sources)
    return {**files, "config.json": json.dumps(content).encode()}


def load(name, **options):
    return BrixelFeatures.from_pretrained(name, device="cpu", **options)


def fresh(name, **options):
    return BrixelFeatures.from_backbone(name, device="cpu", **options)


def cache_of(name):
    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def left_behind():
    """Files in the cache that are parts of others."""
    return [
        path for path in Path(constants.HF_HUB_CACHE).rglob("*") if "incomplete" in path.name or ".tmp" in path.name
    ]


# -------------------------------------------------------------------- fetching


def test_a_model_comes_from_the_hub(hub, saved, image_path, tmp_path):
    repo = hub.add(MODEL, {**saved[0], "README.md": b"not needed", "training.pth": b"not needed"})
    model = load(MODEL)
    assert hub.got() == ["config.json", "adapter.safetensors", "backbone.safetensors"]
    assert model.config.commits == {MODEL: repo.commit}
    made = load(write_files(tmp_path / "saved", saved[0]))
    assert_same_weights(model, made)
    model.extract(image_path).save(tmp_path / "map.safetensors")
    assert FeatureMap.load(tmp_path / "map.safetensors").meta["commits"] == f"{MODEL}@{repo.commit}"
    model.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again" / "config.json").commits == {MODEL: repo.commit}
    assert "commits" not in made.extract(image_path).meta


def test_a_second_load_asks_once_and_fetches_nothing(hub, saved):
    hub.add(MODEL, saved[0])
    load(MODEL)
    hub.requests.clear()
    load(MODEL)
    assert hub.requests == [("HEAD", MODEL, "config.json")]


def test_a_new_commit_is_fetched_whole(hub, saved):
    old = hub.add(MODEL, saved[0]).commit
    load(MODEL)
    new = hub.add(MODEL, {**saved[0], "README.md": b"more"}).commit
    assert load(MODEL).config.commits == {MODEL: new}
    assert old != new


def test_a_commit_needs_no_request_once_it_is_cached(hub, saved, backbone_files):
    commit = hub.add(FREE, backbone_files).commit
    model = hub.add(MODEL, naming(saved[1], f"{FREE}@{commit}")).commit
    load(MODEL, revision=model)
    hub.requests.clear()
    assert load(f"{MODEL}@{model}").config.commits == {MODEL: model, FREE: commit}
    assert load(MODEL, revision=model).config.backbone.sources == (f"{FREE}@{commit}",)
    assert hub.requests == []


def test_what_a_commit_lacks_is_remembered(hub, backbone_files):
    repository = Repository(BACKBONE, hub.add(BACKBONE, backbone_files).commit)
    Snapshot(repository, Access())
    assert Snapshot(repository, Access()).find("preprocessor_config.json") is None
    hub.requests.clear()
    assert Snapshot(repository, Access()).find("preprocessor_config.json") is None
    assert hub.requests == []


def test_branches_and_tags(hub, backbone_files):
    repo = hub.add(BACKBONE, backbone_files)
    repo.revisions["v1.0"] = "c0ffee" + 34 * "0"
    model = fresh(f"{BACKBONE}@v1.0")
    assert model.config.backbone.sources == (f"{BACKBONE}@v1.0",)
    assert model.config.commits == {BACKBONE: repo.revisions["v1.0"]}
    assert fresh(BACKBONE, revision="v1.0").config == model.config
    with pytest.raises(BrixelError, match="revision is '../x'; expected a branch"):
        fresh(BACKBONE, revision="../x")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["environment", "argument", "no server"])
def test_offline_from_the_cache(hub, saved, monkeypatch, how):
    hub.add(MODEL, saved[0])
    load(MODEL)
    hub.requests.clear()
    if how == "environment":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if how == "no server":
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
        )
    load(MODEL, local_files_only=how == "argument")
    assert hub.requests == []


@pytest.mark.parametrize("how", ["environment", "argument"])
def test_offline_and_not_cached(hub, saved, monkeypatch, how):
    hub.add(MODEL, saved[1])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "environment")
    with pytest.raises(
        DownloadError, match=r"config\.json of us/dense is not in the cache, .*downloads are off"
    ) as caught:
        load(MODEL, local_files_only=how == "argument")
    assert caught.value.__cause__ is not None
    assert hub.requests == []


def test_offline_with_a_part_in_the_cache(hub, saved, capsys):
    hub.add(MODEL, saved[0])
    assert main(["info", MODEL]) == 0
    with pytest.raises(DownloadError, match=r"adapter\.safetensors of us/dense is not in the cache"):
        load(MODEL, local_files_only=True)
    hub.add(BACKBONE, {"config.json": b"{}"})
    with pytest.raises(DownloadError):
        fresh(BACKBONE)
    with pytest.raises(DownloadError, match=r"no weights of facebook/dinov2-tiny are cached, and downloads are off"):
        fresh(BACKBONE, local_files_only=True)


def test_another_cache_folder(hub, saved, tmp_path):
    hub.add(MODEL, saved[0])
    load(MODEL, cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine" / "models--us--dense").is_dir()
    assert not cache_of(MODEL).exists()
    load(MODEL, cache_dir=str(tmp_path / "mine"), local_files_only=True)


def test_paths_come_before_repositories(hub, saved, tmp_path, monkeypatch):
    write_files(tmp_path / MODEL, saved[0])
    monkeypatch.chdir(tmp_path)
    load(MODEL)
    with pytest.raises(BrixelError, match="no model at 'no/where'"):
        load(Path("no/where"))  # a path is a path
    assert hub.requests == []


# -------------------------------------------------------------------- backbones


def test_a_backbone_with_its_preprocessing(hub, backbone_files, image_path):
    stated = json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}).encode()
    extras = {"pytorch_model.bin": b"not needed", "onnx/model.onnx": b"not needed", "weights.pth": b"not needed"}
    repo = hub.add(BACKBONE, {**backbone_files, **extras, "preprocessor_config.json": stated})
    model = fresh(BACKBONE)
    assert hub.got() == ["config.json", "preprocessor_config.json", "model.safetensors"]
    assert model.config.backbone.vit.mean == (0.5, 0.5, 0.5)
    assert model.config.backbone.sources == (BACKBONE,)
    assert model.extract(image_path, short_side_px=28).meta["commits"] == f"{BACKBONE}@{repo.commit}"


def test_a_sharded_backbone(hub, backbone_folder, backbone_files):
    state = load_file(backbone_folder / "model.safetensors")
    size = sum(tensor.nbytes for tensor in state.values())
    split = split_torch_state_dict_into_shards(state, max_shard_size=size // 3)
    assert len(split.filename_to_tensors) > 2
    files = {name: save({key: state[key] for key in keys}) for name, keys in split.filename_to_tensors.items()}
    index = json.dumps({"metadata": split.metadata, "weight_map": split.tensor_to_filename}).encode()
    hub.add(BACKBONE, {"config.json": backbone_files["config.json"], "model.safetensors.index.json": index, **files})
    made = fresh(BACKBONE)
    assert set(hub.got()) == {"config.json", "model.safetensors.index.json", *files}
    assert_same_weights(made.backbone, fresh(backbone_folder).backbone)


def timm_files(vit):
    """The backbone as timm keeps it."""
    state = {}
    for ours, tensor in vit.state_dict().items():
        template, index = ours, ""
        if ours.startswith("blocks."):
            index = ours.split(".")[1]
            template = ours.replace(f".{index}.", ".{i}.", 1)
        (theirs,) = DINOV2_TIMM.tensors[template]
        state[theirs.replace("{i}", index)] = tensor.contiguous()
    config = {
        "architecture": "vit_tiny",
        "pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    }
    return {"config.json": json.dumps(config).encode(), "model.safetensors": save(state), "pytorch_model.bin": b"twice"}


def test_a_timm_repository(hub, backbone_folder):
    expected = fresh(backbone_folder)
    hub.add(FREE, timm_files(expected.backbone))
    made = fresh(FREE, architecture=expected.config.backbone.vit)
    assert hub.got() == ["config.json", "model.safetensors"]
    assert_same_weights(made.backbone, expected.backbone)


def test_pickled_weights_where_there_are_no_others(hub, backbone_folder, backbone_files, tmp_path):
    torch.save(load_file(backbone_folder / "model.safetensors"), tmp_path / "weights.bin")
    pickled = (tmp_path / "weights.bin").read_bytes()
    hub.add(BACKBONE, {"config.json": backbone_files["config.json"], "pytorch_model.bin": pickled})
    assert fresh(BACKBONE).embed_dim == 64


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("zipped", [False, True])
def test_code_in_a_repository_does_not_run(hub, backbone_files, tmp_path, zipped):
    harm = {"cls_token": Malicious(str(tmp_path / "harm"))}
    torch.save(harm, tmp_path / "weights.bin") if zipped else (tmp_path / "weights.bin").write_bytes(
        pickle.dumps(harm, 2)
    )
    (tmp_path / "harm").unlink(missing_ok=True)
    content = (tmp_path / "weights.bin").read_bytes()
    hub.add(BACKBONE, {"config.json": backbone_files["config.json"], "pytorch_model.bin": content, "a.pth": content})
    with pytest.raises(CheckpointError, match="more than tensors, which could run code"):
        fresh(BACKBONE)
    assert not (tmp_path / "harm").exists()
    assert "a.pth" not in hub.got()


def test_a_known_name_or_alias_means_its_repositories(hub, backbone_files, caplog):
    files = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b""}
    hub.add("timm/vit_small_patch14_dinov2.lvd142m", files)
    for name in ("dinov2-vits14", "dinov2-small", "vit_small_patch14_dinov2.lvd142m"):
        caplog.clear()
        with pytest.raises(CheckpointError, match="model_type 'bert'"):  # the second source, as the first is missing
            fresh(name)
        assert "the backbone is that of timm/vit_small_patch14_dinov2.lvd142m, not facebook/dinov2-small" in caplog.text
    with pytest.raises(DownloadError, match="no repository facebook/dinov2-small at"):  # an id means this repository
        fresh("facebook/dinov2-small")
    message = (
        r"no source of dinov2-vitb14 is available. Tried facebook/dinov2-base: .* Tried timm/vit_base_patch14_dinov2"
    )
    with pytest.raises(DownloadError, match=message):
        fresh("dinov2-vitb14")
    with pytest.raises(BrixelError, match="did you mean 'dinov2-vits14'"):
        fresh("dinov2-vits15")
    with pytest.raises(BrixelError, match="did you mean 'dinov2-with-registers-base'"):
        fresh("dinov2-with-registers-bas")


def test_a_path_comes_before_an_alias(hub, backbone_folder, tmp_path, monkeypatch):
    shutil.copytree(backbone_folder, tmp_path / "dinov2-small")
    monkeypatch.chdir(tmp_path)
    assert fresh("dinov2-small").config.backbone.sources == (str(tmp_path / "dinov2-small"),)
    assert hub.requests == []


def test_an_alias_loads_its_row(hub, backbone_files, backbone_folder, monkeypatch):
    vit = fresh(backbone_folder).config.backbone.vit
    row = KnownBackbone("dinov2-tiny", vit, "mit", BACKBONE, "timm/tiny", aliases=("dinov2-smallest",))
    for module in (registry, load_backbone):
        monkeypatch.setattr(module, "KNOWN_BACKBONES", {row.name: row})
    repo = hub.add(BACKBONE, backbone_files)
    by_name, by_alias, by_architecture = (
        fresh("dinov2-tiny"),
        fresh("dinov2-smallest"),
        fresh(BACKBONE, architecture="dinov2-smallest"),
    )
    assert by_name.config == by_alias.config == by_architecture.config
    assert by_alias.config.backbone.architecture == "dinov2-tiny"
    assert by_alias.config.backbone.sources == row.sources
    assert by_alias.config.commits == {BACKBONE: repo.commit}


def test_a_model_on_the_bundled_backbone_from_the_hub(hub, tmp_path, monkeypatch):
    """Its config names the package, and no folder of that name in the working directory is used instead."""
    model = load("brixel-tiny")
    model.save_pretrained(tmp_path / "tiny")
    hub.add(MODEL, files_of(tmp_path / "tiny"))
    write_files(tmp_path / "brixel-tiny", {"config.json": b"{}"})
    monkeypatch.chdir(tmp_path)
    loaded = load(MODEL)
    assert hub.got() == ["config.json", "adapter.safetensors"]
    assert loaded.config.backbone == model.config.backbone
    assert_same_weights(loaded, model)


def test_a_wrong_architecture_is_refused_before_its_weights_are_fetched(hub):
    hub.add("microsoft/resnet", {"config.json": b'{"model_type": "resnet"}', "model.safetensors": b"large"})
    with pytest.raises(CheckpointError, match=r"model_type 'resnet'; we read dinov3_vit"):
        fresh("microsoft/resnet")
    assert hub.got() == ["config.json"]


def test_a_fresh_model_names_where_its_backbone_is_published(hub, backbone_files, backbone_folder, monkeypatch):
    vit = fresh(backbone_folder).config.backbone.vit
    row = {"dinov2-tiny": KnownBackbone("dinov2-tiny", vit, "mit", BACKBONE, "timm/tiny")}
    for module in (registry, load_backbone):
        monkeypatch.setattr(module, "KNOWN_BACKBONES", row)
    hub.add(BACKBONE, backbone_files)
    local = str(backbone_folder.resolve())
    assert fresh(backbone_folder).config.backbone.sources == (local, BACKBONE, "timm/tiny")
    assert fresh(BACKBONE).config.backbone.sources == (BACKBONE, "timm/tiny")
    assert fresh(f"{BACKBONE}@main").config.backbone.sources == (BACKBONE, "timm/tiny")


def test_a_release_on_a_backbone_of_the_hub(hub, backbone_files, tmp_path):
    hub.add(BACKBONE, backbone_files)
    torch.save({"some": torch.zeros(1)}, tmp_path / "vits.pth")
    with pytest.raises(CheckpointError, match=r"vits\.pth does not fit an adapter for ViT of width 64"):
        BrixelFeatures.from_release(tmp_path / "vits.pth", BACKBONE, device="cpu")
    assert hub.got() == ["config.json", "model.safetensors"]
    with pytest.raises(BrixelError, match="no adapter at 'us/adapter': expected a file on disk"):
        BrixelFeatures.from_release("us/adapter", BACKBONE)


# -------------------------------------------------------------------- several sources


def test_a_gated_source_gives_way_to_a_free_one(hub, saved, backbone_files, caplog):
    model = hub.add(MODEL, saved[1])
    hub.add(GATED, backbone_files, gated=True)
    free = hub.add(FREE, backbone_files)
    made = load(MODEL)
    assert made.config.commits == {MODEL: model.commit, FREE: free.commit}
    (record,) = [record for record in caplog.records if record.name == "brixel"]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"the backbone is that of {FREE}, not {GATED} ({GATED} is gated and you are")
    assert "\n" not in record.getMessage()
    assert made.config.backbone.sources == (GATED, FREE)


def test_the_first_source_is_taken_where_it_can_be_had(hub, saved, backbone_files, caplog):
    hub.add(MODEL, saved[1])
    gated = hub.add(GATED, backbone_files, gated=True, allowed=("hf_yes",))
    assert load(MODEL, token="hf_yes").config.commits[GATED] == gated.commit
    assert caplog.records == []


def test_a_saved_folder_whose_backbone_has_moved(hub, saved, backbone_files, tmp_path, caplog):
    free = hub.add(FREE, backbone_files)
    write_files(tmp_path, naming(saved[1], str(tmp_path / "gone"), FREE))
    assert load(tmp_path).config.commits == {FREE: free.commit}
    assert caplog.messages == [f"the backbone is that of {FREE}, not {tmp_path / 'gone'} (no longer there)"]


def test_where_all_sources_fail_one_error_says_why(hub, saved, backbone_files):
    hub.add(MODEL, naming(saved[1], "/their/backbone", GATED, FREE))
    hub.add(GATED, backbone_files, gated=True)
    with pytest.raises(DownloadError) as caught:
        load(MODEL)
    message = str(caught.value)
    assert "without its backbone, ViT of width 64, depth 4, patch 14" in message
    assert "Tried /their/backbone: a path in a downloaded config is not followed." in message
    assert f"{GATED}: {GATED} is gated and you are not logged in" in message
    assert f"{FREE}: no repository {FREE}" in message
    assert "Give the backbone's folder, file or repository as backbone=" in message
    assert isinstance(caught.value.__cause__, DownloadError)


def test_other_weights_are_noticed_wherever_they_come_from(hub, saved, backbone_folder, backbone_files):
    state = load_file(backbone_folder / "model.safetensors")
    state["layernorm.weight"] += 0.5
    hub.add(MODEL, saved[1])
    hub.add(FREE, {**backbone_files, "model.safetensors": save(state)})
    with pytest.raises(
        CheckpointError, match=f"backbone at {FREE} has the shape .* other weights .* from {GATED}, {FREE}"
    ):
        load(MODEL)


def test_a_backbone_given_by_name(hub, saved, backbone_files):
    hub.add(MODEL, saved[0])
    hub.add(BACKBONE, backbone_files)
    assert set(load(MODEL, backbone=BACKBONE).config.commits) == {MODEL, BACKBONE}
    assert "backbone.safetensors" not in hub.got()


def test_a_config_of_one_source_is_still_read(saved, backbone_folder, tmp_path):
    content = json.loads(saved[1]["config.json"])
    del content["backbone"]["sources"], content["commits"]
    content["backbone"]["source"] = str(backbone_folder)
    write_files(tmp_path, {**saved[1], "config.json": json.dumps(content).encode()})
    assert load(tmp_path).config.backbone.sources == (str(backbone_folder),)


@pytest.mark.parametrize("wrong", ["facebook/dinov2", [1], [""], None])
def test_wrong_sources_are_refused(saved, tmp_path, wrong):
    content = json.loads(saved[1]["config.json"])
    content["backbone"]["sources"] = wrong
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"config\.json does not describe a model"):
        load(tmp_path)


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (
            False,
            f"{GATED} is gated and you are not logged in: ask for access at .*/{GATED}, then `hf auth login`; {FREE}",
        ),
        (
            "hf_no",
            f"{GATED} is gated and your account was not let in: ask for access at .*; {FREE} holds the same weights",
        ),
    ],
)
def test_a_gate_says_how_it_opens(hub, backbone_files, token, message):
    hub.add(GATED, backbone_files, gated=True, allowed=("hf_yes",))
    with pytest.raises(DownloadError, match=message) as caught:
        fresh(GATED, token=token)
    assert type(caught.value.__cause__).__name__ == "GatedRepoError"
    assert fresh(GATED, token="hf_yes").config.commits
    assert left_behind() == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("facebook/dinov2-smal", r"no repository facebook/dinov2-smal at http.*did you mean 'facebook/dinov2-small'\?"),
        ("nobody/nothing", r"no repository nobody/nothing at http://[^;]*; a private one needs `hf auth login`"),
        (f"{BACKBONE}@v9", r"facebook/dinov2-tiny has no revision 'v9'; those it has: http"),
        (f"{BACKBONE}@{40 * '0'}", "has no revision '0000"),
        ("us/empty", r"us/empty holds no config\.json; it holds README\.md, other\.pth$"),
        ("us/bare", r"no weights of us/bare are there; it holds .*; expected model\.safetensors or"),
        (MODEL, "us/dense holds a brixel model, not a backbone alone: use from_pretrained$"),
        (
            "us/damaged",
            r"config\.json is not JSON .* It came from us/damaged: delete .*models--us--damaged and load again",
        ),
    ],
)
def test_what_is_not_there_says_what_is(hub, saved, backbone_files, name, message):
    hub.add(BACKBONE, backbone_files)
    hub.add(MODEL, saved[0])
    hub.add("us/empty", {"README.md": b"", "other.pth": b""})
    hub.add("us/bare", {"config.json": backbone_files["config.json"]})
    hub.add("us/damaged", {"config.json": b"{"})
    with pytest.raises(DownloadError, match=message) as caught:
        fresh(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"config.json": b'{"model_type": "dinov2"}'},
            "no brixel model but 'dinov2': for a backbone use from_backbone",
        ),
        ({"config.json": b'{"architecture": "vit_small"}'}, "no brixel model but 'vit_small'"),
        ({"config.json": b'{"format_version": 1}', "a": b""}, "does not describe a model"),
        ({"weights.pth": b""}, r"us/other holds no config\.json; it holds weights\.pth"),
    ],
)
def test_what_is_no_model_says_so(hub, files, message):
    hub.add("us/other", files)
    with pytest.raises(BrixelError, match=message):
        load("us/other")


def test_a_model_without_its_adapter(hub, saved):
    hub.add(MODEL, {"config.json": saved[0]["config.json"]})
    with pytest.raises(DownloadError, match=r"us/dense holds no adapter\.safetensors; it holds config\.json"):
        load(MODEL)


def test_a_server_in_trouble_is_not_asked_for_long(hub, saved):
    hub.add(MODEL, saved[0])
    hub.status = 503
    started = time.monotonic()
    with pytest.raises(DownloadError, match=r"answered 503 for config\.json of us/dense .*try again later"):
        load(MODEL)
    assert time.monotonic() - started < 3
    assert len(hub.requests) == 1


def test_a_server_that_is_not_there_is_reported_at_once(hub, monkeypatch):
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    with pytest.raises(
        DownloadError, match=rf"{nowhere} did not answer for us/dense in \d\.\d s \(ConnectError.*HF_ENDPOINT"
    ):
        load(MODEL)


def test_a_server_that_says_nothing_is_waited_for_once(hub, saved, monkeypatch):
    hub.add(MODEL, saved[0])
    hub.delay_s = 1.0
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    with pytest.raises(DownloadError, match=r"did not answer for us/dense in 0\.[3-9] s \(ReadTimeout"):
        load(MODEL)
    assert len(hub.requests) == 1


def test_a_server_that_stops_answering_midway(hub, saved):
    """The config is there from an earlier look, and the rest is not."""
    hub.add(MODEL, saved[0])
    assert main(["info", MODEL]) == 0
    hub.status = 503
    with pytest.raises(DownloadError, match=r"answered 503 for adapter\.safetensors"):
        load(MODEL)


@pytest.mark.skipif(huggingface_hub.__version__ < "2", reason="earlier clients keep a part, and fetch the rest later")
def test_a_transfer_that_breaks_off_leaves_nothing(hub, saved, monkeypatch):
    repo = hub.add(MODEL, saved[0])
    repo.cut.add("adapter.safetensors")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own tries
    with pytest.raises(DownloadError, match=r"adapter\.safetensors of us/dense could not be fetched whole .*try again"):
        load(MODEL)
    assert left_behind() == []
    assert len(list((cache_of(MODEL) / "blobs").iterdir())) == 1
    repo.cut.clear()
    load(MODEL)


@pytest.mark.parametrize("name", ["adapter.safetensors", "backbone.safetensors"])
def test_bytes_that_are_not_those_of_their_checksum_are_refused(hub, saved, name):
    """Of the right length, and not left in the cache: neither another load nor another program takes them."""
    repo = hub.add(MODEL, saved[0])
    repo.changed.add(name)
    for _ in range(2):
        with pytest.raises(
            DownloadError, match=rf"{name} of us/dense has not the bytes that the Hub states.*load again"
        ):
            load(MODEL)
        assert list(cache_of(MODEL).glob(f"snapshots/*/{name}")) == []
        contents = [path.read_bytes() for path in (cache_of(MODEL) / "blobs").iterdir()]
        assert saved[0][name][::-1] not in contents
    repo.changed.clear()
    load(MODEL)


@pytest.mark.slow
def test_a_server_that_dribbles_is_given_up(hub, saved, monkeypatch):
    repo = hub.add(MODEL, saved[0])
    repo.dribbled.add("adapter.safetensors")
    monkeypatch.setattr(hub_download, "_PROGRESS_S", 0.4)
    with pytest.raises(
        DownloadError, match=r"given up for adapter\.safetensors of us/dense: it sent too little for 0 s"
    ):
        load(MODEL)
    for _ in range(100):
        if hub.hung_up:
            break
        time.sleep(0.02)
    assert hub.hung_up == 1  # the call behind it has ended as well
    repo.dribbled.clear()
    load(MODEL)
    assert left_behind() == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["refused", "reset", "status", "nothing known of optional files"])
def test_what_is_cached_works_without_a_network(hub, saved, backbone_files, monkeypatch, caplog, how):
    hub.add(BACKBONE, backbone_files)
    fresh(BACKBONE)
    if how == "nothing known of optional files":  # as where another program has filled the cache
        shutil.rmtree(cache_of(BACKBONE) / ".no_exist")
    nowhere = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    if how == "status":
        hub.status = 503
    else:
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere)
    if how == "reset":

        def reset(**_):
            raise ConnectionResetError("reset by peer")

        monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", reset)
    hub.requests.clear()
    assert fresh(BACKBONE).embed_dim == 64
    assert hub.got() == []
    told = (
        "preprocessor_config.json and processor_config.json not in the cache; mean and deviation are those of its kind"
    )
    assert (told in caplog.text) == (how == "nothing known of optional files")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter.safetensors", "backbone.safetensors"])
def test_a_damaged_file_says_what_to_delete(hub, saved, name):
    hub.add(MODEL, saved[0])
    load(MODEL)
    damaged = next(cache_of(MODEL).glob(f"snapshots/*/{name}")).resolve()
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(DownloadError, match=f"{name} is damaged .* delete .*models--us--dense and load again"):
        load(MODEL)
    shutil.rmtree(cache_of(MODEL))
    load(MODEL)


# -------------------------------------------------------------------- names and paths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("us/dense", Repository("us/dense")),
        ("timm/vit_small_patch16_dinov3.lvd1689m", Repository("timm/vit_small_patch16_dinov3.lvd1689m")),
        ("us/dense@refs/pr/1", Repository("us/dense", "refs/pr/1")),
        *(
            (text, None)
            for text in (
                *("dense", "", "/us/dense", "./us", "../us", "us/..", "us/dense/", "us//dense", "a/b/c", "~/dense"),
                *(
                    "us\\dense",
                    "C:/dense",
                    "us/den--se",
                    "us/den..se",
                    "us/vits.pth",
                    "us/model.safetensors",
                    "us/dense\n",
                ),
                *(
                    "us/dense@",
                    "us/dense@../x",
                    "us/dense@/x",
                    "us/dense@a/../b",
                    "us/dense@.x",
                    "-us/x",
                    "us/x-",
                    "us/ x",
                ),
            )
        ),
    ],
)
def test_what_can_be_a_repository(text, expected):
    assert parse_repository(text) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "trick", ["../evil", "{here}/evil", "evil", "link/evil", "us/../evil", "~/evil", "us/evil@../../x"]
)
def test_paths_in_a_downloaded_config_are_not_followed(hub, saved, backbone_folder, tmp_path, monkeypatch, trick):
    """Every one of these names a folder that exists and holds the right weights."""
    (tmp_path / "here" / "us").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "here"):
        shutil.copytree(backbone_folder, folder / "evil")
    (tmp_path / "here" / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    trick = trick.format(here=tmp_path / "here")
    hub.add(MODEL, naming(saved[1], trick))
    with pytest.raises(BrixelError, match="a path in a downloaded config is not followed|no repository link/evil"):
        load(MODEL)
    hub.add(MODEL, naming(saved[0], trick))
    sources = load(MODEL).config.backbone.sources
    assert sources == (("link/evil",) if trick == "link/evil" else ())


@pytest.mark.parametrize("name", ["../../evil.safetensors", "/evil.safetensors", "a/b.safetensors", ".."])
def test_shards_stay_in_their_folder(hub, backbone_files, name):
    index = json.dumps({"weight_map": {"a": name}}).encode()
    hub.add(BACKBONE, {"config.json": backbone_files["config.json"], "model.safetensors.index.json": index})
    with pytest.raises(CheckpointError, match="names a shard outside its own folder"):
        fresh(BACKBONE)
    assert hub.got() == ["config.json", "model.safetensors.index.json"]


# -------------------------------------------------------------------- command line, processes, threads


@pytest.mark.slow
def test_the_command_line_takes_names(hub, saved, backbone_files, image_path, tmp_path, capsys):
    commit = hub.add(MODEL, saved[0]).commit
    hub.add("us/part", saved[1])
    hub.add(BACKBONE, backbone_files)
    assert main(["info", MODEL]) == 0
    assert hub.got() == ["config.json"]
    told = capsys.readouterr().out
    assert f"backbone.safetensors of {MODEL}, commit {commit}" in told
    assert f"adapter.safetensors of {MODEL}, commit {commit}" in told
    assert main(["info", "us/part"]) == 0
    assert f"{GATED}, {FREE}" in capsys.readouterr().out
    for options in (["--model", MODEL], ["--backbone", BACKBONE, "--short-side-px", "28"]):
        assert main(["show", str(image_path), *options, "-o", str(tmp_path / "panel.png")]) == 0
    capsys.readouterr()
    assert main(["show", str(image_path), "--model", "us/nothing", "-o", str(tmp_path / "other.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("brixel: error: no repository us/nothing at http://127.0.0.1")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_threads_share_a_model(hub, saved, image_path):
    hub.add(MODEL, saved[0])
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: load(MODEL), range(4)))
        maps = list(pool.map(lambda _: models[0].extract(image_path).features, range(8)))
    for features in maps:
        torch.testing.assert_close(features, maps[0], rtol=1e-5, atol=1e-5)
    assert left_behind() == []


PROCESS = """
import socket, sys
from pathlib import Path
connect, lookup = socket.socket.connect, socket.getaddrinfo
def refuse(*arguments):
    raise AssertionError(f"network: {arguments}")
socket.socket.connect = socket.getaddrinfo = refuse
from brixel import BrixelFeatures
from brixel.checkpoints import locate_files
locate_files.BUNDLED_FOLDERS["brixel-tiny"] = Path(sys.argv[1])
assert BrixelFeatures.from_pretrained("brixel-tiny", device="cpu").embed_dim == 64
assert not {name for name in sys.modules if name.startswith(("huggingface_hub", "httpx"))}
socket.socket.connect, socket.getaddrinfo = connect, lookup
print("ready", flush=True)
sys.stdin.readline()
print(BrixelFeatures.from_pretrained("us/dense", device="cpu").config.commits)
"""


@pytest.mark.slow
def test_two_processes_download_at_once_but_never_the_bundled_model(hub, saved, tmp_path):
    """Processes of their own read the endpoint from the environment; the client is imported when it is needed."""
    repo = hub.add(MODEL, saved[0])
    write_files(tmp_path / "tiny", saved[0])
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "tiny")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    running = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    ready = [process.stdout.readline() for process in running]
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120) for process in running]
    assert ready == ["ready\n"] * 2, outputs
    assert [out for out, _ in outputs] == [f"{{'us/dense': '{repo.commit}'}}\n"] * 2, outputs
    assert left_behind() == []
    load(MODEL, local_files_only=True)
