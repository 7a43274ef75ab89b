"""The code in `docs/probes.md` runs, block after block, and its commands are ones that exist."""

import re
import shlex

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image
from probe_images import blocks

from brixel.cli.app import build_parser

TEXT = (ROOT / "docs" / "probes.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_code_of_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("abcd"):
        image, labels = blocks(number, 240, 320)
        Image.fromarray(image).save(f"{name}.jpg")
        np.save(f"{name}.npy", labels + 0.5)
        Image.fromarray(labels.astype(np.uint8)).save(f"{name}.png")
    millimetres = Image.fromarray((blocks(1, 240, 320)[1] * 1000 + 500).astype(np.uint16))
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL):
        if "RegressionProbe" in block:
            millimetres.save("b.png")
        exec(compile(block, "probes.md", "exec"), names)
    assert names["labels"].shape == names["depth"].shape == (240, 320)


def test_the_commands_of_the_guide_exist():
    commands = re.findall(r"^brixel .*$", TEXT, re.MULTILINE)
    assert len(commands) == 3
    for line in commands:
        build_parser().parse_args(shlex.split(line)[1:])
