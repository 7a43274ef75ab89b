"""Peak memory of a process; sizes as texts and free memory are tested with the planner that uses them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from brixel.utils.memory import peak_bytes

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
