"""Files from the Hugging Face Hub: which of a repository are fetched, and what to do where that fails.

The client, `huggingface_hub`, is imported when something is to be fetched and not before. Its cache holds a file whole
or not at all, and the files of a commit together in one folder, to which we keep for all files of a model. A server
that does not answer it would try for minutes, so that we ask once, ourselves, before the first file that is not cached.
"""

import difflib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from brixel.backbones.registry import KNOWN_BACKBONES
from brixel.checkpoints.weight_files import PICKLED, WEIGHT_NAMES, shard_names
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
    """The repository that ORG/NAME or ORG/NAME@REVISION means; None for what can only be a path."""
    name, at, revision = text.partition("@")
    if not _NAME.fullmatch(name) or ".." in name or "--" in name or len(name) > 96:
        return None
    if name.endswith((".git", ".safetensors", ".json", *PICKLED)) or (at and not _REVISION.fullmatch(revision)):
        return None
    return Repository(name, revision or _MAIN)


class Snapshot:
    """A repository's files at one commit, in the client's cache; made with its `config.json`, the rest as asked for.

    Every method raises :class:`DownloadError`, with the client's own error as its cause.
    """

    def __init__(self, repository: Repository, access: Access) -> None:
        self.repository, self.access = repository, access
        self._revision = repository.revision
        self._answers = False  # whether the server did, to us
        self.folder = self.fetch("config.json").parent
        self.commit = self._revision = self.folder.name

    def fetch(self, file: str) -> Path:
        """The path of a file that the repository must have."""
        with self._explained(file):
            path = self._get(file)
        if path is None:
            raise DownloadError(f"{self.repository} holds no {file}{self._listing()}")
        return path

    def find(self, file: str) -> Path | None:
        """The path of a file that the repository may have; None where it has not, or offline where it is not cached."""
        with self._explained(file):
            if self.offline() and self._cached(file) is None:
                return None
            return self._get(file)

    def holds(self, file: str) -> bool:
        """Whether the repository has a file, without fetching it; offline, whether it is in the cache."""
        from huggingface_hub.errors import EntryNotFoundError

        with self._explained(file):
            if self._cached(file) is not None or self.offline():
                return bool(self._cached(file))
            try:
                self._ask(file)
            except EntryNotFoundError:
                return False
            return True

    def fetch_weights(self) -> None:
        """Fetch a backbone's weight file, or all its shards, and its preprocessing, where it has any."""
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
                with suppress(EntryNotFoundError):  # the client asks again, and remembers what is not there
                    self._ask(file)
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
        """Whether a file is in the cache; False where the cache knows that this very commit has none."""
        from huggingface_hub import try_to_load_from_cache

        name, revision = self.repository.name, self._revision
        found = try_to_load_from_cache(name, file, cache_dir=self.access.cache_dir, revision=revision)
        if found is None or isinstance(found, str):
            return None if found is None else True
        return False if _COMMIT.fullmatch(revision) else None

    def _ask(self, file: str) -> None:
        """One small request, which is not repeated, so that a server that does not answer is noticed in seconds."""
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError

        try:
            url = hf_hub_url(self.repository.name, file, revision=self._revision)
            get_hf_file_metadata(url, token=self.access.token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except EntryNotFoundError:
            self._answers = True
            raise
        self._answers = True

    def offline(self) -> bool:
        """Whether downloads are off, by this call or the environment."""
        from huggingface_hub import constants

        return self.access.local_files_only or constants.HF_HUB_OFFLINE

    def _listing(self) -> str:
        """A clause with the names of some of the repository's files, if they can be had."""
        from huggingface_hub import HfApi

        try:
            if self.offline():
                return ""
            files = HfApi().list_repo_files(
                self.repository.name, revision=self.repository.revision, token=self.access.token
            )
        except Exception:  # there is an error to tell already
            return ""
        shown = ", ".join(files[:8]) or "nothing"
        return f"; it holds {shown}{', ...' if len(files) > 8 else ''}"

    @contextmanager
    def _explained(self, file: str) -> Iterator[None]:
        """Errors of the client, of its HTTP library (another one in each version) and of the disk become ours."""
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            raise DownloadError(self._explain(error, file, time.monotonic() - started)) from error

    def _explain(self, error: Exception, file: str, seconds: float) -> str:
        """What came and what to do."""
        from huggingface_hub import constants, errors

        name, server = self.repository.name, constants.ENDPOINT
        if self.offline() and isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            cache = self.access.cache_dir or constants.HF_HUB_CACHE
            return (
                f"{file} of {self.repository} is not in the cache, {cache}, and {_OFFLINE}: fetch it once with them on"
            )
        if isinstance(error, errors.GatedRepoError):
            return _gated(self.repository.name, error.response.status_code, f"{server}/{name}")
        if isinstance(error, errors.RepositoryNotFoundError):
            near = _near(name)
            return f"no repository {name} at {server}, nor such a path here{near}; a private one needs `hf auth login`"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{name} has no revision {self._revision!r}; those it has: {server}/{name}/tree/main"
        told = f"{type(error).__name__}: {' '.join(str(error.__cause__ or error).split())[:200]}"
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            todo = "your token was refused: `hf auth login` again" if status in (401, 403) else "try again later"
            return f"{server} answered {status} for {file} of {self.repository} ({told}): {todo}"
        if self._answers:
            return f"{file} of {self.repository} could not be fetched whole ({told}); no part of it is used: try again"
        return (
            f"{server} did not answer for {self.repository} in {seconds:.1f} s ({told}): check network and HF_ENDPOINT"
        )


def _gated(name: str, status: int, url: str) -> str:
    free = next((row.timm for row in KNOWN_BACKBONES.values() if row.huggingface == name), None)
    other = f"; {free} holds the same weights without a gate" if free else ""
    if status == 401:
        return f"{name} is gated and you are not logged in: ask for access at {url}, then `hf auth login`{other}"
    return f"{name} is gated and your account was not let in: ask for access at {url}{other}"


def _near(name: str) -> str:
    """A clause with the known repository of nearly this name."""
    known = [each for row in KNOWN_BACKBONES.values() for each in row.sources]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {near[0]!r}?" if near and near[0] != name else ""
