"""The optimiser, its learning rate in each step, and the moving average of the weights."""

import copy
import math

import torch
from torch import nn

from brixel.model.upsampler import AnyUpsampler
from brixel.train.config import TrainConfig


def make_optimizer(config: TrainConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Adam or AdamW over the trainable parameters; matrices and kernels decay, vectors do not."""
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return kind(groups, lr=config.lr)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step ``step``, counted from 0."""
    if config.schedule == "release":
        return config.lr * (0.1 if 3 * step < config.steps else 1.0)
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


class WeightAverage:
    """Exponential moving average of an upsampler's parameters; its buffers are copied."""

    def __init__(self, module: AnyUpsampler, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: AnyUpsampler, step: int) -> None:
        """Move towards ``module`` after step ``step``, counted from 0; the decay is smaller in the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, current in zip(self.module.parameters(), module.parameters(), strict=True):
            average.lerp_(current, 1 - decay)
        for buffer, latest in zip(self.module.buffers(), module.buffers(), strict=True):
            buffer.copy_(latest)
