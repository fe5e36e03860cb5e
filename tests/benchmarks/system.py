"""pipefleet as a contender: the whole system, from S3 back to S3, with one worker process."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pipefleet.client import Client
from pipefleet_workers.local import Stack
from tests.benchmarks.contenders import Measurement
from tests.benchmarks.workloads import Workload


@contextmanager
def running(workload: Workload, scratch: Path) -> Iterator[tuple[Client, Stack]]:
    """A stack with one worker for the workload's model; its inputs lie in the bucket."""
    fleet = scratch / f"{workload.name}.toml"
    fleet.write_text(f'[pools.bench]\ntask = "{workload.task}"\nmodel = "{workload.model}"\n')
    begin = time.perf_counter()
    with Stack(scratch / f"data-{workload.name}", fleet=fleet, pools=["bench"], flower=False) as stack:
        print(f"  stack with the model of {workload.name} ready after {time.perf_counter() - begin:.1f} s", flush=True)
        os.environ.update(stack.environment())
        with Client() as client:
            _upload(client, workload)
            measure(client, stack, workload)  # warms the worker up as the other contenders are
            yield client, stack


def measure(client: Client, stack: Stack, workload: Workload) -> Measurement:
    """One bulk run, timed from the call of `map` to the end of `wait`."""
    worker = next(process for process in psutil.process_iter(["cmdline"]) if _is_worker(process, stack))
    before = worker.cpu_times()
    begin = time.perf_counter()
    run = client.map(
        workload.task, _source(workload), output=f"s3://pipefleet/bench/{uuid.uuid4().hex}/",
        parameters={**workload.parameters, **workload.pool_parameters},
    )  # fmt: skip
    ended = run.wait()
    seconds = time.perf_counter() - begin
    after = worker.cpu_times()
    assert ended.state == "succeeded", ended
    outputs = {_name(row["id"]): row["output"] for row in run.results()}
    return Measurement(seconds, after.user + after.system - before.user - before.system, outputs)


def _is_worker(process: psutil.Process, stack: Stack) -> bool:
    words: list[str] = process.info["cmdline"] or []
    return "worker" in words and any(str(stack.data) in word for word in words)


def _name(identity: Any) -> str:
    return str(identity).rsplit("/", 1)[-1]


def _source(workload: Workload) -> str:
    return f"s3://pipefleet/inputs/{workload.name}" + (".jsonl" if workload.is_text else "/")


def _upload(client: Client, workload: Workload) -> None:
    if workload.is_text:
        lines = [json.dumps({"id": name, "inputs": text}) for name, text in workload.items.items()]
        client.store.put(_source(workload), "\n".join(lines).encode())
        return
    for name, content in workload.items.items():
        client.store.put(_source(workload) + name, content, content_type="application/octet-stream")
