"""Whether everybody tells the same: Celery's books and events, the records, the parts, and what the workers have counted."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING

from celery import states

from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import JobState
from pipefleet.queues import dead_letters
from pipefleet.queues.keys import job_key, ledger_keys
from pipefleet.runs.finishing import read_resumed
from pipefleet_workers.ending import REVOKED
from pipefleet_workers.observe.totals import read_items

if TYPE_CHECKING:
    from tests.chaos.world import World

SHOWN = {
    JobState.SUCCEEDED: states.SUCCESS,
    JobState.FAILED: states.FAILURE,
    JobState.CANCELLED: states.REVOKED,
    JobState.EXPIRED: states.REVOKED,
}
"""What Flower shows of a job in this state."""
SECONDS = 60.0
QUEUE = "pipefleet.text-classification"
RUNS = "s3://pipefleet/chaos"
_PART = re.compile(r"(.*/)[^/]*part-[0-9]+[^/]*")


def check_agreement(world: World, client: Client) -> None:
    """Raise AssertionError where two of them differ. Only where nothing moves; takes as long as a worker is silent, 2 s.

    Events are lost with a Redis that is away and with a worker that dies, and what such a worker had counted as well; then
    whatever is told must still not contradict the records.
    """
    from tests.chaos.world import until

    found: list[str] = []

    def agrees() -> bool:
        found[:] = [*_books(world), *_events(world, client), *_counts(world, client)]
        return not found

    try:
        until(agrees, SECONDS)
    except AssertionError:
        raise AssertionError(f"{len(found)} disagreements: {found[:4]}") from None


def stored(client: Client) -> set[str]:
    """The keys of what runs of any scenario have written."""
    return {entry.key for entry in client.store.list(RUNS)}


def _books(world: World) -> list[str]:
    """What `celery inspect` lists although everything has ended."""
    ready = sum(worker.ready for worker in world.workers)
    if not ready:
        return []
    found = []
    with world.events.app.connection() as connection:  # a new one: the server may have been away
        inspect = world.events.app.control.inspect(timeout=2.0, limit=ready, connection=connection)
        for what in ("active", "reserved"):
            answers = getattr(inspect, what)() or {}
            found += [f"{one['id']} is {what} on {name}" for name, listed in answers.items() for one in listed]
    return found


def _events(world: World, client: Client) -> list[str]:
    """Jobs that Flower would show in another state than their record's, and any that it would show as unfinished."""
    lossy = bool(world.faults & {"redis", "death"})
    wrong = []
    records = _states(world, submitted=True)
    for letter in dead_letters.dead_letters(world.redis, QUEUE, count=1000):
        if letter.reason == REVOKED and letter.job_id is not None:
            records.pop(letter.job_id, None)  # a shard, which has no record of its own to be compared
    for job_id, state in records.items():
        shown = world.events.shown(job_id)
        if shown == SHOWN[state] or (shown is None and state is not JobState.SUCCEEDED):
            continue  # of a message that was malformed, or cancelled before a worker was there, Celery hears nothing
        if shown in states.READY_STATES or not lossy:
            wrong.append(f"job {job_id} is {state} and shown as {shown}")
    if not lossy:
        unfinished = {
            one.uuid: one.state
            for one in list(world.events.state.tasks.values())
            if one.state not in states.READY_STATES
        }
        wrong += [f"{name} is shown as {state}" for name, state in unfinished.items() if name not in records]
    return wrong


def _states(world: World, *, submitted: bool = False) -> dict[str, JobState]:
    """The states of all records, or of those that our client made: Celery knows other jobs by another name."""
    prefix = job_key("")
    keys = list(world.redis.scan_iter(f"{prefix}*", count=1000))
    pipe = world.redis.pipeline(transaction=False)
    for key in keys:
        pipe.hmget(key, "state", "submitted")
    return {
        key.decode().removeprefix(prefix): JobState(state.decode())
        for key, (state, at) in zip(keys, pipe.execute(), strict=True)
        if state and (at or not submitted)
    }


def _counts(world: World, client: Client) -> list[str]:
    """Items that the workers have counted, against the records and the parts: never more, and as many where nothing was away."""
    if "redis" in world.faults:
        return []  # it may have lost what was told, or heard it twice
    moves = world.redis.exists(ledger_keys(QUEUE)["unreported_key"])  # thousands of letters take minutes
    told = read_items(world.redis, "texts")
    counted = Counter(
        succeeded=told.items - told.failed - told.cancelled - told.expired, failed=told.failed + told.expired
    )
    written = Counter("succeeded" if state is JobState.SUCCEEDED else "failed"
                      for state in _states(world).values() if state is not JobState.CANCELLED)  # fmt: skip
    written.update(_written(client, stored(client) - world.stored_before))
    exact = not world.faults
    return [
        f"{counted[name]} items counted as {name}, {written[name]} written"
        for name in (["succeeded"] if moves else ["succeeded", "failed"])
        if counted[name] > written[name] or (exact and counted[name] != written[name])
    ]


def _written(client: Client, keys: set[str]) -> Counter[str]:
    """Items in the parts among these objects; where their run has its totals, these, and what failed before it was taken up."""
    found: Counter[str] = Counter()
    by_run: dict[str, list[str]] = {}
    for key in keys:
        if match := _PART.fullmatch(key):
            by_run.setdefault(match[1], []).append(key)
    for run, parts in by_run.items():
        if f"{run}_SUCCESS" in keys:
            said = json.loads(client.store.get(f"s3://pipefleet/{run}_SUCCESS"))
            found.update(succeeded=said["succeeded"], failed=said["failed"] + _refused_before(client, run))
            continue
        for key in parts:
            for line in client.store.lines(f"s3://pipefleet/{key}"):
                found["failed" if "error" in json.loads(line) else "succeeded"] += 1
    return found


def _refused_before(client: Client, run: str) -> int:
    """Items of the shards of a run that were refused and taken up again: each has ended twice."""
    layout = RunLayout.at(f"s3://pipefleet/{run}")
    shards = read_resumed(client.store, layout).shards
    return sum(1 for index in shards for _ in client.store.lines(layout.part(index)))
