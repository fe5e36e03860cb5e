"""The consumer: every delivery ends once, in the one way that it deserves, and suspects count as they should."""

from __future__ import annotations

import threading
import time

import pytest

from pipefleet.contract.messages import JobMessage, JobState
from pipefleet.contract.records import JobFailure
from pipefleet.errors import ContractError
from pipefleet_workers.consume.held import DrainedError, job_of
from pipefleet_workers.ending import Ending
from tests.unit.conftest import eventually
from tests.unit.worker.consume.fakes import AWAY, Bench, FakeDelivery, FakeShards, shard, single

DONE = Ending(JobState.SUCCEEDED, "done")


def test_single_jobs_end_when_their_items_do() -> None:
    bench = Bench()
    good, bad = bench.take(single("good")), bench.take(single("bad"))
    bench.engine.end("good")
    bench.engine.end("bad", JobFailure("bad_input", "no text", "decode"))
    assert (good.wait(), bad.wait()) == ("done", "done")
    assert good.endings == [Ending(JobState.SUCCEEDED, "succeeded")]
    assert [(one.state, one.text) for one in bad.endings] == [(JobState.FAILED, "bad_input in decode")]
    assert (good.starts, bad.starts) == (1, 1)


def test_a_job_that_was_cancelled_before_is_told_as_cancelled_and_never_starts() -> None:
    bench = Bench()
    bench.reporter.states["job"] = JobState.CANCELLED
    delivery = bench.take(single("job"))
    assert delivery.wait() == "done"
    assert delivery.endings == [Ending(JobState.CANCELLED, "cancelled before", here=False)]
    assert (delivery.starts, bench.engine.inside) == (0, [])


def test_a_result_that_comes_after_the_cancel_is_told_as_cancelled() -> None:
    bench = Bench()
    delivery = bench.take(single("job"))
    bench.engine.work("job")
    bench.reporter.states["job"] = JobState.CANCELLED
    bench.engine.end("job")
    delivery.wait()
    assert delivery.endings[0].state is JobState.CANCELLED
    assert (bench.metrics.totals().cancelled, bench.metrics.totals().failed) == (1, 0)


def test_an_unreadable_message_is_refused() -> None:
    assert Bench().take({"version": 99}).wait().startswith("refused: this worker understands")


def test_a_shard_ends_as_it_says() -> None:
    bench = Bench(FakeShards(lambda message: DONE))
    delivery = bench.take(shard())
    assert (delivery.wait(), delivery.endings) == ("done", [DONE])


def test_a_contract_error_refuses_the_shard() -> None:
    def run(message: JobMessage) -> Ending:
        raise ContractError("not this one")

    assert Bench(FakeShards(run)).take(shard()).wait() == "refused: not this one"


def test_the_headers_of_a_shard_let_none_of_its_items_expire() -> None:
    delivery = FakeDelivery(shard())
    delivery.deadline = 1.0
    assert job_of(delivery).deadline is None


@pytest.mark.parametrize(
    ("own", "header", "holds"), [(50.0, 20.0, 20.0), (None, 20.0, 20.0), (10.0, 20.0, 10.0), (10.0, None, 10.0)]
)
def test_the_earlier_one_of_two_deadlines_holds(own: float | None, header: float | None, holds: float) -> None:
    bench, now = Bench(), time.time()
    delivery = FakeDelivery(single("job", deadline=None if own is None else now + own))
    delivery.deadline = None if header is None else now + header
    bench.consumer.take(delivery)
    deadline = bench.engine.work("job").job.deadline
    assert deadline is not None
    assert time.time() + deadline - time.monotonic() == pytest.approx(now + holds, abs=3)


def test_a_message_for_later_begins_at_its_time() -> None:
    bench = Bench()
    delivery = bench.take(single("job"), after=60.0)
    bench.later(59.0)
    assert not bench.engine.inside
    bench.later(1.0)
    bench.engine.end("job")
    assert delivery.wait() == "done"


def test_what_waits_for_later_is_given_back_by_a_drain() -> None:
    bench = Bench()
    delivery = bench.take(single("job"), after=60.0)
    bench.consumer.drain(0.0)
    assert delivery.ends == ["given back"]


