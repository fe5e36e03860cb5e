"""Bulk runs: planned in shards, watched, ended, resumed, moved, and read. `planner` begins a run, `run` is its handle."""
