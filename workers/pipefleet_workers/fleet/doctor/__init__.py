"""`pipefleet doctor`: is everything there that a fleet needs, and what to do about what is not."""
