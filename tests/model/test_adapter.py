"""The adapter against an obvious twin in float64, written from `docs/method.md`, section 1, steps 2 and 3."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brixel.model.adapter import Adapter, ConvNormRelu, Extractor, SpatialPrior

WIDTH = 96  # three channels per head
HEADS, POINTS = 16, 4
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _same_weights_every_time() -> None:
    torch.manual_seed(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Every parameter moved from where it starts, so that none is zero or one; running statistics as after training."""
    made = generator(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            noise = torch.randn(tensor.shape, generator=made)
            if name.endswith("running_var"):
                tensor.copy_(0.2 + noise.abs())
            elif tensor.is_floating_point():
                tensor.add_(0.1 * noise.to(tensor.dtype))


def random_input(grid_hw: tuple[int, int], patch_px: int, batch: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Pixels and four maps."""
    made = generator(1)
    pixels = torch.randn(batch, 3, grid_hw[0] * patch_px, grid_hw[1] * patch_px, generator=made)
    return pixels, [torch.randn(batch, WIDTH, *grid_hw, generator=made) for _ in range(4)]


# ---------------------------------------------------------------- the twin


def twin_conv(x: Tensor, state: State, name: str, stride: int) -> Tensor:
    x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=1)
    statistics = (state[f"{name}.norm.running_mean"], state[f"{name}.norm.running_var"])
    return F.relu(F.batch_norm(x, *statistics, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"], eps=1e-5))


def twin_linear(x: Tensor, state: State, name: str) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def twin_norm(x: Tensor, state: State, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def bilinear(maps: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=grid_hw, mode="bilinear", align_corners=False)


def to_tokens(maps: Tensor) -> Tensor:
    return maps.reshape(*maps.shape[:2], -1).permute(0, 2, 1)


def to_map(tokens: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    return tokens.permute(0, 2, 1).reshape(tokens.shape[0], tokens.shape[2], *grid_hw)


def twin_attention(queries: Tensor, features: Tensor, state: State, name: str, grid_hw: tuple[int, int]) -> Tensor:
    """One head and one point at a time, by torch's own sampler."""
    height, width = grid_hw
    values = to_map(twin_linear(features, state, f"{name}.value"), grid_hw)
    sampling = twin_linear(queries, state, f"{name}.offsets_and_logits")
    offsets = sampling[..., : HEADS * POINTS * 2].reshape(*queries.shape[:2], HEADS, POINTS, 2)
    weights = sampling[..., HEADS * POINTS * 2 :].reshape(*queries.shape[:2], HEADS, POINTS).softmax(-1)
    own_cell = [((x + 0.5) / 2, (y + 0.5) / 2) for y in range(2 * height) for x in range(2 * width)]
    centres = torch.tensor(own_cell, dtype=queries.dtype)  # N 2
    per_head = values.shape[1] // HEADS
    heads = []
    for head in range(HEADS):
        plane = values[:, head * per_head : (head + 1) * per_head]
        read = torch.zeros(queries.shape[0], per_head, queries.shape[1], dtype=queries.dtype)
        for point in range(POINTS):
            places = (centres + offsets[:, :, head, point]) / torch.tensor([width, height], dtype=queries.dtype)
            sample = F.grid_sample(plane, (2 * places - 1)[:, None], padding_mode="zeros", align_corners=False)
            read = read + sample[:, :, 0] * weights[:, None, :, head, point]
        heads.append(read)
    return twin_linear(torch.cat(heads, dim=1).permute(0, 2, 1), state, f"{name}.out")


def twin_extractor(queries: Tensor, features: Tensor, state: State, name: str, grid_hw: tuple[int, int]) -> Tensor:
    normed = twin_norm(queries, state, f"{name}.query_norm"), twin_norm(features, state, f"{name}.feature_norm")
    queries = queries + twin_attention(*normed, state, f"{name}.attention", grid_hw)
    hidden = twin_linear(twin_norm(queries, state, f"{name}.ffn_norm"), state, f"{name}.ffn.down")
    kernel, bias = state[f"{name}.ffn.depthwise.weight"], state[f"{name}.ffn.depthwise.bias"]
    maps = to_map(hidden, (2 * grid_hw[0], 2 * grid_hw[1]))
    maps = F.conv2d(maps, kernel, bias, padding=1, groups=maps.shape[1])
    return queries + twin_linear(F.gelu(to_tokens(maps)), state, f"{name}.ffn.up")


def twin_adapter(state: State, pixels: Tensor, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    height, width = maps[0].shape[2:]
    x = twin_conv(pixels, state, "prior.stem.0", stride=2)
    x = twin_conv(twin_conv(x, state, "prior.stem.1", stride=1), state, "prior.stem.2", stride=1)
    quarter = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    eighth = twin_conv(quarter, state, "prior.down", stride=2)
    kernel = state["query.weight"][:, :, None, None]
    coarse = bilinear(F.conv2d(eighth, kernel, state["query.bias"]), (2 * height, 2 * width))
    queries = to_tokens(coarse) + state["level"]
    for index, source in enumerate([0, 1, 2, 3, 3, 3]):
        queries = twin_extractor(queries, to_tokens(maps[source]), state, f"extractors.{index}", (height, width))
    return bilinear(quarter, (4 * height, 4 * width)), to_map(queries, (2 * height, 2 * width))


def in_float64(module: nn.Module) -> State:
    return {key: tensor.detach().double() for key, tensor in module.state_dict().items()}


# ---------------------------------------------------------------- the adapter as a whole

GRIDS = [(4, 4), (3, 5), (6, 2), (1, 1)]


@pytest.mark.parametrize("grid_hw", GRIDS)
@pytest.mark.parametrize("patch_px", [14, 16])
def test_equals_twin(patch_px: int, grid_hw: tuple[int, int]) -> None:
    adapter = Adapter(WIDTH).eval()
    randomise(adapter)
    pixels, maps = random_input(grid_hw, patch_px)
    with torch.no_grad():
        found = adapter(pixels, maps)[:2]
    expected = twin_adapter(in_float64(adapter), pixels.double(), [each.double() for each in maps])
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape
        bound = 5e-6 * float(other.abs().max())  # the twin itself, run in float32, is off by up to 7e-7 of it
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=bound)


def test_equals_twin_in_float64_with_gradients() -> None:
    adapter = Adapter(WIDTH).double().eval()
    randomise(adapter)
    pixels, maps = random_input((3, 4), patch_px=14)
    pixels, maps = pixels.double(), [each.double() for each in maps]
    state = {key: each.detach().clone() for key, each in adapter.state_dict().items()}
    names = [name for name, _ in adapter.named_parameters()]
    for name in names:
        state[name].requires_grad_()
    found, expected = adapter(pixels, maps)[:2], twin_adapter(state, pixels, maps)
    losses = []
    for pair in (found, expected):
        losses.append(sum((each * torch.randn(each.shape, generator=generator(2)).double()).sum() for each in pair))
    ours = torch.autograd.grad(losses[0], list(adapter.parameters()))
    theirs = torch.autograd.grad(losses[1], [state[name] for name in names])
    for mine, other in zip((*found, *ours), (*expected, *theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)
    assert all(gradient.any() for gradient in ours), "a parameter without influence would prove nothing"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.0015), (torch.bfloat16, 0.012)])
