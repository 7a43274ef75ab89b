"""A backbone from files on disk: a folder in Hugging Face or timm layout, or a weight file in any known layout."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from brixel.backbones.position_embeddings import rotary_periods
from brixel.backbones.registry import BUNDLED_BACKBONES, KNOWN_BACKBONES, KnownBackbone, known_backbone
from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ViTConfig
from brixel.checkpoints.backbone_in_checkpoint import FoundBackbone, find_backbone_in
from brixel.checkpoints.backbone_key_maps import BRIXEL, DINOV2_TIMM, KEY_MAPS, VOCABULARY, needed
from brixel.checkpoints.huggingface_config import is_timm, normalisation, timm_image_hw, timm_tag, vit_config
from brixel.checkpoints.key_mapping import KeyMap, State, rename
from brixel.checkpoints.tensor_values import check_values
from brixel.checkpoints.weight_files import load_into, read_tensors, shapes_of
from brixel.errors import CheckpointError
from brixel.utils.fields import check_names

_LOG = logging.getLogger("brixel")
_SIZES = {"width": "width", "depth": "depth", "patch_px": "patch side", "ffn_width": "feed-forward width"}


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
    adapter_for: str = "",
) -> LoadedBackbone:
    """Read a ViT; it is frozen and in evaluation mode.

    Args:
        path: The folder or the weight file.
        architecture: A name in the table of models, or a configuration, which is used as it is. Where None, the
            folder's `config.json` or the shapes of the tensors decide.
        dtype: Of its weights.
        fields: Fields of :class:`ViTConfig` that replace what the file's format implies.
        adapter_for: Of a saved model, the name of the backbone that its adapter was trained for.

    Raises:
        CheckpointError: The file fits no architecture, or not the one that was given.
    """
    whole = read_tensors(path, needed)
    wanted = _wanted(path, architecture)

    def fits(key_map: KeyMap, state: State) -> bool:
        return wanted is None or not _misfit(key_map, state, wanted)

    found = find_backbone_in(whole, KEY_MAPS, str(path), fits)
    if found.report:
        _LOG.warning("%s: %s", path, found.report)
    key_map, state = found.key_map, found.key_map.canonical(found.state)
    used = {found.root + name: tensor for name, tensor in key_map.used(state).items()}
    check_values(used, str(path), unfilled=key_map.unfilled)

    given = fields or {}
    whole_config = isinstance(architecture, ViTConfig)
    stated = {} if whole_config or given.keys() >= {"mean", "std"} else normalisation(path)
    config, name = _architecture(path, found, architecture, stated, _vocabulary(whole))
    if not whole_config:
        grid = {} if "native_grid" in given else _native_grid(path, key_map, state, config)
        config = _with_fields(config, {**_file_fields(path, state, key_map, config), **stated, **grid, **given})
        if name not in BUNDLED_BACKBONES:  # of these the table says all
            _say_what_is_assumed(path, key_map, config, given)
    else:
        config = _with_fields(config, given)
        if config.positions == "rotary" and "rope_embed.periods" in state:
            _rope_rounding(path, state, config)  # raises where the file's are others

    source = f"{path} ({key_map.name})"
    what = f"{source} does not fit {name or 'its configuration'}"
    if adapter_for:
        what = f"{source} does not fit: it is not the backbone that the adapter was trained for, {adapter_for}"
    misfit = _misfit(key_map, state, config)
    if misfit:
        raise CheckpointError(f"{what}: {misfit}")
    ours = rename(state, key_map, shapes_of(lambda: ViT(config)), what=what)
    vit = load_into(lambda: ViT(config), ours, dtype, what=what)
    if name is not None and _shape_fields(config) != _shape_fields(known_backbone(name).vit):
        name = None  # ``fields`` or the grid made another architecture of it
    return LoadedBackbone(vit.eval().requires_grad_(False), name)


def _wanted(path: Path, architecture: str | ViTConfig | None) -> ViTConfig | None:
    """The configuration that the user named or the folder describes; None where it follows from the tensors."""
    if isinstance(architecture, ViTConfig):
        return architecture
    return vit_config(path) if architecture is None else known_backbone(architecture).vit


def _misfit(key_map: KeyMap, state: State, config: ViTConfig) -> str:
    """Which sizes of the tensors are not those of a configuration, in words; empty where they agree or are not known.

    Nothing is built for it, so that sizes from a stranger's file do no harm.
    """
    try:
        found = _signature(state, key_map)
    except (KeyError, IndexError, ValueError, RuntimeError):
        return ""
    different = [name for name in _SIZES if found[name] != getattr(config, name)]
    return ", ".join(f"its {_SIZES[name]} is {found[name]}, not {getattr(config, name)}" for name in different)


def _vocabulary(whole: State) -> int | None:
    """Words in the vocabulary of the text tower in a checkpoint, if there is one."""
    return next((len(tensor) for name, tensor in whole.items() if name.endswith(VOCABULARY) and tensor.ndim), None)


def _native_grid(path: Path, key_map: KeyMap, state: State, config: ViTConfig) -> dict[str, object]:
    """``native_grid``, where the learned positions of a file are for another grid than that of the configuration."""
    count = _position_count(state, key_map)
    if count is None or config.positions != "learned" or count == math.prod(config.native_hw):
        return {}
    side = math.isqrt(count)
    image_hw = timm_image_hw(path)
    if image_hw is not None and math.prod(px // config.patch_px for px in image_hw) == count:
        return {"native_grid": tuple(px // config.patch_px for px in image_hw)}
    if side * side == count:
        return {"native_grid": side}
    rows = next((rows for rows in range(side, 1, -1) if count % rows == 0), 1)
    raise CheckpointError(
        f"{path} ({key_map.name}) has learned positions for {count} patches, whose grid is not square: give it as "
        f"native_grid=(rows, columns), such as ({rows}, {count // rows})"
    )


def _say_what_is_assumed(path: Path, key_map: KeyMap, config: ViTConfig, given: Mapping[str, object]) -> None:
    """Warn where neither keys nor the user say how positions are computed on other grids than the one trained on."""
    names = ("position_antialias", "position_scale_offset") if config.positions == "learned" else ("rope_rounding",)
    if any(name in given for name in names):
        return
    assumed = ", ".join(f"{name}={getattr(config, name)!r}" for name in names)
    if key_map is BRIXEL:
        _LOG.warning("%s holds no settings; assumed %s, as in Hugging Face's layout", path, assumed)
    elif key_map is DINOV2_TIMM and config.ffn == "mlp" and not config.registers and not is_timm(path):
        _LOG.warning(
            "%s: its keys do not say by whose rule its positions are interpolated; assumed timm's, %s. For weights of "
            "Meta's code, give position_antialias=False, position_scale_offset=0.1",
            path,
            assumed,
        )


def _shape_fields(config: ViTConfig) -> dict[str, object]:
    """The fields of a configuration that are the same in all copies of a model."""
    free = ("mean", "std", "rope_rounding", "position_antialias", "position_scale_offset")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in free}


def _architecture(
    path: Path,
    found: FoundBackbone,
    architecture: str | ViTConfig | None,
    stated: Mapping[str, object],
    words: int | None,
) -> tuple[ViTConfig, str | None]:
    """Configuration and name, as the user gave them, else from the folder's `config.json`, else from the shapes."""
    if isinstance(architecture, ViTConfig):
        return architecture, None
    if architecture is not None:
        row = known_backbone(architecture)
        return row.vit, row.name
    described = vit_config(path)
    if described is None:
        row = _by_shapes(path, found, stated, words)
        return row.vit, row.name
    fields = {name: value for name, value in dataclasses.asdict(described).items() if name not in ("mean", "std")}
    rows = _rows_with({**fields, **stated})
    if not rows:
        return described, None
    row = _only_row(path, rows, words)
    return row.vit, row.name


