"""Waiting for single jobs: the futures of their ends, callbacks, and warnings of queues that nobody serves."""
