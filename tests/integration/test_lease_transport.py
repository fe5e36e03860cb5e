"""How the lease transport takes messages, settles them, gives them back and hands them over, on real servers."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from kombu import Connection, Queue
from redis import Redis

from pipefleet.queues import dead_letters
from pipefleet.queues.keys import PRIORITY_STEPS, ledger_keys, queue_list
from pipefleet.queues.looking import queued_ids
from pipefleet_workers.delivery.leases import Lease, lease_of
from tests.integration.lease_world import (
    EMPTY,
    KEYS,
    NEVER,
    QUEUE,
    TRANSPORT,
    Taker,
    depth,
    envelope,
    ledger_is_empty,
    list_name,
    names,
    push,
    transport_options,
    waits,
)
from tests.servers import Server, until


def test_an_ack_leaves_nothing_behind(redis: Redis, taker: Callable[..., Taker]) -> None:
    push(redis, "a", "b")
    worker = taker()
    for message in worker.take(2):
        message.ack()
    until(lambda: ledger_is_empty(redis))
    assert depth(redis) == EMPTY


def test_priorities_are_served_in_order_and_each_first_come_first_served(
    redis: Redis, taker: Callable[..., Taker]
) -> None:
    for name, priority in [("l1", 9), ("n1", 3), ("h1", 0), ("l2", 9), ("h2", 0), ("m1", 6), ("n2", 3)]:
        push(redis, name, priority=priority)
    assert names(taker().take(7)) == ["h1", "h2", "n1", "n2", "m1", "l1", "l2"]


@pytest.mark.parametrize("priority", PRIORITY_STEPS)
def test_an_idle_worker_hears_of_every_priority(redis: Redis, taker: Callable[..., Taker], priority: int) -> None:
    worker = taker(wait_seconds=NEVER)  # without the bell of its list a message would never come
    until(lambda: (worker.poll(0.01), waits(redis, 4))[1])
    push(redis, "a", priority=priority)
    assert names(worker.take(1)) == ["a"]


def test_a_worker_without_room_takes_nothing_until_an_ack(redis: Redis, taker: Callable[..., Taker]) -> None:
    push(redis, "a", "b", "c")
    worker = taker(prefetch=2)
    first, _ = worker.take(2)
    worker.poll()
    assert depth(redis)["normal"] == 1
    first.ack()
    assert names(worker.take(1)) == ["c"]


def test_no_more_of_the_lowest_priority_is_held_than_allowed(redis: Redis, taker: Callable[..., Taker]) -> None:
    push(redis, *"abcd", priority=9)
    worker = taker(prefetch=10, low_prefetch=2)
    held = worker.take(2)
    push(redis, "x", "y", priority=3)
    assert names(worker.take(2)) == ["x", "y"]  # the others go on
    worker.poll()
    assert (depth(redis)["low"], names(held)) == (2, ["a", "b"])
    held[0].ack()
    assert names(worker.take(1)) == ["c"]


@pytest.mark.parametrize("bound", [{"prefetch": 1}, {"low_prefetch": 1}], ids=str)
def test_an_ack_from_another_thread_wakes_an_event_loop_that_waits_for_room(
    redis: Redis, taker: Callable[..., Taker], bound: dict[str, int]
) -> None:
    class Loop:
        woken = threading.Event()

        def call_soon(self, callback: Callable[[], None]) -> None:
            self.woken.set()

    push(redis, "a", "b", priority=9)
    worker = taker(**bound)
    (lease,) = worker.leases(1)
    worker.poll()
    worker.channel._transport.loop = Loop()
    thread = threading.Thread(target=lease.ack)
    thread.start()
    thread.join()
    assert Loop.woken.is_set()
    worker.channel._transport.loop = None
    assert names(worker.take(1)) == ["b"]


def test_a_message_without_an_ack_is_got_like_any_other(redis: Redis, server: Server) -> None:
    push(redis, "a", "b")
    with Connection(server.url, transport=TRANSPORT, transport_options=transport_options()) as one:
        with one.channel() as channel:
            queue = Queue(QUEUE)(channel)
            first = queue.get(accept=["json"])
            assert first is not None
            assert (first.headers["id"], depth(redis)["unacked"]) == ("a", 1)
            first.ack()
            second = queue.get(no_ack=True, accept=["json"])
            assert second is not None
            assert second.headers["id"] == "b"
            assert queue.get(accept=["json"]) is None
            until(lambda: ledger_is_empty(redis))


def test_a_prefix_of_every_key_is_kept(redis: Redis, taker: Callable[..., Taker]) -> None:
    redis.lpush(f"mine:{list_name(3)}", json.dumps(envelope("a")))
    gone = taker(global_keyprefix="mine:", renew_seconds=NEVER, sweep_seconds=NEVER)
    gone.take(1)
    (again,) = taker(global_keyprefix="mine:").take(1)  # swept back into the list that it came from
    assert again.headers["x-delivery-count"] == 2
    again.ack()
    until(lambda: not [key for key in redis.scan_iter() if b"_kombu" not in key])


def test_settling_is_safe_from_many_threads_and_only_the_first_counts(
    redis: Redis, taker: Callable[..., Taker]
) -> None:
    push(redis, *(str(number) for number in range(400)))
    leases = taker(prefetch=1000).leases(400)

    def settle(mine: list[Lease]) -> None:
        for lease in mine:
            lease.ack()
            lease.give_back()

    threads = [threading.Thread(target=settle, args=(leases[start::3],)) for start in (0, 1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: ledger_is_empty(redis))
    assert depth(redis) == EMPTY


def test_a_copy_of_a_held_message_is_not_run_beside_it(redis: Redis, taker: Callable[..., Taker]) -> None:
    text = json.dumps(envelope("a"))
    redis.lpush(list_name(3), text, text)  # as a producer does that repeats a push whose answer was lost
    worker = taker()
    (first,) = worker.take(1)
    push(redis, "b")
    assert names(worker.take(1)) == ["b"]
    first.ack()
    until(lambda: depth(redis)["unacked"] == 1)
    assert dead_letters.count_dead_letters(redis, QUEUE) == 0


def test_what_is_given_back_keeps_its_place_and_counts_as_never_delivered(
    redis: Redis, taker: Callable[..., Taker]
) -> None:
    push(redis, *"abcde")
    worker = taker(prefetch=3, lease_seconds=NEVER)
    for message in worker.take(3):
        message.reject(requeue=True)
    until(lambda: ledger_is_empty(redis))
    worker.close()
    again = taker().take(5)
    assert names(again) == list("abcde")
    assert {message.headers["x-delivery-count"] for message in again} == {1}
    assert not any(message.headers["redelivered"] for message in again)


def test_closing_gives_back_in_order(redis: Redis, taker: Callable[..., Taker]) -> None:
    push(redis, *"abcd")
    worker = taker(prefetch=3, lease_seconds=NEVER)
    worker.take(3)
    worker.close()
    assert ledger_is_empty(redis)
    assert names(taker().take(4)) == list("abcd")


def test_a_delayed_message_waits_is_seen_and_comes_back_with_its_retry_counted(
    redis: Redis, taker: Callable[..., Taker]
) -> None:
    push(redis, "a", "b")
    worker = taker()
    worker.leases(2)[0].give_back(delay=NEVER)
    until(lambda: depth(redis)["delayed"] == 1)
    assert depth(redis)["unacked"] == 1
    assert set(queued_ids(redis, QUEUE)) == {"a", "b"}
    (tag,) = redis.zrange(KEYS["delayed_key"], 0, -1)
    redis.zadd(KEYS["delayed_key"], {tag: 1.0})  # it is due
    (again,) = worker.take(1)
    assert (again.headers["id"], again.headers["x-retry-count"], again.headers["x-delivery-count"]) == ("a", 1, 1)
    lease = lease_of(again)
    assert lease is not None
    lease.give_back(delay=0.01)
    (third,) = worker.take(1)
    assert (third.headers["x-retry-count"], third.headers["x-delivery-count"]) == (2, 1)


def test_the_queues_of_a_pool_share_leases_and_priority_comes_before_the_queue(redis: Redis, taker: Any) -> None:
    own = f"{QUEUE}@0a1b2c3d"
    for queue, priority in itertools.product((QUEUE, own), (9, 3, 0)):
        message = envelope(f"{queue} {priority}", priority=priority)
        redis.lpush(queue_list(queue, priority), json.dumps(message))
    worker = taker(prefetch=1)
    worker.consumer.add_queue(Queue(own))
    worker.consumer.consume()
    taken = []
    for _ in range(6):
        (lease,) = worker.leases(1)
        taken.append((lease.queue, worker.messages[-1].properties["priority"]))
        lease.ack()
    assert [priority for _, priority in taken] == [0, 0, 3, 3, 9, 9]
    assert {queue for queue, _ in taken} == {QUEUE, own}
    assert ledger_keys(own) == KEYS


def test_a_message_is_handed_over_to_another_queue_and_does_not_count_as_delivered(redis: Redis, taker: Any) -> None:
    own = f"{QUEUE}@0a1b2c3d"
    push(redis, "first", "second", priority=9)
    worker = taker()
    for lease in worker.leases(2):
        lease.hand_over(own, queue_list(own, 9))
    until(lambda: redis.llen(queue_list(own, 9)) == 2)
    assert ledger_is_empty(redis)
    later = taker()
    later.consumer.add_queue(Queue(own))
    later.consumer.consume()
    assert names(later.take(2)) == ["first", "second"]
    assert [message.headers["x-delivery-count"] for message in later.messages] == [1, 1]


def test_a_message_is_handed_over_with_the_prefix_of_every_key(redis: Redis, taker: Callable[..., Taker]) -> None:
    own = queue_list(f"{QUEUE}@0a1b2c3d", 3)
    redis.lpush(f"mine:{list_name(3)}", json.dumps(envelope("a")))
    (lease,) = taker(global_keyprefix="mine:").leases(1)
    lease.hand_over(f"{QUEUE}@0a1b2c3d", own)
    until(lambda: redis.llen(f"mine:{own}") == 1)
    assert not redis.exists(own)
