"""The head and its fusion against the plain way of computing them, after `docs/method.md`, section 1, steps 4 to 6."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brixel.model.head import Fusion, Head, fused_moments

WIDTH, PRIOR, TRUNK = 96, 64, 64
GRIDS = [(1, 1), (1, 4), (3, 2), (5, 7)]  # patches; the prior lies on four times, the queries on two times as many
State = dict[str, Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(module: nn.Module) -> None:
    """Every parameter moved from where it starts, so that none is zero or one."""
    made = generator()
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=made).to(tensor.dtype))


def random_maps(grid_hw: tuple[int, int], batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Prior, queries and the last map in float64; every channel with a mean and a spread of its own."""
    made = generator(1)
    maps = []
    for channels, cells in ((PRIOR, 4), (WIDTH, 2), (WIDTH, 1)):
        shape = (batch, channels, cells * grid_hw[0], cells * grid_hw[1])
        mean, spread = (
            torch.randn(1, channels, 1, 1, generator=made),
            0.5 + torch.rand(1, channels, 1, 1, generator=made),
        )
        maps.append((torch.randn(shape, generator=made) * spread + mean).double())
    return maps[0], maps[1], maps[2]


def bilinear(maps: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=grid_hw, mode="bilinear", align_corners=False)


def conv1x1(maps: Tensor, state: State, name: str) -> Tensor:
    return F.conv2d(maps, state[f"{name}.weight"][:, :, None, None], state[f"{name}.bias"])


def channel_norm(maps: Tensor, state: State, name: str) -> Tensor:
    """LayerNorm over channels, written out."""
    centred = maps - maps.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return normed * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def fused_map(state: State, prior: Tensor, queries: Tensor, name: str) -> Tensor:
    """What the group norm sees: (B, D, 4h, 4w)."""
    return conv1x1(prior, state, f"{name}fine") + bilinear(queries, tuple(prior.shape[2:]))


def twin_fusion(state: State, prior: Tensor, queries: Tensor, name: str = "") -> Tensor:
    joined = fused_map(state, prior, queries, name)
    joined = F.group_norm(joined, 32, state[f"{name}norm.weight"], state[f"{name}norm.bias"], eps=1e-5)
    return conv1x1(joined, state, f"{name}align")


