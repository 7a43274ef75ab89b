"""Renaming other people's checkpoints: one table per format, every foreign key accounted for.

A table says, for each of our keys, which of theirs make it up. A key of theirs that no table entry uses and that is not
listed as known-and-not-needed is an error, as is one of ours that nothing fills.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from brixel.errors import CheckpointError

State = dict[str, Tensor]


@dataclass(frozen=True)
class KeyMap:
    """One checkpoint format. ``{i}`` in a key stands for a block's index, on both sides.

    ``marks`` are keys that only this format has, ``unmarked`` keys that it never has, ``axes`` how many axes a tensor
    of theirs has where that tells formats apart. ``tensors``: ours to theirs; several of theirs are concatenated along
    the first axis. ``zeros``: theirs that a whole file may lack, read as zeros. ``dropped``: theirs that are known and
    not needed (shell patterns); ``unread``: the same, left in the file. ``aliases``: spellings of theirs, as (regular
    expression, replacement). ``prepare`` reworks values before renaming. ``options``: settings of the model that files
    of this format were made for.
    """

    name: str
    tensors: Mapping[str, tuple[str, ...]]
    marks: tuple[str, ...] = ()
    unmarked: tuple[str, ...] = ()
    axes: Mapping[str, int] = field(default_factory=dict)
    zeros: frozenset[str] = frozenset()
    dropped: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    prepare: Callable[[State], State] | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    def canonical(self, state: State) -> State:
        """The state with the aliases replaced; a key whose other spelling is there as well stays as it is."""
        for pattern, replacement in self.aliases:
            spelt = {key: re.sub(pattern, replacement, key) for key in state}
            state = {key if new != key and new in state else new: state[key] for key, new in spelt.items()}
        return state

    def prepared(self, state: State) -> State:
        """The state under this format's own names, its values as the table takes them."""
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


def rename(state: State, key_map: KeyMap, shapes: Mapping[str, tuple[int, ...]], *, what: str) -> State:
    """The tensors under our names, in the order of ``shapes`` (ours to shape), or one error with all that is wrong.

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
        pieces = [_piece(source, state, key_map, len(sources), shape) for source in sources]
        missing += [source for source, piece in zip(sources, pieces, strict=True) if piece is None]
        found = [piece for piece in pieces if piece is not None]
        if len(found) < len(pieces):
            continue
        tensor = found[0] if len(found) == 1 else _concatenated(found)
        if tensor is None or tuple(tensor.shape) != tuple(shape):
            came = " + ".join(str(tuple(piece.shape)) for piece in found)
            misshaped.append(f"{' + '.join(sources)} {came}, model has {tuple(shape)}")
            continue
        ours[key] = tensor
    left = (*key_map.dropped, *key_map.unread)
    unknown = [key for key in state if key not in used and not any(fnmatchcase(key, each) for each in left)]
    complain(what, missing=missing, misshaped=misshaped, unknown=unknown)
    return ours


def complain(what: str, *, missing: list[str], misshaped: list[str], unknown: list[str]) -> None:
    """Raise one CheckpointError with counts and samples of everything that does not fit; nothing where all does."""
    lists = (("missing", missing), ("of another shape", misshaped), ("not known", unknown))
    parts = [f"{len(keys)} {label}: {_sample(keys)}" for label, keys in lists if keys]
    if parts:
        raise CheckpointError(f"{what}: {'; '.join(parts)}")


def _sample(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")


def _sources(key: str, key_map: KeyMap) -> tuple[str, ...]:
    """Their keys for one of ours; none where the format has nothing of the kind."""
    if key in key_map.tensors:
        return key_map.tensors[key]
    index = re.search(r"(?<=\.)\d+(?=\.)", key)
    if index is None:
        return ()
    template = f"{key[: index.start()]}{{i}}{key[index.end() :]}"
    return tuple(source.replace("{i}", index[0]) for source in key_map.tensors.get(template, ()))


def _piece(source: str, state: State, key_map: KeyMap, parts: int, shape: tuple[int, ...]) -> Tensor | None:
    """Their tensor; zeros where the format may leave it out and the whole file does; else None."""
    if source in state:
        return state[source]
    template = re.sub(r"(?<=\.)\d+(?=\.)", "{i}", source, count=1)
    if template not in key_map.zeros:
        return None
    pattern = re.escape(template).replace(re.escape("{i}"), r"\d+")
    if any(re.fullmatch(pattern, key) for key in state):
        return None
    return torch.zeros(shape[0] // parts, *shape[1:], device=next(iter(state.values())).device)


def _concatenated(pieces: list[Tensor]) -> Tensor | None:
    """The pieces as one along the first axis; None where their other axes differ."""
    if len({piece.shape[1:] for piece in pieces}) > 1:
        return None
    return torch.cat([piece.to(pieces[0].dtype) for piece in pieces])
