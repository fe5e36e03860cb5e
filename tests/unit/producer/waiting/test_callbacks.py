"""Callbacks of futures: on a thread of their own, exactly once, and free to wait for other jobs."""

from __future__ import annotations

import asyncio
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from pipefleet.client import Client
from pipefleet.contract.messages import JobState
from pipefleet.contract.records import JobRecord
from pipefleet.jobs.job import Job
from pipefleet.waiting.callbacks import Callbacks
from pipefleet.waiting.watcher import JobFuture, _resolve
from tests.unit.producer.client.test_jobs import TEXTS, Worker


@pytest.fixture
def worker(client: Client) -> Worker:
    return Worker(client)


async def _of(job: Job) -> Any:
    return await job


def test_a_callback_may_submit_and_wait_for_another_job(client: Client, worker: Worker) -> None:
    found: Future[Any] = Future()

    def go_on(_: object) -> None:
        found.set_result(client.submit(TEXTS, "second").result(30))

    first = client.submit(TEXTS, "first")
    first.watch().add_done_callback(go_on)
    worker.answer(1)
    worker.answer(2)
    assert found.result(30) == 2


def test_a_slow_callback_holds_up_neither_results_nor_awaits(client: Client, worker: Worker) -> None:
    slow, go_on = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        slow.set()
        go_on.wait(60)

    first, second, third = (client.submit(TEXTS, text) for text in "abc")
    first.watch().add_done_callback(wait)
    worker.answer(1)
    assert slow.wait(20)
    try:
        worker.answer(2)
        worker.answer(3)
        assert second.result(20) == 2
        assert asyncio.run(asyncio.wait_for(_of(third), 20)) == 3
    finally:
        go_on.set()


def test_one_job_is_awaited_in_several_loops(client: Client, worker: Worker) -> None:
    job = client.submit(TEXTS, "a")
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(lambda: asyncio.run(asyncio.wait_for(_of(job), 30))) for _ in range(4)]
        worker.answer("once")
        assert [one.result(30) for one in waiting] == ["once"] * 4


def test_who_begins_to_wait_while_another_takes_the_result_is_not_forgotten(client: Client, worker: Worker) -> None:
    job = client.submit(TEXTS, "a")
    worker.answer("once")
    assert job.result(20) == "once"
    anew = client.watcher._future(job.id)
    client.watcher.forget(job.id)  # as a thread does that read the record before
    assert client.watcher.watch(job.id) is anew
    assert anew.result(20).output == '"once"'


def test_many_threads_take_one_result_again_and_again(client: Client, worker: Worker) -> None:
    job = client.submit(TEXTS, "a")
    worker.answer("once")
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: [job.result(20) for _ in range(50)], range(8)))
    assert found == [["once"] * 50] * 8


def test_a_loop_that_is_gone_is_woken_in_vain(client: Client, worker: Worker) -> None:
    job = client.submit(TEXTS, "a")

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_of(job), 0.1)

    asyncio.run(impatient())
    worker.answer("later")
    assert job.result(20) == "later"


def test_a_callback_of_a_job_that_has_ended_is_called_too(client: Client, worker: Worker) -> None:
    job, called = client.submit(TEXTS, "a"), threading.Event()
    future = job.watch()
    worker.answer(1)
    future.result(20)
    future.add_done_callback(lambda _: called.set())
    assert called.wait(20)


def test_who_closes_the_client_in_a_callback_does_not_wait_for_itself(
    environment: dict[str, str], client: Client, worker: Worker
) -> None:
    own, closed = Client(), threading.Event()

    def close(_: object) -> None:
        own.close()
        closed.set()

    job = own.submit(TEXTS, "a")
    job.watch().add_done_callback(close)
    worker.answer(1)
    assert closed.wait(20)


def test_of_threads_that_resolve_one_future_exactly_one_wins() -> None:
    for _ in range(50):
        calls: list[JobRecord] = []
        future, barrier, called = JobFuture(Callbacks()), threading.Barrier(4), threading.Event()
        future.add_quick_callback(lambda one, calls=calls: calls.append(one.result()))  # type: ignore[misc]
        future.add_done_callback(lambda _, called=called: called.set())  # type: ignore[misc]
        records = [JobRecord(JobState.SUCCEEDED, output=str(number)) for number in range(4)]

        def race(record: JobRecord, future: JobFuture = future, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(20)
            _resolve(future, record)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(race, records))
        assert calls == [future.result(0)]
        assert called.wait(20)


class TestCallbacks:
    def test_they_run_in_order_on_one_daemon_thread_and_errors_end_nothing(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        callbacks, threads, done = Callbacks(), list[threading.Thread](), threading.Event()
        order: list[int] = []

        def note(number: int) -> None:
            threads.append(threading.current_thread())
            order.append(number)
            if number == 1:
                raise ValueError("no")
            if number == 2:
                sys.exit("no")

        for number in range(5):
            callbacks.run(lambda number=number: note(number))  # type: ignore[misc]
        callbacks.run(done.set)
        assert done.wait(20)
        assert order == list(range(5))
        assert len(set(threads)) == 1
        assert threads[0].daemon
        assert "a callback of a job failed" in caplog.text

    def test_the_thread_ends_when_they_are_stopped_and_another_begins_when_needed(self) -> None:
        callbacks, threads = Callbacks(), list[threading.Thread]()
        for _ in range(2):
            ran = threading.Event()
            callbacks.run(lambda: threads.append(threading.current_thread()))
            callbacks.run(ran.set)
            assert callbacks.stop(20)
            assert ran.is_set()
            assert not threads[-1].is_alive()
        assert threads[0] is not threads[1]
        assert callbacks.stop(20)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_a_callback_that_asks_for_the_exit_does_not_end_those_of_others(error: BaseException) -> None:
    callbacks, called = Callbacks(), threading.Event()

    def leave() -> None:
        raise error

    callbacks.run(leave)
    callbacks.run(called.set)
    assert called.wait(10)
    assert callbacks.stop(20)
