"""brixel: dense feature maps from frozen vision transformers, at four times their grid.

>>> from brixel import BrixelFeatures
>>> model = BrixelFeatures.from_pretrained("folder")
>>> feature_map = model.extract("photo.jpg")
"""

from importlib.metadata import version

from brixel.backbones.registry import KnownBackbone, list_models
from brixel.backbones.vit_config import ViTConfig
from brixel.brixel_features import BrixelFeatures
from brixel.errors import (
    BrixelError,
    CheckpointError,
    DownloadError,
    ImageError,
    MemoryLimitError,
    UploadError,
)
from brixel.extraction.map_folder import MapFolder
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.feature_table import FeatureTable
from brixel.feature_maps.matching import Matches
from brixel.feature_maps.pca import PcaBasis
from brixel.feature_maps.reduction.reduce import Reduce
from brixel.inference.upsample import upsample
from brixel.inference.view import view

__version__ = version("brixel")
__all__ = [
    "BrixelError",
    "BrixelFeatures",
    "CheckpointError",
    "DownloadError",
    "FeatureMap",
    "FeatureTable",
    "ImageError",
    "KnownBackbone",
    "MapFolder",
    "Matches",
    "MemoryLimitError",
    "PcaBasis",
    "Reduce",
    "UploadError",
    "ViTConfig",
    "__version__",
    "list_models",
    "upsample",
    "view",
]


def __dir__() -> list[str]:
    return sorted(__all__)
