"""The loss of reductions: figures beside scipy's, rows of fidelity, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from brixel import BrixelError, BrixelFeatures, Reduce
from brixel.evaluate.fidelity import fidelity
from brixel.evaluate.reduction import neighbours_kept, rank_correlation
from brixel.evaluate.tasks import Task


@pytest.fixture(scope="module")
def model(backbone_folder):
    return BrixelFeatures.from_backbone(backbone_folder, adapter="bilinear", device="cpu")


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    random = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(random.integers(0, 255, (28, 28, 3), np.uint8)).resize((112, 112)).save(
            folder / f"{number}.png"
        )
    return sorted(folder.iterdir())


def test_rank_correlation_is_spearmans():
    ours, theirs = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)), torch.randn(4, 50)
    theirs = ours + 0.5 * theirs
    expected = [spearmanr(a, b).statistic for a, b in zip(ours, theirs, strict=True)]
    np.testing.assert_allclose(rank_correlation(ours, theirs), expected, atol=1e-12)
    assert torch.equal(rank_correlation(ours, ours * 3).round(decimals=12), torch.ones(4, dtype=torch.float64))


def test_neighbours_kept():
    ours = torch.tensor([[5.0, 4, 3, 2, 1]])
    assert neighbours_kept(ours, torch.tensor([[5.0, 4, 1, 2, 3]]), 2).tolist() == [1.0]
    assert neighbours_kept(ours, torch.tensor([[1.0, 5, 4, 2, 3]]), 2).tolist() == [0.5]
    assert neighbours_kept(ours, -ours, 1).tolist() == [0.0]


def test_fidelity_has_a_row_for_every_reduction(model, squares):
    reductions = ["float16", "int8", "pca:64", "pca:4", "pca:4,int8", "stride:7", "regions:2x2"]
    report = fidelity(model, squares, [112], ["bilinear", "student"], reduce=reductions, reduce_images=squares[:2])
    rows = {row["source"]: row for row in report.rows}
    assert list(rows) == ["bilinear", "student", *(f"student {spec}" for spec in reductions)]
    whole = rows["student"]
    cells, channels = 64, 64  # 8 x 8
    sizes = {
        **{"": 4 * cells * channels, " float16": 2 * cells * channels, " int8": cells * channels + 4 * channels},
        **{" pca:64": 4 * cells * channels, " pca:4": 4 * cells * 4, " pca:4,int8": cells * 4 + 4 * 4},
        **{" stride:7": 4 * 16 * channels, " regions:2x2": 4 * 4 * channels},
    }
    for name, size_bytes in sizes.items():
        assert rows[f"student{name}"]["kib"] == size_bytes / 1024, name
    same = rows["student pca:64"]
    assert same["cosine"] == pytest.approx(whole["cosine"], abs=1e-6)
    assert same["ranking"] > 0.999
    assert same["top10"] > 0.99
    assert same["ranking_across"] > 0.999
    kept = [rows[f"student {spec}"]["ranking"] for spec in ("float16", "int8", "pca:4", "stride:7", "regions:2x2")]
    assert kept[0] > kept[1] > 0.99
    assert 0.99 > kept[2] > 0.5
    assert 0.99 > kept[3] > kept[4] > -1
    for metric in ("ranking", "top1", "top10", "ranking_across", "top1_across", "top10_across"):
        assert -1 <= rows["student stride:7"][metric] <= 1
    assert "ranking" not in rows["bilinear"]
    assert "| KiB per image" in report.markdown("command")
    assert len(report.details["112"]["student pca:4"]["ranking"]) == 3
    plain = fidelity(model, squares, [112], ["bilinear", "student"])
    assert "kib" not in plain.columns
    assert {key: whole[key] for key in plain.rows[1]} == plain.rows[1]


def test_what_cannot_be_compared_is_refused(model, squares):
    with pytest.raises(BrixelError, match="pca:4 needs a basis: give reduce_images="):
        fidelity(model, squares, [112], reduce=["pca:4"])
    with pytest.raises(BrixelError, match="points leaves points or regions"):
        fidelity(model, squares, [112], reduce=[Reduce.points([(1, 1)])])
    with pytest.raises(BrixelError, match="has a step 'pac:4'"):
        fidelity(model, squares, [112], reduce=["pac:4"])


def test_one_image_has_no_ranking_across_images(model, squares):
    row = fidelity(model, squares[:1], [112], ["student"], reduce=["int8"]).rows[1]
    assert "ranking" in row
    assert "ranking_across" not in row


def test_a_task_fits_to_the_images_that_it_is_given(model, squares):
    task = Task("fidelity", (112,), (squares[0],), sources=("student",), reduce=("pca:3",), reduce_images=(squares[1],))
    assert [row["source"] for row in task.run(model).rows] == ["student", "student pca:3"]
