"""A folder of maps read back, whether in files or in shards; and checked against its manifest."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from brixel.errors import BrixelError, DamagedFileError
from brixel.extraction.manifest import Written, current, manifests, read_manifests
from brixel.extraction.writers import SHARD_KEY, checksum
from brixel.feature_maps.feature_map import FeatureMap


class MapFolder(Mapping[str, FeatureMap]):
    """The maps that `brixel extract` wrote into a folder, by their images' places below the folders given to it.

    A map is read when it is asked for. Raises BrixelError for a folder without a manifest.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = {image: each for image, (_, each) in current(_noted(self.folder)).items()}

    def __getitem__(self, image: str) -> FeatureMap:
        written = self._files[image]
        path = self.folder / written.file
        if written.file != f"{image}{path.suffix}":
            return _from_shard(path, image)
        return FeatureMap.load(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def verify(folder: Path) -> list[str]:
    """What is wrong with the files of a folder: a line for each that is missing or is not what its manifest says.

    Files whose maps were all made anew elsewhere are nobody's.
    """
    wrong = []
    for written in {each.file: each for _, each in current(_noted(folder)).values()}.values():
        path = folder / written.file
        try:
            if checksum(path) != (written.bytes, written.sha256):
                wrong.append(f"{path}: changed or damaged")
        except OSError as error:
            wrong.append(f"{path}: cannot be read ({error.strerror or error})")
    return wrong


def _noted(folder: Path) -> list[Written]:
    if not manifests(folder):
        raise BrixelError(f"{folder} holds no manifest: expected a folder that `brixel extract` wrote")
    return read_manifests(folder)


def _from_shard(path: Path, image: str) -> FeatureMap:
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()[SHARD_KEY])[image]
            return FeatureMap(file.get_tensor(image), told["image_hw"], told["stride"], told["meta"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged or no shard of ours ({error}); extract again") from error
