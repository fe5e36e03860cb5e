"""Dead letters: what they were, one at a time, and their jobs queued again so that the result comes to whoever waits."""

from __future__ import annotations

import base64
import json
import threading
from typing import Any

import pytest

from pipefleet.cli import main
from pipefleet.client import Client
from pipefleet.connection.connect import subscribed
from pipefleet.contract.messages import JobItem, JobMessage, JobState, Priority, Shard
from pipefleet.errors import JobFailedError
from pipefleet.jobs.job import Job
from pipefleet.printable import printable
from pipefleet.queues import dead_letters
from pipefleet.queues.celery import celery_message
from pipefleet.queues.keys import job_key, ledger_keys, queue_lists
from pipefleet.queues.looking import queue_depth
from pipefleet.queues.revision_notes import queues_of
from pipefleet.runs.letters import MOST_INPUT, read_content
from pipefleet_workers.build import Undertaker
from pipefleet_workers.consume.jobs import work_of
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.items import JobContext, Outcome
from tests.unit.shard_worker import ShardWorker, read

TEXTS = "text-classification"
QUEUE = f"pipefleet.{TEXTS}"


@pytest.fixture
def worker(client: Client) -> ShardWorker:
    return ShardWorker(client, QUEUE)


def taken(client: Client) -> str:
    """The text of the one message in the queues of the pool, taken out of them."""
    queues = queues_of(client.redis, QUEUE)
    for name in (name for queue in queues for name in queue_lists(queue)):
        raw: Any = client.redis.rpop(name)
        if raw is not None:
            return str(raw.decode())
    raise AssertionError("the queue is empty")


def dead(
    client: Client, worker: ShardWorker, text: str = "a text", **options: Any
) -> tuple[Job, dead_letters.DeadLetter]:
    """A job that went to the dead letters, its record failed."""
    job = client.submit(TEXTS, text, **options)
    letter = worker.bury(taken(client), "delivered 3 times", 3)
    worker.tell(letter)
    return job, letter


def run_again(client: Client, worker: ShardWorker, output: Any = "done") -> bool:
    """Run the one queued job as a worker does; False when its record says that it has ended."""
    message = read(taken(client))
    if worker.reporter.start_many([message]) != [JobState.RUNNING]:
        return False
    context = JobContext(message.id, None, {}, 3, None, Outcomes(()))
    worker.reporter.finish_many([(message, Outcome(work_of(context, 0, message.items[0]), output=output))])
    return True


