"""The thread that keeps a worker's leases: it renews them, writes acks and give-backs, and sweeps up the leases of dead workers.

    add ─▶ held ─▶ renew every `renew_seconds` ─┬▶ settle ─▶ pending ─▶ written in batches (`settlements`)
                                                └▶ lost: `on_lost`
    every `sweep_seconds`: leases that ran out ─▶ lists; messages that wait in `arriving` ─▶ lists; dead letters ─▶ `on_dead`

`transport` adds leases; any thread settles them. The ledger has its own connection and its own thread. The event loop cannot do
this work: a solo task keeps the loop busy for as long as it runs. A lease must also survive a reconnect of the consumer. While
Redis is away the thread waits and repeats; nothing is lost. After an outage it renews its own leases before it sweeps.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from redis import Redis
from redis.exceptions import RedisError

from pipefleet.connection.scripts import run_script
from pipefleet.queues.dead_letters import DeadLetter
from pipefleet.service import Service, Services
from pipefleet_workers.delivery.leases import Buried, GivenBack, Lease, LeaseKeys, Settlement, Terms
from pipefleet_workers.delivery.scripts import DUE, GATHER, RENEW, REPORTED, SWEEP, UNREPORTED
from pipefleet_workers.delivery.settlements import Entry, Settlements, fences

log = logging.getLogger(__name__)
_CHUNK = 500
"""Most leases in one call of a script."""
_PAUSE_FIRST, _PAUSE_LONGEST = 0.1, 1.0
"""Seconds before Redis is tried again."""
_MOST_TELLS = 5
"""After so many failed reports a dead letter is filed without one. Only failures while other reports succeed count."""


class _Held(NamedTuple):
    """A weakly held lease, with the data to give its message back even after the consumer has dropped the lease."""

    lease: weakref.ref[Lease]
    tag: bytes
    owner: str
    list: str
    order: int
    deliveries: int


class User(Protocol):
    """Takes messages that a ledger holds."""

    def credit_freed(self) -> None:
        """A lease ended, so there may be room for another message. Called by any thread."""


class Ledger:
    """The leases of one process on one queue. Thread-safe.

    Its thread begins when it is needed, and ends by itself when no user is attached, no lease is held and all settlements are
    written.
    """

    def __init__(self, client: Redis, keys: LeaseKeys, terms: Terms) -> None:
        self._redis: Any = client
        self._keys = keys.all()
        self._terms = terms
        self._name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._fetches, self._order = itertools.count(1), itertools.count(1)
        self._pid = os.getpid()
        self._held: dict[str, _Held] = {}
        self._low: set[str] = set()
        self._pending: deque[Entry] = deque()
        self._due: deque[bytes] = deque()
        self._failed_tells: Counter[bytes] = Counter()
        self._settlements = Settlements(client, self._keys, terms.prefix)
        self._unwritten = 0
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lists: set[str] = set()
        self._gathers = self._reporting = False
        self._lock = threading.RLock()
        self._written = threading.Condition(self._lock)
        self._wake = threading.Event()
        self._service = Service("lease-ledger", self._run, wake=self._wake.set)
        self._reports = Service("lease-reports", self._tell)
        self._to_tell: Sequence[bytes] = ()
        self._renew_at = self._sweep_at = self._wrote_at = self._answered_at = 0.0
        self._pause = 0.0
        self._silence = 3 * max(terms.renew_seconds, terms.sweep_seconds)
        atexit.register(self.flush, 5.0)

    @property
    def keys(self) -> tuple[str, ...]:
        """KEYS[1..8] of every script."""
        return self._keys

    @property
    def redis(self) -> Any:
        """The client of this ledger; its Redis user is that of its channels."""
        return self._redis

    @property
    def held(self) -> int:
        """How many messages this process holds."""
        return len(self._held)

    @property
    def held_low(self) -> int:
        """How many held messages came from the lists of the lowest priority."""
        return len(self._low)

    def owner(self) -> str:
        """A new owner name for the messages of one fetch: host, process, a random part, a number."""
        return f"{self._name}:{next(self._fetches)}"

    def next_order(self) -> int:
        """A number above all earlier numbers."""
        return next(self._order)

    def attach(self, user: User, lists: Iterable[str]) -> None:
        """Keep the thread running for `user`, who takes from `lists`, and tell the user when a lease ends.

        Users are held weakly.
        """
        with self._lock:
            self._users.add(user)
            self._lists.update(lists)
            self.start()

    def detach(self, user: User) -> None:
        """The user takes no more messages."""
        with self._lock:
            self._users.discard(user)
        self._wake.set()

    def gather_soon(self) -> None:
        """Put unfetched messages that woke this process back, so that they wake others; also without a user. Returns at once."""
        self._gathers = True
        self._wake.set()

    def add(self, leases: Iterable[Lease]) -> None:
        """Hold and renew `leases` from now on."""
        with self._lock:
            for lease in leases:
                self._held[lease.key] = _Held(
                    weakref.ref(lease), lease.tag, lease.owner, lease.list, lease.order, lease.deliveries
                )
                if lease.low:
                    self._low.add(lease.key)
            self.start()

    def find(self, key: str) -> Lease | None:
        """The lease with a local delivery tag, while it is held."""
        held = self._held.get(key)
        return held.lease() if held else None

    def leases(self) -> list[Lease]:
        """The leases that are held now, in the order of fetching."""
        with self._lock:
            held = list(self._held.values())
        found = [lease for one in held if (lease := one.lease()) is not None]
        return sorted(found, key=lambda lease: lease.order)

    def give_all_back(self) -> None:
        """Give back all held messages, also messages that the consumer dropped.

        Celery's thread pool drops unstarted tasks at shutdown.
        """
        with self._lock:
            held = list(self._held.values())
        for one in held:
            lease = one.lease() or Lease(one.tag, one.owner, "", one.list, one.deliveries, 0, one.order, self)
            lease.give_back()

    def settle(self, lease: Lease, settlement: Settlement) -> None:
        """End a lease. It is written within `ack_seconds`, and again until Redis has answered. Only the first call counts."""
        with self._lock:
            if lease.settled or lease.lost:
                return
            lease.settled = True
            self._drop(lease.key)
            self._pending.append((lease, settlement))
            self._unwritten += 1
            self.start()
        self._wake.set()
        self._tell_users()

    def due_now(self, lease: Lease) -> None:
        """End the delay of a message that was put off."""
        self._due.append(lease.tag)
        self._wake.set()

    def nudge(self) -> None:
        """Look for dead letters and expired leases now instead of at the next sweep."""
        self._sweep_at = 0.0
        self._wake.set()

    def flush(self, seconds: float) -> bool:
        """Wait until every settlement is written and reported; False when this took longer than `seconds`."""
        if os.getpid() != self._pid:
            return True  # in a forked child: the thread and its work remain in the parent
        self._wake.set()
        with self._written:
            return self._written.wait_for(lambda: not (self._unwritten or self._reporting), seconds)

    def start(self) -> None:
        """Begin to renew and to write."""
        with self._lock:
            if not self._service.running:
                now = time.monotonic()
                self._renew_at, self._sweep_at = now + self._terms.renew_seconds, now + self._terms.sweep_seconds
                self._answered_at = now
            self._service.start()

    def stop(self, timeout: float | None = None) -> bool:
        """End when all settlements are written, or cannot be written. Whether `timeout` seconds were enough.

        Held leases are then no longer renewed. A later `attach`, `add` or `settle` starts the thread again.
        """
        return Services(self._service, self._reports).stop(timeout)

    def _drop(self, key: str) -> None:
        self._held.pop(key, None)
        self._low.discard(key)

    def _tell_users(self) -> None:
        for user in list(self._users):
            user.credit_freed()

    def _run(self, stopping: threading.Event) -> None:
        while not self._finished(stopping):
            self._wake.wait(max(0.0, min(self._renew_at, self._sweep_at) - time.monotonic()))
            try:
                self._turn()
                self._pause = 0.0
            except RedisError as error:
                self._wait_for_redis(error)
            except Exception:
                log.exception("the ledger of %s failed and goes on", self._keys[0])
                self._pause = _PAUSE_LONGEST
                time.sleep(self._pause)

    def _finished(self, stopping: threading.Event) -> bool:
        with self._lock:
            if not len(self._users):
                self._forget_unheld()
            needed = len(self._users) or self._held or self._unwritten or self._gathers or self._reporting
            told = stopping.is_set() and (self._pause or not self._pending)
            if needed and not told:
                return False
            stopping.set()
            if not self._reporting:
                self._redis.connection_pool.disconnect()
            return True

    def _turn(self) -> None:
        self._wake.clear()
        if self._pending:
            # A lone settlement is written at once; in a stream, the settlements of a few milliseconds share a round trip.
            time.sleep(
                max(0.0, min(self._terms.ack_seconds, self._wrote_at + self._terms.ack_seconds - time.monotonic()))
            )
            self._write()
        if self._due:
            self._bring_forward()
        if self._gathers:
            self._gathers = False
            self._gather()
        if time.monotonic() >= self._renew_at:
            self._renew()
        if time.monotonic() >= self._sweep_at:
            self._sweep()

    def _wait_for_redis(self, error: RedisError) -> None:
        if not self._pause:
            log.warning("leases of %s wait for Redis: %s", self._keys[0], type(error).__name__)
        self._pause = min(_PAUSE_LONGEST, max(_PAUSE_FIRST, 2 * self._pause))
        time.sleep(self._pause)
        self._renew_at = 0.0  # once Redis is back, renew before sweeping
        self._wake.set()

    def _call(self, script: str, *arguments: Any) -> Any:
        answer = run_script(self._redis, script, self._keys, *arguments)
        self._note_answer()
        return answer

    def _note_answer(self) -> None:
        """Note that Redis answered. After an outage for all workers, each must renew its leases before any worker sweeps."""
        now = time.monotonic()
        if now - self._answered_at > self._silence:
            self._sweep_at = max(self._sweep_at, now + 2 * self._terms.renew_seconds)
        self._answered_at = now

    def _write(self) -> None:
        batch = [self._pending.popleft() for _ in range(min(_CHUNK, len(self._pending)))]
        try:
            missed = self._settlements.write(batch)
        except RedisError:
            self._pending.extendleft(reversed(batch))
            raise
        self._wrote_at = time.monotonic()
        self._note_answer()
        if missed:
            log.info("%d messages of %s were acknowledged after their lease had ended", missed, self._keys[0])
        delays = [how.delay for _, how in batch if isinstance(how, GivenBack) and how.delay]
        self._sweep_at = min([self._sweep_at, *(self._wrote_at + delay for delay in delays)])
        if any(isinstance(settlement, Buried) for _, settlement in batch):
            self._report()
        with self._written:
            self._unwritten -= len(batch)
            self._written.notify_all()
        if self._pending:
            self._wake.set()

    def _bring_forward(self) -> None:
        tags = [self._due.popleft() for _ in range(min(_CHUNK, len(self._due)))]
        try:
            self._call(DUE, *tags)
        except RedisError:
            self._due.extendleft(reversed(tags))
            raise
        self._sweep_at = 0.0
        if self._due:
            self._wake.set()

    def _renew(self) -> None:
        self._forget_unheld()
        leases = self.leases()
        for start in range(0, len(leases), _CHUNK):
            chunk = leases[start : start + _CHUNK]
            lost = set(self._call(RENEW, *fences(chunk)))
            self._lose([lease for lease in chunk if lease.tag in lost])
        self._renew_at = time.monotonic() + self._terms.renew_seconds

    def _forget_unheld(self) -> None:
        with self._lock:
            gone = [key for key, held in list(self._held.items()) if held.lease() is None]
            for key in gone:
                self._drop(key)
        if gone:
            log.warning("%d messages were dropped without an ack; they are delivered again", len(gone))
            self._tell_users()

    def _lose(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            with self._lock:
                if lease.settled:
                    continue  # it was settled while the renewal was on its way
                lease.lost = True
                self._drop(lease.key)
            log.warning("the lease of message %s is lost; another worker may run it", lease.key)
            _guarded(self._terms.on_lost, lease)
        if leases:
            self._tell_users()

    def _sweep(self) -> None:
        terms, found = self._terms, 100
        if time.monotonic() - self._answered_at > self._silence:
            self._redis.ping()
            self._note_answer()
            return
        while found >= 100:
            steps = sorted(terms.steps, reverse=True)
            found = self._call(SWEEP, int(terms.lease_seconds * 1e6), 100, terms.separator, terms.prefix, *steps)
            if found:
                log.info("%d messages of %s are back in their queue", found, self._keys[0])
        self._gather()
        self._report()
        self._sweep_at = max(self._sweep_at, time.monotonic() + terms.sweep_seconds)

    def _gather(self) -> None:
        """Put messages that woke a dead or slow worker back to their lists, where they wake another worker."""
        with self._lock:
            lists = sorted(self._lists)
        if lists:
            self._call(GATHER, *lists)

    def _report(self) -> None:
        """Report the dead letters of all workers, each at least once, then file them.

        Reports run in a thread of their own: they wait for services, and leases must be renewed meanwhile.
        """
        entries = [] if self._reporting else self._call(UNREPORTED)
        if entries:
            self._reporting, self._to_tell = True, entries
            self._reports.start()

    def _tell(self, stopping: threading.Event) -> None:
        entries = self._to_tell
        try:
            done = [entry for entry in entries if _guarded(self._terms.on_dead, DeadLetter.parse(entry))]
            done += self._given_up([entry for entry in entries if entry not in done], others=bool(done))
            if done:
                self._call(REPORTED, *done)
        except RedisError as error:
            log.warning("dead letters of %s are told of again: %s", self._keys[0], type(error).__name__)
        except Exception:
            log.exception("dead letters of %s are told of again", self._keys[0])
        finally:
            stopping.set()  # the next letters begin a thread of their own
            with self._written:
                self._reporting = False
                self._written.notify_all()
            self._wake.set()

    def _given_up(self, failed: Sequence[bytes], *, others: bool) -> list[bytes]:
        """Letters whose report keeps failing while other reports succeed.

        After _MOST_TELLS tries they are filed without a report; else they would keep later letters back.
        """
        self._failed_tells = Counter({entry: self._failed_tells[entry] + others for entry in failed})
        given_up = [entry for entry in failed if self._failed_tells[entry] >= _MOST_TELLS]
        if given_up:
            log.error("%d dead letters of %s are filed, and nobody could be told of them", len(given_up), self._keys[0])
        return given_up


def _guarded(callback: Callable[[Any], None] | None, argument: Any) -> bool:
    if callback is None:
        return True
    try:
        callback(argument)
    except Exception:
        log.exception("a callback of the lease transport failed")
        return False
    return True
