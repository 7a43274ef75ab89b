"""Train or convert, evaluate and publish an adapter for each of several backbones; a second run continues.

    python examples/publish_adapters.py dinov3-small dinov2-base --images photos --val held-out -o adapters --push ORG
    python examples/publish_adapters.py vitb16-256 vitl16-256 --released files --val held-out -o adapters --push ORG
    python examples/publish_adapters.py --table  # the rows of docs/model-zoo.md

With `--released FOLDER` the names are those of adapters that the paper's authors published, FOLDER/vitb16-256.pth and
so on; otherwise they are backbones. What belongs to a name lies in a folder of that name: the model, `fidelity.md`, and
`pushed.txt` with the commit, by which a finished one is known. Without `--push ORG` nothing leaves this machine. Under
`torchrun` the trainings use all its processes; give one backbone then.
"""

import argparse
from pathlib import Path

import torch

from brixel import BrixelError, BrixelFeatures, list_models
from brixel.backbones.vit import ViT
from brixel.checkpoints.release_adapters import RELEASED
from brixel.evaluate import fidelity
from brixel.evaluate.cost.timing import flops_of
from brixel.images.find_images import find_images
from brixel.model.config import AdapterConfig, default_blocks
from brixel.model.student import Student
from brixel.model.upsampler import make_upsampler
from brixel.train import TrainConfig, distill
from brixel.utils.atomic_files import write_text
from brixel.utils.markdown import markdown_table

SIDES = (8, 12, 16)  # of the students' crops in patches, as brixel-small was trained
CROPS = 330_000  # of the estimate: what the paper trained on, 110,000 images three times
PEAK_FLOPS, UTILISATION = 989e12, 0.3  # bfloat16 without sparsity by the data sheet of the H100 SXM; an assumption
BACKWARD = 2  # operations of a backward pass for each of its forward pass


def publish(name, options):
    folder = options.output / Path(name).name
    report, pushed = folder / "fidelity.md", folder / "pushed.txt"
    model = convert(name, options.released, folder / "model") if options.released else train(name, options, folder)
    if not report.exists():
        images = [path for path, _ in find_images(options.val)]
        sides = [4 * patches * model.patch_px for patches in SIDES]
        found = fidelity(model, images, sides, ("bilinear", "universal", "student"), name=folder.name)
        write_text(report, found.markdown(f"python examples/publish_adapters.py {name}"))
    if options.push and not pushed.exists():
        commit = model.push_to_hub(f"{options.push}/brixel-{folder.name}", private=options.private or None)
        write_text(pushed, f"{commit}\n")
    return pushed.read_text(encoding="utf-8").strip() if pushed.exists() else str(folder)


def train(backbone, options, folder):
    """The distilled adapter; a training that is finished or was interrupted goes on where it stopped."""
    patch_px = BrixelFeatures.from_backbone(backbone, device="cpu").patch_px
    config = TrainConfig(
        backbone,
        tuple(map(str, options.images)),
        str(folder / "model"),
        val=tuple(map(str, options.val)),
        sizes=tuple(patches * patch_px for patches in SIDES),
        steps=options.steps,
        about=options.about,
    )
    distill(config)
    return BrixelFeatures.from_pretrained(folder / "model")


def convert(release, files, folder):
    """An adapter of the authors, as brixel saves models."""
    if not (folder / "config.json").exists():
        BrixelFeatures.from_release(files / f"{release}.pth", release=release).save_pretrained(folder)
    return BrixelFeatures.from_pretrained(folder)


def training_flops(vit):
    """Operations of training on one crop of 16 x 16 patches: teacher, student forward, and its upsampler backward."""
    side = SIDES[-1] * vit.patch_px
    config = AdapterConfig(default_blocks(vit.depth), False, side, blend=True, generation=2, grids=(SIDES[-1],))
    with torch.device("meta"), torch.inference_mode():  # without data: of any size
        student = Student(ViT(vit), make_upsampler(vit, config), config.blocks).eval()
        small, large = (torch.empty(1, 3, pixels, pixels) for pixels in (side, 4 * side))
        teacher = flops_of(lambda: student.backbone_features(large))
        backbone = flops_of(lambda: student.backbone_features(small))
        whole = flops_of(lambda: student(small))
    return teacher + whole + BACKWARD * (whole - backbone)


def model_table():
    """A row for every known backbone: its adapter or the command that trains one, GPU hours, the adapter's licence."""
    rows = []
    for known in list_models():
        hours = CROPS * training_flops(known.vit) / (PEAK_FLOPS * UTILISATION) / 3600
        released = ", ".join(name for name, release in RELEASED.items() if release.backbone == known.name)
        adapter = known.adapter or (f"released: {released}" if released else "train one")
        command = f"`python examples/publish_adapters.py {known.name} --images photos --val held-out -o adapters`"
        licence = "DINOv3's licence binds it" if known.gated else f"free to choose; the backbone is {known.licence}"
        rows.append([known.name, adapter, command if known.sources else "", f"{hours:.1f}", licence])
    headings = ["backbone", "adapter", "command", "GPU hours", "licence of an adapter"]
    return markdown_table(headings, rows, numeric=[False, False, False, True, False])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="backbones, or with --released adapters of the release"
    )
    parser.add_argument("--images", nargs="+", type=Path, default=[], help="folders to train on")
    parser.add_argument("--val", nargs="+", type=Path, default=[], help="folders to validate and evaluate on")
    parser.add_argument("--released", type=Path, metavar="FOLDER", help="the authors' adapter files, to convert them")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--about", default="", help="what the images are, for the model card")
    parser.add_argument("--push", metavar="ORG", help="publish as ORG/brixel-NAME")
    parser.add_argument("--private", action="store_true", help="new repositories are private")
    parser.add_argument("--table", action="store_true", help="print the table of models and stop")
    parser.add_argument("-o", "--output", type=Path, default=Path("adapters"))
    options = parser.parse_args(arguments)
    if options.table:
        print("\n".join(model_table()))
        return
    if not options.names or not options.val or not (options.images or options.released):
        parser.error(
            "give at least one NAME, --val FOLDER, and --images FOLDER to train or --released FOLDER to convert"
        )
    failed = []
    for name in options.names:
        try:
            print(f"{name}: {publish(name, options)}")
        except BrixelError as error:  # the others go on
            failed.append(name)
            print(f"{name}: {error}")
    if failed:
        raise SystemExit(
            f"{len(failed)} of {len(options.names)} failed: {', '.join(failed)}; run the same command again"
        )


if __name__ == "__main__":
    main()
