"""Jobs in Redis: the list of every key, Celery's messages in their queues, dead letters, and losses."""
