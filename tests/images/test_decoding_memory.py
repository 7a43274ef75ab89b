"""The memory that decoding takes, as docs/memory.md states it, by the resident memory of a fresh process."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

SIDE_PX = 3000
PROGRAM = """
import sys
from brixel.images.load import load_image
def resident(kind):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(kind)]
    return int(line.split()[1]) * 1024
load_image(sys.argv[1])  # what is loaded and kept at the first image
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
height, width = load_image(sys.argv[2]).shape[1:]
print((resident("VmHWM") - before) / height / width)
"""


def image_of(mode: str, side_px: int) -> Image.Image:
    grey = np.add.outer(np.arange(side_px), np.arange(side_px)) % 251
    if mode == "F":
        return Image.fromarray((grey / 251).astype(np.float32))
    if mode in ("I;16", "I"):
        return Image.fromarray(grey.astype(np.uint16 if mode == "I;16" else np.int32))
    return Image.fromarray(grey.astype(np.uint8)).convert(mode)


TURNED = Image.Exif()
TURNED[0x0112] = 6
CASES = {
    "grey.png": ("L", {}, 8),
    "colours.png": ("RGB", {}, 8),
    "alpha.png": ("RGBA", {}, 8),
    "palette.gif": ("P", {}, 8),
    "deep.png": ("I;16", {}, 8),
    "integers.tif": ("I", {}, 5.5),
    "floats.tif": ("F", {}, 5.5),
    "floats.pfm": ("F", {"format": "PPM"}, 5.5),
    "packed floats.tif": ("F", {"compression": "tiff_lzw"}, 9),
    "packed.tif": ("RGB", {"compression": "tiff_lzw"}, 8),
    "inks.tif": ("CMYK", {}, 8),
    "turned.jpg": ("RGB", {"exif": TURNED}, 8),
    "turned.png": ("I;16", {"exif": TURNED}, 8),
    "progressive.jpg": ("RGB", {"progressive": True, "subsampling": 0}, 11),
    "colours.webp": ("RGB", {"method": 0}, 17),
    "colours.avif": ("RGB", {"speed": 10}, 11),
    "colours.jp2": ("RGB", {}, 21),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("name", CASES)
def test_bytes_per_pixel(tmp_path: Path, name: str) -> None:
    mode, options, most = CASES[name]
    if name.endswith("avif") and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    for kind, side_px in (("small", 64), ("large", SIDE_PX)):
        image_of(mode, side_px).save(tmp_path / f"{kind}-{name}", **options)
    paths = [str(tmp_path / f"{kind}-{name}") for kind in ("small", "large")]
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert float(printed) < most
