"""MP4 files of ours: read back, whole or not at all."""

import av
import numpy as np
import pytest
from videos import grey_levels, number_of

from brixel import BrixelError
from brixel.video import Frame, frames, write_video
from brixel.video.writing import check_video_path


def test_colours_come_back(tmp_path):
    colours = [(220, 40, 40), (40, 200, 60), (30, 60, 230), (128, 128, 128)]
    write_video(tmp_path / "a.mp4", [np.full((48, 64, 3), colour, np.uint8) for colour in colours], fps=10)
    found = list(frames(tmp_path / "a.mp4"))
    assert [frame.time_s for frame in found] == pytest.approx([0, 0.1, 0.2, 0.3])
    for frame, colour in zip(found, colours, strict=True):
        assert np.abs(frame.rgb.astype(int) - colour).max() <= 3


def test_frames_keep_their_times_and_odd_sides_are_continued(tmp_path):
    greys = [grey[:23, :31] for grey in grey_levels(3)]
    given = [Frame(grey, number, time_s) for grey, number, time_s in zip(greys, (5, 6, 9), (4, 4.5, 6), strict=True)]
    write_video(tmp_path / "a.mp4", given)
    found = list(frames(tmp_path / "a.mp4"))
    assert [frame.time_s for frame in found] == [0, 0.5, 2]
    assert [number_of(frame.rgb) for frame in found] == [0, 1, 2]
    assert found[0].image_hw == (24, 32)


def test_tags_say_how_colours_are_stored(tmp_path):
    write_video(tmp_path / "a.mp4", grey_levels(2))
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert context.pix_fmt == "yuv420p"


def test_a_video_that_fails_leaves_the_earlier_one(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"before")
    for images, message in (
        ([], "no images to write"),
        ([*grey_levels(2), np.zeros((10, 10, 3), np.uint8)], "a frame has 10 x 10 px, those before 24 x 32"),
        ([*grey_levels(2), "gone.png"], "no such file"),
    ):
        with pytest.raises(BrixelError, match=message):
            write_video(path, images)
        assert path.read_bytes() == b"before"
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "message"), [("a.avi", r"ends in \.mp4"), ("gone/a.mp4", "no folder"), ("folder.mp4", "is a folder")]
)
def test_names_that_cannot_be_written_are_errors_before_the_work(tmp_path, name, message):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(BrixelError, match=message):
        write_video(tmp_path / name, iter([]))


def test_only_videos_of_ours_are_replaced_without_asking(tmp_path):
    ours, other = tmp_path / "ours.mp4", tmp_path / "other.mp4"
    write_video(ours, grey_levels(2))
    other.write_bytes(b"something else")
    check_video_path(ours, overwrite=False)
    check_video_path(other)
    with pytest.raises(BrixelError, match=r"other\.mp4 exists, and brixel has not drawn it"):
        check_video_path(other, overwrite=False)


def test_without_the_encoder_of_h264_another_one_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(av.codec, "codecs_available", av.codec.codecs_available - {"libx264"})
    write_video(tmp_path / "a.mp4", grey_levels(3))
    assert [number_of(frame.rgb) for frame in frames(tmp_path / "a.mp4")] == [0, 1, 2]
