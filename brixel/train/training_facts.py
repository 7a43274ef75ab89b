"""The training section of a model's config and card: settings and results as texts."""

from collections.abc import Mapping
from importlib.metadata import version

import torch

from brixel.model.upsampler import UPSCALE
from brixel.train.config import TrainConfig
from brixel.utils.devices import describe_machine


def training_facts(
    config: TrainConfig,
    *,
    images: int,
    held_out: int,
    teacher_px: int,
    processes: int,
    figures: Mapping[str, float],
    device: torch.device,
) -> dict[str, str]:
    """Texts by title, without names of folders; ``figures``: "step" and the results of a validation."""
    batch = config.batch_size * config.accumulate * processes
    pixels = f"{teacher_px} px for the teacher, {teacher_px // UPSCALE} px for the student"
    facts = {
        "images": f"{images}{f', {config.about}' if config.about else ''}; crops of {pixels}",
        "steps": f"{figures['step']:.0f} of {config.steps}, {batch} crops each; {config.optimizer}, rate {config.lr:g}",
        "loss": f"{config.l1:g} L1 + {config.edge:g} edge + {config.spectral:g} spectral",
    }
    if "cosine" in figures:
        title = f"on {held_out} held-out crops"
        for name, text in (("cosine", "cosine to the teacher"), ("l1", "L1 to the teacher")):
            baselines = ", ".join(f"{mode} {figures[f'{mode}_{name}']:.4f}" for mode in ("bilinear", "bicubic"))
            facts[f"{text}, {title}"] = f"{figures[name]:.4f}; {baselines}"
    return facts | {"made with": f"brixel {version('brixel')}; {describe_machine(device)}"}
