"""Matching of feature maps: planted features, a plain loop, places between cells, and bad input."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from brixel import BrixelError, FeatureMap
from brixel.feature_maps import matching


def random_map(channels: int, grid_hw: tuple[int, int], stride: float = 4.0, seed: int = 0) -> FeatureMap:
    features = torch.randn(channels, *grid_hw, generator=torch.Generator().manual_seed(seed))
    return FeatureMap(features, tuple(int(stride * cells) for cells in grid_hw), (stride, stride))


def places_of(shift_yx: tuple[float, float], grid_hw: tuple[int, int], stride: float) -> FeatureMap:
    """Features that turn with the place, of an image whose content is moved by a number of pixels."""
    y, x = (torch.arange(cells) * stride + stride / 2 - shift for cells, shift in zip(grid_hw, shift_yx, strict=True))
    waves = [
        f(axis / length)
        for length in (20, 47)
        for axis in torch.meshgrid(y, x, indexing="ij")
        for f in (torch.sin, torch.cos)
    ]
    return FeatureMap(torch.stack(waves), tuple(int(cells * stride) for cells in grid_hw), (stride, stride))


def test_planted_features_match_exactly():
    a = random_map(32, (9, 12))
    b = FeatureMap(a.features.roll((2, 3), (1, 2)), a.image_hw, a.stride)
    found = a.match(b, refine=False)
    assert len(found) == 9 * 12
    expected = (found.source_yx + torch.tensor([8.0, 12.0])) % torch.tensor([36.0, 48.0])
    assert torch.equal(found.points_yx, expected)
    assert found.mutual.all()
    torch.testing.assert_close(found.score, torch.ones(108), rtol=0, atol=1e-6)
    assert (a.match(b).points_yx - expected).abs().max() <= 2  # half a cell


def test_points_keep_their_order_and_their_images_may_differ_in_size():
    a = random_map(32, (6, 6), stride=10)
    b = FeatureMap(F.interpolate(a.features[None], (18, 12))[0], (54, 60), (3, 5))
    points = [(55.0, 5.0), (5.0, 25.0), (35.0, 45.0)]
    found = a.match(b, points, refine=False)
    assert found.source_yx.tolist() == [list(point) for point in points]
    for (y, x), (row, column) in zip(points, found.points_yx.tolist(), strict=True):
        assert (int(row // 9), int(column // 10)) == (int(y // 10), int(x // 10))  # the same ninth or tenth of the side


def test_against_a_plain_loop(monkeypatch):
    monkeypatch.setattr(matching, "_MOST_SIMILARITIES", 100)  # in parts
    a, b = random_map(6, (5, 7)), random_map(6, (6, 4), stride=8, seed=1)
    found = a.match(b, refine=False)
    cells_a, cells_b = (F.normalize(each.features.flatten(1), dim=0).T for each in (a, b))
    for index, cell in enumerate(cells_a):
        cosines = cells_b @ cell
        best = int(cosines.argmax())
        assert found.score[index] == pytest.approx(float(cosines[best]), abs=1e-6)
        assert found.points_yx[index].tolist() == [8 * (best // 4) + 4, 8 * (best % 4) + 4]
        assert bool(found.mutual[index]) == (int((cells_a @ cells_b[best]).argmax()) == index)
    kept = a.match(b, mutual=True, refine=False)
    assert 0 < len(kept) == int(found.mutual.sum()) < len(found)
    assert torch.equal(kept.points_yx, found[found.mutual].points_yx)
    assert repr(kept) == f"Matches({len(kept)} points, {len(kept)} mutual)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_refinement_finds_places_between_cells(dtype):
    shift = (5.3, 2.9)
    a, b = places_of((0, 0), (20, 20), 4).to(dtype), places_of(shift, (22, 22), 4).to(dtype)
    points = np.random.default_rng(0).uniform(20, 55, (50, 2))
    truth = torch.from_numpy(points) + torch.tensor(shift)
    plain, fine = (a.match(b, points, refine=refine).points_yx - truth for refine in (False, True))
    assert plain.abs().max() <= 2.2  # half a cell, and the interpolation of the features that are looked for
    assert fine.abs().max() < 0.4
    assert fine.norm(dim=1).mean() < plain.norm(dim=1).mean() / 4


def test_matches_stay_inside_the_image():
    a = random_map(8, (3, 3))
    b = FeatureMap(a.features, (9, 9), a.stride)  # its last cells extend beyond the image
    found = a.match(b)
    assert found.points_yx.max() <= 9
    assert b.match(a).source_yx.max() <= 9
    assert b.match(a).mutual.all()


def test_one_cell_and_features_of_zeros():
    one = FeatureMap(torch.zeros(3, 1, 1), (4, 4), (4.0, 4.0))
    found = one.match(one)
    assert (found.points_yx.tolist(), found.score.tolist(), found.mutual.tolist()) == ([[2, 2]], [0], [True])


def test_similarity_to_a_vector_and_to_a_point_of_another_map():
    a, b = random_map(16, (4, 5)), random_map(16, (3, 3), stride=7, seed=1)
    vector = b.at([(3.5, 10.5)])[0]
    expected = F.cosine_similarity(a.features, vector[:, None, None], dim=0)
    for found in (a.similarity(vector), a.similarity(vector.numpy()), a.similarity((3.5, 10.5), of=b)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(
        BrixelError, match=r"array of shape \(3,\); expected \(2,\), .* or \(16,\), a vector of features"
    ):
        a.similarity(torch.zeros(3))
    with pytest.raises(
        BrixelError, match=r"array of shape \(16,\); expected \(2,\), the y and x of a point in pixels$"
    ):
        a.similarity(vector, of=b)


def test_bad_input():
    a = random_map(8, (3, 3))
    with pytest.raises(BrixelError, match="have 8 and 4 channels; expected maps of one model"):
        a.match(random_map(4, (3, 3)))
    with pytest.raises(BrixelError, match="the other map is a Tensor; expected a FeatureMap"):
        a.match(a.features)  # type: ignore[arg-type]
    with pytest.raises(BrixelError, match="outside the image"):
        a.match(a, [(0, 13)])
    with pytest.raises(BrixelError, match=r"expected \(N, 2\)"):
        a.match(a, (3, 4))
    with pytest.raises(BrixelError, match="refine is 'yes'"):
        a.match(a, refine="yes")  # type: ignore[arg-type]
    assert len(a.match(a, np.zeros((0, 2)))) == 0


def blurred_noise_at(y: np.ndarray, x: np.ndarray, seed: int = 0) -> torch.Tensor:
    """A drawn texture at places (H, W) of a plane: 24 smooth channels, none repeating, as features (24, H, W)."""
    numbers = np.random.default_rng(seed)
    waves = numbers.normal(0, 0.12, (24, 6, 2)), numbers.uniform(0, 6.3, (24, 6, 1, 1))
    angles = waves[0][..., 0, None, None] * y + waves[0][..., 1, None, None] * x + waves[1]
    return torch.from_numpy(np.sin(angles).sum(1)).float()


# without refinement the nearest centre of a cell is up to half its diagonal away
@pytest.mark.parametrize(("refine", "within"), [(False, 0.75), (True, 0.5)])
def test_matches_in_a_warped_drawn_scene_are_within_half_a_cell(refine, within):
    """The second image shows the scene turned, tilted and nearer; a pixel of it shows place ``to_scene``."""
    stride, side = 4.0, 160
    homography = np.array([[0.9, -0.12, 14.0], [0.1, 0.85, 6.0], [0.0004, -0.0003, 1.0]])  # (y, x, 1) to the scene

    def to_scene(y, x):
        lifted = np.stack([y, x, np.ones_like(y)], -1) @ homography.T
        return lifted[..., 0] / lifted[..., 2], lifted[..., 1] / lifted[..., 2]

    centres = np.meshgrid(*[(np.arange(int(side / stride)) + 0.5) * stride] * 2, indexing="ij")
    scene = FeatureMap(blurred_noise_at(*centres), (side, side), (stride, stride))
    warped = FeatureMap(blurred_noise_at(*to_scene(*centres)), (side, side), (stride, stride))
    y, x = (axis[3:-3:2, 3:-3:2].reshape(-1) + 1.3 for axis in centres)  # not at centres of cells
    queries = np.stack(to_scene(y, x), 1)
    inside = ((queries > stride) & (queries < side - stride)).all(1)
    assert inside.sum() > 150
    found = scene.match(warped, queries[inside], refine=refine)
    cells = (found.points_yx - torch.from_numpy(np.stack([y, x], 1)[inside])).norm(dim=1) / stride
    assert cells.max() < within
    assert found.mutual.float().mean() > 0.99
