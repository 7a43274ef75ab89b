"""Runs that are started again after users changed a folder, and images that a run cannot use."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from brixel import BrixelError, BrixelFeatures, FeatureMap, MapFolder
from brixel.errors import MemoryLimitError
from brixel.extraction import extract_files
from brixel.extraction import manifest as manifest_module
from brixel.extraction.distributed import ProcessShare
from brixel.extraction.manifest import Manifest, latest_by_image
from brixel.extraction.map_folder import verify
from brixel.extraction.pending_images import count_finished_elsewhere
from brixel.images.find_images import find_images
from brixel.inference.memory.limited_forward import MemoryLimitedForward


@pytest.fixture(scope="module")
def model(backbone_folder):
    return BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=28)


@pytest.fixture
def folder(tmp_path):
    """0.png to 3.png, of 28 x 28 px and different colours."""
    (tmp_path / "in").mkdir()
    for index in range(4):
        Image.new("RGB", (28, 28), (60 * index, 90, 200)).save(tmp_path / "in" / f"{index}.png")
    return tmp_path / "in"


def extract(model, folder, out, **options):
    return extract_files(model, find_images([folder]), out, **options)


@pytest.mark.parametrize("options", [{}, {"shard_bytes": 1}])
def test_an_image_that_was_put_back_is_extracted_again(model, folder, tmp_path, caplog, options):
    out, first = tmp_path / "out", tmp_path / "first.png"
    extract(model, folder, out, **options)
    before = MapFolder(out)["0.png"].features
    shutil.copy2(folder / "0.png", first)
    Image.new("RGB", (28, 56), "white").save(folder / "0.png")
    assert extract(model, folder, out, **options).written == 1
    assert "1 images differ from those whose maps are in" in caplog.text
    shutil.copy2(first, folder / "0.png")  # with its old time of change
    assert extract(model, folder, out, **options).written == 1
    assert MapFolder(out)["0.png"].features.equal(before)
    assert extract(model, folder, out, **options).skipped == 4
    assert verify(out) == []


def test_a_lost_shard_is_not_missed_once_its_maps_are_written_again(model, folder, tmp_path):
    out = tmp_path / "out"
    extract(model, folder, out, shard_bytes=1)
    (out / "maps-0-00001.safetensors").unlink()
    assert [line.endswith(" does not exist") for line in verify(out)] == [True]
    extract(model, folder, out, shard_bytes=1)
    assert verify(out) == []


def test_killed_between_the_first_map_and_its_entry_a_run_goes_on(model, folder, tmp_path):
    out = tmp_path / "out"
    extract(model, folder, out)
    path = out / "manifest-0.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    assert extract(model, folder, out).written == 4


def test_a_file_in_the_way_stops_the_first_run_and_the_second(model, folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "0.png.safetensors").write_bytes(b"mine")
    for _ in range(2):
        with pytest.raises(BrixelError, match=r"0\.png\.safetensors exists and is in no manifest"):
            extract(model, folder, out)
    assert (out / "0.png.safetensors").read_bytes() == b"mine"


def test_a_name_that_cannot_be_written_costs_no_other_map(model, folder, tmp_path):
    long = folder / f"{'x' * 248}.png"
    shutil.copy(folder / "0.png", long)
    summary = extract(model, folder, tmp_path / "out")
    assert (summary.written, [path for path, _ in summary.failures]) == (4, [long])
    assert "is longer than 255 bytes" in str(summary.failures[0][1])
    assert extract(model, folder, tmp_path / "shards", shard_bytes=1).written == 5


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8")
def test_a_name_that_is_not_utf8_goes_into_a_file_and_into_no_shard(model, folder, tmp_path):
    shutil.copy(folder / "0.png", os.path.join(os.fsencode(folder), b"0\xff.png"))
    assert extract(model, folder, tmp_path / "out").written == 5
    summary = extract(model, folder, tmp_path / "shards", shard_bytes=1)
    assert (summary.written, len(summary.failures)) == (4, 1)
    assert "is no UTF-8" in str(summary.failures[0][1])


def test_maps_too_large_for_memory_are_computed_into_their_files(model, folder, tmp_path, monkeypatch):
    Image.new("RGB", (84, 56), "red").save(folder / "1.png")
    expected = model.extract(folder / "1.png", short_side_px="native")
    check = MemoryLimitedForward.check

    def stingy(run, image_hw, **options):
        if image_hw == (56, 84) and not options.get("to_file"):
            raise MemoryLimitError("too large")
        check(run, image_hw, **options)

    monkeypatch.setattr(MemoryLimitedForward, "check", stingy)
    summary = extract(model, folder, tmp_path / "out", ending=".npy", short_side_px="native")
    assert (summary.written, summary.failures) == (4, [])
    made = FeatureMap.load(tmp_path / "out" / "1.png.npy")
    assert (made.image_hw, made.stride) == (expected.image_hw, expected.stride)
    assert made.features.equal(expected.features)
    assert verify(tmp_path / "out") == []
    for options in ({}, {"shard_bytes": 1}):  # these are written whole
        summary = extract(model, folder, tmp_path / f"other{len(options)}", short_side_px="native", **options)
        assert [path.name for path, _ in summary.failures] == ["1.png"]


def test_shards_take_half_of_the_limit_at_most(model, folder, tmp_path, monkeypatch):
    """With maps that cost nothing: two of them fit into a quarter of the limit, and the model gets the other half."""
    features = torch.zeros(64, 8, 8)
    size, limits = features.nbytes, []

    def stream_all(images, *, memory_limit, **options):
        limits.append(memory_limit)
        for _ in images:
            yield FeatureMap(features.clone(), (28, 28), (3.5, 3.5))

    monkeypatch.setattr(model, "stream_all", stream_all)
    for name, options, shards in (("whole", {}, 1), ("small", {"memory_limit": 10 * size}, 2)):
        summary = extract(model, folder, tmp_path / name, shard_bytes=10**9, **options)
        assert (summary.written, summary.failures) == (4, [])
        assert len(list((tmp_path / name).glob("*.safetensors"))) == shards
    assert limits == [None, 10 * size - 2 * (10 * size // 4)]


@pytest.mark.slow
def test_shards_are_smaller_where_the_memory_limit_is_small(model, folder, tmp_path):
    limit = 8 * model.plan((28, 28), short_side_px="native").peak_bytes
    cells = model.extract(folder / "0.png").features.nbytes
    for index in range(4):  # two of their maps fit into a quarter of the limit
        Image.new("RGB", (28, 28 * (limit // 10 // cells)), "red").save(folder / f"{index}.png")
    for name, options, shards in (("whole", {}, 1), ("small", {"memory_limit": limit}, 2)):
        summary = extract(model, folder, tmp_path / name, shard_bytes=10**9, **options)
        assert (summary.written, summary.failures) == (4, [])
        assert len(list((tmp_path / name).glob("*.safetensors"))) == shards


def test_images_of_other_processes_count_in_the_progress_bar(model, folder, tmp_path, monkeypatch):
    images, out = find_images([folder]), tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    written = extract_files(model, images, out).written
    share = ProcessShare(0, 2)
    with Manifest(out, {}, ProcessShare(0, 1), overwrite=True) as manifest:
        manifest.written = manifest_module.read_manifests(out)
        assert count_finished_elsewhere(images, manifest, share) == written == len(latest_by_image(manifest.written))


@pytest.mark.slow
def test_a_corrupt_image_does_not_stop_the_other_processes(model, folder, tmp_path):
    """With `torchrun` itself."""
    for index in range(4, 24):
        shutil.copy(folder / "0.png", folder / f"{index}.png")
    (folder / "junk.png").write_bytes(b"no image")
    model.save_pretrained(tmp_path / "model", include_backbone=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "brixel"]
    arguments = ["extract", folder, "-o", tmp_path / "out", "--model", tmp_path / "model", "--device", "cpu"]
    for _ in range(2):
        done = subprocess.run([*launcher, *map(str, arguments)], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert "skipped: " in done.stderr
    assert "process 1 of 2: 0 written" in done.stdout
    assert len(MapFolder(tmp_path / "out")) == 24
