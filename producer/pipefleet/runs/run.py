"""A bulk run as the producer sees it: progress, waiting, results, failures, cancel, resume.

Object storage is the truth: a run can be opened from its URI alone, and finished after Redis was emptied. Redis only makes
progress cheap to read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipefleet.connection.errors import redis_errors
from pipefleet.connection.replicas import old_figures
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
from pipefleet.waiting.lookout import why_waiting

if TYPE_CHECKING:
    from pipefleet.session import Session

LOOK_AT_STORE_SECONDS = 5.0
"""How often a waiting client looks for the end of the run in object storage, whatever Redis says."""
ASK_WHY_SECONDS = 2.0
"""How often it is asked whether any worker serves the queue."""
FORGOTTEN = "Redis was emptied, and what waited in it is lost"


class Run:
    """One bulk run. Thread-safe. Made by `Client.map` and `Client.run`."""

    def __init__(self, session: Session, layout: RunLayout, plan: RunPlan, planner: Planner | None = None) -> None:
        self._session = session
        self._layout = layout
        self._plan = plan
        self._planner = planner
        self._thread: threading.Thread | None = None
        self._planning_error: PipefleetError | None = None
        self._next_look = self._ask_why_at = 0.0
        self._cancelled_in_store = False
        self._waiting: str | None = None
        self._lost: str | None = None
        self._locks()

    @classmethod
    def open(cls, session: Session, layout: RunLayout) -> Run:
        """The run at a URI. Raises RunError where there is none."""
        plan = read_plan(session.store, layout)
        return cls(session, replace(layout, format=plan.format), plan)

    def __repr__(self) -> str:
        return f"Run({self.uri!r})"

    @property
    def uri(self) -> str:
        """The output prefix: all that is needed to open the run again."""
        return self._layout.uri

    @property
    def id(self) -> str:
        """The run's id, which its job ids and artifacts carry."""
        return self._plan.id

    @property
    def plan(self) -> RunPlan:
        """Task, model, parameters, source and, once planning has ended, totals."""
        return self._plan

    @property
    def planning(self) -> bool:
        """True while this client plans the run."""
        return self._thread is not None and self._thread.is_alive()

    def progress(self) -> RunProgress:
        """How far the run is, from Redis; from object storage once it has ended. Raises what planning raised.

        Object storage is asked when Redis has every part noted, and every LOOK_AT_STORE_SECONDS in case Redis lost its data.
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
            items=max(total or 0, counts.done),  # a planner tells every few seconds how far it is
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
        """The totals of an ended run. Brings what is known of another one up to date; `forgotten`: Redis knows nothing of it."""
        self._next_look = time.monotonic() + LOOK_AT_STORE_SECONDS
        ended = read_totals(self._session.store, self._layout)
        if ended is None:
            self._refresh_plan()
            self._cancelled_in_store = forgotten and self._session.store.head(self._layout.cancelled) is not None
        return ended

    def _why_waiting(self) -> str | None:
        """One sentence where no worker serves the queue, as it was found a moment ago."""
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
        """Wait for the end of the run, at most `timeout` seconds; with `progress`, show it as it goes.

        On a terminal that is a bar, elsewhere plain lines on stderr. While Redis or S3 is away it waits for up to
        PATIENCE_SECONDS, then raises ServiceUnavailableError. Raises ResultTimeoutError (the run goes on), RunError when nobody
        is planning the rest of it or its messages are lost, or whatever error ended the planning.
        """
        return self._waiter.wait(show=progress, timeout=timeout)

    @property
    def _waiter(self) -> Waiter:
        unseen = RunProgress(
            self.uri, "running" if self._plan.shards else "planning", self._plan.items or 0, 0, 0, 0, 0, 0.0
        )
        return Waiter(unseen, self.progress, self._require_planner, self._raise_planning_error)

    def results(self) -> Iterator[dict[str, Any]]:
        """Rows `{id, input, output | error, …}` in source order, a part in memory at a time; waits for parts to come.

        Long arrays, which lie beside the line as artifacts, are fetched with their row.

        Raises RunError when the run was cancelled before all its parts were there. Waits for services as `wait` does.
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
        """Stop the run: what is queued is dropped, what is on a device is not written. `resume` takes it up again.

        Planning in this client stops as well, after the item that its source is at.
        """
        self.stop_planning()
        key = run_key(self.id)
        self._session.store.put(self._layout.cancelled, b"{}")
        with redis_errors(self._session.settings.redis_url):
            self._session.redis.eval(CANCEL_RUN, 1, key, int(self._session.settings.run_ttl))
            self._session.redis.publish(CANCELLED_CHANNEL, self.id)

    def resume(self, *, model: str | None = None, revision: str | None = None) -> int:
        """Queue again every shard that no queue, worker or part accounts for, or that was refused; returns how many those are.

        A run that has ended with refused shards is running again then. Returns when they are known: as after `map`, a thread
        that `Client.close` waits for queues them, with at most `Settings.outstanding_shards` before the fleet at once, and
        finishes an interrupted planning, whose new shards do not count. The state is that of object storage, so a run whose
        Redis was emptied is finished as well.

        Raises RunError when the source was an iterable that ended with its client, or when another client goes on planning
        or queueing the run: that one queues again by itself what Redis lost.

        With `model` (and `revision`), what is not done yet is moved to that model, which the fleet serves for the run's task
        (UnknownModelError where it does not): for a run whose own revision nobody serves any more. Another client that goes on
        planning the run follows, and queues what is moved; then the number is that of the refused shards.
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
        """Find what is missing, and have it queued: by the thread that plans where it still looks, else by a new one."""
        with self._ending:
            missing = planner.backlog.find(planner.shards)
            if planner is self._planner and self.planning:
                if not self._has_ended:
                    return missing
                self.join_planner()
                alive.enter_context(planner.alive())
            self._planner = planner
            self.start_planning(alive.pop_all())
        return missing

    def requeue(self, shards: Collection[int]) -> list[int]:
        """Queue refused shards again, these alone; the indexes of those that were refused. Their run is running again then.

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
        """Queue a shard of a run that was moved away from `queue` where it was moved to; False where there is no such shard."""
        if queue == self._plan.queue or self._session.store.head(self._layout.shard(shard)) is None:
            return False
        if read_moved(self._session.store, self._layout) is None:
            return False
        self._backlog().publish([shard])
        return True

    def _backlog(self) -> Backlog:
        """What is missing of the run, for one look from outside of its planning. It waits for no service."""
        return Backlog(self._session, self._layout, self._plan, Patience(threading.Event()))

    def has_part(self, shard: int) -> bool:
        """Whether the part of a shard is there."""
        return self._session.store.head(self._layout.part(shard)) is not None

    def unserved(self) -> str | None:
        """One sentence with what to do, where no worker serves the revision that the run is for; None where one does."""
        return unserved(self._session, self._plan, self.uri)

    def _move(self, pool: Pool | None) -> None:
        """Move what is not done to `pool`, or keep a run that was moved before together."""
        if pool is not None:
            self._plan = move_run(self._session, self._layout, self._plan, pool)
        elif (moved := read_moved(self._session.store, self._layout)) is not None:
            self._plan = moved.applied(self._plan)
            take_back(self._session, moved, self.id)

    def start_planning(self, alive: AbstractContextManager[object]) -> None:
        """Plan the rest of the source in a thread that keeps the process alive until it is done, inside of `alive`."""
        name = f"pipefleet-plan-{self.id[:8]}"
        self._session.hold(self)
        self._has_ended = False
        self._thread = threading.Thread(target=self._plan_rest, args=(alive,), name=name, daemon=False)
        self._thread.start()
        renew_after_fork(self)

    def stop_planning(self) -> None:
        """Let this client's planning end early. `resume` goes on with it."""
        if self._planner is not None:
            self._planner.stop()

    def join_planner(self) -> None:
        """Wait until the planning thread has ended."""
        if self._thread is not None:
            self._thread.join()

    def after_fork(self) -> None:
        """In a forked process: the parent plans the run; here it is as if another client did."""
        self._planner, self._thread = None, None
        self._locks()

    def _locks(self) -> None:
        self._resuming = threading.Lock()
        self._ending = threading.Lock()
        """Held while what is missing is found, and while the thread that plans decides that nothing is."""
        self._has_ended = True
        """Whether that thread looks no more, though it may still live."""

    def _plan_rest(self, alive: AbstractContextManager[object]) -> None:
        assert self._planner is not None
        try:
            with alive:
                self._run(self._planner)
        except PipefleetError as error:
            self._end_planning(error)
        except Exception as error:  # noqa: BLE001 - nobody else sees what ends this thread; shown by wait()
            self._end_planning(RunError(f"planning ended with {type(error).__name__}: {error}"))

    def _run(self, planner: Planner) -> None:
        """Plan until nothing is missing, or until it was stopped for good."""
        try:
            while not self._has_ended:
                planned = planner.run()
                with self._ending:
                    if planned:
                        self._plan = planner.plan
                    self._has_ended = not planner.backlog.missing if planned else planner.stopped
        finally:
            self._has_ended = True

    def _end_planning(self, error: PipefleetError) -> None:
        """Keep the error that ended the planning, for this client and, under the run, for every other."""
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
        """Why nobody plans the rest of the source, or queues the shards that are missing; None while somebody does.

        `forgotten`: the mark of the run is not in Redis.
        """
        if self.planning:
            return None
        if self._plan.shards is None and planner_gone(self._session, self._plan):
            self._refresh_plan()  # its last act may have been to write the totals
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
        """True when part `index` is there; False when the run has fewer parts."""
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
        """The planner of this client where it can go on, else a new one behind what is there; it gives signs of life in `alive`.

        Raises RunError: see `resume`. None where another client plans a run that was `moved`.
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
