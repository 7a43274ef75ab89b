"""Reading a folder of maps, in files or in shards, and checking it against its manifests."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from brixel.errors import BrixelError, DamagedFileError
from brixel.extraction.clips import is_frame_list, listed_frames
from brixel.extraction.fitted_reduction import REDUCTION_FILE
from brixel.extraction.manifest import SourceImage, WrittenFile, latest_by_image, manifest_paths, read_manifests
from brixel.extraction.writers import checksum
from brixel.feature_maps.channel_basis import ChannelBasis
from brixel.feature_maps.containers.formats import BY_SUFFIX
from brixel.feature_maps.containers.shards import Shards
from brixel.feature_maps.feature_map import BASIS_KEY, FeatureMap
from brixel.feature_maps.feature_table import FeatureTable, is_table
from brixel.utils.fields import check_field, path_like
from brixel.utils.structured_files import check_regular, checking_content
from brixel.video.frames import is_video


class MapFolder(Mapping[str, FeatureMap]):
    """The maps in a folder that :func:`brixel.extraction.extract_files` or `brixel extract` wrote.

    A mapping from the relative path of an image below its input folder, such as ``"cats/7.jpg"``, to its
    :class:`brixel.FeatureMap`: features (D, Hf, Wf) on the CPU, in the dtype that was saved. Frames of a video are
    named by number and time, such as ``"clip.mp4/000120_4.004s"``. A map is read from disk when it is looked up; a
    reduced one has its basis, so that :meth:`brixel.FeatureMap.restored` undoes the reduction. Features of points and
    regions are read with :meth:`table`. Iteration follows the order in which the maps were written.

    Args:
        folder: the output folder of an extraction, in files of one map or of many.

    Raises:
        BrixelError: if the folder holds no manifest, or a damaged one, or one that names files outside of the folder.
            A lookup raises ``DamagedFileError`` for a file that cannot be read, ``MissingFileError`` for one that is
            gone, and ``KeyError`` for an image that has no map.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder: Path = check_field("folder", folder, path_like())
        self._files = {name: file for name, (_, file) in _read_entries(self.folder).items() if not is_frame_list(file)}
        self._holds_tables: bool | None = None

    def __getitem__(self, image: str) -> FeatureMap:
        found = self._read(image)
        if isinstance(found, FeatureTable):
            raise BrixelError(
                f"{self.folder} holds features of points or regions, no maps; get them with table({image!r})"
            )
        return found

    def table(self, image: str) -> FeatureTable:
        """The features of an image's points or regions, in a folder that holds those in place of maps.

        Raises:
            BrixelError: The folder holds maps; otherwise as a lookup.
        """
        found = self._read(image)
        if isinstance(found, FeatureMap):
            raise BrixelError(f"{self.folder} holds maps; get them with maps[{image!r}]")
        return found

    @functools.cached_property
    def basis(self) -> ChannelBasis | None:
        """The basis of maps that were reduced by ``pca``; None where the folder keeps none."""
        path = self.folder / REDUCTION_FILE
        return ChannelBasis.load(path)[0] if path.exists() else None

    def _read(self, image: str) -> FeatureMap | FeatureTable:
        """The map or table of an image, with its basis where the folder has it."""
        written = self._files[image]
        path = self.folder / written.file
        is_part = written.file != f"{image}{path.suffix}" and path.suffix in BY_SUFFIX
        found = _load_from_part(path, image) if is_part else self._load_from_file(path, image)
        is_ours = BASIS_KEY in found.meta and self.basis is not None and self.basis.digest == found.meta[BASIS_KEY]
        return dataclasses.replace(found, basis=self.basis) if is_ours else found

    def _load_from_file(self, path: Path, image: str) -> FeatureMap | FeatureTable:
        if self._holds_tables is None:  # all files of a folder are of one kind
            self._holds_tables = is_table(path)
        found = FeatureTable.load(path) if self._holds_tables else FeatureMap.load(path)
        stated = found.meta.get("picture", image)
        if PurePath(stated).name != PurePath(image).name and image.isprintable():  # other names may be stored escaped
            raise DamagedFileError(f"{path} is the map of {stated!r}, not of {image!r}: extract it again")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def verify(folder: Path) -> list[str]:
    """Compare the files of a folder with its manifests: a message for each file that is missing or differs.

    A file whose maps have all been written again to other files is not checked.
    """
    messages = []
    for written in {file.file: file for _, file in _read_entries(folder).values()}.values():
        path = folder / written.file
        try:
            if not path.is_dir():  # as groups of Zarr are
                check_regular(path)
            if checksum(path) != (written.size_bytes, written.sha256):
                messages.append(f"{path}: changed or damaged")
        except BrixelError as error:
            messages.append(str(error))
        except OSError as error:
            messages.append(f"{path}: cannot be read ({error.strerror or error})")
    return messages


def missing_maps(folder: Path, images: Sequence[tuple[Path, Path]]) -> list[str]:
    """A message for each image, as `find_images` returns them, that has no map in a folder or has changed since.

    Of a video the frames are counted that the last complete run wanted.
    """
    entries = _read_entries(folder)
    messages = []
    for image, relative_path in images:
        name = relative_path.as_posix()
        source, file = entries.get(name, (None, None))
        if source is None or file is None:
            messages.append(f"{image}: has no list of its frames" if is_video(image) else f"{image}: has no map")
        elif is_frame_list(file) and (
            missing := [each for each in listed_frames(folder, name)[1] if each not in entries]
        ):
            messages.append(f"{image}: {len(missing)} of its frames have no map")
        elif _changed(image, source):
            messages.append(f"{image}: has changed since its map was made")
    return messages


def _changed(image: Path, source: SourceImage) -> bool:
    stat = image.stat()
    return (stat.st_size, stat.st_mtime_ns) != (source.size_bytes, source.mtime_ns)


def _read_entries(folder: Path) -> dict[str, tuple[SourceImage, WrittenFile]]:
    if not manifest_paths(folder):
        raise BrixelError(f"{folder} holds no manifest: expected a folder that `brixel extract` wrote")
    return latest_by_image(read_manifests(folder))


def _load_from_part(path: Path, image: str) -> FeatureMap | FeatureTable:
    container = BY_SUFFIX[path.suffix]
    with checking_content(path, f"{container.title} of brixel", "extract again"):
        if isinstance(container, Shards) and container.is_table(path, image):
            return FeatureTable.from_stored(*container.read_parts(path, image))
        features, geometry = container.read(path, image)
        return FeatureMap(features, **geometry)
