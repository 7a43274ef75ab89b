"""The formats of image files that are read, and only these: which reader a file gets, by its first bytes."""

import functools
import importlib
import importlib.util
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image

from brixel.errors import ImageError
from brixel.images.bounds import check_jpeg, without_metadata
from brixel.utils.file_kinds import HEAD_BYTES, other_content, video_container


@dataclass(frozen=True)
class Format:
    """A format: its name in Pillow, the module with its reader, and the endings of its files, the usual one first.

    ``check`` looks at a file before Pillow does: it raises ImageError, or returns the file that Pillow is to read.
    """

    name: str
    module: str
    endings: tuple[str, ...]
    check: Callable[[BinaryIO, str], BinaryIO] = lambda file, path: file
    only_by_ending: bool = False  # no signature at its start, so that almost anything may look like it


HEIF_ENDINGS = (".heic", ".heif", ".hif")
HEIF_HINT = "HEIC needs the package pillow-heif: pip install 'brixel[images]'"

FORMATS = (
    Format("JPEG", "PIL.JpegImagePlugin", (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo"), check_jpeg),
    Format("PNG", "PIL.PngImagePlugin", (".png", ".apng"), without_metadata),
    Format("TIFF", "PIL.TiffImagePlugin", (".tif", ".tiff")),
    Format("WEBP", "PIL.WebPImagePlugin", (".webp",)),
    Format("JPEG2000", "PIL.Jpeg2KImagePlugin", (".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc")),
    Format("GIF", "PIL.GifImagePlugin", (".gif",)),
    Format("BMP", "PIL.BmpImagePlugin", (".bmp", ".dib")),
    Format("DIB", "PIL.BmpImagePlugin", (".dib",), only_by_ending=True),
    Format("PPM", "PIL.PpmImagePlugin", (".ppm", ".pgm", ".pbm", ".pnm", ".pfm")),
    Format("TGA", "PIL.TgaImagePlugin", (".tga", ".icb", ".vda", ".vst"), only_by_ending=True),
    Format("AVIF", "PIL.AvifImagePlugin", (".avif",)),
    Format("HEIF", "pillow_heif", HEIF_ENDINGS),
)

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")

_Reader = Callable[[BinaryIO, str], Image.Image]


def readable_endings() -> tuple[str, ...]:
    """The endings of all formats, in lower case; those of HEIC only where its reader is installed."""
    formats = (format_ for format_ in FORMATS if format_.name != "HEIF" or importlib.util.find_spec("pillow_heif"))
    return tuple(sorted({ending for format_ in formats for ending in format_.endings}))


def identify(file: BinaryIO, path: str) -> Image.Image:
    """Do what `Image.open` does, with the readers of `FORMATS` alone. Raises ImageError."""
    head = file.read(HEAD_BYTES)
    if (other := other_content(head)) is not None:
        raise ImageError(f"{path}: is {other}")
    if (container := video_container(head)) is not None:
        raise ImageError(
            f"{path}: is a video or sound file ({container}); read its frames with brixel.video.frames, and give the "
            "file a name that ends in its usual ending, such as .mp4"
        )
    reasons: list[str] = []
    cause: Exception | None = None
    for format_ in FORMATS:
        if format_.only_by_ending and not path.lower().endswith(format_.endings):
            continue
        reader, accepts = _reader(format_)
        verdict = accepts(head[:16])
        if isinstance(verdict, str):  # a known format, and why it is not supported
            raise ImageError(f"{path}: cannot be read: {verdict}")
        if verdict:
            file.seek(0)
            try:
                return reader(format_.check(file, path), path)
            except (SyntaxError, IndexError, TypeError, KeyError, struct.error) as error:
                reasons.append(f"{format_.name}: {error or type(error).__name__}")
                cause = error
    if cause is not None:
        raise ImageError(
            f"{path}: cannot be decoded ({'; '.join(reasons)}); the file is damaged, cut short or of a kind that is "
            "not read: fetch it again, or export it as PNG or JPEG"
        ) from cause
    raise ImageError(
        f"{path}: is not an image that the installed Pillow can read, or its head is damaged; give a JPEG, PNG, TIFF, "
        "WebP, AVIF, HEIC, JPEG 2000, GIF, BMP, PPM or TGA file, or open it with Pillow and give the PIL image"
    )


@functools.cache
def _reader(format_: Format) -> tuple[_Reader, Callable[[bytes], bool | str]]:
    """What opens files of a format, and what says from their first bytes whether it does, or why it cannot."""
    if format_.name == "HEIF" and importlib.util.find_spec("pillow_heif") is None:
        return _no_reader, lambda head: HEIF_HINT if _is_heif(head) else False
    try:
        module = importlib.import_module(format_.module)
    except ImportError:
        return (
            _no_reader,
            lambda head: "AVIF needs Pillow 11.3 or newer" if head[4:12] == b"ftypavif" else False,
        )
    if format_.name == "HEIF":  # not registered in Pillow: that would change what the rest of the program reads
        return module.HeifImageFile, _is_heif
    reader, accepts = Image.OPEN[format_.name]
    if format_.name == "JPEG":  # also for files of several pictures (MPO), of which it reads the first
        reader = module.JpegImageFile
    return reader, accepts or (lambda head: True)


def _is_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


def _no_reader(file: BinaryIO, path: str) -> Image.Image:
    raise AssertionError(f"no reader for {path}")
