import json
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from brixel import BrixelError
from brixel.errors import DamagedFileError
from brixel.evaluate.fidelity import BASELINES, l1_and_cosine, teacher_edges
from brixel.feature_maps.panel import HEIGHT_PX, LABEL_PX, MARGIN_PX
from brixel.model.losses import principal_directions
from brixel.train.monitoring import Metrics, draw_crops, draw_curve
from brixel.train.validation import HeldOut

# ---------------------------------------------------------------- metrics


def test_records_are_lines_and_are_read_back(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", 0)
    records = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1e-9, "name": "a\nb\u2028ü"}, {"step": 2, "cosine": -0.25}]
    for record in records:
        metrics.add(record)
    assert metrics.records() == records
    assert len((tmp_path / "m.jsonl").read_text(encoding="utf-8").split("\n")) == 4
    assert Metrics(tmp_path / "m.jsonl", 2).records() == records


def test_lines_of_later_steps_are_dropped_on_opening(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", 0)
    for step in range(1, 7):
        metrics.add({"step": step})
    again = Metrics(tmp_path / "m.jsonl", 4)
    assert [record["step"] for record in again.records()] == [1, 2, 3, 4]
    again.add({"step": 5, "again": True})
    assert again.records()[-1] == {"step": 5, "again": True}
    assert Metrics(tmp_path / "m.jsonl", 0).records() == []


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step": 3}', "{", '{"step": 3, "name": "ü'])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path, rest):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + rest, encoding="utf-8")
    metrics = Metrics(path, 5)
    metrics.add({"step": 3, "new": 1})
    assert metrics.records() == [{"step": 1}, {"step": 2}, {"step": 3, "new": 1}]


def test_a_new_file_is_empty_and_an_absent_one_has_no_records(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", 0)
    assert metrics.path.read_text() == ""
    metrics.path.unlink()
    assert metrics.records() == []


def test_a_kill_while_the_file_is_opened_keeps_the_old_lines(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    for step in range(1, 4):
        Metrics(path, 9).add({"step": step})
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(InterruptedError()))
    with pytest.raises(InterruptedError):
        Metrics(path, 2)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


# ---------------------------------------------------------------- the curve


def test_the_curve_is_a_file_where_there_is_something_to_show(tmp_path):
    """What is drawn is tested in `tests/evaluate/test_plots.py`."""
    draw_curve(tmp_path / "curve.png", [{"step": 3, "lr": 0.1}])
    assert list(tmp_path.iterdir()) == []
    draw_curve(tmp_path / "curve.png", [{"step": 1, "loss": 2.0}])
    with Image.open(tmp_path / "curve.png") as image:
        assert image.width > image.height


def test_without_matplotlib_there_is_no_curve(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    draw_curve(tmp_path / "curve.png", [{"step": 1, "loss": 2.0}])
    assert list(tmp_path.iterdir()) == []


def test_nan_survives_the_lines_of_metrics(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", 0)
    metrics.add({"step": 1, "loss": math.nan})
    assert math.isnan(Metrics(metrics.path, 1).records()[0]["loss"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5", "line 1 of .* holds 5; expected a JSON object"),
        ("{", "line 1 of .* is not JSON"),
        ("[" * 100000, "is nested deeper"),
        ('{"loss": 1}', "line 1 lacks step"),
        ('{"step": 1e999}', "step in line 1 is inf"),
        ('{"step": 1, "loss": "low"}', "loss in line 1 is 'low'"),
        ('{"step": 1, "cosine": [1]}', "cosine in line 1 is .1."),
    ],
)
def test_damaged_metrics_are_named(tmp_path, line, message):
    (tmp_path / "m.jsonl").write_text(f"{line}\n")
    with pytest.raises(DamagedFileError, match=rf"m\.jsonl is damaged or not the metrics .*{message}.*delete it"):
        Metrics(tmp_path / "m.jsonl", 5)


# ---------------------------------------------------------------- the panel


class Crops:
    """A stand-in for a cache: pairs of pixels and maps."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


class Shifted:
    """A stand-in for a model, with fixed maps of backbone and student."""

    def __init__(self, low, dense):
        self.low, self.dense = low, dense
        vit = SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        self.config = SimpleNamespace(backbone=SimpleNamespace(vit=vit))

    def backbone_features(self, pixels):
        return self.low[None]

    def __call__(self, pixels):
        return self.dense[None]


@pytest.mark.parametrize("grid", [2, 5])
def test_a_panel_shows_three_crops_with_their_maps(tmp_path, grid):
    low, teacher = torch.randn(6, grid, grid), torch.randn(6, 4 * grid, 4 * grid)
    teacher[:, -1] = 9.0  # the last row of cells has one colour
    crops = Crops([(torch.zeros(3, 14 * grid, 14 * grid), teacher)] * 4)
    draw_crops(tmp_path / "panel.png", Shifted(low, teacher - 1), crops, torch.device("cpu"))
    with Image.open(tmp_path / "panel.png") as panel:
        pixels = np.asarray(panel.convert("RGB"))
    side_px = round(HEIGHT_PX / (4 * grid)) * 4 * grid
    assert pixels.shape == (3 * (side_px + LABEL_PX + MARGIN_PX) + MARGIN_PX, 4 * (side_px + MARGIN_PX) + MARGIN_PX, 3)
    shown = pixels[MARGIN_PX + LABEL_PX :, -MARGIN_PX - side_px : -MARGIN_PX][:side_px]  # the teacher's, first row
    assert (np.ptp(shown[-side_px // (4 * grid) :], axis=(0, 1)) == 0).all()
    image = pixels[MARGIN_PX + LABEL_PX :, MARGIN_PX:][:side_px, :side_px]
    assert (image == round(0.5 * 255)).all()


def test_maps_that_are_not_finite_are_an_error(tmp_path):
    broken = torch.full((3, 4, 4), math.nan)
    crops = Crops([(torch.zeros(3, 8, 8), torch.zeros(3, 4, 4))])
    with pytest.raises(BrixelError, match="not finite"):
        draw_crops(tmp_path / "panel.png", Shifted(broken[:, :1, :1], broken), crops, torch.device("cpu"))


# ---------------------------------------------------------------- validation


def test_l1_and_cosine_are_what_a_loop_over_cells_gives():
    torch.manual_seed(0)
    maps, teacher = torch.randn(2, 2, 5, 3, 4).double()
    cosines, differences = [], []
    for batch in range(2):
        for y in range(3):
            for x in range(4):
                a, b = maps[batch, :, y, x], teacher[batch, :, y, x]
                cosines.append(float(a @ b / a.norm() / b.norm()))
                differences += (a - b).abs().tolist()
    found = l1_and_cosine(maps, teacher)
    assert found["cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found["l1"] == pytest.approx(np.mean(differences), abs=1e-6)
    assert l1_and_cosine(maps.bfloat16(), maps.bfloat16()) == pytest.approx({"l1": 0.0, "cosine": 1.0}, abs=1e-6)


def test_baselines_are_interpolation_averaged_over_crops():
    torch.manual_seed(0)
    crops = Crops([(torch.randn(3, 8, 8), torch.randn(3, 8, 8)) for _ in range(3)])

    def backbone(pixels):
        assert pixels.shape == (1, 3, 8, 8)
        assert not torch.is_grad_enabled()
        return F.avg_pool2d(pixels, 4)

    found = HeldOut(crops, backbone, torch.device("cpu")).baselines
    names = ("l1", "cosine", "centred_cosine", "centred_cosine_edges", "r2")
    assert list(found) == [f"{mode}_{name}" for mode in BASELINES for name in names]
    for mode in BASELINES:
        expected = []
        for pixels, teacher in crops.pairs:
            plain = F.interpolate(F.avg_pool2d(pixels[None], 4), scale_factor=4, mode=mode, align_corners=False)
            expected.append(l1_and_cosine(plain, teacher[None]))
        for name in ("l1", "cosine"):
            assert found[f"{mode}_{name}"] == pytest.approx(np.mean([record[name] for record in expected]), abs=1e-6)


def test_centred_figures_are_what_numpy_gives():
    torch.manual_seed(1)
    crops = Crops([(torch.randn(3, 8, 8), torch.randn(3, 8, 8) + 2) for _ in range(3)])

    def backbone(pixels):
        return F.avg_pool2d(pixels, 4) + 2

    def student(pixels):  # the teacher's map, its mirror image about the mean, bilinear
        index = next(number for number, (known, _) in enumerate(crops.pairs) if known.equal(pixels[0]))
        teacher = crops.pairs[index][1][None]
        return (teacher, 4 - teacher, F.interpolate(backbone(pixels), (8, 8), mode="bilinear"))[index]

    found = HeldOut(crops, backbone, torch.device("cpu")).validate(student)
    teachers = np.stack([teacher.double().numpy() for _, teacher in crops.pairs])  # N D H W
    mean = teachers.mean((0, 2, 3), keepdims=True)
    bilinear = torch.cat([F.interpolate(backbone(pixels[None]), (8, 8), mode="bilinear") for pixels, _ in crops.pairs])
    for prefix, maps in (
        ("bilinear_", bilinear),
        ("", torch.cat([student(pixels[None]) for pixels, _ in crops.pairs])),
    ):
        ours, theirs = maps.double().numpy() - mean, teachers - mean
        cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        assert found[f"{prefix}centred_cosine"] == pytest.approx(cosine.mean(), abs=1e-6)
        assert found[f"{prefix}r2"] == pytest.approx(1 - ((ours - theirs) ** 2).sum() / (theirs**2).sum(), abs=1e-6)
        edges = [teacher_edges(teacher[None], principal_directions(teacher[None], 3)) for _, teacher in crops.pairs]
        at_edges = [image[1:-1, 1:-1][mask.numpy()].mean() for image, mask in zip(cosine, edges, strict=True)]
        assert found[f"{prefix}centred_cosine_edges"] == pytest.approx(np.mean(at_edges), abs=1e-6)
    assert found["better_than_bilinear"] == pytest.approx(1 / 3)  # the third crop is a tie
    assert found["centred_better_than_bilinear"] == pytest.approx(1 / 3)


def test_a_record_is_one_line_of_json(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", 0)
    metrics.add({"step": 1, "loss": 0.25})
    assert [json.loads(line) for line in metrics.path.read_text().splitlines()] == [{"step": 1, "loss": 0.25}]
