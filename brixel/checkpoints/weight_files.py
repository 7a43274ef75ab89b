"""Weight files: reading the common formats, loading them strictly into a module, writing safetensors.

A `.pth` is only read with `weights_only=True`, so that a file can hold numbers but not run code.
"""

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from brixel.checkpoints.int8_weights import expanded
from brixel.checkpoints.key_mapping import State, complain
from brixel.errors import CheckpointError, DamagedFileError
from brixel.utils.atomic_files import atomic_path

PICKLED = (".pth", ".pt", ".bin", ".ckpt")
# names of a folder's weight file, in order of preference
WEIGHT_NAMES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

Module = TypeVar("Module", bound=nn.Module)
Needed = Callable[[str], bool]


def read_tensors(path: str | os.PathLike[str], needed: Needed = lambda name: True) -> State:
    """All tensors of a weight file, or of a folder that holds one (single or sharded), on the CPU.

    8-bit integers with scales become floats. ``needed``: which of them to read, by name; the others are given on the
    meta device, by their shapes.
    Raises FileNotFoundError where there is no weight file, CheckpointError where it cannot be read as tensors.
    """
    source = Path(path)
    if source.is_dir():
        source = weight_file_in(source)
    if not source.is_file():
        raise FileNotFoundError(f"no weight file at {source}")
    return expanded(_read_shards(source, needed) if source.name.endswith(".index.json") else _read_file(source, needed))


def weight_file_in(folder: Path) -> Path:
    """The weight file (or index of shards) of a folder in Hugging Face layout, or the only weight file in it."""
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLED))
    if len(files) == 1:
        return files[0]
    found = ", ".join(path.name for path in files) or "none"
    raise FileNotFoundError(f"{folder}: expected model.safetensors or a single weight file; found {found}")


def _read_file(path: Path, needed: Needed) -> State:
    if path.suffix == ".safetensors":
        return _read_safetensors(path, needed)
    if path.suffix in PICKLED:
        content = _read_pickled(path)
        return {name: tensor if needed(name) else tensor.to("meta") for name, tensor in content.items()}
    raise CheckpointError(f"{path}: expected a weight file: .safetensors, {', '.join(PICKLED)}, or a folder with one")


def _read_safetensors(path: Path, needed: Needed) -> State:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            unread = {name: file.get_slice(name).get_shape() for name in names if not needed(name)}
            read = {name: file.get_tensor(name) for name in names if name not in unread}
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from error
    return read | {name: torch.empty(shape, device="meta") for name, shape in unread.items()}


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names; CheckpointError where one is not in the same folder."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{index} is no index of weight shards ({error!r})") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name or name == ".."]
    if outside:
        raise CheckpointError(f"{index} names a shard outside its own folder: {outside[0]!r}")
    return sorted(names)


def _read_shards(index: Path, needed: Needed) -> State:
    names = shard_names(index)
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{index.parent} lacks {len(absent)} of {len(names)} weight shards: {absent[0]}, ...")
    state: State = {}
    for name in names:
        state.update(_read_file(index.parent / name, needed))
    return state


def _read_pickled(path: Path) -> State:
    # memory-mapped where the format allows it: the file of the largest backbone has 27 GB
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors, which could run code; only plain tensors are read"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # damage causes many kinds of errors: IndexError, struct.error, BadZipFile, ...
        raise DamagedFileError(f"{path} is damaged or no PyTorch weight file ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}; expected a dict of tensors by name")
    for nested in ("teacher", "state_dict", "model"):
        if isinstance(content.get(nested), dict):
            content = content[nested]
    other = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if other or not content:
        raise CheckpointError(f"{path} holds no plain dict of tensors; not a tensor: {', '.join(map(str, other[:4]))}")
    return content


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
    # Copied even where the dtype is right: tensors of a memory-mapped file may be unaligned, and products of unaligned
    # matrices are slower and differ in their last bits.
    dtypes = {key: dtype if tensor.is_floating_point() else tensor.dtype for key, tensor in expected.items()}
    module.load_state_dict({key: state[key].to(dtypes[key], copy=True) for key in expected}, assign=True)
    unset = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not unset, f"outside the state dict: {unset}"
    return module


def write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    with atomic_path(path) as temporary:
        save_file({key: tensor.detach().contiguous().cpu() for key, tensor in state.items()}, temporary)


def shapes_of(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a module's state, without allocating it."""
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in build().state_dict().items()}
