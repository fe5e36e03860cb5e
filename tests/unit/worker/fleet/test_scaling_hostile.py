"""Costs and times that no message can have: the scaler goes on with finite numbers, and no message claims a fleet for itself."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from pipefleet.client import Client
from pipefleet.connection.reading import server_time
from pipefleet.contract.messages import JobItem, JobMessage, Priority
from pipefleet.errors import FleetFileError
from pipefleet.fleet.file import parse_fleet
from pipefleet.fleet.pools import Fleet
from pipefleet.queues.celery import COST_HEADER, celery_message
from pipefleet.queues.keys import ledger_keys, scaler_key, work_key
from pipefleet_workers.fleet.scaling.decide import ScalingLimits, State, decide
from pipefleet_workers.fleet.scaling.messages import Content
from pipefleet_workers.fleet.scaling.service import Scaler, ScalerService
from pipefleet_workers.fleet.scaling.signal import Memory, Reading, measure
from pipefleet_workers.fleet.top.read import read_fleet
from pipefleet_workers.observe.totals import MOST_COST, Done, WorkCount, read_done, record_items
from tests.unit.conftest import eventually
from tests.unit.worker.fleet.test_scaling_service import get

QUEUE = "pipefleet.text-classification"
TABLE = {"task": "text-classification", "model": "/m", "workers": {"min": 0, "max": 500}}
HUGE = 10**400
HEADERS: list[Any] = [
    1e308, -1.0, HUGE, -HUGE, math.nan, math.inf, -math.inf, "1e308", "nan", "words", [1.0], {"a": 1}, None, True, 0, "\ud800",
]  # fmt: skip


@pytest.fixture
def fleet() -> Fleet:
    other = {**TABLE, "task": "token-classification"}
    return parse_fleet({"pools": {"texts": TABLE, "tokens": other}}, base=Path("/"))


@pytest.fixture
def scaler(client: Client, fleet: Fleet) -> Scaler:
    return Scaler(fleet, client.settings, cold_start=180.0)


def message(name: str, **changes: Any) -> bytes:
    """A right message, with other headers or another body."""
    job = JobMessage(name, "text-classification", items=(JobItem("0", "text"),), cost=5.0)
    content = json.loads(celery_message(job, QUEUE, Priority.NORMAL))
    content["headers"] |= changes.pop("headers", {})
    if "payload" in changes:
        content["body"] = json.dumps([[{**job.to_json(), **changes.pop("payload")}], {}, {}])
    return json.dumps({**content, **changes}).encode()


def finite(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("header", ["pipefleet-cost", "pipefleet-at"])
@pytest.mark.parametrize("workers", [0, 3])
def test_no_header_of_a_message_ends_the_readings(
    header: str, workers: int, scaler: Scaler, client: Client, redis: Redis
) -> None:
    for one in range(workers):
        redis.hset("pipefleet:workers", f"w{one}", json.dumps({"pool": "texts", "until": 4e9}))
    redis.hset(work_key("texts"), mapping={"cost": 10.0, "seconds": 20.0})
    for value in HEADERS:
        redis.lpush(QUEUE, *(message(f"m{one}", headers={header: value}) for one in range(3)))
        status = scaler.tick()["texts"]
        assert finite(status.to_json()), value
        assert finite(read_fleet(client).to_json())
        assert status.to_json()["messages"]["queued"] % 3 == 0


def test_no_cost_in_a_body_ends_the_readings(scaler: Scaler, redis: Redis) -> None:
    redis.hset(work_key("texts"), mapping={"cost": 10.0, "seconds": 20.0})
    payloads: list[Any] = [{"cost": one} for one in HEADERS]
    payloads += [{"shard": {"count": one}, "items": None} for one in HEADERS] + [{"items": one} for one in HEADERS]
    for payload in payloads:
        redis.lpush(QUEUE, message("m", headers={COST_HEADER: None}, payload=payload))
    redis.lpush(QUEUE, b"\xff", b"[" * 100_000, message("m", body=5), message("m", properties=None))
    assert finite(scaler.tick()["texts"].to_json())


def test_over_http_the_answer_stays_a_number(scaler: Scaler, redis: Redis) -> None:
    redis.hset(work_key("texts"), mapping={"cost": 10.0, "seconds": 20.0})
    redis.lpush(QUEUE, message("m", headers={COST_HEADER: 1e308}), message("n", payload={"cost": 1e308}))
    with ScalerService(scaler, interval=0.2) as service:
        assert eventually(lambda: get(service, "/pools/texts")[0] == 200)
        assert json.loads(get(service, "/pools/texts")[1])["value"] == 1
        metrics = get(service, "/metrics")[1]
    assert not any(line.endswith((" NaN", " +Inf", " -Inf")) for line in metrics.splitlines())


@pytest.mark.parametrize(
    "garbage",
    [
        {"cost": "2e15", "seconds": "-2e15"},
        {"cost": "nan", "seconds": "inf"},
        {"cost": "x", "seconds": "\x1b"},
        {"cost": "1e308", "seconds": "-1e308"},
    ],
)
def test_totals_that_are_none_count_as_nothing_and_begin_anew(
    garbage: dict[str, str], scaler: Scaler, redis: Redis
) -> None:
    redis.hset(work_key("texts"), mapping={**garbage, "items": "many"})
    redis.lpush(QUEUE, message("m"))
    assert finite(scaler.tick()["texts"].to_json())
    work = WorkCount()
    work.add(cost=1e308, seconds=2.0)
    work.flush(redis, "texts")
    record_items(redis, "texts", items=3)
    assert read_done(redis, "texts") == Done(MOST_COST, 2.0)
    assert redis.hget(work_key("texts"), "items") == b"3"
    redis.set(work_key("texts"), "another type")
    work.add(seconds=1.0)
    work.flush(redis, "texts")
    assert read_done(redis, "texts").seconds == 1.0


@pytest.mark.parametrize(
    "content", ["[]", '{"memory": {}, "state": 5}', "[" * 100_000, '{"state": {"level": 1e300}}', "\x00"]
)
def test_what_is_remembered_and_is_none_is_forgotten(content: str, scaler: Scaler, redis: Redis) -> None:
    redis.set(scaler_key("texts"), content)
    assert scaler.tick()["texts"].decision.desired == 0


def test_a_load_that_no_fleet_has_is_not_remembered() -> None:
    state = {**State(1.0, 1.0).to_json(), "level": 1e300}
    with pytest.raises(ValueError, match="out of bounds"):
        State.from_json(state)


def test_one_message_wants_one_worker_whatever_it_says_that_it_costs() -> None:
    limits, state, memory = ScalingLimits(0, 500, 600.0), State(), Memory()
    for tick in range(200):
        waiting = Content(4, (3 * 5.0 + MOST_COST) / 4)
        reading = Reading(
            1e6 + 15.0 * tick,
            {"queued": {"q": waiting}, "leased": {}, "delayed": {}},
            Done(tick * 10.0, tick * 20.0),
            1,
        )
        memory, measured = measure(memory, reading)
        state, decision = decide(state, measured.signal, limits=limits)
    assert measured.signal.messages == 4
    assert 1 <= decision.desired <= 7


def test_work_that_is_due_in_years_holds_no_worker(scaler: Scaler, redis: Redis) -> None:
    keys, now = ledger_keys(QUEUE), server_time(redis)
    for one in range(50):
        redis.hset(keys["unacked_key"], f"t{one}", b'[%b, "", "%b"]' % (message(f"m{one}"), QUEUE.encode()))
        redis.zadd(keys["delayed_key"], {f"t{one}": now + 1e8})
    status = scaler.tick()["texts"]
    assert status.to_json()["messages"]["delayed"] == 50
    assert status.decision.desired == 0
    redis.zadd(keys["delayed_key"], {"t0": now + 10})
    assert scaler.tick()["texts"].decision.desired == 1


def test_work_that_was_told_and_not_done_is_forgotten_within_the_hour() -> None:
    """A message that lies about its cost ends at once, and would make a unit of cost look like nothing."""
    memory, true = Memory(), 2.0
    reading = Reading(1e6, {"queued": {"q": Content(100, 5.0)}, "leased": {}, "delayed": {}}, Done(), 4)
    done = seconds = 0.0
    for tick in range(400):
        done, seconds = done + 4 * 15.0 / true, seconds + 60.0
        lie = MOST_COST if tick >= 100 else 0.0
        memory, measured = measure(memory, replace(reading, now=1e6 + 15.0 * tick, done=Done(done + lie, seconds)))
    assert measured.seconds_per_cost == pytest.approx(true, rel=0.1)


def test_a_pool_whose_keys_hold_something_else_does_not_hide_the_others(scaler: Scaler, redis: Redis) -> None:
    redis.set(QUEUE, "no list")
    with ScalerService(scaler, interval=0.2) as service:
        assert eventually(lambda: get(service, "/pools/tokens")[0] == 200)
        code, body = get(service, "/pools/texts")
        assert (code, "value" in json.loads(body)) == (503, False)
        assert f"{QUEUE} holds another type of value" in body
        assert [one["pool"] for one in json.loads(get(service, "/pools")[1])] == ["tokens"]


@pytest.mark.parametrize("word", [math.inf, math.nan, 1e300])
def test_a_wait_without_end_is_no_wait(word: float) -> None:
    with pytest.raises(FleetFileError, match="wait_slo must be a number above 0"):
        parse_fleet({"pools": {"texts": {**TABLE, "wait_slo": word}}}, base=Path("/"))
