"""Hugging Face pipelines over buckets of media and text, on a fleet of workers.

>>> import pipefleet
>>> pipe = pipefleet.pipeline("text-classification")  # doctest: +SKIP
>>> pipe("s3://reviews/1.txt", top_k=2)  # doctest: +SKIP

The names in `__all__` are the public API; each is imported from its module when it is first used. torch and transformers are
never imported; celery, redis and boto3 are imported with the first `Client`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipefleet._version import __version__

if TYPE_CHECKING:
    from pipefleet.client import Client
    from pipefleet.contract.messages import JobState
    from pipefleet.errors import (
        JobCancelledError,
        JobError,
        JobExpiredError,
        JobFailedError,
        PipefleetError,
        ResultTimeoutError,
        ServiceUnavailableError,
        UsageError,
    )
    from pipefleet.jobs.job import Job
    from pipefleet.pipelines import FleetPipeline, pipeline
    from pipefleet.runs.progress import RunProgress
    from pipefleet.runs.run import Run
    from pipefleet.settings import Settings

_HOMES = {
    "client": ("Client",),
    "contract.messages": ("JobState",),
    "errors": (
        "JobCancelledError",
        "JobError",
        "JobExpiredError",
        "JobFailedError",
        "PipefleetError",
        "ResultTimeoutError",
        "ServiceUnavailableError",
        "UsageError",
    ),
    "jobs.job": ("Job",),
    "pipelines": ("FleetPipeline", "pipeline"),
    "runs.progress": ("RunProgress",),
    "runs.run": ("Run",),
    "settings": ("Settings",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Client",
    "FleetPipeline",
    "Job",
    "JobCancelledError",
    "JobError",
    "JobExpiredError",
    "JobFailedError",
    "JobState",
    "PipefleetError",
    "ResultTimeoutError",
    "Run",
    "RunProgress",
    "ServiceUnavailableError",
    "Settings",
    "UsageError",
    "__version__",
    "pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pipefleet' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pipefleet.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
