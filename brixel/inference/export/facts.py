"""What an exported file says of its model: the facts that a program without brixel needs to use it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from brixel.backbones.registry import list_models
from brixel.errors import BrixelError
from brixel.inference.dense_features import DenseFeatures
from brixel.utils.devices import dtype_name
from brixel.utils.fields import Rule, check_table, json_table, number, optional, several, text, whole_number
from brixel.utils.structured_files import checking_content, parse_json

KEY = "brixel"
"""The entry of a file's metadata that holds the facts, as JSON."""
INPUT, OUTPUT = "pixels", "features"
_COLOURS = several(number(), "three finite numbers", count=3)
_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("version", "backbone", "adapter", "dtype", "made_with"), text()),
    **dict.fromkeys(("patch_px", "short_side_px", "scale", "width"), whole_number(1)),
    **{"stride_px": number(above=0), "mean": _COLOURS, "std": _COLOURS},
    "licence": optional(text()),
    **dict.fromkeys(("commits", "input", "output"), json_table()),
    "parity": optional(json_table()),
}


def facts_of(
    model: DenseFeatures, dtype: torch.dtype, shapes: tuple[list[int | str], list[int | str]], version: str
) -> dict[str, Any]:
    """The facts of a model, as plain values; ``_px`` are pixels.

    Args:
        model: The model.
        dtype: Of the file's input and output.
        shapes: Of both; names stand for sizes that are free.
        version: Of brixel.
    """
    config, vit = model.config, model.config.backbone.vit
    known = {row.name: row for row in list_models()}.get(config.backbone.architecture or "")
    name = dtype_name(dtype)
    return {
        "version": version,
        "made_with": f"brixel {version}, torch {torch.__version__}",
        "backbone": config.backbone.title,
        "adapter": config.adapter.kind,
        "commits": dict(config.commits),
        "licence": known.licence if known else None,
        "width": vit.width,
        "patch_px": vit.patch_px,
        "scale": model.scale,
        "stride_px": model.stride_px,
        "short_side_px": config.adapter.short_side_px,
        "mean": list(vit.mean),
        "std": list(vit.std),
        "dtype": name,
        "input": {"name": INPUT, "dtype": name, "shape": shapes[0]},
        "output": {"name": OUTPUT, "dtype": name, "shape": shapes[1]},
        "parity": None,
    }


def parse_facts(content: str, path: Path) -> dict[str, Any]:
    """The facts in the metadata of a file. Raises DamagedFileError where they are not such."""
    with checking_content(path, "a file that brixel exported", "export the model again"):
        found = check_table("its metadata", parse_json(content, path), _RULES)
        for name in ("input", "output"):
            if not all(found[name].get(key) for key in ("name", "dtype", "shape")):
                raise BrixelError(f"its {name} lacks a name, a dtype or a shape")
        return found | {name: list(found[name]) for name in ("mean", "std")}


def as_text(facts: Mapping[str, Any]) -> str:
    """The facts as they are written into a file."""
    return json.dumps(facts, ensure_ascii=True)
