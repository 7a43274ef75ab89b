"""What a student costs beside its backbone: time, operations, parameters, memory; on random weights.

Times of the variants are taken in turn within one run, so that what else the machine does falls on all of them alike.
"""

import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from brixel.backbones.registry import known_backbone
from brixel.backbones.vit import ViT
from brixel.errors import BrixelError
from brixel.model.config import AdapterConfig, default_blocks
from brixel.model.student import Student
from brixel.model.upsampler import UPSCALE, Upsampler
from brixel.utils.devices import choose_device, choose_dtype, describe_machine, dtype_name
from brixel.utils.memory import peak_bytes

Key = TypeVar("Key")
DEFAULT_ARCHITECTURES = ("dinov3-vits16", "dinov3-vitb16")
STUDENT, BACKBONE, LARGE = "student", "backbone alone", "backbone alone, image x 4"
_WARM_UP = 3
_SELDOM = 5  # the large image takes long: on a CPU it is timed in one round of five


@dataclass(frozen=True)
class Result:
    """One architecture's figures; the mappings are by variant, seconds a list over the rounds."""

    architecture: str
    seconds: Mapping[str, Sequence[float]]
    flops: Mapping[str, int]
    peak_bytes: Mapping[str, int | None]
    parameters: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """The results of a run and how it was made."""

    results: Sequence[Result]
    recipe: str


def random_student(architecture: str) -> Student:
    """A student of released shape with random weights, its last layer too, so that nothing is a product with zero."""
    torch.manual_seed(0)
    vit = known_backbone(architecture).vit
    config = AdapterConfig(default_blocks(vit.depth), residual_detour=True, short_side_px=256)
    upsampler = Upsampler(vit.width, config)
    torch.nn.init.normal_(upsampler.head.out.weight, std=0.02)
    return Student(ViT(vit), upsampler, config.blocks)


def check_side(architecture: str, image_px: int) -> None:
    """Raise BrixelError for an unknown architecture, and for a side of an image that is no whole patches of it."""
    patch_px = known_backbone(architecture).vit.patch_px
    if image_px % patch_px:
        near = max(1, round(image_px / patch_px)) * patch_px
        raise BrixelError(
            f"{architecture} takes multiples of {patch_px} px, and a side is {image_px} px; such as {near}"
        )


def variants(student: Student, image_px: int, like: Tensor, batch: int = 1) -> dict[str, Callable[[], Tensor]]:
    """The calls that are compared, by name, on ``batch`` images; ``like`` gives device and dtype.

    Images are drawn when they are first looked at: memory is of what is called alone.
    """

    @functools.cache
    def image(side: int) -> Tensor:
        return torch.randn(batch, 3, side, side).to(like)

    return {
        BACKBONE: lambda: student.backbone_features(image(image_px)),
        STUDENT: lambda: student(image(image_px)),
        LARGE: lambda: student.backbone_features(image(UPSCALE * image_px)),
    }


