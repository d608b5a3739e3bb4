"""A stand-in for the hub on this machine: the requests that huggingface_hub makes, answered from memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standIn"
PARTS = True
"""Whether parts of files are sent; a server may also send all."""


@dataclass
class Repo:
    """A repository: the files of each commit, and which commit a branch or tag is at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Adds a commit and moves a branch to it; returns its hash."""
        digest = hashlib.sha1(str(len(self.commits)).encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + content)
        self.commits[digest.hexdigest()] = dict(files)
        self.refs[ref] = digest.hexdigest()
        return self.refs[ref]

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class Hub:
    """The server. `requests` lists what it was asked; `answer` may give a status in place of the answer, or
    raise ConnectionAbortedError for none."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.parts: list[tuple[str, int]] = []
        """Files of which only some bytes were asked for, and how many."""
        self.answer: Callable[[str, str], int | None] = lambda method, path: None
        self.cuts = 0
        """How many of the next files break off in the middle."""
        self.user = {"name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": "write"}}}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def add(self, name: str, folder: Path, **options: bool) -> Repo:
        """A repository with the files of a folder."""
        self.repos[name] = repo = Repo(**options)
        repo.commit(read_folder(folder))
        return repo

    def files(self) -> list[str]:
        """The files that were sent since this was last asked, as "owner/name/path"."""
        found = [
            re.sub(r"/resolve/[^/]+", "", path).lstrip("/")
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        ]
        self.requests.clear()
        return sorted(found)

    def close(self) -> None:
        """Stop answering; new connections are refused from then on."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files below a folder by their paths in it."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.dispatch()

    do_HEAD = do_POST = do_GET

    def dispatch(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        try:
            status = self.hub.answer(self.command, path)
        except ConnectionAbortedError:  # no answer at all
            self.close_connection = True
            return
        if status is not None:
            self.send(status, b"")
        elif path == "/api/whoami-v2":
            self.send_json(self.hub.user) if self.known else self.send(401, b"")
        elif path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(self.body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?/?", path):
            self.model(match[1], match[2] or "revision", match[3] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(*match.groups())
        else:
            self.send(404, b"")

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def find(self, name: str, revision: str) -> tuple[Repo, str] | None:
        """The repository and the commit; None after an error was sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.known):
            # The hub does not tell strangers whether there is such a repository.
            self.send(404 if self.known else 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repo.gated and not self.known and "/resolve/" in self.path:
            self.send(401, b"", {"X-Error-Code": "GatedRepo"})
        elif repo.resolve(revision) is None:
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return repo, repo.resolve(revision)
        return None

    def create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            self.send_json({"url": f"{self.hub.url}/{name}"}, 409)
            return
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repos[name] = repo = Repo(private=private)
        repo.commit({".gitattributes": b""})
        self.send_json({"url": f"{self.hub.url}/{name}"})

    def model(self, name: str, what: str, revision: str) -> None:
        found = self.find(name, revision)
        if found is None:
            return
        repo, commit = found
        files = repo.commits[commit]
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            self.send_json({"id": name, "sha": commit, "siblings": siblings, "private": repo.private})
        elif what == "tree":
            entries = [
                {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": path}
                for path, data in files.items()
            ]
            self.send_json(entries)
        elif what == "preupload":
            asked = [file["path"] for file in json.loads(self.body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in asked]
            self.send_json({"files": modes})
        elif what == "commit":
            made = dict(files)
            for line in map(json.loads, self.body.splitlines()):
                if line["key"] == "file":
                    made[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del made[line["value"]["path"]]
            oid = repo.commit(made, revision)
            self.send_json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})
        else:
            self.send(404, b"")

    def file(self, name: str, revision: str, path: str) -> None:
        found = self.find(name, revision)
        if found is None:
            return
        repo, commit = found
        data = repo.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if data is None:
            self.send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
            return
        headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "" if PARTS else "")
        begin, end = 0, len(data)
        if asked:
            begin, end = int(asked[1]), int(asked[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            self.hub.parts.append((path, end - begin))
        cut = self.command == "GET" and self.hub.cuts > 0
        self.hub.cuts -= cut
        self.send(206 if asked else 200, data[begin:end], headers, cut=cut)

    def send_json(self, value: object, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True