def test_a_drain_waits_for_what_runs_and_no_longer() -> None:
    bench = Bench()
    delivery = bench.take(single("job"))
    bench.engine.work("job")
    drained = threading.Event()
    threading.Thread(target=lambda: (bench.consumer.drain(60.0), drained.set()), daemon=True).start()
    assert eventually(lambda: bench.consumer._draining.is_set())
    assert not drained.is_set()
    bench.engine.end("job")
    assert drained.wait(20)
    assert delivery.ends == ["done"]


def test_a_hurry_ends_the_waiting() -> None:
    bench = Bench()
    delivery = bench.take(single("job"))
    bench.engine.work("job")
    hurry = threading.Event()
    begin = time.monotonic()
    threading.Timer(0.0, hurry.set).start()
    bench.consumer.drain(60.0, hurry)
    assert time.monotonic() - begin < 30
    assert delivery.wait() == "given back"


def test_a_drain_gives_back_what_waits_for_a_service() -> None:
    bench = Bench()
    bench.goes_away()
    assert not bench.health.check()
    delivery = bench.take(single("job"))
    bench.consumer.drain(0.0)
    assert delivery.wait() == "given back"


def test_a_job_waits_for_a_service_that_is_away_for_everybody() -> None:
    bench = Bench()
    delivery = bench.take(single("job"))
    bench.engine.work("job")
    bench.goes_away()
    for _ in range(10):  # more often than a job may fail alone
        bench.consumer.postpone(delivery, AWAY)
    assert (delivery.retries, delivery.ends) == (0, [])


def test_a_job_that_fails_alone_again_and_again_is_refused() -> None:
    bench = Bench(retries=1)
    delivery = bench.take(single("job"), after=1e6)
    for _ in range(3):
        bench.consumer.postpone(delivery, AWAY)
    assert delivery.wait() == "refused: failed 3 times, at last with: away"


def test_a_delivery_ends_once() -> None:
    bench = Bench()
    delivery = bench.take(single("job"), after=60.0)
    bench.consumer.give_back(delivery)
    bench.consumer.done(delivery, single("job"), DONE)
    bench.consumer.refuse(delivery, "no")
    assert delivery.ends == ["given back"]


# What is written as the number of deliveries of a suspect that was fetched for the third time.


def suspect(bench: Bench) -> tuple[JobMessage, list[int]]:
    message = shard()
    return message, bench.reporter.counted.setdefault(message.id, [])


def test_a_suspect_counts_while_it_runs_and_at_no_other_time() -> None:
    seen: list[list[int]] = []
    bench = Bench(FakeShards(lambda message: (seen.append(list(counted)), DONE)[1]))
    message, counted = suspect(bench)
    assert bench.take(message, deliveries=3).wait() == "done"
    assert seen == [[2, 3]]
    assert eventually(lambda: counted == [2, 3, 2])


def test_a_suspect_that_is_refused_does_not_count_against_the_next() -> None:
    def run(message: JobMessage) -> Ending:
        raise ContractError("no")

    bench = Bench(FakeShards(run))
    message, counted = suspect(bench)
    bench.take(message, deliveries=3).wait()
    assert eventually(lambda: counted == [2, 3, 2])


@pytest.mark.parametrize("times", [1, 4])
def test_a_suspect_that_is_postponed_loses_no_count(times: int) -> None:
    left = [AWAY] * times

    def run(message: JobMessage) -> Ending:
        if left:
            raise left.pop()
        return DONE

    bench = Bench(FakeShards(run))
    message, counted = suspect(bench)
    delivery = bench.take(message, deliveries=3)
    for again in range(1, times + 1):
        assert eventually(lambda again=again: counted == [2, *[3, 2, 2] * (again - 1), 3, 2])  # type: ignore[misc]
        assert eventually(lambda: bool(bench.consumer.later._heap))
        bench.later(60.0)
    delivery.wait()
    assert eventually(lambda: counted == [2, *[3, 2, 2] * times, 3, 2])


