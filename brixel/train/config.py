"""The settings of a training run: one flat dataclass, whose fields are also command-line flags and TOML keys."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from brixel.errors import BrixelError
from brixel.model.losses import LossWeights
from brixel.utils.atomic_files import write_text
from brixel.utils.fields import Rule, boolean, check_fields, check_names, number, one_of, optional, several, text
from brixel.utils.fields import whole_number as whole
from brixel.utils.structured_files import read_toml

# the recipe of the authors' release, apart from its three epochs: set them with ``steps``
RELEASE = MappingProxyType(
    {"generation": 1, "optimizer": "adam", "lr": 1e-3, "schedule": "release", "weight_decay": 0.0, "clip_norm": 0.0,
     "ema": 0.0, "cosine": 0.0, "edge": 1.0, "spectral": 0.1, "true_rings": False, "fit": 0}
)  # fmt: skip
PRESETS = MappingProxyType({"default": MappingProxyType({}), "release": RELEASE})
RENAMED = {"val_pictures": "val_images"}  # from the names in files of version 0.1
# what files of versions 0.1 and 0.2, which state all settings of their time, do not state
BEFORE_SECOND_GENERATION = MappingProxyType({"generation": 1, "cosine": 0.0})
# settings without effect on the result: they may change when a run is resumed
INCIDENTAL = frozenset({"out", "workers", "log_every", "save_every", "device", "cache_dir", "about"})

_LARGEST_SIDE, _MANY = 2**16, 2**40  # px; steps or crops
_FOLDERS = "a folder or a list of folders; '.' is the current one"


def _setting(default: Any, rule: Rule, description: str) -> Any:
    return dataclasses.field(default=default, metadata={"rule": rule, "help": description})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run."""

    backbone: str = _setting(MISSING, text(), "frozen backbone: a folder, a weight file, or ORG/NAME on the Hub")
    images: tuple[str, ...] = _setting(
        MISSING, several(text(), _FOLDERS, least=1), "folders of training images, with subfolders"
    )
    out: str = _setting(MISSING, text(), "output folder; an interrupted run resumes from it")
    val: tuple[str, ...] = _setting((), several(text(), _FOLDERS), "folders of images to validate on")
    architecture: str | None = _setting(
        None, optional(text(empty=True)), "architecture of the backbone, where its files leave it open"
    )
    generation: int = _setting(
        2, whole(1, 3), "2: the adapter starts from the universal upsampler; 1: from interpolation, as in the release"
    )
    train_universal: bool = _setting(
        False, boolean(), "train the universal upsampler in the adapter as well, which is fixed otherwise"
    )
    sizes: tuple[int, ...] = _setting(
        (),
        several(whole(1, _LARGEST_SIDE), "sides in pixels", most=64),
        "sides of the student's crops in pixels, one after another in turn",
    )
    steps: int = _setting(2000, whole(1, _MANY), "optimiser steps of the whole run")
    batch_size: int = _setting(
        16,
        whole(1, _MANY),
        "crops per process and micro-batch; of larger sizes fewer, as many cells as of the smallest",
    )
    accumulate: int = _setting(1, whole(1, _MANY), "micro-batches per step")
    teacher_px: int | None = _setting(
        None,
        optional(whole(1, _LARGEST_SIDE)),
        "side of the teacher's crops, four times the student's; in place of sizes; default: 64 patches",
    )
    max_zoom: float = _setting(
        1.5, number(1, below=1e6), "largest random zoom of a crop; 1: crops span the image's short side"
    )
    flip: bool = _setting(True, boolean(), "mirror half of the crops")
    small: Literal["upsample", "skip"] = _setting(
        "upsample", one_of("upsample", "skip"), "what to do with images whose short side is below teacher_px"
    )
    cutouts: tuple[str, ...] = _setting(
        (),
        several(text(), _FOLDERS),
        "folders with `images` and `masks` (PNG, 0 is the background), whose objects are pasted on crops",
    )
    composites: float = _setting(0.25, number(0, most=1), "share of the crops that get objects of cutouts")
    fit: int = _setting(
        2048,
        whole(0, _MANY),
        "crops to fit the blend of the backbone's maps to, before the first step; 0: keep the last map",
    )
    cache: int = _setting(
        0,
        whole(0, _MANY),
        "fixed crops whose teacher maps are kept on disk, of larger sizes fewer; 0: run the teacher every step",
    )
    cache_dir: str | None = _setting(
        None, optional(text(empty=True)), "folder of the cached teacher maps; default: 'cache' in the output folder"
    )
    optimizer: Literal["adamw", "adam"] = _setting("adamw", one_of("adamw", "adam"), "optimiser")
    lr: float = _setting(1e-3, number(0), "highest learning rate")
    weight_decay: float = _setting(0.01, number(0), "weight decay of matrices and kernels")
    warmup: int = _setting(50, whole(0, _MANY), "steps of linear warm-up of the cosine schedule")
    schedule: Literal["cosine", "release"] = _setting(
        "cosine", one_of("cosine", "release"), "learning rate: cosine decay to zero, or a tenth for the first third"
    )
    clip_norm: float = _setting(1.0, number(0), "largest norm of the gradient; 0: no clipping")
    ema: float = _setting(0.99, number(0, below=1), "decay of the averaged weights, which are the ones saved; 0: none")
    drop_path: float = _setting(0.3, number(0, below=1), "rate of stochastic depth in the adapter")
    l1: float = _setting(1.0, number(0), "weight of the L1 loss")
    cosine: float = _setting(1.0, number(0), "weight of 1 - cosine similarity of centred features")
    edge: float = _setting(0.0, number(0), "weight of the edge loss")
    spectral: float = _setting(0.0, number(0), "weight of the spectral loss")
    true_rings: bool = _setting(True, boolean(), "spectral loss: rings of true frequency, unlike the release")
    val_images: int = _setting(24, whole(0, _MANY), "images to validate on, at most; 0: no validation")
    val_every: int = _setting(200, whole(1, _MANY), "steps between validations")
    save_every: int = _setting(100, whole(1, _MANY), "steps between writes of the training state")
    log_every: int = _setting(10, whole(1, _MANY), "steps between lines of metrics")
    workers: int = _setting(2, whole(0, 1024), "processes that read images")
    seed: int = _setting(0, whole(0, below=2**63), "seed of crops, initial weights and stochastic depth")
    device: str = _setting("auto", text(), "device, such as cpu or cuda; auto: the best one present")
    about: str = _setting("", text(empty=True), "what the images are, for the model card")

    def __post_init__(self) -> None:
        check_fields(self, {field.name: field.metadata["rule"] for field in dataclasses.fields(self)})
        if not self.l1 + self.cosine + self.edge + self.spectral:
            raise BrixelError("l1, cosine, edge and spectral are all 0; expected at least one above")
        if self.sizes and self.teacher_px is not None:
            raise BrixelError("sizes and teacher_px are both given; expected one of them: teacher_px is 4 x a size")
        if list(self.sizes) != sorted(set(self.sizes)):
            raise BrixelError(f"sizes are {list(self.sizes)}; expected ascending ones, each once")

    @property
    def loss_weights(self) -> LossWeights:
        """The weights of the losses."""
        return LossWeights(self.l1, self.edge, self.spectral, self.true_rings, self.cosine)

    def scaled(self, crops: int, index: int) -> int:
        """Of ``crops`` of the smallest size, as many of the size with that index as have the same cells; at least 1."""
        if len(self.sizes) < 2 or not crops:
            return crops
        return max(1, round(crops * (self.sizes[0] / self.sizes[index]) ** 2))

    @property
    def size_count(self) -> int:
        """Number of sizes."""
        return max(1, len(self.sizes))

    @property
    def batch_sizes(self) -> list[int]:
        """Crops per process and micro-batch, by size."""
        return [self.scaled(self.batch_size, index) for index in range(self.size_count)]

    def crops_per_step(self, world_size: int) -> float:
        """Crops of all processes that an optimiser step sees, on average over the sizes."""
        return sum(self.batch_sizes) / self.size_count * self.accumulate * world_size


