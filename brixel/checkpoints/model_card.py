"""The model card: README.md next to a model's weights, made from the model's config alone."""

import math
from collections.abc import Mapping
from pathlib import Path

from brixel.backbones.registry import BUNDLED_BACKBONES, LICENCE_URLS, KnownBackbone, find_backbone
from brixel.backbones.vit_config import ForeignConfig
from brixel.checkpoints.hub_download import portable_sources, repositories_in
from brixel.checkpoints.weight_files import shapes_of
from brixel.errors import printable
from brixel.model.config import BILINEAR, TRAINED, UNIVERSAL, BackboneConfig, BrixelConfig
from brixel.model.upsampler import UPSCALE, make_upsampler
from brixel.utils.atomic_files import write_text
from brixel.utils.markdown import markdown_table

CARD, PANEL, LICENCE = "README.md", "panel.png", "LICENSE.md"
_OURS = "<!-- written by brixel at each save; take this line out to keep what you change -->"
_PAPER = "https://arxiv.org/abs/2511.05168"


_UNRECORDED = {
    TRAINED: "not recorded",
    UNIVERSAL: "of the universal upsampler: docs/universal.md of brixel; none for this backbone",
    BILINEAR: "none",
}


def write_card(folder: Path, text: str) -> None:
    """Write README.md into a folder, unless it holds one that its owner has changed."""
    path = folder / CARD
    if not path.is_file() or is_ours(read_card(path)):
        write_text(path, text)


def read_card(path: Path) -> str:
    """The text of a card, whatever its encoding."""
    return path.read_text(encoding="utf-8", errors="replace")


def is_ours(card: str) -> bool:
    """Whether a card may be overwritten: brixel wrote it, and nobody has removed the line that says so."""
    return _OURS in card


def model_card(config: BrixelConfig, name: str, *, whole: bool, panel: bool = False, licence: bool = False) -> str:
    """The text of the card of a model that is loaded as ``name``, a repository or a folder.

    ``whole``, ``panel``, ``licence``: whether the backbone's weights, PANEL and LICENCE are in the same folder.
    """
    backbone = config.backbone
    known = find_backbone(backbone.architecture or "")
    image = [f"![an image, its backbone's map, the dense map]({PANEL})", ""] if panel else []
    lines = [
        *_front_matter(backbone, known),
        _OURS,
        "",
        f"# Dense features from {backbone.title}",
        "",
        f"A small adapter for a frozen vision transformer, {backbone.title}: from an image of low resolution it "
        f"gives a feature map of {UPSCALE} times the transformer's grid on each axis, close to that of the "
        f"transformer on the image at {UPSCALE} times the size. Method: [Another BRIXEL in the Wall]({_PAPER}).",
        "",
        *image,
        *_use(config, name, whole),
        *_section("What it is", _facts(config, whole)),
        *_section("Training", config.training or {"how": _UNRECORDED[config.adapter.kind]}),
        *_licence(backbone, known, whole=whole, copied=licence),
    ]
    return "\n".join(map(printable, lines))


def _front_matter(backbone: BackboneConfig, known: KnownBackbone | None) -> list[str]:
    """The YAML that the Hub reads; its values come from tables or are names of repositories."""
    lines = ["---", "library_name: brixel", "pipeline_tag: image-feature-extraction"]
    if known and known.licence in LICENCE_URLS:
        lines += ["license: other", f"license_name: {known.licence}", f"license_link: {LICENCE_URLS[known.licence]}"]
    elif known:
        lines.append(f"license: {known.licence}")
    published = repositories_in(backbone.sources)
    if published:
        lines += [f"base_model: {published[0].name}", "base_model_relation: adapter"]
    return [*lines, "tags:", "- dense-features", "- feature-upsampling", "---"]


def _use(config: BrixelConfig, name: str, whole: bool) -> list[str]:
    foreign = isinstance(config.backbone.vit, ForeignConfig) and not whole
    given = ", backbone=backbone" if foreign else ""
    lines = ["```python", "from brixel import BrixelFeatures", ""]
    if foreign:
        lines.append(f"backbone = ...  # the {config.backbone.title} that the adapter was made for, a torch module")
    return [
        *lines,
        f'model = BrixelFeatures.from_pretrained("{name}"{given})',
        'feature_map = model.extract("photo.jpg")',
        f"feature_map.features  # ({config.backbone.vit.width}, Hf, Wf)",
        "feature_map.pca()  # (Hf, Wf, 3): colours",
        "```",
        "",
    ]


def _facts(config: BrixelConfig, whole: bool) -> Mapping[str, str]:
    backbone, adapter, vit = config.backbone, config.adapter, config.backbone.vit
    numbers = sum(math.prod(shape) for shape in shapes_of(lambda: make_upsampler(vit, adapter)).values())
    in_package = dict.fromkeys(BUNDLED_BACKBONES, "in the package brixel")
    sources = ", else ".join(in_package.get(source, source) for source in portable_sources(backbone.sources))
    side = adapter.short_side_px
    trained = f"{numbers / 1e6:.2f} M parameters; blocks {', '.join(map(str, adapter.blocks))}, from 0"
    upsampler = {
        TRAINED: {
            "adapter and head": trained,
            "trained at": f"{side} px on the short side, for the map of {UPSCALE * side} px",
        },
        UNIVERSAL: {"upsampler": f"universal, the same for every backbone; {numbers / 1e6:.2f} M parameters"},
        BILINEAR: {"upsampler": "bilinear interpolation"},
    }[adapter.kind]
    return {
        "backbone": backbone.title,
        "its weights": f"in this repository{', in 8 bits' if backbone.int8 else ''}"
        if whole
        else sources or "in no repository: give them as `backbone=`",
        "commits": ", ".join(f"{name}@{commit}" for name, commit in config.commits.items()) or "not recorded",
        **upsampler,
        "images": f"resized to {side} px on the short side unless another size is asked for",
        "a cell of the map": f"{vit.patch_px / UPSCALE:g} px; {vit.width} channels",
        "mean, deviation": f"{vit.mean}, {vit.std}; `extract` normalises images by them",
    }


def _section(title: str, rows: Mapping[str, str]) -> list[str]:
    return [f"## {title}", "", *markdown_table(["", ""], list(rows.items())), ""]


def _licence(backbone: BackboneConfig, known: KnownBackbone | None, *, whole: bool, copied: bool) -> list[str]:
    lines = ["## Licence", ""]
    if known is None:
        lines.append(f"brixel does not know the licence of the backbone, {backbone.title}: add it before you publish.")
    elif known.licence in LICENCE_URLS:
        what = "The backbone's weights are here under it" if whole else "The backbone's weights are not here"
        text = f"a copy is in {LICENCE}" if copied else "pass on a copy of it with the adapter"
        lines.append(
            f"The backbone is under the [{known.licence}]({LICENCE_URLS[known.licence]}), which also covers what is "
            f"derived from its weights, such as this adapter: {text}. {what}."
        )
    else:
        lines.append(f"The backbone is under {known.licence}; so is this adapter, unless its author says otherwise.")
    return [*lines, ""]
