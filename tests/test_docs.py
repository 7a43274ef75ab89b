"""The README and the guides in `docs/`: Python runs as it stands, commands are understood, links lead somewhere."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from helpers import ROOT
from PIL import Image
from safetensors.torch import save

from brixel import BrixelFeatures, Reduce
from brixel.cli.app import build_parser
from brixel.extraction import extract_files
from brixel.video import write_video

README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = {
    "add-a-backbone": ("ijepa_vith14_1k", "pretrained=True", "torch.hub.load", 'backbone="my own"'),
    "evaluation": ("my_function",),
    "clusters": ("s3://",),
    "domains": ("data/LoveDA",),
    "train": ("dinov2-small",),
}
"""Blocks that need what a test cannot have, such as other people's weights or hours: by page, texts in them."""


def blocks_of(page, language):
    """The blocks of a language in a page that can run here."""
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [block for block in found if not any(text in block for text in NOT_RUN.get(page.stem, ()))]


def commands_of(page):
    """The calls of `brixel` in the shell blocks of a page, without comments, continued lines joined."""
    text = "\n".join(blocks_of(page, "bash")).replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*", "", part).strip() for line in text.splitlines() for part in line.split("&&"))
    return [line for line in lines if line.split(" ")[0] == "brixel"]


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A working folder with `photo.jpg` and `photos/`."""
    y, x = np.mgrid[:400, :600]
    colours = np.stack([x / 3, y / 2, 128 + 100 * np.sin(x / 7) * np.cos(y / 5)], -1).clip(0, 255).astype(np.uint8)
    (tmp_path / "photos").mkdir()
    for path in ("photo.jpg", "photos/1.jpg", "photos/2.jpg"):
        Image.fromarray(colours).save(tmp_path / path)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def dinov3(hub):
    """The Hub with DINOv3-S: Meta's repository behind its gate, timm's copy with random weights."""
    checkpoints = json.loads((ROOT / "tests" / "headers" / "dinov3-timm.json").read_text())["checkpoints"]
    header, state = checkpoints["dinov3-vits16"], {}
    for key, shape in header["tensors"].items():
        for index in range(header["depth"] if "{i}" in key else 1):
            state[key.replace("{i}", str(index))] = torch.randn(shape, dtype=torch.float16) * 0.02
    settings = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "tag": "lvd1689m"}
    config = {"architecture": "vit_small_patch16_dinov3", "pretrained_cfg": settings}
    hub.add("facebook/dinov3-vits16-pretrain-lvd1689m", {"config.json": b"{}"}, gated=True)
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": save(state)}
    hub.add("timm/vit_small_patch16_dinov3.lvd1689m", files)


@pytest.fixture(scope="module")
def made_before(tmp_path_factory, backbone_folder, image_path):
    """What the guides take for granted besides photographs: folders of maps, a model, masks, a video, a raster."""
    folder = tmp_path_factory.mktemp("made")
    model = BrixelFeatures.from_backbone(backbone_folder, device="cpu")
    (folder / "cats").mkdir()
    shutil.copyfile(image_path, folder / "cats" / "7.jpg")
    cat = [(folder / "cats" / "7.jpg", Path("cats/7.jpg"))]
    extract_files(model, cat, folder / "maps", reduce="pca:8")
    extract_files(model, cat, folder / "tables", reduce=Reduce.points([(3.0, 4.0)]))
    for sink in ("parquet", "zarr", "webdataset"):
        extract_files(model, cat, folder / f"as-{sink}", sink=sink)
        shutil.move(folder / f"as-{sink}" / sink, folder / "maps" / sink)
    model.export(folder / "brixel-small.onnx", verify=False)
    y, x = np.mgrid[:240, :320]
    halves = (x > 160).astype(np.uint16)
    for name in "abcd":
        colours = np.where(halves[..., None], (200, 60, 40), (40, 90, 200)) + numbers_below(40, (240, 320, 3))
        Image.fromarray(colours.astype(np.uint8)).save(folder / f"{name}.jpg")
        Image.fromarray(halves).save(folder / f"{name}.png")
        np.save(folder / f"{name}.npy", 1.0 + y.astype(np.float32) / 240)
    frames = [np.roll(colours, 4 * index, 1).astype(np.uint8) for index in range(4)]
    write_video(folder / "clip.mp4", frames, fps=4)
    Image.fromarray(halves.astype(np.uint8)).save(folder / "first.png")
    profile = {"driver": "GTiff", "height": 112, "width": 140, "count": 4, "dtype": "uint16", "crs": "EPSG:32633"}
    with rasterio.open(
        folder / "scene.tif", "w", **profile, transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)
    ) as file:
        file.write(numbers_below(4000, (4, 112, 140)).astype(np.uint16))
    return folder


def numbers_below(limit, shape):
    return np.random.default_rng(0).integers(0, limit, shape)


@pytest.fixture
def working_folder(photographs, made_before, tmp_path):
    shutil.copytree(made_before, tmp_path, dirs_exist_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in blocks_of(README, "python") if "dinov3" not in block])
def test_a_block_of_the_readme_runs(block, photographs):
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in blocks_of(README, "python") if "dinov3" in block])
def test_a_block_on_dinov3_runs_without_access(block, photographs, dinov3, caplog):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["feature_map"].embed_dim == 384
    assert "timm/vit_small_patch16_dinov3.lvd1689m" in caplog.text


def test_what_the_first_block_prints(photographs, capsys):
    exec(compile(blocks_of(README, "python")[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("FeatureMap((384, 64, 96) ")
    assert printed[1:] == ["torch.Size([1, 384])", "torch.Size([64, 96])"]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)  # of webdataset's files
@pytest.mark.parametrize("page", [page for page in GUIDES if blocks_of(page, "python")], ids=lambda page: page.stem)
def test_the_blocks_of_a_guide_run_one_after_the_other(page, working_folder, dinov3):
    names = {}
    for block in blocks_of(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("command", sorted({command for page in PAGES for command in commands_of(page)}))
def test_a_command_is_understood(command):
    build_parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8"))
    assert not [link for link in targets if "://" not in link and not (page.parent / link).exists()]
