"""What a weight file is, by its content: the name of a file, and its ending, say nothing about it."""

import tarfile
import zipfile
from enum import Enum
from pathlib import Path

from brixel.errors import CheckpointError, DamagedFileError
from brixel.utils.file_kinds import HEAD_BYTES, other_content

_OTHERS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, such as Keras writes",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file",
    b"\xfd7zXZ\x00": "compressed by xz: unpack it first",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
}
_ZIP_ENTRY, _ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
_PICKLE = b"\x80"  # the start of a pickle of protocol 2 or above, as torch.save writes


class Kind(Enum):
    """The formats that are read."""

    SAFETENSORS = "safetensors"
    ZIP = "torch.save's"
    PICKLE = "torch.save's of before version 1.6"


def kind_of(path: Path) -> Kind:
    """The format of a weight file.

    Raises DamagedFileError for a file that is cut off or stands in for another, and CheckpointError for what is none.
    """
    start = _start_of(path)
    kind = _kind(start)
    if kind is Kind.ZIP:
        _check_zip(path)
    if kind is not None:
        return kind
    instead = other_content(start) or _text(start)
    if instead is not None:
        raise DamagedFileError(f"{path} is {instead}")
    other = next((name for magic, name in _OTHERS.items() if start.startswith(magic)), None)
    if other is None and tarfile.is_tarfile(path):
        other = "a tar archive: unpack it first"
    if other is None:
        raise DamagedFileError(
            f"{path} is damaged, or no weight file: neither safetensors nor what torch.save writes begins like this; "
            "fetch it again"
        )
    raise CheckpointError(f"{path} is {other}; expected weights as safetensors, or as torch.save writes them")


def _text(start: bytes) -> str | None:
    """The beginning of a text, such as a message of a server, on one line; None for what is no text."""
    try:
        text = start.decode("ascii")
    except UnicodeDecodeError:
        return None
    if not all(sign.isprintable() or sign.isspace() for sign in text):
        return None
    return f"a text, {' '.join(text.split())[:80]!r}: check the address, and download it again"


def is_weight_file(path: Path) -> bool:
    """Whether a file begins like one of the formats that are read."""
    try:
        return path.is_file() and _kind(_start_of(path)) is not None
    except OSError:
        return False


def _start_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _kind(start: bytes) -> Kind | None:
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return Kind.SAFETENSORS  # the length of a header, and the JSON of it
    if start.startswith((_ZIP_ENTRY, _ZIP_END)):
        return Kind.ZIP
    return Kind.PICKLE if start.startswith(_PICKLE) else None


def _check_zip(path: Path) -> None:
    """Raise where a zip archive is cut off, or is not one that torch.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DamagedFileError(
            f"{path} is damaged or cut off, a zip archive that cannot be read ({error}); fetch it again"
        ) from error
    if any(name.endswith("constants.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript model, which holds code; expected weights: save the state_dict() of "
            "torch.jit.load(file)"
        )
    if not any(name.endswith("data.pkl") for name in names):
        some = ", ".join(names[:3]) or "nothing"
        raise CheckpointError(
            f"{path} is a zip archive that holds {some}, not a checkpoint; if weights are in it, unpack it"
        )
