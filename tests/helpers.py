"""What several test files need."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brixel.model.universal import UniversalUpsampler

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
"""Reference material beside the checkout; tests that need it carry the marker `shared`."""


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Two modules have the same state, bit for bit."""
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


def mean_colour(pixels: Tensor) -> Tensor:
    """A feature source for patches of 8 px: (B, 3, H, W) to (B, 3, H / 8, W / 8)."""
    return F.avg_pool2d(pixels, 8)


def files_of(folder: Path) -> dict[str, bytes]:
    """The files directly in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def maps_in(folder: Path) -> dict[Path, bytes]:
    """The map files anywhere in a folder, by relative path."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}


def state_of(out: str | Path) -> dict[str, Any]:
    """The training state in a run's output folder."""
    return torch.load(Path(out) / "state.pt", weights_only=True)


def records_of(out: str | Path) -> list[dict[str, Any]]:
    """The metrics of a run, line by line."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def random_universal(dtype: torch.dtype = torch.float32) -> UniversalUpsampler:
    """A universal upsampler in which every weight matters."""
    torch.manual_seed(0)
    universal = UniversalUpsampler()
    with torch.no_grad():
        for parameter in universal.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return universal.to(dtype).eval()
