"""Video files, decoded from the start by FFmpeg (PyAV, extra `video`): in order, upright, and whole or with an error.

FFmpeg reads the file that we have opened, as one of `CONTAINERS`, and opens nothing else: no address, no other file.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from brixel.errors import ImageError, printable
from brixel.images.decode import open_regular_file
from brixel.images.frame import Frame
from brixel.images.patch_grid import MAX_PIXELS
from brixel.utils.extras import import_extra
from brixel.utils.file_kinds import HEAD_BYTES, other_content, video_container

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Array = npt.NDArray[Any]

CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "asf", "flv", "ogg", "mxf", "gif")
"""FFmpeg's names of the containers that are read; playlists and lists of files are none of them."""

_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"[playlist]", b"<ASX", b"<asx")
_BT709, _BT601, _UNKNOWN_MATRIX = 1, 5, 2  # of swscale, and what FFmpeg calls unspecified
_HDR = (16, 18)  # transfer functions: PQ, HLG
_TALLEST_SD, _WIDEST_SD = 576, 1279  # frames without a stated matrix up to this size are BT.601, as players take them
_UPRIGHT = (1, 0, 0, 1)
_MISSING_S = 0.5  # between the end that a file states and that of its last frame: more is an error, less a warning
_DEFAULT_RATE = 25.0  # where neither timestamps nor a rate are stated
_LOG = logging.getLogger("brixel")


def import_av(module: str = "av") -> Any:
    """PyAV, or one of its modules. Raises BrixelError, which names the extra, where it is not installed."""
    return import_extra(module, extra="video", purpose="videos")


@dataclass(frozen=True)
class DecodedFrame:
    """A decoded frame that is not converted to RGB yet; conversion takes longer than decoding.

    Args:
        index: Its number, from 0.
        time_s: When it is shown, in seconds from the start of the video.
        end_s: When its own duration ends; the next frame may come later or earlier.
    """

    index: int
    time_s: float
    end_s: float
    _decoded: "VideoFrame" = field(repr=False)
    _pixel_aspect: Fraction
    _axes: tuple[int, ...]

    def convert(self) -> Frame:
        """The frame as it is shown: RGB, square pixels, upright."""
        rgb = _to_rgb(self._decoded, self._pixel_aspect)
        return Frame(_turned(rgb, self._axes), self.index, self.time_s)


def check_video(path: str | os.PathLike[str]) -> None:
    """Raise ImageError or MissingFileError for what is no video by its first bytes, and BrixelError without PyAV."""
    import_av()
    with open_regular_file(os.fsdecode(path)) as file:
        _check_head(file, printable(os.fsdecode(path)))


def decode(path: str | os.PathLike[str]) -> Iterator[DecodedFrame]:
    """Decode the frames of a video, in the order in which they are shown.

    Of several video streams the best is read, as FFmpeg chooses it. Packets before the first frame that cannot be
    decoded, as where a recording begins between two key frames, are passed over with a warning.

    Raises:
        MissingFileError: There is no such file.
        ImageError: It is no video, has no frames, or is damaged or cut off; raised after the frames before.
    """
    name = printable(os.fsdecode(path))
    with open_regular_file(os.fsdecode(path)) as file:
        _check_head(file, name)
        with _opened(file, name) as container:
            yield from _Decoding(name, container, _video_stream(container, name)).frames()


def _check_head(file: BinaryIO, name: str) -> None:
    head = file.read(HEAD_BYTES)
    file.seek(0)
    if head.lstrip().startswith(_PLAYLISTS):
        raise ImageError(f"{name}: is a playlist, which names other files; give the video itself")
    if (other := other_content(head)) is not None:
        raise ImageError(f"{name}: is {other}")


