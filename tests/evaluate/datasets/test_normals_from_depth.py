"""Normals: readers of NYUv2 and NAVI on made-up samples, and normals of depth on surfaces whose normals are known."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from brixel import BrixelError
from brixel.cli.app import main
from brixel.evaluate.datasets.depth_normals import read_measured
from brixel.evaluate.datasets.normals_from_depth import normals_from_depth
from brixel.evaluate.metrics import angles

FOCAL_PX = 90.0


def rays(height, width, focal_px=FOCAL_PX):
    """Directions of all pixels with z = 1, (3, H, W), x right and y down."""
    y, x = ((torch.arange(side).double() + 0.5 - side / 2) / focal_px for side in (height, width))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.ones(height, width)]).double()


def inverse_of_plane(directions, normal, distance):
    """1 / depth of the plane n . p = -distance, whose unit normal n points to the camera."""
    return -(directions * normal[:, None, None]).sum(0) / distance


@pytest.mark.parametrize("normal", [(0, 0, -1), (0, -1, -0.4), (0.7, 0, -1), (-0.5, 0.6, -0.9)])
def test_planes_are_exact(normal):
    normal = torch.tensor(normal, dtype=torch.float64)
    normal = normal / normal.norm()
    inverse = inverse_of_plane(rays(40, 60), normal, 1.5).clamp(min=0)  # half of the floor is above the horizon
    found = normals_from_depth(inverse, FOCAL_PX)
    known = found.norm(dim=0) > 0
    assert found.shape == (3, 40, 60)
    assert known.sum() >= 18 * 58
    assert torch.allclose(found[:, known], normal.float()[:, None], atol=1e-5)
    assert not known[[0, -1]].any()
    assert not known[:, [0, -1]].any()
    assert torch.allclose(normals_from_depth(1000 * inverse, FOCAL_PX), found, atol=1e-6)  # the unit does not matter


def ball(height, width, focal_px, radius):
    """1 / depth and normals of a ball a little right of the middle and above it; zeros around."""
    directions = rays(height, width, focal_px)
    centre = torch.tensor([0.03, -0.05, 0.6], dtype=torch.float64)
    squared, along = directions.square().sum(0), (directions * centre[:, None, None]).sum(0)
    inside = along**2 - squared * (centre @ centre - radius**2)
    depth = (along - inside.clamp(min=0).sqrt()) / squared
    normals = (directions * depth - centre[:, None, None]) / radius
    return torch.where(inside > 0, 1 / depth, 0.0), normals * (inside > 0)


def test_a_ball_has_the_normals_of_a_ball():
    inverse, normals = ball(120, 160, FOCAL_PX, 0.25)
    found = normals_from_depth(inverse, FOCAL_PX)
    known = found.norm(dim=0) > 0
    assert known[inverse > 0].float().mean() > 0.85  # all but the rim
    assert not known[inverse == 0].any()
    errors = angles(found.double(), torch.where(known, normals, 0.0))
    assert errors.mean() < 0.5
    assert errors.max() < 5  # where it turns away
    row, column = ((inverse > 0).nonzero().double().mean(0)).round().long().tolist()
    left, above = found[:, row, column - 25], found[:, row - 20, column]
    assert left[0] < -0.2  # its left side looks left, its upper side up, all of it to the camera
    assert above[1] < -0.2
    assert (found[2][known] < 0).all()


@pytest.mark.slow
def test_what_files_round_is_averaged_away():
    """As NAVI's files: whole numbers, 655 per metre of 1 / depth; a difference of neighbouring pixels sees little."""
    inverse, normals = ball(1000, 1240, 1000.0, 0.2)
    rounded = (655.35 * inverse).round()
    found = normals_from_depth(rounded, 1000.0)
    assert found.shape == (3, 500, 620)
    truth = torch.nn.functional.avg_pool2d(normals[None], 2)[0]
    errors = angles(found.double(), torch.where(found.norm(dim=0) > 0, truth, 0.0))
    assert errors.mean() < 1.5
    points = rays(1000, 1240, 1000.0) / rounded.clamp(min=1)
    across, down = (points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1])
    crossed = torch.linalg.cross(down, across, dim=0)
    inner = torch.where(normals_from_depth(rounded[2:-2, 2:-2], 1000.0).norm(dim=0) > 0, 1.0, 0.0)
    inner = torch.nn.functional.interpolate(inner[None, None], (998, 1238), mode="nearest")[0]
    assert angles(crossed, normals[:, 1:-1, 1:-1] * inner.double()).mean() > 3 * errors.mean()


def test_pixels_that_are_left_over_move_nothing():
    """1003 x 1001 px make 500 x 501 cells of two; the plane is still the plane."""
    normal = torch.tensor([0.3, -0.4, -0.866], dtype=torch.float64)
    normal = normal / normal.norm()
    found = normals_from_depth(inverse_of_plane(rays(1001, 1003, 900.0), normal, 2), 900.0)
    assert found.shape == (3, 500, 501)
    assert torch.allclose(found[:, 1:-1, 1:-1], normal.float()[:, None, None], atol=1e-5)


