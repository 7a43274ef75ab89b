"""Train the universal upsampler on the maps of `make_maps.py`. Resumes after an interruption.

    python examples/universal/train.py --maps maps --out run --steps 12000
    python examples/universal/train.py --maps maps --out without-tiny --without brixel-tiny --steps 6000

Writes `run/universal.safetensors`, the average of the weights that was best on the validation sets, `run/state.pt` and
`run/metrics.jsonl`. Results: `docs/universal.md`.

Shapes: B crops, D width, h x w low-resolution grid, H x W the teacher's, Gh x Gw pixels of the guide.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from maps import MapSet
from safetensors.torch import save_file
from torch import Tensor

from brixel.evaluate.fidelity import edges_of_one
from brixel.model.universal import OutputGrid, UniversalUpsampler, cell_table, inner_products, mean_length, window_cells

CELLS = 8192  # of the teacher per step
RATIOS = {2: 0.15, 4: 0.7, 8: 0.15}  # and their shares of the steps
LAST, EARLIER = 0, 1  # blocks of a map set
LARGE_GUIDE = 0.25  # share of steps whose guide is made from the large image
WARM_UP = 100  # steps


@dataclass(frozen=True)
class Batch:
    """Features (B, D, h, w), guide (B, 3, Gh, Gw) and teacher (B, D, H, W); ``mean``: the set's mean feature (D,)."""

    features: Tensor
    guide: Tensor
    teacher: Tensor
    mean: Tensor


