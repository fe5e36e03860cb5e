"""A bulk run as the producer sees it: progress, waiting, results, failures, cancel, resume.

Object storage is the truth: a run can be opened from its URI alone, and finished after Redis was emptied. Redis only makes
progress cheap to read.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipefleet import broker
from pipefleet.artifacts import resolve
from pipefleet.contract import JobMessage, Priority
from pipefleet.errors import PipefleetError, ResultTimeoutError, RunError
from pipefleet.finishing import failed_lines, finalise, read_totals, write_failed_rows
from pipefleet.layout import RunLayout, RunPlan, index_of
from pipefleet.moving import move_run, read_moved, take_back, unserved
from pipefleet.parts import JsonLines, part_format
from pipefleet.planner import (
    Planner,
    decode_shard_line,
    planner_alive,
    read_plan,
    remember_totals,
    shard_id,
    shard_message,
    write_plan,
)
from pipefleet.progress import RunProgress, show_progress
from pipefleet.sources import open_source
from pipefleet.tasks import task_spec

if TYPE_CHECKING:
    from pipefleet.client import Client
    from pipefleet.fleet import Pool

POLL_SECONDS = 0.25
LOOK_AT_STORE_SECONDS = 5.0
"""How often a waiting client looks for the end of the run in object storage, whatever Redis says."""
TAKE_OVER_SECONDS = 30.0
"""How long `resume` waits for a planner that gives signs of life; one that died gives them for ten seconds more."""


class Run:
    """One bulk run. Thread-safe. Made by `Client.map` and `Client.run`."""

    def __init__(self, client: Client, layout: RunLayout, plan: RunPlan, planner: Planner | None = None) -> None:
        self._client = client
        self._layout = layout
        self._plan = plan
        self._planner = planner
        self._thread: threading.Thread | None = None
        self._planning_error: PipefleetError | None = None
        self._next_look = 0.0
        self._cancelled_in_store = False

    @classmethod
    def open(cls, client: Client, layout: RunLayout) -> Run:
        """The run at a URI. Raises RunError where there is none."""
        plan = read_plan(client.store, layout)
        return cls(client, replace(layout, format=plan.format), plan)

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
        shards, cancelled, done, failed, parts = self._counts()
        complete = shards is not None and parts >= shards
        if complete or time.monotonic() >= self._next_look:
            ended = self._look_at_store(forgotten=shards is None and cancelled is None)
            if ended is not None:
                return ended
        is_cancelled = bool(cancelled) or self._cancelled_in_store
        if complete and not is_cancelled and self._plan.shards is not None:
            return finalise(self._client.store, self._layout, self._plan)
        queued = planner_alive(self._client, self._plan) if self._plan.items is None else None
        total = queued.items if queued else self._plan.items
        state = "cancelled" if is_cancelled else "planning" if self._plan.shards is None else "running"
        seconds = time.time() - self._plan.created
        known = self._plan.shards or shards or (queued.shards if queued else 0)
        return RunProgress(self.uri, state, total or done, done - failed, failed, known, parts, seconds)

    def _look_at_store(self, *, forgotten: bool) -> RunProgress | None:
        """The totals of an ended run. Brings what is known of another one up to date; `forgotten`: Redis knows nothing of it."""
        self._next_look = time.monotonic() + LOOK_AT_STORE_SECONDS
        ended = read_totals(self._client.store, self._layout)
        if ended is None:
            self._refresh_plan()
            self._cancelled_in_store = forgotten and self._client.store.head(self._layout.cancelled) is not None
        return ended

    def wait(self, *, progress: bool = False, timeout: float | None = None) -> RunProgress:
        """Wait for the end of the run, at most `timeout` seconds; with `progress`, show it as it goes.

        On a terminal that is a bar, elsewhere plain lines on stderr. Raises ResultTimeoutError (the run goes on), RunError when
        nobody is planning the rest of it, or whatever error ended the planning.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with show_progress(enabled=progress) as show:
            while True:
                now = self.progress()
                show(now)
                if now.ended:
                    return now
                self._require_planner()
                if deadline is not None and time.monotonic() >= deadline:
                    raise ResultTimeoutError(f"the run at {self.uri} has not ended within {timeout} s; it goes on")
                time.sleep(POLL_SECONDS)

    def results(self) -> Iterator[dict[str, Any]]:
        """Rows `{id, input, output | error, …}` in source order, a part in memory at a time; waits for parts to come.

        Long arrays, which lie beside the line as artifacts, are fetched with their row.

        Raises RunError when the run was cancelled before all its parts were there.
        """
        index = 0
        while self._wait_for_part(index):
            for row in self._part(index):
                yield self._row(row)
            index += 1

    def _part(self, index: int) -> Iterator[dict[str, Any]]:
        """The rows of a part: lines as they come, of another format from the whole part."""
        uri, store = self._layout.part(index), self._client.store
        if self._plan.format == JsonLines.name:
            return map(json.loads, store.lines(uri))
        return part_format(self._plan.format).rows(store.get(uri))

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "output": resolve(row["output"], self._client.store.get)} if "output" in row else row

    def failures(self) -> Iterator[dict[str, Any]]:
        """The failed items so far, as manifest rows with an `error` of code, message and stage."""
        return map(json.loads, failed_lines(self._client.store, self._layout))

    @property
    def failures_uri(self) -> str:
        """The file that lists every failed item when the run has ended; a source for the next `map`."""
        return self._layout.failures

    def cancel(self) -> None:
        """Stop the run: what is queued is dropped, what is on a device is not written. `resume` takes it up again.

        Planning in this client stops as well, after the item that its source is at.
        """
        self.stop_planning()
        key = broker.run_key(self.id)
        self._client.store.put(self._layout.cancelled, b"{}")
        with broker.redis_errors(self._client.settings.redis_url):
            self._client.redis.hset(key, "cancelled", 1)
            self._client.redis.expire(key, int(self._client.settings.run_ttl))
            self._client.redis.publish(broker.CANCELLED_CHANNEL, self.id)

    def resume(self, *, model: str | None = None, revision: str | None = None) -> int:
        """Queue again every shard that no queue, worker or part accounts for; returns how many those were.

        Also finishes an interrupted planning, whose new shards are queued as they are written and do not count. The state is
        that of object storage, so a run whose Redis was emptied is finished as well. Raises RunError when the source was
        an iterable that ended with its client, or when another client goes on planning the run.

        With `model` (and `revision`), what is not done yet is moved to that model, which the fleet serves for the run's task
        (UnknownModelError where it does not): for a run whose own revision nobody serves any more.
        """
        pool = None if model is None else self._client.route(self._plan.task, model, revision)[1]
        if read_totals(self._client.store, self._layout) is not None:
            return 0
        self._move(pool)
        self._uncancel()
        self._planning_error = None
        self._refresh_plan()
        queued = 0
        if self._plan.shards is None and not self._go_on_planning():
            queued = self._resume_planning()
        return queued + self._queue_missing()

    def unserved(self) -> str | None:
        """One sentence with what to do, where no worker serves the revision that the run is for; None where one does."""
        return unserved(self._client, self._plan, self.uri)

    def _move(self, pool: Pool | None) -> None:
        """Move what is not done to `pool`, or keep a run that was moved before together."""
        if pool is not None:
            self._plan = move_run(self._client, self._layout, self._plan, pool)
        elif (moved := read_moved(self._client.store, self._layout)) is not None:
            self._plan = moved.applied(self._plan)
            take_back(self._client, moved, self.id)

    def start_planning(self, alive: AbstractContextManager[object]) -> None:
        """Plan the rest of the source in a thread that keeps the process alive until it is done, inside of `alive`."""
        name = f"pipefleet-plan-{self.id[:8]}"
        self._thread = threading.Thread(target=self._plan_rest, args=(alive,), name=name, daemon=False)
        self._thread.start()

    def stop_planning(self) -> None:
        """Let this client's planning end early. `resume` goes on with it."""
        if self._planner is not None:
            self._planner.stop()

    def join_planner(self) -> None:
        """Wait until the planning thread has ended."""
        if self._thread is not None:
            self._thread.join()

    def _plan_rest(self, alive: AbstractContextManager[object]) -> None:
        assert self._planner is not None
        try:
            with alive:
                if self._planner.continued:
                    self._queue_missing()  # first: planning waits where too many shards are not done
                if not self._planner.run():
                    return
            self._plan = self._planner.plan
            if self._planner.continued:
                self._queue_missing()
        except PipefleetError as error:
            self._planning_error = error
        except Exception as error:  # noqa: BLE001 - nobody else sees what ends this thread; shown by wait()
            self._planning_error = RunError(f"planning ended with {type(error).__name__}: {error}")

    def _raise_planning_error(self) -> None:
        if self._planning_error is not None:
            raise self._planning_error

    def _require_planner(self) -> None:
        if self._plan.shards is None and not self.planning and planner_alive(self._client, self._plan) is None:
            self._raise_planning_error()
            self._refresh_plan()
            if self._plan.shards is None:
                raise RunError(
                    f"the client that planned the run at {self.uri} stopped before the end of its source; "
                    f"go on with `pipefleet resume {self.uri}`"
                )

    def _refresh_plan(self) -> None:
        if self._plan.shards is None and not self.planning:
            self._plan = read_plan(self._client.store, self._layout)

    def _counts(self) -> tuple[int | None, bytes | None, int, int, int]:
        """Shards and mark of cancellation, each None where Redis does not know it; items done, items failed, parts."""
        pipe = self._client.redis.pipeline(transaction=False)
        pipe.hmget(broker.run_key(self.id), ["shards", "cancelled"])
        for bitmap in ("items", "failed", "parts"):
            pipe.bitcount(broker.run_key(self.id, bitmap))
        with broker.redis_errors(self._client.settings.redis_url):
            (shards, cancelled), done, failed, parts = pipe.execute()
        return None if shards is None else int(shards), cancelled, done, failed, parts

    def _wait_for_part(self, index: int) -> bool:
        """True when part `index` is there; False when the run has fewer parts."""
        while True:
            if self._client.store.head(self._layout.part(index)) is not None:
                return True
            now = self.progress()
            if self._plan.shards is not None and index >= self._plan.shards:
                return False
            if now.state == "cancelled":
                raise RunError(f"the run at {self.uri} was cancelled; go on with `pipefleet resume {self.uri}`")
            self._require_planner()
            time.sleep(POLL_SECONDS)

    def _uncancel(self) -> None:
        self._client.store.delete(self._layout.cancelled)
        with broker.redis_errors(self._client.settings.redis_url):
            self._client.redis.hdel(broker.run_key(self.id), "cancelled")
        self._cancelled_in_store = False

    def _go_on_planning(self) -> bool:
        """Go on with the planning of this client where it was stopped. False when it has none that could go on."""
        planner = self._planner
        if planner is None or not planner.usable:
            return False
        if planner.stopped:
            self.join_planner()
            if planner.usable and self._plan.shards is None:
                planner.go_on()
                self.start_planning(planner.alive())
        return planner.usable

    def _resume_planning(self) -> int:
        """Plan the rest of the source; returns how many of the shards that were there are queued again."""
        deadline = time.monotonic() + TAKE_OVER_SECONDS
        while planner_alive(self._client, self._plan) is not None:  # it may have died a moment ago
            if time.monotonic() >= deadline:
                raise RunError(f"another client plans the run at {self.uri}; see `pipefleet status {self.uri}`")
            time.sleep(POLL_SECONDS)
        self._refresh_plan()
        if self._plan.shards is not None:
            return 0
        if self._plan.source is None:
            raise RunError(
                f"the source of the run at {self.uri} was an iterable that ended with its client; "
                "call map again with the same arguments to go on"
            )
        queued = self._queue_missing()  # first: planning waits where too many shards are not done
        spec = task_spec(self._plan.task)
        preparer = self._client.preparer(spec)
        source = open_source(self._plan.source, spec, self._client.store, preparer, output=self.uri)
        self._planner = planner = Planner(self._client, self._layout, self._plan, source)
        with planner.alive():
            planner.run()
        self._plan = planner.plan
        return queued

    def _queue_missing(self) -> int:
        written = self._restore_progress()
        missing = self._missing_shards(written)
        self._client.publish((self._shard_message(index) for index in missing), self._plan.queue, Priority.LOW)
        if self._plan.shards is not None and len(written) >= self._plan.shards:
            finalise(self._client.store, self._layout, self._plan)
        return len(missing)

    def _restore_progress(self) -> set[int]:
        """Set the progress bits of every part that Redis does not know of; returns the shards that have a part."""
        redis, key = self._client.redis, broker.run_key(self.id, "parts")
        written: set[int] = set()
        if self._plan.shards is not None:
            with broker.redis_errors(self._client.settings.redis_url):
                remember_totals(redis, self._plan, ttl=self._client.settings.run_ttl)
        for entry in self._client.store.list(self._layout.parts):
            index = index_of(entry.key)
            if index is None:
                continue
            written.add(index)
            with broker.redis_errors(self._client.settings.redis_url):
                known = redis.getbit(key, index)
            if not known:
                self._restore_part(index)
        return written

    def _restore_part(self, index: int) -> None:
        positions = [decode_shard_line(line)[0] for line in self._client.store.lines(self._layout.shard(index))]
        rows = list(self._part(index))
        write_failed_rows(self._client.store, self._layout, index, rows)
        pipe = self._client.redis.pipeline(transaction=False)
        for position, row in zip(positions, rows, strict=True):
            pipe.setbit(broker.run_key(self.id, "items"), position, 1)
            pipe.setbit(broker.run_key(self.id, "failed"), position, int("error" in row))
        pipe.setbit(broker.run_key(self.id, "parts"), index, 1)
        with broker.redis_errors(self._client.settings.redis_url):
            pipe.execute()

    def _missing_shards(self, written: set[int]) -> list[int]:
        with broker.redis_errors(self._client.settings.redis_url):
            queued = set(broker.queued_ids(self._client.redis, self._plan.queue))
        every = range(self._planned_shards() if self._plan.shards is None else self._plan.shards)
        return [index for index in every if index not in written and shard_id(self.id, index) not in queued]

    def _planned_shards(self) -> int:
        """How many shards are there while the run is still being planned."""
        if self._planner is not None:
            return self._planner.shards
        return sum(index_of(entry.key) is not None for entry in self._client.store.list(self._layout.shards))

    def _shard_message(self, index: int) -> JobMessage:
        lines = list(self._client.store.lines(self._layout.shard(index)))
        first, _ = decode_shard_line(lines[0])
        return shard_message(self._plan, self._layout, index, first, len(lines))


def plan_run(client: Client, layout: RunLayout, plan: RunPlan, source: Any) -> Run:
    """Start a run: check the source, write the plan, queue the first shard; the rest goes on in a thread.

    When the first shard fails, nothing stays behind.
    """
    spec = task_spec(plan.task)
    opened = open_source(source, spec, client.store, client.preparer(spec), output=layout.uri)
    opened.check()
    client.ping()
    asked = replace(plan, source=opened.describe())
    plan = write_plan(client, layout, asked)
    planner = Planner(client, layout, plan, opened)
    run = Run(client, layout, plan, planner)
    with ExitStack() as alive:
        try:
            alive.enter_context(planner.alive())
            more = planner.step()
        except BaseException:
            if plan.id == asked.id:
                planner.undo()
            raise
        if more or planner.continued:
            run.start_planning(alive.pop_all())
        else:
            run._plan = planner.plan
    return run
