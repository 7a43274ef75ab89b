"""Which files are read at all, what others are called, and what is looked at before Pillow reads one."""

import io
import os
import socket
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import png, png_chunk
from PIL import Image

from brixel.errors import ImageError
from brixel.images import bounds, formats
from brixel.images.formats import FORMATS, readable_endings
from brixel.images.load import load_image

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def saved(format_name: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(buffer, format_name, **options)
    return buffer.getvalue()


# ---- what is read


@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_every_ending_of_a_format_is_read(tmp_path: Path, format_: formats.Format) -> None:
    if format_.name == "HEIF":
        import pillow_heif

        buffer = io.BytesIO()
        pillow_heif.from_pillow(Image.fromarray(PIXELS)).save(buffer, quality=-1)
        content = buffer.getvalue()
    else:
        content = saved(format_.name)
    for ending in format_.endings:
        for name in (f"image{ending}", f"IMAGE{ending.upper()}"):
            (tmp_path / name).write_bytes(content)
            assert load_image(tmp_path / name).shape == (3, 24, 40)
        assert ending in readable_endings()


@pytest.mark.parametrize("name", ["ICO", "PCX", "DDS", "SGI", "ICNS", "XBM", "MSP", "EPS", "PDF"])
def test_other_readers_of_pillow_get_no_file(tmp_path: Path, name: str) -> None:
    mode = "1" if name in ("XBM", "MSP") else "RGB"
    (tmp_path / "image.png").write_bytes(saved(name, Image.new(mode, (32, 32))))
    with pytest.raises(ImageError, match=r"image\.png: is "):
        load_image(tmp_path / "image.png")


def test_the_reader_of_heic_is_not_registered_in_pillow() -> None:
    for format_ in FORMATS:
        formats._reader(format_)
    assert "HEIF" not in Image.OPEN


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><title>404</title></html>", "is an HTML page"),
        (b"\xef\xbb\xbf<HTML>", "is an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is an XML document"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing"),
        (b'{"error": "not found"}', "is JSON text"),
        (b"%PDF-1.7\n", "is a PDF document"),
        (b"PK\x03\x04rest", "is a zip archive"),
        (b"", "is an empty file"),
        (bytes(4000), "is only zeros"),
        (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "is what macOS keeps beside a file"),
        (b"just words, and quite a number of them", "(is not an image|cannot be decoded)"),
        (b'[{"error": 1}]', "is JSON text"),
    ],
)
@pytest.mark.parametrize("name", ["photo.jpg", "mask.png", "scan.tga", "plain.dib"])
def test_what_lies_in_the_place_of_an_image_is_called_what_it_is(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=f"{name}: {message}"):
        load_image(tmp_path / name)


