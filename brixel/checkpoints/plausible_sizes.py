"""Comparing a configuration with the tensors of a file before a model of its sizes is built."""

from brixel.backbones.vit_config import ViTConfig
from brixel.checkpoints.key_mapping import State
from brixel.errors import CheckpointError


def check_sizes(config: ViTConfig, state: State, *, what: str) -> None:
    """Raise CheckpointError for sizes that no tensors like these can have; ``what`` opens the error.

    The bounds are loose, so that they hold in every layout. What passes is compared tensor by tensor afterwards.
    """
    longest = max((side for tensor in state.values() for side in tensor.shape), default=0)
    largest = max((tensor.numel() for tensor in state.values()), default=0)
    if config.depth > len(state):
        raise CheckpointError(f"{what}: depth is {config.depth}, more than the {len(state)} tensors of the file")
    sizes = {"width": config.width, "ffn_width": config.ffn_width, "registers": config.registers}
    for name, size in sizes.items():
        if size > longest:
            raise CheckpointError(f"{what}: {name} is {size}, and no tensor of the file has so long a side")
    areas = {"patch_px": config.patch_px, "native_grid": config.native_grid if config.positions == "learned" else 1}
    for name, side in areas.items():
        if side**2 > largest:
            raise CheckpointError(f"{what}: {name} is {side}, and no tensor of the file has {side} x {side} numbers")
