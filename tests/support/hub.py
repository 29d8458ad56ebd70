"""A Hugging Face hub on loopback, as far as huggingface_hub asks one for files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_of_the_test"


@dataclass
class Hub:
    """What it has, and what it was asked for.

    Attributes:
        url: For `HF_ENDPOINT`.
        commits: Repository -> commit -> file -> content.
        refs: Repository -> branch or tag -> commit.
        private, gated: Repositories; only `TOKEN` opens the private ones, nothing the gated ones.
        asked: Method and path of every request.
        sizes: File -> the size that it is said to have, in place of its own.
        is_down: Whether each request ends in 503.
        goes_on: Cleared while requests wait.
    """

    url: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    asked: list[tuple[str, str]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    is_down: bool = False
    goes_on: threading.Event = field(default_factory=threading.Event)

    def commit(self, repository: str, folder: Path, *refs: str, **more: bytes) -> str:
        """Publish a folder's files, and point branches or tags to them; the commit."""
        files = {file.name: file.read_bytes() for file in folder.iterdir()} | more
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits.setdefault(repository, {})[commit] = files
        for ref in refs or ("main",):
            self.refs.setdefault(repository, {})[ref] = commit
        return commit

    def variables(self, home: Path) -> dict[str, str]:
        """The environment of a process that uses it, with a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}

    def downloads(self) -> list[str]:
        """Names of the files that were downloaded."""
        found = [p for method, p in self.asked if method == "GET" and "/resolve/" in p]
        return [path.rpartition("/")[2] for path in found]


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def fake_hub() -> Iterator[Hub]:
    """A hub, until the block ends."""
    hub = Hub()
    hub.goes_on.set()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def _answer(self) -> None:
            hub.asked.append((self.command, self.path))
            hub.goes_on.wait(20)
            if hub.is_down:
                return self._send(503)
            asked = re.fullmatch(r"/api/models/(.+)/(revision|tree)/([^?]+)(\?.*)?", self.path)
            if asked is not None:  # by vLLM's LoRA
                repository, what, revision = asked[1], asked[2], asked[3]
                commit = hub.refs[repository].get(revision, revision)
                files = hub.commits[repository][commit]
                found: Any = {"id": repository, "sha": commit}
                found["siblings"] = [{"rfilename": name} for name in files]
                if what == "tree":
                    found = [
                        {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                        for name, data in files.items()
                    ]
                return self._send(200, json.dumps(found).encode())
            repository, _, rest = self.path.lstrip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            is_known = self.headers.get("authorization") == f"Bearer {TOKEN}"
            if repository not in hub.commits or (repository in hub.private and not is_known):
                return self._send(401 if not is_known else 404, code="RepoNotFound")
            if repository in hub.gated:
                return self._send(403, code="GatedRepo")
            commit = hub.refs[repository].get(revision, revision)
            if commit not in hub.commits[repository]:
                return self._send(404, code="RevisionNotFound")
            content = hub.commits[repository][commit].get(name)
            if content is None:
                return self._send(404, code="EntryNotFound", commit=commit)
            self._send(200, content, commit=commit, size=hub.sizes.get(name))

        def _send(
            self,
            status: int,
            content: bytes = b"",
            code: str | None = None,
            commit: str | None = None,
            size: int | None = None,
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if code is not None:
                self.send_header("X-Error-Code", code)
            if commit is not None:
                self.send_header("X-Repo-Commit", commit)
                self.send_header("ETag", f'"{_etag(content)}"')
                self.send_header("X-Linked-Size", str(len(content) if size is None else size))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD = _answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.goes_on.set()
        server.shutdown()
        server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path, offline: bool = False) -> None:
    """What `HF_ENDPOINT`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE` do in a process that starts."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.delenv("HF_TOKEN", raising=False)
