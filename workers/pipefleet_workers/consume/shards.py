"""Shards of bulk runs. A thread of the consumer reads the items of a shard, sends them through the engine and writes its part.

The consumer calls `run`, `Suspects` the single steps. The class names the errors; each decides how the delivery ends.

open: gate, plan, cancelled?, part there? ─▶ read ─▶ process ─▶ close: part ─▶ progress ─▶ the run's end, if it was the last
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import MAX_SHARD_BYTES, MAX_SHARD_ITEMS, JobItem, JobMessage, JobState, Priority, Shard
from pipefleet.contract.parts import MAX_PART_BYTES, part_format
from pipefleet.contract.records import JobFailure
from pipefleet.contract.references import StorageRef
from pipefleet.contract.shards import decode_shard_line
from pipefleet.contract.uris import shown
from pipefleet.errors import ContractError, ObjectMissingError, RunError
from pipefleet.runs.finishing import write_failed_rows
from pipefleet.runs.planner import read_plan
from pipefleet_workers.consume.held import DrainedError
from pipefleet_workers.consume.jobs import Jobs, Outlets, work_of
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.consume.run_plans import RunPlans
from pipefleet_workers.consume.tally import Tally
from pipefleet_workers.ending import SHARD_CANCELLED, Ending, before, shard_ending
from pipefleet_workers.items import JobContext, Outcome, Work
from pipefleet_workers.storage.store import ObjectTooLargeError
from pipefleet_workers.storage.uri_gate import UriGate

PROGRESS_SECONDS = 0.25
ADMITTED_AT_ONCE = 128
"""Number of items that enter before the shard checks which items have ended."""
HAND_OVER_PAUSE = 1.0
"""A shard that another worker can do is held for these seconds before it goes back.

