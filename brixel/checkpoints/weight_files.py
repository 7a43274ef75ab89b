"""Weight files: reading the common formats, loading them strictly into a module, writing safetensors.

A `.pth` is only read with `weights_only=True`, so that a file can hold numbers but not run code.
"""

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from brixel.checkpoints.int8_weights import expanded
from brixel.checkpoints.key_mapping import State, complain
from brixel.checkpoints.tensor_values import check_values
from brixel.checkpoints.weight_kinds import Kind, is_weight_file, kind_of
from brixel.errors import CheckpointError, DamagedFileError, MissingFileError
from brixel.utils.atomic_files import atomic_path
from brixel.utils.out_of_memory import raise_if_out_of_memory
from brixel.utils.safetensors_files import open_safetensors
from brixel.utils.structured_files import check_regular, read_json
from brixel.utils.torch_files import load_data

# how the names of weight files usually end, in lower case
WEIGHT_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".pyth", ".pth.tar", ".pt.tar")
# names of a folder's weight file, in order of preference
WEIGHT_NAMES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

_INDEX = ".index.json"
_DEEPEST = 100  # dots in a name of a group of tensors
Module = TypeVar("Module", bound=nn.Module)
Needed = Callable[[str], bool]


def read_tensors(path: str | os.PathLike[str], needed: Needed = lambda name: True) -> State:
    """All tensors of a weight file, or of a folder that holds one (single or sharded), on the CPU.

    Tensors in nested dicts have the names of all of them, joined by dots: ``{"model": {"norm": t}}`` is `model.norm`.
    8-bit integers with scales become floats. ``needed``: which of them to read, by name; the others are given on the
    meta device, by their shapes.
    Raises MissingFileError where there is no weight file, CheckpointError where it cannot be read as tensors.
    """
    source = Path(path)
    if os.path.isdir(source):
        source = weight_file_in(source)
    try:
        check_regular(source)
    except MissingFileError:
        raise MissingFileError(f"no weight file at {source}") from None
    return expanded(_read_shards(source, needed) if source.name.endswith(_INDEX) else _read_file(source, needed))


