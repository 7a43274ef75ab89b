"""The gain of a trained upsampler by the size of the patch grid."""

import itertools

import pytest
import torch

from brixel.model.size_gain import SizeGain


def gain_of(grids: tuple[int, ...], gains: list[float]) -> SizeGain:
    gain = SizeGain(grids)
    with torch.no_grad():
        gain.gains.copy_(torch.tensor(gains))
    return gain


def test_where_it_was_trained_it_is_what_was_learned():
    gain = gain_of((8, 12, 16), [0.9, 0.8, 1.1])
    for grid, expected in ((8, 0.9), (12, 0.8), (16, 1.1)):
        assert float(gain((grid, grid)).detach()) == pytest.approx(expected, abs=1e-6)


def test_far_from_there_it_is_a_half():
    gain = gain_of((8, 16), [1.0, 0.7])
    for grid in (1, 2, 4, 32, 100):
        assert float(gain((grid, grid)).detach()) == 0.5


def test_between_it_changes_without_jumps():
    gain = gain_of((8, 16), [1.0, 0.8])
    values = [float(gain((rows, 16)).detach()) for rows in range(1, 200)]
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) < 0.3
    assert all(0.5 <= value <= 1 for value in values)


def test_only_the_number_of_patches_matters():
    gain = gain_of((12,), [0.9])
    assert float(gain((9, 16)).detach()) == pytest.approx(float(gain((12, 12)).detach()), abs=1e-6)


def test_on_other_grids_it_starts_as_it_was():
    gain = gain_of((8, 16), [1.0, 0.6])
    other = gain.on_grids((8, 11, 32))
    assert other.gains.tolist() == pytest.approx([1.0, float(gain((11, 11)).detach()), 0.5])
    assert gain.on_grids((8, 16)) is gain
