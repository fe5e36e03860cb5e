"""Benchmarks: they print tables and write JSON; they assert nothing about time. `python -m tests.benchmarks --help`."""
