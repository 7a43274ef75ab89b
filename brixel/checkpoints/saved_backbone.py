"""The backbone of a model: read from files or wrapped from a module, described for `config.json`, and found again."""

import dataclasses
from collections.abc import Mapping
from os import PathLike

import torch
from torch import nn

from brixel.backbones.base import Backbone, device_and_dtype
from brixel.backbones.registry import find_backbone
from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.backbones.wrappers import as_backbone, config_of, unwrapped
from brixel.checkpoints.fingerprint import check_fingerprint, fingerprint
from brixel.checkpoints.hub_download import Access
from brixel.checkpoints.huggingface_config import vit_config
from brixel.checkpoints.load_backbone import load_backbone
from brixel.checkpoints.locate_files import ModelFiles, locate, locate_first
from brixel.checkpoints.model_folder import BACKBONE
from brixel.errors import BrixelError, CheckpointError
from brixel.model.config import BackboneConfig, BrixelConfig
from brixel.utils.devices import choose_device, choose_dtype


def read_backbone(
    files: ModelFiles, architecture: str | ViTConfig | None, dtype: torch.dtype, fields: Mapping[str, object]
) -> tuple[ViT, BackboneConfig]:
    """A backbone and its description; ``architecture`` and ``fields`` as in :func:`load_backbone`."""
    if architecture is None and files.bundled:
        architecture = files.bundled.name
    with files.reading():
        if architecture is None:
            vit_config(files.path)  # refuses other architectures before their weights are fetched
        files.fetch_weights()
        loaded = load_backbone(files.path, architecture=architecture, dtype=dtype, fields=fields)
    sources = tuple(dict.fromkeys([files.source, *_published(loaded.architecture)]))
    return loaded.vit, BackboneConfig(loaded.architecture, sources, loaded.vit.config, fingerprint(loaded.vit))


def resolve_backbone(
    files: ModelFiles, config: BrixelConfig, given: str | PathLike[str] | None, dtype: torch.dtype, access: Access
) -> tuple[ViT, BrixelConfig]:
    """The backbone of a saved model, and the model's config with the sources and commits that were used.

    It is the one that the user gave, else `backbone.safetensors` in the model's folder, else the first of the config's
    sources that is available.
    """
    ours, vit = config.backbone, config.backbone.vit
    if isinstance(vit, ForeignConfig):
        raise CheckpointError(
            f"{files.path} holds an adapter for {ours.title}, a module that is in no file of ours: build it and give "
            "it as from_pretrained(..., backbone=module)"
        )
    included = files.find(BACKBONE) if given is None else None
    if included is not None:
        found = dataclasses.replace(files, path=included)
    elif given is not None:
        found = locate(given, what="backbone", access=access)
        found.fetch_weights()
    else:
        published = " and ".join(_published(ours.architecture))
        hint = f" (published as {published})" if published else ""
        missing = f"{files.path} holds an adapter without its backbone, {ours.title}{hint}"
        found = locate_first(ours.sources, downloaded=files.snapshot is not None, access=access, missing=missing)
    with found.reading():
        backbone = load_backbone(found.path, architecture=vit, dtype=dtype, adapter_for=ours.title).vit
    check_fingerprint(ours, backbone, str(included or found.source))
    if included is not None:
        return backbone, config
    if given is not None:
        config = config.with_sources(dict.fromkeys([found.source, *ours.sources]))
    previous = {source.partition("@")[0] for source in ours.sources}  # one of them may have been used when it was saved
    commits = {name: commit for name, commit in config.commits.items() if name not in previous}
    return backbone, dataclasses.replace(config, commits={**commits, **found.commits})


def wrap_module(module: nn.Module, settings: Mapping[str, object]) -> tuple[Backbone, BackboneConfig]:
    """A module as a frozen backbone, and its description. Of ``settings`` only mean and std apply to modules."""
    module = unwrapped(module)
    given = {name for name, value in settings.items() if value is not None and value is not False}
    wrong = [name for name in settings if name in given and name not in ("mean", "std")]
    if wrong:
        raise BrixelError(f"{', '.join(wrong)}: not for a backbone that is a module, {type(module).__name__}")
    normalisation = {name: settings[name] for name in ("mean", "std") if name in settings}
    backbone = as_backbone(module, **normalisation)  # type: ignore[arg-type]
    return backbone, BackboneConfig(None, (), config_of(backbone), fingerprint(backbone))


def match_module(ours: BackboneConfig, module: nn.Module) -> Backbone:
    """A module as the backbone that a saved adapter was made for; CheckpointError where it is another."""
    module = unwrapped(module)
    has_normalisation = hasattr(module, "block_maps")
    backbone = as_backbone(module) if has_normalisation else as_backbone(module, mean=ours.vit.mean, std=ours.vit.std)
    theirs = config_of(backbone)
    for name in ("width", "depth", "patch_px", "mean", "std"):
        expected, found = getattr(ours.vit, name), getattr(theirs, name)
        if found != expected:
            raise CheckpointError(
                f"the adapter is for {ours.title}, whose {name} is {expected}; that of the {type(module).__name__} "
                f"given is {found}"
            )
    check_fingerprint(ours, backbone, f"backbone={type(module).__name__}")
    return backbone


def move_module(
    module: nn.Module, device: str | torch.device, dtype: str | torch.dtype
) -> tuple[torch.device, torch.dtype]:
    """Move a module to a device and a dtype, where "auto" keeps its own. Returns the device and dtype that it has."""
    if device != "auto":
        module.to(choose_device(device))
    if dtype != "auto":
        module.to(choose_dtype(dtype, device_and_dtype(module)[0]))
    return device_and_dtype(module)


def _published(architecture: str | None) -> tuple[str, ...]:
    """The repositories of a backbone in the table of models; none for any other."""
    row = find_backbone(architecture or "")
    return row.sources if row else ()
