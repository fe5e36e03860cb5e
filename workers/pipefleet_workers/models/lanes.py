"""Measures how many forwards should run at once on one device: each in a lane, a thread that calls the one shared model.

    proof: lanes give the results of one lane, and change nothing in the model ─▶ twice as many lanes, while that pays

The warm-up calls `choose_lanes`. A model whose proof fails, and an adapter that is not `parallel`, get one lane. Nothing is raised.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from pipefleet_workers.adapters.base import Adapter, brief
from pipefleet_workers.adapters.progress import UNOBSERVED
from pipefleet_workers.items import Unit
from pipefleet_workers.models.difference import relative
from pipefleet_workers.models.steps import first_scores, seconds_to_write
from pipefleet_workers.process.torch_threads import torch_threads, use_torch_threads
from pipefleet_workers.process.watchdog import listen, listener, working_on

log = logging.getLogger(__name__)

SECONDS = 1.0
"""Seconds after which no further number of lanes is measured."""
ROUNDS, ROUND_SECONDS = 2, 0.4
"""Each number of lanes is measured this often at least, and until so many seconds have passed; the best time counts."""
BATCHES = 4
"""Least number of batches that a measurement runs; where rows write, a batch takes long, and each lane runs one."""
NOISE = 1.2
"""If the two best times of one number of lanes differ by more than this factor, other processes disturb the clock."""
EQUAL, PAYS = 0.98, 1.05
"""Least throughput of a CPU with two lanes, relative to one lane; and with more lanes, relative to half as many.

Two lanes that are as fast as one in a measurement are faster at work: one runs while the other splits its outputs, and while the
threads of other stages take cores. But each lane takes the memory of a batch, and makes batches last longer.
"""
PAYS_ON_GPU = 1.1
"""The same for two lanes on a GPU."""
MOST = {"cpu": 16, "cuda": 2}
"""Most lanes by kind of device; a CPU has at most one for each torch thread. Other devices have one."""
ENOUGH = 1.2
"""One torch thread is enough for a batch if it takes at most this many times the seconds of all threads.

Threads that wait for each other at the end of every operation cost more than a small model computes: with two threads its forward
may take twice as long, and three times the time of the cores.
"""
THREAD_ROUNDS, THREAD_SECONDS = 3, 0.3
"""One thread and all threads run each batch this often, in turns; the best times count. All batches together take about so many
seconds, so a model whose single forward takes long is not measured."""
MEMORY_SHARE = 0.8
"""Share of a GPU's memory that the batches of all lanes may take together."""
_NO_STATE = ("_parameters", "_buffers", "_modules")
"""Attributes of a module that hold other objects, which are looked at themselves."""
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Lanes:
    """Forwards that run at once on a device."""

    count: int = 1
    threads: int = 0
    """Torch threads of each lane while others run; 0 for torch's own number."""
    alone: int = 0
    """Torch threads of a lane that runs alone; 0 for torch's own number."""
    gain: float = 1.0
    """Measured throughput, as a multiple of the throughput of one lane; 1.0 for a number that was not measured."""
    one_thread: int = 0
    """Largest cost of a batch for which one torch thread is enough, see `enough_for_one`."""

    def describe(self) -> str:
        """A phrase for people."""
        small = f"; batches up to a cost of {self.one_thread} take one torch thread" if self.one_thread else ""
        if self.count == 1:
            return f"1 lane{small}"
        threads = f" of {self.threads} torch thread{'s' if self.threads > 1 else ''}" if self.threads else ""
        gain = f" ({self.gain:.2f} times one lane)" if self.gain != 1.0 else ""
        return f"{self.count} lanes{threads}{gain}{small}"


