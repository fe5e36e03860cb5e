"""The peer `LitServe`: its server with batches of 32 in arrival order, and threads that keep HTTP connections open to it.

The package is optional: `pip install 'pipefleet[bench]'`.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import socket
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.measurement import Machine, Measurement, timed
from tests.benchmarks.serving import Served, process, until_ready
from tests.benchmarks.system import addresses
from tests.benchmarks.workloads import Workload

WARM_UP = 64
IN_FLIGHT = 64
_LOOPBACK = "127.0.0.1"


def missing() -> str | None:
    """Why there is no such row, or None."""
    if importlib.util.find_spec("litserve") is None:
        return "not installed (pip install 'pipefleet[bench]')"
    return None


def measure(workload: Workload, machine: Machine, scratch: Path, servers: Mapping[str, psutil.Process]) -> Measurement:
    """LitServe's server with batches of 32 in order of arrival, over HTTP with 64 requests in flight."""
    port, log = _free_port(), scratch / "litserve.log"
    command = [sys.executable, "-m", "tests.benchmarks.litserve_server", str(port)]
    with process(command, Served.of(workload, machine), log) as server, ThreadPoolExecutor(IN_FLIGHT) as threads:
        caller = _Caller(port)
        until_ready(server, log, caller.is_up)
        list(threads.map(caller.call, addresses(workload.first(WARM_UP)).values()))
        inputs = addresses(workload)
        with timed({"worker": server, **servers}) as clock:
            outputs = dict(zip(inputs, threads.map(caller.call, inputs.values()), strict=True))
    return Measurement(clock.seconds, clock.cpu, outputs)


class _Caller:
    """Calls the server over one connection for each thread."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._local = threading.local()

    def is_up(self) -> bool:
        connection = http.client.HTTPConnection(_LOOPBACK, self._port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def call(self, item: str) -> Any:
        if not hasattr(self._local, "connection"):
            self._local.connection = http.client.HTTPConnection(_LOOPBACK, self._port, timeout=600)
        connection = self._local.connection
        connection.request("POST", "/predict", json.dumps({"input": item}), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise RuntimeError(f"LitServe answered {answer.status}: {body[:300]!r}")
        return json.loads(body)["output"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])
