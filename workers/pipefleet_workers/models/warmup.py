"""Warm-up: before a worker takes jobs, it proves that its batches are exact, and measures how large they should be.

    examples → proof (padded, and timed, against alone) → budget (throughput knee, memory) → fit of the service time → lanes

`build` calls `warm_up`. A failed proof only makes batches simpler; a failed measurement uses the table's cost, and one lane. The
results are in the worker's log and metrics, and `pipefleet doctor` shows them. Only a half precision that the device cannot run
raises ModelError.
"""

from __future__ import annotations

import io
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pipefleet.contract.messages import JobItem, Priority
from pipefleet.tasks import Media, TaskSpec
from pipefleet_workers.adapters.base import TOLERANCE, Adapter, brief
from pipefleet_workers.adapters.progress import UNOBSERVED
from pipefleet_workers.inputs.video import Clip
from pipefleet_workers.items import Blob, Decoded, ItemError, JobContext, Nowhere, Unit, Work
from pipefleet_workers.models.cache import ModelError
from pipefleet_workers.models.difference import relative
from pipefleet_workers.models.lanes import Lanes, choose_lanes, enough_for_one, lanes_of
from pipefleet_workers.models.precision import half_advice
from pipefleet_workers.models.steps import seconds_to_write
from pipefleet_workers.observe.service_fit import ServiceFit, ServiceTime
from pipefleet_workers.process.watchdog import working_on

log = logging.getLogger(__name__)

KNEE = 0.95
"""A budget is large enough if it reaches this share of the best measured throughput."""
SECONDS = 1.0
"""No further batch is measured if it would end later than this; two batches are always measured."""
LANE_SECONDS = 0.03
"""Seconds of a batch with which lanes are measured: long enough to be typical, and short enough to run dozens."""
MEMORY_SHARE = 0.8
"""Share of a GPU's free memory that a batch may take."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """The results: whether padding is exact, how much it differs, and the largest padded cost of a batch."""

    pads: bool
    difference: float
    tolerance: float
    max_cost: int
    seconds: float
    moments: float = 0.0
    """The difference of the timestamps of words between a batch and a unit alone, relative as `difference`."""
    lanes: Lanes = field(default_factory=Lanes)
    """The forwards that run at once."""
    continuous: bool = False
    """Whether requests join and leave at every step, see `models.continuous`."""

    def describe(self) -> str:
        """One line for people."""
        if not self.pads:
            how = "equal shapes only"
            how += f" (padding differs by {self.difference:.1e}, above {self.tolerance:.0e})" if self.difference else ""
        else:
            how = f"padded (differs by {self.difference:.1e}, within {self.tolerance:.0e})"
        if self.moments > self.tolerance:
            how += f", word timestamps alone (a batch moves them by {self.moments:.1e})"
        joins = "requests join and leave at every step; other " if self.continuous else ""
        return f"{joins}batches: {how}, up to a cost of {self.max_cost}; {self.lanes.describe()}; warm-up took {self.seconds:.1f} s"

    def to_json(self) -> dict[str, Any]:
        """The fields for the worker's announcement."""
        return asdict(self)


def warm_up(
    adapter: Adapter,
    spec: TaskSpec,
    parameters: dict[str, Any],
    fit: ServiceFit,
    default_cost: int,
    *,
    lanes: int = 1,
) -> WarmUp:
    """Prove and measure. Feeds `fit`. Uses simpler batches rather than raising an error.

    `lanes` is the number of lanes; 0 for the fastest number.

    Sets `adapter.pads` and `adapter.times_together` to False if their proof fails. Raises ModelError only if the model cannot run
    in its half precision on this device, since every job would fail.
    """
    begin = time.perf_counter()
    difference, tolerance = 0.0, TOLERANCE.get(getattr(adapter.pipe, "dtype", None) or torch.float32, 1e-4)
    if adapter.pads:
        difference = _difference(adapter, spec, parameters)
        adapter.pads = difference <= tolerance
    moments = _difference_of_moments(adapter, spec, parameters)
    adapter.times_together = moments <= tolerance
    try:
        cost = _budget(adapter, spec, parameters, fit, default_cost)
    except Exception as error:
        advice = half_advice(error, adapter.pipe.model)
        if advice is not None:
            raise ModelError(f"the example of the warm-up failed ({brief(error)}): {advice}") from None
        log.exception("the warm-up could not measure batches; taking %d as their largest cost", default_cost)
        cost = default_cost
    found_lanes = _lanes(adapter, spec, parameters, fit.current(), asked=lanes, tolerance=tolerance, max_cost=cost)
    found_lanes = replace(found_lanes, one_thread=_one_thread(adapter, spec, parameters, fit.current(), cost))
    seconds = time.perf_counter() - begin
    found = WarmUp(adapter.pads, difference, tolerance, cost, seconds, moments, found_lanes)
    log.info(found.describe())
    return found


