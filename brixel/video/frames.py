"""The frames of a video that are wanted: all, some each second, or each n-th; lazily, in order.

Everything is decoded from the start of the file, also with ``start``: numbers of frames are then exact in every format.
What is not wanted is not converted to RGB, which takes longer than decoding.
"""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from brixel.errors import BrixelError
from brixel.images.frame import Frame
from brixel.utils.fields import check_field, check_fields, number, optional, text, whole_number
from brixel.video.reading import DecodedFrame, check_video, decode

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".m2ts", ".ts", ".wmv", ".flv"),
    *(".ogv", ".3gp", ".mxf"),
)
"""Suffixes of videos, by which commands tell them from images, in lower case."""

_ROUNDING_S = 1e-6  # so that frames at a multiple of 1/fps are taken at it, whatever their time was rounded to


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a video by its name."""
    return os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class FrameSelection:
    """Which frames of a video are wanted; the arguments of :func:`frames`."""

    fps: float | None = None
    every: int | None = None
    start: float | None = None
    stop: float | None = None

    def __post_init__(self) -> None:
        second, positive = number(0), number(above=0)
        rules = {"fps": positive, "every": whole_number(1), "start": second, "stop": positive}
        check_fields(self, {name: optional(rule) for name, rule in rules.items()})
        if self.fps is not None and self.every is not None:
            raise BrixelError(f"fps is {self.fps:g} and every is {self.every}; give one of them")
        if self.start is not None and self.stop is not None and self.stop <= self.start:
            raise BrixelError(f"start is {self.start:g} s and stop {self.stop:g} s; expected a later stop")

    def of(self, decoded: Iterable[DecodedFrame]) -> Iterator[DecodedFrame]:
        """Those of all frames that are wanted."""
        start, stop = self.start or 0.0, math.inf if self.stop is None else self.stop
        if self.fps is not None:
            yield from _at_rate(decoded, self.fps, start, stop)
            return
        for frame in decoded:
            if frame.time_s >= stop:
                return
            if frame.time_s >= start and frame.index % (self.every or 1) == 0:
                yield frame


def frames(
    path: str | os.PathLike[str],
    fps: float | None = None,
    every: int | None = None,
    start: float | None = None,
    stop: float | None = None,
) -> Iterator[Frame]:
    """Read the frames of a video, for ``model.stream(frames(path))`` and wherever several images are taken.

    Frames are as players show them: in the order and at the times of their timestamps, turned upright, with square
    pixels, in 8-bit sRGB by the matrix and range that the file states. HDR is not mapped to a normal range. Needs the
    extra `video`.

    Args:
        path: A file: MP4, QuickTime, Matroska, WebM, AVI, MPEG, Ogg, WMV, Flash, MXF or GIF. Addresses and playlists
            are not opened.
        fps: So many frames per second: at each multiple of 1/fps from ``start`` on the frame that is shown then; a
            frame is given once, also where there are fewer.
        every: The frames whose number is a multiple of it.
        start: In seconds: frames before it are left out.
        stop: In seconds: frames from it on are left out.

    Yields:
        The frames, with their number and time in the whole video.

    Raises:
        MissingFileError: There is no such file.
        ImageError: It is no video, has no frames, or is damaged or cut off, which is raised after the frames before.
        BrixelError: An argument is out of range, both ``fps`` and ``every`` are given, or PyAV is not installed.
    """
    name, selection = check_field("path", path, text()), FrameSelection(fps, every, start, stop)
    check_video(name)
    return (frame.convert() for frame in selection.of(decode(name)))


def sample_frames(path: str | os.PathLike[str], count: int, selection: FrameSelection) -> list[Frame]:
    """Up to ``count`` of the frames that are wanted, evenly spaced; all are decoded once, and few are held."""
    kept: list[Frame] = []
    step = 1
    for position, decoded in enumerate(selection.of(decode(path))):
        if position % step == 0:
            kept.append(decoded.convert())
        if len(kept) == 2 * count:
            kept, step = kept[::2], 2 * step
    last = len(kept) - 1
    chosen = {round(number * last / max(1, count - 1)) for number in range(count)} if last >= count else range(last + 1)
    return [kept[position] for position in sorted(chosen)]


def _at_rate(decoded: Iterable[DecodedFrame], fps: float, start: float, stop: float) -> Iterator[DecodedFrame]:
    """At each time ``start + k / fps`` before ``stop`` the frame that is shown then, once."""
    count = 0  # of the times that have passed
    for shown, following in pairwise(_with_end(decoded)):
        assert shown is not None
        until = (shown.end_s if following is None else following.time_s) - _ROUNDING_S
        due = start + count / fps
        if due >= stop:
            return
        if due < until:
            yield shown
            count = math.floor((until - start) * fps) + 1


def _with_end(decoded: Iterable[DecodedFrame]) -> Iterator[DecodedFrame | None]:
    yield from decoded
    yield None
