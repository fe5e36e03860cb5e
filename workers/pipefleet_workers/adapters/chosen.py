"""An adapter that leaves all work to another adapter, which it chooses by the abilities of the loaded model.

Some tasks are served by two kinds of models: ViLT classifies an answer, BLIP writes it; LayoutLM points at words, Donut reads the
page itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipefleet_workers.adapters.arguments import Arguments
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit


class Chosen(Adapter):
    """A subclass chooses the adapter of a pipeline in `choose`. It is as thread-safe as the chosen adapter."""

    def __init__(self, pipe: Any) -> None:
        self._inner = self.choose(pipe)(pipe)
        self.pipe = pipe
        self.copies = self._inner.copies
        self.parser = self._inner.parser

    @staticmethod
    def choose(pipe: Any) -> type[Adapter]:
        """The class of the adapter for a pipeline."""
        raise NotImplementedError

    @property
    def pads(self) -> bool:
        """Whether units of unequal length may share a batch, see `Adapter.pads`."""
        return self._inner.pads

    @pads.setter
    def pads(self, value: bool) -> None:
        self._inner.pads = value

    @property
    def tick(self) -> Callable[[], None]:
        """Called at each step of a long forward, see `Adapter.tick`."""
        return self._inner.tick

    @tick.setter
    def tick(self, value: Callable[[], None]) -> None:
        self._inner.tick = value

    @property
    def typical_size(self) -> int:  # type: ignore[override]
        """Size of the made-up input that batches are measured with."""
        return self._inner.typical_size

    @property
    def sampling_rate(self) -> int | None:
        """The model's own rate in Hz, for audio."""
        return self._inner.sampling_rate

    def example(self, size: int) -> Any:
        """A made-up input, see `Adapter.example`."""
        return self._inner.example(size)

    def prepare(self, decoded: Sequence[Decoded]) -> list[list[Unit] | ItemError]:
        """The units or the failure of each item."""
        return self._inner.prepare(decoded)

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """One dict of model inputs."""
        return self._inner.collate(units)

    def run(self, inputs: dict[str, Any], units: Sequence[Unit]) -> Any:
        """The model's outputs."""
        return self._inner.run(inputs, units)

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The output of each unit, in order."""
        return self._inner.split(outputs, units)

    def numbers(self, units: Sequence[Unit]) -> list[np.ndarray[Any, Any]]:
        """The numbers that the proof of exactness compares."""
        return self._inner.numbers(units)

    def finish(self, assembly: Assembly) -> Any:
        """The result of an item."""
        return self._inner.finish(assembly)

    def parse(self, parameters: Mapping[str, Any]) -> Arguments:
        """The pipeline's arguments."""
        return self._inner.parse(parameters)
