"""The Celery application for Flower, which takes one by name: `celery --app pipefleet.flower:app flower`.

Importing this module reads the settings; it raises UsageError where they are wrong.
"""

from __future__ import annotations

from pipefleet.queues.celery import celery_app
from pipefleet.settings import load_settings

app = celery_app(load_settings())
