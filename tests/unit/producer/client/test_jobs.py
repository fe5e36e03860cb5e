"""Single jobs from the producer's side; the test plays the worker through the same scripts that a worker uses."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipefleet.client import Client
from pipefleet.connection.connect import subscribed
from pipefleet.connection.scripts import digest
from pipefleet.contract.messages import JobMessage, JobState, decode_message
from pipefleet.contract.records import FINISH, SUBMIT, JobFailure, finish_arguments
from pipefleet.errors import (
    ContractError,
    InputError,
    JobCancelledError,
    JobError,
    JobExpiredError,
    JobFailedError,
    ParameterError,
    PipefleetError,
    ResultTimeoutError,
    UnknownModelError,
)
from pipefleet.fleet.announcements import announce_pool
from pipefleet.fleet.routing import revision_queue
from pipefleet.jobs.job import Job
from pipefleet.pipelines.calls import is_dataset
from pipefleet.pipelines.fleet_pipeline import pipeline
from pipefleet.queues import celery
from pipefleet.queues.keys import CANCELLED_CHANNEL, job_key, queue_list
from pipefleet.queues.looking import queue_depth
from pipefleet.queues.revision_notes import queues_of
from tests.unit.conftest import eventually

TEXTS = "text-classification"
QUEUE = f"pipefleet.{TEXTS}"
OWN = revision_queue(QUEUE, "/models/texts", None)


class Worker:
    """Takes messages off a queue and ends jobs, on connections of its own."""

    def __init__(self, client: Client) -> None:
        self.redis = client.redis

    def take(self, priority: int = 3) -> JobMessage:
        names = [queue_list(queue, priority) for queue in (OWN, *queues_of(self.redis, QUEUE))]
        found: Any = self.redis.brpop(names, timeout=20)
        assert found, "nothing was queued"
        return decode_message(json.loads(json.loads(found[1])["body"])[0][0])

    def end(self, job_id: str, state: JobState, *, reply: str | None = None, **fields: Any) -> bool:
        arguments = finish_arguments(job_id, state, 1.0, ttl=60, reply=reply, fields=fields)
        return bool(self.redis.eval(FINISH, 1, job_key(job_id), *arguments))

    def answer(self, output: Any) -> JobMessage:
        message = self.take()
        self.end(message.id, JobState.SUCCEEDED, reply=message.reply, output=json.dumps(output))
        return message


@pytest.fixture
def worker(client: Client) -> Worker:
    return Worker(client)


class TestSubmit:
    def test_a_job_is_recorded_and_queued_with_all_that_was_asked(self, client: Client, worker: Worker) -> None:
        job = client.submit(TEXTS, "good", parameters={"top_k": 2}, output="s3://pipefleet/out/", expires=60)
        message = worker.take()
        assert (message.id, message.task, message.model) == (job.id, TEXTS, "/models/texts")
        assert (message.items[0].inputs, message.parameters) == ("good", {"top_k": 2})
        assert message.output == "s3://pipefleet/out/"
        record = job.record()
        assert record.submitted is not None
        assert message.deadline == pytest.approx(record.submitted + 60, abs=30)
        assert (job.status(), record.queue) == (JobState.QUEUED, OWN)
        assert client.redis.ttl(job_key(job.id)) > 0  # type: ignore[operator]

    @pytest.mark.parametrize(("priority", "step"), [("high", 0), ("normal", 3), ("low", 9)])
    def test_each_priority_has_its_list(self, client: Client, worker: Worker, priority: str, step: int) -> None:
        job = client.submit(TEXTS, "good", priority=priority)
        assert worker.take(step).id == job.id

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"inputs": 3}, InputError),
            ({"inputs": "a", "parameters": {"custom_generate": "x"}}, ParameterError),
            ({"inputs": "a", "parameters": ["top_k"]}, ParameterError),
            ({"inputs": "a", "model": "org/none"}, UnknownModelError),
            ({"inputs": "a", "output": "/tmp/out"}, InputError),
            ({"inputs": "a", "expires": 0}, InputError),
            ({"inputs": "a", "expires": float("inf")}, PipefleetError),
            ({"inputs": "a", "priority": "urgent"}, ContractError),
        ],
    )
    def test_what_is_refused_is_not_queued(
        self, client: Client, arguments: dict[str, Any], error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            client.submit(TEXTS, arguments.pop("inputs"), **arguments)
        assert client.redis.keys("*") == []

    def test_a_text_of_any_length_fits_a_message(self, client: Client, worker: Worker) -> None:
        text = "long " * 100_000
        client.submit(TEXTS, {"text": text, "text_pair": text})
        fields = worker.take().items[0].inputs
        assert client.store.get(fields["text"]["$ref"]).decode() == text

    def test_one_idempotency_key_is_one_job_however_many_submit_it(self, client: Client, worker: Worker) -> None:
        with ThreadPoolExecutor(8) as threads:
            jobs = list(threads.map(lambda _: client.submit(TEXTS, "good", idempotency_key="k1"), range(8)))
        assert len({job.id for job in jobs}) == 1
        assert queue_depth(client.redis, QUEUE)["normal"] == 1
        worker.answer([1])
        assert [job.result(20) for job in jobs] == [[1]] * 8
        assert client.submit(TEXTS, "good", idempotency_key="k2").id != jobs[0].id

    def test_an_idempotency_key_survives_a_submit_that_failed(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(celery, "MAX_MESSAGE_BYTES", 10)
            with pytest.raises(ContractError):
                client.submit(TEXTS, "good", idempotency_key="k")
        job = client.submit(TEXTS, "good", idempotency_key="k")
        assert queue_depth(client.redis, QUEUE)["normal"] == 1
        assert job.status() is JobState.QUEUED

    @pytest.mark.parametrize("key", [None, "k"])
    def test_a_command_that_is_sent_again_queues_nothing_twice(
        self, client: Client, worker: Worker, monkeypatch: pytest.MonkeyPatch, key: str | None
    ) -> None:
        def lost_answer(*arguments: Any) -> Any:
            first = whole(*arguments)
            worker.end(worker.take().id, JobState.SUCCEEDED, output="1")
            assert whole(*arguments) == first
            return first

        whole = client.redis.evalsha
        with monkeypatch.context() as patch:
            patch.setattr(client.redis, "evalsha", lambda script, *rest: (
                lost_answer(script, *rest) if script == digest(SUBMIT) else whole(script, *rest)
            ))  # fmt: skip
            job = client.submit(TEXTS, "good", idempotency_key=key)
        assert job.status() is JobState.SUCCEEDED
        assert queue_depth(client.redis, QUEUE)["normal"] == 0

    def test_what_has_no_utf8_form_is_refused(self, client: Client) -> None:
        with pytest.raises(ContractError, match="surrogates not allowed"):
            client.submit(TEXTS, "\ud800")
        assert client.redis.keys("*") == []

    def test_a_job_is_found_again_by_its_id(self, client: Client, worker: Worker) -> None:
        job_id = client.submit(TEXTS, "good").id
        worker.answer("found")
        with Client() as another:
            assert another.job(job_id).result(20) == "found"
            with pytest.raises(JobError, match="nothing is known of job none"):
                another.job("none").status()


class TestResult:
    def test_it_arrives_for_a_thread_that_already_waits(self, client: Client, worker: Worker) -> None:
        job = client.submit(TEXTS, "good")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(job.result, 30)
            worker.answer([{"label": "POSITIVE", "score": 0.5}])
            assert waiting.result(30) == [{"label": "POSITIVE", "score": 0.5}]
        assert job.status() is JobState.SUCCEEDED
        assert job.result(30) == [{"label": "POSITIVE", "score": 0.5}]  # a second time

    def test_the_channel_alone_delivers_it(
        self, client: Client, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipefleet.waiting.watcher.SWEEP_SECONDS", 3600.0)
        job = client.submit(TEXTS, "good")
        future = client.watcher.watch(job.id)
        worker.answer("heard")
        assert future.result(20).output == '"heard"'

    def test_a_missed_message_is_found_by_the_sweep(
        self, client: Client, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipefleet.waiting.watcher.SWEEP_SECONDS", 0.1)
        job = client.submit(TEXTS, "good")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(job.result, 30)
            worker.end(worker.take().id, JobState.SUCCEEDED, reply=None, output='"swept"')
            assert waiting.result(30) == "swept"

    def test_a_lost_connection_of_the_watcher_loses_no_result(
        self, client: Client, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipefleet.waiting.watcher.SWEEP_SECONDS", 0.1)
        job = client.submit(TEXTS, "good")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(job.result, 30)
            assert client.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub") >= 1
            worker.answer("still there")
            assert waiting.result(30) == "still there"

    def test_a_timeout_leaves_the_job_to_be_waited_for_again(self, client: Client, worker: Worker) -> None:
        job = client.submit(TEXTS, "good")
        with pytest.raises(ResultTimeoutError, match=rf"job {job.id} has not finished within 0\.01 s; it goes on"):
            job.result(timeout=0.01)
        with pytest.raises(TimeoutError):
            job.result(timeout=0)
        worker.answer("late")
        assert job.result(20) == "late"

    def test_many_jobs_end_in_any_order(self, client: Client, worker: Worker) -> None:
        jobs = [client.submit(TEXTS, f"text {number}") for number in range(60)]
        messages = [worker.take() for _ in jobs]
        for message in reversed(messages):
            output = json.dumps(message.items[0].inputs)
            worker.end(message.id, JobState.SUCCEEDED, reply=message.reply, output=output)
        assert [job.result(20) for job in jobs] == [f"text {number}" for number in range(60)]

    def test_a_result_that_lies_in_the_store_is_read_from_there(
        self, client: Client, worker: Worker, prefix: str
    ) -> None:
        job = client.submit(TEXTS, "good")
        client.store.put(prefix + "one.json", b'["from the store"]')
        message = worker.take()
        reference = json.dumps({"$ref": prefix + "one.json"})
        worker.end(message.id, JobState.SUCCEEDED, reply=message.reply, output_ref=reference)
        assert job.result(20) == ["from the store"]

    def test_a_failure_is_raised_with_code_stage_and_message(self, client: Client, worker: Worker) -> None:
        job = client.submit(TEXTS, "good")
        message = worker.take()
        failure = JobFailure("bad_input", "the picture is truncated", "decode")
        worker.end(message.id, JobState.FAILED, reply=message.reply, error=json.dumps(failure.to_json()))
        with pytest.raises(
            JobFailedError, match=r"the picture is truncated \(code bad_input, stage decode\)"
        ) as caught:
            job.result(20)
        assert (caught.value.failure_code, caught.value.stage) == ("bad_input", "decode")

    def test_a_job_that_expired_says_so(self, client: Client, worker: Worker) -> None:
        job = client.submit(TEXTS, "good", expires=60)
        message = worker.take()
        worker.end(message.id, JobState.EXPIRED, reply=message.reply)
        with pytest.raises(JobExpiredError, match=job.id):
            job.result(20)

    def test_closing_the_client_wakes_those_who_wait(self, environment: dict[str, str]) -> None:
        client = Client()
        job = client.submit(TEXTS, "good")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(job.result, 60)
            assert eventually(lambda: not client.watcher.watch(job.id).done())
            client.close()
            with pytest.raises(JobError, match=r"the client (was|is) closed"):
                waiting.result(30)


class TestCancel:
    def test_a_queued_job_is_ended_and_its_waiter_told(self, client: Client) -> None:
        job = client.submit(TEXTS, "good")
        with subscribed(client.redis, CANCELLED_CHANNEL) as channel:
            assert channel.get_message(timeout=10)["type"] == "subscribe"
            assert job.cancel() is True
            assert channel.get_message(timeout=10)["data"] == job.id.encode()  # what a worker hears
        with pytest.raises(JobCancelledError, match=job.id):
            job.result(20)
        assert job.status() is JobState.CANCELLED

    def test_a_job_that_ended_is_not_cancelled_any_more(self, client: Client, worker: Worker) -> None:
        job = client.submit(TEXTS, "good")
        worker.answer("done")
        assert job.cancel() is False
        assert job.result(20) == "done"

    def test_a_job_that_nothing_is_known_of_is_not_ended_by_cancelling_it(self, client: Client) -> None:
        assert client.job("none").cancel() is False
        assert client.redis.keys("*") == []

    def test_a_worker_cannot_finish_a_cancelled_job(self, client: Client, worker: Worker) -> None:
        job = client.submit(TEXTS, "good")
        message = worker.take()
        assert job.cancel()
        assert not worker.end(message.id, JobState.SUCCEEDED, reply=message.reply, output="1")
        with pytest.raises(JobCancelledError):
            job.result(20)


class TestAwait:
    def test_jobs_are_awaited_side_by_side(self, client: Client, worker: Worker) -> None:
        jobs = [client.submit(TEXTS, f"text {number}") for number in range(5)]
        answering = threading.Thread(target=lambda: [worker.answer(number) for number in range(5)])
        answering.start()

        async def gather() -> list[Any]:
            return await asyncio.wait_for(asyncio.gather(*(_of(job) for job in jobs)), 30)

        assert asyncio.run(gather()) == list(range(5))
        answering.join(20)

    def test_giving_up_on_an_await_does_not_end_the_job(self, client: Client, worker: Worker) -> None:
        job = client.submit(TEXTS, "good")

        async def impatient() -> Any:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(_of(job), 0.05)
            worker.answer("later")
            return await asyncio.wait_for(_of(job), 30)

        assert asyncio.run(impatient()) == "later"

    def test_an_awaited_failure_is_raised(self, client: Client) -> None:
        job = client.submit(TEXTS, "good")
        job.cancel()

        async def fail() -> None:
            await asyncio.wait_for(_of(job), 30)

        with pytest.raises(JobCancelledError):
            asyncio.run(fail())


async def _of(job: Job) -> Any:
    return await job


class TestPipeline:
    @pytest.fixture
    def answers(self, client: Client, worker: Worker) -> Any:
        """A worker that answers each text with its upper case, in pairs and the second of a pair first."""
        stop = threading.Event()

        def serve() -> None:
            held: list[JobMessage] = []
            while not stop.is_set():
                found: Any = worker.redis.brpop([queue_list(OWN, 3)], timeout=0.1)
                if found:
                    held.append(decode_message(json.loads(json.loads(found[1])["body"])[0][0]))
                if len(held) == 2 or not found:
                    for message in reversed(held):
                        output = json.dumps([{"label": message.items[0].inputs.upper()}])
                        worker.end(message.id, JobState.SUCCEEDED, reply=message.reply, output=output)
                    held.clear()

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        stop.set()
        thread.join(20)

    @pytest.mark.usefixtures("answers")
    def test_one_gives_one_a_list_a_list_and_a_generator_a_lazy_one(self, client: Client) -> None:
        pipe = pipeline("sentiment-analysis", client=client, device=0, dtype="auto")
        assert pipe.task == TEXTS
        assert pipe("a", batch_size=8) == [{"label": "A"}]
        assert pipe(["a", "b"]) == [{"label": "A"}, {"label": "B"}]
        assert pipe(["a", "b"], top_k=None) == [[{"label": "A"}], [{"label": "B"}]]
        assert list(pipe(letter for letter in "abcde")) == [{"label": letter} for letter in "ABCDE"]

    @pytest.mark.usefixtures("answers")
    def test_a_generator_is_read_only_so_far_ahead(
        self, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIPEFLEET_IN_FLIGHT", "4")
        read: list[int] = []

        def texts() -> Any:
            for number in range(100):
                read.append(number)
                yield f"text {number}"

        with Client() as client:
            outputs = pipeline(TEXTS, client=client)(texts())
            assert next(outputs) == {"label": "TEXT 0"}
            assert next(outputs) == {"label": "TEXT 1"}
            assert len(read) <= 6
            outputs.close()

    def test_what_is_left_of_a_generator_is_cancelled(self, client: Client, worker: Worker) -> None:
        outputs = pipeline(TEXTS, client=client)(text for text in ["a", "b", "c"])
        first = threading.Thread(target=lambda: worker.answer([1]))
        first.start()
        assert next(outputs) == 1
        first.join(20)
        assert eventually(lambda: queue_depth(client.redis, QUEUE)["normal"] == 2)
        outputs.close()
        left = [worker.take().id for _ in range(2)]
        assert [client.job(job_id).status() for job_id in left] == [JobState.CANCELLED] * 2

    def test_unknown_arguments_and_models_are_refused_at_once(self, client: Client) -> None:
        with pytest.raises(ParameterError, match=r"takes no parameter 'topk' \(did you mean 'top_k'"):
            pipeline(TEXTS, client=client, topk=1)
        with pytest.raises(UnknownModelError, match="served are: text-classification: /models/texts"):
            pipeline(TEXTS, model="org/none", client=client)
        with pytest.raises(ParameterError, match="idempotency_key is an argument of Client"):
            pipeline(TEXTS, client=client).submit("a", idempotency_key="x")


def test_a_client_can_be_closed_twice_and_unused(environment: dict[str, str]) -> None:
    client = Client()
    client.close()
    client.close()


def test_a_fleet_without_a_file_is_what_workers_announce(
    client: Client, monkeypatch: pytest.MonkeyPatch, worker: Worker
) -> None:
    monkeypatch.delenv("PIPEFLEET_FLEET")
    pool = {"task": TEXTS, "model": "org/a", "revision": "1", "default": False}
    announce_pool(client.redis, "texts", {**pool, "queue": QUEUE}, seconds=60)
    announce_pool(client.redis, "gone", {**pool, "model": "org/gone"}, seconds=-1)
    with Client() as unaware:
        assert list(unaware.fleet.pools) == ["texts"]
        unaware.submit(TEXTS, "good", model="org/a")
        assert worker.take().model == "org/a"


def test_a_worker_that_comes_later_is_found(client: Client, monkeypatch: pytest.MonkeyPatch, worker: Worker) -> None:
    monkeypatch.delenv("PIPEFLEET_FLEET")
    with Client() as unaware:
        with pytest.raises(UnknownModelError, match="is a worker running"):
            unaware.submit(TEXTS, "good")
        pool = {"task": TEXTS, "model": "org/a", "revision": "1", "default": False, "queue": QUEUE, "later": 1}
        announce_pool(client.redis, "texts", pool, seconds=60)
        unaware.submit(TEXTS, "good")
        assert worker.take().model == "org/a"
        announce_pool(client.redis, "texts", {**pool, "model": "org/b"}, seconds=60)
        monkeypatch.setattr(unaware, "_announced_until", 0.0)  # what was announced is taken for five seconds
        unaware.submit(TEXTS, "good")
        assert worker.take().model == "org/b"


@pytest.mark.parametrize("value", [b"x", bytearray(b"x"), memoryview(b"x")])
def test_bytes_of_any_kind_are_one_input(client: Client, value: Any) -> None:
    pictures = pipeline("image-classification", client=client)
    with pytest.raises(ResultTimeoutError):
        pictures.submit(value).result(0)
    assert not is_dataset(value)
