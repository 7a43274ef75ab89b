"""The backbone of a model: loaded from files or wrapped from a module, described for `config.json`, found again."""

import dataclasses
from collections.abc import Mapping
from os import PathLike

import torch
from torch import nn

from brixel.backbones.base import Backbone, device_and_dtype
from brixel.backbones.registry import KNOWN_BACKBONES
from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.backbones.wrappers import as_backbone, config_of
from brixel.checkpoints.fingerprint import check_fingerprint, fingerprint
from brixel.checkpoints.hub_download import Access
from brixel.checkpoints.huggingface_config import vit_config
from brixel.checkpoints.load_backbone import LoadedBackbone, load_backbone
from brixel.checkpoints.locate_files import ModelFiles, locate, locate_first
from brixel.checkpoints.model_folder import BACKBONE
from brixel.checkpoints.weight_files import load_into, read_tensors
from brixel.errors import BrixelError, CheckpointError
from brixel.model.config import BackboneConfig, BrixelConfig
from brixel.utils.devices import choose_device, choose_dtype


def load_from(
    place: ModelFiles, architecture: str | ViTConfig | None, dtype: torch.dtype, fields: Mapping[str, object]
) -> LoadedBackbone:
    """The backbone at a place; one that cannot be read is refused before its weights are fetched."""
    with place.reading():
        if architecture is None and place.path.is_dir():
            vit_config(place.path)
        place.fetch_weights()
        return load_backbone(place.path, architecture=architecture, dtype=dtype, fields=fields)


def describe_loaded(loaded: LoadedBackbone, place: ModelFiles) -> BackboneConfig:
    """What a config says of a backbone: where it was, then where it is published."""
    sources = dict.fromkeys([place.source, *_published(loaded.architecture)])
    return BackboneConfig(loaded.architecture, tuple(sources), loaded.vit.config, fingerprint(loaded.vit))


def resolve_backbone(
    place: ModelFiles, config: BrixelConfig, given: str | PathLike[str] | None, dtype: torch.dtype, access: Access
) -> tuple[Backbone, BrixelConfig]:
    """The backbone that a saved model needs, given by the user, beside it, or from its sources; and its config now."""
    ours = config.backbone
    architecture = ours.vit
    if isinstance(architecture, ForeignConfig):
        raise CheckpointError(
            f"{place.path} holds an adapter for {ours.title}, a module that is in no file of ours: build it and give "
            "it as from_pretrained(..., backbone=module)"
        )
    own = place.find(BACKBONE) if given is None else None
    if own is not None:
        with place.reading():
            vit = load_into(
                lambda: ViT(architecture), read_tensors(own), dtype, what=f"{own} does not fit {ours.title}"
            )
        check_fingerprint(ours, vit.requires_grad_(False), str(own))
        return vit, config
    if given is not None:
        found = locate(given, what="backbone", access=access)
        found.fetch_weights()
    else:
        published = " and ".join(_published(ours.architecture))
        told = f" (published as {published})" if published else ""
        missing = f"{place.path} holds an adapter without its backbone, {ours.title}{told}"
        found = locate_first(ours.sources, downloaded=place.snapshot is not None, access=access, missing=missing)
    with found.reading():
        vit = load_backbone(found.path, architecture=architecture, dtype=dtype).vit
    check_fingerprint(ours, vit, found.source)
    named = {source.partition("@")[0] for source in ours.sources}  # of which some other may have been taken before
    others = {name: commit for name, commit in config.commits.items() if name not in named}
    if given is not None:
        ours = dataclasses.replace(ours, sources=tuple(dict.fromkeys([found.source, *ours.sources])))
    return vit, dataclasses.replace(config, backbone=ours, commits={**others, **found.commits})


def wrap_module(module: nn.Module, settings: Mapping[str, object]) -> tuple[Backbone, BackboneConfig]:
    """The module as a frozen backbone, and what a config says of it; of ``settings`` it takes mean and std alone."""
    wrong = [name for name, value in settings.items() if value not in (None, False) and name not in ("mean", "std")]
    if wrong:
        raise BrixelError(f"{', '.join(wrong)}: not for a backbone that is a module, {type(module).__name__}")
    normalisation = {name: settings[name] for name in ("mean", "std") if name in settings}
    backbone = as_backbone(module, **normalisation)  # type: ignore[arg-type]
    return backbone, BackboneConfig(None, (), config_of(backbone), fingerprint(backbone))


def match_module(ours: BackboneConfig, module: nn.Module) -> Backbone:
    """The module as the backbone that a saved adapter was made for; CheckpointError where it is another."""
    knows_its_own = hasattr(module, "block_maps")
    backbone = as_backbone(module) if knows_its_own else as_backbone(module, mean=ours.vit.mean, std=ours.vit.std)
    theirs = config_of(backbone)
    for name in ("width", "depth", "patch_px", "mean", "std"):
        expected, came = getattr(ours.vit, name), getattr(theirs, name)
        if came != expected:
            raise CheckpointError(
                f"the adapter is for {ours.title}, whose {name} is {expected}; that of the {type(module).__name__} "
                f"given is {came}"
            )
    check_fingerprint(ours, backbone, f"backbone={type(module).__name__}")
    return backbone


def move_module(
    module: nn.Module, device: str | torch.device, dtype: str | torch.dtype
) -> tuple[torch.device, torch.dtype]:
    """Move a module to a device and dtype, where "auto" leaves it as it is; where it lies then."""
    if device != "auto":
        module.to(choose_device(device))
    if dtype != "auto":
        module.to(choose_dtype(dtype, device_and_dtype(module)[0]))
    return device_and_dtype(module)


def _published(architecture: str | None) -> tuple[str, ...]:
    """The repositories of a backbone of the table of models; none of any other."""
    known = KNOWN_BACKBONES.get(architecture or "")
    return known.sources if known else ()
