"""Probes that are kept: saved and loaded with the model they need, and refused with another."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from brixel import BrixelError, BrixelFeatures, CheckpointError, FeatureMap
from brixel.errors import DamagedFileError, MissingFileError
from brixel.probe import RegressionProbe, SegmentationProbe, load_probe


@pytest.fixture(scope="module")
def tiny():
    return BrixelFeatures.from_pretrained("brixel-tiny", device="cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A probe of the bundled tiny model, by its name, with its image and its folder."""
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, 32:] = (250, 80, 20)
    mask = np.zeros((48, 64), int)
    mask[:, 32:] = 5
    probe = SegmentationProbe("brixel-tiny", short_side_px=48, regularisation=0.5, class_names={0: "dark", 5: "light"})
    folder = tmp_path_factory.mktemp("probes") / "probe"
    probe.fit([image], [mask]).save(folder)
    return probe, image, mask, folder


@pytest.mark.slow
def test_a_probe_comes_back_with_its_model(saved):
    probe, image, mask, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["probe.json", "probe.safetensors"]
    again = SegmentationProbe.load(folder)
    assert again.get_params() == {**probe.get_params(), "class_names": {0: "dark", 5: "light"}}
    assert np.array_equal(again.predict_proba(image), probe.predict_proba(image))
    assert again.score([image], [mask]) == probe.score([image], [mask])
    assert again.classes_.tolist() == [0, 5]
    assert [again.name_of(label) for label in (0, 5, 7)] == ["dark", "light", "7"]
    assert isinstance(load_probe(folder), SegmentationProbe)
    again.save(folder)  # over itself
    assert np.array_equal(load_probe(folder).predict(image), probe.predict(image))


@pytest.mark.slow
def test_a_model_that_was_given_as_an_object_is_kept_beside(saved, tiny, tmp_path):
    _, image, mask, folder = saved
    probe = SegmentationProbe(tiny, short_side_px=48).fit([image], [mask])
    probe.save(tmp_path / "probe")
    assert (tmp_path / "probe" / "model" / "adapter.safetensors").exists()
    moved = shutil.move(tmp_path / "probe", tmp_path / "moved")
    again = SegmentationProbe.load(moved, device="cpu")
    assert np.array_equal(again.predict_proba(image), probe.predict_proba(image))
    assert np.array_equal(SegmentationProbe.load(folder, model=tiny).predict(image), probe.predict(image))


@pytest.mark.parametrize("change", ["backbone", "upsampler"])
def test_another_model_is_refused(saved, change):
    folder = saved[3]
    other = BrixelFeatures.from_pretrained("brixel-tiny", device="cpu")
    with torch.no_grad():
        for parameter in getattr(other, change).parameters():
            parameter.mul_(1.1)
    with pytest.raises(
        CheckpointError, match=f"fitted with brixel-tiny .*the model given, .*other weights in its {change}"
    ):
        SegmentationProbe.load(folder, model=other)


def test_a_model_of_other_sizes_is_refused(saved, colours):
    with pytest.raises(CheckpointError, match="whose width is 192; that of the model given, .* is 32: give the model"):
        SegmentationProbe.load(saved[3], model=colours)
    with pytest.raises(BrixelError, match="model is 'brixel-tiny'; expected a BrixelFeatures, or None"):
        SegmentationProbe.load(saved[3], model="brixel-tiny")


def test_a_model_in_another_dtype_is_the_same(saved):
    _, image, _, folder = saved
    half = SegmentationProbe.load(folder, device="cpu", dtype="bfloat16")
    assert half.model_.dtype == torch.bfloat16
    assert half.predict(image).shape == (48, 64)


def test_a_model_that_is_gone_is_named(saved, tmp_path):
    folder = shutil.copytree(saved[3], tmp_path / "probe")
    described = json.loads((folder / "probe.json").read_text())
    described["model"]["name"] = str(tmp_path / "gone")
    (folder / "probe.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="the model of the probe in .* cannot be loaded .*; give it as model="):
        SegmentationProbe.load(folder)
    with pytest.raises(MissingFileError, match="holds no probe.json: expected a folder that a probe was saved in"):
        SegmentationProbe.load(tmp_path / "nothing")


def change_json(folder, **fields):
    path = folder / "probe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_weights(folder, **tensors):
    path = folder / "probe.safetensors"
    save_file({**load_file(path), **tensors}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "probe.json").write_text("{"), "probe.json is not JSON"),
        (lambda folder: (folder / "probe.json").write_text("[]"), "the file is \\[\\]; expected a table"),
        (lambda folder: change_json(folder, kind="dance"), "kind in the file is 'dance'"),
        (lambda folder: change_json(folder, learned={"classes": [1, 0]}), r"classes are \[1, 0\] for 2 outputs"),
        (lambda folder: change_json(folder, params={"regularisation": -1}), "regularisation is -1; expected"),
        (lambda folder: change_json(folder, params={"colour": 1}), "unknown parameter 'colour'"),
        (lambda folder: change_json(folder, model={"name": 1}), "model lacks title"),
        (lambda folder: (folder / "probe.safetensors").write_bytes(b"x" * 40), "damaged or no safetensors file"),
        (lambda folder: change_weights(folder, bias=torch.zeros(3)), r"'bias': \(3,\).* expected finite float32"),
        (lambda folder: change_weights(folder, bias=torch.full((2,), torch.nan)), "expected finite float32"),
        (
            lambda folder: change_weights(folder, bias=torch.ones(2)),
            "is not the file that probe.json beside it was written for",
        ),
        (lambda folder: change_weights(folder, more=torch.ones(2)), "expected mean, deviation, weight, bias"),
    ],
)
def test_damaged_folders_are_named(saved, tmp_path, change, message):
    folder = shutil.copytree(saved[3], tmp_path / "probe")
    change(folder)
    with pytest.raises(DamagedFileError, match=message):
        SegmentationProbe.load(folder)


def test_newer_formats_other_kinds_and_other_files(saved, tmp_path):
    folder = shutil.copytree(saved[3], tmp_path / "probe")
    with pytest.raises(CheckpointError, match="holds a segmentation probe; load it with its own class"):
        RegressionProbe.load(folder)
    change_json(folder, format_version=2)
    with pytest.raises(CheckpointError, match="has format 2, newer than 1, which we read: update brixel"):
        load_probe(folder)
    (folder / "probe.safetensors").unlink()
    change_json(folder, format_version=1)
    with pytest.raises(MissingFileError, match="lacks probe.safetensors"):
        load_probe(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(BrixelError, match="full holds files, and no probe; give a new folder"):
        saved[0].save(tmp_path / "full")
    with pytest.raises(BrixelError, match="thesis.txt is a file; expected a folder"):
        saved[0].save(tmp_path / "full" / "thesis.txt")


def test_a_regression_probe_of_maps_is_kept_without_a_model(tmp_path, tiny):
    feature_map = FeatureMap(torch.randn(4, 3, 5), (3, 5), (1.0, 1.0))
    probe = RegressionProbe(log=True).fit([feature_map], [np.arange(15).reshape(3, 5)])
    probe.save(tmp_path / "probe")
    again = load_probe(tmp_path / "probe")
    assert isinstance(again, RegressionProbe)
    assert again.model_ is None
    assert np.array_equal(again.predict(feature_map), probe.predict(feature_map))
    with pytest.raises(CheckpointError, match="the probe reads 4 channels, and the model gives 192"):
        load_probe(tmp_path / "probe", model=tiny)
