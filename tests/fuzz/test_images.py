"""Damaged image files: each is read as an image, or refused as an ImageError, in silence."""

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz.mutations import mutate
from fuzz.runner import Case, Fuzz
from PIL import Image, features

from brixel.errors import ImageError
from brixel.images.formats import FORMATS
from brixel.images.load import load_image
from brixel.images.preprocess import Preprocessor

_TURNED = Image.Exif()
_TURNED[0x0112] = 6
_PREPARE = Preprocessor(14, 28, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
_FORMATS = {ending: format_.name for format_ in FORMATS for ending in format_.endings} | {".mpo": "MPO"}


def _shapes(height: int, width: int, channels: int) -> np.ndarray[Any, Any]:
    """Discs and stripes, so that every format has something to compress; uint8 (H, W, C)."""
    y, x = np.mgrid[:height, :width]
    discs = ((y % 23 - 11) ** 2 + (x % 19 - 9) ** 2 < 60).astype(int)
    planes = [(90 * discs + (3 * x + 5 * y) * (channel + 1)) % 256 for channel in range(channels)]
    return np.stack(planes, -1).astype(np.uint8)


def _whole_files() -> dict[str, bytes]:
    """Small files of every format, by name; the ending is that of the format."""
    rgb, rgba = Image.fromarray(_shapes(61, 83, 3)), Image.fromarray(_shapes(40, 52, 4))
    grey, large = Image.fromarray(_shapes(47, 33, 1)[..., 0]), Image.fromarray(_shapes(900, 1300, 3))
    deep = np.linspace(0, 65535, 41 * 29).reshape(41, 29)
    palette, bits = rgb.quantize(20), grey.convert("1")
    images: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("plain.jpg", rgb, {}),
        ("progressive.jpg", rgb, {"progressive": True, "exif": _TURNED}),
        ("grey.jpg", grey, {"restart_marker_blocks": 4}),
        ("ink.jpg", rgb.convert("CMYK"), {}),
        ("large.jpg", large, {"quality": 40, "exif": _TURNED}),
        ("two.mpo", rgb, {"save_all": True, "append_images": [grey.convert("RGB")]}),
        ("plain.png", rgb, {"exif": _TURNED}),
        ("alpha.png", rgba, {}),
        ("palette.png", palette, {"transparency": 3}),
        ("deep.png", Image.fromarray(deep.astype(np.uint16)), {}),
        ("bits.png", bits, {}),
        ("frames.apng", rgb, {"save_all": True, "append_images": [rgb.rotate(180)], "format": "PNG"}),
        ("plain.webp", rgb, {}),
        ("exact.webp", rgba, {"lossless": True, "exif": _TURNED.tobytes()}),
        ("frames.webp", rgb, {"save_all": True, "append_images": [rgb.rotate(180)]}),
        ("plain.gif", palette, {"transparency": 2}),
        ("frames.gif", palette, {"save_all": True, "append_images": [rgb.rotate(180).quantize(9)]}),
        ("plain.tif", rgb, {"exif": _TURNED}),
        ("fax.tif", bits, {"compression": "group4"}),
        ("deep.tif", Image.fromarray(deep.astype(np.uint16)), {"compression": "tiff_lzw"}),
        ("whole.tif", Image.fromarray(deep.astype(np.int32)), {}),
        ("float.tif", Image.fromarray((deep / 65535).astype(np.float32)), {}),
        ("pages.tif", rgb, {"save_all": True, "append_images": [grey]}),
        ("plain.bmp", rgb, {}),
        ("palette.bmp", palette, {}),
        ("plain.dib", rgb, {"format": "DIB"}),
        ("plain.ppm", rgb, {}),
        ("grey.pgm", grey, {"format": "PPM"}),
        ("bits.pbm", bits, {"format": "PPM"}),
        ("float.pfm", Image.fromarray((deep / 65535).astype(np.float32)), {"format": "PPM"}),
        ("runs.tga", rgba, {"compression": "tga_rle"}),
        ("plain.jp2", rgb, {}),
        ("grey.j2k", grey, {}),
    ]
    images += [(f"{name}.tif", rgb, {"compression": name}) for name in ("jpeg", "packbits", "tiff_adobe_deflate")]
    if features.check("avif"):
        images += [("plain.avif", rgb, {}), ("alpha.avif", rgba, {"exif": _TURNED.tobytes()})]
    files = {"ascii.ppm": b"P3 # by hand\n3 2\n1023\n" + b" ".join(b"%d" % (57 * value) for value in range(18))}
    for name, image, options in images:
        buffer = io.BytesIO()
        image.copy().save(buffer, **{"format": _FORMATS[Path(name).suffix], **options})
        files[name] = buffer.getvalue()
    return files | _heic(rgb)


def _heic(image: Image.Image) -> dict[str, bytes]:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer)
    return {"plain.heic": buffer.getvalue()}


def _sound_checksums(content: bytes) -> bytes:
    """A PNG with the checksums that its chunks should have, so that what is wrong in them is looked at."""
    fixed, position = bytearray(content), 8
    while position + 12 <= len(fixed):
        (length,) = struct.unpack_from(">I", fixed, position)
        end = position + 8 + length
        if end + 4 > len(fixed):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(fixed[position + 4 : end]))
        position = end + 4
    return bytes(fixed)


def _read(path: Path) -> None:
    rgb = load_image(path)
    assert rgb.ndim == 3
    assert rgb.shape[0] == 3
    assert min(rgb.shape) > 0
    assert rgb.dtype in (torch.uint8, torch.float32)
    if rgb.dtype == torch.float32:
        assert 0 <= rgb.min() <= rgb.max() <= 1


def _prepare(path: Path) -> None:
    pixels, placement = _PREPARE(path)
    assert pixels.shape == (3, *placement.patch_grid.padded_hw)
    assert pixels.isfinite().all()


@pytest.mark.slow
def test_images(fuzz: Fuzz, tmp_path: Path) -> None:
    files = _whole_files()
    names, contents = sorted(files), [files[name] for name in sorted(files)]
    for name in names:  # whole, each is read
        (tmp_path / name).write_bytes(files[name])
        _read(tmp_path / name)

    def case(rng: random.Random) -> Case:
        name = rng.choice(names)
        damaged = mutate(rng, files[name], contents)
        if damaged.startswith(b"\x89PNG") and rng.random() < 0.7:
            damaged = _sound_checksums(damaged)
        path = tmp_path / (name if rng.random() < 0.9 else f"renamed{rng.choice(list(_FORMATS))}")
        path.write_bytes(damaged)
        read = rng.choice((_read, _prepare))
        return path.name, lambda: read(path)

    fuzz.run("images", case, count=3000, refusals=ImageError)