def test_heic_without_its_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats._reader.cache_clear()
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    try:
        (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
        with pytest.raises(ImageError, match=r"phone\.heic: .*needs the package pillow-heif: pip install 'brixel\[im"):
            load_image(tmp_path / "phone.heic")
        assert ".heic" not in readable_endings()
    finally:
        formats._reader.cache_clear()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket.png"))
        os.symlink("pipe.png", tmp_path / "link.png")
        for path in (tmp_path / "pipe.png", tmp_path / "socket.png", tmp_path / "link.png", "/dev/zero", "/dev/null"):
            with pytest.raises(ImageError, match=f"{path}: is a pipe, a socket or a device; give a file"):
                load_image(path)


# ---- JPEG: scans


def scans(content: bytes) -> list[int]:
    return [at for at in range(len(content) - 1) if content[at : at + 2] == b"\xff\xda"]


def repeated_scan(content: bytes, times: int) -> bytes:
    """A JPEG with its last scan repeated."""
    last = scans(content)[-1]
    return content[:last] + content[last:-2] * times + content[-2:]


def test_more_scans_than_usual_are_refused_by_the_pixels_they_go_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = saved("JPEG", progressive=True)
    assert len(scans(content)) == 10
    monkeypatch.setattr(bounds, "MAX_SCAN_PIXELS", 24 * 40 * 12)
    path = tmp_path / "scans.jpg"
    for times in (1, 3):
        path.write_bytes(repeated_scan(content, times))
        assert load_image(path).shape == (3, 24, 40)
    for times in (4, 400):
        path.write_bytes(repeated_scan(content, times))
        with pytest.raises(ImageError, match=r"scans\.jpg: has 13 scans or more of 960 pixels each"):
            load_image(path)


def test_the_largest_image_in_usual_scans_is_read() -> None:
    assert bounds.MAX_SCAN_PIXELS >= 10 * bounds.MAX_PIXELS


def test_scans_inside_of_other_segments_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved("JPEG", comment=b"\xff\xda" * 5000, exif=b"Exif\0\0" + b"\xff\xda\0\x0c" * 2000)
    monkeypatch.setattr(bounds, "MAX_SCAN_PIXELS", 24 * 40)
    for end in (b"", b"\xff\xda" * 100, content):  # what follows the image does not either, as in files of two
        (tmp_path / "thumbnail.jpg").write_bytes(content + end)
        assert load_image(tmp_path / "thumbnail.jpg").shape == (3, 24, 40)


def test_a_jpeg_of_millions_of_segments_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_SEGMENTS", 1000)
    content = saved("JPEG")
    (tmp_path / "segments.jpg").write_bytes(content[:2] + b"\xff\xfe\0\x02" * 1000 + content[2:])
    with pytest.raises(ImageError, match="more than 1,000 segments"):
        load_image(tmp_path / "segments.jpg")


# ---- PNG: metadata


def with_chunks(*chunks: bytes, after: bytes = b"") -> bytes:
    content = saved("PNG")
    end = content.index(b"IDAT") - 4
    return content[:end] + b"".join(chunks) + content[end:-12] + after + content[-12:]


LARGE = zlib.compress(bytes(3 << 20))
METADATA = {
    "zTXt": png_chunk(b"zTXt", b"Comment\0\0" + LARGE),
    "iTXt": png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + LARGE),
    "iTXt, plain": png_chunk(b"iTXt", b"Comment\0\0\0\0\0" + b"a" * (3 << 20)),
    "tEXt": png_chunk(b"tEXt", b"Comment\0" + b"a" * (3 << 20)),
    "iCCP": png_chunk(b"iCCP", b"profile\0\0" + LARGE),
    "EXIF as text": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + LARGE),
    "many": png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 20))) * 80,
    "of a private kind": png_chunk(b"prVt", bytes(3 << 20)),
    "damaged": png_chunk(b"iCCP", b"profile\0\0no zlib")[:-4] + b"\0\0\0\0",
}


@pytest.mark.parametrize("kind", METADATA)
def test_a_png_is_read_whatever_its_metadata(tmp_path: Path, kind: str) -> None:
    for content in (with_chunks(METADATA[kind]), with_chunks(after=METADATA[kind])):
        (tmp_path / "large.png").write_bytes(content)
        assert torch.equal(load_image(tmp_path / "large.png"), torch.tensor(PIXELS.transpose(2, 0, 1)))


def test_metadata_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(with_chunks(METADATA["many"], METADATA["iCCP"]))
    tracemalloc.start()
    try:
        load_image(tmp_path / "large.png")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def exif_as_text(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = exif.tobytes()
    return b"\nexif\n%8d\n" % len(data) + data.hex().encode() + b"\n"


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"tEXt", b"Raw profile type exif\0" + exif_as_text(6)),
        png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(exif_as_text(6))),
        png_chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation="6"/>'),
    ],
)
def test_what_says_which_side_is_up_is_kept(tmp_path: Path, chunk: bytes) -> None:
    (tmp_path / "turned.png").write_bytes(with_chunks(chunk))
    assert load_image(tmp_path / "turned.png").shape == (3, 40, 24)


def test_of_an_animated_png_the_first_frame_is_read(tmp_path: Path) -> None:
    frames = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1].copy())]
    for default in (False, True):
        content = saved("PNG", frames[0], save_all=True, append_images=frames[1:], default_image=default)
        (tmp_path / "frames.apng").write_bytes(content)
        assert torch.equal(load_image(tmp_path / "frames.apng"), torch.tensor(PIXELS.transpose(2, 0, 1)))


def test_a_png_of_many_small_chunks(tmp_path: Path) -> None:
    packed = zlib.compress(b"".join(b"\0" + bytes(row) for row in np.arange(2000, dtype=np.uint8).reshape(20, 100)))
    head = png((20, 100), bytes(2000))[:33]
    body = b"".join(png_chunk(b"IDAT", packed[at : at + 1]) for at in range(len(packed)))
    (tmp_path / "small.png").write_bytes(head + body + png_chunk(b"IEND", b""))
    assert load_image(tmp_path / "small.png").shape == (3, 20, 100)


# ---- heads cut short


@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000"])
def test_a_head_that_is_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    content = saved(name)
    for end in range(0, 60, 7):
        (tmp_path / "cut").write_bytes(content[:end])
        with pytest.raises(ImageError):
            load_image(tmp_path / "cut")
