"""Damaged files of ours, and of others that we read: each is used or refused as a BrixelError, in silence.

Time is bounded for each input, and memory for all inputs of a test.
"""

import functools
import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz.mutations import mutate
from fuzz.runner import Fuzz
from fuzz.text_mutations import Mutator, mutate_json, mutate_lines, mutate_safetensors, mutate_toml
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from brixel import BrixelError, BrixelFeatures, FeatureMap, FeatureTable, MapFolder, Reduce
from brixel.checkpoints.weight_files import read_tensors
from brixel.evaluate.datasets.depth_normals import read_measured
from brixel.evaluate.datasets.labelled import read_labelled
from brixel.evaluate.feature_cache import Features
from brixel.evaluate.feature_sources import FeatureSource
from brixel.evaluate.report import SOURCE_COLUMNS, Report
from brixel.evaluate.suite import run_suite
from brixel.evaluate.suite_file import Part, read_suite
from brixel.evaluate.tasks import Task
from brixel.extraction import extract_files
from brixel.extraction.map_folder import verify
from brixel.images.find_images import find_images
from brixel.train.checkpoint import TrainingState, load_state, save_state
from brixel.train.config import TrainConfig, make_config, read_settings, write_settings
from brixel.train.monitoring import Metrics
from brixel.train.teacher_cache import TeacherCache
from brixel.utils.memory import peak_bytes

pytestmark = pytest.mark.slow

COUNT = 150
"""Damaged inputs of each test; `BRIXEL_FUZZ` sets another number."""
_MEMORY_BYTES = 2**31  # what all inputs of a test may take, besides what is taken before

Files = Mapping[str, tuple[bytes, Mutator]]
"""The files of a folder by relative path: their content, and what damages them."""


@pytest.fixture
def damaged(fuzz: Fuzz, tmp_path: Path) -> Callable[..., None]:
    """A function that reads a folder many times, each time with damage in one of its files."""

    def run(name: str, files: Files, read: Callable[[Path], object], **options: Any) -> None:
        before = peak_bytes(torch.device("cpu")) or 0
        folder = tmp_path / "damaged"
        for path, (content, _) in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)

        def make_case(rng: random.Random) -> tuple[str, Callable[[], object]]:
            path = rng.choice(list(files))
            content, mutator = files[path]
            harm = mutator(rng, content)

            def use() -> None:
                try:
                    (folder / path).write_bytes(harm)
                    read(folder)
                finally:
                    (folder / path).write_bytes(content)

            return f"{path} ({harm[:60]!r})", use

        fuzz.run(name, make_case, count=COUNT, **options)
        taken = (peak_bytes(torch.device("cpu")) or 0) - before
        assert taken < _MEMORY_BYTES, f"{taken / 2**20:.0f} MiB more than before"

    return run


