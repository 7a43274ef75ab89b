"""Limits kept: predicted and counted peaks side by side."""

import pytest
import torch

from brixel.cli.app import main
from brixel.errors import BrixelError
from brixel.evaluate.cost.memory import memory_table
from brixel.evaluate.cost.memory_limits import limit_report, limit_table

MIB = 2**20


@pytest.mark.slow
def test_what_is_counted_stays_within_limit_and_prediction():
    limits = [60 * MIB, 98 * MIB, 400 * MIB, 800 * MIB]
    rows = list(limit_table(["dinov3-vits16"], [256], limits, dtype=torch.float32, tiles="auto"))
    assert [row.limit_bytes for row in rows] == limits
    assert [row.strategy.name if row.strategy else None for row in rows] == [None, "row_chunks", "whole", "whole"]
    for row in rows[1:]:
        assert 0.9 * row.predicted_bytes <= row.measured_bytes <= row.predicted_bytes <= row.limit_bytes
    assert rows[2].seconds == rows[3].seconds  # the same strategy is run once
    text = limit_report(rows, "brixel plan --limits")
    assert "| dinov3-vits16 | float32 | 256 | 60 MiB | refused: nothing fits | - | - | - | - |" in text
    assert "| 98 MiB | exact chunks of " in text
    assert text.endswith("    brixel plan --limits")


def test_wrong_names_and_amounts_are_refused_before_anything_runs(capsys):
    with pytest.raises(BrixelError, match="did you mean 'dinov3-vits16'"):
        next(limit_table(["dinov3-vits1"], [64], [MIB], dtype=torch.float32, tiles="auto"))
    with pytest.raises(BrixelError, match="did you mean 'dinov3-vits16'"):
        memory_table([], [64], measured={"dinov3-vits1": 64})
    with pytest.raises(BrixelError, match="dinov3-vitb16 is to be measured, and not among the architectures"):
        memory_table(["dinov3-vits16"], [64], measured={"dinov3-vitb16": 64})
    with pytest.raises(BrixelError, match=r"multiples of 16 px, and a side is 250 px; such as 256"):
        next(limit_table(["dinov3-vits16"], [64, 250], [MIB], dtype=torch.float32, tiles="auto"))
    with pytest.raises(BrixelError, match=r"multiples of 16 px"):
        memory_table(["dinov3-vits16"], [250])
    assert main(["plan", "64x64", "--table"]) == 2
    assert "give one of a size" in capsys.readouterr().err
    assert main(["plan", "--limits", "much", "--architectures", "dinov3-vits16"]) == 2
    assert "much" in capsys.readouterr().err


def test_the_command_refuses_what_fits_nothing(capsys):
    assert main(["plan", "--limits", "1MiB", "--architectures", "dinov3-vits16", "--sides", "64"]) == 0
    assert "refused: nothing fits" in capsys.readouterr().out
