"""Where a model's files are: turns what a user or a configuration names into files on disk."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from brixel.backbones.registry import BRIXEL_SMALL, BUNDLED_BACKBONES, KnownBackbone, closest_backbone, find_backbone
from brixel.checkpoints.hub_download import Access, Repository, Snapshot, parse_repository
from brixel.checkpoints.model_folder import BACKBONE, CONFIG
from brixel.errors import BrixelError, CheckpointError, DamagedFileError, DownloadError
from brixel.utils.structured_files import read_json

DEFAULT = BRIXEL_SMALL.name
"""The model in the package that is loaded unless another is named."""
BUNDLED_FOLDERS = {name: Path(__file__).parents[1] / "assets" / name for name in BUNDLED_BACKBONES}
"""The folders of the models in the package, with their backbones."""
_TIMM_NAME = re.compile(r"(?:vit|eva|eva02|beit|beitv2|deit|deit3|naflexvit|flexivit|samvit)_\w+")
_ADDRESS = re.compile(r"(?:hf[-_]hub:|hf://|https?://[^/]+/)(?:models/)?([^/]+/[^/]+)/?")


@dataclass(frozen=True)
class ModelFiles:
    """A folder or a weight file on disk.

    ``snapshot``: the repository on the Hub that it was fetched from, as far as its files were needed. ``bundled``: the
    backbone that it is, where it is part of the package.
    """

    path: Path
    snapshot: Snapshot | None = None
    bundled: KnownBackbone | None = None

    @property
    def source(self) -> str:
        """What a configuration calls these files."""
        if self.bundled:
            return self.bundled.name
        return str(self.snapshot.repository if self.snapshot else self.path.resolve())

    @property
    def commits(self) -> Mapping[str, str]:
        """The commit of the repository that the files came from, by its name."""
        return {self.snapshot.repository.name: self.snapshot.commit} if self.snapshot else {}

    def need(self, file: str) -> Path:
        """The path of one of the files; in a folder on disk, it may be missing."""
        return self.snapshot.fetch(file) if self.snapshot else self.path / file

    def find(self, file: str) -> Path | None:
        """The path of one of the files; None where it is missing."""
        if self.snapshot:
            return self.snapshot.find(file)
        return self.path / file if (self.path / file).is_file() else None

    def fetch_weights(self) -> None:
        """Fetch a backbone's weights, unless they are on disk."""
        if self.snapshot:
            with self.reading():
                self.snapshot.fetch_weights()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A context for reading the files: the error about a damaged file that was fetched says what to do."""
        try:
            yield
        except DamagedFileError as error:
            if self.snapshot is None:
                raise
            cache = self.snapshot.folder.parent.parent
            raise DownloadError(
                f"{error}. It came from {self.snapshot.repository}: delete {cache} and load again; "
                "if that does not help, the file is damaged on the Hub as well"
            ) from error


def locate(
    name_or_path: str | os.PathLike[str], *, what: str, revision: str | None = None, access: Access | None = None
) -> ModelFiles:
    """The files that a user named.

    In this order: a model in the package by its name (a folder of that name is "./brixel-tiny"); a path on disk; for
    models and backbones, a repository on the Hub, as a string ORG/NAME or ORG/NAME@REVISION, whose `config.json` is
    fetched; for backbones, a name or an alias in the table of models.

    Args:
        name_or_path: What the user named.
        what: What it must be: "model", "backbone", or the file of an "adapter".
        revision: Branch, tag or commit of the repository.
        access: How the Hub is reached.

    Raises:
        DownloadError: The Hub does not give it, or the repository holds something else.
        BrixelError: There is no such thing.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        module = ", or a torch module" if what == "backbone" else ""
        raise BrixelError(f"the {what} is a {type(name_or_path).__name__}; expected a path or a name{module}")
    name, access = str(name_or_path), access or Access()
    if what == "model" and name in BUNDLED_FOLDERS:
        _check_revision(name, "a model in the package", revision)
        return ModelFiles(BUNDLED_FOLDERS[name])
    path = Path(name_or_path).expanduser()
    if os.path.exists(path):
        _check_revision(name, "a path on disk", revision)
        _check_kind(path, name, what)
        return ModelFiles(path)
    row = find_backbone(name)
    if what == "model" and row is not None:
        raise BrixelError(f"{name} is a backbone, not a model with an adapter: use from_backbone")
    repository = parse_repository(name) if isinstance(name_or_path, str) and what != "adapter" else None
    if repository is not None:
        return _from_hub(_at(repository, revision), what, access)
    if what == "backbone" and row is not None:
        first = f": give {row.sources[0]!r} with it" if row.sources else ""
        _check_revision(name, f"a name that may mean several repositories{first}", revision)
        return _known(row, access)
    raise BrixelError(f"no {what} at {name!r}: {_expected(name, what)}")


def _check_revision(name: str, kind: str, revision: str | None) -> None:
    """Raise BrixelError for a revision of what has none."""
    if revision is not None:
        raise BrixelError(f"revision={revision!r} goes with ORG/NAME of a repository on the Hub; {name} is {kind}")


