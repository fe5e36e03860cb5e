"""The fleet as producers know it: `fleet.toml`, the announcements of workers, the queue of each job, and the store of the fleet."""
