"""A server that answers every S3 request with one error, for codes that no server here produces, with a clock of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answers:
    """What the server answers now, and what it was asked: method and path."""

    status: int = 403
    code: str = "AccessDenied"
    more: str = ""
    """Further elements of the answer's body."""
    ahead: float = 0.0
    """Seconds that the server's clock is ahead of this machine's."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""
    allowed: set[str] = field(default_factory=set)
    """Paths that are answered with an object."""

    def body(self) -> bytes:
        return f"<Error><Code>{self.code}</Code><Message>no</Message>{self.more}</Error>".encode()


@contextmanager
def answering(status: int = 403, code: str = "AccessDenied", **fields: Any) -> Iterator[Answers]:
    """A server on a port of its own, in threads of this process."""
    answers = Answers(status, code, **fields)

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answers.asked.append((self.command, self.path))
            is_there = self.path in answers.allowed
            body = b"content" if is_there else answers.body()
            self.send_response_only(200 if is_there else answers.status)
            self.send_header("Last-Modified", formatdate(usegmt=True))
            self.send_header("ETag", '"1"')
            self.send_header("Date", formatdate(time.time() + answers.ahead, usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_DELETE = answer

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the tests look at `asked`."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    answers.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield answers
    finally:
        server.shutdown()
        server.server_close()
