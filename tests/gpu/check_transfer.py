"""Inputs copied to the device ahead of their forward, under load and with a delay on the copying stream: every result is right.

Without the wait for the copy the model would read memory that holds nothing yet. The second check takes this wait away and must see
wrong results, or the first would show nothing. In a rehearsal on a CPU a thread stands in for the stream.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from pipefleet_workers.engine import engine as engine_module
from pipefleet_workers.engine.device import Device
from pipefleet_workers.engine.transfer import CudaLink, Link, Transfer
from tests.checkpoints import CHECKPOINTS
from tests.gpu.engines import engine, load, outputs, tolerance
from tests.gpu.plan import Check, Order
from tests.gpu.same import differences
from tests.parity.harness import Call

TASKS = ("text-classification", "image-classification")
DELAY_CYCLES = 20_000_000
"""About ten milliseconds of a GPU, before each copied batch."""
ROUNDS, QUICK_ROUNDS = 40, 8


class LateLink(CudaLink):
    """Holds the copying stream back before each copy."""

    waits = True

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(DELAY_CYCLES)  # type: ignore[no-untyped-call]
        return super().copy(tensor)

    def join(self, mark: Any, tensors: list[torch.Tensor]) -> None:
        if self.waits:
            super().join(mark, tensors)


class HeedlessLink(LateLink):
    """Does not wait for its copies."""

    waits = False


class Standin:
    """A link of a CPU: what it copies is zero until a timer has filled it."""

    waits = True

    def __init__(self, device: torch.device) -> None:
        self._filled: list[threading.Event] = []

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        there, filled = torch.zeros_like(tensor), threading.Event()

        def fill() -> None:
            there.copy_(tensor)
            filled.set()

        self._filled.append(filled)
        threading.Timer(0.02, fill).start()
        return there

    def mark(self) -> list[threading.Event]:
        mark, self._filled = self._filled, []
        return mark

    def join(self, mark: list[threading.Event], tensors: list[torch.Tensor]) -> None:
        if self.waits:
            for filled in mark:
                filled.wait()


class HeedlessStandin(Standin):
    """Does not wait for its copies."""

    waits = False


@contextlib.contextmanager
def linked(kind: type[Link]) -> Iterator[None]:
    """Engines that are made in the block copy ahead through a link of this kind, on a CPU too."""
    transfer = mock.patch.object(Transfer, "to", lambda device: Transfer(kind(device)))  # type: ignore[call-arg]

    def ahead(*arguments: Any, **options: Any) -> Device:
        return Device(*arguments, **{**options, "collate_ahead": True})

    with transfer, mock.patch.object(engine_module, "Device", ahead):
        yield


def _late(order: Order) -> str:
    """Batches of all sizes, one behind the other, on several models."""
    link = LateLink if order.on_gpu else Standin
    batches = wrong = 0
    for task in TASKS:
        found, count = _through(task, link, order)
        wrong += found
        batches += count
    if wrong:
        raise AssertionError(f"{wrong} results are wrong: the device did not wait for its inputs")
    return f"{batches} batches, each copied with a delay, and every result right"


def _heedless(order: Order) -> str:
    link = HeedlessLink if order.on_gpu else HeedlessStandin
    wrong, batches = _through("image-classification", link, order)
    if not wrong:
        raise AssertionError("no result was wrong without the wait, so the other check shows nothing")
    return f"without the wait for the copies {wrong} results of {batches} batches are wrong, as they must be"


def _through(task: str, link: type[Link], order: Order) -> tuple[int, int]:
    """The number of wrong results, and of batches."""
    row, pipe = CHECKPOINTS[task], load(task, order.device)
    inputs = row.inputs(order.folder)
    wanted = [pipe(one, **row.parameters) for one in inputs]
    rounds = QUICK_ROUNDS if order.quick or not order.on_gpu else ROUNDS
    calls = [Call(one, row.parameters) for _ in range(rounds) for one in inputs]
    with linked(link), engine(pipe, task, max_items=5) as running:
        results = outputs(running.run(calls))
        batches = len(running.adapter.batches)
    bad = sum(
        bool(differences(one, wanted[index % len(inputs)], tolerance(order.device)))
        for index, one in enumerate(results)
    )
    return bad, batches


CHECKS = (
    Check("copies ahead, delayed", "check", _late, 60.0, quick=True),
    Check("copies ahead, without the wait", "check", _heedless, 60.0, quick=True),
)
