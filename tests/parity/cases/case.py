"""The type of a parity case."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.checkpoints import CHECKPOINTS
from tests.parity.harness import Call

Maker = Callable[[Path], list[Any]]
Expected = Callable[[Any, Call], Any]


def direct(pipe: Any, call: Call) -> Any:
    """What transformers returns for one call: the pipeline gets copies, since it empties what it is given."""
    return pipe(copy.deepcopy(call.inputs), **copy.deepcopy(dict(call.parameters)))


@dataclass(frozen=True)
class Case:
    """One row.

    `inputs` makes the inputs, each called with each of `parameters` (both the checkpoint's own by default); `expected` says
    what one call must return. `shares` is the least number of units that some batch must hold when all calls run together (1
    where the model cannot be batched), `ragged` that units of unequal length must have met in a batch.
    """

    checkpoint: str
    parameters: Sequence[dict[str, Any]] | None = None
    name: str = ""
    inputs: Maker | None = None
    expected: Expected = direct
    shares: int = 2
    ragged: bool = False

    @property
    def task(self) -> str:
        return self.checkpoint.partition(":")[0]

    @property
    def id(self) -> str:
        return f"{self.checkpoint}{'-' if self.name else ''}{self.name}"

    def calls(self, folder: Path) -> list[Call]:
        """Every input with every set of parameters, neighbours of different parameters."""
        row = CHECKPOINTS[self.checkpoint]
        inputs = (self.inputs or row.inputs)(folder)
        return [Call(one, own) for one in inputs for own in self.parameters or [row.parameters]]
