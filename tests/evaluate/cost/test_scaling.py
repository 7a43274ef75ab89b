"""Cost: counted by hand for one layer's share, timed in outline, refused where it makes no sense."""

import json

import numpy as np
import pytest

from brixel.cli.app import main
from brixel.errors import BrixelError
from brixel.evaluate.cost import scaling as module
from brixel.evaluate.cost import timing as benchmark
from brixel.evaluate.cost.scaling import cost
from brixel.evaluate.cost.timing import BACKBONE, LARGE, STUDENT
from brixel.evaluate.cost_plot import cost_plot
from brixel.evaluate.diagram import SIZE_PX
from brixel.feature_maps.panel import MARGIN_PX


def test_operations_grow_as_tokens_do():
    rows = {(row["student_px"], row["variant"]): row for row in cost(["dinov3-vits16"], [128, 512], rounds=0).rows}
    assert rows[128, LARGE]["gflop"] == pytest.approx(rows[512, BACKBONE]["gflop"])  # the same image
    assert rows[128, LARGE]["image_px"] == 512
    assert rows[128, STUDENT]["output_cells"] == rows[128, LARGE]["output_cells"] == "32 x 32"
    tokens, width = 32 * 32 + 5, 384
    layers = 12 * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)  # products; attention
    patches = 2 * 1024 * 768 * width
    assert rows[512, BACKBONE]["gflop"] == pytest.approx((layers + patches) / 1e9, rel=1e-6)
    assert rows[128, STUDENT]["parameters"] > rows[128, BACKBONE]["parameters"] == pytest.approx(21.6, abs=0.1)


def test_teachers_beyond_the_limit_are_left_out():
    rows = cost(["dinov3-vits16"], [2048], rounds=0).rows
    assert [row["variant"] for row in rows] == [BACKBONE, STUDENT]


def test_the_command_times_every_batch_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "peak_bytes_of", lambda *_: 3 * 2**20)  # it starts processes
    monkeypatch.setattr(benchmark, "seconds_of", lambda call, device: 0.5)
    sizes = ["--image-px", "33", "--batch-size", "1", "4", "--rounds", "2", "--device", "cpu"]
    assert main(["evaluate", "cost", *sizes, "-o", str(tmp_path / "cost.md")]) == 0
    rows = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["variant"], row["batch"], row["per_second"]) for row in rows[:3]] == [
        (BACKBONE, 1, 2),
        (BACKBONE, 4, 8),
        (STUDENT, 1, 2),
    ]
    assert "| 1 | 500.0 | 500.0 | 2.00 | 3 |" in capsys.readouterr().out
    with pytest.raises(BrixelError, match="did you mean"):
        cost(["dinov3-vits"], [32], rounds=0)
    with pytest.raises(BrixelError, match="rounds is -1; expected 0"):
        cost(["dinov3-vits16"], [32], rounds=-1)
    with pytest.raises(BrixelError, match="nothing to measure"):
        cost([], [32], rounds=0)


def test_the_plot_has_a_diagram_for_each_architecture_and_quantity():
    rows = [
        {"architecture": name, "variant": variant, "output_cells": f"{cells} x {cells}", "gflop": cells**power, **more}
        for name, more in (("one", {"peak_mib": 100.0}), ("other", {}))
        for variant, power in (("backbone", 1), ("student", 2))
        for cells in (16, 64)
    ]
    plot = np.asarray(cost_plot(rows))
    assert plot.shape[:2] == (2 * SIZE_PX[0] + 3 * MARGIN_PX, 2 * SIZE_PX[1] + 3 * MARGIN_PX)
    first, second = (plot[MARGIN_PX:, MARGIN_PX + number * (SIZE_PX[1] + MARGIN_PX) :] for number in range(2))
    for diagram in (first, second):  # both lines have two marks; the steeper one reaches higher
        diagram = diagram[: SIZE_PX[0], : SIZE_PX[1]]
        rows_of = [np.nonzero((diagram == colour).all(-1).any(1))[0] for colour in ((0x88,) * 3, (0xC2, 0x3B, 0x22))]
        assert len(rows_of[0]) > 0 < len(rows_of[1])
        heights = [rows.max() - rows[rows > 70].min() for rows in rows_of]
        assert heights[1] > heights[0]
