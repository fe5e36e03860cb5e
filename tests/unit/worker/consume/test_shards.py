"""Shards against a real Redis and S3: what ends, what is written, and what is counted."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import MAX_SHARD_BYTES, JobMessage, JobState, Priority, decode_message
from pipefleet.contract.records import JobFailure
from pipefleet.errors import ContractError
from pipefleet.fleet.pools import Pool
from pipefleet.queues.keys import queue_list
from pipefleet.runs.run import Run
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.consume.held import RevokedError
from pipefleet_workers.consume.jobs import Jobs, Outlets
from pipefleet_workers.consume.shards import Shards
from pipefleet_workers.consume.tally import Tally
from pipefleet_workers.ending import SHARD_CANCELLED, Ending, before
from pipefleet_workers.items import Outcome, Work
from pipefleet_workers.observe.metrics import Metrics, Totals
from pipefleet_workers.observe.totals import WorkCount
from pipefleet_workers.results.lines import PartWriter
from pipefleet_workers.results.reports import Reporter
from pipefleet_workers.storage.store import WorkerStore
from tests.unit.conftest import eventually
from tests.unit.worker.consume.fakes import TASK, FakeEngine

QUEUE = f"pipefleet.{TASK}"


def answer(work: Work) -> Outcome:
    bad = "bad" in str(work.item.inputs)
    return Outcome(work, output={"label": "x"}, failure=JobFailure("bad_input", "bad", "decode") if bad else None)


class Worker:
    """One worker's shards, with an engine that answers at once."""

    def __init__(self, client: Client, allowed: tuple[str, ...] = ("s3://",)) -> None:
        self.engine, self.metrics = FakeEngine(), Metrics("texts")
        self.engine.answers = answer
        store = WorkerStore()
        reporter = Reporter(client.redis, store, client.settings, worker="worker")
        outlets = Outlets(store, ObjectStore(), PartWriter(store, {}), reporter, allowed)
        self.jobs = Jobs(Pool("texts", TASK, "/models/texts"), self.engine)  # type: ignore[arg-type]
        self.shards = Shards(self.jobs, outlets, Tally(self.metrics, WorkCount()))

    def run(self, message: JobMessage) -> Ending:
        assert message.shard is not None
        return self.shards.run(message, message.shard)

    @property
    def totals(self) -> Totals:
        return self.metrics.totals()


@pytest.fixture
def planned(client: Client, prefix: str) -> Callable[..., tuple[Run, list[JobMessage]]]:
    """A function that plans a run of two shards, and its messages."""

    def plan(*texts: Any) -> tuple[Run, list[JobMessage]]:
        rows = [
            text if isinstance(text, dict) else {"id": str(index), "inputs": text}
            for index, text in enumerate(texts or ("a", "bad", "c", "d"))
        ]
        run = client.map(TASK, rows, output=f"{prefix}out/", shard_size=2)
        run.join_planner()
        name = queue_list(run.plan.queue, Priority.LOW)
        texts_: Any = client.redis.lrange(name, 0, -1)
        return run, [decode_message(json.loads(json.loads(text)["body"])[0][0]) for text in reversed(texts_)]

    return plan


def test_shards_write_their_parts_and_the_last_one_ends_the_run(client: Client, planned: Any) -> None:
    run, (first, second) = planned()
    worker = Worker(client)
    assert worker.run(first) == Ending(JobState.SUCCEEDED, "1 succeeded, 1 failed")
    assert not run.progress().ended
    assert worker.run(second) == Ending(JobState.SUCCEEDED, "2 succeeded")
    totals = json.loads(client.store.get(RunLayout.at(run.uri).success))
    assert (totals["succeeded"], totals["failed"]) == (3, 1)
    assert (worker.totals.items, worker.totals.failed) == (4, 1)
    assert not worker.jobs._contexts


def test_the_results_of_a_shard_free_themselves(client: Client, planned: Any) -> None:
    class Result(dict[str, str]):
        """A result that can be watched."""

    worker, seen = Worker(client), []

    def answered(work: Work) -> Outcome:
        result = Result(label="x")
        seen.append(weakref.ref(result))
        return Outcome(work, output=result)

    worker.engine.answers = answered
    first, second = planned()[1]
    worker.run(first)  # its errors of scripts that Redis does not know yet hold frames
    gc.disable()
    try:
        worker.run(second)
        assert [result() for result in seen[2:]] == [None] * 2
    finally:
        gc.enable()


