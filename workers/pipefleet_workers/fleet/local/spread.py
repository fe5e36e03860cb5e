"""Which device each worker of a pool gets: the emptiest when one starts, the fullest when one ends. Pure.

`Follower` and `Autoscaler` ask for a pool's devices and its room on this host, `Crew` for the device of a new worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from pipefleet.fleet.devices import ALL
from pipefleet.fleet.pools import Pool
from pipefleet_workers.process.host import Count, host_devices


class Placed(Protocol):
    """A worker on a device; None if it chooses a device itself."""

    @property
    def device(self) -> str | None:
        """The device's name."""


_Worker = TypeVar("_Worker", bound=Placed)


def devices_of(pool: Pool, count: Count) -> tuple[str, ...]:
    """The devices over which a pool's workers are spread on this host; empty if each worker finds its own device.

    That is so where the fleet file names the one device of all workers, and where there is nothing to choose.
    """
    if pool.devices is not None:
        return host_devices(pool.devices, count)
    if pool.device not in ("auto", "cuda") or pool.device_map is not None:
        return ()
    return host_devices(ALL, count) if count() > 1 else ()


def room_of(pool: Pool, count: Count) -> int | None:
    """How many workers of a pool this host has room for; None if the pool has no `devices`."""
    return None if pool.devices is None else len(devices_of(pool, count)) * pool.workers_per_device


def emptiest(devices: Sequence[str], workers: Iterable[Placed], everybody: Iterable[Placed]) -> str | None:
    """The device with fewest of a pool's `workers`; of equals, the device with fewest workers of any pool. None without devices."""
    own, others = _crowds(workers), _crowds(everybody)
    return min(devices, key=lambda name: (own[name], others[name]), default=None)


def surplus(workers: Sequence[_Worker], number: int) -> list[_Worker]:
    """`number` of `workers`, which are in the order in which they should end, so that the others stay evenly spread."""
    left, chosen = list(workers), list[_Worker]()
    for _ in range(number):
        crowds = _crowds(left)
        chosen.append(max(left, key=lambda one: crowds[one.device]))  # the first of equals
        left.remove(chosen[-1])
    return chosen


def misplaced(workers: Sequence[_Worker], devices: Sequence[str], most: int) -> list[_Worker]:
    """The workers on other devices than these, and those that are more than `most` on one; the oldest stay."""
    crowds: Counter[str | None] = Counter()
    found = []
    for worker in workers:
        crowds[worker.device] += 1
        if worker.device not in devices or crowds[worker.device] > most:
            found.append(worker)
    return found


def _crowds(workers: Iterable[Placed]) -> Counter[str | None]:
    return Counter(worker.device for worker in workers)
