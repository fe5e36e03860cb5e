"""What must hold after every scenario: each item once and in order, each job ended, and nothing left in Redis."""

from __future__ import annotations

import contextlib
import io
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from pipefleet.cli import main as command
from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout, index_of
from pipefleet.contract.messages import JobState
from pipefleet.queues import dead_letters
from pipefleet.queues.keys import ledger_keys, waiting_lists
from pipefleet.queues.revision_notes import queues_of
from pipefleet.runs.run import Run
from tests.chaos.saboteur import TASK
from tests.chaos.world import QUEUE, World, until

LEDGER = ("unacked", "unacked_index", "deliveries", "retries", "owners", "delayed")


def texts(count: int, prefix: str = "text") -> list[str]:
    """Texts of several lengths, all different."""
    return [f"{prefix} {index} " + "word " * (index % 7) for index in range(count)]


def start_run(client: Client, rows: Sequence[str], **options: Any) -> Run:
    """A bulk run over texts, its source a manifest in the store, so that anybody can go on with it."""
    base = f"s3://pipefleet/chaos/{uuid.uuid4().hex}/"
    manifest = "\n".join(json.dumps({"id": str(place), "inputs": text}) for place, text in enumerate(rows))
    client.store.put(f"{base}m.jsonl", manifest.encode())
    return client.map(TASK, f"{base}m.jsonl", output=f"{base}out/", **options)


def check_run(client: Client, run: Run, rows: Sequence[Any], failed: Mapping[int, str] | None = None) -> None:
    """Every item once, in order, the totals right; `failed` has the code of each that failed."""
    failed = failed or {}
    layout, store = RunLayout.at(run.uri), client.store
    parts = [index_of(entry.key) for entry in store.list(layout.parts)]
    lines = [json.loads(line) for index in range(len(parts)) for line in store.lines(layout.part(index))]
    assert parts == list(range(len(parts))), f"parts are missing: {parts}"
    assert [line["id"] for line in lines] == [str(place) for place in range(len(rows))], "items are missing or doubled"
    found = {place: line["error"]["code"] for place, line in enumerate(lines) if "error" in line}
    assert found == dict(failed), f"failed: {sorted(found.items())[:5]} instead of {sorted(failed.items())[:5]}"
    assert all("output" in line for place, line in enumerate(lines) if place not in failed)
    totals = json.loads(store.get(layout.success))
    counts = (totals["items"], totals["succeeded"], totals["failed"], totals["parts"])
    assert counts == (len(rows), len(rows) - len(failed), len(failed), len(parts)), f"_SUCCESS says {totals}"
    listed = sorted(row["id"] for row in run.failures())
    assert listed == sorted(str(place) for place in failed), f"failures.jsonl lists {listed[:5]}"


def leftovers(world: World, *, dead: int = 0) -> list[str]:
    """What is in Redis and should not be once everything has ended; `dead` is how many dead letters there should be."""
    redis, keys = world.redis, ledger_keys(QUEUE)
    left = [f"{name} has entries" for name in LEDGER if redis.exists(keys[f"{name}_key"])]
    lists = [name for queue in queues_of(redis, QUEUE) for name in waiting_lists(queue)]
    left += [f"{redis.llen(name)} messages wait in {name!r}" for name in lists if redis.llen(name)]
    left += [f"a journal {key!r}" for key in redis.scan_iter("pipefleet:*suspects*")]
    for key in redis.scan_iter("pipefleet:job:*"):
        value: Any = redis.hget(key, "state")
        state = (value or b"").decode()
        if not state or not JobState(state).final:
            left.append(f"{key.decode()} is {state or 'without a state'}")
    letters = dead_letters.count_dead_letters(redis, QUEUE)
    return left if letters == dead else [*left, f"{letters} dead letters instead of {dead}"]


def check_quiet(world: World, *, dead: int = 0, seconds: float = 30.0) -> None:
    """Nothing is left, and `pipefleet queues` says the same as the keys themselves."""
    left: list[str] = []

    def nothing() -> bool:
        left[:] = leftovers(world, dead=dead)
        return not left

    try:
        until(nothing, seconds)
    except AssertionError:
        raise AssertionError(f"{len(left)} leftovers: {left[:4]}") from None
    check_queues(world)


def check_queues(world: World) -> None:
    """`pipefleet queues --json` against LLEN, HLEN and ZCARD; only where nothing moves."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert command(["queues", "--json"]) == 0
    rows = json.loads(said.getvalue())  # one for each revision
    redis, keys = world.redis, ledger_keys(QUEUE)
    lists = [name for queue in queues_of(redis, QUEUE) for name in waiting_lists(queue)]
    high, normal, middle, low = (sum(map(redis.llen, lists[step::4])) for step in range(4))
    delayed = redis.zcard(keys["delayed_key"])
    dead = redis.llen(keys["dead_key"]) + redis.llen(keys["unreported_key"])
    counted = {"high": high, "normal": normal + middle, "low": low, "delayed": delayed, "dead": dead}
    counted["unacked"] = redis.hlen(keys["unacked_key"]) - delayed
    told = {name: sum(row[name] for row in rows) for name in counted}
    assert told == counted, f"`queues` says {told}, the keys {counted}"


def check_singles(jobs: Sequence[Any], seconds: float = 60.0) -> None:
    """Every one of these jobs succeeds."""
    for job in jobs:
        (best, *_) = job.result(timeout=seconds)
        assert best["label"]
