"""Damaged videos: frames, or an ImageError, and nothing printed by FFmpeg."""

import itertools
import logging
import random
from pathlib import Path

import numpy as np
import pytest
from fuzz.mutations import mutate
from fuzz.runner import Case, Fuzz
from videos import grey_levels, write

from brixel import ImageError
from brixel.video import frames

_CODECS = {
    **{"a.mp4": "libx264", "a.mov": "mpeg4", "a.mkv": "libx264", "a.webm": "libvpx-vp9", "a.avi": "mpeg4"},
    **{"a.ts": "libx264", "a.flv": "libx264", "a.mpg": "mpeg1video", "a.mxf": "mpeg2video", "a.gif": "gif"},
}
_MOST_FRAMES = 200  # damage may state that a frame is shown for years, or a thousand times


def _read(path: Path) -> None:
    found = list(itertools.islice(frames(path), _MOST_FRAMES))
    assert [frame.index for frame in found] == list(range(len(found)))
    assert all(frame.rgb.ndim == 3 and frame.rgb.dtype == np.uint8 for frame in found)
    assert all(before.time_s < after.time_s for before, after in itertools.pairwise(found))


@pytest.mark.slow
def test_videos(fuzz: Fuzz, tmp_path: Path) -> None:
    fuzz.caplog.set_level(logging.ERROR, "brixel")  # warnings name what is odd
    contents = {}
    for name, codec in _CODECS.items():
        pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        contents[name] = write(tmp_path / name, grey_levels(8), codec=codec, pix_fmt=pix_fmt).read_bytes()
        _read(tmp_path / name)

    def case(rng: random.Random) -> Case:
        name = rng.choice(list(contents))
        path = tmp_path / name
        path.write_bytes(mutate(rng, contents[name], list(contents.values())))
        return name, lambda: _read(path)

    fuzz.run("videos", case, count=2000, refusals=ImageError)
