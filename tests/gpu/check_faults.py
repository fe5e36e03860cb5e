"""Errors after which a device answers nothing more: the worker's process ends with its own code, and the next one can work.

A model's token beyond its vocabulary stops a GPU with a device-side assert. A CPU knows no such error, so in a rehearsal the
adapter raises its words.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.text.encoder import TextClassifier
from pipefleet_workers.items import Unit
from pipefleet_workers.process.exit_codes import BROKEN_DEVICE
from tests.gpu.children import in_child
from tests.gpu.engines import engine, load, outputs
from tests.gpu.plan import Check, Order
from tests.parity.harness import Call

TASK = "text-classification"
SECONDS = 60.0


class Beyond(TextClassifier):
    """Gives the model tokens that it does not have."""

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        if self.pipe.device.type == "cpu":
            raise RuntimeError("CUDA error: device-side assert triggered")
        return super().run({**inputs, "input_ids": inputs["input_ids"] + 1_000_000}, units, progress)


def _sticky(order: Order) -> str:
    broken = in_child(partial(_serve, order.device, Beyond), SECONDS, order.folder / "broken.txt")
    said = (order.folder / "broken.txt").read_text(errors="replace")
    if broken != BROKEN_DEVICE:
        raise AssertionError(f"the process ended with {broken}, not {BROKEN_DEVICE}: {said[-300:]}")
    if "the process ends with code" not in said:
        raise AssertionError(f"the process does not say why it ends: {said[-300:]}")
    healthy = in_child(partial(_serve, order.device, TextClassifier), SECONDS, order.folder / "healthy.txt")
    if healthy:
        raise AssertionError(f"the next process ended with {healthy}; see {order.folder / 'healthy.txt'}")
    return f"the process ended with code {BROKEN_DEVICE} and said why; the next process used the device"


def _serve(device: str, adapter: Any) -> None:
    with engine(load(TASK, device), TASK, adapter=adapter) as running:
        outputs(running.run([Call("some words"), Call("more words than that")]))
    if device != "cpu":
        torch.cuda.synchronize(device)


CHECKS = (Check("broken device", "check", _sticky, 2 * SECONDS + 10, quick=True),)
