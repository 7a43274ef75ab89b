"""Two processes with gloo train as one does with the same global batch; only rank 0 writes."""

import dataclasses
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import records_of, state_of
from PIL import Image, ImageDraw
from torch import nn

from brixel import BrixelError, BrixelFeatures
from brixel.train import TrainConfig, distill
from brixel.train.distributed import DistributedContext, all_reduce_mean, barrier, distributed_context, sync_batch_norm

pytestmark = pytest.mark.slow  # several processes, each of which imports torch
STEPS, RANKS, LR = 3, 2, 1e-4
MAPS_HW = (4, 5)

# The program of both processes: several process groups, one after the other, with a port each. Output goes to files.
PROGRAM = """
import faulthandler, json, os, sys
from pathlib import Path
import torch
import torch._dynamo  # DistributedDataParallel imports it: once, before the fork
from torch import nn
torch.set_num_threads(1)
from brixel import BrixelError, BrixelFeatures
from brixel.train import TrainConfig, distill
from brixel.train import trainer
from brixel.train.distributed import all_reduce_mean, barrier, distributed_context, sync_batch_norm

task = json.loads(sys.argv[1])
folder, ports = Path(task["folder"]), iter(task["ports"])
for rank in range(1, task["ranks"]):
    if os.fork() == 0:
        break
else:
    rank = 0
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(task["ranks"])}
os.environ["MASTER_ADDR"] = "127.0.0.1"
output = os.open(folder / f"output-{rank}", os.O_CREAT | os.O_WRONLY)
os.dup2(output, 1)
os.dup2(output, 2)
faulthandler.dump_traceback_later(240, exit=True)  # on a deadlock, print where and leave no process behind

def audit(event, args):  # files opened for writing, folders made, files renamed or removed
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        touched.append(f"{event} {args[:2]}")
    elif event == "open" and isinstance(args[0], (str, bytes, os.PathLike)) and args[2] & (os.O_WRONLY | os.O_RDWR):
        touched.append(f"open {args[0]}")
touched, results = [], {}

class Recorded(trainer.Trainer):
    def __init__(self, *args):
        super().__init__(*args)
        Recorded.last = self
trainer.Trainer = Recorded

def run(name, **options):
    os.environ["MASTER_PORT"] = next(ports)
    try:
        distill(TrainConfig(**task[name]), **options)
        return Recorded.last.module.state_dict()
    except (BrixelError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"

def batch_norm():
    os.environ["MASTER_PORT"] = next(ports)
    with distributed_context("cpu") as context:
        data = torch.load(folder / "batch-norm.pt")
        module = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6, momentum=0.3))
        module.load_state_dict(data["state"])
        module = sync_batch_norm(module, context)
        kinds = [type(layer).__name__ for layer in module]
        for x, y in zip(data["inputs"], data["weights"]):
            module.zero_grad()
            x, y = (values.chunk(context.world_size)[context.rank] for values in (x, y))
            x = x.clone().requires_grad_()
            (module(x) * y).sum().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        module.eval()
        barrier(context)
        mean = all_reduce_mean(torch.tensor([1.0 + context.rank, 4.0]), context)
        process = (context.rank, context.world_size, context.is_main, str(context.device))
        return {"kinds": kinds, "state": module.state_dict(), "x": x.grad, "gradients": gradients, "mean": mean,
                "process": process, "eval": module(data["inputs"][0])}

class Teacher:
    def __init__(self, fault=None, call=None):
        self.model = BrixelFeatures.from_backbone(task["backbone"], adapter="fresh", device="cpu")
        self.fault, self.call, self.calls = fault, call, 0
    def __call__(self, pixels):
        self.calls += len(pixels) > 1  # not those for validation, which rank 0 alone makes
        maps = self.model.backbone_features(pixels).clone()
        if self.calls == self.call and self.fault == "stop":
            raise RuntimeError("interrupted")
        if self.calls == self.call and rank == 1:
            maps[0, 0, 0, 0] = self.fault
        return maps

results["batch_norm"] = batch_norm()
sys.addaudithook(audit)
results["wide"] = run("wide")
results["cached"] = run("cached")
results["whole"] = run("whole", teacher=Teacher())
results["stopped"] = run("halved", teacher=Teacher("stop", 6))
results["halved"] = run("halved", teacher=Teacher())
results["nan"] = run("nan", teacher=Teacher(float("nan"), 3))
results["touched"] = touched[:]
results["group_left"] = torch.distributed.is_initialized()
torch.save(results, folder / f"results-{rank}.pt")
if rank:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def free_ports(number):
    """Free ports below those that a system hands out by itself: gloo listens on such ones, and could take these."""
    ports, candidate = [], random.SystemRandom().randrange(15_000, 30_000)
    while len(ports) < number:
        candidate += 1
        with socket.socket() as server:
            try:
                server.bind(("", candidate))
            except OSError:
                continue
            ports.append(str(candidate))
    return ports


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder, numbers = tmp_path_factory.mktemp("drawn"), np.random.default_rng(0)
    for number in range(10):
        image = Image.new("RGB", (160, 150), tuple(numbers.integers(0, 256, 3).tolist()))
        draw = ImageDraw.Draw(image)
        for _ in range(8):
            x, y = numbers.integers(0, 130, 2).tolist()
            draw.rectangle((x, y, x + 40, y + 30), fill=tuple(numbers.integers(0, 256, 3).tolist()))
        image.save(folder / f"{number}.png")
    return folder


def batch_norm_data():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6, momentum=0.3))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    inputs, weights = torch.randn(3, 4, 3, *MAPS_HW) * 2 + 5, torch.randn(3, 4, 6, *MAPS_HW)
    inputs[:, :2] += 3  # the shares of the processes differ
    return module, inputs, weights


@pytest.fixture(scope="module")
def task(backbone_folder, drawn, tmp_path_factory):
    """The task of the processes: the settings of their runs by name, folder, ports."""
    folder = tmp_path_factory.mktemp("distributed")
    common = {
        **{"backbone": str(backbone_folder), "images": str(drawn), "val_images": 2},
        **{"teacher_px": 112, "steps": STEPS, "batch_size": 2, "warmup": 2, "lr": LR, "drop_path": 0.0},
        **{"val_every": STEPS, "save_every": 2, "log_every": 1, "workers": 0, "device": "cpu"},
    }
    runs = {
        "wide": {"val": str(drawn)},
        "cached": {"val": str(drawn), "cache": 6},
        **{name: {"accumulate": 2, "drop_path": 0.3, "fit": 0} for name in ("whole", "halved")},
        "nan": {"generation": 1, "fit": 0},  # the second generation would read the crop before its first step
    }
    return {
        **{name: {**common, **settings, "out": str(folder / name)} for name, settings in runs.items()},
        **{"folder": str(folder), "ranks": RANKS, "ports": free_ports(7), "backbone": str(backbone_folder)},
    }


@pytest.fixture(scope="module")
def results(task):
    """The results of the processes, by rank."""
    folder = Path(task["folder"])
    module, inputs, weights = batch_norm_data()
    torch.save({"state": module.state_dict(), "inputs": inputs, "weights": weights}, folder / "batch-norm.pt")
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(task)], timeout=300)
    output = [path.read_text() for path in sorted(folder.glob("output-*"))]
    assert done.returncode == 0, "\n".join(output)
    return [torch.load(folder / f"results-{rank}.pt") for rank in range(RANKS)]


def alone(settings, out):
    """The same run by one process with the whole batch."""
    config = TrainConfig(**{**settings, "batch_size": RANKS * settings["batch_size"], "out": str(out)})
    distill(config)
    return state_of(out)


# ---------------------------------------------------------------- batch norm


def test_batch_norm_over_two_processes_is_that_of_the_whole_batch(results):
    module, inputs, weights = batch_norm_data()
    for x, y in zip(inputs, weights, strict=True):
        module.zero_grad()
        x = x.clone().requires_grad_()
        (module(x) * y).sum().backward()
    for rank in range(RANKS):
        found = results[rank]["batch_norm"]
        assert found["kinds"] == ["Conv2d", "CpuSyncBatchNorm", "ReLU", "CpuSyncBatchNorm"]
        torch.testing.assert_close(dict(found["state"]), dict(module.state_dict()), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["x"], x.grad.chunk(RANKS)[rank], rtol=1e-4, atol=1e-5)
    for name, parameter in module.named_parameters():  # without DistributedDataParallel, gradients are summands
        summed = sum(results[rank]["batch_norm"]["gradients"][name] for rank in range(RANKS))
        torch.testing.assert_close(summed, parameter.grad, rtol=1e-4, atol=1e-4)


def test_batch_norm_at_inference_needs_no_other_process(results):
    module, inputs, _ = batch_norm_data()
    module.load_state_dict(results[0]["batch_norm"]["state"])
    for rank in range(RANKS):
        torch.testing.assert_close(results[rank]["batch_norm"]["eval"], module.eval()(inputs[0]), rtol=1e-5, atol=1e-5)


def test_rank_world_size_and_means(results):
    for rank in range(RANKS):
        assert results[rank]["batch_norm"]["process"] == (rank, RANKS, rank == 0, "cpu")
        assert results[rank]["batch_norm"]["mean"].tolist() == [1.5, 4.0]
        assert not results[rank]["group_left"]


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", ["wide", "cached"])
def test_two_processes_train_as_one_with_the_whole_batch(task, results, tmp_path, name):
    """All losses on, batch norm and the directions of the edge loss over both: within 1e-5, running statistics too."""
    expected, found = alone(task[name], tmp_path / "alone"), state_of(task[name]["out"])
    for part in ("module", "average"):
        assert set(found[part]) == set(expected[part])
        for key, values in expected[part].items():
            difference = (found[part][key] - values).abs().double()
            # on some processors, in a few weights: Adam turns a gradient of rounding noise into a step of up to lr
            assert (difference > 1e-5).double().mean() < 1e-4, key
            assert difference.max() < LR, key
    moved = expected["module"]["head.out.weight"]  # initialised with zeros
    assert moved.abs().max() > 1e-4
    assert found["progress"]["step"] == expected["progress"]["step"] == STEPS
    ours, theirs = (records_of(out) for out in (task[name]["out"], tmp_path / "alone"))
    assert [set(record) for record in ours] == [set(record) for record in theirs]
    for record, other in zip(ours, theirs, strict=True):
        for key in record.keys() - {"pictures_per_s"}:
            assert record[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", ["wide", "cached", "whole"])
def test_all_processes_end_with_the_same_weights(task, results, name):
    written = state_of(task[name]["out"])["module"]
    for rank in range(RANKS):
        torch.testing.assert_close(dict(results[rank][name]), dict(written), rtol=0, atol=0)


def test_two_processes_that_were_stopped_resume_to_the_same_weights(task, results):
    messages = [results[rank]["stopped"] for rank in range(RANKS)]  # the slower one loses its connection
    assert "RuntimeError: interrupted" in messages
    assert all(isinstance(message, str) and message.startswith("RuntimeError: ") for message in messages)
    ours, theirs = state_of(task["halved"]["out"]), state_of(task["whole"]["out"])
    for part in ("progress", "module", "average", "optimizer"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    assert [record["step"] for record in records_of(task["halved"]["out"]) if "loss" in record] == [1, 2, 3]


def test_one_process_does_not_resume_the_run_of_two(task, results, tmp_path):
    shutil.copytree(task["wide"]["out"], tmp_path / "out")
    with pytest.raises(BrixelError, match="processes: 1, not 2"):
        distill(TrainConfig(**{**task["wide"], "out": str(tmp_path / "out")}))


def test_numbers_that_are_not_finite_in_one_process_stop_both_with_one_message(task, results):
    assert results[0]["nan"] == results[1]["nan"]
    assert results[0]["nan"].startswith("BrixelError: step 2: ")
    state = state_of(task["nan"]["out"])
    assert state["progress"]["step"] == 2
    assert all(tensor.isfinite().all() for tensor in state["module"].values())


def test_only_rank_0_writes_and_prints(task, results):
    folder = Path(task["folder"])
    first, second = ([event for event in results[rank]["touched"] if str(folder) in event] for rank in range(RANKS))
    assert second == []
    assert any("/state.pt'" in event for event in first)
    assert "step" not in (folder / "output-1").read_text()
    assert f"step {STEPS}/{STEPS}" in (folder / "output-0").read_text()


def test_the_result_of_two_processes_is_a_plain_model(task, results):
    model = BrixelFeatures.from_pretrained(task["wide"]["out"], device="cpu")
    assert {type(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {nn.BatchNorm2d}


# ---------------------------------------------------------------- one process


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with distributed_context("cpu") as context:
        assert context == DistributedContext(0, 1, torch.device("cpu"))
        assert context.is_main
        assert not torch.distributed.is_initialized()
        value = torch.tensor(3.0, requires_grad=True)
        assert all_reduce_mean(value, context) == 3
        assert not all_reduce_mean(value, context).requires_grad
        barrier(context)
        module = nn.Sequential(nn.BatchNorm2d(3))
        assert sync_batch_norm(module, context) is module
        assert type(module[0]) is nn.BatchNorm2d


def test_torchrun_with_one_process_is_one_process(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with distributed_context("cpu") as context:
        assert (context.rank, context.world_size) == (0, 1)
        assert not torch.distributed.is_initialized()


def test_the_context_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DistributedContext(0, 1, torch.device("cpu")).rank = 1


def test_the_environment_of_these_tests_describes_no_process_group():
    assert os.environ.get("WORLD_SIZE", "1") == "1"
