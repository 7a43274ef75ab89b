import contextlib
import copy
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from brixel import BrixelError, BrixelFeatures, FeatureMap, MapFolder
from brixel.extraction import extract_files
from brixel.extraction.distributed import Share
from brixel.extraction.manifest import Manifest, SourceImage, Written, manifests, read_manifests
from brixel.extraction.map_folder import verify
from brixel.images.find_images import find_images


@pytest.fixture(scope="module")
def model(backbone_folder):
    return BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=28)


@pytest.fixture
def album(tmp_path, image_path):
    """a.png, b.JPG, sub/a.png; a text file and a hidden image that do not count."""
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/a.png", ".hidden.png"):
        shutil.copy(image_path, folder / name)
    Image.open(image_path).rotate(90, expand=True).save(folder / "b.JPG")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_folders_keep_their_structure_and_files_go_by_name(album, image_path):
    found = find_images([album, image_path])
    assert [str(place) for _, place in found] == ["a.png", "b.JPG", "sub/a.png", "waves.png"]
    assert [path for path, _ in found] == [album / "a.png", album / "b.JPG", album / "sub/a.png", image_path]


def test_one_image_named_twice_counts_once(album):
    assert len(find_images([album, album / "a.png"])) == 3


def test_folders_within_each_other_count_their_images_once(album):
    places = [str(place) for _, place in find_images([album, album / "sub"])]
    assert places == ["a.png", "b.JPG", "sub/a.png"]


def test_long_names_can_be_written(model, image_path, tmp_path):
    long = tmp_path / f"{'x' * 228}.png"
    shutil.copy(image_path, long)
    assert extract_files(model, find_images([long]), tmp_path / "out").written == 1


def test_wrong_paths_say_so(album, tmp_path):
    with pytest.raises(BrixelError, match="no image or folder at .*missing"):
        find_images([album / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BrixelError, match="no images in .*empty"):
        find_images([tmp_path / "empty"])
    with pytest.raises(BrixelError, match=r"would both be written as a\.png; extract them separately"):
        find_images([album / "a.png", album / "sub" / "a.png"])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_image_gets_its_own_map(model, album, tmp_path, batch_size):
    report = extract_files(model, find_images([album]), tmp_path / "out", batch_size=batch_size)
    assert (report.written, report.skipped, report.failures) == (3, 0, [])
    for name in ("a.png", "b.JPG", "sub/a.png"):
        ours = FeatureMap.load(tmp_path / "out" / f"{name}.safetensors")
        expected = model.extract(album / name)
        torch.testing.assert_close(ours.features, expected.features, rtol=1e-5, atol=1e-5)
        assert ours.image_hw == expected.image_hw
        assert ours.meta["image"] == name.rpartition("/")[2]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_unreadable_images_are_listed_and_cost_no_other_map(model, album, tmp_path, batch_size):
    (album / "aa.png").write_bytes((album / "a.png").read_bytes()[:200])
    (album / "c.png").write_bytes(b"")
    report = extract_files(model, find_images([album]), tmp_path / "out", batch_size=batch_size)
    assert report.written == 3
    assert [path.name for path, _ in report.failures] == ["aa.png", "c.png"]
    assert all(path.name in str(error) for path, error in report.failures)
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 3


def test_an_image_that_vanishes_is_listed(model, album, tmp_path):
    images = find_images([album])
    (album / "b.JPG").unlink()
    report = extract_files(model, images, tmp_path / "out")
    assert report.written == 2
    assert [path.name for path, _ in report.failures] == ["b.JPG"]


def test_what_is_finished_is_skipped_unless_overwritten(model, album, tmp_path):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out)
    mine = b"m" * (out / "a.png.safetensors").stat().st_size
    (out / "a.png.safetensors").write_bytes(mine)
    (out / "b.JPG.safetensors").unlink()
    report = extract_files(model, find_images([album]), out)
    assert (report.written, report.skipped) == (1, 2)
    assert (out / "a.png.safetensors").read_bytes() == mine
    report = extract_files(model, find_images([album]), out, overwrite=True)
    assert (report.written, report.skipped) == (3, 0)
    FeatureMap.load(out / "a.png.safetensors")


