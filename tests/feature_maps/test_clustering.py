"""Clusters of cells: planted groups, the largest first, the same again, and bad input."""

import sys

import pytest
import torch

from brixel import BrixelError, FeatureMap


def planted(sizes: tuple[int, ...], channels: int = 16) -> tuple[FeatureMap, torch.Tensor]:
    """A map whose cells are noisy copies of a few directions, of any length, and the groups (Hf, Wf)."""
    numbers = torch.Generator().manual_seed(0)
    groups = torch.cat([torch.full((size,), group) for group, size in enumerate(sizes)])
    groups = groups[torch.randperm(len(groups), generator=numbers)].reshape(-1, 10)
    directions = torch.linalg.qr(torch.randn(channels, channels, generator=numbers)).Q[: len(sizes)]
    features = directions[groups] + 0.02 * torch.randn(*groups.shape, channels, generator=numbers)
    features = features * torch.rand(*groups.shape, 1, generator=numbers).add(0.1)
    return FeatureMap(features.permute(2, 0, 1), (groups.shape[0] * 4, 40), (4, 4)), groups


def test_planted_groups_are_found_the_largest_first():
    feature_map, groups = planted((90, 70, 40))  # given by falling size
    found = feature_map.cluster(3)
    assert found.dtype == torch.int64
    assert torch.equal(found, groups)
    assert torch.equal(feature_map.to("float16").cluster(3), groups)


def test_one_cluster_and_one_for_every_cell():
    feature_map = planted((10, 10))[0]
    assert not feature_map.cluster(1).any()
    assert feature_map.cluster(20).unique().tolist() == list(range(20))


def test_the_same_seed_gives_the_same_clusters():
    features = torch.randn(8, 20, 20, generator=torch.Generator().manual_seed(1))
    feature_map = FeatureMap(features, (20, 20), (1, 1))
    assert torch.equal(feature_map.cluster(5, seed=3), feature_map.cluster(5, seed=3))


def test_a_large_map_is_fitted_on_a_sample(monkeypatch):
    feature_map, groups = planted((900, 600, 500))
    monkeypatch.setattr("brixel.feature_maps.clustering.MAX_FIT_CELLS", 300)
    monkeypatch.setattr("brixel.feature_maps.pca.MAX_FIT_CELLS", 300)
    assert torch.equal(feature_map.cluster(3), groups)


def test_fewer_distinct_cells_give_fewer_clusters():
    feature_map = FeatureMap(torch.ones(4, 3, 3), (3, 3), (1, 1))
    assert not feature_map.cluster(4).any()


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "3"])
def test_k_is_a_positive_number(k):
    with pytest.raises(BrixelError, match="k is .*expected a whole number from 1 up"):
        planted((10,))[0].cluster(k)


def test_bad_input():
    feature_map = planted((10,))[0]
    with pytest.raises(BrixelError, match="k is 11, and the map has 10 cells"):
        feature_map.cluster(11)
    feature_map.features[0, 0, 0] = torch.nan
    with pytest.raises(BrixelError, match="not finite"):
        feature_map.cluster(2)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(BrixelError, match=r"clusters need 'sklearn': pip install 'brixel\[cluster\]'"):
        planted((10,))[0].cluster(2)
