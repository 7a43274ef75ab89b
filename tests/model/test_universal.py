"""The universal upsampler: what it starts as, which grids, widths and sizes it takes, and what leaves it unchanged."""

import pytest
import torch
import torch.nn.functional as F
from helpers import random_universal
from torch import Tensor

from brixel.model.universal import (
    CELLS,
    WINDOW,
    OutputGrid,
    UniversalUpsampler,
    cell_table,
    inner_products,
    likeness,
    mean_length,
    weighted_sums,
    window_cells,
)

SIZES = [  # grid, output
    *(((4, 4), (16, 16)), ((3, 5), (6, 10)), ((5, 3), (40, 24))),  # 2, 4 and 8
    *(((1, 1), (4, 4)), ((1, 7), (4, 28)), ((6, 1), (24, 4))),  # one cell, one row, one column
    *(((5, 7), (13, 22)), ((7, 5), (50, 39)), ((4, 6), (4, 6)), ((3, 3), (4, 11))),  # any
]


def inputs(grid: tuple[int, int], size: tuple[int, int], width: int = 24, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Features with a mean far from zero, and a guide of another size than the network reads."""
    torch.manual_seed(1)
    return torch.randn(batch, width, *grid) + torch.randn(width, 1, 1), torch.rand(batch, 3, 3 * size[0], 5 * size[1])


# ---------------------------------------------------------------- what it starts as


@pytest.mark.parametrize(("grid", "size"), SIZES)
def test_a_fresh_one_is_bilinear_interpolation(grid, size):
    torch.manual_seed(0)
    features, guide = inputs(grid, size)
    expected = F.interpolate(features, size, mode="bilinear", align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(UniversalUpsampler()(features, guide, size), expected, rtol=0, atol=3e-6)


def test_a_fresh_one_learns_from_its_first_step():
    torch.manual_seed(0)
    universal, (features, guide) = UniversalUpsampler(), inputs((3, 4), (12, 16))
    universal(features, guide, (12, 16)).square().sum().backward()
    assert universal.change.weight.grad.abs().sum() > 0
    assert universal.attention.grad != 0
    assert universal.similarity.grad != 0


# ---------------------------------------------------------------- against naive loops


@pytest.mark.parametrize(("cells", "outputs"), [(1, 1), (4, 16), (5, 13), (7, 50), (3, 4), (6, 6)])
def test_slots_hold_each_output_cell_once_in_the_cell_of_its_centre(cells, outputs):
    grid = OutputGrid((cells, 1), (outputs, 1), torch.device("cpu"))
    per_cell = grid.down.outputs.shape[1]
    for output in range(outputs):
        centre = (output + 0.5) * cells / outputs
        cell, slot = divmod(int(grid.down.slot_of[output]), per_cell)
        assert cell == int(centre)
        assert int(grid.down.outputs[cell, slot]) == output
        assert float(grid.down.offset[output]) == pytest.approx(centre - cell - 0.5)
    for cell in range(cells):  # unused slots repeat an output cell of the same cell
        own = {output for output in range(outputs) if int((output + 0.5) * cells / outputs) == cell}
        assert set(grid.down.outputs[cell].tolist()) == own


@pytest.mark.parametrize(("grid", "size"), [((3, 4), (7, 16)), ((2, 2), (4, 6))])
def test_weighted_sums_equal_loops(grid, size):
    features, _ = inputs(grid, size, width=5, batch=1)
    layout = OutputGrid(grid, size, features.device)
    weights = torch.randn(1, *size, CELLS + 1)
    found = weighted_sums(window_cells(cell_table(features), layout), layout.to_slots(weights), layout)[0]
    mean = features[0].mean((1, 2))
    half = WINDOW // 2
    for y in range(size[0]):
        for x in range(size[1]):
            row, column = int((y + 0.5) * grid[0] / size[0]), int((x + 0.5) * grid[1] / size[1])
            expected = weights[0, y, x, -1] * mean
            for index in range(CELLS):
                down, across = row + index // WINDOW - half, column + index % WINDOW - half
                cell = features[0, :, min(max(down, 0), grid[0] - 1), min(max(across, 0), grid[1] - 1)]
                expected = expected + weights[0, y, x, index] * (cell - mean)
            torch.testing.assert_close(found[:, y, x], expected, rtol=1e-4, atol=1e-5)


def test_likeness_holds_cosines_lengths_and_the_cosine_to_the_mean():
    features, _ = inputs((4, 5), (16, 20), batch=1)
    grid, table = OutputGrid((4, 5), (16, 20), features.device), cell_table(features)
    found = likeness(inner_products(window_cells(table, grid)), mean_length(table))[0, 2, 2]
    mean = features.mean((2, 3))[0]
    centred = features[0] - mean[:, None, None]
    window = centred[:, [0, 1, 2, 3, 3]][:, :, [0, 1, 2, 3, 4]].flatten(1)  # around cell (2, 2): rows 0 to 4, clamped
    cosines = F.cosine_similarity(window[:, :, None], window[:, None], dim=0)
    first, second = torch.triu_indices(CELLS, CELLS, 1)
    torch.testing.assert_close(found[:-2], cosines[first, second], rtol=1e-4, atol=1e-5)
    own, lengths = centred[:, 2, 2], centred.square().sum(0).mean().sqrt()
    torch.testing.assert_close(found[-2], (own.norm() / lengths).log(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[-1], F.cosine_similarity(features[0, :, 2, 2], mean, dim=0), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what leaves it unchanged


@pytest.mark.parametrize(("grid", "size"), SIZES)
def test_it_commutes_with_rotations_of_the_feature_space(grid, size):
    universal = random_universal(torch.float64)
    features, guide = (tensor.double() for tensor in inputs(grid, size))
    rotation = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))[0]

    def rotated(maps: Tensor) -> Tensor:
        return torch.einsum("ij,bjhw->bihw", rotation, maps)

    with torch.no_grad():
        found = universal(rotated(features), guide, size)
        # cosines are computed in float32
        torch.testing.assert_close(found, rotated(universal(features, guide, size)), rtol=0, atol=1e-5)


def test_constant_features_stay_constant():
    guide = torch.rand(1, 3, 48, 48)
    constant = torch.randn(1, 7, 1, 1).expand(1, 7, 3, 3)
    with torch.no_grad():
        found = random_universal()(constant, guide, (12, 12))
    torch.testing.assert_close(found, constant[:, :, :1, :1].expand_as(found), rtol=0, atol=1e-6)


def test_a_factor_on_the_features_is_a_factor_on_the_map():
    features, guide = inputs((4, 4), (16, 16))
    universal = random_universal()
    with torch.no_grad():
        found, plain = universal(1000 * features, guide, (16, 16)), universal(features, guide, (16, 16))
    torch.testing.assert_close(found, 1000 * plain, rtol=1e-4, atol=1e-2)


def test_a_batch_equals_its_images_alone():
    features, guide = inputs((4, 5), (16, 20), batch=3)
    universal = random_universal()
    with torch.no_grad():
        alone = [universal(features[[i]], guide[[i]], (16, 20)) for i in range(3)]
        torch.testing.assert_close(universal(features, guide, (16, 20)), torch.cat(alone), rtol=0, atol=1e-5)


def test_the_guide_matters_and_so_do_other_features():
    universal = random_universal()
    features, guide = inputs((4, 4), (16, 16), batch=1)
    with torch.no_grad():
        plain = universal(features, guide, (16, 16))
        assert (universal(features, guide.flip(-1), (16, 16)) - plain).abs().max() > 1e-3
        similar = torch.randn(1, 9, 4, 4)
        assert (universal.upsample(features, similar, guide, (16, 16)) - plain).abs().max() > 1e-3


# ---------------------------------------------------------------- widths, dtypes, gradients, export


@pytest.mark.parametrize("width", [1, 32, 100, 4096])
def test_any_width(width):
    features, guide = inputs((2, 3), (8, 12), width=width, batch=1)
    with torch.no_grad():
        found = random_universal()(features, guide, (8, 12))
    assert found.shape == (1, width, 8, 12)
    assert found.isfinite().all()
    assert found.is_contiguous(memory_format=torch.channels_last) or width == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    features, guide = inputs((5, 6), (20, 24))
    with torch.no_grad():
        expected = random_universal()(features, guide, (20, 24))
        found = random_universal(dtype)(features.to(dtype), guide.to(dtype), (20, 24))
    assert found.dtype == dtype
    difference = (found.float() - expected).abs().mean() / expected.std()
    assert difference < (0.02 if dtype == torch.bfloat16 else 0.004)


def test_gradients_of_features_and_guide():
    universal = random_universal(torch.float64).requires_grad_(False)
    features = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    guide = torch.rand(1, 3, 16, 24, dtype=torch.float64, requires_grad=True)
    universal(features, guide, (4, 6)).square().sum().backward()
    step = 1e-3
    for tensor, index in ((features, (0, 1, 1, 2)), (guide, (0, 2, 5, 7))):
        with torch.no_grad():
            sums = []
            for sign in (1, -1):
                tensor[index] += sign * step
                sums.append(universal(features, guide, (4, 6)).square().sum())
                tensor[index] -= sign * step
        # cosines are computed in float32
        assert float(tensor.grad[index]) == pytest.approx(float(sums[0] - sums[1]) / (2 * step), rel=2e-2, abs=1e-4)


class Scaled(torch.nn.Module):
    """Upsamples to four times the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.universal = random_universal()

    def forward(self, features: Tensor, guide: Tensor) -> Tensor:
        height, width = features.shape[2:]
        out: Tensor = self.universal(features, guide, (4 * height, 4 * width))
        return out


@pytest.mark.slow
def test_export_with_dynamic_sizes_equals_eager():
    model = Scaled().eval()
    height, width = (torch.export.Dim(name, min=2, max=64) for name in ("h", "w"))
    batch = torch.export.Dim("b", min=1, max=8)
    shapes = ({0: batch, 2: height, 3: width}, {0: batch, 2: 16 * height, 3: 16 * width})
    example = (torch.randn(2, 8, 3, 5), torch.rand(2, 3, 48, 80))
    exported = torch.export.export(model, example, dynamic_shapes=shapes).module()
    for grid in ((3, 5), (2, 2), (7, 4)):
        features, guide = torch.randn(1, 8, *grid), torch.rand(1, 3, 16 * grid[0], 16 * grid[1])
        with torch.no_grad():
            torch.testing.assert_close(exported(features, guide), model(features, guide), rtol=0, atol=1e-5)
