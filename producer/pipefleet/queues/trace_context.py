"""OpenTelemetry's trace context of a submitted job: a span around the submit, and headers that carry it to the worker.

Nothing is imported, and nothing happens, unless the program uses OpenTelemetry itself. `Client.submit` and `celery` call this.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HEADERS = ("traceparent", "tracestate")
"""Message headers of the trace context, as W3C defines them."""


@contextmanager
def submitting(task: str, job_id: str) -> Iterator[None]:
    """A span around the queueing of one job, under the caller's span if there is one."""
    api = _api("trace")
    if api is None:
        yield
        return
    attributes = {"messaging.system": "redis", "pipefleet.task": task, "pipefleet.job": job_id}
    tracer = api.get_tracer("pipefleet")
    with tracer.start_as_current_span("pipefleet submit", kind=api.SpanKind.PRODUCER, attributes=attributes):
        yield


def trace_headers() -> dict[str, str]:
    """The headers that tie a message to the current span; empty without a span."""
    api = _api("propagate")
    if api is None:
        return {}
    carrier: dict[str, str] = {}
    api.inject(carrier)
    return {name: carrier[name] for name in HEADERS if name in carrier}


def _api(name: str) -> Any:
    """A module of OpenTelemetry's; None in a program that has not loaded OpenTelemetry, where no span would go anywhere."""
    return importlib.import_module(f"opentelemetry.{name}") if "opentelemetry.trace" in sys.modules else None
