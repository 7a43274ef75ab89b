"""What several test files need: a tiny backbone on disk, written by transformers, a model on it, and images."""

import gc
import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loopback_hub import LoopbackHub
from PIL import Image

from brixel import BrixelFeatures


def pytest_collection_finish() -> None:
    """What is imported by now stays; that no search for garbage looks at it again saves a twentieth of the time."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the lines that tests recorded as a property "summary", such as the counts of the fuzz tests."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, text in getattr(report, "user_properties", []):
                if name == "summary" and report.when == "call":
                    terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 with random weights as Hugging Face keeps it: width 64, four blocks, patch 14."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14, layerscale_value=0.5
    )
    model = Dinov2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path_factory.mktemp("backbone")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG of 60 x 90 pixels with some structure."""
    y, x = np.mgrid[:60, :90]
    colours = np.stack([x * 2, y * 4, 128 + 100 * np.sin(x / 7) * np.cos(y / 5)], axis=-1).clip(0, 255)
    path = tmp_path_factory.mktemp("images") / "waves.png"
    Image.fromarray(colours.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def model(backbone_folder: Path) -> BrixelFeatures:
    """A model of 28 px with random weights."""
    return BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu", short_side_px=28)


@pytest.fixture
def album(tmp_path: Path, image_path: Path) -> Path:
    """a.png, b.JPG, sub/a.png; a text file and a hidden image that do not count."""
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/a.png", ".hidden.png"):
        shutil.copy(image_path, folder / name)
    Image.open(image_path).rotate(90, expand=True).save(folder / "b.JPG")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models here are tiny: on busy cores, threads that wait for each other make them ten times slower."""
    torch.set_num_threads(1)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection can be opened."""
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A `LoopbackHub` that the client of this process asks in place of the Hub, with an empty cache and no token.

    The client reads the environment when it is imported, so its constants are set here; for other processes the
    environment is set as well.
    """
    from huggingface_hub import close_session, constants

    server = LoopbackHub()
    home = tmp_path / "hf"
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(home)}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    # every client reads the certificates of all authorities, for 30 ms; nothing here is encrypted
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)
    url = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in (
        ("ENDPOINT", server.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", url),
        ("HF_HUB_CACHE", str(home / "hub")),
        ("HF_TOKEN_PATH", str(home / "token")),
        ("HF_STORED_TOKENS_PATH", str(home / "stored_tokens")),
        ("HF_HUB_DISABLE_TELEMETRY", True),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),  # its transfers are not spoken by the loopback server
    ):
        monkeypatch.setattr(constants, name, value)
    yield server
    close_session()
    server.stop()