def test_a_part_that_is_there_is_not_written_again_and_not_counted_again(client: Client, planned: Any) -> None:
    _, (first, _) = planned()
    Worker(client).run(first)
    again = Worker(client)
    assert again.run(first) == before(JobState.SUCCEEDED)
    assert (again.engine.inside, again.totals.items) == ([], 0)


def test_of_two_workers_with_one_shard_one_counts(client: Client, planned: Any) -> None:
    _, (first, _) = planned()
    slow, quick = Worker(client), Worker(client)
    contents = slow.shards.open(first, first.shard)
    assert contents is not None
    outcomes = slow.shards.process(first, contents.items)
    assert quick.run(first).here
    assert slow.shards.close(first.shard, outcomes) == before(JobState.SUCCEEDED)
    assert (quick.totals.items, slow.totals.items) == (2, 0)


def test_a_run_that_was_cancelled_before_begins_nothing(client: Client, planned: Any) -> None:
    run, (first, _) = planned()
    run.cancel()
    worker = Worker(client)
    assert worker.run(first) == before(JobState.CANCELLED)
    assert (worker.engine.inside, worker.totals.items) == ([], 0)


def test_items_of_a_run_that_is_cancelled_meanwhile_are_cancelled_and_not_failed(client: Client, planned: Any) -> None:
    run, (first, _) = planned()
    worker = Worker(client)

    def cancel(work: Work) -> Outcome:
        if work.position == 1:
            run.cancel()
        return answer(work)

    worker.engine.answers = cancel
    assert worker.run(first) == SHARD_CANCELLED
    assert (worker.totals.items, worker.totals.cancelled, worker.totals.failed) == (2, 2, 0)
    assert not list(client.store.list(RunLayout.at(run.uri).parts))


def test_a_revoked_shard_writes_nothing(client: Client, planned: Any) -> None:
    run, (first, _) = planned()
    worker = Worker(client)
    worker.engine.answers = None
    raised: list[BaseException] = []

    def play() -> None:
        try:
            worker.run(first)
        except RevokedError as error:
            raised.append(error)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    assert eventually(lambda: len(worker.engine.inside) == 2)
    worker.jobs.revoke(first.id)
    thread.join(20)
    assert [type(one) for one in raised] == [RevokedError]
    assert all(work.job.cancelled for work in worker.engine.inside)
    assert worker.totals.items == 0
    assert not list(client.store.list(RunLayout.at(run.uri).parts))


def test_a_shard_outside_what_this_worker_may_write_is_refused(client: Client, planned: Any) -> None:
    _, (first, _) = planned()
    with pytest.raises(ContractError, match="outside what this worker may write"):
        Worker(client, allowed=("s3://elsewhere/",)).run(first)


def test_a_shard_whose_list_is_gone_is_refused(client: Client, planned: Any) -> None:
    run, (first, _) = planned()
    client.store.client.delete_object(
        Bucket="pipefleet", Key=RunLayout.at(run.uri).shard(0).removeprefix("s3://pipefleet/")
    )
    with pytest.raises(ContractError, match="is not there"):
        Worker(client).run(first)


def test_a_number_beyond_what_the_fast_reader_takes_fails_its_own_item(client: Client, planned: Any) -> None:
    run, messages = planned("a", 10**400, 3, {"inputs": "d", "id": 2**70})
    worker = Worker(client)
    for message in messages:
        assert worker.run(message).state is JobState.SUCCEEDED
    assert [(row["id"], "error" in row) for row in run.results()] == [
        ("0", False), ("1", True), ("2", True), (str(2**70), False),
    ]  # fmt: skip
    assert [row["error"]["code"] for row in run.failures()] == ["bad_input", "bad_input"]


def forged(message: JobMessage, **changes: Any) -> JobMessage:
    """A message whose shard was changed by somebody who knows the run."""
    assert message.shard is not None
    changed = replace(message.shard, **changes)
    moved = {} if "uri" in changes else {"uri": RunLayout(changed.run_uri).shard(changed.index)}
    return replace(message, shard=replace(changed, **moved))


