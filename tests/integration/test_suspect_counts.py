"""How often a message counts as delivered, in Redis: a suspect's own words about it, and what giving it back makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from pipefleet.settings import Settings
from pipefleet_workers.delivery.leases import Lease
from pipefleet_workers.results.reports import Reporter
from tests.integration.lease_world import KEYS, Taker, envelope, list_name
from tests.servers import Server, until


@pytest.fixture
def reporter(server: Server, redis: Redis) -> Reporter:
    return Reporter(redis, None, Settings(redis_url=server.url), worker="worker")  # type: ignore[arg-type]


@pytest.fixture
def lease(redis: Redis, taker: Callable[..., Taker]) -> Lease:
    """A message that was delivered twice before."""
    message = envelope("suspect")
    redis.hset(KEYS["deliveries_key"], message["properties"]["delivery_tag"], 2)
    redis.lpush(list_name(3), json.dumps(message))
    (one,) = taker().leases(1)
    assert (one.deliveries, count(redis, one)) == (3, 3)
    return one


def count(redis: Redis, lease: Lease) -> int:
    value: Any = redis.hget(KEYS["deliveries_key"], lease.tag)
    return int(value or 0)


def given_back(redis: Redis, lease: Lease) -> bool:
    return bool(until(lambda: redis.llen(list_name(3))))


@pytest.mark.parametrize("times", [1, 4])
def test_a_suspect_that_is_excused_again_and_again_counts_once_less(
    redis: Redis, reporter: Reporter, lease: Lease, times: int
) -> None:
    for _ in range(times):
        reporter.count_deliveries([lease], excused=True)
    assert count(redis, lease) == 2
    for _ in range(times):
        reporter.count_deliveries([lease], excused=False)
    assert count(redis, lease) == 3


@pytest.mark.parametrize("excused", [True, False])
def test_a_suspect_that_is_given_back_keeps_what_it_had_before(
    redis: Redis, reporter: Reporter, lease: Lease, excused: bool
) -> None:
    reporter.count_deliveries([lease], excused=excused)
    lease.give_back()
    assert given_back(redis, lease)
    assert count(redis, lease) == 2


def test_a_suspect_is_counted_no_more_once_it_was_given_back(redis: Redis, reporter: Reporter, lease: Lease) -> None:
    lease.give_back()
    assert given_back(redis, lease)
    reporter.count_deliveries([lease], excused=True)
    assert count(redis, lease) == 2


def test_a_lease_that_is_lost_is_the_next_holders_to_count(redis: Redis, reporter: Reporter, lease: Lease) -> None:
    redis.hset(KEYS["owners_key"], lease.tag, "another")
    redis.hset(KEYS["deliveries_key"], lease.tag, 4)
    for excused in (True, False):
        reporter.count_deliveries([lease], excused=excused)
    assert count(redis, lease) == 4


def test_the_first_delivery_leaves_nothing_behind_when_it_is_given_back(
    redis: Redis, taker: Callable[..., Taker]
) -> None:
    redis.lpush(list_name(3), json.dumps(envelope("first")))
    (one,) = taker().leases(1)
    one.give_back()
    assert given_back(redis, one)
    assert not redis.exists(KEYS["deliveries_key"])
