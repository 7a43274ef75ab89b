"""Renaming the keys of other people's checkpoints: one table per format, every foreign key accounted for.

A table lists, for every key of ours, the keys of theirs that it is made of. A key of theirs that is neither used nor
listed as not needed is an error, and so is a key of ours that nothing fills.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from brixel.errors import CheckpointError

State = dict[str, Tensor]
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")  # of a block


@dataclass(frozen=True)
class KeyMap:
    """One checkpoint format. ``{i}`` in a key, ours or theirs, is a block's index.

    Args:
        name: The format in words.
        tensors: Our keys to theirs; several of theirs are concatenated along the first axis.
        marks: Keys that only this format has.
        unmarked: Keys that this format never has.
        axes: Number of axes of some of their tensors, where that distinguishes formats.
        zeros: Keys of theirs that a whole file may lack; read as zeros.
        dropped: Keys of theirs that are not needed, as shell patterns.
        unread: Keys of theirs that are not even read from the file, as shell patterns.
        unfilled: Endings of keys of theirs that may be NaN, which means that nothing was written there.
        aliases: Other spellings of their keys, as (regular expression, replacement).
        prepare: Changes the tensors before they are renamed.
        options: Fields of :class:`ViTConfig` that files of this format imply.
    """

    name: str
    tensors: Mapping[str, tuple[str, ...]]
    marks: tuple[str, ...] = ()
    unmarked: tuple[str, ...] = ()
    axes: Mapping[str, int] = field(default_factory=dict)
    zeros: frozenset[str] = frozenset()
    dropped: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    unfilled: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    prepare: Callable[[State], State] | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    def used(self, state: State) -> State:
        """Those tensors of a state, under this format's own names, that become part of ours."""
        sources = {source for theirs in self.tensors.values() for source in theirs}
        return {
            name: tensor
            for name, tensor in state.items()
            if name in sources or _template(name) in sources or name.endswith(self.unfilled)
        }

    def canonical(self, state: State) -> State:
        """The state with aliases replaced; a key stays as it is where both spellings are present."""
        for pattern, replacement in self.aliases:
            spelt = {key: re.sub(pattern, replacement, key) for key in state}
            state = {key if new != key and new in state else new: state[key] for key, new in spelt.items()}
        return state

    def prepared(self, state: State) -> State:
        """The state under this format's own names, its tensors in the shapes that the table expects."""
        state = self.canonical(state)
        return state if self.prepare is None else self.prepare(state)

    def matches(self, state: State) -> bool:
        """Whether the keys are those of this format."""
        state = self.canonical(state)
        return (
            all(mark in state for mark in self.marks)
            and not any(mark in state for mark in self.unmarked)
            and all(key in state and state[key].ndim == axes for key, axes in self.axes.items())
        )


def layer_keys(ours: str, *theirs: str) -> dict[str, tuple[str, ...]]:
    """The entries of a table for one layer with weight and bias, which may join several of theirs."""
    return {f"{ours}.{part}": tuple(f"{layer}.{part}" for layer in theirs) for part in ("weight", "bias")}


def rename(state: State, key_map: KeyMap, shapes: Mapping[str, tuple[int, ...]], *, what: str) -> State:
    """The tensors under our names, in the order of ``shapes`` (our keys to shapes), or one error with all faults.

    ``what`` opens that error: "FILE does not fit MODEL".
    """
    state = key_map.prepared(state)
    ours: State = {}
    used: set[str] = set()
    missing: list[str] = []
    misshaped: list[str] = []
    for key, shape in shapes.items():
        sources = _sources(key, key_map)
        if not sources:
            missing.append(f"{key} (never in this layout)")
            continue
        used.update(sources)
        parts = [_part(source, state, key_map, len(sources), shape) for source in sources]
        missing += [source for source, part in zip(sources, parts, strict=True) if part is None]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            continue
        tensor = found[0] if len(found) == 1 else _concatenated(found)
        if tensor is None or tuple(tensor.shape) != tuple(shape):
            came = " + ".join(str(tuple(part.shape)) for part in found)
            misshaped.append(f"{' + '.join(sources)} {came}, model has {tuple(shape)}")
            continue
        ours[key] = tensor
    ignored = (*key_map.dropped, *key_map.unread)
    unknown = [key for key in state if key not in used and not any(fnmatchcase(key, pattern) for pattern in ignored)]
    complain(what, missing=missing, misshaped=misshaped, unknown=unknown)
    return ours


def complain(what: str, *, missing: list[str], misshaped: list[str], unknown: list[str]) -> None:
    """Raise one CheckpointError with counts and samples of all keys that do not fit, if there are any."""
    lists = (("missing", missing), ("of another shape", misshaped), ("not known", unknown))
    parts = [f"{len(keys)} {label}: {_sample(keys)}" for label, keys in lists if keys]
    if parts:
        raise CheckpointError(f"{what}: {'; '.join(parts)}")


def _sample(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")


def _sources(key: str, key_map: KeyMap) -> tuple[str, ...]:
    """Their keys for one of ours; none where the format has no such tensor."""
    if key in key_map.tensors:
        return key_map.tensors[key]
    index = _INDEX.search(key)
    if index is None:
        return ()
    template = _template(key)
    return tuple(source.replace("{i}", index[0]) for source in key_map.tensors.get(template, ()))


def _template(key: str) -> str:
    """A key with its first index replaced by "{i}", as in key maps."""
    return _INDEX.sub("{i}", key, count=1)


def _part(source: str, state: State, key_map: KeyMap, count: int, shape: tuple[int, ...]) -> Tensor | None:
    """Their tensor, one of ``count``; zeros where the format may lack it and the whole file does; else None."""
    if source in state:
        return state[source]
    template = _template(source)
    if template not in key_map.zeros:
        return None
    pattern = re.escape(template).replace(re.escape("{i}"), r"\d+")
    if any(re.fullmatch(pattern, key) for key in state):
        return None
    return torch.zeros(shape[0] // count, *shape[1:], device=next(iter(state.values())).device)


def _concatenated(parts: list[Tensor]) -> Tensor | None:
    """The parts as one tensor, along the first axis; None where their other axes differ."""
    if len({part.shape[1:] for part in parts}) > 1:
        return None
    return torch.cat([part.to(parts[0].dtype) for part in parts])
