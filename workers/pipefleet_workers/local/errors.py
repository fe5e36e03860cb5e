"""Errors of the embedded stack."""

from __future__ import annotations


class StackError(RuntimeError):
    """The embedded stack cannot start or go on; the message names the cause and the next step."""


class PortTakenError(StackError):
    """A server lost its port to another program between the choice and the bind; worth one more try."""