class TrainingSet:
    """Batches of one map set."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.maps, self.limit = MapSet(folder), limit
        self.means = [self.mean(block) for block in (LAST, EARLIER)]

    def mean(self, block: int) -> Tensor:
        """The teacher's mean feature, over up to 64 crops."""
        count = min(self.maps.done, 64)
        return torch.stack([self.maps.read("map1", [row])[0, block].mean((1, 2)) for row in range(count)]).mean(0)

    @property
    def weight(self) -> float:
        """Share of steps: sets with more cells are read more often, but less than in proportion."""
        return math.sqrt(min(self.maps.done, self.limit or self.maps.done) * self.maps.grid**2)

    def batch(self, rng: np.random.Generator, *, as_it_is: bool = False) -> Batch:
        """A random batch, with random changes that keep the task; ``as_it_is``: but not of the feature space."""
        count = min(self.maps.done, self.limit or self.maps.done)
        rows = rng.choice(count, min(count, max(1, CELLS // self.maps.grid**2)), replace=False)
        ratio = int(rng.choice(list(RATIOS), p=list(RATIOS.values())))
        block = EARLIER if rng.random() < 0.3 else LAST
        features, teacher = (self.maps.read(f"map{r}", rows)[:, block] for r in (ratio, 1))
        guide = self.maps.read("guide" if rng.random() < LARGE_GUIDE else f"view{ratio}", rows)
        turns, mirror = int(rng.integers(4)), rng.random() < 0.5
        features, guide, teacher = (_turned(maps, turns, mirror) for maps in (features, guide, teacher))
        batch = Batch(features, _recoloured(guide, rng), teacher, self.means[block])
        return batch if as_it_is else _as_another_backbone(batch, rng)


def _turned(maps: Tensor, turns: int, mirror: bool) -> Tensor:
    maps = maps.rot90(turns, (2, 3))
    return maps.flip(3) if mirror else maps


def _recoloured(guide: Tensor, rng: np.random.Generator) -> Tensor:
    """Sometimes change gamma and gains of the guide, or the order of its channels."""
    if rng.random() < 0.3:
        guide = guide[:, torch.from_numpy(rng.permutation(3))]
    if rng.random() < 0.3:
        gains = torch.from_numpy(np.exp(rng.normal(0, 0.15, (1, 3, 1, 1)))).float()
        guide = (guide.pow(math.exp(rng.normal(0, 0.25))) * gains).clamp(0, 1)
    return guide


def _as_another_backbone(batch: Batch, rng: np.random.Generator) -> Batch:
    """Sometimes project features to fewer dimensions with random gains, and add a constant feature."""
    features, teacher, mean = batch.features, batch.teacher, batch.mean
    if rng.random() < 0.3:
        width = features.shape[1]
        narrow = round(math.exp(rng.uniform(math.log(32), math.log(width))))
        projection = torch.from_numpy(rng.normal(0, 1, (narrow, width)) * np.exp(rng.normal(0, 0.7, width))).float()
        features, teacher = (torch.einsum("nd,bdhw->bnhw", projection, maps) for maps in (features, teacher))
        mean = projection @ mean
    if rng.random() < 0.3:
        constant = torch.from_numpy(rng.normal(0, 1, len(mean))).float()
        constant = constant * (rng.uniform(-1, 1) * mean.norm() / constant.norm()) - rng.uniform(0, 1) * mean
        features, teacher = (maps + constant[:, None, None] for maps in (features, teacher))
        mean = mean + constant
    return Batch(features, batch.guide, teacher, mean)


def loss_of(model: UniversalUpsampler, batch: Batch) -> Tensor:
    """1 - cosine, the same after the mean is subtracted, and the squared error over the teacher's variance.

    All of them are functions of inner products of the weighted cells and the teacher's, in which the width does not
    appear. So the output itself is not computed.
    """
    size_hw = (batch.teacher.shape[2], batch.teacher.shape[3])
    grid = OutputGrid((batch.features.shape[2], batch.features.shape[3]), size_hw, batch.features.device)
    table = cell_table(batch.features)
    cells = window_cells(table, grid)
    gram = inner_products(cells)
    weights = model.weights(gram, mean_length(table), batch.guide, grid)  # B h w S 26
    teacher = grid.to_slots(batch.teacher.permute(0, 2, 3, 1))  # B h w S D
    cosine, _, _ = _cosine(weights, cells, teacher)
    from_mean = torch.cat([cells[..., :-1, :], cells[..., -1:, :] - batch.mean], -2)
    centred, error, variance = _cosine(weights, from_mean, teacher - batch.mean)
    return 1 - cosine + 0.5 * (1 - centred) + 0.1 * error / variance


def _cosine(weights: Tensor, cells: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean cosine of weighted sums of cells to the teacher, the mean squared distance and length of the teacher."""
    with torch.no_grad():
        gram, products = cells @ cells.mT, teacher @ cells.mT  # B h w 26 26, B h w S 26
        square = teacher.square().sum(-1)
    dot = (weights * products).sum(-1)
    length = ((weights @ gram) * weights).sum(-1)
    cosine = dot / (length.clamp_min(1e-9) * square.clamp_min(1e-9)).sqrt()
    return cosine.mean(), (length - 2 * dot + square).mean(), square.mean()


class HeldOut:
    """A validation set: what the upsampler removes of bilinear interpolation's 1 - cosine."""

    def __init__(self, folder: Path) -> None:
        self.name, self.maps = folder.name.removesuffix("-val"), MapSet(folder)
        teachers = self.maps.read("map1", range(self.maps.count))[:, LAST]
        self.mean = teachers.mean((0, 2, 3))
        self.edges = [edges_of_one(teacher[None]) for teacher in teachers]
        self.base = {r: self._errors(lambda f, _, size: F.interpolate(f, size, mode="bilinear"), r) for r in RATIOS}

    @torch.no_grad()
    def _errors(self, upsample: "UniversalUpsampler", ratio: int) -> Tensor:
        """1 - cosine, raw, centred, raw at edges, centred at edges, by image: (N, 4)."""
        errors = []
        for row in range(self.maps.count):
            features, teacher = (self.maps.read(f"map{r}", [row])[:, LAST] for r in (ratio, 1))
            out = upsample(features, self.maps.read(f"view{ratio}", [row]), tuple(teacher.shape[2:]))
            mean = self.mean[:, None, None]
            cosines = [F.cosine_similarity(a, b, dim=1)[0] for a, b in ((out, teacher), (out - mean, teacher - mean))]
            at_edges = [cosine[1:-1, 1:-1][self.edges[row]].mean() for cosine in cosines]
            errors.append(1 - torch.stack([*(cosine.mean() for cosine in cosines), *at_edges]))
        return torch.stack(errors)

    def measure(self, upsample: "UniversalUpsampler") -> dict[str, list[float]]:
        """By ratio: per cent removed (raw, centred, at edges, centred at edges) and images better, raw and centred."""
        found = {}
        for ratio in RATIOS:
            errors, base = self._errors(upsample, ratio), self.base[ratio]
            removed = 100 * (1 - errors.sum(0) / base.sum(0))
            found[f"{self.name}/{ratio}"] = [*removed.tolist(), *(errors < base)[:, :2].sum(0).tolist()]
        return found


class Run:
    """A training run and its state on disk."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(options.seed)
        self.model = UniversalUpsampler()
        self.average = copy.deepcopy(self.model).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, weight_decay=0.02, betas=(0.9, 0.99))
        self.step, self.best = 0, -math.inf
        if (self.out / "state.pt").exists():
            state = torch.load(self.out / "state.pt")
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.best = state["step"], state["best"]

    def save(self) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}
        torch.save({**parts, "step": self.step, "best": self.best}, self.out / "state.tmp")
        (self.out / "state.tmp").replace(self.out / "state.pt")

    def train(self, sets: Sequence[TrainingSet], held_out: Sequence[HeldOut]) -> None:
        steps, losses, start_s = self.options.steps, [], time.perf_counter()
        while self.step < steps:
            rng = np.random.default_rng([self.options.seed, self.step])
            weights = np.array([one.weight for one in sets])
            batch = sets[rng.choice(len(sets), p=weights / weights.sum())].batch(rng)
            rate = min(1, (self.step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * self.step / steps))
            for group in self.optimizer.param_groups:
                group["lr"] = self.options.lr * rate
            loss = loss_of(self.model, batch)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            keep = min(0.998, self.step / (self.step + 10))
            with torch.no_grad():
                for average, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                    average.lerp_(value, 1 - keep)
            losses.append(loss.item())
            if self.step % self.options.every == 0 or self.step == steps:
                self.validate(held_out, float(np.mean(losses)), (time.perf_counter() - start_s) / len(losses))
                losses, start_s = [], time.perf_counter()

    def validate(self, held_out: Sequence[HeldOut], loss: float, step_s: float) -> None:
        """Measure the average on the validation sets, and keep it if its centred share is the best."""
        found = {}
        for one in held_out:
            found |= one.measure(self.average)
        score = float(np.mean([values[0] + values[1] for name, values in found.items() if name.endswith("/4")])) / 2
        rounded = {name: [round(value, 1) for value in values] for name, values in found.items()}
        line = {"step": self.step, "loss": round(loss, 5), "step_s": round(step_s, 3), "score": score, **rounded}
        print(json.dumps(line), flush=True)
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if score > self.best:
            self.best = score
            save_file(self.average.state_dict(), self.out / "universal.safetensors")
        self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--without", default="", help="leave out the backbone of this name, but validate on it")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--every", type=int, default=500, help="steps between validations")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--limit", type=int, help="crops of each set, for learning curves")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folders = sorted(path.parent for path in options.maps.glob("*/done.json"))
    is_left_out = [bool(options.without) and path.name.startswith(options.without) for path in folders]
    sets = [
        TrainingSet(path, options.limit)
        for path, left_out in zip(folders, is_left_out, strict=True)
        if not left_out and not path.name.endswith("-val")
    ]
    held_out = [HeldOut(path) for path in folders if path.name.endswith("-val")]
    Run(options).train(sets, held_out)


if __name__ == "__main__":
    main()