Else this worker would take it again at once.
"""
HAND_OVER_SECONDS = 600.0
"""How long a shard is handed back before it is refused: workers that could do it may exist but never take it."""


class ElsewhereError(DrainedError):
    """Another worker of the pool can do this shard, and this worker cannot: the message goes back."""


class Contents(NamedTuple):
    """The contents of a shard: its items in order, and by position the failures of items that could not be prepared."""

    items: list[JobItem]
    failures: dict[int, JobFailure]


class Shards:
    """Runs shards. Thread-safe. `run` raises DrainedError, RevokedError, ServiceUnavailableError or ContractError.

    `elsewhere` says whether another live worker of the pool can write parts in a format.
    """

    def __init__(
        self, jobs: Jobs, outlets: Outlets, tally: Tally, *, elsewhere: Callable[[str], bool] = lambda _: False
    ) -> None:
        self._jobs = jobs
        self._outlets = outlets
        self._tally = tally
        self._elsewhere = elsewhere
        self._handed_over: dict[str, float] = {}
        self._plans = RunPlans()

    def run(self, message: JobMessage, shard: Shard, *, patient: bool = True) -> Ending:
        """Run a shard to its end; returns its ending."""
        contents = self.open(message, shard)
        if contents is None:
            return self.ended_before(shard)
        items, failures = contents
        refusal = self._jobs.refusal(message)
        if refusal is not None:
            return self.close(shard, refused(message, items, refusal))
        return self.close(shard, self.process(message, items, patient=patient, without=failures))

    def open(self, message: JobMessage, shard: Shard) -> Contents | None:
        """The items of a shard that must still run; None if the shard was cancelled or its part exists.

        Raises ContractError for a shard that does not belong to its run, before anything is read or written for it.
        """
        outlets = self._outlets
        UriGate(outlets.allowed, outlets.reporter.store_uri).require_shard(shard)
        self._plans.require(message, shard, outlets.store)
        if self._outlets.reporter.run_cancelled(shard):
            return None
        layout = RunLayout(shard.run_uri, shard.format)
        self._require_format(message.id, shard)
        if self._outlets.store.exists(layout.part(shard.index)):
            self._end(shard, self._part(shard))
            return None
        return self.read(shard)

    def ended_before(self, shard: Shard) -> Ending:
        """The ending of a shard for which `open` returned None."""
        cancelled = self._outlets.reporter.run_cancelled(shard)
        return before(JobState.CANCELLED if cancelled else JobState.SUCCEEDED)

    def process(
        self,
        message: JobMessage,
        items: Sequence[JobItem],
        *,
        patient: bool = True,
        without: Mapping[int, JobFailure] | None = None,
        only: Sequence[int] | None = None,
    ) -> list[Outcome]:
        """The outcomes of items, in order: of all items, or only of the items at the positions `only`.

        Items in `without` have failed already.
        """
        without = without or {}
        positions = range(len(items)) if only is None else only
        sink = Outcomes(positions)
        context = self._jobs.begin(message, sink, priority=int(Priority.LOW), patient=patient)
        works = [work_of(context, position, items[position]) for position in positions]
        try:
            for work in works:
                if work.position in without:
                    sink.deliver(Outcome(work, failure=without[work.position]))
            self._admit([work for work in works if work.position not in without], sink, message.shard)
            self._wait(sink, message.shard)
        except Exception as error:
            context.give_back(error)  # remaining items in the engine would only slow the next try
            raise
        finally:
            self._jobs.end(context)
        return sink.in_order()

    def close(self, shard: Shard, outcomes: Sequence[Outcome]) -> Ending:
        """Write the part of a shard; if it was the last shard, also the end of its run. Returns the shard's ending."""
        reporter = self._outlets.reporter
        if reporter.run_cancelled(shard):
            self._tally.cancelled(len(outcomes))
            return SHARD_CANCELLED
        reporter.progress(shard, outcomes)
        ending = shard_ending(outcomes)
        written = self._outlets.parts.write(shard, outcomes)
        if written is None:  # another worker's part was there first, and is the valid one
            written = self._part(shard)
            ending = before(JobState.SUCCEEDED)
        else:
            self._tally.items(outcomes)
        self._end(shard, written)
        return ending

    def _part(self, shard: Shard) -> bytes:
        """The part at the shard's place, usually another worker's. Raises ContractError if it has more than MAX_PART_BYTES."""
        uri = RunLayout(shard.run_uri, shard.format).part(shard.index)
        try:
            return self._outlets.store.get(StorageRef(uri), max_bytes=MAX_PART_BYTES)
        except ObjectTooLargeError as error:
            raise ContractError(f"the part of the shard cannot be read: {error}") from None

    def _end(self, shard: Shard, part: bytes) -> None:
        """After the part exists, ours or another worker's: list its failures, note it, and end the run if it was the last part."""
        layout, objects = RunLayout(shard.run_uri, shard.format), self._outlets.objects
        failed = part_format(shard.format).failed(part)
        write_failed_rows(objects, layout, shard.index, failed)
        if self._outlets.reporter.part_written(shard):
            self._outlets.reporter.refusals(objects, layout, shard.run_id).end(read_plan(objects, layout))

    def _require_format(self, job_id: str, shard: Shard) -> None:
        """Raise an error if this worker cannot write the part of the shard.

        ElsewhereError while another worker takes the shard; ContractError otherwise.
        """
        try:
            require_format(shard)
        except ContractError:
            now = time.monotonic()
            if len(self._handed_over) > 10_000:  # shards that another worker took never come back here
                self._handed_over.clear()
            since = self._handed_over.setdefault(job_id, now)
            if now - since < HAND_OVER_SECONDS and self._elsewhere(shard.format):
                time.sleep(HAND_OVER_PAUSE)
                raise ElsewhereError from None
            self._handed_over.pop(job_id, None)
            raise

    def read(self, shard: Shard) -> Contents:
        """The items of a shard. Raises ContractError when they differ from the message, or are more than MAX_SHARD_ITEMS."""
        if shard.count > MAX_SHARD_ITEMS:
            raise ContractError(
                f"the shard {shown(shard.uri)} has {shard.count} items, a worker takes {MAX_SHARD_ITEMS}; "
                "run the source again with a smaller shard_size"
            )
        try:
            body = self._outlets.store.get(StorageRef(shard.uri), max_bytes=MAX_SHARD_BYTES)
        except ObjectMissingError:
            text = f"the shard {shown(shard.uri)} is not there; was the output of the run removed?"
            raise ContractError(text) from None
        except ObjectTooLargeError as error:
            raise ContractError(f"the shard cannot be read: {error}") from None
        decoded = _decoded(shard, body)
        failures = {place: failure for place, (_, _, failure) in enumerate(decoded) if failure is not None}
        return Contents([item for _, item, _ in decoded], failures)

    def _admit(self, works: Sequence[Work], sink: Outcomes, shard: Shard | None) -> None:
        """Send items in while there is room, and report ended items meanwhile: a shard may be larger than the worker."""
        told = time.monotonic()
        with self._jobs.turn:
            for start in range(0, len(works), ADMITTED_AT_ONCE):
                self._jobs.admit(works[start : start + ADMITTED_AT_ONCE], bulk=True)
                if time.monotonic() - told >= PROGRESS_SECONDS:
                    self._tell(sink, shard, 0.0)
                    told = time.monotonic()

    def _wait(self, sink: Outcomes, shard: Shard | None) -> None:
        while not sink.complete:
            self._tell(sink, shard, PROGRESS_SECONDS)

    def _tell(self, sink: Outcomes, shard: Shard | None, seconds: float) -> None:
        """Wait for outcomes, and report the new ones. Raises the reason if the shard was given back."""
        new = sink.wait(seconds)
        if sink.abandoned is not None:
            raise sink.abandoned
        if shard is not None and not sink.complete:
            self._outlets.reporter.progress(shard, new)


def _loads(line: bytes) -> Any:
    """Parse JSON as fast as possible.

    orjson refuses integers beyond the doubles, but a producer may write them; only one item may fail.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)


def _decoded(shard: Shard, body: bytes) -> list[tuple[int, JobItem, JobFailure | None]]:
    """The lines of a shard. Their number and positions must agree with the message. Raises ContractError."""
    body = body.removesuffix(b"\n")
    count = body.count(b"\n") + 1  # counted before an object for each line takes memory
    if count != shard.count:
        raise ContractError(f"the shard {shown(shard.uri)} has {count} items instead of {shard.count}")
    decoded = []
    for position, line in enumerate(body.split(b"\n"), start=shard.first):
        try:
            decoded.append(decode_shard_line(line, _loads))
        except (ContractError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise ContractError(f"the shard {shown(shard.uri)} lists no item at position {position}") from None
        if decoded[-1][0] != position:
            raise ContractError(f"the shard {shown(shard.uri)} lists another item than that of position {position}")
    return decoded


def require_format(shard: Shard) -> None:
    """Raise ContractError if this worker cannot write the part of a shard."""
    try:
        part_format(shard.format).require()
    except RunError as error:
        raise ContractError(f"this worker cannot write its part: {error}") from None


def refused(message: JobMessage, items: Sequence[JobItem], failure: JobFailure) -> list[Outcome]:
    """The outcomes of a shard that this worker must not run."""
    context = JobContext(message.id, None, {}, int(Priority.LOW), None, Outcomes(()))
    return [Outcome(work_of(context, position, item), failure=failure) for position, item in enumerate(items)]
