"""Which losses pay: short trainings of an adapter on DINOv2-S, with several seeds.

    python examples/small/ablate.py --backbone dinov2-small --maps maps --images photos --val held-out --out ablation

Writes one line of JSON per training to `ablation/results.jsonl`; a second run continues. The crops and the ridge fit
are those of `make.py`, so only the losses differ. Results: `docs/results/second-generation.md`.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "universal"))
from make import Crops
from maps import MapSet

from brixel import BrixelFeatures
from brixel.train import TrainConfig, distill

VARIANTS: dict[str, dict[str, float | bool]] = {
    "l1 + cosine": {},
    "l1": {"cosine": 0.0},
    "cosine": {"l1": 0.0},
    "l1 + cosine + edge": {"edge": 0.1},
    "l1 + cosine + spectral": {"spectral": 0.01},
    "l1 + edge + spectral, as in the paper": {"cosine": 0.0, "edge": 1.0, "spectral": 0.1},
    "l1 + cosine, universal trained along": {"train_universal": True},
}
KEPT = ("l1", "cosine", "centred_cosine", "centred_cosine_edges", "r2")


def train(options: argparse.Namespace, variant: str, seed: int) -> dict[str, float]:
    """One training; the held-out figures of its last step."""
    model = BrixelFeatures.from_backbone(options.backbone, adapter="fresh", device="cpu", dtype=torch.float32)
    out = options.out / f"{list(VARIANTS).index(variant)}-{seed}"
    config = TrainConfig(
        backbone=options.backbone,
        images=tuple(options.images),
        val=(options.val,),
        out=str(out),
        sizes=(options.size,),
        steps=options.steps,
        batch_size=options.batch_size,
        fit=options.fit,
        lr=3e-4,
        val_every=options.steps,
        save_every=options.steps,
        workers=0,
        device="cpu",
        seed=seed,
        **VARIANTS[variant],
    )
    name = Path(options.backbone).name
    distill(config, model=model, crops=[Crops(MapSet(options.maps / f"{name}-{4 * options.size}"), model)])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "centred_cosine" in line)
    return {name: last[name] for key in KEPT for name in (key, f"bilinear_{key}")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--maps", type=Path, required=True, help="what make_maps.py wrote")
    parser.add_argument("--images", nargs="+", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=112, help="of the student, in pixels")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--fit", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    finished = {(line["losses"], line["seed"]) for line in done}
    for seed in options.seeds:
        for variant in VARIANTS:
            if (variant, seed) in finished:
                continue
            line = {"losses": variant, "seed": seed, **train(options, variant, seed)}
            print(json.dumps(line), flush=True)
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
