"""Redis at `maxmemory`: nothing new enters, and what is there is done by workers that need no memory for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from pipefleet import broker
from pipefleet.client import Client
from pipefleet.contract import JobState
from pipefleet.errors import ServiceFullError
from pipefleet.settings import load_settings
from tests.nursery import TASK, Nursery, long_texts
from tests.servers import Server, distribution_redis, redis_6, until, valkey

JOBS = 300
TEXTS = 60
FULL = "is out of memory; raise its maxmemory, or let the workers catch up"
PROGRAMS = [one for one in (valkey(), distribution_redis(), redis_6()) if one is not None]


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    one = Nursery(tmp_path_factory.mktemp("nursery"))
    yield one
    one.close()


@pytest.fixture(params=PROGRAMS, ids=["valkey", "distribution", "6.2"][: len(PROGRAMS)])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    one = Server(request.param, tmp_path)
    yield one
    one.kill()


def fill(redis: Redis) -> None:
    """Let the server be full, whatever it forgets."""
    redis.config_set("maxmemory", 1_000_000)  # it takes more without any data


def test_a_fresh_worker_drains_a_server_that_is_full(
    server: Server,
    nursery: Nursery,
    environment: dict[str, str],
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(f'[pools.default]\ntask = "{TASK}"\nmodel = "{nursery.model}"\n')
    ours = {"PIPEFLEET_REDIS_URL": server.url, "PIPEFLEET_FLEET": str(fleet)}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    with Client(load_settings()) as client, server.client() as redis:
        jobs = [client.submit(TASK, text) for text in long_texts(JOBS)]
        run = client.map(TASK, long_texts(TEXTS), output=f"{prefix}run/", shard_size=10)
        run.join_planner()
        fill(redis)
        with pytest.raises(ServiceFullError, match=FULL):
            client.submit(TASK, "one more")
        pid = nursery.start({**environment, **ours})
        until(lambda: pid in nursery.codes or all(job.status().final for job in jobs), 60.0)
        assert pid not in nursery.codes, nursery.log(pid)
        assert [job.status() for job in jobs] == [JobState.SUCCEEDED] * JOBS
        assert all(job.result(timeout=10)[0]["score"] > 0 for job in jobs)
        ended = run.wait(timeout=60)
        assert (ended.state, ended.succeeded) == ("succeeded", TEXTS)
        keys = broker.unacked_keys(run.plan.queue)
        until(lambda: not any(broker.depth(redis, run.plan.queue).values()))
        assert redis.exists(keys["dead_key"], keys["unreported_key"]) == 0
        redis.config_set("maxmemory", 0)
        assert client.submit(TASK, "room again").result(
            timeout=20
        )  # the worker has waited on lists that it may not wait on
        assert nursery.stop(pid) == 0
