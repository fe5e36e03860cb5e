"""The Celery application for Flower, which wants to be given one by name: `celery --app pipefleet.flower:app flower`."""

from __future__ import annotations

from pipefleet.queues.celery import celery_app
from pipefleet.settings import load_settings

app = celery_app(load_settings())
