"""Single jobs: their handle, who hears of their ends, and queuing dead letters again."""
