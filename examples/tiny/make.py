"""How brixel-tiny was made: a ViT of 5 M parameters, distilled from DINOv2-S's dense features, and its adapter.

    python examples/tiny/make.py --teacher dinov2-small --images photos composites --val held-out --out tiny

Three stages, which resume after an interruption: targets (the teacher's maps of fixed crops in three sizes), backbone,
adapter (`brixel.train`). Results: `docs/brixel-tiny.md`.

Shapes: N crops, B batch, g patches along a side, D the teacher's width, d the small model's.
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from slicing import slice_vit
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
SHORT_SIDE_PX = 256  # images are resized to this; the adapter was trained at 128, but outlines are better at 256
GRIDS = (8, 16, 32)  # patches along a side, from the student's images to the teacher's
BATCH = 8  # crops per call of the teacher
TOKENS = 4096  # per step, for every grid
GRID_CYCLE = (8, 16, 16, 32)  # the grids of successive steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--crops", type=int, default=2176)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--adapter-steps", type=int, default=500)
    options = parser.parse_args()
    teacher = BrixelFeatures.from_backbone(options.teacher, device="cpu", dtype=torch.float32)
    train = Crops(options.out / "train", teacher, crop_dataset(teacher, options.images, random=True), options.crops)
    held_out = crop_dataset(teacher, [options.val], random=False)
    val = Crops(options.out / "val", teacher, held_out, len(held_out))
    backbone = options.out / "backbone"
    if not (backbone / "config.json").exists():
        save(train_backbone(teacher.backbone, train, val, options.steps, options.out), backbone)
    config = TrainConfig(
        **{
            "backbone": str(backbone),
            "images": options.images,
            "val": options.val,
            "out": str(options.out / "adapter"),
        },
        **{"teacher_px": 512, "cache": options.crops, "steps": options.adapter_steps, "edge": 0.0, "spectral": 0.0},
        **{"drop_path": 0.1, "workers": 1, "device": "cpu"},
    )
    model = distill(config, model=BrixelFeatures.from_pretrained(backbone, device="cpu"))
    adapter = dataclasses.replace(model.config.adapter, short_side_px=SHORT_SIDE_PX)
    model.config = dataclasses.replace(model.config, adapter=adapter)
    model.to(torch.float16).save_pretrained(options.out / "brixel-tiny", include_backbone=True)


def crop_dataset(teacher: BrixelFeatures, folders: list[Path], *, random: bool) -> CropDataset:
    settings = CropSettings(TEACHER_PX, max_zoom=1.5, random=random)
    vit = teacher.config.backbone.vit
    return CropDataset(find_training_images(folders), settings, mean=vit.mean, std=vit.std)


class Crops:
    """Crops (N, 3, 448, 448) and the teacher's maps of them on three grids (N, g, g, D), on disk in float16."""

    def __init__(self, folder: Path, teacher: BrixelFeatures, source: CropDataset, count: int) -> None:
        shapes = {"pixels": (3, TEACHER_PX, TEACHER_PX)} | {str(g): (g, g, teacher.embed_dim) for g in GRIDS}
        folder.mkdir(parents=True, exist_ok=True)
        self.arrays = {name: open_array(folder / f"{name}.npy", (count, *shape)) for name, shape in shapes.items()}
        done = folder / "done"
        done_count = int(done.read_text()) if done.exists() else 0
        loader = DataLoader(source, BATCH, sampler=range(done_count, count), num_workers=1, collate_fn=collate)
        for start, batch in zip(range(done_count, count, BATCH), loader, strict=True):
            rows = slice(start, start + len(batch.teacher))
            self.arrays["pixels"][rows] = batch.teacher.half().numpy()
            for grid in GRIDS:
                with torch.no_grad():
                    maps = teacher.backbone_features(resize(batch.teacher, grid * teacher.patch_px))
                self.arrays[str(grid)][rows] = rearrange(maps, "b d h w -> b h w d").half().numpy()
            for array in self.arrays.values():
                array.flush()
            done.write_text(str(rows.stop))
            print(f"teacher: {rows.stop}/{count}", flush=True)
        self.count = count

    def batch(self, indices: Tensor, grid: int) -> tuple[Tensor, Tensor]:
        """Pixels for the small model (B, 3, 16 g, 16 g) and the teacher's cells (B, g, g, D)."""
        pixels, cells = (torch.from_numpy(self.arrays[name][indices.numpy()]).float() for name in ("pixels", str(grid)))
        return resize(pixels, grid * TINY.patch_px), cells


