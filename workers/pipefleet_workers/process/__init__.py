"""The process of a worker: what watches it, how it ends, what it is tied to, and how much memory it has and values take."""
