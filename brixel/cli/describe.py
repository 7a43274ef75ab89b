"""What a saved model is made of, told from its `config.json` alone: no weights are read."""

import math
from collections.abc import Sequence
from pathlib import Path

from brixel.backbones.registry import KnownBackbone, list_models
from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ForeignConfig
from brixel.brixel_features import PathLike
from brixel.checkpoints.hub_download import parse_repository
from brixel.checkpoints.locate_files import ModelFiles, locate
from brixel.checkpoints.model_folder import ADAPTER, BACKBONE, CONFIG, read_config
from brixel.checkpoints.release_adapters import RELEASED
from brixel.checkpoints.weight_files import shapes_of
from brixel.model.upsampler import UPSCALE, Upsampler


def describe(name_or_path: PathLike) -> dict[str, str]:
    """Facts by name, for people. Raises as :meth:`brixel.BrixelFeatures.from_pretrained` does for a wrong folder."""
    place = locate(name_or_path, what="model")
    config = read_config(place.need(CONFIG))
    backbone, adapter, vit = config.backbone, config.adapter, config.backbone.vit
    known = {row.name: row for row in list_models()}.get(backbone.architecture or "")
    foreign = isinstance(vit, ForeignConfig)
    sizes = (vit.width, vit.depth) if isinstance(vit, ForeignConfig) else (vit.width, vit.depth, vit.heads)
    rows = {
        "backbone": backbone.title,
        "its weights": "a module, given as backbone=" if foreign else _whereabouts(place, backbone.sources),
        "published as": ", ".join(known.sources) or "part of the package" if known else "-",
        "licence": known.licence if known else "-",
        "width, depth" if foreign else "width, depth, heads": ", ".join(map(str, sizes)),
        "patch": f"{vit.patch_px} px; a cell of the dense map: {vit.patch_px / UPSCALE:g} px",
        "mean, deviation": f"{vit.mean}, {vit.std}",
        "adapter": _where(place, ADAPTER) or f"missing: {place.path / ADAPTER}",
        "blocks": ", ".join(map(str, adapter.blocks)),
        "short side": f"{adapter.short_side_px} px",
        "starts from": "a blend of four maps" if adapter.blend else "the last map",
        "residual detour": "yes, as in the release" if adapter.residual_detour else "no",
    }
    numbers = f"adapter and head {_millions(shapes_of(lambda: Upsampler(vit.width, adapter)))}"
    if not isinstance(vit, ForeignConfig):
        numbers = f"backbone {_millions(shapes_of(lambda: ViT(vit)))}, {numbers}"
    return rows | {"numbers": numbers} | {f"training: {name}": text for name, text in config.training.items()}


def describe_models() -> list[dict[str, str]]:
    """A row of facts for each model that is known by name."""
    return [_describe_model(row) for row in list_models()]


def _describe_model(row: KnownBackbone) -> dict[str, str]:
    released = ", ".join(name for name, each in RELEASED.items() if each.backbone == row.name)
    return {
        "name": row.name,
        "numbers": _millions(shapes_of(lambda: ViT(row.vit))),
        "patch": f"{row.vit.patch_px} px",
        "width": str(row.vit.width),
        "licence": row.licence,
        "gated": "first source" if row.gated else "no",
        "adapter": row.adapter or (f"released: {released}" if released else "train one"),
        "sources": ", ".join(row.sources) or "in the package",
    }


def _where(place: ModelFiles, file: str) -> str | None:
    """Where a model's file is, without fetching it."""
    if place.snapshot is None:
        found = place.find(file)
        return None if found is None else str(found)
    return f"{file} of {place.source}, commit {place.snapshot.commit}" if place.snapshot.holds(file) else None


def _whereabouts(place: ModelFiles, sources: Sequence[str]) -> str:
    """Where the backbone's weights are: with the model, or the sources that a path or a repository can still be."""
    own = _where(place, BACKBONE)
    if own is not None:
        return own
    local = [] if place.snapshot else [each for each in sources if Path(each).exists()]
    usable = [each for each in sources if each in local or parse_repository(each)]
    return ", else ".join(usable) if usable else f"missing: they were at {', '.join(sources)}"


def _millions(shapes: dict[str, tuple[int, ...]]) -> str:
    return f"{sum(math.prod(shape) for shape in shapes.values()) / 1e6:.2f} M"
