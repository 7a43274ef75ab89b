"""The formats of files with many maps, by the name of their sink and by the ending of their files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from brixel.errors import BrixelError, did_you_mean
from brixel.feature_maps.containers.base import Container
from brixel.feature_maps.containers.parquet import Parquet
from brixel.feature_maps.containers.shards import Shards
from brixel.feature_maps.containers.webdataset_tars import WebdatasetTars
from brixel.feature_maps.containers.zarr_groups import ZarrGroups
from brixel.utils.fields import short_repr

CONTAINERS: Mapping[str, Container] = {
    "shards": Shards(),
    "parquet": Parquet(),
    "zarr": ZarrGroups(),
    "webdataset": WebdatasetTars(),
}
"""By the name of the sink."""
BY_SUFFIX: Mapping[str, Container] = {container.suffix: container for container in CONTAINERS.values()}


def load_from_container(path: Path, image: str | None) -> tuple[Tensor, dict[str, Any]]:
    """Features and geometry of an image's map in a container; of its only map where no image is named."""
    container = BY_SUFFIX[path.suffix]
    images = container.images(path)
    if image is None:
        if len(images) != 1:
            raise BrixelError(f"{path} holds the maps of {len(images)} images; name one of them with image=")
        image = images[0]
    if image not in images:
        raise BrixelError(f"{path} holds no map of {short_repr(image)}; {did_you_mean(str(image), images)}")
    return container.read(path, image)
