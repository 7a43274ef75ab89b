"""Teacher features of fixed crops on disk, so that small machines train without running the teacher in every epoch.

A folder holds `header.json` (what the cache was made from), `teacher.bin` and `student.bin` (the crops, one after the
other), and `done.json` (their number, written only when their bytes are on disk). A build that was killed resumes after
the last recorded crop. One process builds; any number may read.

Shapes: B batch, T side of the teacher's crop and S = T/4 of the student's in pixels, D x h x w the teacher's features.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from brixel.errors import BrixelError, DamagedFileError
from brixel.train.data import CropBatch, CropDataset, collate
from brixel.utils.atomic_files import write_text
from brixel.utils.devices import dtype_name
from brixel.utils.fields import Rule, check_table, json_table, one_of, several, text, whole_number
from brixel.utils.structured_files import read_json, read_json_value

FORMAT_VERSION = 1
HEADER, DONE, TEACHER, STUDENT = "header.json", "done.json", "teacher.bin", "student.bin"
# of the teacher's features; the student's pixels are always float16, as bfloat16 is coarser than their 8 bits
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

_COUNT = whole_number(1, 2**40)
_SHAPE = several(whole_number(1, 2**31), "three whole numbers above 0", count=3)
_HEADER_RULES = {
    "format_version": Rule(f"{FORMAT_VERSION}, which this version reads", whole_number(FORMAT_VERSION, 2).convert),
    **{"fingerprint": json_table(), "teacher_shape": _SHAPE, "student_shape": _SHAPE},
}
_DONE_RULES = {"crops": whole_number(0, 2**40), "skipped": several(text(), "a list of paths", single=False)}


class TeacherCache(Dataset[tuple[Tensor, Tensor]]):
    """A complete cache: item i is crop i's student view (3, S, S), normalised, and teacher features (D, h, w), float32.

    The constructor opens a folder and raises BrixelError if it holds no complete cache; :meth:`build_or_open` also
    builds, and checks what the cache was made from. ``skipped``: paths of the images that could not be used.
    """

    def __init__(self, folder: Path) -> None:
        header, done, skipped = _read(folder)
        self.folder, self.skipped, self.count = folder, tuple(skipped), header["fingerprint"]["count"]
        if done < self.count:
            raise BrixelError(f"the teacher cache in {folder} has {done} of {self.count} crops: finish building it")
        self.dtype = _DTYPES[header["fingerprint"]["dtype"]]
        self._teacher = _memmap(folder / TEACHER, (self.count, *header["teacher_shape"]))
        self._student = _memmap(folder / STUDENT, (self.count, *header["student_shape"]))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = range(self.count)[index]
        student, teacher = (torch.from_numpy(np.array(rows[row])) for rows in (self._student, self._teacher))
        return student.view(torch.float16).float(), teacher.view(self.dtype).float()

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherCache, (self.folder,)  # a worker opens the files itself

    @classmethod
    def build_or_open(
        cls,
        folder: Path,
        *,
        dataset: CropDataset,
        count: int,
        teacher: Callable[[Tensor], Tensor],
        teacher_id: str | dict[str, Any],
        batch_size: int = 1,
        dtype: torch.dtype = torch.float16,
        workers: int = 0,
        progress: Callable[[int, int], object] = lambda done, count: None,
    ) -> "TeacherCache":
        """Open the cache in ``folder``, after building the part of it that is missing.

        The crops are positions 0 ... ``count`` - 1 of ``dataset``. ``teacher``: from normalised pixels (B, 3, T, T) on
        the CPU to features (B, D, h, w) on any device; ``teacher_id``: distinguishes it from others, as plain JSON
        values. ``workers``: processes that read images. ``progress``: called with crops done and ``count``.
        Raises BrixelError if the folder holds something else (which is left alone), if the disk is too small or full,
        and for features that are not finite.
        """
        fingerprint = _fingerprint(dataset, count, teacher_id, dtype)
        done, skipped = _crops_done(folder, fingerprint)
        if done == count:
            return cls(folder)
        positions, generator = range(done, count), torch.Generator()  # the default is to draw from the global one
        for batch in DataLoader(
            dataset, batch_size, sampler=positions, num_workers=workers, collate_fn=collate, generator=generator
        ):
            with torch.no_grad():
                features = _check_features(teacher(batch.teacher), batch, done, dtype)
            skipped = list(dict.fromkeys([*skipped, *batch.skipped]))
            _append(folder, fingerprint, features, batch.student.to(torch.float16), done, skipped)
            done += len(features)
            progress(done, count)
        return cls(folder)


def _fingerprint(dataset: CropDataset, count: int, teacher_id: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that the bytes of a cache depend on, as it reads back from JSON."""
    name = dtype_name(dtype)
    if name not in _DTYPES or count < 1:
        raise BrixelError(f"a teacher cache of {count} crops in {name}; expected 1 or more, in {' or '.join(_DTYPES)}")
    crops = {**asdict(dataset.settings), "mean": dataset.mean, "std": dataset.std}
    parts = {"teacher": teacher_id, "pictures": _listed(dataset.images), "crops": crops, "count": count, "dtype": name}
    if (cutouts := dataset.cutouts) is not None:
        files = _listed([path for sample in cutouts.samples for path in (sample.image, sample.target)])
        parts["cutouts"] = {**files, "share": cutouts.share, "seed": cutouts.seed}
    return dict(json.loads(json.dumps(parts)))


