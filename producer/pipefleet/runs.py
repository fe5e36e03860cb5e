"""A bulk run as the producer sees it: progress, waiting, results, failures, cancel, resume.

Object storage is the truth: a run can be opened from its URI alone, and finished after Redis was emptied. Redis only makes
progress cheap to read.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipefleet import broker
from pipefleet.contract import JobMessage, Priority, encode_json
from pipefleet.errors import PipefleetError, ResultTimeoutError, RunError
from pipefleet.layout import RunLayout, RunPlan, index_of
from pipefleet.objects import ObjectMissingError, ObjectStore
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
from pipefleet.progress import show_progress
from pipefleet.sources import open_source
from pipefleet.tasks import task_spec

if TYPE_CHECKING:
    from pipefleet.client import Client

POLL_SECONDS = 0.25
LOOK_AT_STORE_SECONDS = 5.0
"""How often a waiting client looks for the end of the run in object storage, whatever Redis says."""


@dataclass(frozen=True, slots=True)
class RunProgress:
    """How far a run is. `state` is planning, running, succeeded, partial (ended, some items failed) or cancelled.

    `items` counts what is known of the source so far; `succeeded + failed` of them have ended. `seconds` since the start.
    """

    uri: str
    state: str
    items: int
    succeeded: int
    failed: int
    shards: int
    parts: int
    seconds: float

    @property
    def ended(self) -> bool:
        """True when nothing will change any more."""
        return self.state in ("succeeded", "partial", "cancelled")

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        names = ("uri", "state", "items", "succeeded", "failed", "shards", "parts", "seconds")
        return {name: getattr(self, name) for name in names}


class Run:
    """One bulk run. Thread-safe. Made by `Client.map` and `Client.run`."""

    def __init__(self, client: Client, layout: RunLayout, plan: RunPlan, planner: Planner | None = None) -> None:
        self._client = client
        self._layout = layout
        self._plan = plan
        self._planner = planner
        self._thread: threading.Thread | None = None
        self._planning_error: PipefleetError | None = None

    @classmethod
    def open(cls, client: Client, layout: RunLayout) -> Run:
        """The run at a URI. Raises RunError where there is none."""
        return cls(client, layout, read_plan(client.store, layout))

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

    def progress(self) -> RunProgress:
        """How far the run is, from Redis; from object storage once it has ended. Raises what planning raised."""
        self._raise_planning_error()
        ended = read_totals(self._client.store, self._layout)
        if ended is not None:
            return ended
        self._refresh_plan()
        shards, cancelled, done, failed, parts = self._counts()
        total = self._plan.items if self._plan.items is not None else planner_alive(self._client, self._plan)
        state = "cancelled" if cancelled else "running" if self._plan.shards is not None else "planning"
        seconds = time.time() - self._plan.created
        progress = RunProgress(self.uri, state, total or done, done - failed, failed, shards, parts, seconds)
        if not cancelled and self._plan.shards is not None and parts >= self._plan.shards:
            return finalise(self._client.store, self._layout, self._plan)
        return progress

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

        Raises RunError when the run was cancelled before all its parts were there.
        """
        index = 0
        while self._wait_for_part(index):
            for line in self._client.store.lines(self._layout.part(index)):
                yield json.loads(line)
            index += 1

    def failures(self) -> Iterator[dict[str, Any]]:
        """The failed items so far, as manifest rows with an `error` of code, message and stage."""
        for entry in self._client.store.list(self._layout.failed):
            index = index_of(entry.key)
            if index is not None:
                for line in self._client.store.lines(self._layout.failed_shard(index)):
                    yield json.loads(line)

    @property
    def failures_uri(self) -> str:
        """The file that lists every failed item when the run has ended; a source for the next `map`."""
        return self._layout.failures

    def cancel(self) -> None:
        """Stop the run: what is queued is dropped, what is on a device is not written. `resume` takes it up again."""
        self._client.store.put(self._layout.cancelled, b"{}")
        with broker.redis_errors(self._client.settings.redis_url):
            self._client.redis.hset(broker.run_key(self.id), "cancelled", 1)
            self._client.redis.publish(broker.CANCELLED_CHANNEL, self.id)

    def resume(self) -> int:
        """Queue every shard that no queue, worker or part accounts for; returns how many those were.

        Also finishes an interrupted planning, and a run whose Redis was emptied. Raises RunError when the source was an
        iterable that ended with its client.
        """
        if read_totals(self._client.store, self._layout) is not None:
            return 0
        self._uncancel()
        self._refresh_plan()
        if self._plan.shards is None:
            self._resume_planning()
        return self._queue_missing()

    def start_planning(self) -> None:
        """Plan the rest of the source in a thread that keeps the process alive until it is done."""
        self._thread = threading.Thread(target=self._plan_rest, name=f"pipefleet-plan-{self.id[:8]}", daemon=False)
        self._thread.start()

    def join_planner(self) -> None:
        """Wait until the planning thread has ended."""
        if self._thread is not None:
            self._thread.join()

    def _plan_rest(self) -> None:
        assert self._planner is not None
        try:
            self._planner.run()
            self._plan = self._planner.plan
            if self._planner.continued:
                self._queue_missing()
        except PipefleetError as error:
            self._planning_error = error
        except Exception as error:  # noqa: BLE001 - raised by the user's own iterable; shown by wait()
            self._planning_error = RunError(f"the source raised {type(error).__name__}: {error}")

    def _raise_planning_error(self) -> None:
        if self._planning_error is not None:
            raise self._planning_error

    def _require_planner(self) -> None:
        alive = self._thread is not None and self._thread.is_alive()
        if self._plan.shards is None and not alive and planner_alive(self._client, self._plan) is None:
            self._raise_planning_error()
            self._refresh_plan()
            if self._plan.shards is None:
                raise RunError(
                    f"the client that planned the run at {self.uri} stopped before the end of its source; "
                    f"go on with `pipefleet resume {self.uri}`"
                )

    def _refresh_plan(self) -> None:
        if self._plan.shards is None and self._thread is None:
            self._plan = read_plan(self._client.store, self._layout)

    def _counts(self) -> tuple[int, bool, int, int, int]:
        pipe = self._client.redis.pipeline(transaction=False)
        pipe.hmget(broker.run_key(self.id), ["shards", "cancelled"])
        for bitmap in ("items", "failed", "parts"):
            pipe.bitcount(broker.run_key(self.id, bitmap))
        with broker.redis_errors(self._client.settings.redis_url):
            (shards, cancelled), done, failed, parts = pipe.execute()
        return self._plan.shards or int(shards or 0), bool(cancelled), done, failed, parts

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

    def _resume_planning(self) -> None:
        while planner_alive(self._client, self._plan) is not None:
            time.sleep(POLL_SECONDS)  # another client plans, or one that died did so a moment ago
        self._refresh_plan()
        if self._plan.shards is not None:
            return
        if self._plan.source is None:
            raise RunError(
                f"the source of the run at {self.uri} was an iterable that ended with its client; "
                "call map again with the same arguments to go on"
            )
        spec = task_spec(self._plan.task)
        preparer = self._client.preparer(spec)
        source = open_source(self._plan.source, spec, self._client.store, preparer, output=self.uri)
        self._planner = Planner(self._client, self._layout, self._plan, source)
        self._planner.run()
        self._plan = self._planner.plan

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
        rows = [json.loads(line) for line in self._client.store.lines(self._layout.part(index))]
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
        every = range(self._plan.shards or 0)
        return [index for index in every if index not in written and shard_id(self.id, index) not in queued]

    def _shard_message(self, index: int) -> JobMessage:
        lines = list(self._client.store.lines(self._layout.shard(index)))
        first, _ = decode_shard_line(lines[0])
        return shard_message(self._plan, self._layout, index, first, len(lines))


