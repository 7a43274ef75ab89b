"""Every setting of a training run: one flat dataclass, which is also the command line's flags and a TOML file."""

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from brixel.errors import BrixelError, did_you_mean
from brixel.model.losses import LossWeights
from brixel.utils.atomic_files import write_text
from brixel.utils.toml import read_toml

# the recipe of the release; three epochs are for the user to say in steps
RELEASE = MappingProxyType(
    {"optimizer": "adam", "lr": 1e-3, "schedule": "release", "weight_decay": 0.0, "clip_norm": 0.0, "ema": 0.0,
     "true_rings": False, "fit": 0}
)  # fmt: skip
PRESETS = MappingProxyType({"default": MappingProxyType({}), "release": RELEASE})
# settings that change nothing about the result, and so may differ when a run is taken up again
RENAMED = {"val_pictures": "val_images"}  # settings of version 0.1, as its files have them
INCIDENTAL = frozenset({"out", "workers", "log_every", "save_every", "device", "cache_dir", "about"})


@dataclass(frozen=True)
class TrainConfig:
    """How to distil an adapter. Sizes in pixels, counts in optimiser steps.

    ``images`` and ``val`` are folders, searched through. ``teacher_px``: side of the square crops that the teacher
    sees, 64 patches where None; the student sees them at a quarter. ``batch_size`` is per process and pass; a step
    takes ``accumulate`` passes. ``fit``: the blend of the backbone's maps is fitted to that many crops by least squares
    before the first step, to no more than the run reads; 0 leaves it at the last map. ``cache``: that many fixed crops
    go through the teacher once, into ``cache_dir`` (below ``out`` where None); 0 runs the teacher in every step.
    ``schedule``: "cosine" warms up, then falls to zero; "release" takes a tenth of ``lr`` for the first third.
    ``ema``: decay of the averaged weights that are validated and kept; 0 for none. ``l1``, ``edge``, ``spectral``,
    ``true_rings``: see :class:`brixel.train.LossWeights`. ``about``: what the images are, for the model's card.
    """

    backbone: str
    images: tuple[str, ...]
    out: str
    val: tuple[str, ...] = ()
    architecture: str | None = None
    steps: int = 2000
    batch_size: int = 16
    accumulate: int = 1
    teacher_px: int | None = None
    max_zoom: float = 1.5
    flip: bool = True
    small: Literal["upsample", "skip"] = "upsample"
    fit: int = 2048
    cache: int = 0
    cache_dir: str | None = None
    optimizer: Literal["adamw", "adam"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 50
    schedule: Literal["cosine", "release"] = "cosine"
    clip_norm: float = 1.0
    ema: float = 0.99
    drop_path: float = 0.3
    l1: float = 1.0
    edge: float = 1.0
    spectral: float = 0.1
    true_rings: bool = True
    val_images: int = 24
    val_every: int = 200
    save_every: int = 100
    log_every: int = 10
    workers: int = 2
    seed: int = 0
    device: str = "auto"
    about: str = ""

    def __post_init__(self) -> None:
        for field, kind in fields():
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name), kind))
            if isinstance(getattr(self, field.name), float) and not math.isfinite(getattr(self, field.name)):
                raise BrixelError(f"{field.name} is {getattr(self, field.name)}; expected a finite number")
        for name in ("steps", "batch_size", "accumulate", "max_zoom", "val_every", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise BrixelError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in (
            *("fit", "cache", "warmup", "lr", "weight_decay", "clip_norm", "workers", "val_images", "seed"),
            *("l1", "edge", "spectral"),
        ):
            if getattr(self, name) < 0:
                raise BrixelError(f"{name} is {getattr(self, name)}; expected zero or more")
        for name in ("ema", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise BrixelError(f"{name} is {getattr(self, name)}; expected from 0 to below 1")
        if self.teacher_px is not None and self.teacher_px < 1:
            raise BrixelError(f"teacher_px is {self.teacher_px}; expected a positive number of pixels")
        if self.seed >= 2**63:
            raise BrixelError(f"seed is {self.seed}; expected less than 2**63")
        if not self.l1 + self.edge + self.spectral:
            raise BrixelError("l1, edge and spectral are all 0; expected at least one above")
        if not self.images:
            raise BrixelError("images is empty; expected at least one folder of images")
        for name in ("backbone", "out", "images", "val"):
            if "" in (getattr(self, name), *getattr(self, name)):
                raise BrixelError(f"{name} is {getattr(self, name)!r}; expected a path, '.' for the current folder")

    @property
    def loss_weights(self) -> LossWeights:
        """The weights of the losses."""
        return LossWeights(self.l1, self.edge, self.spectral, self.true_rings)


def fields() -> list[tuple["dataclasses.Field[Any]", Any]]:
    """The settings with their types."""
    kinds = typing.get_type_hints(TrainConfig)
    return [(field, kinds[field.name]) for field in dataclasses.fields(TrainConfig)]


def make_config(settings: dict[str, Any], *, preset: str = "default") -> TrainConfig:
    """A configuration from settings by name, over those of a preset ("default", "release")."""
    if preset not in PRESETS:
        raise BrixelError(f"unknown preset {preset!r}; {did_you_mean(preset, PRESETS)}")
    settings = {RENAMED.get(name, name): value for name, value in settings.items()}
    known = [field.name for field, _ in fields()]
    for name in settings:
        if name not in known:
            raise BrixelError(f"unknown setting {name!r}; {did_you_mean(name, known)}")
    missing = [name for name in ("backbone", "images", "out") if settings.get(name) is None]
    if missing:
        raise BrixelError(f"settings without a default are missing: {', '.join(missing)}")
    return TrainConfig(**{**PRESETS[preset], **settings})


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a TOML file."""
    return read_toml(path, "settings")


def write_settings(path: Path, config: TrainConfig) -> None:
    """Write every setting as TOML, whole or not at all; those that are None are left out, as TOML has no such value."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    # JSON's strings, numbers, booleans and flat lists are TOML's, too, but for one control character
    written = {name: json.dumps(value, ensure_ascii=False) for name, value in settings.items()}
    lines = [f"{name} = {text}\n".replace("\x7f", "\\u007f") for name, text in written.items()]
    write_text(path, "".join(lines))


def differences(one: TrainConfig, other: TrainConfig) -> list[str]:
    """Settings in which two runs differ and that matter to the result, as "name: this, not that"."""
    pairs = ((field.name, getattr(one, field.name), getattr(other, field.name)) for field, _ in fields())
    return [f"{name}: {a!r}, not {b!r}" for name, a, b in pairs if a != b and name not in INCIDENTAL]


def _checked(name: str, value: Any, kind: Any) -> Any:
    """The value in the type that the setting has, or an error."""
    if typing.get_origin(kind) is tuple:
        value = [value] if isinstance(value, (str, Path)) else value
        if isinstance(value, (list, tuple)) and all(isinstance(each, (str, Path)) for each in value):
            return tuple(str(each) for each in value)
    elif typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
        raise BrixelError(f"{name} is {value!r}; expected one of {', '.join(map(repr, typing.get_args(kind)))}")
    elif value is None and type(None) in typing.get_args(kind):
        return None
    else:
        plain = next((each for each in typing.get_args(kind) if each is not type(None)), kind)
        if plain is str and isinstance(value, Path):
            return str(value)
        if plain is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if type(value) is plain:
            return value
    raise BrixelError(f"{name} is {value!r}; expected {getattr(kind, '__name__', kind)}")
