"""A client that was used before `os.fork()`: the child submits and waits as the parent does, and takes nothing of the parent's.

The children are made in processes of their own: a test process has threads of many other things.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pipefleet.client import Client
from pipefleet.contract.messages import JobState, decode_message
from pipefleet.queues.keys import queue_list
from tests.unit.producer.client.test_jobs import OWN, Worker

PREAMBLE = """
import json, multiprocessing, os, sys, threading, time
import pipefleet
from pipefleet.errors import PipefleetError

TEXTS = "text-classification"
client = pipefleet.Client()
before = client.submit(TEXTS, "before")
client.store.head("s3://pipefleet/none")

def hold(*locks):
    # Other threads hold every lock while the process forks, as they may at any time.
    held, done = threading.Barrier(len(locks) + 1), threading.Event()
    def keep(lock):
        with lock:
            held.wait(20)
            done.wait()
    for lock in locks:
        threading.Thread(target=keep, args=(lock,), daemon=True).start()
    held.wait(20)

def say(**found):
    print(json.dumps(found), flush=True)
"""

LOCKS = """
hold(client._lock, client.watcher._lock, client.clock._measuring, client.watcher._lookout._lock, client.store._lock,
     client.watcher._callbacks._service._lock, client.watcher._callbacks._waiting._changed, client.watcher._service._lock,
     client.redis.connection_pool._lock)
"""

FORKED = """
channel = client.watcher.channel
child = os.fork()
if child == 0:
    try:
        called = threading.Event()
        job = client.submit(TEXTS, "in the child", expires=60)
        job.watch().add_done_callback(lambda _: called.set())
        say(
            own=job.result(30), inherited=before.result(30), again=client.job(before.id).result(30), called=called.wait(30),
            other_channel=client.watcher.channel != channel, stored=client.store.head("s3://pipefleet/none"),
        )
        client.close()
    finally:
        sys.stdout.flush()
        os._exit(0)
os.waitpid(child, 0)
"""

AFTER = """
say(parent=before.result(30), later=client.submit(TEXTS, "in the parent").result(30))
client.close()
"""


@pytest.fixture
def answers(client: Client) -> Iterator[None]:
    """A worker that answers each text with its upper case."""
    worker, stop = Worker(client), threading.Event()

    def serve() -> None:
        while not stop.is_set():
            found: Any = worker.redis.brpop([queue_list(OWN, 3)], timeout=0.1)
            if found:
                message = decode_message(json.loads(json.loads(found[1])["body"])[0][0])
                output = json.dumps(message.items[0].inputs.upper())
                worker.end(message.id, JobState.SUCCEEDED, reply=message.reply, output=output)

    thread = threading.Thread(target=serve)
    thread.start()
    yield
    stop.set()
    thread.join(20)


def run(*parts: str, fail: bool = False) -> dict[str, Any]:
    """What a program said, all together."""
    ended = subprocess.run(
        [sys.executable, "-c", PREAMBLE + "".join(parts)],
        capture_output=True,
        text=True,
        timeout=90,
        env=dict(os.environ),
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return {key: value for line in ended.stdout.splitlines() for key, value in json.loads(line).items()}


@pytest.mark.usefixtures("answers")
def test_a_child_submits_and_waits_and_so_does_its_parent_afterwards() -> None:
    assert run(FORKED, AFTER) == {
        "own": "IN THE CHILD", "inherited": "BEFORE", "again": "BEFORE", "called": True, "other_channel": True,
        "stored": None, "parent": "BEFORE", "later": "IN THE PARENT",
    }  # fmt: skip


@pytest.mark.usefixtures("answers")
def test_locks_that_other_threads_held_are_free_in_the_child() -> None:
    assert run(LOCKS, FORKED)["own"] == "IN THE CHILD"


@pytest.mark.usefixtures("answers")
def test_processes_of_multiprocessing_share_a_client() -> None:
    pool = """
def work(text):
    return client.submit(TEXTS, text).result(30)

with multiprocessing.get_context("fork").Pool(2) as processes:
    say(found=processes.map(work, list("abcdef")))
"""
    assert run(pool, AFTER)["found"] == list("ABCDEF")


@pytest.mark.usefixtures("answers")
def test_a_stream_of_results_belongs_to_the_process_that_began_it() -> None:
    stream = """
results = pipefleet.pipeline(TEXTS, client=client)(text for text in "abc")
first = next(results)
child = os.fork()
if child == 0:
    try:
        next(results)
    except PipefleetError as error:
        say(error=str(error))
    finally:
        del results
        sys.stdout.flush()
        os._exit(0)
os.waitpid(child, 0)
say(first=first, rest=list(results))
"""
    found = run(stream)
    assert (found["first"], found["rest"]) == ("A", ["B", "C"])
    assert "belongs to the process that made it" in found["error"]


@pytest.mark.usefixtures("answers")
def test_what_the_parent_plans_is_not_planned_in_the_child(prefix: str) -> None:
    planning = f"""
go_on = threading.Event()
def texts():
    yield from ("text " * 3 for _ in range(16))
    go_on.wait(60)
    yield "the last"

run = client.map(TEXTS, texts(), output="{prefix}")
child = os.fork()
if child == 0:
    say(planning=run.planning, planner=run._planner is None, runs=len(client._planning), state=run.progress().state)
    client.close()  # waits for no planning
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
go_on.set()
client.close()
say(items=client.run("{prefix}").plan.items)
"""
    expected = {"planning": False, "planner": True, "runs": 0, "state": "planning", "items": 17}
    assert run(planning) == expected