def twin_head(state: State, prior: Tensor, queries: Tensor, last_map: Tensor, *, detour: bool) -> Tensor:
    height, width = last_map.shape[2:]
    aligned = twin_fusion(state, prior, queries, "fusion.")
    trunk = aligned
    for index in range(3):
        name = f"trunk.{index}"
        kernel, bias = state[f"{name}.depthwise.weight"], state[f"{name}.depthwise.bias"]
        x = F.conv2d(channel_norm(trunk, state, f"{name}.norm"), kernel, bias, padding=1, groups=TRUNK)
        x = conv1x1(F.gelu(conv1x1(F.gelu(x), state, f"{name}.pointwise1")), state, f"{name}.pointwise2")
        trunk = trunk + x
    mixed = F.conv2d(aligned + trunk, state["mix.weight"], state["mix.bias"], padding=1, groups=4)
    base = bilinear(last_map, (max(1, height // 2), max(1, width // 2))) if detour else last_map
    return conv1x1(channel_norm(mixed, state, "norm"), state, "out") + bilinear(base, (4 * height, 4 * width))


def copied_state(module: nn.Module) -> State:
    """A module's parameters as leaves of their own, float64."""
    return {key: each.detach().double().clone().requires_grad_() for key, each in module.state_dict().items()}


@pytest.fixture(autouse=True)
def _same_weights_every_time() -> None:
    torch.manual_seed(0)


def new_fusion(dtype: torch.dtype = torch.float64) -> Fusion:
    fusion = Fusion(WIDTH)
    randomise(fusion)
    return fusion.to(dtype)


def new_head(*, detour: bool) -> Head:
    head = Head(WIDTH, residual_detour=detour).double()
    randomise(head)
    return head


# ---------------------------------------------------------------- fusion


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("grid_hw", GRIDS)
def test_fusion_equals_the_plain_way(grid_hw: tuple[int, int], dtype: torch.dtype, bound: float) -> None:
    fusion = new_fusion(dtype)
    prior, queries, _ = (each.to(dtype) for each in random_maps(grid_hw))
    found = fusion(prior, queries)
    assert found.dtype == dtype
    expected = twin_fusion(copied_state(fusion), prior.double(), queries.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("grid_hw", GRIDS)
def test_fusion_has_the_gradients_of_the_plain_way(grid_hw: tuple[int, int], dtype: torch.dtype, bound: float) -> None:
    fusion = new_fusion(dtype)
    prior, queries, _ = (each.to(dtype).requires_grad_() for each in random_maps(grid_hw))
    plain = copied_state(fusion)
    plain_prior, plain_queries = (each.detach().double().requires_grad_() for each in (prior, queries))
    out = fusion(prior, queries)
    direction = torch.randn(out.shape, generator=generator(2)).to(dtype)
    ours = torch.autograd.grad(out, [prior, queries, *fusion.parameters()], direction)
    expected = twin_fusion(plain, plain_prior, plain_queries)
    leaves = [plain_prior, plain_queries, *(plain[name] for name, _ in fusion.named_parameters())]
    theirs = torch.autograd.grad(expected, leaves, direction.double())
    for mine, other in zip(ours, theirs, strict=True):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=bound * scale)


@pytest.mark.parametrize("grid_hw", GRIDS)
def test_moments_are_those_of_the_fused_map(grid_hw: tuple[int, int]) -> None:
    fusion = new_fusion()
    prior, queries, _ = random_maps(grid_hw)
    mean, variance = fused_moments(prior, queries, fusion.fine.weight, fusion.fine.bias)
    joined = fused_map(copied_state(fusion), prior, queries, "")
    torch.testing.assert_close(mean, joined.mean((2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(variance, joined.var((2, 3), correction=0), rtol=0, atol=1e-12)


def test_constant_maps_have_no_variance() -> None:
    fusion = new_fusion()
    prior, queries = torch.full((1, PRIOR, 8, 12), 3.0).double(), torch.full((1, WIDTH, 4, 6), -5.0).double()
    mean, variance = fused_moments(prior, queries, fusion.fine.weight, fusion.fine.bias)
    torch.testing.assert_close(mean, 3 * fusion.fine.weight.sum(1)[None] + fusion.fine.bias - 5, rtol=0, atol=1e-12)
    assert variance.abs().max() < 1e-20
    assert fusion(prior, queries).isfinite().all()


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_large_offsets_do_not_cancel(offset: float) -> None:
    """Maps of spread 1 around a mean of ``offset``: squares minus squared means would lose every digit of float32."""
    fusion = new_fusion(torch.float32)
    prior, queries, _ = ((each + offset).float() for each in random_maps((5, 7)))
    moments = fused_moments(prior, queries, fusion.fine.weight, fusion.fine.bias)
    joined = fused_map(copied_state(fusion), prior.double(), queries.double(), "")
    torch.testing.assert_close(moments[0].double(), joined.mean((2, 3)), rtol=1e-6, atol=1e-6 * offset)
    torch.testing.assert_close(moments[1].double(), joined.var((2, 3), correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("offset", [1.0, 1e3])
def test_common_offset_of_the_queries_changes_little(offset: float) -> None:
    """The norm removes it; what is left is float32's rounding of values near it (1e-6 of it in the plain way too)."""
    fusion = new_fusion(torch.float32)
    prior, queries, _ = (each.float() for each in random_maps((5, 7)))
    queries = queries + offset
    expected = twin_fusion(copied_state(fusion), prior.double(), queries.double())
    torch.testing.assert_close(fusion(prior, queries).double(), expected, rtol=0, atol=1e-5 + 3e-6 * offset)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
def test_fusion_in_half_precision(dtype: torch.dtype, bound: float) -> None:
    fusion = new_fusion(dtype)
    prior, queries, _ = (each.to(dtype) for each in random_maps((5, 7)))
    found = fusion(prior, queries)
    expected = twin_fusion(copied_state(fusion), prior.double(), queries.double())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


def test_half_precision_moments_do_not_overflow() -> None:
    """Sums of squares beyond 65504, the largest float16."""
    fusion = new_fusion(torch.float16)
    prior, queries, _ = ((100 * each).half() for each in random_maps((8, 8)))
    found = fusion(prior, queries)
    expected = twin_fusion(copied_state(fusion), prior.double(), queries.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.01)


# ---------------------------------------------------------------- head


@pytest.mark.parametrize("detour", [False, True])
@pytest.mark.parametrize("grid_hw", GRIDS)
def test_head_equals_twin(grid_hw: tuple[int, int], detour: bool) -> None:
    head = new_head(detour=detour)
    maps = random_maps(grid_hw)
    found = head(*maps)
    assert found.shape == (2, WIDTH, 4 * grid_hw[0], 4 * grid_hw[1])
    expected = twin_head(copied_state(head), *maps, detour=detour)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_head_has_the_gradients_of_its_twin() -> None:
    head, maps = new_head(detour=True), [each.requires_grad_() for each in random_maps((3, 5))]
    plain, plain_maps = copied_state(head), [each.detach().clone().requires_grad_() for each in maps]
    out, expected = head(*maps), twin_head(plain, *plain_maps, detour=True)
    direction = torch.randn(out.shape, generator=generator(2)).double()
    ours = torch.autograd.grad(out, [*maps, *head.parameters()], direction)
    leaves = [*plain_maps, *(plain[name] for name, _ in head.named_parameters())]
    for mine, other in zip(ours, torch.autograd.grad(expected, leaves, direction), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_detour_matters() -> None:
    maps = random_maps((4, 6))
    straight, around = new_head(detour=False), new_head(detour=True)
    around.load_state_dict(straight.state_dict())
    assert (straight(*maps) - around(*maps)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("grid_hw", GRIDS)
def test_fresh_head_is_the_upsampled_map(grid_hw: tuple[int, int], dtype: torch.dtype) -> None:
    head = Head(WIDTH, residual_detour=False).to(dtype)
    prior, queries, last_map = (each.to(dtype) for each in random_maps(grid_hw))
    size = (4 * grid_hw[0], 4 * grid_hw[1])
    assert torch.equal(head(prior, queries, last_map), bilinear(last_map, size))


@pytest.mark.parametrize("grid_hw", GRIDS)
def test_fresh_head_with_detour_goes_down_then_up(grid_hw: tuple[int, int]) -> None:
    head = Head(WIDTH, residual_detour=True).double()
    maps = random_maps(grid_hw)
    down = bilinear(maps[2], (max(1, grid_hw[0] // 2), max(1, grid_hw[1] // 2)))
    assert torch.equal(head(*maps), bilinear(down, (4 * grid_hw[0], 4 * grid_hw[1])))


@pytest.mark.parametrize("grid_hw", [*GRIDS, (1, 2), (3, 2), (5, 9)])
def test_the_detour_of_exported_graphs_is_the_same(grid_hw: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    head, maps = Head(WIDTH, residual_detour=True).double(), random_maps(grid_hw)
    expected = head(*maps)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(head(*maps), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("detour", [False, True])
def test_bias_is_added_to_every_cell(detour: bool) -> None:
    head = Head(WIDTH, residual_detour=detour).double()
    maps = random_maps((3, 4))
    before = head(*maps)
    bias = torch.arange(WIDTH, dtype=torch.float64)
    with torch.no_grad():
        head.out.bias.copy_(bias)
    torch.testing.assert_close(head(*maps), before + bias[:, None, None], rtol=0, atol=1e-12)


def test_inputs_are_left_as_they_were() -> None:
    maps = random_maps((3, 4))
    before = [each.clone() for each in maps]
    new_head(detour=False)(*maps)
    assert all(torch.equal(one, other) for one, other in zip(maps, before, strict=True))
