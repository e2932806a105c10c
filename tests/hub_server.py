"""A server that speaks the protocol of the Hugging Face hub, as far as `huggingface_hub` needs it to fetch files."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Repositories by their path there (`ORG/NAME`, `datasets/ORG/NAME`), and what was asked for."""

    url: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Repository → commit → file → content."""
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    """Repository → branch or tag → commit."""
    gated: set[str] = field(default_factory=set)
    fetched: list[str] = field(default_factory=list)
    """Files that were sent."""

    def add(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Makes a commit, and has the branch name it."""
        commit = hashlib.sha1(json.dumps([[n, c.hex()] for n, c in files.items()]).encode()).hexdigest()
        self.commits.setdefault(repository, {})[commit] = files
        self.branches.setdefault(repository, {})[branch] = commit
        return commit

    def add_folder(self, repository: str, folder: Path, more: dict[str, bytes] | None = None) -> str:
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        return self.add(repository, files | (more or {}))

    def environment(self, home: Path) -> dict[str, str]:
        """Variables of a process for which this is the hub, and whose cache is in `home`."""
        return os.environ | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}


class _Answer(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        api = path.startswith("api/")
        path = path.removeprefix("api/").removeprefix("models/")
        depth = 3 if path.startswith("datasets/") else 2
        repository, rest = "/".join(path.split("/")[:depth]), path.split("/")[depth:]
        if repository not in self.hub.commits:
            return self._refuse(401, "RepoNotFound")
        if repository in self.hub.gated:
            return self._refuse(403, "GatedRepo")
        what, revision, file = rest[0], rest[1], "/".join(rest[2:])
        if revision == "refs":  # refs/pr/1
            revision, file = "/".join(rest[1:4]), "/".join(rest[4:])
        commit = self.hub.branches[repository].get(revision, revision)
        if commit not in self.hub.commits[repository]:
            return self._refuse(404, "RevisionNotFound")
        files = self.hub.commits[repository][commit]
        if api and what == "revision":
            return self._send(json.dumps({"id": repository.removeprefix("datasets/"), "sha": commit}).encode())
        if api and what == "tree":
            rows = [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in files.items()]
            return self._send(json.dumps(rows).encode())
        if file not in files:
            return self._refuse(404, "EntryNotFound")
        if self.command == "GET":
            self.hub.fetched.append(file)
        return self._send(files[file], {"ETag": f'"{_oid(files[file])}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET  # noqa: N815 (the name that http.server asks for)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Answer", (_Answer,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
