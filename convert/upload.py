"""Send a converted checkpoint to the hub."""

import re
import shlex
from pathlib import Path
from typing import Any

from mlx_unet3d import __version__
from mlx_unet3d.checkpoints.hub import LOGIN, is_broken_connection


def check_upload(repo: str, *, force: bool = False, token: str | bool | None = None) -> None:
    """Ask the hub before the conversion if `upload` may send files to `repo`.

    Args:
        repo: "owner/name"; it need not exist.
        force: allow files in it, which will be replaced.
        token: hub token; None takes the one stored by `hf auth login`.

    Raises:
        ValueError: an invalid name.
        FileExistsError: the repository has files, without `force`.
        PermissionError: no login, or one without permission to write there.
        ConnectionError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi, errors

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo):
        raise ValueError(f"--upload-repo {repo!r} must be owner/name, as in the address of a repository")
    api = HfApi(token=token)
    try:
        _check_login(api.whoami(), repo)
        held = [name for name in api.list_repo_files(repo) if name != ".gitattributes"]
    except errors.RepositoryNotFoundError:
        return
    except errors.LocalTokenNotFoundError as error:
        raise PermissionError(f"to upload to {repo}, {LOGIN}: there is no login yet") from error
    except PermissionError:
        raise
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise PermissionError(
                f"the hub does not accept the login for {repo} ({error}); with a token that may write, "
                f"{LOGIN}"
            ) from error
        if not _is_from_the_hub(error):
            raise
        raise ConnectionError(
            f"the hub cannot be asked about {repo} ({error}); try later, or convert without --upload-repo"
        ) from error
    if held and not force:
        raise FileExistsError(
            f"https://huggingface.co/{repo} has files already ({', '.join(held[:4])}); give another "
            "--upload-repo, or --force to replace them (the hub keeps its history)"
        )


def upload(folder: Path, repo: str, *, force: bool = False, token: str | bool | None = None) -> str:
    """Send a folder to a repository, created as private if it is missing, and return its address.

    Args:
        folder: what to send.
        repo: "owner/name"; an existing repository keeps its visibility.
        force: remove files of `repo` that `folder` does not have in the same commit.
        token: as in `check_upload`.

    Raises ConnectionError if that fails; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=f"Convert with mlx-unet3d {__version__}",
            delete_patterns="*" if force else None,
        )
    except Exception as error:
        if not _is_from_the_hub(error):
            raise
        raise ConnectionError(
            f"the checkpoint is in {folder}, but could not be uploaded to {repo} ({error}); upload it with: "
            f"hf upload {repo} {shlex.quote(str(folder))} . --private"
        ) from error
    return str(url)


def _check_login(user: dict[str, Any], repo: str) -> None:
    """Raise PermissionError for a token that can only read, or another owner."""
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PermissionError(
            f"the login of {user['name']} may only read; make a token that may write at "
            f"https://huggingface.co/settings/tokens, then {LOGIN}"
        )
    owner = repo.partition("/")[0]
    owners = [user["name"], *(group["name"] for group in user.get("orgs", []))]
    if owner.lower() not in [name.lower() for name in owners]:
        raise PermissionError(
            f"the login is that of {user['name']}, who cannot write to {owner}; upload to "
            f"{' or '.join(f'{name}/...' for name in owners)}, or log in as {owner}"
        )


def _is_from_the_hub(error: Exception) -> bool:
    """Return True for an answer of the hub or a failed connection to it, False for errors in a program."""
    return isinstance(error, OSError | ValueError) or is_broken_connection(error)
