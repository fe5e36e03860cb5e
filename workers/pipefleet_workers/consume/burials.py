"""After a dead letter: tells the waiting client that its job has failed, or tells the run that its shard has failed.

    dead letter ─▶ Redis: the job's record, or the run's refusals     at once, in the thread that keeps the leases
                └▶ S3: the refusal beside the run, the run's end      in a thread of its own

The ledger calls `Burials.letter` for each dead letter, the consumer for refused shards. If the second step fails, the next client
that looks at the run does this step.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.connection.wrong_type import is_wrong_type
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import Shard, is_id
from pipefleet.contract.records import JobFailure
from pipefleet.contract.uris import shard_fault
from pipefleet.errors import PipefleetError, ServiceUnavailableError
from pipefleet.patience import Patience
from pipefleet.queues.dead_letters import FOREIGN, DeadLetter
from pipefleet.runs.letters import read_content
from pipefleet.runs.planner import read_plan
from pipefleet.runs.refusals import Noted, Refusals, note
from pipefleet.service import Inbox, Service
from pipefleet.settings import Settings
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.results.reports import Reporter
from pipefleet_workers.storage.uri_gate import UriGate

log = logging.getLogger(__name__)
PATIENCE_SECONDS = 300.0
"""How long the thread keeps trying while Redis or S3 is away."""


class Burials:
    """Notes the dead letters of one queue. Thread-safe.

    Once a refused shard is noted, the thread that ends runs calls `on_refused` with the failure and the shard's number of items.
    This thread begins with the first refused shard, also after `stop`.
    """

    def __init__(
        self,
        settings: Settings,
        reporter: Reporter,
        *,
        queue: str,
        allowed: Sequence[str],
        on_refused: Callable[[JobFailure, int], None],
    ) -> None:
        self._settings = settings
        self._reporter = reporter
        self._queue = queue
        self._gate = UriGate(allowed, settings.store)
        self._on_refused = on_refused
        self._redis = connect(settings)
        self._store = ObjectStore()
        self._shards: Inbox[tuple[Shard, JobFailure, Noted]] = Inbox()
        self._service = Service("burials", self._follow, wake=self._shards.wake)

    def letter(self, letter: DeadLetter) -> None:
        """Tell the waiting client. Raises ServiceUnavailableError while Redis is away; the caller then calls again later.

        If another program has overwritten the record of the job or the run, no one can be told. This raises nothing: repeated calls
        for such letters would keep later letters back.
        """
        content, reason = read_content(letter), letter.reason.encode(errors="replace").decode()
        try:
            if content.shard is not None:
                if reason.startswith(FOREIGN):
                    return  # the run's own shard of this index is in another message, or does not exist
                code = letter.code if letter.code == "killed_worker" else "refused"
                self.shard(content.shard, JobFailure(code, reason, "consume"), letter.entry)
            elif letter.job_id is not None and is_id(letter.job_id):
                failure = JobFailure(letter.code, f"the job went to the dead letters: {reason}", "consume")
                self._reporter.bury(letter, failure, self._queue, content.reply)
        except UnicodeError:
            log.warning("nobody can wait for a job whose id has no UTF-8 form")
        except ServiceUnavailableError as error:
            if not is_wrong_type(error):
                raise
            log.error("nobody can be told of a dead letter: %s", error)

    def shard(self, shard: Shard, failure: JobFailure, letter: bytes = b"") -> None:
        """Note that no worker will run a shard. With `letter`: only as long as this dead letter exists.

        Raises ServiceUnavailableError.
        """
        if shard_fault(shard, self._settings.store) is not None:
            return  # the named run has another shard at this index
        with redis_errors(self._settings.redis_url):
            noted = note(self._redis, shard, failure, ttl=self._settings.run_ttl, queue=self._queue, letter=letter)
        if noted and self._gate.shard(shard) is None:
            self._shards.put((shard, failure, noted))
            self._service.start()

    def start(self) -> None:
        """Begin to end the runs of refused shards."""
        self._service.start()

    def stop(self, timeout: float | None = None) -> bool:
        """End the runs of noted shards (one try each while a service is away), then stop. Whether `timeout` seconds were enough."""
        return self._service.stop(timeout)

    def _follow(self, stopping: threading.Event) -> None:
        patience = Patience(stopping, seconds=PATIENCE_SECONDS)
        for shard, failure, noted in self._shards.each(stopping):
            try:
                count = patience.call(lambda shard=shard: self._end(shard))  # type: ignore[misc]
                if count and noted is Noted.NEW:
                    self._on_refused(failure, count)
            except PipefleetError as error:
                log.warning(
                    "shard %d of run %s was refused, and its run does not say so: %s", shard.index, shard.run_id, error
                )
            except Exception:
                log.exception("noting a refused shard failed")

    def _end(self, shard: Shard) -> int:
        """Note the refusal beside the run; end the run if this was its last shard.

        Returns how many items of the run the shard has.
        """
        plan = read_plan(self._store, RunLayout(shard.run_uri))
        layout = RunLayout(shard.run_uri, plan.format)
        if plan.id != shard.run_id:
            return 0
        refusals = Refusals(self._redis, self._settings, self._store, layout, plan.id)
        refusals.mark(shard.index)
        if plan.shards is not None and refusals.counts().complete:
            refusals.end(plan)
        return shard.count if plan.items is None else min(shard.count, max(0, plan.items - shard.first))
