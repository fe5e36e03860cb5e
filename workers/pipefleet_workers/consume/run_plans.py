"""Compares a shard with the plan of its run in object storage. A plan is read once for each run.

`Shards.open` asks before it reads or writes anything. A shard outside its run raises ContractError.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import JobMessage, Shard
from pipefleet.contract.references import StorageRef
from pipefleet.contract.uris import shown
from pipefleet.errors import ContractError, InputError, ObjectMissingError
from pipefleet.queues.dead_letters import FOREIGN
from pipefleet_workers.storage.store import ObjectTooLargeError, WorkerStore

MAX_PLAN_BYTES = 1 << 20
"""Most bytes of a plan: it holds the parameters of a message, and little else."""
MOST_KNOWN = 256
"""Number of plans that are remembered."""
PLANNING_SECONDS = 10.0
"""How long a plan without totals is used before it is read again: its run is still being planned, and has no bound yet."""


@dataclass(frozen=True, slots=True)
class _Plan:
    id: str
    shards: int | None
    items: int | None
    format: str
    read_at: float
    job: Mapping[str, str]
    """The fields that the messages of its shards must have, each as JSON."""
    moved: bool
    """Whether the run was moved to another model; messages that name any of its models may still exist."""

    def fault(self, message: JobMessage, shard: Shard) -> str | None:
        if self.id != shard.run_id:
            return f"there is another run at {shown(shard.run_uri)} now"
        if self.format != shard.format:
            return f"the run at {shown(shard.run_uri)} has parts of another format"
        if self.shards is not None and shard.index >= self.shards:
            return f"the run at {shown(shard.run_uri)} has {self.shards} shards, and none with the index {shard.index}"
        if self.items is not None and shard.first + shard.count > self.items:
            return f"the run at {shown(shard.run_uri)} has {self.items} items, and shard {shard.index} lies beyond them"
        others = [name for name in self.job if _text(getattr(message, name)) != self.job[name]]
        if others and not (self.moved and set(others) <= {"model", "revision"}):
            return f"the run at {shown(shard.run_uri)} has another {others[0]}"
        return None


class RunPlans:
    """Compares shards with the plans of their runs. Thread-safe. `clock` gives monotonic seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: OrderedDict[str, _Plan] = OrderedDict()
        self._lock = threading.Lock()

    def require(self, message: JobMessage, shard: Shard, store: WorkerStore) -> None:
        """Raise ContractError for a shard that lies outside its run, ServiceUnavailableError when the store is away.

        A message with other parameters than its run raises ContractError too: its items would fail, or have other results.

        A remembered plan may accept a shard, never refuse it. Before a refusal the plan is read again, since another run may have
        begun at the same place.
        """
        with self._lock:
            known = self._known.get(shard.run_uri)
        if known is not None and self._holds(known) and known.fault(message, shard) is None:
            return
        plan = self._read(RunLayout(shard.run_uri), store)
        with self._lock:
            self._known[shard.run_uri] = plan
            self._known.move_to_end(shard.run_uri)
            while len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        fault = plan.fault(message, shard)
        if fault is not None:
            raise ContractError(FOREIGN + fault)

    def _holds(self, plan: _Plan) -> bool:
        return plan.shards is not None or self._clock() - plan.read_at < PLANNING_SECONDS

    def _read(self, layout: RunLayout, store: WorkerStore) -> _Plan:
        begin = self._clock()
        for uri in (layout.run, layout.plan):
            try:
                body = store.get(StorageRef(uri), max_bytes=MAX_PLAN_BYTES)
                return _parsed(body, uri, begin, moved=store.exists(layout.moved))
            except ObjectMissingError:
                continue
            except (ObjectTooLargeError, InputError) as error:
                raise ContractError(f"the plan of the run cannot be read: {error}") from None
        raise ContractError(f"there is no run at {shown(layout.uri)}; was its output removed?")


def _parsed(text: bytes, uri: str, read_at: float, *, moved: bool) -> _Plan:
    try:
        body: Any = json.loads(text)
        shards, items = body.get("shards"), body.get("items")
        if all(isinstance(body[name], str) for name in ("id", "format")) and all(
            one is None or type(one) is int for one in (shards, items)
        ):
            job = {name: body[name] for name in ("task", "model", "revision", "parameters")}
            wanted = {name: _text(value) for name, value in {**job, "output": None, "deadline": None}.items()}
            return _Plan(body["id"], shards, items, body["format"], read_at, wanted, moved)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ContractError(f"{shown(uri)} is not the plan of a run")


def _text(value: Any) -> str:
    """A JSON value as a text that distinguishes `1` from `true`: a worker may refuse one of them."""
    try:
        return json.dumps(value, sort_keys=True)
    except RecursionError:
        return "nested too deep"
