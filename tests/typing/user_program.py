"""What a user's program sees of brixel's types: checked by mypy and pyright against the installed wheel, not run."""

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import numpy as np
import torch

import brixel
from brixel import BrixelError, BrixelFeatures, FeatureMap, MapFolder, Matches, PcaBasis
from brixel.data import ImageDataset, collate


def features_of(path: Path) -> FeatureMap:
    model = BrixelFeatures.from_pretrained("brixel-tiny", device="cpu")
    assert_type(model, BrixelFeatures)
    assert_type(model.stream([path, str(path), np.zeros((4, 4, 3), np.uint8)], batch_size=2), Iterator[FeatureMap])
    return model.extract(path, scale=8, memory_limit="4GiB")


def use(a: FeatureMap, b: FeatureMap) -> None:
    assert_type(a.image_hw, tuple[int, int])
    assert_type(a.at([(1.0, 2.0)]), torch.Tensor)
    assert_type(a.similarity((1.0, 2.0), of=b), torch.Tensor)
    assert_type(a.match(b, mutual=True), Matches)
    assert_type(PcaBasis.fit([a.features]), PcaBasis)
    assert_type(brixel.upsample(torch.zeros(1, 8, 4, 4), "photo.jpg"), torch.Tensor)


def read(folder: str) -> FeatureMap:
    try:
        return MapFolder(folder)["a.jpg"]
    except BrixelError as error:
        raise SystemExit(str(error)) from error


def batches_of(model: BrixelFeatures, paths: list[Path]) -> None:
    data = ImageDataset(paths, model)
    for batch in collate([data[0], data[1]]):
        assert_type(batch.pixels, torch.Tensor)
        assert_type(batch.to("cuda").at_image_size(batch.pixels), list[torch.Tensor])
