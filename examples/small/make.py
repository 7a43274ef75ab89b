"""How brixel-small was made: DINOv2-S with 8-bit weights, and an adapter of the second generation for three sizes.

    python examples/universal/make_maps.py --backbone dinov2-small:448=2200,672=560,896=180 ... --out maps
    python examples/small/make.py --backbone dinov2-small --maps maps --images photos --val held-out --out small \
        --name brixel-small

The crops are those that the universal upsampler was trained on. Resumes after an interruption. Results:
`docs/brixel-small.md`.

Shapes: S side of the student's crop in pixels, D width, h x w its patch grid.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "universal"))
from maps import MapSet

from brixel import BrixelFeatures
from brixel.checkpoints.hub_download import portable_sources
from brixel.images.crops import normalised
from brixel.train import TrainConfig, distill

SHORT_SIDE_PX = 224  # images are resized to this by default


class Crops:
    """The student's crops of a map set with the teacher's maps, and all of them mirrored."""

    def __init__(self, maps: MapSet, model: BrixelFeatures) -> None:
        self.maps, self.vit = maps, model.config.backbone.vit

    def __len__(self) -> int:
        return 2 * self.maps.done

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(3, S, S) and (D, 4h, 4w)."""
        row, mirrored = divmod(index, 2)
        pixels = normalised(self.maps.read("view4", [row])[0], self.vit.mean, self.vit.std)
        teacher = self.maps.read("map1", [row])[0, 0]  # of the last block
        return (pixels.flip(-1), teacher.flip(-1)) if mirrored else (pixels, teacher)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="a name that brixel knows, or a folder")
    parser.add_argument("--maps", type=Path, required=True, help="what make_maps.py wrote")
    parser.add_argument("--images", nargs="+", required=True, help="the folders that the maps were made from")
    parser.add_argument("--val", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=(112, 168, 224), help="of the student, in pixels")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--fit", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--drop-path", type=float, default=0.3)
    parser.add_argument("--l1", type=float, default=1.0, help="weight of the L1 loss beside the cosine loss")
    parser.add_argument("--train-universal", action="store_true", help="train the universal upsampler along")
    parser.add_argument(
        "--gain", type=float, default=1.0, help="factor on the learned gains, chosen on held-out images"
    )
    parser.add_argument("--weights", choices=("float", "int8"), default="int8", help="of the backbone, in the file")
    parser.add_argument("--name", default="", help="of the model in the package")
    parser.add_argument("--short-side-px", type=int, default=SHORT_SIDE_PX)
    options = parser.parse_args()
    model = BrixelFeatures.from_backbone(options.backbone, adapter="fresh", device="cpu", dtype=torch.float32)
    config = TrainConfig(
        backbone=options.backbone,
        images=tuple(options.images),
        val=(options.val,),
        out=str(options.out / "run"),
        sizes=tuple(options.sizes),
        steps=options.steps,
        batch_size=options.batch_size,
        fit=options.fit,
        lr=options.lr,
        drop_path=options.drop_path,
        l1=options.l1,
        train_universal=options.train_universal,
        val_every=100,
        workers=0,
        device="cpu",
        about="photographs, composites and drawings of examples/universal/pictures.py",
    )
    name = Path(options.backbone).name
    crops = [Crops(MapSet(options.maps / f"{name}-{4 * size}"), model) for size in options.sizes]
    model = distill(config, model=model, crops=crops)
    with torch.no_grad():
        model.upsampler.gain.gains.mul_(options.gain)
    adapter = dataclasses.replace(model.config.adapter, short_side_px=options.short_side_px)
    config = dataclasses.replace(model.config, adapter=adapter)
    if options.name:  # in the package, and published where the backbone is
        config = config.with_sources(dict.fromkeys([options.name, *portable_sources(config.backbone.sources)]))
    model.config = config
    model.to(torch.float16).save_pretrained(options.out / "model", include_backbone=True, weights=options.weights)


if __name__ == "__main__":
    main()