def choose_lanes(
    adapter: Adapter, examples: Sequence[Unit], batch: Sequence[Unit], *, asked: int, tolerance: float
) -> Lanes:
    """The lanes of a worker: `asked`, or those that run batches like `batch` fastest if `asked` is 0.

    `examples` are units of unequal lengths; each alone has to give the same numbers in every lane.
    """
    device = adapter.pipe.device
    most = asked or most_lanes(device)
    if most == 1:
        return lanes_of(device)
    if not adapter.parallel:
        if asked:
            log.warning("1 lane instead of %d: forwards of this task cannot run at once", asked)
        return lanes_of(device)
    before = torch_threads()
    try:
        reason = _difference(adapter, examples, lanes_of(device, asked or 2), tolerance)
        if reason:
            log.warning("1 lane: %s", reason)
            return lanes_of(device)
        return lanes_of(device, asked) if asked else _fastest(adapter, batch, most)
    except Exception as error:  # noqa: BLE001 - whatever a model raises, one lane can run it
        log.warning("1 lane: several could not be measured (%s)", brief(error))
        return lanes_of(device)
    finally:
        use_torch_threads(before)  # threads that begin later take over the number that was set last
        if device.type == "cuda":
            torch.cuda.empty_cache()  # memory that one stream has freed serves no other stream


