"""The queue of a stage: bounded, the most urgent slice first; and a stage that works it off before it ends."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from pipefleet.contract.messages import JobItem
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine.stage import SliceQueue, Stage
from pipefleet_workers.items import JobContext, Outcome, Work

SECONDS = 30.0


def work(name: str) -> Work:
    context = JobContext("job", None, {}, 3, None, Outcomes(range(1)))
    return Work(context, 0, JobItem(name, ""), {}, 1)


def names(slices: list[list[Work]]) -> list[str]:
    return [one.item.id for items in slices for one in items]


def test_the_most_urgent_slice_goes_first_and_equally_urgent_ones_in_order() -> None:
    queue, stopping = SliceQueue(9), threading.Event()
    for priority, name in ((6, "a"), (0, "b"), (6, "c"), (0, "d")):
        queue.put(priority, name)
    stopping.set()
    assert [queue.take(stopping) for _ in range(5)] == ["b", "d", "a", "c", None]


def test_who_puts_into_a_full_queue_waits_for_a_taker() -> None:
    queue, stopping, passed = SliceQueue(1), threading.Event(), threading.Event()
    queue.put(0, "first")

    def put() -> None:
        queue.put(0, "second")
        passed.set()

    thread = threading.Thread(target=put, daemon=True)
    thread.start()
    assert not passed.wait(0.1)
    assert queue.take(stopping) == "first"
    assert passed.wait(SECONDS)
    assert queue.take(stopping) == "second"


@pytest.mark.parametrize("threads", [1, 3])
def test_a_stage_works_off_its_queue_before_it_ends_and_begins_anew(threads: int) -> None:
    handled: list[list[Work]] = []
    stage = Stage("test", threads, handled.append, lambda _: None, room=100, watchdog=None, seconds=SECONDS)
    assert stage.stop(SECONDS), "it has not run yet"
    for turn in range(2):
        handled.clear()
        for index in range(20):
            stage.put(3, [work(f"{turn}-{index}")])
        stage.start()
        stage.start()
        assert stage.stop(SECONDS)
        assert stage.stop(SECONDS)
        assert sorted(names(handled)) == sorted(f"{turn}-{index}" for index in range(20))


def test_what_a_stage_cannot_handle_fails_alone() -> None:
    ended: list[Outcome] = []

    def handle(items: Any) -> None:
        if items[0].item.id == "bad":
            raise SystemError("no")
        ended.append(Outcome(items[0]))

    stage = Stage("test", 1, handle, ended.append, room=10, watchdog=None, seconds=SECONDS)
    stage.put(3, [work("bad"), work("with it")])
    stage.put(3, [work("good")])
    stage.start()
    assert stage.stop(SECONDS)
    assert [(one.work.item.id, bool(one.failure)) for one in ended] == [
        ("bad", True),
        ("with it", True),
        ("good", False),
    ]
