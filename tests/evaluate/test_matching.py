"""Matching on maps that hold their own coordinates, where the answer is known."""

import pytest
import torch

from brixel import BrixelError
from brixel.evaluate.feature_sources import FeatureSource
from brixel.evaluate.matching import match_distances, matching, random_homography, transform_points, warp_image


def coordinates(pixels):
    """Features that tell a place: unit vectors that turn with x and with y (an image of x and y)."""
    x, y = pixels[:, :1], pixels[:, 1:2]
    return torch.cat([x.cos(), x.sin(), y.cos(), y.sin()], 1)


@pytest.fixture
def ramp():
    at = (torch.arange(32) + 0.5) / 32
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)])


def test_homographies_keep_the_second_view_inside_the_first():
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    for _ in range(20):
        found = transform_points(corners, random_homography(generator))
        assert (found - corners).abs().max() <= 0.25 + 1e-6
        assert 0 <= found.min() <= found.max() <= 1


def test_the_warped_image_shows_what_lies_where_the_points_say(ramp):
    homography = random_homography(torch.Generator().manual_seed(1))
    view = warp_image(ramp, homography)
    at = torch.tensor([[10.5 / 32, 20.5 / 32]])  # the centre of the pixel in row 20, column 10
    assert view[:2, 20, 10].tolist() == pytest.approx(transform_points(at, homography)[0].tolist(), abs=1e-6)


def test_features_that_tell_the_place_find_every_point_within_half_a_cell(ramp):
    homography = random_homography(torch.Generator().manual_seed(2))
    first, second = (coordinates(each[None])[0] for each in (ramp, warp_image(ramp, homography)))
    points = 0.1 + 0.8 * torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    found = match_distances(first, second, homography, points)
    assert found[0].max() < 1.5 * 2**0.5 / 2 / 32  # half a diagonal, and the curvature of the bilinear reading
    assert found[1].max() < 0.5 / 32  # refined
    assert found[1].mean() < 0.3 * found[0].mean()


def test_constant_features_find_nothing(ramp, tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 40), "green").save(tmp_path / "a.png")
    source = FeatureSource("nothing", lambda pixels: torch.ones(len(pixels), 3, 8, 8), 8, scale=4)
    report = matching([source], [tmp_path / "a.png"], [32], model="none")
    assert report.rows[0]["pck_0.1"] < 0.1
    assert report.rows[0]["image_px"] == 32
    assert report.rows == matching([source], [tmp_path / "a.png"], [32], model="none").rows
    with pytest.raises(BrixelError, match="no images"):
        matching([source], [], [32], model="none")
