"""Extractions that are interrupted or killed, and started again: in this process, and (slow) as processes."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import maps_in
from PIL import Image

from brixel import BrixelFeatures, MapFolder
from brixel.extraction import extract_files
from brixel.extraction.manifest import manifest_paths, read_manifests
from brixel.extraction.map_folder import verify
from brixel.images.find_images import find_images

COUNT = 12


def test_an_interruption_finishes_the_maps_in_progress_and_a_restart_the_rest(
    backbone_folder, tmp_path, monkeypatch, caplog
):
    for index in range(COUNT):
        Image.fromarray(np.full((28, 28, 3), 20 * index, np.uint8)).save(tmp_path / f"{index:02}.png")
    model, calls = BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=28), []

    def interrupted(pixels):
        calls.append(pixels)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return BrixelFeatures.forward(model, pixels)

    def extract():
        options = {"batch_size": 4, "shard_bytes": 10**9}
        return extract_files(model, find_images([tmp_path]), tmp_path / "out", **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "forward", interrupted)
        extract()
    assert "interrupt again to stop at once" in caplog.text
    finished = len(MapFolder(tmp_path / "out"))
    assert 0 < finished < COUNT  # the shard was written although it was not full
    assert verify(tmp_path / "out") == []
    summary = extract()
    assert (summary.written, summary.skipped) == (COUNT - finished, finished)


def many(folder, count):
    """Small images of two sizes, of different greys."""
    folder.mkdir()
    for index in range(count):
        side = (28, 42)[index % 3 == 0]
        Image.new("L", (side, 28), index).save(folder / f"{index:03d}.png")
    return folder


class Killed(BaseException):
    """What happens at a step in place of the end of the process."""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"shard_bytes": 2 * 64 * 8 * 8 * 4}])
def test_killed_before_any_step_on_the_disk_a_run_goes_on_to_the_same_bytes(
    backbone_folder, tmp_path, monkeypatch, options
):
    """Every rename and every flush is once the step that fails, with all after it; then the run is started again."""
    images = find_images([many(tmp_path / "in", 3)])
    model = BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=28)
    with monkeypatch.context() as patch:
        steps = count_steps(patch)
        assert extract_files(model, images, tmp_path / "whole", **options).written == 3
    files = 2 if options else 3
    assert steps == ["fsync", *files * ["replace", "fsync", "fsync"]]  # the settings; a map's file, its content, a line
    for killed_at in range(len(steps)):
        out = tmp_path / f"out{killed_at}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            count_steps(patch, killed_at)
            extract_files(model, images, out, **options)
        (out / f".{'0' * 32}.part.safetensors").write_bytes(b"half")  # what a killed process leaves
        listed = len(MapFolder(out))
        summary = extract_files(model, images, out, **options)
        assert (summary.written, summary.skipped) == (3 - listed, listed)
        ours, theirs = maps_in(out), maps_in(tmp_path / "whole")
        assert sorted(ours) == sorted(theirs)
        assert [name for name in ours if ours[name] != theirs[name]] == []
        assert sum(len(written.images) for written in read_manifests(out)) == 3
        assert verify(out) == []


def count_steps(patch, killed_at=None):
    """A list that gets the name of every flush and rename; from step ``killed_at`` on each of them raises `Killed`."""
    steps = []

    def counted(name, function):
        def step(*arguments):
            if len(steps) == killed_at:
                raise Killed
            steps.append(name)
            return function(*arguments)

        return step

    for name in ("fsync", "replace"):
        patch.setattr(os, name, counted(name, getattr(os, name)))
    return steps


# ---------------------------------------------------------------- processes


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
summary = extract_files(
    model, find_images([Path(source)]), Path(out), shard_bytes=int(shards[0]) if shards else None
)
print(summary.written, summary.skipped)
"""


def start(*arguments):
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("shards", [(), (400_000,)])
def test_killed_at_any_moment_a_run_goes_on_to_the_same_bytes(backbone_folder, tmp_path, shards):
    """200 images, killed five times; what the manifest listed by then is not done again.

    One image a batch: the last digits of a map can depend on the images that share its batch.
    """
    source = many(tmp_path / "in", 200)
    whole = start(backbone_folder, source, tmp_path / "whole", *shards)
    assert whole.communicate()[0] == "200 0\n"
    moments, out = random.Random(0), tmp_path / "out"
    for _ in range(5):
        process = start(backbone_folder, source, out, *shards)
        time.sleep(moments.uniform(0.02, 0.3))
        process.kill()
        process.communicate()
    listed = len(MapFolder(out)) if manifest_paths(out) else 0
    last = start(backbone_folder, source, out, *shards)
    assert last.communicate()[0] == f"{200 - listed} {listed}\n"
    ours, theirs = maps_in(out), maps_in(tmp_path / "whole")
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []  # names: pytest would print the bytes
    images = [source.relative_path for written in read_manifests(out) for source in written.images]
    assert len(images) == len(set(images)) == 200
    assert verify(out) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupted_process_finishes_the_maps_in_progress(backbone_folder, tmp_path):
    source, out = many(tmp_path / "in", 200), tmp_path / "out"
    process = start(backbone_folder, source, out, 10**9)
    while not manifest_paths(out) or manifest_paths(out)[0].stat().st_size == 0:
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
