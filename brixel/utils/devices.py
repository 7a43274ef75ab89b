"""Devices and dtypes by name, and a description of the machine."""

import datetime
import platform

import torch

from brixel.errors import BrixelError


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, such as "float32"."""
    return str(dtype).removeprefix("torch.")


DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
"""The dtypes of models and maps, by name."""

# before 2.10 torch's MPS lacks embedding_bag (pytorch/pytorch#162270, #163931)
_MPS_COMPLETE = torch.torch_version.TorchVersion(torch.__version__) >= "2.10"


def choose_device(device: str | torch.device) -> torch.device:
    """The device of a name; "auto" is CUDA if available, else MPS, else the CPU. BrixelError for one torch lacks."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() and _MPS_COMPLETE else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BrixelError(f"unknown device {device!r}; expected 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'") from error
    absent = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if absent.get(chosen.type):
        kind = chosen.type.upper()
        raise BrixelError(f"device {str(device)!r} was asked for, but torch sees no {kind} device; use 'cpu' or 'auto'")
    if chosen.type == "mps" and not _MPS_COMPLETE:
        raise BrixelError(f"device 'mps' needs torch 2.10 or newer, and this is {torch.__version__}; use 'cpu'")
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" is bfloat16 on CUDA devices that support it, else float32."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or chosen not in DTYPES.values():
        raise BrixelError(f"unknown dtype {dtype!r}; expected 'auto', {', '.join(map(repr, DTYPES))}")
    return chosen


def describe_machine(device: torch.device) -> str:
    """The device, threads, versions and date, for tables of measurements."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return (
        f"{name}, {torch.get_num_threads()} threads; torch {torch.__version__}, Python {platform.python_version()}; "
        f"{datetime.date.today().isoformat()}"
    )


def _processor() -> str:
    """The processor, by its model name on Linux, and its vector instructions."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
