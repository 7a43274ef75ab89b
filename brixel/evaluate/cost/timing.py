"""Models with random weights, and what their forward passes cost: time, operations, peak memory.

Calls that are compared are timed in turn within one process, so that the load of the machine affects all of them alike.
"""

import functools
import multiprocessing
import time
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from brixel.backbones.registry import known_backbone
from brixel.backbones.vit import ViT
from brixel.brixel_features import BrixelFeatures
from brixel.checkpoints.fingerprint import fingerprint
from brixel.errors import BrixelError
from brixel.images.patch_grid import whole_patches
from brixel.model.config import AdapterConfig, BackboneConfig, BrixelConfig, default_blocks
from brixel.model.student import Student
from brixel.model.upsampler import UPSCALE, GuidedUpsampler, Upsampler
from brixel.utils.memory import peak_bytes

Key = TypeVar("Key")
STUDENT, UNIVERSAL, BACKBONE, LARGE = "student", "universal", "backbone alone", "backbone alone, image x 4"
WARM_UP = 3
SLOW_EVERY = 5  # rounds


def random_student(architecture: str, *, residual_detour: bool = True, blend: bool = False) -> Student:
    """A student with random weights, of the released shape by default; no layer is zero, as a fresh head's last is."""
    return _random_student(architecture, residual_detour, blend)[0]


def random_model(architecture: str) -> BrixelFeatures:
    """A model with random weights, of the shape that training gives."""
    student, adapter = _random_student(architecture, residual_detour=False, blend=True)
    backbone = BackboneConfig(architecture, (), known_backbone(architecture).vit, fingerprint(student.backbone))
    return BrixelFeatures(student.backbone, student.upsampler, BrixelConfig(backbone, adapter)).eval()


def _random_student(architecture: str, residual_detour: bool, blend: bool) -> tuple[Student, AdapterConfig]:
    torch.manual_seed(0)
    vit = known_backbone(architecture).vit
    config = AdapterConfig(default_blocks(vit.depth), residual_detour, short_side_px=256, blend=blend)
    upsampler = Upsampler(vit.width, config)
    torch.nn.init.normal_(upsampler.head.out.weight, std=0.02)
    return Student(ViT(vit), upsampler, config.blocks), config


def check_side(architecture: str, image_px: int) -> None:
    """Raise BrixelError for an unknown architecture, or for a side that is not a multiple of its patch size."""
    patch_px = known_backbone(architecture).vit.patch_px
    if image_px % patch_px:
        near = whole_patches(image_px, patch_px)
        raise BrixelError(
            f"{architecture} takes multiples of {patch_px} px, and a side is {image_px} px; such as {near}"
        )


def variants(student: Student, image_px: int, batch: int = 1) -> dict[str, Callable[[], Tensor]]:
    """The calls that are compared, by name, on ``batch`` square images of random numbers.

    An image is made by the first call that needs it, so that the peak memory of a call includes no other's image.
    """

    @functools.cache
    def image(side: int) -> Tensor:
        return torch.randn(batch, 3, side, side).to(student.device, student.dtype)

    with student.device:
        guided = GuidedUpsampler(student.backbone.mean, student.backbone.std).to(student.dtype)
    universal = Student(student.backbone, guided, student.blocks[-1:])
    return {
        BACKBONE: lambda: student.backbone_features(image(image_px)),
        UNIVERSAL: lambda: universal(image(image_px)),
        STUDENT: lambda: student(image(image_px)),
        LARGE: lambda: student.backbone_features(image(UPSCALE * image_px)),
    }


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run with ``count`` threads of torch, and restore the number after; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_in_turn(
    calls: Mapping[Key, Callable[[], Tensor]], rounds: int, device: torch.device, slow: Container[Key] = ()
) -> dict[Key, list[float]]:
    """Seconds of every call in every round, all calls in turn, after rounds of warm-up.

    On a CPU the ``slow`` calls run in one round of five only: 0, 5, 10 and so on.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for turn in range(-WARM_UP, rounds):
            for name, call in calls.items():
                if name in slow and device.type == "cpu" and turn != -1 and (turn < 0 or turn % SLOW_EVERY):
                    continue
                elapsed = seconds_of(call, device)
                if turn >= 0:
                    seconds[name].append(elapsed)
    return seconds


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes, until the device has finished it."""
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        (torch.cuda if device.type == "cuda" else torch.mps).synchronize()
    return time.perf_counter() - start


def flops_of(call: Callable[[], Tensor]) -> int:
    """Operations of matrix products, convolutions and attention, two for each multiply-add."""
    # torch 2.13 does not count the CPU's attention kernel; plain matrix products are counted on every device
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return int(counter.get_total_flops())


def peak_bytes_of(
    architecture: str, variant: str, image_px: int, device: torch.device, dtype: torch.dtype
) -> int | None:
    """Peak memory of a new process that runs one variant: resident on a CPU, allocated on CUDA, None elsewhere."""
    arguments = (architecture, variant, image_px, device, dtype, torch.get_num_threads())
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_of_this_process, *arguments).result()


def _peak_of_this_process(
    architecture: str, variant: str, image_px: int, device: torch.device, dtype: torch.dtype, threads: int
) -> int | None:
    torch.set_num_threads(threads)
    student = random_student(architecture).to(device, dtype)
    call = variants(student, image_px)[variant]
    with torch.inference_mode():
        for _ in range(1 if variant == LARGE else 2):
            call()
    return peak_bytes(device)
