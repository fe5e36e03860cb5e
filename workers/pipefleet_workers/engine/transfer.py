"""Copies the inputs of the next batch to a GPU while the current batch runs: from pinned memory, on a stream of their own.

    collate thread: begin ─▶ pinned copy ─▶ device, on the side stream ─▶ event      lane: finish waits for the event

No thread waits for the copy: only the device's work on a batch is queued behind the copy of this batch. `Forward` calls `begin` and
`finish`. A failed copy raises nothing: the forward copies the inputs itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

log = logging.getLogger(__name__)


class Link(Protocol):
    """The way to one device. The collate thread calls `copy` and `mark`; the thread of a lane calls `join`."""

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor; returns at once. The tensor itself does not change."""

    def mark(self) -> Any:
        """An event that fires when all copies so far are done."""

    def join(self, mark: Any, tensors: list[torch.Tensor]) -> None:
        """Let this thread's later work on the device wait for `mark`, and keep the memory of `tensors` until that work is done."""


class CudaLink:
    """Copies through pinned memory, on a stream beside the model's stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, valid once the side stream gets there. `pin_memory` copies; it never pins in place."""
        with torch.cuda.stream(self._stream):
            return tensor.pin_memory().to(self._device, non_blocking=True)

    def mark(self) -> Any:
        """An event on the side stream."""
        return self._stream.record_event()

    def join(self, mark: Any, tensors: list[torch.Tensor]) -> None:
        """Make the model's stream wait for `mark`. The side stream's memory is not reused before the model's stream has read it."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(current)


class Staged:
    """The inputs of one batch, on their way to the device or still on the host. `Transfer.finish` takes them out, once."""

    __slots__ = ("arrived", "inputs")

    def __init__(self, inputs: Any, arrived: Any = None) -> None:
        self.inputs = inputs
        self.arrived = arrived


class Transfer:
    """Copies inputs before their forward. The collate thread calls `begin`; the thread of a lane calls `finish`.

    Without a `link` nothing is copied ahead: the adapter's `run` moves inputs from the host.
    """

    def __init__(self, link: Link | None = None) -> None:
        self._link = link

    @classmethod
    def to(cls, device: torch.device) -> Transfer:
        """A transfer to a CUDA device, on a stream of its own; for any other device, a transfer without a link."""
        return cls(CudaLink(device) if device.type == "cuda" else None)

    def begin(self, inputs: Any) -> Staged:
        """Start to copy the collated inputs; returns at once.

        If the copy fails, for example for want of memory, the inputs stay on the host. The forward then copies them, and a failure
        there is handled as any failure of a forward.
        """
        if self._link is None:
            return Staged(inputs)
        try:
            return Staged(map_tensors(inputs, self._link.copy), self._link.mark())
        except RuntimeError as error:  # torch's errors of memory and of CUDA are of this class
            log.warning("a batch could not be copied ahead (%s); its forward copies it", str(error).partition("\n")[0])
        return Staged(inputs)

    def finish(self, staged: Staged) -> Any:
        """The inputs. The device's work on them waits for the copy; this thread does not. Leaves `staged` empty.

        No other object may hold the inputs: a batch that runs out of memory must be able to free them.
        """
        inputs, arrived = staged.inputs, staged.arrived
        staged.inputs = staged.arrived = None
        if self._link is not None and arrived is not None:
            found: list[torch.Tensor] = []
            map_tensors(inputs, lambda one: _noted(one, found))
            self._link.join(arrived, found)
        return inputs


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of `value` with `change` applied to every tensor inside; mappings, lists and tuples keep their type."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        kind: Any = type(value)
        return kind({name: map_tensors(item, change) for name, item in value.items()})
    if isinstance(value, list | tuple):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _noted(tensor: torch.Tensor, found: list[torch.Tensor]) -> torch.Tensor:
    found.append(tensor)
    return tensor