def test_half_precision_finds_its_places_on_a_wide_grid(dtype: torch.dtype, bound: float) -> None:
    """Places near cell 200 in bfloat16 itself would be a whole cell apart."""
    extractor, grid_hw = Extractor(WIDTH).eval(), (1, 200)
    randomise(extractor)
    extractor.to(dtype)
    queries = torch.randn(1, 800, WIDTH, generator=generator(1)).to(dtype)
    features = torch.randn(1, 200, WIDTH, generator=generator(2)).to(dtype)
    with torch.no_grad():
        found = extractor(queries, features, grid_hw)
    state = {f"it.{key}": tensor for key, tensor in in_float64(extractor).items()}
    expected = twin_extractor(queries.double(), features.double(), state, "it", grid_hw)
    assert found.dtype == dtype
    assert (found.double() - expected).square().mean().sqrt() < bound  # of values whose own is 1.1


@pytest.mark.parametrize("grid_hw", GRIDS)
def test_the_blend_is_a_1x1_convolution_of_all_four_maps(grid_hw: tuple[int, int]) -> None:
    adapter = Adapter(WIDTH, blend=True).double().eval()
    randomise(adapter)
    pixels, maps = random_input(grid_hw, patch_px=14)
    maps = [each.double() for each in maps]
    kernel = adapter.blend.weight[..., None, None]
    expected = F.conv2d(torch.cat(maps, dim=1), kernel, adapter.blend.bias)
    torch.testing.assert_close(adapter(pixels.double(), maps)[2], expected, rtol=0, atol=1e-12)


def test_maps_may_lie_in_memory_as_they_like() -> None:
    adapter = Adapter(WIDTH, blend=True).eval()
    randomise(adapter)
    pixels, maps = random_input((3, 4), patch_px=16)
    last = torch.channels_last
    with torch.no_grad():
        found = adapter(pixels, maps)
        again = adapter(pixels.contiguous(memory_format=last), [each.contiguous(memory_format=last) for each in maps])
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- convolutions on the pixels


