"""Every task's tiny models on the device: one call at a time and batched, through the engine, against the CPU in float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import transformers

from pipefleet_workers.adapters.base import brief
from pipefleet_workers.adapters.table import RUNTIME
from tests.gpu.engines import engine, load, outputs, served, tolerance
from tests.gpu.plan import Check, Order, Skip
from tests.gpu.same import differences
from tests.parity.cases import CASES, Case
from tests.parity.harness import Call

QUICK = ("text-classification", "image-classification", "text-generation")


def checks(*, every_case: bool) -> Iterator[Check]:
    """A check for each task, over all its parity cases or over the first one of each checkpoint."""
    for task in RUNTIME:
        cases = [case for case in CASES if case.task == task]
        if not every_case:
            cases = list({case.checkpoint: case for case in reversed(cases)}.values())
        yield Check(f"task {task}", "check", partial(_task, cases), 30.0 + 10 * len(cases), quick=task in QUICK)


def _task(cases: list[Case], order: Order) -> str:
    largest, like_theirs, calls = 0, 0, 0
    refused: list[str] = []
    for case in cases[:1] if order.quick else cases:
        found = _Case(case, order)
        refused += found.refused
        if found.calls:
            largest = max(largest, found.run())
            like_theirs += found.like_theirs
            calls += len(found.calls)
    own = f"transformers {transformers.__version__} itself refuses"
    if not calls:
        raise Skip(f"{own} {refused[0]}")
    said = [f"{calls} calls alone and together, up to {largest} in a batch"]
    said += [f"{like_theirs} differ from the CPU as the device's own pipeline does"] if like_theirs else []
    said += [f"{own} {len(refused)} more: {refused[0]}"] if refused else []
    return "; ".join(said)


class _Case:
    """One parity case on the device.

    `refused` are the calls that this transformers refuses on the CPU, without pipefleet, with its reasons. `like_theirs` counts
    results that equal those of transformers on this device only.
    """

    def __init__(self, case: Case, order: Order) -> None:
        self.case = case
        self.calls: list[Call] = []
        self.refused: list[str] = []
        self.like_theirs = 0
        self._wanted: list[Any] = []
        self._theirs: dict[int, Any] = {}
        self._device = order.device
        try:
            self._expect(order)
        except Exception as error:  # noqa: BLE001 - such as a missing library
            self.refused.append(f"{case.id}: {brief(error)}")
            return
        self._pipe = served(case.checkpoint, order.device)

    def _expect(self, order: Order) -> None:
        reference = load(self.case.checkpoint, "cpu")
        for call in self.case.calls(order.folder):
            try:
                self._wanted.append(self.case.expected(reference, call))
                self.calls.append(call)
            except Exception as error:  # noqa: BLE001 - older pipelines refuse or break on some calls
                self.refused.append(f"{self.case.id} with {dict(call.parameters)}: {brief(error)}")

    def run(self) -> int:
        """Compare all results; the size of the largest batch. Raises AssertionError."""
        with engine(self._pipe, self.case.task) as alone:
            self._compare("alone", [outputs(alone.run([copy.deepcopy(call)]))[0] for call in self.calls])
        with engine(self._pipe, self.case.task, held=True) as held:
            self._compare("together", outputs(held.together(copy.deepcopy(self.calls))))
            largest = max(len(batch.units) for batch in held.adapter.batches)
        if largest < self.case.shares:
            raise AssertionError(f"{self.case.id}: the largest batch has {largest} units, not {self.case.shares}")
        return largest

    def _compare(self, how: str, found: list[Any]) -> None:
        for index, (one, wanted) in enumerate(zip(found, self._wanted, strict=True)):
            apart = differences(one, wanted, tolerance(self._device))
            if apart and self._is_theirs(index, one):
                self.like_theirs += 1
            elif apart:
                where = f"{self.case.id}, call {index} {how}"
                raise AssertionError(f"{where}: {apart[0]} ({len(apart)} differences)")

    def _is_theirs(self, index: int, found: Any) -> bool:
        """Whether transformers' own pipeline gives this result on the device, for example with the device's random numbers."""
        if index not in self._theirs:
            call: Call = copy.deepcopy(self.calls[index])
            try:
                self._theirs[index] = self.case.expected(self._pipe, call)
            except Exception:  # noqa: BLE001 - some expectations are written by hand, for the CPU
                return False
        return not differences(found, self._theirs[index], tolerance(self._device))
