"""The model in the package: it loads with nothing else, and its features mean something."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

import brixel
from brixel import BrixelFeatures, CheckpointError
from brixel.cli.info import model_facts
from brixel.train import TrainConfig, distill

FOLDER = Path(brixel.__file__).parent / "assets" / "brixel-tiny"
SCENE = Path(brixel.__file__).parent / "assets" / "scene.jpg"
# points (y, x) of the drawing, on its 640 x 960 px
THINGS = {
    "sky": [(60, 150), (120, 480), (180, 640)],
    "grass": [(500, 100), (560, 300), (590, 850)],
    "house": [(420, 620), (420, 770), (480, 660)],
    "roof": [(350, 650), (350, 740), (370, 700)],
    "mountains": [(290, 230), (310, 520), (300, 600)],
}

# rows of the drawing, and columns between which there is an edge of the house or the sun
EDGES = [(430, (580, 645)), (430, (785, 850)), (95, (740, 815))]


@pytest.fixture(scope="module")
def tiny():
    return BrixelFeatures.from_pretrained("brixel-tiny", device="cpu")


@pytest.fixture(scope="module")
def scene(tiny):
    return tiny.extract(SCENE)


def test_files_are_small_and_in_half_precision():
    names = ["adapter.safetensors", "backbone.safetensors"]
    assert sorted(path.name for path in FOLDER.iterdir()) == [*names, "config.json"]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 14_000_000
    for name in names:
        with safe_open(FOLDER / name, "pt") as file:
            tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 - no mapping
        assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float16}
        assert all(tensor.isfinite().all() for tensor in tensors)


def test_its_config_names_no_path_of_the_machine_it_was_made_on():
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["backbone"]["sources"] == [config["backbone"]["architecture"]] == ["brixel-tiny"]


def test_it_loads_without_network(tmp_path, monkeypatch, offline):
    """From another folder. That it loads without optional packages is tested with the imports, in another process."""
    monkeypatch.chdir(tmp_path)
    model = BrixelFeatures.from_pretrained("brixel-tiny")
    assert model(torch.zeros(1, 3, 32, 48).to(model.device, model.dtype)).shape == (1, 192, 8, 12)


def test_sizes(tiny):
    assert (tiny.embed_dim, tiny.patch_px, tiny.stride_px) == (192, 16, 4)
    assert tiny.dtype == torch.float32
    parts = (tiny.backbone, tiny.adapter, tiny.head)
    assert [round(sum(weight.numel() for weight in part.parameters()) / 1e6, 1) for part in parts] == [5.5, 0.9, 0.1]


@pytest.mark.slow
def test_its_name_means_the_bundled_one_and_a_path_the_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = BrixelFeatures.from_pretrained("brixel-tiny", device="cpu")
    torch.testing.assert_close(other.state_dict(), tiny.state_dict(), rtol=0, atol=0)
    shutil.copytree(FOLDER, "brixel-tiny")
    changed = BrixelFeatures.from_pretrained("./brixel-tiny", device="cpu")
    with torch.no_grad():
        changed.head.out.bias.add_(1)
    changed.save_pretrained("brixel-tiny", include_backbone=True)
    theirs, ours = (BrixelFeatures.from_pretrained(name, device="cpu") for name in ("./brixel-tiny", "brixel-tiny"))
    torch.testing.assert_close(theirs.head.out.bias, tiny.head.out.bias + 1)
    assert torch.equal(ours.head.out.bias, tiny.head.out.bias)


def test_a_saved_copy_loads_without_its_backbone(tiny, tmp_path, offline):
    """Its config names the package as the source of the backbone."""
    tiny.save_pretrained(tmp_path / "folder")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "config.json",
    ]
    again = BrixelFeatures.from_pretrained(tmp_path / "folder", device="cpu")
    assert again.config == tiny.config
    torch.testing.assert_close(again.state_dict(), tiny.state_dict(), rtol=0, atol=0)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "folder" / "config.json").read_bytes()


@pytest.mark.slow
def test_its_backbone_is_known_by_name(tiny, tmp_path, offline):
    fresh = BrixelFeatures.from_backbone("brixel-tiny", device="cpu")
    torch.testing.assert_close(fresh.backbone.state_dict(), tiny.backbone.state_dict(), rtol=0, atol=0)
    described = fresh.config.backbone
    assert (described.architecture, described.sources) == ("brixel-tiny", ("brixel-tiny",))
    assert described.vit == tiny.config.backbone.vit
    fresh.save_pretrained(tmp_path)
    for given in (None, "brixel-tiny"):
        again = BrixelFeatures.from_pretrained(tmp_path, backbone=given, device="cpu")
        assert again.config == fresh.config
    other = BrixelFeatures.from_backbone("brixel-tiny", device="cpu", rope_rounding="bfloat16")
    assert other.config.backbone.vit.rope_rounding == "bfloat16"
    with pytest.raises(CheckpointError, match="does not fit dinov3-vits16"):
        BrixelFeatures.from_backbone("brixel-tiny", architecture="dinov3-small")


@pytest.mark.slow
def test_an_adapter_is_trained_on_its_backbone(tmp_path, offline):
    (tmp_path / "images").mkdir()
    with Image.open(SCENE) as scene:
        scene.resize((96, 64)).save(tmp_path / "images" / "scene.png")
    images = (str(tmp_path / "images"),)
    settings = {"steps": 1, "batch_size": 1, "warmup": 1, "workers": 0, "device": "cpu", "teacher_px": 64, "fit": 1}
    config = TrainConfig("brixel-tiny", images, str(tmp_path / "run"), val=images, **settings)
    model = distill(config)
    assert model.config.backbone.sources == ("brixel-tiny",)
    again = BrixelFeatures.from_pretrained(tmp_path / "run", device="cpu")
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    distill(config)  # finds the finished run


def test_info_tells_its_licence():
    facts = model_facts(Path("brixel-tiny"))
    assert (facts["backbone"], facts["licence"]) == ("brixel-tiny", "apache-2.0")


def test_a_thing_is_nearer_to_itself_than_to_other_things(scene):
    """The nearest of all other points of the drawn scene, by cosine similarity, is of the same thing, but for one."""
    points = [(name, point) for name, group in THINGS.items() for point in group]
    features = F.normalize(scene.at([point for _, point in points]), dim=1)
    features = F.normalize(features - features.mean(0), dim=1)
    similarity = (features @ features.T).fill_diagonal_(-1)
    nearest = [points[index][0] for index in similarity.argmax(1).tolist()]
    assert sum(name != found for (name, _), found in zip(points, nearest, strict=True)) <= 1


def test_outlines_are_sharper_than_by_interpolation(tiny, scene):
    """Across upright edges: the largest step from a cell to the next."""
    plain = tiny.extract_backbone(SCENE).features[None]
    plain = F.interpolate(plain, scene.grid_hw, mode="bilinear", align_corners=False)[0]
    for row_px, columns_px in EDGES:
        row = int(row_px / scene.stride[0])
        columns = slice(*(int(column_px / scene.stride[1]) for column_px in columns_px))
        steps = []
        for features in (scene.features, plain):
            cells = F.normalize(features[:, row, columns], dim=0)
            steps.append(float((1 - (cells[:, 1:] * cells[:, :-1]).sum(0)).max()))
        assert steps[0] > 1.5 * steps[1], (row_px, steps)


@pytest.mark.slow
def test_half_precision_gives_nearly_the_same(tiny, scene):
    half = BrixelFeatures.from_pretrained("brixel-tiny", device="cpu", dtype="bfloat16").extract(SCENE)
    cosine = F.cosine_similarity(half.features.float(), scene.features, dim=0)
    assert float(cosine.mean()) > 0.995