def open_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    mode = "r+" if path.exists() else "w+"
    return np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=shape)


def resize(pixels: Tensor, side_px: int) -> Tensor:
    if pixels.shape[-1] == side_px:
        return pixels
    return F.interpolate(pixels, (side_px, side_px), mode="bicubic", antialias=True, align_corners=False)


def train_backbone(teacher: ViT, train: Crops, val: Crops, steps: int, out: Path) -> ViT:
    torch.manual_seed(0)
    batches = [resize(train.batch(torch.arange(start, start + 16), 16)[0], 224) for start in range(0, 128, 16)]
    tiny, projection = slice_vit(teacher, TINY, batches)
    matrices = [parameter for parameter in tiny.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in tiny.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    average = torch.optim.swa_utils.AveragedModel(tiny, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    state, start_step = out / "backbone.pt", 0
    saved_parts = {"tiny": tiny, "average": average, "optimizer": optimizer}
    if state.exists():
        saved = torch.load(state, weights_only=True)
        for name, part in saved_parts.items():
            part.load_state_dict(saved[name])
        start_step = saved["step"]
    else:
        cells = val.batch(torch.arange(val.count), 32)[1]
        share = (cells @ projection.T).square().sum() / cells.square().sum()
        print(f"the projection keeps {float(share):.3f} of the features' squared norm", flush=True)
        print("sliced, untrained:", cosines(tiny, projection, val), flush=True)
    start_s = time.perf_counter()
    for step in range(start_step, steps):
        lr = 1e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        grid = GRID_CYCLE[step % len(GRID_CYCLE)]
        generator = torch.Generator().manual_seed(step)
        pixels, cells = train.batch(torch.randint(train.count, (TOKENS // grid**2,), generator=generator), grid)
        with torch.autocast("cpu", torch.bfloat16):
            maps = last_map(tiny, pixels).float()
        loss = distance(maps, cells @ projection.T)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tiny.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(tiny)
        done = step + 1
        if done % 20 == 0:
            left_s = (time.perf_counter() - start_s) / (done - start_step) * (steps - done)
            print(f"backbone: step {done}/{steps} grid {grid} loss {loss:.4f}, {left_s:.0f} s left", flush=True)
        if done % 200 == 0 or done == steps:
            print("  ", cosines(average.module, projection, val), flush=True)
            content = {name: part.state_dict() for name, part in saved_parts.items()} | {"step": done}
            torch.save(content, state.with_suffix(".part"))
            state.with_suffix(".part").rename(state)
    return average.module


def last_map(tiny: ViT, pixels: Tensor) -> Tensor:
    """The map after the last block, channels last: (B, g, g, d)."""
    return rearrange(tiny.block_maps(pixels, [TINY.depth - 1])[0], "b d h w -> b h w d")


def distance(maps: Tensor, targets: Tensor) -> Tensor:
    return (maps - targets).abs().mean() + (1 - F.cosine_similarity(maps, targets, dim=-1)).mean()


@torch.no_grad()
def cosines(tiny: ViT, projection: Tensor, crops: Crops) -> dict[int, float]:
    """Mean cosine similarity to the teacher's projected maps, by grid."""
    means = {}
    for grid in GRIDS:
        similarities = []
        for index in range(crops.count):
            pixels, cells = crops.batch(torch.tensor([index]), grid)
            similarities.append(F.cosine_similarity(last_map(tiny, pixels), cells @ projection.T, dim=-1).mean())
        means[grid] = round(float(torch.stack(similarities).mean()), 4)
    return means


def save(tiny: ViT, folder: Path) -> None:
    """Save the backbone with a fresh adapter as a folder for `from_pretrained`."""
    adapter = AdapterConfig(default_blocks(TINY.depth), residual_detour=False, short_side_px=SHORT_SIDE_PX, blend=True)
    config = BrixelConfig(BackboneConfig(BRIXEL_TINY.name, (BRIXEL_TINY.name,), TINY, fingerprint(tiny)), adapter)
    model = BrixelFeatures(tiny.eval(), Upsampler(TINY.width, adapter), config)
    model.save_pretrained(folder, include_backbone=True)


if __name__ == "__main__":
    main()
