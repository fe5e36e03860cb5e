"""URLs of Redis: sockets, other names and passwords work for producers and workers alike; what cannot work is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from pipefleet.client import Client
from pipefleet.connection.connect import connect
from pipefleet.errors import ServiceUnavailableError, UsageError
from pipefleet.queues.celery import celery_app
from pipefleet.settings import Settings, load_settings
from pipefleet.settings.redis_urls import celery_url, redis_url
from pipefleet_workers.delivery.redis_start import connect_patiently, refuse_unusable
from pipefleet_workers.settings import WorkerSettings
from tests.integration.lease_world import Taker, push
from tests.servers import Server, free_port, redis_6, valkey


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("redis://u:p,w;x@host:1/2", "redis://u:p,w;x@host:1/2"),
        ("REDISS://host", "rediss://host"),
        ("valkey://host/1", "redis://host/1"),
        ("valkeys://host", "rediss://host"),
        ("redis+socket:///run/redis.sock?virtual_host=3", "unix:///run/redis.sock?db=3"),
        ("unix://:secret@/run/redis.sock?db=3", "unix://:secret@/run/redis.sock?db=3"),
        ("unix:///run/redis.sock?password=a/b", "unix://:a%2Fb@/run/redis.sock"),
        (" redis://host/0\n", "redis://host/0"),
        ("redis://host?db=5", "redis://host/5"),
        ("redis:///0", "redis:///0"),
        ("redis://[::1]:6379/2/", "redis://[::1]:6379/2"),
    ],
)
def test_every_name_of_one_server_is_understood(given: str, taken: str) -> None:
    assert redis_url(given) == taken
    assert Settings(redis_url=given).redis_url == taken


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("sentinel://host:26379", "names Redis Sentinel"),
        ("redis+sentinel://host:26379/0/primary", "names Redis Sentinel"),
        ("redis+cluster://host", "names a Redis Cluster"),
        ("redis://one/0;redis://two/0", "names several servers"),
        ("redis://one:1,two:2/0", "names several servers"),
        ("redi://host", "did you mean 'redis'"),
        ("host:6379", "must start with redis://"),
        ("amqp://host", "must start with redis://"),
        ("redis://host..example/0", "names no host"),
        ("redis://\udcff\x1b/0", "names no host"),
        ("redis://host/first", "must name its database by a number"),
        ("redis://host/-1", "must name its database by a number"),
        ("redis://host?database=1", "has an option that cannot be used; known are db, "),
        ("rediss://host?ssl_cert_reqs=all", "has an ssl_cert_reqs that is none of none, "),
        ("redis://:se/cret@host", "write '/', "),
        ("unix://", "must name the path of a socket"),
    ],
)
def test_a_url_that_cannot_work_is_refused_in_one_sentence(
    given: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPEFLEET_REDIS_URL", given)
    with pytest.raises(UsageError, match=f"wrong setting: PIPEFLEET_REDIS_URL: .*{words}"):
        load_settings()


@pytest.mark.parametrize(
    "url",
    [
        "redis://host:1/3?socket_timeout=5&protocol=2",
        "rediss://host?ssl_cert_reqs=none&client_name=we",
        "redis://host?db=5",
    ],
)
def test_celery_is_told_what_it_understands(url: str) -> None:
    told = celery_app(Settings(redis_url=url)).connection()
    asked = connect(Settings(redis_url=url)).connection_pool.connection_kwargs
    assert (told.hostname, int(told.virtual_host.strip("/") or 0)) == (asked["host"], asked.get("db", 0))
    assert bool(told.ssl) == ("ssl_cert_reqs" in asked)


def _low_port() -> int:
    """A free port; the nodes of a cluster use the one 10,000 above it as well."""
    return next(port for port in iter(free_port, None) if port < 55_000)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(program: str, *options: str) -> Server:
        servers.append(Server(program, tmp_path, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def test_producers_and_workers_meet_at_a_socket(started: Callable[..., Server], tmp_path: Path) -> None:
    socket = tmp_path / "redis.sock"
    server = started(valkey(), "--unixsocket", str(socket))
    settings = Settings(redis_url=f"unix://{socket}?db=3")
    with Redis(port=server.port, db=3) as redis, Client(settings) as client:
        client.ping()
        push(redis, "a")
        taker = Taker(celery_url(settings.redis_url))
        taker.take(1)[0].ack()
        taker.close()


@pytest.mark.parametrize("program", [valkey(), redis_6()], ids=["valkey", "6.2"])
def test_a_node_of_a_cluster_is_refused_in_one_sentence(
    started: Callable[..., Server], program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.servers.free_port", _low_port)
    server = started(program, "--cluster-enabled", "yes")
    settings = Settings(redis_url=server.url, fleet=None)  # no file, whatever the environment says
    with pytest.raises(UsageError, match="is a node of a Redis Cluster, which pipefleet cannot use"):
        connect_patiently(settings, WorkerSettings())
    with pytest.raises(UsageError, match="is a node of a Redis Cluster, which pipefleet cannot use"):
        refuse_unusable(settings)
    with Client(settings) as client:
        for look in (client.job("x").status, lambda: client.fleet):
            with pytest.raises(UsageError, match="is a node of a Redis Cluster, which pipefleet cannot use"):
                look()
    with server.client() as redis:  # one node with every slot moves nothing, and has keys together in one slot only
        redis.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
    with Client(settings) as client, pytest.raises(UsageError, match="is a node of a Redis Cluster"):
        client.submit("text-classification", "x", model="m")


def test_a_database_that_the_server_lacks_is_named(started: Callable[..., Server]) -> None:
    server = started(redis_6())
    settings = Settings(redis_url=f"redis://127.0.0.1:{server.port}/999")
    with Client(settings) as client, pytest.raises(UsageError, match="/999 has no database of this number"):
        client.job("x").status()
    with pytest.raises(UsageError, match="has no database of this number"):
        connect_patiently(settings, WorkerSettings())


def test_a_server_with_too_many_connections_is_waited_for(started: Callable[..., Server]) -> None:
    server = started(redis_6())
    with server.client() as redis, Client(Settings(redis_url=server.url)) as client:
        redis.config_set("maxclients", 1)
        with pytest.raises(ServiceUnavailableError, match="has no place for another connection"):
            client.job("x").status()
