"""Maps of a teacher and of its student's small images on disk, for training the universal upsampler.

A folder holds the crops of one backbone at one size T: the teacher's map of T pixels, and the maps of the same crop at
T/2, T/4 and T/8, each of two blocks: the last, and an earlier one as if it were of another backbone. `done.json` says
how many crops are complete; a build that was killed resumes there.

Shapes: N crops, L = 2 blocks, D width, g patches along the teacher's side; P pixels along the side of a guide.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from pictures import resized
from torch import Tensor

from brixel.backbones.vit import ViT
from brixel.images.crops import normalised
from brixel.utils.atomic_files import write_text

RATIOS = (2, 4, 8)  # the teacher's side / the student's
GUIDE_PX = 4  # pixels of a guide per cell of the map


class MapSet:
    """The crops of one backbone at one size, memory-mapped.

    Args:
        folder: Where they are, or will be.
        backbone: Only needed to add crops.
        side_px: The teacher's side, T; a multiple of eight patches.
        count: Number of crops when complete.
    """

    def __init__(self, folder: Path, backbone: ViT | None = None, side_px: int = 0, count: int = 0) -> None:
        self.folder, self.backbone = folder, backbone
        header = folder / "header.json"
        if not header.exists():
            assert backbone is not None, folder
            assert side_px % (8 * backbone.patch_px) == 0, (folder, side_px)
            folder.mkdir(parents=True, exist_ok=True)
            grid = side_px // backbone.patch_px
            facts = {"side_px": side_px, "count": count, "grid": grid, "width": backbone.width}
            write_text(header, json.dumps(facts))
        facts = json.loads(header.read_text())
        self.side_px, self.count, self.grid, self.width = (facts[k] for k in ("side_px", "count", "grid", "width"))
        shapes = {f"map{r}": (np.float16, (2, self.width, self.grid // r, self.grid // r)) for r in (1, *RATIOS)}
        shapes |= {f"view{r}": (np.uint8, (3, side, side)) for r in RATIOS for side in [self.side_px // r]}
        shapes["guide"] = (np.uint8, (3, GUIDE_PX * self.grid, GUIDE_PX * self.grid))
        self.arrays = {
            name: np.memmap(
                folder / name, dtype, "r+" if (folder / name).exists() else "w+", shape=(self.count, *shape)
            )
            for name, (dtype, shape) in shapes.items()
        }

    @property
    def done(self) -> int:
        """Crops that are complete."""
        path = self.folder / "done.json"
        return int(json.loads(path.read_text())) if path.exists() else 0

    @torch.no_grad()
    def add(self, image: Tensor) -> None:
        """Compute and store the maps of the next crop, uint8 (3, T, T)."""
        assert self.backbone is not None
        number, depth = self.done, self.backbone.depth
        blocks = (depth - 1, depth * (3 if number % 2 else 2) // 4 - 1)
        for ratio in (1, *RATIOS):
            view = image if ratio == 1 else resized(image, self.side_px // ratio)
            pixels = normalised(view.float()[None] / 255, self.backbone.mean, self.backbone.std)
            maps = self.backbone.block_maps(pixels, blocks)
            self.arrays[f"map{ratio}"][number] = torch.cat(maps).half().numpy()
            if ratio > 1:
                self.arrays[f"view{ratio}"][number] = view.numpy()
        self.arrays["guide"][number] = resized(image, GUIDE_PX * self.grid).numpy()
        for array in self.arrays.values():
            array.flush()
        write_text(self.folder / "done.json", str(number + 1))

    def read(self, name: str, rows: Sequence[int]) -> Tensor:
        """Crops of an array: float32, images in [0, 1]."""
        values = torch.from_numpy(np.stack([self.arrays[name][row] for row in rows]))
        return values.float() / 255 if values.dtype == torch.uint8 else values.float()


def build(sets: Sequence[MapSet], crop: Callable[[str, int, int], Tensor]) -> None:
    """Complete all sets side by side, so that each has about the same share of its crops at any time."""
    while todo := [one for one in sets if one.done < one.count]:
        least = min(todo, key=lambda one: one.done / one.count)
        least.add(crop(least.folder.name, least.done, least.side_px))