def benchmark(
    architectures: Sequence[str],
    *,
    image_px: int = 256,
    rounds: int = 20,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Report:
    """Measure students of the named architectures on one image of ``image_px`` x ``image_px`` pixels."""
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    for name in architectures:  # an error should not cost the time of those before it
        check_side(name, image_px)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        results = [_measure(name, image_px, rounds, where, kind) for name in architectures]
        recipe = _recipe(image_px, rounds, where, kind)
    finally:
        torch.set_num_threads(before)
    return Report(results, recipe)


def _measure(architecture: str, image_px: int, rounds: int, device: torch.device, dtype: torch.dtype) -> Result:
    peaks = {name: peak_bytes_of(architecture, name, image_px, device, dtype) for name in (BACKBONE, STUDENT, LARGE)}
    student = random_student(architecture).to(device, dtype)
    calls = variants(student, image_px, next(student.backbone.parameters()))
    with torch.inference_mode():
        flops = {name: flops_of(call) for name, call in calls.items()}
    seconds = seconds_in_turn(calls, rounds, device, seldom=(LARGE,))
    counts = {
        "backbone": sum(each.numel() for each in student.backbone.parameters()),
        "adapter and head": sum(each.numel() for part in (student.adapter, student.head) for each in part.parameters()),
    }
    return Result(architecture, seconds, flops, peaks, counts)


def seconds_in_turn(
    calls: Mapping[Key, Callable[[], Tensor]], rounds: int, device: torch.device, seldom: Container[Key] = ()
) -> dict[Key, list[float]]:
    """Seconds of every call, one after another in each round, after rounds that do not count.

    ``seldom``: those that take long, and run on a CPU in one round of five, after one that does not count.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for turn in range(-_WARM_UP, rounds):
            for name, call in calls.items():
                if name in seldom and device.type == "cpu" and turn != -1 and (turn < 0 or turn % _SELDOM):
                    continue
                elapsed = seconds_of(call, device)
                if turn >= 0:
                    seconds[name].append(elapsed)
    return seconds


def seconds_of(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds that one call takes, until the device is done with it."""
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        (torch.cuda if device.type == "cuda" else torch.mps).synchronize()
    return time.perf_counter() - start


def flops_of(call: Callable[[], Tensor]) -> int:
    """Operations of matrix products, convolutions and attention, two for each multiply-add."""
    # torch 2.13 counts nothing for the attention kernel that the CPU takes: as plain products it is counted everywhere
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return int(counter.get_total_flops())


def peak_bytes_of(
    architecture: str, variant: str, image_px: int, device: torch.device, dtype: torch.dtype
) -> int | None:
    """Peak memory of a fresh process that runs one variant: resident on the CPU, allocated on CUDA; else None."""
    context = multiprocessing.get_context("spawn")
    arguments = (architecture, variant, image_px, str(device), dtype, torch.get_num_threads())
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak_of_this_process, *arguments).result()


def _peak_of_this_process(
    architecture: str, variant: str, image_px: int, device: str, dtype: torch.dtype, threads: int
) -> int | None:
    torch.set_num_threads(threads)
    student = random_student(architecture).to(device, dtype)
    call = variants(student, image_px, next(student.backbone.parameters()))[variant]
    with torch.inference_mode():
        for _ in range(1 if variant == LARGE else 2):
            call()
    return peak_bytes(torch.device(device))


def _recipe(image_px: int, rounds: int, device: torch.device, dtype: torch.dtype) -> str:
    return (
        f"One image of {image_px} x {image_px} px, {dtype_name(dtype)}, random weights, {rounds} rounds in turn; "
        f"{describe_machine(device)}."
    )


def report(run: Report, command: str) -> str:
    """The run as Markdown: a table with medians, ranges and ratios, the recipe, and the command that made it."""
    lines = [
        "# What a student costs beside its backbone",
        "",
        "| architecture | variant | time, ms: median (min to max) | of its backbone's | GFLOP | peak memory, MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for result in run.results:
        for variant, seconds in result.seconds.items():
            peak = result.peak_bytes[variant]
            lines.append(
                f"| {result.architecture} | {variant} | {_range(seconds)} | {_ratio(result, variant)} "
                f"| {result.flops[variant] / 1e9:.2f} | {'-' if peak is None else f'{peak / 2**20:.0f}'} |"
            )
    lines.append("")
    for result in run.results:
        extra = (result.flops[STUDENT] - result.flops[BACKBONE]) / 1e9
        counts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in result.parameters.items())
        lines.append(f"- {result.architecture}: parameters: {counts}; adapter and head: {extra:.2f} GFLOP.")
    lines += [
        "",
        run.recipe,
        "Ratios are medians over the rounds. Operations are those of products, convolutions and attention, two for a",
        "multiply-add. Peak memory is of a whole process: resident on the CPU, allocated on CUDA. Made by:",
        "",
        f"    {command}",
    ]
    return "\n".join(lines)


def _range(seconds: Sequence[float]) -> str:
    low, median, high = (each * 1e3 for each in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def _ratio(result: Result, variant: str) -> str:
    """Median over the rounds of the time over the backbone's in the same round."""
    own, base = result.seconds[variant], result.seconds[BACKBONE]
    step = _SELDOM if len(own) < len(base) else 1
    return f"{statistics.median(a / b for a, b in zip(own, base[::step], strict=True)):.2f}"
