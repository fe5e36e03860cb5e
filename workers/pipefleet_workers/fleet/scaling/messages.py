"""The messages of one pool in Redis: their exact number, and their cost, estimated from a sample of bounded size.

A reading costs the same for a hundred thousand messages as for ten million: the lengths of a few lists and hashes, and SAMPLE
messages of each. `signal.read_pool` calls it. Errors are redis-py's.
"""

from __future__ import annotations

import base64
import math
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipefleet.connection.rights import may
from pipefleet.foreign import mapping, number, read_json
from pipefleet.queues.celery import COST_HEADER, TIME_HEADER
from pipefleet.queues.keys import ledger_keys, waiting_lists
from pipefleet_workers.observe.totals import MOST_COST

SAMPLE = 64
"""Messages that are read of each list or hash; a shorter list is read whole, and its cost is exact."""
DUE_SECONDS = 300.0
"""A delayed message that is due later than this is no work yet, whatever its cost."""
DEPTH = 50_000
"""Samples lie no further than this from an end of a list: Redis walks there, and takes 10 ms to the middle of a million."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place of a pool's messages, and whether they wait there or are with workers.

    `kind` is `list`, `hash`, or `tags`: a sorted set with the entries of the hash before it that no worker holds.
    """

    key: str
    state: str
    """`queued`, `leased` or `delayed`."""
    kind: str = "list"


@dataclass(frozen=True, slots=True)
class Content:
    """The content of one place: the number of messages, exact; their mean cost, with its standard error."""

    count: int
    mean: float = 0.0
    error: float = 0.0
    queued_at: float | None = None
    """When the oldest message was queued; None if there is none, or it carries no time."""
    due: int | None = None
    """The number of delayed messages that are due within DUE_SECONDS; None means all."""

    @property
    def soon(self) -> int:
        """The number of messages that a worker can take now, or within DUE_SECONDS."""
        return self.count if self.due is None else min(self.count, self.due)


def places(*queues: str) -> list[Place]:
    """Every place where the messages of one pool's queues can be. Only this function knows the transport's keys."""
    keys = ledger_keys(queues[0])
    waiting = [Place(name, "queued") for queue in queues for name in waiting_lists(queue)]
    return [*waiting, Place(keys["unacked_key"], "leased", "hash"), Place(keys["delayed_key"], "delayed", "tags")]


def read_contents(redis: Any, wanted: Sequence[Place], source: random.Random, *, now: float) -> list[Content]:
    """The content of each place, in three round trips. `source` chooses the sample, `now` is the server's time.

    A user without the right to read messages gets their number; each message then counts as one item.
    """
    counts, soon = _counts(redis, wanted, now + DUE_SECONDS)
    sampled = counts if may(redis, *_reading(wanted)) else [0] * len(counts)
    pipe = redis.pipeline(transaction=False)
    for place, count in zip(wanted, sampled, strict=True):
        for position in _positions(place, count, source):
            pipe.lindex(place.key, position)
        if count and place.kind == "hash":
            pipe.hrandfield(place.key, SAMPLE, withvalues=True)
    replies = iter(pipe.execute())
    contents: list[Content] = []
    for place, count, some in zip(wanted, counts, sampled, strict=True):
        if place.kind == "hash":
            raw = list(next(replies))[1::2] if some else []
            contents.append(_content(raw, count, oldest=None))
        elif place.kind == "tags":
            rest, delayed = _split(contents.pop(), count)
            contents += (rest, replace(delayed, due=soon[place.key]))
        else:
            raw = [next(replies) for _ in _positions(place, some, None)]
            contents.append(_content(raw[1:], count, oldest=raw[0] if raw else None))
    return contents


def _reading(wanted: Iterable[Place]) -> list[tuple[str, ...]]:
    """The commands that read messages in their places."""
    return [
        ("LINDEX", place.key, "0") if place.kind == "list" else ("HRANDFIELD", place.key, "1")
        for place in wanted
        if place.kind != "tags"
    ]