def _at(repository: Repository, revision: str | None) -> Repository:
    """A repository at the revision that was given beside it, if one was."""
    if revision is None:
        return repository
    if repository != Repository(repository.name) and repository.revision != revision:
        raise BrixelError(f"{repository} names another revision than revision={revision!r}: give one of them")
    return Repository(repository.name, revision)


def _check_kind(path: Path, name: str, what: str) -> None:
    """Raise BrixelError where a path is that of something else, which has a call of its own."""
    is_model = "format_version" in read_json(path / CONFIG) if path.is_dir() else False
    if is_model and what == "backbone":
        raise BrixelError(f"{name} is a brixel model, not a backbone: use from_pretrained")
    if is_model and what == "adapter":
        raise BrixelError(f"{name} is a brixel model, not an adapter of the paper's authors: use from_pretrained")
    if what == "model" and not path.is_dir():
        raise BrixelError(
            f"{name} is a file; a model is a folder that save_pretrained wrote. For the weights of a backbone use "
            "from_backbone; for an adapter of the paper's authors use from_release"
        )


def _expected(name: str, what: str) -> str:
    """What would have been right in place of a name, as a clause."""
    if what == "adapter":
        return "expected a file on disk"
    address = _ADDRESS.fullmatch(name)
    if address is not None:
        return f"give the name of the repository alone, {address[1]!r}"
    places = "expected a path on disk, or ORG/NAME of a repository on the Hub"
    if what == "model":
        return places
    closest = closest_backbone(name)
    if _TIMM_NAME.match(name):
        return (
            f"it looks like a name of timm. For DINOv2, DINOv3 and SigLIP give 'timm/{name}', with its tag after a "
            "dot; any other ViT as a module, timm.create_model(name, pretrained=True, dynamic_img_size=True)"
            + (f"; {closest}" if closest.startswith("did you mean") else "")
        )
    return f"{places}, or a name that `brixel models` lists; {closest}"


def locate_first(sources: Iterable[str], *, downloaded: bool, access: Access, missing: str) -> ModelFiles:
    """The first of a backbone's sources that is available, with its weights; a warning names those that are not.

    Args:
        sources: As in :class:`brixel.model.config.BackboneConfig`.
        downloaded: Whether they come from a config from the Hub. Paths in it are another machine's: not followed.
        access: How the Hub is reached.
        missing: Opens the error where none is available; the reasons follow.

    Raises:
        DownloadError: None is available, and at least one of them is on the Hub.
        CheckpointError: None is available, and all are paths.
    """
    reasons: list[tuple[str, BrixelError]] = []
    failure: BrixelError | None = None
    for source in sources:
        try:
            files = _from_source(source, downloaded, access)
            files.fetch_weights()
        except (DownloadError, _MissingPathError) as error:
            reasons.append((source, error))
            failure = error if failure is None or isinstance(error, DownloadError) else failure
            continue
        if reasons:
            left = "; ".join(f"{other} ({reason})" for other, reason in reasons)
            logging.getLogger("brixel").warning("the backbone is that of %s, not %s", source, left)
        return files
    error_class = DownloadError if isinstance(failure, DownloadError) else CheckpointError
    tried = " ".join(f"Tried {source}: {reason}." for source, reason in reasons) or "Its config names no source."
    raise error_class(f"{missing}. {tried} Give the backbone's folder, file or repository as backbone=") from failure


class _MissingPathError(BrixelError):
    """A path does not exist, or is not followed."""


def _from_source(source: str, downloaded: bool, access: Access) -> ModelFiles:
    if not downloaded and Path(source).exists():
        return ModelFiles(Path(source))
    if source in BUNDLED_BACKBONES:
        return _known(BUNDLED_BACKBONES[source], access)
    repository = parse_repository(source)
    if repository is not None:
        return _from_hub(repository, "backbone", access)
    raise _MissingPathError("a path in a downloaded config is not followed" if downloaded else "no longer there")


def _known(row: KnownBackbone, access: Access) -> ModelFiles:
    """The files of a backbone in the table of models."""
    if not row.sources:
        return ModelFiles(BUNDLED_FOLDERS[row.name] / BACKBONE, bundled=row)
    return locate_first(row.sources, downloaded=True, access=access, missing=f"no source of {row.name} is available")


def _from_hub(repository: Repository, what: str, access: Access) -> ModelFiles:
    snapshot = Snapshot(repository, access)
    files = ModelFiles(snapshot.folder, snapshot)
    with files.reading():
        content = read_json(snapshot.folder / CONFIG)
    is_model = "format_version" in content
    if what == "model" and not is_model:
        name = content.get("model_type") or content.get("architecture")
        found = repr(name) if name else "something else"
        raise DownloadError(f"{repository} holds no brixel model but {found}: for a backbone use from_backbone")
    if what == "backbone" and is_model:
        raise DownloadError(f"{repository} holds a brixel model, not a backbone alone: use from_pretrained")
    return files
