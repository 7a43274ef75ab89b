"""How brixel-tiny was made: a ViT of 5 M parameters that gives DINOv2-S's dense features, then its adapter.

    python examples/tiny/make.py --teacher dinov2-small --images photos composites --val held-out --out tiny

Three steps, each taken up where it stopped: targets (the teacher's maps of fixed crops in three sizes), backbone,
adapter (`brixel.train`). `docs/brixel-tiny.md` says what came of it.
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from slicing import sliced
from torch import Tensor
from torch.utils.data import DataLoader

from brixel import BrixelFeatures
from brixel.backbones.registry import BRIXEL_TINY
from brixel.backbones.vit import ViT
from brixel.checkpoints.fingerprint import fingerprint
from brixel.images.crops import CropSettings
from brixel.model.config import AdapterConfig, BackboneConfig, BrixelConfig, default_blocks
from brixel.model.upsampler import Upsampler
from brixel.train import TrainConfig, distill
from brixel.train.data import CropDataset, collate, find_training_images

TINY = BRIXEL_TINY.vit
TEACHER_PX = 448
SHORT_SIDE_PX = 256  # that images are brought to, although the adapter was trained at 128: outlines gain by it
GRIDS = (8, 16, 32)  # patches on a side: of the images that a student sees, and of those that its teacher sees
BATCH = 8  # crops that the teacher sees at once
TOKENS = 4096  # of a step, whatever the grid
TURN = (8, 16, 16, 32)  # the grids of the steps, in turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--crops", type=int, default=2176)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--adapter-steps", type=int, default=500)
    given = parser.parse_args()
    teacher = BrixelFeatures.from_backbone(given.teacher, device="cpu", dtype=torch.float32)
    train = Crops(given.out / "train", teacher, dataset(teacher, given.images, random=True), given.crops)
    held_out = dataset(teacher, [given.val], random=False)
    val = Crops(given.out / "val", teacher, held_out, len(held_out))
    backbone = given.out / "backbone"
    if not (backbone / "config.json").exists():
        save(train_backbone(teacher.backbone, train, val, given.steps, given.out), backbone)
    config = TrainConfig(
        **{"backbone": str(backbone), "images": given.images, "val": given.val, "out": str(given.out / "adapter")},
        **{"teacher_px": 512, "cache": given.crops, "steps": given.adapter_steps, "edge": 0.0, "spectral": 0.0},
        **{"drop_path": 0.1, "workers": 1, "device": "cpu"},
    )
    model = distill(config, model=BrixelFeatures.from_pretrained(backbone, device="cpu"))
    adapter = dataclasses.replace(model.config.adapter, short_side_px=SHORT_SIDE_PX)
    model.config = dataclasses.replace(model.config, adapter=adapter)
    model.to(torch.float16).save_pretrained(given.out / "brixel-tiny", include_backbone=True)


def dataset(teacher: BrixelFeatures, folders: list[Path], *, random: bool) -> CropDataset:
    settings = CropSettings(TEACHER_PX, max_zoom=1.5, random=random)
    vit = teacher.config.backbone.vit
    return CropDataset(find_training_images(folders), settings, mean=vit.mean, std=vit.std)


class Crops:
    """Crops (N, 3, 448, 448) and the teacher's maps of them in three sizes (N, g, g, D), on disk, float16."""

    def __init__(self, folder: Path, teacher: BrixelFeatures, source: CropDataset, count: int) -> None:
        shapes = {"pixels": (3, TEACHER_PX, TEACHER_PX)} | {str(g): (g, g, teacher.embed_dim) for g in GRIDS}
        folder.mkdir(parents=True, exist_ok=True)
        self.arrays = {name: opened(folder / f"{name}.npy", (count, *shape)) for name, shape in shapes.items()}
        done = folder / "done"
        first = int(done.read_text()) if done.exists() else 0
        loader = DataLoader(source, BATCH, sampler=range(first, count), num_workers=1, collate_fn=collate)
        for start, batch in zip(range(first, count, BATCH), loader, strict=True):
            rows = slice(start, start + len(batch.teacher))
            self.arrays["pixels"][rows] = batch.teacher.half().numpy()
            for grid in GRIDS:
                with torch.no_grad():
                    maps = teacher.backbone_features(resized(batch.teacher, grid * teacher.patch_px))
                self.arrays[str(grid)][rows] = maps.permute(0, 2, 3, 1).half().numpy()
            for array in self.arrays.values():
                array.flush()
            done.write_text(str(rows.stop))
            print(f"teacher: {rows.stop}/{count}", flush=True)
        self.count = count

    def batch(self, places: Tensor, grid: int) -> tuple[Tensor, Tensor]:
        """Pixels for the small model (B, 3, 16 g, 16 g) and the teacher's cells (B, g, g, D)."""
        pixels, cells = (torch.from_numpy(self.arrays[name][places.numpy()]).float() for name in ("pixels", str(grid)))
        return resized(pixels, grid * TINY.patch_px), cells