def _split(both: Content, tagged: int) -> tuple[Content, Content]:
    """The contents of a hash, divided: the untagged messages and the tagged messages. Both get the same mean cost."""
    tagged = min(tagged, both.count)
    return replace(both, count=both.count - tagged), replace(both, count=tagged)


def message_cost(payload: Mapping[str, Any]) -> float:
    """The cost of a job, from its JSON form: its own value, else the number of its items. See `JobMessage.work`.

    At most MOST_COST. Raises ValueError or LookupError if it is no message of ours.
    """
    cost = believed(payload.get("cost") or 0.0)
    shard = payload.get("shard")
    return cost or believed(mapping(shard)["count"] if shard else len(payload.get("items") or (1,)))


def believed(cost: Any) -> float:
    """A cost from a message, at most MOST_COST. Raises ValueError if it is no number, below 0 or not finite."""
    return min(MOST_COST, number(cost, most=sys.float_info.max))


def _counts(redis: Any, wanted: Sequence[Place], until: float) -> tuple[list[int], dict[str, int]]:
    """The number of messages in each place; and for each sorted set, the number of messages that are due by `until`."""
    pipe, tags = redis.pipeline(transaction=False), [place.key for place in wanted if place.kind == "tags"]
    for place in wanted:
        {"list": pipe.llen, "hash": pipe.hlen, "tags": pipe.zcard}[place.kind](place.key)
    for key in tags:
        pipe.zcount(key, "-inf", until)
    counts = [int(count) for count in pipe.execute()]
    return counts[: len(wanted)], dict(zip(tags, counts[len(wanted) :], strict=True))


def _positions(place: Place, count: int, source: random.Random | None) -> list[int]:
    """The place of the oldest message in a list, then of a sample.

    The sample is spread evenly: a run's shards grow along the list.
    """
    if place.kind != "list" or not count:
        return []
    if count <= SAMPLE:
        return [-1, *range(count)]
    within = min(count, 2 * DEPTH)
    phase = source.random() if source else 0.0
    spread = (int((index + phase) * within / SAMPLE) for index in range(SAMPLE))
    return [-1, *(at if at < within / 2 else at - within for at in spread)]


def _content(raw: Sequence[bytes | None], count: int, *, oldest: bytes | None) -> Content:
    """The content of a place. A message that went away between the two round trips does not count as read."""
    costs = [_cost_and_time(one)[0] for one in raw if one is not None]
    queued_at = _cost_and_time(oldest)[1] if oldest is not None else None
    if not costs:
        return Content(count, 1.0 if count else 0.0, 0.0, queued_at)
    mean = sum(costs) / len(costs)
    variance = sum((cost - mean) ** 2 for cost in costs) / max(1, len(costs) - 1)
    unread = max(0.0, 1.0 - len(costs) / count) if count else 0.0
    return Content(count, mean, math.sqrt(variance / len(costs) * unread), queued_at)


def _cost_and_time(raw: bytes) -> tuple[float, float | None]:
    """The cost of one message, and when it was queued. A foreign message counts as one item."""
    try:
        content = read_json(raw)
        message = mapping(content[0] if isinstance(content, list) else content)
        headers = mapping(message["headers"])
    except (ValueError, LookupError):
        return 1.0, None
    return _cost(message, headers.get(COST_HEADER)), _time(headers.get(TIME_HEADER))


def _cost(message: Mapping[str, Any], told: Any) -> float:
    try:
        return (believed(told) if told else message_cost(_payload(message))) or 1.0
    except (ValueError, LookupError, TypeError, AttributeError):
        return 1.0


def _time(told: Any) -> float | None:
    try:
        return None if told is None else number(told)
    except ValueError:
        return None


def _payload(message: Mapping[str, Any]) -> Mapping[str, Any]:
    body = message["body"]
    if message["properties"].get("body_encoding") == "base64":
        body = base64.b64decode(body)
    return mapping(read_json(body)[0][0])
