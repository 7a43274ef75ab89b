"""The training state, from which an interrupted run resumes: one file, written atomically."""

import dataclasses
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brixel.errors import BrixelError
from brixel.train.config import TrainConfig, differences, given_settings, make_config
from brixel.utils.atomic_files import atomic_path

FORMAT_VERSION = 2
_READ_VERSIONS = (1, 2)  # in 1, "best" is a raw cosine

Parts = Mapping[str, nn.Module | torch.optim.Optimizer]
"""What a run changes, by its name in the file."""


@dataclass
class TrainingState:
    """How far a run is."""

    step: int = 0  # steps done
    best: float | None = None  # the best validation so far, as centred cosine similarity to the teacher
    processes: int = 1  # with another number, the rest of the run would read other batches


def save_state(path: Path, config: TrainConfig, state: TrainingState, parts: Parts) -> None:
    """Write what the rest of a run depends on. Random states are not part of it: they follow from seed and step."""
    content = {
        "format_version": FORMAT_VERSION,
        "config": given_settings(config),
        "progress": dataclasses.asdict(state),
        **{name: part.state_dict() for name, part in parts.items()},
    }
    try:
        with atomic_path(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        raise BrixelError(
            f"cannot write {path} ({error}); the previous state is kept: free some disk space and start again"
        ) from error


def load_state(path: Path, config: TrainConfig, parts: Parts, *, processes: int) -> TrainingState:
    """Load a saved run into its parts. BrixelError if settings that affect the result differ.

    The best raw cosine of version 0.1 or 0.2 cannot be compared with centred ones, so ``best`` is None there.
    """
    content = _read(path)
    state = TrainingState(**content["progress"])
    if content["format_version"] == 1:
        state.best = None
    changed = differences(config, make_config(content["config"]))
    if state.processes != processes:
        changed.append(f"processes: {processes}, not {state.processes}")
    if changed:
        raise BrixelError(
            f"{path.parent} holds a run with other settings ({'; '.join(changed)}): "
            "use the settings that it was started with, or another output folder"
        )
    for name, part in parts.items():
        part.load_state_dict(content[name])
    return state


def _read(path: Path) -> dict[str, Any]:
    damaged = f"{path} is damaged or is not the state of a training run; delete it to start from the beginning"
    if not zipfile.is_zipfile(path):
        raise BrixelError(damaged)
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not notice damage inside a tensor
            intact = archive.testzip() is None
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage raises a dozen kinds of exceptions
        raise BrixelError(damaged) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if not intact or version is None:
        raise BrixelError(damaged)
    if version not in _READ_VERSIONS:
        raise BrixelError(
            f"{path} has format {version}; this version reads {' and '.join(map(str, _READ_VERSIONS))}: "
            "resume with the version that wrote it"
        )
    return content
