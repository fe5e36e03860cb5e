"""Fleets of 1 to 10,000 devices over a day in seconds of computing, to compare how they are scaled. See `run`."""
