"""The plan of a run: which checks belong to which part. `__main__` calls `checks`."""

from __future__ import annotations

from collections.abc import Iterator

from tests.gpu import (
    bench,
    bench_system,
    check_faults,
    check_lanes,
    check_memory,
    check_speed,
    check_tasks,
    check_transfer,
    machine,
)
from tests.gpu.plan import Check


def checks(device: str, part: str, *, quick: bool, only: str | None = None) -> list[Check]:
    """The checks of a part (`check`, `bench` or `all`), those of `--quick` alone, and those whose name contains `only`."""
    return [
        one
        for one in _all(on_gpu=device != "cpu")
        if part in (one.part, "all") and (one.quick or not quick) and (only or "") in one.name
    ]


def named(name: str, device: str) -> Check:
    """The check of this name. Raises StopIteration for an unknown one."""
    return next(one for one in (machine.CHECK, *_all(on_gpu=device != "cpu")) if one.name == name)


def _all(*, on_gpu: bool) -> Iterator[Check]:
    yield from check_tasks.checks(every_case=on_gpu)
    yield from check_speed.checks()
    yield from check_transfer.CHECKS
    yield from check_lanes.checks()
    yield from check_faults.CHECKS
    yield from check_memory.CHECKS
    yield from bench.checks()
    yield from bench_system.checks()