def test_a_file_that_is_in_no_manifest_is_not_written_over(model, album, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "b.JPG.safetensors").write_bytes(b"mine")
    with pytest.raises(BrixelError, match=r"b\.JPG\.safetensors exists and is in no manifest"):
        extract_files(model, find_images([album]), out)
    assert (out / "b.JPG.safetensors").read_bytes() == b"mine"
    assert extract_files(model, find_images([album]), out, overwrite=True).written == 3


def test_an_image_that_changed_is_done_again(model, album, tmp_path):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out)
    shutil.copy(album / "b.JPG", album / "a.png")  # other content under the old name
    report = extract_files(model, find_images([album]), out)
    assert (report.written, report.skipped) == (1, 2)
    assert MapFolder(out)["a.png"].image_hw == FeatureMap.load(out / "b.JPG.safetensors").image_hw
    assert verify(out) == []


@pytest.mark.parametrize(
    "changed", [{"short_side_px": 56}, {"ending": ".npy"}, {"save_dtype": torch.float16}, {"shard_bytes": 1000}]
)
def test_other_settings_are_refused(model, album, tmp_path, changed):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(BrixelError, match=r"out holds maps made with other settings \(.*, not .*\): give those"):
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
        with pytest.raises(BrixelError, match="No space left on device.*; what was finished before is kept: make room"):
            extract_files(model, find_images([album]), out)
    assert [path.name for path in out.rglob("*") if path.is_file()].count("a.png.safetensors") == 1
    assert len(MapFolder(out)) == 1
    assert verify(out) == []
    report = extract_files(model, find_images([album]), out)
    assert (report.written, report.skipped) == (2, 1)


def test_a_folder_that_cannot_be_written_to(model, album, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(BrixelError, match="cannot write into .*file.*; give another folder, or mend its permissions"):
        extract_files(model, find_images([album]), tmp_path / "file" / "out")


def test_two_runs_do_not_write_to_one_folder(model, album, tmp_path):
    with Manifest(tmp_path, {}, Share()), pytest.raises(BrixelError, match="another run writes to"):
        extract_files(model, find_images([album]), tmp_path)


@pytest.mark.parametrize(("first", "second"), [(Share(0, 1), Share(1, 2)), (Share(1, 2), Share(0, 1))])
def test_a_run_of_another_number_of_processes_does_not_write_along(tmp_path, first, second):
    with Manifest(tmp_path, {}, first):
        with pytest.raises(BrixelError, match="another run writes to"), Manifest(tmp_path, {}, second):
            pass
        with Manifest(tmp_path, {}, Share(1 - first.rank, 2)) if first.processes == 2 else contextlib.nullcontext():
            pass  # its own kind does
    with Manifest(tmp_path, {}, second):
        pass


def test_a_file_that_was_cut_short_is_made_again(model, album, tmp_path):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out)
    os.truncate(out / "a.png.safetensors", 100)
    report = extract_files(model, find_images([album]), out)
    assert (report.written, report.skipped) == (1, 2)
    assert verify(out) == []


def test_features_that_do_not_fit_float16_are_listed(model, album, tmp_path):
    large = copy.deepcopy(model)
    with torch.no_grad():
        large.head.out.bias += 1e6
    report = extract_files(large, find_images([album]), tmp_path / "out", save_dtype=torch.float16)
    assert report.written == 0
    assert "a.png: its features do not fit float16; save as bfloat16" in str(report.failures[0][1])


