"""consume: deliveries of the queue become jobs of the engine, and are acknowledged when their results are written."""
