import pytest
import torch
import torch.nn.functional as F

from brixel.inference.memory.row_chunks import resize_rows, row_ranges, source_rows


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("new_hw", [(1, 3), (4, 8), (7, 5), (28, 12), (32, 9)])
def test_resized_rows_are_rows_of_the_resized_map(total, new_hw):
    maps = torch.randn(2, 3, total, 4)
    whole = F.interpolate(maps, size=new_hw, mode="bilinear", align_corners=False)
    for wanted in row_ranges(new_hw[0], 3):
        start, stop = source_rows(wanted, total, new_hw[0])
        assert 0 <= start < stop <= total
        rows = resize_rows(maps[:, :, start:stop], start, total, wanted, new_hw, torch.float32)
        torch.testing.assert_close(rows, whole[:, :, wanted[0] : wanted[1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("total", "rows", "expected"), [(5, 2, [(0, 2), (2, 4), (4, 5)]), (2, 9, [(0, 2)])])
def test_row_ranges_cover_all_rows_once(total, rows, expected):
    assert row_ranges(total, rows) == expected
