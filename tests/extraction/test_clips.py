"""Videos in extractions: names, restarts, changed and damaged videos, lists of frames."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import maps_in
from PIL import Image
from videos import grey_levels, write

from brixel import BrixelError, BrixelFeatures, MapFolder
from brixel.extraction import clips, extract_files
from brixel.extraction.map_folder import missing_maps, verify
from brixel.images.find_images import find_images
from brixel.utils.structured_files import read_json_value
from brixel.video import frames

TIMES = [0, 40, 100, 500, 540, 1200]


@pytest.fixture(scope="module")
def model(backbone_folder):
    return BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=28)


@pytest.fixture
def clip(tmp_path):
    return write(tmp_path / "clip.mp4", grey_levels(6), times=TIMES)


@pytest.fixture
def no_decoding(monkeypatch):
    """Any attempt to decode fails the test."""

    def decode(path):
        raise AssertionError(f"{path} is decoded")

    return lambda: monkeypatch.setattr(clips, "decode", decode)


def extract(model, paths, out, **options):
    return extract_files(model, find_images(paths), out, **options)


NAMES = [f"clip.mp4/{index:06d}_{time / 1000:.3f}s" for index, time in enumerate(TIMES)]


def test_frames_are_named_by_number_and_time(model, clip, tmp_path):
    summary = extract(model, [clip], tmp_path / "out", every=2)
    assert (summary.written, summary.skipped, summary.failures) == (3, 0, [])
    maps = MapFolder(tmp_path / "out")
    assert list(maps) == NAMES[::2]
    assert (tmp_path / "out" / f"{NAMES[2]}.safetensors").exists()
    for index, frame in zip((0, 2, 4), frames(clip, every=2), strict=True):
        found = maps[NAMES[index]]
        assert found.features.equal(model.extract(frame).features)
        assert (found.meta["frame"], found.meta["picture"]) == (str(index), NAMES[index].partition("/")[2])
    content = read_json_value(tmp_path / "out" / "clip.mp4" / "frames.json")
    assert content == {"fps": None, "every": 2, "frames": [[0, 0.0], [2, 0.1], [4, 0.54]]}
    assert verify(tmp_path / "out") == []


def test_a_finished_video_is_not_decoded_again(model, clip, tmp_path, no_decoding):
    extract(model, [clip], tmp_path / "out", fps=2)
    no_decoding()
    summary = extract(model, [clip], tmp_path / "out", fps=2)
    assert (summary.written, summary.skipped, summary.failures) == (0, 3, [])


@pytest.mark.parametrize("options", [{}, {"shard_bytes": 1}, {"ending": ".npy"}])
def test_what_is_missing_is_extracted_and_equal(model, clip, tmp_path, options):
    out = tmp_path / "out"
    extract(model, [clip], out, every=2, **options)
    assert extract(model, [clip], out, **options).written == 3  # other frames are wanted as well
    whole = {name: MapFolder(out)[name].features for name in NAMES}
    lost = next(out.rglob("*00001.safetensors" if options.get("shard_bytes") else "000002_*"))
    lost.unlink()
    summary = extract(model, [clip], out, **options)
    assert (summary.written, summary.skipped) == (1, 5)
    assert sorted(MapFolder(out)) == NAMES
    assert all(MapFolder(out)[name].features.equal(features) for name, features in whole.items())
    assert verify(out) == []


def test_a_run_that_stopped_in_the_middle_goes_on(model, clip, tmp_path, monkeypatch):
    extract(model, [clip], tmp_path / "whole")
    stream_all = model.stream_all

    def stops(images, **options):
        for number, result in enumerate(stream_all(images, **options)):
            if number == 3:
                raise RuntimeError("the power is gone")
            yield result

    monkeypatch.setattr(model, "stream_all", stops)
    with pytest.raises(RuntimeError):
        extract(model, [clip], tmp_path / "out")
    monkeypatch.setattr(model, "stream_all", stream_all)
    summary = extract(model, [clip], tmp_path / "out")
    assert summary.skipped == 3
    assert summary.written == 3
    assert maps_in(tmp_path / "out") == maps_in(tmp_path / "whole")


def test_a_changed_video_is_extracted_again_and_its_lost_frames_are_named(model, clip, tmp_path, caplog):
    extract(model, [clip], tmp_path / "out")
    write(clip, grey_levels(6)[::-1][:4], times=TIMES[:4])
    summary = extract(model, [clip], tmp_path / "out")
    assert (summary.written, summary.skipped) == (4, 0)
    assert f"{clip} differs from the video whose maps are in" in caplog.text
    assert f"2 maps, such as {NAMES[4]}, are of frames that {clip} had and has no more" in caplog.text


def test_a_video_that_is_cut_off_fails_after_its_frames_and_costs_no_other(model, tmp_path):
    whole = write(tmp_path / "b.mp4", grey_levels(3))
    cut = write(tmp_path / "a.mp4", grey_levels(12), movflags="faststart", options={"bf": "0"})
    cut.write_bytes(cut.read_bytes()[:-150])
    summary = extract(model, [cut, whole], tmp_path / "out")
    [(path, error)] = summary.failures
    assert path == cut
    assert "is damaged or cut off at frame" in str(error)
    names = list(MapFolder(tmp_path / "out"))
    assert len([name for name in names if name.startswith("b.mp4/")]) == 3
    assert 0 < len([name for name in names if name.startswith("a.mp4/")]) == summary.written - 3 < 12
    assert not (tmp_path / "out" / "a.mp4" / "frames.json").exists()
    assert len(extract(model, [cut, whole], tmp_path / "out").failures) == 1  # and is tried again


def test_images_and_videos_go_together(model, clip, tmp_path, caplog):
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (28, 28), "red").save(folder / "a.png")
    shutil.copy2(clip, folder / "sub" / "clip.mp4")
    images = find_images([folder])
    assert extract_files(model, images, tmp_path / "only").written == 1
    assert images.left_out == {".mp4": 1}
    both = find_images([folder], also=(".mp4",))
    assert extract_files(model, both, tmp_path / "both", every=3).written == 3
    assert list(MapFolder(tmp_path / "both")) == ["a.png", *(f"sub/{name}" for name in NAMES[::3])]
    assert missing_maps(tmp_path / "both", both) == []
    with pytest.raises(BrixelError, match="holds no manifest"):
        missing_maps(tmp_path / "album", both)


def test_missing_maps_of_a_video_are_named(model, clip, tmp_path):
    out, images = tmp_path / "out", find_images([clip])
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    extract(model, [tmp_path / "a.png"], out)
    assert missing_maps(out, images) == [f"{clip}: has no list of its frames"]
    extract(model, [clip], out)
    assert missing_maps(out, images) == []
    path = out / "manifest-0.jsonl"
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if NAMES[3].encode() not in line]
    path.write_bytes(b"".join(lines))
    assert missing_maps(out, images) == [f"{clip}: 1 of its frames have no map"]
    os.utime(clip, ns=(0, 0))
    path.write_bytes(b"".join(line for line in lines))
    assert extract(model, [clip], out).written == 6


def test_a_damaged_list_is_named(model, clip, tmp_path):
    extract(model, [clip], tmp_path / "out")
    path = tmp_path / "out" / "clip.mp4" / "frames.json"
    content = path.read_text()
    path.write_text(content.replace("null", '"xx"', 1)[: len(content)])
    with pytest.raises(BrixelError, match=r"frames\.json"):
        extract(model, [clip], tmp_path / "out")


def test_processes_share_the_frames_of_a_video(model, clip, tmp_path, monkeypatch, no_decoding):
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        found.append(extract(model, [clip], tmp_path / "out"))
    assert sum(summary.written for summary in found) == 6
    assert found[0].written == found[1].of_others
    assert sorted(MapFolder(tmp_path / "out")) == NAMES
    no_decoding()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert extract(model, [clip], tmp_path / "out").written == 0


def test_a_folder_in_the_way_stops_the_first_run(model, clip, tmp_path):
    (tmp_path / "out" / "clip.mp4").mkdir(parents=True)
    with pytest.raises(BrixelError, match="exists and is in no manifest"):
        extract(model, [clip], tmp_path / "out")


def test_a_missing_video_is_a_failure(model, clip, tmp_path):
    images = find_images([clip])
    clip.unlink()
    assert len(extract_files(model, images, tmp_path / "out").failures) == 1


@pytest.mark.slow
def test_a_killed_run_goes_on_with_equal_maps(model, tmp_path):
    """Killed by the system in the middle of a video, by a program of its own."""
    clip = write(tmp_path / "clip.mp4", grey_levels(25))
    model.save_pretrained(tmp_path / "model", include_backbone=True)
    command = [sys.executable, "-m", "brixel", "extract", clip, "--model", tmp_path / "model", "--device", "cpu", "-o"]
    subprocess.run([*map(str, command), str(tmp_path / "whole")], check=True, timeout=240, capture_output=True)
    program = f"""
import os, signal, sys
from brixel.extraction import manifest
from brixel.cli.app import main
add, count = manifest.Manifest.add, 0
def dies(self, written):
    global count
    add(self, written)
    count += 1
    if count == 9:
        os.kill(os.getpid(), signal.SIGKILL)
manifest.Manifest.add = dies
main({[*map(str, command[3:]), str(tmp_path / "out")]!r})
"""
    killed = subprocess.run([sys.executable, "-c", program], timeout=240, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    done = subprocess.run([*map(str, command), str(tmp_path / "out")], timeout=240, capture_output=True, text=True)
    assert done.stdout == "16 written, 9 already there, 0 failed\n", done.stderr
    assert maps_in(tmp_path / "out") == maps_in(tmp_path / "whole")
    lists = [json.loads((tmp_path / name / "clip.mp4" / "frames.json").read_text()) for name in ("out", "whole")]
    assert lists[0] == lists[1]
    assert all(torch.isfinite(each.features).all() for each in MapFolder(tmp_path / "out").values())
