"""consume: a delivery of the queue becomes a job of the engine, and is acknowledged when its results are written.

`celery_task` gives deliveries to `consumer`, which ends each of them exactly once. Read `consumer.py` first.
"""
