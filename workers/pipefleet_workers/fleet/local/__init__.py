"""The local stack behind `pipefleet up`: real servers and workers as children of one process."""

from __future__ import annotations

from pipefleet_workers.fleet.local.errors import StackError
from pipefleet_workers.fleet.local.stack import Stack

__all__ = ["Stack", "StackError"]
