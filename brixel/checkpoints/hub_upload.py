"""Upload of a model to the Hugging Face Hub: one commit, or none."""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from PIL import Image

from brixel.backbones.vit_config import ForeignConfig
from brixel.checkpoints.hub_download import (
    Access,
    Repository,
    Snapshot,
    client_errors,
    parse_repository,
    portable_sources,
    repositories_in,
    summary_of,
)
from brixel.checkpoints.model_card import CARD, LICENCE, PANEL, is_ours, model_card, read_card
from brixel.checkpoints.model_folder import ADAPTER, BACKBONE, CONFIG, check_includable, config_of_weights, save
from brixel.errors import BrixelError, DownloadError, UploadError
from brixel.feature_maps.panel import save_panel
from brixel.model.config import BrixelConfig
from brixel.model.student import Student

_FILES = (CONFIG, ADAPTER, BACKBONE, CARD, LICENCE, PANEL)  # files that brixel writes; others of a repository stay


def push(
    student: Student,
    config: BrixelConfig,
    name: str,
    draw: Callable[[], Image.Image],
    *,
    include_backbone: bool,
    weights: str,
    private: bool | None,
    token: str | bool | None,
    message: str,
) -> str:
    """Save a model with its card and the panel that ``draw`` makes, and upload it; returns "ORG/NAME@COMMIT"."""
    repository = check_pushable(name, token)
    check_includable(config.backbone, include_backbone)
    config = publishable(config_of_weights(config, include_backbone, weights), include_backbone)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_panel(draw(), folder / PANEL)
        licence = licence_copy(config, Access(token))
        if licence is not None:
            shutil.copy(licence, folder / LICENCE)
        card = model_card(config, repository.name, whole=include_backbone, panel=True, licence=licence is not None)
        save(student, config, folder, include_backbone=include_backbone, weights=weights, card=card)
        return upload(folder, repository, private=private, token=token, message=message)


def check_pushable(name: str, token: str | bool | None = None) -> Repository:
    """The repository of this name; BrixelError where it is no name of one, UploadError where nobody is logged in."""
    from huggingface_hub import constants, get_token

    repository = parse_repository(name) if isinstance(name, str) else None
    if repository is None or "@" in name:
        raise BrixelError(f"the repository is {name!r}; expected ORG/NAME, where ORG is your account or organisation")
    if constants.HF_HUB_OFFLINE:
        raise UploadError("HF_HUB_OFFLINE is set, so that nothing is uploaded: push without it")
    if token is False or (token in (None, True) and get_token() is None):
        raise UploadError("nobody is logged in: run `hf auth login` with a token that may write, or give token=")
    return repository


def publishable(config: BrixelConfig, include_backbone: bool) -> BrixelConfig:
    """The config as others can use it, without paths of this machine.

    Raises BrixelError where nobody else could load the model, as its backbone would be nowhere.
    """
    backbone = config.backbone
    sources = portable_sources(backbone.sources)
    if not sources and not include_backbone and not isinstance(backbone.vit, ForeignConfig):
        raise BrixelError(
            f"the backbone, {backbone.title}, is in no repository that brixel knows of (it came from "
            f"{', '.join(backbone.sources)}), so that nobody could load the model: push with include_backbone=True if "
            "its licence allows, or load the model with backbone='ORG/NAME' first"
        )
    return config.with_sources(sources)


def licence_copy(config: BrixelConfig, access: Access) -> Path | None:
    """The licence file of the backbone's repository; None where there is none or it cannot be fetched."""
    for repository in repositories_in(config.backbone.sources):
        with suppress(DownloadError):
            found = Snapshot(repository, access).find(LICENCE)
            if found is not None:
                return found
    return None


def upload(
    folder: Path, repository: Repository, *, private: bool | None, token: str | bool | None, message: str
) -> str:
    """Bring a repository to the state of a folder in one commit; returns "ORG/NAME@COMMIT".

    Creates the repository if it does not exist. A card that its owner has changed there is kept; a backbone that is not
    in the folder is deleted; files with other names stay. Raises UploadError, and then nothing there has changed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, name = HfApi(token=token), repository.name
    with client_errors(UploadError, lambda error, seconds: f"{name} was not changed: {_reason(error, name, seconds)}"):
        api.create_repo(name, private=private, exist_ok=True)
        present = api.list_repo_files(name)
        files = {path.name: path for path in sorted(folder.iterdir()) if path.name in _FILES}
        if CARD in present and not is_ours(read_card(Path(api.hf_hub_download(name, CARD)))):
            files.pop(CARD, None)
        added = [CommitOperationAdd(file, path) for file, path in files.items()]
        deleted = [CommitOperationDelete(BACKBONE)] if BACKBONE in present and BACKBONE not in files else []
        commit = api.create_commit(name, [*added, *deleted], commit_message=message)
    return f"{name}@{commit.oid}"


def _reason(error: Exception, name: str, seconds: float) -> str:
    from huggingface_hub import constants, errors

    server, summary = constants.ENDPOINT, summary_of(error)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, errors.HfHubHTTPError):  # the client wraps those of an upload
        cause = cause.__cause__
    if cause is None:
        return f"no usable answer from {server} within {seconds:.1f} s ({summary})"
    status = cause.response.status_code
    if status in (401, 403, 404):
        owner = name.partition("/")[0]
        return f"{server} answered {status}, so your token may not write to {owner} ({summary}); see `hf auth whoami`"
    return f"{server} answered {status} ({summary}); try again later"
