"""`model.compile()`: the same maps, what it says, and the model as it is where the compiler fails."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from brixel import BrixelError, BrixelFeatures
from brixel.cli.app import main

Graph = Callable[..., Any]


@pytest.fixture
def model(backbone_folder: Path) -> BrixelFeatures:
    torch.compiler.reset()
    return BrixelFeatures.from_backbone(backbone_folder, device="cpu", dtype="float32", short_side_px=56)


class Counting:
    """A compiler that runs graphs as they are, and counts calls and graphs."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: Graph, inputs: Any) -> Graph:
        self.graphs += 1

        def run(*values: Any) -> Any:
            self.calls += 1
            return graph(*values)

        return run


def broken(graph: Graph, inputs: Any) -> Graph:
    raise RuntimeError("no compiler here")


@pytest.mark.slow
def test_extract_and_stream_run_compiled_code(model, image_path, caplog):
    expected, small, scaled = (
        model.extract(image_path),
        model.extract(image_path, short_side_px=42),
        model.extract(image_path, scale=2),
    )
    backend = Counting()
    model.compile(backend=backend)
    with caplog.at_level(logging.WARNING, "brixel"):
        found = model.extract(image_path)
    messages = [record.message for record in caplog.records if record.name == "brixel"]
    assert [message.split(" in ")[0] for message in messages][1:] == ["compiled"]
    assert (backend.graphs, backend.calls) == (1, 1)
    torch.testing.assert_close(found.features, expected.features, rtol=0, atol=1e-5)
    maps = list(model.stream([image_path, image_path], short_side_px=42))
    assert (backend.graphs, backend.calls) == (1, 3)  # sizes are dynamic
    torch.testing.assert_close(maps[1].features, small.features, rtol=0, atol=1e-5)
    for _ in range(2):
        other = model.extract(image_path, scale=2)
    assert (backend.graphs, backend.calls) == (2, 5)
    torch.testing.assert_close(other.features, scaled.features, rtol=0, atol=1e-5)
    model.extract(image_path, memory_limit="1GiB")
    assert backend.calls == 5  # as it is
    assert sum(record.name == "brixel" for record in caplog.records) == 4


@pytest.mark.slow
def test_a_released_adapter_compiles_for_all_sizes(random_model):
    model = random_model("dinov3-vits16", detour=True, blend=False)
    backend = Counting()
    model.compile(backend=backend)
    for rows, columns in ((6, 5), (9, 9), (7, 12)):
        pixels = torch.randn(1, 3, 16 * rows, 16 * columns)
        with torch.no_grad():
            torch.testing.assert_close(model(pixels), model.forward(pixels), rtol=0, atol=1e-4)
    assert backend.graphs <= 2  # kernels of convolutions have thresholds
    assert backend.calls == 3


@pytest.mark.slow
def test_a_compiler_that_fails_is_said_once(model, image_path, caplog):
    expected = model.extract(image_path)
    model.compile(backend=broken)
    with caplog.at_level(logging.WARNING, "brixel"):
        for _ in range(3):
            assert torch.equal(model.extract(image_path).features, expected.features)
    _, message = (record.message for record in caplog.records if record.name == "brixel")
    assert "torch.compile failed, and the model runs as it is" in message
    assert "no compiler here" in message


@pytest.mark.slow
def test_bad_input_is_no_failure_of_the_compiler(model, image_path, caplog):
    model.compile(backend=broken)
    with pytest.raises(BrixelError, match="H and W positive multiples"):
        model(torch.zeros(1, 3, 20, 28))
    with pytest.raises(BrixelError, match="a str; expected a tensor"):
        model("photo.jpg")


@pytest.mark.slow
def test_copies_are_saved_and_planned_as_they_are(model, tmp_path):
    before = model.plan((56, 56), memory_limit="4GiB")
    model.compile(backend=broken)
    assert model.is_compiled
    assert model.plan((56, 56), memory_limit="4GiB") == before
    model.save_pretrained(tmp_path / "saved")
    assert model.export(tmp_path / "x.pt2", dynamic=False, verify=False).path.exists()


def test_the_command_line(image_path, tmp_path, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(BrixelFeatures, "compile", lambda self: compiled.append(self))
    arguments = ["extract", str(image_path), "--model", "brixel-tiny", "--short-side-px", "32"]
    assert main([*arguments, "-o", str(tmp_path / "maps"), "--compile"]) == 0
    assert main([*arguments, "-o", str(tmp_path / "one.npy"), "--compile"]) == 0
    assert len(compiled) == 2
    assert main([*arguments, "-o", str(tmp_path / "maps"), "--compile", "--memory-limit", "1GiB"]) == 2
    assert "--compile does not go with --memory-limit" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on PATH")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while it imports its compiler
def test_torchs_own_compiler(model, image_path):
    """One graph for all sizes of one image."""
    sizes = (56, 42, 84)
    expected = [model.extract(image_path, short_side_px=side).features for side in sizes]
    model.compile()
    for side, features in zip(sizes, expected, strict=True):
        found = model.extract(image_path, short_side_px=side).features
        torch.testing.assert_close(found, features, rtol=0, atol=1e-5 * float(features.abs().max()))
