"""Frames as players show them, and files that are no whole video."""

import struct
import sys

import av
import numpy as np
import pytest
from PIL import Image
from videos import grey_levels, number_of, write, write_sound

from brixel import BrixelError, ImageError
from brixel.images.load import load_image
from brixel.video import Frame, frames

QUADRANTS = np.zeros((24, 32, 3), np.uint8)
QUADRANTS[:12, :16], QUADRANTS[:12, 16:], QUADRANTS[12:, :16], QUADRANTS[12:, 16:] = 40, 90, 150, 220


def corners(rgb):
    """The greys of the four quadrants, to 5."""
    height, width = rgb.shape[:2]
    return [round(float(rgb[y, x].mean()) / 5) * 5 for y in (2, height - 3) for x in (2, width - 3)]


def read_until_error(path):
    """The numbers of the frames before the error, and its message."""
    found, iterator = [], frames(path)
    with pytest.raises(ImageError) as raised:
        for frame in iterator:
            found.append(number_of(frame.rgb))
            assert frame.index == len(found) - 1
    return found, str(raised.value)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9")],
)
def test_every_frame_comes_once_and_in_order(tmp_path, name, codec):
    found = list(frames(write(tmp_path / name, grey_levels(14), codec=codec)))
    assert [number_of(frame.rgb) for frame in found] == [frame.index for frame in found] == list(range(14))
    assert [frame.time_s for frame in found] == pytest.approx([0.04 * index for index in range(14)], abs=1e-3)
    assert found[0].rgb.shape == (24, 32, 3)
    assert found[0].rgb.dtype == np.uint8


def test_times_are_those_of_the_timestamps_where_the_rate_varies(tmp_path):
    times = [0, 40, 60, 500, 1000, 1010]
    found = list(frames(write(tmp_path / "a.mp4", grey_levels(6), times=times)))
    assert [frame.time_s for frame in found] == [time / 1000 for time in times]
    assert [number_of(frame.rgb) for frame in found] == list(range(6))


def test_times_start_at_the_start_of_the_video(tmp_path):
    path = write(tmp_path / "a.mkv", grey_levels(3), times=[5000, 5040, 5080])
    assert [frame.time_s for frame in frames(path)] == pytest.approx([0, 0.04, 0.08], abs=1e-3)


@pytest.mark.parametrize(
    ("rotation", "expected"),
    [
        (None, [40, 90, 150, 220]),
        ((90,), [90, 220, 40, 150]),
        ((180,), [220, 150, 90, 40]),
        ((270,), [150, 40, 220, 90]),
        ((0, True, False), [90, 40, 220, 150]),
        ((0, False, True), [150, 220, 40, 90]),
    ],
)
def test_frames_are_turned_upright(tmp_path, rotation, expected):
    [frame] = frames(write(tmp_path / "a.mp4", [QUADRANTS], rotation=rotation))
    assert corners(frame.rgb) == expected
    assert frame.image_hw == ((32, 24) if rotation in ((90,), (270,)) else (24, 32))
    assert frame.rgb.flags.c_contiguous


def test_a_matrix_of_a_phone_in_the_file_turns_frames(tmp_path):
    """The bytes of the header that phones write, not those of our writer: 90 degrees clockwise."""
    path = write(tmp_path / "a.mp4", [QUADRANTS])
    data = path.read_bytes()
    upright, turned = ([1, 0, 0, 0, 1, 0, 0, 0, 16384], [0, 1, 0, -1, 0, 0, 24, 0, 16384])  # the last in 2.30
    packed = [struct.pack(">9i", *(value << 16 for value in matrix)) for matrix in (upright, turned)]
    start = data.index(packed[0], data.index(b"tkhd"))
    path.write_bytes(data[:start] + packed[1] + data[start + 36 :])
    [frame] = frames(path)
    assert corners(frame.rgb) == [150, 40, 220, 90]


