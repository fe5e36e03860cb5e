"""process: the process of a worker: its watchdog, its exit codes, its tie to a parent, its memory, and the sizes of values."""
