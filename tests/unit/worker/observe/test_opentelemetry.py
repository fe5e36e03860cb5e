"""One trace from `Client.submit` to the result, and nothing of it without OpenTelemetry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipefleet.client import Client
from pipefleet.fleet.routing import revision_queue
from pipefleet.queues import trace_context
from pipefleet.queues.keys import queue_lists
from pipefleet_workers.observe.opentelemetry import laid_out
from tests.checkpoints import cached
from tests.servers import until

QUEUE = "pipefleet.text-classification"
SECOND = 1_000_000_000


def test_stages_are_laid_out_around_the_wait_for_the_batch() -> None:
    seconds = {"fetch": 1.0, "decode": 0.5, "preprocess": 0.5, "forward": 2.0, "postprocess": 1.0}
    found = laid_out(seconds, 10 * SECOND, 20 * SECOND)
    assert {name: (begin // SECOND, end // SECOND) for name, (begin, end) in found.items()} == {
        "fetch": (10, 11), "decode": (11, 11), "preprocess": (11, 12), "postprocess": (19, 20), "forward": (17, 19),
    }  # fmt: skip


def test_no_stage_leaves_its_job() -> None:
    found = laid_out({"fetch": 9.0, "preprocess": 9.0, "forward": 9.0}, 0, 10 * SECOND)
    assert all(0 <= begin <= end <= 10 * SECOND for begin, end in found.values())


def header(client: Client) -> dict[str, Any]:
    raw: Any = client.redis.lpop(queue_lists(revision_queue(QUEUE, "/models/texts", None))[1])
    return dict(json.loads(raw)["headers"])


def test_without_a_tracer_a_message_carries_no_trace(client: Client) -> None:
    """In a process of its own: other tests of this one may have set a tracer up."""
    code = "import pipefleet; pipefleet.Client().submit('text-classification', 'x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not set(trace_context.HEADERS) & set(header(client))


@pytest.fixture
def spans() -> Any:
    """The spans of this process, in memory."""
    memory = pytest.importorskip(
        "opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="no OpenTelemetry SDK"
    )
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    exporter = memory.InMemorySpanExporter()
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    provider: Any = trace.get_tracer_provider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """The address of an OTLP collector, and the spans that it got."""
    wire = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="no OTLP exporter")
    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            for resource in wire.ExportTraceServiceRequest.FromString(body).resource_spans:
                got.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", got
    server.shutdown()
    server.server_close()


def test_the_message_carries_the_span_of_the_submission(spans: Any, client: Client) -> None:
    client.submit("text-classification", "a text")
    (submit,) = spans.get_finished_spans()
    assert submit.name == "pipefleet submit"
    assert header(client)["traceparent"].split("-")[1:3] == [
        f"{submit.context.trace_id:032x}", f"{submit.context.span_id:016x}"
    ]  # fmt: skip


def test_one_trace_from_the_submission_to_the_result(
    spans: Any, collector: tuple[str, list[Any]], client: Client, tmp_path: Path
) -> None:
    url, got = collector
    fleet, ready = tmp_path / "fleet.toml", tmp_path / "ready"
    fleet.write_text(f'[pools.texts]\ntask = "text-classification"\nmodel = "{cached("text-classification")}"\n')
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "PIPEFLEET_WORKER_WARM_UP": "false", "PIPEFLEET_FLEET": str(fleet)}
    with (tmp_path / "log").open("wb") as log, Client(client.settings.model_copy(update={"fleet": fleet})) as submitter:
        command = [sys.executable, "-m", "pipefleet", "worker", "--ready-file", str(ready), "--threads", "1"]
        worker = subprocess.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=log)
        try:
            until(ready.exists, 60)
            assert submitter.submit("text-classification", "a text").result(30)
            worker.terminate()
            assert worker.wait(30) == 0
        finally:
            worker.kill()
            worker.wait()
    (submit,) = spans.get_finished_spans()
    assert {span.trace_id.hex() for span in got} == {f"{submit.context.trace_id:032x}"}
    by_name = {span.name: span for span in got}
    assert set(by_name) == {"pipefleet job", "queue", "decode", "preprocess", "forward", "postprocess"}
    job = by_name.pop("pipefleet job")
    assert job.parent_span_id.hex() == f"{submit.context.span_id:016x}"
    assert {span.parent_span_id for span in by_name.values()} == {job.span_id}
    assert all(
        job.start_time_unix_nano <= one.start_time_unix_nano <= one.end_time_unix_nano for one in by_name.values()
    )
    assert max(one.end_time_unix_nano for one in by_name.values()) <= job.end_time_unix_nano