def test_a_suspect_that_is_drained_while_it_waits_never_counts() -> None:
    began = threading.Event()

    def run(message: JobMessage) -> Ending:
        began.set()
        assert eventually(lambda: drained.is_alive() and bench.consumer._draining.is_set())
        raise DrainedError

    bench = Bench(FakeShards(run))
    drained = threading.Thread(target=bench.consumer.drain, args=(0.0,), daemon=True)
    first, second = bench.take(shard("first"), deliveries=3), bench.take(shard("second"), deliveries=3)
    assert began.wait(20)
    drained.start()
    assert {first.wait(), second.wait()} == {"given back"}
    assert eventually(lambda: bench.reporter.counted["first"] == [2, 3, 2])
    assert bench.reporter.counted["second"] == [2]


def test_a_suspect_whose_lease_is_lost_is_the_other_workers_to_count() -> None:
    bench = Bench()
    message = single("job")
    delivery = bench.take(message, deliveries=3)
    bench.engine.work("job")
    delivery.lease.lost = True
    bench.engine.end("job")
    assert delivery.wait() == "done"
    assert delivery.endings[0].state is None
    assert bench.reporter.counted["job"] == [2, 3]


def test_a_suspect_waits_for_a_redis_that_cannot_count_it() -> None:
    bench = Bench(FakeShards(lambda message: DONE))
    bench.goes_away()
    delivery = bench.take(shard(), deliveries=3)
    assert eventually(lambda: not bench.health.well)
    assert not bench.shards.ran
    bench.comes_back()
    assert delivery.wait() == "done"
    assert bench.reporter.counted["run-0"][:2] == [2, 3]


def test_a_suspect_runs_with_nothing_beside_it() -> None:
    inside: set[str] = set()
    beside: dict[str, set[str]] = {}
    together = threading.Barrier(3)

    def run(message: JobMessage) -> Ending:
        inside.add(message.id)
        beside[message.id] = set(inside)
        if message.id.startswith("innocent"):
            together.wait(20)
        inside.discard(message.id)
        return DONE

    bench = Bench(FakeShards(run), shards=3)
    taken = [bench.take(shard(f"innocent {n}")) for n in range(3)]
    taken += [bench.take(shard(f"suspect {n}"), deliveries=3) for n in range(3)]
    assert [one.wait() for one in taken] == ["done"] * 6
    assert [beside[f"suspect {n}"] for n in range(3)] == [{f"suspect {n}"} for n in range(3)]


def test_threads_of_the_consumer_outlive_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(deliveries=3)
    whole = bench.reporter.count_deliveries

    def broken(*_: object, **__: object) -> None:
        monkeypatch.setattr(bench.reporter, "count_deliveries", whole)
        raise RuntimeError("a bug")

    monkeypatch.setattr(bench.reporter, "count_deliveries", broken)
    suspect = bench.take(single("suspect"), deliveries=3)
    assert eventually(lambda: bool(bench.consumer.later._heap))
    bench.later(60.0)
    bench.engine.end("suspect")
    assert suspect.wait() == "done"


def test_a_message_that_cannot_be_taken_in_is_nobody_elses_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(retries=0)

    def elsewhere(message: JobMessage) -> str | None:
        if message.id == "bad":
            raise RuntimeError("a bug")
        return None

    monkeypatch.setattr(bench.jobs, "elsewhere", elsewhere)
    bad, good = bench.take(single("bad")), bench.take(single("good"))
    bench.engine.end("good")
    assert good.wait() == "done"
    assert eventually(lambda: bool(bench.consumer.later._heap))
    bench.later(60.0)
    assert bad.wait().startswith("refused: failed 2 times")


def test_a_single_job_that_calls_itself_a_shard_runs_no_more_often_than_others() -> None:
    """Its headers brought it here once more; what it is, its body says."""
    bench = Bench()
    spoof = bench.take(single("spoof"), deliveries=4)
    assert spoof.wait() == "refused: delivered 3 times"
    real = bench.take(shard("real"), deliveries=4)
    assert real.wait() == "done"
    assert not bench.engine.inside