def test_what_the_writer_of_safetensors_says_of_a_full_disk_is_explained(model, album, tmp_path, monkeypatch):
    def fail(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("brixel.feature_maps.storage.save_file", fail)
    with pytest.raises(BrixelError, match="No space left on device.*start the same command again"):
        extract_files(model, find_images([album]), tmp_path / "out")


# ---------------------------------------------------------------- the manifest


def note(name):
    return Written(f"{name}.safetensors", 3, "0" * 64, (SourceImage(name, 1, 2),))


def test_a_note_that_was_cut_off_is_not_counted(tmp_path):
    with Manifest(tmp_path, {"a": "b"}, Share()) as manifest:
        manifest.begin()
        manifest.add(note("x"))
        manifest.add(note("y"))
    path = tmp_path / "manifest-0.jsonl"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        assert [each.file for each in read_manifests(tmp_path)] == ["x.safetensors", "y.safetensors"][
            : max(lines - 1, 0)
        ]
    path.write_bytes(whole[:-5])
    with Manifest(tmp_path, {"a": "b"}, Share()) as manifest:
        assert len(manifest.written) == 1
        manifest.add(note("y"))
    assert [each.file for each in read_manifests(tmp_path)] == ["x.safetensors", "y.safetensors"]


@pytest.mark.parametrize("content", [b"{}\n", b"not json\n", b'{"format_version": 1}\n', b"[]\n"])
def test_a_damaged_manifest_says_so(tmp_path, content):
    (tmp_path / "manifest-0.jsonl").write_bytes(content)
    with pytest.raises(BrixelError, match=r"manifest-0\.jsonl is damaged or no manifest of ours"):
        Manifest(tmp_path, {}, Share())
    with Manifest(tmp_path, {}, Share(), overwrite=True) as manifest:
        assert manifest.written == []


def test_a_newer_manifest_says_so(tmp_path):
    (tmp_path / "manifest-0.jsonl").write_bytes(b'{"format_version": 2, "settings": {}}\n')
    with pytest.raises(BrixelError, match="has format 2, this brixel reads 1; update brixel"):
        read_manifests(tmp_path)


def test_verify_finds_what_is_changed_or_missing(model, album, tmp_path):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out)
    assert verify(out) == []
    path = out / "sub" / "a.png.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (out / "b.JPG.safetensors").unlink()
    assert sorted(line.partition(": ")[2][:19] for line in verify(out)) == ["cannot be read (No ", "changed or damaged"]
    with pytest.raises(BrixelError, match="holds no manifest: expected a folder that `brixel extract` wrote"):
        verify(album)


# ---------------------------------------------------------------- shards


@pytest.mark.parametrize("maps_each", [1, 2, 9])
def test_shards_hold_what_files_would(model, album, tmp_path, maps_each):
    images = find_images([album])
    extract_files(model, images, tmp_path / "files")
    limit = maps_each * model.extract(album / "a.png").features.nbytes
    report = extract_files(model, images, tmp_path / "shards", shard_bytes=limit)
    assert report.written == 3
    found = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert found == [f"maps-0-{number:05d}.safetensors" for number in range(-(-3 // maps_each))]
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


def test_a_lost_shard_is_made_again(model, album, tmp_path):
    extract_files(model, find_images([album]), tmp_path, shard_bytes=1)
    (tmp_path / "maps-0-00001.safetensors").unlink()
    report = extract_files(model, find_images([album]), tmp_path, shard_bytes=1)
    assert (report.written, report.skipped) == (1, 2)
    assert len(MapFolder(tmp_path)) == 3
    assert MapFolder(tmp_path)["b.JPG"].features.shape[0] == model.embed_dim


def test_a_shard_that_was_not_noted_is_written_over(model, album, tmp_path):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out, shard_bytes=1)
    before = maps_in(out)
    manifest = out / "manifest-0.jsonl"
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:-1]))
    extract_files(model, find_images([album]), out, shard_bytes=1)
    assert maps_in(out) == before


def test_overwriting_shards_leaves_none_of_before(model, album, tmp_path):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out, shard_bytes=1)
    extract_files(model, find_images([album]), out, shard_bytes=2**30, overwrite=True)
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert names == ["manifest-0.jsonl", "maps-0-00000.safetensors"]


def test_what_is_saved_can_be_narrower(model, album, tmp_path):
    extract_files(model, find_images([album / "a.png"]), tmp_path, save_dtype=torch.bfloat16)
    ours = MapFolder(tmp_path)["a.png"].features
    assert torch.equal(ours, model.extract(album / "a.png").features.bfloat16())
    with pytest.raises(BrixelError, match="npy knows no bfloat16"):
        extract_files(model, find_images([album]), tmp_path, ending=".npy", save_dtype=torch.bfloat16)
    with pytest.raises(BrixelError, match=r"shards of 5 bytes as \.npy"):
        extract_files(model, find_images([album]), tmp_path, ending=".npy", shard_bytes=5)


