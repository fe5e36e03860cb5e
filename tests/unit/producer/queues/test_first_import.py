"""The first jobs of a process may come from many threads at once, while celery is being imported."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import threading
from pipefleet.contract.messages import JobItem, JobMessage, Priority
from pipefleet.queues.celery import celery_message

message = JobMessage(id="1", task="text-classification", items=(JobItem("0", "a"),))
together, failed = threading.Barrier(16), []

def first():
    together.wait()
    try:
        celery_message(message, "queue", Priority.NORMAL)
    except BaseException as error:
        failed.append(error)

threads = [threading.Thread(target=first) for _ in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
raise SystemExit(repr(failed[0]) if failed else 0)
"""


def test_many_threads_make_their_first_message_at_once() -> None:
    for _ in range(4):
        ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
