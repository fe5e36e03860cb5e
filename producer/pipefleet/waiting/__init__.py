"""Waiting for single jobs: the futures of their ends, the callbacks of those, and warnings of queues that nobody serves."""
