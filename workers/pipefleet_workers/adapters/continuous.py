"""The seam of continuous batches: requests join and leave a running model between any two of its steps.

`engine.continuous` drives a `ContinuousWriter` from the device's thread; `adapters.writing.continuous` is the writer of decoders. A
worker has one only where its warm-up has proved it (`models.continuous`). A step raises whatever the model raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipefleet_workers.items import Unit

JOINS = "joins"
"""The key of all units that a continuous writer takes; they share no batch of another kind."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The results of one step."""

    read_along: Sequence[tuple[Unit, Sequence[int]]]
    """Units with a new token whose clients read along, each with all tokens of its first sequence so far."""
    ended: Sequence[tuple[Unit, Any]]
    """Units that ended, each with its output."""


class ContinuousWriter(Protocol):
    """Writes the answers of many units, a token for each at every step. Only `takes` is thread-safe."""

    def takes(self, context: Any) -> bool:
        """Whether a unit with this context of its assembly can be written here at all."""

    def fits(self, unit: Unit, *, without: Sequence[Unit] = ()) -> bool:
        """Whether there is room for a unit now, or would be if the units in `without` left."""

    def join(self, unit: Unit) -> None:
        """Take a unit in. A unit that was parked goes on where it stopped."""

    def park(self, unit: Unit) -> None:
        """Give a unit's room to others. Its tokens are kept for its next `join`."""

    def forget(self, unit: Unit) -> None:
        """Drop a unit, inside or parked, with its tokens."""

    def step(self) -> Turn:
        """One step of the model for the units inside."""

    def clear(self) -> None:
        """Park all units after a failed step."""

    def shrink(self) -> None:
        """Take fewer units from now on, since the device has run out of memory."""
