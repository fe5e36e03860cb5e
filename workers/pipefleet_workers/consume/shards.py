"""Shards of bulk runs: each has a thread that reads its items, sends them through the engine and writes its part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import orjson

from pipefleet.contract import JobItem, JobMessage, Priority, Shard
from pipefleet.errors import ContractError, ObjectMissingError, RunError
from pipefleet.finishing import finalise, write_failed_rows
from pipefleet.layout import RunLayout
from pipefleet.parts import part_format
from pipefleet.planner import decode_shard_line, read_plan
from pipefleet.records import JobFailure
from pipefleet.storage import StorageRef
from pipefleet_workers.consume.jobs import Jobs, Outlets, work_of
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.items import JobContext, Outcome, Work
from pipefleet_workers.stages.fetch import lies_under

PROGRESS_SECONDS = 0.25


class Shards:
    """Runs shards. Thread-safe. `run` raises DrainedError, ServiceUnavailableError or ContractError; then nothing was written."""

    def __init__(self, jobs: Jobs, outlets: Outlets) -> None:
        self._jobs = jobs
        self._outlets = outlets

    def run(self, message: JobMessage, shard: Shard, *, patient: bool = True) -> str:
        """Run a shard to its end; the state it reached."""
        items = self.open(message, shard)
        if items is None:
            return "ended before"
        refusal = self._jobs.refusal(message)
        outcomes = refused(message, items, refusal) if refusal else self.process(message, items, patient=patient)
        return self.close(shard, outcomes)

    def open(self, message: JobMessage, shard: Shard) -> list[JobItem] | None:
        """The items of a shard that is still to be done; None for one that was cancelled or whose part is there."""
        if not lies_under(shard.run_uri, self._outlets.allowed):
            raise ContractError(f"the output {shard.run_uri} lies outside what this worker may write")
        if self._outlets.reporter.run_cancelled(shard):
            return None
        layout = RunLayout(shard.run_uri, shard.format)
        require_format(shard)
        if self._outlets.store.exists(layout.part(shard.index)):
            self._end(shard, self._outlets.store.get(StorageRef(layout.part(shard.index))))
            return None
        return self.read(shard)

    def process(
        self,
        message: JobMessage,
        items: Sequence[JobItem],
        *,
        patient: bool = True,
        without: Mapping[int, JobFailure] | None = None,
        only: Sequence[int] | None = None,
    ) -> list[Outcome]:
        """The outcomes of items, in order: of all, or of those at the positions `only`; `without` have failed already."""
        without = without or {}
        positions = range(len(items)) if only is None else only
        sink = Outcomes(positions)
        context = self._jobs.begin(message, sink, priority=int(Priority.LOW), patient=patient)
        works = [work_of(context, position, items[position]) for position in positions]
        admitted: list[Work] = []
        try:
            for work in works:
                if work.position in without:
                    sink.deliver(Outcome(work, failure=without[work.position]))
            admitted = self._jobs.admit([work for work in works if work.position not in without], bulk=True)
            self._wait(sink, message.shard)
        finally:
            self._jobs.end(context)
            self._jobs.engine.release(admitted)
        return sink.in_order()

    def close(self, shard: Shard, outcomes: Sequence[Outcome]) -> str:
        """Write the part of a shard and, if it was the last one, the end of its run."""
        reporter = self._outlets.reporter
        if reporter.run_cancelled(shard):
            return "cancelled"
        reporter.progress(shard, outcomes)
        written = self._outlets.parts.write(shard, outcomes)
        if written is None:  # another worker's part was there first: what it says holds
            written = self._outlets.store.get(StorageRef(RunLayout(shard.run_uri, shard.format).part(shard.index)))
        self._end(shard, written)
        return "succeeded"

    def _end(self, shard: Shard, part: bytes) -> None:
        """The part is there, ours or another's: list its failures, note it, and end the run if it was the last."""
        layout, objects = RunLayout(shard.run_uri, shard.format), self._outlets.objects
        write_failed_rows(objects, layout, shard.index, part_format(shard.format).failed(part))
        if self._outlets.reporter.part_written(shard):
            finalise(objects, layout, read_plan(objects, layout), now=self._jobs.clock())

    def read(self, shard: Shard) -> list[JobItem]:
        """The items of a shard. Raises ContractError where they are not what the message says."""
        try:
            lines = self._outlets.store.get(StorageRef(shard.uri)).splitlines()
        except ObjectMissingError:
            raise ContractError(f"the shard {shard.uri} is not there; was the output of the run removed?") from None
        items = [decode_shard_line(line, orjson.loads)[1] for line in lines]
        if len(items) != shard.count:
            raise ContractError(f"the shard {shard.uri} has {len(items)} items instead of {shard.count}")
        return items

    def _wait(self, sink: Outcomes, shard: Shard | None) -> None:
        while not sink.complete:
            new = sink.wait(PROGRESS_SECONDS)
            if sink.abandoned is not None:
                raise sink.abandoned
            if shard is not None and not sink.complete:
                self._outlets.reporter.progress(shard, new)


def require_format(shard: Shard) -> None:
    """Raise ContractError where this worker cannot write the part of a shard."""
    try:
        part_format(shard.format).require()
    except RunError as error:
        raise ContractError(f"this worker cannot write its part: {error}") from None


def refused(message: JobMessage, items: Sequence[JobItem], failure: JobFailure) -> list[Outcome]:
    """The outcomes of a shard that this worker must not run."""
    context = JobContext(message.id, None, {}, int(Priority.LOW), None, Outcomes(()))
    return [Outcome(work_of(context, position, item), failure=failure) for position, item in enumerate(items)]
