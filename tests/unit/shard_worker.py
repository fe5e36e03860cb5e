"""A worker's part in a run, without a model: it takes shards from the queue, ends them, and puts them to the dead letters."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from pipefleet.client import Client
from pipefleet.contract.messages import JobItem, JobMessage, decode_message
from pipefleet.contract.records import JobFailure
from pipefleet.queues import dead_letters
from pipefleet.queues.keys import ledger_keys, queue_lists
from pipefleet.queues.revision_notes import queues_of
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.consume.burials import Burials
from pipefleet_workers.consume.jobs import Outlets, work_of
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.consume.shards import Shards
from pipefleet_workers.consume.tally import Tally
from pipefleet_workers.items import JobContext, Outcome
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.observe.totals import WorkCount
from pipefleet_workers.results.lines import PartWriter
from pipefleet_workers.results.reports import Reporter
from pipefleet_workers.storage.store import WorkerStore

BAD = JobFailure("bad_input", "it is bad", "decode")


class ShardWorker:
    """Ends the shards of one pool as the consumer does, but with outcomes of the test's own."""

    def __init__(self, client: Client, queue: str, allowed: tuple[str, ...] = ("s3://",)) -> None:
        self.client, self.queue = client, queue
        store = WorkerStore()
        self.reporter = Reporter(client.redis, store, client.settings, worker="test")
        outlets = Outlets(store, ObjectStore(), PartWriter(store, {"model": "test"}), self.reporter, allowed)
        self.metrics = Metrics("pool")
        tally = Tally(self.metrics, WorkCount())
        self.shards = Shards(None, outlets, tally)  # type: ignore[arg-type]  # nothing enters an engine here
        on_refused = tally.refused
        self.burials = Burials(client.settings, self.reporter, queue=queue, allowed=allowed, on_refused=on_refused)

    def lists(self) -> list[str]:
        """The Redis lists in which messages of the pool wait, of whichever revision."""
        return [name for queue in queues_of(self.client.redis, self.queue) for name in queue_lists(queue)]

    def take(self, *indexes: int) -> dict[int, str]:
        """Take messages of shards out of the queue: all, or those of `indexes`; their texts by index."""
        taken = {}
        for name in self.lists():
            for raw in self.client.redis.lrange(name, 0, -1):  # type: ignore[union-attr]
                shard = read(raw.decode()).shard
                if shard is not None and (not indexes or shard.index in indexes):
                    assert self.client.redis.lrem(name, 1, raw)
                    taken[shard.index] = raw.decode()
        return taken

    def do(self, text: str, bad: Collection[int] = ()) -> str | None:
        """Run the shard of a message; the items at the positions `bad` fail. The state it reached, None if it was done before."""
        message = read(text)
        assert message.shard is not None
        contents = self.shards.open(message, message.shard)
        if contents is None:
            return None
        return self.shards.close(message.shard, outcomes(message, contents.items, bad)).state

    def bury(self, text: str, reason: str = "it is refused", deliveries: int = 1) -> dead_letters.DeadLetter:
        """Put a message to the dead letters that nobody was told of."""
        queue = json.loads(text)["properties"].get("delivery_info", {}).get("routing_key", self.queue)
        entry = {"reason": reason, "at": 1.0, "queue": queue, "deliveries": deliveries, "message": text}
        key = ledger_keys(self.queue)["unreported_key"]
        letter = dead_letters.DeadLetter.parse(json.dumps(entry).encode())
        self.client.redis.lpush(key, letter.entry)
        return letter

    def tell(self, letter: dead_letters.DeadLetter) -> None:
        """Tell of a dead letter as the lease transport does, and file it."""
        keys = ledger_keys(self.queue)
        self.burials.letter(letter)
        if self.client.redis.lrem(keys["unreported_key"], 1, letter.entry):  # type: ignore[arg-type]
            self.client.redis.lpush(keys["dead_key"], letter.entry)

    def refuse(self, text: str, reason: str = "it is refused") -> dead_letters.DeadLetter:
        """Put a message to the dead letters, with all that follows at once."""
        letter = self.bury(text, reason)
        self.tell(letter)
        return letter


def read(text: str) -> JobMessage:
    """The job in a message as it lies in a queue."""
    return decode_message(json.loads(json.loads(text)["body"])[0][0])


def outcomes(message: JobMessage, items: list[JobItem], bad: Collection[int]) -> list[Outcome]:
    """An output for each item, a failure for those at the positions `bad` of the run."""
    context = JobContext(message.id, None, {}, 9, None, Outcomes(()))
    assert message.shard is not None
    ended: list[Any] = []
    for place, item in enumerate(items):
        failure = BAD if message.shard.first + place in bad else None
        ended.append(Outcome(work_of(context, place, item), output=item.inputs, failure=failure))
    return ended
