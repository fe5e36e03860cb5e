"""forward: one batch on the device. Only the culprit of a failure fails; out of memory halves the batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from pipefleet.records import JobFailure
from pipefleet_workers.adapters.base import Adapter, brief
from pipefleet_workers.items import Batch, Unit

log = logging.getLogger(__name__)
STAGE = "forward"


class Forward:
    """Runs batches through the model. Used by the device's thread alone."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def run(self, batch: Batch) -> list[tuple[Unit, Any | JobFailure]]:
        """The output of every unit, or why it has none, in the batch's order."""
        begin = time.perf_counter()
        outputs = self._run(batch.units)
        share = (time.perf_counter() - begin) / len(batch.units)
        for unit in batch.units:
            seconds = unit.assembly.work.seconds
            seconds[STAGE] = seconds.get(STAGE, 0.0) + share
        return list(zip(batch.units, outputs, strict=True))

    def _run(self, units: Sequence[Unit]) -> list[Any | JobFailure]:
        try:
            return self._once(units)
        except Exception as error:  # noqa: BLE001 - a model may raise anything; it ends in the result of a unit
            if len(units) == 1:
                return [_failure(units[0], error)]
            half = len(units) // 2 if _out_of_memory(error) else 1
            log.warning("a batch of %d failed (%s); running it again in pieces", len(units), brief(error))
        pieces = [units[:half], units[half:]] if half > 1 else [[unit] for unit in units]
        return [output for piece in pieces for output in self._run(piece)]

    def _once(self, units: Sequence[Unit]) -> list[Any]:
        inputs = self._adapter.collate(units)
        outputs = self._adapter.split(self._adapter.run(inputs, units), units)
        if len(outputs) != len(units):
            raise RuntimeError(f"the model gave {len(outputs)} outputs for {len(units)} inputs")
        return outputs


def _out_of_memory(error: BaseException) -> bool:
    """Torch names it differently on each kind of device."""
    return type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower()


def _failure(unit: Unit, error: BaseException) -> JobFailure:
    code = "out_of_memory" if _out_of_memory(error) else "model_error"
    return JobFailure(code, f"the model failed on an input of length {unit.length}: {brief(error)}", STAGE)
