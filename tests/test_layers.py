"""Imports point one way: a module imports only from layers above its own, or from its own row where that says so."""

import ast
import subprocess
import sys
from pathlib import Path

import brixel

PACKAGE = Path(brixel.__file__).parent

LAYERS = (
    {"errors", "atomic", "ahead"},
    {
        "pca",
        "geometry",
        "deformable",
        "devices",
        "extraction.share",
        "key_map",
        "live_bytes",
        "modes",
        "rows",
        "sizes",
        "tiling",
        "toml_file",
        "pictures",
        "crops",
        "losses",
        "backbones.positions",
        "backbones.vit_config",
    },
    {
        "feature_map",
        "pixels",
        "adapter",
        "checkpoints",
        "model_table",
        "backbones.vit",
        "backbones.key_maps",
        "backbones.protocol",
    },
    {
        "decoding",
        "head",
        "engine",
        "hub",
        "map_file",
        "backbones.huggingface",
        "backbones.foreign",
        "backbones.vit_pieces",
    },
    {"images", "student", "release", "sources", "backbones.loading"},
    {"config", "pieces"},
    {"ways"},
    {"memory_plan", "preparation"},
    {"extraction.manifest"},
    {"extraction.outputs", "extraction.progress"},
    {"extraction.map_folder", "extraction.todo"},
    {"bounded"},
    {"file_backbone", "module_backbone", "card", "dense_features"},
    {"saving", "panel"},
    {"publish"},
    {"features"},
    {"extraction.run", "benchmark", "describe", "evaluate.bootstrap", "evaluate.metrics", "evaluate.report"},
    {"memory_table", "throughput", "evaluate.datasets", "evaluate.sources"},
    {"limit_table", "evaluate.diagram", "evaluate.feature_store", "evaluate.normals_from_depth"},
    {
        "evaluate.cost",
        "evaluate.cost_plot",
        "evaluate.fidelity",
        "evaluate.pictures",
        "evaluate.matching",
        "evaluate.measured",
        "evaluate.probe",
        "evaluate.report_plot",
    },
    {"evaluate.segmentation", "evaluate.shape"},
    {"evaluate.tasks"},
    {"evaluate.suite_file"},
    {"evaluate.suite"},
    {"train.config", "train.data", "train.distributed", "train.watch"},
    {"train.cache", "train.state", "train.facts", "train.recipe", "train.start"},
    {"train.batches", "train.progress_pictures", "train.validation"},
    {"train.loop"},
    {"train.plan"},
    {"commands.options"},
    {"commands.use", "commands.throughput", "commands.make", "commands.evaluate", "commands.plan"},
    {"cli"},
    {"__main__"},
)
LAYER_OF = {name: row for row, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    names = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    return {name: path for path, name in names.items() if not name.endswith("__init__")}


def imported(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "brixel":
            found |= {f"brixel.{each.name}" for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name.removeprefix("brixel.") for name in found if name.startswith("brixel.")} & set(LAYER_OF)


def test_every_module_has_a_layer():
    assert set(modules()) == set(LAYER_OF)


def test_imports_point_upwards():
    wrong = [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in imported(path)
        if LAYER_OF[other] >= LAYER_OF[name]
    ]
    assert not wrong


def test_the_engine_geometry_and_tiling_know_no_model():
    know_none = ("engine", "geometry", "tiling")
    assert set().union(*(imported(modules()[name]) for name in know_none)) <= {"errors"}


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
import brixel
assert state() == before, [pair for pair in zip(before, state()) if pair[0] != pair[1]]
late = {"transformers", "timm", "tqdm", "huggingface_hub"} & (set(sys.modules) - loaded)
assert not late, late
from brixel.backbones.foreign import as_backbone
try:  # told from those of other packages without importing them
    as_backbone(torch.nn.Linear(1, 1))
except ValueError:
    pass
brixel.BrixelFeatures.from_pretrained(device="cpu")  # the bundled model
late = {"transformers", "timm", "huggingface_hub"} & (set(sys.modules) - loaded)
assert not late, late
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
