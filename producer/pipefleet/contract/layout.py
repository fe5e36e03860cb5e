"""The layout of a bulk run in object storage: the names of its files, and the plan that two of them hold. No network.

<output>/_run/plan.json             the plan, written first
<output>/_run/shards/00000.jsonl    the items of a shard
<output>/_run/run.json              the plan with its totals, written when every shard is there; never changed
<output>/_run/moved.json            the model, revision and queue that `resume --model` moved the rest of the run to
<output>/part-00000.jsonl           (or .parquet) the results of a shard, a line for each item, in the shard's order
<output>/artifacts/<position>/…     pictures, sound and long arrays of a result, which fit no JSON line
<output>/requeued/<job>.json        the result of an item that killed its workers and was queued again by itself
<output>/_run/failed/00000.jsonl    the failed items of a shard, as manifest lines
<output>/_run/failures.jsonl        the failed items of all shards, when the run has ended: a source for the next run
<output>/_run/refused/00000.json    why no worker will run a shard; its items are failed items when the run has ended
<output>/_run/resumed.json          the refused shards that were taken up, and a word: a `_SUCCESS` with another word is void
<output>/_run/cancelled             the run was cancelled
<output>/_run/stopped.json          why the planning ended before the source; removed when somebody goes on
<output>/_SUCCESS                   the totals; there when the run has ended

Planner, clients and workers write these files; docs/architecture.md says after which event each is there. Other programs may
write to the bucket too: `RunPlan.from_json` raises RunError for a file that is not a plan.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipefleet.arguments import text_of
from pipefleet.contract.messages import CONTRACT_VERSION, MAX_RUN_ITEMS, RUN_ID_FORM
from pipefleet.contract.references import MAX_KEY_BYTES, directory_uri, split_uri
from pipefleet.errors import RunError, UsageError
from pipefleet.foreign import mapping, name, number, readable, whole

BELOW_OUTPUT = 124
"""Bytes of a key that are kept for the names below an output."""
_NUMBERED = re.compile(r"(\d{5,})\.(?:jsonl|parquet)$")


@dataclass(frozen=True, slots=True)
class RunLayout:
    """The names of one run. `uri` is the output prefix of the run, with a slash at the end; `format` is the format of its parts."""

    uri: str
    format: str = "jsonl"

    @classmethod
    def at(cls, uri: str) -> RunLayout:
        """The layout under `uri`. Raises InputError unless it is an `s3://` URI."""
        return cls(directory_uri(text_of("the URI of a run", uri)))

    def require_room(self) -> None:
        """Raise UsageError where the keys below the output would be longer than object storage takes."""
        _, key = split_uri(self.uri)
        if len(key.encode()) > MAX_KEY_BYTES - BELOW_OUTPUT:
            raise UsageError(
                f"the output {self.uri[:60]!r}… is too long: its key may have {MAX_KEY_BYTES - BELOW_OUTPUT} bytes, "
                f"not {len(key.encode())}; choose a shorter one"
            )

    @property
    def plan(self) -> str:
        """The plan."""
        return f"{self.uri}_run/plan.json"

    @property
    def run(self) -> str:
        """The plan with its totals."""
        return f"{self.uri}_run/run.json"

    @property
    def moved(self) -> str:
        """The model, revision and queue that the rest of the run was moved to."""
        return f"{self.uri}_run/moved.json"

    @property
    def control(self) -> str:
        """The prefix of the files that describe the run."""
        return f"{self.uri}_run/"

    @property
    def shards(self) -> str:
        """The prefix of all shards."""
        return f"{self.uri}_run/shards/"

    @property
    def parts(self) -> str:
        """The prefix of all parts."""
        return f"{self.uri}part-"

    @property
    def failed(self) -> str:
        """The prefix of the lists of failed items."""
        return f"{self.uri}_run/failed/"

    @property
    def refused(self) -> str:
        """The prefix of the notes of refused shards."""
        return f"{self.uri}_run/refused/"

    @property
    def failures(self) -> str:
        """The list of all failed items."""
        return f"{self.uri}_run/failures.jsonl"

    @property
    def cancelled(self) -> str:
        """The mark of a cancelled run."""
        return f"{self.uri}_run/cancelled"

    @property
    def resumed(self) -> str:
        """The refused shards that were taken up, and the word that tells a `_SUCCESS` of now from an earlier one."""
        return f"{self.uri}_run/resumed.json"

    @property
    def stopped(self) -> str:
        """Why the planning ended before the source."""
        return f"{self.uri}_run/stopped.json"

    @property
    def success(self) -> str:
        """The totals of an ended run."""
        return f"{self.uri}_SUCCESS"

    def shard(self, index: int) -> str:
        """The items of one shard."""
        return f"{self.shards}{index:05d}.jsonl"

    def part(self, index: int) -> str:
        """The results of one shard."""
        return f"{self.parts}{index:05d}.{self.format}"

    def part_of(self, key: str) -> int | None:
        """The number of the part with this key; None for another object whose name begins like a part's."""
        index = index_of(key)
        return index if index is not None and split_uri(self.part(index))[1] == key else None

    def failed_shard(self, index: int) -> str:
        """The failed items of one shard."""
        return f"{self.failed}{index:05d}.jsonl"

    def refused_shard(self, index: int) -> str:
        """Why no worker will run a shard."""
        return f"{self.refused}{index:05d}.json"

    @property
    def requeued(self) -> str:
        """The prefix of the results of items that were queued again by themselves."""
        return f"{self.uri}requeued/"

    def artifacts(self, position: int) -> str:
        """The prefix of the artifacts of the item at `position` in the run."""
        return f"{self.uri}artifacts/{position:08d}/"


