"""The format of the authors' own adapter files (`.pth`, without the backbone): `docs/method.md`, section 2.

Tensors that never reach the output are dropped by name; an unknown key is refused.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from einops import rearrange

from brixel.backbones.registry import find_backbone, known_backbone
from brixel.backbones.vit_config import ViTConfig
from brixel.checkpoints.key_mapping import KeyMap, State, layer_keys, rename
from brixel.checkpoints.tensor_values import check_values
from brixel.checkpoints.weight_files import read_tensors
from brixel.errors import BrixelError, CheckpointError
from brixel.model.adapter import EXTRACTORS
from brixel.model.head import TRUNK_BLOCKS
from brixel.utils.fields import check_names


@dataclass(frozen=True)
class ReleasedAdapter:
    """A file of the release: the name of its backbone in the table of models, and the short side of its images."""

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

_SHORT_SIDE_PX = 256  # of all files but one
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
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


def _extractor(index: int) -> dict[str, tuple[str, ...]]:
    """Every one of four interactions holds an extractor; the last also holds the two extra ones."""
    prefix = f"adapter.interactions.{index}.extractor"
    if index > 3:
        prefix = f"adapter.interactions.3.extra_extractors.{index - 4}"
    entries: dict[str, tuple[str, ...]] = {}
    for ours, theirs in _EXTRACTOR.items():
        entries |= layer_keys(f"adapter.extractors.{index}.{ours}", *(f"{prefix}.{layer}" for layer in theirs))
    return entries


def _trunk(index: int) -> dict[str, tuple[str, ...]]:
    ours, theirs = f"head.trunk.{index}", f"head.trunk.{index}.block"
    return {
        **layer_keys(f"{ours}.norm", f"{theirs}.0.ln"),
        **layer_keys(f"{ours}.depthwise", f"{theirs}.1"),
        **layer_keys(f"{ours}.pointwise1", f"{theirs}.3"),
        **layer_keys(f"{ours}.pointwise2", f"{theirs}.5"),
    }


def live_parts(state: State) -> State:
    """The level embedding of the query's scale alone, and 1x1 convolutions as the matrices that they are."""
    parts = {
        key: rearrange(tensor, "o i 1 1 -> o i") if tensor.shape[2:] == (1, 1) else tensor
        for key, tensor in state.items()
    }
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
        **layer_keys("adapter.query", "adapter.spm.fc2"),
        "adapter.level": ("adapter.level_embed",),
        **{key: names for index in range(EXTRACTORS) for key, names in _extractor(index).items()},
        **layer_keys("head.fusion.fine", "adapter.spm.fc1"),
        **layer_keys("head.fusion.norm", "adapter.norm1"),
        **layer_keys("head.fusion.align", "head.align_in"),
        **{key: names for index in range(TRUNK_BLOCKS) for key, names in _trunk(index).items()},
        **layer_keys("head.mix", "head.mix"),
        **layer_keys("head.norm", "head.head_norm.ln"),
        **layer_keys("head.out", "head.out_conv"),
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


_MARK = "adapter.level_embed"


def read_release(path: Path) -> State:
    """The tensors of a release file under its own names, without what a wrapper or a nested dict adds to them."""
    state = read_tensors(path)
    root = next((name.removesuffix(_MARK) for name in state if name.endswith(f".{_MARK}")), "")
    return {name.removeprefix(root): tensor for name, tensor in state.items()}


def choose_release(
    release: str | None,
    backbone: str | os.PathLike[str] | None,
    architecture: str | ViTConfig | None,
    short_side_px: int | None,
) -> tuple[str | os.PathLike[str], str | ViTConfig | None, int]:
    """Backbone, architecture and short side of a release file; ``release`` implies those that are None."""
    if release is not None:
        check_names([release], RELEASED, "unknown file of the release")
        row = RELEASED[release]
        backbone = row.backbone if backbone is None else backbone
        architecture = row.backbone if architecture is None else architecture
        short_side_px = short_side_px or row.short_side_px
    if backbone is None:
        raise BrixelError(f"no backbone and no release: say which file this is, release= one of {', '.join(RELEASED)}")
    return backbone, architecture, short_side_px or _SHORT_SIDE_PX


def check_width(
    path: Path, state: State, backbone: str | os.PathLike[str], architecture: str | ViTConfig | None
) -> None:
    """Raise CheckpointError for a release file of another width than that of a known backbone, which is not fetched."""
    known = find_backbone(architecture if isinstance(architecture, str) else str(backbone))
    levels = state.get(_MARK)
    if known is None or levels is None or not levels.ndim or levels.shape[-1] == known.vit.width:
        return
    if not isinstance(architecture, str) and Path(backbone).expanduser().exists():  # not the known one of that name
        return
    width = levels.shape[-1]
    fitting = ", ".join(name for name, row in RELEASED.items() if known_backbone(row.backbone).vit.width == width)
    hint = f": it may be {fitting}" if fitting else ""
    raise CheckpointError(
        f"{path} does not fit {known.name}: it is for a backbone {width} wide, not {known.vit.width}{hint}"
    )


def our_names(state: State, shapes: dict[str, tuple[int, ...]], *, what: str) -> State:
    """The tensors of a release file that are used, under our names; ``shapes`` are those of the upsampler."""
    counts = ".num_batches_tracked"  # integers
    check_values({name: tensor for name, tensor in RELEASE.used(state).items() if not name.endswith(counts)}, what)
    return rename(state, RELEASE, shapes, what=what)
