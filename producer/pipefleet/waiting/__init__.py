"""Waiting for single jobs: who hears that one has ended, and why one has not: nobody serves its queue."""
