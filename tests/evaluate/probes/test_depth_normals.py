"""Depth and normals: readers of tiny samples, planted solutions, and the scenes of the example."""

import importlib.util
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from PIL import Image

from brixel import BrixelError
from brixel.evaluate.datasets.depth_normals import read_measured
from brixel.evaluate.feature_sources import FeatureSource
from brixel.evaluate.probes.depth_normals import depth_normals, probe_depth_normals
from brixel.evaluate.probes.training import ProbeSettings

EXAMPLES = ROOT / "examples"


def grey16(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(numbers, dtype=np.uint16)).save(path)


def photograph(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 1), "red").save(path)


def test_plain_depth_in_millimetres_and_in_metres(tmp_path):
    for name in ("a", "b"):
        photograph(tmp_path / "val" / "images" / f"{name}.png")
    grey16(tmp_path / "val" / "depth" / "a.png", [[0, 1500, 65535]])
    np.save(tmp_path / "val" / "depth" / "b.npy", np.array([[np.nan, 1.5, -1]]))
    data = read_measured("depth", "plain", tmp_path, "val")
    assert data.target(0).flatten().tolist() == pytest.approx([0, 1.5, 65.535])
    assert data.target(1).tolist() == [[[0, 1.5, 0]]]
    np.save(tmp_path / "val" / "depth" / "b.npy", np.array([1, 2]))
    with pytest.raises(BrixelError, match=r"b\.npy contains int64 \(2,\); expected floats \(H, W\)"):
        data.target(1)
    (tmp_path / "val" / "depth" / "b.npy").write_bytes(b"no array")
    with pytest.raises(BrixelError, match=r"b\.npy is damaged .*; write it again"):
        data.target(1)
    Image.new("L", (3, 1), 7).save(tmp_path / "val" / "depth" / "a.png")
    with pytest.raises(BrixelError, match=r"a\.png has mode L, 8 bits; expected 16 bits"):
        data.target(0)
    Image.new("RGB", (60, 20)).save(tmp_path / "val" / "images" / "a.png")
    grey16(tmp_path / "val" / "depth" / "a.png", np.ones((60, 60)))
    with pytest.raises(BrixelError, match=r"a\.png has 20 x 60 px upright, .*a\.png has 60 x 60"):
        data.target(0)


