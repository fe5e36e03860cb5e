"""Bulk runs: planned in shards, watched, ended, resumed, moved, and read."""
