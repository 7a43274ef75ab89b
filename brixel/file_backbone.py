"""A backbone that comes from files: loaded, described for a config, found again for a saved model."""

import dataclasses
from collections.abc import Mapping
from os import PathLike

import torch

from brixel.backbones.huggingface import vit_config
from brixel.backbones.loading import LoadedBackbone, load_backbone
from brixel.backbones.protocol import Backbone
from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.checkpoints import fit, read_tensors
from brixel.config import BACKBONE, BackboneConfig, BrixelConfig, fingerprint
from brixel.errors import CheckpointError
from brixel.hub import Access
from brixel.model_table import KNOWN_BACKBONES
from brixel.sources import Place, locate, locate_first


def load_from(
    place: Place, architecture: str | ViTConfig | None, dtype: torch.dtype, fields: Mapping[str, object]
) -> LoadedBackbone:
    """The backbone at a place; one that cannot be read is refused before its weights are fetched."""
    with place.reading():
        if architecture is None and place.path.is_dir():
            vit_config(place.path)
        place.fetch_weights()
        return load_backbone(place.path, architecture=architecture, dtype=dtype, fields=fields)


def describe_loaded(loaded: LoadedBackbone, place: Place) -> BackboneConfig:
    """What a config says of a backbone: where it was, then where it is published."""
    sources = dict.fromkeys([place.source, *_published(loaded.architecture)])
    return BackboneConfig(loaded.architecture, tuple(sources), loaded.vit.config, fingerprint(loaded.vit))


def find_again(
    place: Place, config: BrixelConfig, given: str | PathLike[str] | None, dtype: torch.dtype, access: Access
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
            vit = fit(lambda: ViT(architecture), read_tensors(own), dtype, what=f"{own} does not fit {ours.title}")
        ours.check_weights(vit.requires_grad_(False), str(own))
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
    ours.check_weights(vit, found.source)
    named = {source.partition("@")[0] for source in ours.sources}  # of which some other may have been taken before
    others = {name: commit for name, commit in config.commits.items() if name not in named}
    if given is not None:
        ours = dataclasses.replace(ours, sources=tuple(dict.fromkeys([found.source, *ours.sources])))
    return vit, dataclasses.replace(config, backbone=ours, commits={**others, **found.commits})


def _published(architecture: str | None) -> tuple[str, ...]:
    """The repositories of a backbone of the table of models; none of any other."""
    known = KNOWN_BACKBONES.get(architecture or "")
    return known.sources if known else ()
