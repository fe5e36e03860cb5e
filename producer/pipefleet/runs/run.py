"""`Run`, the handle of a bulk run: progress, waiting, results, failures, cancel, resume.

`Client.map` and `Client.run` make handles. Object storage is the truth: a run can be opened from its URI alone, and finished after
Redis was emptied. Redis only makes progress cheap to read. Errors are RunError for a run that has stopped, cancelled or foreign
files, ResultTimeoutError, and ServiceUnavailableError.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipefleet.connection.errors import redis_errors
from pipefleet.connection.replicas import old_figures
from pipefleet.connection.scripts import run_script
from pipefleet.contract.layout import RunLayout, RunPlan
from pipefleet.contract.records import CANCEL_RUN
from pipefleet.errors import PipefleetError, RunError
from pipefleet.fleet.pools import Pool
from pipefleet.forking import renew_after_fork
from pipefleet.patience import PATIENCE_SECONDS, Patience
from pipefleet.queues.keys import CANCELLED_CHANNEL, run_key
from pipefleet.runs.backlog import Backlog
from pipefleet.runs.finishing import read_totals
from pipefleet.runs.moving import known_pool, move_run, read_moved, take_back, unserved
from pipefleet.runs.planner import (
    Planner,
    is_forgotten,
    left_unqueued,
    planner_alive,
    planner_gone,
    read_plan,
    release_planning,
    remember_totals,
)
from pipefleet.runs.progress import RunProgress
from pipefleet.runs.reading import read_failures, read_results
from pipefleet.runs.refusals import Refusals
from pipefleet.runs.resume import claim_when_alone, reopened
from pipefleet.runs.stopped import UNKNOWN, forget_stopped, note_stopped, read_stopped
from pipefleet.runs.wait import POLL_SECONDS, Waiter
from pipefleet.service import Service
from pipefleet.waiting.lookout import why_waiting

if TYPE_CHECKING:
    from pipefleet.session import Session

LOOK_AT_STORE_SECONDS = 5.0
"""Seconds between two looks of a waiting client for the end of the run in object storage, for any answer of Redis."""
ASK_WHY_SECONDS = 2.0
"""Seconds between two looks whether a worker serves the queue."""
FORGOTTEN = "Redis was emptied, and what waited in it is lost"


class Run:
    """One bulk run. Thread-safe. Made by `Client.map` and `Client.run`."""

    def __init__(self, session: Session, layout: RunLayout, plan: RunPlan, planner: Planner | None = None) -> None:
        self._session = session
        self._layout = layout
        self._plan = plan
        self._planner = planner
        self._planning = Service(
            f"pipefleet-plan-{plan.id[:8]}", self._plan_rest, wake=self.stop_planning, daemon=False
        )
        self._alive: AbstractContextManager[object] = nullcontext()
        self._planning_error: PipefleetError | None = None
        self._next_look = self._ask_why_at = 0.0
        self._cancelled_in_store = False
        self._waiting: str | None = None
        self._lost: str | None = None
        self._locks()

    @classmethod
    def open(cls, session: Session, layout: RunLayout) -> Run:
        """The run at a URI. Raises RunError where there is no run."""
        plan = read_plan(session.store, layout)
        return cls(session, replace(layout, format=plan.format), plan)

    def __repr__(self) -> str:
        return f"Run({self.uri!r})"

    @property
    def uri(self) -> str:
        """The output prefix. It suffices to open the run again."""
        return self._layout.uri

    @property
    def id(self) -> str:
        """The id of the run. The ids of its jobs begin with it."""
        return self._plan.id

    @property
    def plan(self) -> RunPlan:
        """Task, model, parameters, source and, once planning has ended, totals."""
        return self._plan

    @property
    def planning(self) -> bool:
        """True while this client plans the run."""
        return self._planning.alive

    def progress(self) -> RunProgress:
        """The progress of the run, from Redis; from object storage once it has ended. Raises the error that ended planning here.

        Object storage is read when Redis has noted every part, and every LOOK_AT_STORE_SECONDS in case Redis lost its data.
        """
        self._raise_planning_error()
        counts = self._refusals.counts()
        shards, complete = counts.shards, counts.complete
        if complete or not counts.known or time.monotonic() >= self._next_look:
            ended = self._look_at_store(forgotten=shards is None and counts.cancelled is None)
            if ended is not None:
                return ended
        is_cancelled = bool(counts.cancelled) or self._cancelled_in_store
        if complete and not is_cancelled and self._plan.shards is not None:
            ended = self._refusals.end(self._plan)
            if ended is not None:
                return ended
            is_cancelled = self._session.store.head(self._layout.cancelled) is not None
        queued = planner_alive(self._session, self._plan) if self._plan.items is None else None
        reason = None if queued or is_cancelled else self._why_stopped(forgotten=not counts.known)
        total = queued.items if queued else self._plan.items
        going = "planning" if self._plan.shards is None else "running"
        return RunProgress(
            uri=self.uri,
            state="cancelled" if is_cancelled else "stopped" if reason else going,
            items=max(total or 0, counts.done),  # a planner's figure is a few seconds old
            succeeded=counts.done - counts.failed,
            failed=counts.failed,
            shards=max(self._plan.shards or shards or (queued.shards if queued else 0), counts.parts + counts.refused),
            parts=counts.parts,
            seconds=max(0.0, self._session.now() - self._plan.created),
            reason=reason,
            refused=counts.refused,
            refused_reason=counts.reason,
            waiting=None if is_cancelled else self._why_waiting(),
        )

    def _look_at_store(self, *, forgotten: bool) -> RunProgress | None:
        """The totals if the run has ended; else None, and the plan is read again. `forgotten`: Redis knows nothing of the run."""
        self._next_look = time.monotonic() + LOOK_AT_STORE_SECONDS
        ended = read_totals(self._session.store, self._layout)
        if ended is None:
            self._refresh_plan()
            self._cancelled_in_store = forgotten and self._session.store.head(self._layout.cancelled) is not None
        return ended

    def _why_waiting(self) -> str | None:
        """One sentence if no worker served the queue at the last look; else None."""
        if time.monotonic() >= self._ask_why_at:
            self._ask_why_at = time.monotonic() + ASK_WHY_SECONDS
            with redis_errors(self._session.settings.redis_url):
                self._waiting = old_figures(self._session.redis, self._session.settings.redis_url) or why_waiting(
                    self._session.redis, self._plan.queue, pool=known_pool(self._session, self._plan)
                )
        return self._waiting

    @property
    def _refusals(self) -> Refusals:
        return Refusals(self._session.redis, self._session.settings, self._session.store, self._layout, self.id)

    def wait(self, *, progress: bool = False, timeout: float | None = None) -> RunProgress:
        """Wait for the end of the run, at most `timeout` seconds. With `progress` it shows the progress.

        The progress is a bar on a terminal, and plain lines elsewhere, on stderr. While Redis or S3 is away it waits for up to
        PATIENCE_SECONDS, then raises ServiceUnavailableError. Raises ResultTimeoutError (the run goes on); RunError if nobody
        plans the rest of the run or its messages are lost; or the error that ended the planning.
        """
        return self._waiter.wait(show=progress, timeout=timeout)

    @property
    def _waiter(self) -> Waiter:
        unseen = RunProgress(
            self.uri, "running" if self._plan.shards else "planning", self._plan.items or 0, 0, 0, 0, 0, 0.0
        )
        return Waiter(unseen, self.progress, self._require_planner, self._raise_planning_error)

    def results(self) -> Iterator[dict[str, Any]]:
        """Rows `{id, input, output | error, …}` in source order. Waits for each part; one part is in memory at a time.

        Artifacts, such as long arrays, are fetched with their row. Raises RunError if the run was cancelled before all its parts
        were there. Waits for services as `wait` does.
        """
        yield from read_results(self._session.store, self._layout, self._waiter.patience(), self._wait_for_part)

    def failures(self) -> Iterator[dict[str, Any]]:
        """The failed items so far, as manifest rows with an `error` of code, message and stage. Waits for S3 as `wait` does."""
        return read_failures(self._session.store, self._layout, self._waiter.patience())

    @property
    def failures_uri(self) -> str:
        """The file that lists every failed item when the run has ended; a source for the next `map`."""
        return self._layout.failures

    def cancel(self) -> None:
        """Stop the run: queued shards are dropped, and shards on a device are not written. `resume` takes it up again.

        Planning in this client stops too, after the current item of the source.
        """
        self.stop_planning()
        key = run_key(self.id)
        self._session.store.put(self._layout.cancelled, b"{}")
        with redis_errors(self._session.settings.redis_url):
            run_script(self._session.redis, CANCEL_RUN, [key], int(self._session.settings.run_ttl))
            self._session.redis.publish(CANCELLED_CHANNEL, self.id)

    def resume(self, *, model: str | None = None, revision: str | None = None) -> int:
        """Queue again every shard that was refused or that no queue, worker or part accounts for. Returns their number.

        A run that had ended with refused shards is running again then. The call returns once the shards are known. As after `map`,
        a thread that `Client.close` waits for queues them, within `Settings.outstanding_shards`, and finishes an interrupted
        planning; its new shards do not count. Object storage decides, so a run whose Redis was emptied is finished too.

        Raises RunError if the source was an iterable that ended with its client, or if another client plans or queues the run:
        that client queues again by itself the shards that Redis lost.

        With `model` (and `revision`), the items that are not done yet move to that model, for a run whose own revision nobody
        serves any more. Raises UnknownModelError if the fleet does not serve it for the run's task. Another client that plans the
        run follows and queues the moved shards; then the number counts the refused shards alone.
        """
        self._session.check_fleet()
        pool = None if model is None else self._session.route(self._plan.task, model, revision)[1]
        with self._resuming:
            return Patience(seconds=PATIENCE_SECONDS).call(lambda: self._resume(pool))

    def _resume(self, pool: Pool | None) -> int:
        ended = read_totals(self._session.store, self._layout) is not None
        if ended and not self._refusals.all():
            return 0
        self._refresh_plan()
        self._move(pool)
        with ExitStack() as alive:
            planner = self._planner_to_go_on(alive, moved=pool is not None)
            taken = self._refusals.take_up(self._plan)
            if ended and not taken:
                return 0
            self._uncancel()
            if planner is None:
                return len(taken)
            forget_stopped(self._session.store, self._layout)
            self._planning_error = None
            planner.prepare()
            return self._go_on(planner, alive)

    def _go_on(self, planner: Planner, alive: ExitStack) -> int:
        """Find the missing shards, and have them queued: by this client's planning thread if it goes on, else by a new thread."""
        with self._ending:
            missing = planner.backlog.find(planner.shards)
            if planner is self._planner and self.planning:
                if self._planning.running:
                    return missing
                self.join_planner()
                alive.enter_context(planner.alive())
            self._planner = planner
            self.start_planning(alive.pop_all())
        return missing

    def requeue(self, shards: Collection[int]) -> list[int]:
        """Queue these refused shards again. Returns the indexes of those that were refused. Their run is running again then.

        Raises RunError for a cancelled run.
        """
        ended = read_totals(self._session.store, self._layout) is not None
        if not ended and self._session.store.head(self._layout.cancelled) is not None:
            raise RunError(f"the run at {self.uri} was cancelled; go on with `pipefleet resume {self.uri}`")
        taken = self._refusals.take_up(self._plan, only=shards)
        if not taken:
            return []
        backlog = self._backlog()
        if ended:
            self._uncancel()
            with redis_errors(self._session.settings.redis_url):
                remember_totals(self._session.redis, self._plan, ttl=self._session.settings.run_ttl)
            backlog.recall(self._plan.shards or 0)
        backlog.publish(taken)
        return taken

    def follow(self, shard: int, queue: str | None) -> bool:
        """Queue a shard where its run was moved to, away from `queue`. False if the run did not move, or lacks the shard."""
        if queue == self._plan.queue or self._session.store.head(self._layout.shard(shard)) is None:
            return False
        if read_moved(self._session.store, self._layout) is None:
            return False
        self._backlog().publish([shard])
        return True

    def _backlog(self) -> Backlog:
        """The missing shards of the run, as a client sees them that does not plan it. Waits for no service."""
        return Backlog(self._session, self._layout, self._plan, Patience(threading.Event()))

    def has_part(self, shard: int) -> bool:
        """Whether the part of a shard is there."""
        return self._session.store.head(self._layout.part(shard)) is not None

    def unserved(self) -> str | None:
        """One sentence with the next step if no worker serves the revision of the run; else None."""
        return unserved(self._session, self._plan, self.uri)

    def _move(self, pool: Pool | None) -> None:
        """Move the rest of the run to `pool`. Without `pool`, take messages that an earlier move left out of their old queues."""
        if pool is not None:
            self._plan = move_run(self._session, self._layout, self._plan, pool)
        elif (moved := read_moved(self._session.store, self._layout)) is not None:
            self._plan = moved.applied(self._plan)
            take_back(self._session, moved, self.id)

    def start_planning(self, alive: AbstractContextManager[object]) -> None:
        """Plan the rest of the source in a thread, inside of `alive`. The thread keeps the process alive until it is done."""
        self._session.hold(self)
        self._alive = alive
        self._planning.start()
        renew_after_fork(self)

    def stop_planning(self) -> None:
        """Let this client's planning end early. `resume` goes on with the run."""
        if self._planner is not None:
            self._planner.stop()

    def join_planner(self) -> None:
        """Wait until the planning thread has ended."""
        self._planning.join()

    def after_fork(self) -> None:
        """In a forked process: the parent plans the run. For the child the parent is another client."""
        self._planner = None
        self._locks()

    def _locks(self) -> None:
        self._resuming = threading.Lock()
        self._ending = threading.Lock()
        """Held while missing shards are looked for, and while the planning thread decides that none is missing."""

    def _plan_rest(self, stopping: threading.Event) -> None:
        assert self._planner is not None
        try:
            with self._alive:
                self._run(self._planner, stopping)
        except PipefleetError as error:
            self._end_planning(error)
        except Exception as error:  # noqa: BLE001 - nobody else sees the error that ends this thread; wait() raises it
            self._end_planning(RunError(f"planning ended with {type(error).__name__}: {error}"))

    def _run(self, planner: Planner, stopping: threading.Event) -> None:
        """Plan until no shard is missing, or until the planner was stopped."""
        try:
            while not stopping.is_set():
                planned = planner.run()
                with self._ending:
                    if planned:
                        self._plan = planner.plan
                    if planner.stopped or (planned and not planner.backlog.missing):
                        stopping.set()
        finally:
            stopping.set()  # the thread may still live; a new start gets a new thread

    def _end_planning(self, error: PipefleetError) -> None:
        """Keep the error that ended the planning: in this handle, and in stopped.json for every other client."""
        self._planning_error = error
        if self._planner is not None and self._planner.alone:
            note_stopped(self._session.store, self._layout, error, at=self._session.clock.peek())

    def _raise_planning_error(self) -> None:
        if self._planning_error is not None:
            raise self._planning_error

    def _require_planner(self, now: RunProgress) -> None:
        if now.reason is not None:
            self._raise_planning_error()
            raise RunError(f"the run at {self.uri} has stopped: {now.reason}; go on with `pipefleet resume {self.uri}`")

    def _why_stopped(self, *, forgotten: bool) -> str | None:
        """Why nobody plans the rest of the source or queues the missing shards; None while somebody does.

        `forgotten`: Redis lacks the mark of the run.
        """
        if self.planning:
            return None
        if self._plan.shards is None and planner_gone(self._session, self._plan):
            self._refresh_plan()  # the planner may have written the totals as its last act
            if self._plan.shards is None:
                return read_stopped(self._session.store, self._layout) or UNKNOWN
        if self._plan.shards is None:
            return None
        if forgotten and is_forgotten(self._session, self._plan):
            return FORGOTTEN
        if left := left_unqueued(self._session, self._plan):
            return f"{left} shards are not queued, and the client that queued them has ended"
        lost = self._session.losses.why(self._plan)
        if lost is None or lost == self._lost:
            return lost
        self._lost = None if self._backlog().restore_unknown(self._plan.shards) else lost
        return self._lost

    def _refresh_plan(self) -> None:
        if self._plan.shards is None and not self.planning:
            self._plan = read_plan(self._session.store, self._layout)
        elif (moved := read_moved(self._session.store, self._layout)) is not None:
            self._plan = moved.applied(self._plan)

    def _wait_for_part(self, index: int) -> bool:
        """Wait until part `index` is there. False if the run has fewer parts."""
        patience = self._waiter.patience()
        while True:
            if patience.call(lambda: self._session.store.head(self._layout.part(index))) is not None:
                return True
            now = patience.call(self.progress)
            if self._plan.shards is not None and index >= self._plan.shards:
                return False
            if now.state == "cancelled":
                raise RunError(f"the run at {self.uri} was cancelled; go on with `pipefleet resume {self.uri}`")
            self._require_planner(now)
            time.sleep(POLL_SECONDS)

    def _uncancel(self) -> None:
        self._session.store.delete(self._layout.cancelled)
        with redis_errors(self._session.settings.redis_url):
            self._session.redis.hdel(run_key(self.id), "cancelled")
        self._cancelled_in_store = False

    def _planner_to_go_on(self, alive: ExitStack, *, moved: bool) -> Planner | None:
        """The client's planner if it can go on; else a new one, behind the last shard. It gives signs of life inside of `alive`.

        Raises RunError, see `resume`. None if another client plans a run that was `moved`.
        """
        planner = self._planner
        if planner is not None and planner.stopped:
            self.join_planner()
        usable = planner is not None and planner.usable
        if planner is not None and usable and self.planning:
            planner.go_on()
            return planner
        if not claim_when_alone(self._session, self._plan, self.uri, moved=moved):
            return None
        try:
            self._refresh_plan()
            reads = self._plan.shards is None
            if planner is None or not usable or not reads:
                source = reopened(self._session, self._layout, self._plan) if reads else None
                planner = Planner(self._session, self._layout, self._plan, source)
            planner.go_on()
            alive.enter_context(planner.alive())
        except BaseException:
            release_planning(self._session, self._plan)
            raise
        return planner