FORGED: dict[str, Callable[[RunLayout], dict[str, Any]]] = {
    "an index beyond the run": lambda run: {"index": 2**28, "first": 2**28},
    "an index near the end of Redis's bitmaps": lambda run: {"index": 2**32 - 2, "first": 2**32 - 2},
    "a position beyond the run": lambda run: {"first": 2**32 - 5},
    "the shard after the last": lambda run: {"index": 2, "first": 4},
    "items beyond the run": lambda run: {"index": 1, "first": 3},
    "another position": lambda run: {"index": 1, "first": 1},
    "fewer items": lambda run: {"count": 1},
    "the run of another": lambda run: {"run_id": "0" * 32},
    "parts of another format": lambda run: {"format": "parquet"},
    "a list that lies elsewhere": lambda run: {"uri": run.part(0)},
    "a place without a run": lambda run: {"run_uri": f"{run.uri}none/"},
    "a place inside a run": lambda run: {"run_uri": run.control},
}


def test_a_shard_outside_of_its_run_is_refused_before_anything_is_allocated(client: Client, planned: Any) -> None:
    run, (first, _) = planned()
    layout, worker = RunLayout.at(run.uri), Worker(client)
    written = {entry.key for entry in client.store.list(run.uri)}
    for what, changes in FORGED.items():
        with pytest.raises(ContractError) as caught:
            worker.run(forged(first, **changes(layout)))
        assert len(str(caught.value)) < 700, what
    assert not client.redis.keys("*:parts")
    assert not client.redis.keys("*:items")
    assert {entry.key for entry in client.store.list(run.uri)} == written
    assert not worker.engine.inside
    assert worker.run(first).here, "the shard itself runs"


def test_the_plan_of_a_run_is_read_once_and_again_where_it_does_not_fit(client: Client, planned: Any) -> None:
    run, (first, second) = planned()
    worker, read = Worker(client), []
    store = worker.shards._outlets.store
    get = store.get
    store.get = lambda reference, **options: read.append(reference.uri) or get(reference, **options)  # type: ignore[method-assign, func-returns-value]
    assert worker.run(first).here
    assert worker.run(second).here
    layout = RunLayout.at(run.uri)
    assert read.count(layout.run) == 1
    client.store.put(layout.run, json.dumps({**run.plan.to_json(), "id": "another"}).encode())
    with pytest.raises(ContractError, match="another run"):
        worker.run(replace(first, shard=replace(first.shard, run_id="yet-another")))
    assert read.count(layout.run) == 2
    assert layout.plan not in read


def test_a_list_that_is_too_long_is_refused_before_it_is_read(client: Client, planned: Any) -> None:
    run, (first, _) = planned()
    uri = RunLayout.at(run.uri).shard(0)
    worker = Worker(client)
    store = worker.shards._outlets.store
    get = store.get
    bounds: dict[str, int | None] = {}

    def note(reference: Any, *, max_bytes: int | None = None) -> bytes:
        bounds[reference.uri] = max_bytes
        return get(reference, max_bytes=None if max_bytes is None else min(max_bytes, 1000))

    store.get = note  # type: ignore[method-assign]
    client.store.put(uri, b"\n" * 1001)
    with pytest.raises(ContractError, match="1001 bytes, above the bound"):
        worker.run(first)
    assert bounds[uri] == MAX_SHARD_BYTES


WRONG_LISTS = [
    (b'{"position":0,"id":"0","inputs":"a"}\n', "has 1 items instead of 2"),
    (b"\n" * 100_000, "has 100000 items instead of 2"),
    (
        b'{"position":0,"id":"0","inputs":"a"}\n{"position":2,"id":"1","inputs":"b"}\n',
        "another item than that of position 1",
    ),
    (b'{"position":0,"id":"0","inputs":"a"}\n{"position":1e999,"id":"1","inputs":"b"}\n', "no item at position 1"),
    (b'{"position":0,"id":"0","inputs":"a"}\n[]\n', "no item at position 1"),
    (b'{"position":0,"id":"0","inputs":"a"}\n' + b"[" * 100_000 + b"\n", "no item at position 1"),
    (b"\xff\n\xff\n", "no item at position 0"),
]


def test_a_list_that_is_not_what_the_message_says_is_refused_at_once(client: Client, planned: Any) -> None:
    run, (first, _) = planned()
    worker = Worker(client)
    for lines, reason in WRONG_LISTS:
        client.store.put(RunLayout.at(run.uri).shard(0), lines)
        with pytest.raises(ContractError, match=reason):
            worker.run(first)