def test_plain_normals(tmp_path):
    for name in ("a", "b"):
        photograph(tmp_path / "images" / f"{name}.png")
    (tmp_path / "normals").mkdir()
    np.save(tmp_path / "normals" / "a.npy", np.array([[[0, 0, -2.0], [0, 0, 0], [0.6, 0, 0.8]]]))
    colours = [[[127, 128, 0], [255, 127, 128], [127, 128, 127], [0, 0, 0]]]
    Image.fromarray(np.array(colours, np.uint8)).save(tmp_path / "normals" / "b.png")
    data = read_measured("normals", "plain", tmp_path, "")
    expected = torch.tensor([[0, 0, -1.0], [0, 0, 0], [0.6, 0, 0.8]]).T[:, None]
    assert torch.allclose(data.target(0), expected)
    expected = torch.tensor([[0, 0, -1.0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]).T[:, None]  # black is none
    assert torch.allclose(data.target(1), expected, atol=0.01)


def test_nyuv2(tmp_path):
    scene = tmp_path / "official_splits" / "test" / "bathroom"
    photograph(scene / "rgb_00045.jpg")
    grey16(scene / "sync_depth_00045.png", [[0, 2000, 9999]])
    data = read_measured("depth", "nyuv2", tmp_path, "val")
    assert data.target(0).flatten().tolist() == pytest.approx([0, 2, 9.999])
    with pytest.raises(BrixelError, match="train, which does not exist; source: nyu_depth_v2_labeled"):
        read_measured("depth", "nyuv2", tmp_path, "train")


@pytest.mark.parametrize("scene", ["multiview_00_pixel_4a", "multiview-00-pixel_5"])
def test_scenes_of_navi_are_found_as_its_versions_name_them(tmp_path, scene):
    photograph(tmp_path / "duck" / scene / "images" / "000.jpg")
    photograph(tmp_path / "duck" / "video-00-pixel_5" / "images" / "000.jpg")
    grey16(tmp_path / "duck" / scene / "depth" / "000.png", [[0, 6553, 1310]])
    assert [each.target.parts[-3] for each in read_measured("depth", "navi", tmp_path, "train").samples] == [scene]


def test_navi(tmp_path):
    scene = tmp_path / "duck" / "wild_set"
    photograph(scene / "images" / "000.jpg")
    photograph(scene / "images" / "downsampled_000.jpg")
    grey16(scene / "depth" / "000.png", [[0, 6553, 1310]])
    data = read_measured("depth", "navi", tmp_path, "val")
    assert len(data.samples) == 1
    assert data.target(0).flatten().tolist() == pytest.approx([0, 0.1, 0.5], rel=1e-3)
    with pytest.raises(BrixelError, match=r"no NAVI \(.*multiview.*found; source: navi_v1"):
        read_measured("depth", "navi", tmp_path, "train")
    with pytest.raises(BrixelError, match="NAVI has no split .test."):
        read_measured("depth", "navi", tmp_path, "test")
    with pytest.raises(BrixelError, match="unknown layout for normals: .nyuv.; did you mean 'nyuv2'"):
        read_measured("normals", "nyuv", tmp_path, "val")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Images whose colours are the depth (red) and the normal (green and blue), smooth."""
    root = tmp_path_factory.mktemp("told")
    y, x = np.mgrid[:64, :64] / 64
    for split, count in (("train", 6), ("val", 2)):
        for kind in ("images", "depth", "normals"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            red, green, blue = ((1 + np.sin(3 * x + k * y + index + k)) / 2 for k in range(3))
            Image.fromarray((255 * np.stack([red, green, blue], -1)).astype(np.uint8)).save(
                root / split / "images" / f"{index}.png"
            )
            depth = np.exp(red)
            depth[:16] = 0  # not measured
            np.save(root / split / "depth" / f"{index}.npy", depth)
            np.save(root / split / "normals" / f"{index}.npy", np.stack([green - 0.5, blue - 0.5, red * 0 - 1], -1))
    return root


QUICK = ProbeSettings(steps=80, batch_size=3, learning_rates=(1e-5, 0.01))
FEW_STEPS = replace(QUICK, steps=3)
COLOURS = FeatureSource("teacher", lambda pixels: F.avg_pool2d(pixels, 8), 8, scale=4)
NOTHING = FeatureSource("bilinear", lambda pixels: torch.ones(len(pixels), 3, 2, 2), 8, resize="bilinear")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "figure", "limit"), [("depth", "abs_rel", 0.05), ("normals", "mean_deg", 4)])
def test_features_that_tell_it_all_reach_it(told, kind, figure, limit):
    train, val = (read_measured(kind, "plain", told, split) for split in ("train", "val"))
    probe, found = probe_depth_normals(kind, COLOURS, train, val, 64, settings=QUICK)
    assert probe.learning_rate == 0.01
    assert max(each[figure] for each in found) < limit


@pytest.mark.slow
def test_the_report_compares_with_bilinear(told):
    train, val = (read_measured("depth", "plain", told, split) for split in ("train", "val"))
    report = depth_normals("depth", [NOTHING, COLOURS], train, val, [64], model="any", settings=QUICK)
    nothing, all_of_it = report.rows
    assert all_of_it["rmse"] < 0.3 * nothing["rmse"]
    assert all_of_it["change"][1] < 0
    assert f"| any | 16 | bilinear | {nothing['rmse']:.4f} |" in report.markdown("command")
    assert "6 images to fit, 2 to report" in report.recipe


def without_values(told, tmp_path, kind, images):
    """The told splits, with values outside the centre square alone for some of their images."""
    shutil.copytree(told, tmp_path / "told")
    wide = np.zeros((64, 68) if kind == "depth" else (64, 68, 3))
    wide[:, 0] = 1
    for split, name in images:
        folder = tmp_path / "told" / split
        np.save(folder / kind / f"{name}.npy", wide)
        Image.new("RGB", (68, 64)).save(folder / "images" / f"{name}.png")
    return [read_measured(kind, "plain", tmp_path / "told", split) for split in ("train", "val")]


@pytest.mark.parametrize("kind", ["depth", "normals"])
def test_images_without_a_value_are_left_out_and_told_of_once(told, tmp_path, kind, caplog):
    train, val = without_values(told, tmp_path, kind, [("train", 2), ("val", 0)])
    report = depth_normals(kind, [NOTHING, COLOURS], train, val, [64], model="any", settings=FEW_STEPS)
    assert "5 images to fit, 1 to report, centre squares; 2 of 8 images without a value left out; " in report.recipe
    (record,) = caplog.records
    assert record.getMessage().endswith(f"2 of 8 images without a value left out, the first {train.samples[2].target}")
    less = replace(train, samples=[*train.samples[:2], *train.samples[3:]]), replace(val, samples=val.samples[1:])
    again = depth_normals(kind, [NOTHING, COLOURS], *less, [64], model="any", settings=FEW_STEPS)
    assert again.rows == report.rows
    assert "left out" not in again.recipe


def test_splits_without_any_value_are_refused(told, tmp_path):
    train, val = without_values(told, tmp_path, "depth", [("val", 0), ("val", 1)])
    message = r"^none of 2 images of told has depth in its centre square, the first .*val/depth/0\.npy"
    with pytest.raises(BrixelError, match=message):
        depth_normals("depth", [COLOURS], train, val, [64], model="any", settings=QUICK)
    sparse = replace(train, read=lambda path: F.one_hot(torch.tensor([1] * 64), 64)[None].float())  # between centres
    with pytest.raises(BrixelError, match="no image of told has depth at the centre of any of its 8 x 8 cells"):
        probe_depth_normals("depth", COLOURS, sparse, val, 64, settings=QUICK)


@pytest.fixture
def scenes():
    spec = importlib.util.spec_from_file_location("render_scenes", EXAMPLES / "render_scenes.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_rendered_depth_and_normals_fit_together(scenes, tmp_path):
    """Away from outlines, neighbouring points lie in the plane that the normal says."""
    photograph(tmp_path / "photos" / "red.png")
    scenes.main([str(tmp_path / "photos"), str(tmp_path / "out"), "--count", "1", "--seed", "3"])
    depth = read_measured("depth", "plain", tmp_path / "out", "").target(0)[0].numpy()
    normals = read_measured("normals", "plain", tmp_path / "out", "").target(0).numpy().transpose(1, 2, 0)
    points = scenes.rays() * depth[..., None]
    measured = depth > 0
    assert measured.mean() > 0.9
    facing = (normals * scenes.rays()).sum(-1)
    assert (facing[measured] <= 0.02).all()
    for step in (points[:, 1:] - points[:, :-1], (points[1:] - points[:-1])[:, :-1]):
        here = normals[: step.shape[0], : step.shape[1]]
        off = np.abs((step * here).sum(-1)) / np.linalg.norm(step, axis=-1).clip(1e-9)
        assert np.median(off) < 1e-2
        assert (off < 0.05).mean() > 0.9


def test_a_ball_lies_where_it_should(scenes):
    depth, normals, _, _ = scenes.ball(scenes.rays(), np.array([0, 0, 3.0]), 1.0)
    middle = scenes.SIDE_PX // 2
    assert depth[middle, middle] == pytest.approx(2, abs=1e-4)
    assert normals[middle, middle] == pytest.approx([0, 0, -1], abs=1e-2)
    assert np.isinf(depth[0, 0])
