"""The folder of a saved model: writing it, and reading its `config.json`."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from brixel.backbones.registry import find_backbone
from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.checkpoints.int8_weights import quantised_state
from brixel.checkpoints.model_card import model_card, write_card
from brixel.checkpoints.weight_files import write_tensors
from brixel.errors import BrixelError, CheckpointError
from brixel.model.config import AdapterConfig, BackboneConfig, BrixelConfig
from brixel.model.student import Student
from brixel.utils.atomic_files import write_text
from brixel.utils.fields import check_field, check_names, one_of, short_repr
from brixel.utils.structured_files import read_json

FORMAT_VERSION = 1
CONFIG, ADAPTER, BACKBONE = "config.json", "adapter.safetensors", "backbone.safetensors"
FLOAT, INT8 = "float", "int8"

_ADDED = ("int8", "kind", "generation", "grids", "own_share")
"""Fields that version 0.2 does not know: left out where they say nothing, so that it reads what it can read."""

Section = TypeVar("Section")


def save(
    student: Student,
    config: BrixelConfig,
    folder: Path,
    *,
    include_backbone: bool,
    weights: str = FLOAT,
    card: str | None = None,
) -> None:
    """Write weights, card and, last, `config.json`; each file whole or not at all.

    ``weights``: of the backbone, "float" or "int8". ``card``: its text; where None, that of a model that is loaded
    from this folder.
    """
    check_includable(config.backbone, include_backbone)
    config = config_of_weights(config, include_backbone, weights)
    if folder.exists() and not folder.is_dir():
        raise BrixelError(f"{folder} is a file; expected a folder to write a model into")
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / ADAPTER, student.upsampler.state_dict())
    if include_backbone:
        backbone = student.backbone
        assert isinstance(backbone, nn.Module)
        write_tensors(folder / BACKBONE, quantised_state(backbone) if weights == INT8 else backbone.state_dict())
    else:
        (folder / BACKBONE).unlink(missing_ok=True)  # of another model, saved here before
    write_card(folder, card or model_card(config, folder.resolve().name, whole=include_backbone))
    write_config(folder / CONFIG, config)


def config_of_weights(config: BrixelConfig, include_backbone: bool, weights: str) -> BrixelConfig:
    """The config of a model that is saved with such weights. BrixelError where they do not go together."""
    check_field("weights", weights, one_of(FLOAT, INT8))
    if weights == FLOAT:
        return config
    if not include_backbone:
        raise BrixelError("weights='int8' is how the backbone is stored; expected include_backbone=True with it")
    return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, int8=True))


def check_includable(backbone: BackboneConfig, include_backbone: bool) -> None:
    """Raise BrixelError where the weights of a backbone should be written whose code is not brixel's."""
    if include_backbone and isinstance(backbone.vit, ForeignConfig):
        raise BrixelError(
            f"the backbone was given as a module, {backbone.title}, and cannot be included: save without "
            "include_backbone, and load with from_pretrained(folder, backbone=module)"
        )


def write_config(path: Path, config: BrixelConfig) -> None:
    """Write `config.json`, whole or not at all."""
    content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}
    for section, part in ((content["backbone"], config.backbone), (content["adapter"], config.adapter)):
        for field in dataclasses.fields(part):
            if field.name in _ADDED and section[field.name] == field.default:
                del section[field.name]
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_config(path: Path) -> BrixelConfig:
    """Read `config.json`; CheckpointError where it is missing, not ours, damaged, or of a newer format."""
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} holds no {path.name}: expected a folder written by save_pretrained; for a backbone use "
            "from_backbone"
        )
    content = read_json(path)
    version = content.pop("format_version", None)
    if type(version) is not int:
        raise CheckpointError(f"{path} is no brixel model's, it lacks format_version; for a backbone use from_backbone")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {short_repr(version)}, newer than {FORMAT_VERSION}, which we read: update brixel"
        )
    try:
        backbone = dict(_table("backbone", content.pop("backbone", None)))
        if "source" in backbone:  # written before there could be several
            backbone["sources"] = (backbone.pop("source"),)
        values = _table("backbone.vit", backbone.pop("vit", None))
        vit = _section(ForeignConfig if "class_name" in values else ViTConfig, values)
        config = BrixelConfig(
            _section(BackboneConfig, {**backbone, "vit": vit}),
            _section(AdapterConfig, _table("adapter", content.pop("adapter", None))),
            content.pop("commits", {}),
            content.pop("training", {}),
        )
    except BrixelError as error:
        raise CheckpointError(f"{path} does not describe a model: {error}") from error
    _check_architecture(path, config.backbone)
    if content:
        raise CheckpointError(f"{path} has unknown parts: {', '.join(content)[:200]}")
    return config


def _check_architecture(path: Path, backbone: BackboneConfig) -> None:
    """Raise CheckpointError where the named architecture has other sizes than are stated."""
    known = find_backbone(backbone.architecture or "")
    if known is None:
        return
    for name in ("width", "depth", "patch_px"):
        expected, found = getattr(known.vit, name), getattr(backbone.vit, name)
        if found != expected:
            raise CheckpointError(
                f"{path} names the architecture {known.name}, whose {name} is {expected}, and states {found}"
            )


def _table(name: str, values: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise BrixelError(f"{name} is {short_repr(values)}; expected a table")
    return values


def _section(kind: type[Section], values: dict[str, Any]) -> Section:
    """A dataclass from its fields by name; an unknown or a missing name is an error."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    check_names(values, [field.name for field in fields], f"{kind.__name__} has no")
    required = [field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise BrixelError(f"{kind.__name__} lacks {', '.join(missing)}")
    return kind(**values)
