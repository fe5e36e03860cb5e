"""`Burials`: the items of refused shards count as failed, each shard once."""

from __future__ import annotations

from pipefleet.client import Client
from pipefleet_workers.observe.metrics import Totals
from tests.unit.conftest import eventually
from tests.unit.shard_worker import ShardWorker

TEXTS = "text-classification"


def counted(totals: Totals) -> tuple[int, int]:
    return totals.items, totals.failed


def test_items_of_a_refused_shard_count_as_failed_once_and_again_when_they_are_taken_up_and_end(
    client: Client, prefix: str
) -> None:
    run = client.map(TEXTS, [f"text {number}" for number in range(5)], output=prefix, shard_size=2)
    run.join_planner()
    worker = ShardWorker(client, run.plan.queue)
    taken = worker.take()
    worker.do(taken[0])
    worker.refuse(taken[1])
    worker.refuse(taken[1], "a copy of the same message")
    worker.refuse(taken[2])
    assert eventually(lambda: counted(worker.metrics.totals()) == (5, 3))
    assert run.wait(timeout=20).failed == 3
    assert run.resume() == 2
    run.join_planner()
    for text in worker.take().values():
        worker.do(text)
    assert run.wait(timeout=20).state == "succeeded"
    assert counted(worker.metrics.totals()) == (8, 3)


def test_a_message_that_names_a_run_which_is_not_there_counts_nothing(client: Client, prefix: str) -> None:
    run = client.map(TEXTS, ["one", "two"], output=prefix, shard_size=1)
    run.join_planner()
    worker = ShardWorker(client, run.plan.queue)
    taken = worker.take()
    worker.refuse(taken[0].replace(run.id, "another-run"))
    worker.refuse(taken[1])
    assert eventually(lambda: worker.metrics.totals().failed >= 1)
    assert counted(worker.metrics.totals()) == (1, 1)
