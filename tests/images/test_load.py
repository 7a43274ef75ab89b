"""Images in: drawn with NumPy, written by Pillow or by hand, and compared with pixels known beforehand."""

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from brixel.errors import ImageError
from brixel.images.from_arrays import to_bytes
from brixel.images.load import load_image, open_image
from brixel.images.patch_grid import MAX_PIXELS, plan_patch_grid
from brixel.images.preprocess import resize_normalise_pad

Array = np.ndarray[Any, Any]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (11, 17, 3), dtype=np.uint8)
GREY16 = np.array([[0, 1, 255, 256], [257, 32768, 65534, 65535]], dtype=np.uint16)


def to_chw(pixels: Array) -> Tensor:
    """(H, W, 3) or (H, W) as (3, H, W), written out the slow way."""
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=2)
    return torch.stack([torch.tensor(pixels[:, :, channel].tolist()) for channel in range(3)])


def check(loaded: Tensor, pixels: Array) -> None:
    """`loaded` holds exactly these 8-bit pixels."""
    assert loaded.dtype == torch.uint8
    assert loaded.is_contiguous()
    assert torch.equal(loaded.long(), to_chw(pixels))


def check_deep(loaded: Tensor, values: Array) -> None:
    """`loaded` holds exactly these values in [0, 1], rounded to float32."""
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, to_chw(values.astype(np.float64)).float())


def over_white(rgba: Array) -> Array:
    alpha = rgba[..., 3:].astype(np.float64) / 255
    mixed: Array = np.floor(rgba[..., :3] * alpha + 255 * (1 - alpha) + 0.5 + 1e-9)
    return mixed.astype(np.uint8)


def write_png(
    path: Path, image_hw: tuple[int, int], depth: int, kind: int, rows: bytes, transparent: bytes = b""
) -> None:
    """A PNG by hand: `kind` 0 is grey, 2 is RGB; `rows` without filter bytes."""

    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    height_px, width_px = image_hw
    stride = len(rows) // height_px
    body = b"".join(b"\0" + rows[y * stride : (y + 1) * stride] for y in range(height_px)) if rows else b""
    head = struct.pack(">IIBBBBB", width_px, height_px, depth, kind, 0, 0, 0)
    extra = chunk(b"tRNS", transparent) if transparent else b""
    data = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


# Files of 8 bits


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "tga", "gif", "webp"])
def test_formats_without_loss(tmp_path: Path, suffix: str) -> None:
    pixels = NOISE // 128 * 255 if suffix == "gif" else NOISE  # eight colours fit a palette
    options: dict[str, Any] = {"lossless": True, "exact": True} if suffix == "webp" else {}
    path = tmp_path / f"noise.{suffix}"
    Image.fromarray(pixels).save(path, **options)
    check(load_image(path), pixels)
    check(load_image(str(path)), pixels)
    with Image.open(path) as image:
        check(load_image(image), pixels)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_formats_with_loss(tmp_path: Path, suffix: str) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (48, 64, 3))
    path = tmp_path / f"ramp.{suffix}"
    Image.fromarray(ramp).save(path, quality=95)
    loaded = load_image(path)
    assert loaded.dtype == torch.uint8
    assert (loaded.long() - to_chw(ramp)).abs().max() <= 6  # what the compression may change in a smooth ramp
    assert torch.equal(loaded, load_image(np.asarray(Image.open(path).convert("RGB"))))


def test_grey_and_bilevel(tmp_path: Path) -> None:
    Image.fromarray(NOISE[..., 0]).save(tmp_path / "grey.png")
    check(load_image(tmp_path / "grey.png"), NOISE[..., 0])
    bits = NOISE[..., 0] > 127
    Image.fromarray(bits).save(tmp_path / "bits.png")
    check(load_image(tmp_path / "bits.png"), bits.astype(np.uint8) * 255)


