"""The share of the ranking of similarities that `pca:32` keeps on photographs, with a basis of other photographs."""

import pytest
import torch
from helpers import SHARED

from brixel import BrixelFeatures, Reduce
from brixel.evaluate.reduction import neighbours_kept, rank_correlation
from brixel.feature_maps.matching import unit_cells

PHOTOS = SHARED / "data/photos"


@pytest.mark.shared
@pytest.mark.slow
def test_pca_32_keeps_the_ranking_of_similarities_on_photographs():
    """`docs/results/reduction.md` has 0.995 within an image and 0.997 across, of 24 photographs."""
    model = BrixelFeatures.from_pretrained(device="cpu")
    reduce = Reduce("pca:32,int8").fit(model.stream(sorted((PHOTOS / "train").iterdir())[::9]))  # 16 photographs
    assert reduce.basis.kept_variance > 0.75
    whole, reduced = [], []
    for feature_map in model.stream(sorted((PHOTOS / "val").iterdir())[::3]):  # 8 photographs
        whole.append(unit_cells(feature_map.features)[::17])
        reduced.append(unit_cells(reduce(feature_map).restored().features)[::17])
    within, nearest = [], []
    for ours, theirs in zip(whole, reduced, strict=True):
        similarities = [cells[::8] @ cells.T for cells in (ours, theirs)]
        within.append(rank_correlation(*similarities).mean())
        nearest.append(neighbours_kept(*similarities, 10).mean())
    assert torch.stack(within).mean() > 0.985
    assert torch.stack(nearest).mean() > 0.75
    across = [torch.cat(cells[1:]) @ cells[0].T for cells in (whole, reduced)]
    assert rank_correlation(*across).mean() > 0.99
