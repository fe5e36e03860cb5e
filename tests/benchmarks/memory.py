"""The producer's memory: peak resident size of a process that plans a run over 10,000 and over 1,000,000 listed objects.

Writing a million real objects takes an hour, so a server of our own answers the listing, page by page, as S3 does, and takes
the shards; the client, boto3 and Redis are the real ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pipefleet_workers.fleet.local.stack import Stack

ROOT = Path(__file__).resolve().parents[2]
PAGE = 1000
_ENTRY = "<Contents><Key>{key}</Key><Size>100000</Size><ETag>&quot;{number:032x}&quot;</ETag></Contents>"


def measure(count: int, scratch: Path) -> dict[str, float]:
    """Objects, peak MiB and seconds of the planning process."""
    with Stack(scratch / f"data-memory-{count}", flower=False) as stack:
        server = _listing_server(count)
        url = f"http://127.0.0.1:{server.server_address[1]}"
        fleet = scratch / "memory.toml"
        fleet.write_text('[pools.pictures]\ntask = "image-classification"\nmodel = "/model"\n')
        environment = {
            **os.environ,
            **stack.environment(),
            "AWS_ENDPOINT_URL_S3": url,
            "PIPEFLEET_FLEET": str(fleet),
            "PIPEFLEET_OUTSTANDING_SHARDS": "1000000",  # no fleet works here
        }
        command = [sys.executable, "-m", "tests.benchmarks.memory", str(count)]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        server.shutdown()
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _listing_server(count: int) -> ThreadingHTTPServer:
    written: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            if "list-type" in query:
                return self._answer(200, _page(count, query).encode())
            body = written.get(urlsplit(self.path).path)
            return self._answer(200 if body else 404, body or b"<Error><Code>NoSuchKey</Code></Error>")

        def do_HEAD(self) -> None:
            self._answer(200 if urlsplit(self.path).path == "/pipefleet" else 404, b"")

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if "_run/shards/" not in self.path:
                written[urlsplit(self.path).path] = body
            self._answer(200, b"")

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"0"')
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _page(count: int, query: dict[str, list[str]]) -> str:
    if query["prefix"] != ["media/"]:
        count = 0
    start = int(query.get("continuation-token", ["0"])[0])
    end = min(count, start + PAGE)
    entries = "".join(_ENTRY.format(key=f"media/{number:09d}.jpg", number=number) for number in range(start, end))
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{end}</NextContinuationToken>" if end < count else ""
    return f"<ListBucketResult>{more}{entries}</ListBucketResult>"


def main() -> None:
    """Plan one run over the listed objects and print this process's peak."""
    import time

    from pipefleet.client import Client

    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    count = parser.parse_args().count
    begin = time.perf_counter()
    with Client() as client:
        run = client.map("image-classification", "s3://pipefleet/media/", output=f"s3://pipefleet/out-{count}/")
        run.join_planner()
        assert run.plan.items == count, run.plan
    # Not ru_maxrss: Linux carries the parent's peak over into the child that it forks.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    print(json.dumps({"objects": count, "peak_mib": round(peak, 1), "seconds": round(time.perf_counter() - begin, 1)}))


if __name__ == "__main__":
    main()
