"""The model that a run trains, and the sizes of its crops."""

import dataclasses

import torch

from brixel.brixel_features import BrixelFeatures
from brixel.images.crops import check_teacher_px
from brixel.model.adapter import Extractor
from brixel.model.upsampler import UPSCALE, SecondUpsampler, WithUniversal, make_upsampler
from brixel.train.config import TrainConfig

_TEACHER_PATCHES = 64  # along the side of the teacher's crop by default: 1024 px at patch 16


def prepare_model(config: TrainConfig, model: BrixelFeatures | None) -> BrixelFeatures:
    """The model to train, in float32, with the sizes that it is trained on and its rate of stochastic depth."""
    if model is None:
        model = BrixelFeatures.from_backbone(
            config.backbone, adapter="fresh", architecture=config.architecture, device="cpu", dtype=torch.float32
        )
        if config.generation == 1:
            model = _first_generation(model)
    model = model.float()
    sides_px = [side_px // UPSCALE for side_px in teacher_sides_px(config, model.patch_px)]
    adapter = dataclasses.replace(model.config.adapter, short_side_px=sides_px[-1])
    if isinstance(model.upsampler, SecondUpsampler):
        grids = tuple(side_px // model.patch_px for side_px in sides_px)
        adapter = dataclasses.replace(adapter, grids=grids)
        model.upsampler.gain = model.upsampler.gain.on_grids(grids)
    if isinstance(model.upsampler, WithUniversal):
        model.upsampler.universal.requires_grad_(config.train_universal)
    model.config = dataclasses.replace(model.config, adapter=adapter)
    if model.adapter.blend is not None:
        model.adapter.blend.requires_grad_(False)  # fitted, not trained: brixel.train.fit_blend
    for extractor in model.adapter.extractors:
        assert isinstance(extractor, Extractor)
        extractor.drop_path = config.drop_path
    return model


def _first_generation(fresh: BrixelFeatures) -> BrixelFeatures:
    """A fresh adapter of the first generation on the same backbone."""
    adapter = dataclasses.replace(fresh.config.adapter, generation=1, grids=())
    upsampler = make_upsampler(fresh.config.backbone.vit, adapter)
    return BrixelFeatures(fresh.backbone, upsampler, dataclasses.replace(fresh.config, adapter=adapter))


def teacher_sides_px(config: TrainConfig, patch_px: int) -> list[int]:
    """Sides of the teacher's crops in pixels. BrixelError unless a quarter of each is a multiple of ``patch_px``."""
    one = _TEACHER_PATCHES * patch_px if config.teacher_px is None else config.teacher_px
    sides_px = [UPSCALE * size for size in config.sizes] or [one]
    for side_px in sides_px:
        check_teacher_px(side_px, patch_px)
    return sides_px


def describe_crops(config: TrainConfig, patch_px: int) -> str:
    """The sides of the teacher's and the student's crops, in words."""
    sides_px = teacher_sides_px(config, patch_px)
    teacher, student = (", ".join(str(side // part) for side in sides_px) for part in (1, UPSCALE))
    return f"{teacher} px for the teacher, {student} px for the student"


def describe_loss(config: TrainConfig) -> str:
    """The losses with their weights, in words."""
    weights = {"L1": config.l1, "cosine": config.cosine, "edge": config.edge, "spectral": config.spectral}
    return " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight)
