"""Download of files from the Hugging Face Hub: which of a repository are fetched, and what to do where that fails.

The client, `huggingface_hub`, is imported when it is needed. Its cache holds complete files only, and those of a commit
in one folder; all files of a model come from one commit. The client retries for minutes where a server does not answer,
so the first file that is not cached is preceded by a single request without retries.
"""

import difflib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from brixel.backbones.registry import BUNDLED_BACKBONES, KNOWN_BACKBONES, find_backbone
from brixel.checkpoints.weight_files import WEIGHT_NAMES, named_as_weights, shard_names
from brixel.errors import BrixelError, DownloadError

_MAIN = "main"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9]([\w.-]*\w)?", re.ASCII)
_REVISION = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OFFLINE = "downloads are off (HF_HUB_OFFLINE or local_files_only)"


@dataclass(frozen=True)
class Repository:
    """A repository of models on the Hub, ORG/NAME, at a branch, a tag or a commit."""

    name: str
    revision: str = _MAIN

    def __post_init__(self) -> None:
        if not _REVISION.fullmatch(self.revision):  # it becomes part of a path in the cache
            raise BrixelError(f"revision is {self.revision!r}; expected a branch, a tag or a commit of {self.name}")

    def __str__(self) -> str:
        return self.name if self.revision == _MAIN else f"{self.name}@{self.revision}"


@dataclass(frozen=True)
class Access:
    """How the Hub is reached. ``token``: None for the one of `hf auth login`, False for none."""

    token: str | bool | None = None
    cache_dir: Path | None = None
    local_files_only: bool = False


def parse_repository(text: str) -> Repository | None:
    """The repository that ORG/NAME or ORG/NAME@REVISION names; None for a text that can only be a path."""
    name, at, revision = text.partition("@")
    if not _NAME.fullmatch(name) or ".." in name or "--" in name or len(name) > 96:
        return None
    if name.endswith((".git", ".json")) or named_as_weights(name) or (at and not _REVISION.fullmatch(revision)):
        return None
    return Repository(name, revision or _MAIN)


def repositories_in(sources: Iterable[str]) -> list[Repository]:
    """The sources of a config that are repositories on the Hub."""
    return list(filter(None, map(parse_repository, sources)))


def portable_sources(sources: Iterable[str]) -> tuple[str, ...]:
    """The sources of a config that mean the same on every machine: repositories, and the model in the package."""
    return tuple(source for source in sources if source in BUNDLED_BACKBONES or parse_repository(source))


