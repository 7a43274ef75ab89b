"""Where in a checkpoint the backbone is: below which names, as whose weights, and what lies beside it.

Names are flat here: the tensor "norm.weight" in the nested dict "teacher" is `teacher.norm.weight`, just like one that
a wrapper or a bigger network prefixed so. A backbone is found by the keys that mark its format (:class:`KeyMap`): what
precedes them all is its root, such as `teacher.backbone.`, whatever it is called.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from brixel.checkpoints.key_mapping import KeyMap, State
from brixel.errors import CheckpointError

_SEGMENT = r"(?:^|(?<=\.))"  # the start of a part of a name
# parts that wrappers of modules add, anywhere: torch.compile, FSDP, activation checkpoints, DataParallel, Fabric
_WRAPPERS = re.compile(
    _SEGMENT + r"(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module|module)\."
)
_CHUNKED = re.compile(_SEGMENT + r"blocks\.(\d+)\.(\d+)\.")  # blocks in chunks, as Meta trains them under FSDP
_FLATTENED = re.compile(r"(?:^|\.)_?flat_param(?:_\d+)?$")  # all parameters of a module as one, by FSDP

# Words in roots that tell the networks of one training apart. DINOv3 keeps an earlier teacher, "gram", for a loss.
_AVERAGES = frozenset({"ema", "averaged", "average", "swa", "shadow", "momentum", "encoder_k"})
_TEACHERS = frozenset({"teacher", "target"})
_STUDENTS = frozenset({"student", "online", "encoder_q", "gram"})
_PLAIN = 2  # the rank of a root without such words
_OPTIMISERS = frozenset(
    {"optimizer", "optimizers", "optim", "opt", "adam", "adamw", "sgd", "buffer", "buffers", "exp", "grad", "grads"}
)  # moments have the names of weights
_RECORDS = frozenset({"scheduler", "schedulers", "scaler", "callbacks", "loops", "rng", "sampler", "dataloader"})
# words in the names of what belongs to no backbone: heads, other parts of bigger networks, losses
_HEADS = frozenset(
    (
        *("head", "heads", "classifier", "classifiers", "fc", "linear", "probe", "logits", "prototype"),
        *("prototypes", "projector", "projection", "proj", "predictor", "prediction", "pred", "decoder", "decode"),
        *("neck", "fpn", "ppm", "aspp", "pooler", "queue", "loss", "losses", "criterion", "metric", "metrics", "aux"),
        *("auxiliary", "center", "text", "language", "lm", "mask_token"),
    )
)


@dataclass(frozen=True)
class FoundBackbone:
    """A backbone in a checkpoint.

    ``key_map``: its format. ``root``: what precedes its names in the checkpoint. ``state``: its tensors, by names
    without the root, and those beside it that nothing explains, by their whole names, so that they are refused.
    ``aside``: heads and other parts that were left aside, by name. ``others``: roots of other backbones.
    """

    key_map: KeyMap
    root: str
    state: State
    aside: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def report(self) -> str:
        """Which one was taken, and what was left aside, in words; empty where there was nothing to choose."""
        parts = []
        if self.others or _rank(self.root) != _PLAIN:
            left = f", not at {', '.join(map(_place, self.others))}" if self.others else ""
            parts.append(f"the backbone taken is the one at {_place(self.root)}{left}")
        if self.aside:
            shown = ", ".join(self.aside[:8]) + (", ..." if len(self.aside) > 8 else "")
            parts.append(f"left aside, as not of the backbone: {shown}")
        return "; ".join(parts)


def find_backbone_in(
    state: State,
    key_maps: Sequence[KeyMap],
    path: str,
    fits: Callable[[KeyMap, State], bool] = lambda key_map, state: True,
) -> FoundBackbone:
    """The backbone in a checkpoint, of one of the formats ``key_maps``.

    Of several, one that ``fits``; of these an average of weights over a training, before a teacher, before any other,
    before a student. ``path`` names the checkpoint in errors.

    Raises CheckpointError where there is none, or two that nothing tells apart.
    """
    state = _unwrapped(state)
    found = {root: pair for root in _roots(state, key_maps) if (pair := _below(root, state, key_maps)) is not None}
    found = {root: (key_map, _own(root, below, found)) for root, (key_map, below) in found.items()}
    if not found:
        raise CheckpointError(_nothing(state, key_maps, path))
    fitting = [root for root, pair in found.items() if fits(*pair)] or list(found)
    root = _best(fitting, found, path)
    key_map, below = found[root]
    others = [other for other in found if other != root]
    kept, aside = _sorted_out(root, others, below, state, (*key_map.dropped, *key_map.unread))
    return FoundBackbone(key_map, root, kept, aside, tuple(others))


def _unwrapped(state: State) -> State:
    """The state without the parts of names that wrappers add, except where two names would become one."""
    plain = {name: _WRAPPERS.sub("", name) for name in state}
    counts = Counter(plain.values())
    return {name if counts[new] > 1 else new: state[name] for name, new in plain.items()}


def _roots(state: State, key_maps: Sequence[KeyMap]) -> list[str]:
    """What precedes a mark of some format, in the order of the names."""
    marks = tuple({mark for key_map in key_maps for mark in key_map.marks})
    endings = tuple(f".{mark}" for mark in marks)
    roots: dict[str, None] = {}
    for name in state:
        if name in marks or name.endswith(endings):
            roots |= {name.removesuffix(mark): None for mark in marks if name == mark or name.endswith(f".{mark}")}
    return [root for root in roots if not _words(root) & _OPTIMISERS]


def _below(root: str, state: State, key_maps: Sequence[KeyMap]) -> tuple[KeyMap, State] | None:
    """The format of the tensors below a root, and these; None where they are no backbone."""
    below = _unchunked({name.removeprefix(root): state[name] for name in state if name.startswith(root)})
    key_map = next((key_map for key_map in key_maps if key_map.matches(below)), None)
    return None if key_map is None else (key_map, below)


def _own(root: str, below: State, roots: Iterable[str]) -> State:
    """The tensors below a root, without those of other backbones below it."""
    deeper = tuple(other.removeprefix(root) for other in roots if other != root and other.startswith(root))
    return {name: tensor for name, tensor in below.items() if not name.startswith(deeper)}


def _unchunked(state: State) -> State:
    """The state with blocks numbered through: `blocks.CHUNK.INDEX.` becomes `blocks.INDEX.`."""
    places = sorted({(int(match[1]), int(match[2])) for name in state if (match := _CHUNKED.match(name))})
    restarts = len({index for _, index in places}) < len(places)  # from 0 in every chunk
    numbers = {place: number if restarts else place[1] for number, place in enumerate(places)}
    return {
        _CHUNKED.sub(lambda match: f"blocks.{numbers[int(match[1]), int(match[2])]}.", name): tensor
        for name, tensor in state.items()
    }


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; of those that are not read, whether they may."""
    plain = all(tensor.layout == torch.strided and not tensor.is_nested for tensor in (one, other))
    if one is other or not plain or one.shape != other.shape or one.dtype != other.dtype:
        return one is other
    return (one.is_meta and other.is_meta) or (not one.is_meta and not other.is_meta and torch.equal(one, other))


