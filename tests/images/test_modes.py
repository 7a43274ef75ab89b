"""Every depth and colour layout is scaled to what it means, or refused: no image is silently too dark, or inverted."""

import struct
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from image_files import png, png_chunk, tiff
from PIL import Image

from brixel.errors import ImageError
from brixel.images.load import load_image
from brixel.images.modes import EIGHT_BITS, to_rgb_tensor
from brixel.images.stored_rows import are_stored

RAMP = [0, 1, 2, 3]  # in thirds of white


def packed(bits: int, order: str = "<") -> bytes:
    """A row of four samples of 0, 1, 2, 3 thirds of the largest."""
    values = [third * (2**bits - 1) // 3 for third in RAMP]
    if bits >= 16:
        return struct.pack(order + "4" + {16: "H", 32: "I"}[bits], *values)
    return int("".join(f"{value:0{bits}b}" for value in values), 2).to_bytes(4 * bits // 8, "big")


def floats(order: str = "<") -> bytes:
    return struct.pack(f"{order}4f", *(third / 3 for third in RAMP))


SIGNED, FLOAT = 2, 3
UP, DOWN = [0, 1 / 3, 2 / 3, 1], [1, 2 / 3, 1 / 3, 0]
GREY_ALPHA = bytes([0, 255, 255, 255, 85, 0, 0, 255])  # black, white, clear, black

SCALED = {
    "tiff of 4 bits": (tiff((1, 4), packed(4), bits=(4,)), UP),
    "tiff of 4 bits, white is zero": (tiff((1, 4), packed(4), bits=(4,), photometric=0), DOWN),
    "tiff of 1 bit, white is zero": (tiff((1, 4), b"\x30", bits=(1,), photometric=0), [1, 1, 0, 0]),
    "tiff of 8 bits, white is zero": (tiff((1, 4), packed(8), photometric=0), DOWN),
    "tiff of 8 bits, big end, white is zero": (tiff((1, 4), packed(8), photometric=0, order=">"), DOWN),
    "tiff of 12 bits": (tiff((1, 4), packed(12), bits=(12,)), UP),
    "tiff of 16 bits": (tiff((1, 4), packed(16), bits=(16,)), UP),
    "tiff of 16 bits, big end": (tiff((1, 4), packed(16, ">"), bits=(16,), order=">"), UP),
    "tiff of 16 bits, white is zero": (tiff((1, 4), packed(16), bits=(16,), photometric=0), DOWN),
    "tiff of floats": (tiff((1, 4), floats(), bits=(32,), sample_format=FLOAT), UP),
    "tiff of floats, big end": (tiff((1, 4), floats(">"), bits=(32,), sample_format=FLOAT, order=">"), UP),
    "tiff of floats, white is zero": (tiff((1, 4), floats(), bits=(32,), sample_format=FLOAT, photometric=0), DOWN),
    "tiff of 32 bits": (tiff((1, 4), struct.pack("<4I", 0, 21845, 43690, 65535), bits=(32,)), UP),
    "tiff of 16-bit colours": (
        tiff(
            (1, 4), b"".join(struct.pack("<3H", *[third * 21845] * 3) for third in RAMP), bits=(16,) * 3, photometric=2
        ),
        UP,
    ),
    "tiff of grey and alpha": (
        tiff((1, 4), GREY_ALPHA, bits=(8, 8), tags={338: (2,)}),
        [0, 1, 1, 0],
    ),
    "tiff of premultiplied grey": (
        tiff((1, 4), bytes([0, 255, 255, 255, 0, 0, 85, 170]), bits=(8, 8), tags={338: (1,)}),
        [0, 1, 1, 2 / 3],
    ),
    "png of 1 bit": (png((1, 4), b"\x30", depth=1), [0, 0, 1, 1]),
    "png of 2 bits": (png((1, 4), packed(2), depth=2), UP),
    "png of 4 bits": (png((1, 4), packed(4), depth=4), UP),
    "png of 16 bits": (png((1, 4), packed(16, ">"), depth=16), UP),
    "png of 16 bits, grey and alpha": (
        png((1, 4), b"".join(bytes([byte] * 2) for byte in GREY_ALPHA), depth=16, colour=4),
        [0, 1, 1, 0],
    ),
    **{
        f"png of {bits} bits, the second grey transparent": (
            png((1, 4), packed(bits, ">"), depth=bits, extra=png_chunk(b"tRNS", struct.pack(">H", (2**bits - 1) // 3))),
            [0, 1, 2 / 3, 1],
        )
        for bits in (2, 4, 8, 16)
    },
    "pgm of 100 greys": (b"P5 4 1 99\n" + bytes([0, 33, 66, 99]), UP),
    "pgm of 10 bits": (b"P5 4 1 1023\n" + struct.pack(">4H", 0, 341, 682, 1023), UP),
    "pgm of 12 bits": (b"P5 4 1 4095\n" + struct.pack(">4H", 0, 1365, 2730, 4095), UP),
    "pgm of 12 bits as text": (b"P2 4 1 4095 0 1365 2730 4095\n", UP),
    "ppm of 10 bits": (b"P6 4 1 1023\n" + struct.pack(">12H", *(341 * third for third in RAMP for _ in range(3))), UP),
    "pbm": (b"P4 4 1\n\xc0", [0, 0, 1, 1]),
    "pfm": (b"Pf 4 1 -1.0\n" + floats(), UP),
}


OLD_PILLOW = int(PIL.__version__.partition(".")[0]) < 13  # which lacks some kinds of TIFF and says so
if OLD_PILLOW:
    del SCALED["tiff of premultiplied grey"]


@pytest.mark.parametrize("layout", SCALED)
def test_black_is_black_and_white_is_white(tmp_path: Path, layout: str) -> None:
    content, greys = SCALED[layout]
    (tmp_path / "image.any").write_bytes(content)
    loaded = load_image(tmp_path / "image.any")
    values = loaded.double() / 255 if loaded.dtype == torch.uint8 else loaded.double()
    assert values.shape == (3, 1, 4)
    assert (values - torch.tensor(greys, dtype=torch.float64)).abs().max() < 0.003


REFUSED = {
    "signed, 8 bits": (tiff((1, 4), packed(8), sample_format=SIGNED), "signed samples of 8 bits"),
    "signed, 16 bits": (tiff((1, 4), packed(16), bits=(16,), sample_format=SIGNED), "signed samples of 16 bits"),
    "full 32 bits": (tiff((1, 4), packed(32), bits=(32,)), r"values go from -?\d+ to \d+"),
    "12 bits, white is zero": (tiff((1, 4), packed(12), bits=(12,), photometric=0), "kind that is not read"),
    "16 bits, big end, white is zero": (
        tiff((1, 4), packed(16, ">"), bits=(16,), photometric=0, order=">"),
        "kind that is not read",
    ),
    "float colours": (tiff((1, 4), floats() * 3, bits=(32,) * 3, sample_format=FLOAT, photometric=2), "is not read"),
    "YCbCr at half the resolution": (tiff((2, 2), bytes(12), bits=(8,) * 3, photometric=6), "YCbCr colours at a lower"),
    "a thumbnail first": (tiff((1, 4), packed(8), tags={254: (1,)}), "begins with a thumbnail, as camera raw files"),
    "16-bit colours, one transparent": (
        png((1, 1), bytes(6), depth=16, colour=2, extra=png_chunk(b"tRNS", bytes(6))),
        "a transparent colour of 16 bits a channel",
    ),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_what_has_no_known_range_is_refused(tmp_path: Path, layout: str) -> None:
    content, message = REFUSED[layout]
    (tmp_path / "image.any").write_bytes(content)
    with pytest.raises(ImageError, match=message):
        load_image(tmp_path / "image.any")


@pytest.mark.skipif(OLD_PILLOW, reason="Pillow reads these from 13")
def test_colours_of_tiff(tmp_path: Path) -> None:
    """YCbCr at full resolution, inks, and CIELAB: a red, as its formula gives it."""
    red = {
        "YCbCr": tiff((1, 1), bytes([76, 85, 255]), bits=(8,) * 3, photometric=6, tags={530: (1, 1)}),
        "inks": tiff((1, 1), bytes([0, 255, 255, 0]), bits=(8,) * 4, photometric=5),
        "CIELAB": tiff((1, 1), bytes([138, 81, 70]), bits=(8,) * 3, photometric=8),  # L 54.3, a 80.8, b 69.9
    }
    for name, content in red.items():
        (tmp_path / "red.tif").write_bytes(content)
        difference = load_image(tmp_path / "red.tif")[:, 0, 0].long() - torch.tensor([255, 0, 0])
        assert difference.abs().max() <= 6, (name, difference)


def test_modes_that_are_not_in_the_table_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brixel.images.modes.EIGHT_BITS", tuple(mode for mode in EIGHT_BITS if mode != "HSV"))
    with pytest.raises(ImageError, match="PIL image: has the mode HSV in Pillow, which is not read; convert it to RGB"):
        load_image(Image.new("HSV", (2, 2)))


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "F"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_of_rows_come_upright(mode: str, orientation: int) -> None:
    """Conversion in bands is the conversion of the whole, turned as Pillow turns it."""
    stored = np.random.default_rng(orientation).integers(0, 256, (70, 5200, 3)).astype(np.uint8)  # two bands
    values = {"RGB": stored, "L": stored[..., 0], "I;16": stored[..., 0].astype(np.uint16) * 257}
    values["F"] = (stored[..., 0] / np.float32(255)).astype(np.float32)
    image = Image.fromarray(values[mode])
    image.getexif()[0x0112] = orientation
    loaded = load_image(image)
    expected = to_rgb_tensor(image, 1, "")
    turned = {
        1: expected,
        2: expected.flip(2),
        3: expected.flip(1, 2),
        4: expected.flip(1),
        5: expected.transpose(1, 2),
        6: expected.transpose(1, 2).flip(2),
        7: expected.flip(1, 2).transpose(1, 2),
        8: expected.transpose(1, 2).flip(1),
    }
    assert torch.equal(loaded, turned[orientation])


@pytest.mark.parametrize("suffix", ["tif", "pfm", "big end.tif", "strips.tif", "turned.tif", "lzw.tif"])
def test_rows_are_read_from_the_file_as_pillow_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    values = np.random.default_rng(0).random((37, 23), np.float32)
    path = tmp_path / f"grey.{suffix}"
    if suffix == "big end.tif":
        path.write_bytes(tiff((37, 23), values.astype(">f4").tobytes(), bits=(32,), sample_format=FLOAT, order=">"))
    else:
        exif = Image.Exif()
        exif[0x0112] = 3 if suffix == "turned.tif" else 1
        options: dict[str, object] = {"format": "PPM"} if suffix == "pfm" else {"exif": exif}
        options |= {"compression": "tiff_lzw"} if suffix == "lzw.tif" else {}
        options |= {"strip_size": 23 * 4 * 10} if suffix == "strips.tif" else {}
        Image.fromarray(values).save(path, **options)
    with Image.open(path) as image:
        assert are_stored(image) == (suffix != "lzw.tif")
    monkeypatch.setattr("brixel.images.modes._BAND_PIXELS", 23 * 4)
    loaded = load_image(path)
    expected = values[::-1, ::-1] if suffix == "turned.tif" else values
    assert np.array_equal(loaded[0].numpy(), expected)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(path)


def test_a_closed_image_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "grey.tif")
    with Image.open(tmp_path / "grey.tif") as image:
        pass
    with pytest.raises(ImageError, match=r"grey\.tif: cannot be decoded .*closed: fetch or open it again"):
        load_image(image)
