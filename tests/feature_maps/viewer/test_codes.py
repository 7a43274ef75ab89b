"""Codes of maps: decoded by the rule in the module's text, and compared with features in float64."""

import numpy as np
import pytest
import torch

from brixel import BrixelError, PcaBasis
from brixel.feature_maps.viewer import codes
from brixel.feature_maps.viewer.codes import encode


def smooth_map(channels: int, height: int, width: int, seed: int = 0, directions: int = 20) -> torch.Tensor:
    """A map of a few directions that vary slowly, about a mean far from zero, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, directions, generator=torch.Generator().manual_seed(99))
    coarse = torch.randn(1, directions, 4, 5, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)[0]
    noise = 0.1 * torch.randn(channels, height, width, generator=generator)
    return torch.einsum("cd,dhw->chw", mixing, fine) + 3 + noise


def decoded(encoded: codes.EncodedMaps, position: int) -> np.ndarray:
    """Directions of a map's cells (N, k)."""
    return encoded.low + encoded.step * encoded.maps[position].codes.astype(np.float64)


def directions(features: torch.Tensor) -> np.ndarray:
    cells = features.double().flatten(1).T.numpy()
    return cells / np.linalg.norm(cells, axis=1, keepdims=True)


def test_products_of_decoded_cells_are_cosines_within_the_stated_loss():
    maps = [smooth_map(100, 9, 12), smooth_map(100, 7, 11, seed=1)]
    encoded = encode(maps)
    assert encoded.channels == 100
    assert [coded.codes.shape for coded in encoded.maps] == [(108, 64), (77, 64)]
    ours = np.concatenate([decoded(encoded, position) for position in range(2)])
    exact = np.concatenate([directions(features) for features in maps])
    errors = abs(ours @ ours.T - exact @ exact.T)  # of all pairs: there are fewer cells than are measured
    assert encoded.loss.mean == pytest.approx(errors.mean(), rel=1e-3)
    assert encoded.loss.p99 == pytest.approx(np.percentile(errors, 99), rel=1e-3)
    assert encoded.loss.largest == pytest.approx(errors.max(), rel=1e-3)
    assert encoded.loss.mean < 0.003
    assert encoded.loss.largest < 0.03


def test_few_channels_lose_only_what_rounding_takes():
    encoded = encode([smooth_map(5, 6, 8)])
    assert encoded.maps[0].codes.shape == (48, 5)
    assert encoded.loss.largest < 0.02
    single = encode([torch.ones(3, 1, 1)])
    assert single.maps[0].codes.shape == (1, 1)
    assert abs(decoded(single, 0)[0, 0]) == pytest.approx(1)
    assert single.loss.largest == pytest.approx(0, abs=1e-6)


def test_lengths_are_kept_and_zero_means_zero():
    features = smooth_map(8, 3, 4)
    features[:, 0, 0] = 0
    features[:, 1, 1] *= 1e-9
    features[:, 2, 2] *= 1e6
    coded = encode([features]).maps[0]
    lengths = torch.linalg.vector_norm(features.double(), dim=0).flatten().numpy()
    assert coded.longest == pytest.approx(lengths.max())
    assert coded.lengths[0] == 0
    assert coded.lengths[1:].min() == 1
    assert coded.lengths[10] == 65_535
    np.testing.assert_allclose(
        encode([smooth_map(8, 3, 4)]).maps[0].lengths / 65_535, relative(smooth_map(8, 3, 4)), atol=1e-5
    )


def relative(features: torch.Tensor) -> np.ndarray:
    lengths = torch.linalg.vector_norm(features, dim=0).flatten().numpy()
    return lengths / lengths.max()


def test_colours_are_those_of_pca():
    maps = [smooth_map(100, 9, 12), smooth_map(100, 7, 11, seed=1)]
    encoded, basis = encode(maps), PcaBasis.fit(maps)
    for position, features in enumerate(maps):
        coded = encoded.maps[position]
        lengths = coded.lengths[:, None] / 65_535 * coded.longest
        products = lengths * (decoded(encoded, position) @ encoded.directions.T)
        shares = (products - encoded.colour_low) / (encoded.colour_high - encoded.colour_low)
        expected = basis.project(features).reshape(-1, 3)
        assert abs(255 * shares.clip(0, 1) - expected).max() < 6
        assert abs(255 * shares.clip(0, 1) - expected).mean() < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_maps_of_other_dtypes(dtype):
    assert encode([smooth_map(70, 5, 6).to(dtype)]).loss.largest < 0.03


def test_codes_are_the_same_on_every_call_and_leave_random_numbers_alone():
    features = smooth_map(100, 9, 12).requires_grad_()
    torch.manual_seed(5)
    first = encode([features])
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    second = encode([features])
    np.testing.assert_array_equal(first.maps[0].codes, second.maps[0].codes)
    assert first.loss == second.loss


def test_features_that_are_not_finite_are_refused():
    features = smooth_map(8, 3, 4)
    features[0, 0, 0] = torch.nan
    with pytest.raises(BrixelError, match="holds values that are not finite"):
        encode([features])
