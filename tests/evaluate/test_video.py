"""J and F of DAVIS against naive twins, and the evaluation on a drawn data set."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation
from videos import write_davis

from brixel import BrixelError
from brixel.cli.app import main
from brixel.evaluate import FeatureSource, read_davis, video
from brixel.evaluate.metrics import boundary_f, region_j
from brixel.evaluate.suite_file import read_suite


def blobs(seed, height=37, width=61):
    noise = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    found = np.zeros((height, width), bool)
    for _ in range(3):
        row, column, radius = noise.uniform(0, height), noise.uniform(0, width), noise.uniform(3, 12)
        found |= (y - row) ** 2 + (x - column) ** 2 < radius**2
    return found


def naive_outline(mask):
    """Pixel by pixel: those that differ from the neighbour to the right, below or diagonally below; no wrap-around."""
    height, width = mask.shape
    found = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            below, right = min(y + 1, height - 1), min(x + 1, width - 1)
            found[y, x] = len({mask[y, x], mask[below, x], mask[y, right], mask[below, right]}) > 1
    return found


def naive_f(ours, theirs, radius):
    """By the definition: a pixel is right where one of the other outline lies within the radius."""
    a, b = (np.argwhere(naive_outline(mask)).astype(np.float64) for mask in (ours, theirs))
    distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    precision, recall = (distances.min(1) <= radius).mean(), (distances.min(0) <= radius).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("within", [0.008, 0.03])
def test_f_is_that_of_the_definition(seed, within):
    ours, theirs = blobs(seed), blobs(seed + 100)
    radius = math.ceil(within * math.hypot(37, 61))
    found = boundary_f(torch.from_numpy(ours), torch.from_numpy(theirs), within)
    assert found == pytest.approx(naive_f(ours, theirs, radius), abs=1e-12)
    assert boundary_f(torch.from_numpy(theirs), torch.from_numpy(ours), within) == pytest.approx(found, abs=1e-12)


def test_the_tolerance_is_a_disk():
    from brixel.evaluate.metrics import _dilated

    outline = np.random.default_rng(0).random((40, 50)) > 0.98
    offsets = np.arange(-4, 5)
    disk = offsets[:, None] ** 2 + offsets**2 <= 16
    assert (_dilated(torch.from_numpy(outline), 4).numpy() == binary_dilation(outline, disk)).all()


def test_measures_of_empty_and_equal_masks():
    empty, full, some = torch.zeros(20, 30).bool(), torch.ones(20, 30).bool(), torch.from_numpy(blobs(0, 20, 30))
    assert (region_j(empty, empty), boundary_f(empty, empty)) == (1, 1)
    assert (region_j(some, some), boundary_f(some, some)) == (1, 1)
    assert (region_j(empty, some), boundary_f(empty, some)) == (0, 0)
    assert (region_j(some, empty), boundary_f(some, empty)) == (0, 0)
    assert boundary_f(full, full) == 1  # no outline at the frame
    assert region_j(full, some) == pytest.approx(float(some.float().mean()))
    with pytest.raises(BrixelError, match="the prediction has shape"):
        region_j(empty, some[:5])


def colours(pixels):
    """Features of a perfect source: the colours, on cells of 2 px."""
    return torch.nn.functional.avg_pool2d(pixels, 2) * 5


def constant(pixels):
    return torch.ones(len(pixels), 4, pixels.shape[2] // 2, pixels.shape[3] // 2)


@pytest.fixture
def data(tmp_path):
    return write_davis(tmp_path / "data")


def test_a_source_that_tells_objects_apart_beats_one_that_does_not(data):
    sources = [FeatureSource("bilinear", constant, 4, scale=4), FeatureSource("colours", colours, 4, scale=4)]
    report = video(sources, read_davis(data), [48], model="none")
    rows = {row["source"]: row for row in report.rows}
    assert rows["colours"]["jf"] > 0.85 > rows["bilinear"]["jf"]
    assert rows["colours"]["j_recall"] == rows["colours"]["f_recall"] == 1
    assert rows["colours"]["jf_gain"][0] > 0
    assert rows["colours"]["image_px"] == 48
    by_object = report.details["48"]["colours"]
    assert [(each["video"], each["object"]) for each in by_object] == [("boat", 1), ("boat", 3), ("cat", 1), ("cat", 3)]
    means = [(each["j"] + each["f"]) / 2 for each in by_object]
    assert rows["colours"]["jf"] == pytest.approx(sum(means) / 4)
    assert "2 videos, 8 frames, 4 objects; 7 last frames and the first" in report.recipe


def test_the_first_and_the_last_frame_are_not_counted(data):
    """The truth of the last frame is that of the first, and of the first it is given: neither matters."""
    sources = [FeatureSource("colours", colours, 4, scale=4)]
    before = video(sources, read_davis(data), [48], model="none").rows[0]["jf"]
    for name in ("boat", "cat"):
        folder = data / "Annotations" / "480p" / name
        (folder / "00003.png").write_bytes((folder / "00000.png").read_bytes())
    assert video(sources, read_davis(data), [48], model="none").rows[0]["jf"] == before


@pytest.mark.slow
def test_the_command_and_a_suite(data, backbone_folder, tmp_path, capsys):
    out = tmp_path / "video.md"
    arguments = ["evaluate", "video", "--data", str(data), "--backbone", str(backbone_folder), "--device", "cpu"]
    assert main([*arguments, "--teacher-px", "112", "--sources", "bilinear", "universal", "-o", str(out)]) == 0
    content = json.loads(out.with_suffix(".json").read_text())
    assert [row["source"] for row in content["rows"]] == ["bilinear", "universal"]
    assert all(0 <= row["jf"] <= 1 for row in content["rows"])
    assert main([*arguments, "--teacher-px", "113"]) == 2
    assert "teacher_px is 113" in capsys.readouterr().err.replace("--teacher-px is", "teacher_px is")
    suite = tmp_path / "suite.toml"
    suite.write_text(
        f'[models.tiny]\nbackbone = "{backbone_folder}"\n[[run]]\ntask = "video"\ndata = "{data}"\nteacher_px = [112]\n'
        'limit = 1\nsources = ["bilinear"]\n'
    )
    [part] = read_suite(suite)
    part.task.check()
    assert main(["evaluate", "suite", str(suite), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert (tmp_path / "out" / "video.png").exists()
    suite.write_text(suite.read_text() + 'train = "train"\n')
    with pytest.raises(BrixelError, match="unknown key 'train'"):
        read_suite(suite)
