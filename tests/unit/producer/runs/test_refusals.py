"""Runs with shards that no worker will run: they say so, they end, and they can be taken up again."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipefleet.cli import main
from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout
from pipefleet.queues import dead_letters
from pipefleet.queues.keys import queue_lists, run_key
from pipefleet.runs.refusals import Refusals
from pipefleet.runs.run import Run
from pipefleet.storage.store import ObjectStore
from tests.unit.conftest import eventually
from tests.unit.shard_worker import ShardWorker

TEXTS = "text-classification"
QUEUE = f"pipefleet.{TEXTS}"


@pytest.fixture
def worker(client: Client) -> ShardWorker:
    return ShardWorker(client, QUEUE)


def planned(client: Client, prefix: str, items: int = 6, shard_size: int = 2) -> Run:
    run = client.map(TEXTS, [f"text {number}" for number in range(items)], output=prefix, shard_size=shard_size)
    run.join_planner()
    return run


def resumed(run: Run) -> int:
    """Take a run up, and wait until what it lacks is queued."""
    missing = run.resume()
    run.join_planner()
    return missing


def failed_ids(run: Run, client: Client) -> list[str]:
    return [json.loads(line)["id"] for line in client.store.lines(run.failures_uri)]


def check_ended(run: Run, client: Client) -> None:
    """Totals, parts and the list of failed items of an ended run say the same."""
    ended = run.progress()
    rows = list(run.results())
    bad = [row["id"] for row in rows if "error" in row]
    assert [row["id"] for row in rows] == [str(number) for number in range(ended.items)]
    assert (ended.succeeded, ended.failed) == (len(rows) - len(bad), len(bad))
    assert (failed_ids(run, client) if bad else []) == bad
    assert [row["id"] for row in run.failures()] == bad
    assert ended.state == ("failed" if len(bad) == len(rows) else "partial" if bad else "succeeded")


class TestProgress:
    def test_a_run_says_what_was_refused_and_why_and_ends_with_these_items_failed(
        self, client: Client, prefix: str, worker: ShardWorker
    ) -> None:
        run = planned(client, prefix)
        taken = worker.take()
        worker.refuse(taken[1], "this worker cannot write its part")
        now = run.progress()
        assert (now.state, now.refused, now.refused_reason) == ("running", 1, "this worker cannot write its part")
        worker.do(taken[0])
        worker.do(taken[2])
        ended = run.wait(timeout=20)
        assert (ended.state, ended.succeeded, ended.failed, ended.refused) == ("partial", 4, 2, 1)
        assert ended.refused_reason == "this worker cannot write its part"
        assert failed_ids(run, client) == ["2", "3"]
        check_ended(run, client)
        (row, _) = run.failures()
        assert row["inputs"] == "text 2"
        assert row["error"] == {"code": "refused", "message": "this worker cannot write its part", "stage": "consume"}

    def test_a_run_whose_shards_were_all_refused_has_failed(
        self, client: Client, prefix: str, worker: ShardWorker
    ) -> None:
        run = planned(client, prefix)
        for text in worker.take().values():
            worker.refuse(text)
        ended = run.wait(timeout=20)
        assert (ended.state, ended.failed, ended.refused) == ("failed", 6, 3)
        check_ended(run, client)

    def test_the_worker_itself_ends_a_run_that_nobody_waits_for(
        self, client: Client, store: ObjectStore, prefix: str, worker: ShardWorker
    ) -> None:
        run = planned(client, prefix)
        taken = worker.take()
        worker.do(taken[0])
        worker.do(taken[2])
        worker.refuse(taken[1])
        assert eventually(lambda: store.head(RunLayout.at(prefix).success) is not None)
        check_ended(run, client)

    def test_a_worker_that_does_the_last_shard_ends_the_run_too(
        self, client: Client, store: ObjectStore, prefix: str, worker: ShardWorker
    ) -> None:
        run = planned(client, prefix)
        taken = worker.take()
        worker.refuse(taken[1])
        worker.do(taken[0])
        assert worker.do(taken[2], bad=[4]) == "succeeded"
        assert store.head(RunLayout.at(prefix).success) is not None
        assert failed_ids(run, client) == ["2", "3", "4"]
        check_ended(run, client)

    def test_a_worker_that_may_not_write_there_leaves_the_end_to_the_client(
        self, client: Client, store: ObjectStore, prefix: str
    ) -> None:
        worker = ShardWorker(client, QUEUE, allowed=("s3://elsewhere/",))
        run = planned(client, prefix, items=2)
        worker.refuse(worker.take()[0], "it lies outside")
        assert list(store.list(RunLayout.at(prefix).refused)) == []
        assert run.wait(timeout=20).refused_reason == "it lies outside"
        check_ended(run, client)

    def test_the_end_is_known_from_object_storage_when_redis_forgot(
        self, client: Client, prefix: str, worker: ShardWorker
    ) -> None:
        run = planned(client, prefix, items=4)
        taken = worker.take()
        worker.refuse(taken[0])
        layout = RunLayout.at(prefix)
        assert eventually(lambda: client.store.head(layout.refused_shard(0)) is not None)
        client.redis.flushall()
        assert resumed(run) == 2  # the message of the other shard is gone as well
        assert [row["position"] for row in map(json.loads, client.store.lines(layout.shard(0)))] == [0, 1]
        for text in worker.take().values():
            worker.do(text)
        assert run.wait(timeout=20).state == "succeeded"

    def test_a_shard_whose_list_of_items_is_gone_is_counted_and_does_not_stop_resume(
        self, client: Client, prefix: str, worker: ShardWorker
    ) -> None:
        run = planned(client, prefix)
        layout, taken = RunLayout.at(prefix), worker.take()
        client.store.delete(layout.shard(1))
        worker.refuse(taken[1], "the shard is not there")
        worker.refuse(taken[2])
        worker.do(taken[0])
        assert run.wait(timeout=20).failed == 4
        assert [row["input"] for row in run.results()][2:4] == [None, None]
        assert resumed(run) == 1
        worker.do(worker.take()[2])
        ended = run.wait(timeout=20)
        assert (ended.state, ended.failed, ended.refused) == ("partial", 2, 1)
        assert resumed(run) == 0
        check_ended(run, client)

    def test_an_item_that_could_not_be_prepared_keeps_its_own_failure(
        self, client: Client, prefix: str, worker: ShardWorker
    ) -> None:
        run = planned(client, prefix, items=2)
        layout, own = RunLayout.at(prefix), {"code": "bad_input", "message": "it is empty", "stage": "plan"}
        first, second = map(json.loads, client.store.lines(layout.shard(0)))
        body = "".join(json.dumps(line) + "\n" for line in (first, {**second, "failure": own}))
        client.store.put(layout.shard(0), body.encode())
        worker.refuse(worker.take()[0])
        run.wait(timeout=20)
        assert [row["error"]["code"] for row in run.results()] == ["refused", "bad_input"]

    def test_a_shard_that_another_copy_of_its_message_finished_counts_as_done(
        self, client: Client, prefix: str, worker: ShardWorker
    ) -> None:
        run = planned(client, prefix, items=4)
        taken = worker.take()
        worker.refuse(taken[0])
        worker.do(taken[0])
        assert run.progress().refused == 0
        worker.refuse(taken[0])  # a third copy
        assert run.progress().refused == 0
        worker.do(taken[1])
        assert run.wait(timeout=20).state == "succeeded"
        check_ended(run, client)

    def test_a_shard_is_listed_as_failed_or_done_not_both_when_it_is_done_after_the_end(
        self, client: Client, prefix: str, worker: ShardWorker
    ) -> None:
        run = planned(client, prefix, items=2)
        text = worker.take()[0]
        worker.refuse(text)
        assert run.wait(timeout=20).state == "failed"
        assert worker.do(text) is None
        check_ended(run, client)

    def test_a_cancelled_run_stays_cancelled(
        self, client: Client, store: ObjectStore, prefix: str, worker: ShardWorker
    ) -> None:
        run = planned(client, prefix, items=4)
        taken = worker.take()
        worker.do(taken[0])
        run.cancel()
        worker.refuse(taken[1])
        assert eventually(lambda: store.head(RunLayout.at(prefix).refused_shard(1)) is not None)
        assert run.progress().state == "cancelled"
        assert store.head(RunLayout.at(prefix).success) is None
        assert resumed(run) == 1
        worker.do(worker.take()[1])
        assert run.wait(timeout=20).state == "succeeded"

    def test_planning_goes_on_past_refused_shards(
        self, client: Client, prefix: str, worker: ShardWorker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipefleet.runs.planner.HELD_BACK_SECONDS", 0.05)
        monkeypatch.setattr(client, "settings", client.settings.model_copy(update={"outstanding_shards": 2}))
        run = client.map(TEXTS, [f"text {number}" for number in range(8)], output=prefix, shard_size=2)
        stop = threading.Event()

        def refuse() -> None:
            while not stop.wait(0.02):
                for text in worker.take().values():
                    worker.refuse(text)

        thread = threading.Thread(target=refuse)
        thread.start()
        try:
            assert run.wait(timeout=30).state == "failed"
        finally:
            stop.set()
            thread.join()
        check_ended(run, client)

    def test_messages_that_name_no_shard_or_one_beyond_measure_harm_nobody(
        self, client: Client, prefix: str, worker: ShardWorker
    ) -> None:
        run = planned(client, prefix, items=2)
        text = worker.take()[0]
        envelope = json.loads(text)
        uri = RunLayout.at(prefix).shard(5)
        for change in (
            {"index": 1 << 40}, {"count": 1 << 60}, {"run_id": "\ud800"}, {"index": "x"}, {"run_id": f"{run.id}:refused"},
            {"index": 5, "first": 5, "uri": uri}, {"uri": uri}, {"index": 1 << 27, "first": 1 << 27},
            {"format": "parquet"}, {"format": "x/../../_run/plan"},
        ):  # fmt: skip
            body = json.loads(envelope["body"])
            body[0][0]["shard"].update(change)
            worker.refuse(json.dumps({**envelope, "body": json.dumps(body)}))
        worker.refuse(json.dumps({**envelope, "body": "["}))
        assert client.redis.hkeys(run_key(run.id, "refused")) == [b"0"]
        assert run.wait(timeout=20).failed == 2
        check_ended(run, client)


class TestResume:
    def test_it_takes_refused_shards_up_again_and_their_letters_away(
        self, client: Client, store: ObjectStore, prefix: str, worker: ShardWorker
    ) -> None:
        run = planned(client, prefix)
        taken = worker.take()
        worker.refuse(taken[1])
        worker.do(taken[0], bad=[0])
        worker.do(taken[2])
        assert run.wait(timeout=20).failed == 3
        assert resumed(client.run(prefix)) == 1
        layout = RunLayout.at(prefix)
        for uri in (layout.success, layout.failures, layout.part(1), layout.refused_shard(1), layout.failed_shard(1)):
            assert store.head(uri) is None, uri
        assert dead_letters.count_dead_letters(client.redis, QUEUE) == 0
        now = run.progress()
        assert (now.state, now.succeeded, now.failed, now.parts, now.refused) == ("running", 3, 1, 2, 0)
        assert resumed(run) == 0
        worker.do(worker.take()[1])
        ended = run.wait(timeout=20)
        assert (ended.state, ended.failed, ended.refused) == ("partial", 1, 0)
        check_ended(run, client)
        assert resumed(run) == 0

    def test_other_shards_of_a_running_run_are_left_alone(
        self, client: Client, prefix: str, worker: ShardWorker
    ) -> None:
        run = planned(client, prefix)
        held = worker.take()  # as if with a worker, but unknown to the ledger: so put back below
        worker.refuse(held[0])
        client.redis.lpush(queue_lists(run.plan.queue)[-1], held[1], held[2])
        assert resumed(run) == 1
        for text in worker.take().values():
            assert worker.do(text) == "succeeded"
        assert run.wait(timeout=20).state == "succeeded"

    @pytest.mark.parametrize("after", [0, 1, 2, 3, 5, 8, 11, 12])
    def test_it_can_be_interrupted_anywhere(
        self, client: Client, prefix: str, worker: ShardWorker, monkeypatch: pytest.MonkeyPatch, after: int
    ) -> None:
        run = planned(client, prefix)
        taken = worker.take()
        worker.refuse(taken[1])
        worker.refuse(taken[2])
        worker.do(taken[0])
        run.wait(timeout=20)
        with Client() as other, monkeypatch.context() as patch:
            interrupted = other.run(prefix)
            for service, name in ((other.store, "put"), (other.store, "delete"), (other, "publish")):
                patch.setattr(service, name, _Interrupted(after, getattr(service, name)))
            _Interrupted.calls = 0
            with pytest.raises(_KilledError):
                resumed(interrupted)
        if run.progress().ended and run.progress().state != "cancelled":
            check_ended(run, client)
        resumed(run)
        for text in worker.take().values():
            worker.do(text)
        assert run.wait(timeout=20).state == "succeeded"
        check_ended(run, client)
        assert dead_letters.count_dead_letters(client.redis, QUEUE) == 0


class _KilledError(Exception):
    """Ends a call as a kill would, between two of its writes."""


class _Interrupted:
    calls = 0

    def __init__(self, after: int, whole: Callable[..., Any]) -> None:
        self.after, self.whole = after, whole

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _Interrupted.calls >= self.after:
            raise _KilledError
        _Interrupted.calls += 1
        return self.whole(*args, **kwargs)


class TestLetters:
    def test_one_shard_of_an_ended_run_is_queued_again_by_its_letter(
        self, client: Client, prefix: str, worker: ShardWorker, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = planned(client, prefix)
        for text in worker.take().values():
            worker.refuse(text)
        assert run.wait(timeout=20).state == "failed"
        job = f"{run.id}-00001"
        assert main(["dead-letters", "--requeue", "--id", job, "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert (row["job"], row["run"], row["shard"], row["became"]) == (job, prefix, 1, "queued again")
        assert run.progress().state == "running"
        assert set(taken := worker.take()) == {1}
        assert worker.do(taken[1]) == "succeeded"
        ended = run.wait(timeout=20)
        assert (ended.state, ended.succeeded, ended.refused) == ("partial", 2, 2)
        check_ended(run, client)

    def test_a_letter_of_a_running_run_takes_its_refusal_back(
        self, client: Client, store: ObjectStore, prefix: str, worker: ShardWorker
    ) -> None:
        run = planned(client, prefix, items=4)
        letter = worker.refuse(worker.take(0)[0])
        assert eventually(lambda: store.head(RunLayout.at(prefix).refused_shard(0)) is not None)
        assert main(["dead-letters", "--requeue"]) == 0
        assert run.progress().refused == 0
        assert store.head(RunLayout.at(prefix).refused_shard(0)) is None
        worker.burials.letter(letter)  # told once more, by a worker that read the letters before
        assert run.progress().refused == 0
        for text in worker.take().values():
            worker.do(text)
        assert run.wait(timeout=20).state == "succeeded"

    def test_a_letter_of_a_cancelled_or_removed_run_stays(
        self, client: Client, prefix: str, worker: ShardWorker, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = planned(client, prefix, items=2)
        worker.refuse(worker.take()[0])
        run.cancel()
        assert main(["dead-letters", "--requeue"]) == 1
        assert "cannot be queued: the run at" in capsys.readouterr().out
        for entry in client.store.list(prefix):
            client.store.delete(f"s3://pipefleet/{entry.key}")
        assert main(["dead-letters", "--requeue"]) == 1
        assert "there is no run at" in capsys.readouterr().out
        assert dead_letters.count_dead_letters(client.redis, QUEUE) == 1

    def test_a_letter_of_a_shard_that_is_done_is_dropped(
        self, client: Client, prefix: str, worker: ShardWorker, capsys: pytest.CaptureFixture[str]
    ) -> None:
        planned(client, prefix, items=2)
        text = worker.take()[0]
        worker.do(text)
        worker.refuse(text)
        assert main(["dead-letters", "--requeue"]) == 0
        assert "has ended meanwhile" in capsys.readouterr().out
        assert dead_letters.count_dead_letters(client.redis, QUEUE) == 0
        assert worker.take() == {}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["do", "refuse", "copy", "look", "resume", "cancel", "requeue", "mark"]),
        st.integers(min_value=0, max_value=2),
    ),
    max_size=14,
)


@given(steps=STEPS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_in_whatever_order_each_item_counts_once_and_the_run_ends(
    client: Client, environment: dict[str, str], steps: list[tuple[str, int]]
) -> None:
    client.redis.flushall()
    run = planned(client, prefix := f"s3://pipefleet/tests/{uuid.uuid4().hex}/")
    worker = ShardWorker(client, QUEUE)
    for step, index in steps:
        _take_step(step, index, run, worker)
        if client.store.head(RunLayout.at(prefix).success) is not None:
            check_ended(run, client)
    for _ in range(2):  # what is cancelled is resumed; then everything that is queued is done
        if run.progress().state == "cancelled":
            resumed(run)
        for text in worker.take().values():
            worker.do(text)
    assert run.wait(timeout=20).ended
    check_ended(run, client)


def _take_step(step: str, index: int, run: Run, worker: ShardWorker) -> None:
    client = worker.client
    if step in ("do", "refuse"):
        for text in worker.take(index).values():
            worker.do(text, bad=[2 * index]) if step == "do" else worker.refuse(text)
    elif step == "copy":
        for text in worker.take(index).values():
            client.redis.lpush(queue_lists(run.plan.queue)[-1], text, text)
    elif step == "mark":  # what a worker's thread does late
        Refusals(client.redis, client.settings, client.store, RunLayout.at(run.uri), run.id).mark(index)
    elif step == "requeue":
        main(["dead-letters", "--requeue", "--json"])
    else:
        {"look": run.progress, "resume": run.resume, "cancel": run.cancel}[step]()
