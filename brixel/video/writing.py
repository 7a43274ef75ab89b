"""Writing of MP4 files: H.264 where FFmpeg has its encoder, frame by frame, whole or not at all."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from brixel.errors import BrixelError
from brixel.images.frame import Frame
from brixel.images.from_arrays import to_bytes
from brixel.images.load import ImageInput, load_image
from brixel.inference.stream import several_images
from brixel.utils.atomic_files import atomic_path, check_folder
from brixel.utils.fields import check_field, number, path_like
from brixel.video.reading import import_av

ENDING = ".mp4"
_MARK = "drawn by brixel"  # the comment in videos of ours, by which they are known
_TICKS = 60_000  # timestamps per second
_ENCODERS = {"libx264": {"crf": "16", "preset": "veryfast"}, "mpeg4": {"qmin": "2", "qmax": "4"}}
_BT709, _LIMITED = 1, 1  # FFmpeg's numbers, the same for matrix, primaries and transfer


def write_video(path: str | os.PathLike[str], images: Iterable[ImageInput], fps: float = 25.0) -> None:
    """Write images as an MP4 file, whole or not at all; an earlier file is replaced. Needs the extra `video`.

    Args:
        path: The file, ``*.mp4``.
        images: Images of one size. Frames of a video keep their distances in time; one of odd height or width is
            continued by a row or column, since H.264 takes only even ones.
        fps: Images per second, for images that are no frames.

    Raises:
        ImageError: An image cannot be read.
        BrixelError: Another ending, a missing folder, no images, or images of several sizes.
    """
    target: Path = check_field("path", path, path_like())
    fps = check_field("fps", fps, number(above=0))
    images = several_images(images)
    check_video_path(target)
    with video_writer(target, fps) as writer:
        for position, image in enumerate(images):
            writer.add(to_bytes(load_image(image)), image.time_s if isinstance(image, Frame) else position / fps)


def check_video_path(path: Path, *, overwrite: bool = True) -> None:
    """Raise BrixelError if no video can be written to ``path``; without ``overwrite``, also over one not of ours."""
    check_folder(path)
    if path.suffix.lower() != ENDING:
        raise BrixelError(f"{path}: expected a name that ends in {ENDING}, the format of the videos that are written")
    if path.is_dir():
        raise BrixelError(f"{path} is a folder; expected the name of a video to write")
    if not overwrite and path.exists() and not _is_ours(path):
        raise BrixelError(f"{path} exists, and brixel has not drawn it; give another name, or --overwrite")


@contextlib.contextmanager
def video_writer(path: Path, fps: float) -> Iterator["VideoWriter"]:
    """A writer of the video at ``path``, which appears when the block ends without an error.

    ``fps``: frames per second, about: a hint for players, and how long the last frame is shown.
    """
    av = import_av()
    with (
        atomic_path(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        container.metadata["comment"] = _MARK
        writer = VideoWriter(container, fps, path)
        yield writer
        writer.finish()


class VideoWriter:
    """Encodes frames one by one; see :func:`video_writer`."""

    def __init__(self, container: Any, fps: float, path: Path) -> None:
        self._container, self._fps, self._path = container, fps, path
        self._stream: Any = None
        self._image_hw = (0, 0)
        self._start_s = 0.0
        self._last: int | None = None  # timestamp of the last frame

    def add(self, pixels: npt.NDArray[np.uint8], time_s: float) -> None:
        """Append a frame (H, W, 3) that is shown at ``time_s``, later than the one before.

        Raises BrixelError for another size than that of the first frame.
        """
        height, width = pixels.shape[:2]
        if self._stream is None:
            self._start_s, self._image_hw = time_s, (height, width)
            self._stream = self._new_stream(height + height % 2, width + width % 2)
        if self._image_hw != (height, width):
            before = "{} x {}".format(*self._image_hw)
            raise BrixelError(
                f"{self._path}: a frame has {height} x {width} px, those before {before}; a video has frames of one "
                "size: resize them, or write several videos"
            )
        self._mux(self._frame(pixels, self._timestamp(time_s)))

    def finish(self) -> None:
        """Write what the encoder holds back. Raises BrixelError where there was no frame."""
        if self._stream is None:
            raise BrixelError(f"{self._path}: no images to write; expected at least one")
        for packet in self._stream.encode(None):
            self._container.mux(packet)

    def _timestamp(self, time_s: float) -> int:
        stamp = round((time_s - self._start_s) * _TICKS)
        self._last = stamp if self._last is None else max(stamp, self._last + 1)
        return self._last

    def _new_stream(self, height: int, width: int) -> Any:
        av = import_av()
        name = next((each for each in _ENCODERS if each in av.codec.codecs_available), "mpeg4")
        stream = self._container.add_stream(name, rate=Fraction(self._fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = dict(_ENCODERS[name])
        stream.codec_context.time_base = Fraction(1, _TICKS)
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        return stream

    def _frame(self, pixels: npt.NDArray[np.uint8], timestamp: int) -> Any:
        av = import_av()
        flags = import_av("av.video.reformatter").Interpolation
        rows, columns = self._stream.height - pixels.shape[0], self._stream.width - pixels.shape[1]
        even = np.pad(pixels, ((0, rows), (0, columns), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(even, format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=_BT709,
            dst_color_range=_LIMITED,
            interpolation=flags.BICUBIC | flags.ACCURATE_RND | flags.FULL_CHR_H_INP,
        )
        frame.pts, frame.time_base = timestamp, Fraction(1, _TICKS)
        frame.duration = round(_TICKS / self._fps)
        return frame

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)


def _is_ours(path: Path) -> bool:
    """Whether a file is a video that we wrote."""
    av = import_av()
    try:
        with av.open(str(path), "r", container_options={"format_whitelist": "mov"}) as container:
            return bool(container.metadata.get("comment") == _MARK)
    except (av.FFmpegError, OSError, ValueError):
        return False
