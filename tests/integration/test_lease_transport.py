"""The lease transport against real servers: nothing lost, nothing twice, whatever dies."""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from kombu import Connection, Queue
from redis import Redis

from pipefleet.contract.messages import JobItem, JobMessage, Priority, Shard
from pipefleet.errors import UsageError
from pipefleet.queues import dead_letters
from pipefleet.queues.celery import SHARD_HEADER, celery_message, push_job
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

# Taking and settling


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


# Giving back


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


# Leases


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
        (seen,) = dead_letters.leased_messages(redis, QUEUE)
        return seen.seconds > 1.5

    until(held_for_three_leases)
    assert other.messages == []
    (seen,) = dead_letters.leased_messages(redis, QUEUE)
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
    until(lambda: dead_letters.leased_messages(redis, QUEUE)[0].seconds > 1)
    lease.ack()
    until(lambda: ledger_is_empty(redis))


# Dead letters


def hostile_entries() -> list[bytes]:
    """Some hundreds of entries that no consumer could take."""
    good, shapes = envelope("x"), random.Random(7)
    values: list[Any] = [None, True, 0, -1.5, "", "text", [], [1], {}, {"a": 1}, "\x00", "9" * 400]
    entries = [b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe\xfd", b"[" * 2000, b'{"a":NaN}', b"[0x10]"]
    for value in values:
        for part in ("properties", "body_encoding", "delivery_tag", "delivery_info", "task", "headers"):
            one = json.loads(json.dumps(good))
            place = {"properties": one, "headers": one, "task": one["headers"]}.get(part, one["properties"])
            place[part] = value
            if part == "task":
                one["headers"]["id"] = value
            entries.append(json.dumps(one).encode())
    text = json.dumps(good).encode()
    entries += [text[: shapes.randrange(1, len(text) - 1)] for _ in range(100)]
    entries += [bytes(shapes.randrange(256) for _ in range(shapes.randrange(1, 200))) for _ in range(100)]
    for encoding, body in [("base64", "!"), ("base64", "a"), ("utf-8", "{"), ("base64", "eA=="), ("zip", "x")]:
        one = json.loads(json.dumps(good))
        one["body"], one["properties"]["body_encoding"] = body, encoding
        one["properties"]["delivery_tag"] = f"{encoding}{body}"
        entries.append(json.dumps(one).encode())
    return entries


def test_hostile_entries_become_dead_letters_and_the_others_are_delivered(
    redis: Redis, taker: Callable[..., Taker]
) -> None:
    entries = hostile_entries()
    for position, entry in enumerate(entries):
        redis.lpush(list_name(3), entry)
        if position % 50 == 0:
            push(redis, f"good{position}")
    expected = [f"good{position}" for position in range(0, len(entries), 50)]
    worker = taker(prefetch=10_000)
    worker.on_message = lambda message: (worker.messages.append(message), message.ack())[0]
    until(lambda: (worker.poll(), depth(redis) == EMPTY)[1])
    seen = names(worker.messages)
    assert [name for name in seen if name.startswith("good")] == expected
    harmless = [name for name in seen if not name.startswith("good")]
    until(lambda: len(worker.dead) == len(entries) - len(harmless))
    assert len(harmless) < 20  # an odd value in a place that nobody reads
    assert dead_letters.count_dead_letters(redis, QUEUE) == len(worker.dead)
    assert {letter.code for letter in worker.dead} == {"malformed"}
    assert all(letter.reason and letter.queue == QUEUE for letter in worker.dead)


def test_a_message_that_its_consumer_cannot_take_does_not_end_it(redis: Redis, taker: Callable[..., Taker]) -> None:
    push(redis, "bad", "good")
    worker = taker()

    def receive(message: Any) -> None:
        if message.headers["id"] == "bad":
            raise TypeError("unhashable")
        worker.messages.append(message)

    worker.on_message = receive
    assert names(worker.take(1)) == ["good"]
    until(lambda: [letter.job_id for letter in worker.dead] == ["bad"])


def killer(server: Server, redis: Redis, kills: int, **options: Any) -> None:
    """Workers that take every message and vanish with it, one after the other."""
    for _ in range(kills):
        gone = Taker(server.url, options={"renew_seconds": NEVER, "sweep_seconds": NEVER, **options})
        gone.take(1)
        for tag in redis.zrange(KEYS["unacked_index_key"], 0, -1):
            redis.zadd(KEYS["unacked_index_key"], {tag: 1.0})  # its lease ran out
        sweeper = Taker(server.url, prefetch=1, options={"lease_seconds": 0.9})
        sweeper.on_message = lambda message: message.reject(requeue=True)
        until(lambda: depth(redis)["unacked"] == 0)
        gone.channel.ledger.flush(1.0)
        sweeper.consumer.cancel()
        sweeper.close()
        gone.messages.clear()
        gone.close()


def test_a_message_that_kills_its_workers_becomes_a_dead_letter_and_can_be_queued_again(
    server: Server, redis: Redis, taker: Callable[..., Taker]
) -> None:
    push(redis, "poison")
    killer(server, redis, 3)
    worker = taker()
    push(redis, "next")
    assert names(worker.take(1)) == ["next"]
    (letter,) = until(lambda: worker.dead)
    assert (letter.reason, letter.code, letter.job_id) == ("delivered 3 times", "killed_worker", "poison")
    assert (letter.queue, letter.deliveries) == (QUEUE, 3)
    (listed,) = dead_letters.dead_letters(redis, QUEUE)
    assert listed == letter
    assert dead_letters.requeue_dead_letter(redis, listed, QUEUE)
    assert not dead_letters.requeue_dead_letter(redis, listed, QUEUE)
    (again,) = worker.take(1)
    assert (again.headers["id"], again.headers["x-delivery-count"]) == ("poison", 1)
    assert dead_letters.count_dead_letters(redis, QUEUE) == 0


def test_a_shard_is_delivered_however_often_it_was(server: Server, redis: Redis, taker: Callable[..., Taker]) -> None:
    shard = Shard(run_id="r", run_uri="s3://b/r/", uri="s3://b/r/_run/shards/00000.jsonl", index=0, first=0, count=1)
    pipe = redis.pipeline()
    push_job(pipe, JobMessage(id="shard", task="text-classification", shard=shard), QUEUE, Priority.LOW)
    pipe.execute()
    killer(server, redis, 4)
    (message,) = taker().take(1)
    assert (message.headers["id"], message.headers["x-delivery-count"]) == ("shard", 5)


def test_only_shards_carry_the_header_of_shards() -> None:
    single = JobMessage(id="1", task="text-classification", items=(JobItem("0", "x"),))
    assert SHARD_HEADER not in json.loads(celery_message(single, QUEUE, Priority.NORMAL))["headers"]


def test_a_dead_letter_is_reported_again_until_somebody_could_take_note(
    redis: Redis, taker: Callable[..., Taker]
) -> None:
    calls: list[dead_letters.DeadLetter] = []

    def note(letter: dead_letters.DeadLetter) -> None:
        calls.append(letter)
        if len(calls) == 1:
            raise RuntimeError("the record could not be written")

    redis.lpush(list_name(3), "not a message")
    worker = taker(on_dead=note)
    until(lambda: (worker.poll(), len(calls) == 2)[1])
    until(lambda: redis.llen(KEYS["dead_key"]) == 1)
    assert calls[0] == calls[1]
    with pytest.raises(UsageError, match="not a message"):
        dead_letters.requeue_dead_letter(redis, calls[0], QUEUE)
    assert dead_letters.remove_dead_letter(redis, calls[0], QUEUE)
    assert dead_letters.dead_letters(redis, QUEUE) == []


def test_leases_are_renewed_while_somebody_is_told_of_a_dead_letter_at_length(
    redis: Redis, taker: Callable[..., Taker]
) -> None:
    told, go = threading.Event(), threading.Event()

    def note(letter: dead_letters.DeadLetter) -> None:
        told.set()
        assert go.wait(60.0)

    redis.lpush(list_name(3), "not a message")
    push(redis, "a")
    worker = taker(on_dead=note)
    (lease,) = worker.leases(1)
    until(told.is_set)
    until(lambda: dead_letters.leased_messages(redis, QUEUE)[0].seconds > 2.0)  # two leases
    assert (lease.lost, dead_letters.leased_messages(redis, QUEUE)[0].deliveries) == (False, 1)
    assert dead_letters.leased_messages(redis, QUEUE)[0].renewed_seconds < 1.0
    lease.ack()
    until(lambda: depth(redis)["unacked"] == 0)
    go.set()
    until(lambda: redis.llen(KEYS["dead_key"]) == 1)


def test_the_consumer_may_bury_a_message_and_a_refused_one_is_kept(redis: Redis, taker: Callable[..., Taker]) -> None:
    push(redis, "a", "b")
    worker = taker()
    first, second = worker.take(2)
    lease = lease_of(first)
    assert lease is not None
    lease.dead_letter("item 3 ends every worker")
    second.reject(requeue=False)
    until(lambda: len(worker.dead) == 2)
    assert {letter.job_id: letter.reason for letter in worker.dead} == {
        "a": "item 3 ends every worker",
        "b": "it was rejected by its consumer",
    }
    assert {letter.deliveries for letter in worker.dead} == {1}


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
