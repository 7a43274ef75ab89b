"""What a run is set up with: the model to train, the size of its crops, the optimiser, the rate of each step."""

import dataclasses
import math

import torch
from torch import nn

from brixel.brixel_features import BrixelFeatures
from brixel.images.crops import check_teacher_px
from brixel.model.adapter import Extractor
from brixel.model.upsampler import UPSCALE
from brixel.train.config import TrainConfig

_TEACHER_PATCHES = 64  # on a side of the teacher's crop, if the user says nothing: 1024 px at patch 16


def prepared_model(config: TrainConfig, model: BrixelFeatures | None) -> BrixelFeatures:
    """The model to train, in float32, its size set to what it is trained on and its rate of stochastic depth set."""
    if model is None:
        model = BrixelFeatures.from_backbone(
            config.backbone, architecture=config.architecture, device="cpu", dtype=torch.float32
        )
    model = model.float()
    adapter = dataclasses.replace(model.config.adapter, short_side_px=teacher_side(config, model.patch_px) // UPSCALE)
    model.config = dataclasses.replace(model.config, adapter=adapter)
    if model.adapter.blend is not None:
        model.adapter.blend.requires_grad_(False)  # fitted, not trained: brixel.train.fit_blend
    for extractor in model.adapter.extractors:
        assert isinstance(extractor, Extractor)
        extractor.drop_path = config.drop_path
    return model


def teacher_side(config: TrainConfig, patch_px: int) -> int:
    """Side of the teacher's crops in pixels; BrixelError where it is not four whole patches of the student's."""
    side = _TEACHER_PATCHES * patch_px if config.teacher_px is None else config.teacher_px
    check_teacher_px(side, patch_px)
    return side


def make_optimizer(config: TrainConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Adam or AdamW; matrices and kernels decay, vectors do not."""
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    parameters = [each for each in module.parameters() if each.requires_grad]
    groups = [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
    ]
    return kind(groups, lr=config.lr)


def passes_to_fit(config: TrainConfig, world_size: int) -> int:
    """Passes whose crops the blend is fitted to: enough for ``config.fit``, and no more than the run has."""
    crops = min(config.fit, config.cache or config.fit)
    return min(math.ceil(crops / (config.batch_size * world_size)), config.steps * config.accumulate)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step ``step``, from 0."""
    if config.schedule == "release":
        return config.lr * (0.1 if 3 * step < config.steps else 1.0)
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))
