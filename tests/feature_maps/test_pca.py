import numpy as np
import pytest
import torch

from brixel.errors import BrixelError
from brixel.feature_maps import pca
from brixel.feature_maps.pca import PcaBasis


def random_map(d: int, h: int, w: int, seed: int = 0) -> torch.Tensor:
    """Correlated channels around a mean far from zero, with directions of clearly different variance."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(99)))[0]
    spread = 10.0 * 0.6 ** torch.arange(d)
    cells = torch.randn(h * w, d, generator=generator) * spread @ mixing + 20
    return cells.T.reshape(d, h, w).contiguous()


def svd_basis(maps: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, signed components and projections of all cells by numpy's SVD in float64."""
    cells = np.concatenate([m.double().numpy().reshape(m.shape[0], -1).T for m in maps])  # (K, D)
    mean = cells.mean(axis=0)
    rows = np.linalg.svd(cells - mean, full_matrices=False)[2][:3]
    for row in rows:
        if row[np.abs(row).argmax()] < 0:
            row *= -1
    return mean, rows, (cells - mean) @ rows.T


@pytest.mark.parametrize("sizes", [[(9, 13)], [(9, 13), (4, 5), (1, 7)]])
def test_fit_agrees_with_svd(sizes: list[tuple[int, int]]) -> None:
    maps = [random_map(12, h, w, seed) for seed, (h, w) in enumerate(sizes)]
    basis = PcaBasis.fit(maps)
    mean, components, projections = svd_basis(maps)
    np.testing.assert_allclose(basis.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(basis.components, components, atol=1e-5)
    for colour in range(3):
        ordered = np.sort(projections[:, colour])
        for share, found in ((0.01, basis.low[colour]), (0.99, basis.high[colour])):
            place = share * (len(ordered) - 1)
            below = int(place)
            expected = ordered[below] + (place - below) * (ordered[below + 1] - ordered[below])
            assert float(found) == pytest.approx(expected, abs=1e-3)


def test_project_cell_by_cell() -> None:
    features = random_map(6, 8, 9)
    basis = PcaBasis.fit([features])
    image = basis.project(features)
    assert image.shape == (8, 9, 3)
    assert image.dtype == np.uint8
    for row in range(8):
        for column in range(9):
            cell = features[:, row, column].double().numpy() - basis.mean.double().numpy()
            for colour in range(3):
                low, high = float(basis.low[colour]), float(basis.high[colour])
                position = float(cell @ basis.components[colour].double().numpy())
                expected = 255 * min(max((position - low) / (high - low), 0), 1)
                assert abs(int(image[row, column, colour]) - expected) <= 0.5 + 1e-3
    assert image.min() == 0
    assert image.max() == 255


def test_one_basis_gives_one_colour_to_one_feature() -> None:
    first, second = random_map(6, 8, 9), random_map(6, 5, 4, seed=1)
    second[:, 2, 3] = first[:, 4, 4]
    basis = PcaBasis.fit([first, second])
    assert (basis.project(first)[4, 4] == basis.project(second)[2, 3]).all()


def test_sign_follows_the_largest_entry_also_when_features_are_negated() -> None:
    features = random_map(7, 10, 10)
    basis, negated = PcaBasis.fit([features]), PcaBasis.fit([-features])
    for row in basis.components:
        assert row[row.abs().argmax()] > 0
    torch.testing.assert_close(negated.components, basis.components)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_memory_format_does_not_matter(dtype: torch.dtype) -> None:
    features = random_map(16, 33, 21).to(dtype)
    channels_last = features.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    transposed = features.transpose(1, 2).contiguous().transpose(1, 2)
    within_a_larger_one = torch.zeros(20, 40, 30, dtype=dtype)[2:18, 3:36, 5:26].copy_(features)
    expected_basis = PcaBasis.fit([features])
    expected = expected_basis.project(features)
    for other in (channels_last, transposed, within_a_larger_one, features.clone().requires_grad_()):
        basis = PcaBasis.fit([other])
        assert torch.equal(basis.components, expected_basis.components)
        np.testing.assert_array_equal(basis.project(other), expected)


def test_sampled_fit_is_repeatable_and_near_the_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = [random_map(8, 40, 50), random_map(8, 30, 20, seed=1)]
    full = PcaBasis.fit(maps)
    monkeypatch.setattr(pca, "MAX_FIT_CELLS", 1500)
    state = torch.random.get_rng_state()
    first, second = PcaBasis.fit(maps), PcaBasis.fit(maps)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.components, second.components)
    assert not torch.equal(first.components, full.components)
    assert ((first.components * full.components).sum(dim=1) > 0.99).all()