def test_an_odd_angle_is_left_with_one_warning(tmp_path, caplog):
    for frame in frames(write(tmp_path / "a.mp4", [QUADRANTS] * 3, rotation=(13,))):
        assert corners(frame.rgb) == [40, 90, 150, 220]
    assert caplog.text.count("no multiple of 90 degrees") == 1


COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (128, 128, 128), (235, 235, 235))


def yuv_frame(colour, matrix, full, bits, height, width):
    """A frame of one colour, by the definitions of BT.601, BT.709 and BT.2020 (ITU-R BT.709, 3.2 to 3.4)."""
    kr, kb = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}[matrix]
    red, green, blue = (value / 255 for value in colour)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = ((blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr)))
    unit = 2 ** (bits - 8)
    if full:
        values = [luma * (2**bits - 1), *(c * (2**bits - 1) + 128 * unit for c in chroma)]
    else:
        values = [(16 + 219 * luma) * unit, *((128 + 224 * c) * unit for c in chroma)]
    frame = av.VideoFrame(width, height, {8: "yuv420p", 10: "yuv420p10le"}[bits])
    for plane, value in zip(frame.planes, values, strict=True):
        data = np.full(plane.buffer_size // (1 if bits == 8 else 2), round(value), np.uint8 if bits == 8 else np.uint16)
        plane.update(data.tobytes())
    return frame


@pytest.mark.parametrize(
    ("stated", "matrix", "full", "bits", "size"),
    [
        ({"colorspace": 1, "color_range": 1}, "709", False, 8, (24, 32)),
        ({"colorspace": 6, "color_range": 1}, "601", False, 8, (24, 32)),
        ({"colorspace": 5, "color_range": 2}, "601", True, 8, (24, 32)),
        ({"colorspace": 9, "color_range": 1}, "2020", False, 10, (24, 32)),
        ({"colorspace": 1, "color_range": 2}, "709", True, 10, (24, 32)),
        ({}, "601", False, 8, (24, 32)),  # small frames without a stated matrix
        ({}, "709", False, 8, (16, 1280)),  # large ones
    ],
)
def test_colours_are_right_for_every_matrix_range_and_depth(tmp_path, stated, matrix, full, bits, size):
    pixels = [yuv_frame(colour, matrix, full, bits, *size) for colour in COLOURS]
    pix_fmt = "yuv420p" if bits == 8 else "yuv420p10le"
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        for name, value in stated.items():
            setattr(stream.codec_context, name, value)
        for number, frame in enumerate(pixels):
            frame.pts = number
            for name, value in stated.items():
                setattr(frame, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for frame, colour in zip(frames(path), COLOURS, strict=True):
        assert np.abs(frame.rgb.astype(int) - colour).max() <= 3, (frame.rgb[0, 0], colour)


def test_hdr_is_named(tmp_path, caplog):
    write(tmp_path / "a.mp4", grey_levels(2), color_trc=16)
    assert len(list(frames(tmp_path / "a.mp4"))) == 2
    assert caplog.text.count("has HDR colours") == 1


def test_wide_pixels_become_square(tmp_path):
    path = write(tmp_path / "a.mp4", [QUADRANTS], sample_aspect_ratio=2)
    [frame] = frames(path)
    assert frame.rgb.shape == (24, 64, 3)
    assert corners(frame.rgb) == [40, 90, 150, 220]


def test_transparency_lies_over_white(tmp_path):
    rgba = np.zeros((24, 32, 4), np.uint8)
    rgba[:, 16:] = [200, 0, 0, 255]
    Image.fromarray(rgba).save(tmp_path / "a.gif", save_all=True, append_images=[Image.fromarray(rgba[:, ::-1])])
    first, second = frames(tmp_path / "a.gif")
    assert first.rgb[5, 5].tolist() == [255, 255, 255]
    assert first.rgb[5, 25].tolist() == [200, 0, 0]
    assert second.index == 1


def test_sound_beside_the_pictures_changes_nothing(tmp_path):
    path = write(tmp_path / "a.mkv", grey_levels(4), sound=True)  # which lasts longer than they do
    assert [number_of(frame.rgb) for frame in frames(path)] == [0, 1, 2, 3]


# ---------------------------------------------------------------- what is no whole video


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "codec", "settings", "share"),
    [
        ("a.mp4", "libx264", {"movflags": "faststart"}, 0.5),
        ("a.mp4", "libx264", {"movflags": "faststart"}, 0.9),
        ("a.mkv", "libx264", {}, 0.4),
        ("a.avi", "mpeg4", {}, 0.9),
        ("a.webm", "libvpx-vp9", {}, 0.4),
        ("a.ts", "libx264", {}, 0.4),
    ],
)
def test_a_file_that_was_cut_off_gives_the_frames_before_then_an_error(tmp_path, name, codec, settings, share):
    noise = np.random.default_rng(0)
    pixels = [noise.integers(0, 200, (24, 32, 3), np.uint8) // 4 + grey // 2 for grey in grey_levels(25)]
    path = write(tmp_path / name, pixels, codec=codec, gop_size=12, **settings)
    whole = [frame.rgb for frame in frames(path)]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    found = []
    message = r"is damaged or cut off at frame (\d+), [\d.]+ s \(.*\); the \1 frames"
    with pytest.raises(ImageError, match=message) as raised:
        for frame in frames(path):
            found.append(frame)
    assert f"at frame {len(found)}, {len(found) * 0.04:.3f} s" in str(raised.value)
    assert 0 < len(found) < 25
    assert all((frame.rgb == rgb).all() for frame, rgb in zip(found, whole, strict=False))


def test_one_frame_less_than_stated_is_a_warning(tmp_path, caplog):
    path = write(tmp_path / "a.mkv", grey_levels(10))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"00:00:00.400000000", b"00:00:00.440000000"))
    assert len(list(frames(path))) == 10
    assert "may lack its last frames: it should last 0.440 s, and ends after 0.400 s" in caplog.text


