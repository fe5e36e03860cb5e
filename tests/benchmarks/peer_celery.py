"""The peer `naive Celery`: a stock Celery app, one task for each item, four threads, results through its Redis backend.

The worker's threads share the model and have a copy each of everything else, as tokenizers are not thread-safe.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from celery import Celery
from celery.exceptions import TimeoutError as CeleryTimeoutError

from tests.benchmarks.measurement import Machine, Measurement, timed
from tests.benchmarks.serving import Served, process, until_ready
from tests.benchmarks.system import addresses
from tests.benchmarks.workloads import Workload

THREADS = 4
TASK = "bench.infer"
QUEUE = "bench-naive-celery"
WAIT_SECONDS = 600.0

Submit = Callable[[str], Any]
app = Celery("bench", broker=os.environ.get("PIPEFLEET_REDIS_URL"), backend=os.environ.get("PIPEFLEET_REDIS_URL"))
_local = threading.local()
_lock = threading.Lock()


@app.task(name=TASK)  # type: ignore[untyped-decorator]
def infer(item: str) -> Any:
    """The output for one text, or for the object at one `s3://` URI."""
    served, shared = _loaded()
    if not hasattr(_local, "pipe"):
        with _lock:
            _local.pipe = copy.copy(shared)
            for name in ("tokenizer", "processor", "image_processor", "feature_extractor"):
                if getattr(shared, name, None) is not None:
                    setattr(_local.pipe, name, copy.deepcopy(getattr(shared, name)))
    if served.task == "feature-extraction":
        return served.run(_local.pipe, [item])[0]
    return _local.pipe(served.fetched(item), **served.parameters)


def _loaded() -> tuple[Served, Any]:
    with _lock:
        return _load()


@functools.cache
def _load() -> tuple[Served, Any]:
    served = Served.from_environment()
    return served, served.load()


@contextlib.contextmanager
def running(workload: Workload, machine: Machine, scratch: Path) -> Iterator[tuple[psutil.Process, Submit]]:
    """A warm worker beside the running stack, and what sends it an item and returns Celery's AsyncResult."""
    log, url = scratch / "naive-celery.log", os.environ["PIPEFLEET_REDIS_URL"]
    options = ["--pool", "threads", "--concurrency", str(THREADS), "--queues", QUEUE, "--loglevel", "WARNING"]
    command = [sys.executable, "-m", "celery", "-A", "tests.benchmarks.peer_celery", "worker", *options]
    with process(command, Served.of(workload, machine), log) as worker, Celery(broker=url, backend=url) as client:

        def submit(item: str) -> Any:
            return client.send_task(TASK, args=[item], queue=QUEUE)

        for result in [submit(item) for item in addresses(workload.first(2 * THREADS)).values()]:
            until_ready(worker, log, functools.partial(_has_come, result))
        yield worker, submit


def measure(workload: Workload, machine: Machine, scratch: Path, servers: Mapping[str, psutil.Process]) -> Measurement:
    """A stock Celery app: one task for each item, four threads that share the model, results through its Redis backend. Timed
    from the first item that is sent to the last `get`."""
    with running(workload, machine, scratch) as (worker, submit):
        with timed({"worker": worker, **servers}) as clock:
            results = {name: submit(item) for name, item in addresses(workload).items()}
            outputs = {name: result.get(WAIT_SECONDS) for name, result in results.items()}
    return Measurement(clock.seconds, clock.cpu, outputs)


def _has_come(result: Any) -> bool:
    try:
        result.get(timeout=0.5)
    except CeleryTimeoutError:
        return False
    return True