def weight_file_in(folder: Path) -> Path:
    """The weight file (or index of shards) of a folder in Hugging Face layout, or the only weight file in it."""
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in visible if named_as_weights(path.name) or is_weight_file(path)]
    if len(files) == 1:
        return files[0]
    if any(path.suffix == ".distcp" for path in visible):
        raise CheckpointError(
            f"{folder} is a checkpoint of torch.distributed, whose tensors are in parts: join them with "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE` and give the file"
        )
    found = ", ".join(path.name for path in files) or f"none among {len(visible)} files"
    raise MissingFileError(f"{folder}: expected model.safetensors or a single weight file; found {found}")


def named_as_weights(name: str) -> bool:
    """Whether a file's name ends as those of weight files usually do. What it is, its content decides."""
    return name.casefold().endswith(WEIGHT_ENDINGS)


def _read_file(path: Path, needed: Needed) -> State:
    if kind_of(path) is Kind.SAFETENSORS:
        return _read_safetensors(path, needed)
    content = _flat(_read_pickled(path), path)
    return {name: tensor if needed(name) else tensor.to("meta") for name, tensor in content.items()}


def _read_safetensors(path: Path, needed: Needed) -> State:
    with open_safetensors(path) as file:
        names = file.keys()
        unread = {name: file.get_slice(name).get_shape() for name in names if not needed(name)}
        read = {name: file.get_tensor(name) for name in names if name not in unread}
    return read | {name: torch.empty(shape, device="meta") for name, shape in unread.items()}


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names; CheckpointError where one is not in the same folder."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise DamagedFileError(f"{index} is no index of weight shards: weight_map is no table; fetch it again")
    names = {name if isinstance(name, str) else repr(name)[:80] + "/" for name in shards.values()}
    outside = [name for name in names if Path(name).name != name or name == ".."]
    if outside:
        raise CheckpointError(f"{index} names a shard outside its own folder: {outside[0][:80]!r}")
    return sorted(names)


def _read_shards(index: Path, needed: Needed) -> State:
    names = shard_names(index)
    absent = [name for name in names if not os.path.isfile(index.parent / name)]
    if absent:
        raise MissingFileError(
            f"{index.parent} lacks {len(absent)} of {len(names)} weight shards: {absent[0][:80]}, ..."
        )
    state: State = {}
    for name in names:
        state.update(_read_file(index.parent / name, needed))
    return state


def _read_pickled(path: Path) -> Mapping[Any, Any]:
    # memory-mapped where the format allows it: the file of the largest backbone has 27 GB
    allowed: list[Any] = [argparse.Namespace]  # settings of a training: names and plain values
    try:
        with torch.serialization.safe_globals(allowed):
            content = load_data(path, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        names = f"; it names {found[1]}" if found else ""
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors, which could run code; only plain tensors are read{names}. "
            "If you trust the file: torch.save the state_dict in torch.load(file, weights_only=False), and give that"
        ) from error
    except Exception as error:  # damage causes many kinds of errors: IndexError, struct.error, BadZipFile, ...
        raise_if_out_of_memory(error, path)
        raise DamagedFileError(f"{path} is damaged or no PyTorch weight file ({error})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds {type(content).__name__}; expected a dict of tensors by name")
    return content


def _flat(content: Mapping[Any, Any], path: Path) -> State:
    """The tensors in nested dicts and lists, under the joined names; what is no tensor is left out."""
    state: State = {}
    seen: set[int] = set()  # a pickle may hold itself
    waiting: list[tuple[str, Any]] = [("", content)]
    for prefix, group in waiting:  # which grows
        if id(group) in seen or prefix.count(".") > _DEEPEST:
            continue
        seen.add(id(group))
        for key, value in group.items() if isinstance(group, Mapping) else enumerate(group):
            name = f"{prefix}{key}"
            if isinstance(value, Tensor):
                if name in state:
                    raise CheckpointError(f"{path} holds two tensors of the name {name}")
                state[name] = value
            elif isinstance(value, Mapping | list | tuple):
                waiting.append((f"{name}.", value))
    if not state:
        keys = ", ".join(map(str, list(content)[:4])) or "nothing"
        raise CheckpointError(f"{path} holds no tensors by name; it holds {keys}")
    return state


def load_into(build: Callable[[], Module], state: Mapping[str, Tensor], dtype: torch.dtype, *, what: str) -> Module:
    """Build a module without allocating it, and load ``state``, whose keys and shapes must be those of the module.

    Floating-point tensors are cast to ``dtype``. ``what`` opens the error: "FILE does not fit MODEL".
    """
    with torch.device("meta"):
        module = build()
    expected = module.state_dict()
    complain(
        what,
        missing=[key for key in expected if key not in state],
        misshaped=[
            f"{key} {tuple(state[key].shape)}, model has {tuple(tensor.shape)}"
            for key, tensor in expected.items()
            if key in state and state[key].shape != tensor.shape
        ],
        unknown=[key for key in state if key not in expected],
    )
    check_values({key: state[key] for key, tensor in expected.items() if tensor.is_floating_point()}, what)
    # Copied even where the dtype is right: tensors of a memory-mapped file may be unaligned, and products of unaligned
    # matrices are slower and differ in their last bits.
    dtypes = {key: dtype if tensor.is_floating_point() else tensor.dtype for key, tensor in expected.items()}
    loaded = {key: state[key].to(dtypes[key], copy=True) for key in expected}
    narrowed = {key: tensor for key, tensor in loaded.items() if tensor.dtype == dtype != state[key].dtype}
    check_values(narrowed, f"{what}, as {dtype}")  # too large a number becomes infinite
    module.load_state_dict(loaded, assign=True)
    unset = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not unset, f"outside the state dict: {unset}"
    return module


def write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    with atomic_path(path, durable=True) as temporary:
        save_file({key: tensor.detach().contiguous().cpu() for key, tensor in state.items()}, temporary)


def shapes_of(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a module's state, without allocating it."""
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in build().state_dict().items()}
