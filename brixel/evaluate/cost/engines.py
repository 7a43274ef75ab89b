"""Time, memory and numbers of models in eager torch, torch.compile, ONNX Runtime and OpenVINO, on the CPU."""

import itertools
import logging
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from brixel.backbones.registry import BUNDLED_BACKBONES, known_backbone
from brixel.brixel_features import BrixelFeatures
from brixel.evaluate.cost.timing import random_model, torch_threads
from brixel.evaluate.report import Report
from brixel.images.patch_grid import whole_patches
from brixel.inference.compiled import CompiledCall
from brixel.inference.export.formats import FORMATS, Run
from brixel.inference.export.tracing import InputSize, example, plain_copy, trace, traced_size
from brixel.model.student import Student
from brixel.model.upsampler import BilinearUpsampler
from brixel.utils.devices import describe_machine
from brixel.utils.extras import import_extra
from brixel.utils.fields import check_names
from brixel.utils.memory import status_bytes

BACKBONE, STUDENT = "backbone", "student"
EAGER, EAGER_BF16, COMPILED = "eager", "eager-bfloat16", "compile"
ONNX, ONNX_HALF, ONNX_INT8 = "onnxruntime", "onnxruntime-float16", "onnxruntime-int8"
OPENVINO, OPENVINO_BF16 = "openvino", "openvino-bfloat16"
ENGINES = (EAGER, EAGER_BF16, COMPILED, ONNX, ONNX_HALF, ONNX_INT8, OPENVINO, OPENVINO_BF16)
_CPU = torch.device("cpu")
_REST_S = 0.05  # threads of other engines wait actively for a while
_WARM_UP = 2
_COLUMNS = {
    **{"model": ("model", ""), "image_px": ("image, px", "d"), "batch": ("batch", "d"), "part": ("part", "")},
    **{"engine": ("engine", ""), "ms": ("ms, median", ".1f"), "ratio": ("times as fast as eager", ".2f")},
    **{"of_backbone": ("of its backbone's time", ".2f"), "difference": ("largest difference", ".1e")},
    **{"peak_mib": ("memory of one image, MiB", ".0f"), "file_mb": ("file, MB", ".1f")},
}


@dataclass(frozen=True)
class _Part:
    """A part of a model, in memory and as files, by engine."""

    student: Student
    files: dict[str, Path]


def engines(
    names: Sequence[str],
    image_px: Sequence[int],
    *,
    batch_sizes: Sequence[int] = (1,),
    rounds: int = 7,
    threads: int | None = None,
    kinds: Sequence[str] = ENGINES,
) -> Report:
    """Measure models and their backbones alone in several engines, with dynamic sizes.

    Args:
        names: Models of the package, and architectures, which get random weights.
        image_px: Sides of square images in pixels; rounded to the nearest multiple of the patch.
        batch_sizes: Images per call.
        rounds: Timed calls of each engine, all in turn.
        threads: Threads of every engine; None for torch's choice.
        kinds: The engines, of :data:`ENGINES`.

    Returns:
        A row per model, size, batch, part and engine: median milliseconds, how many times as fast as eager float32
        in the same round, the largest difference from its features, and for one image the peak of resident memory of a
        new process over what it holds before the model is loaded.

    Raises:
        BrixelError: A name or an engine is unknown, or a package is missing.
    """
    check_names(kinds, ENGINES, "unknown engine")
    for name in set(names) - set(BUNDLED_BACKBONES):
        known_backbone(name)  # an unknown name fails before the first export
    wanted = [kind for kind in ENGINES if kind in kinds or kind == EAGER]
    rows: list[dict[str, Any]] = []
    with torch_threads(threads), tempfile.TemporaryDirectory() as folder:
        for name in names:
            parts = _parts(name, wanted, Path(folder))
            calls = {(part, kind): _call(kind, content) for part, content in parts.items() for kind in wanted}
            sides = [whole_patches(wanted_px, parts[STUDENT].student.patch_px) for wanted_px in image_px]
            measured = [
                {"model": name, "image_px": side, "batch": batch, **row}
                for side, batch in itertools.product(sides, batch_sizes)
                for row in _measure(calls, InputSize(batch, side, side), rounds)
            ]
            for row in measured:  # after all timings
                if row["batch"] == 1:
                    row["peak_mib"] = _peak_mib(name, row["part"], row["engine"], row["image_px"], parts)
                if file := parts[row["part"]].files.get(row["engine"]):
                    row["file_mb"] = file.stat().st_size / 1e6
            rows += measured
        recipe = f"Random noise; {rounds} rounds in turn; {', '.join(_versions(wanted))}; {describe_machine(_CPU)}."
    note = (
        "Eager float32 is what the others are compared with. Files have dynamic sizes. onnxruntime-int8: weights of "
        "products in 8 bits, by its quantize_dynamic. OpenVINO computes in float32 only where told so, as here. A "
        "row of dashes: the compiler failed."
    )
    return Report("engines", "Engines", _COLUMNS, rows, recipe, (note,))


def _model(name: str) -> BrixelFeatures:
    if name in BUNDLED_BACKBONES:
        return BrixelFeatures.from_pretrained(name, device="cpu", dtype="float32")
    return random_model(name)


def _students(model: BrixelFeatures) -> dict[str, Student]:
    """The backbone alone, and the whole model."""
    alone = Student(model.backbone, BilinearUpsampler(), model.blocks[-1:]).at_scale(1)
    return {BACKBONE: alone, STUDENT: model}


