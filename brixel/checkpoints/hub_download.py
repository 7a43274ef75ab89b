"""Download of files from the Hugging Face Hub: which of a repository are fetched, and what to do where that fails.

The client, `huggingface_hub`, is imported when it is needed. Its cache holds complete files only, and those of a commit
in one folder; all files of a model come from one commit. The client retries for minutes where a server does not answer,
so the first file that is not cached is preceded by a single request without retries. It has no limit for a server that
keeps sending a little, so its calls are watched, and it does not compare checksums, so that is done here.
"""

import difflib
import functools
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from brixel.backbones.registry import BUNDLED_BACKBONES, KNOWN_BACKBONES, find_backbone
from brixel.checkpoints.weight_files import WEIGHT_NAMES, named_as_weights, shard_names
from brixel.errors import BrixelError, DownloadError

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Files that may state how images are normalised."""

_MAIN = "main"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9]([\w.-]*\w)?", re.ASCII)
_REVISION = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OFFLINE = "downloads are off (HF_HUB_OFFLINE or local_files_only)"
_ANSWER_S = 30.0
"""How long a server has for the answer to one small request."""
_PROGRESS_S = 300.0
"""How long a download may bring nothing new to disk. The client writes 10 MB at a time, so 35 kB/s are too slow."""

Result = TypeVar("Result")


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
        self._unreachable = False  # whether there is no network, as far as is known
        self._was_cached = self._cached("config.json") is True
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
            try:
                return self._get(file)
            except Exception as error:
                if not (self._was_cached and _is_no_answer(error)):
                    raise
                self._unreachable = True  # what is cached works without a network
                return None

    def holds(self, file: str) -> bool:
        """Whether the repository has a file, without fetching it; offline, whether it is in the cache."""
        with self._download_errors(file):
            cached = self._cached(file)
            return bool(cached) if cached is not None or self.offline() else self._ask(file)

    def fetch_weights(self) -> None:
        """Fetch a backbone's weight file or all its shards, and its preprocessing if it has one."""
        if not any(self.find(name) for name in PROCESSORS) and self.offline():
            unknown = [name for name in PROCESSORS if self._cached(name) is None]
            if unknown:
                logging.getLogger("brixel").warning(
                    "%s: %s not in the cache; mean and deviation are those of its kind",
                    self.repository,
                    " and ".join(unknown),
                )
        for name in WEIGHT_NAMES:
            found = self.find(name)
            if found is not None:
                for shard in shard_names(found) if name.endswith(".index.json") else ():
                    self.fetch(shard)
                return
        offline = _OFFLINE if not self._unreachable else "the Hub does not answer"
        where = f"cached, and {offline}" if self.offline() else f"there{self._listing()}"
        raise DownloadError(f"no weights of {self.repository} are {where}; expected {' or '.join(WEIGHT_NAMES[:3])}")

    def _get(self, file: str) -> Path | None:
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        cached = self._cached(file)
        if cached is False:
            return None
        try:
            if cached is None and not self._answers and not self.offline():
                self._ask(file)  # where the file is missing, the client asks again, and remembers that
            download = functools.partial(self._download, file, local=self.offline())
            path = Path(watched(download, _PROGRESS_S, self._sizes))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None
        except Exception as error:
            if not (cached and _is_no_answer(error)):
                raise
            path = Path(self._download(file, local=True))
        if cached is None:
            self._check_bytes(path, file)
        return path

    def _download(self, file: str, *, local: bool) -> str:
        from huggingface_hub import hf_hub_download

        access = self.access
        return hf_hub_download(
            self.repository.name,
            file,
            revision=self._revision,
            cache_dir=access.cache_dir,
            token=access.token,
            local_files_only=local,
        )

    def _sizes(self) -> list[int]:
        """The sizes of the files of the repository in the cache, also of those that are not complete."""
        from huggingface_hub import constants

        cache = Path(self.access.cache_dir or constants.HF_HUB_CACHE)
        blobs = cache / f"models--{self.repository.name.replace('/', '--')}" / "blobs"
        return sorted(_size(path) for path in blobs.glob("*"))

    def _check_bytes(self, path: Path, file: str) -> None:
        """Raise DownloadError, and delete it, where a file is not what its sha256, the name of its blob, states."""
        blob = path.parent / os.readlink(path) if path.is_symlink() else path
        if not _SHA256.fullmatch(blob.name):  # small files have another checksum; without links there is no name
            return
        with blob.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != blob.name:
            path.unlink()
            blob.unlink(missing_ok=True)
            raise DownloadError(
                f"{file} of {self.repository} has not the bytes that the Hub states: their sha256 is {found[:12]}..., "
                f"not {blob.name[:12]}... It was deleted: load again. If that does not help, something between here "
                "and the Hub changes files"
            )

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
            ask = functools.partial(
                get_hf_file_metadata, url, token=self.access.token, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
            watched(ask, _ANSWER_S)
        except EntryNotFoundError:
            found = False
        self._answers = True
        return found

    def offline(self) -> bool:
        """Whether downloads are off, by this call or the environment."""
        from huggingface_hub import constants

        return self.access.local_files_only or constants.HF_HUB_OFFLINE or self._unreachable

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
            return f"{what} is not in the cache, {cache}, and {_OFFLINE}. Fetch it once while online"
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
        if isinstance(error, TooSlowError):
            return f"{server} was given up for {what}: {error}. No part of it is used. Try again later"
        if self._answers:
            return f"{what} could not be fetched whole ({summary}); no part of it is used: try again"
        waited = f"did not answer for {self.repository} in {seconds:.1f} s"
        return f"{server} {waited} ({summary}): check network and HF_ENDPOINT"


class TooSlowError(Exception):
    """A server sends too little for too long."""


def watched(call: Callable[[], Result], seconds: float, progress: Callable[[], object] = lambda: None) -> Result:
    """The result of a call of the client. It is given up when ``progress`` has been the same for so many seconds.

    Raises TooSlowError then, and whatever the call raises.
    """
    from huggingface_hub import close_session

    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # of any kind, for the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name="brixel-download", daemon=True)
    thread.start()
    seen, since = progress(), time.monotonic()
    while thread.is_alive():
        thread.join(min(1.0, seconds / 4))
        now = progress()
        if now != seen:
            seen, since = now, time.monotonic()
        elif thread.is_alive() and time.monotonic() - since > seconds:
            close_session()  # which ends the call, with an error that nobody waits for
            raise TooSlowError(f"it sent too little for {seconds:.0f} s")
    if errors:
        raise errors[0]
    return results[0]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # moved to its place meanwhile
        return 0


def _is_no_answer(error: Exception) -> bool:
    """Whether an error of the client says nothing about the file: no network, a server in trouble, a closed gate."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code != 404
    return not isinstance(error, EntryNotFoundError | BrixelError)


@contextmanager
def client_errors(error_class: type[BrixelError], message: Callable[[Exception, float], str]) -> Iterator[None]:
    """Turn errors of the client, of its HTTP library (which depends on its version) and of the disk into ours.

    ``message`` makes the text from the error and the seconds until it came.
    """
    started = time.monotonic()
    try:
        yield
    except BrixelError:
        raise
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
