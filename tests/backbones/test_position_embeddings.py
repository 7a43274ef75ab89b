"""Rotary tables and interpolated positions against explicit loops in float64, torch's resize and Pillow's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from brixel.backbones.position_embeddings import interpolate_positions, rotary_periods, rotary_table, rotate

GRIDS = [(4, 4), (3, 7), (8, 2), (1, 1)]


def periods_by_hand(head_width: int, theta: float = 100.0) -> list[float]:
    return [theta ** (4 * k / head_width) for k in range(head_width // 4)]


def turned_by_hand(tokens: np.ndarray, grid_hw: tuple[int, int], periods: list[float], prefix: int) -> np.ndarray:
    """(N, E) turned token by token, channel pair by channel pair: the definition, in float64."""
    height, width = grid_hw
    half, quarter = tokens.shape[1] // 2, tokens.shape[1] // 4
    turned = tokens.copy()
    for i in range(height):
        for j in range(width):
            token = prefix + i * width + j
            centre = (2 * (i + 0.5) / height - 1, 2 * (j + 0.5) / width - 1)
            for d in range(half):
                angle = 2 * math.pi * centre[d // quarter] / periods[d % quarter]
                first, second = tokens[token, d], tokens[token, d + half]
                turned[token, d] = first * math.cos(angle) - second * math.sin(angle)
                turned[token, d + half] = second * math.cos(angle) + first * math.sin(angle)
    return turned


def rounded_to_bfloat16(value: float) -> float:
    """To 8 significant bits, ties to even."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def cubic(distance: float, a: float = -0.75) -> float:
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def bicubic_matrix(source: int, target: int, step: float) -> np.ndarray:
    """(target, source) weights of bicubic sampling at (i + 0.5) * step - 0.5, edges clamped."""
    weights = np.zeros((target, source))
    for i in range(target):
        place = (i + 0.5) * step - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            weights[i, min(max(tap, 0), source - 1)] += cubic(place - tap)
    return weights


def bicubic_by_hand(positions: torch.Tensor, grid_hw: tuple[int, int], offset: float) -> np.ndarray:
    """The first DINOv2 release's rule where ``offset`` is 0.1, the plain one where it is 0."""
    source = positions[0].double().numpy()
    rows, columns = (
        bicubic_matrix(native, target, native / (target + offset))
        for native, target in zip(source.shape[1:], grid_hw, strict=True)
    )
    return np.einsum("ih,dhw,jw->dij", rows, source, columns)


def random_positions(native: int, width: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, width, native, native, generator=torch.Generator().manual_seed(seed))


# ---- rotary ----


@pytest.mark.parametrize(("head_width", "longest"), [(64, 74.99), (128, 86.60)])
def test_periods_run_from_one_to_nearly_the_base(head_width: int, longest: float) -> None:
    periods = rotary_periods(head_width, 100.0, torch.float32)
    np.testing.assert_allclose(periods.double().numpy(), periods_by_hand(head_width), rtol=1e-6)
    assert periods[0] == 1
    assert float(periods[-1]) == pytest.approx(longest, abs=5e-3)


