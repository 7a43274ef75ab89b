import copy
import errno
import os
import shutil

import numpy as np
import pytest
import torch
from helpers import maps_in
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from brixel import BrixelError, FeatureMap, MapFolder
from brixel.extraction import extract_files
from brixel.extraction.distributed import ProcessShare
from brixel.extraction.manifest import Manifest
from brixel.extraction.map_folder import verify
from brixel.extraction.writers import FileWriter
from brixel.images.find_images import find_images


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_image_gets_its_own_map(model, album, tmp_path, batch_size):
    summary = extract_files(model, find_images([album]), tmp_path / "out", batch_size=batch_size)
    assert (summary.written, summary.skipped, summary.failures) == (3, 0, [])
    for name in ("a.png", "b.JPG", "sub/a.png"):
        ours = FeatureMap.load(tmp_path / "out" / f"{name}.safetensors")
        expected = model.extract(album / name)
        torch.testing.assert_close(ours.features, expected.features, rtol=1e-5, atol=1e-5)
        assert ours.image_hw == expected.image_hw
        assert ours.meta["picture"] == name.rpartition("/")[2]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_unreadable_images_are_listed_and_cost_no_other_map(model, album, tmp_path, batch_size):
    (album / "aa.png").write_bytes((album / "a.png").read_bytes()[:200])
    (album / "c.png").write_bytes(b"")
    summary = extract_files(model, find_images([album]), tmp_path / "out", batch_size=batch_size)
    assert summary.written == 3
    assert [path.name for path, _ in summary.failures] == ["aa.png", "c.png"]
    assert all(path.name in str(error) for path, error in summary.failures)
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 3


def test_an_image_that_vanishes_is_listed(model, album, tmp_path):
    images = find_images([album])
    (album / "b.JPG").unlink()
    summary = extract_files(model, images, tmp_path / "out")
    assert summary.written == 2
    assert [path.name for path, _ in summary.failures] == ["b.JPG"]


def test_long_names_can_be_written(model, image_path, tmp_path):
    long = tmp_path / f"{'x' * 228}.png"
    shutil.copy(image_path, long)
    assert extract_files(model, find_images([long]), tmp_path / "out").written == 1


def test_finished_maps_are_skipped_unless_overwritten(model, album, tmp_path):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out)
    mine = b"m" * (out / "a.png.safetensors").stat().st_size
    (out / "a.png.safetensors").write_bytes(mine)
    (out / "b.JPG.safetensors").unlink()
    summary = extract_files(model, find_images([album]), out)
    assert (summary.written, summary.skipped) == (1, 2)
    assert (out / "a.png.safetensors").read_bytes() == mine
    summary = extract_files(model, find_images([album]), out, overwrite=True)
    assert (summary.written, summary.skipped) == (3, 0)
    FeatureMap.load(out / "a.png.safetensors")


def test_a_file_that_is_in_no_manifest_is_not_written_over(model, album, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "b.JPG.safetensors").write_bytes(b"mine")
    with pytest.raises(BrixelError, match=r"b\.JPG\.safetensors exists and is in no manifest"):
        extract_files(model, find_images([album]), out)
    assert (out / "b.JPG.safetensors").read_bytes() == b"mine"
    assert extract_files(model, find_images([album]), out, overwrite=True).written == 3


def test_an_image_that_changed_is_extracted_again(model, album, tmp_path):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out)
    shutil.copy(album / "b.JPG", album / "a.png")  # other content under the old name
    summary = extract_files(model, find_images([album]), out)
    assert (summary.written, summary.skipped) == (1, 2)
    assert MapFolder(out)["a.png"].image_hw == FeatureMap.load(out / "b.JPG.safetensors").image_hw
    assert verify(out) == []


def test_a_file_that_was_cut_short_is_written_again(model, album, tmp_path):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out)
    os.truncate(out / "a.png.safetensors", 100)
    summary = extract_files(model, find_images([album]), out)
    assert (summary.written, summary.skipped) == (1, 2)
    assert verify(out) == []


