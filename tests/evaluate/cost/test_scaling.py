"""Cost: operations against those counted by hand, times in outline, refused where it makes no sense."""

import dataclasses
import itertools
import json
import sys

import pytest
import torch

from brixel.backbones.registry import known_backbone
from brixel.cli.app import main
from brixel.errors import BrixelError
from brixel.evaluate.cost import scaling, timing
from brixel.evaluate.cost.scaling import cost
from brixel.evaluate.cost.timing import BACKBONE, LARGE, STUDENT, UNIVERSAL


@pytest.fixture(scope="module")
def counted():
    return cost(["dinov3-vits16"], [128, 512, 2048], rounds=0)


@pytest.fixture
def shallow(monkeypatch):
    """Students of four blocks, and no new processes."""

    def known(name):
        row = known_backbone(name)
        return dataclasses.replace(row, vit=dataclasses.replace(row.vit, depth=4))

    monkeypatch.setattr(timing, "known_backbone", known)
    monkeypatch.setattr(scaling, "peak_bytes_of", lambda *_: 3 * 2**20)


@pytest.mark.slow
def test_operations_grow_as_tokens_do(counted):
    rows = {(row["student_px"], row["variant"]): row for row in counted.rows}
    assert rows[128, LARGE]["gflop"] == pytest.approx(rows[512, BACKBONE]["gflop"])  # the same image
    assert rows[128, LARGE]["image_px"] == 512
    assert rows[128, STUDENT]["output_cells"] == rows[128, LARGE]["output_cells"] == "32 x 32"
    tokens, width = 32 * 32 + 5, 384
    layers = 12 * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)  # products; attention
    patches = 2 * 1024 * 768 * width
    assert rows[512, BACKBONE]["gflop"] == pytest.approx((layers + patches) / 1e9, rel=1e-6)
    assert rows[128, BACKBONE]["gflop"] < rows[128, STUDENT]["gflop"] < rows[128, LARGE]["gflop"]


@pytest.mark.slow
def test_parameters_are_counted_by_part(counted):
    rows = {row["variant"]: row for row in counted.rows}
    assert rows[BACKBONE]["parameters"] == rows[LARGE]["parameters"] == (21_601_152 - 384) / 1e6  # no mask token
    upsampler = sum(weight.numel() for weight in timing.random_student("dinov3-vits16").upsampler.parameters())
    assert rows[STUDENT]["parameters"] == pytest.approx((21_601_152 - 384 + upsampler) / 1e6)
    gflop = {(row["student_px"], row["variant"]): row["gflop"] for row in counted.rows}
    added = gflop[128, STUDENT] - gflop[128, BACKBONE]
    (note,) = counted.notes
    assert f"backbone 21.60 M, upsampler {upsampler / 1e6:.2f} M" in note
    assert f"GFLOP of the upsampler: {added:.2f} at 128 px, " in note


@pytest.mark.slow
def test_teachers_beyond_the_limit_are_left_out(counted):
    assert [row["variant"] for row in counted.rows if row["student_px"] == 2048] == [BACKBONE, UNIVERSAL, STUDENT]


@pytest.mark.slow
def test_times_are_medians_and_ratios_of_the_same_round(shallow, monkeypatch):
    """A machine that is slower in every round: backbone 1, 2, 3..., student three times, the teacher ten times that."""
    clock = itertools.count()

    def seconds(calls, rounds, device, slow):
        (key,) = slow
        assert key[1] == LARGE
        base = torch.arange(1.0, rounds + 1).tolist()
        by_variant = {BACKBONE: base, UNIVERSAL: base, STUDENT: [3 * second for second in base], LARGE: [10.0, 60.0]}
        next(clock)
        return {key: by_variant[key[1]] for key in calls}

    monkeypatch.setattr(scaling, "seconds_in_turn", seconds)
    report = cost(["dinov3-vits16"], [32, 64], rounds=6, device="cpu")
    assert next(clock) == 2  # once per size
    backbone, _, student, teacher = report.rows[:4]
    assert (backbone["ms"], backbone["ms_range"], backbone["ratio"]) == (3500, (1000, 6000), 1)
    assert (student["ms"], student["ratio"], student["per_second"]) == (10500, 3, 1 / 10.5)
    assert teacher["ratio"] == 10  # of the backbone in rounds 0 and 5
    assert teacher["ms_p90"] == pytest.approx(55000)
    text = report.markdown("brixel evaluate cost")
    assert "| 3500.0 | 1000.0 to 6000.0 | 5500.0 | 1.00 | 0.29 | 3 |" in text


@pytest.mark.slow
def test_every_variant_is_timed_and_the_recipe_says_how(shallow):
    threads = torch.get_num_threads()
    report = cost(["dinov3-vits16"], [32], rounds=6, threads=1, device="cpu")
    assert torch.get_num_threads() == threads
    assert [row["variant"] for row in report.rows] == [BACKBONE, UNIVERSAL, STUDENT, LARGE]
    assert all(0 < row["ms_range"][0] <= row["ms"] <= row["ms_range"][1] for row in report.rows)
    assert "float32, 6 rounds in turn (x 4: one of 5); " in report.recipe
    assert f"1 threads; torch {torch.__version__}" in report.recipe


@pytest.mark.slow
def test_the_command_times_every_batch_size(shallow, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "seconds_of", lambda call, device: 0.5)
    sizes = ["--image-px", "33", "--batch-size", "1", "4", "--rounds", "2", "--device", "cpu"]
    assert main(["evaluate", "cost", *sizes, "-o", str(tmp_path / "cost.md")]) == 0
    rows = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["variant"], row["batch"], row["per_second"]) for row in rows[:3]] == [
        (BACKBONE, 1, 2),
        (BACKBONE, 4, 8),
        (UNIVERSAL, 1, 2),
    ]
    assert "| 1 | 500.0 | 500.0 to 500.0 | 500.0 | 1.00 | 2.00 | 3 |" in capsys.readouterr().out
    assert (tmp_path / "cost.png").exists()


@pytest.mark.slow
def test_without_matplotlib_the_command_goes_on_without_a_plot(shallow, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["evaluate", "cost", "--image-px", "32", "--rounds", "0", "-o", str(tmp_path / "cost.md")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cost.json", "cost.md"]


def test_what_cannot_be_measured_is_refused(capsys):
    with pytest.raises(BrixelError, match="did you mean"):
        cost(["dinov3-vits16", "dinov3-vits"], [])
    with pytest.raises(BrixelError, match="rounds is -1; expected 0"):
        cost(["dinov3-vits16"], [32], rounds=-1)
    for architectures, sides in (([], [32]), (["dinov3-vits16"], [])):
        with pytest.raises(BrixelError, match="nothing to measure"):
            cost(architectures, sides, rounds=0)
    assert main(["evaluate", "cost", "-o", "no/such/report.md"]) == 2
    assert "no folder no/such" in capsys.readouterr().err
