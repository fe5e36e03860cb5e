"""Tasks that bring text together with pictures, sound or video."""

from __future__ import annotations

from pipefleet_workers.runtime.row import TaskRuntime

ROWS: dict[str, TaskRuntime] = {}