class Snapshot:
    """A repository's files at one commit, in the client's cache: its `config.json`, others when they are needed.

    Every method raises :class:`DownloadError`, with the client's own error as its cause.
    """

    def __init__(self, repository: Repository, access: Access) -> None:
        self.repository, self.access = repository, access
        self._revision = repository.revision
        self._answers = False  # whether the server has answered a request
        self.folder = self.fetch("config.json").parent
        self.commit = self._revision = self.folder.name

    def fetch(self, file: str) -> Path:
        """The path of a file that the repository must have."""
        with self._download_errors(file):
            path = self._get(file)
        if path is None:
            raise DownloadError(f"{self.repository} holds no {file}{self._listing()}")
        return path

    def find(self, file: str) -> Path | None:
        """The path of a file that the repository may have; None where it is missing, or not cached when offline."""
        with self._download_errors(file):
            if self.offline() and self._cached(file) is None:
                return None
            return self._get(file)

    def holds(self, file: str) -> bool:
        """Whether the repository has a file, without fetching it; offline, whether it is in the cache."""
        with self._download_errors(file):
            cached = self._cached(file)
            return bool(cached) if cached is not None or self.offline() else self._ask(file)

    def fetch_weights(self) -> None:
        """Fetch a backbone's weight file or all its shards, and its preprocessing if it has one."""
        self.find("preprocessor_config.json")
        for name in WEIGHT_NAMES:
            found = self.find(name)
            if found is not None:
                for shard in shard_names(found) if name.endswith(".index.json") else ():
                    self.fetch(shard)
                return
        where = f"cached, and {_OFFLINE}" if self.offline() else f"there{self._listing()}"
        raise DownloadError(f"no weights of {self.repository} are {where}; expected {' or '.join(WEIGHT_NAMES[:3])}")

    def _get(self, file: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        cached = self._cached(file)
        if cached is False:
            return None
        try:
            if cached is None and not self._answers and not self.offline():
                self._ask(file)  # where the file is missing, the client asks again, and remembers that
            path = hf_hub_download(
                self.repository.name,
                file,
                revision=self._revision,
                cache_dir=self.access.cache_dir,
                token=self.access.token,
                local_files_only=self.access.local_files_only,
            )
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None
        return Path(path)

    def _cached(self, file: str) -> bool | None:
        """Whether a file is in the cache: True, None for no, False where the cache knows that this commit lacks it."""
        from huggingface_hub import try_to_load_from_cache

        name, revision = self.repository.name, self._revision
        found = try_to_load_from_cache(name, file, cache_dir=self.access.cache_dir, revision=revision)
        if isinstance(found, str):
            return True
        return False if found is not None and _COMMIT.fullmatch(revision) else None

    def _ask(self, file: str) -> bool:
        """Whether the repository has a file, by one small request without retries.

        So a server that does not answer is noticed in seconds.
        """
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError

        url = hf_hub_url(self.repository.name, file, revision=self._revision)
        found = True
        try:
            get_hf_file_metadata(url, token=self.access.token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except EntryNotFoundError:
            found = False
        self._answers = True
        return found

    def offline(self) -> bool:
        """Whether downloads are off, by this call or the environment."""
        from huggingface_hub import constants

        return self.access.local_files_only or constants.HF_HUB_OFFLINE

    def _listing(self) -> str:
        """A clause with the names of some of the repository's files; empty where they cannot be listed."""
        from huggingface_hub import HfApi

        try:
            if self.offline():
                return ""
            repository, token = self.repository, self.access.token
            files = HfApi().list_repo_files(repository.name, revision=repository.revision, token=token)
        except Exception:  # an error is being reported already
            return ""
        shown = ", ".join(files[:8]) or "nothing"
        return f"; it holds {shown}{', ...' if len(files) > 8 else ''}"

    def _download_errors(self, file: str) -> AbstractContextManager[None]:
        return client_errors(DownloadError, lambda error, seconds: self._message(error, file, seconds))

    def _message(self, error: Exception, file: str, seconds: float) -> str:
        from huggingface_hub import constants, errors

        name, server, what = self.repository.name, constants.ENDPOINT, f"{file} of {self.repository}"
        if self.offline() and isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            cache = self.access.cache_dir or constants.HF_HUB_CACHE
            return f"{what} is not in the cache, {cache}, and {_OFFLINE}: fetch it once while online"
        if isinstance(error, errors.GatedRepoError):
            return _gated(name, error.response.status_code, f"{server}/{name}")
        if isinstance(error, errors.RepositoryNotFoundError):
            close = _closest(name)
            return f"no repository {name} at {server}, nor such a path here{close}; a private one needs `hf auth login`"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{name} has no revision {self._revision!r}; those it has: {server}/{name}/tree/main"
        summary = summary_of(error)
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            todo = "your token was refused: `hf auth login` again" if status in (401, 403) else "try again later"
            return f"{server} answered {status} for {what} ({summary}): {todo}"
        if self._answers:
            return f"{what} could not be fetched whole ({summary}); no part of it is used: try again"
        waited = f"did not answer for {self.repository} in {seconds:.1f} s"
        return f"{server} {waited} ({summary}): check network and HF_ENDPOINT"


@contextmanager
def client_errors(error_class: type[BrixelError], message: Callable[[Exception, float], str]) -> Iterator[None]:
    """Turn errors of the client, of its HTTP library (which depends on its version) and of the disk into ours.

    ``message`` makes the text from the error and the seconds until it came.
    """
    started = time.monotonic()
    try:
        yield
    except Exception as error:
        raise error_class(message(error, time.monotonic() - started)) from error


def summary_of(error: Exception) -> str:
    """Class and text of an error, or the text of its cause, on one line of limited length."""
    return f"{type(error).__name__}: {' '.join(str(error.__cause__ or error).split())[:200]}"


def _gated(name: str, status: int, url: str) -> str:
    row = find_backbone(name)
    free = f"; {row.timm} holds the same weights without a gate" if row and row.huggingface == name else ""
    if status == 401:
        return f"{name} is gated and you are not logged in: ask for access at {url}, then `hf auth login`{free}"
    return f"{name} is gated and your account was not let in: ask for access at {url}{free}"


def _closest(name: str) -> str:
    """A clause with the known repository whose name is close."""
    known = [repository for row in KNOWN_BACKBONES.values() for repository in row.sources]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close and close[0] != name else ""
