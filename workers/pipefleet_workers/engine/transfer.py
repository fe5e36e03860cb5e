"""Inputs on their way to a GPU: copied from pinned memory on a stream of their own, while the batch before still runs.

    collate thread: begin ─▶ pinned copy ─▶ device, on the side stream ─▶ event      device's thread: finish waits for the event

No thread waits: only what the device computes from a batch comes after the copy of that batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

log = logging.getLogger(__name__)


class Link(Protocol):
    """The way to one device. `copy` and `mark` are called by the collate thread, `join` by the device's."""

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor; returns at once. The tensor itself stays as it is."""

    def mark(self) -> Any:
        """What is over as soon as every copy so far is."""

    def join(self, mark: Any, tensors: list[torch.Tensor]) -> None:
        """Let the calling thread's work on the device come after `mark`, and its memory be kept until that work is over."""


class CudaLink:
    """Copies through pinned memory on a stream beside the one that the model runs on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, once the stream is there; `pin_memory` makes a copy and never pins in place."""
        with torch.cuda.stream(self._stream):
            return tensor.pin_memory().to(self._device, non_blocking=True)

    def mark(self) -> Any:
        """An event on the side stream."""
        return self._stream.record_event()

    def join(self, mark: Any, tensors: list[torch.Tensor]) -> None:
        """Make the model's stream wait. Memory that the side stream gave is not given away before that stream has read it."""
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
    """Copies inputs ahead of their forward. `begin` is for the thread beside the device's, `finish` for the device's own.

    Without a `link` nothing is copied ahead: the adapter's `run` moves what lies on the host.
    """

    def __init__(self, link: Link | None = None) -> None:
        self._link = link

    @classmethod
    def to(cls, device: torch.device) -> Transfer:
        """To a CUDA device by a stream of its own; to any other one without a link."""
        return cls(CudaLink(device) if device.type == "cuda" else None)

    def begin(self, inputs: Any) -> Staged:
        """Start the copy of what collate returned; returns at once.

        Where it fails, as for want of memory, the inputs stay on the host: the forward copies them, and what fails there is
        handled as any failure of a forward.
        """
        if self._link is None:
            return Staged(inputs)
        try:
            return Staged(map_tensors(inputs, self._link.copy), self._link.mark())
        except RuntimeError as error:  # torch's errors of memory and of CUDA are of this class
            log.warning("a batch could not be copied ahead (%s); its forward copies it", str(error).partition("\n")[0])
        return Staged(inputs)

    def finish(self, staged: Staged) -> Any:
        """The inputs; what is computed from them waits for the copy, this thread does not. Leaves `staged` empty.

        Nothing else may hold the inputs: a batch that is out of memory must be able to let go of its own.
        """
        inputs, arrived = staged.inputs, staged.arrived
        staged.inputs = staged.arrived = None
        if self._link is not None and arrived is not None:
            found: list[torch.Tensor] = []
            map_tensors(inputs, lambda one: _noted(one, found))
            self._link.join(arrived, found)
        return inputs


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor inside of it changed; mappings, lists and tuples keep their type."""
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