def _listed(files: Sequence[Path]) -> dict[str, Any]:
    """Number, bytes, and a digest of names and sizes of files. They may move, all together."""
    paths = [os.path.abspath(path) for path in files]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    sizes = [os.path.getsize(path) if os.path.exists(path) else -1 for path in paths]
    digest = hashlib.sha256()
    for path, size in zip(paths, sizes, strict=True):
        digest.update(os.fsencode(Path(path).relative_to(root).as_posix()) + b"\0%d\n" % size)
    return {"number": len(sizes), "bytes": sum(sizes), "names_and_sizes": digest.hexdigest()}


def _crops_done(folder: Path, fingerprint: dict[str, Any]) -> tuple[int, list[str]]:
    """Crops done and images skipped so far. BrixelError if the folder holds something else."""
    if not (folder / HEADER).exists():
        if folder.exists() and (not folder.is_dir() or any(path.name[0] != "." for path in folder.iterdir())):
            raise BrixelError(f"{folder} exists and is not a teacher cache: name a new or an empty folder")
        return 0, []
    header, done, skipped = _read(folder)
    if different := "; ".join(_differences(header["fingerprint"], fingerprint)):
        raise BrixelError(f"{folder} holds another teacher cache: {different}. Name another folder, or delete this one")
    return done, skipped


def _differences(stored: Any, given: Any, name: str = "") -> Iterator[str]:
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in {**stored, **given}:
            yield from _differences(stored.get(key, "nothing"), given.get(key, "nothing"), f"{name}.{key}".lstrip("."))
    elif stored != given:
        yield f"{name} is {str(stored)[:200]} in the folder, {str(given)[:200]} now"


def _check_features(features: Tensor, batch: CropBatch, start: int, dtype: torch.dtype) -> Tensor:
    """The teacher's features on the CPU in the stored dtype. BrixelError for a wrong shape or values not finite."""
    if features.ndim != 4 or len(features) != len(batch.teacher):
        raise BrixelError(f"the teacher gave {tuple(features.shape)}; expected ({len(batch.teacher)}, D, h, w)")
    stored = features.detach().to("cpu", dtype)
    for row, image in enumerate(batch.images):
        if not stored[row].isfinite().all():
            fault = f"do not fit {dtype}: take bfloat16" if features[row].isfinite().all() else "are not finite"
            raise BrixelError(f"the teacher's features of crop {start + row}, from {image}, {fault}")
    return stored


def _append(
    folder: Path, fingerprint: dict[str, Any], teacher: Tensor, student: Tensor, done: int, skipped: list[str]
) -> None:
    """Write a batch, then the new number of crops once its bytes are on the disk."""
    shapes = {"teacher_shape": tuple(teacher.shape[1:]), "student_shape": tuple(student.shape[1:])}
    header = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, **shapes}
    left = fingerprint["count"] - done
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        needed, free = left * (teacher[0].nbytes + student[0].nbytes), shutil.disk_usage(existing).free
        if needed > free:
            sizes = f"{needed / 2**30:.2f} GiB more, and {free / 2**30:.2f} GiB are free"
            raise BrixelError(
                f"the teacher cache in {folder} needs {sizes}: free space on the disk or take fewer crops"
            )
        if not (folder / HEADER).exists():
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(folder / HEADER, header)
        if different := "; ".join(_differences(_read(folder)[0], header)):
            raise BrixelError(f"the teacher's output does not fit the cache in {folder}: {different}")
        _write(folder / TEACHER, teacher, done)
        _write(folder / STUDENT, student, done)
        _write_json(folder / DONE, {"crops": done + len(teacher), "skipped": skipped})
    except OSError as error:
        kept = f"{done} crops are kept, {left} missing"
        raise BrixelError(f"cannot write the teacher cache: {error}; fix this and start again, {kept}") from error


def _write(path: Path, rows: Tensor, start: int) -> None:
    """Write rows from number ``start`` on and wait for the disk. (With a memory map, a full disk ends the process.)"""
    data = rows.contiguous().view(torch.int16).numpy().tobytes()
    with open(path, "r+b" if path.exists() else "wb") as file:
        if file.seek(0, os.SEEK_END) < (offset := start * rows[0].nbytes):
            raise BrixelError(f"{path} is shorter than {DONE} says: delete the folder and build it again")
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _memmap(path: Path, shape: Sequence[int]) -> "np.memmap[Any, np.dtype[np.int16]]":
    """A file as rows of 16-bit numbers, read on access."""
    if not path.is_file() or path.stat().st_size != 2 * math.prod(shape):
        raise DamagedFileError(f"{path} is missing or has the wrong size: delete the folder and build it again")
    return np.memmap(path, np.int16, "r", shape=tuple(shape))


def _read(folder: Path) -> tuple[dict[str, Any], int, list[str]]:
    """The header, the number of crops done and the images skipped."""
    try:
        header = check_table(HEADER, read_json_value(folder / HEADER), _HEADER_RULES)
        crops = {name: header["fingerprint"].get(name) for name in ("count", "dtype")}
        check_table("fingerprint", crops, {"count": _COUNT, "dtype": one_of(*_DTYPES)})
        done = check_table(DONE, read_json(folder / DONE), _DONE_RULES, {"crops": 0, "skipped": ()})
        return header, done["crops"], list(done["skipped"])
    except MemoryError:
        raise
    except BrixelError as error:
        raise DamagedFileError(
            f"{folder} holds no intact teacher cache ({error}): build one in another folder"
        ) from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
