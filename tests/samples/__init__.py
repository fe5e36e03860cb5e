"""The makers of the sample media that `pipefleet demo` and the tests use: `python -m tests.samples`."""