def _file_fields(path: Path, state: State, key_map: KeyMap, config: ViTConfig) -> dict[str, object]:
    """The fields that the file's format implies."""
    fields = dict(key_map.options)
    if "rope_embed.periods" in state:
        fields["rope_rounding"] = _rope_rounding(path, state, config)
    return fields


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


def _by_shapes(path: Path, found: FoundBackbone, stated: Mapping[str, object], words: int | None) -> KnownBackbone:
    """The known backbone whose tensors have these shapes, apart from its grid where none has this one.

    The stated normalisation decides between twins.
    """
    key_map = found.key_map
    if key_map is BRIXEL:
        raise CheckpointError(
            f"{path} is the backbone of a saved model, whose config.json holds its settings: load the model with "
            "from_pretrained, or give the architecture"
        )
    try:
        signature = _signature(found.state, key_map)
    except KeyError as error:
        raise CheckpointError(f"{path} ({key_map.name}) lacks {error}; fetch the file again") from error
    except (IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} ({key_map.name}) has tensors of unexpected dimensions ({error})") from error
    rows = _rows_with({**signature, **stated}) or _rows_with(signature)
    if not rows:
        sizes = ", ".join(f"{name} {value}" for name, value in signature.items())
        raise CheckpointError(f"{path} ({key_map.name}) fits no known architecture ({sizes}); give it as a ViTConfig")
    count = _position_count(found.state, key_map)
    same_grid = [row for row in rows if count in (None, math.prod(row.vit.native_hw))]
    if not same_grid and len({dataclasses.replace(row.vit, native_grid=1) for row in rows}) == 1:
        return rows[0]
    return _only_row(path, same_grid or rows, words)


