"""`sample_points` against a plain loop over points, and against torch's own `grid_sample`."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brixel.model.deformable_attention import embedding_bag_sums, gathered_sums, sample_points

CASES = {  # name: (batch, grid_hw, queries, heads, points, channels per head)
    "square": (1, (4, 4), 6, 2, 3, 8),
    "wide, batch of 2, 12 channels": (2, (3, 7), 5, 4, 4, 12),
    "tall, batch of 3, 3 channels": (3, (6, 2), 4, 3, 2, 3),
    "one cell": (2, (1, 1), 4, 2, 4, 5),
    "one row, one channel": (1, (1, 5), 7, 1, 1, 1),
}
SAMPLES = [pytest.param(*case, id=name) for name, case in CASES.items()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_sampling(
    batch: int, grid_hw: tuple[int, int], queries: int, heads: int, points: int, channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, points up to two cells outside the grid, and weights of both signs; float64."""
    made = generator()
    values = torch.randn(batch, *grid_hw, heads, channels, dtype=torch.float64, generator=made)
    spread = torch.tensor([grid_hw[1] + 4.0, grid_hw[0] + 4.0], dtype=torch.float64)
    places = torch.rand(batch, queries, heads, points, 2, dtype=torch.float64, generator=made) * spread - 2
    return values, places, torch.randn(batch, queries, heads, points, dtype=torch.float64, generator=made)


