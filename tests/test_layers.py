"""Imports point one way: a module imports only from layers above its own, or from its own row where that says so."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import brixel

PACKAGE = Path(brixel.__file__).parent

LAYERS = (
    "errors",
    "utils",
    "backbones",
    "feature_maps",
    "model",
    "images",
    "checkpoints",
    "inference",
    "brixel_features",
    "data",
    "probe",
    "video",
    "extraction",
    "distributed",
    "evaluate",
    "train",
    "cli",
)
"""The folders and files of the package: a row imports from rows above it, and from itself without a circle."""
OUTSIDE = {"__init__", "__main__"}


@functools.cache
def modules() -> dict[str, Path]:
    names = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


@functools.cache
def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "brixel":
            found |= {f"{node.module}.{each.name}" for each in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
    return {name.removeprefix("brixel.") for name in found} & set(modules())


def test_every_folder_has_a_layer():
    assert {name.split(".")[0] for name in modules()} - OUTSIDE == set(LAYERS)


def test_the_folder_list_stays_short():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__", "__init__.py", "__main__.py", "py.typed"}
    assert len(entries) <= 18, entries


def test_imports_point_upwards():
    inner = {name: path for name, path in modules().items() if name not in OUTSIDE}
    wrong = [
        f"{name} imports {other}"
        for name, path in inner.items()
        for other in imported(path)
        if LAYERS.index(other.split(".")[0]) > LAYERS.index(name.split(".")[0])
    ]
    assert not wrong


def test_imports_make_no_circle():
    graph = {name: imported(path) - OUTSIDE - {name} for name, path in modules().items() if name not in OUTSIDE}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_batching_the_patch_grid_and_tiling_know_no_model():
    know_none = ("inference.batching", "images.patch_grid", "inference.memory.tiling")
    assert set().union(*(imported(modules()[name]) for name in know_none)) <= {"errors", "inference", "images"}


@pytest.mark.slow
def test_importing_changes_nothing_global_and_brings_no_optional_package():
    """Flags, warning filters, logging, random state, threads and the environment are as `import torch` leaves them.

    Optional packages are not even imported for a foreign backbone, nor the Hub's client for the bundled model.
    """
    program = """
import logging, os, random, warnings
import numpy, torch, PIL.Image, PIL.ImageFont, PIL.ImageDraw, safetensors.torch
def state():
    backends = torch.backends
    return (
        list(warnings.filters), logging.root.level, list(logging.root.handlers), dict(os.environ),
        torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
        backends.cudnn.benchmark, backends.cudnn.deterministic,
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(),
        torch.initial_seed(), random.getstate(), numpy.random.get_state()[1].tolist(), PIL.Image.MAX_IMAGE_PIXELS,
    )
before = state()
import sys
loaded = set(sys.modules)
import pytest

import brixel
assert state() == before, [pair for pair in zip(before, state()) if pair[0] != pair[1]]
late = {"transformers", "timm", "tqdm", "huggingface_hub", "av"} & (set(sys.modules) - loaded)
assert not late, late
from brixel.backbones.wrappers import as_backbone
try:  # told from those of other packages without importing them
    as_backbone(torch.nn.Linear(1, 1))
except ValueError:
    pass
brixel.BrixelFeatures.from_pretrained("brixel-tiny", device="cpu")  # the bundled model
late = {"transformers", "timm", "huggingface_hub"} & (set(sys.modules) - loaded)
assert not late, late
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