def test_sample_takes_each_cell_once_and_every_map() -> None:
    sizes = [(100, 120), (3, 5), (90, 70)]
    maps = [torch.arange(1e5 * i, 1e5 * i + h * w).reshape(1, h, w) for i, (h, w) in enumerate(sizes)]
    everything = np.concatenate([m.numpy().ravel() for m in maps])
    assert len(everything) > pca.MAX_FIT_CELLS
    taken = pca.sample_cells(maps)[0].numpy()
    assert len(np.unique(taken)) == len(taken) == pca.MAX_FIT_CELLS
    assert np.isin(taken, everything).all()
    assert (np.unique(taken // 1e5) == [0, 1, 2]).all()


@pytest.mark.parametrize("value", [0.0, 1 / 3, 12345.678, -1e-20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_constant_map_is_mid_grey(value: float, dtype: torch.dtype) -> None:
    features = torch.full((5, 7, 11), value, dtype=dtype) * torch.arange(1, 6, dtype=dtype)[:, None, None]
    assert (PcaBasis.fit([features]).project(features) == 128).all()


@pytest.mark.parametrize("d", [1, 2])
def test_fewer_than_three_channels_leave_grey_colours(d: int) -> None:
    features = random_map(d, 6, 6)
    basis = PcaBasis.fit([features])
    assert basis.components.shape == (3, d)
    assert (basis.components[d:] == 0).all()
    image = basis.project(features)
    assert (image[..., d:] == 128).all()
    assert all(len(np.unique(image[..., colour])) > 10 for colour in range(d))


def test_a_map_of_one_direction_has_one_colour() -> None:
    features = random_map(1, 12, 12) * torch.tensor([0.3, -1.7, 0.9, 0.1])[:, None, None] + 5
    image = PcaBasis.fit([features]).project(features)
    assert len(np.unique(image[..., 0])) > 50
    assert (image[..., 1:] == 128).all()


def test_one_cell_is_grey() -> None:
    assert PcaBasis.fit([torch.ones(4, 1, 1)]).project(torch.ones(4, 1, 1)).tolist() == [[[128, 128, 128]]]


def test_errors() -> None:
    good = random_map(4, 3, 3)
    with pytest.raises(BrixelError, match="no feature maps to fit a basis to; give at least one tensor"):
        PcaBasis.fit([])
    with pytest.raises(BrixelError, match="feature map 1 has 5 channels, the first map has 4; use maps"):
        PcaBasis.fit([good, random_map(5, 3, 3)])
    with pytest.raises(BrixelError, match=r"feature map 0 has shape \(3, 3\); expected \(D, H, W\)"):
        PcaBasis.fit([torch.ones(3, 3)])
    with pytest.raises(BrixelError, match=r"feature map 1 has shape \(4, 0, 3\); expected \(D, H, W\), none"):
        PcaBasis.fit([good, torch.ones(4, 0, 3)])
    for bad in (float("nan"), float("inf")):
        broken = good.clone()
        broken[2, 1, 1] = bad
        with pytest.raises(BrixelError, match="feature map 1 holds values that are not finite; mend or"):
            PcaBasis.fit([good, broken])
        with pytest.raises(BrixelError, match="the feature map holds values that are not finite"):
            PcaBasis.fit([good]).project(broken)
    with pytest.raises(BrixelError, match="the feature map has 5 channels, the basis has 4"):
        PcaBasis.fit([good]).project(random_map(5, 3, 3))
    with pytest.raises(BrixelError, match=r"have shapes .*; expected \(D,\), \(3, D\), \(3,\), \(3,\)"):
        PcaBasis(torch.ones(4), torch.ones(4, 3), torch.ones(3), torch.ones(3))
