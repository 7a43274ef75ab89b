"""Compute the maps that the universal upsampler is trained on. Resumes after an interruption.

    python examples/universal/make_maps.py --backbone dinov2-small:448=2200,672=560,896=180 --photos photos/train \\
        --cutouts objects/train --out maps

Training sets are named `BACKBONE-T`; with `--val FOLDER`, `BACKBONE-T-val` has a centre crop of each of its images.
"""

import argparse
from pathlib import Path

import torch
from maps import MapSet, build
from pictures import CropSource
from torch import Tensor

from brixel import BrixelFeatures
from brixel.backbones.vit import ViT
from brixel.evaluate.feature_cache import centre_crop
from brixel.train.data import find_training_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", action="append", required=True, metavar="NAME:T=CROPS,...")
    parser.add_argument("--photos", type=Path, nargs="+", required=True)
    parser.add_argument("--cutouts", type=Path, help="a folder with images/ and masks/")
    parser.add_argument("--val", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    held_out = find_training_images([options.val]) if options.val else []
    sets, val_sets = [], []
    for text in options.backbone:
        name, _, sizes = text.rpartition(":")
        vit = BrixelFeatures.from_backbone(name, device="cpu", dtype=torch.float32).backbone
        assert isinstance(vit, ViT)
        for side_px, count in (map(int, size.split("=")) for size in sizes.split(",")):
            folder = options.out / f"{Path(name).name}-{side_px}"
            sets.append(MapSet(folder, vit, side_px, count))
            if held_out:
                val_sets.append(MapSet(folder.with_name(f"{folder.name}-val"), vit, side_px, len(held_out)))

    def centre(_: str, number: int, side_px: int) -> Tensor:
        return (255 * centre_crop(held_out[number], side_px)).round().byte()

    build(val_sets, centre)
    masks = sorted(options.cutouts.glob("masks/*")) if options.cutouts else []
    cutouts = [(next(options.cutouts.glob(f"images/{mask.stem}.*")), mask) for mask in masks]
    build(sets, CropSource(find_training_images(options.photos), cutouts).crop)


if __name__ == "__main__":
    main()