def plan_run(client: Client, layout: RunLayout, plan: RunPlan, source: Any) -> Run:
    """Start a run: check the source, write the plan, queue the first shard; the rest goes on in a thread."""
    spec = task_spec(plan.task)
    opened = open_source(source, spec, client.store, client.preparer(spec), output=layout.uri)
    opened.check()
    plan = write_plan(client, layout, replace(plan, source=opened.describe()))
    planner = Planner(client, layout, plan, opened)
    run = Run(client, layout, plan, planner)
    try:
        more = planner.step()
    except PipefleetError:
        if not planner.shards:
            with suppress(PipefleetError):  # nothing was planned, so the same call may be made again
                client.store.delete(layout.plan)
        raise
    if more or planner.continued:
        run.start_planning()
    else:
        run._plan = planner.plan
    return run


def read_totals(store: ObjectStore, layout: RunLayout) -> RunProgress | None:
    """The progress of a run that has ended, from `_SUCCESS`; None while it has not."""
    try:
        totals = json.loads(store.get(layout.success))
    except ObjectMissingError:
        return None
    return RunProgress(uri=layout.uri, **totals)


def finalise(store: ObjectStore, layout: RunLayout, plan: RunPlan) -> RunProgress:
    """Gather the failed items and write `_SUCCESS`, when every part is there. Safe to call twice and at the same time."""
    failed = _gather_failures(store, layout)
    totals = RunProgress(
        uri=layout.uri,
        state="partial" if failed else "succeeded",
        items=plan.items or 0,
        succeeded=(plan.items or 0) - failed,
        failed=failed,
        shards=plan.shards or 0,
        parts=plan.shards or 0,
        seconds=round(time.time() - plan.created, 3),
    )
    body = {name: value for name, value in totals.to_json().items() if name != "uri"}
    store.put_new(layout.success, encode_json(body).encode())
    return read_totals(store, layout) or totals


def write_failed_rows(store: ObjectStore, layout: RunLayout, index: int, rows: list[dict[str, Any]]) -> None:
    """Write the failed rows of a part as manifest lines. Derived from the part alone, so writing twice is harmless."""
    lines = [encode_json(_manifest_row(row)) for row in rows if "error" in row]
    if lines:
        body = ("\n".join(lines) + "\n").encode()
        store.put(layout.failed_shard(index), body, content_type="application/x-ndjson")


def _manifest_row(row: dict[str, Any]) -> dict[str, Any]:
    parameters = {"parameters": row["parameters"]} if row.get("parameters") else {}
    return {"id": row["id"], "inputs": row["input"], **parameters, "error": row["error"]}


def _gather_failures(store: ObjectStore, layout: RunLayout) -> int:
    """Join the failed items of all shards into one file; returns how many there are."""
    count = 0
    with tempfile.TemporaryFile() as gathered:
        for entry in store.list(layout.failed):
            for line in store.lines(f"s3://{layout.uri.split('/')[2]}/{entry.key}"):
                gathered.write(line + b"\n")
                count += 1
        if count:
            gathered.seek(0)
            store.upload(layout.failures, gathered, content_type="application/x-ndjson")
    return count
