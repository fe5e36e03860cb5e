"""Jobs that may have killed a worker run alone, and a shard among them is split until its killer item is known.

The search in a shard that was delivered too often:

1. The worker runs the shard item by item. Before each item it notes the item's position in Redis.
2. The worker dies. The position stays in Redis.
3. The next worker finds the position: this item is a culprit, and fails with the code `killed_worker`.
4. The next worker runs all other items as usual, in batches, but with no other job beside them.
5. If that worker dies as well, there is another culprit: the search begins again at 1, without the known culprits.

A living worker never convicts an item by its own note: it stopped at this item for another reason, such as an outage of Redis.
The consumer calls `Suspects.run`. It raises the errors of `Shards.run`.

A suspect is a message that was delivered often enough that it may have killed its workers. While a suspect waits, its delivery is
not counted; it counts only while the suspect runs. Otherwise one killer would raise the counts of all suspects that wait behind
it. Redis holds this number of deliveries (the fetch made it d):

    the suspect waits to run alone, also after it was postponed    d - 1        the worker may die of another suspect
    it runs alone                                                  d            the worker may die of it
    it has ended, but its ack is not written yet                   d - 1        then the entry is deleted
    it was given back, from any state                              d - 1
    its lease was lost                                             untouched    the next holder counts it

Each number is set, never added to: repeating a step, after an error or a lost answer, changes nothing.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipefleet.connection.errors import redis_errors
from pipefleet.connection.scripts import run_script
from pipefleet.contract.messages import JobItem, JobMessage, Shard
from pipefleet.contract.records import JobFailure
from pipefleet.errors import ContractError
from pipefleet.foreign import read_json
from pipefleet.queues.keys import run_key
from pipefleet.settings import Settings
from pipefleet_workers.consume.jobs import Jobs
from pipefleet_workers.consume.shards import Shards, refused
from pipefleet_workers.ending import Ending
from pipefleet_workers.items import Outcome

log = logging.getLogger(__name__)
CODE = "killed_worker"
MOST_OPENINGS = 3
"""How often workers may die while they read a shard's list of items, before an item has begun."""
_NOTE = """
redis.call('HDEL', KEYS[1], 'trying')
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
"""
"""KEYS: journal. ARGV: field, text, ttl. The first write takes no memory of a full server, see `pipefleet.contract.records`."""
_OPEN = """
redis.call('HDEL', KEYS[1], '')
local openings = redis.call('HINCRBY', KEYS[1], 'openings', 1)
redis.call('EXPIRE', KEYS[1], ARGV[1])
return openings
"""
"""KEYS: journal. ARGV: ttl. How often the list of items was opened, this time included."""
Bury = Callable[[str, JobMessage, int, JobItem], None]
"""Moves an item to the dead letters: reason, message, position in the shard, item."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The knowledge of earlier deliveries about a shard."""

    trying: int | None = None
    """Position of the item that was running when the worker died."""
    culprits: tuple[int, ...] = ()


