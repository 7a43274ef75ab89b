"""Which frames are wanted."""

import itertools

import pytest
import torch
from videos import grey_levels, number_of, write

from brixel import BrixelError, BrixelFeatures
from brixel.video import frames
from brixel.video.frames import FrameSelection, sample_frames

TIMES = [0, 40, 100, 500, 540, 1200, 2000]  # milliseconds


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clip") / "a.mp4", grey_levels(7), times=TIMES)


def shown_at(times_s, grid):
    """The naive twin: the last frame at or before each time, once."""
    found = [max(index for index, time in enumerate(times_s) if time <= at + 1e-6) for at in grid]
    return sorted(set(found))


@pytest.mark.parametrize("fps", [0.5, 1, 2, 3, 7.3, 25, 1000])
def test_fps_gives_the_frame_that_is_shown_at_each_time(clip, fps):
    times_s = [time / 1000 for time in TIMES]
    grid = [count / fps for count in range(int(2.04 * fps) + 1) if count / fps < 2.04 - 1e-6]
    assert [frame.index for frame in frames(clip, fps=fps)] == shown_at(times_s, grid)


def test_fps_starts_at_start_and_ends_before_stop(clip):
    assert [frame.index for frame in frames(clip, fps=2, start=0.3, stop=1.3)] == [2, 4]  # shown at 0.3 and 0.8


def test_every_counts_all_frames(clip):
    assert [frame.index for frame in frames(clip, every=3)] == [0, 3, 6]
    assert [number_of(frame.rgb) for frame in frames(clip, every=3, start=0.05)] == [3, 6]


def test_start_is_taken_and_stop_is_not(clip):
    assert [frame.index for frame in frames(clip, start=0.04, stop=0.54)] == [1, 2, 3]
    assert list(frames(clip, start=9)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 2, "every": 3}, "fps is 2 and every is 3; give one of them"),
        ({"fps": 0}, "fps is 0; expected a finite number above 0"),
        ({"every": 1.5}, "every is 1.5; expected a whole number from 1 up"),
        ({"start": -1}, "start is -1; expected"),
        ({"start": 2, "stop": 1}, "start is 2 s and stop 1 s; expected a later stop"),
    ],
)
def test_wrong_arguments_are_errors_at_once(clip, arguments, message):
    with pytest.raises(BrixelError, match=message):
        frames(clip, **arguments)


@pytest.mark.parametrize(("total", "count"), [(1, 4), (3, 4), (4, 4), (9, 4), (40, 4), (29, 1)])
def test_a_sample_is_even_and_of_the_size_that_was_asked_for(tmp_path, total, count):
    path = write(tmp_path / "a.mp4", grey_levels(min(total, 29)) + grey_levels(max(0, total - 29)))
    found = [frame.index for frame in sample_frames(path, count, FrameSelection())]
    assert len(found) == min(total, count)
    assert found[0] == 0
    gaps = {after - before for before, after in itertools.pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= max(1, total // count)


def test_a_stream_of_frames_gives_maps_with_number_and_time(clip, backbone_folder):
    model = BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=28)
    maps = list(model.stream(frames(clip, every=2), batch_size=2))
    assert [each.meta["frame"] for each in maps] == ["0", "2", "4", "6"]
    assert [each.meta["time_s"] for each in maps] == ["0.000000", "0.100000", "0.540000", "2.000000"]
    alone = [model.extract(frame.rgb) for frame in frames(clip, every=2)]
    assert all(torch.allclose(a.features, b.features, atol=1e-5) for a, b in zip(maps, alone, strict=True))
    assert maps[0].image_hw == (24, 32)
