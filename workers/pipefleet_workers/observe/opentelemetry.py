"""OpenTelemetry spans of single jobs whose message carries a trace: one trace from `Client.submit` to the result.

    pipefleet submit (producer)
    pipefleet job     queued                begun                                                    ended
                      |-------- queue ------|-fetch-|-decode-|-preprocess-|  (waits)  |-forward-|-postprocess-|

`worker` calls `start` and `stop`, and `singles` calls `job_ended`, which makes the spans from the seconds of each stage that
travel with every result. Fetch, decode and preprocess are laid out from the begin of the job on, forward and postprocess back from
its end; in between, the item waited for its batch. Spans are optional: they need the extra `otel`, and OTEL_EXPORTER_OTLP_ENDPOINT
(or …_TRACES_ENDPOINT) in the worker's environment. A failure to make them is logged, and changes no job.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from pipefleet import __version__
from pipefleet.contract.messages import JobMessage
from pipefleet.queues.celery import TIME_HEADER
from pipefleet_workers.items import Outcome

log = logging.getLogger(__name__)
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
BEFORE, AFTER = ("fetch", "decode", "preprocess"), ("forward", "postprocess")
_active: Telemetry | None = None


class Telemetry:
    """Sends the spans of a worker. Thread-safe. `provider` is a TracerProvider of OpenTelemetry's SDK."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._trace = importlib.import_module("opentelemetry.trace")
        self._propagate = importlib.import_module("opentelemetry.propagate")
        self._tracer = provider.get_tracer("pipefleet", __version__)

    def job_ended(self, headers: Mapping[str, Any], message: JobMessage, outcome: Outcome, *, begun: float) -> None:
        """Make the spans of a job that has just ended.

        `begun` is in seconds of the monotonic clock; `headers` are the headers of the job's message.
        """
        end = time.time_ns()
        start = end - round((time.monotonic() - begun) * 1e9)
        parent = self._propagate.extract(dict(headers))
        attributes = {"pipefleet.job": message.id, "pipefleet.task": message.task}
        kind = self._trace.SpanKind.CONSUMER
        queued = round(float(headers.get(TIME_HEADER) or start / 1e9) * 1e9)
        first = min(queued, start)
        span = self._tracer.start_span(
            "pipefleet job", context=parent, kind=kind, start_time=first, attributes=attributes
        )
        if outcome.failure is not None:
            span.set_attribute("error.type", outcome.failure.code)
            span.set_status(self._trace.StatusCode.ERROR, f"{outcome.failure.code} in {outcome.failure.stage}")
        inside = self._trace.set_span_in_context(span)
        for name, (begin, over) in (
            laid_out(outcome.work.seconds, start, end).items() | {"queue": (first, start)}.items()
        ):
            self._tracer.start_span(name, context=inside, start_time=begin).end(end_time=over)
        span.end(end_time=end)

    def close(self) -> None:
        """Send the remaining spans, within 30 s, the SDK's own bound."""
        self._provider.shutdown()


def laid_out(seconds: Mapping[str, float], start: int, end: int) -> dict[str, tuple[int, int]]:
    """When each stage ran, in nanoseconds: early stages from `start` on, late stages back from `end`, all between the two."""
    found, at = {}, start
    for name in BEFORE:
        if name in seconds:
            found[name] = at, min(end, at + round(seconds[name] * 1e9))
            at = found[name][1]
    over = end
    for name in reversed(AFTER):
        if name in seconds:
            found[name] = max(at, over - round(seconds[name] * 1e9)), over
            over = found[name][0]
    return found


def start(pool: str, worker: str) -> None:
    """Send this worker's spans to the collector that the environment names; does nothing if it names none."""
    global _active
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return
    try:
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        resources = importlib.import_module("opentelemetry.sdk.resources")
        otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        log.warning("no traces: %s; pip install 'pipefleet[otel]', or unset %s", error, ENDPOINTS[0])
        return
    names = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "pipefleet-worker"), "service.instance.id": worker}
    provider = sdk.TracerProvider(resource=resources.Resource.create({**names, "pipefleet.pool": pool}))
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter()))
    _active = Telemetry(provider)


def stop() -> None:
    """Send the remaining spans; does nothing if `start` did nothing."""
    global _active
    if _active is not None:
        _active.close()
        _active = None


def job_ended(delivery: Any, message: JobMessage, outcome: Outcome) -> None:
    """Make the spans of a job whose message carries a trace. Costs next to nothing for other jobs. Raises nothing."""
    headers = getattr(delivery, "trace", None) if _active is not None else None
    if _active is None or headers is None:
        return
    try:
        _active.job_ended(headers, message, outcome, begun=delivery.begun)
    except Exception:
        log.exception("no spans for job %s", message.id)