@contextmanager
def _opened(file: BinaryIO, name: str) -> Iterator["InputContainer"]:
    av = import_av()
    # a second bar to everything that FFmpeg would open by itself is that no protocol is allowed
    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"}
    is_video = video_container(file.read(HEAD_BYTES)) is not None
    file.seek(0)
    try:
        container = av.open(file, "r", container_options=options, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        if is_video:
            raise ImageError(
                f"{name}: cannot be opened ({_reason(error)}); the file is damaged or was cut off before its index was "
                "written: fetch or export it again"
            ) from error
        raise ImageError(
            f"{name}: is not a video that is read; expected MP4, QuickTime, Matroska, WebM, AVI, MPEG, Ogg, WMV, "
            "Flash, MXF or GIF: export it as MP4"
        ) from error
    with container:
        yield container


def _video_stream(container: "InputContainer", name: str) -> "VideoStream":
    """The stream to read; pictures in sound files, such as covers of albums, are none."""
    av = import_av()
    streams = [each for each in container.streams.video if not each.disposition & av.stream.Disposition.attached_pic]
    best = container.streams.best("video")
    if not streams:
        sound = " only sound" if container.streams.audio else " none"
        raise ImageError(f"{name}: has no video stream,{sound}; give a file with pictures")
    stream: VideoStream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise ImageError(f"{name}: has a codec that this FFmpeg cannot decode; export it as H.264 in an MP4 file")
    stream.thread_type = "SLICE"  # threads that each decode a frame keep errors at the end of a file to themselves
    stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
    return stream


class _Decoding:
    """The state of reading one stream."""

    def __init__(self, name: str, container: "InputContainer", stream: "VideoStream") -> None:
        self._name, self._container, self._stream = name, container, stream
        self._rate = float(stream.average_rate or stream.guessed_rate or _DEFAULT_RATE)
        self._origin_s: float | None = None if stream.start_time is None else self._seconds(stream.start_time)
        self._given = 0
        self._time_s = -1 / self._rate  # of the last frame
        self._end_s = 0.0  # of the last frame
        self._packets = 0
        self._begun = False  # whether a key frame was decoded
        self._early: list[int | None] = []  # timestamps of the packets before the first frame is there
        self._warned: set[str] = set()

    def frames(self) -> Iterator[DecodedFrame]:
        """All frames, then an error where some are missing."""
        av = import_av()
        try:
            for packet in self._container.demux(self._stream):
                self._packets += packet.size > 0
                if not self._given and packet.size and not packet.is_discard:
                    self._early.append(packet.pts)
                if packet.is_corrupt and self._begun:
                    yield from self._before(packet)
                    raise self._damage("a packet is incomplete")
                yield from map(self._next, self._decoded(packet))
        except av.FFmpegError as error:
            raise self._damage(_reason(error)) from error
        self._check_end()

    def _decoded(self, packet: "Packet[VideoStream]") -> Sequence["VideoFrame"]:
        """The frames of a packet; of one that cannot be decoded before the first key frame, none."""
        av = import_av()
        try:
            frames: Sequence[VideoFrame] = packet.decode()
        except av.InvalidDataError:
            if self._begun:
                raise
            return []
        self._begun = self._begun or packet.is_keyframe
        return frames

    def _before(self, damaged: "Packet[VideoStream]") -> Iterator[DecodedFrame]:
        """What the decoder holds back of the frames that are shown before a packet that is incomplete."""
        av = import_av()
        try:
            waiting = self._stream.decode(None)
        except av.FFmpegError:
            return
        for frame in waiting:
            if frame.is_corrupt or frame.pts is None or damaged.pts is None or frame.pts >= damaged.pts:
                return
            yield self._next(frame)

    def _next(self, decoded: "VideoFrame") -> DecodedFrame:
        if decoded.is_corrupt:
            raise self._damage("the frame is incomplete")
        if not self._given:
            self._warn_of_early(decoded.pts)
        if decoded.color_trc in _HDR:
            self._warn("HDR", "has HDR colours, which are not mapped to a normal range: its frames look pale")
        if decoded.interlaced_frame:
            self._warn("interlaced", "is interlaced, and its frames are not made whole: what moves has combed outlines")
        stamp = decoded.pts if decoded.pts is not None else decoded.dts
        time_s = self._time_s + 1 / self._rate if stamp is None else self._since_start(stamp)
        if time_s <= self._time_s:
            self._warn("times", f"frame {self._given} has no later time than the one before; the frame rate is used")
            time_s = self._time_s + 1 / self._rate
        end_s = time_s + (self._seconds(decoded.duration) if decoded.duration else 1 / self._rate)
        found = DecodedFrame(self._given, time_s, end_s, decoded, self._pixel_aspect(), self._axes(decoded))
        self._given, self._time_s, self._end_s = self._given + 1, time_s, end_s
        return found

    def _warn_of_early(self, first: int | None) -> None:
        """Name the frames before the first one that could be decoded."""
        missing = sum(stamp is not None and first is not None and stamp < first for stamp in self._early)
        if missing:
            self._warn("early", f"{missing} frames before the first key frame cannot be decoded and are left out")
        self._early = []

    def _seconds(self, stamp: int) -> float:
        return float(stamp * self._stream.time_base) if self._stream.time_base else stamp / self._rate

    def _since_start(self, stamp: int) -> float:
        seconds = self._seconds(stamp)
        if self._origin_s is None or (not self._given and seconds < self._origin_s):
            self._origin_s = seconds
        return seconds - self._origin_s

    def _pixel_aspect(self) -> Fraction:
        aspect = self._stream.sample_aspect_ratio or self._stream.codec_context.sample_aspect_ratio
        return Fraction(aspect) if aspect else Fraction(1)

    def _axes(self, decoded: "VideoFrame") -> tuple[int, ...]:
        """The signs (a, b, c, d) of the display matrix: x' = a x + c y and y' = b x + d y are what is shown."""
        sides: Any = decoded.side_data
        data = next((bytes(side) for side in sides if side.type.name == "DISPLAYMATRIX"), None)
        if data is None:
            return _UPRIGHT
        a, b, _, c, d, *_ = np.sign(np.frombuffer(data, np.int32)).tolist()
        if (a == d == 0) != (b == c == 0):
            return a, b, c, d
        self._warn("angle", "is to be turned by an angle that is no multiple of 90 degrees; it is left as it is")
        return _UPRIGHT

    def _check_end(self) -> None:
        """Raise ImageError where the file ends before its last frame."""
        if self._given == 0:
            raise ImageError(f"{self._name}: has a video stream without frames; the file is damaged: export it again")
        listed = len(self._stream.index_entries)
        if self._packets < listed:
            raise self._damage(f"{listed} frames are listed, and the file ends before")
        stated_s = self._stated_end_s() or 0.0
        message = f"it should last {stated_s:.3f} s, and ends after {self._end_s:.3f} s"
        if stated_s - self._end_s > max(_MISSING_S, 2 / self._rate):
            raise self._damage(message)
        if stated_s - self._end_s > max(1e-3, 0.9 / self._rate):
            self._warn("end", f"may lack its last frames: {message}")

    def _stated_end_s(self) -> float | None:
        """The end of the stream that the file states, if any; the end of the file may be that of the sound."""
        if self._container.format.name == "avi" and self._stream.frames:  # its duration is that of what is there
            return self._stream.frames / self._rate
        if self._stream.duration is not None:
            start_s = (self._origin_s or 0.0) if self._stream.start_time is None else 0.0
            return self._seconds(self._stream.duration) - start_s
        text = self._stream.metadata.get("DURATION", "")
        try:
            hours, minutes, seconds = (float(part) for part in text.split(":"))
        except ValueError:
            only = len(self._container.streams) == 1
            return self._container.duration / 1e6 if only and self._container.duration else None
        return 3600 * hours + 60 * minutes + seconds - (self._origin_s or 0)

    def _damage(self, reason: str) -> ImageError:
        where = f"frame {self._given}, {max(0.0, self._end_s):.3f} s"
        return ImageError(
            f"{self._name}: is damaged or cut off at {where} ({reason}); the {self._given} frames before were read: "
            "fetch it again, or cut it there"
        )

    def _warn(self, kind: str, message: str) -> None:
        """Log a message, once per kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            _LOG.warning("%s: %s", self._name, message)


def _reason(error: Exception) -> str:
    """What FFmpeg says, without numbers and names of functions."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _to_rgb(decoded: "VideoFrame", pixel_aspect: Fraction) -> Array:
    """The pixels as (H, W, 3), uint8, by the matrix and range that the file states; wider where pixels are wide."""
    flags = import_av("av.video.reformatter").Interpolation
    sd = decoded.height <= _TALLEST_SD and decoded.width <= _WIDEST_SD
    matrix = (_BT601 if sd else _BT709) if decoded.colorspace == _UNKNOWN_MATRIX else None
    has_alpha = any(component.is_alpha for component in decoded.format.components)
    width = max(1, round(decoded.width * pixel_aspect))
    converted = decoded.reformat(
        width=width,
        format="rgba" if has_alpha else "rgb24",
        src_colorspace=matrix,
        interpolation=flags.BICUBIC | flags.ACCURATE_RND | flags.FULL_CHR_H_INT,
    )
    pixels = converted.to_ndarray()
    return _over_white(pixels) if has_alpha else pixels


def _over_white(rgba: Array) -> Array:
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _turned(rgb: Array, axes: tuple[int, ...]) -> Array:
    """Pixels (H, W, 3) turned and mirrored as :meth:`_Decoding._axes` says."""
    a, b, c, d = axes
    turned = rgb if a else rgb.swapaxes(0, 1)
    turned = turned[:, ::-1] if (a or c) < 0 else turned
    return np.ascontiguousarray(turned[::-1] if (d or b) < 0 else turned)
