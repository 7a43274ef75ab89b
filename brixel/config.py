"""`config.json` of a saved model: which backbone, exactly, and which adapter."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from brixel.atomic import write_text
from brixel.backbones.protocol import Backbone, weights_of
from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.errors import BrixelError, CheckpointError, DamagedFileError, did_you_mean
from brixel.student import AdapterConfig

FORMAT_VERSION = 1
CONFIG, ADAPTER, BACKBONE = "config.json", "adapter.safetensors", "backbone.safetensors"  # of a saved folder
_FINGERPRINT_TENSORS = 32
_FINGERPRINT_TOLERANCE = 1e-2  # relative: a copy in bfloat16 is within it

Section = TypeVar("Section")


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone an adapter belongs to.

    ``architecture``: its name in the table of models, or None for one of the user's own; ``vit``: all of it,
    or what is known of one that came as a module, which has no sources.
    ``sources``: where it can be had, in order of preference, each a path on disk or ORG/NAME or ORG/NAME@REVISION on
    the Hub. ``fingerprint``: some of its weights, to tell it from others of its size.
    """

    architecture: str | None
    sources: tuple[str, ...]
    vit: ViTConfig | ForeignConfig
    fingerprint: tuple[float, ...]

    def __post_init__(self) -> None:
        if isinstance(self.sources, str) or not all(isinstance(each, str) and each for each in self.sources):
            raise BrixelError(f"sources is {self.sources!r}; expected a list of paths and names of repositories")
        object.__setattr__(self, "sources", tuple(self.sources))
        if not all(type(value) in (int, float) and math.isfinite(value) for value in self.fingerprint):
            raise BrixelError("fingerprint holds something else than finite numbers")
        object.__setattr__(self, "fingerprint", tuple(self.fingerprint))

    @property
    def title(self) -> str:
        """A name for messages: the architecture, or its sizes."""
        kind = self.vit.class_name if isinstance(self.vit, ForeignConfig) else "ViT"
        return (
            self.architecture or f"{kind} of width {self.vit.width}, depth {self.vit.depth}, patch {self.vit.patch_px}"
        )

    def check_weights(self, backbone: Backbone, where: str) -> None:
        """Raise CheckpointError if ``backbone`` has other weights than the adapter was made for; ``where`` names it."""
        theirs, ours = torch.tensor(fingerprint(backbone)), torch.tensor(self.fingerprint)
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=_FINGERPRINT_TOLERANCE, atol=1e-5):
            origin = f", which came from {', '.join(self.sources)}" if self.sources else ""
            raise CheckpointError(
                f"the backbone at {where} has the shape of {self.title} but other weights than the adapter was made "
                f"for{origin}"
            )


@dataclass(frozen=True)
class BrixelConfig:
    """All that a saved folder says of its model beside the weights.

    ``commits``: of the repositories on the Hub whose files it was made of, by name; to trace results, not to load by.
    ``training``: how the adapter was made and how good it was, for people, by what each line is about.
    """

    backbone: BackboneConfig
    adapter: AdapterConfig
    commits: Mapping[str, str] = field(default_factory=dict, hash=False)
    training: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, what in (("commits", "commits by name of repository"), ("training", "texts by name")):
            given = getattr(self, name)
            texts = [*given, *given.values()] if isinstance(given, Mapping) else [None]
            if not all(isinstance(each, str) for each in texts):
                raise BrixelError(f"{name} is {given!r}; expected {what}")


def fingerprint(backbone: Backbone) -> tuple[float, ...]:
    """Two weights each of some of its tensors, to four digits.

    Of our own ViT the final norm, the patch embedding and every block's first layer; of any other module at most 32
    tensors from first to last, matrices and kernels if it has any: vectors are often all ones or zeros.
    """
    weights = _known_weights(backbone) if isinstance(backbone, ViT) else _some_weights(cast("nn.Module", backbone))
    values = [value for each in weights for value in each.flatten()[[0, each.numel() // 2]].tolist()]
    return tuple(float(f"{value:.4g}") for value in values)


def _known_weights(vit: ViT) -> list[Tensor]:
    first_layers = [f"blocks.{index}.attention.qkv.weight" for index in range(vit.depth)]
    return [vit.get_parameter(name).detach() for name in ("norm.weight", "patch_embed.weight", *first_layers)]


def _some_weights(module: nn.Module) -> list[Tensor]:
    weights = [each for each in weights_of(module) if each.numel()]
    weights = [each for each in weights if each.ndim > 1 and max(each.shape) < each.numel()] or weights
    step = (len(weights) - 1) / (_FINGERPRINT_TENSORS - 1)
    return weights if step <= 1 else [weights[round(index * step)] for index in range(_FINGERPRINT_TENSORS)]


def digest(parts: Iterable[nn.Module]) -> str:
    """A hash of all weights and buffers of some modules, with their names: 16 hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        for name, weight in part.state_dict().items():
            found.update(
                name.encode() + weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    return found.hexdigest()[:16]


def write_config(path: Path, config: BrixelConfig) -> None:
    """Write `config.json`, whole or not at all."""
    content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_config(path: Path) -> BrixelConfig:
    """Read `config.json`; CheckpointError where it is missing, not ours, damaged, or of a newer format."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} holds no {path.name}: expected a folder written by save_pretrained")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFileError(f"{path} is not JSON ({error})") from error
    version = content.pop("format_version", None) if isinstance(content, dict) else None
    if type(version) is not int:
        raise CheckpointError(f"{path} is no brixel model's: it lacks format_version; for a backbone use from_backbone")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {version}, newer than {FORMAT_VERSION}, which we read: update brixel")
    try:
        backbone = dict(content.pop("backbone"))
        if "source" in backbone:  # as it was written before there could be several
            backbone["sources"] = (backbone.pop("source"),)
        values = backbone.pop("vit")
        vit = _section(ForeignConfig, values) if "class_name" in values else _section(ViTConfig, values)
        config = BrixelConfig(
            _section(BackboneConfig, {**backbone, "vit": vit}),
            _section(AdapterConfig, content.pop("adapter")),
            content.pop("commits", {}),
            content.pop("training", {}),
        )
    except (KeyError, TypeError, BrixelError) as error:
        raise CheckpointError(f"{path} does not describe a model: {error}") from error
    if content:
        raise CheckpointError(f"{path} has parts that we do not know: {', '.join(content)}")
    return config


def _section(kind: type[Section], values: dict[str, Any]) -> Section:
    """A dataclass from its fields; one that is not known, or missing without a default, is an error."""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise BrixelError(f"{kind.__name__} has no {name!r}; {did_you_mean(name, known)}")
    return kind(**values)
