"""The training state, from which an interrupted run resumes: one file, written atomically."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brixel.errors import BrixelError, DamagedFileError
from brixel.train.config import TrainConfig, differences, given_settings, make_config
from brixel.utils.atomic_files import atomic_path
from brixel.utils.devices import dtype_name
from brixel.utils.fields import (
    Rule,
    check_field,
    check_table,
    json_table,
    number,
    optional,
    several,
    short_repr,
    whole_number,
)
from brixel.utils.out_of_memory import is_out_of_memory
from brixel.utils.torch_files import load_torch

FORMAT_VERSION = 2
_READ_VERSIONS = (1, 2)  # in 1, "best" is a raw cosine
_ANY = Rule("anything", lambda value: value)
_INDICES = several(whole_number(), "a list of whole numbers", single=False)
_GROUP_KEYS = {"lr", "betas", "eps", "weight_decay"}  # of Adam and AdamW; versions of torch add others
_STATE_KEYS = {"step", "exp_avg", "exp_avg_sq"}
_GROUPS = several(json_table(), "a list of tables", single=False)
_STATE_RULES = {"format_version": whole_number(1), "config": json_table(), "progress": json_table()}
_PROGRESS_RULES = {
    "step": whole_number(0, 2**40),
    "best": optional(number(finite=False)),
    "processes": whole_number(1, 2**20),
}

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
        with atomic_path(path, durable=True) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        if is_out_of_memory(error):
            raise
        raise BrixelError(
            f"cannot write {path} ({error}); the previous state is kept: free some disk space and start again"
        ) from error


def load_state(path: Path, config: TrainConfig, parts: Parts, *, processes: int) -> TrainingState:
    """Load a saved run into its parts. BrixelError if settings that affect the result differ.

    A run may be extended: ``steps`` may be larger than before, and the learning rate follows their schedule from here.
    The best raw cosine of version 0.1 or 0.2 cannot be compared with centred ones, so ``best`` is None there.
    """
    content = _read(path)
    with _checking(path):
        fields = check_table("the state", content, _STATE_RULES | dict.fromkeys(parts, _ANY))
        state = TrainingState(**check_table("progress", fields["progress"], _PROGRESS_RULES, vars(TrainingState())))
        saved = make_config(fields["config"])
        if state.step > saved.steps:
            raise BrixelError(f"it is at step {state.step} of {saved.steps}")
    if content["format_version"] == 1:
        state.best = None
    if config.steps > saved.steps:  # the run is extended
        saved = dataclasses.replace(saved, steps=config.steps)
    changed = differences(config, saved)
    if state.processes != processes:
        changed.append(f"processes: {processes}, not {state.processes}")
    if changed:
        raise BrixelError(
            f"{path.parent} holds a run with other settings ({'; '.join(changed)}): "
            "use the settings that it was started with, or another output folder"
        )
    with _checking(path):
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                _check_module(name, part, fields[name])
            else:
                _check_optimizer(name, part, fields[name])
    for name, part in parts.items():
        part.load_state_dict(content[name])
    return state


def _read(path: Path) -> dict[str, Any]:
    with _checking(path):
        content = load_torch(path, verify=True)
        version = content.get("format_version") if isinstance(content, dict) else None
        if type(version) is not int:
            raise BrixelError("it has no format_version")
    if version not in _READ_VERSIONS:
        raise BrixelError(
            f"{path} has format {version}; this version reads {' and '.join(map(str, _READ_VERSIONS))}: "
            "resume with the version that wrote it"
        )
    return content


@contextmanager
def _checking(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except BrixelError as error:
        raise DamagedFileError(
            f"{path} is damaged or is not the state of a training run; delete it to start from the beginning ({error})"
        ) from error


def _check_module(name: str, module: nn.Module, state: Any) -> None:
    """Raise BrixelError unless a state has the tensors of a module."""
    expected = module.state_dict()
    if not isinstance(state, dict) or state.keys() != expected.keys():
        raise BrixelError(f"{name} has other tensors than the model")
    for key, tensor in expected.items():
        _check_tensor(f"{key} of {name}", state[key], tensor.shape, floating=tensor.is_floating_point())


def _check_optimizer(name: str, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Raise BrixelError unless a state has the groups of an optimiser, and tensors of the shapes of its parameters."""
    groups = optimizer.state_dict()["param_groups"]
    check_table(name, state, {"state": json_table(), "param_groups": _GROUPS})
    found = state["param_groups"]
    indices = [check_field("params", group.get("params"), _INDICES) for group in found]
    if indices != [tuple(group["params"]) for group in groups]:
        raise BrixelError(f"{name} has other groups of parameters")
    for group, theirs in zip(groups, found, strict=True):
        if missing := _GROUP_KEYS - theirs.keys():
            raise BrixelError(f"a group of {name} lacks {', '.join(sorted(missing))}")
        odd = [key for key, value in group.items() if key in theirs and not _same_kind(theirs[key], value)]
        if odd:
            raise BrixelError(
                f"{odd[0]} of {name} is {short_repr(theirs[odd[0]])}; expected a value like {group[odd[0]]!r}"
            )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        if type(index) is not int or index not in range(len(parameters)) or not isinstance(values, dict):
            raise BrixelError(f"{name} has the state of a parameter {short_repr(index)}, which the model lacks")
        if missing := _STATE_KEYS - values.keys():
            raise BrixelError(f"parameter {index} of {name} lacks {', '.join(sorted(missing))}")
        for key, value in values.items():
            shape = parameters[index].shape if key != "step" else torch.Size()
            _check_tensor(f"{short_repr(key)} of parameter {index} of {name}", value, shape, floating=True)


def _check_tensor(name: str, value: Any, shape: torch.Size, *, floating: bool) -> None:
    expected = "floats" if floating else "whole numbers"
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_complex():
        raise BrixelError(f"{name} is a {type(value).__name__}; expected a dense tensor of {expected}")
    if value.shape != shape or value.is_floating_point() != floating:
        found = f"{tuple(value.shape)} {dtype_name(value.dtype)}"
        raise BrixelError(f"{name} is {found}; expected {expected} {tuple(shape)}")


def _same_kind(value: Any, like: Any) -> bool:
    """Whether a setting of an optimiser may be that of this run: switches are equal, numbers are numbers."""
    if isinstance(like, bool):
        return value is like
    if isinstance(like, tuple):
        return isinstance(value, tuple) and list(map(type, value)) == list(map(type, like))
    return isinstance(value, bool | None) if like is None else type(value) is type(like)