def opened(path: Path, shape: tuple[int, ...]) -> np.memmap:
    mode = "r+" if path.exists() else "w+"
    return np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=shape)


def resized(pixels: Tensor, side_px: int) -> Tensor:
    if pixels.shape[-1] == side_px:
        return pixels
    return F.interpolate(pixels, (side_px, side_px), mode="bicubic", antialias=True, align_corners=False)


def train_backbone(teacher: ViT, train: Crops, val: Crops, steps: int, out: Path) -> ViT:
    torch.manual_seed(0)
    few = [resized(train.batch(torch.arange(at, at + 16), 16)[0], 224) for at in range(0, 128, 16)]
    tiny, projection = sliced(teacher, TINY, few)
    matrices = [each for each in tiny.parameters() if each.ndim > 1]
    vectors = [each for each in tiny.parameters() if each.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    average = torch.optim.swa_utils.AveragedModel(tiny, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    state, first = out / "backbone.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        for name, each in (("tiny", tiny), ("average", average), ("optimizer", optimizer)):
            each.load_state_dict(saved[name])
        first = saved["step"]
    else:
        cells = val.batch(torch.arange(val.count), 32)[1]
        kept = (cells @ projection.T).square().sum() / cells.square().sum()
        print(f"the projection keeps {float(kept):.3f} of the features' square", flush=True)
        print("sliced, untrained:", nearness(tiny, projection, val), flush=True)
    started = time.perf_counter()
    for step in range(first, steps):
        lr = 1e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        grid = TURN[step % len(TURN)]
        generator = torch.Generator().manual_seed(step)
        pixels, cells = train.batch(torch.randint(train.count, (TOKENS // grid**2,), generator=generator), grid)
        with torch.autocast("cpu", torch.bfloat16):
            maps = tiny.block_maps(pixels, [TINY.depth - 1])[0].permute(0, 2, 3, 1).float()
        loss = distance(maps, cells @ projection.T)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tiny.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(tiny)
        done = step + 1
        if done % 20 == 0:
            left = (time.perf_counter() - started) / (done - first) * (steps - done)
            print(f"backbone: step {done}/{steps} grid {grid} loss {loss:.4f}, {left:.0f} s left", flush=True)
        if done % 200 == 0 or done == steps:
            print("  ", nearness(average.module, projection, val), flush=True)
            saved = {"tiny": tiny, "average": average, "optimizer": optimizer}
            saved = {name: each.state_dict() for name, each in saved.items()} | {"step": done}
            torch.save(saved, state.with_suffix(".part"))
            state.with_suffix(".part").rename(state)
    return average.module


def distance(maps: Tensor, targets: Tensor) -> Tensor:
    return (maps - targets).abs().mean() + (1 - F.cosine_similarity(maps, targets, dim=-1)).mean()


@torch.no_grad()
def nearness(tiny: ViT, projection: Tensor, crops: Crops) -> dict[int, float]:
    """Mean cosine similarity to the teacher's projected maps, by grid."""
    result = {}
    for grid in GRIDS:
        each = []
        for place in range(crops.count):
            pixels, cells = crops.batch(torch.tensor([place]), grid)
            maps = tiny.block_maps(pixels, [TINY.depth - 1])[0].permute(0, 2, 3, 1)
            each.append(F.cosine_similarity(maps, cells @ projection.T, dim=-1).mean())
        result[grid] = round(float(torch.stack(each).mean()), 4)
    return result


def save(tiny: ViT, folder: Path) -> None:
    """The backbone with a fresh adapter, as a folder for `from_pretrained`."""
    adapter = AdapterConfig(default_blocks(TINY.depth), residual_detour=False, short_side_px=SHORT_SIDE_PX, blend=True)
    config = BrixelConfig(BackboneConfig(BRIXEL_TINY.name, (BRIXEL_TINY.name,), TINY, fingerprint(tiny)), adapter)
    model = BrixelFeatures(tiny.eval(), Upsampler(TINY.width, adapter), config)
    model.save_pretrained(folder, include_backbone=True)


if __name__ == "__main__":
    main()
