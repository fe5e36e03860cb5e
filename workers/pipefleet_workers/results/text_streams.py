"""`TextStreams`: tells clients the text of a job while a model writes it.

    device's thread: wrote(unit, tokens) ─▶ newest tokens of each job ─▶ own thread: text, new piece ─▶ XADD ─▶ the client reads it

The engine calls it for jobs whose client asked for it. A text never waits for Redis: a piece that cannot be written goes with the
next one. The result of the job stands in its record as ever, and alone counts.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from redis.exceptions import RedisError

from pipefleet.queues.keys import text_key
from pipefleet.service import Service
from pipefleet_workers.items import JobContext, Unit

log = logging.getLogger(__name__)
PACE_SECONDS = 0.02
"""Shortest time between two pieces of a job: each piece costs the text of all its tokens."""
KEPT_SECONDS = 600
"""How long a stream is kept after its last piece, for clients that were away."""
_UNFINISHED = "\ufffd"
"""Stands at the end of a text whose last character lacks tokens."""
TextOf = Callable[[Unit, Sequence[int]], str | None]


class TextStreams:
    """A service that writes the texts. Thread-safe; `wrote` and `ended` return at once.

    `text_of` gives the text of a unit's tokens, or None while there is none. Redis may refuse a write, for example when it is full;
    then the client reads a longer piece later, or the whole text at the end.
    """

    def __init__(self, redis: Any, text_of: TextOf) -> None:
        self._redis = redis
        self._text_of = text_of
        self._newest: dict[str, tuple[Unit, Sequence[int]]] = {}
        self._ended: list[JobContext] = []
        self._told: dict[str, int] = {}
        """Characters of each job that its client can read. Only the service's thread uses it."""
        self._changed = threading.Condition()
        self._service = Service("text-streams", self._run, wake=self._wake)

    def start(self) -> None:
        """Begin to write."""
        self._service.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Write what was told, then end. Whether the thread has ended within `timeout` seconds (None: no bound)."""
        return self._service.stop(timeout)

    def wrote(self, unit: Unit, tokens: Sequence[int]) -> None:
        """A unit has these new tokens by now. Tokens that were told before and not written yet are dropped."""
        with self._changed:
            self._newest[unit.assembly.work.job.id] = unit, tokens
            self._changed.notify()

    def ended(self, job: JobContext) -> None:
        """No more tokens of a job come from here; a job that was given back goes on elsewhere."""
        with self._changed:
            self._newest.pop(job.id, None)  # the client takes the rest from the result
            self._ended.append(job)
            self._changed.notify()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self, stopping: threading.Event) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest or self._ended or stopping.is_set())
                newest, self._newest = self._newest, {}
                ended, self._ended = self._ended, []
            if not newest and not ended:
                return
            try:
                self._write(newest, ended)
            except RedisError as error:
                log.debug("a text is not told now: %s", error)
            except Exception:  # without this thread no client could read along any more
                log.exception("telling texts failed")
            stopping.wait(PACE_SECONDS)

    def _write(self, newest: dict[str, tuple[Unit, Sequence[int]]], ended: Sequence[JobContext]) -> None:
        pipe = self._redis.pipeline(transaction=False)
        for job in ended:  # first, since tokens that came before the end were dropped
            self._told.pop(job.id, None)
            if not job.given_back:
                pipe.xadd(text_key(job.id), {"end": 1})
                pipe.expire(text_key(job.id), KEPT_SECONDS)
        told: dict[str, int] = {}
        for job_id, (unit, tokens) in newest.items():
            at, text = self._told.get(job_id, 0), self._text(unit, tokens)
            if len(text) > at:
                pipe.xadd(text_key(job_id), {"at": at, "text": text[at:].encode(errors="replace")})
                pipe.expire(text_key(job_id), KEPT_SECONDS)
                told[job_id] = len(text)
        if pipe.command_stack:
            pipe.execute()
        self._told.update(told)

    def _text(self, unit: Unit, tokens: Sequence[int]) -> str:
        try:
            return (self._text_of(unit, tokens) or "").rstrip(_UNFINISHED)
        except Exception:
            log.exception("the text of job %s cannot be told before its end", unit.assembly.work.job.id)
            return ""
