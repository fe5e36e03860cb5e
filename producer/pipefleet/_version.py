"""The version of pipefleet. The build reads it here."""

__version__ = "0.1.0"
