"""`pipefleet doctor`: checks everything that a fleet needs, and tells the remedy for each fault."""
