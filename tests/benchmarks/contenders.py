"""Who takes part: each contender's name and reason (its docstring, which the page quotes), and the ones that need no server."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.benchmarks import by_hand, processes
from tests.benchmarks.measurement import Machine, Measurement
from tests.benchmarks.workloads import Workload, decode_item

BATCH = 32
ONE_BY_ONE, BATCHED, HAND, HANDS = "one-by-one", "batched", "hand", "hands"
CELERY, LITSERVE, ENGINE, SYSTEM = "celery", "litserve", "engine", "system"
LIMITS = (HAND, HANDS)
"""The better of them is the limit."""
PEERS = (CELERY, LITSERVE)
NEEDS_SERVERS = (CELERY, LITSERVE, SYSTEM)
WARM_UP = 8
"""Items that run before the clock starts."""
ENGINE_WARM_UP = 128
"""The same for pipefleet, whose threads take slices of up to 32 texts: each of them has had one then."""


def one_by_one(pipe: Any, workload: Workload, numbers: Iterator[int]) -> dict[str, Any]:
    """`pipeline(x)` in a loop: what most scripts do. Its outputs are what the others' outputs are compared with."""
    arguments = {**workload.parameters, **workload.pipeline_parameters}
    return {name: _kept(workload, pipe(decode_item(workload, name), **arguments)) for name in workload.items}


def batched(pipe: Any, workload: Workload, numbers: Iterator[int]) -> dict[str, Any]:
    """`pipeline(generator, batch_size=32)`: what the documentation advises for throughput. Batches in order of arrival."""
    stream = (decode_item(workload, name) for name in workload.items)
    arguments = {**workload.parameters, **workload.pipeline_parameters}
    outputs = pipe(stream, batch_size=BATCH, **arguments)
    return {name: _kept(workload, one) for name, one in zip(workload.items, outputs, strict=True)}


def hand(pipe: Any, workload: Workload, numbers: Iterator[int]) -> dict[str, Any]:
    """A loop written by hand for this workload alone, everything in memory, nothing in between: items sorted by length,
    texts tokenised in bulk, pictures decoded and resized by threads, recordings that have ended dropped from their batch. One
    process with as many torch threads as there are cores."""
    parts = by_hand.pieces(workload, 1)
    return by_hand.run(pipe, workload, (parts[number] for number in numbers))


@dataclass(frozen=True)
class Hands:
    """The same loop in as many processes as there are cores (on a GPU: two), each with one torch thread, drawing pieces of
    the work from one counter. It is faster for small models: torch's threads meet at the end of each of a forward's many
    operations, and the last one holds up the others, whereas processes meet once at the end. What runs in Python or outside of the
    forward (tokenising, decoding, a token's choice) uses one core in one process, and all cores here. The price is a copy of the
    weights for each process."""

    count: int

    def __call__(self, pipe: Any, workload: Workload, numbers: Iterator[int]) -> dict[str, Any]:
        parts = by_hand.pieces(workload, self.count)
        return by_hand.run(pipe, workload, (parts[number] for number in numbers if number < len(parts)))


def engine(pipe: Any, workload: Workload, numbers: Iterator[int]) -> dict[str, Any]:
    """pipefleet's engine in one process, fed from memory: without messages, Redis and S3."""
    from tests.benchmarks.in_process import through_the_engine

    return dict(zip(workload.items, through_the_engine(pipe, workload), strict=True))


ALONE: dict[str, processes.Run] = {ONE_BY_ONE: one_by_one, BATCHED: batched, HAND: hand, ENGINE: engine}
"""Contenders in one process without servers."""
TITLES = {
    ONE_BY_ONE: "`pipeline()` one by one",
    BATCHED: f"`pipeline(batch_size={BATCH})`",
    CELERY: "naive Celery",
    LITSERVE: "LitServe",
    HAND: "hand loop, one process",
    HANDS: "hand loops, a process for each core",
    ENGINE: "pipefleet, in process",
    SYSTEM: "pipefleet, whole system",
}
"""All contenders, in the order of a round and of a table."""


def in_one_process(name: str, workload: Workload, machine: Machine, *, warm: bool = True) -> Measurement:
    """Run one of `ALONE`, after a warm-up where the time counts."""
    warm_up = 0 if not warm else ENGINE_WARM_UP if name == ENGINE else WARM_UP
    return processes.run(processes.Task(ALONE[name], workload, warm_up, machine, pieces=1), 1)


def by_all_cores(workload: Workload, machine: Machine, *, warm: bool = True) -> Measurement:
    """Run the hand loop in as many processes as the machine has cores for."""
    count = machine.processes
    pieces = len(by_hand.pieces(workload, count))
    task = processes.Task(Hands(count), workload, WARM_UP if warm else 0, machine.single_threaded(), pieces)
    return processes.run(task, count)


def about(subject: Callable[..., Any] | type) -> str:
    """A contender's docstring as one paragraph."""
    return " ".join((inspect.getdoc(subject) or "").split())


def _kept(workload: Workload, output: Any) -> Any:
    return output.float().cpu().numpy()[0] if workload.task == "feature-extraction" else output