def test_a_file_that_ends_between_two_frames_is_cut_off(tmp_path):
    path = write(tmp_path / "a.mp4", grey_levels(10), movflags="faststart", options={"bf": "0"})
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: positions[9]])
    found, message = read_until_error(path)
    assert found == list(range(9))
    assert "10 frames are listed" in message or "should last 0.400 s" in message or "incomplete" in message


def test_an_mp4_without_its_index_cannot_be_opened(tmp_path):
    path = write(tmp_path / "a.mp4", grey_levels(10))
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    assert read_until_error(path) == (
        [],
        f"{path}: has a video stream without frames; the file is damaged: export it again",
    )
    path.write_bytes(whole[: len(whole) // 2])
    assert read_until_error(path)[1].startswith(f"{path}: cannot be opened")
    assert "cut off before its index was written" in read_until_error(path)[1]


def test_damage_inside_is_an_error_at_its_frame(tmp_path):
    noise = np.random.default_rng(0)
    pixels = [noise.integers(0, 256, (24, 32, 3), np.uint8) for _ in range(12)]
    path = write(tmp_path / "a.mp4", pixels, gop_size=1, options={"bf": "0"})
    with av.open(str(path)) as container:
        positions = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data, (start, size) = bytearray(path.read_bytes()), positions[6]
    data[start + 60 : start + size] = bytes(size - 60)
    path.write_bytes(data)
    found = []
    with pytest.raises(ImageError, match=r"is damaged or cut off at frame 6, 0\.240 s"):
        for frame in frames(path):
            found.append(frame.index)
    assert found == list(range(6))


def test_damage_before_the_first_frame_is_shown_is_an_error(tmp_path):
    """The decoder holds frames back, to bring them into order: what it cannot decode meanwhile is not left out."""
    noise = np.random.default_rng(0)
    pixels = [noise.integers(0, 256, (24, 32, 3), np.uint8) for _ in range(12)]
    path = write(tmp_path / "a.mp4", pixels, options={"bf": "3", "b_strategy": "0"})
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data, (start, size) = bytearray(path.read_bytes()), packets[1]
    data[start + 60 : start + size] = bytes(size - 60)
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"is damaged or cut off at frame [01], 0\.0[04]0 s"):
        list(frames(path))


def test_interlaced_video_is_named(tmp_path, caplog):
    write(tmp_path / "a.mp4", grey_levels(3), options={"x264-params": "tff=1"})
    assert len(list(frames(tmp_path / "a.mp4"))) == 3
    assert caplog.text.count("is interlaced") == 1


def test_a_recording_that_begins_between_key_frames_says_so(tmp_path, caplog):
    path = write(tmp_path / "a.ts", grey_levels(20), gop_size=8, options={"bf": "0", "x264-params": "scenecut=0"})
    with av.open(str(path)) as container:
        packets = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[packets[3] // 188 * 188 :])
    found = [number_of(frame.rgb) for frame in frames(path)]
    assert found == list(range(8, 20))
    assert "5 frames before the first key frame cannot be decoded" in caplog.text


def test_a_stream_without_frames_is_named(tmp_path):
    path = write(tmp_path / "a.mkv", grey_levels(2))
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"\x1f\x43\xb6\x75")])  # before the first cluster
    assert "a video stream without frames" in read_until_error(path)[1] or "cut off" in read_until_error(path)[1]