@pytest.mark.parametrize("head_width", [16, 64, 128])
def test_rounded_periods_hold_eight_bits(head_width: int) -> None:
    rounded = rotary_periods(head_width, 100.0, torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert rounded.tolist() == [rounded_to_bfloat16(period) for period in periods_by_hand(head_width)]
    assert not torch.equal(rounded, rotary_periods(head_width, 100.0, torch.float32))


@pytest.mark.parametrize("grid_hw", GRIDS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_rotation_as_defined(grid_hw: tuple[int, int], prefix: int) -> None:
    head_width = 16
    count = prefix + grid_hw[0] * grid_hw[1]
    tokens = torch.randn(2, count, head_width, generator=torch.Generator().manual_seed(0))
    table = rotary_table(grid_hw, rotary_periods(head_width, 100.0, torch.float32), prefix)
    assert [each.shape for each in table] == [(count, head_width)] * 2
    turned = rotate(tokens, *table)
    for one, found in zip(tokens, turned, strict=True):
        expected = turned_by_hand(one.double().numpy(), grid_hw, periods_by_hand(head_width), prefix)
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=3e-6)
    assert torch.equal(turned[:, :prefix], tokens[:, :prefix])  # class and registers stay, to the bit


def test_table_on_a_large_grid_stays_exact() -> None:
    periods = rotary_periods(64, 100.0, torch.float32)
    cosine, signed_sine = rotary_table((64, 48), periods, prefix=5)
    for i, j in [(0, 0), (63, 47), (17, 30)]:
        centre = (2 * (i + 0.5) / 64 - 1, 2 * (j + 0.5) / 48 - 1)
        angles = [2 * math.pi * axis / period for axis in centre for period in periods_by_hand(64)]
        row = 5 + i * 48 + j
        np.testing.assert_allclose(cosine[row].double().numpy(), np.cos(angles * 2), rtol=0, atol=2e-6)
        np.testing.assert_allclose(signed_sine[row, 32:].double().numpy(), np.sin(angles), rtol=0, atol=2e-6)
        np.testing.assert_allclose(signed_sine[row, :32].double().numpy(), -np.sin(angles), rtol=0, atol=2e-6)


def test_rotated_products_depend_on_the_displacement_alone() -> None:
    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    table = rotary_table((6, 6), rotary_periods(16, 100.0, torch.float32), prefix=0)
    scores = rotate(query.expand(36, -1), *table) @ rotate(key.expand(36, -1), *table).T
    scores = scores.unflatten(1, (6, 6)).unflatten(0, (6, 6))
    torch.testing.assert_close(scores[1, 2, 3, 5], scores[2, 0, 4, 3], rtol=0, atol=1e-5)
    assert (scores[1, 2, 3, 5] - scores[1, 2, 5, 3]).abs() > 1e-3


# ---- learned ----


@pytest.mark.parametrize("grid_hw", [(3, 7), (16, 16), (9, 4), (1, 1), (37, 20), (50, 41)])
@pytest.mark.parametrize(("native", "offset"), [(37, 0.1), (37, 0.0), (5, 0.1), (5, 0.0)])
def test_bicubic_rules_in_closed_form(grid_hw: tuple[int, int], native: int, offset: float) -> None:
    positions = random_positions(native)
    found = interpolate_positions(positions, grid_hw, antialias=False, scale_offset=offset)
    expected = bicubic_by_hand(positions, grid_hw, offset)
    # float32 places the samples to about 1e-6 of the native grid's side, and white noise is steep
    np.testing.assert_allclose(found[0].double().numpy(), expected, rtol=0, atol=5e-5)


def test_the_offset_matters() -> None:
    positions = random_positions(37)
    plain, offset = (interpolate_positions(positions, (16, 16), antialias=False, scale_offset=o) for o in (0.0, 0.1))
    assert (plain - offset).abs().max() > 0.1


@pytest.mark.parametrize("grid_hw", [(3, 7), (16, 16), (50, 41)])
def test_offset_rule_is_the_call_of_the_first_release(grid_hw: tuple[int, int]) -> None:
    positions = random_positions(37)
    scales = tuple((each + 0.1) / 37 for each in grid_hw)
    reference = F.interpolate(positions, scale_factor=scales, mode="bicubic", antialias=False)
    found = interpolate_positions(positions, grid_hw, antialias=False, scale_offset=0.1)
    assert found.shape[2:] == grid_hw
    # torch places its samples in float32, we in float64, and white noise is steep
    torch.testing.assert_close(found, reference, rtol=0, atol=2e-5)


@pytest.mark.parametrize("grid_hw", [(3, 7), (16, 16), (1, 1), (50, 41)])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_size_rule_is_torchs_resize(grid_hw: tuple[int, int], antialias: bool, mode: str) -> None:
    positions = random_positions(37).double()  # in float32 torch places samples to about 1e-6 of the side
    reference = F.interpolate(positions, size=grid_hw, mode=mode, antialias=antialias)
    found = interpolate_positions(positions, grid_hw, antialias=antialias, scale_offset=0.0, mode=mode)
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid_hw", [(3, 7), (16, 16), (50, 41)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_antialiased_rule_is_pillows_resize(grid_hw: tuple[int, int], mode: str) -> None:
    positions = random_positions(37, width=2)
    found = interpolate_positions(positions, grid_hw, antialias=True, scale_offset=0.0, mode=mode)
    for channel, resized in zip(positions[0], found[0], strict=True):
        image = Image.fromarray(channel.numpy()).resize((grid_hw[1], grid_hw[0]), Image.Resampling[mode.upper()])
        np.testing.assert_allclose(resized.numpy(), np.asarray(image), rtol=0, atol=5e-5)  # as above


@pytest.mark.parametrize(("antialias", "offset"), [(False, 0.1), (False, 0.0), (True, 0.0)])
def test_native_grid_is_untouched(antialias: bool, offset: float) -> None:
    positions = random_positions(5)
    assert torch.equal(interpolate_positions(positions, (5, 5), antialias=antialias, scale_offset=offset), positions)


@pytest.mark.parametrize("antialias", [False, True])
def test_native_grid_is_untouched_by_the_bilinear_rule(antialias: bool) -> None:
    positions = random_positions(5)
    found = interpolate_positions(positions, (5, 5), antialias=antialias, scale_offset=0.0, mode="bilinear")
    assert torch.equal(found, positions)
