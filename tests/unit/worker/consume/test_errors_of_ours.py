"""An error of ours, wherever it comes from: no thread of the consumer ends by it, nothing stays in the gate, no job is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from pipefleet.contract.messages import JobState
from pipefleet_workers.consume.health import Health
from tests.unit.conftest import eventually
from tests.unit.worker.consume.fakes import AWAY, Bench, FakeDelivery, shard, single


def broken(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("a bug")


def once(bench: Bench, owner: Any, name: str) -> None:
    """The next call of a method raises, those after it do what they did."""
    before: Callable[..., Any] = getattr(owner, name)

    def raises(*_: Any, **__: Any) -> NoReturn:
        setattr(owner, name, before)
        broken()

    setattr(owner, name, raises)


@pytest.mark.parametrize("where", ["start_many", "begin", "admit", "elsewhere"])
def test_jobs_that_an_error_kept_from_beginning_begin_again(where: str) -> None:
    bench = Bench()
    owner = {"start_many": bench.reporter, "begin": bench.jobs, "admit": bench.engine, "elsewhere": bench.jobs}[where]
    once(bench, owner, where)
    delivery = bench.take(single())
    assert eventually(lambda: bool(bench.consumer.later._heap))
    assert eventually(lambda: bench.consumer._gate.empty and not bench.jobs._contexts)
    bench.later(60.0)
    bench.engine.end("job")
    assert delivery.wait() == "done"


def test_a_job_that_cannot_begin_keeps_no_other_from_it() -> None:
    bench = Bench()
    bench.goes_away()
    bench.health.check()
    bad = FakeDelivery(single("bad"))
    bad.started = broken  # type: ignore[method-assign]
    bench.consumer.take(bad)
    good = bench.take(single("good"))
    bench.comes_back()
    bench.engine.end("good")
    assert good.wait() == "done"
    assert eventually(lambda: bool(bench.consumer.later._heap))


def test_a_job_whose_delivery_cannot_end_goes_back_and_leaves_the_gate() -> None:
    bench = Bench()
    delivery = FakeDelivery(single())
    delivery.done = broken  # type: ignore[method-assign]
    bench.consumer.take(delivery)
    bench.engine.end("job")
    assert delivery.wait() == "given back"
    assert eventually(lambda: bench.consumer._gate.empty)


def test_the_thread_of_shards_outlives_one_that_cannot_end() -> None:
    bench = Bench()
    delivery = FakeDelivery(shard("run-0"))
    delivery.done = broken  # type: ignore[method-assign]
    bench.consumer.take(delivery)
    assert delivery.wait() == "given back"
    assert bench.take(shard("run-1")).wait() == "done"


def test_the_threads_of_suspects_outlive_one_that_cannot_end() -> None:
    bench = Bench()
    unreadable, alone = FakeDelivery({"version": 1}, deliveries=3), FakeDelivery(single("alone"), deliveries=3)
    unreadable.refuse = alone.done = broken  # type: ignore[method-assign]
    bench.consumer.take(unreadable)
    assert unreadable.wait() == "given back"
    bench.consumer.take(alone)
    bench.engine.end("alone")
    assert alone.wait() == "given back"
    next_one = bench.take(single("next"), deliveries=3)
    bench.engine.end("next")
    assert next_one.wait() == "done"
    assert bench.reporter.states["next"] is JobState.SUCCEEDED


def test_an_error_in_a_probe_is_waited_for_like_an_outage() -> None:
    errors: list[Exception] = [AWAY, RuntimeError("a bug")]

    def probe() -> None:
        if errors:
            raise errors.pop(0)

    health = Health(probe, sleep=lambda _: None)
    assert not health.check()
    assert eventually(lambda: health.well)
