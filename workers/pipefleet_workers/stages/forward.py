"""forward: one batch on the device. Only the culprit of a failure fails; out of memory halves the batch and the budget."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipefleet.records import JobFailure
from pipefleet_workers.adapters.base import Adapter, brief
from pipefleet_workers.items import Batch, Unit

log = logging.getLogger(__name__)
STAGE = "forward"
_BROKEN = ("device-side assert", "illegal memory access", "unspecified launch failure", "CUBLAS_STATUS", "cudaErrorECC")
"""After these a CUDA context answers every call with an error, so every later item would fail as well."""


class DeviceBrokenError(Exception):
    """The device can only be used again by a new process."""


class Forward:
    """Runs batches through the model. Used by the device's thread, `collate` also by the thread beside it."""

    def __init__(self, adapter: Adapter, on_memory: Callable[[int], None]) -> None:
        self._adapter = adapter
        self._on_memory = on_memory

    def collate(self, batch: Batch) -> Any:
        """The inputs of a batch ahead of its run; None where that fails, so that `run` finds the culprit."""
        try:
            return self._adapter.collate(batch.units)
        except Exception as error:  # noqa: BLE001 - found again, and put down to a unit, by `run`
            log.warning("a batch of %d cannot be collated (%s)", len(batch.units), brief(error))
            return None

    def run(self, batch: Batch, inputs: Any = None) -> list[tuple[Unit, Any | JobFailure]]:
        """The output of every unit, or why it has none, in the batch's order. Raises DeviceBrokenError."""
        begin = time.perf_counter()
        outputs = self._run(batch.units, inputs)
        share = (time.perf_counter() - begin) / len(batch.units)
        for unit in batch.units:
            seconds = unit.assembly.work.seconds
            seconds[STAGE] = seconds.get(STAGE, 0.0) + share
        return list(zip(batch.units, outputs, strict=True))

    def _run(self, units: Sequence[Unit], inputs: Any = None) -> list[Any | JobFailure]:
        try:
            return self._once(units, inputs)
        except Exception as error:
            if any(words in str(error) for words in _BROKEN):
                raise DeviceBrokenError(f"the device is broken: {brief(error)}") from error
            memory = _out_of_memory(error)
            if len(units) == 1:
                return [_failure(units[0], error)]
            log.warning("a batch of %d failed (%s); running it again in pieces", len(units), brief(error))
        if memory:
            self._free_memory(units)
        half = len(units) // 2
        pieces = [units[:half], units[half:]] if memory else [[unit] for unit in units]
        return [output for piece in pieces for output in self._run(piece)]

    def _once(self, units: Sequence[Unit], inputs: Any) -> list[Any]:
        inputs = self._adapter.collate(units) if inputs is None else inputs
        outputs = self._adapter.split(self._adapter.run(inputs, units), units)
        if len(outputs) != len(units):
            raise RuntimeError(f"the model gave {len(outputs)} outputs for {len(units)} inputs")
        return outputs

    def _free_memory(self, units: Sequence[Unit]) -> None:
        """Let go of what the failed batch held, outside its exception's frames, and make later batches smaller."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._on_memory(Batch(units[0].key, units).cost // 2)


def _out_of_memory(error: BaseException) -> bool:
    """Torch names it differently on each kind of device."""
    return type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower()


def _failure(unit: Unit, error: BaseException) -> JobFailure:
    code = "out_of_memory" if _out_of_memory(error) else "model_error"
    return JobFailure(code, f"the model failed on an input of length {unit.length}: {brief(error)}", STAGE)
