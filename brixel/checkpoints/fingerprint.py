"""Distinguishing sets of weights of the same shape."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from brixel.backbones.base import Backbone, weights_of
from brixel.backbones.vit import ViT
from brixel.checkpoints.int8_weights import LARGEST
from brixel.errors import CheckpointError
from brixel.model.config import BackboneConfig

_FINGERPRINT_TENSORS = 32
_FINGERPRINT_TOLERANCE = 1e-2  # relative: a copy in bfloat16 is within it


def fingerprint(backbone: Backbone | nn.Module) -> tuple[float, ...]:
    """Two weights of some tensors of a backbone, or of another module, rounded to four digits.

    The tensors of our own ViT are the final norm, the patch embedding and the first layer of every block; of any other
    module at most 32 from first to last, matrices and kernels if it has any, as vectors are often all ones or zeros.
    """
    values = [value for weight in _weights(backbone) for value in weight.flatten()[[0, weight.numel() // 2]].tolist()]
    return tuple(float(f"{value:.4g}") for value in values)


def _weights(backbone: Backbone | nn.Module) -> list[Tensor]:
    return _known_weights(backbone) if isinstance(backbone, ViT) else _some_weights(cast("nn.Module", backbone))


def _known_weights(vit: ViT) -> list[Tensor]:
    first_layers = [f"blocks.{index}.attention.qkv.weight" for index in range(vit.depth)]
    return [vit.get_parameter(name).detach() for name in ("norm.weight", "patch_embed.weight", *first_layers)]


def _some_weights(module: nn.Module) -> list[Tensor]:
    weights = [weight for weight in weights_of(module) if weight.numel()]
    weights = [weight for weight in weights if weight.ndim > 1 and max(weight.shape) < weight.numel()] or weights
    step = (len(weights) - 1) / (_FINGERPRINT_TENSORS - 1)
    return weights if step <= 1 else [weights[round(index * step)] for index in range(_FINGERPRINT_TENSORS)]


def digest(modules: Iterable[nn.Module]) -> str:
    """A hash of the names and values of all weights and buffers of some modules: 16 hexadecimal digits."""
    found = hashlib.sha256()
    for module in modules:
        for name, weight in module.state_dict().items():
            content = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
            found.update(name.encode() + content.numpy().tobytes())
    return found.hexdigest()[:16]


def same_fingerprint(ours: Sequence[float], theirs: Sequence[float], steps: Tensor | None = None) -> bool:
    """Whether two fingerprints are of the same weights, perhaps in other dtypes. ``steps``: what is allowed beside."""
    if len(ours) != len(theirs):
        return False
    one, other = torch.tensor(ours, dtype=torch.float32), torch.tensor(theirs, dtype=torch.float32)
    allowed = 1e-5 + _FINGERPRINT_TOLERANCE * one.abs()
    if steps is not None:
        allowed = allowed + steps
    return bool(((one - other).abs() <= allowed).all())


def check_fingerprint(config: BackboneConfig, backbone: Backbone, source: str) -> None:
    """Raise CheckpointError if ``backbone``, from ``source``, has other weights than the adapter was made for."""
    steps = torch.zeros(1)
    if config.int8:  # two weights of each tensor
        steps = torch.tensor([float(weight.abs().max()) / LARGEST for weight in _weights(backbone)])
        steps = steps.repeat_interleave(2)
    if not same_fingerprint(config.fingerprint, fingerprint(backbone), steps):
        origin = f", which came from {', '.join(config.sources)}" if config.sources else ""
        raise CheckpointError(
            f"the backbone at {source} has the shape of {config.title} but other weights than the adapter was made "
            f"for{origin}: it is not the backbone that the adapter was trained for"
        )
