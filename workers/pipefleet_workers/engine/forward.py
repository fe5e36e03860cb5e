"""One forward: a batch goes in, an output or a failure for every unit comes out. The lanes call it.

Only the culprit of a failure fails: a failed batch runs again in pieces. When memory runs out, the batch is halved, and later
batches become smaller. Raises DeviceBrokenError when only a new process can use the device again.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipefleet.contract.records import JobFailure
from pipefleet_workers.adapters.base import Adapter, brief
from pipefleet_workers.adapters.progress import STAGE, Progress
from pipefleet_workers.engine.transfer import Staged, Transfer
from pipefleet_workers.items import Batch, ItemError, Unit, spend
from pipefleet_workers.models.precision import half_advice

log = logging.getLogger(__name__)
_BROKEN = ("device-side assert", "illegal memory access", "unspecified launch failure", "CUBLAS_STATUS", "cudaErrorECC")
"""After one of these, a CUDA context answers every call with an error, so every later item would fail as well."""


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""Words of the memory errors of GPUs, of Linux and of Windows."""


class DeviceBrokenError(Exception):
    """Only a new process can use the device again."""


class Forward:
    """Runs batches through the model. All lanes use it; the collating thread uses only `collate`."""

    def __init__(self, adapter: Adapter, on_memory: Callable[[int], None], transfer: Transfer | None = None) -> None:
        self._adapter = adapter
        self._on_memory = on_memory
        self._transfer = transfer or Transfer()

    def excludes(self, batch: Batch) -> bool:
        """Whether no other batch may run beside this batch."""
        return self._adapter.excludes(batch.units)

    def collate(self, batch: Batch) -> Staged | None:
        """The inputs of a batch, on their way to the device before its run.

        None where collating fails: `run` then finds the culprit.
        """
        try:
            return self._transfer.begin(self._adapter.collate(batch.units))
        except Exception as error:  # noqa: BLE001 - `run` meets the error again, and finds its unit
            log.warning("a batch of %d cannot be collated (%s)", len(batch.units), brief(error))
            return None

    def run(
        self, batch: Batch, progress: Progress, staged: Staged | None = None
    ) -> list[tuple[Unit, Any | JobFailure]]:
        """For every unit its output or its failure, in the batch's order. Raises DeviceBrokenError."""
        begin = time.perf_counter()
        outputs = self._run(batch.units, progress, staged)
        share = (time.perf_counter() - begin) / len(batch.units)
        spend([unit.assembly.work for unit in batch.units], STAGE, share)
        return list(zip(batch.units, outputs, strict=True))

    def _run(self, units: Sequence[Unit], progress: Progress, staged: Staged | None = None) -> list[Any | JobFailure]:
        try:
            return self._once(units, progress, staged)
        except Exception as error:
            if is_broken(error):
                raise DeviceBrokenError(f"the device is broken: {brief(error)}") from error
            memory = out_of_memory(error)
            if len(units) == 1:
                return [_failure(units[0], error, self._adapter)]  # ignored if the unit's output was handed on earlier
            log.warning("a batch of %d failed (%s); running it again in pieces", len(units), brief(error))
        if memory:
            self._free_memory(units)
        return self._in_pieces(units, progress, halves=memory)

    def _in_pieces(self, units: Sequence[Unit], progress: Progress, *, halves: bool) -> list[Any | JobFailure]:
        """The outputs of units that failed together; None for each unit whose output is handed on already."""
        rest = [unit for unit in units if progress.remains(unit)]
        half = len(rest) // 2
        pieces = [piece for piece in (rest[:half], rest[half:]) if piece] if halves else [[unit] for unit in rest]
        found = (output for piece in pieces for output in self._run(piece, progress))
        outputs = dict(zip(map(id, rest), found, strict=True))
        return [outputs.get(id(unit)) for unit in units]

    def _once(self, units: Sequence[Unit], progress: Progress, staged: Staged | None) -> list[Any]:
        inputs = self._adapter.collate(units) if staged is None else self._transfer.finish(staged)
        outputs = self._adapter.split(self._through_model(inputs, units, progress), units)
        if len(outputs) != len(units):
            raise RuntimeError(f"the model gave {len(outputs)} outputs for {len(units)} inputs")
        return outputs

    def _through_model(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """The raw outputs of the model."""
        return self._adapter.run(inputs, units, progress)

    def _free_memory(self, units: Sequence[Unit]) -> None:
        """Free the memory of the failed batch, and make later batches smaller.

        Called outside the frames of the exception, which hold it.
        """
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._on_memory(Batch(units[0].key, units).cost // 2)


def is_broken(error: BaseException) -> bool:
    """Whether only a new process can use the device again."""
    return any(words in str(error) for words in _BROKEN)


def out_of_memory(error: BaseException) -> bool:
    """Whether the device ran out of memory; torch words this error differently on each kind of device."""
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or any(words in str(error).lower() for words in _NO_MEMORY)


def _failure(unit: Unit, error: BaseException, adapter: Adapter) -> JobFailure:
    if isinstance(error, ItemError):
        return error.failure
    code = "out_of_memory" if out_of_memory(error) else "model_error"
    advice = half_advice(error, getattr(getattr(adapter, "pipe", None), "model", None))
    further = f"; {advice}" if advice else ""
    return JobFailure(code, f"the model failed on an input of length {unit.length}: {brief(error)}{further}", STAGE)
