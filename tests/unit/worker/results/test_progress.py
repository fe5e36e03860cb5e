"""Progress as ranges: whatever ends in whatever order, the bitmaps of the run say of each item whether it ended and failed."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from pipefleet.contract.messages import JobItem, Shard
from pipefleet.contract.records import JobFailure
from pipefleet.queues.keys import run_key
from pipefleet.settings import Settings
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.items import JobContext, Outcome, Work
from pipefleet_workers.results.reports import Reporter
from pipefleet_workers.storage.store import WorkerStore

COUNT = 200
FAILURE = JobFailure("bad_input", "no text", "decode")
_ENDS = st.dictionaries(st.integers(0, COUNT - 1), st.booleans())
_RUNS = st.tuples(st.integers(0, COUNT - 1), st.integers(0, COUNT), st.booleans()).map(
    lambda run: dict.fromkeys(range(run[0], min(COUNT, run[0] + run[1])), run[2])
)


def ended(ends: dict[int, bool]) -> list[Outcome]:
    context = JobContext("run-0", "run", {}, 9, None, Outcomes(range(COUNT)))
    return [
        Outcome(Work(context, place, JobItem(str(place), "text"), {}, 1), "x", None if fine else FAILURE)
        for place, fine in ends.items()
    ]


def bits(redis: Redis, key: str) -> set[int]:
    found: bytes = redis.get(key) or b""  # type: ignore[assignment]
    return {place for place in range(8 * len(found)) if found[place // 8] >> (7 - place % 8) & 1}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 20), st.lists(st.one_of(_ENDS, _RUNS), max_size=5))
def test_the_bitmaps_tell_what_has_ended(redis: Redis, first: int, told: Sequence[dict[int, bool]]) -> None:
    run = uuid.uuid4().hex
    reporter = Reporter(redis, WorkerStore(), Settings(), worker="worker")
    shard = Shard(run, f"s3://bucket/{run}/", f"s3://bucket/{run}/0.jsonl", 0, first, COUNT)
    known: dict[int, bool] = {}
    for ends in told:
        reporter.progress(shard, ended(ends))
        known |= ends
    assert bits(redis, run_key(run, "items")) == {first + place for place in known}
    assert bits(redis, run_key(run, "failed")) == {first + place for place, fine in known.items() if not fine}
    redis.delete(run_key(run, "items"), run_key(run, "failed"))
