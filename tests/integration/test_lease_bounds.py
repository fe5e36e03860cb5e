"""What one message may cost the lease transport: its size, its codecs, its time, and a settlement that cannot be written."""

from __future__ import annotations

import base64
import bz2
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from pipefleet.connection.reading import server_time
from pipefleet.contract.messages import MAX_MESSAGE_BYTES, MAX_WIRE_BYTES, JobItem, JobMessage, Priority
from pipefleet.errors import ContractError
from pipefleet.queues import dead_letters
from pipefleet.queues.celery import celery_message
from pipefleet.queues.keys import PRIORITY_STEPS
from pipefleet.queues.looking import message_id
from tests.integration.lease_world import KEYS, NEVER, QUEUE, Taker, depth, envelope, list_name, names, push, waits
from tests.servers import until


def letters(redis: Redis, count: int) -> list[dead_letters.DeadLetter]:
    until(lambda: dead_letters.count_dead_letters(redis, QUEUE) == count)
    return dead_letters.dead_letters(redis, QUEUE)


# Sizes


@pytest.mark.parametrize("letter", ["a", "\x01", '"', "é", "🙂"])
def test_the_largest_message_of_every_producer_passes(letter: str) -> None:
    size = MAX_MESSAGE_BYTES
    while True:
        job = JobMessage("j" * 200, "t" * 100, "m" * 500, "r" * 40, items=(JobItem("0", letter * size),))
        try:
            ours = celery_message(job, QUEUE, Priority.NORMAL)
            break
        except ContractError:
            size = size * 9 // 10
    stock = json.dumps([[job.to_json()], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    written = json.dumps({**json.loads(ours), "body": base64.b64encode(stock.encode()).decode()})
    assert len(ours.encode()) < MAX_WIRE_BYTES // 2
    assert len(written) + 6 * 2 * 1024 < MAX_WIRE_BYTES  # with argsrepr and kwargsrepr at their longest


def test_a_message_that_is_too_large_never_travels(redis: Redis, taker: Callable[..., Taker]) -> None:
    huge = json.dumps({**envelope("huge"), "body": "x" * 20_000_000})
    edge = json.dumps({**envelope("edge"), "padding": "x" * (MAX_WIRE_BYTES - 600)})
    for text in (huge, edge):
        redis.lpush(list_name(3), text)
    push(redis, "good")
    worker = taker()
    received = redis.info("stats")["total_net_output_bytes"]  # type: ignore[index]
    assert names(worker.take(2)) == ["edge", "good"]
    (letter,) = letters(redis, 1)
    assert redis.info("stats")["total_net_output_bytes"] - received < 5_000_000  # type: ignore[index]
    assert letter.reason == f"too_large: its message has {len(huge)} bytes, and a worker takes {MAX_WIRE_BYTES}"
    assert (letter.code, len(letter.entry) < 3000) == ("too_large", True)


def test_one_fetch_takes_some_megabytes_and_the_next_one_the_rest(redis: Redis, taker: Callable[..., Taker]) -> None:
    texts = [json.dumps({**envelope(str(number)), "padding": "x" * 300_000}) for number in range(60)]
    redis.lpush(list_name(3), *texts)
    worker = taker(wait_seconds=NEVER)
    assert names(worker.take(1))[0] == "0"
    assert depth(redis)["normal"] > 20
    worker.take(60 - len(worker.messages))
    assert names(worker.messages) == [str(number) for number in range(60)]


def test_large_dead_letters_are_listed_a_few_at_a_time_and_a_huge_one_is_only_named(redis: Redis) -> None:
    letter = {"reason": "r", "at": 1.0, "queue": QUEUE, "deliveries": 1}
    huge = json.dumps({**letter, "message": "x" * 30_000_000})
    redis.rpush(KEYS["dead_key"], *(json.dumps({**letter, "message": "x" * 2_000_000}) for _ in range(20)), huge)
    first = dead_letters.dead_letters(redis, QUEUE, count=1000)
    assert len(first) == 9
    every = list(dead_letters.every_dead_letter(redis, QUEUE))
    assert len(every) == 21
    assert (every[-1].code, every[-1].message) == ("too_large", "")
    assert str(len(huge)) in every[-1].reason
    assert dead_letters.remove_dead_letter(redis, every[-1], QUEUE)
    assert not dead_letters.remove_dead_letter(redis, every[-1], QUEUE)
    assert dead_letters.count_dead_letters(redis, QUEUE) == 20


def test_a_huge_letter_that_nobody_was_told_of_keeps_no_other_back(redis: Redis, taker: Callable[..., Taker]) -> None:
    redis.lpush(KEYS["unreported_key"], b"x" * (dead_letters.MOST_LETTER_BYTES + 1))
    redis.lpush(list_name(3), "no message")
    worker = taker()
    until(lambda: (worker.poll(), [letter.reason for letter in worker.dead] == ["it is not JSON"])[1])
    until(lambda: redis.llen(KEYS["dead_key"]) == 2)


@pytest.mark.parametrize("filler", ["\x00", "\x7f"])
def test_a_letter_whose_message_grows_when_it_is_quoted_is_still_read(
    redis: Redis, taker: Callable[..., Taker], filler: str
) -> None:
    redis.lpush(list_name(3), filler * 300_000)
    worker = taker()
    until(lambda: (worker.poll(), worker.dead)[1])
    assert (worker.dead[0].reason, worker.dead[0].message) == ("it is not JSON", filler * 300_000)


# Keys that hold something else


@pytest.mark.parametrize("idle", [True, False])
def test_a_list_whose_key_holds_something_else_keeps_no_other_back(
    redis: Redis, taker: Callable[..., Taker], idle: bool
) -> None:
    worker = taker()
    if idle:
        until(lambda: (worker.poll(), waits(redis, len(PRIORITY_STEPS)))[1])
    redis.sadd(list_name(6), "x")
    push(redis, "high", priority=0)
    push(redis, "low", priority=9)
    assert names(worker.take(2)) == ["high", "low"]
    push(redis, "later")
    assert names(worker.take(1)) == ["later"]
    assert names(taker(prefetch=1).messages) == []  # a worker starts meanwhile
    redis.delete(list_name(6))
    push(redis, "mended", priority=6)
    until(lambda: (worker.poll(), "mended" in names(worker.messages))[1])


def test_a_count_that_is_none_keeps_no_message_back(redis: Redis, taker: Callable[..., Taker]) -> None:
    texts = [json.dumps(envelope(name)) for name in ("first", "second")]
    tags = [json.loads(text)["properties"]["delivery_tag"] for text in texts]
    redis.hset(KEYS["deliveries_key"], tags[0], "many")
    redis.hset(KEYS["retries_key"], tags[1], "few")
    redis.lpush(list_name(3), *texts)
    leases = taker().leases(2)
    assert [(lease.deliveries, lease.retries) for lease in leases] == [(1, 0), (1, 0)]


# Codecs


def bomb() -> str:
    return base64.b64encode(bz2.compress(b"0" * 100_000_000)).decode()


def shaped(name: str, *, header: dict[str, Any] | None = None, **parts: Any) -> str:
    one = envelope(name, **(header or {}))
    encoding = parts.pop("body_encoding", None)
    one["properties"] |= {"body_encoding": encoding} if encoding else {}
    return json.dumps(one | parts)


REFUSED = {
    "its body is compressed": shaped(
        "bomb", header={"compression": "application/x-bz2"}, body=bomb(), body_encoding="base64"
    ),
    "its content-type is not application/json": shaped("pickle", **{"content-type": "application/x-python-serialize"}),
    "its content-encoding is not utf-8": shaped("coded", **{"content-encoding": "idna"}),
    "its body has an unknown encoding": shaped("rot", body_encoding="rot13"),
    "its body is not JSON": shaped("number", body=f"[[{'9' * 300_000}], {{}}, null]"),
    "its body is empty, or nests more than 100 deep": shaped("deep", body=f"[[{'[' * 200}{']' * 200}], {{}}, null]"),
    "its body is not the arguments of a task": shaped("flat", body="[1, 2, 3]"),
}


def test_only_the_codecs_of_our_producers_are_taken(redis: Redis, taker: Callable[..., Taker]) -> None:
    redis.lpush(list_name(3), *REFUSED.values())
    body = base64.b64encode(b'[["x"], {}, null]').decode()
    redis.lpush(list_name(3), shaped("base64", body=body, body_encoding="base64"))
    assert names(taker().take(1)) == ["base64"]
    found = letters(redis, len(REFUSED))
    assert {(letter.job_id, letter.reason) for letter in found} == {
        (json.loads(text)["headers"]["id"], reason) for reason, text in REFUSED.items()
    }


def test_very_many_headers_go_no_further(redis: Redis, taker: Callable[..., Taker]) -> None:
    many = {f"h{number}": number for number in range(15_000)}
    push(redis, "many", **many, root_id=["list"], traceparent={"a": 1}, argsrepr="x" * 30_000, shadow=3)
    (message,) = taker().take(1)
    kept = {"task", "id", "argsrepr", "x-delivery-count", "x-retry-count", "redelivered"}
    assert (set(message.headers), len(message.headers["argsrepr"])) == (kept, 2048)


# Settlements


def test_a_settlement_that_cannot_be_written_drops_no_other(redis: Redis, taker: Callable[..., Taker]) -> None:
    push(redis, "surrogate", "unnamed", "changed", "typed", "done", "back", "buried")
    redis.set("a string", "x")
    worker = taker(renew_seconds=NEVER, sweep_seconds=NEVER)
    leases = dict(
        zip(("surrogate", "unnamed", "changed", "typed", "done", "back", "buried"), worker.leases(7), strict=True)
    )
    redis.hset(KEYS["owners_key"], leases["changed"].tag, "somebody else")
    leases["surrogate"].dead_letter("no such field: \ud800" + "x" * 5000)
    leases["unnamed"].hand_over("q\ud800", "q\ud800")
    leases["changed"].dead_letter("never")
    leases["typed"].hand_over("a string", "a string")
    leases["buried"].dead_letter("buried")
    leases["done"].ack()
    leases["back"].give_back()
    assert worker.channel.ledger.flush(10.0)
    found = {letter.job_id: letter.reason for letter in letters(redis, 3)}
    assert found["surrogate"].startswith("no such field: ?xxx")
    assert (found["typed"], found["buried"]) == ("its list holds something else", "buried")
    held = {message_id(raw) for raw in redis.hvals(KEYS["unacked_key"])}  # type: ignore[union-attr]
    assert held == {"unnamed", "changed"}  # these come back when their leases have run out
    assert message_id(redis.lindex(list_name(3), -1)) == "back"  # type: ignore[arg-type]


def test_a_swept_message_whose_list_is_none_keeps_no_other_back(redis: Redis, taker: Callable[..., Taker]) -> None:
    redis.set("a string", "x")
    lost = envelope("lost", priority=0)
    tag = lost["properties"]["delivery_tag"]
    redis.hset(KEYS["unacked_key"], tag, f'[{json.dumps(lost)}, "", "a string"]')
    redis.zadd(KEYS["unacked_index_key"], {tag: 1.0})  # its lease ran out, that of a queue whose key was overwritten
    push(redis, "normal")
    gone = taker(renew_seconds=NEVER, sweep_seconds=NEVER)
    gone.take(1)
    assert names(taker().take(1)) == ["normal"]
    (letter,) = letters(redis, 1)
    assert (letter.job_id, letter.queue, letter.reason) == ("lost", "a string", "its list holds something else")


def test_a_letter_that_nobody_can_be_told_of_is_filed_in_the_end(redis: Redis, taker: Callable[..., Taker]) -> None:
    told: list[str | None] = []

    def note(letter: dead_letters.DeadLetter) -> None:
        told.append(letter.job_id)
        if letter.job_id == "stuck":
            raise TypeError("its record is no record")

    worker = taker(on_dead=note)
    push(redis, "stuck")
    worker.leases(1)[0].dead_letter("x")
    until(lambda: told)
    assert redis.llen(KEYS["dead_key"]) == 0
    for number in range(5):
        push(redis, str(number))
        worker.leases(1)[0].dead_letter("x")
        until(lambda number=number: str(number) in told)  # type: ignore[misc]
    until(lambda: redis.llen(KEYS["dead_key"]) == 6)


# Messages whose time has not come


def test_what_is_put_off_holds_no_place_and_comes_back_into_its_own_list_uncounted(
    redis: Redis, taker: Callable[..., Taker]
) -> None:
    push(redis, "low", priority=9)
    worker = taker(prefetch=1, low_prefetch=1)
    (lease,) = worker.leases(1)
    assert abs(lease.taken_at - server_time(redis)) < 30
    lease.put_off(3600.0)
    push(redis, "next")
    (held,) = worker.leases(1)
    until(lambda: (depth(redis)["delayed"], depth(redis)["unacked"]) == (1, 1))
    lease.due_now()
    until(lambda: redis.llen(list_name(9)) == 1)
    held.ack()
    (again,) = worker.leases(1)
    assert (again.list, again.deliveries, again.retries) == (list_name(9), 1, 0)


def test_what_is_put_off_for_less_than_a_sweep_comes_when_it_is_due(redis: Redis, taker: Callable[..., Taker]) -> None:
    push(redis, "soon")
    worker = taker(sweep_seconds=NEVER)
    began = time.monotonic()
    worker.leases(1)[0].put_off(0.3)
    assert names(worker.take(1)) == ["soon"]
    assert time.monotonic() - began > 0.25
