"""Amounts of memory as text, free memory, and the peak of a process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from brixel import BrixelError
from brixel.utils.memory import format_bytes, free_bytes, parse_bytes, peak_bytes

MIB = 2**20

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak comes from getrusage")


@linux_only
def test_peak_memory_is_what_linux_says_of_this_process_alone():
    peak = peak_bytes(torch.device("cpu"))
    status = Path("/proc/self/status").read_text(encoding="ascii")
    later = int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024
    assert 2**26 < peak <= later


@linux_only
@pytest.mark.slow
def test_peak_memory_does_not_include_that_of_the_parent_process():
    program = "from brixel.utils.memory import peak_bytes; import torch; print(peak_bytes(torch.device('cpu')))"
    held = torch.ones(2**28)  # a GiB, more than an import takes
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert 2**26 < int(found.stdout) < held.nbytes


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        *[(7, 7), ("4GiB", 4 * 2**30), ("500 MiB", 500 * MIB), ("1.5 gb", 1_500_000_000), (" 12 ", 12), ("2KiB", 2048)],
        *[("4G", 2**32), ("4g", 2**32), ("4GB", 4 * 10**9), ("4 GiB", 2**32), ("4e9", 4 * 10**9), ("500M", 500 * MIB)],
        *[("1.5e3 kB", 1_500_000), ("2T", 2**41), ("8k", 8192), ("1E+9", 10**9), (4e9, 4 * 10**9), ("1.GiB", 2**30)],
    ],
)
def test_amounts_of_memory(given, expected):
    assert parse_bytes(given) == expected


@pytest.mark.parametrize("given", [0, -1, True, 1.5, "", "GiB", "4 Gi", "four", "-1GiB", "0MiB", None])
def test_other_values_are_refused(given):
    with pytest.raises(BrixelError, match="no amount of memory; expected bytes above zero or text such as '4GiB'"):
        parse_bytes(given)


def test_amounts_as_text():
    assert [format_bytes(count) for count in (1, MIB, 1000 * MIB, 2**30, 5 * 2**28)] == [
        "1 MiB",
        "1 MiB",
        "1000 MiB",
        "1.00 GiB",
        "1.25 GiB",
    ]


@pytest.mark.parametrize("need", [1, MIB - 1, MIB, MIB + 1, 2**30 - 1, 2**30 + 1, 1_960_000_000, 5 * 2**28 + 1])
def test_a_need_as_text_is_a_limit_that_is_enough(need):
    assert parse_bytes(format_bytes(need)) >= need
    assert format_bytes(need - 1, up=False) != format_bytes(need)  # "needs 1.83 GiB, and the limit is 1.83 GiB"
    assert format_bytes(1_960_000_000, up=False) == "1.82 GiB"
    assert format_bytes(parse_bytes("1.83GiB"), up=False) == "1.83 GiB"


def test_free_memory_is_known_or_none():
    free = free_bytes(torch.device("cpu"))
    assert free is None or 0 <= free < 2**50
