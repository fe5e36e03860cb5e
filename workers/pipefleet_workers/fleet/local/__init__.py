"""The embedded stack behind `pipefleet up`: real servers and workers as children of one process."""

from __future__ import annotations

from .errors import StackError
from .stack import Stack

__all__ = ["Stack", "StackError"]
