"""Nearness to the teacher, against the same figures made step by step with Pillow and torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from brixel import BrixelError, BrixelFeatures
from brixel.cli import main
from brixel.errors import ImageError
from brixel.evaluate.fidelity import fidelity, report


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
    """Two pictures of 112 x 112 px: crops of that size are the pictures themselves."""
    folder, numbers = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    paths = [folder / f"{index}.png" for index in range(2)]
    for path in paths:
        small = Image.fromarray(numbers.integers(0, 256, (14, 14, 3), dtype=np.uint8))
        small.resize((112, 112), Image.Resampling.BICUBIC).save(path)
    return paths


def twin(model, path):
    """Student, bilinear and bicubic of one picture: L1 and cosine, each cell by itself."""
    pixels = torch.from_numpy(np.asarray(Image.open(path)).astype(np.float32) / 255).permute(2, 0, 1)[None]
    small = F.interpolate(pixels, (28, 28), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels, small = (pixels - mean) / std, (small - mean) / std
    with torch.no_grad():
        teacher, low = model.backbone_features(pixels), model.backbone_features(small)
        maps = {mode: F.interpolate(low, (8, 8), mode=mode) for mode in ("bilinear", "bicubic")}
        maps["student"] = model(small)
    figures = {}
    for name, each in maps.items():
        cells, theirs = (x[0].double().flatten(1).T.numpy() for x in (each, teacher))
        cosine = (cells * theirs).sum(1) / np.linalg.norm(cells, axis=1) / np.linalg.norm(theirs, axis=1)
        figures[name] = {"l1": np.abs(cells - theirs).mean(), "cosine": cosine.mean()}
    return figures


def test_figures_are_means_over_pictures_of_means_over_cells(model, squares):
    found = fidelity(model, squares, [112]).figures[112]
    both = [twin(model, path) for path in squares]
    assert list(found) == ["bilinear", "bicubic", "student"]
    for name, figure in found.items():
        for kind, value in figure.items():
            assert value == pytest.approx(np.mean([each[name][kind] for each in both]), abs=1e-5)


def test_the_model_is_left_in_the_mode_it_was_in(model, squares):
    model.train()
    fidelity(model, squares[:1], [112])
    assert model.adapter.training
    model.eval()


def test_a_fresh_student_is_bilinear(backbone_folder, squares):
    figures = fidelity(BrixelFeatures.from_backbone(backbone_folder, device="cpu"), squares, [56, 112]).figures
    assert list(figures) == [56, 112]
    for methods in figures.values():
        assert methods["student"] == pytest.approx(methods["bilinear"], abs=1e-6)


def test_what_cannot_be_compared_is_refused(model, squares, tmp_path):
    with pytest.raises(BrixelError, match="no pictures"):
        fidelity(model, [], [112])
    with pytest.raises(BrixelError, match="teacher_px is 100; expected a multiple of 56"):
        fidelity(model, squares, [112, 100])
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"bad\.png"):
        fidelity(model, [*squares, tmp_path / "bad.png"], [112])


def test_the_report_tells_how_much_of_the_error_is_gone(model, squares):
    result = fidelity(model, squares, [112])
    text = report(result, "brixel evaluate fidelity")
    plain, ours = (result.figures[112][name]["cosine"] for name in ("bilinear", "student"))
    assert f"| 28 px | 112 px | bilinear | {result.figures[112]['bilinear']['l1']:.4f} | {plain:.4f} | 0.0% |" in text
    assert f"| {ours:.4f} | {1 - (1 - ours) / (1 - plain):.1%} |" in text
    assert "2 pictures, centre crops" in text
    assert "    brixel evaluate fidelity" in text


def test_the_command_writes_its_report(backbone_folder, squares, tmp_path, capsys):
    output = tmp_path / "report.md"
    arguments = ["--backbone", str(backbone_folder), "--images", str(squares[0].parent), "--teacher-px", "56", "112"]
    assert main(["evaluate", "fidelity", *arguments, "--device", "cpu", "-o", str(output)]) == 0
    assert output.read_text(encoding="utf-8") == capsys.readouterr().out
    assert "| 14 px | 56 px | student |" in output.read_text(encoding="utf-8")
    assert main(["evaluate", "fidelity", *arguments, "-o", str(tmp_path / "no" / "report.md")]) == 2
