"""The student as a whole: what it starts as, what trains, which dtypes, sizes and compilers it takes, what it costs."""

import copy
import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ViTConfig
from brixel.errors import BrixelError
from brixel.model.adapter import Adapter
from brixel.model.config import AdapterConfig, default_blocks
from brixel.model.head import Head
from brixel.model.student import Student
from brixel.model.upsampler import Upsampler

BLOCKS = (0, 1, 2, 3)
COMMON = {"width": 64, "depth": 4, "heads": 2, "ffn": "mlp", "ffn_width": 128, "norm_eps": 1e-6}
CONFIGS = {
    16: ViTConfig(**COMMON, patch_px=16, positions="rotary", registers=2),
    14: ViTConfig(**COMMON, patch_px=14, positions="learned", native_grid=5, position_scale_offset=0.1),
}
PATCHES = sorted(CONFIGS)
GRIDS = [(1, 1), (2, 5), (6, 4)]


@pytest.fixture(autouse=True)
def _same_weights_every_time() -> None:
    torch.manual_seed(0)


def new_student(patch_px: int, **fields: object) -> Student:
    """A random backbone, with ``fields`` over its configuration, and a fresh adapter."""
    config = AdapterConfig(BLOCKS, residual_detour=False, short_side_px=16 * patch_px)
    backbone, upsampler = ViT(dataclasses.replace(CONFIGS[patch_px], **fields)), Upsampler(64, config)
    randomise(backbone)
    return Student(backbone, upsampler, config.blocks)


def trained_student(patch_px: int, **fields: object) -> Student:
    """The same with every parameter moved from where it starts."""
    student = new_student(patch_px, **fields)
    randomise(student.adapter)
    randomise(student.head)
    return student


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape))


def image(grid_hw: tuple[int, int], patch_px: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, grid_hw[0] * patch_px, grid_hw[1] * patch_px)


# ---------------------------------------------------------------- what it starts as


@pytest.mark.parametrize("grid_hw", GRIDS)
@pytest.mark.parametrize("patch_px", PATCHES)
def test_untrained_student_is_the_backbone_upsampled(patch_px: int, grid_hw: tuple[int, int]) -> None:
    student, pixels = new_student(patch_px), image(grid_hw, patch_px)
    with torch.no_grad():
        dense, coarse = student(pixels), student.backbone_features(pixels)
    assert coarse.shape == (2, 64, *grid_hw)
    size = (4 * grid_hw[0], 4 * grid_hw[1])
    assert torch.equal(dense, F.interpolate(coarse, size=size, mode="bilinear", align_corners=False))


def test_the_four_blocks_reach_the_adapter_and_the_last_the_head() -> None:
    config = AdapterConfig((0, 2, 3, 4), residual_detour=True, short_side_px=64)
    backbone = ViT(ViTConfig(**{**COMMON, "depth": 5}, patch_px=16, positions="rotary"))
    upsampler = Upsampler(64, config)
    for module in (backbone, upsampler):
        randomise(module)
    student, pixels = Student(backbone, upsampler, config.blocks), image((3, 4), 16)
    assert student.head.residual_detour
    with torch.no_grad():
        maps = [backbone.block_maps(pixels, [index])[0] for index in config.blocks]
        expected = student.head(*student.adapter(pixels, maps)[:2], maps[3])
        torch.testing.assert_close(student(pixels), expected, rtol=0, atol=1e-6)
        assert torch.equal(student.backbone_features(pixels), maps[3])


