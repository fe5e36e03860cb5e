"""The embedded stack behind `pipefleet up`: real servers and workers as children of one process."""