def _only_row(path: Path, rows: list[KnownBackbone], words: int | None) -> KnownBackbone:
    """The only one of ``rows``, or the only one with timm's tag or with ``words`` in its vocabulary."""
    if len(rows) == 1:
        return rows[0]
    tag = timm_tag(path)
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


def _position_count(state: State, key_map: KeyMap) -> int | None:
    """The patches that a file has learned positions for; None where it has none."""
    names = key_map.tensors.get("positions", ())
    shapes = _shapes(state, key_map)
    found = [shapes[name] for name in names if len(shapes.get(name, ())) == 3]
    return found[0][1] - ("cls_token" in key_map.tensors) if found else None


def _shapes(state: State, key_map: KeyMap) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors as the table expects them, by their names; their numbers are not looked at."""
    on_meta = {name: torch.empty(tensor.shape, device="meta") for name, tensor in state.items()}
    return {name: tuple(tensor.shape) for name, tensor in key_map.prepared(on_meta).items()}


def _signature(state: State, key_map: KeyMap) -> dict[str, object]:
    """The fields that follow from the shapes of a checkpoint. Raises KeyError with a key that is missing."""
    theirs = _shapes(state, key_map)

    def shapes(ours: str) -> list[tuple[int, ...]]:
        names = [name.replace("{i}", "0") for name in key_map.tensors.get(ours, ())]
        return [theirs[name] for name in names if name in theirs]

    def shape(ours: str) -> tuple[int, ...]:
        found = shapes(ours)
        if not found:
            raise KeyError(key_map.tensors[ours][0])
        return found[0]

    ffn_width = shape("blocks.{i}.ffn.down.weight")[1]
    gated = sum(rows for rows, _ in shapes("blocks.{i}.ffn.gate_up.weight")) == 2 * ffn_width
    block = key_map.tensors["blocks.{i}.norm1.weight"][0]
    depth = 0
    while block.replace("{i}", str(depth)) in theirs:
        depth += 1
    positions: dict[str, object] = {"positions": "rotary"}
    if shapes("positions"):
        positions = {"positions": "learned", "position_mode": key_map.options.get("position_mode", "bicubic")}
    return {
        **positions,
        "class_token": "cls_token" in key_map.tensors,
        "layer_scale": "blocks.{i}.scale1" in key_map.tensors,
        "width": shape("norm.weight")[0],
        "depth": depth,
        "patch_px": shape("patch_embed.weight")[3],
        "registers": sum(table[1] for table in shapes("registers")),
        "ffn": "swiglu" if gated else "mlp",
        "ffn_width": ffn_width,
    }
