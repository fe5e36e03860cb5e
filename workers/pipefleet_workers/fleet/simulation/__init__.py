"""Simulates fleets of 1 to 10,000 devices over a day, in seconds of computing, to compare ways of scaling. Begin with `run`."""