def _difference(adapter: Adapter, spec: TaskSpec, parameters: dict[str, Any]) -> float:
    """The largest relative difference between units of unequal length in one batch and each unit alone; infinite on an error."""
    return _apart(adapter.numbers, lambda: _examples(adapter, spec, parameters, (5, 23, 61)))


def _difference_of_moments(adapter: Adapter, spec: TaskSpec, parameters: dict[str, Any]) -> float:
    """The same difference for the timestamps of words; 0.0 for a model that gives no timestamps of words."""
    if not adapter.tells_moments:
        return 0.0
    return _apart(adapter.moments, lambda: _examples(adapter, spec, parameters, (5, 61)))


def _examples(adapter: Adapter, spec: TaskSpec, parameters: dict[str, Any], sizes: Sequence[int]) -> list[Unit]:
    return [unit for size in sizes for unit in example_units(adapter, spec, parameters, size)]


def _apart(compute: Callable[[Sequence[Unit]], list[np.ndarray[Any, Any]]], make: Callable[[], list[Unit]]) -> float:
    try:
        units = make()
        together = compute(units)
        alone = []
        for unit in units:
            working_on(None)
            alone += compute([unit])[:1]
    except Exception:
        log.exception("the proof of exactness failed to run")
        return float("inf")
    return max(relative(mine, other) for mine, other in zip(together, alone, strict=True))


