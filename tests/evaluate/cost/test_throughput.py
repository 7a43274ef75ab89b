from brixel import BrixelFeatures
from brixel.cli.app import main
from brixel.evaluate.cost.throughput import BARE, EXTRACT, STREAM, draw_images, measure, report


def test_all_three_do_all_images_in_every_round(backbone_folder, tmp_path, monkeypatch):
    draw_images(tmp_path, 3, (40, 60))
    model = BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=28)
    calls = []
    monkeypatch.setattr(
        model, "forward", lambda pixels: calls.append(pixels.shape[0]) or type(model).forward(model, pixels)
    )
    result = measure(model, tmp_path, rounds=2, batch_size=2, workers=1)
    assert {name: len(seconds) for name, seconds in result.seconds.items()} == {BARE: 2, STREAM: 2, EXTRACT: 2}
    assert calls.count(2) >= 3  # the bare model's batches, and a warm-up
    assert "3 images, the first of 40 x 60 px, 28 x 42 px as the model sees it" in result.recipe


def test_the_report_tells_pictures_per_second_and_the_median_ratio(backbone_folder, tmp_path):
    draw_images(tmp_path, 1, (28, 28))
    model = BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=28)
    made = measure(model, tmp_path, rounds=1, batch_size=1, workers=0)
    made.seconds[BARE][:] = [0.5]
    made.seconds[EXTRACT][:] = [0.625]
    text = report([made], "brixel throughput")
    assert f"| {BARE} | 2.00 (2.00 to 2.00) | 100.0 % |" in text
    assert f"| {EXTRACT} | 1.60 (1.60 to 1.60) | 80.0 % |" in text


def test_the_command_writes_a_report(tmp_path, capsys):
    draw_images(tmp_path / "in", 1, (64, 64))
    arguments = ["throughput", "--images", str(tmp_path / "in"), "--rounds", "1", "-o", str(tmp_path / "report.md")]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert (tmp_path / "report.md").read_text() == capsys.readouterr().out