def folder_files(folder: Path, mutators: Mapping[str, Mutator]) -> dict[str, tuple[bytes, Mutator]]:
    """The files of a folder, by the mutator for their ending; others are left out."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in mutators]
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), mutators[path.suffix]) for path in paths}


@pytest.fixture(scope="module")
def model(backbone_folder: Path) -> BrixelFeatures:
    return BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu", short_side_px=28)


# ---------------------------------------------------------------- models and weights


def use_model(model: BrixelFeatures) -> None:
    pixels = torch.zeros(1, 3, 2 * model.patch_px, 2 * model.patch_px)
    with torch.no_grad():
        assert model(pixels).shape == (1, model.embed_dim, 8, 8)


@pytest.mark.parametrize("kind", ["fresh", "universal", "int8"])
def test_models(damaged, model, backbone_folder, tmp_path, kind) -> None:
    if kind == "universal":
        model = BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=28)
    model.save_pretrained(tmp_path / "model", include_backbone=True, weights="int8" if kind == "int8" else "float")
    files = folder_files(tmp_path / "model", {".json": mutate_json, ".safetensors": mutate_safetensors})
    damaged(f"models, {kind}", files, lambda folder: use_model(BrixelFeatures.from_pretrained(folder, device="cpu")))


def test_backbones_of_others(damaged, backbone_folder) -> None:
    files = folder_files(backbone_folder, {".json": mutate_json, ".safetensors": mutate_safetensors})
    files["preprocessor_config.json"] = (
        b'{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "rescale_factor": 0.00392, "do_rescale": true}',
        mutate_json,
    )
    damaged("backbones in folders", files, lambda folder: use_model(BrixelFeatures.from_backbone(folder, device="cpu")))


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        **{f"blocks.{index}.qkv.weight": torch.randn(6, 2) for index in range(3)},
        **{"norm.weight": torch.ones(2, dtype=torch.float16), "count": torch.tensor(3)},
    }


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_weights(damaged, tmp_path, new_format) -> None:
    nested = {"state_dict": weights(), "epoch": 3, "args": {"lr": 0.1, "name": "x"}}
    torch.save(nested, tmp_path / "weights.pth", _use_new_zipfile_serialization=new_format)
    mutator = functools.partial(mutate_pickled, path=tmp_path / "again.pth", new_format=new_format)
    files = {"weights.pth": ((tmp_path / "weights.pth").read_bytes(), mutator)}
    kind = "zip" if new_format else "pickle"
    damaged(f"pickled weights, {kind}", files, lambda folder: read_tensors(folder / "weights.pth"))


def test_shards_of_weights(damaged, tmp_path) -> None:
    names, state = list(weights()), weights()
    for number, keys in enumerate((names[:2], names[2:]), 1):
        save_file({key: state[key] for key in keys}, tmp_path / f"model-{number}.safetensors")
    index = {
        "metadata": {"total_size": 100},
        "weight_map": {k: f"model-{1 + (n > 1)}.safetensors" for n, k in enumerate(names)},
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    files = folder_files(tmp_path, {".json": mutate_json, ".safetensors": mutate_safetensors})
    damaged("shards of weights", files, read_tensors)


# ---------------------------------------------------------------- maps


def use_map(found: FeatureMap) -> None:
    assert found.features.ndim == 3
    repr(found)
    found.at([(0.5, 0.5)])


@pytest.mark.parametrize("ending", ["safetensors", "npy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps(damaged, tmp_path, ending, dtype) -> None:
    FeatureMap(torch.ones(4, 3, 2, dtype=dtype), (12, 8), (4.0, 4.0), {"model": "x"}).save(tmp_path / f"a.{ending}")
    mutators = {".json": mutate_json, ".safetensors": mutate_safetensors, ".npy": mutate}
    files = folder_files(tmp_path, mutators)
    damaged(f"maps, {ending}", files, lambda folder: use_map(FeatureMap.load(folder / f"a.{ending}")))


@pytest.mark.parametrize("steps", ["int8", "points", "basis"])
def test_reduced_maps_and_bases(damaged, tmp_path, steps) -> None:
    feature_map = FeatureMap(torch.rand(4, 3, 2), (12, 8), (4.0, 4.0), {"model": "x"})
    path = tmp_path / "a.safetensors"
    if steps == "int8":
        Reduce("int8")(feature_map).save(path)
    elif steps == "points":
        (Reduce.points([(1, 2), (3, 4)]) + "int8")(feature_map).save(path)
    else:
        Reduce("pca:2,int8").fit([feature_map]).save(path)
    read = {
        "int8": lambda folder: use_map(FeatureMap.load(folder / "a.safetensors")),
        "points": lambda folder: repr(FeatureTable.load(folder / "a.safetensors")),
        "basis": lambda folder: Reduce.load(folder / "a.safetensors")(feature_map),
    }
    damaged(f"reduced, {steps}", folder_files(tmp_path, {".safetensors": mutate_safetensors}), read[steps])


@pytest.mark.parametrize("reduce", [None, "pca:3,int8"])
@pytest.mark.parametrize("shard_bytes", [None, 10**5])
def test_folders_of_maps(damaged, model, image_path, tmp_path, shard_bytes, reduce, caplog) -> None:
    (tmp_path / "photos/sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        shutil.copy(image_path, tmp_path / "photos" / name)
    images = find_images([tmp_path / "photos"])
    extract_files(model, images, tmp_path / "maps", shard_bytes=shard_bytes, reduce=reduce)
    caplog.clear()  # that the model is not trained
    files = folder_files(tmp_path / "maps", {".jsonl": mutate_lines, ".safetensors": mutate_safetensors})
    files["manifest-0.jsonl"] = (files["manifest-0.jsonl"][0], mutate_lines)

    def read(folder: Path) -> None:
        maps = MapFolder(folder)
        verify(folder)
        for name in maps:
            use_map(maps[name])

    damaged(f"folders of maps, {'files' if shard_bytes is None else 'shards'}", files, read)


# ---------------------------------------------------------------- training


def test_teacher_caches(damaged) -> None:
    header = {
        "format_version": 1,
        "fingerprint": {"count": 3, "dtype": "float16", "teacher": {"width": 2}, "crops": {"mean": [0.5, 0.5, 0.5]}},
        **{"teacher_shape": [2, 4, 4], "student_shape": [3, 8, 8]},
    }
    done = {"crops": 3, "skipped": ["photos/a.png"]}
    files: Files = {
        "header.json": (json.dumps(header).encode(), mutate_json),
        "done.json": (json.dumps(done).encode(), mutate_json),
        "teacher.bin": (bytes(3 * 2 * 4 * 4 * 2), mutate),
        "student.bin": (bytes(3 * 3 * 8 * 8 * 2), mutate),
    }

    def read(folder: Path) -> None:
        cache = TeacherCache(folder)
        for index in (0, len(cache) - 1):
            student, teacher = cache[index]
            assert student.ndim == teacher.ndim == 3

    damaged("teacher caches", files, read)


def training_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return {"module": module, "optimizer": optimizer}


def mutate_pickled(rng: random.Random, content: bytes, path: Path, new_format: bool = True) -> bytes:
    """A file of torch.save with damage to a value, or to the bytes of the file; ``path`` is a file to write to."""
    if rng.random() < 0.4:
        return mutate(rng, content)
    path.write_bytes(content)
    state = torch.load(path, weights_only=True)
    group: Any = state
    while True:
        keys = list(group) if isinstance(group, dict) else list(range(len(group)))
        key = rng.choice(keys)
        if not isinstance(group[key], dict | list) or not group[key] or rng.random() < 0.2:
            break
        group = group[key]
    odd = (
        None,
        True,
        -1,
        0,
        1.5,
        float("nan"),
        2**70,
        "x",
        [],
        {},
        [1, 2],
        {"a": 1},
        (1,),
        torch.ones(3),
        torch.ones(()),
    )
    odd_tensors = (torch.ones(2, 2, dtype=torch.int8), torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.complex64))
    if rng.random() < 0.2 and isinstance(group, dict):
        del group[key]
    else:
        group[key] = rng.choice((*odd, *odd_tensors))
    torch.save(state, path, _use_new_zipfile_serialization=new_format)
    return path.read_bytes()


def test_training_states(damaged, tmp_path) -> None:
    config, path = TrainConfig(backbone="b", images=("i",), out="o"), tmp_path / "state.pt"
    save_state(path, config, TrainingState(3, 0.5, 1), training_parts())
    files = {"state.pt": (path.read_bytes(), functools.partial(mutate_pickled, path=path))}

    def read(folder: Path) -> None:
        parts = training_parts()
        load_state(folder / "state.pt", config, parts, processes=1)
        parts["module"](torch.randn(4, 3)).square().sum().backward()
        parts["optimizer"].step()

    damaged("training states", files, read)


def test_settings(damaged, tmp_path) -> None:
    write_settings(tmp_path / "train.toml", TrainConfig(backbone="b", images=("i", "j"), out="o", sizes=(64, 128)))
    files = folder_files(tmp_path, {".toml": mutate_toml})
    damaged("settings of a run", files, lambda folder: make_config(read_settings(folder / "train.toml")))


def test_metrics(damaged) -> None:
    lines = [{"step": n, "loss": 0.5, "lr": 1e-3, "cosine": 0.1, "bilinear_cosine": 0.1} for n in range(1, 5)]
    files: Files = {"m.jsonl": ("".join(f"{json.dumps(line)}\n" for line in lines).encode(), mutate_lines)}
    damaged("metrics", files, lambda folder: Metrics(folder / "m.jsonl", 3).records())


# ---------------------------------------------------------------- evaluation


def test_suites(damaged, tmp_path) -> None:
    text = """
