"""Amounts of memory: as text and in bytes, free on a device, used at peak."""

import math
import os
import re
import sys
from fractions import Fraction
from pathlib import Path

import torch

from brixel.errors import BrixelError

MARGIN = 0.1  # of what is free, left to others by default
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_CGROUP = Path("/sys/fs/cgroup")


def parse_bytes(amount: int | str) -> int:
    """Bytes from a whole number of them, or from text such as "4GiB", "500 MiB", "1.5 GB"."""
    if isinstance(amount, int) and not isinstance(amount, bool) and amount > 0:
        return amount
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", amount.lower()) if isinstance(amount, str) else None
    if match and match[2] in _UNITS and float(match[1]) > 0:
        return math.ceil(Fraction(match[1]) * _UNITS[match[2]])  # up, so that it reads as it was given
    raise BrixelError(
        f"a limit of {amount!r} is no amount of memory; expected bytes above zero or text such as '4GiB', '500 MiB'"
    )


def format_bytes(count: int, *, up: bool = True) -> str:
    """Such as "512 MiB", "3.25 GiB": rounded up, as what is needed; or down, as what there is."""
    in_gib = count >= 2**30
    parts = count * 100 if in_gib else count  # hundredths of a GiB, whole MiB
    unit = 2**30 if in_gib else 2**20
    number = -(-parts // unit) if up else parts // unit
    return f"{number // 100}.{number % 100:02d} GiB" if in_gib else f"{number} MiB"


def free_bytes(device: torch.device) -> int | None:
    """What a program can still allocate on a device; None where that cannot be found out."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _free_host_bytes() if device.type == "cpu" else None


def _free_host_bytes() -> int | None:
    """What the system calls available, or what is left to the group of processes that this one belongs to."""
    known = [each for each in (_available(), _left_in_group()) if each is not None]
    return min(known) if known else None


def _available() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(re.findall(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)[0]) * 1024
    except (OSError, IndexError):
        try:  # what other systems than Linux may know
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None


def _left_in_group() -> int | None:
    """Of a container: its limit, less what it uses beside caches of files. None without a limit."""
    try:
        limit, used = ((_CGROUP / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        caches = re.findall(
            r"^inactive_file (\d+)", (_CGROUP / "memory.stat").read_text(encoding="ascii"), re.MULTILINE
        )
        return max(0, int(limit) - int(used) + sum(map(int, caches)))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def peak_bytes(device: torch.device) -> int | None:
    """The most memory so far: allocated by torch on CUDA, resident in this process elsewhere; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage tells no less than what the process had that started this one
        return int(re.findall(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"), re.MULTILINE)[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
