"""The jobs inside a worker: found by id and by run, ended together, and checked before their items enter the engine."""

from __future__ import annotations

from typing import Any

import pytest

from pipefleet.contract.messages import JobItem, JobMessage
from pipefleet.fleet.pools import Pool
from pipefleet_workers.consume.held import DrainedError, RevokedError
from pipefleet_workers.consume.jobs import UNKNOWN_BYTES, Jobs, work_of
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.items import JobContext
from pipefleet_workers.process.sizes import NUMBER
from tests.unit.worker.consume.fakes import TASK, FakeEngine, shard, single


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def jobs(engine: FakeEngine) -> Jobs:
    pool = Pool("pool", TASK, "model", parameters={"top_k": 1})
    return Jobs(pool, engine, ("s3://bucket/",))  # type: ignore[arg-type]


def begin(jobs: Jobs, message: JobMessage) -> JobContext:
    return jobs.begin(message, Outcomes((0,)), priority=3, patient=True)


def reason(context: JobContext) -> Any:
    return context.sink.abandoned  # type: ignore[attr-defined]


def test_a_job_has_the_pools_parameters_and_its_own_above_them(jobs: Jobs) -> None:
    assert begin(jobs, single(parameters={"top_k": 3})).parameters == {"top_k": 3}
    assert begin(jobs, single()).parameters == {"top_k": 1}


def test_a_job_is_cancelled_by_its_id_and_a_shard_by_its_run(jobs: Jobs) -> None:
    one, part, other = begin(jobs, single("one")), begin(jobs, shard()), begin(jobs, single("other"))
    jobs.cancel("one")
    jobs.cancel("run")
    assert (one.cancelled, part.cancelled, other.cancelled) == (True, True, False)


def test_a_job_that_has_ended_is_cancelled_no_more(jobs: Jobs) -> None:
    context = begin(jobs, single("one"))
    jobs.end(context)
    jobs.cancel("one")
    assert not context.cancelled


def test_a_drain_abandons_every_job(jobs: Jobs) -> None:
    contexts = [begin(jobs, single("one")), begin(jobs, shard())]
    jobs.give_back_all(DrainedError())
    assert [type(reason(context)) for context in contexts] == [DrainedError] * 2


def test_a_revoked_job_is_abandoned_also_where_it_begins_again_until_it_is_forgotten(jobs: Jobs) -> None:
    first, other = begin(jobs, shard("run-0")), begin(jobs, shard("run-1"))
    jobs.revoke("run-0")
    again = begin(jobs, shard("run-0"))
    assert [type(reason(one)) for one in (first, again)] == [RevokedError] * 2
    assert reason(other) is None
    jobs.forget("run-0")
    assert reason(begin(jobs, shard("run-0"))) is None


def test_only_what_may_be_run_enters_the_engine(jobs: Jobs, engine: FakeEngine) -> None:
    items = [JobItem("0", "good"), JobItem("1", "bad", {"no such": 1}), JobItem("2", {"$ref": "s3://b/k", "size": "x"})]
    sink = Outcomes(range(3))
    context = jobs.begin(single(), sink, priority=3, patient=True)
    jobs.admit([work_of(context, place, item) for place, item in enumerate(items)], bulk=False)
    assert engine.work(context.id).position == 0
    failures = {one.work.position: one.failure for one in sink.wait(0.0)}
    assert set(failures) == {1, 2}
    assert all(failure is not None and failure.stage == "consume" for failure in failures.values())


@pytest.mark.parametrize(
    ("inputs", "weight", "fetches"),
    [
        ("four", 4, False),
        ({"text": "four"}, 4, False),
        ({"$ref": "s3://bucket/key", "size": 10}, len("s3://bucket/key") + NUMBER + 10, True),
        (
            [{"$ref": "s3://bucket/a", "size": 10}, {"$ref": "s3://bucket/b"}],
            13 + NUMBER + 10 + 13 + UNKNOWN_BYTES,
            True,
        ),
    ],
)
def test_an_item_weighs_what_it_brings_into_memory(jobs: Jobs, inputs: Any, weight: int, fetches: bool) -> None:
    work = work_of(begin(jobs, single()), 0, JobItem("0", inputs))
    assert (work.weight, work.fetches) == (weight, fetches)


def test_an_output_outside_what_may_be_written_is_refused(jobs: Jobs) -> None:
    items = (JobItem("0", "text"),)
    inside = JobMessage("job", TASK, model="model", items=items, output="s3://bucket/out/")
    outside = JobMessage("job", TASK, model="model", items=items, output="s3://elsewhere/out/")
    assert jobs.refusal(inside) is None
    refused = jobs.refusal(outside)
    assert refused is not None
    assert refused.code == "forbidden"