def read_cell_by_cell(grid: Tensor, x: float, y: float) -> Tensor:
    """(h, w, C) at one place: every cell weighs by a tent of its own centre, so that nothing is outside."""
    height, width, channels = grid.shape
    total = torch.zeros(channels, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            weight = max(0.0, 1 - abs(x - (column + 0.5))) * max(0.0, 1 - abs(y - (row + 0.5)))
            if weight:
                total += weight * grid[row, column].double()
    return total


def naive(values: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """The contract as loops: (B, N, A * C) in float64."""
    batch, queries, heads, count = weights.shape
    out = torch.zeros(batch, queries, heads, values.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for n in range(queries):
            for a in range(heads):
                for p in range(count):
                    x, y = points[b, n, a, p].tolist()
                    out[b, n, a] += float(weights[b, n, a, p]) * read_cell_by_cell(values[b, :, :, a], x, y)
    return out.flatten(2)


def by_grid_sample(values: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """The same by torch's sampler, one head at a time."""
    size = torch.tensor([values.shape[2], values.shape[1]], dtype=points.dtype)
    places = 2 * points / size - 1  # -1 and 1 are the outer edges of the grid
    heads = []
    for a in range(values.shape[3]):
        plane = values[:, :, :, a].permute(0, 3, 1, 2)  # B C h w
        read = F.grid_sample(plane, places[:, :, a], mode="bilinear", padding_mode="zeros", align_corners=False)
        heads.append((read * weights[:, None, :, a]).sum(-1).mT)  # B N C
    return torch.cat(heads, dim=-1)


def test_loop_reads_as_grid_sample() -> None:
    """The two references agree with each other, so that a mistake would have to be in both."""
    sampling = random_sampling(2, (3, 5), 4, 2, 3, 4)
    torch.testing.assert_close(naive(*sampling), by_grid_sample(*sampling), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("batch", "grid_hw", "queries", "heads", "points", "channels"), SAMPLES)
def test_equals_plain_loop(
    batch: int, grid_hw: tuple[int, int], queries: int, heads: int, points: int, channels: int
) -> None:
    sampling = random_sampling(batch, grid_hw, queries, heads, points, channels)
    found = sample_points(*sampling)
    assert found.shape == (batch, queries, heads * channels)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, naive(*sampling), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("batch", "grid_hw", "queries", "heads", "points", "channels"), SAMPLES)
def test_equals_grid_sample_in_float32(
    batch: int, grid_hw: tuple[int, int], queries: int, heads: int, points: int, channels: int
) -> None:
    values, places, weights = random_sampling(batch, grid_hw, queries, heads, points, channels)
    found = sample_points(values.float(), places.float(), weights.float())
    expected = by_grid_sample(values.float().double(), places.float().double(), weights.float().double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def at_places(values: Tensor, places: list[tuple[float, float]]) -> tuple[Tensor, Tensor, Tensor]:
    """One query per place, every head and a single point reading it with weight 1."""
    heads = values.shape[3]
    points = torch.tensor(places, dtype=torch.float64)[None, :, None, None].expand(values.shape[0], -1, heads, 1, 2)
    return values, points, torch.ones(points.shape[:-1], dtype=torch.float64)


def test_borders_and_centres() -> None:
    """On the outer edges, on every cell centre, and exactly one cell beyond the outermost centres."""
    height, width = 3, 4
    values = torch.randn(2, height, width, 2, 3, dtype=torch.float64, generator=generator())
    xs = [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, width - 0.5, float(width), width + 0.5]
    ys = [-0.5, 0.0, 0.5, 1.5, height - 0.5, float(height), height + 0.5]
    sampling = at_places(values, [(x, y) for y in ys for x in xs])
    torch.testing.assert_close(sample_points(*sampling), naive(*sampling), rtol=0, atol=1e-14)


def test_a_cell_centre_reads_its_cell_exactly() -> None:
    values = torch.randn(1, 3, 4, 2, 3, dtype=torch.float64, generator=generator())
    centres = [(column + 0.5, row + 0.5) for row in range(3) for column in range(4)]
    assert torch.equal(sample_points(*at_places(values, centres)).view(1, 3, 4, 2, 3), values)


@pytest.mark.parametrize("far", [0.5001, 1.0, 1.5, 2.0, 3.0, 1e4, 1e9, 1e30, float("inf")])
def test_far_outside_is_zero_on_every_side(far: float) -> None:
    """At least a cell beyond the outermost centres; neighbours in the batch and other heads must not leak in."""
    height, width = 3, 4
    values = torch.full((3, height, width, 2, 3), 7.0, dtype=torch.float64)
    outside = [(-far, 1.5), (width + far, 1.5), (1.5, -far), (1.5, height + far)]
    outside += [(-far, -far), (-far, height + far), (width + far, -far), (width + far, height + far)]
    assert not sample_points(*at_places(values, outside)).any()


def test_gradients_by_finite_differences() -> None:
    values, points, weights = random_sampling(2, (2, 3), 3, 2, 2, 3)
    # interpolation has kinks where a point crosses a cell's centre, at k + 0.5: stay 0.1 off
    fractions = 0.1 + 0.8 * torch.rand(points.shape, dtype=points.dtype, generator=generator(1))
    points = (points - 0.5).floor() + 0.5 + fractions
    inputs = [each.requires_grad_() for each in (values, points, weights)]
    assert torch.autograd.gradcheck(sample_points, inputs)


def test_gradients_equal_those_of_grid_sample() -> None:
    ours = [each.requires_grad_() for each in random_sampling(2, (4, 5), 6, 3, 4, 12)]
    theirs = [each.detach().clone().requires_grad_() for each in ours]
    out, expected = sample_points(*ours), by_grid_sample(*theirs)
    direction = torch.randn(out.shape, dtype=out.dtype, generator=generator(1))
    for mine, other in zip(
        torch.autograd.grad(out, ours, direction), torch.autograd.grad(expected, theirs, direction), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_ways_of_summing_bags_agree_with_their_gradients(dtype: torch.dtype) -> None:
    table = torch.randn(40, 12, generator=generator()).to(dtype)
    bags = torch.randint(40, (30, 16), generator=generator(), dtype=torch.int32)
    weights = torch.randn(30, 16, generator=generator()).softmax(-1).to(dtype)
    direction = torch.randn(30, 12, generator=generator(1)).to(dtype)
    bound = 8 * torch.finfo(dtype).eps
    results = []
    for sums_of in (embedding_bag_sums, gathered_sums):
        inputs = [table.clone().requires_grad_(), weights.clone().requires_grad_()]
        sums = sums_of(inputs[0], bags, inputs[1])
        results.append([sums, *torch.autograd.grad(sums, inputs, direction)])
    for bag, gathered in zip(*results, strict=True):
        torch.testing.assert_close(bag, gathered, rtol=bound, atol=bound * float(bag.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(dtype: torch.dtype) -> None:
    """Within one rounding of the largest value, for weights that sum to one, as attention's do."""
    values, points, weights = random_sampling(2, (5, 7), 20, 4, 4, 12)
    values, weights = values.to(dtype), weights.softmax(-1).to(dtype)
    found = sample_points(values, points.float(), weights)
    expected = sample_points(values.float(), points.float(), weights.float())
    assert found.dtype == dtype
    bound = torch.finfo(dtype).eps * float(values.abs().max())
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=bound)


class Sampler(nn.Module):
    def forward(self, values: Tensor, points: Tensor, weights: Tensor) -> Tensor:
        return sample_points(values, points, weights)


@pytest.mark.slow
def test_export_with_dynamic_sizes_equals_eager() -> None:
    batch, height, width, queries = (torch.export.Dim(name, min=1, max=512) for name in ("b", "h", "w", "n"))
    sizes = {"values": {0: batch, 1: height, 2: width}, "points": {0: batch, 1: queries}}
    sizes["weights"] = sizes["points"]
    example = random_sampling(2, (3, 5), 6, 2, 4, 12)
    program = torch.export.export(Sampler(), example, dynamic_shapes=sizes)
    assert "embedding_bag" not in str(program.graph)  # a loop per bag in ONNX
    exported = program.module()
    for batch_, grid_hw, count in ((2, (3, 5), 6), (1, (7, 2), 9), (3, (1, 1), 4)):
        sampling = random_sampling(batch_, grid_hw, count, 2, 4, 12)
        torch.testing.assert_close(exported(*sampling), sample_points(*sampling), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    torch.compiler.reset()
    compiled = torch.compile(sample_points, fullgraph=True, backend="aot_eager")
    for grid_hw in ((3, 5), (6, 2)):  # the second size makes the first one's graph dynamic
        sampling = random_sampling(2, grid_hw, 6, 2, 4, 12)
        torch.testing.assert_close(compiled(*sampling), sample_points(*sampling), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_compiled_for_a_cpu_it_keeps_embedding_bag() -> None:
    """torch 2.13 starts threads for every bag of gathered rows, where a head has fewer channels than a vector holds."""
    torch.compiler.reset()
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(str(graph.graph))
        return graph

    sampling = random_sampling(1, (3, 5), 6, 2, 4, 12)
    torch.testing.assert_close(torch.compile(sample_points, backend=backend)(*sampling), sample_points(*sampling))
    assert len(graphs) == 1
    assert "embedding_bag" in graphs[0]
