"""Shards against a real Redis and S3: what ends, what is written, and what is counted."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pipefleet import broker
from pipefleet.client import Client
from pipefleet.contract import JobMessage, JobState, decode_message
from pipefleet.errors import ContractError
from pipefleet.fleet import Pool
from pipefleet.layout import RunLayout
from pipefleet.objects import ObjectStore
from pipefleet.records import JobFailure
from pipefleet.runs import Run
from pipefleet_workers.consume.delivery import RevokedError
from pipefleet_workers.consume.jobs import Jobs, Outlets
from pipefleet_workers.consume.shards import Shards
from pipefleet_workers.consume.tally import Tally
from pipefleet_workers.ending import SHARD_CANCELLED, Ending, before
from pipefleet_workers.items import Outcome, Work
from pipefleet_workers.metrics import Metrics, Totals
from pipefleet_workers.objects import WorkerStore
from pipefleet_workers.reports import Reporter
from pipefleet_workers.scaling.ledger import WorkCount
from pipefleet_workers.stages.write import PartWriter
from tests.unit.conftest import eventually
from tests.unit.consume.fakes import TASK, FakeEngine

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
        name = broker.queue_list(run.plan.queue, broker.Priority.LOW)
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
