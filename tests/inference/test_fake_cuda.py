"""CUDA without a card: fake tensors on device "cuda" go through every kind of model, and must meet no tensor elsewhere.

Needs a build of torch with CUDA; shapes, dtypes and devices are computed, values are not.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from brixel import BrixelFeatures
from brixel.inference.memory import planner as planning
from brixel.inference.memory.allocation_tracker import copy_with
from brixel.inference.memory.planner import Planner
from brixel.inference.memory.prediction import Job
from brixel.inference.memory.strategies import RowChunks, Strategy, Tiles, Whole
from brixel.model.losses import LossWeights, total_loss

NEWER = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"  # earlier fake tensors ask a driver
pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch has no CUDA"),
    pytest.mark.skipif(not NEWER, reason="fake tensors on cuda need a driver before torch 2.13"),
]
GRID = (6, 9)
MODELS = {
    "DINOv3, released": ("dinov3-vits16", {"detour": True, "blend": False}),
    "DINOv3, second generation": ("dinov3-vits16", {"blend": True, "generation": 2, "grids": (2, 4)}),
    "DINOv2, first generation": ("dinov2-vits14", {"blend": True}),
    "DINOv2 with registers, universal": ("dinov2-vits14-reg4", {"kind": "universal"}),
    "SigLIP 2, universal": ("siglip2-base-patch16-512", {"kind": "universal"}),
    "SigLIP 2 NaFlex, bilinear": ("siglip2-base-patch16-naflex", {"kind": "bilinear"}),
}


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode()


@pytest.fixture(params=MODELS)
def model(request, random_model) -> BrixelFeatures:
    architecture, fields = MODELS[request.param]
    return copy.deepcopy(random_model(architecture, **fields)).requires_grad_(False).eval()


def on_cuda(model: BrixelFeatures, mode: FakeTensorMode, dtype: torch.dtype) -> BrixelFeatures:
    def change(weight: Tensor) -> Tensor:
        fake = mode.from_tensor(weight)
        with mode:  # outside it torch would look for a card
            return fake.to("cuda", dtype if weight.is_floating_point() else weight.dtype)

    return copy_with(model, change)


@contextmanager
def autocast_to_bfloat16() -> Iterator[None]:
    """What ``torch.autocast`` switches on, which it does where there is a card alone."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def pixels_of(model: BrixelFeatures, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, GRID[0] * model.patch_px, GRID[1] * model.patch_px)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward(model, mode, dtype):
    student = on_cuda(model, mode, dtype)
    with mode, torch.no_grad():
        maps = student(pixels_of(model).to("cuda", dtype))
    assert (maps.device.type, maps.dtype) == ("cuda", dtype)
    assert maps.shape == (2, 64, 4 * GRID[0], 4 * GRID[1])


def test_autocast(model, mode):
    student = on_cuda(model, mode, torch.float32)
    with mode, torch.no_grad(), autocast_to_bfloat16():
        maps = student(pixels_of(model).cuda())
    assert maps.device.type == "cuda"


def test_other_scales(model, mode):
    if not model.upsampler.any_scale:
        pytest.skip("this adapter has one scale")
    student = on_cuda(model, mode, torch.bfloat16).at_scale(3)
    with mode, torch.no_grad():
        assert student(pixels_of(model).cuda().bfloat16()).shape[2:] == (3 * GRID[0], 3 * GRID[1])


@pytest.mark.parametrize("strategy", [Whole(1), Whole(2), RowChunks(2), Tiles(8)], ids=lambda strategy: strategy.name)
def test_strategies_bring_maps_to_the_host(model, mode, strategy: Strategy):
    student = on_cuda(model, mode, torch.bfloat16)
    with mode:
        outputs = strategy.run(student, pixels_of(model))
    assert [(out.device.type, out.dtype, tuple(out.shape)) for out in outputs] == [
        ("cpu", torch.bfloat16, (64, 4 * GRID[0], 4 * GRID[1]))
    ] * 2


def test_training_mode_under_autocast(model, mode):
    """Forward and loss; backward needs a card, and edge and spectral loss need values."""
    student = on_cuda(model, mode, torch.float32)
    with mode, autocast_to_bfloat16():
        maps = student.train()(pixels_of(model).cuda())
        loss, _ = total_loss(maps, maps.detach().float(), LossWeights(l1=1, cosine=1, edge=0, spectral=0))
    assert loss.device.type == "cuda"


def test_the_planner(model, mode, monkeypatch):
    monkeypatch.setattr(planning, "free_bytes", lambda device: 2**33)
    student = on_cuda(model, mode, torch.bfloat16)
    job = Job(2, (GRID[0] * model.patch_px, GRID[1] * model.patch_px))
    plan = Planner(student, None, "auto").plan(job)
    assert (plan.strategy, plan.device) == ("whole", "cuda:0")
    assert Planner(student, 1000, "never").plan(job).device == "cpu"  # too little: the host computes it
