"""Nearness to the teacher, against the same figures made step by step with Pillow and torch."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from brixel import BrixelError, BrixelFeatures
from brixel.cli.app import main
from brixel.errors import ImageError
from brixel.evaluate.feature_sources import FeatureSource, sources_of
from brixel.evaluate.fidelity import compare, fidelity, teacher_edges
from brixel.evaluate.report import Report
from brixel.model.losses import edge_loss, principal_directions, spectral_loss


@pytest.fixture(scope="module")
def model(backbone_folder):
    """A student whose adapter and head say something."""
    torch.manual_seed(0)
    model = BrixelFeatures.from_backbone(backbone_folder, device="cpu")
    with torch.no_grad():
        for parameter in (*model.adapter.parameters(), *model.head.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Two images of 112 x 112 px: crops of that size are the images themselves."""
    folder, numbers = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    paths = [folder / f"{index}.png" for index in range(2)]
    for path in paths:
        small = Image.fromarray(numbers.integers(0, 256, (14, 14, 3), dtype=np.uint8))
        small.resize((112, 112), Image.Resampling.BICUBIC).save(path)
    return paths


def twin(model, path):
    """Student, bilinear and bicubic of one image: L1 and cosine, each cell by itself."""
    pixels = torch.from_numpy(np.asarray(Image.open(path)).astype(np.float32) / 255).permute(2, 0, 1)[None]
    small = F.interpolate(pixels, (28, 28), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels, small = (pixels - mean) / std, (small - mean) / std
    with torch.no_grad():
        teacher, low = model.backbone_features(pixels), model.backbone_features(small)
        maps = {mode: F.interpolate(low, (8, 8), mode=mode) for mode in ("nearest", "bilinear", "bicubic")}
        maps["student"] = model(small)
    figures = {}
    for name, each in maps.items():
        cells, theirs = (x[0].double().flatten(1).T.numpy() for x in (each, teacher))
        cosine = (cells * theirs).sum(1) / np.linalg.norm(cells, axis=1) / np.linalg.norm(theirs, axis=1)
        edges = set(strongest(teacher[0].double()))
        inner = [cell for place, cell in enumerate(cosine) if divmod(place, 8) in edges]
        directions = principal_directions(teacher)
        figures[name] = {
            "l1": np.abs(cells - theirs).mean(),
            "cosine": cosine.mean(),
            "cosine_edges": np.mean(inner),
            "edge": float(edge_loss(each, teacher, directions=directions)),
            "spectral": float(spectral_loss(each, teacher)),
        }
    return figures


def strongest(teacher):
    """Places of the four of 36 inner cells where the eight directions change most, one by one."""
    directions = principal_directions(teacher.float()[None]).double()
    planes = torch.einsum("nd,dyx->nyx", directions, teacher)
    found = {}
    for y in range(1, 7):
        for x in range(1, 7):
            patch = planes[:, y - 1 : y + 2, x - 1 : x + 2]
            weights = torch.tensor([1.0, 2.0, 1.0]).double()
            across = (patch[:, :, 2] - patch[:, :, 0]) @ weights
            down = (patch[:, 2] - patch[:, 0]) @ weights
            found[y, x] = float((across**2 + down**2).sum())
    return sorted(found, key=lambda place: -found[place])[:4]


def by_name(report, side):
    return {row["source"]: row for row in report.rows if row["teacher_px"] == side}


def test_figures_are_means_over_images_of_means_over_cells(model, squares):
    report = fidelity(model, squares, [112])
    both = [twin(model, path) for path in squares]
    rows = by_name(report, 112)
    assert list(rows) == ["nearest", "bilinear", "bicubic", "student"]
    for name, row in rows.items():
        for kind, first in both[0][name].items():
            pair = [first, both[1][name][kind]]
            assert row[kind] == pytest.approx(np.mean(pair), rel=1e-4, abs=1e-5)
            assert report.details["112"][name][kind] == pytest.approx(pair, rel=1e-4, abs=1e-5)
            low, high = row[f"{kind}_interval"]  # of two images: the one, the other, or half of both
            assert (low, high) == pytest.approx((min(pair), max(pair)), rel=1e-4, abs=1e-5)


def test_edges_are_the_tenth_of_cells_where_the_teacher_changes():
    teacher = torch.zeros(1, 2, 22, 22)
    teacher[:, 0, :, 10:] = 1
    edges = teacher_edges(teacher, torch.eye(2))
    assert edges.sum() == 40
    assert edges[:, 8:10].all()  # inner columns 8 and 9 are columns 9 and 10 of the map


def test_the_backbone_runs_once_for_all_interpolations(model, squares):
    called = []
    one = sources_of(model, ["bilinear"])[0]

    def counted(pixels):
        called.append(tuple(pixels.shape))
        return one.maps(pixels)

    sources = [
        FeatureSource(name, counted, 14, resize=name, identity="same") for name in ("nearest", "bilinear", "bicubic")
    ]
    compare(sources, sources_of(model, ["teacher"])[0], squares, [112], model="any")
    assert called == [(1, 3, 28, 28)] * 2


def test_maps_of_another_grid_are_refused(model, squares):
    source = FeatureSource("small", model.backbone_features, 14)
    with pytest.raises(BrixelError, match=r"'small' gave \(1, 64, 2, 2\), the teacher \(1, 64, 8, 8\)"):
        compare([source], sources_of(model, ["teacher"])[0], squares, [112], model="any")


def test_the_model_is_left_in_the_mode_it_was_in(model, squares):
    model.train()
    fidelity(model, squares[:1], [112])
    assert model.adapter.training
    model.eval()


def test_a_fresh_student_is_bilinear(backbone_folder, squares):
    report = fidelity(BrixelFeatures.from_backbone(backbone_folder, device="cpu"), squares, [56, 112])
    for side in (56, 112):
        rows = by_name(report, side)
        for kind in ("l1", "cosine", "edge", "spectral"):
            assert rows["student"][kind] == pytest.approx(rows["bilinear"][kind], rel=1e-4, abs=1e-6)


def test_what_cannot_be_compared_is_refused(model, squares, tmp_path):
    with pytest.raises(BrixelError, match="no images"):
        fidelity(model, [], [112])
    with pytest.raises(BrixelError, match="teacher_px is 100; expected a multiple of 56"):
        fidelity(model, squares, [112, 100])
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad\.png"):
        fidelity(model, [*squares, tmp_path / "bad.png"], [112])


def test_the_report_tells_how_much_of_the_error_is_gone(model, squares):
    report = fidelity(model, squares, [112])
    text, rows = report.markdown("brixel evaluate fidelity"), by_name(report, 112)
    plain, ours = rows["bilinear"], rows["student"]
    removed = 1 - (1 - ours["cosine"]) / (1 - plain["cosine"])
    assert ours["removed"] == pytest.approx(removed)
    assert f"| 28 | 112 | bilinear | {plain['l1']:.4f} | {plain['cosine']:.4f} | - | - |" in text
    assert f"| {ours['cosine']:.4f} | {removed:.1%} | {ours['removed_interval'][0]:.1%} to" in text
    assert "2 images, centre crops" in text
    assert "    brixel evaluate fidelity" in text


def test_the_command_writes_its_report(backbone_folder, squares, tmp_path, capsys):
    output = tmp_path / "report.md"
    arguments = ["--backbone", str(backbone_folder), "--images", str(squares[0].parent), "--teacher-px", "56", "112"]
    assert main(["evaluate", "fidelity", *arguments, "--device", "cpu", "-o", str(output)]) == 0
    assert output.read_text(encoding="utf-8") == capsys.readouterr().out
    content = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert "| 14 | 56 | student |" in output.read_text(encoding="utf-8")
    assert Report.from_content(content).markdown(content["command"]) + "\n" == output.read_text(encoding="utf-8")
    assert main(["evaluate", "fidelity", *arguments, "-o", str(tmp_path / "no" / "report.md")]) == 2
