"""A saved model's folder onto the Hub: one commit, or none."""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from brixel.backbones.vit_config import ForeignConfig
from brixel.checkpoints.hub_download import Access, Repository, Snapshot, parse_repository
from brixel.checkpoints.locate_files import repositories_in
from brixel.checkpoints.model_card import CARD, LICENCE, PANEL, is_ours, model_card
from brixel.checkpoints.model_folder import ADAPTER, BACKBONE, CONFIG, check_includable, save
from brixel.errors import BrixelError, DownloadError, UploadError
from brixel.feature_maps.panel import save_panel
from brixel.model.config import BrixelConfig
from brixel.model.student import Student

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_FILES = (CONFIG, ADAPTER, BACKBONE, CARD, LICENCE, PANEL)  # that we write; others of a repository stay


def push(
    student: Student,
    config: BrixelConfig,
    name: str,
    draw: Callable[[], Image.Image],
    *,
    include_backbone: bool,
    private: bool | None,
    token: str | bool | None,
    message: str,
) -> str:
    """Save a model with its card and the image that ``draw`` makes, and upload it; "ORG/NAME@COMMIT"."""
    repository = check_pushable(name, token)
    check_includable(config.backbone, include_backbone)
    config = publishable(config, include_backbone)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_panel(draw(), folder / PANEL)
        licence = licence_copy(config, Access(token))
        if licence is not None:
            shutil.copy(licence, folder / LICENCE)
        card = model_card(config, repository.name, whole=include_backbone, panel=True, licence=licence is not None)
        save(student, config, folder, include_backbone=include_backbone, card=card)
        return upload(folder, repository, private=private, token=token, message=message)


def check_pushable(name: str, token: str | bool | None = None) -> Repository:
    """The repository that a name means; BrixelError where it is none or nothing can be uploaded at all."""
    repository = parse_repository(name) if isinstance(name, str) else None
    if repository is None or "@" in name:
        raise BrixelError(f"the repository is {name!r}; expected ORG/NAME, where ORG is your account or organisation")
    _check_login(token)
    return repository


def publishable(config: BrixelConfig, include_backbone: bool) -> BrixelConfig:
    """The config as others can use it, without paths of this machine.

    Raises BrixelError where the model could not be loaded from the Hub, as its backbone would be nowhere.
    """
    backbone = config.backbone
    published = repositories_in(backbone.sources)
    if not published and not include_backbone and not isinstance(backbone.vit, ForeignConfig):
        raise BrixelError(
            f"the backbone, {backbone.title}, is in no repository that brixel knows of (it came from "
            f"{', '.join(backbone.sources)}), so that nobody could load the model: push with include_backbone=True if "
            "its licence allows, or load the model with backbone='ORG/NAME' first"
        )
    return dataclasses.replace(config, backbone=dataclasses.replace(backbone, sources=published))


def licence_copy(config: BrixelConfig, access: Access) -> Path | None:
    """The text of the backbone's licence, out of its repository; None where it has none or cannot be reached."""
    for source in repositories_in(config.backbone.sources):
        with suppress(DownloadError):
            repository = parse_repository(source)
            found = Snapshot(repository, access).find(LICENCE) if repository else None
            if found is not None:
                return found
    return None


def _check_login(token: str | bool | None) -> None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UploadError("HF_HUB_OFFLINE is set, so that nothing is uploaded: push with it off")
    if token is False or (token in (None, True) and get_token() is None):
        raise UploadError("nobody is logged in: run `hf auth login` with a token that may write, or give token=")


def upload(
    folder: Path, repository: Repository, *, private: bool | None, token: str | bool | None, message: str
) -> str:
    """Bring a repository to the state of a folder in one commit; "ORG/NAME@COMMIT".

    The repository is made if need be. A card that its owner has changed there is left; a backbone that is not in the
    folder is taken out; files of other names stay. Raises UploadError, and then nothing there has changed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, name = HfApi(token=token), repository.name
    with _explained(name):
        api.create_repo(name, private=private, exist_ok=True)
        there = api.list_repo_files(name)
        kept = {CARD} if CARD in there and not is_ours(_text(api, name)) else set()
        files = sorted(path for path in folder.iterdir() if path.name in _FILES and path.name not in kept)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path.name, path) for path in files
        ]
        if BACKBONE in there and not (folder / BACKBONE).exists():
            operations.append(CommitOperationDelete(BACKBONE))
        commit = api.create_commit(name, operations, commit_message=message)
    return f"{name}@{commit.oid}"


def _text(api: "HfApi", name: str) -> str:
    return Path(api.hf_hub_download(name, CARD)).read_text(encoding="utf-8", errors="replace")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Errors of the client and of its HTTP library become ours."""
    started = time.monotonic()
    try:
        yield
    except Exception as error:
        raise UploadError(_explain(error, name, time.monotonic() - started)) from error


def _explain(error: Exception, name: str, seconds: float) -> str:
    from huggingface_hub import constants, errors

    server = constants.ENDPOINT
    told = f"{type(error).__name__}: {' '.join(str(error.__cause__ or error).split())[:200]}"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, errors.HfHubHTTPError):  # the client wraps those of an upload
        cause = cause.__cause__
    if cause is None:
        return f"{name} was not changed: no answer from {server} within {seconds:.1f} s, or none of use ({told})"
    status = cause.response.status_code
    if status in (401, 403, 404):
        return (
            f"{name} was not changed: {server} answered {status}, so your token is not one that may write to "
            f"{name.partition('/')[0]} ({told}); see `hf auth whoami`"
        )
    return f"{name} was not changed: {server} answered {status} ({told}); try again later"
