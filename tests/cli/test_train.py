import pytest

from brixel.cli import train
from brixel.train import TrainConfig


@pytest.fixture
def configs(monkeypatch):
    """The configurations that runs are started with."""
    started = []
    monkeypatch.setattr(train, "distill", started.append)
    return started


def test_flags_are_settings(run, configs, tmp_path, capsys):
    flags = ("--backbone", "b", "--images", "i", "j", "--steps", 7, "--lr", "1e-4", "--no-flip", "--batch-size", 3)
    assert run("train", *flags, "-o", tmp_path / "run") == 0
    assert run("train", *flags, "--out", tmp_path / "run") == 0
    values = {"steps": 7, "lr": 1e-4, "flip": False, "batch_size": 3}
    assert configs == [TrainConfig("b", ("i", "j"), str(tmp_path / "run"), **values)] * 2
    assert capsys.readouterr().out == f"{tmp_path / 'run'}\n" * 2


def test_flags_override_the_file(run, configs, tmp_path):
    (tmp_path / "run.toml").write_text('backbone = "b"\nimages = ["i"]\nout = "o"\nsteps = 5\nlr = 0.5\n')
    assert run("train", "--config", tmp_path / "run.toml", "--steps", 7, "--preset", "release") == 0
    assert (configs[0].steps, configs[0].lr, configs[0].schedule) == (7, 0.5, "release")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "missing --backbone, --images, --output; example: brixel train --backbone "),
        (("--backbone", "b", "-o", "o"), "missing --images; example: "),
        (("--lr", "fast"), "--lr: 'fast'; expected a number"),
        (("--batch-size", "0"), "--batch-size: '0'; expected a positive whole number"),
        (("--schedule", "cosin"), "--schedule: unknown value 'cosin'; did you mean 'cosine'?"),
        (("--backbone", "b", "--images", "i", "-o", "o", "--save-every", "0"), "--save-every is 0; expected "),
    ],
)
def test_errors_name_the_flags(run, configs, capsys, arguments, message):
    assert run("train", *arguments) == 2
    assert capsys.readouterr().err.startswith(f"brixel: error: {message}")
    assert not configs
