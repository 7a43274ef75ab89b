"""What a run needs to go on after it was killed: one file, written whole or not at all."""

import copy
import dataclasses
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from brixel.errors import BrixelError
from brixel.train.config import TrainConfig, differences, make_config
from brixel.utils.atomic_files import atomic_path

FORMAT_VERSION = 1

Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Progress:
    """Where a run stands: steps done, the best validation so far (cosine to the teacher, None before the first).

    ``processes`` share it: with another number of them the rest of the run would take other batches.
    """

    step: int = 0
    best: float | None = None
    processes: int = 1


class Average(Generic[Module]):
    """Exponential moving average of a module's parameters; buffers are taken as they are."""

    def __init__(self, module: Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's parameters after step ``step`` (from 0); young averages follow faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, current in zip(self.module.parameters(), module.parameters(), strict=True):
            average.lerp_(current, 1 - decay)
        for buffer, newest in zip(self.module.buffers(), module.buffers(), strict=True):
            buffer.copy_(newest)


def save_state(
    path: Path,
    config: TrainConfig,
    progress: Progress,
    module: nn.Module,
    average: Average[Any],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write all that the rest of a run depends on; randomness is a function of seed and step, so none is kept."""
    content = {
        "format_version": FORMAT_VERSION,
        "config": {name: value for name, value in dataclasses.asdict(config).items() if value is not None},
        "progress": dataclasses.asdict(progress),
        "module": module.state_dict(),
        "average": average.module.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    try:
        with atomic_path(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # torch's own writer says RuntimeError of a full disk
        raise BrixelError(
            f"cannot write {path} ({error}); the state before it is kept: make room and start again"
        ) from error


def load_state(
    path: Path,
    config: TrainConfig,
    module: nn.Module,
    average: Average[Any],
    optimizer: torch.optim.Optimizer,
    *,
    processes: int = 1,
) -> Progress:
    """Put a saved run back in place. BrixelError if it was made with settings that matter and differ."""
    content = _read(path)
    progress = Progress(**content["progress"])
    changed = differences(config, make_config(content["config"]))
    if progress.processes != processes:
        changed.append(f"processes: {processes}, not {progress.processes}")
    if changed:
        raise BrixelError(
            f"{path.parent} holds a run with other settings ({'; '.join(changed)}): "
            "give the settings that it was started with, or another --out"
        )
    module.load_state_dict(content["module"])
    average.module.load_state_dict(content["average"])
    optimizer.load_state_dict(content["optimizer"])
    return progress


def _read(path: Path) -> dict[str, Any]:
    damaged = f"{path} is damaged or no state of a training run; delete it to start anew"
    if not zipfile.is_zipfile(path):
        raise BrixelError(damaged)
    try:
        with zipfile.ZipFile(path) as archive:  # torch reads over damage inside a tensor
            sound = archive.testzip() is None
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage surfaces as any of a dozen kinds
        raise BrixelError(damaged) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if not sound or version is None:
        raise BrixelError(damaged)
    if version != FORMAT_VERSION:
        raise BrixelError(f"{path} has format {version}; this version reads {FORMAT_VERSION}: go on with the other one")
    return content
