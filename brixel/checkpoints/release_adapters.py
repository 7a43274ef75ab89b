"""The format of the authors' own adapter files (`.pth`, no backbone inside): `docs/method.md`, section 2.

Their tensors that never reach the output are known by name and dropped; a key that nobody knows is refused.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from brixel.backbones.registry import KNOWN_BACKBONES, KnownBackbone
from brixel.backbones.vit_config import ViTConfig
from brixel.checkpoints.key_mapping import KeyMap, State, rename
from brixel.checkpoints.weight_files import read_tensors
from brixel.errors import BrixelError, CheckpointError, did_you_mean
from brixel.model.adapter import EXTRACTORS
from brixel.model.head import TRUNK_BLOCKS


@dataclass(frozen=True)
class ReleasedAdapter:
    """A file of the release: the backbone it belongs to, by its name in the table of models, and its input's side."""

    backbone: str
    short_side_px: int


RELEASED: Mapping[str, ReleasedAdapter] = MappingProxyType(
    {
        "vits16-256": ReleasedAdapter("dinov3-vits16", 256),
        "vitb16-256": ReleasedAdapter("dinov3-vitb16", 256),
        "vitl16-256": ReleasedAdapter("dinov3-vitl16", 256),
        "vith16plus-256": ReleasedAdapter("dinov3-vith16plus", 256),
        "vitb16-480": ReleasedAdapter("dinov3-vitb16", 480),
    }
)

_SHORT_SIDE_PX = 256  # of all but one
_PARTS = ("weight", "bias")
_NORM = (*_PARTS, "running_mean", "running_var", "num_batches_tracked")
_EXTRACTOR = {
    "query_norm": ("query_norm",),
    "feature_norm": ("feat_norm",),
    "attention.value": ("attn.value_proj",),
    "attention.offsets_and_logits": ("attn.sampling_offsets", "attn.attention_weights"),
    "attention.out": ("attn.output_proj",),
    "ffn_norm": ("ffn_norm",),
    "ffn.down": ("ffn.fc1",),
    "ffn.depthwise": ("ffn.dwconv.dwconv",),
    "ffn.up": ("ffn.fc2",),
}


def _conv_norm(ours: str, conv: str, norm: str) -> dict[str, tuple[str, ...]]:
    norms: dict[str, tuple[str, ...]] = {f"{ours}.norm.{part}": (f"{norm}.{part}",) for part in _NORM}
    return {f"{ours}.conv.weight": (f"{conv}.weight",), **norms}


def _layer(ours: str, *theirs: str) -> dict[str, tuple[str, ...]]:
    return {f"{ours}.{part}": tuple(f"{each}.{part}" for each in theirs) for part in _PARTS}


def _extractor(index: int) -> dict[str, tuple[str, ...]]:
    """Four interactions hold an extractor each; the last holds the two extra ones as well."""
    place = f"adapter.interactions.{index}.extractor"
    if index > 3:
        place = f"adapter.interactions.3.extra_extractors.{index - 4}"
    entries: dict[str, tuple[str, ...]] = {}
    for ours, theirs in _EXTRACTOR.items():
        entries |= _layer(f"adapter.extractors.{index}.{ours}", *(f"{place}.{each}" for each in theirs))
    return entries


def _trunk(index: int) -> dict[str, tuple[str, ...]]:
    ours, theirs = f"head.trunk.{index}", f"head.trunk.{index}.block"
    return {
        **_layer(f"{ours}.norm", f"{theirs}.0.ln"),
        **_layer(f"{ours}.depthwise", f"{theirs}.1"),
        **_layer(f"{ours}.pointwise1", f"{theirs}.3"),
        **_layer(f"{ours}.pointwise2", f"{theirs}.5"),
    }


def live_parts(state: State) -> State:
    """The level of the query scale alone, and 1x1 convolutions as the matrices they are."""
    parts = {key: tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor for key, tensor in state.items()}
    levels = parts.get("adapter.level_embed")
    if levels is not None and levels.ndim == 2 and len(levels) == 3:
        parts["adapter.level_embed"] = levels[0]
    return parts


RELEASE = KeyMap(
    name="the BRIXEL release",
    tensors={
        **_conv_norm("adapter.prior.stem.0", "adapter.spm.stem.0", "adapter.spm.stem.1"),
        **_conv_norm("adapter.prior.stem.1", "adapter.spm.stem.3", "adapter.spm.stem.4"),
        **_conv_norm("adapter.prior.stem.2", "adapter.spm.stem.6", "adapter.spm.stem.7"),
        **_conv_norm("adapter.prior.down", "adapter.spm.conv2.0", "adapter.spm.conv2.1"),
        **_layer("adapter.query", "adapter.spm.fc2"),
        "adapter.level": ("adapter.level_embed",),
        **{key: names for index in range(EXTRACTORS) for key, names in _extractor(index).items()},
        **_layer("head.fusion.fine", "adapter.spm.fc1"),
        **_layer("head.fusion.norm", "adapter.norm1"),
        **_layer("head.fusion.align", "head.align_in"),
        **{key: names for index in range(TRUNK_BLOCKS) for key, names in _trunk(index).items()},
        **_layer("head.mix", "head.mix"),
        **_layer("head.norm", "head.head_norm.ln"),
        **_layer("head.out", "head.out_conv"),
    },
    dropped=(
        "adapter.up.*",
        "adapter.norm[234].*",
        "adapter.guide_proj.*",
        "adapter.spm.conv[34].*",
        "adapter.spm.fc[34].*",
    ),
    prepare=live_parts,
)


def choose_release(
    path: Path,
    release: str | None,
    backbone: str | os.PathLike[str] | None,
    architecture: str | ViTConfig | None,
    short_side_px: int | None,
) -> tuple[str | os.PathLike[str], str | ViTConfig | None, int]:
    """Backbone, architecture and short side of a release file, by its name where the user leaves them open.

    A file that is too wide or narrow for a backbone known by name is refused, before that is fetched.
    """
    if release is not None and release not in RELEASED:
        raise BrixelError(f"unknown file of the release {release!r}; {did_you_mean(release, RELEASED)}")
    row = RELEASED.get(release or "")
    if row is None and backbone is None:
        raise BrixelError(f"no backbone and no release: say which file this is, release= one of {', '.join(RELEASED)}")
    if row is not None:
        backbone = row.backbone if backbone is None else backbone
        architecture = row.backbone if architecture is None else architecture
    assert backbone is not None
    known = KNOWN_BACKBONES.get(architecture if isinstance(architecture, str) else str(backbone))
    if known is not None:
        _check_width(path, known)
    return backbone, architecture, short_side_px or (row.short_side_px if row else _SHORT_SIDE_PX)


def _check_width(path: Path, known: KnownBackbone) -> None:
    levels = read_tensors(path).get("adapter.level_embed")
    width = known.vit.width
    if levels is not None and levels.shape[-1] != width:
        near = ", ".join(name for name, row in RELEASED.items() if _width(row) == levels.shape[-1])
        told = f": it may be {near}" if near else ""
        raise CheckpointError(
            f"{path} does not fit {known.name}: it is for a backbone {levels.shape[-1]} wide, not {width}{told}"
        )


def _width(row: ReleasedAdapter) -> int:
    return KNOWN_BACKBONES[row.backbone].vit.width


def read_release(path: Path, shapes: dict[str, tuple[int, ...]], *, what: str) -> State:
    """The live tensors of a release file under our names; ``shapes`` are those of our adapter and head."""
    return rename(read_tensors(path), RELEASE, shapes, what=what)
