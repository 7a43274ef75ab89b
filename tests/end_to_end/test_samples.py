"""What version 0.1 wrote is read by this one, and goes on to the same results: `tests/samples`."""

import json
import lzma
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ROOT, records_of
from safetensors.torch import load_file

import brixel.train
from brixel import BrixelFeatures, FeatureMap, MapFolder
from brixel.extraction import extract_files
from brixel.images.crops import CropSettings
from brixel.images.find_images import find_images
from brixel.train.config import make_config, read_settings
from brixel.train.data import CropDataset, find_training_images
from brixel.train.teacher_cache import TeacherCache

SAMPLES = ROOT / "tests" / "samples" / "v0_1"


@pytest.fixture
def samples(tmp_path, monkeypatch) -> Path:
    """A copy of the samples as working folder; the images have the times that the manifests name."""
    copy = tmp_path / "samples"
    shutil.copytree(SAMPLES, copy)
    for number in range(3):
        os.utime(copy / "images" / f"{number}.png", ns=(10**18 + number, 10**18 + number))
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture(scope="module")
def model() -> BrixelFeatures:
    return BrixelFeatures.from_pretrained(SAMPLES / "model", device="cpu", dtype="float32")


def test_a_model_gives_the_same_features(model):
    tensors = load_file(SAMPLES / "outputs.safetensors")
    with torch.no_grad():
        features = model(tensors["pixels"])
    torch.testing.assert_close(features, tensors["features"], rtol=0, atol=1e-5)
    extracted = model.extract(SAMPLES / "images" / "0.png")
    torch.testing.assert_close(extracted.features, tensors["extracted"], rtol=0, atol=1e-5)


def test_a_model_is_written_with_the_same_weights_and_facts(model, tmp_path):
    model.to(torch.float16).save_pretrained(tmp_path, include_backbone=True)
    model.float()
    for name in ("adapter.safetensors", "backbone.safetensors"):
        assert (tmp_path / name).read_bytes() == (SAMPLES / "model" / name).read_bytes()
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, SAMPLES / "model"))
    assert ours == theirs


def test_maps_are_read(model):
    whole, array = (FeatureMap.load(SAMPLES / f"map.{ending}") for ending in ("safetensors", "npy"))
    assert whole.features.equal(load_file(SAMPLES / "outputs.safetensors")["extracted"])
    assert array.features.equal(whole.features.to(torch.bfloat16))
    assert whole.image_hw == array.image_hw == (60, 90)
    assert whole.stride == array.stride
    assert whole.meta == array.meta
    assert whole.meta["resized_hw"] == "56x84"


@pytest.mark.parametrize(("folder", "options"), [("extracted_files", {}), ("extracted_shards", {"shard_bytes": 60000})])
def test_a_folder_of_maps_is_read_and_nothing_is_done_again(model, samples, folder, options):
    maps = MapFolder(folder)
    assert sorted(maps) == ["0.png", "1.png", "2.png"]
    assert maps["0.png"].features.equal(FeatureMap.load("map.safetensors").features.half())
    before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    summary = extract_files(model, find_images([Path("images")]), Path(folder), save_dtype=torch.float16, **options)
    assert (summary.written, summary.skipped, summary.failures) == (0, 3, [])
    assert {name: (Path(folder) / name).read_bytes() for name in before} == before


def test_a_teacher_cache_is_opened_as_the_same(model, samples):
    vit = model.config.backbone.vit
    settings = CropSettings(112, 1.5, True, "upsample", 3, True)
    dataset = CropDataset(find_training_images([Path("images")]), settings, mean=vit.mean, std=vit.std)

    def teacher(pixels):
        raise AssertionError("nothing is left to compute")

    cache = TeacherCache.build_or_open(
        Path("teacher_cache"), dataset=dataset, count=4, teacher=teacher, teacher_id={"name": "sample"}
    )
    assert len(cache) == 4
    student, features = cache[1]
    torch.testing.assert_close(student, dataset[1].student, rtol=0, atol=2e-3)  # kept in half precision
    assert features.shape == (32, 8, 8)


@pytest.mark.slow
def test_a_training_run_goes_on_to_the_same_weights(samples):
    run = samples / "run"
    (run / "state.pt").write_bytes(lzma.decompress((run / "state.pt.xz").read_bytes()))
    expected = json.loads((run / "expected.json").read_text())
    trained = brixel.train.distill(make_config(read_settings(run / "train.toml")))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("step", "loss", "l1", "edge", "spectral", "lr"):
        assert last[name] == pytest.approx(expected["metrics"][-1][name], rel=1e-5), name
    assert torch.load(run / "state.pt", weights_only=True)["progress"]["best"] == 4  # without validation, the last step
    sums = {name: float(tensor.double().abs().sum()) for name, tensor in trained.upsampler.state_dict().items()}
    assert sums == pytest.approx(expected["sums"], rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_chooses_its_best_model_anew(samples):
    """Version 0.1 kept the best raw cosine, here 0.99, with which centred cosines cannot be compared."""
    run = samples / "run"
    (run / "state.pt").write_bytes(lzma.decompress((run / "state.pt.xz").read_bytes()))
    state = torch.load(run / "state.pt", weights_only=True)
    assert state["format_version"] == 1
    state["progress"]["best"] = 0.99
    state["config"]["val"] = ["images"]
    torch.save(state, run / "state.pt")
    (run / "adapter.safetensors").write_bytes(b"the best by raw cosine")
    settings = {**read_settings(run / "train.toml"), "val": ["images"]}
    brixel.train.distill(make_config(settings))
    (check,) = [record for record in records_of(run) if "centred_cosine" in record]
    resumed = torch.load(run / "state.pt", weights_only=True)
    assert resumed["format_version"] == 2
    assert resumed["progress"]["best"] == check["centred_cosine"] < 0.99
    assert (run / "adapter.safetensors").read_bytes() == (run / "last" / "adapter.safetensors").read_bytes()
