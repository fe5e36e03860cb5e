"""What the consumer's tests put around it: deliveries, a Reporter, an engine and a clock that do as they are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipefleet.contract.messages import JobItem, JobMessage, JobState, Shard
from pipefleet.contract.records import JobFailure
from pipefleet.errors import AccessDeniedError, ServiceUnavailableError
from pipefleet.fleet.pools import Pool
from pipefleet_workers.consume.consumer import Consumer
from pipefleet_workers.consume.health import Health
from pipefleet_workers.consume.jobs import Jobs
from pipefleet_workers.consume.places import Places
from pipefleet_workers.consume.tally import Tally
from pipefleet_workers.consume.tries import IntakeLimits
from pipefleet_workers.delivery.leases import Lease, Settlement
from pipefleet_workers.ending import Ending, before, single_ending
from pipefleet_workers.items import Outcome, Work
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.observe.totals import WorkCount
from tests.unit.conftest import eventually

TASK = "text-classification"
AWAY = ServiceUnavailableError("away")
BARRED = AccessDeniedError("S3 refuses access (InvalidAccessKeyId)")


def single(job_id: str = "job", **fields: Any) -> JobMessage:
    return JobMessage(job_id, TASK, items=(JobItem("0", "text"),), **fields)


def shard(job_id: str = "run-0", *, count: int = 2) -> JobMessage:
    return JobMessage(job_id, TASK, shard=Shard("run", "s3://bucket/run/", "s3://bucket/run/0.jsonl", 0, 0, count))


class FakeDelivery:
    """A message in the worker's hands; `ends` is how it left them, and `counts` what Redis has as its deliveries."""

    def __init__(self, message: JobMessage | Any, *, deliveries: int = 1, name: str | None = None) -> None:
        self.payload = message.to_json() if isinstance(message, JobMessage) else message
        self.id = name or (message.id if isinstance(message, JobMessage) else "unreadable")
        self.priority, self.deliveries, self.retries = 3, deliveries, 0
        self.revoked = False
        self.deadline: float | None = None
        self.lease = Lease(self.id.encode(), "owner", "queue", "list", deliveries, 0, 1, self)
        self.begun = 0.0
        self.starts = 0
        self.settlements: list[Settlement] = []
        self.ends: list[str] = []
        self.endings: list[Ending] = []
        self.ended = threading.Event()

    @property
    def lost(self) -> bool:
        return self.lease.lost

    def settle(self, lease: Lease, settlement: Settlement) -> None:
        """As the holder of its lease; nothing is written."""
        self.settlements.append(settlement)

    def due_now(self, lease: Lease) -> None:
        """As the holder of its lease."""

    def started(self, *, quick: bool = False) -> None:
        self.starts += 1

    def done(self, ending: Ending) -> None:
        self.endings.append(ending)
        self._end("done")

    def give_back(self, delay: float = 0.0) -> None:
        self._end("given back, counted" if delay else "given back")

    def refuse(self, reason: str) -> None:
        self._end(f"refused: {reason}")

    def _end(self, how: str) -> None:
        self.ends.append(how)
        self.ended.set()

    def wait(self) -> str:
        """How it ended."""
        assert self.ended.wait(20), f"{self.id} does not end"
        return self.ends[0]


class FakeReporter:
    """Records in a dictionary. `away` makes every call fail; `counted` is how often each message counts as delivered."""

    store_uri = "s3://bucket/store/"

    def __init__(self) -> None:
        self.states: dict[str, JobState] = {}
        self.started: dict[str, float] = {}
        self.failures: dict[str, JobFailure] = {}
        self.counted: dict[str, list[int]] = {}
        self.away = False
        self.barred = False
        self.calls = 0
        self.before_finish: Callable[[], None] = lambda: None

    def ping(self) -> None:
        self._ask()

    def count_deliveries(self, leases: Sequence[Lease], *, excused: bool) -> None:
        self._ask()
        for lease in leases:
            if not lease.lost:
                self.counted.setdefault(lease.tag.decode(), []).append(lease.deliveries - excused)

    def start_many(self, messages: Sequence[JobMessage]) -> list[JobState | Exception]:
        self._ask()
        for message in messages:
            if not self._final(message.id):
                self.states[message.id] = JobState.RUNNING
                self.started[message.id] = time.time()
        return [self.states[message.id] for message in messages]

    def finish_many(self, ends: Sequence[tuple[JobMessage, Outcome]]) -> list[Ending | Exception]:
        self.before_finish()
        if self.away:
            return [AWAY] * len(ends)
        return [self._finish(message.id, outcome.state, outcome.failure) for message, outcome in ends]

    def end(self, message: JobMessage, state: JobState, failure: JobFailure) -> Ending:
        self._ask()
        return self._finish(message.id, state, failure)

    def revoke(self, job_id: str, failure: JobFailure, at: float) -> None:
        self._ask()
        if job_id in self.states and self.started.get(job_id, at) <= at:
            self._finish(job_id, JobState.CANCELLED, failure)

    def _finish(self, job_id: str, state: JobState, failure: JobFailure | None) -> Ending:
        if self._final(job_id):
            return before(self.states[job_id])
        self.states[job_id] = state
        if failure is not None:
            self.failures[job_id] = failure
        return single_ending(state, failure)

    def _final(self, job_id: str) -> bool:
        return job_id in self.states and self.states[job_id].final

    def _ask(self) -> None:
        self.calls += 1
        if self.away:
            raise AWAY
        if self.barred:
            raise BARRED


