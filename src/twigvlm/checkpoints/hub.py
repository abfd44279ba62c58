"""Twigs on the Hugging Face hub."""

import re
from os import PathLike, fspath
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from twigvlm.checkpoints.card import MARK
from twigvlm.errors import TwigVLMError, one_line

# Of the hub's HTTP client, which is another one from version to version; a connection that fails may be no OSError.
_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
_ERRORS = (OSError, ValueError, _HTTPError)


def is_hub_id(name: str) -> bool:
    """Whether a name can only mean a repository of the hub, `user/name`: nothing here is called so."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()


def fetch(path: str | PathLike[str], files: list[str], revision: str | None, token: str | None) -> Path:
    """The directory of a twig: a local one as it is, a hub id's files downloaded once.

    Args:
        path: the directory, or the hub id.
        files: names of the files to download.
        revision: branch, tag or commit of a hub id; None: the main branch.
        token: for a private repository; None: that of the login.

    Raises:
        TwigVLMError: the hub does not have it, keeps it from you, or cannot be reached.
    """
    name = fspath(path)
    if not is_hub_id(name):
        if revision is not None:
            raise TwigVLMError(f"revision={revision!r}: {name} is not a hub id; leave revision out")
        return Path(name)
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, token=token, allow_patterns=files))
    except _ERRORS as error:
        raise TwigVLMError(f"{name}: {_reason(error, revision)}") from error


def push(
    folder: Path, name: str, private: bool | None, token: str | None, message: str, card: str, replaced: list[str]
) -> str:
    """Upload a directory to a repository, which is made if need be.

    Args:
        folder: the directory.
        name: of the repository.
        private: whether a new repository is private; None: the default of the account.
        token: None: that of the login.
        message: of the commit.
        card: file that stays where the repository has one that is not ours.
        replaced: files that go if the directory has none.

    Returns:
        The page of the repository.

    Raises:
        TwigVLMError: the hub refuses or cannot be reached.
    """
    try:
        page = huggingface_hub.create_repo(name, private=private, token=token, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=page.repo_id,
            folder_path=folder,
            commit_message=message,
            token=token,
            ignore_patterns=[] if _is_ours(page.repo_id, card, token) else [card],
            delete_patterns=replaced,
        )
    except _ERRORS as error:
        remedy = "go online to reach the hub" if _is_offline(error) else "log in with 'hf auth login', or pass a token"
        raise TwigVLMError(f"{name}: not pushed ({one_line(error)}); {remedy}") from error
    return str(page)


def _is_ours(name: str, card: str, token: str | None) -> bool:
    """Whether a repository's model card may be written again; it may also have none."""
    try:
        found = Path(huggingface_hub.hf_hub_download(name, card, token=token))
    except RemoteEntryNotFoundError:
        return True
    return MARK in found.read_text(encoding="utf-8", errors="replace")


def _reason(error: Exception, revision: str | None) -> str:
    if isinstance(error, GatedRepoError):
        return "access is restricted; ask for it on its page, and log in with 'hf auth login' or pass a token"
    if isinstance(error, RepositoryNotFoundError):
        return "no such directory, and no such repository on the hub; correct the name, or log in if the repository is private"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision={revision!r}; name one of its branches, tags or commits"
    if _is_offline(error):
        return "no such directory, not in the cache, and the hub cannot be reached; go online, or name a directory"
    return f"cannot be downloaded ({one_line(error)}); try again, or name a directory"


def _is_offline(error: Exception) -> bool:
    """Whether the hub cannot be reached, or is not to be."""
    unanswered = isinstance(error, _HTTPError) and not isinstance(error, HfHubHTTPError)
    return unanswered or isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled)
