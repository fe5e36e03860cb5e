"""pipefleet as a contender: the whole system, from S3 back to S3, with one worker process."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipefleet.client import Client
from pipefleet_workers.fleet.local.environment import in_environment
from pipefleet_workers.fleet.local.stack import Stack
from tests.benchmarks.contenders import ENGINE_WARM_UP
from tests.benchmarks.measurement import Machine, Measurement, timed
from tests.benchmarks.workloads import Workload

POOL = "bench"


@dataclass(frozen=True)
class System:
    """A running stack with one worker, a client, and the processes of the worker and the two servers."""

    client: Client
    stack: Stack
    processes: dict[str, psutil.Process]


@contextlib.contextmanager
def running(
    workload: Workload,
    machine: Machine,
    scratch: Path,
    *,
    worker: Mapping[str, str] | None = None,
    pool: Mapping[str, Any] | None = None,
) -> Iterator[System]:
    """A stack with one warm worker for the workload's model; the inputs lie in the bucket.

    `worker` is the worker's environment beyond the usual, `pool` what the fleet file says of its pool beyond the usual.
    """
    fleet = scratch / f"{workload.name}.toml"
    table = {
        "task": workload.task,
        "model": workload.model,
        "device": machine.device,
        "dtype": machine.dtype,
        **(pool or {}),
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in table.items()]
    fleet.write_text("\n".join([f"[pools.{POOL}]", *lines, ""]))
    data, begin = scratch / f"data-{uuid.uuid4().hex[:8]}", time.perf_counter()
    with contextlib.ExitStack() as held:
        with in_environment({**machine.environment(), **(worker or {})}):
            stack = held.enter_context(Stack(data, fleet=fleet, pools=[POOL], flower=False))
        print(f"  stack with the model of {workload.name} ready after {time.perf_counter() - begin:.1f} s", flush=True)
        held.enter_context(in_environment(stack.environment()))
        client = held.enter_context(Client())
        _upload(client, workload)
        yield System(client, stack, _processes(stack))


def warm(system: System, workload: Workload) -> None:
    """A short run of the workload's first items, as the other contenders have before their clock starts."""
    sources = list(addresses(workload.first(ENGINE_WARM_UP)).values())
    run = system.client.map(
        workload.task, sources, output=_output(), parameters={**workload.parameters, **workload.pool_parameters}
    )
    run.wait()


def measure(system: System, workload: Workload) -> Measurement:
    """All of pipefleet from S3 back to S3: a bulk run through Redis and one worker process, from the call of `map` to the
    end of `wait`."""
    with timed(system.processes) as clock:
        run = system.client.map(
            workload.task, source(workload), output=_output(),
            parameters={**workload.parameters, **workload.pool_parameters},
        )  # fmt: skip
        ended = run.wait()
    if ended.state != "succeeded":
        raise RuntimeError(f"the run over {workload.name} ended as {ended.state}: {next(iter(run.failures()), None)}")
    outputs = {_name(row["id"]): row["output"] for row in run.results()}
    return Measurement(clock.seconds, clock.cpu, outputs)


def source(workload: Workload) -> str:
    """Where the inputs lie: a manifest of texts, or a prefix of media."""
    return f"s3://pipefleet/inputs/{workload.name}" + (".jsonl" if workload.is_text else "/")


def addresses(workload: Workload) -> dict[str, str]:
    """By name, what a peer is sent for each item: the text itself, or the URI of the object."""
    if workload.is_text:
        return dict(workload.items)
    return {name: source(workload) + name for name in workload.items}


def _output() -> str:
    return f"s3://pipefleet/bench/{uuid.uuid4().hex}/"


def _name(identity: Any) -> str:
    return str(identity).rsplit("/", 1)[-1]


def _upload(client: Client, workload: Workload) -> None:
    if workload.is_text:
        lines = [json.dumps({"id": name, "inputs": text}) for name, text in workload.items.items()]
        client.store.put(source(workload), "\n".join(lines).encode())
        return
    for name, content in workload.items.items():
        client.store.put(source(workload) + name, content, content_type="application/octet-stream")


def _processes(stack: Stack) -> dict[str, psutil.Process]:
    """By what their CPU time is called; the stack's children are told apart by their command lines."""
    found: dict[str, psutil.Process] = {}
    for child in psutil.Process(os.getpid()).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = child.cmdline()
            if "worker" in words and any(str(stack.data) in word for word in words):
                found["worker"] = child
    servers = {"redis": stack.redis.child, "s3": stack.s3.child}
    return found | {name: psutil.Process(child.pid) for name, child in servers.items() if child is not None}
