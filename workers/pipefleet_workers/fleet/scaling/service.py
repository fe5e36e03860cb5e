"""The scaler as a service: it reads every pool again and again, decides, and answers over HTTP.

    /pools/<name>   JSON with `value`, the workers wanted (KEDA's metrics-api: valueLocation "value", AverageValue 1);
                    `<name>@previous` is the revision that a pool is leaving, which is counted separately
    /pools          the same for every pool and revision
    /metrics        Prometheus
    /healthz        200 while the readings are fresh

Every answer is 503 while Redis cannot be read or the last reading is old: a scaler that cannot see must never answer 0. Averages
are kept in Redis too, so a restarted scaler goes on from them. Run one scaler for a fleet.

`pipefleet scaler` and `local.autoscale` run it. A port in use raises OSError. A reading that fails is logged.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.connection.reading import server_time
from pipefleet.connection.scripts import run_script
from pipefleet.connection.wrong_type import passed_over
from pipefleet.contract.messages import encode_json
from pipefleet.errors import PipefleetError, ServiceUnavailableError
from pipefleet.fleet.announcements import announced_workers, workers_of
from pipefleet.fleet.pools import Fleet, Pool, model_label
from pipefleet.fleet.revisions import Part, parts_of
from pipefleet.foreign import read_object
from pipefleet.queues import dead_letters as deadletters
from pipefleet.queues.keys import scaler_key
from pipefleet.service import Service, Services
from pipefleet.settings import Settings
from pipefleet_workers.fleet.scaling.decide import (
    GAP_SECONDS,
    HOLD_SECONDS,
    Decision,
    ScalingLimits,
    State,
    decide,
    replacing,
    whole_replicas,
)
from pipefleet_workers.fleet.scaling.signal import STATES, Measured, Memory, Reading, measure, read_pool

log = logging.getLogger(__name__)
KEEP = "redis.call('EXPIRE', KEYS[1], ARGV[2]) redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])"
"""The first write takes no memory, see `pipefleet.contract.records`: a full Redis needs workers most."""
STALE_TICKS = 3
"""A reading is stale after so many missed readings."""
SHORTEST_STALE = 30.0
LOOK_SECONDS = 0.25
"""Seconds between two looks of the HTTP server at its stop signal."""
LAST_SECONDS = 5.0
"""Seconds that the end waits for a reading that is under way."""


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """One pool at its last reading."""

    pool: Pool
    reading: Reading
    measured: Measured
    decision: Decision
    dead_letters: int = 0
    barred: int = 0
    """Living workers that take no jobs since S3 refuses them; `Reading.workers` counts the others."""

    def to_json(self) -> dict[str, Any]:
        """The answer of `/pools/<name>`. Work in device-seconds; messages are counted exactly."""
        signal, decision = self.measured.signal, self.decision
        return {
            "pool": self.pool.key,
            "model": model_label(self.pool.model, self.pool.revision),
            "value": decision.desired,
            "workers": {
                "ready": signal.ready,
                "barred": self.barred,
                "min": self.pool.workers.min,
                "max": self.pool.workers.max,
                "per_replica": self.pool.workers_per_host or 1,
            },
            "messages": {state: self.reading.count(state) for state in STATES},
            "dead_letters": self.dead_letters,
            "backlog_seconds": {"queued": signal.queued, "leased": signal.leased},
            "backlog_error": self.measured.error,
            "load": decision.load,
            "wanted": decision.wanted,
            "oldest_age_seconds": signal.oldest_age,
            "wait_slo_seconds": self.pool.wait_slo,
            "seconds_per_cost": self.measured.seconds_per_cost,
            "read_at": signal.now,
        }


class Scaler:
    """Reads and decides for every pool of a fleet, and for each revision that a pool is leaving, by `Pool.key`.

    `tick` is called by one thread, the rest by any.

    `cold_start` is in seconds from the start of a worker to its first job, `hold` as in `ScalingLimits`. With `from_zero` no
    worker runs yet: the scaler then goes on from the measurements of an earlier scaler, but not from its number of workers. With
    `by_replica` the workers that a pool's `devices` give one host start and end together, as in a container.
    """

    def __init__(
        self,
        fleet: Fleet,
        settings: Settings,
        *,
        cold_start: float,
        hold: float = HOLD_SECONDS,
        from_zero: bool = False,
        by_replica: bool = True,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._fleet = fleet
        self._url = settings.redis_url
        self._redis: Any = connect(settings)
        self._cold_start = cold_start
        self._hold = hold
        self._from_zero = from_zero
        self._by_replica = by_replica
        self._clock = clock or functools.partial(server_time, self._redis)
        self._minds: dict[str, tuple[Memory, State]] = {}
        self._statuses: Mapping[str, PoolStatus] = {}
        self._read_at: float | None = None
        self.troubles: Mapping[str, str] = {}
        """Why a pool could not be read the last time, one sentence for each."""

    def follow(self, fleet: Fleet) -> None:
        """From the next `tick` on, read the pools of this fleet. Called by any thread."""
        self._fleet = fleet

    def tick(self, *, remember: bool = True) -> Mapping[str, PoolStatus]:
        """Read every pool and decide; with `remember`, keep the averages in Redis. Raises ServiceUnavailableError.

        A pool whose keys hold another type is left out, see `troubles`; the other pools are read.
        """
        with redis_errors(self._url):
            workers = announced_workers(self._redis)
            statuses, troubles = {}, dict[str, str]()
            for one in parts_of(self._redis, self._fleet, troubles=troubles):
                with passed_over(troubles, one.key):
                    serving = [workers[name] for name in workers_of(workers, one.pool, one.queue)]
                    statuses[one.key] = self._look(one, serving, remember=remember)
        for trouble in troubles.values():
            log.warning("%s", trouble)
        self._statuses, self.troubles, self._read_at = statuses, troubles, time.monotonic()
        return statuses

    def statuses(self, *, younger: float) -> Mapping[str, PoolStatus]:
        """Every pool at the last reading. Raises ServiceUnavailableError if the reading is `younger` seconds old or older."""
        if self._read_at is None or time.monotonic() - self._read_at >= younger:
            raise ServiceUnavailableError(
                "the scaler has no fresh reading of Redis; see its log, and check PIPEFLEET_REDIS_URL"
            )
        return self._statuses

    def _look(self, part: Part, workers: Sequence[Mapping[str, Any]], *, remember: bool) -> PoolStatus:
        pool = part.pool
        memory, state = self._minds.get(part.key) or self._recall(part.key)
        barred = sum(1 for facts in workers if facts.get("barred"))
        reading = read_pool(self._redis, part, workers=len(workers) - barred, now=self._clock())
        memory, measured = measure(memory, reading)
        state, decision = decide(state, measured.signal, limits=self._limits(pool))
        decision = replacing(decision, barred=barred, ready=reading.workers, most=pool.workers.max)
        bounds = pool.workers
        desired = whole_replicas(decision.desired, each=self._each(pool), least=bounds.min, most=bounds.max)
        decision = replace(decision, desired=desired)
        self._minds[part.key] = memory, state
        if remember:
            content = encode_json({"memory": memory.to_json(), "state": state.to_json()})
            run_script(self._redis, KEEP, [scaler_key(part.key)], content, int(60 * GAP_SECONDS))
        dead = 0 if pool.generation else deadletters.count_dead_letters(self._redis, part.queue)
        return PoolStatus(pool, reading, measured, decision, dead, barred)

    def _recall(self, pool: str) -> tuple[Memory, State]:
        """The values that an earlier scaler left in Redis; a fresh start if they cannot be read."""
        try:
            content = read_object(self._redis.get(scaler_key(pool)))
            state = State() if self._from_zero else State.from_json(content["state"])
            return Memory.from_json(content["memory"]), state
        except (ValueError, LookupError, TypeError):
            return Memory(), State()

    def _each(self, pool: Pool) -> int:
        """The workers of a replica: those of one host, unless this scaler itself starts each worker."""
        return (pool.workers_per_host or 1) if self._by_replica else 1

    def _limits(self, pool: Pool) -> ScalingLimits:
        workers = pool.workers
        return ScalingLimits(workers.min, workers.max, pool.wait_slo, cold_start=self._cold_start, hold=self._hold)


class ScalerService:
    """A Scaler with its thread and its HTTP server. Port 0 takes a free port; `port` has its number.

    A context manager: it is started inside the block, at whose end the port is given back.
    """

    def __init__(self, scaler: Scaler, *, interval: float, address: str = "127.0.0.1", port: int = 0) -> None:
        self._scaler = scaler
        self._interval = interval
        registry = CollectorRegistry()
        registry.register(_Metrics(self._fresh))
        fields = {"fresh": staticmethod(self._fresh), "registry": registry, "scaler": scaler}
        handler = type("Handler", (_Handler,), fields)
        self._server = ThreadingHTTPServer((address, port), handler)
        self._server.timeout = LOOK_SECONDS
        self.port: int = self._server.server_address[1]
        self._ticking = Service("scaler", self._tick_forever)
        self._services = Services(self._ticking, Service("scaler-http", self._serve))

    def __enter__(self) -> ScalerService:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(LAST_SECONDS)
        self._server.server_close()

    def start(self) -> None:
        """Begin to read the pools and to answer."""
        self._services.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Stop reading and answering. Whether the threads have ended within `timeout` seconds; a thread may wait for Redis."""
        return self._services.stop(timeout)

    def wait(self) -> None:
        """Block until the service is stopped."""
        self._ticking.join()

    def _serve(self, stopping: threading.Event) -> None:
        """Answer in threads of their own, daemons that end with their connection."""
        while not stopping.is_set():
            self._server.handle_request()

    def _tick_forever(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            begin = time.monotonic()
            try:
                self._scaler.tick()
            except PipefleetError as error:
                log.warning("no reading: %s", error)
            except Exception:
                log.exception("no reading")
            stopping.wait(max(0.0, begin + self._interval - time.monotonic()))

    def _fresh(self) -> Mapping[str, PoolStatus]:
        return self._scaler.statuses(younger=max(SHORTEST_STALE, STALE_TICKS * self._interval))


class _Handler(BaseHTTPRequestHandler):
    """Answers GET requests, and no others."""

    fresh: Callable[[], Mapping[str, PoolStatus]]
    registry: CollectorRegistry
    scaler: Scaler
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        try:
            code, content, body = self._answer(self.path.partition("?")[0].rstrip("/"))
        except ServiceUnavailableError as error:
            code, content, body = _json(503, {"error": str(error)})
        self.send_response(code)
        self.send_header("Content-Type", content)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def _answer(self, path: str) -> tuple[int, str, bytes]:
        statuses = self.fresh()
        if path == "/metrics":
            return 200, "text/plain; version=0.0.4; charset=utf-8", generate_latest(self.registry)
        if path == "/healthz":
            return _json(200, {"ok": True})
        if path == "/pools":
            return _json(200, [status.to_json() for status in statuses.values()])
        name = path.removeprefix("/pools/")
        if name in statuses:
            return _json(200, statuses[name].to_json())
        if name in self.scaler.troubles:
            return _json(503, {"error": self.scaler.troubles[name]})
        return _json(404, {"error": "there are /pools, /pools/NAME, /metrics and /healthz", "pools": sorted(statuses)})


def _json(code: int, value: Any) -> tuple[int, str, bytes]:
    return code, "application/json", json.dumps(value).encode()


class _Metrics(Collector):
    """The last readings as Prometheus metrics; none while no reading is fresh."""

    def __init__(self, fresh: Callable[[], Mapping[str, PoolStatus]]) -> None:
        self._fresh = fresh

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Every metric of every pool."""
        try:
            statuses = self._fresh()
        except ServiceUnavailableError:
            return
        for name, (text, value) in _GAUGES.items():
            family = GaugeMetricFamily(f"pipefleet_pool_{name}", text, labels=["pool"])
            for pool, status in statuses.items():
                family.add_metric([pool], value(status))
            yield family
        messages = GaugeMetricFamily("pipefleet_pool_messages", "messages of the pool", labels=["pool", "state"])
        for pool, status in statuses.items():
            for state in STATES:
                messages.add_metric([pool, state], status.reading.count(state))
        yield messages


_GAUGES: dict[str, tuple[str, Callable[[PoolStatus], float]]] = {
    "desired_workers": ("workers that the pool should have", lambda one: one.decision.desired),
    "ready_workers": ("workers that are alive and take jobs", lambda one: one.measured.signal.ready),
    "max_workers": ("workers that the pool may have", lambda one: one.pool.workers.max),
    "load": ("work that arrives, in devices that it keeps busy", lambda one: one.decision.load),
    "queued_seconds": ("work that waits, in device-seconds", lambda one: one.measured.signal.queued),
    "leased_seconds": ("work that workers hold, in device-seconds", lambda one: one.measured.signal.leased),
    "dead_letters": ("messages that no worker will run", lambda one: one.dead_letters),
    "backlog_error": ("relative standard error of the outstanding work", lambda one: one.measured.error),
    "oldest_age_seconds": ("how long the oldest job has waited", lambda one: one.measured.signal.oldest_age),
    "wait_slo_seconds": ("how long a job may wait", lambda one: one.pool.wait_slo),
    "seconds_per_cost": ("worker-seconds of a unit of cost", lambda one: one.measured.seconds_per_cost or 0.0),
    "read_timestamp_seconds": ("when the pool was read", lambda one: one.measured.signal.now),
}
