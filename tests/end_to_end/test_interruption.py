"""An interruption of a folder's extraction, in this process; `test_extraction.py` sends one to a process of its own."""

import signal

import numpy as np
import pytest
from PIL import Image

from brixel import BrixelFeatures, MapFolder
from brixel.extraction import extract_files
from brixel.extraction.map_folder import verify
from brixel.images.find_images import find_images

COUNT = 12


def test_an_interruption_finishes_what_is_in_hand_and_a_restart_the_rest(
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
    assert "once more stops at once" in caplog.text
    finished = len(MapFolder(tmp_path / "out"))
    assert 0 < finished < COUNT  # the shard was written although it was not full
    assert verify(tmp_path / "out") == []
    report = extract()
    assert (report.written, report.skipped) == (COUNT - finished, finished)
