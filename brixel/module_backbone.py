"""A backbone that came as a module rather than from files: taken in, brought to a device, compared with a saved one."""

from collections.abc import Mapping

import torch
from torch import nn

from brixel.backbones.foreign import as_backbone, config_of
from brixel.backbones.protocol import Backbone, whereabouts
from brixel.config import BackboneConfig, fingerprint
from brixel.devices import choose_device, choose_dtype
from brixel.errors import BrixelError, CheckpointError


def take_in(module: nn.Module, settings: Mapping[str, object]) -> tuple[Backbone, BackboneConfig]:
    """The module as a frozen backbone, and what a config says of it; of ``settings`` it takes mean and std alone."""
    wrong = [name for name, value in settings.items() if value not in (None, False) and name not in ("mean", "std")]
    if wrong:
        raise BrixelError(f"{', '.join(wrong)}: not for a backbone that is a module, {type(module).__name__}")
    normalisation = {name: settings[name] for name in ("mean", "std") if name in settings}
    backbone = as_backbone(module, **normalisation)  # type: ignore[arg-type]
    return backbone, BackboneConfig(None, (), config_of(backbone), fingerprint(backbone))


def same_as(ours: BackboneConfig, module: nn.Module) -> Backbone:
    """The module as the backbone that a saved adapter was made for; CheckpointError where it is another."""
    knows_its_own = hasattr(module, "block_maps")
    backbone = as_backbone(module) if knows_its_own else as_backbone(module, mean=ours.vit.mean, std=ours.vit.std)
    theirs = config_of(backbone)
    for name in ("width", "depth", "patch_px", "mean", "std"):
        expected, came = getattr(ours.vit, name), getattr(theirs, name)
        if came != expected:
            raise CheckpointError(
                f"the adapter is for {ours.title}, whose {name} is {expected}; that of the {type(module).__name__} "
                f"given is {came}"
            )
    ours.check_weights(backbone, f"backbone={type(module).__name__}")
    return backbone


def bring(module: nn.Module, device: str | torch.device, dtype: str | torch.dtype) -> tuple[torch.device, torch.dtype]:
    """Move a module to a device and dtype, where "auto" leaves it as it is; where it lies then."""
    if device != "auto":
        module.to(choose_device(device))
    if dtype != "auto":
        module.to(choose_dtype(dtype, whereabouts(module)[0]))
    return whereabouts(module)
