"""The metrics of one worker, in one table; a new metric starts here.

The engine and `consume.tally` count, `facts` sets facts and `pulse` reads the totals. `build` serves the metrics over HTTP for
Prometheus if a port is given; a port in use raises OSError there. Counting raises nothing.
"""

from __future__ import annotations

import re
import threading
from collections import Counter as Counts
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.registry import Collector

from pipefleet.contract.messages import JobState

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_WORD = re.compile(r"[a-z_]{0,40}")
"""Valid codes and stages: an item that its producer could not prepare brings its own code and stage in its shard."""
STATES = tuple(state for state in JobState if state.final)
"""The final states of an item."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Items of one worker that ended, and how many of them failed, were cancelled or expired."""

    items: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    processed: int = 0
    """Items that left the engine, with any outcome; the items of a shard that runs again count again."""
    busy: float = 0.0
    """Seconds in which a forward ran; those of forwards that ran at once count once."""


class Metrics:
    """Counters of one worker, each labelled with its pool. Thread-safe."""

    def __init__(self, pool: str) -> None:
        self.registry = CollectorRegistry()
        self._pool = pool
        self._children: dict[tuple[object, ...], Counter] = {}
        self._ended = dict.fromkeys(STATES, 0)
        self._processed = 0
        self._busy_seconds = 0.0
        self._lock = threading.Lock()
        self._items = self._counter(
            "pipefleet_items_total", "items that ended, by what their record or part says", "state"
        )
        self._failures = self._counter("pipefleet_item_failures_total", "items that failed", "code", "stage")
        self._stage = self._counter("pipefleet_stage_seconds_total", "seconds spent on items", "stage")
        self._cost = self._counter("pipefleet_batch_cost_total", "cost of batches, padded and useful", "kind")
        self._busy = self._counter("pipefleet_device_busy_seconds_total", "seconds in which a forward ran, in any lane")
        self._lane_busy = self._counter("pipefleet_lane_busy_seconds_total", "seconds in which a lane ran", "lane")
        self._messages = self._counter("pipefleet_messages_total", "messages of the queue", "event")
        for event in ("delivered", "redelivered", "handed_back", "handed_over"):
            self._child(self._messages, event)  # a rate needs the zero before the first event
        for state in STATES:
            self._child(self._items, state)
        self._units = self._histogram("pipefleet_batch_units", "units of a batch", SIZES)
        self._seconds = self._histogram("pipefleet_batch_seconds", "seconds of a forward", SECONDS)
        self._takes = Gauge(
            "pipefleet_takes_jobs", "1; 0 while the object store refuses this worker", ("pool",), registry=self.registry
        )
        self.barred(None)
        self._facts = Gauge(
            "pipefleet_batching", "budget, padding (1 exact, 0 equal shapes), service time, lanes", ("pool", "fact"),
            registry=self.registry,
        )  # fmt: skip

    def barred(self, reason: str | None) -> None:
        """Report that the object store refuses this worker, so that it takes no jobs; None once it does not."""
        self._takes.labels(self._pool).set(0 if reason else 1)

    def batch(self, units: int, *, padded: float, useful: float, seconds: float, busy: float | None = None) -> None:
        """Count one batch, which took `seconds`.

        `busy` are its device seconds: less than `seconds` if other batches ran at the same time, and None for `seconds`.
        """
        busy = seconds if busy is None else busy
        self._units.labels(self._pool).observe(units)
        self._seconds.labels(self._pool).observe(seconds)
        self._busy.labels(self._pool).inc(busy)
        with self._lock:
            self._busy_seconds += busy
        self._cost.labels(self._pool, "padded").inc(padded)
        self._cost.labels(self._pool, "useful").inc(useful)

    def lane(self, index: int, seconds: float) -> None:
        """Count the seconds of one batch for the lane that ran it."""
        self._child(self._lane_busy, str(index)).inc(seconds)

    def message(self, event: str) -> None:
        """Count one message that was `delivered`, `redelivered`, `handed_back` or `handed_over`."""
        self._child(self._messages, event).inc()

    def processed(self, seconds: Sequence[Mapping[str, float]]) -> None:
        """Count items that leave the engine, with the seconds of each by stage. Many in one call, since each counter has a lock."""
        with self._lock:
            self._processed += len(seconds)
        totals: dict[str, float] = defaultdict(float)
        shared = {id(one): one for one in seconds}
        for key, count in Counts(map(id, seconds)).items():
            for name, value in shared[key].items():
                totals[name] += value * count
        for name, value in totals.items():
            self._child(self._stage, name).inc(value)

    def ended(self, state: JobState, count: int = 1) -> None:
        """Count items that have ended as `state`, according to their record or part."""
        self._child(self._items, state).inc(count)
        with self._lock:
            self._ended[state] += count

    def failure(self, *, code: str, stage: str, count: int = 1) -> None:
        """Count the reason of items that `ended` counts as failed. Unknown codes and stages count as `other`."""
        self._child(self._failures, *(one if _WORD.fullmatch(one) else "other" for one in (code, stage))).inc(count)

    def totals(self) -> Totals:
        """All counts since the worker began."""
        with self._lock:
            ended = self._ended
            return Totals(
                items=sum(ended.values()),
                failed=ended[JobState.FAILED],
                cancelled=ended[JobState.CANCELLED],
                expired=ended[JobState.EXPIRED],
                processed=self._processed,
                busy=self._busy_seconds,
            )

    def fact(self, name: str, value: float) -> None:
        """Set one fact about batching."""
        self._facts.labels(self._pool, name).set(value)

    def add(self, collector: Collector) -> None:
        """Expose the metrics of `collector` as well, read at each scrape."""
        self.registry.register(collector)

    def serve(self, port: int, address: str = "127.0.0.1") -> None:
        """Answer `/metrics` on `port` from a thread. Raises OSError when the port is in use."""
        start_http_server(port, addr=address, registry=self.registry)

    def _child(self, counter: Counter, *labels: str) -> Counter:
        """The counter with these labels; looking it up in the library takes ten times as long as counting."""
        key = (id(counter), *labels)
        if key not in self._children:
            self._children[key] = counter.labels(self._pool, *labels)
        return self._children[key]

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("pool", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ("pool",), buckets=buckets, registry=self.registry)