def index_of(key: str) -> int | None:
    """The number of a shard or part, from its key."""
    found = _NUMBERED.search(key)
    return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The plan of a run: the content of plan.json and, with totals, of run.json. `created` is in seconds since 1970."""

    id: str
    task: str
    model: str
    revision: str | None
    parameters: Mapping[str, Any]
    source: str | None
    queue: str
    format: str
    shard_size: int | None
    created: float
    contract_version: int
    shards: int | None = None
    items: int | None = None
    strict: bool = False
    """Whether an item that cannot be prepared ends the planning."""

    def to_json(self) -> dict[str, Any]:
        """The JSON form. It has totals only where they are known, and `strict` only where it is true."""
        unknown = {"shards", "items"} if self.shards is None else set()
        lenient = set() if self.strict else {"strict"}
        return {field: value for field, value in asdict(self).items() if field not in unknown | lenient}

    @classmethod
    def from_json(cls, value: Any, where: str) -> RunPlan:
        """The reverse of `to_json`. Raises RunError, which names `where`, for any other value and any other contract version."""
        with readable(where):
            plan = cls(**value)
            plan._check()
        if plan.contract_version != CONTRACT_VERSION:
            raise RunError(
                f"{where} follows contract version {str(plan.contract_version)[:20]}, this is version "
                f"{CONTRACT_VERSION}; use the release of pipefleet that began the run"
            )
        totals = (plan.shards, plan.items)
        if not _is_id(plan.id) or not all(map(_is_total, totals)) or (None in totals and any(totals)):
            raise RunError(f"{where} names no run of pipefleet: its id, shards or items are none")
        return plan

    def _check(self) -> None:
        """Raise ValueError for a field of the wrong type."""
        for text in (self.id, self.task, self.model, self.queue, self.format):
            name(text)
        if self.revision is not None:
            name(self.revision)
        for count in (self.shards, self.items, self.shard_size):
            whole(count or 0, most=MAX_RUN_ITEMS)
        mapping(self.parameters), number(self.created)
        if not isinstance(self.source, str | None):
            raise ValueError("the source is no text")


def _is_id(value: object) -> bool:
    return isinstance(value, str) and RUN_ID_FORM.fullmatch(value) is not None


def _is_total(value: object) -> bool:
    return value is None or (type(value) is int and 0 <= value <= MAX_RUN_ITEMS)
