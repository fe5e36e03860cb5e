"""A client whose Redis goes away for a moment: whoever waits goes on waiting, says for what, and never beyond a time-out."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pipefleet
from pipefleet import patience
from pipefleet.client import Client
from pipefleet.contract.messages import JobState
from pipefleet.contract.records import FINISH, finish_arguments
from pipefleet.errors import ResultTimeoutError, ServiceUnavailableError
from pipefleet.patience import Patience, within
from pipefleet.queues.keys import KEY
from pipefleet.runs import wait as waiter
from pipefleet.settings import load_settings
from tests.servers import Server, until, valkey
from tests.unit.shard_worker import ShardWorker

TASK = "text-classification"
AWAY = ServiceUnavailableError("away")


@pytest.fixture
def server(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A Redis that keeps its data; the settings name it."""
    one = Server(valkey(), tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    monkeypatch.setenv("PIPEFLEET_REDIS_URL", one.url)
    monkeypatch.setenv("PIPEFLEET_REDIS_TIMEOUT", "2")
    yield one
    one.kill()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(load_settings()) as one:
        yield one


def restart(server: Server) -> None:
    """The same server again, at its port."""
    server._command += ["--port", str(server.port)] if "--port" not in server._command else []
    server.start()


def test_a_wait_for_a_run_lasts_through_an_outage_and_says_so(
    client: Client, server: Server, prefix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = client.map(TASK, ["a", "b"], output=f"{prefix}run/", shard_size=1)
    run.join_planner()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(run.wait, progress=True, timeout=60)
        until(lambda: "running" in capfd.readouterr().err)
        server.kill()
        until(lambda: "waiting for a service: cannot reach Redis" in capfd.readouterr().err)
        restart(server)
        worker = ShardWorker(client, run.plan.queue)
        until(lambda: _takes_writes(client))
        for text in worker.take().values():
            worker.do(text)
        assert waiting.result(60).state == "succeeded"
    assert [row["id"] for row in run.results()] == ["0", "1"]


def _takes_writes(client: Client) -> bool:
    try:
        client.ping()
    except ServiceUnavailableError:
        return False
    return True


def test_planning_and_results_go_on_after_an_outage(client: Client, server: Server, prefix: str) -> None:
    away, back = threading.Event(), threading.Event()

    def source() -> Iterator[str]:
        yield "first"
        yield "second"
        away.set()
        assert back.wait(60)
        yield "third"

    run = client.map(TASK, source(), output=f"{prefix}run/", shard_size=1)
    assert away.wait(20)
    server.kill()
    with ThreadPoolExecutor(1) as threads:
        rows = threads.submit(lambda: [row["id"] for row in run.results()])
        back.set()
        until(lambda: run.planning)
        restart(server)
        run.join_planner()
        worker = ShardWorker(client, run.plan.queue)
        for text in worker.take().values():
            worker.do(text)
        assert rows.result(60) == ["0", "1", "2"]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_time_out_holds_while_redis_is_away(client: Client, server: Server, prefix: str, frozen: bool) -> None:
    run = client.map(TASK, ["a"], output=f"{prefix}run/")
    run.join_planner()
    job = client.submit(TASK, "x")
    os.kill(server._process.pid, signal.SIGSTOP if frozen else signal.SIGKILL)
    try:
        for wait in (lambda: run.wait(timeout=0.5), lambda: job.result(timeout=0.5)):
            begin = time.monotonic()
            with pytest.raises(ResultTimeoutError):
                wait()
            assert time.monotonic() - begin < 10
    finally:
        os.kill(server._process.pid, signal.SIGCONT)


def test_a_job_is_not_called_unknown_by_a_look_before_it_was_queued(
    client: Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep asks for all jobs under way, also for one that is just being queued; its answer may come afterwards."""
    asked, queued = threading.Event(), threading.Event()
    note, take = client._note_revision, client.watcher._take

    def late(*answer: Any) -> None:
        asked.set()
        assert queued.wait(30)
        take(*answer)

    def sweep_first(*job: Any) -> None:
        sweeps.start()
        assert asked.wait(30)
        note(*job)

    sweeps = threading.Thread(target=client.watcher._sweep)
    monkeypatch.setattr(client.watcher, "_take", late)
    monkeypatch.setattr(client, "_note_revision", sweep_first)
    job = client.submit(TASK, "x")
    os.kill(server._process.pid, signal.SIGKILL)
    queued.set()
    sweeps.join(30)
    with pytest.raises(ResultTimeoutError):
        job.result(timeout=0.1)


def test_a_look_at_a_frozen_redis_fails_after_the_time_of_one_answer(
    client: Client, server: Server, prefix: str
) -> None:
    run = client.map(TASK, ["a"], output=f"{prefix}run/")
    run.join_planner()
    os.kill(server._process.pid, signal.SIGSTOP)
    try:
        with Client(load_settings()) as fresh:
            for look in (run.progress, fresh.ping, fresh.job("x").status):
                begin = time.monotonic()
                with pytest.raises(ServiceUnavailableError):
                    look()
                assert time.monotonic() - begin < 8, "retries inside of retries, each of two seconds"
    finally:
        os.kill(server._process.pid, signal.SIGCONT)


def test_a_look_that_does_not_wait_fails_at_once(client: Client, server: Server, prefix: str) -> None:
    run = client.map(TASK, ["a"], output=f"{prefix}run/")
    run.join_planner()
    server.kill()
    for look in (run.progress, client.ping, client.job("x").status):
        with pytest.raises(ServiceUnavailableError):
            look()
    restart(server)


def test_a_stream_of_inputs_lasts_through_an_outage(client: Client, server: Server) -> None:
    submitted, back = threading.Event(), threading.Event()

    def inputs() -> Iterator[str]:
        yield "first"
        submitted.set()
        assert back.wait(60)
        yield "second"

    pipe = pipefleet.pipeline(TASK, client=client)
    with ThreadPoolExecutor(1) as threads:
        results = threads.submit(list, pipe(inputs()))
        assert submitted.wait(20)
        server.kill()
        back.set()
        restart(server)
        ended = 0

        def end_all() -> bool:
            nonlocal ended
            for name in client.redis.scan_iter(f"{KEY}job:*"):
                job_id = name.decode().rpartition(":")[2]
                fields = {"output": '[{"label": "x", "score": 1}]'}
                arguments = finish_arguments(job_id, JobState.SUCCEEDED, None, ttl=60, reply=None, fields=fields)
                ended += int(client.redis.eval(FINISH, 1, name, *arguments))
            return ended >= 2

        until(lambda: _takes_writes(client))
        until(end_all)
        assert len(results.result(60)) == 2


def test_a_wait_gives_up_after_its_patience(
    client: Client, server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiter, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr("pipefleet.waiting.watcher.PATIENCE_SECONDS", 0.2)
    run = client.map(TASK, ["a"], output=f"{prefix}run/")
    run.join_planner()
    job = client.submit(TASK, "x")
    server.kill()
    with pytest.raises(ServiceUnavailableError):
        run.wait()
    with pytest.raises(ServiceUnavailableError):
        job.result()
    restart(server)


def test_a_call_that_is_not_over_in_time_is_left_alone() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.05, lambda: never.wait(60))
    never.set()
    assert within(20.0, lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        within(20.0, lambda: 1 // 0)


def test_a_reader_goes_on_behind_what_it_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "pause", lambda attempt, longest=0.0: 0.0)
    opened: list[int] = []

    def items(read: int) -> Iterator[Any]:
        opened.append(read)
        for number in range(read, 5):
            if number == 3 and len(opened) < 3:
                raise AWAY
            yield number

    assert list(Patience(seconds=60.0).each(items)) == [0, 1, 2, 3, 4]
    assert opened == [0, 3, 3]


def test_ctrl_c_ends_the_patience_at_once() -> None:
    def away() -> None:
        raise AWAY

    def told(error: Exception) -> None:
        signal.raise_signal(signal.SIGINT)

    begin = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            Patience(seconds=60.0, told=told).call(away)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 20