@pytest.mark.parametrize("patch_px", PATCHES)
def test_a_batch_is_its_images_one_by_one(patch_px: int) -> None:
    student = trained_student(patch_px)
    for grid_hw in GRIDS:
        pixels = image(grid_hw, patch_px, batch=3)
        with torch.no_grad():
            together, singles = student(pixels), torch.cat([student(each) for each in pixels.split(1)])
        assert together.isfinite().all()
        torch.testing.assert_close(together, singles, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_adapter_and_head_alone(training: bool) -> None:
    student = trained_student(16).train(training)
    student(image((2, 3), 16, batch=8)).square().mean().backward()
    for name, parameter in student.named_parameters():
        if name.startswith("backbone."):
            assert parameter.grad is None, name
            assert not parameter.requires_grad, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.slow
def test_a_fresh_student_learns() -> None:
    """It starts as the identity, but not at a point that gradients cannot leave."""
    student, pixels = new_student(16).train(), image((2, 3), 16, batch=4)
    target = torch.randn(student(pixels).shape)
    optimiser = torch.optim.Adam([each for each in student.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = F.l1_loss(student(pixels), target)
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert student.adapter.level.any(), "the far end of the adapter has not moved"


def test_backbone_stays_in_evaluation_mode() -> None:
    student = new_student(16)
    assert not any(each.training for each in student.modules())
    assert student.train() is student
    assert not any(each.training for each in student.backbone.modules())
    assert all(each.training for part in (student.adapter, student.head) for each in part.modules())
    assert not any(each.training for each in student.eval().modules())


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.03), (torch.bfloat16, 0.25)])
@pytest.mark.parametrize("patch_px", PATCHES)
def test_half_precision_stays_near_float32(patch_px: int, dtype: torch.dtype, bound: float) -> None:
    """Values reach 5 here; half of what is measured comes from the backbone. The bounds are three times that."""
    student, pixels = trained_student(patch_px), image((4, 6), patch_px)
    half = copy.deepcopy(student).to(dtype)
    with torch.no_grad():
        found, expected = half(pixels.to(dtype)), student(pixels)
    assert {each.dtype for each in half.parameters()} == {dtype}
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_untrained_student_is_the_backbone_upsampled_in_other_dtypes(dtype: torch.dtype) -> None:
    student, pixels = new_student(16).to(dtype), image((2, 3), 16).to(dtype)
    with torch.no_grad():
        coarse = student.backbone_features(pixels)
        assert torch.equal(student(pixels), F.interpolate(coarse, size=(8, 12), mode="bilinear", align_corners=False))


# ---------------------------------------------------------------- export and compilers


LEARNED = {"position_scale_offset": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch_px", "fields"),
    [
        (16, {}),
        (14, LEARNED),
        (14, {**LEARNED, "position_antialias": True}),
        (14, {**LEARNED, "position_scale_offset": 0.1}),
    ],
)
def test_export_with_dynamic_sizes_equals_eager(patch_px: int, fields: dict[str, object]) -> None:
    student = trained_student(patch_px, **fields)
    batch, height, width = (torch.export.Dim(name, min=low, max=64) for name, low in (("b", 1), ("h", 2), ("w", 2)))
    sizes = {"pixels": {0: batch, 2: patch_px * height, 3: patch_px * width}}
    with torch.no_grad():
        exported = torch.export.export(student, (image((3, 5), patch_px),), dynamic_shapes=sizes).module()
        for count, grid_hw in ((2, (3, 5)), (1, (2, 2)), (3, (7, 4)), (1, (5, 5))):
            pixels = image(grid_hw, patch_px, batch=count)
            torch.testing.assert_close(exported(pixels), student(pixels), rtol=0, atol=1e-5)


