"""A backbone from files on disk: a folder in Hugging Face or timm layout, or a weight file in any known layout."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from brixel.backbones.position_embeddings import rotary_periods
from brixel.backbones.registry import KNOWN_BACKBONES, KnownBackbone, known_backbone
from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ViTConfig
from brixel.checkpoints.backbone_key_maps import BRIXEL, VOCABULARY, needed, recognise, without_prefix
from brixel.checkpoints.huggingface_config import normalisation, timm_tag, vit_config
from brixel.checkpoints.key_mapping import KeyMap, State, rename
from brixel.checkpoints.plausible_sizes import check_sizes
from brixel.checkpoints.weight_files import load_into, read_tensors, shapes_of
from brixel.errors import CheckpointError
from brixel.utils.fields import check_names


@dataclass(frozen=True)
class LoadedBackbone:
    """A backbone, and its name in the table of models if it has one."""

    vit: ViT
    architecture: str | None


def load_backbone(
    path: Path,
    *,
    architecture: str | ViTConfig | None = None,
    dtype: torch.dtype = torch.float32,
    fields: Mapping[str, object] | None = None,
) -> LoadedBackbone:
    """Read a ViT; it is frozen and in evaluation mode.

    Args:
        path: The folder or the weight file.
        architecture: A name in the table of models, or a configuration, which is used as it is. Where None, the
            folder's `config.json` or the shapes of the tensors decide.
        dtype: Of its weights.
        fields: Fields of :class:`ViTConfig` that replace what the file's format implies.

    Raises:
        CheckpointError: The file fits no architecture, or not the one that was given.
    """
    state = without_prefix(read_tensors(path, needed))
    key_map = recognise(state, str(path))
    state = key_map.canonical(state)
    config, name = _architecture(path, state, key_map, architecture)
    config = _with_fields(config, {**_file_fields(path, state, key_map, config, architecture), **(fields or {})})

    what = f"{path} ({key_map.name}) does not fit {name or 'its configuration'}"
    check_sizes(config, state, what=what)
    ours = rename(state, key_map, shapes_of(lambda: ViT(config)), what=what)
    vit = load_into(lambda: ViT(config), ours, dtype, what=what)
    if name is not None and _shape_fields(config) != _shape_fields(known_backbone(name).vit):
        name = None  # ``fields`` made another architecture of it
    return LoadedBackbone(vit.eval().requires_grad_(False), name)


def _shape_fields(config: ViTConfig) -> dict[str, object]:
    """The fields of a configuration that are the same in all copies of a model."""
    free = ("mean", "std", "rope_rounding", "position_antialias", "position_scale_offset")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in free}


def _architecture(
    path: Path, state: State, key_map: KeyMap, architecture: str | ViTConfig | None
) -> tuple[ViTConfig, str | None]:
    """Configuration and name, as the user gave them, else from the folder's `config.json`, else from the shapes."""
    if isinstance(architecture, ViTConfig):
        return architecture, None
    if architecture is not None:
        row = known_backbone(architecture)
        return row.vit, row.name
    stated = normalisation(path)
    described = vit_config(path)
    if described is None:
        row = _by_shapes(path, state, key_map, stated)
        return row.vit, row.name
    fields = {name: value for name, value in dataclasses.asdict(described).items() if name not in ("mean", "std")}
    rows = _rows_with({**fields, **stated})
    if not rows:
        return _with_fields(described, stated), None
    row = _only_row(path, state, rows)
    return row.vit, row.name


def _file_fields(
    path: Path, state: State, key_map: KeyMap, config: ViTConfig, architecture: str | ViTConfig | None
) -> dict[str, object]:
    """The fields that the file's format and the folder imply; none where the user gave a whole configuration."""
    fields = dict(key_map.options)
    if "rope_embed.periods" in state:
        fields["rope_rounding"] = _rope_rounding(path, state, config)
    return {} if isinstance(architecture, ViTConfig) else {**fields, **normalisation(path)}


