"""Tasks that bring text together with pictures, sound or video."""

from __future__ import annotations

from pipefleet.tasks.spec import TaskSpec

ROWS: tuple[TaskSpec, ...] = ()
