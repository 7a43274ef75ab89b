"""Distillation: train an adapter and a head for a frozen backbone.

>>> from brixel.train import TrainConfig, distill
>>> distill(TrainConfig(backbone="dinov3-small", images=("photos",), out="run"))
"""

from brixel.model.losses import LossWeights, edge_loss, l1_loss, spectral_loss, total_loss
from brixel.train.config import TrainConfig
from brixel.train.trainer import distill

__all__ = ["LossWeights", "TrainConfig", "distill", "edge_loss", "l1_loss", "spectral_loss", "total_loss"]


def __dir__() -> list[str]:
    return sorted(__all__)
