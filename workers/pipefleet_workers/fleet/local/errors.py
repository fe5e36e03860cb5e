"""Errors of the local stack. They are PipefleetErrors, so the command line prints them as one line."""

from __future__ import annotations

from pipefleet.errors import PipefleetError


class StackError(PipefleetError):
    """The stack cannot start or go on; the message names the part and the remedy."""

    code = "stack"
    exit_code = 3


class PortTakenError(StackError):
    """Another program took a port between its choice and its use; for its servers `Stack` chooses again, a few times."""