def _parts(name: str, kinds: Sequence[str], folder: Path) -> dict[str, _Part]:
    """The parts of a model, exported to the files that the engines need."""
    return {
        part: _Part(student, _export(student, kinds, folder / f"{name}-{part}"))
        for part, student in _students(_model(name)).items()
    }


def _export(student: Student, kinds: Sequence[str], stem: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for dtype, engines_of in (
        (torch.float32, (ONNX, ONNX_INT8, OPENVINO, OPENVINO_BF16)),
        (torch.float16, (ONNX_HALF,)),
    ):
        needed = [kind for kind in engines_of if kind in kinds]
        if needed:
            path = stem.with_name(f"{stem.name}-{dtype}.onnx")
            program = trace(plain_copy(student, dtype), traced_size(student.patch_px), dynamic=True)
            FORMATS["onnx"].convert(program, 18).save(str(path))
            files |= dict.fromkeys(needed, path)
    if ONNX_INT8 in files:
        quantization = import_extra("onnxruntime.quantization", extra="onnx", purpose="int8 weights")
        path = stem.with_name(f"{stem.name}-int8.onnx")
        settings = {"weight_type": quantization.QuantType.QInt8, "op_types_to_quantize": ["MatMul"]}
        logging.disable(logging.WARNING)  # it advises a preprocessing for convolutions
        try:
            quantization.quantize_dynamic(str(files[ONNX_INT8]), str(path), **settings)
        finally:
            logging.disable(logging.NOTSET)
        files[ONNX_INT8] = path
    return files


def _call(kind: str, part: _Part) -> Run:
    """The part in an engine: pixels in float32 to features in float32."""
    if kind in part.files:
        return _load_file(kind, part.files[kind])
    student = part.student
    if kind == EAGER_BF16:
        student = plain_copy(student, torch.bfloat16)
        return lambda pixels: student(pixels.bfloat16()).float()
    return CompiledCall(student, {}) if kind == COMPILED else student


def _load_file(kind: str, path: Path) -> Run:
    if kind in (OPENVINO, OPENVINO_BF16):
        return _load_openvino(path, "bf16" if kind == OPENVINO_BF16 else "f32")
    run = FORMATS["onnx"].load(path)
    return (lambda pixels: run(pixels.half()).float()) if kind == ONNX_HALF else run


def _load_openvino(path: Path, precision: str) -> Run:
    openvino = import_extra("openvino", extra="openvino", purpose="measurements of OpenVINO")
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(str(path), "CPU", {**settings, "PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()
    return lambda pixels: torch.from_numpy(request.infer([pixels.numpy()])[compiled.output(0)].copy())


def _measure(calls: dict[tuple[str, str], Run], size: InputSize, rounds: int) -> list[dict[str, Any]]:
    """The rows of one size: all engines and parts in turn."""
    pixels = example(size, torch.float32)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    difference: dict[tuple[str, str], float] = {}
    with torch.no_grad():
        expected = {part: calls[part, EAGER](pixels) for part in (BACKBONE, STUDENT)}
        for turn in range(-_WARM_UP, rounds):
            for key, call in calls.items():
                time.sleep(_REST_S)
                start = time.perf_counter()
                features = call(pixels)
                if turn >= 0:
                    seconds[key].append(time.perf_counter() - start)
                elif key not in difference:
                    difference[key] = (features - expected[key[0]]).abs().max().item()
    failed = [key for key, call in calls.items() if isinstance(call, CompiledCall) and call.has_failed]
    return [
        {"part": part, "engine": kind}
        if (part, kind) in failed
        else {
            "part": part,
            "engine": kind,
            "ms": statistics.median(own) * 1e3,
            "ratio": _median_ratio(seconds[part, EAGER], own),
            "of_backbone": _median_ratio(own, seconds[BACKBONE, kind]) if part == STUDENT else None,
            "difference": None if kind == EAGER else difference[part, kind],
        }
        for (part, kind), own in seconds.items()
    ]


def _median_ratio(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(first / second for first, second in zip(one, other, strict=True))


def _peak_mib(name: str, part: str, kind: str, side: int, parts: dict[str, _Part]) -> float | None:
    """Peak resident memory of a new process that runs one image; None for compilers, which take more than models do."""
    if kind == COMPILED:
        return None
    arguments = (name, part, kind, parts[part].files.get(kind), side, torch.get_num_threads())
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_of_this_process, *arguments).result() / 2**20


def _peak_of_this_process(name: str, part: str, kind: str, path: Path | None, side: int, threads: int) -> int:
    torch.set_num_threads(threads)
    for module in ("onnxruntime", "openvino"):
        import_extra(module, extra="onnx,openvino", purpose="measurements of engines")
    pixels = example(InputSize(1, side, side), torch.float32)
    before = status_bytes("VmRSS")
    call = _call(kind, _Part(_students(_model(name))[part], {})) if path is None else _load_file(kind, path)
    with torch.no_grad():
        call(pixels)
    return status_bytes("VmHWM") - before


def _versions(kinds: Sequence[str]) -> list[str]:
    """The engines' versions."""
    found = []
    if any(kind.startswith(ONNX) for kind in kinds):
        found.append(FORMATS["onnx"].engine())
    if any(kind.startswith(OPENVINO) for kind in kinds):
        openvino = import_extra("openvino", extra="openvino", purpose="measurements of OpenVINO")
        found.append(f"OpenVINO {openvino.__version__.partition('-')[0]}")
    return found
