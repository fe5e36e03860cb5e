"""A hub of models for tests: what huggingface_hub asks for, over HTTP, from folders. Gated repositories want a token."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "5b1d8f4" + 33 * "0"
TOKEN = "hf_" + 34 * "x"
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_API = re.compile(r"/api/models/([^/]+/[^/?]+)(?:/revision/([^/?]+))?(?:/.*)?(?:\?.*)?")


@dataclass
class Hub:
    """Repositories by name: a folder each; `gated` are those that want TOKEN."""

    folders: Mapping[str, Path]
    gated: frozenset[str] = frozenset()
    url: str = ""
    asked: list[str] = field(default_factory=list)

    def refusal(self, repository: str, revision: str, authorization: str | None) -> tuple[int, str] | None:
        """Status and error code for a request, None where it may pass."""
        if repository not in self.folders:
            return 401, "RepoNotFound"
        if repository in self.gated and authorization != f"Bearer {TOKEN}":
            return 403, "GatedRepo"
        return None if revision in (COMMIT, "main") else (404, "RevisionNotFound")


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            hub.asked.append(self.path)
            file, api = _FILE.fullmatch(self.path), _API.fullmatch(self.path)
            repository, revision = (file or api).group(1, 2) if file or api else ("", "")
            refused = hub.refusal(repository, revision or "main", self.headers.get("Authorization"))
            if refused:
                return self._send(refused[0], b"", {"X-Error-Code": refused[1], "X-Error-Message": refused[1]}, body)
            if api and "/tree/" in self.path:  # of a folder that no test has
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            if api:
                names = sorted(path.name for path in hub.folders[repository].iterdir())
                found = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                return self._send(200, json.dumps(found).encode(), {}, body)
            path = hub.folders[repository] / file.group(3)  # type: ignore[union-attr]
            if not path.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
            content = path.read_bytes()
            etag = hashlib.sha1(content).hexdigest()
            return self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, body)

        def _send(self, status: int, content: bytes, headers: Mapping[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
