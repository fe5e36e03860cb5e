"""A Redis whose role changes under workers and clients: whoever meets a replica waits for the primary."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipefleet.cli import main
from pipefleet.client import Client
from pipefleet.runs.run import Run
from pipefleet.settings import load_settings
from tests.nursery import TASK, Nursery
from tests.servers import Server, redis_6, until

ITEMS = 400


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    one = Nursery(tmp_path_factory.mktemp("nursery"))
    yield one
    one.close()


@pytest.fixture(params=[redis_6()], ids=["6.2"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    servers = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        servers.append(Server(request.param, tmp_path / name))
    yield servers[0], servers[1]
    for server in servers:
        server.kill()


@pytest.fixture
def ours(
    nursery: Nursery, pair: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> dict[str, str]:
    """The settings of a fleet on the first server."""
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(f'[pools.default]\ntask = "{TASK}"\nmodel = "{nursery.model}"\n')
    return {"PIPEFLEET_REDIS_URL": pair[0].url, "PIPEFLEET_FLEET": str(fleet)}


def planned(run: Run, server: Server) -> None:
    """Wait until all messages of a run are on both servers: nobody queues again those that a failover loses."""
    run.join_planner()
    with server.client() as redis:
        until(lambda: redis.info("replication")["slave0"]["state"] == "online", 30.0)
        redis.set("planned", 1)
        assert redis.wait(1, 30_000) == 1


class Address:
    """A port that leads to one server and later to another, and that leaves connections to the first one open."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.server.port))
            for ends in ((near, far), (far, near)):
                threading.Thread(target=_carry, args=ends, daemon=True).start()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def test_a_worker_and_its_clients_follow_an_address_to_the_new_primary(
    pair: tuple[Server, Server],
    nursery: Nursery,
    environment: dict[str, str],
    ours: dict[str, str],
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = pair
    other.follow(one)
    address = Address(one)
    settings = {**environment, **ours, "PIPEFLEET_REDIS_URL": address.url}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    pid = nursery.start(settings)
    with contextlib.closing(address), Client(load_settings()) as client:
        run = client.map(TASK, (f"text {index}" for index in range(ITEMS)), output=f"{prefix}run/", shard_size=5)
        planned(run, one)
        until(lambda: run.progress().succeeded > 20, 60.0)
        other.lead()
        address.server = other
        one.follow(other)  # and lets its connections be
        assert run.wait(timeout=150).succeeded == ITEMS
        assert client.submit(TASK, "more").result(timeout=30)
    log = nursery.log(pid)
    assert nursery.stop(pid) == 0
    assert "Traceback" not in log, log


def test_a_worker_and_its_clients_wait_while_the_server_is_a_replica(
    pair: tuple[Server, Server],
    nursery: Nursery,
    environment: dict[str, str],
    ours: dict[str, str],
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = pair
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    other.follow(one)
    settings = {
        **environment,
        **ours,
        "PIPEFLEET_WORKER_SIMULATED_DEVICE": "0.1,0.001",
        "PIPEFLEET_WORKER_LEASE_SECONDS": "5",
    }
    first = nursery.start(settings)
    with Client(load_settings()) as client, one.client() as redis:
        run = client.map(TASK, (f"text {index}" for index in range(ITEMS)), output=f"{prefix}run/", shard_size=5)
        planned(run, one)
        until(lambda: run.progress().succeeded > 20, 60.0)
        other.lead()
        one.follow(other)
        second = nursery.start(settings)  # a worker that starts meanwhile waits as well
        for pid in (first, second):
            until(lambda pid=pid: "is a replica that takes no writes" in nursery.log(pid), 30.0)  # type: ignore[misc]
        one.lead()
        until(lambda: run.progress().succeeded > 100, 60.0)
        redis.config_set("min-replicas-to-write", 3)
        until(lambda: "too few replicas follow it" in nursery.log(first), 30.0)
        redis.config_set("min-replicas-to-write", 0)
        ended = run.wait(timeout=90)
        assert (ended.state, ended.succeeded) == ("succeeded", ITEMS)
        rows = [row["id"] for row in run.results()]
        assert rows == [str(index) for index in range(ITEMS)]
        job = client.submit(TASK, "afterwards")
        assert job.result(timeout=30)
        until(lambda: not any(redis.llen(name) for name in redis.scan_iter("pipefleet:dead*")))
        assert nursery.codes.keys() & {first, second} == set(), nursery.log(first) + nursery.log(second)
        assert [nursery.stop(pid) for pid in (first, second)] == [0, 0]


def test_who_asks_a_replica_is_told_that_its_figures_may_be_old(
    pair: tuple[Server, Server],
    environment: dict[str, str],
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, other = pair
    monkeypatch.setenv("PIPEFLEET_REDIS_URL", one.url)
    with Client(load_settings()) as client:
        client.map(TASK, ["a", "b"], output=prefix).join_planner()
        other.follow(one)
    monkeypatch.setenv("PIPEFLEET_REDIS_URL", other.url)
    assert main(["status", prefix]) == 0
    told = capsys.readouterr().out
    assert told.count(f"running; what is told may be old: Redis at {other.url} is a replica that takes no writes") == 1
