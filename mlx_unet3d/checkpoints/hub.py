"""The hub: how to reach it, and the download of a repository."""

import errno
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

LOGIN = "log in with `hf auth login`, or set HF_TOKEN or pass token="


@dataclass(frozen=True)
class Hub:
    """How a repository of the hub is reached; the names are those of `huggingface_hub` and diffusers.

    Attributes:
        revision: branch, tag or commit; only for hub ids.
        local_files_only: look in the hub's cache and nowhere else.
        token: hub token; True or None takes the one that `hf auth login` stored, False sends none.
        cache_dir: the hub's cache; None is its usual place.
    """

    revision: str | None = None
    local_files_only: bool = False
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None


def takes_hub(function: Callable[..., Result]) -> Callable[..., Result]:
    """Let a function that takes `hub: Hub` take the fields of one as keywords too.

    Callers write `revision="main"` as in diffusers, or hand on the `hub=` that they were given; TypeError for
    both at once. The signature, which `help()` shows, lists all of them.
    """
    signature = inspect.signature(function)
    names = [setting.name for setting in fields(Hub)]
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name == "hub":
            parameters += (
                parameter.replace(name=setting.name, default=setting.default, annotation=setting.type)
                for setting in fields(Hub)
            )
            parameter = parameter.replace(default=None, annotation=Hub | None)
        parameters.append(parameter)

    @functools.wraps(function)
    def call(*args: Any, hub: Hub | None = None, **kwargs: Any) -> Result:
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        if hub is not None and given:
            raise TypeError(f"{function.__qualname__}() takes hub= or {', '.join(given)}=, not both")
        return function(*args, hub=hub or Hub(**given), **kwargs)

    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters if p.annotation is not p.empty} | {
        "return": signature.return_annotation
    }
    return call


def download(hub_id: str, hub: Hub, patterns: Sequence[str]) -> Path:
    """Download the files of these patterns; returns the folder in the hub's cache.

    Raises FileNotFoundError, PermissionError, ConnectionError and OSError with the cure, see `find_folder`.
    """
    with explaining(hub_id, hub):
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(patterns), **vars(hub)))


@contextmanager
def explaining(hub_id: str, hub: Hub) -> Iterator[None]:
    """Raise errors of requests to the hub as FileNotFoundError, PermissionError, ConnectionError or OSError,
    with the cure."""
    # Imported late: it takes longer than the rest of the package together, and folders need none
    # of it.
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{hub_id}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{hub_id} is gated: accept its licence at {page}, then {LOGIN}; a local folder with "
            "its files works too"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{hub_id} has no revision {hub.revision!r}; see {page}/tree/main for its branches"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {hub_id!r} here, and the hub has no {page} or does not show it to "
            "you: check the spelling; repositories also move or close. If it is private or gated, "
            f"{LOGIN}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        # Also raised where the hub did answer, with an error, and the cache does not have the file.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _refusal(hub_id, page, error.__cause__) from error
        raise FileNotFoundError(
            f"there is no folder {hub_id!r} here, and the hub's cache does not have all its files, "
            "while the hub is out of reach or not to be asked (local_files_only, HF_HUB_OFFLINE): "
            f"run once online, or download {page} elsewhere and pass the folder. The hub library "
            f"says: {error}"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refusal(hub_id, page, error) from error
    except OSError as error:
        cache = hub.cache_dir or constants.HF_HUB_CACHE
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                f"no room for {hub_id}: the disk of the hub's cache {cache} is full; make room, or "
                "move the cache with HF_HOME or cache_dir="
            ) from error
        raise OSError(
            f"{hub_id} could not be downloaded to the hub's cache {cache} ({error}); try again, or "
            "move the cache with HF_HOME or cache_dir="
        ) from error
    except Exception as error:
        if not is_broken_connection(error):
            raise
        raise ConnectionError(
            f"the download of {hub_id} broke off ({error}); run again: the files that are complete "
            "are not downloaded twice"
        ) from error


def is_broken_connection(error: Exception) -> bool:
    """Return True for errors of the HTTP and transfer libraries below huggingface_hub.

    Its versions use different ones, whose errors are no OSErrors.
    """
    return isinstance(error, RuntimeError) or type(error).__module__.split(".")[0].startswith("http")


def _refusal(hub_id: str, page: str, error: Any) -> OSError:
    """Make the error for an answer of the hub that has no class of its own."""
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return PermissionError(
            f"the hub refuses {hub_id} (HTTP {status}): accept its licence at {page} if it has "
            f"one, then {LOGIN}"
        )
    return ConnectionError(
        f"the hub answered HTTP {status} for {hub_id}: {error}; try again later, or pass a local folder"
    )