def _budget(adapter: Adapter, spec: TaskSpec, parameters: dict[str, Any], fit: ServiceFit, default: int) -> int:
    """The smallest padded cost near the best throughput: at least half the default, at most four times the default."""
    if not adapter.typical_size:
        return default
    unit = example_units(adapter, spec, parameters, adapter.typical_size)[0]
    seconds = _measured(adapter, unit, _most(adapter, default))
    for cost, one in seconds.items():
        fit.add(cost, one)
    if not seconds:
        return default
    if adapter.pipe.device.type == "cpu":
        seconds |= _foreseen(seconds, _most(adapter, default))
    rates = {cost: cost / one for cost, one in seconds.items()}
    best = max(rates.values())
    knee = min(cost for cost, rate in rates.items() if rate >= KNEE * best)
    return max(knee, default // 2, unit.cost)


def _most(adapter: Adapter, default: int) -> int:
    """The largest cost that may be found: on a GPU, the few steps that are timed do not show the memory of a whole answer."""
    return default if adapter.typical_steps and adapter.pipe.device.type != "cpu" else 4 * default


def _measured(adapter: Adapter, unit: Unit, most: int) -> dict[int, float]:
    """The seconds of batches of 1, 2, 4, … such units by their cost: two batches, and as many more as `SECONDS` allow."""
    seconds: dict[int, float] = {}
    last, count = _timed(adapter, [unit]), 1  # not counted: the first call compiles and allocates
    begin = time.perf_counter()
    while unit.cost * count <= most and _fits_memory(adapter, seconds):
        if len(seconds) > 1 and time.perf_counter() - begin + 2 * last > SECONDS:
            break
        last = min(_timed(adapter, [unit] * count) for _ in range(1 if adapter.typical_steps else 2))
        seconds[unit.cost * count] = last
        count *= 2
    return seconds


def _foreseen(seconds: dict[int, float], most: int) -> dict[int, float]:
    """The seconds of larger batches, on the straight line through the two largest measured ones.

    A CPU would take too long to run them all.
    """
    if len(seconds) < 2:
        return {}
    (less, before), (cost, after) = list(seconds.items())[-2:]
    slope = max(0.0, after - before) / (cost - less)
    larger = itertools.takewhile(lambda one: one <= most, (cost << doublings for doublings in itertools.count(1)))
    return {one: after + slope * (one - cost) for one in larger}


def _lanes(
    adapter: Adapter,
    spec: TaskSpec,
    parameters: dict[str, Any],
    service: ServiceTime | None,
    *,
    asked: int,
    tolerance: float,
    max_cost: int,
) -> Lanes:
    """The lanes of the worker. A task without a typical size is not measured: it gets `asked` lanes, or one."""
    working_on(None)
    device, measured = adapter.pipe.device, bool(adapter.typical_size) and service is not None
    if asked == 1 or not (asked or measured):
        return lanes_of(device)
    try:
        examples = _examples(adapter, spec, parameters, (5, 23, 61))
        unit = example_units(adapter, spec, parameters, adapter.typical_size or 23)[0]
    except Exception as error:  # noqa: BLE001 - a model without examples runs in one lane
        log.warning("1 lane: no examples can be made for this model (%s)", brief(error))
        return lanes_of(device)
    count = 1
    if service is not None:
        count = int((LANE_SECONDS - service.base) / max(1e-9, service.per_cost * unit.cost))
    batch = [unit] * max(1, min(count, max_cost // unit.cost))
    return choose_lanes(adapter, examples, batch, asked=asked, tolerance=tolerance)


def _one_thread(
    adapter: Adapter, spec: TaskSpec, parameters: dict[str, Any], service: ServiceTime | None, most: int
) -> int:
    """The cost for which one torch thread is enough on a CPU; 0 if nothing can be measured."""
    if adapter.pipe.device.type != "cpu" or not adapter.typical_size or service is None:
        return 0
    try:
        unit = example_units(adapter, spec, parameters, adapter.typical_size)[0]
        seconds = max(0.0, service.base + service.per_cost * unit.cost)
        return enough_for_one(lambda batch: _timed(adapter, batch), unit, seconds=seconds, most=most)
    except Exception as error:  # noqa: BLE001 - whatever a model raises, all threads can run it
        log.warning("all torch threads run every batch: fewer could not be measured (%s)", brief(error))
        return 0


def _timed(adapter: Adapter, units: Sequence[Unit]) -> float:
    """The seconds of a batch; of a batch whose rows write, the seconds of typical answers."""
    working_on(None)
    if adapter.typical_steps:
        return seconds_to_write(adapter, units)
    begin = time.perf_counter()
    adapter.split(adapter.run(adapter.collate(units), units, UNOBSERVED), units)
    return time.perf_counter() - begin


def _fits_memory(adapter: Adapter, seconds: dict[int, float]) -> bool:
    """Whether a batch of twice the last cost would fit: its peak grows about linearly with the cost."""
    if adapter.pipe.device.type != "cuda" or not seconds:
        return True
    free, total = torch.cuda.mem_get_info(adapter.pipe.device)
    peak = torch.cuda.max_memory_allocated(adapter.pipe.device)
    return bool(2 * peak < MEMORY_SHARE * total and free > (1 - MEMORY_SHARE) * total)


def example_units(adapter: Adapter, spec: TaskSpec, parameters: dict[str, Any], size: int) -> list[Unit]:
    """The units of one made-up input of about `size`: words, tenths of a second, or eight pixels a side for each."""
    parameters = {**adapter.example_parameters(), **parameters}
    context = JobContext("warm-up", None, parameters, int(Priority.NORMAL), None, Nowhere())
    work = Work(context, 0, JobItem("warm-up", ""), parameters, 0)
    example = adapter.example(size)
    if example is None:
        example = _example(spec, size, adapter.sampling_rate or 16_000)
    (prepared,) = adapter.prepare([Decoded(work, example)])
    if isinstance(prepared, ItemError):
        raise prepared
    return prepared


def _example(spec: TaskSpec, size: int, rate: int) -> Any:
    """A made-up input of a task: its main value, or the fields that it needs."""
    if spec.media is not None:
        return _made_up(spec.media, size, rate)
    return {name: _made_up(spec.fields[name], size, rate) for name in spec.required}


def _made_up(media: Media, size: int, rate: int) -> Any:
    source = np.random.default_rng(size)
    match media:
        case Media.TEXT | Media.TEXTS | Media.PROMPT:
            return " ".join(source.choice(["the", "sea", "of", "trees", "was", "wide", "and", "old"], size))
        case Media.AUDIO | Media.AUDIOS:
            return (0.1 * source.standard_normal(int(rate * size / 10))).astype(np.float32)
        case Media.IMAGE | Media.IMAGES:
            return _picture(source, size)
        case Media.IMAGE_PAIR:
            return [_picture(source, size), _picture(source, size)]
        case Media.VIDEO | Media.VIDEOS:
            return _clip(source)
        case _:
            raise NotImplementedError(f"no example is made up of {media}")


def _picture(source: np.random.Generator, size: int) -> Any:
    from PIL import Image

    return Image.fromarray(source.integers(0, 255, (size * 8, size * 8, 3), dtype=np.uint8))


def _clip(source: np.random.Generator) -> Any:
    """Frames of noise, more than most models take. Noise, since an animation leaves out equal frames."""
    buffer = io.BytesIO()
    first, *rest = [_picture(source, 4) for _ in range(128)]
    first.save(buffer, format="GIF", save_all=True, append_images=rest)
    return Clip(Blob("warm-up.gif", buffer.getvalue(), None), max_frames=len(rest) + 1, max_pixels=1 << 20)
