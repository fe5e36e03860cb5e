"""Jobs in Redis: every key, Celery's messages in their queues, and the dead letters."""
