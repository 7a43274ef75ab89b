"""The folder of a saved probe: `probe.safetensors`, `probe.json`, and `model/` where the model has no name.

`probe.json` is written last. It states the hash of the weights, so that files of two probes are never taken for one.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brixel.brixel_features import BrixelFeatures
from brixel.checkpoints.fingerprint import fingerprint, same_fingerprint
from brixel.checkpoints.weight_files import write_tensors
from brixel.errors import BrixelError, CheckpointError, DamagedFileError, MissingFileError
from brixel.utils.atomic_files import check_output_folder, write_text
from brixel.utils.fields import (
    boolean,
    check_fields,
    check_table,
    json_table,
    number,
    one_of,
    optional,
    several,
    short_repr,
    text,
    whole_number,
)
from brixel.utils.safetensors_files import open_safetensors
from brixel.utils.structured_files import checking_content, read_json_value

FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION, MODEL = "probe.safetensors", "probe.json", "model"
KINDS = ("segmentation", "regression")

_TENSORS = ("mean", "deviation", "weight", "bias")
_PRINT = several(number(-1e30, 1e30), "a list of finite numbers", most=2**12, single=False)
_RULES = {
    "format_version": whole_number(1),
    "kind": one_of(*KINDS),
    "weights_sha256": text(),
    "params": json_table(),
    "learned": json_table(),
    "model": optional(json_table()),
}
_AGAIN = "fit the probe again, or fetch the folder again"


@dataclass(frozen=True)
class ModelRecord:
    """The model of a probe: where it is, and what tells it from others.

    ``name``: what ``from_pretrained`` loads; None where the model lies in `model/`. ``backbone``, ``upsampler``: some
    weights, see `checkpoints.fingerprint`. The other fields are those of its config that change its features.
    """

    name: str | None
    title: str
    width: int
    patch_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    kind: str
    generation: int
    blocks: tuple[int, ...]
    own_share: float
    residual_detour: bool
    short_side_px: int
    backbone: tuple[float, ...]
    upsampler: tuple[float, ...]

    def __post_init__(self) -> None:
        check_fields(self, _RECORD_RULES, prefix="model.")

    @classmethod
    def of(cls, model: BrixelFeatures, name: str | None) -> "ModelRecord":
        """The record of a model that is loaded."""
        vit, adapter = model.config.backbone.vit, model.config.adapter
        facts: dict[str, Any] = {field: getattr(vit, field) for field in _OF_BACKBONE}
        facts |= {field: getattr(adapter, field) for field in _OF_ADAPTER}
        prints = fingerprint(model.backbone), fingerprint(model.upsampler)
        return cls(name, model.config.backbone.title, **facts, backbone=prints[0], upsampler=prints[1])

    def check(self, model: BrixelFeatures, where: str) -> None:
        """Raise CheckpointError where a model gives other features than the recorded one."""
        found = ModelRecord.of(model, None)
        for field in (*_OF_BACKBONE, *_OF_ADAPTER):
            ours, theirs = getattr(self, field), getattr(found, field)
            if ours != theirs:
                raise CheckpointError(
                    f"the probe was fitted with {self._described}, whose {field} is {ours}; that of {where}, "
                    f"{found.title}, is {theirs}: give the model that it was fitted with as model="
                )
        for part in ("backbone", "upsampler"):
            if not same_fingerprint(getattr(self, part), getattr(found, part)):
                raise CheckpointError(
                    f"the probe was fitted with {self._described}; {where}, {found.title}, has other weights in its "
                    f"{part}: give the model that it was fitted with as model="
                )

    @property
    def _described(self) -> str:
        return f"{self.name} ({self.title})" if self.name else self.title


_OF_BACKBONE = ("width", "patch_px", "mean", "std")
_OF_ADAPTER = ("kind", "generation", "blocks", "own_share", "residual_detour", "short_side_px")
_RECORD_RULES = {
    "name": optional(text()),
    "title": text(),
    **{name: whole_number(1) for name in ("width", "patch_px", "generation", "short_side_px")},
    **{name: several(number(), "three numbers", count=3) for name in ("mean", "std")},
    "kind": text(),
    "blocks": several(whole_number(), "indices of blocks", single=False),
    "own_share": number(0),
    "residual_detour": boolean(),
    **{"backbone": _PRINT, "upsampler": _PRINT},
}


@dataclass(frozen=True)
class SavedProbe:
    """A probe as its folder states it. ``tensors``: mean and deviation (D,), weight (C, D) and bias (C,)."""

    path: Path
    params: Mapping[str, Any]
    learned: Mapping[str, Any]
    model: ModelRecord | None
    tensors: Mapping[str, Tensor]

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Name the file where a value from it is refused."""
        with checking_content(self.path / DESCRIPTION, "the description of a probe", _AGAIN):
            yield

    def find_model(
        self, model: BrixelFeatures | None, *, device: str | torch.device, dtype: str | torch.dtype
    ) -> BrixelFeatures | None:
        """The model that the probe needs, checked: the one that is given, or the one it names. None if it needs none.

        Raises:
            CheckpointError: It is another model, or is not where it was.
        """
        if model is not None and not isinstance(model, BrixelFeatures):
            raise BrixelError(f"model is {short_repr(model)}; expected a BrixelFeatures, or None")
        record, width = self.model, self.tensors["weight"].shape[1]
        if record is None:
            if model is not None and model.embed_dim != width:
                raise CheckpointError(f"the probe reads {width} channels, and the model gives {model.embed_dim}")
            return model
        where = "the model given"
        if model is None:
            source = str(self.path / MODEL) if record.name is None else record.name
            where = f"that at {source}"
            try:
                model = BrixelFeatures.from_pretrained(source, device=device, dtype=dtype)
            except BrixelError as error:
                raise CheckpointError(
                    f"the model of the probe in {self.path} cannot be loaded ({error}); give it as model="
                ) from error
        record.check(model, where)
        return model


