import json

import pytest

from brixel import BrixelFeatures
from brixel.cli.app import main
from brixel.evaluate.cost import throughput as module
from brixel.evaluate.cost.throughput import BARE, EXTRACT, STREAM, draw_images, throughput


@pytest.fixture(scope="module")
def model(backbone_folder):
    return BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=28)


def test_all_three_do_all_images_in_every_round(model, tmp_path, monkeypatch):
    draw_images(tmp_path, 3, (40, 60))
    calls = []
    monkeypatch.setattr(
        model, "forward", lambda pixels: calls.append(pixels.shape[0]) or type(model).forward(model, pixels)
    )
    report = throughput([model], tmp_path, rounds=2, batch_size=2, workers=1)
    assert {row["what"]: len(row["seconds"]) for row in report.rows} == {BARE: 2, STREAM: 2, EXTRACT: 2}
    assert calls.count(2) >= 3  # the bare model's batches, and a warm-up
    assert "3 images, the first of 40 x 60 px, 28 x 42 px as the model sees it" in report.recipe


def test_the_report_has_images_per_second_and_the_median_ratio(model, tmp_path, monkeypatch):
    draw_images(tmp_path, 1, (28, 28))
    elapsed = iter([9, 9, 9, 0.5, 0.5, 0.625, 0.25, 0.5, 0.5, 0.5, 0.5, 0.8])  # a warm-up and three rounds

    def seconds(call, device):
        call()
        return next(elapsed)

    monkeypatch.setattr(module, "seconds_of", seconds)
    text = throughput([model], tmp_path, rounds=3, batch_size=1, workers=0).markdown("brixel evaluate throughput")
    assert f"| {BARE} | 2.00 | 2.00 to 4.00 | 100.0% |" in text
    assert f"| {EXTRACT} | 1.60 | 1.25 to 2.00 | 62.5% |" in text


@pytest.mark.slow
def test_the_command_writes_a_report(tmp_path, capsys):
    draw_images(tmp_path / "in", 1, (64, 64))
    output = tmp_path / "report.md"
    arguments = ["evaluate", "throughput", "--images", str(tmp_path / "in"), "--rounds", "1", "-o", str(output)]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert output.read_text() == capsys.readouterr().out
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert {row["backbone"] for row in rows} == {"brixel-tiny"}
