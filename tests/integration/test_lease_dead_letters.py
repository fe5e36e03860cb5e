"""Messages that the lease transport gives up: entries that are no messages, and messages that kill their workers or are refused."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from pipefleet.contract.messages import JobItem, JobMessage, Priority, Shard
from pipefleet.errors import UsageError
from pipefleet.queues import dead_letters
from pipefleet.queues.celery import SHARD_HEADER, celery_message, push_job
from pipefleet_workers.delivery.leases import lease_of
from tests.integration.lease_world import (
    EMPTY,
    KEYS,
    NEVER,
    QUEUE,
    Taker,
    depth,
    envelope,
    held_messages,
    list_name,
    names,
    push,
)
from tests.servers import Server, until


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
    worker = taker(on_dead=note, lease_seconds=3.0)
    (lease,) = worker.leases(1)
    until(told.is_set)
    until(lambda: held_messages(redis)[0].seconds > 6.0)  # two leases
    assert (lease.lost, held_messages(redis)[0].deliveries) == (False, 1)
    assert held_messages(redis)[0].renewed_seconds < 3.0
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
