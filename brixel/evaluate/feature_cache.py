"""Features of many crops, computed once: in memory, or on disk, where a run that was killed finds them again.

Where there is no room for all of them an error says so as soon as the first is there.

On disk each crop is a file of its own, `FOLDER/KEY/HASH.npy` in float16: KEY says which source and which size, HASH is
that of the image's bytes. Maps that are interpolated are kept as they come from the backbone, and so serve several
sources. Shapes: D channels, h x w cells, T the crop's side in pixels.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from brixel.errors import BrixelError
from brixel.evaluate.feature_sources import FeatureSource
from brixel.images.crops import CropSettings, teacher_crop
from brixel.images.load import load_image
from brixel.utils.atomic_files import atomic_path
from brixel.utils.memory import MARGIN, format_bytes, free_bytes

_FEWER = "take fewer images (--limit) or a smaller --teacher-px"


def centre_crop(image: Path, teacher_px: int) -> Tensor:
    """The centre square of an image at T pixels a side: (3, T, T), float32 in [0, 1]."""
    return teacher_crop(load_image(image), CropSettings(teacher_px, random=False), torch.Generator())


class Features:
    """The maps of a source on the centre crops of images: item i is (D, h, w), float32, of image i.

    ``kept``: each map before interpolation, as a tensor, a file, or a function that computes it when it is asked for.
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
        maps = [_opened(self._kept[index]) for index in indices]
        return self.source.finish(torch.stack(maps).float())

    def split(self, count: int) -> tuple["Features", "Features"]:
        """Those of the first ``count`` images, and the others."""
        return Features(self.source, self._kept[:count]), Features(self.source, self._kept[count:])


def features_of(
    source: FeatureSource, images: Sequence[Path], teacher_px: int, cache: Path | None = None, keep: int | None = None
) -> Features:
    """Compute what is not there yet. ``cache``: a folder, made if need be; None keeps them in memory.

    ``keep``: how many are kept in memory, from the first on, None for all; the others are computed whenever they are
    asked for. A source without ``identity`` is never kept on disk. Raises BrixelError where disk or memory is too small
    for all and for features that float16 cannot hold, ImageError for an image that cannot be used.
    """
    if cache is not None and source.identity:
        return Features(source, _on_disk(source, images, teacher_px, _folder(source, teacher_px, cache)))
    kept = _in_memory(source, images[:keep], teacher_px)
    return Features(source, [*kept, *(partial(_computed, source, each, teacher_px) for each in images[len(kept) :])])


def check_memory(needed: int, what: str, instead: str) -> None:
    """Raise BrixelError where the host's memory has no room for so many bytes; ``instead``: what else can be done."""
    free = free_bytes(torch.device("cpu"))
    if free is not None and needed > (1 - MARGIN) * free:
        there = f"{format_bytes(free)} are free, of which {MARGIN:.0%} are left to others"
        raise BrixelError(f"{what} need {format_bytes(needed)} of memory, and {there}: {instead}")


def _in_memory(source: FeatureSource, images: Sequence[Path], teacher_px: int) -> list[Tensor]:
    kept: list[Tensor] = []
    for image in tqdm(images, f"features, {source.name}, {teacher_px} px", disable=None):
        kept.append(_computed(source, image, teacher_px))
        if len(kept) == 1:
            maps = f"{len(images)} maps of source {source.name!r} at {teacher_px} px"
            check_memory(len(images) * kept[0].nbytes, maps, f"keep them on disk (--cache), {_FEWER}")
    return kept


def _on_disk(source: FeatureSource, images: Sequence[Path], teacher_px: int, folder: Path) -> list[Path]:
    """The files of the images' maps, of which those that are missing are written."""
    paths = [folder / f"{_hash(image.read_bytes())}.npy" for image in images]
    missing = {path: image for path, image in zip(paths, images, strict=True) if not path.exists()}
    title = f"features, {source.name}, {teacher_px} px"
    for number, (path, image) in enumerate(tqdm(missing.items(), title, disable=None)):
        half = _computed(source, image, teacher_px)
        if number == 0:
            maps = f"{len(missing)} maps of source {source.name!r} at {teacher_px} px"
            _check_disk(len(missing) * half.nbytes, maps, folder)
        with atomic_path(path) as temporary:
            np.save(temporary, half.numpy())
    return paths


def _check_disk(needed: int, what: str, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{format_bytes(needed)} in {folder}, and {format_bytes(free)} are free"
        raise BrixelError(f"{what} need {sizes}: name a folder on a larger disk (--cache), {_FEWER}")


def _computed(source: FeatureSource, image: Path, teacher_px: int) -> Tensor:
    """The map of an image as it is kept, (D, h, w), float16."""
    half = source.raw(centre_crop(image, teacher_px)[None])[0].half()
    if not half.isfinite().all():
        raise BrixelError(f"features of source {source.name!r} on {image} are not finite, or too large for float16")
    return half


def _opened(kept: Tensor | Path | Callable[[], Tensor]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return torch.from_numpy(np.load(kept)) if isinstance(kept, Path) else kept()


def _folder(source: FeatureSource, teacher_px: int, cache: Path) -> Path:
    folder = cache / _hash(f"{source.identity} scale {source.scale} at {teacher_px} px".encode())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]
