"""A model's folder: what `save_pretrained` writes, and what there must be for it to load again elsewhere."""

from pathlib import Path

from torch import nn

from brixel.backbones.vit_config import ForeignConfig
from brixel.card import model_card, write_card
from brixel.checkpoints import write_tensors
from brixel.config import ADAPTER, BACKBONE, CONFIG, BackboneConfig, BrixelConfig, write_config
from brixel.errors import BrixelError
from brixel.student import Student


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
    write_tensors(folder / ADAPTER, nn.ModuleDict({"adapter": student.adapter, "head": student.head}).state_dict())
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