@pytest.mark.parametrize("stride", [1, 2])
def test_folded_norm_equals_unfolded(stride: int) -> None:
    layer = ConvNormRelu(5, 7, stride).double().eval()
    randomise(layer)
    x = torch.randn(2, 5, 9, 8, dtype=torch.float64, generator=generator(1))
    expected = twin_conv(x, {f"layer.{key}": each for key, each in layer.state_dict().items()}, "layer", stride)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_training_normalises_by_the_batch_and_keeps_statistics() -> None:
    layer = ConvNormRelu(5, 7, 2).double().train()
    randomise(layer)
    mean, variance = layer.norm.running_mean.clone(), layer.norm.running_var.clone()
    x = torch.randn(2, 5, 9, 8, dtype=torch.float64, generator=generator(1))
    raw = F.conv2d(x, layer.conv.weight, stride=2, padding=1)
    normed = F.batch_norm(raw, mean, variance, layer.norm.weight, layer.norm.bias, training=True, momentum=0.1)
    torch.testing.assert_close(layer(x), F.relu(normed), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.norm.running_mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.norm.running_var, variance, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid_hw", GRIDS)
@pytest.mark.parametrize("patch_px", [14, 16])
def test_prior_halves_three_times_rounding_up(patch_px: int, grid_hw: tuple[int, int]) -> None:
    height, width = grid_hw[0] * patch_px, grid_hw[1] * patch_px
    quarter, eighth = SpatialPrior().eval()(torch.zeros(2, 3, height, width))
    assert quarter.shape == (2, 64, math.ceil(height / 4), math.ceil(width / 4))
    assert eighth.shape == (2, 128, math.ceil(height / 8), math.ceil(width / 8))


def test_prior_is_resized_to_the_grid_only_where_it_differs() -> None:
    adapter = Adapter(WIDTH).eval()
    for patch_px, resized in ((16, False), (14, True)):
        pixels, maps = random_input((3, 5), patch_px)
        quarter = adapter.prior(pixels)[0]
        prior = adapter(pixels, maps)[0]
        assert prior.shape == (2, 64, 12, 20)
        assert (prior.shape != quarter.shape) == resized
        assert resized or torch.equal(prior, quarter)


# ---------------------------------------------------------------- stochastic depth


def extractor_and_parts(batch: int) -> tuple[Extractor, Tensor, Tensor, Tensor, Tensor]:
    """An extractor, one input for the whole batch, and what comes out without its last branch, and that branch."""
    extractor = Extractor(32).double().eval()
    randomise(extractor)
    queries = torch.randn(1, 4, 32, dtype=torch.float64, generator=generator(1)).expand(batch, -1, -1)
    features = torch.randn(1, 1, 32, dtype=torch.float64, generator=generator(2)).expand(batch, -1, -1)
    with torch.no_grad():
        normed = extractor.query_norm(queries), extractor.feature_norm(features)
        trunk = queries + extractor.attention(*normed, (1, 1))
        branch = extractor(queries, features, (1, 1)) - trunk
    assert branch.abs().amax() > 0.01
    return extractor, queries, features, trunk, branch


def test_training_drops_the_branch_of_whole_samples_and_keeps_its_mean() -> None:
    extractor, queries, features, trunk, branch = extractor_and_parts(1000)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        ratio = (extractor.train()(queries, features, (1, 1)) - trunk) / branch
    first = ratio[:, :1, :1]
    torch.testing.assert_close(ratio, first.expand_as(ratio), rtol=0, atol=1e-9)  # all of a sample or nothing
    kept = first.flatten() > 0.5
    torch.testing.assert_close(first.flatten(), kept.double() / 0.7, rtol=0, atol=1e-9)
    assert abs(float(kept.double().mean()) - 0.7) < 0.058  # four standard deviations of 1000 draws


def test_evaluation_drops_nothing() -> None:
    extractor, queries, features, trunk, branch = extractor_and_parts(64)
    with torch.no_grad():
        again = extractor.train().eval()(queries, features, (1, 1))
    torch.testing.assert_close(again, trunk + branch, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- where a fresh adapter looks


def test_every_head_starts_in_a_direction_of_its_own() -> None:
    layer = Extractor(WIDTH).attention.offsets_and_logits
    assert not layer.weight.any()
    offsets = layer.bias[: HEADS * POINTS * 2].view(HEADS, POINTS, 2)
    assert offsets.isfinite().all()
    for head in range(HEADS):
        for point in range(POINTS):
            x, y = offsets[head, point].tolist()
            turn = math.remainder(math.atan2(y, x) - 2 * math.pi * head / HEADS, 2 * math.pi)
            assert turn == pytest.approx(0, abs=1e-5)
            assert max(abs(x), abs(y)) == pytest.approx(point + 1, abs=1e-5)
    assert not layer.bias[HEADS * POINTS * 2 :].any()
