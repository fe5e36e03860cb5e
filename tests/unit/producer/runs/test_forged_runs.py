"""What a producer can do to a run of another, who may not write where it lies: forged messages, plans, lists and neighbours."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout, RunPlan
from pipefleet.contract.messages import Shard
from pipefleet.errors import ContractError, RunError
from pipefleet.queues.keys import run_key
from pipefleet.runs.files import MOST_BYTES
from pipefleet.runs.refusals import Refusals
from pipefleet.runs.run import Run
from tests.unit.shard_worker import ShardWorker

TASK = "text-classification"
QUEUE = f"pipefleet.{TASK}"
OTHERS: list[dict[str, Any]] = [
    {"parameters": {"top_k": 3}},
    {"parameters": {"top_k": True}},
    {"deadline": 1.0},
    {"output": "s3://pipefleet/tests/_run/x.json"},
    {"model": "/models/other"},
    {"revision": "other"},
    {"model": None},
    {"task": "image-classification"},
]
"""What a copy of a shard's message may say, so that its items fail, or are given other results."""


def planned(client: Client, uri: str, items: int = 4, **options: Any) -> Run:
    run = client.map(TASK, [str(index) for index in range(items)], output=uri, shard_size=2, **options)
    run.join_planner()
    return run


def changed(text: str, **changes: Any) -> str:
    """A message as it lies in a queue with other fields in its job; those that are None are left out."""
    envelope = json.loads(text)
    body = json.loads(envelope["body"])
    job = {**body[0][0], **changes}
    body[0][0] = {name: value for name, value in job.items() if value is not None}
    return json.dumps({**envelope, "body": json.dumps(body)})


@pytest.mark.parametrize("changes", OTHERS)
def test_a_shard_that_asks_for_something_else_than_its_run_is_not_run(
    client: Client, prefix: str, changes: dict[str, Any]
) -> None:
    run, worker = planned(client, prefix, parameters={"top_k": 1}), ShardWorker(client, QUEUE)
    texts = worker.take()
    with pytest.raises(ContractError) as caught:
        worker.do(changed(texts[0], **changes))
    worker.refuse(changed(texts[0], **changes), str(caught.value))
    assert not run.has_part(0)
    worker.do(texts[1])
    assert not run.progress().ended, "the shard itself still waits"
    assert worker.do(texts[0]) == "succeeded"
    assert run.progress().state == "succeeded"


def test_a_run_elsewhere_with_the_id_of_another_changes_nothing_of_that(client: Client, prefix: str) -> None:
    run, worker = planned(client, f"{prefix}victim/"), ShardWorker(client, QUEUE)
    texts = worker.take()
    evil = RunLayout(f"{prefix}evil/")
    plan = RunPlan.from_json(run.plan.to_json(), "")
    client.store.put(evil.run, json.dumps({**plan.to_json(), "shards": 99, "items": 198}).encode())
    client.store.put(evil.shard(0), client.store.get(RunLayout(run.uri).shard(0)))
    forged = changed(texts[0], shard=Shard(run.id, evil.uri, evil.shard(0), 0, 0, 2).to_json())
    with pytest.raises(ContractError, match="lies elsewhere"):
        worker.do(forged)
    worker.refuse(forged)
    assert run.progress().parts == run.progress().refused == 0
    assert client.redis.exists(run_key(run.id, "items")) == 0
    worker.do(texts[1])
    assert not run.progress().ended
    worker.do(texts[0])
    assert run.progress().state == "succeeded"


def test_a_run_that_was_begun_by_an_earlier_release_is_known_by_its_id_alone(client: Client, prefix: str) -> None:
    run, worker = planned(client, prefix), ShardWorker(client, QUEUE)
    client.redis.hdel(run_key(run.id), "uri")
    for text in worker.take().values():
        assert worker.do(text) == "succeeded"
    assert run.progress().state == "succeeded"


