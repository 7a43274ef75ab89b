"""Exported files: every kind of model and backbone against eager, through ONNX Runtime and torch.export."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import ROOT, random_universal
from PIL import Image

from brixel import BrixelError, BrixelFeatures
from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ViTConfig
from brixel.cli.app import main
from brixel.inference.export import export as exporting
from brixel.inference.export.facts import KEY
from brixel.inference.export.formats import FORMATS, read_facts
from brixel.inference.export.parity import BOUNDS, check_parity, compare
from brixel.inference.export.tracing import InputSize
from brixel.model.config import BILINEAR, UNIVERSAL, AdapterConfig, BackboneConfig, BrixelConfig
from brixel.model.upsampler import WithUniversal, make_upsampler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the exporters
SIZES = {"width": 64, "depth": 4, "heads": 2, "ffn_width": 96, "ffn": "mlp", "norm_eps": 1e-6}
DINOV3 = ViTConfig(**SIZES, patch_px=16, registers=2, positions="rotary")
LEARNED = {"positions": "learned", "native_grid": 5, "position_scale_offset": 0.0}
DINOV2 = ViTConfig(**SIZES, patch_px=14, **LEARNED)
META = dataclasses.replace(DINOV2, position_scale_offset=0.1)
SIGLIP2 = dataclasses.replace(
    DINOV2, class_token=False, layer_scale=False, gelu="tanh", position_mode="bilinear", position_antialias=True
)
FOUR = {"blocks": (0, 1, 2, 3), "residual_detour": False, "short_side_px": 64, "blend": True}
SECOND = AdapterConfig(**FOUR, generation=2, grids=(3, 5))
FIRST = AdapterConfig(**FOUR)
RELEASED = AdapterConfig((0, 1, 2, 3), residual_detour=True, short_side_px=64)
ALONE = {"blocks": (3,), "residual_detour": False, "short_side_px": 64}
MODELS: dict[str, tuple[ViTConfig, AdapterConfig]] = {
    "DINOv3, released": (DINOV3, RELEASED),
    "DINOv2 of Meta, second generation": (META, SECOND),
    "DINOv2 of timm, first generation": (dataclasses.replace(DINOV2, position_antialias=True), FIRST),
    "DINOv2 of transformers, universal": (DINOV2, AdapterConfig(**ALONE, kind=UNIVERSAL)),
    "SigLIP 2, bilinear": (SIGLIP2, AdapterConfig(**ALONE, kind=BILINEAR)),
}


def model_of(name: str) -> BrixelFeatures:
    """A tiny model in which every weight matters."""
    vit, adapter = MODELS[name]
    torch.manual_seed(0)
    backbone, upsampler = ViT(vit), make_upsampler(vit, adapter)
    with torch.no_grad():
        for parameter in (*backbone.parameters(), *upsampler.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    if isinstance(upsampler, WithUniversal):
        upsampler.universal = random_universal()
    return BrixelFeatures(backbone, upsampler, BrixelConfig(BackboneConfig("dinov2-vits14", (), vit, ()), adapter))


def images_of(model: BrixelFeatures, batch: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(batch, 3, rows * model.patch_px, columns * model.patch_px)


def session_of(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(["features"], {"pixels": pixels.numpy()})[0])


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[BrixelFeatures, Path]:
    """The quickest model and its ONNX file."""
    path = tmp_path_factory.mktemp("exported") / "small.onnx"
    model = model_of("SigLIP 2, bilinear")
    model.export(path)
    return model, path


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_in_onnx(name: str, tmp_path: Path) -> None:
    """Also for one row or column, which `torch.export` treats apart, and no size was traced at."""
    model = model_of(name)
    written = model.export(tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    graph = onnx.load(written.path)
    assert {entry.domain: entry.version for entry in graph.opset_import} == {"": 18}
    kinds = {node.op_type for node in graph.graph.node}
    assert not kinds & {"Loop", "If", "Scan", "GridSample", "SequenceAt"}
    assert not any(
        attribute.name == "antialias" and attribute.i for node in graph.graph.node for attribute in node.attribute
    )
    assert str(ROOT).encode() not in written.path.read_bytes()
    run = session_of(written.path)
    for batch, rows, columns in (
        (1, 2, 2),
        (1, 3, 3),
        (2, 5, 5),
        (1, 7, 2),
        (3, 4, 9),
        (1, 10, 6),
        (1, 1, 1),
        (2, 1, 5),
    ):
        pixels = images_of(model, batch, rows, columns)
        with torch.no_grad():
            expected = model(pixels)
        torch.testing.assert_close(run(pixels), expected, rtol=0, atol=5e-5 * float(expected.abs().max()))
    sizes = written.facts["parity"]["sizes"]
    assert len(sizes) >= 6
    assert all(row["largest_difference"] <= 1e-4 * row["largest_value"] for row in sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DINOv3, released", "DINOv2 of Meta, second generation"])
def test_a_program_of_torch_in_another_process(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    path = model.export(tmp_path / "model.pt2").path
    pixels = {
        f"{rows}x{columns}": images_of(model, batch, rows, columns) for batch, rows, columns in ((1, 2, 2), (3, 4, 9))
    }
    torch.save(pixels, tmp_path / "pixels.pt")
    program = """
