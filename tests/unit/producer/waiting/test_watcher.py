"""Waiting for jobs: nobody waits for what cannot come, and a long-lived client keeps nothing that nobody asks for."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipefleet.client import Client
from pipefleet.connection.connect import subscribed
from pipefleet.contract.messages import JobState
from pipefleet.contract.records import FINISH, HEARS, MOST_TOLD, JobFailure, finish_arguments
from pipefleet.errors import (
    ContractError,
    InputError,
    JobError,
    JobFailedError,
    ResultTimeoutError,
    ServiceUnavailableError,
)
from pipefleet.jobs.job import Job
from pipefleet.queues.keys import job_key
from tests.unit.conftest import eventually

TEXTS = "text-classification"


def end(client: Client, job_id: str, state: JobState, **fields: str) -> None:
    """End a job silently: the watcher has to find out by itself."""
    arguments = finish_arguments(job_id, state, 1.0, ttl=60, reply=None, fields=fields)
    assert client.redis.eval(FINISH, 1, job_key(job_id), *arguments)


async def _of(job: Job) -> Any:
    return await job


class TestUnknown:
    def test_a_job_that_nothing_is_known_of_until_the_timeout_is_no_timeout(self, client: Client) -> None:
        with pytest.raises(JobError, match="nothing is known of job none") as caught:
            client.job("none").result(0.2)
        assert not isinstance(caught.value, ResultTimeoutError)

    def test_without_a_timeout_it_is_given_up_after_a_while(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipefleet.waiting.watcher.SWEEP_SECONDS", 0.05)
        monkeypatch.setattr("pipefleet.waiting.watcher.UNKNOWN_SECONDS", 0.2)
        with ThreadPoolExecutor(1) as threads, pytest.raises(JobError, match="nothing is known of job none"):
            threads.submit(client.job("none").result).result(20)

    def test_so_is_one_whose_record_was_lost(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipefleet.waiting.watcher.SWEEP_SECONDS", 0.05)
        monkeypatch.setattr("pipefleet.waiting.watcher.UNKNOWN_SECONDS", 0.2)
        job = client.submit(TEXTS, "x")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(job.result)
            client.redis.flushall()
            with pytest.raises(JobError, match="nothing is known of job"):
                waiting.result(20)

    def test_a_job_that_another_celery_client_queued_may_get_its_record_later(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipefleet.waiting.watcher.SWEEP_SECONDS", 0.05)
        job = client.job("from-celery")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(job.result, 20)
            assert eventually(lambda: job._future is not None and job._future.unknown_since is not None)
            end(client, job.id, JobState.SUCCEEDED, output='"late"')
            assert waiting.result(20) == "late"


class TestMemory:
    @pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
    def test_a_job_whose_result_was_read_is_forgotten(self, client: Client, state: JobState) -> None:
        job = client.submit(TEXTS, "x")
        end(client, job.id, state, output="1", error=json.dumps(JobFailure("a", "b", "c").to_json()))
        if state is JobState.FAILED:
            with pytest.raises(JobFailedError):
                job.result(20)
        else:
            assert job.result(20) == 1
        assert not client.watcher._futures
        assert job._future is None

    def test_results_that_nobody_reads_are_not_kept(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipefleet.waiting.watcher.SWEEP_SECONDS", 0.1)
        jobs = [client.submit(TEXTS, "x") for _ in range(50)]
        assert len(client.watcher._futures) == 50
        for job in jobs:
            end(client, job.id, JobState.SUCCEEDED, output="1" * 1000)
        del jobs, job
        assert eventually(lambda: not client.watcher._futures)


class TestClosed:
    def test_a_job_that_ended_unread_is_not_waited_for(self, environment: dict[str, str]) -> None:
        with Client() as client:
            job_id = client.submit(TEXTS, "x").id
        with pytest.raises(JobError, match="the client is closed"):
            client.job(job_id).result(20)
        with pytest.raises(JobError, match="the client is closed"):
            client.submit(TEXTS, "x")

    def test_who_awaits_gets_an_error_of_ours(self, environment: dict[str, str]) -> None:
        async def close_meanwhile(client: Client, job: Job) -> None:
            waiting = asyncio.ensure_future(_of(job))
            while job._future is None or not job._future._done_callbacks:  # type: ignore[attr-defined]
                await asyncio.sleep(0.01)
            await asyncio.to_thread(client.close)
            with pytest.raises(JobError, match="the client was closed while job"):
                await asyncio.wait_for(waiting, 20)

        client = Client()
        asyncio.run(close_meanwhile(client, client.submit(TEXTS, "x")))


def test_awaiting_does_no_redis_work_on_the_event_loop(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    job, threads = client.job(client.submit(TEXTS, "x").id), _look_ups(client, monkeypatch)

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_of(job), 0.2)

    asyncio.run(impatient())
    assert threads
    assert threading.main_thread() not in threads


class TestNotices:
    """The notice of a job's end brings its record; nothing is looked up, and `await` takes no thread."""

    @pytest.fixture
    def unswept(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
        """The threads that look up records; no sweep helps."""
        monkeypatch.setattr(client.watcher, "_sweep", lambda: None)
        return _look_ups(client, monkeypatch)

    def told(self, client: Client, state: JobState, job: Job, **fields: str | bytes) -> None:
        arguments = finish_arguments(job.id, state, None, ttl=60, reply=client.watcher.channel, fields=fields)
        assert client.redis.eval(FINISH, 1, job_key(job.id), *arguments)

    def test_a_result_needs_no_look_up(self, client: Client, unswept: list[threading.Thread]) -> None:
        job = client.submit(TEXTS, "x")
        self.told(client, JobState.SUCCEEDED, job, output='["ä/\\n"]', warnings='["w"]')
        assert job.result(20) == ["ä/\n"]
        assert job.warnings == ["w"]
        assert not unswept

    def test_a_failure_needs_none(self, client: Client, unswept: list[threading.Thread]) -> None:
        job = client.submit(TEXTS, "x")
        self.told(client, JobState.FAILED, job, error=json.dumps(JobFailure("bad_input", "no", "decode").to_json()))
        with pytest.raises(JobFailedError, match="no"):
            job.result(20)
        assert not unswept

    def test_an_await_takes_no_thread(
        self, client: Client, unswept: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(asyncio, "to_thread", None)

        async def both() -> Any:
            job = client.submit(TEXTS, "x")
            waiting = asyncio.ensure_future(_of(job))
            await asyncio.sleep(0)
            self.told(client, JobState.SUCCEEDED, job, output="1")
            return await asyncio.wait_for(waiting, 20)

        assert asyncio.run(both()) == 1
        assert not unswept

    @pytest.mark.parametrize(
        "notice",
        [
            "{}",
            "{}\n",
            "{}\n[1",
            '{}\n["state"]',
            '{}\n["state", "running"]',
            "{}\n{{}}",
            '{}\n["state", "succeeded", "output", 5]',
        ],
    )
    def test_a_notice_without_a_readable_end_is_looked_up(
        self, client: Client, unswept: list[threading.Thread], notice: str
    ) -> None:
        job = client.submit(TEXTS, "x")
        end(client, job.id, JobState.SUCCEEDED, output="1")
        client.redis.publish(client.watcher.channel, notice.format(job.id))
        assert job.result(20) == 1
        assert unswept

    def test_a_long_record_does_not_go_with_its_notice(self, client: Client, unswept: list[threading.Thread]) -> None:
        job = client.submit(TEXTS, "x")
        self.told(client, JobState.SUCCEEDED, job, output=json.dumps("x" * MOST_TOLD))
        assert len(job.result(20)) == MOST_TOLD
        assert unswept

    def test_a_result_that_is_no_utf_8_is_told_as_unreadable_and_not_mended(self, client: Client, unswept: Any) -> None:
        job = client.submit(TEXTS, "x")
        self.told(client, JobState.SUCCEEDED, job, output=b'"\xff"')
        with pytest.raises(ContractError, match="the record of this job cannot be read"):
            job.result(20)

    def test_a_client_of_an_earlier_release_gets_the_id_alone(self, client: Client) -> None:
        job, heard = client.submit(TEXTS, "x"), []
        client.redis.hdel(job_key(job.id), HEARS)  # such a client wrote no such field
        with subscribed(client.redis, client.watcher.channel) as channel:
            assert channel.get_message(timeout=20)["type"] == "subscribe"
            self.told(client, JobState.SUCCEEDED, job, output="1")
            heard.append(channel.get_message(timeout=20)["data"])
        assert heard == [job.id.encode()]
        assert job.result(20) == 1

    def test_who_leaves_soon_looks(self, client: Client, unswept: list[threading.Thread]) -> None:
        job = client.submit(TEXTS, "x")
        end(client, job.id, JobState.SUCCEEDED, output="1")
        assert job.result(0) == 1
        assert unswept

    def test_a_watcher_that_was_stopped_begins_again(self, client: Client) -> None:
        job = client.submit(TEXTS, "x")
        assert client.watcher.stop(20)
        end(client, job.id, JobState.SUCCEEDED, output="1")
        assert job.result() == 1

    def test_the_future_of_another_process_is_not_waited_for(self, client: Client) -> None:
        job = client.submit(TEXTS, "x")
        ours = client.watcher._service._stopping
        client.watcher.after_fork()  # as in the child: the parent's channel is not heard here
        client.watcher._service.after_fork()
        end(client, job.id, JobState.SUCCEEDED, output="1")
        assert job.result() == 1
        ours.set()


def _look_ups(client: Client, monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads that look up records from now on."""
    threads: list[threading.Thread] = []
    whole = client.watcher._look_up

    def look_up(ids: list[str]) -> None:
        threads.append(threading.current_thread())
        whole(ids)

    monkeypatch.setattr(client.watcher, "_look_up", look_up)
    return threads


def test_a_record_that_cannot_be_read_fails_its_own_job_alone(client: Client) -> None:
    odd, good = client.submit(TEXTS, "x"), client.submit(TEXTS, "y")
    client.redis.hset(job_key(odd.id), mapping={"state": "from-the-future"})
    client.redis.publish(client.watcher.channel, odd.id)
    with pytest.raises(ContractError, match="cannot be read"):
        odd.result(20)
    with pytest.raises(ContractError, match="same release"):
        odd.status()
    end(client, good.id, JobState.SUCCEEDED, output="1")
    assert good._future is not None
    assert good._future.result(20).output == "1"  # the thread still listens and sweeps


def test_what_is_no_text_on_the_clients_channel_and_errors_end_no_waiting(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipefleet.waiting.watcher.SWEEP_SECONDS", 0.05)
    whole, failed = client.watcher._sweep, threading.Event()

    def sweep() -> None:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("a bug")
        whole()

    monkeypatch.setattr(client.watcher, "_sweep", sweep)
    job = client.submit(TEXTS, "x")
    client.redis.publish(client.watcher.channel, b"\xff")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(job.result, 20)
        assert failed.wait(20)
        end(client, job.id, JobState.SUCCEEDED, output='"heard"')
        assert waiting.result(20) == "heard"


def test_what_redis_does_not_tell_of_one_job_is_not_the_others_affair(client: Client) -> None:
    odd, good = client.submit(TEXTS, "x"), client.submit(TEXTS, "y")
    client.redis.set(job_key(odd.id), "no hash")
    client.redis.publish(client.watcher.channel, b"\xff\xfe")
    with pytest.raises(ServiceUnavailableError):
        odd.result(20)
    end(client, good.id, JobState.SUCCEEDED, output="1")
    assert good._future is not None
    assert good._future.result(20).output == "1"  # the thread still listens and sweeps


@pytest.mark.parametrize("wrong", [{"expires": float("nan")}, {"expires": "5"}, {"idempotency_key": 5}])
def test_a_wrong_argument_of_submit_is_refused_with_a_sentence(client: Client, wrong: Any) -> None:
    with pytest.raises(InputError, match="must be"):
        client.submit("text-classification", "x", **wrong)
