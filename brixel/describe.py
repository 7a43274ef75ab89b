"""What a saved model is made of, told from its `config.json` alone: no weights are read."""

import math
from pathlib import Path

from brixel.backbones.vit import ViT
from brixel.checkpoints import shapes_of
from brixel.config import read_config
from brixel.features import ADAPTER, BACKBONE, CONFIG
from brixel.model_table import KNOWN_BACKBONES
from brixel.sources import BUNDLED, locate
from brixel.student import UPSCALE, new_trainable

_LICENCES = {BUNDLED: "apache-2.0"}  # of backbones that are not in the table, as they are published nowhere else


def describe(folder: Path) -> dict[str, str]:
    """Facts by name, for people. Raises as :meth:`brixel.BrixelFeatures.from_pretrained` does for a wrong folder."""
    folder = locate(folder, what="model")
    config = read_config(folder / CONFIG)
    backbone, adapter, vit = config.backbone, config.adapter, config.backbone.vit
    known = KNOWN_BACKBONES.get(backbone.architecture or "")
    rows = {
        "backbone": backbone.title,
        "its weights": _whereabouts(folder, backbone.source),
        "published as": f"{known.huggingface}, {known.timm}" if known else "-",
        "licence": known.licence if known else _LICENCES.get(backbone.title, "-"),
        "width, depth, heads": f"{vit.width}, {vit.depth}, {vit.heads}",
        "patch": f"{vit.patch_px} px; a cell of the dense map: {vit.patch_px / UPSCALE:g} px",
        "mean, deviation": f"{vit.mean}, {vit.std}",
        "adapter": str(folder / ADAPTER) if (folder / ADAPTER).is_file() else f"missing: {folder / ADAPTER}",
        "blocks": ", ".join(map(str, adapter.blocks)),
        "short side": f"{adapter.short_side_px} px",
        "starts from": "a blend of four maps" if adapter.blend else "the last map",
        "residual detour": "yes, as in the release" if adapter.residual_detour else "no",
    }
    own, trained = shapes_of(lambda: ViT(vit)), shapes_of(lambda: new_trainable(vit.width, adapter))
    return rows | {"numbers": f"backbone {_millions(own)}, adapter and head {_millions(trained)}"}


def _whereabouts(folder: Path, source: str) -> str:
    if (folder / BACKBONE).is_file():
        return str(folder / BACKBONE)
    return source if Path(source).exists() else f"missing: they were at {source}"


def _millions(shapes: dict[str, tuple[int, ...]]) -> str:
    return f"{sum(math.prod(shape) for shape in shapes.values()) / 1e6:.2f} M"
