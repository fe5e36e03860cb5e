"""The work of a pool's workers, as running totals in Redis: `pipefleet:work:<pool>` with `cost`, `seconds` and ITEM_COUNTS.

`pipefleet:work:<pool>@<digits of its queue>` has `cost` and `seconds` of one revision alone. Every worker adds its work since its
last report, so the totals stay when a worker ends. The device and `consume.tally` count, `facts` reports; the scaler and `top` read
the totals. Errors are redis-py's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipefleet.connection.scripts import run_script
from pipefleet.foreign import number
from pipefleet.queues.keys import work_key

log = logging.getLogger(__name__)
MOST_COST = 1e9
"""Largest cost of one message: 10,000 items of 100,000 tokens. A larger cost in a message counts as this."""
_ADD = """
redis.pcall('HDEL', KEYS[1], '')
local anew = {}
for _, key in ipairs(KEYS) do
  for i = 2, #ARGV, 2 do
    local answer = redis.pcall(ARGV[1], key, ARGV[i], ARGV[i + 1])
    if type(answer) == 'table' and answer.err then
      local known = false
      for _, words in ipairs({'WRONGTYPE', 'not a float', 'not an integer', 'not a valid float', 'Infinity', 'would overflow'}) do
        known = known or string.find(answer.err, words, 1, true) ~= nil
      end
      if not known then return answer end
      if redis.call('TYPE', key).ok ~= 'hash' then redis.call('DEL', key) end
      answer = false
    end
    if not answer or not (tonumber(answer) >= 0 and tonumber(answer) <= 1e15) then
      redis.call('HSET', key, ARGV[i], ARGV[i + 1])
      table.insert(anew, ARGV[i] .. ' of ' .. key)
    end
  end
end
return anew
"""
"""KEYS: totals. ARGV: the command that adds, then fields and numbers.

A field that Redis cannot add to, or whose number is not credible (see `foreign.MOST_NUMBER`), begins anew; the names of such
totals are returned. The first write takes no memory: see `pipefleet.contract.records`.
"""
ITEM_COUNTS = ("items", "failed", "cancelled", "expired")
"""Items that ended, and how many of them ended without a result."""


@dataclass(frozen=True, slots=True)
class Items:
    """Items of a pool that ended since it began, and how many of them failed, were cancelled or expired."""

    items: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """Totals since the pool began: cost of the messages that ended (see `JobMessage.work`), device seconds of forwards."""

    cost: float = 0.0
    seconds: float = 0.0


def record_done(redis: Any, *names: str, cost: float, seconds: float) -> None:
    """Add the work of one worker since its last call to each of these totals. One round trip; raises redis-py's errors.

    A total that is no number, or is too large, begins anew: readers only look at differences.
    """
    _add(redis, list(map(work_key, names)), "HINCRBYFLOAT", cost=cost, seconds=seconds)


def _add(redis: Any, keys: Sequence[str], command: str, **values: float) -> None:
    for total in run_script(redis, _ADD, keys, command, *(part for pair in values.items() for part in pair)):
        log.warning("%s was no number; it begins anew", total.decode(errors="replace"))


def record_items(redis: Any, pool: str, **counts: int) -> None:
    """Add the items that ended in one worker, by the names of ITEM_COUNTS. One round trip; raises redis-py's errors."""
    if any(counts.values()):
        _add(redis, [work_key(pool)], "HINCRBY", **counts)


def read_items(redis: Any, pool: str) -> Items:
    """The totals of a pool; zeros before the first report."""
    return Items(*(int(_total(count)) for count in redis.hmget(work_key(pool), ITEM_COUNTS)))


def read_done(redis: Any, pool: str) -> Done:
    """The totals of a pool; zeros before the first report."""
    cost, seconds = redis.hmget(work_key(pool), ["cost", "seconds"])
    return Done(_total(cost), _total(seconds))


def _total(value: bytes | None) -> float:
    """A total, at most MOST_NUMBER; 0 for a value that is no number."""
    try:
        return number(value or 0)
    except ValueError:
        return 0.0


class WorkCount:
    """The work of one worker since its last report. Thread-safe; one thread calls `flush`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cost = self._seconds = 0.0

    def add(self, *, cost: float = 0.0, seconds: float = 0.0) -> None:
        """Count the cost of a message that ended here, at most MOST_COST, or the seconds of a forward."""
        with self._lock:
            self._cost += min(cost, MOST_COST)
            self._seconds += seconds

    def flush(self, redis: Any, *names: str) -> None:
        """Add the work to each of these totals. If this fails, the next call adds it; raises redis-py's errors."""
        with self._lock:
            cost, seconds = self._cost, self._seconds
        record_done(redis, *names, cost=cost, seconds=seconds)
        with self._lock:
            self._cost, self._seconds = self._cost - cost, self._seconds - seconds
