"""A call over many inputs: results as soon as they are there, in order, bounded, and nothing left behind."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipefleet.client import Client
from pipefleet.contract.messages import JobState, decode_message
from pipefleet.errors import InputError, JobError, ParameterError, ResultTimeoutError
from pipefleet.pipelines.fleet_pipeline import pipeline
from pipefleet.pipelines.streaming import stream
from pipefleet.queues.keys import queue_list
from pipefleet.queues.looking import queue_depth
from pipefleet.tasks import TASKS
from tests.unit.conftest import eventually
from tests.unit.producer.client.test_jobs import OWN, QUEUE, TEXTS, Worker


class FakeJob:
    """A job that ends when it is told to."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.ended = threading.Event()
        self.cancelled = False

    def cancel(self) -> bool:
        self.cancelled = True
        return True


class Fleet:
    """Where fake jobs are submitted; they end at once unless `held`."""

    def __init__(self, *, held: bool = False) -> None:
        self.jobs: list[FakeJob] = []
        self.held = held

    def submit(self, value: Any) -> FakeJob:
        if isinstance(value, Exception):
            raise value
        job = FakeJob(value)
        self.jobs.append(job)
        if not self.held:
            job.ended.set()
        return job

    def result(self, job: FakeJob) -> Any:
        assert job.ended.wait(30)
        return job.value

    def stream(self, source: Iterator[Any], *, bound: int = 4, eager: bool = False) -> Any:
        return stream(source, self.submit, self.result, bound=bound, eager=eager)  # type: ignore[arg-type]


def test_a_result_does_not_wait_for_the_next_input() -> None:
    seen = threading.Event()

    def live() -> Iterator[int]:
        yield 1
        assert seen.wait(30)
        yield 2

    results = Fleet().stream(live())
    assert next(results) == 1
    seen.set()
    assert list(results) == [2]


def test_all_come_in_order_and_no_more_than_the_bound_is_taken() -> None:
    taken: list[int] = []
    results = Fleet().stream((taken.append(number) or number for number in range(1000)), bound=4)  # type: ignore[func-returns-value]
    for number, result in enumerate(results):
        assert result == number
        assert len(taken) <= number + 1 + 4
    assert taken == list(range(1000))


def test_nothing_is_taken_before_the_first_result_is_asked_for() -> None:
    fleet = Fleet()
    results = fleet.stream(iter([1]))
    assert not fleet.jobs
    results.close()
    assert not fleet.jobs


def test_an_error_of_the_inputs_comes_after_the_results_before_it() -> None:
    def broken() -> Iterator[int]:
        yield from (1, 2)
        raise ValueError("no more")

    results = Fleet().stream(broken())
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ValueError, match="no more"):
        next(results)


def test_with_eager_an_error_of_the_first_window_needs_no_result() -> None:
    fleet = Fleet(held=True)
    with pytest.raises(InputError):
        next(fleet.stream(iter([1, InputError("bad"), 3]), eager=True))
    assert [job.cancelled for job in fleet.jobs] == [True]


@pytest.mark.parametrize("eager", [False, True])
def test_no_inputs_are_no_results(eager: bool) -> None:
    assert list(Fleet().stream(iter([]), eager=eager)) == []


def test_who_stops_early_cancels_what_is_under_way_and_closes_the_generator() -> None:
    closed = threading.Event()

    def inputs() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.set()

    fleet = Fleet()
    results = fleet.stream(inputs(), bound=4)
    assert next(results) == 0
    assert eventually(lambda: len(fleet.jobs) == 5)
    results.close()
    assert [job.cancelled for job in fleet.jobs] == [False, True, True, True, True]
    assert closed.wait(20)
    assert len(fleet.jobs) == 5


def test_an_iterator_that_is_no_generator_is_not_closed(tmp_path: Any) -> None:
    path = tmp_path / "texts"
    path.write_text("a\nb\nc\n")
    with path.open() as file:
        results = Fleet().stream(file)
        assert next(results) == "a\n"
        results.close()
        assert not file.closed


