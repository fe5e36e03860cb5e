"""The table of tiny checkpoints: a row per key, filled by the decorator that the builder modules use."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Writes the files of a checkpoint into an existing, empty folder.
Builder = Callable[[Path], None]

#: Makes the sample inputs; the folder (existing, writable) takes those that must be files, such as videos.
InputMaker = Callable[[Path], list[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A tiny random-weight model of one task, with inputs that show how the task batches.

    `key` is `<task>` for the reference model of a task and `<task>:<variant>` for an architecture whose
    batching behaves differently. `inputs(folder)` gives 4 to 6 ragged inputs, each the single positional
    argument of one pipeline call; `parameters` are keyword arguments that suit all of them.
    """

    key: str
    task: str
    build: Builder
    inputs: InputMaker
    _parameters: Mapping[str, Any] = field(repr=False)

    @property
    def parameters(self) -> dict[str, Any]:
        """A copy of its own for every reader: pipelines empty the nested arguments that they are given."""
        return deepcopy(dict(self._parameters))


#: Every checkpoint by key, in the order of registration. Complete once `tests.checkpoints` is imported.
CHECKPOINTS: dict[str, Checkpoint] = {}


def checkpoint(
    key: str, *, inputs: InputMaker, parameters: Mapping[str, Any] | None = None
) -> Callable[[Builder], Builder]:
    """Register the decorated builder under `key`; may be stacked to serve several keys with one model.

    Raises ValueError when the key is taken.
    """

    def register(build: Builder) -> Builder:
        if key in CHECKPOINTS:
            raise ValueError(f"checkpoint {key!r} is registered twice; give one of them another variant name")
        task = key.partition(":")[0]
        CHECKPOINTS[key] = Checkpoint(key, task, build, inputs, parameters or {})
        return build

    return register
