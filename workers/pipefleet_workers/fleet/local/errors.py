"""What can go wrong with the embedded stack."""

from __future__ import annotations

from pipefleet.errors import PipefleetError


class StackError(PipefleetError):
    """The stack cannot start or go on; the message names the part and what to do."""

    code = "stack"
    exit_code = 3


class PortTakenError(StackError):
    """Another program took a port between its choice and its use; choosing anew helps."""
