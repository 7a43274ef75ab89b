"""Tables of memory: predicted and measured peaks."""

import pytest
import torch

from brixel.cli.app import main
from brixel.errors import BrixelError
from brixel.evaluate.cost import memory
from brixel.evaluate.cost.memory import limit_table, memory_table
from brixel.utils.memory import format_bytes

MIB = 2**20


@pytest.mark.slow
def test_the_table_is_predicted_without_weights_and_measured_where_asked():
    report = memory_table(["dinov3-vits16"], [64, 128], measured={"dinov3-vits16": 64})
    assert [(row["dtype"], row["image_px"]) for row in report.rows] == [
        ("float32", 64),
        ("float32", 128),
        ("bfloat16", 64),
        ("bfloat16", 128),
    ]
    for row in report.rows:
        assert row.keys() & {"whole", "row_chunks", "tiles"} == {
            "whole",
            "row_chunks",
        }
        assert (row["measured"] is None) == (row["image_px"] == 128)
        for kind, measured in row["measured_bytes"].items():
            assert 0.9 * row[kind] <= measured <= 1.01 * row[kind]
    text = report.markdown("brixel evaluate memory")
    row = report.rows[3]
    cells = f"{format_bytes(row['whole'])} | {format_bytes(row['row_chunks'])} | - | -"
    assert f"| dinov3-vits16 | bfloat16 | 128 | {cells} |" in text
    assert text.endswith("    brixel evaluate memory")


@pytest.mark.slow
def test_what_is_counted_stays_within_limit_and_prediction():
    limits = [60 * MIB, 106 * MIB, 400 * MIB, 800 * MIB]
    report = limit_table(["dinov3-vits16"], [256], limits, dtype=torch.float32, tiles="auto")
    rows = report.rows
    assert [row["limit_bytes"] for row in rows] == limits
    assert [row.get("kind") for row in rows] == [None, "row_chunks", "whole", "whole"]
    for row in rows[1:]:
        assert 0.9 * row["predicted_bytes"] <= row["measured_bytes"] <= 1.01 * row["predicted_bytes"]
        assert row["measured_bytes"] <= row["limit_bytes"]
    assert rows[2]["seconds"] == rows[3]["seconds"]  # the same strategy is run once
    text = report.markdown("brixel evaluate memory --limits")
    assert "| dinov3-vits16 | float32 | 256 | 60 MiB | refused: nothing fits | - | - | - | - |" in text
    assert "| 106 MiB | exact chunks of " in text
    assert text.endswith("    brixel evaluate memory --limits")


def test_wrong_names_and_amounts_are_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(memory, "random_student", None)
    limits = {"limits": [MIB], "dtype": torch.float32, "tiles": "auto"}
    with pytest.raises(BrixelError, match="did you mean 'dinov3-vits16'"):
        limit_table(["dinov3-vits16", "dinov3-vits1"], [64], **limits)
    with pytest.raises(BrixelError, match="did you mean 'dinov3-vits16'"):
        memory_table([], [64], measured={"dinov3-vits1": 64})
    with pytest.raises(BrixelError, match="dinov3-vitb16 is to be measured, but is not among the architectures"):
        memory_table(["dinov3-vits16"], [64], measured={"dinov3-vitb16": 64})
    with pytest.raises(BrixelError, match=r"multiples of 16 px, and a side is 250 px; such as 256"):
        limit_table(["dinov3-vits16"], [64, 250], **limits)
    with pytest.raises(BrixelError, match=r"multiples of 16 px"):
        memory_table(["dinov3-vits16"], [250])
    command = ["evaluate", "memory", "--architectures", "dinov3-vits16", "--limits"]
    assert main([*command, "much"]) == 2
    assert "much" in capsys.readouterr().err
    assert main([*command, "1MiB", "--measure", "dinov3-vits16=64"]) == 2
    assert "--measure goes without --limits" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_refuses_what_fits_nothing(monkeypatch, capsys):
    def nothing_fits(*_):
        raise memory.MemoryLimitError("nothing fits")

    monkeypatch.setattr(memory, "choose_strategy", nothing_fits)
    command = ["evaluate", "memory", "--architectures", "dinov3-vits16", "--image-px", "64"]
    assert main([*command, "--limits", "1MiB", "1GiB"]) == 0
    out = capsys.readouterr().out
    for limit in ("1 MiB", "1.00 GiB"):
        assert f"| dinov3-vits16 | float32 | 64 | {limit} | refused: nothing fits | - | - | - | - |" in out


@pytest.mark.slow
def test_a_limit_below_the_weights_is_refused():
    (row,) = limit_table(["dinov3-vits16"], [64], [MIB]).rows
    assert row["strategy"] == "refused: nothing fits"
