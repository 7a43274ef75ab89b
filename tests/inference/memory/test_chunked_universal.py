"""The universal upsampler in chunks of rows: the same numbers as in one piece, in less memory."""

import pytest
import torch
from helpers import random_universal

from brixel.inference.memory.allocation_tracker import AllocationTracker
from brixel.inference.memory.chunked_universal import universal_in_chunks
from brixel.inference.memory.row_chunks import row_ranges


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("grid", "size"), [((7, 5), (28, 20)), ((7, 5), (14, 40)), ((5, 7), (13, 22)), ((1, 6), (4, 24)), ((6, 1), (50, 3))]
)
def test_chunks_equal_the_whole(grid, size, rows):
    universal = random_universal()
    features, similar, guide = torch.randn(1, 9, *grid) + 1, torch.randn(1, 4, *grid), torch.rand(1, 3, 40, 30)
    for alike in (None, similar):
        out = torch.full((9, *size), float("nan"))
        universal_in_chunks(universal, features, guide, out, size, row_ranges(grid[0], rows), alike)
        with torch.no_grad():
            expected = universal.upsample(features, features if alike is None else alike, guide, size)[0]
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


def test_only_the_upper_left_cells_are_written():
    universal = random_universal()
    features, guide = torch.randn(1, 9, 6, 5), torch.rand(1, 3, 40, 30)
    out = torch.full((9, 17, 13), float("nan"))
    universal_in_chunks(universal, features, guide, out, (24, 20), row_ranges(6, 2))
    with torch.no_grad():
        expected = universal(features, guide, (24, 20))[0, :, :17, :13]
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_chunks_take_less_memory():
    universal, features, guide = random_universal(), torch.randn(1, 256, 24, 24), torch.rand(1, 3, 96, 96)
    out = torch.empty(256, 96, 96)
    peaks = []
    for rows in (24, 2):
        with AllocationTracker("cpu") as tracker:
            tracker.leave_out([out])
            universal_in_chunks(universal, features, guide, out, (96, 96), row_ranges(24, rows))
        peaks.append(tracker.peak)
    assert peaks[1] < peaks[0] / 3
