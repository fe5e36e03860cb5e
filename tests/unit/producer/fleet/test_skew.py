"""Whole flows of a client whose clock is early or late, with workers whose own clock is off the other way: nobody notices."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pipefleet.client import Client
from pipefleet.connection.clock import ServerClock
from pipefleet.connection.reading import server_time
from pipefleet.errors import PipefleetError
from pipefleet.fleet.announcements import announce_pool, announce_worker
from pipefleet.fleet.pools import Fleet, Pool
from pipefleet.fleet.revisions import forget_revisions
from pipefleet.fleet.routing import announcement, queue_name, work_queue
from pipefleet.queues import dead_letters
from pipefleet.queues.keys import REVISIONS_KEY, queue_lists, run_key
from pipefleet.queues.revision_notes import note_revision
from pipefleet_workers.consume.jobs import Jobs
from pipefleet_workers.fleet.doctor.clocks import check_clocks
from pipefleet_workers.items import Outcome, Work
from tests.unit.producer.client.test_jobs import TEXTS
from tests.unit.shard_worker import ShardWorker, read

SKEWS = (60.0, 90.0, 3600.0)
POOL = Pool("texts", TEXTS, "/models/skewed", revision="r1")
FLEET = Fleet({"texts": POOL})
QUEUE, OWN = queue_name(POOL, FLEET), work_queue(POOL, FLEET)

CHILD = """
import json, sys, time
right, skew = time.time, 0.0
time.time = lambda: right() + skew
from pipefleet.client import Client
from pipefleet.cli import main
told = {}
for one in json.loads(sys.argv[1]):
    skew = one
    with Client() as client:
        pools = sorted(client.fleet.pools)
        job = client.submit("text-classification", "a", expires=30)
        once = [client.submit("text-classification", "b", idempotency_key=f"k{one}", expires=30) for _ in range(2)]
        run = client.map("text-classification", ["a", "b", "c"], output=f"{sys.argv[2]}{one}/")
        ended = run.wait(timeout=60)
        outputs = [job.result(timeout=60), once[0].result(timeout=60)]
        state = client.run(run.uri).progress().state
        told[one] = [pools, outputs, once[0].id == once[1].id, ended.state, 0 <= ended.seconds < 60, state]
print(json.dumps(told))
"""


class Part(threading.Thread):
    """A worker's part, by a clock of its own: single jobs that have not expired, and shards."""

    def __init__(self, client: Client) -> None:
        super().__init__(daemon=True)
        self._client = client
        self._shards = ShardWorker(client, QUEUE)
        self._jobs = Jobs(POOL, None, clock=ServerClock(client.redis).now)  # type: ignore[arg-type]
        self.ending = threading.Event()
        self.expired: list[str] = []

    def run(self) -> None:
        lists = [name for queue in (OWN, QUEUE) for name in queue_lists(queue)]
        while not self.ending.is_set():
            found: Any = self._client.redis.brpop(lists, timeout=0.2)
            if found:
                self._serve(found[1].decode())

    def _serve(self, text: str) -> None:
        message = read(text)
        if message.shard is not None:
            self._shards.do(text)
            return
        context = self._jobs.begin(message, None, priority=3, patient=True)  # type: ignore[arg-type]
        stopped = context.stopped("fetch")
        if stopped is not None:
            self.expired.append(message.id)
        outcome = Outcome(Work(context, 0, message.items[0], {}, 1), output=["done"], failure=stopped)
        self._shards.reporter.finish_many([(message, outcome)])


@pytest.fixture
def part(client: Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[Part]:
    announce_pool(client.redis, POOL.name, announcement(POOL, FLEET), seconds=60.0)
    facts = {"pool": POOL.name, "queue": OWN, "max_cost": 1, "pads": True}
    announce_worker(client.redis, "texts@there-1", facts, seconds=60.0)
    one = Part(client)
    one.start()
    yield one
    one.ending.set()
    one.join(20)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_client_whose_clock_is_off_is_served_like_any_other(
    client: Client, part: Part, monkeypatch: pytest.MonkeyPatch, prefix: str, sign: int
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() - sign * 3600.0)
    skews = [sign * skew for skew in SKEWS]
    environment = {name: value for name, value in os.environ.items() if name != "PIPEFLEET_FLEET"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(skews), prefix],
        capture_output=True, text=True, timeout=240, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    expected = [["texts"], [["done"], ["done"]], True, "succeeded", True, "succeeded"]
    assert told == {str(skew): expected for skew in skews}
    assert part.expired == []


@pytest.mark.parametrize("skew", [-9 * 86_400.0, 9 * 86_400.0])
def test_marks_and_notes_are_told_by_the_server(
    client: Client, monkeypatch: pytest.MonkeyPatch, prefix: str, skew: float
) -> None:
    redis, now = client.redis, server_time(client.redis)
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + skew)
    note_revision(redis, OWN, POOL.model, POOL.revision)
    client.submit(TEXTS, "a", model="/models/texts")
    forget_revisions(redis)
    noted = redis.hgetall(REVISIONS_KEY)
    assert len(noted) == 2, "what was noted a moment ago is no week old"  # type: ignore[arg-type]
    times = [json.loads(one)["at"] for one in noted.values()]  # type: ignore[union-attr]
    run = client.map(TEXTS, ["a"], output=prefix)
    run.join_planner()
    times.append(float(redis.hget(run_key(run.plan.id), "since") or 0))  # type: ignore[arg-type]
    dead_letters.file_dead_letter(redis, QUEUE, message="{}", reason="bad")
    times += [letter.at for letter in dead_letters.every_dead_letter(redis, QUEUE)]
    assert times == pytest.approx([now] * len(times), abs=60)
    assert client.clock.peek() == pytest.approx(now, abs=60)


@pytest.mark.parametrize(
    ("skew", "words"),
    [
        (0.0, "s .* Redis's; .* s .* the store's"),
        (90.0, "WARNING: the clock of this machine is 90 seconds ahead of Redis's"),
    ],
)
def test_doctor_tells_how_far_the_clock_is_off(
    client: Client, monkeypatch: pytest.MonkeyPatch, skew: float, words: str
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + skew)
    assert re.search(words, check_clocks(client.settings))


def test_a_clock_that_the_store_will_refuse_is_a_failure(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() - 3660)
    with pytest.raises(PipefleetError, match="61 minutes behind the store's; set it \\(NTP\\); S3 refuses"):
        check_clocks(client.settings)