def test_a_sound_file_is_named(tmp_path):
    path = write_sound(tmp_path / "a.mp4")
    assert read_until_error(path) == ([], f"{path}: has no video stream, only sound; give a file with pictures")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "is an HTML page"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", "is a playlist"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "is a playlist"),
        (b"just some text\n" * 99, "is not a video that is read"),
        (b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=video 9 RTP/AVP 96\r\n", "is not a video that is read"),
    ],
)
def test_what_is_no_video_is_called_what_it_is(tmp_path, content, message):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message):
        list(frames(path))


def test_no_file_but_the_named_one_is_opened(tmp_path, monkeypatch):
    """A list of files in the form that FFmpeg also takes without its head, and a playlist behind white space."""
    write(tmp_path / "other.mp4", grey_levels(2))
    for name, content in (
        ("a.concat", f"file '{tmp_path / 'other.mp4'}'\n"),
        ("a.m3u8", f"\n\n#EXTM3U\n#EXTINF:1,\n{tmp_path / 'other.mp4'}\n#EXT-X-ENDLIST\n"),
        ("a.mpd", "<?xml version='1.0'?><MPD></MPD>"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ImageError):
            list(frames(tmp_path / name))
    with pytest.raises(BrixelError, match="a URL must be downloaded first"):
        frames("http://127.0.0.1:9/a.mp4")


def test_an_image_is_no_video_and_a_video_no_image(tmp_path, image_path):
    with pytest.raises(ImageError, match="is not a video that is read"):
        list(frames(image_path))
    path = write(tmp_path / "a.mp4", grey_levels(2)).rename(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match=r"is a video or sound file \(MP4 or QuickTime\); read its frames with brixel"):
        load_image(path)


def test_a_missing_file_and_a_folder_are_errors_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        frames(tmp_path / "gone.mp4")
    with pytest.raises(ImageError, match="is a folder"):
        frames(tmp_path)


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", grey_levels(2))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BrixelError, match=r"^videos need 'av': pip install 'brixel\[video\]'$"):
        frames(path)


def test_frames_are_images_whose_maps_know_their_time(tmp_path):
    frame = Frame(QUADRANTS, 7, 0.28)
    assert load_image(frame).tolist() == QUADRANTS.transpose(2, 0, 1).tolist()
    assert np.asarray(frame).tolist() == QUADRANTS.tolist()
    assert repr(frame) == "Frame(index=7, time_s=0.28)"
