"""Whole training runs: they learn, resume after a kill, stop at values that are not finite, and report."""

import dataclasses
import errno
import json
import math
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import records_of, state_of
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import nn

from brixel import BrixelError, BrixelFeatures
from brixel.checkpoints.model_folder import read_config
from brixel.train import TrainConfig, distill
from brixel.train.config import make_config, read_settings
from brixel.train.optim import WeightAverage, learning_rate, make_optimizer
from brixel.train.setup import teacher_sides_px
from brixel.train.validation import HeldOut

TEACHER_PX, WIDTH = 112, 64


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """20 images to train on and 6 to validate with: coloured shapes on a coloured ground."""
    folder, numbers = tmp_path_factory.mktemp("drawn"), np.random.default_rng(0)
    for name, count in (("train", 20), ("val", 6)):
        (folder / name).mkdir()
        for number in range(count):
            draw_shapes(numbers, 150 + number).save(folder / name / f"{number:02}.png")
    return folder


def draw_shapes(numbers, height_px):
    image = Image.new("RGB", (160, height_px), tuple(numbers.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, width, height = numbers.integers(0, 130, 4).tolist()
        shape = draw.ellipse if numbers.random() < 0.5 else draw.rectangle
        shape((x, y, x + width // 2 + 15, y + height // 2 + 15), fill=tuple(numbers.integers(0, 256, 3).tolist()))
    return image


@pytest.fixture
def config(backbone_folder, drawn, tmp_path, monkeypatch):
    """A run of four steps with a state after the second and the last, without a fit of the blend; no curve is drawn."""
    monkeypatch.setattr("brixel.train.validation.draw_curve", lambda path, records: path.touch())
    return short_run(backbone_folder, drawn / "train", tmp_path / "out")


@pytest.fixture(scope="module")
def plain(backbone_folder, drawn, tmp_path_factory):
    """The output folder of that run, uninterrupted."""
    out = tmp_path_factory.mktemp("plain") / "out"
    distill(short_run(backbone_folder, drawn / "train", out))
    return out


FIRST_GENERATION = {"generation": 1, "cosine": 0.0, "edge": 1.0, "spectral": 0.1}
"""The loop is the same; for the second see `test_second_generation.py`."""


def short_run(backbone, images, out, **settings):
    return TrainConfig(
        **{
            **{"backbone": str(backbone), "images": str(images), "out": str(out), "teacher_px": TEACHER_PX},
            **{"steps": 4, "batch_size": 2, "warmup": 1, "drop_path": 0.3, "val_every": 4, "save_every": 2},
            **{"log_every": 1, "workers": 0, "device": "cpu", "fit": 0, **FIRST_GENERATION, **settings},
        }
    )


def changed(config, **settings):
    return dataclasses.replace(config, **settings)


def assert_same_run(one, other):
    """State (weights, average, optimiser, steps), best and last model and metrics are equal, bit for bit."""
    ours, theirs = state_of(one), state_of(other)
    for part in ("progress", "module", "average", "optimizer"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    for name in ("adapter.safetensors", "last/adapter.safetensors"):
        assert (Path(one) / name).read_bytes() == (Path(other) / name).read_bytes()
    assert metrics_of(one) == metrics_of(other)


def metrics_of(out):
    """The metrics, without the speed, which always differs."""
    return [{name: value for name, value in record.items() if name != "pictures_per_s"} for record in records_of(out)]


class Teacher:
    """The backbone as a callable; ``faults``: exceptions or values, by number of the call from 0."""

    def __init__(self, backbone, faults=None):
        self.model = BrixelFeatures.from_backbone(backbone, adapter="fresh", device="cpu")
        self.faults, self.shapes = faults or {}, []

    def __call__(self, pixels):
        self.shapes.append(tuple(pixels.shape))
        fault = self.faults.get(len(self.shapes) - 1)
        if isinstance(fault, Exception):
            raise fault
        maps = self.model.backbone_features(pixels)
        if fault is not None:
            maps = maps.clone()
            maps[-1, 3, 2, 1] = fault
        return maps


# ---------------------------------------------------------------- it learns


@pytest.fixture(scope="module")
def trained(backbone_folder, drawn, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "out"
    config = short_run(
        *(backbone_folder, drawn / "train", out),
        **{"val": str(drawn / "val"), "steps": 30, "batch_size": 4, "cache": 40, "lr": 3e-3, "ema": 0.95},
        **{"warmup": 4, "drop_path": 0.1, "val_every": 15, "save_every": 30, "log_every": 3, "fit": 40},
    )
    return config, distill(config)


@pytest.mark.slow
def test_the_loss_falls_and_held_out_maps_are_nearer_than_by_interpolation(trained):
    config, _ = trained
    losses = [record["loss"] for record in metrics_of(config.out) if "loss" in record]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    check = metrics_of(config.out)[-1]
    assert check["cosine"] > check["bilinear_cosine"] + 0.1
    assert check["cosine"] > check["bicubic_cosine"] + 0.1


def test_metrics_are_complete_and_consistent(trained):
    config, _ = trained
    records = metrics_of(config.out)
    steps = [record for record in records if "loss" in record]
    checks = [record for record in records if "cosine" in record]
    assert [record["step"] for record in steps] == [*range(3, 31, 3)]
    assert [record["step"] for record in checks] == [15, 30]
    for record in steps:
        assert set(record) == {"step", "loss", "l1", "edge", "spectral", "lr"}
        assert record["loss"] == pytest.approx(record["l1"] + record["edge"] + 0.1 * record["spectral"], rel=1e-5)
        assert record["lr"] == learning_rate(config, record["step"] - 1)
    names = ["l1", "cosine", "centred_cosine", "centred_cosine_edges", "r2"]
    plain = [f"{mode}_{name}" for mode in ("bilinear", "bicubic") for name in names]
    for record in checks:
        assert list(record) == ["step", *names, "better_than_bilinear", "centred_better_than_bilinear", *plain]
        assert record["better_than_bilinear"] * 6 == pytest.approx(6)  # of six crops
    assert {name: checks[0][name] for name in plain} == {name: checks[1][name] for name in plain}
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["pictures_per_s"] > 0 for line in lines if "loss" in line)


def test_the_result_is_a_folder_for_from_pretrained(trained, backbone_folder, drawn):
    config, given = trained
    best = BrixelFeatures.from_pretrained(config.out, device="cpu")
    last = BrixelFeatures.from_pretrained(Path(config.out) / "last", device="cpu")
    image = next((drawn / "val").iterdir())
    for model in (best, last, given):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
        assert model.config.adapter.short_side_px == TEACHER_PX // 4
        assert model.extract(image).features.shape[0] == WIDTH
    assert torch.equal(given.extract(image).features, best.extract(image).features)
    fresh = BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu", short_side_px=TEACHER_PX // 4)
    assert not torch.equal(fresh.extract(image).features, best.extract(image).features)


def test_the_best_model_is_that_of_the_best_validation(trained):
    config, _ = trained
    checks = [record for record in metrics_of(config.out) if "cosine" in record]
    progress = state_of(config.out)["progress"]
    assert progress["best"] == max(record["centred_cosine"] for record in checks)
    assert progress["step"] == 30
    same = (Path(config.out) / "adapter.safetensors").read_bytes() == (
        Path(config.out) / "last" / "adapter.safetensors"
    ).read_bytes()
    assert same == (checks[-1]["centred_cosine"] > checks[0]["centred_cosine"])


def test_the_saved_weights_are_the_averaged_ones(trained):
    config, _ = trained
    state, kept = state_of(config.out), load_file(Path(config.out) / "last" / "adapter.safetensors")
    assert set(kept) == set(state["average"]) == set(state["module"])
    assert all(torch.equal(kept[name], state["average"][name]) for name in kept)
    assert not all(torch.equal(kept[name], state["module"][name]) for name in kept)


def test_all_settings_are_written(trained):
    config, _ = trained
    written = read_settings(Path(config.out) / "train.toml")
    assert make_config(written) == config
    expected = {field.name for field in dataclasses.fields(config) if getattr(config, field.name) is not None}
    assert set(written) == expected


def test_curve_and_panels_are_images_and_no_other_files_remain(trained):
    config, _ = trained
    out = Path(config.out)
    for name in ("curve.png", "panel-000015.png", "panel-000030.png"):
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) > 200
    names = {"adapter.safetensors", "cache", "config.json", "last", "metrics.jsonl", "state.pt", "train.toml", "val"}
    images = {"curve.png", "panel-000015.png", "panel-000030.png"}
    assert {path.name for path in out.iterdir()} == names | images | {"README.md"}


def test_config_and_card_describe_the_training(trained):
    config, _ = trained
    checks = [record for record in records_of(config.out) if "cosine" in record]
    best = max(checks, key=lambda record: record["centred_cosine"])
    facts = read_config(Path(config.out, "config.json")).training
    assert facts["steps"].startswith(f"{best['step']} of {config.steps}, ")
    (figure,) = [text for name, text in facts.items() if name.startswith("cosine to the teacher, on ")]
    bilinear, bicubic = best["bilinear_cosine"], best["bicubic_cosine"]
    assert figure == f"{best['cosine']:.4f}; bilinear {bilinear:.4f}, bicubic {bicubic:.4f}"
    card = Path(config.out, "README.md").read_text()
    assert all(f"| {text} |" in card for text in facts.values())
    assert not any(folder in card for folder in config.images)


def test_a_finished_run_started_again_gives_its_result_and_changes_nothing(trained):
    config, given = trained
    before = {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()}
    again = distill(config)
    assert {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()} == before
    torch.testing.assert_close(again.state_dict(), given.state_dict(), rtol=0, atol=0)


# ---------------------------------------------------------------- killed and resumed

# The runs of these tests are killed at four moments, with and without cache and workers. One interpreter forks them.
KILLED = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from brixel.train import TrainConfig, distill
from brixel.train import trainer
torch.set_num_threads(1)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def in_call(number, original, replacement):
    calls = []
    def counted(*args, **options):
        calls.append(1)
        return (replacement if len(calls) == number else original)(*args, **options)
    return counted

def half_written(content, path):
    whole = save(content, path)
    os.truncate(path, os.path.getsize(path) // 2)
    die()

save, step = torch.save, torch.optim.AdamW.step
def stepped(*args, **options):
    step(*args, **options)
    die()

cases = json.loads(sys.argv[1])
pids = []
for moment, settings in cases:
    pid = os.fork()
    if not pid:
        if moment == "in a step":
            torch.optim.AdamW.step = in_call(4, step, stepped)
        elif moment == "while the state is written":
            torch.save = in_call(2, save, half_written)
        elif moment == "after a validation":
            trainer.save_state = in_call(2, trainer.save_state, die)
        elif moment == "from outside":
            trainer.Trainer.step = in_call(4, trainer.Trainer.step, lambda *_: time.sleep(600))
        distill(TrainConfig(**settings))
        os._exit(0)
    pids.append(pid)
for pid, (moment, settings) in zip(pids, cases):
    metrics = Path(settings["out"]) / "metrics.jsonl"
    while moment == "from outside" and not (metrics.exists() and '"step": 3' in metrics.read_text()):
        if os.waitpid(pid, os.WNOHANG)[0]:
            sys.exit(moment + ": ended by itself")
        time.sleep(0.01)
    if moment == "from outside":
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
"""
# moment, crops in the cache, workers; all moments are after the state of step 2 and before that of step 4
CASES = [
    ("in a step", 0, 0),
    ("from outside", 0, 2),
    ("after a validation", 6, 0),
    ("while the state is written", 6, 2),
]


@pytest.fixture(scope="module")
def killed(backbone_folder, drawn, tmp_path_factory):
    """The configurations of the killed runs, by case."""
    folder = tmp_path_factory.mktemp("killed")
    configs = {
        case: interruptible(backbone_folder, drawn, folder / f"out-{number}", cache=case[1], workers=case[2])
        for number, case in enumerate(CASES)
    }
    cases = json.dumps([(case[0], dataclasses.asdict(config)) for case, config in configs.items()])
    with (folder / "output").open("w") as output:  # not a pipe: orphaned DataLoader workers keep it open
        done = subprocess.run([sys.executable, "-c", KILLED, cases], stdout=output, stderr=output, timeout=120)
    assert done.returncode == 0, (folder / "output").read_text()
    return configs


@pytest.fixture(scope="module")
def uninterrupted(backbone_folder, drawn, tmp_path_factory):
    """The output folders of two uninterrupted runs, by crops in the cache."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for cache in (0, 6):
        distill(interruptible(backbone_folder, drawn, folder / str(cache), cache=cache, workers=0))
    return {cache: folder / str(cache) for cache in (0, 6)}


def interruptible(backbone, drawn, out, **settings):
    settings = {"steps": 5, "accumulate": 2, "val_every": 4, "val": str(drawn / "val"), "val_images": 1, **settings}
    return short_run(backbone, drawn / "train", out, **settings)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no such signal on Windows")
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_as_an_uninterrupted_one(killed, uninterrupted, case):
    config = killed[case]
    assert state_of(config.out)["progress"]["step"] == 2
    distill(config)
    assert_same_run(config.out, uninterrupted[case[1]])
    steps = [record["step"] for record in metrics_of(config.out) if "loss" in record]
    assert steps == list(range(1, 6))
    assert [record["step"] for record in metrics_of(config.out) if "cosine" in record] == [4, 5]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "call"), [(0, 1), (0, 8), (2, 5)])
def test_a_run_stopped_by_an_exception_ends_as_an_uninterrupted_one(
    backbone_folder, drawn, uninterrupted, tmp_path, workers, call
):
    config = interruptible(backbone_folder, drawn, tmp_path / "out", workers=workers, val=())
    teacher = Teacher(backbone_folder, {call: RuntimeError("interrupted")})
    with pytest.raises(RuntimeError, match="interrupted"):
        distill(config, teacher=teacher)
    assert (tmp_path / "out" / "state.pt").exists() == (call > 1)
    distill(config, teacher=Teacher(backbone_folder))
    ours, theirs = state_of(config.out), state_of(uninterrupted[0])
    for part in ("module", "average", "optimizer"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    assert [record["step"] for record in metrics_of(config.out)] == list(range(1, 6))


# ---------------------------------------------------------------- resumed with other settings, or from a damaged state


@pytest.fixture(scope="module")
def half_done(backbone_folder, drawn, tmp_path_factory):
    """A run that stopped in its third step."""
    out = tmp_path_factory.mktemp("half") / "out"
    config = short_run(backbone_folder, drawn / "train", out)
    with pytest.raises(RuntimeError, match="interrupted"):
        distill(config, teacher=Teacher(backbone_folder, {2: RuntimeError("interrupted")}))
    return config


@pytest.fixture
def stopped(half_done, tmp_path):
    """A copy of that run, to resume."""
    shutil.copytree(half_done.out, tmp_path / "out")
    return changed(half_done, out=str(tmp_path / "out"))


def test_other_settings_that_matter_are_refused_by_name(stopped):
    before = (Path(stopped.out) / "state.pt").read_bytes()
    settings = (Path(stopped.out) / "train.toml").read_bytes()
    with pytest.raises(BrixelError, match="holds a run with other settings") as caught:
        distill(changed(stopped, steps=3, lr=0.5, drop_path=0.0, val=("elsewhere",), seed=7, cache=3))
    for text in ("steps: 3, not 4", "lr: 0.5, not 0.001", "drop_path: 0.0, not 0.3", "seed: 7, not 0", "cache: 3"):
        assert text in str(caught.value)
    assert "workers" not in str(caught.value)
    assert (Path(stopped.out) / "state.pt").read_bytes() == before
    assert (Path(stopped.out) / "train.toml").read_bytes() == settings


@pytest.mark.slow
def test_a_run_can_be_extended(stopped):
    """The steps that are done stay; the learning rate of the others follows the schedule of all steps."""
    done = [line for line in records_of(stopped.out) if "lr" in line]
    model = distill(changed(stopped, steps=6, log_every=1))
    assert state_of(stopped.out)["progress"]["step"] == 6
    assert state_of(stopped.out)["config"]["steps"] == 6
    after = [line for line in records_of(stopped.out) if "lr" in line]
    assert after[: len(done)] == done
    assert [line["step"] for line in after[-2:]] == [5, 6]
    assert after[-1]["lr"] == learning_rate(changed(stopped, steps=6), 5)
    assert "of 6" in model.config.training["steps"]


def test_a_folder_of_images_is_not_written_into(config):
    with pytest.raises(BrixelError, match="which holds images to train on; give another folder as out"):
        distill(changed(config, out=config.images[0]))
    with pytest.raises(BrixelError, match="which holds images to train on"):
        distill(changed(config, out=f"{config.images[0]}/run"))
    with pytest.raises(BrixelError, match="holds images, such as .*, and no run"):
        distill(changed(config, images=("elsewhere",), val=(), out=config.images[0]))
    assert not (Path(config.images[0]) / "train.toml").exists()


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed_at_the_next_start(stopped):
    left = [Path(stopped.out) / f".{'0' * 32}.part.pt", Path(stopped.out) / "last" / f".{'a' * 32}.part.safetensors"]
    other = Path(stopped.out) / ".hidden.part.txt"
    for path in (*left, other):
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    distill(stopped)
    assert not any(path.exists() for path in left)
    assert other.exists()


def test_another_number_of_processes_is_refused(stopped):
    state = state_of(stopped.out)
    state["progress"]["processes"] = 4
    torch.save(state, Path(stopped.out) / "state.pt")
    with pytest.raises(BrixelError, match="processes: 1, not 4"):
        distill(stopped)


@pytest.mark.slow
def test_incidental_settings_may_change(stopped):
    config = changed(stopped, workers=1, log_every=2, save_every=3, device="auto", cache_dir="nowhere")
    distill(changed(config, device="cpu"))
    state = state_of(stopped.out)
    assert state["progress"]["step"] == 4
    assert (state["config"]["workers"], state["config"]["log_every"]) == (1, 2)
    assert read_settings(Path(stopped.out) / "train.toml")["save_every"] == 3
    assert [record["step"] for record in metrics_of(stopped.out)] == [1, 2, 4]


def cut(content):
    return content[: len(content) // 2]


def flipped(content):
    """Content with one bit of a tensor in the middle flipped."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flipped, lambda _: b"", lambda _: b"text", lambda content: content[:-9]])
def test_a_damaged_state_is_an_error_and_is_not_changed(stopped, damage):
    path = Path(stopped.out) / "state.pt"
    content = damage(path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(BrixelError, match=r"state\.pt is damaged or is not the state of a training run; delete it"):
        distill(stopped)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [[1, 2], {"other": torch.ones(2)}, torch.ones(3)])
def test_a_file_of_something_else_is_no_state(stopped, content):
    torch.save(content, Path(stopped.out) / "state.pt")
    with pytest.raises(BrixelError, match="is damaged or is not the state of a training run"):
        distill(stopped)


def test_a_state_that_would_run_code_is_refused(stopped):
    torch.save({"format_version": 1, "code": Teacher}, Path(stopped.out) / "state.pt")
    with pytest.raises(BrixelError, match="is damaged or is not the state of a training run"):
        distill(stopped)


def test_a_newer_format_is_refused_by_number(stopped):
    state = state_of(stopped.out)
    torch.save({**state, "format_version": 3, "new": 1}, Path(stopped.out) / "state.pt")
    with pytest.raises(BrixelError, match="has format 3; this version reads 1 and 2"):
        distill(stopped)


@pytest.mark.slow
def test_the_best_model_is_chosen_by_centred_cosine(config, monkeypatch):
    """The second validation has the higher raw cosine, the first the higher centred one."""
    figures = iter([{"cosine": 0.5, "centred_cosine": 0.4}, {"cosine": 0.6, "centred_cosine": 0.3}])
    monkeypatch.setattr(HeldOut, "validate", lambda self, predict: {**self.baselines, "l1": 1.0, **next(figures)})
    val = str(Path(config.images[0]).parent / "val")
    distill(changed(config, val=(val,), val_images=1, val_every=2))
    out = Path(config.out)
    assert state_of(out)["progress"]["best"] == 0.4
    assert read_config(out / "config.json").training["steps"].startswith("2 of 4, ")
    assert read_config(out / "last" / "config.json").training["steps"].startswith("4 of 4, ")


@pytest.mark.slow
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space left"), RuntimeError("file write failed")])
def test_a_full_disk_keeps_the_previous_state(config, monkeypatch, plain, error):
    saved = []
    save = torch.save

    def full(content, path):
        saved.append(path)
        if len(saved) == 2:
            Path(path).write_bytes(b"half of it")
            raise error
        save(content, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(BrixelError, match=r"cannot write .*state\.pt.*free some disk space and start again"):
        distill(config)
    monkeypatch.undo()
    assert state_of(config.out)["progress"]["step"] == 2
    assert not list(Path(config.out).glob(".*"))
    distill(config)
    assert_same_run(config.out, plain)


# ---------------------------------------------------------------- numbers that are not finite


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "call", "settings"),
    [(math.nan, 3, {}), (math.inf, 7, {"accumulate": 2, "edge": 0.0, "spectral": 0.0})],
)
def test_a_teacher_that_is_not_finite_stops_the_run_before_the_weights_change(
    backbone_folder, config, plain, tmp_path, value, call, settings
):
    """Also in the second of two micro-batches, when the first has already changed the running statistics."""
    config = changed(config, **settings)
    with pytest.raises(BrixelError, match="^step 3: .*not finite") as caught:
        distill(config, teacher=Teacher(backbone_folder, {call: value}))
    assert "state.pt" in str(caught.value)
    state = state_of(config.out)
    assert state["progress"]["step"] == 3
    for part in ("module", "average"):
        assert all(tensor.isfinite().all() for tensor in state[part].values())

    distill(config, teacher=Teacher(backbone_folder))
    if settings:
        plain = tmp_path / "uninterrupted"
        distill(changed(config, out=str(plain)))
    assert_same_run(config.out, plain)


def test_a_loss_that_overflows_stops_the_run(config):
    """The state before the step is saved, running statistics included."""
    config = changed(config, lr=1e30, clip_norm=0.0, warmup=0, weight_decay=0.0, val_every=99)
    with pytest.raises(BrixelError, match=r"^step [123]: loss (inf|nan), gradient norm .*; training stops here"):
        distill(config)
    state = state_of(config.out)
    for part in ("module", "average"):
        assert all(tensor.isfinite().all() for tensor in state[part].values())
    assert len(metrics_of(config.out)) == state["progress"]["step"]


# ---------------------------------------------------------------- what is given in code


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_random_state_is_not_changed(config, backbone_folder, workers):
    teacher = Teacher(backbone_folder, {3: RuntimeError("interrupted")})
    torch.manual_seed(5)
    before = random_states()
    with pytest.raises(RuntimeError, match="interrupted"):
        distill(changed(config, workers=workers), teacher=teacher)
    assert random_states() == before
    distill(changed(config, workers=workers))
    assert random_states() == before


@pytest.mark.slow
def test_the_result_depends_on_the_seed_and_not_on_the_callers_random_state(config, plain, tmp_path):
    torch.manual_seed(2)
    distill(config)
    assert_same_run(config.out, plain)
    distill(changed(config, out=str(tmp_path / "other"), seed=1, steps=1))
    ours, other = state_of(config.out)["module"], state_of(tmp_path / "other")["module"]
    assert not torch.equal(ours["adapter.query.weight"], other["adapter.query.weight"])


@pytest.fixture
def own_model(backbone_folder):
    """A model whose adapter is not fresh."""
    torch.manual_seed(3)
    model = BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu")
    with torch.no_grad():
        model.head.out.weight.normal_(std=0.01)
    return model


@pytest.mark.slow
def test_a_given_model_is_trained_and_its_backbone_is_not(config, own_model):
    backbone = {name: tensor.clone() for name, tensor in own_model.backbone.state_dict().items()}
    start = own_model.head.out.weight.detach().clone()
    result = distill(changed(config, ema=0.0, lr=1e-5), model=own_model)
    torch.testing.assert_close(dict(own_model.backbone.state_dict()), backbone, rtol=0, atol=0)
    torch.testing.assert_close(dict(result.backbone.state_dict()), backbone, rtol=0, atol=0)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in own_model.backbone.parameters())
    assert not torch.equal(result.head.out.weight, start)
    torch.testing.assert_close(result.head.out.weight, start, rtol=0, atol=1e-4)  # close to its start
    assert not any(module.training for module in (own_model, own_model.adapter, own_model.head, result))


def test_a_given_model_needs_no_backbone_on_the_disk(config, own_model, drawn):
    result = distill(changed(config, backbone="given in code", steps=1), model=own_model)
    saved = load_file(Path(config.out) / "adapter.safetensors")
    state = result.upsampler.state_dict()
    torch.testing.assert_close(dict(state), saved, rtol=0, atol=0)
    assert result.extract(next((drawn / "val").iterdir())).features.isfinite().all()


@pytest.mark.slow
def test_a_given_model_of_half_precision_is_trained_in_single(config, backbone_folder):
    model = BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu", dtype="bfloat16")
    distill(changed(config, steps=1), model=model)
    assert {tensor.dtype for tensor in state_of(config.out)["module"].values()} == {torch.float32, torch.int64}


@pytest.mark.slow
def test_a_given_teacher_is_called_for_every_micro_batch(config, backbone_folder, plain):
    teacher = Teacher(backbone_folder)
    distill(config, teacher=teacher)
    assert teacher.shapes == [(2, 3, TEACHER_PX, TEACHER_PX)] * 4
    assert_same_run(config.out, plain)  # this teacher is the backbone


def test_a_teacher_of_another_shape_is_refused(config):
    with pytest.raises(BrixelError, match=r"the teacher's \(2, 64, 4, 4\)"):
        distill(config, teacher=lambda pixels: torch.zeros(len(pixels), WIDTH, 4, 4))


@pytest.mark.slow
def test_with_a_cache_the_teacher_sees_every_crop_once(config, backbone_folder, drawn):
    teacher = Teacher(backbone_folder)
    distill(changed(config, cache=3, val=(str(drawn / "val"),), val_images=2), teacher=teacher)
    assert teacher.shapes == [(1, 3, TEACHER_PX, TEACHER_PX)] * 5


# ---------------------------------------------------------------- images


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"workers": 2}, {"cache": 8}])
def test_unreadable_images_are_counted_and_listed_and_skipped(config, drawn, tmp_path, capsys, settings):
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for number in range(3):
        shutil.copy(drawn / "train" / f"{number:02}.png", folder / "below")
    (folder / "broken.png").write_bytes((folder / "below" / "00.png").read_bytes()[:300])
    (folder / "text.jpg").write_text("no image")
    distill(changed(config, images=(str(folder),), **settings))
    assert f"2 images could not be used: {folder / 'broken.png'}, {folder / 'text.jpg'}" in capsys.readouterr().err


def test_a_run_without_readable_images_is_an_error(config, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"nothing")
    with pytest.raises(BrixelError, match=r"none of the 1 training images can be used.*broken\.png"):
        distill(changed(config, images=(str(folder),)))


@pytest.mark.slow
def test_small_images_are_upsampled_or_skipped(config, drawn, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(drawn / "train" / "00.png", folder)
    Image.new("RGB", (50, 40), "red").save(folder / "small.png")
    distill(changed(config, images=(str(folder),)))
    assert "could not be used" not in capsys.readouterr().err
    distill(changed(config, images=(str(folder),), small="skip", out=str(tmp_path / "skipping")))
    assert f"1 images could not be used: {folder / 'small.png'}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["images", "val"])
def test_folders_that_are_missing_or_empty_are_named(config, tmp_path, setting):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("text")
    for name in ("absent", "empty", "file.txt"):
        with pytest.raises(BrixelError, match=name):
            distill(changed(config, **{setting: (str(tmp_path / name),)}))


@pytest.mark.parametrize(
    ("teacher_px", "advice"), [(100, "take 56 or 112"), (50, "take 56"), (28, "take 56"), (113, "take 112 or 168")]
)
def test_a_size_that_does_not_fit_the_patches_is_refused(config, teacher_px, advice):
    with pytest.raises(BrixelError, match=f"teacher_px is {teacher_px}; expected a multiple of 56, 4 x 14: {advice}"):
        distill(changed(config, teacher_px=teacher_px))
    assert not Path(config.out).exists()


def test_the_default_size_of_the_teacher_is_64_patches():
    assert teacher_sides_px(TrainConfig("b", "i", "o"), 14) == [896]
    assert teacher_sides_px(TrainConfig("b", "i", "o"), 16) == [1024]
    assert teacher_sides_px(TrainConfig("b", "i", "o", sizes=(112, 168)), 14) == [448, 672]


def test_a_backbone_that_is_missing_is_named(config):
    with pytest.raises(BrixelError, match="no backbone at 'absent'"):
        distill(changed(config, backbone="absent"))


@pytest.mark.slow
def test_progress_is_a_line_every_few_steps_without_a_terminal(config, capsys):
    distill(changed(config, log_every=3))
    output, errors = capsys.readouterr()
    assert output == ""
    lines = errors.strip().split("\n")
    assert [line.split(" loss ")[0] for line in lines] == ["step 3/4", "step 4/4"]
    assert all("images/s, " in line and line.endswith("s left") for line in lines)


@pytest.mark.slow
def test_without_held_out_images_the_best_is_the_latest(config):
    distill(changed(config, val_every=2))
    out = Path(config.out)
    assert (out / "adapter.safetensors").read_bytes() == (out / "last" / "adapter.safetensors").read_bytes()
    assert state_of(out)["progress"]["best"] == 4
    assert (out / "curve.png").exists()
    assert not list(out.glob("panel*"))


# ---------------------------------------------------------------- averages, rates, groups


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.05, 0.9])
def test_the_average_equals_that_of_an_explicit_loop(config, monkeypatch, decay):
    """The decay is at most (1 + step) / (10 + step)."""
    weights = []
    update = WeightAverage.update

    def recorded(self, module, step):
        if not step:
            weights.append({name: parameter.clone() for name, parameter in self.module.named_parameters()})
        weights.append({name: parameter.detach().clone() for name, parameter in module.named_parameters()})
        update(self, module, step)

    monkeypatch.setattr(WeightAverage, "update", recorded)
    distill(changed(config, ema=decay, lr=1e-2))
    state = state_of(config.out)
    assert len(weights) == 5
    for name, average in weights[0].items():
        for step, current in enumerate(weights[1:]):
            rate = min(decay, (1 + step) / (10 + step))
            average = rate * average + (1 - rate) * current[name]
        torch.testing.assert_close(state["average"][name], average, rtol=1e-5, atol=1e-7)
    for name in state["module"].keys() - weights[0].keys():  # buffers are not averaged
        assert torch.equal(state["average"][name], state["module"][name]), name
    assert (state["average"]["adapter.prior.stem.0.norm.num_batches_tracked"]) == 4
    if not decay:
        torch.testing.assert_close(state["average"], state["module"], rtol=0, atol=0)


def test_the_cosine_rate_warms_up_and_falls_to_nearly_zero():
    config = TrainConfig("b", "i", "o", steps=14, warmup=4, lr=2.0)
    rates = [learning_rate(config, step) for step in range(14)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[9] == pytest.approx(1.0)  # half-way
    assert rates[13] == pytest.approx(1 + math.cos(math.pi * 0.9))
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert min(rates) > 0


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (3, 3), (3, 50), (5, 4)])
def test_rates_of_short_runs_are_positive_and_at_most_lr(steps, warmup):
    config = TrainConfig("b", "i", "o", steps=steps, warmup=warmup, lr=0.5)
    rates = [learning_rate(config, step) for step in range(steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[0] == (0.5 / warmup if warmup else 0.5)


@pytest.mark.parametrize(("steps", "low"), [(9, 3), (10, 4), (11, 4), (1, 1), (3, 1)])
def test_the_rate_of_the_release_is_a_tenth_for_the_first_third(steps, low):
    config = make_config({"backbone": "b", "images": "i", "out": "o", "steps": steps, "warmup": 5}, preset="release")
    rates = [learning_rate(config, step) for step in range(steps)]
    assert rates == pytest.approx([1e-4] * low + [1e-3] * (steps - low))


@pytest.mark.slow
def test_the_optimiser_uses_the_rate_of_every_step(config, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: (rates.append([group["lr"] for group in self.param_groups]), step(self))[1],
    )
    config = changed(config, warmup=2)
    distill(config)
    assert rates == [[learning_rate(config, number)] * 2 for number in range(4)]


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_matrices_and_kernels_decay_and_vectors_do_not(name, kind):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5), nn.LayerNorm(5))
    optimizer = make_optimizer(TrainConfig("b", "i", "o", optimizer=name, weight_decay=0.25, lr=0.5), module)
    assert type(optimizer) is kind
    decayed, plain = optimizer.param_groups
    assert [a is b for a, b in zip(decayed["params"], (module[0].weight, module[2].weight), strict=True)]
    assert len(plain["params"]) == 6
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.25, 0.0)
    assert decayed["lr"] == plain["lr"] == 0.5


def test_every_parameter_but_the_blend_is_trained(plain):
    groups = state_of(plain)["optimizer"]
    model = BrixelFeatures.from_pretrained(plain, device="cpu")
    count = sum(1 for part in (model.adapter, model.head) for _ in part.parameters()) - 2  # the blend is fitted
    assert sum(len(group["params"]) for group in groups["param_groups"]) == count
    moved = [bool(moments["exp_avg"].abs().max() > 0) for moments in groups["state"].values()]
    assert moved.count(False) == 0


@pytest.mark.slow
def test_the_release_preset_runs(config):
    settings = {**dataclasses.asdict(config), "optimizer": "adam"}
    chosen = {name: settings[name] for name in ("backbone", "images", "out", "teacher_px", "steps", "batch_size")}
    config = make_config({**chosen, "workers": 0, "device": "cpu", "drop_path": 0.3}, preset="release")
    distill(config)
    state = state_of(config.out)
    torch.testing.assert_close(state["average"], state["module"], rtol=0, atol=0)
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_gradients_are_clipped_to_the_norm_that_is_set(config, monkeypatch, clip_norm):
    norms = []
    step = torch.optim.AdamW.step

    def recorded(self):
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norms.append(float(nn.utils.get_total_norm(gradients)))
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    distill(changed(config, clip_norm=clip_norm))
    if clip_norm:
        assert norms == pytest.approx([0.5] * 4, rel=1e-4)
    else:
        assert min(norms) > 1


@pytest.mark.slow
def test_accumulated_micro_batches_are_one_large_batch(config, tmp_path):
    """With L1 only. The untrained head does not depend on the statistics of batch norm."""
    wide = changed(config, batch_size=4, accumulate=1, drop_path=0.0, edge=0.0, spectral=0.0, steps=1, warmup=0)
    distill(wide)
    distill(changed(wide, batch_size=2, accumulate=2, out=str(tmp_path / "narrow")))
    ours, theirs = metrics_of(wide.out), metrics_of(tmp_path / "narrow")
    for name in ("loss", "l1"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-6)
