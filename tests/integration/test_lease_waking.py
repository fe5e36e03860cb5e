"""Idle workers and the messages that wake them: one message wakes one, and is never with a worker that dies or has no room."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty
from typing import Any

import pytest
from redis import Redis

from pipefleet.queues.keys import arriving_lists
from pipefleet.queues.looking import queued_ids
from pipefleet_workers.fleet.scaling.messages import places
from tests.integration.lease_world import (
    NEVER,
    QUEUE,
    Taker,
    depth,
    envelope,
    ledger_is_empty,
    list_name,
    names,
    push,
    waits,
)
from tests.servers import until

ALONE = {"wait_seconds": NEVER, "sweep_seconds": NEVER, "lease_seconds": NEVER}
"""A worker that hears of a message by its bell, or never."""


@pytest.fixture
def idle(redis: Redis, taker: Callable[..., Taker]) -> Callable[..., list[Taker]]:
    """A function that starts workers, which wait on every list in the order in which they were started."""

    def start(count: int = 1, **options: Any) -> list[Taker]:
        before = blocked(redis)
        workers = []
        for place in range(1, count + 1):
            workers.append(taker(**{**ALONE, **options}))
            until(lambda one=workers[-1], wanted=before + 4 * place: (one.poll(0.01), waits(redis, wanted))[1])
        return workers

    return start


def blocked(redis: Redis) -> int:
    return sum(client["cmd"] == "blmove" for client in redis.client_list())


def arriving(redis: Redis) -> int:
    return sum(int(redis.llen(name)) for name in arriving_lists(QUEUE))


def scripts_run(redis: Redis) -> int:
    found: Any = redis.info("commandstats")
    return sum(int(found.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in ("eval", "evalsha"))


def all_poll(workers: Sequence[Taker], done: Callable[[], Any]) -> None:
    until(lambda: ([worker.poll(0.002) for worker in workers], done())[1])


def heard(workers: Sequence[Taker]) -> list[list[str]]:
    return [names(worker.messages) for worker in workers]


def test_one_message_wakes_one_of_many_idle_workers(redis: Redis, idle: Callable[..., list[Taker]]) -> None:
    workers = idle(20)
    before = scripts_run(redis)
    for number in range(5):
        push(redis, str(number))
        all_poll(workers, lambda wanted=number + 1: sum(map(len, heard(workers))) == wanted)
        all_poll(workers, lambda: waits(redis, 80))
    assert sorted(name for own in heard(workers) for name in own) == list("01234")
    assert scripts_run(redis) - before == 5, "a script each for the worker that fetches, and none for the others"
    assert heard(workers)[:5] == [["0"], ["1"], ["2"], ["3"], ["4"]], "who has waited longest is next"


def test_what_woke_a_worker_that_froze_comes_with_anybodys_fetch(
    redis: Redis, idle: Callable[..., list[Taker]], taker: Callable[..., Taker]
) -> None:
    (frozen,) = idle(1)
    push(redis, "a")
    until(lambda: arriving(redis) == 1)
    push(redis, "b")
    other = taker(**ALONE)
    assert names(other.take(2)) == ["a", "b"]
    assert arriving(redis) == 0
    assert frozen.messages == []


def test_what_woke_a_worker_that_froze_or_died_wakes_another_after_a_sweep(
    redis: Redis, idle: Callable[..., list[Taker]]
) -> None:
    frozen, other = *idle(1), *idle(1, sweep_seconds=0.2)
    push(redis, "a")
    until(lambda: arriving(redis) == 1)
    frozen.channel.bells.by_list[list_name(3)].connection._sock.close()  # as the server sees a process that was killed
    assert names(other.take(1)) == ["a"]
    assert frozen.messages == []


def test_counts_and_lists_see_what_has_woken_a_worker(redis: Redis, idle: Callable[..., list[Taker]]) -> None:
    idle(1)
    push(redis, "a")
    push(redis, "b", priority=9)
    until(lambda: arriving(redis) == 2)
    push(redis, "c")
    assert depth(redis) == {"high": 0, "normal": 2, "low": 1, "unacked": 0, "delayed": 0}
    assert sorted(queued_ids(redis, QUEUE)) == ["a", "b", "c"]
    assert sum(int(redis.llen(place.key)) for place in places(QUEUE) if place.state == "queued") == 3


def test_the_text_of_a_message_stays_as_it_was(redis: Redis, idle: Callable[..., list[Taker]]) -> None:
    idle(1)
    text = json.dumps(envelope("a"))
    redis.lpush(list_name(3), text)
    until(lambda: arriving(redis) == 1)
    assert redis.lrange(f"{list_name(3)}:arriving", 0, -1) == [text.encode()]


@pytest.mark.parametrize("bound", [{"prefetch": 1}, {"prefetch": 9, "low_prefetch": 1}], ids=str)
def test_a_worker_that_has_no_room_when_it_is_woken_wakes_the_next_one(
    redis: Redis, idle: Callable[..., list[Taker]], bound: dict[str, int]
) -> None:
    full, other = *idle(1, **bound), *idle(1)
    push(redis, "a", priority=0)
    if "low_prefetch" in bound:
        full.channel.low_prefetch = 0  # as if shards had come with a fetch that was on its way
    assert names(full.take(1)) == ["a"]
    push(redis, "b", priority=9)
    all_poll([full, other], lambda: other.messages)
    assert heard([full, other]) == [["a"], ["b"]]


def test_a_message_that_comes_while_a_fetch_is_on_its_way_is_not_forgotten(
    redis: Redis, idle: Callable[..., list[Taker]]
) -> None:
    (worker,) = idle(1)
    during_its_fetch(worker, redis, lambda: push(redis, "late", priority=9))
    push(redis, "a")
    assert names(worker.take(2)) == ["a", "late"]


def test_a_message_that_comes_while_a_fetch_takes_all_room_wakes_the_next_one(
    redis: Redis, idle: Callable[..., list[Taker]]
) -> None:
    worker, other = *idle(1, prefetch=1), *idle(1)
    during_its_fetch(worker, redis, lambda: push(redis, "late", priority=9))
    push(redis, "a")
    all_poll([worker, other], lambda: other.messages)
    assert heard([worker, other]) == [["a"], ["late"]]


def during_its_fetch(worker: Taker, redis: Redis, then: Callable[[], None]) -> None:
    """When the next fetch of a worker has run and its answer is not read yet, and has woken it once more."""
    send = worker.channel._send_fetch

    def sent(fetch: Any) -> None:
        worker.channel._send_fetch = send
        send(fetch)
        until(lambda: depth(redis)["unacked"] == 1)
        then()
        until(lambda: arriving(redis) == 1)
        bell = worker.channel.bells.by_list[list_name(9)]
        until(lambda: bell.connection.can_read(0))
        with suppress(Empty):
            worker.channel.handlers[bell.kind]()

    worker.channel._send_fetch = sent


def test_order_and_priorities_hold_whatever_has_woken_workers(
    redis: Redis, idle: Callable[..., list[Taker]], taker: Callable[..., Taker]
) -> None:
    idle(2)
    push(redis, "1", "2", "3", "4")
    push(redis, "low", priority=9)
    push(redis, "high", priority=0)
    until(lambda: arriving(redis) == 4)
    assert names(taker(**ALONE).take(6)) == ["high", "1", "2", "3", "4", "low"]


def test_what_is_given_back_is_before_what_has_woken_a_worker(
    redis: Redis, idle: Callable[..., list[Taker]], taker: Callable[..., Taker]
) -> None:
    holder = taker(**ALONE)
    push(redis, "first")
    (lease,) = holder.leases(1)
    idle(1)
    push(redis, "second")
    until(lambda: arriving(redis) == 1)
    lease.give_back()
    until(lambda: ledger_is_empty(redis))
    assert names(taker(**ALONE).take(2)) == ["first", "second"]


def test_a_worker_that_ends_leaves_what_woke_it_to_the_next_one(redis: Redis, idle: Callable[..., list[Taker]]) -> None:
    ending, other = idle(2)
    push(redis, "a")
    until(lambda: arriving(redis) == 1)
    ending.close()
    all_poll([other], lambda: other.messages)
    assert heard([other]) == [["a"]]


def test_a_worker_with_bulk_inside_leaves_single_jobs_to_an_idle_one(
    redis: Redis, idle: Callable[..., list[Taker]]
) -> None:
    busy, other = *idle(1), *idle(1)
    push(redis, "shard", priority=9)
    assert names(busy.take(1)) == ["shard"]
    until(lambda: (busy.poll(0.01), waits(redis, 8))[1])
    for bell in busy.channel.bells.by_list.values():  # those of before its shard
        bell.connection.disconnect()
    until(lambda: (busy.poll(0.01), waits(redis, 8))[1])
    push(redis, "single")
    all_poll([other], lambda: other.messages)
    assert heard([busy, other]) == [["shard"], ["single"]]
