"""Files of a repository on the hub, read in part: headers of weight files without the weights."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .headers import Header, read_header_of
from .hub import Hub, explaining
from .pickles import begins_pickle, read_pickle_of

_BLOCK = 256 * 1024
_MOST_REQUESTS = 64
"""Of one file: enough for the longest headers; older torch files, whose parts lie apart, take thousands."""


@dataclass(frozen=True)
class Repository:
    """A repository at one commit.

    Attributes:
        hub_id: "owner/name".
        hub: how it is reached.
        sizes: bytes of each file, by its path below `prefix`.
        prefix: a folder, with a slash at the end; empty for the whole repository.
    """

    hub_id: str
    hub: Hub
    sizes: dict[str, int] = field(repr=False)
    prefix: str = ""

    @classmethod
    def of(cls, hub_id: str, hub: Hub) -> "Repository":
        """List the files of a repository.

        Raises FileNotFoundError, PermissionError and ConnectionError as `find_folder`.
        """
        with explaining(hub_id, hub):
            from huggingface_hub import HfApi

            entries = HfApi(token=hub.token).list_repo_tree(hub_id, recursive=True, revision=hub.revision)
            return cls(hub_id, hub, {e.path: e.size for e in entries if hasattr(e, "size")})

    def below(self, folder: str) -> "Repository":
        """Return the files below a folder, by their paths in it."""
        start = f"{folder.strip('/')}/" if folder else ""
        sizes = {k.removeprefix(start): size for k, size in self.sizes.items() if k.startswith(start)}
        return Repository(self.hub_id, self.hub, sizes, self.prefix + start)

    def read(self, name: str) -> tuple[Header, bool]:
        """Return the header of a weight file, and whether it is a torch pickle; weights are not downloaded.

        Raises CheckpointError for a damaged file, or one whose tensors are not listed at one place.
        """
        path, size = Path(self.hub_id, self.prefix + name), self.sizes[name]
        with explaining(self.hub_id, self.hub):
            file = io.BufferedReader(_Remote(self, name))
            pickled = begins_pickle(file.read(4))
            file.seek(0)
            if pickled:
                return read_pickle_of(path, file, size, lists=True, locate=False), True
            return read_header_of(path, file, size), False


def cached_file(hub_id: str, name: str, hub: Hub) -> Path | None:
    """Return the path of a file in the hub's cache; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, name, cache_dir=hub.cache_dir, revision=hub.revision)
    return Path(found) if isinstance(found, str) else None


class _Remote(io.RawIOBase):
    """A file of a repository, whose bytes are asked for in blocks when they are read."""

    def __init__(self, repository: Repository, name: str):
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        hub = repository.hub
        self._path, self._size = f"{repository.hub_id}/{repository.prefix}{name}", repository.sizes[name]
        self._url = hf_hub_url(repository.hub_id, repository.prefix + name, revision=hub.revision)
        self._headers = build_hf_headers(token=hub.token)
        self._blocks: dict[int, bytes] = {}
        self._requests = self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError("a place before the file")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        block, offset = divmod(self._position, _BLOCK)
        if self._position >= self._size or not len(buffer):
            return 0
        if block not in self._blocks:
            self._blocks[block] = self._get(block * _BLOCK, min((block + 1) * _BLOCK, self._size))
        found = self._blocks[block][offset : offset + len(buffer)]
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)

    def _get(self, begin: int, end: int) -> bytes:
        from huggingface_hub.utils import get_session, hf_raise_for_status

        self._requests += 1
        if self._requests > _MOST_REQUESTS:
            raise CheckpointError(
                f"{self._path} does not list its tensors at one place; download it, and give the file"
            )
        headers = {**self._headers, "Range": f"bytes={begin}-{end - 1}"}
        with get_session().stream("GET", self._url, headers=headers, follow_redirects=True) as answer:
            hf_raise_for_status(answer)
            if answer.status_code != 206:
                raise CheckpointError(f"the hub does not send a part of {self._path}; download it")
            content = answer.read()
        if len(content) != end - begin:
            raise CheckpointError(f"the hub sent {len(content)} bytes of {self._path}, not {end - begin}")
        return content