def test_gaps_and_steps_have_no_normal():
    inverse = torch.full((20, 30), 0.5)
    inverse[5, 6] = 0
    inverse[:, 20:] = 0.4  # from 2 m to 2.5 m
    known = normals_from_depth(inverse, FOCAL_PX).norm(dim=0) > 0
    expected = torch.zeros(20, 30, dtype=torch.bool)
    expected[1:-1, 1:-1] = True
    expected[4:7, 5:8] = False
    expected[:, 19:21] = False
    assert torch.equal(known, expected)
    assert normals_from_depth(torch.full((2, 2), 0.5), FOCAL_PX).tolist() == [[[0, 0], [0, 0]]] * 3


def photograph(path, size=(3, 1)):
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(colours).save(path)


def test_nyuv2(tmp_path):
    folder = tmp_path / "dsine_eval" / "nyuv2" / "test"
    photograph(folder / "000001_img.png")
    photograph(folder / "000000_img.png")
    for number in range(2):  # a wall that faces the camera, a floor, and a pixel without a normal
        colours = np.array([[[127, 127, 255], [127, 255, 127], [0, 0, 0]]], np.uint8)
        Image.fromarray(colours).save(folder / f"00000{number}_normal.png")
    for root in (tmp_path, tmp_path / "dsine_eval", tmp_path / "dsine_eval" / "nyuv2"):
        data = read_measured("normals", "nyuv2", root, "val")
        assert [sample.image.name for sample in data.samples] == ["000000_img.png", "000001_img.png"]
        expected = torch.tensor([[0, 0, -1.0], [0, -1, 0], [0, 0, 0]]).T[:, None]  # as in examples/render_scenes.py
        assert torch.allclose(data.target(1), expected, atol=0.01)
    with pytest.raises(BrixelError, match=r"with normals at .*train, which does not exist; source: dsine_eval\.zip"):
        read_measured("normals", "nyuv2", tmp_path, "train")
    (folder / "000001_normal.png").unlink()
    with pytest.raises(BrixelError, match=r"1 files of .* are missing, the first .*000001_normal\.png; source: ds"):
        read_measured("normals", "nyuv2", tmp_path, "test")
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(BrixelError, match=r"no NYU Depth v2 with normals \(.*test/\*_img\.png\) found; source: dsi"):
        read_measured("normals", "nyuv2", tmp_path, "test")


def annotation(name, focal_px, image_hw):
    return {"filename": name, "image_size": image_hw, "camera": {"focal_length": focal_px, "camera_model": "any"}}


@pytest.fixture
def ball_in_navi(tmp_path):
    """One object as NAVI has it: images of 320 x 240 px, depth maps of 160 x 120, each of a ball."""
    inverse, normals = ball(120, 160, FOCAL_PX, 0.25)
    numbers = (655.35 * inverse).round().numpy().astype(np.uint16)
    for scene in ("multiview-00-pixel_5", "wild_set"):
        folder = tmp_path / "duck" / scene
        (folder / "depth").mkdir(parents=True)
        for name in ("000", "001"):
            photograph(folder / "images" / f"{name}.jpg", (320, 240))
            Image.fromarray(numbers).save(folder / "depth" / f"{name}.png")
        listed = [annotation(f"{name}.jpg", 2 * FOCAL_PX, [240, 320]) for name in ("000", "001", "002")]
        (folder / "annotations.json").write_text(json.dumps(listed))
    return tmp_path, normals


def test_navi(ball_in_navi):
    """The focal length is in pixels of the image; the map has half as many."""
    root, normals = ball_in_navi
    data = read_measured("normals", "navi", root, "train")
    found = data.target(1).double()
    known = found.norm(dim=0) > 0
    assert len(data.samples) == 2
    assert known[normals.norm(dim=0) > 0].float().mean() > 0.8
    errors = angles(found, torch.where(known, normals, 0.0))
    assert errors.mean() < 2  # the file rounds 1 / depth


def test_folders_of_navi_that_are_not_as_expected(ball_in_navi):
    root, _ = ball_in_navi
    listed = root / "duck" / "wild_set" / "annotations.json"
    listed.write_text(json.dumps([annotation("000.jpg", 90.0, [240, 320])]))
    with pytest.raises(BrixelError, match=r"annotations\.json lacks the focal length of 001; source: navi_v1"):
        read_measured("normals", "navi", root, "val")
    for wrong in ("{", "[1]", '[{"filename": "000.jpg", "image_size": [3]}]', '[{"filename": "000.jpg"}]'):
        listed.write_text(wrong)
        with pytest.raises(BrixelError, match=r"annotations\.json cannot be used .*; expected a list with filename"):
            read_measured("normals", "navi", root, "val")
    listed.unlink()
    with pytest.raises(BrixelError, match=r"the cameras of a scene of NAVI at .*annotations\.json, which does not"):
        read_measured("normals", "navi", root, "val")
    assert len(read_measured("depth", "navi", root, "val").samples) == 2  # depth needs no camera


def test_the_command_takes_them(ball_in_navi, backbone_folder, tmp_path):
    root, _ = ball_in_navi
    common = ["--backbone", str(backbone_folder), "--device", "cpu", "--teacher-px", "56", "--steps", "2"]
    report = tmp_path / "report.md"
    command = ["evaluate", "normals", "--layout", "navi", "--data", str(root), "--sources", "bilinear", *common]
    assert main([*command, "-o", str(report)]) == 0
    rows = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    assert 0 < rows[0]["mean_deg"] < 90
    assert "NAVI: 2 images to fit, 2 to report" in report.read_text(encoding="utf-8")
