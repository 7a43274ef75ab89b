"""Features of many crops, computed once: in memory, or on disk, where a run that was killed finds them again.

On disk each crop is a file of its own, `FOLDER/KEY/HASH.npy` in float16: KEY says which source and which size, HASH is
that of the picture's bytes. Maps that are interpolated are kept as they come from the backbone, and so serve several
sources. Shapes: D channels, h x w cells, T the crop's side in pixels.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from brixel.atomic import atomic_path
from brixel.crops import CropSettings, teacher_crop
from brixel.errors import BrixelError
from brixel.evaluate.sources import Source
from brixel.images import load_image


def centre_crop(picture: Path, teacher_px: int) -> Tensor:
    """The centre square of a picture at T pixels a side: (3, T, T), float32 in [0, 1]."""
    return teacher_crop(load_image(picture), CropSettings(teacher_px, random=False), torch.Generator())


class Features:
    """The maps of a source on the centre crops of pictures: item i is (D, h, w), float32, of picture i."""

    def __init__(self, source: Source, kept: Sequence[Tensor | Path]) -> None:
        self.source = source
        self._kept = kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Tensor:
        return self.batch([index])[0]

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Maps of several pictures, (B, D, h, w), float32."""
        found = [self._kept[index] for index in indices]
        maps = [each if isinstance(each, Tensor) else torch.from_numpy(np.load(each)) for each in found]
        return self.source.finish(torch.stack(maps).float())


def features_of(source: Source, pictures: Sequence[Path], teacher_px: int, cache: Path | None = None) -> Features:
    """Compute what is not there yet. ``cache``: a folder, made if need be; None keeps all in memory.

    A source without ``identity`` is kept in memory always. Raises BrixelError for features that float16 cannot hold,
    ImageError for a picture that cannot be used.
    """
    folder = _folder(source, teacher_px, cache) if cache is not None and source.identity else None
    kept: list[Tensor | Path] = []
    for picture in tqdm(pictures, f"features, {source.name}, {teacher_px} px", disable=None):
        path = None if folder is None else folder / f"{_hash(picture.read_bytes())}.npy"
        if path is not None and path.exists():
            kept.append(path)
            continue
        half = source.raw(centre_crop(picture, teacher_px)[None])[0].half()  # D h w
        if not half.isfinite().all():
            raise BrixelError(
                f"features of source {source.name!r} on {picture} are not finite, or too large for float16"
            )
        if path is None:
            kept.append(half)
            continue
        with atomic_path(path) as temporary:
            np.save(temporary, half.numpy())
        kept.append(path)
    return Features(source, kept)


def _folder(source: Source, teacher_px: int, cache: Path) -> Path:
    folder = cache / _hash(f"{source.identity} scale {source.scale} at {teacher_px} px".encode())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]
