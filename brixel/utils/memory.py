"""Memory: sizes as texts and in bytes, free memory of a device, peak memory."""

import ctypes
import functools
import math
import os
import re
import sys
from fractions import Fraction
from pathlib import Path

import torch

from brixel.errors import BrixelError

MARGIN = 0.1  # share of the free memory that is left to other programs by default
_PREFIXES = "kmgt"
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate(_PREFIXES, 1)}
_UNITS |= {f"{prefix}{ib}": 1024**power for power, prefix in enumerate(_PREFIXES, 1) for ib in ("ib", "")}
_MALLOC_MMAP_THRESHOLD = -3  # of mallopt, in glibc's malloc.h
_MAPPED_FROM = 256 * 2**10  # bytes
_CGROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")


def parse_bytes(amount: int | float | str) -> int:
    """Bytes, from a number or a text such as "4GiB", "500 MiB", "1.5 GB", "4e9".

    "G" alone is "GiB", as in the tools of Unix; "GB" is 10^9 bytes.
    """
    if isinstance(amount, int | float) and not isinstance(amount, bool) and amount > 0 and amount % 1 == 0:
        return int(amount)
    number = r"\s*([0-9]+(?:\.[0-9]*)?(?:e\+?[0-9]{1,2})?)\s*([a-z]*)\s*"
    match = re.fullmatch(number, amount.lower()) if isinstance(amount, str) else None
    if match and match[2] in _UNITS and Fraction(match[1]) > 0:
        return math.ceil(Fraction(match[1]) * _UNITS[match[2]])  # up, so that format_bytes shows the given amount
    raise BrixelError(
        f"a limit of {amount!r} is no amount of memory; expected bytes above zero or text such as '4GiB', '500 MiB'"
    )


def format_bytes(count: int, *, up: bool = True) -> str:
    """A text such as "512 MiB" or "3.25 GiB", rounded up, as for a requirement, or down, as for a limit."""
    in_gib = count >= 2**30
    parts = count * 100 if in_gib else count  # hundredths of a GiB, whole MiB
    unit = 2**30 if in_gib else 2**20
    number = -(-parts // unit) if up else parts // unit
    return f"{number // 100}.{number % 100:02d} GiB" if in_gib else f"{number} MiB"


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on a device; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _free_host_bytes() if device.type == "cpu" else None


def _free_host_bytes() -> int | None:
    """The memory that is available in the system, or in the control group of this process if that is less."""
    known = [count for count in (_available(), _left_in_group()) if count is not None]
    return min(known) if known else None


def _available() -> int | None:
    try:
        return _bytes_in(Path("/proc/meminfo"), "MemAvailable")
    except (OSError, IndexError):
        try:  # on other systems than Linux
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None


def _left_in_group() -> int | None:
    """The limit of a container less its use without file caches; None without a limit."""
    try:
        limit, used = ((_CGROUP / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        stat = (_CGROUP / "memory.stat").read_text(encoding="ascii")
        caches = sum(map(int, re.findall(r"^inactive_file (\d+)", stat, re.MULTILINE)))
        return max(0, int(limit) - int(used) + caches)
    except (OSError, ValueError):  # no such file, or "max"
        return None


@functools.cache
def return_freed_memory() -> None:
    """From now on, let the C library give freed tensors back to the system at once, where it is glibc.

    By default it keeps freed blocks of up to 32 MiB for later, and a process can hold twice the memory that its tensors
    take. Blocks that are mapped one by one are given back when they are freed; allocating them takes a little longer.
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # musl has a mallopt too, which does nothing
        libc.mallopt(_MALLOC_MMAP_THRESHOLD, _MAPPED_FROM)
        libc.malloc_trim(0)
    except (OSError, AttributeError):
        return


def peak_bytes(device: torch.device) -> int | None:
    """Peak bytes so far: allocated by torch on CUDA, else resident in this process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    if _STATUS.exists():  # on Linux getrusage includes the peak of the parent process
        return status_bytes("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def status_bytes(field: str) -> int:
    """Bytes that Linux reports of this process, such as "VmRSS": what is resident."""
    return _bytes_in(_STATUS, field)


def _bytes_in(path: Path, field: str) -> int:
    """Bytes in a field of a file below /proc. Raises IndexError where it has none."""
    return int(re.findall(rf"^{field}:\s+(\d+) kB", path.read_text(encoding="ascii"), re.MULTILINE)[0]) * 1024