@pytest.mark.parametrize(
    "changed", [{"short_side_px": 56}, {"ending": ".npy"}, {"save_dtype": torch.float16}, {"shard_bytes": 1000}]
)
def test_other_settings_are_refused(model, album, tmp_path, changed):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(BrixelError, match=r"out holds maps made with other settings \(.*, not .*\): give the settings"):
        extract_files(model, find_images([album]), out, **changed)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert extract_files(model, find_images([album]), out, overwrite=True, **changed).written == 3


def test_another_adapter_is_another_setting(model, album, tmp_path):
    extract_files(model, find_images([album]), tmp_path / "out")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.out.bias.add_(1)
    with pytest.raises(BrixelError, match=r"other settings \(weights: [0-9a-f]{16}, not [0-9a-f]{16}\)"):
        extract_files(other, find_images([album]), tmp_path / "out")


def test_a_full_disk_stops_the_run_and_keeps_what_was_finished(model, album, tmp_path, monkeypatch):
    out, written = tmp_path / "out", []

    def fail(array, path, *rest):
        if written:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        save_file(array, path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("brixel.feature_maps.storage.save_file", fail)
        with pytest.raises(
            BrixelError, match="No space left on device.*; the maps that were finished are kept: free some space"
        ):
            extract_files(model, find_images([album]), out)
    assert [path.name for path in out.rglob("*") if path.is_file()].count("a.png.safetensors") == 1
    assert len(MapFolder(out)) == 1
    assert verify(out) == []
    summary = extract_files(model, find_images([album]), out)
    assert (summary.written, summary.skipped) == (2, 1)


def test_the_safetensors_error_for_a_full_disk_is_explained(model, album, tmp_path, monkeypatch):
    def fail(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("brixel.feature_maps.storage.save_file", fail)
    with pytest.raises(BrixelError, match="No space left on device.*start the same command again"):
        extract_files(model, find_images([album]), tmp_path / "out")


def test_a_folder_that_cannot_be_written_to(model, album, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(BrixelError, match="cannot write into .*file.*; give another folder, or correct its perm"):
        extract_files(model, find_images([album]), tmp_path / "file" / "out")


def test_two_runs_do_not_write_to_one_folder(model, album, tmp_path):
    with Manifest(tmp_path, {}, ProcessShare()), pytest.raises(BrixelError, match="another run writes to"):
        extract_files(model, find_images([album]), tmp_path)


def test_maps_can_be_saved_in_another_dtype(model, album, tmp_path):
    extract_files(model, find_images([album / "a.png"]), tmp_path, save_dtype=torch.bfloat16)
    ours = MapFolder(tmp_path)["a.png"].features
    assert torch.equal(ours, model.extract(album / "a.png").features.bfloat16())
    with pytest.raises(BrixelError, match="npy does not support bfloat16"):
        extract_files(model, find_images([album]), tmp_path, ending=".npy", save_dtype=torch.bfloat16)
    with pytest.raises(BrixelError, match=r"shards of 5 bytes as \.npy"):
        extract_files(model, find_images([album]), tmp_path, ending=".npy", shard_bytes=5)


def test_features_that_do_not_fit_float16_are_listed(model, album, tmp_path):
    large = copy.deepcopy(model)
    with torch.no_grad():
        large.head.out.bias += 1e6
    summary = extract_files(large, find_images([album]), tmp_path / "out", save_dtype=torch.float16)
    assert summary.written == 0
    assert "a.png: its features do not fit float16; save as bfloat16" in str(summary.failures[0][1])


def test_npy_maps_are_plain_arrays(model, album, tmp_path):
    extract_files(model, find_images([album / "a.png"]), tmp_path / "out", ending=".npy")
    array = np.load(tmp_path / "out" / "a.png.npy")
    np.testing.assert_array_equal(array, model.extract(album / "a.png").numpy())


# ---------------------------------------------------------------- shards


@pytest.mark.slow
@pytest.mark.parametrize("maps_per_shard", [1, 2, 9])
def test_shards_hold_what_files_would(model, album, tmp_path, maps_per_shard):
    images = find_images([album])
    extract_files(model, images, tmp_path / "files")
    limit = maps_per_shard * model.extract(album / "a.png").features.nbytes
    summary = extract_files(model, images, tmp_path / "shards", shard_bytes=limit)
    assert summary.written == 3
    found = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert found == [f"maps-0-{number:05d}.safetensors" for number in range(-(-3 // maps_per_shard))]
    files, shards = MapFolder(tmp_path / "files"), MapFolder(tmp_path / "shards")
    assert list(files) == list(shards) == ["a.png", "b.JPG", "sub/a.png"]
    for name, ours in shards.items():
        assert torch.equal(ours.features, files[name].features)
        assert (ours.image_hw, ours.stride, ours.meta) == (
            files[name].image_hw,
            files[name].stride,
            files[name].meta,
        )
    assert verify(tmp_path / "shards") == []
    assert extract_files(model, images, tmp_path / "shards", shard_bytes=limit).skipped == 3


def test_a_lost_shard_is_written_again(model, album, tmp_path):
    extract_files(model, find_images([album]), tmp_path, shard_bytes=1)
    (tmp_path / "maps-0-00001.safetensors").unlink()
    summary = extract_files(model, find_images([album]), tmp_path, shard_bytes=1)
    assert (summary.written, summary.skipped) == (1, 2)
    assert len(MapFolder(tmp_path)) == 3
    assert MapFolder(tmp_path)["b.JPG"].features.shape[0] == model.embed_dim


def test_a_shard_that_was_not_listed_is_written_over(model, album, tmp_path):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out, shard_bytes=1)
    before = maps_in(out)
    manifest = out / "manifest-0.jsonl"
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:-1]))
    extract_files(model, find_images([album]), out, shard_bytes=1)
    assert maps_in(out) == before


def test_overwriting_removes_earlier_shards(model, album, tmp_path):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out, shard_bytes=1)
    extract_files(model, find_images([album]), out, shard_bytes=2**30, overwrite=True)
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert names == ["manifest-0.jsonl", "maps-0-00000.safetensors"]


@pytest.mark.parametrize("removed", [False, True])
def test_an_output_folder_that_is_moved_meanwhile_ends_the_run(model, album, tmp_path, monkeypatch, removed):
    out, plain_add = tmp_path / "out", FileWriter.add

    def add_and_move(writer, source, feature_map):
        written = plain_add(writer, source, feature_map)
        if out.exists():
            shutil.rmtree(out) if removed else out.rename(tmp_path / "moved")
        return written

    monkeypatch.setattr(FileWriter, "add", add_and_move)
    with pytest.raises(BrixelError, match=f"{out} was moved or removed while maps were written into it"):
        extract_files(model, find_images([album]), out)
    assert not out.exists()
    if removed:
        return
    monkeypatch.undo()
    (tmp_path / "moved").rename(out)  # put back, the run goes on
    assert extract_files(model, find_images([album]), out).written == 3
    assert verify(out) == []


def test_an_input_folder_that_is_moved_meanwhile_is_reported(model, album, tmp_path):
    images = find_images([album])
    album.rename(tmp_path / "elsewhere")
    summary = extract_files(model, images, tmp_path / "out")
    assert (summary.written, len(summary.failures)) == (0, 3)
    assert all("No such file" in str(error) for _, error in summary.failures)


def test_what_is_left_out_is_in_the_summary(model, album, tmp_path):
    assert extract_files(model, find_images([album]), tmp_path / "out").left_out == {".txt": 1}
    assert extract_files(model, list(find_images([album])), tmp_path / "out").left_out == {}


@pytest.mark.parametrize("shard_bytes", [None, 2**20])
def test_a_clock_that_is_set_back_changes_no_order(model, album, tmp_path, monkeypatch, shard_bytes):
    """The last map of an image is the one in the folder, whatever the clock said when it was made."""
    out = tmp_path / "out"
    for year, size, count in ((2040, 40, 3), (1990, 44, 1), (2020, 48, 1)):
        monkeypatch.setattr("time.time", lambda year=year: (year - 1970) * 365.25 * 86400)
        Image.new("RGB", (size, size)).save(album / "a.png")
        assert extract_files(model, find_images([album]), out, shard_bytes=shard_bytes).written == count
        assert MapFolder(out)["a.png"].image_hw == (size, size)
        assert extract_files(model, find_images([album]), out, shard_bytes=shard_bytes).written == 0
