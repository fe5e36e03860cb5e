"""Doctor names a Redis that answers everything and takes no writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipefleet.errors import PipefleetError
from pipefleet.settings import Settings
from pipefleet_workers.fleet.doctor.redis_server import check_redis, judge_writes
from tests.servers import Server, free_port, programs


@pytest.fixture(params=programs(), ids=["valkey", "redis"])
def replica(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    server = Server(request.param, tmp_path)
    with server.client() as client:
        client.replicaof("127.0.0.1", str(free_port()))
    yield server
    server.kill()


def test_doctor_names_a_replica(replica: Server) -> None:
    with pytest.raises(PipefleetError, match="is a replica that takes no writes; name the primary"):
        check_redis(Settings(redis_url=replica.url))


@pytest.mark.parametrize("name", ["aof_last_write_status", "rdb_last_bgsave_status"])
def test_a_server_that_cannot_save_its_data_is_named(name: str) -> None:
    with pytest.raises(PipefleetError, match="cannot save its data"):
        judge_writes({"role": "master", name: "err"})
    judge_writes({"role": "master", name: "ok"})
