"""The scaler over HTTP: the value that KEDA reads, Prometheus metrics, and 503 whenever it cannot see."""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from pipefleet.client import Client
from pipefleet.contract.messages import JobItem, JobMessage, Priority, encode_json
from pipefleet.errors import ServiceUnavailableError, UsageError
from pipefleet.fleet.file import parse_fleet
from pipefleet.fleet.pools import Fleet
from pipefleet.queues.celery import push_job
from pipefleet.queues.keys import scaler_key
from pipefleet_workers.facts import WORKERS_KEY
from pipefleet_workers.fleet.scaling import command
from pipefleet_workers.fleet.scaling.decide import State
from pipefleet_workers.fleet.scaling.service import Scaler, ScalerService
from pipefleet_workers.fleet.scaling.signal import Memory
from pipefleet_workers.observe.totals import record_done
from tests.unit.conftest import eventually

QUEUE = "pipefleet.text-classification"
FLEET = {"pools": {"texts": {"task": "text-classification", "model": "/m", "workers": {"min": 0, "max": 7}}}}


@pytest.fixture
def fleet() -> Fleet:
    return parse_fleet(FLEET, base=Path("/"))


@pytest.fixture
def scaler(client: Client, fleet: Fleet) -> Scaler:
    return Scaler(fleet, client.settings, cold_start=180.0)


@pytest.fixture
def service(scaler: Scaler) -> Iterator[ScalerService]:
    with ScalerService(scaler, interval=0.2) as one:
        yield one


def put(redis: Redis, count: int) -> None:
    pipe = redis.pipeline()
    for index in range(count):
        push_job(pipe, JobMessage(f"j{index}", "text-classification", items=(JobItem("0", "t"),)), QUEUE, Priority.LOW)
    pipe.execute()


