import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from brixel import BrixelError, BrixelFeatures, FeatureMap
from brixel.extraction import extract_files
from brixel.pictures import find_pictures


@pytest.fixture(scope="module")
def model(backbone_folder):
    return BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=28)


@pytest.fixture
def album(tmp_path, picture):
    """a.png, b.JPG, sub/a.png; a text file and a hidden picture that do not count."""
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/a.png", ".hidden.png"):
        shutil.copy(picture, folder / name)
    Image.open(picture).rotate(90, expand=True).save(folder / "b.JPG")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_folders_keep_their_structure_and_files_go_by_name(album, picture):
    found = find_pictures([album, picture])
    assert [str(place) for _, place in found] == ["a.png", "b.JPG", "sub/a.png", "waves.png"]
    assert [path for path, _ in found] == [album / "a.png", album / "b.JPG", album / "sub/a.png", picture]


def test_one_picture_named_twice_counts_once(album):
    assert len(find_pictures([album, album / "a.png"])) == 3


def test_folders_within_each_other_count_their_pictures_once(album):
    places = [str(place) for _, place in find_pictures([album, album / "sub"])]
    assert places == ["a.png", "b.JPG", "sub/a.png"]


def test_long_names_can_be_written(model, picture, tmp_path):
    long = tmp_path / f"{'x' * 228}.png"
    shutil.copy(picture, long)
    assert extract_files(model, find_pictures([long]), tmp_path / "out").written == 1


def test_wrong_paths_say_so(album, tmp_path):
    with pytest.raises(BrixelError, match="no picture or folder at .*missing"):
        find_pictures([album / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BrixelError, match="no pictures in .*empty"):
        find_pictures([tmp_path / "empty"])
    with pytest.raises(BrixelError, match=r"would both be written as a\.png; extract them apart"):
        find_pictures([album / "a.png", album / "sub" / "a.png"])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_picture_gets_its_own_map(model, album, tmp_path, batch_size):
    report = extract_files(model, find_pictures([album]), tmp_path / "out", batch_size=batch_size)
    assert (report.written, report.skipped, report.failures) == (3, 0, [])
    for name in ("a.png", "b.JPG", "sub/a.png"):
        ours = FeatureMap.load(tmp_path / "out" / f"{name}.safetensors")
        expected = model.extract(album / name)
        torch.testing.assert_close(ours.features, expected.features, rtol=1e-5, atol=1e-5)
        assert ours.image_hw == expected.image_hw
        assert ours.meta["picture"] == name.rpartition("/")[2]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_unreadable_pictures_are_listed_and_cost_no_other_map(model, album, tmp_path, batch_size):
    (album / "aa.png").write_bytes((album / "a.png").read_bytes()[:200])
    (album / "c.png").write_bytes(b"")
    report = extract_files(model, find_pictures([album]), tmp_path / "out", batch_size=batch_size)
    assert report.written == 3
    assert [path.name for path, _ in report.failures] == ["aa.png", "c.png"]
    assert all(path.name in str(error) for path, error in report.failures)
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 3


def test_a_picture_that_vanishes_is_listed(model, album, tmp_path):
    pictures = find_pictures([album])
    (album / "b.JPG").unlink()
    report = extract_files(model, pictures, tmp_path / "out")
    assert report.written == 2
    assert [path.name for path, _ in report.failures] == ["b.JPG"]


def test_what_exists_is_skipped_unless_overwritten(model, album, tmp_path):
    out = tmp_path / "out"
    extract_files(model, find_pictures([album]), out)
    (out / "a.png.safetensors").write_bytes(b"mine")
    (out / "b.JPG.safetensors").unlink()
    report = extract_files(model, find_pictures([album]), out)
    assert (report.written, report.skipped) == (1, 2)
    assert (out / "a.png.safetensors").read_bytes() == b"mine"
    report = extract_files(model, find_pictures([album]), out, overwrite=True)
    assert (report.written, report.skipped) == (3, 0)
    FeatureMap.load(out / "a.png.safetensors")


def test_a_write_that_fails_leaves_nothing_half_done(model, album, tmp_path, monkeypatch):
    def fail(array, path, *_):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("brixel.feature_map.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        extract_files(model, find_pictures([album]), tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_npy_maps_are_plain_arrays(model, album, tmp_path):
    extract_files(model, find_pictures([album / "a.png"]), tmp_path / "out", ending=".npy")
    array = np.load(tmp_path / "out" / "a.png.npy")
    np.testing.assert_array_equal(array, model.extract(album / "a.png").numpy())
