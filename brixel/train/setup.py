"""The model that a run trains, and the size of its crops."""

import dataclasses

import torch

from brixel.brixel_features import BrixelFeatures
from brixel.images.crops import check_teacher_px
from brixel.model.adapter import Extractor
from brixel.model.upsampler import UPSCALE
from brixel.train.config import TrainConfig

_TEACHER_PATCHES = 64  # along the side of the teacher's crop by default: 1024 px at patch 16


def prepare_model(config: TrainConfig, model: BrixelFeatures | None) -> BrixelFeatures:
    """The model to train, in float32, with the short side that it is trained on and its rate of stochastic depth."""
    if model is None:
        model = BrixelFeatures.from_backbone(
            config.backbone, architecture=config.architecture, device="cpu", dtype=torch.float32
        )
    model = model.float()
    short_side_px = teacher_side_px(config, model.patch_px) // UPSCALE
    adapter = dataclasses.replace(model.config.adapter, short_side_px=short_side_px)
    model.config = dataclasses.replace(model.config, adapter=adapter)
    if model.adapter.blend is not None:
        model.adapter.blend.requires_grad_(False)  # fitted, not trained: brixel.train.fit_blend
    for extractor in model.adapter.extractors:
        assert isinstance(extractor, Extractor)
        extractor.drop_path = config.drop_path
    return model


def teacher_side_px(config: TrainConfig, patch_px: int) -> int:
    """Side of the teacher's crops in pixels. BrixelError unless a quarter of it is a multiple of ``patch_px``."""
    side_px = _TEACHER_PATCHES * patch_px if config.teacher_px is None else config.teacher_px
    check_teacher_px(side_px, patch_px)
    return side_px


def describe_crops(config: TrainConfig, patch_px: int) -> str:
    """The sides of the teacher's and the student's crops, in words."""
    teacher_px = teacher_side_px(config, patch_px)
    return f"{teacher_px} px for the teacher, {teacher_px // UPSCALE} px for the student"