def test_alpha_is_laid_over_white(tmp_path: Path) -> None:
    rgba = RNG.integers(0, 256, (64, 64, 4), dtype=np.uint8)
    rgba[:8, :, 3], rgba[8:16, :, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    loaded = load_image(tmp_path / "rgba.png")
    check(loaded, over_white(rgba))
    assert (loaded[:, :8] == 255).all()
    grey_alpha = rgba[..., 2:]
    Image.fromarray(grey_alpha, "LA").save(tmp_path / "la.png")
    check(load_image(tmp_path / "la.png"), over_white(rgba[..., [2, 2, 2, 3]]))


def test_palettes(tmp_path: Path) -> None:
    indices = RNG.integers(0, 4, (5, 7), dtype=np.uint8)
    colours = np.array([[10, 20, 30], [200, 0, 7], [255, 255, 0], [3, 90, 160]], dtype=np.uint8)
    alpha = np.array([255, 0, 128, 3], dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    assert image.mode == "P"
    image.save(tmp_path / "opaque.png")
    check(load_image(tmp_path / "opaque.png"), colours[indices])
    image.save(tmp_path / "alphas.png", transparency=alpha.tobytes())
    check(load_image(tmp_path / "alphas.png"), over_white(np.dstack([colours[indices], alpha[indices]])))
    image.save(tmp_path / "hole.gif", transparency=1)
    holed = colours.copy()
    holed[1] = 255
    check(load_image(tmp_path / "hole.gif"), holed[indices])


def test_one_transparent_colour(tmp_path: Path) -> None:
    pixels = NOISE // 128 * 255
    Image.fromarray(pixels).save(tmp_path / "rgb.png", transparency=(255, 0, 0))
    expected = pixels.copy()
    expected[(pixels == (255, 0, 0)).all(axis=2)] = 255
    assert (expected != pixels).any()
    check(load_image(tmp_path / "rgb.png"), expected)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png", transparency=0)
    check(load_image(tmp_path / "grey.png"), np.full_like(pixels[..., 0], 255))


def test_premultiplied_alpha() -> None:
    rgba = np.array([[[200, 100, 0, 255], [128, 0, 64, 128], [0, 0, 0, 0]]], dtype=np.uint8)
    expected = to_chw(rgba[..., :3].astype(int) + 255 - rgba[..., 3:].astype(int))  # colour times alpha, plus white
    colour = load_image(Image.frombytes("RGBa", (3, 1), rgba.tobytes()))
    assert (colour.long() - expected).abs().max() <= 1  # one rounding more than ours
    grey = load_image(Image.frombytes("La", (3, 1), rgba[..., [0, 3]].tobytes()))
    assert (grey.long() - expected[:1]).abs().max() <= 1


def test_palette_with_an_alpha_channel() -> None:
    image = Image.new("PA", (2, 1))
    image.putpalette(bytes([9, 8, 7, 100, 200, 50]))
    image.putpixel((0, 0), (0, 255))
    image.putpixel((1, 0), (1, 128))
    check(load_image(image), over_white(np.array([[[9, 8, 7, 255], [100, 200, 50, 128]]], dtype=np.uint8)))


def test_other_colour_spaces(tmp_path: Path) -> None:
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [0, 255, 255, 0]]], dtype=np.uint8)
    colours = np.array([[[255, 255, 255], [0, 255, 255], [0, 0, 0], [255, 0, 0]]], dtype=np.uint8)
    Image.fromarray(inks, "CMYK").save(tmp_path / "inks.tiff")
    check(load_image(tmp_path / "inks.tiff"), colours)
    hues = np.array([[[0, 0, 255], [128, 255, 255], [0, 0, 0], [0, 255, 255]]], dtype=np.uint8)
    assert (load_image(Image.frombytes("HSV", (4, 1), hues.tobytes())).long() - to_chw(colours)).abs().max() <= 4
    luma = np.array([[[255, 128, 128], [179, 171, 1], [0, 128, 128], [76, 85, 255]]], dtype=np.uint8)  # BT.601
    assert (load_image(Image.frombytes("YCbCr", (4, 1), luma.tobytes())).long() - to_chw(colours)).abs().max() <= 2
    lab = load_image(Image.frombytes("LAB", (2, 1), bytes([255, 0, 0, 0, 0, 0])))  # white, black
    assert (lab[:, 0].long() - torch.tensor([255, 0])).abs().max() <= 1
    padded = Image.frombytes("RGBX", (4, 1), np.dstack([colours, colours[..., :1]]).tobytes())
    check(load_image(padded), colours)


# Deeper files


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bit_greys_are_exact(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"deep.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 4 2 65535\n" + GREY16.astype(">u2").tobytes())
    else:
        Image.fromarray(GREY16).save(path)
    check_deep(load_image(path), GREY16 / 65535)


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I", "=i4")])
def test_integer_greys_of_pil(mode: str, dtype: str) -> None:
    image = Image.frombytes(mode, (4, 2), GREY16.astype(dtype).tobytes())
    assert image.mode == mode
    check_deep(load_image(image), GREY16 / 65535)


