"""Other upsamplers beside the universal one: the same crops, steps and validation; operations and time.

    python examples/universal/make_maps.py ... --out maps
    python examples/baselines/compare.py --maps maps --backbone dinov2-small --steps 3000 --out baselines

Trains the cross-attention and the universal upsampler on the maps of one backbone; chooses the widths of joint
bilateral upsampling on its training crops. Prints a Markdown table. Results: `docs/results/second-generation.md`.
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jafar_like import JafarLike
from joint_bilateral import JointBilateral
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "universal"))
from train import Batch, HeldOut, TrainingSet
from train import loss_of as universal_loss

from brixel.model.universal import UniversalUpsampler
from brixel.utils.markdown import markdown_table

Upsample = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]
SPATIAL, COLOUR = (0.4, 0.5, 0.6, 0.8), (0.05, 0.1, 0.2, 0.4)  # widths to choose from
TUNING_STEPS = 12
COST_GRID, COST_PX = 16, 256


def bilinear(features: Tensor, _: Tensor, size_hw: tuple[int, int]) -> Tensor:
    return F.interpolate(features, size_hw, mode="bilinear", align_corners=False)


def loss_of(upsample: Upsample, batch: Batch) -> Tensor:
    """The loss of `train.py`, from the output itself."""
    out = upsample(batch.features, batch.guide, (batch.teacher.shape[2], batch.teacher.shape[3]))
    mean = batch.mean[:, None, None]
    error, variance = ((maps - batch.teacher).square().sum(1).mean() for maps in (out, mean))
    raw, centred = (
        1 - F.cosine_similarity(out - shift, batch.teacher - shift, dim=1).mean() for shift in (0 * mean, mean)
    )
    return raw + 0.5 * centred + 0.1 * error / variance


def batches(sets: list[TrainingSet], steps: int, *, own_width: bool):
    weights = np.array([one.weight for one in sets])
    for step in range(steps):
        rng = np.random.default_rng([0, step])
        chosen = sets[rng.choice(len(sets), p=weights / weights.sum())]
        yield chosen.batch(rng, as_it_is=own_width)


def trained(model: nn.Module, sets: list[TrainingSet], steps: int, path: Path) -> nn.Module:
    """The model after ``steps`` steps, from the file where there is one."""
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02, betas=(0.9, 0.99))
    for step, batch in enumerate(batches(sets, steps, own_width=True)):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss = universal_loss(model, batch) if isinstance(model, UniversalUpsampler) else loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.save(model.state_dict(), path)
    return model.eval()


@torch.no_grad()
def tuned(sets: list[TrainingSet]) -> JointBilateral:
    """Joint bilateral upsampling with the widths that are best on training crops."""
    crops = list(batches(sets, TUNING_STEPS, own_width=True))
    candidates = [JointBilateral(spatial, colour) for spatial, colour in itertools.product(SPATIAL, COLOUR)]
    return min(candidates, key=lambda model: sum(float(loss_of(model, batch)) for batch in crops))


@torch.no_grad()
def cost(upsample: Upsample, width: int) -> tuple[float, float]:
    """GFLOP, and the median of the time in ms, for 16 x 16 cells and an image of 256 px."""
    features, guide = torch.randn(1, width, COST_GRID, COST_GRID), torch.rand(1, 3, COST_PX, COST_PX)
    size_hw = (4 * COST_GRID, 4 * COST_GRID)
    with FlopCounterMode(display=False) as counter:
        upsample(features, guide, size_hw)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        upsample(features, guide, size_hw)
        times.append(time.perf_counter() - start)
    return counter.get_total_flops() / 1e9, 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=Path, required=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    folders = sorted(options.maps.glob(f"{options.backbone}-*"))
    sets = [TrainingSet(folder, None) for folder in folders if not folder.name.endswith("-val")]
    held_out = [HeldOut(folder) for folder in folders if folder.name.endswith("-val")]
    torch.manual_seed(0)
    bilateral, width = tuned(sets), sets[0].maps.width
    found: dict[str, nn.Module | Upsample] = {
        f"joint bilateral, {bilateral.spatial:g} cells, {bilateral.colour:g} of colour": bilateral,
        "cross-attention": trained(JafarLike(width), sets, options.steps, options.out / "jafar_like.pt"),
        "universal": trained(UniversalUpsampler(), sets, options.steps, options.out / "universal.pt"),
    }
    rows = [["bilinear", *[""] * len(held_out), "", *(f"{value:.2f}" for value in cost(bilinear, width))]]
    for name, model in found.items():
        removed = [held.measure(model)[f"{held.name}/4"] for held in held_out]
        cells = [
            f"{raw:.1f} ({centred:.1f}, {edges:.1f}), {better:.0f}" for raw, centred, edges, _, better, _ in removed
        ]
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows.append([name, *cells, f"{parameters / 1e3:.0f} k", *(f"{value:.2f}" for value in cost(model, width))])
    titles = [f"{held.maps.side_px // 4} px" for held in held_out]
    print("\n".join(markdown_table(["", *titles, "parameters", "GFLOP", "ms"], rows)))


if __name__ == "__main__":
    main()
