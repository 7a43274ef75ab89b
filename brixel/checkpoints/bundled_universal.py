"""The weights of the universal upsampler, which are part of the package."""

import functools
from pathlib import Path

import torch

from brixel.checkpoints.weight_files import load_into, read_tensors
from brixel.model.universal import UniversalUpsampler

UNIVERSAL = Path(__file__).parents[1] / "assets" / "universal.safetensors"


def load_universal(dtype: torch.dtype) -> UniversalUpsampler:
    """The trained universal upsampler on the CPU, without gradients for its weights."""
    made = load_into(UniversalUpsampler, read_tensors(UNIVERSAL), dtype, what=f"{UNIVERSAL} does not fit")
    return made.requires_grad_(False).eval()


@functools.lru_cache(maxsize=4)
def shared_universal(dtype: torch.dtype, device: torch.device) -> UniversalUpsampler:
    """One copy for each dtype and device, for functions that keep no model."""
    return load_universal(dtype).to(device)