def lanes_of(device: torch.device, count: int = 1) -> Lanes:
    """So many lanes, which share the torch threads of this process if the device is the CPU."""
    if device.type != "cpu":
        return Lanes(count)
    return Lanes(count, max(1, torch_threads() // count), torch_threads())


def enough_for_one(run: Callable[[Sequence[Unit]], float], unit: Unit, *, seconds: float, most: int) -> int:
    """The largest cost of a batch of such units for which one torch thread is enough; 0 if it is enough for none.

    `run` runs a batch and returns its seconds; one unit takes about `seconds`. Larger batches are tried up to the cost `most`.
    """
    before, left, found, count = torch_threads(), THREAD_SECONDS, 0, 1
    try:
        while before > 1 and unit.cost * count <= most and (left := left - 2 * THREAD_ROUNDS * seconds) > 0:
            one, all_of_them = _one_and_all(run, [unit] * count, before)
            if one > ENOUGH * all_of_them:
                break
            found, count, seconds = unit.cost * count, 2 * count, 2 * one
    finally:
        use_torch_threads(before)
    return found


def _one_and_all(run: Callable[[Sequence[Unit]], float], batch: Sequence[Unit], threads: int) -> tuple[float, float]:
    """The best seconds of one torch thread, and of all `threads`."""
    best = {1: float("inf"), threads: float("inf")}
    for _ in range(THREAD_ROUNDS):
        for count, seconds in best.items():
            use_torch_threads(count)
            best[count] = min(seconds, run(batch))
    return best[1], best[threads]


def most_lanes(device: torch.device) -> int:
    """The largest number of lanes that is worth measuring on a device."""
    most = MOST.get(device.type, 1)
    return min(most, torch_threads()) if device.type == "cpu" else most


@contextlib.contextmanager
def lane_stream(device: torch.device, lanes: Lanes) -> Iterator[None]:
    """A context for the thread of a lane. On a GPU with several lanes, its work is queued on a stream of its own."""
    if device.type != "cuda" or lanes.count == 1:
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield


@dataclass(slots=True)
class _Times:
    """What one number of lanes took for a batch, in each round: seconds, and seconds of all cores."""

    seconds: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)

    @property
    def noisy(self) -> bool:
        best, next_best, *_ = sorted(self.seconds)
        return next_best > NOISE * best


def _fastest(adapter: Adapter, batch: Sequence[Unit], most: int) -> Lanes:
    """Twice as many lanes, as long as that pays."""
    device, end = adapter.pipe.device, time.perf_counter() + SECONDS
    best, gain = lanes_of(device), 1.0
    while 2 * best.count <= most and time.perf_counter() < end:
        more = lanes_of(device, 2 * best.count)
        step = _step(adapter, batch, best, more)
        if step < _least(device, more) or not _fits_memory(device):
            break
        best, gain = more, gain * step
    return replace(best, gain=gain)


def _least(device: torch.device, lanes: Lanes) -> float:
    if device.type != "cpu":
        return PAYS_ON_GPU
    return EQUAL if lanes.count == 2 else PAYS


def _step(adapter: Adapter, batch: Sequence[Unit], lanes: Lanes, more: Lanes) -> float:
    """The throughput of `more` lanes, as a multiple of that of `lanes`. Both are measured in turns.

    On a CPU that other processes use as well, the time that the cores took says more than the clock.
    """
    times = {lanes: _Times(), more: _Times()}
    end = time.perf_counter() + ROUND_SECONDS
    while len(times[more].seconds) < ROUNDS or time.perf_counter() < end:
        for one, found in times.items():
            seconds, cores = _seconds(adapter, batch, one)
            found.seconds.append(seconds)
            found.cores.append(cores)
    noisy = adapter.pipe.device.type == "cpu" and any(one.noisy for one in times.values())
    before, after = (min(one.cores if noisy else one.seconds) for one in times.values())
    log.debug("%d lanes run %.2f times as fast as %d (noisy: %s)", more.count, before / after, lanes.count, noisy)
    return before / after


def _seconds(adapter: Adapter, batch: Sequence[Unit], lanes: Lanes) -> tuple[float, float]:
    """Seconds for a batch if `lanes` run many of them, and the seconds that all cores together took for it."""
    count = lanes.count if adapter.typical_steps else max(BATCHES, lanes.count)

    def one(_: int) -> None:
        if adapter.typical_steps:
            seconds_to_write(adapter, batch)
        else:
            adapter.split(adapter.run(adapter.collate(batch), batch, UNOBSERVED), batch)

    begin, cores = time.perf_counter(), time.process_time()
    in_lanes(adapter.pipe.device, lanes, count, one)
    return (time.perf_counter() - begin) / count, (time.process_time() - cores) / count


def in_lanes(device: torch.device, lanes: Lanes, count: int, run: Callable[[int], _Result]) -> list[_Result]:
    """The results of `run(0)` to `run(count - 1)`, computed in `lanes` that all begin at once."""
    numbers, results = iter(range(count)), dict[int, _Result]()
    ready, watching = threading.Barrier(lanes.count), listener()

    def lane(_: int) -> None:
        listen(watching)  # whoever watches the caller hears of each run
        if lanes.threads:
            use_torch_threads(lanes.threads)
        with lane_stream(device, lanes):
            ready.wait()
            for number in numbers:
                working_on(None)
                results[number] = run(number)

    with ThreadPoolExecutor(lanes.count) as threads:
        list(threads.map(lane, range(lanes.count)))
    return [results[number] for number in range(count)]


def _difference(adapter: Adapter, examples: Sequence[Unit], lanes: Lanes, tolerance: float) -> str:
    """Why several lanes are not exact; empty if they are."""

    def compute(unit: Unit) -> np.ndarray[Any, Any]:
        working_on(None)
        return first_scores(adapter, unit) if adapter.typical_steps else adapter.numbers([unit])[0]

    wanted = [compute(unit) for unit in examples]
    before = _state(adapter.pipe.model)
    runs = len(examples) * lanes.count + 1  # lanes meet examples of unequal lengths in ever other pairs
    order = [number % len(examples) for number in range(runs)]
    found = in_lanes(adapter.pipe.device, lanes, runs, lambda number: compute(examples[order[number]]))
    difference = max(relative(one, wanted[index]) for one, index in zip(found, order, strict=True))
    if not difference <= tolerance:  # also if it is no number
        return f"forwards that run at once differ by {difference:.1e}, above {tolerance:.0e}"
    changed = _changed(before, _state(adapter.pipe.model))
    return f"the model keeps data between forwards, in {changed}" if changed else ""


def _state(model: torch.nn.Module) -> dict[str, Any]:
    """The attributes and buffers of all modules, buffers with the number of their changes."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found |= {f"{path}.{name}": value for name, value in vars(module).items() if name not in _NO_STATE}
        for name, buffer in module._buffers.items():
            if buffer is not None:
                found[f"{path}.{name}"] = buffer
                found[f"{path}.{name}, changes"] = 0 if buffer.is_inference() else buffer._version
    return found


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The name of an attribute that is another object than before; empty if there is none."""
    names = (name for name, value in after.items() if name not in before or not _same(before[name], value))
    return next(names, "").removeprefix(".")


def _same(mine: Any, other: Any) -> bool:
    return mine is other or (isinstance(mine, int | float | str) and mine == other)


def _fits_memory(device: torch.device) -> bool:
    """Whether two of the largest batches that this process has run fit a GPU together."""
    if device.type != "cuda":
        return True
    _, total = torch.cuda.mem_get_info(device)
    return bool(2 * torch.cuda.max_memory_allocated(device) < MEMORY_SHARE * total)
