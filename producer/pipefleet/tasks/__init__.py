"""The producer's half of the task table: the inputs, parameters and results of each task. `TASKS` is the whole table.

A task is one row in a module here and one row in `pipefleet_workers.adapters.table`; a test holds the two key sets equal.
Clients and workers look rows up with `task_spec`, which raises UnknownTaskError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from pipefleet.errors import UnknownTaskError, nearest
from pipefleet.tasks import audio, multimodal, text, vision
from pipefleet.tasks.spec import Media, TaskSpec

__all__ = ["ALIASES", "TASKS", "Media", "TaskSpec", "implied_parameters", "task_spec"]

_ROWS = (*text.ROWS, *audio.ROWS, *vision.ROWS, *multimodal.ROWS)
_TRANSLATION = re.compile(r"translation_([A-Za-z-]+)_to_([A-Za-z-]+)")
_TRANSLATION_ROW = "translation_xx_to_yy"

TASKS: Mapping[str, TaskSpec] = MappingProxyType({row.name: row for row in sorted(_ROWS, key=lambda row: row.name)})
"""Every task by its canonical name, in alphabetical order."""

ALIASES: Mapping[str, str] = MappingProxyType({alias: row.name for row in TASKS.values() for alias in row.aliases})
"""Other names of tasks, each with the canonical name."""


def task_spec(name: str) -> TaskSpec:
    """The row of a task given by name, alias, or a name such as `translation_en_to_fr`.

    Raises UnknownTaskError, which names the nearest task.
    """
    if not isinstance(name, str):
        raise UnknownTaskError(f"a task is named by a text, not by a value of type {type(name).__name__}")
    canonical = _TRANSLATION_ROW if _TRANSLATION.fullmatch(name) else ALIASES.get(name, name)
    if canonical not in TASKS:
        known = [*TASKS, *ALIASES]
        raise UnknownTaskError(
            f"there is no task {name[:60]!r}{nearest(name, known)}; `pipefleet tasks` lists all {len(TASKS)}"
        )
    return TASKS[canonical]


def implied_parameters(name: str) -> dict[str, str]:
    """The parameters inside of a task's name: the languages of `translation_en_to_fr`; none for other names."""
    found = _TRANSLATION.fullmatch(name)
    if found is None or name == _TRANSLATION_ROW:
        return {}
    return {"src_lang": found[1], "tgt_lang": found[2]}
