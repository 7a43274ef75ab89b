"""The model inside the package: it loads with nothing around it, and its features mean something."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import brixel
from brixel import BrixelFeatures
from brixel.cli.info import model_facts

FOLDER = Path(brixel.__file__).parent / "assets" / "tiny"
SCENE = Path(brixel.__file__).parent / "assets" / "scene.jpg"
# points (y, x) of the drawing, on its 640 x 960 px
THINGS = {
    "sky": [(60, 150), (120, 480), (180, 640)],
    "grass": [(500, 100), (560, 300), (590, 850)],
    "house": [(420, 620), (420, 770), (480, 660)],
    "roof": [(350, 650), (350, 740), (370, 700)],
    "mountains": [(290, 230), (310, 520), (300, 600)],
}

# rows of the drawing, and columns between which a side of the house and of the sun stands
EDGES = [(430, (580, 645)), (430, (785, 850)), (95, (740, 815))]


@pytest.fixture(scope="module")
def tiny():
    return BrixelFeatures.from_pretrained(device="cpu")


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
        assert {each.dtype for each in tensors if each.is_floating_point()} == {torch.float16}
        assert all(each.isfinite().all() for each in tensors)


def test_its_file_names_no_place_of_the_machine_it_was_made_on():
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["backbone"]["sources"] == [config["backbone"]["architecture"]] == ["brixel-tiny"]


def test_it_loads_without_arguments_or_network(tmp_path, monkeypatch):
    """From another folder. That it loads without optional packages is tested in a process of its own, with imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    model = BrixelFeatures.from_pretrained()
    assert model(torch.zeros(1, 3, 32, 48).to(model.device, model.dtype)).shape == (1, 192, 8, 12)


def test_sizes(tiny):
    assert (tiny.embed_dim, tiny.patch_px, tiny.stride_px) == (192, 16, 4)
    assert tiny.dtype == torch.float32
    parts = (tiny.backbone, tiny.adapter, tiny.head)
    assert [round(sum(each.numel() for each in part.parameters()) / 1e6, 1) for part in parts] == [5.5, 0.9, 0.1]


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


def test_info_tells_its_licence():
    facts = model_facts(Path("brixel-tiny"))
    assert (facts["backbone"], facts["licence"]) == ("brixel-tiny", "apache-2.0")


def test_a_thing_is_nearer_to_itself_than_to_other_things(scene):
    """Of the drawn scene: every point's nearest among all the others is of the same thing, by cosine similarity."""
    points = [(name, point) for name, group in THINGS.items() for point in group]
    features = F.normalize(scene.at([point for _, point in points]), dim=1)
    features = F.normalize(features - features.mean(0), dim=1)
    similarity = (features @ features.T).fill_diagonal_(-1)
    nearest = [points[place][0] for place in similarity.argmax(1).tolist()]
    assert nearest == [name for name, _ in points]


def test_outlines_are_sharper_than_by_interpolation(tiny, scene):
    """Across upright edges: the largest step from a cell to the next."""
    plain = tiny.extract_backbone(SCENE).features[None]
    plain = F.interpolate(plain, scene.grid_hw, mode="bilinear", align_corners=False)[0]
    for row_px, columns_px in EDGES:
        row = int(row_px / scene.stride[0])
        columns = slice(*(int(each / scene.stride[1]) for each in columns_px))
        steps = []
        for features in (scene.features, plain):
            cells = F.normalize(features[:, row, columns], dim=0)
            steps.append(float((1 - (cells[:, 1:] * cells[:, :-1]).sum(0)).max()))
        assert steps[0] > 1.5 * steps[1], (row_px, steps)


def test_half_precision_gives_nearly_the_same(tiny, scene):
    half = BrixelFeatures.from_pretrained(device="cpu", dtype="bfloat16").extract(SCENE)
    cosine = F.cosine_similarity(half.features.float(), scene.features, dim=0)
    assert float(cosine.mean()) > 0.995
