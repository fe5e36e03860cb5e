"""Single jobs: the handle that waits for a job, cancels it and reads its result."""
