"""Where a model's files are: the one place that turns what a user or a config names into files on disk."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from brixel.backbones.registry import BRIXEL_TINY, KNOWN_BACKBONES
from brixel.checkpoints.hub_download import Access, Repository, Snapshot, parse_repository
from brixel.checkpoints.huggingface_config import read_json
from brixel.errors import BrixelError, CheckpointError, DamagedFileError, DownloadError, did_you_mean

BUNDLED = BRIXEL_TINY.name  # the model that comes with the package


@dataclass(frozen=True)
class ModelFiles:
    """A folder or a weight file on disk; with ``snapshot``, the part that was fetched of a repository on the Hub."""

    path: Path
    snapshot: Snapshot | None = None

    @property
    def source(self) -> str:
        """How a config names the place."""
        return str(self.snapshot.repository if self.snapshot else self.path.resolve())

    @property
    def commits(self) -> Mapping[str, str]:
        """The commit of the repository that files came from, by its name."""
        return {self.snapshot.repository.name: self.snapshot.commit} if self.snapshot else {}

    def need(self, file: str) -> Path:
        """The path of one of its files; a folder on disk is not asked whether it has it."""
        return self.snapshot.fetch(file) if self.snapshot else self.path / file

    def find(self, file: str) -> Path | None:
        """The path of one of its files, None where it has none such."""
        if self.snapshot:
            return self.snapshot.find(file)
        return self.path / file if (self.path / file).is_file() else None

    def fetch_weights(self) -> None:
        """Have a backbone's weights on disk."""
        if self.snapshot:
            with self.reading():
                self.snapshot.fetch_weights()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around reading its files: of a damaged one that was fetched, the error says what to do."""
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
    """The folder or file that a user named; ``what`` it is to be: "model", "backbone", or a file "adapter".

    A model named :data:`BUNDLED` is the package's own; a folder of that name is reached as "./brixel-tiny". A string
    ORG/NAME or ORG/NAME@REVISION that is no path on disk is a repository on the Hub: its `config.json` is fetched,
    and must be that of a ``what``. A backbone may also go by its name in the table of models. Raises
    DownloadError where that fails, BrixelError where there is nothing.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        module = ", or a torch module" if what == "backbone" else ""
        raise BrixelError(f"the {what} is a {type(name_or_path).__name__}; expected a path or a name{module}")
    if what == "model" and str(name_or_path) == BUNDLED:
        return ModelFiles(Path(__file__).parents[1] / "assets" / "tiny")
    path = Path(name_or_path).expanduser()
    if path.exists():
        return ModelFiles(path)
    known = KNOWN_BACKBONES.get(str(name_or_path)) if what == "backbone" else None
    if known is not None:
        missing = f"no source of {known.name} can be had"
        return locate_first(known.sources, downloaded=True, access=access or Access(), missing=missing)
    repository = parse_repository(name_or_path) if isinstance(name_or_path, str) and what != "adapter" else None
    if repository is None:
        expected = "a file on disk" if what == "adapter" else "a path on disk, or ORG/NAME of a repository on the Hub"
        if what == "backbone":
            expected += f", or a name that `brixel models` lists; {did_you_mean(str(name_or_path), KNOWN_BACKBONES)}"
        raise BrixelError(f"no {what} at {str(name_or_path)!r}: expected {expected}")
    if revision is not None:
        repository = Repository(repository.name, revision)
    return _fetched(repository, what, access or Access())


def _fetched(repository: Repository, what: str, access: Access) -> ModelFiles:
    snapshot = Snapshot(repository, access)
    place = ModelFiles(snapshot.folder, snapshot)
    with place.reading():
        content = read_json(snapshot.folder / "config.json")
    ours = "format_version" in content
    if what == "model" and not ours:
        kind = content.get("model_type") or content.get("architecture")
        told = f"{kind!r}" if kind else "something else"
        raise DownloadError(
            f"{repository} holds no brixel model but {told}: for a backbone use from_backbone, --backbone"
        )
    if what == "backbone" and ours:
        raise DownloadError(f"{repository} holds a brixel model, not a backbone alone: use from_pretrained, --model")
    return place


def locate_first(sources: Iterable[str], *, downloaded: bool, access: Access, missing: str) -> ModelFiles:
    """The first of several sources of a backbone that can be had, with its weights; a warning says if others could not.

    ``downloaded``: the sources are those of a config from the Hub, whose paths are not followed: they would be another
    machine's. ``missing`` opens the error where none can be had, which tells why of each.
    """
    reasons: list[str] = []
    failure: BrixelError | None = None
    for source in sources:
        try:
            place = _locate_source(source, downloaded, access)
        except (DownloadError, _Gone) as error:
            reasons.append(f"{source} ({error})")
            failure = error if failure is None or isinstance(error, DownloadError) else failure
            continue
        if reasons:
            logging.getLogger("brixel").warning("the backbone is that of %s, not %s", source, "; ".join(reasons))
        return place
    kind = DownloadError if isinstance(failure, DownloadError) else CheckpointError
    tried = "; ".join(reasons) or "its config names no place"
    raise kind(f"{missing}; tried: {tried}; give the backbone's folder, file or repository as backbone=") from failure


def repositories_in(sources: Iterable[str]) -> tuple[str, ...]:
    """Those of a config's sources that are repositories on the Hub."""
    return tuple(source for source in sources if parse_repository(source) is not None)


class _Gone(BrixelError):
    """A path that is not there, or is not followed."""


def _locate_source(source: str, downloaded: bool, access: Access) -> ModelFiles:
    repository = parse_repository(source)
    if downloaded and repository is None:
        raise _Gone("a path in a downloaded config is not followed")
    if repository is None and not Path(source).exists():
        raise _Gone("no longer there")
    place = _fetched(repository, "backbone", access) if downloaded and repository else None
    place = place or locate(source, what="backbone", access=access)
    place.fetch_weights()
    return place