class Journal:
    """The knowledge about one shard, in a Redis hash. Raises ServiceUnavailableError when Redis is away."""

    def __init__(self, redis: Any, settings: Settings, shard: Shard) -> None:
        self._redis = redis
        self._settings = settings
        self._count = shard.count
        self._key = run_key(shard.run_id, f"suspects:{shard.index}")

    def read(self, reader: str) -> Finding:
        """The finding. A note about a running item is left out if the process `reader` itself wrote it."""
        with redis_errors(self._settings.redis_url):
            raw = self._redis.hgetall(self._key)
        position, _, process = raw.get(b"trying", b"").decode(errors="replace").partition(":")
        found = [] if process == reader else self._positions([position])
        return Finding(found[0] if found else None, tuple(self._positions(_list(raw.get(b"culprits", b"[]")))))

    def _positions(self, values: Sequence[Any]) -> list[int]:
        """The values that are positions of the shard. Other values come from another program, and accuse no item."""
        found = [int(one) for one in values if re.fullmatch("[0-9]{1,9}", str(one), re.ASCII)]
        return [one for one in found if one < self._count]

    def convict(self, finding: Finding) -> Finding:
        """Note that the item that was running is a culprit."""
        assert finding.trying is not None
        found = Finding(None, tuple(sorted({*finding.culprits, finding.trying})))
        self._note("culprits", json.dumps(found.culprits))
        return found

    def opens(self) -> int:
        """Note that the list of items is read next. Returns how many such readings have begun without an end, this one included."""
        with redis_errors(self._settings.redis_url):
            return int(run_script(self._redis, _OPEN, [self._key], int(self._settings.run_ttl)))

    def opened(self) -> None:
        """Note that the list of items was read or given up, and the worker lives."""
        with redis_errors(self._settings.redis_url):
            self._redis.hdel(self._key, "openings")

    def tries(self, position: int, worker: str) -> None:
        """Note that the item at `position` begins in a process of this name."""
        self._note("trying", f"{position}:{worker}")

    def _note(self, field: str, text: str) -> None:
        with redis_errors(self._settings.redis_url):
            run_script(self._redis, _NOTE, [self._key], field, text, int(self._settings.run_ttl))

    def tried(self) -> None:
        """Note that the running item has ended or was given up, and the worker lives."""
        with redis_errors(self._settings.redis_url):
            self._redis.hdel(self._key, "trying")

    def forget(self) -> None:
        """Delete the notes: the shard has ended."""
        with redis_errors(self._settings.redis_url):
            self._redis.delete(self._key)


class Suspects:
    """Runs shards that were delivered too often. The caller has made sure that no other job runs."""

    def __init__(self, jobs: Jobs, shards: Shards, journal: Callable[[Shard], Journal], bury: Bury) -> None:
        self._jobs = jobs
        self._shards = shards
        self._journal = journal
        self._bury = bury
        self._name = uuid.uuid4().hex

    def run(self, message: JobMessage, shard: Shard) -> Ending:
        """Run one shard to its end; returns its ending. Raises the errors of `Shards.run`."""
        journal = self._journal(shard)
        finding = journal.read(self._name)
        if journal.opens() > MOST_OPENINGS:
            journal.forget()
            raise ContractError(f"workers died {MOST_OPENINGS} times while they read the list of its items")
        try:
            contents = self._shards.open(message, shard)
        finally:
            journal.opened()
        if contents is None:
            self._settle(journal, finding, message, shard)
            return self._shards.ended_before(shard)
        items = contents.items
        refusal = self._jobs.refusal(message)
        if refusal is not None:
            return self._shards.close(shard, refused(message, items, refusal))
        convicted = finding.trying is not None
        if convicted:
            finding = journal.convict(finding)
            log.warning("item %d of shard %d kills its workers", finding.culprits[-1], shard.index)
        failures = {**contents.failures, **dict.fromkeys(finding.culprits, _FAILURE)}
        if convicted:
            outcomes = self._shards.process(message, items, without=failures)
        else:
            outcomes = self._one_by_one(message, items, journal, failures)
        ending = self._shards.close(shard, outcomes)
        self._settle(journal, finding, message, shard)
        return ending

    def _settle(self, journal: Journal, finding: Finding, message: JobMessage, shard: Shard) -> None:
        """After the shard has ended: write a dead letter for each culprit; twice only if this process dies in here."""
        items = self._shards.read(shard).items if finding.culprits else []
        for position in finding.culprits:
            self._bury(_FAILURE.message, message, position, items[position])
        journal.forget()

    def _one_by_one(
        self, message: JobMessage, items: list[JobItem], journal: Journal, failures: Mapping[int, JobFailure]
    ) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for position in range(len(items)):
            if position not in failures:
                journal.tries(position, self._name)
            try:
                outcomes += self._shards.process(message, items, without=failures, only=[position])
            finally:
                journal.tried()
        return outcomes


def _list(raw: bytes) -> Sequence[Any]:
    try:
        found = read_json(raw)
    except ValueError:
        return []
    return found if isinstance(found, list) else []


_FAILURE = JobFailure(
    CODE, "workers died with the shard of this item again and again, at last with this item alone", "forward"
)