def _rope_rounding(path: Path, state: State, config: ViTConfig) -> str:
    """Whether a file's rotary periods are exact, "float32", or rounded, "bfloat16"."""
    periods = state["rope_embed.periods"].float()
    if periods.is_meta:
        return "bfloat16"
    for name, rounding in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        ours = rotary_periods(config.width // config.heads, config.rope_theta, rounding)
        if ours.shape == periods.shape and torch.allclose(ours, periods, rtol=1e-6, atol=0):
            return name
    raise CheckpointError(
        f"{path}: its rotary periods {periods[:3].tolist()}... are not those of head width "
        f"{config.width // config.heads} and base {config.rope_theta:g}; give the right architecture"
    )


def _with_fields(config: ViTConfig, fields: Mapping[str, object]) -> ViTConfig:
    check_names(fields, [field.name for field in dataclasses.fields(ViTConfig)], "a ViT has no setting")
    return dataclasses.replace(config, **fields)  # type: ignore[arg-type]


def _by_shapes(path: Path, state: State, key_map: KeyMap, stated: Mapping[str, object]) -> KnownBackbone:
    """The known backbone whose tensors have these shapes; the stated normalisation decides between twins."""
    if key_map is BRIXEL:
        raise CheckpointError(
            f"{path} is the backbone of a saved model, whose config.json holds its settings: load the model with "
            "from_pretrained, or give the architecture"
        )
    try:
        signature = _signature(key_map.prepared(state), key_map)
    except KeyError as error:
        raise CheckpointError(f"{path} ({key_map.name}) lacks {error}; fetch the file again") from error
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"{path} ({key_map.name}) has tensors of unexpected dimensions ({error})") from error
    rows = _rows_with({**signature, **stated})
    if not rows:
        found = ", ".join(f"{name} {value}" for name, value in signature.items())
        raise CheckpointError(f"{path} ({key_map.name}) fits no known architecture ({found}); give it as a ViTConfig")
    return _only_row(path, state, rows)


def _only_row(path: Path, state: State, rows: list[KnownBackbone]) -> KnownBackbone:
    """The only one of ``rows``, or the only one with timm's tag or with the vocabulary of the text tower."""
    if len(rows) == 1:
        return rows[0]
    tag = timm_tag(path)
    words = len(state[VOCABULARY]) if VOCABULARY in state else None
    fitting = [row for row in rows if (tag and row.timm.endswith(f".{tag}")) or (words and row.vocabulary == words)]
    if len(fitting) == 1:
        return fitting[0]
    names = " or ".join(repr(row.name) for row in rows)
    same_normalisation = len({(row.vit.mean, row.vit.std) for row in rows}) == 1
    difference = "their weights alone" if same_normalisation else "normalisation"
    raise CheckpointError(f"{path} may be {names}, which differ in {difference}: say which, as its architecture")


def _rows_with(fields: Mapping[str, object]) -> list[KnownBackbone]:
    rows = KNOWN_BACKBONES.values()
    return [row for row in rows if all(getattr(row.vit, name) == value for name, value in fields.items())]


def _signature(state: State, key_map: KeyMap) -> dict[str, object]:
    """The fields that follow from the shapes of a checkpoint. Raises KeyError with a key that is missing."""

    def shapes(ours: str) -> list[tuple[int, ...]]:
        names = [name.replace("{i}", "0") for name in key_map.tensors.get(ours, ())]
        return [tuple(state[name].shape) for name in names if name in state]

    def shape(ours: str) -> tuple[int, ...]:
        found = shapes(ours)
        if not found:
            raise KeyError(key_map.tensors[ours][0])
        return found[0]

    ffn_width = shape("blocks.{i}.ffn.down.weight")[1]
    gated = sum(rows for rows, _ in shapes("blocks.{i}.ffn.gate_up.weight")) == 2 * ffn_width
    block = key_map.tensors["blocks.{i}.norm1.weight"][0]
    depth = 0
    while block.replace("{i}", str(depth)) in state:
        depth += 1
    class_token = "cls_token" in key_map.tensors
    positions: dict[str, object] = {"positions": "rotary"}
    if shapes("positions"):
        positions = {
            "positions": "learned",
            "position_mode": key_map.options.get("position_mode", "bicubic"),
            "native_grid": math.isqrt(shape("positions")[1] - class_token),
        }
    return {
        **positions,
        "class_token": class_token,
        "layer_scale": "blocks.{i}.scale1" in key_map.tensors,
        "width": shape("norm.weight")[0],
        "depth": depth,
        "patch_px": shape("patch_embed.weight")[3],
        "registers": sum(table[1] for table in shapes("registers")),
        "ffn": "swiglu" if gated else "mlp",
        "ffn_width": ffn_width,
    }