def _best(roots: Sequence[str], found: Mapping[str, tuple[KeyMap, State]], path: str) -> str:
    """The root of the backbone to take."""
    best = min(map(_rank, roots))
    same = [root for root in roots if _rank(root) == best]
    first = found[same[0]][1]
    for other in same[1:]:
        state = found[other][1]
        if state.keys() != first.keys() or not all(_same(state[name], first[name]) for name in first):
            raise CheckpointError(
                f"{path} holds several backbones, at {', '.join(map(_place, same))}, and nothing says which one is "
                "meant: save the tensors of that one to a file of their own"
            )
    return same[0]


def _rank(root: str) -> int:
    """The place of a root in the order of preference."""
    words = _words(root)
    if words & _STUDENTS:
        return _PLAIN + 1
    if words & _AVERAGES:
        return _PLAIN - 2
    return _PLAIN - 1 if words & _TEACHERS else _PLAIN


def _sorted_out(
    root: str, others: Sequence[str], below: State, state: State, ignored: Sequence[str]
) -> tuple[State, tuple[str, ...]]:
    """The tensors of the backbone and those that nothing explains, and the names of parts that are left aside."""
    siblings = {_first(_beyond(other, root)) for other in others}
    kept: State = {}
    aside: dict[str, None] = {}  # in order
    for name, tensor in below.items():
        if _words(_first(name)) & _HEADS and not _listed(name, ignored):
            aside[_first(name)] = None
        elif tensor.ndim or "." in name:  # else a counter
            kept[name] = tensor
    for name, tensor in state.items():
        beyond = _beyond(name, root)
        words = _words(_first(beyond))
        if _first(beyond) in siblings or words & (_OPTIMISERS | _RECORDS) or _listed(beyond, ignored):
            continue
        if name.startswith(root) or not tensor.ndim:  # the backbone's own; a counter
            continue
        if words & (_HEADS | _AVERAGES | _TEACHERS | _STUDENTS):
            aside[_first(beyond)] = None
        else:
            kept[name] = tensor
    return kept, tuple(aside)


def _first(name: str) -> str:
    return name.partition(".")[0]


def _beyond(name: str, root: str) -> str:
    """A name from the part on where it differs from a root."""
    parts, own = name.split("."), root.split(".")
    shared = 0
    while shared < min(len(parts) - 1, len(own)) and parts[shared] == own[shared]:
        shared += 1
    return ".".join(parts[shared:])


def _words(text: str) -> set[str]:
    """The parts of a name, and the words in them, in lower case."""
    return {*text.lower().split("."), *re.findall("[a-z]+", text.lower())}


def _listed(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _place(root: str) -> str:
    return repr(root.rstrip(".")) if root else "the top"


def _nothing(state: State, key_maps: Sequence[KeyMap], path: str) -> str:
    """Why no backbone was found."""
    if any(_FLATTENED.search(name) for name in state):
        return (
            f"{path} holds parameters that FSDP has flattened, in parts: save it again with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict and full_state_dict=True"
        )
    if "adapter.level_embed" in state:
        return f"{path} is an adapter of the paper's authors, not a backbone: use from_release"
    if any(name.startswith("adapter.") for name in state):
        return f"{path} is an adapter of brixel, not a backbone: give its folder to from_pretrained"
    some = ", ".join(list(state)[:5])
    known = ", ".join(dict.fromkeys(key_map.name for key_map in key_maps))
    return f"{path} holds {len(state)} tensors ({some}, ...), no layout that we know; known: {known}"
