"""Nearness to the teacher, against the same figures made step by step with Pillow and torch."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from brixel import BrixelError, BrixelFeatures
from brixel.cli.app import main
from brixel.errors import ImageError
from brixel.evaluate.bootstrap import DRAWS, by_metric
from brixel.evaluate.feature_sources import FeatureSource, sources_of
from brixel.evaluate.fidelity import (
    better_count,
    centred_metrics,
    compare,
    fidelity,
    l1_and_cosine,
    mean_feature,
    r2,
    teacher_edges,
)
from brixel.evaluate.report import Report
from brixel.model.losses import edge_loss, principal_directions, spectral_loss


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
    report = fidelity(
        BrixelFeatures.from_backbone(backbone_folder, adapter="bilinear", device="cpu"), squares, [56, 112]
    )
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
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    sources = next(line for line in lines if "bilinear" in line)
    cells = {line[0]: dict(zip(sources, line, strict=True)) for line in lines if len(line) == len(sources)}
    assert ", 28 px, teacher 112 px\n" in text
    assert cells["L1"]["bilinear"] == f"{plain['l1']:.4f}"
    assert cells["cosine"]["student"] == f"{ours['cosine']:.4f}"
    assert cells["of bilinear's 1 - cosine removed"]["bilinear"] == "-"
    assert cells["of bilinear's 1 - cosine removed"]["student"] == f"{removed:.1%}"
    assert f" {ours['removed_interval'][0]:.1%} to {ours['removed_interval'][1]:.1%} |" in text
    assert max(map(len, text.splitlines()[:20])) <= 120  # for a terminal
    assert "2 images, centre crops" in text
    assert "    brixel evaluate fidelity" in text


def test_the_command_writes_its_report(backbone_folder, squares, tmp_path, capsys):
    output = tmp_path / "report.md"
    arguments = ["--backbone", str(backbone_folder), "--images", str(squares[0].parent), "--teacher-px", "56", "112"]
    assert main(["evaluate", "fidelity", *arguments, "--device", "cpu", "-o", str(output)]) == 0
    assert output.read_text(encoding="utf-8") == capsys.readouterr().out
    content = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert ", 14 px, teacher 56 px\n" in output.read_text(encoding="utf-8")
    assert Report.from_content(content).markdown(content["command"]) + "\n" == output.read_text(encoding="utf-8")
    assert main(["evaluate", "fidelity", *arguments, "-o", str(tmp_path / "no" / "report.md")]) == 2


# ---------------------------------------------------------------- centred metrics


SIDES = {56: 4, 112: 8}  # pixels of the teacher's image: cells along a side of its map


def fixed_sources():
    """Two sources and a teacher whose maps depend on the image; all have a large common mean."""

    def maps_of(sign, noise, scale):
        def maps(pixels):
            side = pixels.shape[-1] // 14 * (4 // scale)
            numbers = np.random.default_rng(round(float(pixels.double().abs().sum() * 100)) % 2**31)
            own = torch.from_numpy(numbers.normal(size=(1, 10, side, side)))
            return (3 + sign * own + noise * torch.from_numpy(numbers.normal(size=own.shape))).float()

        return maps

    names = {"bilinear": (1, 0.9), "better": (1, 0.5)}
    sources = [FeatureSource(name, maps_of(*values, 1), 14) for name, values in names.items()]
    return sources, FeatureSource("teacher", maps_of(1, 0.0, 4), 14, scale=4)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five images of several shapes."""
    folder, numbers = tmp_path_factory.mktemp("photos"), np.random.default_rng(3)
    paths = [folder / f"{index}.png" for index in range(5)]
    for index, path in enumerate(paths):
        Image.fromarray(numbers.integers(0, 256, (120 + 9 * index, 150, 3), dtype=np.uint8)).save(path)
    return paths


def recorded(source, calls):
    """The source, whose maps are appended to ``calls``."""

    def maps(pixels):
        calls.append(source.maps(pixels))
        return calls[-1]

    return dataclasses.replace(source, maps=maps)


def cells_of(maps):
    """(1, D, H, W) -> (H, W, D), float64."""
    return maps[0].double().permute(1, 2, 0).numpy()


def cosines(ours, theirs):
    return (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)


def bootstrapped(statistic, count):
    """The 95 % interval of a statistic of indices of images."""
    drawn = torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(0)).numpy()
    return np.quantile([statistic(indices) for indices in drawn], [0.025, 0.975])


