"""OpenTelemetry's trace context of a submitted job. Nothing is imported unless the program uses OpenTelemetry itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HEADERS = ("traceparent", "tracestate")
"""Message headers that carry it, as W3C defines them."""


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
    """The headers that tie a message to the current span; empty without one."""
    api = _api("propagate")
    if api is None:
        return {}
    carrier: dict[str, str] = {}
    api.inject(carrier)
    return {name: carrier[name] for name in HEADERS if name in carrier}


def _api(name: str) -> Any:
    """A module of OpenTelemetry's, or None in a program that has not loaded it: then nobody set up where spans go."""
    return importlib.import_module(f"opentelemetry.{name}") if "opentelemetry.trace" in sys.modules else None
