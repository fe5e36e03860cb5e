"""Tasks whose input is pictures or video alone."""

from __future__ import annotations

from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.runtime.row import IMAGE, TaskRuntime

ROWS = {
    "image-classification": TaskRuntime(Adapter, IMAGE),
}
