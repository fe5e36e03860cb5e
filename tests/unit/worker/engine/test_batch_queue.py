"""The room before the device under many threads: bounded, nothing lost or doubled, closed without a hang."""

from __future__ import annotations

import threading

from pipefleet.contract.messages import JobItem
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine.batch_queue import BatchQueue
from pipefleet_workers.engine.batcher import BatchLimits, MicroBatcher
from pipefleet_workers.items import Assembly, Batch, JobContext, Unit, Work

SECONDS = 30.0


def unit(length: int) -> Unit:
    context = JobContext("job", None, {}, 3, None, Outcomes(range(1)))
    return Unit(Assembly(Work(context, 0, JobItem("0", ""), {}, 1), expected=1), 0, "key", length, None)


def room(capacity: int) -> BatchQueue:
    return BatchQueue(MicroBatcher(BatchLimits(max_cost=64, max_items=5)), capacity)


def started(target: object, *args: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def joined(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "a thread hangs"


def test_many_producers_and_takers_lose_and_double_nothing() -> None:
    queue, stopping = room(8), threading.Event()
    groups = [[[unit(1 + (i * j) % 13) for j in range(1, 4)] for i in range(100)] for _ in range(4)]
    taken: list[list[Batch]] = [[], []]
    most = []

    def produce(own: list[list[Unit]]) -> None:
        for units in own:
            queue.put(units)
            most.append(len(queue))

    def consume(own: list[Batch]) -> None:
        while (batch := queue.take(stopping)) is not None:
            own.append(batch)

    consumers = [started(consume, own) for own in taken]
    joined(*[started(produce, own) for own in groups])
    stopping.set()
    queue.wake()
    joined(*consumers)
    out = [id(one) for own in taken for batch in own for one in batch.units]
    assert sorted(out) == sorted(id(one) for own in groups for units in own for one in units)
    assert max(most) <= 8 - 1 + 3, "one item's units may exceed the capacity, but only one item's"


def test_put_blocks_while_full_and_goes_on_when_a_batch_leaves() -> None:
    queue, passed = room(2), threading.Event()
    queue.put([unit(1), unit(2)])

    def put_more() -> None:
        queue.put([unit(3)])
        passed.set()

    thread = started(put_more)
    assert not passed.wait(0.1)
    assert len(queue) == 2
    assert queue.take(threading.Event()) is not None
    joined(thread)
    assert passed.is_set()


def test_the_units_of_an_item_enter_together_even_above_the_capacity() -> None:
    queue = room(2)
    queue.put([unit(1) for _ in range(7)])
    assert len(queue) == 7


def test_take_waits_for_the_first_unit() -> None:
    queue = room(4)
    found: list[Batch | None] = []
    thread = started(lambda: found.append(queue.take(threading.Event())))
    queue.put([unit(1)])
    joined(thread)
    assert found[0] is not None


def test_who_is_to_stop_empties_the_room_and_then_ends() -> None:
    queue, stopping = room(4), threading.Event()
    queue.put([unit(1)])
    stopping.set()
    assert queue.take(stopping) is not None
    assert queue.take(stopping) is None


def test_who_waits_hears_that_it_is_to_stop() -> None:
    queue, stopping = room(1), threading.Event()
    thread = started(queue.take, stopping)
    stopping.set()
    queue.wake()
    joined(thread)


def test_a_poll_never_blocks_and_makes_room_and_a_wait_ends_with_the_last_unit() -> None:
    queue, stopping = room(2), threading.Event()
    assert queue.poll(lambda one: 9) is None
    queue.put([unit(3), unit(4)])
    putting = started(queue.put, [unit(5)])
    assert queue.wait(stopping)
    assert queue.poll(lambda one: 0) is None
    first = queue.poll(lambda one: 1)
    assert first is not None
    assert len(first.units) == 1
    joined(putting)
    stopping.set()
    assert queue.wait(stopping), "two units are left"
    while queue.poll(lambda one: 9) is not None:
        pass
    assert not queue.wait(stopping)