cache = "cache"
[models.tiny]
model = "brixel-tiny"
[models."org/name"]
backbone = "org/name"
architecture = "dinov2-small"
[[run]]
task = "fidelity"
images = ["photos", "more"]
teacher_px = [512, 1024]
sources = ["bilinear", "student"]
[[run]]
task = "segmentation"
models = ["tiny"]
data = "data"
layout = "voc2012"
train = "train"
val = "val"
teacher_px = 512
steps = 100
limit = 10
boundary_px = 4
"""
    files: Files = {"suite.toml": (text.encode(), mutate_toml)}
    damaged("suites", files, lambda folder: [part.key for part in read_suite(folder / "suite.toml")])


def test_parts_of_suites(damaged, tmp_path, monkeypatch) -> None:
    """Every 10th figure is made: they take longer than all else."""
    made: list[int] = []

    def figure(draw: Callable[[], object], path: Path) -> bool:
        made.append(1)
        return len(made) % 10 == 1 and draw() is not None

    monkeypatch.setattr("brixel.evaluate.suite.save_plot", figure)
    columns = {**SOURCE_COLUMNS, "cosine": ("cosine", ".4f"), "better": ("better in", "of"), "r2": ("R2", ".3f")}
    columns |= {"teacher_px": ("teacher's", "d"), **{f"m{index}": (f"metric {index}", ".3g") for index in range(8)}}
    row = {
        "model": "m",
        "image_px": 14,
        "teacher_px": 56,
        "cosine": 0.5,
        "cosine_interval": [0.4, 0.6],
        "better": [1, 2],
    }
    rows = [{**row, "source": source} for source in ("bilinear", "student")]
    images = tmp_path / "photos"
    images.mkdir()
    Image.new("RGB", (20, 20)).save(images / "a.png")
    parts = [Part("m", {"backbone": "b"}, Task("fidelity", (px,), images=(images,))) for px in (56, 112)]
    report = Report("fidelity", "Fidelity", columns, rows, "1 image; 2026-01-01.", ["a note"], {"images": ["a"]})
    content = json.dumps({**report.content("command"), "model_files": None}).encode()
    files: Files = {f"parts/{part.key}.json": (content, mutate_json) for part in parts}

    def fail(table: Mapping[str, str]) -> BrixelFeatures:
        raise BrixelError("the model of a part has changed")

    damaged("parts of suites", files, lambda folder: run_suite(parts, folder, "command", fail, lambda line: None))


def test_feature_caches(damaged, tmp_path) -> None:
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.ones((3, 4, 4), np.float16))
    source = FeatureSource("x", lambda pixels: pixels, 8)
    files = folder_files(tmp_path, {".npy": mutate})

    def read(folder: Path) -> None:
        assert Features(source, [folder / "a.npy", folder / "b.npy"]).batch([0, 1]).shape[0] == 2

    damaged("feature caches", files, read)


def mutate_list(rng: random.Random, content: bytes) -> bytes:
    """A list of VOC with damage to a line, or to its bytes."""
    lines = content.decode().splitlines(keepends=True)
    if rng.random() < 0.5:
        return mutate(rng, content)
    odd = (
        "\n",
        "\r\n",
        "../../x\n",
        "/etc/passwd\n",
        "a b c\n",
        "a\0b\n",
        "a" * 5000 + "\n",
        "p0.jpg\n",
        ".\n",
        "\ufeff",
    )
    lines[rng.randrange(len(lines))] = rng.choice(odd)
    return "".join(lines).encode()


def test_data_sets(damaged, tmp_path) -> None:
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for folder in ("images", "masks", "depth", "JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "duck"):
        (root / folder).mkdir(parents=True)
    photograph = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    mask = Image.fromarray(rng.integers(0, 3, (12, 16)).astype(np.uint8))
    for name in ("images/a.jpg", "images/b.png", "JPEGImages/p0.jpg"):
        photograph.save(root / name)
    for name in ("masks/a.png", "masks/b.png", "SegmentationClass/p0.png"):
        mask.save(root / name)
    np.save(root / "depth/a.npy", rng.random((12, 16)).astype(np.float32) + 1)
    Image.fromarray((rng.random((12, 16)) * 5000 + 900).astype(np.uint16)).save(root / "depth/b.png")
    (root / "classes.json").write_text('["a", "b", "c"]')
    (root / "ImageSets/Segmentation/val.txt").write_text("p0\n/JPEGImages/p0.jpg /SegmentationClass/p0.png\n\n")
    mutators: dict[str, Mutator] = {".json": mutate_json, ".txt": mutate_list}
    mutators |= dict.fromkeys((".jpg", ".png", ".npy"), mutate)

    def read(folder: Path) -> None:
        for data in (
            read_labelled("plain", folder, ""),
            read_labelled("voc2012", folder, "val"),
            read_measured("depth", "plain", folder, ""),
        ):
            for index in range(len(data.samples)):
                assert data.target(index).ndim in (2, 3)

    damaged("data sets", folder_files(root, mutators), read)
