"""The linear probe: planted solutions, which it must find, and a protocol that is the same for all."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from brixel import BrixelError
from brixel.cli.app import main
from brixel.evaluate import feature_cache
from brixel.evaluate.datasets.labelled import read_labelled
from brixel.evaluate.feature_cache import Features
from brixel.evaluate.feature_sources import FeatureSource
from brixel.evaluate.probes.segmentation import segment, segmentation
from brixel.evaluate.probes.training import (
    Cells,
    Maps,
    ProbeSettings,
    convolutional_readout,
    fit_readouts,
    train_probe,
)
from brixel.probe.cells import cell_shares
from brixel.probe.readouts import linear_readout

COLOURS = np.array([[10, 10, 10], [250, 20, 20], [20, 250, 20]], dtype=np.uint8)
QUICK = ProbeSettings(steps=60, batch_size=256, learning_rates=(0.001, 0.1))


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Images of 64 px in three colours, each of a class, laid out in blocks of 8 px."""
    root = tmp_path_factory.mktemp("coloured")
    numbers = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            mask = numbers.integers(0, 3, (8, 8)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(COLOURS[mask]).save(root / split / "images" / f"{index}.png")
            mask[:8, :8] = 255
            Image.fromarray(mask).save(root / split / "masks" / f"{index}.png")
    (root / "classes.json").write_text(json.dumps(["dark", "red", "green"]))
    return root


@pytest.fixture(scope="module")
def splits(coloured):
    return read_labelled("plain", coloured, "train"), read_labelled("plain", coloured, "val")


def colours_of(pixels):
    return F.avg_pool2d(pixels, 8)


def constant(pixels):
    return torch.ones(len(pixels), 3, pixels.shape[2] // 8, pixels.shape[3] // 8)


def test_features_that_hold_the_classes_reach_all(splits):
    """Cells of two pixels: but for the bilinear upsampling of logits, at outlines, all is right."""
    fine = FeatureSource("teacher", lambda pixels: F.avg_pool2d(pixels, 2), 2, scale=4)
    found = segment(fine, *splits, 64, settings=QUICK, within_px=1)
    both, either = found.areas.sum(0)
    assert found.accuracy > 0.95
    assert (both / either).min() > 0.9
    assert found.learning_rate in QUICK.learning_rates
    assert found.areas.shape == found.strips.shape == (4, 2, 3)


def test_features_that_hold_nothing_reach_the_most_frequent_class(splits):
    found = segment(FeatureSource("nothing", constant, 8), *splits, 64, settings=QUICK)
    assert (found.areas.sum(0)[0] > 0).sum() == 1
    assert found.accuracy < 0.5


def test_runs_are_alike(splits):
    source = FeatureSource("teacher", colours_of, 8, scale=4)
    one, other = (segment(source, *splits, 64, settings=QUICK) for _ in range(2))
    assert torch.equal(one.strips, other.strips)
    assert one.scores == other.scores


@pytest.mark.slow
def test_the_report_tells_gains_and_the_gap(splits):
    sources = [
        FeatureSource("bilinear", colours_of, 8, resize="bilinear"),
        FeatureSource("student", colours_of, 8, scale=4),
        FeatureSource("teacher", colours_of, 8, scale=4),
    ]
    report = segmentation(sources, *splits, [64], model="any", settings=QUICK, within_px=2)
    bilinear, student, teacher = report.rows
    assert student["miou"] == teacher["miou"] > bilinear["miou"]
    assert student["miou_gap"] == student["boundary_gap"] == 1
    assert teacher["miou_gain"][0] > 0
    assert "miou_gap" not in bilinear
    assert student["iou_by_class"].keys() == {"dark", "red", "green"}
    text = report.markdown("brixel evaluate segmentation")
    assert f"| any | 16 | bilinear | {bilinear['miou']:.4f} |" in text
    assert "| 100% | 100% |" in text


@pytest.mark.slow
def test_no_gap_is_told_where_the_teacher_may_be_no_better(splits):
    sources = [FeatureSource(name, colours_of, 8, scale=4) for name in ("bilinear", "student", "teacher")]
    report = segmentation(sources, *splits, [64], model="any", settings=QUICK, within_px=2)
    assert all("miou_gap" not in row and "boundary_gap" not in row for row in report.rows)
    assert report.rows[1]["miou_gain"] == (0, 0)


def test_other_classes_are_refused(splits, coloured):
    train, val = splits
    with pytest.raises(BrixelError, match="3 classes to fit and 2 to report, or others; .* classes.json"):
        segment(FeatureSource("x", constant, 8), train, replace(val, classes=["a", "b"]), 64)


def test_shares_of_a_cell():
    labels = torch.tensor([[0, 0, 1, 1], [0, -1, 1, 1]]).repeat_interleave(2, 0).repeat_interleave(2, 1)  # 4 x 8
    shares = cell_shares(labels, 3, (1, 2))
    assert shares.tolist() == [[0.75, 0], [0, 1], [0, 0]]


def test_cells_for_which_memory_is_too_small_are_refused(monkeypatch):
    monkeypatch.setattr(feature_cache, "free_bytes", lambda device: 6 * 36 * 5 * 2)
    with pytest.raises(BrixelError, match=r"^cells of 6 images need 1 MiB of memory, .*take fewer images"):
        Cells(planted(), 36)
    assert Cells(planted(5), 36).inputs([4]).shape == (1, 5, 1, 1)


def test_without_a_cache_there_need_be_room_for_cells_alone(splits, monkeypatch):
    monkeypatch.setattr(feature_cache, "free_bytes", lambda device: 2 * 8 * 256 * 3 * 2)  # maps have 1024 cells
    fine = FeatureSource("teacher", lambda pixels: F.avg_pool2d(pixels, 2), 2, scale=4)
    assert segment(fine, *splits, 64, settings=QUICK).accuracy > 0.9


def test_figures_are_those_of_a_cache(splits, tmp_path):
    source = FeatureSource("teacher", colours_of, 8, scale=4, identity="colours")
    one, other = (segment(source, *splits, 64, settings=QUICK, cache=cache) for cache in (None, tmp_path))
    assert torch.equal(one.areas, other.areas)
    assert one.scores == other.scores


def planted(count=6, width=5):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(width, 6, 6, generator=generator) for _ in range(count)]
    return Features(FeatureSource("planted", constant, 8), maps)


def test_a_linear_probe_finds_a_planted_map():
    features, weights = planted(), torch.tensor([[2.0, -1, 0, 3, 1]])
    cells = Cells(features, 36)
    truth = torch.cat([(weights @ features[number].flatten(1))[0] + 4 for number in range(6)])

    def loss(outputs, items):
        return (outputs[0, 0, :, 0] - truth[items]).square().mean()

    settings = ProbeSettings(steps=200, batch_size=64, learning_rates=(1e-5, 0.2), weight_decay=0)

    def score(readout, images):
        items = [number * 36 + cell for number in images for cell in range(36)]
        return -float(loss(readout(cells.inputs(items)), items))

    probe = train_probe(lambda width: linear_readout(width, 1), cells, loss, score, settings)
    assert probe.learning_rate == 0.2
    assert probe.scores[1e-5] < probe.scores[0.2]
    found = probe.readout(features.batch([3]))[0, 0].flatten()
    assert torch.allclose(found, truth[3 * 36 : 4 * 36], atol=0.02)


def test_readouts_trained_side_by_side_do_not_meet():
    features = planted()

    def loss(outputs, items):
        return (outputs[:, 0] - features.batch(items)[:, 0]).square().mean()

    settings = ProbeSettings(steps=5, batch_size=4)
    args = (lambda width: convolutional_readout(width, 1, 8), Maps(features), range(6), loss)
    pair, alone = fit_readouts(*args, [0.01, 0.001], settings), fit_readouts(*args, [0.001], settings)
    for one, other in zip(pair[1].parameters(), alone[0].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in pair[0].parameters())


def test_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    fit_readouts(
        lambda width: nn.Conv2d(width, 1, 1), Maps(planted()), range(6), lambda out, _: out.mean(), [0.1], QUICK
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_settings_that_cannot_be_run_are_refused():
    with pytest.raises(BrixelError, match="steps is 0; expected a whole number from 1 up"):
        ProbeSettings(steps=0)
    with pytest.raises(BrixelError, match="1 training images"):
        train_probe(lambda width: linear_readout(width, 1), Maps(planted(1)), lambda a, b: a.mean(), None, QUICK)


@pytest.mark.slow
def test_the_command(coloured, backbone_folder, tmp_path, capsys):
    output = tmp_path / "report.md"
    arguments = ["--backbone", str(backbone_folder), "--device", "cpu", "--data", str(coloured), "--steps", "3"]
    command = ["evaluate", "segmentation", *arguments, "--teacher-px", "56", "--limit", "2", "-o", str(output)]
    assert main([*command, "--cache", str(tmp_path / "cache")]) == 0
    rows = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    assert [row["source"] for row in rows] == ["bilinear", "student", "teacher"]
    assert rows[0]["miou"] == pytest.approx(rows[1]["miou"], abs=0.01)  # a fresh student is bilinear
    assert "2 images to fit, 2 to report" in output.read_text(encoding="utf-8")
    assert main([*command[:-1], str(tmp_path / "report.txt")]) == 2
    assert "ends in .md" in capsys.readouterr().err
