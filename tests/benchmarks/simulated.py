"""A simulated accelerator fed from S3: the share of time in which the device works shows how well the stages overlap."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks import system, trace
from tests.benchmarks.measurement import Machine
from tests.benchmarks.workloads import Workload

SERVICE = "0.005,5e-6"
"""BASE,PER_COST in seconds. The tiny model's picture costs 3,072 elements, so a picture takes 15 ms and a batch 5 ms more."""
PICTURES = 400
QUICK_PICTURES = 40


def simulated(pictures: Workload, count: int) -> Workload:
    """`count` pictures for a tiny classifier: those of another workload again and again, under names of their own."""
    from tests.checkpoints import cached

    contents = list(pictures.items.values())
    items = {f"{index:06d}.jpg": contents[index % len(contents)] for index in range(count)}
    return replace(pictures, name="simulated", model=str(cached("image-classification")), items=items)


def measure(
    workload: Workload, machine: Machine, scratch: Path, *, service: str = SERVICE, picture: Path | None = None
) -> dict[str, Any]:
    """Pictures a second and the device's busy share, from the worker's trace; draws the trace to `picture`."""
    file = scratch / "trace.jsonl"
    worker = {"PIPEFLEET_WORKER_SIMULATED_DEVICE": service, "PIPEFLEET_WORKER_TRACE": str(file)}
    with system.running(workload, replace(machine, device="cpu"), scratch, worker=worker) as running:
        system.warm(running, workload)
        begin = time.monotonic()
        measured = system.measure(running, workload)
    # Read after the worker has ended, which is when its last lines are in the file.
    events = trace.read(file, since=begin)
    forwards = [event for event in events if event.stage == trace.DEVICE_STAGE]
    row: dict[str, Any] = {
        "service": service,
        "items": len(measured.outputs),
        "items_per_second": round(measured.rate, 2),
        "batches": len(forwards),
        "busy_share": round(trace.busy_share(events), 4),
        "cpu_us_per_item": {name: round(1e6 * used / len(measured.outputs), 1) for name, used in measured.cpu.items()},
    }
    if picture is not None:
        picture.write_text(trace.draw(events, f"One worker, simulated device: busy {row['busy_share']:.1%}"))
        print(f"  trace drawn to {picture}", flush=True)
    return row
