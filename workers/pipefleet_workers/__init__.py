"""Workers of pipefleet."""
