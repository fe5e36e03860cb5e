"""Dead letters of single items: one for each culprit of a shard."""

from __future__ import annotations

from pipefleet.client import Client
from pipefleet.contract.messages import MAX_MESSAGE_BYTES, JobItem, JobMessage, Shard, is_id
from pipefleet.contract.uris import output_fault
from pipefleet.queues import dead_letters
from pipefleet.runs.letters import read_content
from pipefleet_workers.build import Undertaker
from tests.unit.worker.consume.fakes import TASK

QUEUE = f"pipefleet.{TASK}"


def test_items_of_one_id_are_jobs_of_their_own(client: Client, prefix: str) -> None:
    shard = Shard("run", prefix, f"{prefix}_run/shards/00000.jsonl", 0, 0, 2)
    undertaker = Undertaker(client.settings, QUEUE, "pool", "worker")
    for item_id in ("one id", "long" * 100, "two\nlines", "../../x", "ü" * 190):
        for position in range(2):
            undertaker.bury("killed", JobMessage("run-0", TASK, shard=shard), position, JobItem(item_id, "text"))
    letters = list(dead_letters.dead_letters(client.redis, QUEUE))
    assert len({letter.job_id for letter in letters}) == 10
    assert len({read_content(letter).output for letter in letters}) == 10
    for letter in letters:
        output = read_content(letter).output
        assert is_id(letter.job_id)
        assert output is not None
        assert output_fault(output, "job", client.settings.store) is None, "it can be queued again"


def test_an_item_that_no_message_can_carry_keeps_nothing_back(client: Client, prefix: str) -> None:
    shard = Shard("run", prefix, f"{prefix}_run/shards/00000.jsonl", 0, 0, 2)
    undertaker = Undertaker(client.settings, QUEUE, "pool", "worker")
    for item in (JobItem("lone \ud800", "text"), JobItem("long", "x" * MAX_MESSAGE_BYTES)):
        undertaker.bury("killed", JobMessage("run-0", TASK, shard=shard), 0, item)
    assert dead_letters.count_dead_letters(client.redis, QUEUE) == 0