def test_a_copy_of_a_run_takes_nothing_over_until_the_run_is_gone(client: Client, prefix: str) -> None:
    run = planned(client, f"{prefix}run/")
    copy = RunLayout(f"{prefix}copy/")
    for name in ("_run/plan.json", "_run/run.json", "_run/shards/00000.jsonl", "_run/shards/00001.jsonl"):
        client.store.put(copy.uri + name, client.store.get(run.uri + name))
    with pytest.raises(RunError, match="is a copy of the run at"):
        client.run(copy.uri).resume()
    worker = ShardWorker(client, QUEUE)
    worker.do(worker.take(0)[0])
    client.store.delete(RunLayout(run.uri).plan)
    again = client.run(copy.uri)
    again.resume()
    again.join_planner()
    assert client.redis.hget(run_key(run.id), "uri") == copy.uri.encode()


def test_neighbours_of_parts_are_none(client: Client, prefix: str) -> None:
    run = planned(client, prefix)
    for name in (
        "part-x00000.jsonl",
        "part-0/00001.jsonl",
        "part-00000.jsonl.00001.jsonl",
        "part-\u0660\u0660\u0660\u0660\u0661.jsonl",
    ):
        client.store.put(prefix + name, b"{}")
    client.redis.flushall()
    again, worker = client.run(run.uri), ShardWorker(client, QUEUE)
    assert again.resume() == 2
    again.join_planner()
    for text in worker.take().values():
        worker.do(text)
    assert again.progress().state == "succeeded"


def test_totals_are_both_there_or_neither(client: Client, prefix: str) -> None:
    plan = planned(client, prefix).plan.to_json()
    for body in ({**plan, "items": None}, {**plan, "shards": None}):
        with pytest.raises(RunError):
            RunPlan.from_json(body, "run.json")


def test_a_list_that_names_places_beyond_its_run_makes_no_bits(client: Client, prefix: str) -> None:
    run, worker = planned(client, prefix, items=2), ShardWorker(client, QUEUE)
    layout = RunLayout(run.uri)
    lines = [{"position": place, "id": "x", "inputs": "x"} for place in (-1, 2**32 - 1, 1.5, "1")]
    client.store.put(layout.shard(0), b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    worker.refuse(worker.take()[0])
    Refusals(client.redis, client.settings, client.store, layout, run.id).end(run.plan)
    assert client.redis.strlen(run_key(run.id, "items")) == 1
    assert run.progress().failed == 2


def test_a_client_restores_no_places_beyond_those_of_any_run(client: Client, prefix: str) -> None:
    run, worker = planned(client, prefix, items=2), ShardWorker(client, QUEUE)
    worker.do(worker.take()[0])
    client.store.delete(RunLayout(run.uri).success)
    line = json.dumps({"position": 2**32 - 3, "id": "x", "inputs": "x"}, separators=(",", ":")).encode()
    client.store.put(RunLayout(run.uri).shard(0), line + b"\n" + line + b"\n")
    client.redis.flushall()
    again = client.run(run.uri)
    again.resume()
    again.join_planner()
    assert client.redis.strlen(run_key(run.id, "items")) < 1000


def test_files_of_a_run_are_bounded_before_they_are_read(client: Client, prefix: str) -> None:
    run, worker = planned(client, prefix, items=2), ShardWorker(client, QUEUE)
    texts, layout = worker.take(), RunLayout(run.uri)
    bounds: dict[str, int | None] = {}
    get = client.store.get

    def note(uri: str, *, max_bytes: int | None = None) -> bytes:
        bounds[uri] = max_bytes
        return get(uri, max_bytes=max_bytes)

    client.store.get = note  # type: ignore[method-assign]
    Run.open(client, layout)
    assert bounds[layout.run] == MOST_BYTES
    client.store.get = get  # type: ignore[method-assign]
    with pytest.raises(RunError, match="above the bound of 10"):
        client.store.get(layout.run, max_bytes=10)
    client.store.put(layout.part(0), b"{}\n")
    read_part = worker.shards._outlets.store.get

    def small(reference: Any, *, max_bytes: int | None = None) -> bytes:
        return read_part(reference, max_bytes=2 if reference.uri == layout.part(0) and max_bytes else max_bytes)

    worker.shards._outlets.store.get = small  # type: ignore[method-assign]
    with pytest.raises(ContractError, match="above the bound"):
        worker.do(texts[0])