import sys, torch
program = torch.export.load("model.pt2").module()
assert "brixel" not in sys.modules
torch.save({name: program(pixels) for name, pixels in torch.load("pixels.pt").items()}, "features.pt")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, cwd=tmp_path, timeout=300)
    assert str(ROOT).encode() not in path.read_bytes()
    found = torch.load(tmp_path / "features.pt")
    with torch.no_grad():
        for size, given in pixels.items():
            expected = model(given)
            torch.testing.assert_close(found[size], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert read_facts(path)["parity"]["engine"].startswith("torch ")


@pytest.mark.slow
def test_float16_and_another_scale(tmp_path: Path) -> None:
    model = model_of("DINOv2 of transformers, universal")
    written = model.export(tmp_path / "half.onnx", dtype="float16", scale=2)
    assert model.dtype == torch.float32
    facts = written.facts
    assert (facts["dtype"], facts["scale"], facts["stride_px"]) == ("float16", 2, 7)
    weights = onnx.load(written.path).graph.initializer
    size_of = {kind: sum(np.prod(tensor.dims) for tensor in weights if tensor.data_type == kind) for kind in (1, 10)}
    assert size_of[onnx.TensorProto.FLOAT] < 0.02 * size_of[onnx.TensorProto.FLOAT16]  # positions and the like
    pixels = images_of(model, 2, 4, 6)
    with torch.no_grad():
        expected = model.at_scale(2)(pixels)
    found = session_of(written.path)(pixels.half())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


@pytest.mark.slow
def test_one_size_and_another_opset(tmp_path: Path) -> None:
    model = model_of("SigLIP 2, bilinear")
    written = model.export(tmp_path / "static.onnx", dynamic=False, image_hw=(42, 70), batch=2, opset=20)
    assert written.facts["input"]["shape"] == [2, 3, 42, 70]
    assert written.facts["output"]["shape"] == [2, 64, 12, 20]
    assert onnx.load(written.path).opset_import[0].version == 20
    pixels = images_of(model, 2, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(session_of(written.path)(pixels), model(pixels), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_facts_are_in_the_file(small: tuple[BrixelFeatures, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, path = small
    facts = json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map[KEY])
    assert facts == read_facts(path)
    expected = {"patch_px": 14, "stride_px": 3.5, "short_side_px": 64, "scale": 4, "width": 64, "adapter": "bilinear"}
    assert {name: facts[name] for name in expected} == expected
    assert (facts["licence"], facts["backbone"]) == ("apache-2.0", "dinov2-vits14")
    assert facts["mean"] == list(model.config.backbone.vit.mean)
    assert facts["input"] == {"name": "pixels", "dtype": "float32", "shape": ["batch", 3, "height", "width"]}
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == facts["input"]["shape"]
    assert session.get_outputs()[0].shape == facts["output"]["shape"] == ["batch", 64, "map_height", "map_width"]
    assert main(["info", str(path)]) == 0
    assert "ONNX Runtime" in capsys.readouterr().out
    assert main(["info", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == facts


@pytest.mark.slow
def test_a_file_that_differs_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = model_of("SigLIP 2, bilinear"), tmp_path / "model.onnx"
    path.write_text("before")
    kind = FORMATS["onnx"]

    def wrong(path: Path, threads: int | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
        run = type(kind).load(kind, path)
        return lambda pixels: run(pixels).roll(1, 1)

    monkeypatch.setattr(kind, "load", wrong)
    with pytest.raises(
        BrixelError, match=r"differs from the model: by .* expected at most 0.0001 of that.*verify=False"
    ):
        model.export(path)
    assert {each.name for each in tmp_path.iterdir()} == {"model.onnx"}
    assert path.read_text() == "before"
    written = model.export(path, verify=False)
    assert written.facts["parity"] is None
    assert "not compared" in str(written)


@pytest.mark.slow
def test_weights_beside_the_file_where_it_would_be_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from brixel.inference.export import formats

    monkeypatch.setattr(formats, "_LARGEST_IN_ONE", 1000)
    model = model_of("SigLIP 2, bilinear")
    written = model.export(tmp_path / "large.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"large.onnx", "large.onnx.data"}
    assert written.facts["parity"]
    pixels = images_of(model, 1, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(session_of(written.path)(pixels), model(pixels), rtol=0, atol=1e-5)
    assert read_facts(written.path) == written.facts


@pytest.mark.slow
def test_a_module_of_someone_else(tmp_path: Path) -> None:
    """A model of transformers; its own code traces at one size at least."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    colours = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    model = BrixelFeatures.from_backbone(Dinov2Model(config), device="cpu", **colours)
    written = model.export(tmp_path / "theirs.onnx", dynamic=False, image_hw=(42, 56))
    assert written.facts["backbone"].startswith("Dinov2Model")
    assert written.facts["licence"] is None


@pytest.mark.slow
def test_the_command_and_the_example_without_torch(
    backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example's map equals extract()'s within 2e-4 of the largest value: Pillow and torch resize alike."""
    model = BrixelFeatures.from_backbone(backbone_folder, device="cpu", dtype="float32")
    path = tmp_path / "tiny.onnx"
    assert main(["export", "--backbone", str(backbone_folder), "-o", str(path)]) == 0
    assert "224 x 224" in capsys.readouterr().out
    image = tmp_path / "photo.png"
    Image.open(ROOT / "brixel" / "assets" / "scene.jpg").resize((401, 283)).save(image)
    blocked = "import sys, runpy\nfor name in ('torch', 'brixel'): sys.modules[name] = None\n"
    program = f"{blocked}sys.argv = ['x', {str(path)!r}, {str(image)!r}, '-o', 'out.png']\n"
    program += f"runpy.run_path({str(ROOT / 'examples' / 'onnx_features.py')!r}, run_name='__main__')"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, timeout=300)
    found, expected = np.load(tmp_path / "out.png.npy"), model.extract(image).features.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (8 * expected.shape[2], 8 * expected.shape[1])


# ---------------------------------------------------------------- bad input, before any work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "model.bin"}, "does not say the format; expected .onnx for 'onnx', .pt2 for 'torch'"),
        ({"path": "model.onnx", "format": "tflite"}, "format is 'tflite'; expected one of 'onnx', 'torch'"),
        ({"path": "model.onnx", "dtype": "bfloat16"}, "dtype is 'bfloat16'; expected one of 'float32', 'float16'"),
        ({"path": "model.onnx", "dtype": 16}, "dtype is 16"),
        ({"path": "model.onnx", "opset": 9}, "opset is 9; expected a whole number from 18"),
        ({"path": "model.onnx", "scale": 0}, "scale is 0"),
        ({"path": "model.onnx", "image_hw": (28, 28)}, "give dynamic=False as well"),
        (
            {"path": "model.onnx", "dynamic": False, "image_hw": (28, 30)},
            "28 x 30 px; expected multiples of the patch, 14",
        ),
        ({"path": "model.onnx", "dynamic": False, "image_hw": 28}, "image_hw is 28; expected height and width"),
        ({"path": "model.onnx", "dynamic": "no"}, "dynamic is 'no'"),
        ({"path": "missing/model.onnx"}, "its folder does not exist"),
        ({"path": ""}, "path is ''"),
    ],
)
def test_bad_arguments(
    settings: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_of("SigLIP 2, bilinear")
    with pytest.raises(BrixelError, match=message.replace("(", r"\(")):
        model.export(**settings)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_photograph_is_not_replaced(tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"a photograph")
    with pytest.raises(BrixelError, match=r"photo.jpg exists and does not end in .onnx; name a new file"):
        model_of("SigLIP 2, bilinear").export(photo, format="onnx")
    assert photo.read_bytes() == b"a photograph"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(exporting.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(BrixelError, match=r"model.onnx cannot be written \(Permission denied\)"):
        model_of("SigLIP 2, bilinear").export(tmp_path / "model.onnx")


@pytest.mark.parametrize("missing", ["onnxscript", "onnxruntime"])
def test_missing_packages_are_named(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "onnxscript":
        monkeypatch.setattr(exporting, "trace", lambda *_, **__: None)
    with pytest.raises(BrixelError, match=rf"need '{missing}': pip install 'brixel\[onnx\]'"):
        model_of("SigLIP 2, bilinear").export(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_model_that_cannot_be_traced_says_so(tmp_path: Path) -> None:
    class Odd(ViT):
        def block_maps(self, pixels, blocks):
            if float(pixels.sum()) > 0:  # depends on data
                pixels = -pixels
            return super().block_maps(pixels, blocks)

    model = model_of("SigLIP 2, bilinear")
    model.backbone = Odd(SIGLIP2)
    with pytest.raises(BrixelError, match=r"cannot trace this model, with a backbone of class Odd; with dynamic=False"):
        model.export(tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- parts


def test_parity_finds_differences_and_what_is_not_finite() -> None:
    sizes = [InputSize(1, 28, 28), InputSize(2, 28, 42)]
    rows = compare(lambda pixels: 2 * pixels, lambda pixels: 2 * pixels, sizes, torch.float32)
    check_parity(rows, torch.float32)
    assert [row.largest_difference for row in rows] == [0, 0]
    assert [(row.batch, row.height_px, row.width_px, row.traced) for row in rows] == [
        (1, 28, 28, True),
        (2, 28, 42, False),
    ]
    for factor, share in ((1 + 0.5 * BOUNDS[torch.float32], 0.5), (1 + 2 * BOUNDS[torch.float32], 2)):
        rows = compare(lambda pixels, factor=factor: factor * pixels, lambda pixels: pixels, sizes, torch.float32)
        assert rows[0].share == pytest.approx(share * BOUNDS[torch.float32], rel=0.01)
        if share > 1:
            with pytest.raises(BrixelError, match="differs from the model"):
                check_parity(rows, torch.float32)
    rows = compare(lambda pixels: pixels * torch.nan, lambda pixels: pixels, sizes, torch.float32)
    with pytest.raises(BrixelError, match="differs from the model: by inf"):
        check_parity(rows, torch.float32)
    with pytest.raises(BrixelError, match="the file gives"):
        compare(lambda pixels: pixels[:, :1], lambda pixels: pixels, sizes, torch.float32)


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
@pytest.mark.parametrize("content", [b"", b"<html>", b"\x08\x08", b"PK\x03\x04" + bytes(40)])
def test_files_that_are_none_of_ours(name: str, content: bytes, tmp_path: Path, capsys) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert main(["info", str(path)]) == 2
    assert f"{path} " in capsys.readouterr().err
    path.unlink()
    assert main(["info", str(path)]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_damaged_facts_are_refused(tmp_path: Path) -> None:
    model = onnx.helper.make_model(onnx.helper.make_graph([], "none", [], []))
    for facts in ("", "[]", "{}", '{"version": 3}', "{" * 5000):
        onnx.helper.set_model_props(model, {KEY: facts})
        onnx.save(model, tmp_path / "model.onnx")
        with pytest.raises(BrixelError, match=r"model.onnx"):
            read_facts(tmp_path / "model.onnx")
