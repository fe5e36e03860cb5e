"""`compile = true` of a pool: the model's forward runs through torch.compile, compiled before the worker takes its first job.

    eager results of examples → compile → the same results? → every length and batch of one and of several, once → no more compiling

`models.acceleration` calls it. If a step fails, the model runs uncompiled, and the log says why. A model that compiling cannot
help raises UsageError.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipefleet.errors import UsageError
from pipefleet.fleet.pools import Pool
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.base import TOLERANCE, Adapter, brief
from pipefleet_workers.adapters.progress import UNOBSERVED
from pipefleet_workers.adapters.text.buckets import rounded_length
from pipefleet_workers.adapters.text.encoder import TextEncoder
from pipefleet_workers.items import ItemError, Unit
from pipefleet_workers.models.warmup import example_units

log = logging.getLogger(__name__)

BACKEND = "inductor"
SECONDS = 300.0
"""After this time no further length is begun. A compilation that has begun cannot be stopped."""
LONGEST = 8192
"""Size of the longest example, for models without a bound on positions."""
_PROVED = (5, 23, 61)


def require_compilable(pool: Pool, adapter: Adapter) -> None:
    """Raise UsageError if `compile = true` cannot help a pool's model."""
    model = adapter.pipe.model
    if getattr(model, "can_generate", lambda: False)():
        raise UsageError(
            f"pool {pool.name}: compile = true is for models that answer in one forward, and {type(model).__name__} writes step "
            "by step; leave it out"
        )
    if pool.device_map:
        raise UsageError(f"pool {pool.name}: compile = true and device_map exclude each other; leave one of them out")


def compile_forward(
    adapter: Adapter,
    pool: Pool,
    parameters: Mapping[str, Any],
    *,
    max_cost: int,
    backend: Any = BACKEND,
    seconds: float = SECONDS,
) -> bool:
    """Compile the model of `adapter` and run it with every length that fits `max_cost`; False if it stays uncompiled.

    Takes from seconds to minutes. Afterwards this process compiles nothing more: a new shape runs eagerly. Raises UsageError, see
    `require_compilable`.
    """
    require_compilable(pool, adapter)
    begin = time.perf_counter()
    try:
        _round_lengths(adapter, pool, parameters)
        proved = _proved_units(adapter, pool, parameters)
        wanted = adapter.numbers(proved)
        adapter.pipe.model.compile(dynamic=True, backend=backend)
        _require_equal(adapter.numbers(proved), wanted, adapter)
        for units in _shapes(adapter, pool, parameters, max_cost):
            adapter.split(adapter.run(adapter.collate(units), units, UNOBSERVED), units)
            if time.perf_counter() - begin > seconds:
                log.warning("compiling was cut off after %.0f s: what is longer runs as it is, not compiled", seconds)
                break
    except Exception as error:  # noqa: BLE001 - compilers fail in ways of their own, and the model runs without
        _undo(adapter)
        cause = getattr(error, "inner_exception", error)  # torch wraps the errors of its backend
        log.warning("the model runs as it is, compiling it failed: %s", brief(cause))
        return False
    torch.compiler.set_stance("eager_on_recompile")
    log.info("the model is compiled; it took %.1f s", time.perf_counter() - begin)
    return True


def _round_lengths(adapter: Adapter, pool: Pool, parameters: Mapping[str, Any]) -> None:
    """Let texts be padded to rounded lengths, if the padding changes no result."""
    if not isinstance(adapter, TextEncoder) or not adapter.pads:
        return
    units = _proved_units(adapter, pool, parameters)
    plain = [adapter.numbers([unit])[0] for unit in units]
    adapter.rounds_lengths = True
    padded = [adapter.numbers([unit])[0] for unit in units]
    adapter.rounds_lengths = _differ(padded, plain) <= _tolerance(adapter)


def _proved_units(adapter: Adapter, pool: Pool, parameters: Mapping[str, Any]) -> list[Unit]:
    """Units of unequal sizes if these may share a batch, else several units of one size."""
    sizes = _PROVED if adapter.pads else (adapter.typical_size or _PROVED[1],) * 2
    return [unit for size in sizes for unit in example_units(adapter, task_spec(pool.task), dict(parameters), size)]


def _shapes(adapter: Adapter, pool: Pool, parameters: Mapping[str, Any], max_cost: int) -> Iterator[list[Unit]]:
    """Batches of one and of two units, for every length up to `max_cost`. torch compiles a batch of one separately."""
    size = 1 if isinstance(adapter, TextEncoder) else adapter.typical_size or _PROVED[1]
    while size <= LONGEST:
        try:
            units = example_units(adapter, task_spec(pool.task), dict(parameters), size)
        except ItemError:  # the example has more tokens than the model has positions
            return
        if units[0].length > max_cost:
            return
        yield units[:1]
        yield units[:1] * 2
        if not isinstance(adapter, TextEncoder):
            return
        size = rounded_length(size + 1)


def _require_equal(
    found: Sequence[np.ndarray[Any, Any]], wanted: Sequence[np.ndarray[Any, Any]], adapter: Adapter
) -> None:
    difference, tolerance = _differ(found, wanted), _tolerance(adapter)
    if difference > tolerance:
        raise ValueError(f"its results differ by {difference:.1e}, above {tolerance:.0e}")


def _differ(found: Sequence[np.ndarray[Any, Any]], wanted: Sequence[np.ndarray[Any, Any]]) -> float:
    """The largest difference, relative to the largest number of each output; infinite if shapes differ."""
    pairs = list(zip(found, wanted, strict=True))
    if any(mine.shape != other.shape for mine, other in pairs):
        return float("inf")
    return max(float(np.abs(mine - other).max()) / max(1e-6, float(np.abs(other).max())) for mine, other in pairs)


def _tolerance(adapter: Adapter) -> float:
    return TOLERANCE.get(getattr(adapter.pipe, "dtype", None) or torch.float32, 1e-4)


def _undo(adapter: Adapter) -> None:
    adapter.pipe.model._compiled_call_impl = None
    if isinstance(adapter, TextEncoder):
        adapter.rounds_lengths = False
