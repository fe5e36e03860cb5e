"""Leases in time: they are renewed while their message is worked on, expire when nobody renews them, and a lost one is reported."""

from __future__ import annotations

from collections.abc import Callable

from redis import Redis

from tests.integration.lease_world import (
    KEYS,
    NEVER,
    Taker,
    depth,
    held_messages,
    ledger_is_empty,
    names,
    push,
)
from tests.servers import until


def test_an_expired_lease_is_delivered_once_more_and_counted(redis: Redis, taker: Callable[..., Taker]) -> None:
    push(redis, "a", "b")
    gone = taker(renew_seconds=NEVER, sweep_seconds=NEVER)
    gone.take(2)
    other = taker()
    again = other.take(2)
    assert names(again) == ["a", "b"]
    assert [(one.headers["x-delivery-count"], one.headers["redelivered"]) for one in again] == [(2, True)] * 2
    other.poll()
    assert len(other.messages) == 2


def test_a_message_that_is_worked_on_is_renewed_past_its_lease(redis: Redis, taker: Callable[..., Taker]) -> None:
    push(redis, "a")
    holder, other = taker(lease_seconds=0.5), taker(lease_seconds=0.5)
    (lease,) = holder.leases(1)

    def held_for_three_leases() -> bool:
        other.poll()
        (seen,) = held_messages(redis)
        return seen.seconds > 1.5

    until(held_for_three_leases)
    assert other.messages == []
    (seen,) = held_messages(redis)
    assert (seen.job_id, seen.deliveries, lease.lost) == ("a", 1, False)
    assert seen.renewed_seconds < seen.seconds


def test_an_ack_after_the_lease_was_lost_does_not_touch_the_new_holders(
    redis: Redis, taker: Callable[..., Taker]
) -> None:
    push(redis, "a", "b")
    late = taker(renew_seconds=NEVER, sweep_seconds=NEVER)
    first, second = late.take(2)
    other = taker()
    taken = other.take(2)
    first.ack()
    second.reject(requeue=True)
    late.channel.ledger.flush(5.0)
    assert (depth(redis)["unacked"], depth(redis)["normal"]) == (2, 0)
    for message in taken:
        message.ack()
    until(lambda: ledger_is_empty(redis))
    assert other.lost == []


def test_a_lost_lease_is_reported_and_frees_its_room(redis: Redis, taker: Callable[..., Taker]) -> None:
    push(redis, "a")
    worker = taker(prefetch=1, renew_seconds=0.1)
    (lease,) = worker.leases(1)
    redis.hset(KEYS["owners_key"], lease.tag, "somebody else")
    until(lambda: worker.lost)
    assert worker.lost == [lease]
    assert lease.lost
    push(redis, "b")
    assert names(worker.take(1)) == ["b"]


def test_a_message_that_nobody_holds_any_more_is_not_renewed(redis: Redis, taker: Callable[..., Taker]) -> None:
    push(redis, "a")
    worker = taker(lease_seconds=0.5)
    worker.take(1)
    worker.messages.clear()
    (again,) = worker.take(1)
    assert again.headers["x-delivery-count"] == 2


def test_a_held_lease_keeps_its_message_alive_without_the_message(redis: Redis, taker: Callable[..., Taker]) -> None:
    push(redis, "a")
    worker = taker(lease_seconds=0.3)
    (lease,) = worker.leases(1)
    worker.messages.clear()
    until(lambda: held_messages(redis)[0].seconds > 1)
    lease.ack()
    until(lambda: ledger_is_empty(redis))
