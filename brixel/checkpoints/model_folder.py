"""A model's folder: what `save_pretrained` writes, and its `config.json` read back."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.checkpoints.model_card import model_card, write_card
from brixel.checkpoints.weight_files import write_tensors
from brixel.errors import BrixelError, CheckpointError, DamagedFileError, did_you_mean
from brixel.model.config import AdapterConfig, BackboneConfig, BrixelConfig
from brixel.model.student import Student
from brixel.utils.atomic_files import write_text

FORMAT_VERSION = 1
CONFIG, ADAPTER, BACKBONE = "config.json", "adapter.safetensors", "backbone.safetensors"

Section = TypeVar("Section")


def save(
    student: Student, config: BrixelConfig, folder: Path, *, include_backbone: bool, card: str | None = None
) -> None:
    """Write config, weights and card; each file whole or not at all, `config.json` last.

    ``card``: its text; where None, that of a model which is loaded from this folder.
    """
    check_includable(config.backbone, include_backbone)
    if folder.exists() and not folder.is_dir():
        raise BrixelError(f"{folder} is a file; expected a folder to write a model into")
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / ADAPTER, student.upsampler.state_dict())
    if include_backbone:
        write_tensors(folder / BACKBONE, student.backbone.state_dict())
    else:
        (folder / BACKBONE).unlink(missing_ok=True)  # of a model that was here before
    write_card(folder, card or model_card(config, folder.resolve().name, whole=include_backbone))
    write_config(folder / CONFIG, config)


def check_includable(backbone: BackboneConfig, include_backbone: bool) -> None:
    """Raise BrixelError where a backbone is to be written whose code is in the user's program alone."""
    if include_backbone and isinstance(backbone.vit, ForeignConfig):
        raise BrixelError(
            f"the backbone is a module of your own program, {backbone.title}, and cannot be written "
            "along: save without include_backbone, and load with from_pretrained(folder, backbone=module)"
        )


def write_config(path: Path, config: BrixelConfig) -> None:
    """Write `config.json`, whole or not at all."""
    content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_config(path: Path) -> BrixelConfig:
    """Read `config.json`; CheckpointError where it is missing, not ours, damaged, or of a newer format."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} holds no {path.name}: expected a folder written by save_pretrained")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFileError(f"{path} is not JSON ({error})") from error
    version = content.pop("format_version", None) if isinstance(content, dict) else None
    if type(version) is not int:
        raise CheckpointError(f"{path} is no brixel model's: it lacks format_version; for a backbone use from_backbone")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {version}, newer than {FORMAT_VERSION}, which we read: update brixel")
    try:
        backbone = dict(content.pop("backbone"))
        if "source" in backbone:  # as it was written before there could be several
            backbone["sources"] = (backbone.pop("source"),)
        values = backbone.pop("vit")
        vit = _section(ForeignConfig, values) if "class_name" in values else _section(ViTConfig, values)
        config = BrixelConfig(
            _section(BackboneConfig, {**backbone, "vit": vit}),
            _section(AdapterConfig, content.pop("adapter")),
            content.pop("commits", {}),
            content.pop("training", {}),
        )
    except (KeyError, TypeError, BrixelError) as error:
        raise CheckpointError(f"{path} does not describe a model: {error}") from error
    if content:
        raise CheckpointError(f"{path} has parts that we do not know: {', '.join(content)}")
    return config


def _section(kind: type[Section], values: dict[str, Any]) -> Section:
    """A dataclass from its fields; one that is not known, or missing without a default, is an error."""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise BrixelError(f"{kind.__name__} has no {name!r}; {did_you_mean(name, known)}")
    return kind(**values)