def test_sixteen_bit_grey_with_a_transparent_value(tmp_path: Path) -> None:
    write_png(tmp_path / "deep.png", (2, 4), 16, 0, GREY16.astype(">u2").tobytes(), struct.pack(">H", 257))
    check_deep(load_image(tmp_path / "deep.png"), np.where(GREY16 == 257, 65535, GREY16) / 65535)


def test_sixteen_bit_colours_keep_their_high_bytes(tmp_path: Path) -> None:
    write_png(tmp_path / "deep.png", (11, 17), 16, 2, (NOISE.astype(">u2") * 257).tobytes())
    check(load_image(tmp_path / "deep.png"), NOISE)


def test_float_tiff(tmp_path: Path) -> None:
    values = RNG.random((6, 5), dtype=np.float32)
    values[0, :2] = 0, 1
    Image.fromarray(values).save(tmp_path / "float.tiff")
    check_deep(load_image(tmp_path / "float.tiff"), values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 70000]], np.int32), r"values go from 0 to 70000; .*mode I must lie in 0..65535: scale them"),
        (np.array([[-1, 5]], np.int32), "values go from -1 to 5"),
        (np.array([[0, 255]], np.float32), r"values go from 0 to 255; floats must lie in \[0, 1\]: divide by 255"),
        (np.array([[0, np.nan]], np.float32), "NaN"),
    ],
)
def test_deep_files_out_of_range(tmp_path: Path, values: Array, message: str) -> None:
    Image.fromarray(values).save(tmp_path / "wild.tiff")
    with pytest.raises(ImageError, match=r"wild\.tiff: .*" + message):
        load_image(tmp_path / "wild.tiff")


# Orientation and animation

TURNED: dict[int, Callable[[Array], Array]] = {  # how an image stored with this EXIF value is to be shown
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path, plain = tmp_path / f"turned.{suffix}", tmp_path / f"plain.{suffix}"
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(NOISE).save(plain, **options)
    Image.fromarray(NOISE).save(path, exif=exif, **options)
    stored = np.asarray(Image.open(plain).convert("RGB"))
    check(load_image(path), TURNED[orientation](stored))
    with Image.open(path) as image:
        check(load_image(image), TURNED[orientation](stored))
        check(load_image(image), TURNED[orientation](stored))  # and again: nothing was turned in place


def test_deep_grey_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GREY16).save(tmp_path / "deep.png", exif=exif)
    check_deep(load_image(tmp_path / "deep.png"), np.rot90(GREY16, -1) / 65535)


