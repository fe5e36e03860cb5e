"""The fleet as producers know it: `fleet.toml`, what workers announce, which queue serves which job, and why one waits."""