def get(service: ScalerService, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{service.port}{path}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def pool(service: ScalerService) -> Any:
    code, body = get(service, "/pools/texts")
    return json.loads(body) if code == 200 else None


def test_it_answers_what_keda_and_prometheus_ask(service: ScalerService, redis: Redis) -> None:
    put(redis, 5)
    assert eventually(lambda: (pool(service) or {}).get("value") == 1)
    assert pool(service)["messages"] == {"queued": 5, "leased": 0, "delayed": 0}
    assert get(service, "/healthz")[0] == 200
    assert [one["pool"] for one in json.loads(get(service, "/pools")[1])] == ["texts"]
    code, metrics = get(service, "/metrics")
    assert code == 200
    assert 'pipefleet_pool_desired_workers{pool="texts"} 1.0' in metrics
    assert 'pipefleet_pool_messages{pool="texts",state="queued"} 5.0' in metrics


def test_it_wants_whole_replicas_where_a_host_has_several_workers(client: Client, redis: Redis) -> None:
    table = {**FLEET["pools"]["texts"], "devices": 3, "workers_per_device": 2}
    fleet = parse_fleet({"pools": {"texts": table}}, base=Path("/"))
    put(redis, 5)
    (status,) = Scaler(fleet, client.settings, cold_start=180.0).tick(remember=False).values()
    assert status.decision.desired == 6
    assert status.to_json()["workers"] == {"ready": 0, "barred": 0, "min": 0, "max": 7, "per_replica": 6}
    alone = Scaler(fleet, client.settings, cold_start=180.0, by_replica=False)  # as on one host, which starts each
    assert alone.tick(remember=False)["texts"].decision.desired == 1


def test_a_pool_that_does_not_exist_is_404(service: ScalerService) -> None:
    assert eventually(lambda: get(service, "/healthz")[0] == 200)
    code, body = get(service, "/pools/nobody")
    assert (code, json.loads(body)["pools"]) == (404, ["texts"])


def test_without_redis_every_answer_is_503_and_never_a_number(client: Client, fleet: Fleet) -> None:
    away = client.settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0", "redis_timeout": 0.5})
    with ScalerService(Scaler(fleet, away, cold_start=180.0), interval=0.2) as service:
        for path in ("/pools/texts", "/pools", "/metrics", "/healthz", "/pools/nobody"):
            code, body = get(service, path)
            assert code == 503, path
            assert "value" not in body


def test_an_old_reading_is_no_reading(scaler: Scaler) -> None:
    scaler.tick()
    assert scaler.statuses(younger=60.0)["texts"].decision.desired == 0
    with pytest.raises(ServiceUnavailableError, match="fresh"):
        scaler.statuses(younger=0.0)


def test_it_measures_the_pool_and_goes_on_after_a_restart(client: Client, fleet: Fleet, redis: Redis) -> None:
    now = [1_000_000.0]
    alive = encode_json({"pool": "texts", "until": 4e9})
    redis.hset(WORKERS_KEY, mapping={"a": alive, "b": alive, "other": encode_json({"pool": "x", "until": 4e9})})
    put(redis, 1000)

    def start() -> Scaler:
        return Scaler(fleet, client.settings, cold_start=180.0, clock=lambda: now[0])

    first = start()
    first.tick()
    for _ in range(5):
        now[0] += 10.0
        record_done(redis, "texts", cost=5.0, seconds=1.0)  # two workers, 5 jobs in 10 s: 4 worker-seconds each
        before = first.tick()["texts"]
    assert before.measured.signal.ready == 2
    assert before.measured.seconds_per_cost == pytest.approx(4.0)
    assert before.measured.signal.queued == pytest.approx(4000.0)
    assert before.decision.desired == 7  # the pool's maximum; 4000 s of work ask for more
    now[0] += 10.0
    after = start().tick()["texts"]
    assert after.measured.seconds_per_cost == pytest.approx(4.0)
    assert after.decision.load == pytest.approx(before.decision.load, rel=0.2)


@pytest.mark.parametrize(
    ("good", "barred", "waiting", "value"),
    [(0, 1, 3, 2), (0, 3, 3, 2), (2, 1, 3, 3), (0, 2, 0, 0), (1, 6, 3, 3), (6, 4, 3, 7)],
)
def test_workers_that_s3_refuses_are_no_capacity(
    scaler: Scaler, redis: Redis, good: int, barred: int, waiting: int, value: int
) -> None:
    facts = {"pool": "texts", "until": 4e9}
    names = {f"good-{n}": facts for n in range(good)} | {
        f"barred-{n}": {**facts, "barred": "S3"} for n in range(barred)
    }
    redis.hset(WORKERS_KEY, mapping={name: encode_json(one) for name, one in names.items()})
    redis.set(scaler_key("texts"), encode_json({"memory": Memory().to_json(), "state": State(0.0).to_json()}))
    put(redis, waiting)
    status = scaler.tick()["texts"]
    assert (status.reading.workers, status.barred) == (good, barred)
    assert status.decision.desired == value


def test_a_state_that_cannot_be_read_is_a_fresh_start(scaler: Scaler, redis: Redis) -> None:
    redis.set(scaler_key("texts"), '{"memory": 1}')
    assert scaler.tick()["texts"].decision.desired == 0


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    chosen = parser.parse_args(["scaler", *arguments])
    return int(chosen.run(chosen))


class TestCommand:
    def test_once_prints_json_and_changes_nothing(
        self, client: Client, redis: Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        put(redis, 3)
        path = tmp_path / "one.toml"
        path.write_text('[pools.texts]\ntask = "text-classification"\nmodel = "/m"\n')
        keys = set(redis.keys())
        assert run("--fleet", str(path), "--json-once") == 0
        (status,) = json.loads(capsys.readouterr().out)
        assert (status["value"], status["messages"]["queued"]) == (1, 3)
        assert set(redis.keys()) == keys

    def test_a_port_in_use_is_a_usage_error(self, client: Client, service: ScalerService) -> None:
        with pytest.raises(UsageError, match="--port"):
            run("--port", str(service.port))

    def test_too_rare_readings_are_refused(self, client: Client) -> None:
        with pytest.raises(UsageError, match="60"):
            run("--interval", "61")
