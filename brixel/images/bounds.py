"""What is looked at in an image file before Pillow reads it, so that a small file cannot take hours or all memory."""

import bisect
import io
import itertools
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from brixel.errors import ImageError
from brixel.images.patch_grid import MAX_PIXELS

MAX_SCAN_PIXELS = 16 * MAX_PIXELS
"""Pixels of a JPEG times its scans: each scan of a progressive file goes over all of them. Usual files have ten."""

MAX_SEGMENTS = 100_000
"""Segments of a JPEG. An ordinary file has tens, one with the largest colour profile some 300."""

_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # none that stands inside a scan: stuffed bytes and restarts
_CHUNK_BYTES = 1 << 20
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # segments with the image's size


# ---- JPEG


def check_jpeg(file: BinaryIO, path: str) -> BinaryIO:
    """Raise ImageError for a file with more scans than `MAX_SCAN_PIXELS` allows, or more than `MAX_SEGMENTS`."""
    scans, pixels = 0, 0
    for number, (marker, start) in enumerate(_jpeg_segments(file)):
        if number > MAX_SEGMENTS:
            raise ImageError(f"{path}: has more than {MAX_SEGMENTS:,} segments; no camera or program writes so many")
        if marker in _SIZES and len(start) == 5:
            pixels = max(pixels, int.from_bytes(start[1:3], "big") * int.from_bytes(start[3:5], "big"))
        scans += marker == _SOS
        if scans * pixels > MAX_SCAN_PIXELS and scans > 1:
            raise ImageError(
                f"{path}: has {scans} scans or more of {pixels:,} pixels each, which would take minutes to decode; the "
                f"limit is {MAX_SCAN_PIXELS:,} pixels in all scans: save it again"
            )
    file.seek(0)
    return file


def _jpeg_segments(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The segments up to the end of the image, as libjpeg finds them: marker and, of those with a size, its bytes."""
    position = 2
    while (found := _next_marker(file, position)) is not None:
        marker, position = found
        if marker in (_SOI, _EOI):
            return
        file.seek(position)
        length = int.from_bytes(file.read(2), "big")
        yield marker, file.read(5) if marker in _SIZES else b""
        position += max(2, length)


def _next_marker(file: BinaryIO, position: int) -> tuple[int, int] | None:
    """The next marker from a position on, and the position after it."""
    file.seek(position)
    before = b""
    while chunk := file.read(_CHUNK_BYTES if before else 4096):
        if found := _MARKER.search(before + chunk):
            return found[0][1], position - len(before) + found.end()
        position += len(chunk)
        before = chunk[-1:]
    return None


# ---- PNG

_KEPT_CHUNKS = (b"tRNS", b"eXIf")
_MAX_TEXT_BYTES = 1 << 16


def without_metadata(file: BinaryIO, path: str) -> BinaryIO:
    """The file without the chunks that neither pixels nor orientation depend on, and without further frames.

    Pillow unpacks texts and colour profiles when it opens a file, and refuses one whose are large.
    """
    parts = [(0, 8)]
    for position, kind, length in _png_chunks(file):
        if kind[:1].isupper() or kind in _KEPT_CHUNKS or _is_orientation(kind, length, file):
            parts.append((position, length + 12))
    file.seek(0)
    return io.BufferedReader(_Parts(file, parts))


def _png_chunks(file: BinaryIO) -> Iterator[tuple[int, bytes, int]]:
    """Position, kind and bytes of each chunk, while the file is behind its head."""
    position, kind = 8, b""
    while kind != b"IEND":
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        yield position, kind, length
        position += length + 12


def _is_orientation(kind: bytes, length: int, file: BinaryIO) -> bool:
    """Whether a text chunk may say which side is up, and is small; `file` is where its text starts."""
    if kind not in (b"tEXt", b"zTXt", b"iTXt") or length > _MAX_TEXT_BYTES:
        return False
    text = file.read(length)
    if kind == b"iTXt":
        return text.startswith(b"XML:com.adobe.xmp\0\0")  # the second zero: not compressed
    keyword = b"Raw profile type exif\0"
    if not text.startswith(keyword):
        return False
    return kind == b"tEXt" or _unpacks_to_little(text[len(keyword) + 1 :])


def _unpacks_to_little(packed: bytes) -> bool:
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed, _MAX_TEXT_BYTES)
    except zlib.error:
        return False
    return unpacking.eof


class _Parts(io.RawIOBase):
    """Parts of a file, (start, bytes), one after the other, as a file."""

    def __init__(self, file: BinaryIO, parts: list[tuple[int, int]]) -> None:
        self._file, self._parts = file, parts
        self._ends = list(itertools.accumulate(length for _, length in parts))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._ends[-1]}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        index = bisect.bisect_right(self._ends, self._position)
        if index == len(self._parts):
            return 0
        left = self._ends[index] - self._position  # in this part
        start, length = self._parts[index]
        self._file.seek(start + length - left)
        view = memoryview(buffer).cast("B")
        data = self._file.read(min(left, len(view)))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)
