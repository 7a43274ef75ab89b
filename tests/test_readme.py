"""The README's code runs: every Python block as it stands, every `brixel` command as far as its options."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from safetensors.torch import save

from brixel.cli.app import build_parser

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
SHELL = re.findall(r"^ *```bash\n(.*?)^ *```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [
    part.strip() for block in SHELL for line in block.splitlines() for part in line.split("&&") if "brixel " in part
]


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A working folder with `photo.jpg` and `photos/`."""
    y, x = np.mgrid[:400, :600]
    colours = np.stack([x / 3, y / 2, 128 + 100 * np.sin(x / 7) * np.cos(y / 5)], -1).clip(0, 255).astype(np.uint8)
    (tmp_path / "photos").mkdir()
    for path in ("photo.jpg", "photos/1.jpg", "photos/2.jpg"):
        Image.fromarray(colours).save(tmp_path / path)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def dinov3(hub):
    """The Hub with DINOv3-S: Meta's repository behind its gate, timm's copy with random weights."""
    checkpoints = json.loads((ROOT / "tests" / "headers" / "dinov3-timm.json").read_text())["checkpoints"]
    header, state = checkpoints["dinov3-vits16"], {}
    for key, shape in header["tensors"].items():
        for index in range(header["depth"] if "{i}" in key else 1):
            state[key.replace("{i}", str(index))] = torch.randn(shape, dtype=torch.float16) * 0.02
    settings = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "tag": "lvd1689m"}
    config = {"architecture": "vit_small_patch16_dinov3", "pretrained_cfg": settings}
    hub.add("facebook/dinov3-vits16-pretrain-lvd1689m", {"config.json": b"{}"}, gated=True)
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": save(state)}
    hub.add("timm/vit_small_patch16_dinov3.lvd1689m", files)


@pytest.mark.parametrize("block", [block for block in BLOCKS if "dinov3" not in block])
def test_a_block_runs(block, photographs):
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("block", [block for block in BLOCKS if "dinov3" in block])
def test_a_block_on_dinov3_runs_without_access(block, photographs, dinov3, caplog):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["feature_map"].embed_dim == 384
    assert "timm/vit_small_patch16_dinov3.lvd1689m" in caplog.text


def test_what_the_first_block_prints(photographs, capsys):
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("FeatureMap((384, 64, 96) ")
    assert printed[1:] == ["torch.Size([1, 384])", "torch.Size([64, 96])"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command):
    program, *arguments = shlex.split(command)
    assert program == "brixel"
    build_parser().parse_args(arguments)


def test_links_lead_somewhere():
    targets = [link for link in re.findall(r"\]\(([^)#]+)", TEXT) if "://" not in link]
    assert len(targets) > 15
    assert not [link for link in targets if not (ROOT / link).exists()]
