"""From outputs to what is stored: artifacts, the lines of a part, records of single jobs, and progress."""