@pytest.mark.parametrize("kept_bytes", [0, 3 * 10 * 64 * 4, 2**30])  # of no map, of three maps, of all
def test_centred_figures_are_those_of_numpy(photos, monkeypatch, kept_bytes):
    monkeypatch.setattr(sys.modules["brixel.evaluate.fidelity"], "_KEPT_BYTES", kept_bytes)
    sources, teacher = fixed_sources()
    found = {name: [] for name in ("bilinear", "better", "teacher")}
    sources = [recorded(source, found[source.name]) for source in sources]
    report = compare(sources, recorded(teacher, found["teacher"]), photos, SIDES, model="m")
    for number, (side, grid) in enumerate(SIDES.items()):
        own_calls = slice(5 * number, 5 * number + 5)
        theirs = [cells_of(maps) for maps in found["teacher"] if maps.shape[-1] == grid][:5]
        mean = np.mean([cells.mean((0, 1)) for cells in theirs], axis=0)
        kept = min(5, kept_bytes // (10 * grid * grid * 4))
        assert sum(maps.shape[-1] == grid for maps in found["teacher"]) == 10 - kept
        rows, figures = by_name(report, side), {}
        for name in ("bilinear", "better"):
            ours = [cells_of(maps) for maps in found[name][own_calls]]
            pairs = list(zip(ours, theirs, strict=True))
            centred = [cosines(one - mean, other - mean) for one, other in pairs]
            edges = [inner_edges(cells) for cells in theirs]
            figures[name] = {
                "cosine": np.array([cosines(*pair).mean() for pair in pairs]),
                "centred_cosine": np.array([each.mean() for each in centred]),
                "centred_cosine_edges": np.array(
                    [np.mean([image[cell] for cell in at]) for image, at in zip(centred, edges, strict=True)]
                ),
                "cosine_edges": np.array(
                    [np.mean([cosines(*pair)[cell] for cell in at]) for pair, at in zip(pairs, edges, strict=True)]
                ),
            }
            for key, values in figures[name].items():
                assert rows[name][key] == pytest.approx(values.mean(), abs=1e-5)
                assert report.details[str(side)][name][key] == pytest.approx(list(values), abs=1e-5)
                interval = bootstrapped(lambda drawn, values=values: values[drawn].mean(), 5)
                assert rows[name][f"{key}_interval"] == pytest.approx(tuple(interval), abs=1e-5)
            errors = np.array([((one - other) ** 2).sum() for one, other in pairs])
            variances = np.array([((other - mean) ** 2).sum() for other in theirs])

            def explained(drawn, errors=errors, variances=variances):
                return 1 - errors[drawn].sum() / variances[drawn].sum()

            assert rows[name]["r2"] == pytest.approx(explained(np.arange(5)), abs=1e-5)
            assert rows[name]["r2_interval"] == pytest.approx(tuple(bootstrapped(explained, 5)), abs=1e-5)
        for cosine, removed in (
            ("cosine", "removed"),
            ("centred_cosine", "centred_removed"),
            ("cosine_edges", "edges_removed"),
            ("centred_cosine_edges", "centred_edges_removed"),
        ):
            own, base = (figures[name][cosine] for name in ("better", "bilinear"))

            def gone(drawn, own=own, base=base):
                return 1 - (1 - own[drawn]).sum() / (1 - base[drawn]).sum()

            assert rows["better"][removed] == pytest.approx(gone(np.arange(5)), abs=1e-4)
            assert rows["better"][f"{removed}_interval"] == pytest.approx(tuple(bootstrapped(gone, 5)), abs=1e-4)
            assert removed not in rows["bilinear"]
        for cosine, better in (("cosine", "better"), ("centred_cosine", "centred_better")):
            own, base = (figures[name][cosine] for name in ("better", "bilinear"))
            assert rows["better"][better] == [(own > base).sum(), 5]
            assert better not in rows["bilinear"]


def inner_edges(cells):
    """The tenth of inner cells (y, x), in places of the whole map, where eight directions change most."""
    maps = torch.from_numpy(cells).float().permute(2, 0, 1)[None]
    rows, columns = teacher_edges(maps, principal_directions(maps, 8)).nonzero(as_tuple=True)
    return [(int(y) + 1, int(x) + 1) for y, x in zip(rows, columns, strict=True)]


def test_a_map_pulled_towards_the_mean_gains_raw_cosine_alone():
    """Half of the cells differ along the mean, where raw cosine sees nothing; the map is wrong in the others."""
    mean = torch.tensor([4.0, 0.0, 0.0])
    steps = torch.tensor([[2.0, 0, 0], [-2.0, 0, 0], [0, 0.5, 0], [0, -0.5, 0]]).repeat(4, 1)  # teacher - mean
    found = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, -0.5, 0.25], [0, 0.5, 0.25]]).repeat(4, 1)

    def as_map(cells):
        return cells.T.reshape(1, 3, 4, 4)

    teacher = as_map(mean + steps)
    assert mean_feature([teacher]).equal(mean)
    figures = []
    for pull in (0.0, 0.25, 0.5):
        maps = as_map(mean + (1 - pull) * found)
        centred = centred_metrics(maps, teacher, mean, torch.ones(2, 2, dtype=torch.bool))
        figures.append((l1_and_cosine(maps, teacher)["cosine"], centred["centred_cosine"], r2(by_metric([centred]))[0]))
    raw, centred_cosine, explained = zip(*figures, strict=True)
    assert raw[0] + 1e-3 < raw[1] < raw[2] - 1e-3
    assert centred_cosine == pytest.approx([centred_cosine[0]] * 3, abs=1e-6)
    assert explained[0] > explained[1] + 1e-2 > explained[2] + 2e-2


def test_equal_cosines_are_not_better():
    base = torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    assert better_count(torch.tensor([0.5, 0.6, 0.4, 0.5 + 1e-7], dtype=torch.float64), base) == 1
    assert better_count(base, base) == 0


def test_a_fresh_student_is_better_in_no_image(backbone_folder, squares):
    report = fidelity(BrixelFeatures.from_backbone(backbone_folder, adapter="bilinear", device="cpu"), squares, [112])
    row = by_name(report, 112)["student"]
    assert row["better"] == row["centred_better"] == [0, 2]
    assert report.markdown("command").count(" 0 of 2 |") >= 2
