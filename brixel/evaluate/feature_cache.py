"""Features of many crops, computed once and kept in memory or on disk, where an interrupted run finds them again.

On disk every crop has a file, `FOLDER/KEY/HASH.npy` in float16: KEY is a hash of the source and the size, HASH that of
the image's bytes. Maps are kept before interpolation, so that several sources share them.
Shapes: D channels, h x w cells, T the crop's side in pixels.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brixel.errors import BrixelError, DamagedFileError
from brixel.evaluate.feature_sources import FeatureSource
from brixel.images.crops import CropSettings, teacher_crop
from brixel.images.load import load_image
from brixel.utils.atomic_files import atomic_path
from brixel.utils.memory import MARGIN, format_bytes, free_bytes
from brixel.utils.npy_files import open_npy
from brixel.utils.progress import progress_bar
from brixel.utils.structured_files import checking_content

_DELETE = "delete it, and it is computed again"
_ADVICE = "take fewer images (--limit) or a smaller --teacher-px"


def centre_crop(image: Path, teacher_px: int) -> Tensor:
    """The centre square of an image at T pixels a side: (3, T, T), float32 in [0, 1]."""
    return teacher_crop(load_image(image), CropSettings(teacher_px, random=False), torch.Generator())


class Features:
    """The maps of a source on the centre crops of images: item i is (D, h, w), float32, of image i.

    ``kept``: by image, the map before interpolation: a tensor, a file, or a function that computes it.
    """

    def __init__(self, source: FeatureSource, kept: Sequence[Tensor | Path | Callable[[], Tensor]]) -> None:
        self.source = source
        self._kept = kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Tensor:
        return self.batch([index])[0]

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Maps of several images, (B, D, h, w), float32."""
        kept = [self._kept[index] for index in indices]
        maps = [_read(each) for each in kept]
        for one, found in zip(kept, maps, strict=True):
            if isinstance(one, Path) and found.shape != maps[0].shape:
                shapes = f"a map of {tuple(found.shape)}, another file one of {tuple(maps[0].shape)}"
                raise DamagedFileError(f"{one} holds {shapes}; {_DELETE}")
        return self.source.finish(torch.stack(maps).float())

    def split(self, count: int) -> tuple["Features", "Features"]:
        """The features of the first ``count`` images, and those of the others."""
        return Features(self.source, self._kept[:count]), Features(self.source, self._kept[count:])


def features_of(
    source: FeatureSource, images: Sequence[Path], teacher_px: int, cache: Path | None = None, keep: int | None = None
) -> Features:
    """Compute the features of images that are not kept yet.

    ``cache``: a folder, made if it is missing; None, or a source without ``identity``, keeps features in memory.
    ``keep``: how many are kept in memory, None for all; the others are computed at every use. Raises BrixelError where
    disk or memory is too small for all (at the first map), or float16 cannot hold a feature; ImageError as usual.
    """
    if cache is not None and source.identity:
        folder = cache / _hash(f"{source.identity} scale {source.scale} at {teacher_px} px".encode())
        folder.mkdir(parents=True, exist_ok=True)
        return Features(source, _on_disk(source, images, teacher_px, folder))
    kept = _in_memory(source, images[:keep], teacher_px)
    return Features(source, [*kept, *(partial(_compute, source, image, teacher_px) for image in images[len(kept) :])])


def check_memory(needed: int, what: str, advice: str) -> None:
    """Raise BrixelError where the host's free memory is less than ``needed`` bytes and a margin."""
    free = free_bytes(torch.device("cpu"))
    if free is not None and needed > (1 - MARGIN) * free:
        available = f"{format_bytes(free)} are free, of which {MARGIN:.0%} are left to others"
        raise BrixelError(f"{what} need {format_bytes(needed)} of memory, and {available}: {advice}")


def _in_memory(source: FeatureSource, images: Sequence[Path], teacher_px: int) -> list[Tensor]:
    kept: list[Tensor] = []
    for image in progress_bar(images, f"features, {source.name}, {teacher_px} px"):
        kept.append(_compute(source, image, teacher_px))
        if len(kept) == 1:
            maps = f"{len(images)} maps of source {source.name!r} at {teacher_px} px"
            check_memory(len(images) * kept[0].nbytes, maps, f"keep them on disk (--cache), {_ADVICE}")
    return kept


def _on_disk(source: FeatureSource, images: Sequence[Path], teacher_px: int, folder: Path) -> list[Path]:
    """The files of the images' maps; those that are missing are written."""
    paths = [folder / f"{_hash(image.read_bytes())}.npy" for image in images]
    missing = {path: image for path, image in zip(paths, images, strict=True) if not path.exists()}
    title = f"features, {source.name}, {teacher_px} px"
    for number, (path, image) in enumerate(progress_bar(missing.items(), title)):
        half = _compute(source, image, teacher_px)
        needed = len(missing) * half.nbytes
        if number == 0 and needed > (free := shutil.disk_usage(folder).free):
            raise BrixelError(
                f"{len(missing)} maps of source {source.name!r} at {teacher_px} px need {format_bytes(needed)} in "
                f"{folder}, and {format_bytes(free)} are free: name a folder on a larger disk (--cache), {_ADVICE}"
            )
        with atomic_path(path) as temporary:
            np.save(temporary, half.numpy())
    return paths


def _compute(source: FeatureSource, image: Path, teacher_px: int) -> Tensor:
    """The map of an image as it is kept, (D, h, w), float16."""
    half = source.raw(centre_crop(image, teacher_px)[None])[0].half()
    if not half.isfinite().all():
        raise BrixelError(f"features of source {source.name!r} on {image} are not finite, or too large for float16")
    return half


def _read(kept: Tensor | Path | Callable[[], Tensor]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return _read_file(kept) if isinstance(kept, Path) else kept()


def _read_file(path: Path) -> Tensor:
    with checking_content(path, "a map of the cache", _DELETE):
        array = open_npy(path)
        if array.ndim != 3 or array.dtype != np.float16:
            raise BrixelError(f"it holds {array.dtype} {array.shape}, expected float16 (D, h, w)")
        return torch.from_numpy(np.array(array))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]