def check_is_probe_folder(path: Path) -> None:
    """Raise BrixelError where a probe cannot be written: a file is there, or a folder that holds something else."""
    check_output_folder(path)
    if path.is_dir() and not (path / DESCRIPTION).exists() and any(path.iterdir()):
        raise BrixelError(f"{path} holds files, and no probe; give a new folder, or that of a probe to replace")


def write_probe(
    path: Path,
    tensors: Mapping[str, Tensor],
    kind: str,
    params: Mapping[str, Any],
    learned: Mapping[str, Any],
    model: ModelRecord | None,
) -> None:
    """Write weights and, last, the description."""
    write_tensors(path / WEIGHTS, tensors)
    content = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "weights_sha256": _sha256(path / WEIGHTS),
        "params": dict(params),
        "learned": dict(learned),
        "model": None if model is None else dataclasses.asdict(model),
    }
    write_text(path / DESCRIPTION, json.dumps(content, indent=1) + "\n")


def kind_of_probe(path: Path) -> str:
    """The kind of the probe in a folder, "segmentation" or "regression". Raises as :func:`read_probe`."""
    return str(_read_description(path)["kind"])


def read_probe(path: Path, kind: str) -> SavedProbe:
    """Read the folder of a probe of a kind.

    Raises:
        MissingFileError: There is no probe, or a file of it is missing.
        DamagedFileError: A file is damaged, or belongs to another probe.
        CheckpointError: The probe is of another kind, or of a newer format.
    """
    content = _read_description(path)
    if content["kind"] != kind:
        raise CheckpointError(f"{path} holds a {content['kind']} probe; load it with its own class, not for {kind}")
    with checking_content(path / DESCRIPTION, "the description of a probe", _AGAIN):
        record = None if content["model"] is None else _record(content["model"])
    if not (path / WEIGHTS).exists():
        raise MissingFileError(f"{path} lacks {WEIGHTS}: {_AGAIN}")
    tensors = _read_weights(path / WEIGHTS)
    if _sha256(path / WEIGHTS) != content["weights_sha256"]:
        raise DamagedFileError(
            f"{path / WEIGHTS} is not the file that {DESCRIPTION} beside it was written for: {_AGAIN}"
        )
    return SavedProbe(path, content["params"], content["learned"], record, tensors)


def _read_description(path: Path) -> dict[str, Any]:
    described = path / DESCRIPTION
    if not described.exists():
        raise MissingFileError(f"{path} holds no {DESCRIPTION}: expected a folder that a probe was saved in")
    with checking_content(described, "the description of a probe", _AGAIN):
        content = read_json_value(described)
        version = content.get("format_version") if isinstance(content, dict) else None
        if type(version) is not int or version <= FORMAT_VERSION:
            return check_table("the file", content, _RULES)
    raise CheckpointError(
        f"{described} has format {version}, newer than {FORMAT_VERSION}, which we read: update brixel"
    )


def _record(values: Mapping[str, Any]) -> ModelRecord:
    return ModelRecord(**check_table("model", values, _RECORD_RULES))


def _read_weights(path: Path) -> dict[str, Tensor]:
    with open_safetensors(path) as file:
        names = sorted(file.keys())
        if names != sorted(_TENSORS):
            raise DamagedFileError(f"{path} holds {', '.join(names)[:200]}; expected {', '.join(_TENSORS)}: {_AGAIN}")
        tensors = {name: file.get_tensor(name) for name in _TENSORS}
    weight = tensors["weight"]
    outputs, width = weight.shape if weight.ndim == 2 else (0, 0)
    expected = {"mean": (width,), "deviation": (width,), "weight": (outputs, width), "bias": (outputs,)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected or not all(each.dtype == torch.float32 and each.isfinite().all() for each in tensors.values()):
        raise DamagedFileError(f"{path} holds {found}; expected finite float32 of one width: {_AGAIN}")
    return tensors


def _sha256(path: str | os.PathLike[str]) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