@pytest.mark.parametrize("exif", [b"Exif\0\0 no such thing", b"\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_unreadable_exif_is_passed_over(tmp_path: Path, exif: bytes) -> None:
    Image.fromarray(NOISE).save(tmp_path / "odd.png", exif=exif)
    check(load_image(tmp_path / "odd.png"), NOISE)


def test_an_orientation_beyond_the_eight_is_passed_over(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    Image.fromarray(NOISE).save(tmp_path / "nine.png", exif=exif)
    check(load_image(tmp_path / "nine.png"), NOISE)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    first, second = NOISE // 128 * 255, 255 - NOISE // 128 * 255
    path = tmp_path / f"moving.{suffix}"
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(first).save(path, save_all=True, append_images=[Image.fromarray(second)], **options)
    check(load_image(path), first)
    with Image.open(path) as image:
        assert image.n_frames == 2
        image.seek(1)
        check(load_image(image), second)  # a PIL image: the frame it stands at


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_pil_image_is_left_as_it_was(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(NOISE[..., 0] // 128)
    image.putpalette(bytes([9, 8, 7, 100, 200, 50]))
    image.save(tmp_path / "palette.png", exif=exif, transparency=b"\x80")

    def state(image: Image.Image) -> tuple[object, ...]:
        info = {key: value for key, value in image.info.items() if key != "exif"}
        return (image.mode, image.size, image.tobytes(), image.getpalette("RGBA"), info, image.getexif()[0x0112])

    with Image.open(tmp_path / "palette.png") as image, Image.open(tmp_path / "palette.png") as twin:
        loaded = load_image(image)
        assert loaded.shape == ((3, 11, 17) if orientation == 1 else (3, 17, 11))
        assert state(image) == state(twin)
        loaded.zero_()
        assert state(image) == state(twin)


# Arrays and tensors


@pytest.mark.parametrize(
    "array",
    [
        NOISE,
        NOISE[..., 0],
        NOISE[::-1, ::-2],
        NOISE[..., ::-1],
        np.asfortranarray(NOISE),
        np.frombuffer(NOISE.tobytes(), np.uint8).reshape(NOISE.shape),
    ],
    ids=["colour", "grey", "negative strides", "BGR view", "Fortran order", "read-only"],
)
def test_arrays_of_bytes(array: Array) -> None:
    before = array.copy()
    loaded = load_image(array)
    check(loaded, array)
    loaded.zero_()
    assert np.array_equal(array, before)  # no memory is shared


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("shape", [(5, 6, 3), (5, 6)])
def test_arrays_of_floats(dtype: str, shape: tuple[int, ...]) -> None:
    array = RNG.random(shape).astype(dtype)
    array[0, 0], array[-1, -1] = 0, 1
    check_deep(load_image(array), array)
    array.setflags(write=False)
    check_deep(load_image(array), array)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_arrays_of_sixteen_bits(dtype: str) -> None:
    check_deep(load_image(GREY16.astype(dtype)), GREY16 / 65535)
    check_deep(load_image(np.dstack([GREY16] * 3).astype(dtype)), GREY16 / 65535)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_floats(dtype: torch.dtype) -> None:
    tensor = torch.rand(3, 4, 5).to(dtype).requires_grad_()
    loaded = load_image(tensor)
    assert loaded.dtype == torch.float32
    assert not loaded.requires_grad
    assert torch.equal(loaded, tensor.detach().float())


def test_a_tensor_that_fits_is_not_copied() -> None:
    for tensor in (torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8), torch.rand(3, 4, 5)):
        assert load_image(tensor).data_ptr() == tensor.data_ptr()


@pytest.mark.gpu
def test_a_tensor_on_a_device_comes_back_to_the_cpu() -> None:
    tensor = torch.rand(3, 4, 5, device="cuda")
    assert torch.equal(load_image(tensor), tensor.cpu())


# Errors


def zeros(shape: tuple[int, ...], dtype: str = "uint8") -> Array:
    return np.broadcast_to(np.zeros((), dtype), shape)  # any size in one byte


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (zeros((2, 3, 3), "bool"), r"array of shape \(2, 3, 3\) and dtype bool: expected uint8, .*astype"),
        (zeros((2, 3), "int64"), r"dtype int64: expected uint8, uint16 or floats .*0..255: array\.astype\('uint8'\)"),
        (zeros((2, 3), "complex64"), "dtype complex64: expected uint8"),
        (zeros((2, 3), "U1"), "dtype <U1: expected uint8"),
        (zeros((2, 3), "object"), "dtype object: expected uint8"),
        (zeros((0, 3, 3)), "is empty, 0x3 pixels; give one with at least one pixel"),
        (zeros((3, 0)), "is empty, 3x0 pixels"),
        (zeros((3, 8, 9)), r"expected \(H, W, 3\) or \(H, W\); channels come last: array\.transpose\(1, 2, 0\)"),
        (zeros((1, 8, 9)), "channels come last"),
        (zeros((8, 9, 4)), r"drop alpha: array\[\.\.\., :3\], or lay it over white: PIL\.Image\.fromarray"),
        (zeros((8, 9, 1)), r"for a grey image: array\[\.\.\., 0\]"),
        (zeros((2, 8, 9, 3)), r"of a batch give one image at a time: array\[0\]"),
        (zeros((8, 9, 5)), r"shape \(8, 9, 5\) and dtype uint8: expected \(H, W, 3\) or \(H, W\)$"),
        (zeros((8,)), r"shape \(8,\) and dtype uint8: expected"),
        (zeros((20_000, 10_000, 3)), "has 20000x10000 pixels .*, and the limit is 178,956,970; make it smaller"),
        (np.array([[0.0, 255.0]]), r"values go from 0 to 255; floats must lie in \[0, 1\]: divide by 255"),
        (np.array([[0.0, 4095.0]]), "values go from 0 to 4095; .*: divide by the largest value there can be"),
        (np.array([[-2.1, 2.6]]), "values go from -2.1 to 2.6; .*: give the image as it was before normalisation"),
        (np.array([[-0.1, 1.1]]), r"values go from -0.1 to 1.1; .*: if it is rounding or ringing, \.clip\(0, 1\)"),
        (np.array([[0.5, np.nan]]), "values go from nan to nan; .*: replace NaN and infinite values"),
        (np.array([[0.5, np.inf]], "float32"), "values go from 0.5 to inf; .*: replace NaN and infinite values"),
        (np.array([[-np.inf, 0.5]]), "values go from -inf to 0.5; .*: replace NaN"),
        (np.array([[1e300, 0.5]]), "replace NaN and infinite"),
    ],
)
def test_arrays_refused(array: Array, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(array)


def blank(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros((), dtype=dtype).expand(shape)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (blank(3, 8, 9, dtype=torch.bool), r"tensor of shape \(3, 8, 9\) and dtype torch.bool: expected uint8 or"),
        (blank(3, 8, 9, dtype=torch.int64), r"torch.int64: expected .*0\.\.255: tensor\.to\(torch\.uint8\)"),
        (blank(3, 8, 9, dtype=torch.complex64), "torch.complex64: expected"),
        (blank(8, 9, 3), r"expected \(3, H, W\); channels come first: tensor\.permute\(2, 0, 1\)"),
        (blank(8, 9), r"for a grey image: tensor\.expand\(3, -1, -1\)"),
        (blank(1, 8, 9), r"for a grey image: tensor\.expand\(3, -1, -1\)"),
        (blank(4, 8, 9), r"drop alpha: tensor\[:3\]"),
        (blank(1, 3, 8, 9), r"of a batch give one image at a time: tensor\[0\]"),
        (blank(5, 8, 9), r"expected \(3, H, W\)$"),
        (blank(3, 0, 9), "is empty, 0x9 pixels"),
        (blank(3, 20_000, 10_000), "has 20000x10000 pixels .*limit is 178,956,970"),
        (torch.full((3, 2, 2), 200.0), "values go from 200 to 200; .*: divide by 255"),
        (torch.full((3, 2, 2), float("nan")), "NaN"),
    ],
)
def test_tensors_refused(tensor: Tensor, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(tensor)


def test_what_the_hints_say_works() -> None:
    rgba = RNG.integers(0, 256, (4, 5, 4), dtype=np.uint8)
    check(load_image(Image.fromarray(rgba)), over_white(rgba))
    grey = torch.rand(4, 5)
    assert torch.equal(load_image(grey.expand(3, -1, -1)), load_image(grey[None].expand(3, -1, -1)))
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, format="png")
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        check(load_image(image), NOISE)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        ([NOISE], r"one image cannot be a list; give a path, a PIL image, an array \(H, W, 3\) or a tensor \(3,"),
        (b"\x89PNG", r"cannot be a bytes; .*for the bytes of a file PIL\.Image\.open\(io\.BytesIO\(data\)\)"),
        (None, "cannot be a NoneType"),
        (7, "cannot be a int"),
    ],
)
def test_other_objects_refused(thing: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(thing)  # type: ignore[arg-type]


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png: no such file, check the path") as raised:
        load_image(tmp_path / "nowhere.png")
    assert raised.value.filename == str(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="https://example.*: no such file.*a URL must be downloaded first"):
        load_image("https://example.org/cat.jpg")


def test_paths_that_hold_no_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a folder; give the files in it one by one"):
        load_image(tmp_path)
    for name, content in (("notes.txt", b"these are notes\n"), ("notes.jpg", b"not a JPEG"), ("a.png", b"\x89PNG\r\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=f"{name}: is not an image that the installed Pillow can read, or its"):
            load_image(tmp_path / name)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png: is an empty file; fetch or export it again"):
        load_image(tmp_path / "empty.png")
    with pytest.raises(ImageError, match=r"cannot be opened \(.*null.*\); check path and permissions") as raised:
        load_image("a\0b.png")
    assert isinstance(raised.value.__cause__, ValueError)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tiff", "webp", "bmp", "lzw.tiff"])
def test_files_cut_short(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    pixels = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **({"compression": "tiff_lzw"} if suffix == "lzw.tiff" else {}))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(
        ImageError, match=rf"cut\.{suffix}: cannot be decoded \(.*\); the file is damaged, cut"
    ) as raised:
        load_image(path)
    assert raised.value.__cause__ is not None


def test_damaged_pixels_and_closed_images(tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    Image.fromarray(NOISE).save(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 10] ^= 0xFF
    (tmp_path / "flipped.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"flipped\.png: cannot be decoded"):
        load_image(tmp_path / "flipped.png")
    with Image.open(path) as image:
        pass
    with pytest.raises(ImageError, match=r"noise\.png: cannot be decoded .*closed: fetch or open it again"):
        load_image(image)
    with pytest.raises(ImageError, match="PIL image: is empty, 5x0 pixels"):
        load_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("image_hw", [(20_000, 10_000), (2, MAX_PIXELS // 2 + 1)])
def test_large_files_are_refused_before_decoding(tmp_path: Path, image_hw: tuple[int, int]) -> None:
    write_png(tmp_path / "huge.png", image_hw, 8, 2, b"")  # its head alone: decoding would fail otherwise
    with pytest.raises(ImageError, match=rf"huge\.png: has {image_hw[0]}x{image_hw[1]} pixels .*limit is 178,956,970"):
        load_image(tmp_path / "huge.png")


@pytest.mark.parametrize("suffix", ["png", "tiff", "gif", "webp", "jpg"])
def test_no_warning_above_half_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """With Pillow's limit lowered to 100 pixels, so that 187 are as 167 million are."""
    path = tmp_path / f"large.{suffix}"
    Image.fromarray(NOISE).save(path)
    expected = load_image(path)
    filters = list(warnings.filters)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(path).close()
    with ThreadPoolExecutor(8) as pool:
        for loaded in pool.map(load_image, [path] * 24):  # a warning is an error here
            assert torch.equal(loaded, expected)
    assert list(warnings.filters) == filters
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert torch.equal(load_image(path), expected)


def test_more_than_pillow_was_set_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.gif"
    Image.fromarray(NOISE[..., 0]).save(path)
    content = bytearray(path.read_bytes())
    content[6:10] = struct.pack("<HH", 1, 1)  # a screen smaller than its frame: the reader checks by itself
    path.write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ImageError, match=r"large\.gif: is more than Pillow is set to read \(.*\); make it") as raised:
        load_image(path)
    assert isinstance(raised.value.__cause__, Image.DecompressionBombError)


def test_ordinary_images_leave_the_warning_machinery_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(NOISE).save(tmp_path / "plain.tiff")
    monkeypatch.setattr(warnings, "catch_warnings", None)
    check(load_image(tmp_path / "plain.tiff"), NOISE)


def test_threads_read_the_same(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (120, 90, 3), dtype=np.uint8)
    paths = [tmp_path / f"noise.{suffix}" for suffix in ("png", "jpg", "tiff", "webp")]
    for path in paths:
        Image.fromarray(pixels).save(path)
    alone = [load_image(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        for index, loaded in enumerate(pool.map(load_image, paths * 10)):
            assert torch.equal(loaded, alone[index % len(paths)])


def test_the_file_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(NOISE).save(tmp_path / "noise.png")
    (tmp_path / "notes.txt").write_text("notes")
    opened: list[Any] = []
    plain_open = open

    def recording_open(*args: Any) -> Any:
        opened.append(plain_open(*args))
        return opened[-1]

    monkeypatch.setattr("builtins.open", recording_open)
    load_image(tmp_path / "noise.png")
    with pytest.raises(ImageError):
        load_image(tmp_path / "notes.txt")
    assert [file.closed for file in opened] == [True, True]


# ---- JPEG files that are reduced while they are decoded


@functools.cache
def photograph(height: int, width: int) -> Image.Image:
    """Waves of many lengths and some noise: nothing that a reduction could leave as it is by luck."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / length + y / (2 * length)) for length in (3, 17, 90)], -1)
    noise = np.random.default_rng(0).normal(0, 6, waves.shape)
    return Image.fromarray((128 + 90 * waves + noise).clip(0, 255).astype("uint8"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image_hw", "short_side_px", "orientation", "reduction"),
    [
        ((1200, 1600), 96, 1, 4),
        pytest.param((1200, 1600), 96, 6, 4, marks=pytest.mark.slow),
        pytest.param((1200, 1600), 96, 3, 4, marks=pytest.mark.slow),
        pytest.param((1201, 1603), 96, 1, 4, marks=pytest.mark.slow),
        ((1202, 1602), 96, 8, 2),  # what is rounded up would come to lie at the left or top
        ((1201, 1603), 96, 3, 1),
        ((1007, 763), 64, 1, 2),
        ((1007, 767), 31, 1, 8),
        ((400, 600), 200, 1, 1),
    ],
)
def test_a_large_jpeg_is_decoded_smaller(
    tmp_path: Path, image_hw: tuple[int, int], short_side_px: int, orientation: int, reduction: int
) -> None:
    """Near to the whole one resized: on average by less than what eight bits round away, and not moved."""
    path, exif = tmp_path / "large.jpg", Image.Exif()
    exif[0x0112] = orientation
    photograph(*image_hw).save(path, quality=92, exif=exif)
    whole = load_image(path)
    upright_hw = image_hw if orientation < 5 else image_hw[::-1]
    grid = plan_patch_grid(upright_hw, 16, short_side_px)
    with open_image(path) as image:
        assert image.image_hw == upright_hw
        rgb = image.read(grid.resized_hw)
    assert rgb.shape == (3, *(-(-side // reduction) for side in upright_hw))
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    error = 255 * (resize_normalise_pad(rgb, grid, **plain) - resize_normalise_pad(whole, grid, **plain))
    error = error[:, : grid.resized_hw[0], : grid.resized_hw[1]]
    assert error.abs().mean() < 0.5
    assert error.abs().max() < 8  # of the last pixels, where the reduction's own reach over the edge
    assert (reduction == 1) == (not error.any())


def test_a_reduced_jpeg_is_not_moved(tmp_path: Path) -> None:
    """The mean place of a bright spot near the end of a side, of which the reduction rounds the length up."""
    y, x = np.mgrid[:1001, :1001]
    spot = 255 * np.exp(-((x - 930) ** 2 + (y - 930) ** 2) / (2 * 30**2))
    Image.fromarray(spot.astype("uint8")).save(tmp_path / "spot.jpg", quality=95)
    grid = plan_patch_grid((1001, 1001), 1, 40)

    def centre(rgb: Tensor) -> float:
        light = resize_normalise_pad(rgb, grid, (0, 0, 0), (1, 1, 1))[0, 30:, 30:].sum(0)
        return float((light * torch.arange(len(light))).sum() / light.sum())

    with open_image(tmp_path / "spot.jpg") as image:
        reduced = image.read(grid.resized_hw)
    assert reduced.shape == (3, 126, 126)
    assert abs(centre(reduced) - centre(load_image(tmp_path / "spot.jpg"))) < 0.01


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_of_jpeg_are_reduced_too(tmp_path: Path, mode: str) -> None:
    photograph(800, 800).convert(mode).save(tmp_path / "large.jpg")
    with open_image(tmp_path / "large.jpg") as image:
        assert image.read((64, 64)).shape == (3, 200, 200)


def test_a_jpeg_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    photograph(300, 300).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:2000])
    with open_image(tmp_path / "cut.jpg") as image:
        assert image.image_hw == (300, 300)  # what does not fit into memory is told by now
        with pytest.raises(ImageError, match=r"cut.jpg: cannot be decoded"):
            image.read((300, 300))


def test_images_that_are_no_jpeg_files_are_read_whole(tmp_path: Path) -> None:
    photograph(800, 800).save(tmp_path / "large.png")
    for image in (tmp_path / "large.png", photograph(800, 800), np.asarray(photograph(800, 800))):
        with open_image(image) as source:
            assert source.read((64, 64)).shape == (3, 800, 800)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
def test_tall_images_are_converted_in_bands_of_rows(mode: str) -> None:
    image = photograph(700, 9).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.arange(700 * 9, dtype="uint8").reshape(700, 9)))
    rows = [load_image(image.crop((0, row, 9, row + 1))) for row in range(700)]
    assert torch.equal(load_image(image), torch.cat(rows, 1))


def test_to_bytes_gives_back_the_pixels_of_bytes_and_of_floats():
    array = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    rgb = torch.from_numpy(array).permute(2, 0, 1)
    assert (to_bytes(rgb) == array).all()
    assert (to_bytes(rgb.float() / 255) == array).all()
    assert to_bytes(rgb.float() / 255).dtype == np.uint8
