"""Limits of memory against resident memory."""

import sys

import pytest
import torch

from brixel import BrixelError
from brixel.cli.app import main
from brixel.evaluate.cost import resident
from brixel.evaluate.cost.resident import resident_table


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_resident_memory_stays_within_the_limit(monkeypatch):
    monkeypatch.setattr(resident, "SHARES", (1.0, 0.6))
    report = resident_table(["brixel-tiny", "dinov3-vits16"], [320], torch.float32)
    assert [row["model"] for row in report.rows] == ["brixel-tiny"] * 2 + ["dinov3-vits16"] * 2
    for row in report.rows:
        assert row["strategy"].startswith("refused") or row["resident_bytes"] <= row["limit_bytes"]
    assert report.rows[0]["planned_bytes"] == report.rows[0]["limit_bytes"]
    assert report.rows[0]["strategy"] == "whole"


def test_arguments_are_checked_before_a_process_is_started(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(resident, "ProcessPoolExecutor", None)
    with pytest.raises(BrixelError, match="multiples of 16 px"):
        resident_table(["dinov3-vits16"], [250], torch.float32)
    monkeypatch.setattr(resident, "_CLEAR", tmp_path / "none")
    with pytest.raises(BrixelError, match="use Linux"):
        resident_table(["brixel-tiny"], [256], torch.float32)
    assert main(["evaluate", "memory", "--resident", "--limits", "1GiB"]) == 2
    assert "--resident goes without" in capsys.readouterr().err
