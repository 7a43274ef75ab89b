"""Frozen backbones: the protocol, our own ViT, wrappers for models of other packages, and the known models.

`docs/add-a-backbone.md` shows how to write one.
"""

from brixel.backbones.base import Backbone
from brixel.backbones.wrappers import TimmBackbone, TransformersBackbone

__all__ = ["Backbone", "TimmBackbone", "TransformersBackbone"]


def __dir__() -> list[str]:
    return sorted(__all__)
