"""`brixel info` and `brixel models`: facts about a saved or exported model and about the known ones; no weights."""

import argparse
import difflib
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brixel.backbones.registry import find_backbone, list_models
from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ForeignConfig
from brixel.brixel_features import PathLike
from brixel.checkpoints.hub_download import portable_sources
from brixel.checkpoints.locate_files import BUNDLED_FOLDERS, ModelFiles, locate
from brixel.checkpoints.model_folder import ADAPTER, BACKBONE, CONFIG, read_config
from brixel.checkpoints.release_adapters import RELEASED
from brixel.checkpoints.weight_files import shapes_of
from brixel.cli.options import MODEL_HELP, add_flag, command, print_json, print_table
from brixel.errors import BrixelError
from brixel.inference.export.formats import is_exported, read_facts
from brixel.inference.export.parity import as_table
from brixel.model.upsampler import UPSCALE, make_upsampler


def add(commands: Any) -> None:
    """Add the commands."""
    text = "print the facts of a saved or an exported model"
    parser = command(commands, "info", _info, text, "brixel info brixel-small")
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}, or a file that `brixel export` wrote")
    add_flag(parser, "--json")

    text = "list the models that are known by name"
    parser = command(commands, "models", _models, text, "brixel models --json")
    add_flag(parser, "--json")


def model_facts(name_or_path: PathLike) -> dict[str, Any]:
    """The facts of a saved model, from its `config.json`, as plain values by name; ``_px`` are pixels.

    Args:
        name_or_path: A folder, a repository on the Hub, "brixel-small" or "brixel-tiny".

    Raises:
        BrixelError: As for :meth:`brixel.BrixelFeatures.from_pretrained`.
    """
    files = locate(name_or_path, what="model")
    config = read_config(files.need(CONFIG))
    backbone, adapter, vit = config.backbone, config.adapter, config.backbone.vit
    known = {row.name: row for row in list_models()}.get(backbone.architecture or "")
    foreign = isinstance(vit, ForeignConfig)
    return {
        "backbone": backbone.title,
        "backbone_module": vit.class_name if isinstance(vit, ForeignConfig) else None,
        "backbone_weights": None if foreign else _backbone_weights(files, backbone.sources),
        "backbone_sources": list(backbone.sources),
        "published_as": list(known.sources) if known else [],
        "licence": known.licence if known else None,
        "width": vit.width,
        "depth": vit.depth,
        "heads": None if isinstance(vit, ForeignConfig) else vit.heads,
        "patch_px": vit.patch_px,
        "cell_px": vit.patch_px / UPSCALE,
        "mean": list(vit.mean),
        "std": list(vit.std),
        "adapter": adapter.kind,
        "adapter_weights": _where(files, ADAPTER),
        "blocks": list(adapter.blocks),
        "short_side_px": adapter.short_side_px,
        "blend_of_blocks": adapter.blend,
        "residual_detour": adapter.residual_detour,
        "backbone_parameters": None if isinstance(vit, ForeignConfig) else _parameters(shapes_of(lambda: ViT(vit))),
        "upsampler_parameters": _parameters(shapes_of(lambda: make_upsampler(vit, adapter))),
        "training": dict(config.training),
    }


def known_models() -> list[dict[str, Any]]:
    """The facts of every model that is known by name, as plain values."""
    return [
        {
            "name": row.name,
            "aliases": list(row.aliases),
            "parameters": _parameters(shapes_of(functools.partial(ViT, row.vit))),
            "patch_px": row.vit.patch_px,
            "width": row.vit.width,
            "depth": row.vit.depth,
            "licence": row.licence,
            "gated": row.gated,
            "adapter": row.adapter,
            "released_adapters": [name for name, adapter in RELEASED.items() if adapter.backbone == row.name],
            "sources": list(row.sources),
        }
        for row in list_models()
    ]


def _where(files: ModelFiles, file: str) -> str | None:
    """Where a file of the model is, without a download; None where it is missing."""
    if files.snapshot is None:
        path = files.find(file)
        return None if path is None else str(path)
    return f"{file} of {files.source}, commit {files.snapshot.commit}" if files.snapshot.holds(file) else None


def _backbone_weights(files: ModelFiles, sources: Sequence[str]) -> list[str]:
    """Where the backbone's weights can be loaded from: the model's own file, or those sources that still can exist."""
    own = _where(files, BACKBONE)
    if own is not None:
        return [own]
    portable = portable_sources(sources)
    return [source for source in sources if source in portable or (not files.snapshot and Path(source).exists())]


def _parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _check_name(name: str) -> None:
    """Raise BrixelError for the name of a backbone, and for one that is close to a known name."""
    if name in BUNDLED_FOLDERS or Path(name).exists():
        return
    if backbone := find_backbone(name):
        raise BrixelError(
            f"{name!r} is a backbone, not a model with an adapter: `brixel models` lists its facts; to use it, call "
            f"`brixel show IMAGE --backbone {backbone.name}`"
        )
    names = [name for row in list_models() for name in (row.name, *row.aliases)]
    close = difflib.get_close_matches(name, names, n=1)
    if close and "/" not in name:  # another repository on the Hub may have the name of a known one
        raise BrixelError(f"unknown model {name!r}; did you mean {close[0]!r}?")


def _info(options: argparse.Namespace) -> int:
    path = Path(options.model)
    if is_exported(path) and not path.is_dir():
        return _exported_info(path, as_json=options.json)
    _check_name(options.model)
    facts = model_facts(options.model)
    if options.json:
        print_json(facts)
        return 0
    training = {f"training: {name}": text for name, text in facts.pop("training").items()}
    needed = {"adapter_weights"} if facts["backbone_module"] else {"adapter_weights", "backbone_weights"}
    facts |= {name: "missing" for name in needed if not facts[name]}
    print_table({name: value for name, value in facts.items() if value not in (None, [])} | training)
    return 0


def _exported_info(path: Path, *, as_json: bool) -> int:
    facts = read_facts(path)
    if as_json:
        print_json(facts)
        return 0
    parity = facts.pop("parity")
    for name in ("input", "output"):
        value = facts[name]
        facts[name] = f"{value['name']}, {value['dtype']}, {' x '.join(map(str, value['shape']))}"
    facts["commits"] = [f"{name}@{commit}" for name, commit in facts["commits"].items()]
    print_table({name: value for name, value in facts.items() if value not in (None, [])})
    print(as_table(parity) if parity else "not compared with the model when it was written")
    return 0


def _models(options: argparse.Namespace) -> int:
    models = known_models()
    if options.json:
        print_json(models)
        return 0
    names = ("name", "also", "parameters", "patch", "width", "licence", "gated", "adapter", "sources")
    rows = [names, *map(_row, models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    released = ", ".join(model["released_adapters"])
    return (
        model["name"],
        min(model["aliases"], key=len, default="-"),
        f"{model['parameters'] / 1e6:.2f} M",
        f"{model['patch_px']} px",
        str(model["width"]),
        model["licence"],
        "first source" if model["gated"] else "no",
        model["adapter"] or (f"released: {released}" if released else "train one"),
        ", ".join(model["sources"]) or "in the package",
    )