def test_a_failed_result_cancels_the_rest() -> None:
    fleet, taken = Fleet(), threading.Event()

    def result(job: FakeJob) -> Any:
        assert taken.wait(20)
        raise JobError("it failed")

    def inputs() -> Iterator[int]:
        yield from (1, 2)
        taken.set()

    with pytest.raises(JobError):
        next(stream(inputs(), fleet.submit, result, bound=4))  # type: ignore[arg-type]
    assert fleet.jobs[1].cancelled


def test_an_interrupt_cancels_what_is_under_way() -> None:
    fleet = Fleet()

    def result(job: FakeJob) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(stream(iter([1, 2]), fleet.submit, result, bound=1))  # type: ignore[arg-type]
    assert [job.cancelled for job in fleet.jobs] == [True]


def test_an_input_that_comes_after_the_caller_left_is_not_submitted() -> None:
    fleet, go_on, ended = Fleet(), threading.Event(), threading.Event()

    def live() -> Iterator[int]:
        try:
            yield 1
            go_on.wait(30)
            yield 2
        finally:
            ended.set()

    results = fleet.stream(live())
    assert next(results) == 1
    results.close()  # although the source is busy
    go_on.set()
    assert ended.wait(20)
    assert [job.value for job in fleet.jobs] == [1]


def test_a_job_that_was_being_submitted_when_the_caller_left_is_cancelled() -> None:
    fleet, submitting, go_on = Fleet(), threading.Event(), threading.Event()

    def submit(value: int) -> FakeJob:
        if value == 2:
            submitting.set()
            assert go_on.wait(30)
        return fleet.submit(value)

    results = stream(iter([1, 2]), submit, fleet.result, bound=4)  # type: ignore[arg-type]
    assert next(results) == 1
    assert submitting.wait(20)
    results.close()
    go_on.set()
    assert eventually(lambda: len(fleet.jobs) == 2 and fleet.jobs[1].cancelled)


def test_results_that_are_dropped_are_closed() -> None:
    fleet = Fleet()
    results = fleet.stream(iter(range(100)), bound=4)
    next(results)
    assert eventually(lambda: len(fleet.jobs) == 5)
    del results
    gc.collect()
    assert [job.cancelled for job in fleet.jobs[1:]] == [True] * 4


def test_inputs_are_not_kept() -> None:
    class Picture:
        pass

    alive: weakref.WeakSet[Picture] = weakref.WeakSet()

    def pictures() -> Iterator[Picture]:
        for _ in range(200):
            one = Picture()
            alive.add(one)
            yield one
            del one

    def submit(_: Picture) -> FakeJob:
        return fleet.submit(0)

    fleet, most = Fleet(), 0
    for _ in stream(pictures(), submit, fleet.result, bound=4):  # type: ignore[arg-type]
        most = max(most, len(alive))
    assert most <= 2