# ---------------------------------------------------------------- several processes, interruptions


def many(folder, count):
    """Small images of two sizes, each of another grey."""
    folder.mkdir()
    for index in range(count):
        side = (28, 42)[index % 3 == 0]
        Image.new("L", (side, 28), index).save(folder / f"{index:03d}.png")
    return folder


def test_processes_share_the_images_and_a_restart_with_others_repeats_none(model, tmp_path, monkeypatch):
    images, out = find_images([many(tmp_path / "in", 12)]), tmp_path / "out"
    parts = {}
    for rank in (0, 2):  # of three: the second is late
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        parts[rank] = extract_files(model, images, out).written
    assert parts[0] > 0 < parts[2]
    assert len(MapFolder(out)) == parts[0] + parts[2] < 12
    reports = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        reports.append(extract_files(model, images, out))
    assert sum(each.written for each in reports) == 12 - parts[0] - parts[2]
    assert sum(each.skipped for each in reports) == parts[0] + parts[2]
    assert len(MapFolder(out)) == 12
    assert verify(out) == []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert extract_files(model, images, out, overwrite=True).written == 12
    assert [path.name for path in manifests(out)] == ["manifest-0.jsonl"]


def test_shares_are_whole_and_apart():
    names = [f"{index}.jpg" for index in range(1000)]
    owners = [[rank for rank in range(7) if Share(rank, 7).holds(name)] for name in names]
    assert all(len(each) == 1 for each in owners)
    counts = [owners.count([rank]) for rank in range(7)]
    assert min(counts) > 100


PROGRAM = """
import sys, torch
from pathlib import Path
from brixel import BrixelFeatures
from brixel.extraction import extract_files
from brixel.images.find_images import find_images
torch.set_num_threads(1)
backbone, source, out, *shards = sys.argv[1:]
torch.manual_seed(0)
model = BrixelFeatures.from_backbone(backbone, device="cpu", short_side_px=28)
print("ready", flush=True)
report = extract_files(
    model, find_images([Path(source)]), Path(out), batch_size=4, shard_bytes=int(shards[0]) if shards else None
)
print(report.written, report.skipped)
"""


def start(*arguments):
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def maps_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("shards", [(), (400_000,)])
def test_killed_at_any_moment_a_run_goes_on_to_the_same_bytes(backbone_folder, tmp_path, shards):
    """200 images, killed ten times; what the manifest had by then is not done again."""
    source = many(tmp_path / "in", 200)
    whole = start(backbone_folder, source, tmp_path / "whole", *shards)
    assert whole.communicate()[0] == "200 0\n"
    moments, out = random.Random(0), tmp_path / "out"
    for _ in range(10):
        process = start(backbone_folder, source, out, *shards)
        time.sleep(moments.uniform(0.02, 0.3))
        process.kill()
        process.communicate()
    noted = len(MapFolder(out)) if manifests(out) else 0
    last = start(backbone_folder, source, out, *shards)
    assert last.communicate()[0] == f"{200 - noted} {noted}\n"
    ours, theirs = maps_in(out), maps_in(tmp_path / "whole")
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []  # said without a comparison of the bytes
    images = [source.image for each in read_manifests(out) for source in each.images]
    assert len(images) == len(set(images)) == 200
    assert verify(out) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interruption_finishes_what_is_in_hand(backbone_folder, tmp_path):
    source, out = many(tmp_path / "in", 200), tmp_path / "out"
    process = start(backbone_folder, source, out, 10**9)
    while not manifests(out) or manifests(out)[0].stat().st_size == 0:
        time.sleep(0.005)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    finished = len(MapFolder(out))
    assert 0 < finished < 200  # the shard was written although it was not full
    assert verify(out) == []
    last = start(backbone_folder, source, out, 10**9)
    assert last.communicate()[0] == f"{200 - finished} {finished}\n"


def test_npy_maps_are_plain_arrays(model, album, tmp_path):
    extract_files(model, find_images([album / "a.png"]), tmp_path / "out", ending=".npy")
    array = np.load(tmp_path / "out" / "a.png.npy")
    np.testing.assert_array_equal(array, model.extract(album / "a.png").numpy())