class FakeEngine:
    """Keeps what is admitted until a test says what becomes of it."""

    def __init__(self) -> None:
        self.inside: list[Work] = []
        self.answers: Callable[[Work], Outcome] | None = None

    def admit(self, works: Sequence[Work], *, bulk: bool) -> None:
        self.inside += works
        if self.answers is not None:
            for work in works:
                work.job.sink.deliver(self.answers(work))

    def work(self, job_id: str) -> Work:
        """The item of a job, once it is here; items of jobs that were given back are the engine's to drop."""

        def here() -> list[Work]:
            return [one for one in self.inside if one.job.id == job_id and not one.job.given_back]

        assert eventually(lambda: bool(here())), f"{job_id} never comes"
        return here()[-1]

    def end(self, job_id: str, failure: JobFailure | None = None, *, seconds: float = 0.001) -> None:
        """The forward of a job's item is over; it took so many `seconds`."""
        work = self.work(job_id)
        work.seconds = {"forward": seconds}
        self.inside = [one for one in self.inside if one is not work]
        stopped = work.job.stopped("forward")
        work.job.sink.deliver(Outcome(work, output={"label": "x"}, failure=failure or stopped))


class FakeShards:
    """Shards whose `run` is what a test makes it; `entered` tells that one runs."""

    def __init__(self, run: Callable[[JobMessage], Ending]) -> None:
        self._run = run
        self.entered = threading.Event()
        self.ran: list[str] = []

    def run(self, message: JobMessage, shard: Shard | None = None, *, patient: bool = True) -> Ending:
        self.ran.append(message.id)
        self.entered.set()
        return self._run(message)


class FakeClock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A consumer with everything around it."""

    def __init__(
        self, served: FakeShards | None = None, *, places: Places | None = None, start: bool = True, **limits: Any
    ) -> None:
        self.engine, self.reporter, self.clock = FakeEngine(), FakeReporter(), FakeClock()
        self.metrics = Metrics("pool")
        self.tally = Tally(self.metrics, WorkCount())
        self.looks = threading.Event()
        self.health = Health(self.reporter.ping, sleep=lambda _: self.looks.wait(20) and self.looks.clear())
        pool = Pool("pool", TASK, "model")
        self.jobs = Jobs(pool, self.engine, is_away=self.health.is_away)  # type: ignore[arg-type]
        self.shards: Any = served or FakeShards(lambda message: Ending(JobState.SUCCEEDED))
        self.consumer = Consumer(
            self.jobs, self.shards, self.shards, self.reporter, self.health, tally=self.tally,  # type: ignore[arg-type]
            limits=IntakeLimits(**{"shards": 1, **limits}), clock=self.clock, places=places,
        )  # fmt: skip
        if start:
            self.consumer.start()

    def take(self, message: JobMessage | Any, **options: Any) -> FakeDelivery:
        """A delivery that the consumer has taken."""
        after = options.pop("after", 0.0)
        delivery = FakeDelivery(message, **options)
        self.consumer.take(delivery, after=after)
        return delivery

    def revoke(self, name: str) -> None:
        """An operator revokes a job."""
        self.consumer.revoke(name, time.time())

    def later(self, seconds: float) -> None:
        """So much time passes."""
        self.clock.now += seconds
        self.consumer.later.look()

    def goes_away(self) -> None:
        """Redis does not answer any more."""
        self.reporter.away = True

    def is_refused(self) -> None:
        """S3 refuses this worker whatever it asks for."""
        self.reporter.barred = True

    def comes_back(self) -> None:
        """Redis answers and S3 does not refuse, and the next look at them is now."""
        self.reporter.away = self.reporter.barred = False
        self.looks.set()