def compiled_equals_eager(backend: str, *grids: tuple[int, int]) -> None:
    torch.compiler.reset()
    student = trained_student(16)
    compiled = torch.compile(student, fullgraph=True, backend=backend)
    with torch.no_grad():
        for grid_hw in grids:
            pixels = image(grid_hw, 16)
            torch.testing.assert_close(compiled(pixels), student(pixels), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_parts_compile_without_graph_breaks() -> None:
    """A quick check of the patterns of einops; the slow tests below compile the whole student."""
    torch.compiler.reset()
    student = trained_student(16)
    block, extractor, fusion = student.backbone.blocks[0], student.adapter.extractors[0], student.head.fusion
    tokens, queries, grid_hw = torch.randn(2, 6, 64), torch.randn(2, 24, 64), (2, 3)
    prior, coarse = torch.randn(2, 64, 8, 12), torch.randn(2, 64, 4, 6)
    with torch.no_grad():
        for part, inputs in (
            (block, (tokens, None)),
            (extractor, (queries, tokens, grid_hw)),
            (fusion, (prior, coarse)),
        ):
            compiled = torch.compile(part, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(*inputs), part(*inputs), rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_for_any_size(backend: str) -> None:
    compiled_equals_eager(backend, (3, 5), (4, 2), (2, 7))  # the second size makes the first one's graph dynamic


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on PATH")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while it imports its compiler
def test_default_compiler_equals_eager() -> None:
    compiled_equals_eager("inductor", (3, 5))


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize(("width", "gigaflops", "limit"), [(384, 6.154, 6.6), (768, 13.400, 14.3)])
def test_floating_point_operations(width: int, gigaflops: float, limit: float) -> None:
    """Adapter and head of ViT-S/16 and ViT-B/16 on one image of 256 px, a multiply-add counted as two."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        adapter, head = Adapter(width).eval(), Head(width, residual_detour=True).eval()
        maps = [torch.empty(1, width, 16, 16) for _ in BLOCKS]
        dense = head(*adapter(torch.empty(1, 3, 256, 256), maps))
    assert dense.shape == (1, width, 64, 64)
    counted = counter.get_total_flops() / 1e9
    assert counted <= limit
    assert counted == pytest.approx(gigaflops, rel=0.01)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("blocks", [(), (0, 1, 3), (0, 1, 2, 3, 4), (3, 2, 1, 0), (-1, 0, 1, 2), (0, 2, 1, 3)])
def test_blocks_must_be_four_in_order(blocks: tuple[int, ...]) -> None:
    with pytest.raises(BrixelError, match="expected four indices from 0, in ascending order") as raised:
        AdapterConfig(blocks, residual_detour=False, short_side_px=256)
    assert f"AdapterConfig.blocks is {blocks}" in str(raised.value)


def test_blocks_may_come_as_a_list() -> None:
    assert AdapterConfig([0, 1, 2, 3], residual_detour=False, short_side_px=256).blocks == (0, 1, 2, 3)


@pytest.mark.parametrize("blocks", [(0, 1, 1, 2), (0, 1, 2, 4)])
def test_last_block_must_be_the_backbones(blocks: tuple[int, ...]) -> None:
    parts = Upsampler(64, AdapterConfig(blocks, residual_detour=False, short_side_px=256))
    with pytest.raises(BrixelError, match="the last must be the backbone's last, 3"):
        Student(ViT(CONFIGS[16]), parts, blocks)


@pytest.mark.parametrize("side", [0, -16, 256.0, "256"])
def test_short_side_must_be_a_positive_whole_number(side: object) -> None:
    with pytest.raises(BrixelError, match="AdapterConfig.short_side_px is .*; expected a whole number from 1 to"):
        AdapterConfig(BLOCKS, residual_detour=False, short_side_px=side)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [16, 80, 100])
def test_width_must_be_a_multiple_of_the_groups(width: int) -> None:
    with pytest.raises(BrixelError, match=f"the backbone is {width} wide; a trained adapter needs a multiple of 32"):
        Upsampler(width, AdapterConfig(BLOCKS, residual_detour=False, short_side_px=256))


@pytest.mark.parametrize("shape", [(1, 3, 40, 64), (1, 3, 64, 17), (1, 1, 32, 32), (3, 32, 32), (1, 3, 0, 32)])
def test_pixels_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BrixelError, match="expected"):
        new_student(16)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("depth", "blocks"), [(12, (3, 6, 9, 11)), (24, (6, 12, 18, 23)), (32, (8, 16, 24, 31)), (4, (0, 1, 2, 3))]
)
def test_default_blocks_are_the_released_ones(depth: int, blocks: tuple[int, ...]) -> None:
    assert default_blocks(depth) == blocks


@pytest.mark.parametrize("depth", range(4, 41))
def test_default_blocks_suit_any_backbone(depth: int) -> None:
    blocks = default_blocks(depth)
    assert len(set(blocks)) == 4
    assert blocks[-1] == depth - 1
    AdapterConfig(blocks, residual_detour=False, short_side_px=256)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_too_shallow_a_backbone_has_no_default_blocks(depth: int) -> None:
    with pytest.raises(BrixelError, match=f"a backbone of {depth} blocks has no default choice of four"):
        default_blocks(depth)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.25), (torch.float16, 0.03)])
def test_autocast_runs_forward_and_backward(dtype: torch.dtype, bound: float) -> None:
    """The bounds are those of half-precision weights; parameters and gradients stay float32."""
    student, pixels = trained_student(16), image((1, 2), 16)  # on CPUs convolutions in float16 are slow
    expected = student(pixels)
    with torch.autocast("cpu", dtype):
        found = student(pixels)
    assert (found - expected).abs().max() < bound
    found.square().mean().backward()
    gradients = [each.grad for part in (student.adapter, student.head) for each in part.parameters()]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
