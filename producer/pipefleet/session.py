"""`Session`: one client's connections, and the calls that jobs, runs and planners share.

Settings come in. Jobs, runs and planners take a session. `Client` is a session with the calls of users. Errors of Redis and S3
leave as errors of this package: ServiceUnavailableError where one does not answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from pipefleet.connection.clock import ServerClock
from pipefleet.connection.connect import connect, renew_connections
from pipefleet.connection.errors import redis_errors
from pipefleet.connection.scripts import run_script
from pipefleet.contract.messages import JobMessage, JobState, Priority
from pipefleet.contract.records import CANCEL, JobRecord, finish_arguments, read_record
from pipefleet.errors import UnknownModelError
from pipefleet.fleet.announcements import announced_fleet
from pipefleet.fleet.identity import Membership
from pipefleet.fleet.latest import LatestFleet
from pipefleet.fleet.pools import Fleet, Pool
from pipefleet.fleet.routing import route
from pipefleet.forking import renew_after_fork
from pipefleet.inputs.prepare import InputPreparer
from pipefleet.queues.celery import push_job
from pipefleet.queues.keys import CANCELLED_CHANNEL, job_key
from pipefleet.queues.lost_messages import LostMessages
from pipefleet.settings import Settings
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import TaskSpec, task_spec
from pipefleet.tasks.parameters import layered
from pipefleet.tasks.requirements import Known
from pipefleet.waiting.lookout import Lookout
from pipefleet.waiting.watcher import Watcher

ANNOUNCED_SECONDS = 5.0
"""Seconds between two reads of the workers' announcements."""


class Planning(Protocol):
    """A run that this client plans. `close` joins it; a failed `with` block stops it."""

    @property
    def planning(self) -> bool:
        """Whether the planning goes on."""

    def stop_planning(self) -> None:
        """Let the planning end early."""

    def join_planner(self) -> None:
        """Wait for the end of the planning."""


class Session:
    """Connections to one fleet. Thread-safe; connections open when they are first needed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = ObjectStore()
        self.redis = connect(self.settings)
        self.clock = ServerClock(self.redis)
        """The clock of deadlines and records."""
        self._membership = Membership(self.redis, self.store, self.settings)
        self._lookout = Lookout(self.redis)
        self.losses = LostMessages(self.redis, self.settings.redis_url)
        """Shards of runs that Redis has lost."""
        self.watcher = Watcher(self.redis, self.settings.redis_url, self._lookout)
        self._planning: list[Planning] = []
        self._fleet_file: LatestFleet | None = None
        self._announced: Fleet | None = None
        self._announced_until = 0.0
        self._lock = threading.Lock()
        renew_after_fork(self)

    def route(self, task: str, model: str | None, revision: str | None) -> tuple[TaskSpec, Pool]:
        """The row of `task` and the pool that serves it. Raises UnknownTaskError or UnknownModelError."""
        spec = task_spec(task)
        try:
            return spec, route(spec.name, model, revision, self.fleet)
        except UnknownModelError:
            return spec, route(spec.name, model, revision, self._read_fleet(at_once=True))  # the pool may be new

    @property
    def fleet(self) -> Fleet:
        """The fleet, as of a few seconds ago: from the fleet file if there is one, else from the workers' announcements."""
        return self._read_fleet()

    def _read_fleet(self, *, at_once: bool = False) -> Fleet:
        path = self.settings.fleet_path
        if path is not None:
            if self._fleet_file is None or self._fleet_file.path != path:
                self._fleet_file = LatestFleet(path)
            return self._fleet_file.fleet(at_once=at_once)
        known = self._announced
        if known is None or at_once or time.monotonic() >= self._announced_until:
            self._announced_until = time.monotonic() + ANNOUNCED_SECONDS
            with redis_errors(self.settings.redis_url):
                known = self._announced = announced_fleet(self.redis)
        return known

    def ping(self) -> None:
        """Raise ServiceUnavailableError unless Redis answers."""
        with redis_errors(self.settings.redis_url):
            self.redis.ping()

    def preparer(
        self, spec: TaskSpec, pool: Pool | None = None, parameters: Mapping[str, Any] | None = None
    ) -> InputPreparer:
        """A preparer, which turns a user's inputs for this task into JSON with references.

        With the pool and the parameters of a call it refuses inputs that do not go with them. Workers do not announce the
        parameters of their pool, so a missing parameter is known only with a fleet file.
        """
        complete = pool is not None and self.settings.fleet_path is not None
        known = Known(layered(spec, pool.parameters if pool else {}, parameters or {}), complete)
        return InputPreparer(
            spec, self.store, self.settings.store, inline_bytes=self.settings.inline_bytes, known=known
        )

    def read_records(self, job_ids: Sequence[str]) -> list[JobRecord | None]:
        """The records of jobs, in one round trip; None for an unknown job."""
        pipe = self.redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.hgetall(job_key(job_id))
        with redis_errors(self.settings.redis_url):
            return [read_record(raw) for raw in pipe.execute()]

    def cancel_job(self, job_id: str) -> bool:
        """See `Job.cancel`."""
        ttl, key = self.settings.result_ttl, job_key(job_id)
        reply = self.watcher.channel
        arguments = finish_arguments(job_id, JobState.CANCELLED, None, ttl=ttl, reply=reply, fields={})
        with redis_errors(self.settings.redis_url):
            ended = bool(run_script(self.redis, CANCEL, [key], *arguments))
            if ended:
                self.redis.publish(CANCELLED_CHANNEL, job_id)
        return ended

    def publish(self, messages: Iterable[JobMessage], queue: str, priority: Priority) -> None:
        """Queue messages in one round trip. Raises ServiceUnavailableError; then either none or all of them are queued."""
        self.check_fleet()
        pipe, now = self.redis.pipeline(transaction=True), self.now()
        for message in messages:
            push_job(pipe, message, queue, priority, now=now)
        with redis_errors(self.settings.redis_url):
            pipe.execute()

    def check_fleet(self, *, uses_store: bool = True) -> None:
        """Raise FleetMismatchError if Redis belongs to another fleet. Looks once; without `uses_store` only at Redis."""
        self._membership.check(uses_store=uses_store)

    def hold(self, run: Planning) -> None:
        """Remember a run that is being planned, so that `close` waits for it."""
        with self._lock:
            self._planning = [*(one for one in self._planning if one.planning and one is not run), run]

    def now(self) -> float:
        """Seconds since 1970 by the Redis server's clock. Raises ServiceUnavailableError if Redis never answered."""
        with redis_errors(self.settings.redis_url):
            return self.clock.now()

    def after_fork(self) -> None:
        """In a forked process: make new connections; the parent's connections and its planning stay the parent's."""
        self._lock = threading.Lock()
        renew_connections(self.redis, self.settings)
        self._planning = []

    def _runs_in_planning(self) -> list[Planning]:
        with self._lock:
            return list(self._planning)
