"""The clock of the fleet: the server's, whatever the local ones say."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as AwayError

from pipefleet.client import Client
from pipefleet.connection.clock import REFRESH_SECONDS, TRIES, ServerClock
from pipefleet.contract.messages import JobMessage, JobState
from pipefleet.contract.records import read_record
from pipefleet.fleet.pools import Pool
from pipefleet.queues.keys import queue_list
from pipefleet_workers.consume.jobs import Jobs
from tests.unit.producer.client.test_jobs import TEXTS, Worker

HOUR = 3600.0


class Server:
    """A Redis server as far as its clock goes: `skew` seconds ahead of `monotonic`, each answer `delay` seconds on its way."""

    def __init__(self, *, skew: float = 1e9, delays: tuple[float, ...] = (0.001,)) -> None:
        self.local = 50.0
        self.skew = skew
        self.away = False
        self.asked = 0
        self._delays = delays

    def monotonic(self) -> float:
        return self.local

    def time(self) -> tuple[int, int]:
        if self.away:
            raise AwayError("away")
        delay = self._delays[min(self.asked, len(self._delays) - 1)]
        self.asked += 1
        self.local += delay / 2
        now = self.local + self.skew
        self.local += delay / 2
        return int(now), round(now % 1 * 1e6)

    def clock(self) -> ServerClock:
        return ServerClock(self, monotonic=self.monotonic)  # type: ignore[arg-type]

    @property
    def now(self) -> float:
        return self.local + self.skew


def test_it_tells_the_servers_time_and_asks_once_in_a_while() -> None:
    server = Server()
    clock = server.clock()
    for _ in range(100):
        assert clock.now() == pytest.approx(server.now, abs=1e-4)
        server.local += REFRESH_SECONDS / 200
    assert server.asked == 1
    server.local += REFRESH_SECONDS
    clock.now()
    assert server.asked == 2


def test_a_server_whose_clock_is_set_is_followed_within_the_refresh() -> None:
    server = Server()
    clock = server.clock()
    clock.now()
    server.skew += 100
    server.local += REFRESH_SECONDS
    assert clock.now() == pytest.approx(server.now, abs=1e-4)


def test_of_slow_answers_the_fastest_counts() -> None:
    server = Server(delays=(4.0, 0.5, 2.0))
    assert server.clock().now() == pytest.approx(server.now, abs=0.25)
    assert server.asked == TRIES


def test_an_outage_changes_nothing_and_is_not_waited_for_again_and_again() -> None:
    server = Server()
    clock = server.clock()
    clock.now()
    server.away = True
    server.local += REFRESH_SECONDS
    assert clock.now() == pytest.approx(server.now, abs=1e-4)
    server.away, asked = False, server.asked
    clock.now()
    assert server.asked == asked
    server.local += REFRESH_SECONDS
    clock.now()
    assert server.asked == asked + 1


def test_a_server_that_was_never_there_is_an_error() -> None:
    server = Server()
    server.away = True
    with pytest.raises(AwayError):
        server.clock().now()


def test_many_threads_measure_once() -> None:
    server = Server()
    clock = server.clock()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: clock.now(), range(64)))
    assert server.asked == 1


def test_it_agrees_with_a_real_server(redis: Redis) -> None:
    before, now, after = (_server_time(redis), ServerClock(redis).now(), _server_time(redis))
    assert before - 5 <= now <= after + 5


def _server_time(redis: Redis) -> float:
    seconds, micros = redis.time()  # type: ignore[misc]
    return float(seconds) + micros / 1e6


@pytest.mark.parametrize("hours", [-1, 1])
class TestAnHourOff:
    """What a process does whose own clock is an hour early or late."""

    @pytest.fixture(autouse=True)
    def wrong(self, client: Client, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
        right = time.time
        monkeypatch.setattr(time, "time", lambda: right() + hours * HOUR)

    def test_a_client_tells_deadline_and_times_by_the_server(self, client: Client) -> None:
        worker = Worker(client)
        job = client.submit(TEXTS, "a", expires=60)
        now = _server_time(client.redis)
        message = worker.take()
        assert message.deadline == pytest.approx(now + 60, abs=30)
        assert job.record().submitted == pytest.approx(now, abs=30)
        job.cancel()
        assert job.record().finished == pytest.approx(now, abs=30)

    def test_a_message_and_a_run_are_dated_by_the_server(self, client: Client, prefix: str) -> None:
        run = client.map(TEXTS, ["a"], output=prefix)
        assert run.plan.created == pytest.approx(_server_time(client.redis), abs=30)
        assert 0 <= run.progress().seconds < 60
        (raw,) = client.redis.lrange(queue_list(run.plan.queue, 9), 0, -1)  # type: ignore[misc]
        import json

        at = json.loads(raw)["headers"]["pipefleet-at"]
        assert at == pytest.approx(_server_time(client.redis), abs=30)

    def test_a_worker_records_and_judges_by_the_server(self, client: Client) -> None:
        from pipefleet.settings import load_settings
        from pipefleet_workers.items import Outcome, Work
        from pipefleet_workers.results.reports import Reporter
        from pipefleet_workers.storage.store import WorkerStore

        reporter = Reporter(client.redis, WorkerStore(), load_settings(), worker="w")
        job = client.submit(TEXTS, "a", expires=60)
        message = Worker(client).take()
        jobs = Jobs(Pool("texts", TEXTS, "m"), None, clock=ServerClock(client.redis).now)  # type: ignore[arg-type]
        context = jobs.begin(message, None, priority=3, patient=True)  # type: ignore[arg-type]
        assert context.stopped("fetch") is None
        reporter.start_many([message])
        outcome = Outcome(Work(context, 0, message.items[0], {}, 1), output=[1])
        reporter.finish_many([(message, outcome)])
        record = job.record()
        assert record.state is JobState.SUCCEEDED
        assert record.submitted is not None
        assert record.started is not None
        assert record.finished is not None
        assert record.submitted <= record.started <= record.finished
        assert record.finished == pytest.approx(_server_time(client.redis), abs=30)


def test_a_deadline_that_has_passed_by_the_server_stops_a_job() -> None:
    jobs = Jobs(Pool("texts", TEXTS, "m"), None, clock=lambda: 1000.0)  # type: ignore[arg-type]
    for deadline, code in ((999.0, "expired"), (1000.0 + HOUR, None), (None, None)):
        message = JobMessage("j", TEXTS, deadline=deadline)
        stopped = jobs.begin(message, None, priority=3, patient=True).stopped("fetch")  # type: ignore[arg-type]
        assert (stopped.code if stopped else None) == code


def test_a_record_that_is_given_a_time_keeps_it(client: Client) -> None:
    worker = Worker(client)
    job = client.submit(TEXTS, "a")
    worker.end(job.id, JobState.SUCCEEDED, output="1")
    record = read_record(client.redis.hgetall(f"pipefleet:job:{job.id}"))  # type: ignore[arg-type]
    assert record is not None
    assert record.finished == 1.0
