"""Tests of the consumer's modules, which play Celery, Redis and the engine themselves."""