def fields() -> list[tuple["dataclasses.Field[Any]", Any]]:
    """The settings with their types; ``field.metadata["help"]`` describes each in a line."""
    hints = typing.get_type_hints(TrainConfig)
    return [(field, hints[field.name]) for field in dataclasses.fields(TrainConfig)]


_ARGS = "".join(f"    {field.name}: {field.metadata['help']}.\n" for field in dataclasses.fields(TrainConfig))
_RAISES = "    BrixelError: A value has the wrong type or is out of range, or all losses have weight 0.\n"
TrainConfig.__doc__ = f"{TrainConfig.__doc__}\n\nArgs:\n{_ARGS}\nRaises:\n{_RAISES}"


def make_config(settings: Mapping[str, Any], *, preset: str = "default") -> TrainConfig:
    """A configuration from settings by name, over those of a preset ("default", "release").

    Raises:
        BrixelError: A name is unknown, a setting without a default is missing, or a value is not allowed.
    """
    check_names([preset], PRESETS, "unknown preset")
    settings = {RENAMED.get(name, name): value for name, value in settings.items()}
    if {"fit", "ema", "seed", "out"} <= settings.keys() and "generation" not in settings:
        settings = {**BEFORE_SECOND_GENERATION, **settings}
    check_names(settings, [field.name for field in dataclasses.fields(TrainConfig)], "unknown setting")
    required = [field.name for field in dataclasses.fields(TrainConfig) if field.default is MISSING]
    missing = [name for name in required if settings.get(name) is None]
    if missing:
        raise BrixelError(f"settings without a default are missing: {', '.join(missing)}")
    return TrainConfig(**{**PRESETS[preset], **settings})


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a TOML file."""
    return read_toml(path, "settings")


def given_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that are not None, by name: what is written to files."""
    return {name: value for name, value in dataclasses.asdict(config).items() if value is not None}


def write_settings(path: Path, config: TrainConfig) -> None:
    """Write the settings as TOML, atomically; None, which TOML lacks, is left out."""
    # JSON strings, numbers, booleans and flat lists are valid TOML, except for one control character
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in given_settings(config).items()}
    write_text(path, "".join(f"{name} = {value}\n".replace("\x7f", "\\u007f") for name, value in values.items()))


def differences(config: TrainConfig, other: TrainConfig) -> list[str]:
    """Settings that affect the result and differ, as "name: value in ``config``, not value in ``other``"."""
    names = (field.name for field in dataclasses.fields(config))
    pairs = ((name, getattr(config, name), getattr(other, name)) for name in names)
    return [f"{name}: {a!r}, not {b!r}" for name, a, b in pairs if a != b and name not in INCIDENTAL]
