"""Engines side by side: what the rows say, on a tiny model in place of the one that is named."""

import sys

import pytest

from brixel import BrixelError, BrixelFeatures
from brixel.cli.app import main
from brixel.evaluate.cost import engines as measured
from brixel.evaluate.cost.engines import ENGINES, engines


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the exporters
def test_rows_of_engines(backbone_folder, monkeypatch):
    """Without the compiler, and without OpenVINO, which has ended the process of the tests."""
    model = BrixelFeatures.from_backbone(backbone_folder, device="cpu", dtype="float32", adapter="bilinear")
    monkeypatch.setattr(measured, "_model", lambda name: model)  # of this process; memory is measured in others
    kinds = [kind for kind in ENGINES if not kind.startswith(("compile", "openvino"))]
    report = engines(["brixel-tiny"], [115], batch_sizes=(1, 2), rounds=2, threads=1, kinds=kinds)
    assert [row["engine"] for row in report.rows] == 2 * [kind for _ in ("backbone", "student") for kind in kinds]
    assert {row["image_px"] for row in report.rows} == {112}  # eight patches of 14
    bounds = {"eager": None, "onnxruntime": 1e-4, "openvino": 1e-4, "onnxruntime-float16": 0.1}
    for row in report.rows:
        assert row["ms"] > 0
        bound = bounds.get(row["engine"], 1.0)
        assert row["difference"] is None if bound is None else 0 <= row["difference"] < bound, row
        assert (row["ratio"] == 1) or row["engine"] != "eager"
        assert (row["of_backbone"] is not None) == (row["part"] == "student")
        assert ("file_mb" in row) == row["engine"].startswith(("onnx", "open"))
        if row["batch"] == 1:
            assert 0 < row["peak_mib"] < 2000
    assert "ONNX Runtime 1." in report.recipe
    assert report.markdown("brixel evaluate engines").count("\n| brixel-tiny") == len(report.rows)


def test_bad_arguments(monkeypatch):
    with pytest.raises(BrixelError, match="unknown engine 'tensorrt'"):
        engines(["brixel-tiny"], [56], kinds=["tensorrt"])
    with pytest.raises(BrixelError, match="unknown backbone architecture 'resnet'"):
        engines(["resnet"], [56])
    assert main(["evaluate", "engines", "--engines", "tensorrt"]) == 2


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BrixelError, match=r"OpenVINO need 'openvino': pip install 'brixel\[openvino\]'"):
        measured._load_openvino(tmp_path / "model.onnx", "f32")
