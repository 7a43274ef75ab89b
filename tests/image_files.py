"""Image files by hand: layouts that Pillow does not write."""

import struct
import zlib
from collections.abc import Mapping

_SHORT, _LONG = 3, 4


def tiff(
    size_hw: tuple[int, int],
    pixels: bytes,
    *,
    bits: tuple[int, ...] = (8,),
    photometric: int = 1,
    sample_format: int = 1,
    order: str = "<",
    tags: Mapping[int, tuple[int, ...]] | None = None,
) -> bytes:
    """An uncompressed TIFF of one strip; `tags` are further ones, of 16 bits."""
    height, width = size_hw
    entries = {256: (width,), 257: (height,), 258: bits, 259: (1,), 262: (photometric,), 273: (0,), 277: (len(bits),)}
    entries |= {278: (height,), 279: (len(pixels),), 339: (sample_format,) * len(bits), **(tags or {})}
    values_at = 8 + 2 + 12 * len(entries) + 4
    directory, values = struct.pack(order + "H", len(entries)), b""
    long_values = {tag: numbers for tag, numbers in entries.items() if len(numbers) > 2}
    pixels_at = values_at + sum(2 * len(numbers) for numbers in long_values.values())
    for tag, numbers in sorted(entries.items()):
        kind = _LONG if tag in (256, 257, 273, 278, 279) else _SHORT
        numbers = (pixels_at,) if tag == 273 else numbers
        packed = struct.pack(order + ("I" if kind == _LONG else "H") * len(numbers), *numbers)
        if len(packed) > 4:
            values, packed = values + packed, struct.pack(order + "I", values_at + len(values))
        directory += struct.pack(order + "HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return head + directory + bytes(4) + values + pixels


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size_hw: tuple[int, int], rows: bytes, *, depth: int = 8, colour: int = 0, extra: bytes = b"") -> bytes:
    """A PNG: `colour` 0 is grey, 2 RGB, 4 grey with alpha, 6 RGBA; `extra` are chunks before the pixels."""
    height, width = size_hw
    stride = len(rows) // height
    body = b"".join(b"\0" + rows[row * stride : (row + 1) * stride] for row in range(height))
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + png_chunk(b"IDAT", zlib.compress(body)) + png_chunk(b"IEND", b"")
