"""Decoding makes no noise, in any thread, and leaves warnings, logging and libtiff as they were."""

import contextlib
import logging
import random
import struct
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from image_files import tiff
from PIL import Image

from brixel.errors import ImageError
from brixel.images.load import load_image
from brixel.images.quiet import quiet_decoding

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture
def noisy(tmp_path: Path) -> list[Path]:
    """Files that make Pillow warn or log, and libtiff print."""
    contents = {
        "truncated EXIF.jpg": ("JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\xff"}),
        "deflate.tif": ("TIFF", {"compression": "tiff_adobe_deflate"}),
        "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}),
        "jpeg.tif": ("TIFF", {"compression": "jpeg"}),
    }
    paths = []
    for name, (format_name, options) in contents.items():
        path = tmp_path / name
        Image.fromarray(NOISE).save(path, format_name, **options)
        content = bytearray(path.read_bytes())
        if name.endswith("tif"):
            for at in range(200, 600):
                content[at] ^= 0x5A
        path.write_bytes(content)
        paths.append(path)
    Image.fromarray(NOISE[..., 0]).convert("1").save(tmp_path / "fax.tif", compression="group4")
    fax = bytearray((tmp_path / "fax.tif").read_bytes())
    fax[60:90] = random.Random(0).randbytes(30)
    (tmp_path / "fax.tif").write_bytes(fax)
    many = tiff((1, 4), bytes(4), tags={270: (1, 2, 3)}).replace(
        struct.pack("<HHI", 277, 3, 1) + b"\1", struct.pack("<HHI", 277, 3, 1) + b"\xff"
    )
    (tmp_path / "many samples.tif").write_bytes(many)
    return [*paths, tmp_path / "fax.tif", tmp_path / "many samples.tif"]


def load(path: Path) -> None:
    with contextlib.suppress(ImageError):
        load_image(path)


def test_pillow_alone_makes_noise(noisy: list[Path]) -> None:
    """The files do what they are for: in a process without brixel, most of them print, warn or log."""
    program = """
import contextlib, sys
from PIL import Image
for path in sys.argv[1:]:
    with contextlib.suppress(Exception):
        Image.open(path).load()
"""
    printed = subprocess.run(
        [sys.executable, "-W", "always", "-c", program, *map(str, noisy)], capture_output=True, text=True, check=True
    ).stderr
    assert "Decod" in printed  # libtiff
    assert "UserWarning" in printed
    assert "More samples per pixel" in printed


def test_nothing_is_warned_printed_or_logged(
    noisy: list[Path], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for path in noisy:
            load(path)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(load, noisy * 10))
    assert warned == []
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_other_threads_are_heard_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    inside, done = threading.Event(), threading.Event()

    def decode() -> None:
        with quiet_decoding(), quiet_decoding():
            warnings.warn("of a decoding thread", stacklevel=1)
            inside.set()
            done.wait(20)

    thread = threading.Thread(target=decode)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        thread.start()
        inside.wait(20)
        warnings.warn("of another thread", stacklevel=1)
        logging.getLogger("PIL.TiffImagePlugin").error("of another thread")
        done.set()
        thread.join()
    assert [str(warning.message) for warning in warned] == ["of another thread"]
    assert [record.getMessage() for record in caplog.records] == ["of another thread"]


def test_filters_are_as_before_also_where_others_change_them_meanwhile(tmp_path: Path) -> None:
    before = list(warnings.filters)
    with quiet_decoding():
        assert len(warnings.filters) == len(before) + 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Image.fromarray(NOISE).save(tmp_path / "plain.tif")
            load_image(tmp_path / "plain.tif")
    assert list(warnings.filters) == before
    decoding = quiet_decoding()
    decoding.__enter__()
    with warnings.catch_warnings():  # starts while an image is decoded, and ends after it
        decoding.__exit__(None, None, None)
    assert list(warnings.filters) == before


def test_libtiff_speaks_again_afterwards(noisy: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    load(noisy[1])
    with pytest.raises(Exception, match="decoder error"), Image.open(noisy[1]) as image:
        image.load()
    assert "Decod" in capfd.readouterr().err