class TestRequeue:
    def test_a_single_job_runs_again_and_its_client_gets_the_new_result(
        self, client: Client, worker: ShardWorker
    ) -> None:
        job, _ = dead(client, worker)
        with pytest.raises(JobFailedError, match="delivered 3 times"):
            job.result(timeout=20)
        client.redis.expire(job_key(job.id), 5)
        assert main(["dead-letters", "--requeue"]) == 0
        record = job.record()
        assert (record.state, record.failure, record.finished, record.worker) == (JobState.QUEUED, None, None, None)
        assert client.redis.ttl(job_key(job.id)) > 5  # type: ignore[operator]
        assert run_again(client, worker)
        assert client.job(job.id).result(timeout=20) == "done"
        assert job.result(timeout=20) == "done"
        assert dead_letters.count_dead_letters(client.redis, QUEUE) == 0

    def test_it_is_not_failed_by_a_worker_that_tells_of_the_letter_late(
        self, client: Client, worker: ShardWorker
    ) -> None:
        job = client.submit(TEXTS, "a text")
        letter = worker.bury(taken(client), "delivered 3 times", 3)
        assert dead_letters.requeue_dead_letter(client.redis, letter, QUEUE) == "queued"
        worker.burials.letter(letter)
        assert job.status() is JobState.QUEUED
        assert run_again(client, worker)
        assert job.result(timeout=20) == "done"

    def test_a_job_that_succeeded_elsewhere_or_was_cancelled_is_left_as_it_is(
        self, client: Client, worker: ShardWorker, capsys: pytest.CaptureFixture[str]
    ) -> None:
        jobs = [client.submit(TEXTS, "a text") for _ in range(2)]
        letters = [worker.bury(text) for text in (taken(client), taken(client))]
        client.redis.hset(job_key(jobs[0].id), mapping={"state": "succeeded", "output": '"done"'})
        assert jobs[1].cancel()
        for letter in letters:
            worker.tell(letter)
        assert main(["dead-letters", "--requeue", "--json"]) == 0
        became = {row["job"]: row["became"] for row in json.loads(capsys.readouterr().out)}
        assert became == {jobs[0].id: "has succeeded meanwhile", jobs[1].id: "was cancelled"}
        assert jobs[0].result(timeout=20) == "done"
        assert queue_depth(client.redis, QUEUE)["normal"] == 0
        assert dead_letters.count_dead_letters(client.redis, QUEUE) == 0

    def test_a_job_whose_record_has_expired_gets_a_new_one(self, client: Client, worker: ShardWorker) -> None:
        job, _ = dead(client, worker)
        client.redis.delete(job_key(job.id))
        assert main(["dead-letters", "--requeue"]) == 0
        assert job.status() is JobState.QUEUED

    def test_the_client_hears_of_a_letter_on_its_channel(self, client: Client, worker: ShardWorker) -> None:
        job = client.submit(TEXTS, "a text")
        with subscribed(client.redis, client.watcher.channel) as channel:
            channel.get_message(timeout=5)
            worker.tell(worker.bury(taken(client)))
            heard = threading.Event()
            while not heard.is_set():
                message = channel.get_message(timeout=5)
                assert message is not None
                if message["type"] == "message" and message["data"].partition(b"\n")[0] == job.id.encode():
                    heard.set()

    def test_one_item_of_a_shard_has_its_result_beside_the_run(
        self, client: Client, worker: ShardWorker, prefix: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shard = Shard("run1", prefix, f"{prefix}_run/shards/00000.jsonl", 0, 0, 1)
        Undertaker(client.settings, QUEUE, "texts", "test").bury(
            "workers died with it", JobMessage("run1-00000", TEXTS, shard=shard), 0, JobItem("a/b ü%.txt", "a text")
        )
        assert main(["dead-letters", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert (row["item"], row["input"]) == ("a/b ü%.txt", "a text")
        assert row["result"].startswith(f"{prefix}requeued/run1-00000-")
        assert main(["dead-letters", "--requeue", "--id", row["job"]]) == 0
        assert f"the result goes to {row['result']}" in capsys.readouterr().out
        assert run_again(client, worker, {"label": "x"})
        assert json.loads(client.store.get(row["result"])) == {"label": "x"}
        assert client.job(row["job"]).result(timeout=20) == {"label": "x"}


class TestChoice:
    def test_one_id_at_a_time(self, client: Client, worker: ShardWorker, capsys: pytest.CaptureFixture[str]) -> None:
        ids = [dead(client, worker, f"text {number}")[0].id for number in range(4)]
        assert main(["dead-letters", "--requeue", "--id", ids[1]]) == 0
        assert main(["dead-letters", "--remove", "--id", ids[0], ids[2], "--json"]) == 0
        assert [letter.job_id for letter in dead_letters.dead_letters(client.redis, QUEUE)] == [ids[3]]
        assert read(taken(client)).id == ids[1]

    @pytest.mark.parametrize("what", ["--requeue", "--remove"])
    def test_an_unknown_id_is_an_error_and_nothing_is_done(
        self, client: Client, worker: ShardWorker, capsys: pytest.CaptureFixture[str], what: str
    ) -> None:
        job, _ = dead(client, worker)
        assert main(["dead-letters", what, "--id", job.id, "none\x1b[31m"]) == 2
        assert capsys.readouterr().err == (
            "pipefleet: no dead letter is of the job none\\x1b[31m; see `pipefleet dead-letters`\n"
        )
        assert dead_letters.count_dead_letters(client.redis, QUEUE) == 1

    def test_the_newest_are_listed_with_the_count_of_all(
        self, client: Client, worker: ShardWorker, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ids = [dead(client, worker, f"text {number}")[0].id for number in range(5)]
        assert main(["dead-letters", "--limit", "2", "--json"]) == 0
        printed = capsys.readouterr()
        assert [row["job"] for row in json.loads(printed.out)] == [ids[4], ids[3]]
        assert printed.err == "pool texts: 5 dead letters, the newest 2 are shown; see --limit\n"


class TestContent:
    def test_the_table_shows_what_the_input_was_and_nothing_that_a_terminal_obeys(
        self, client: Client, worker: ShardWorker, capsys: pytest.CaptureFixture[str]
    ) -> None:
        dead(client, worker, "\x1b[2Jred\n\u202e" + "x" * 300)
        assert main(["dead-letters"]) == 0
        out = capsys.readouterr().out
        assert "\\x1b[2Jred\\n\\u202exxx" in out
        assert "\x1b" not in out
        assert "\u202e" not in out
        assert "x" * 80 not in out
        assert len(out.splitlines()) == 2
        assert TEXTS in out
        assert main(["dead-letters", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert row["input"].endswith("x" * 300)

    def test_references_are_uris_and_long_inputs_are_cut(self, client: Client) -> None:
        def content(inputs: Any) -> Any:
            message = JobMessage("1", TEXTS, items=(JobItem("0", inputs),), output="s3://out/x")
            text = celery_message(message, QUEUE, Priority.LOW)
            return read_content(_letter(text))

        found = content({"image": {"$ref": "s3://media/cat.jpg", "etag": "1"}, "question": "who?"})
        assert found.input == '{"image": "s3://media/cat.jpg", "question": "who?"}'
        assert (found.task, found.item, found.output, found.shard) == (TEXTS, "0", "s3://out/x", None)
        assert len(content("x" * 20_000).input) == MOST_INPUT
        assert content({"$ref": 3}).input == '{"$ref": 3}'

    def test_a_body_in_base64_is_read(self) -> None:
        message = JobMessage("1", TEXTS, items=(JobItem("0", "a text"),))
        envelope = json.loads(celery_message(message, QUEUE, Priority.LOW))
        envelope["body"] = base64.b64encode(envelope["body"].encode()).decode()
        envelope["properties"]["body_encoding"] = "base64"
        assert read_content(_letter(json.dumps(envelope))).input == "a text"

    @pytest.mark.parametrize(
        "text",
        ["", "[]", "{}", '{"body":1}', '{"body":"[","properties":{}}', '{"body":"[[3]]","properties":{}}',
         '{"body":"[[{\\"items\\":[3],\\"shard\\":3}]]","properties":{}}', "[" * 100_000],
    )  # fmt: skip
    def test_what_cannot_be_read_says_nothing(self, text: str) -> None:
        found = read_content(_letter(text))
        assert (found.input, found.shard, found.item) == (None, None, None)

    def test_a_letter_about_an_id_without_a_utf8_form_is_let_go(self, client: Client, worker: ShardWorker) -> None:
        worker.tell(worker.bury('{"headers":{"id":"\\ud800"},"properties":{},"body":"[]"}', "it is \ud800"))
        assert dead_letters.count_dead_letters(client.redis, QUEUE) == 1


def test_a_letter_whose_job_has_no_record_that_can_be_written_is_let_go(client: Client, worker: ShardWorker) -> None:
    letter = _letter(json.dumps({"headers": {"id": "odd"}}))
    client.redis.lpush(ledger_keys(QUEUE)["unreported_key"], letter.entry)
    client.redis.set(job_key("odd"), "no record")
    worker.tell(letter)  # raises nothing: it would be told of for ever, and those behind it never


def test_printable_text_is_bounded_and_on_one_line() -> None:
    assert printable("ä b") == "ä b"
    assert printable("a\tb\x9b\u2028") == "a\\tb\\x9b\\u2028"
    assert printable("x" * 81) == "x" * 79 + "…"
    assert len(printable("\n" * 80)) == 80


def _letter(message: str) -> dead_letters.DeadLetter:
    return dead_letters.DeadLetter("a reason", 1.0, QUEUE, 1, message, b"")