class TestPipe:
    @pytest.fixture
    def worker(self, client: Client) -> Worker:
        return Worker(client)

    @pytest.fixture
    def answers(self, worker: Worker) -> Iterator[None]:
        """A worker that answers each text with its upper case."""
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                found: Any = worker.redis.brpop([queue_list(OWN, 3)], timeout=0.1)
                if found:
                    message = decode_message(json.loads(json.loads(found[1])["body"])[0][0])
                    output = json.dumps([{"label": message.items[0].inputs.upper()}])
                    worker.end(message.id, JobState.SUCCEEDED, reply=message.reply, output=output)

        with ThreadPoolExecutor(1) as threads:
            serving = threads.submit(serve)
            yield
            stop.set()
            serving.result(20)

    @pytest.mark.usefixtures("answers")
    def test_a_live_generator_is_answered_at_once(self, client: Client) -> None:
        seen = threading.Event()

        def live() -> Iterator[str]:
            yield "a"
            assert seen.wait(30)
            yield "b"

        results = pipeline(TEXTS, client=client)(live())
        assert next(results) == {"label": "A"}
        seen.set()
        assert list(results) == [{"label": "B"}]

    @pytest.mark.usefixtures("answers")
    def test_a_data_set_without_iter_is_taken_by_its_length(self, client: Client) -> None:
        class Texts:
            def __len__(self) -> int:
                return 3

            def __getitem__(self, index: int) -> str:
                return "abc"[index]

        assert [one["label"] for one in pipeline(TEXTS, client=client)(Texts())] == ["A", "B", "C"]

    @pytest.mark.usefixtures("answers")
    def test_answers_within_the_timeout_are_answers(self, client: Client) -> None:
        pipe = pipeline(TEXTS, client=client, timeout=30)
        assert pipe("a") == [{"label": "A"}]
        assert pipe(["a", "b"], timeout=20) == [{"label": "A"}, {"label": "B"}]
        assert pipe("a", timeout=None) == [{"label": "A"}]

    @pytest.mark.parametrize("inputs", ["a", ["a", "b"], ("a", "b", "c")])
    @pytest.mark.parametrize("default", [True, False])
    def test_what_does_not_come_in_time_is_cancelled(
        self, client: Client, worker: Worker, inputs: Any, default: bool
    ) -> None:
        pipe = pipeline(TEXTS, client=client, timeout=0.05 if default else None)
        with pytest.raises(ResultTimeoutError, match=r"had no result within 0\.05 s and was cancelled"):
            pipe(inputs) if default else pipe(inputs, timeout=0.05)
        count = len(inputs)
        jobs = [worker.take() for _ in range(count)]
        assert [client.job(one.id).status() for one in jobs] == [JobState.CANCELLED] * count

    def test_a_result_of_a_generator_that_does_not_come_in_time_ends_it(self, client: Client, worker: Worker) -> None:
        results = pipeline(TEXTS, client=client)((text for text in "ab"), timeout=0.05)
        with pytest.raises(ResultTimeoutError):
            next(results)
        assert list(results) == []

    def test_a_bad_input_of_a_list_is_an_error_although_nobody_serves(self, client: Client, worker: Worker) -> None:
        with pytest.raises(InputError):
            pipeline(TEXTS, client=client)(["good", 3])
        assert client.job(worker.take().id).status() is JobState.CANCELLED

    @pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True, "10"])
    def test_a_timeout_is_a_number_of_seconds(self, client: Client, value: Any) -> None:
        with pytest.raises(ParameterError, match="timeout must be a number of seconds"):
            pipeline(TEXTS, client=client, timeout=value)
        with pytest.raises(ParameterError, match="timeout must be a number of seconds"):
            pipeline(TEXTS, client=client)("a", timeout=value)
        assert queue_depth(client.redis, QUEUE)["normal"] == 0

    def test_an_interrupt_cancels_the_job_of_a_call(
        self, client: Client, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("pipefleet.jobs.job.Job.result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pipeline(TEXTS, client=client)("a")
        assert client.job(worker.take().id).status() is JobState.CANCELLED

    def test_a_result_that_comes_as_the_time_is_over_is_the_result(
        self, client: Client, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = client.cancel_job

        def late(job_id: str) -> bool:
            worker.answer("just in time")
            return whole(job_id)

        monkeypatch.setattr(client, "cancel_job", late)
        assert pipeline(TEXTS, client=client)("a", timeout=0.1) == "just in time"

    def test_submit_does_not_wait(self, client: Client) -> None:
        with pytest.raises(ParameterError, match="say timeout to the result"):
            pipeline(TEXTS, client=client).submit("a", timeout=3)


def test_no_task_has_a_parameter_of_this_name() -> None:
    assert [spec.name for spec in TASKS.values() if "timeout" in spec.parameters or "timeout" in spec.fields] == []
