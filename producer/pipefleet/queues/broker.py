"""Redis as everything here uses it: the Celery app, the wire format, the queues and every key. The one file that imports celery.

Keys, all under `pipefleet:` (queues are Celery's own lists, named in `routing`):

    job:<id>                hash    state, output, error … of a single job; kept for `Settings.result_ttl`
    done:<client>           channel the ids of a client's jobs that reached a final state
    cancelled               channel ids of jobs and runs that were cancelled
    idempotency:<key>       string  the id of the job that was submitted with this key, and a digest of what it asks for
    run:<id>                hash    shards, cancelled, since (a mark that is gone when Redis was emptied), unqueued (missing shards)
    run:<id>:items          bitmap  items that are finished, by position
    run:<id>:failed         bitmap  those of them that failed
    run:<id>:parts          bitmap  shards whose part is written
    run:<id>:refused        hash    shards without a part that no worker will run: why, by index
    run:<id>:planner        string  who plans or resumes the run now; ends with its heartbeat
    run:<id>:suspects:<index> hash  what is known of a shard that killed workers: culprits, and the item that runs alone now
    pools                   hash    what workers announce, by pool and revision; each entry ends with its heartbeat
    workers                 hash    what each worker tells of itself; ends with its heartbeat
    fleet                   string  the store that the fleet has, by its id; see `identity`
    revisions               hash    model and revision of each queue `<queue>@…` that messages were put into, or a worker consumes
    parked                  hash    pools whose workers `pipefleet up` starts no more, and why
    work:<pool>             hash    what a pool's workers have done, as running totals
    scaler:<pool>           string  what the scaler remembers of a pool

and of a pool's queue, shared by the queues of its revisions:

    unacked:<queue>         hash    delivered messages, by delivery tag: Celery's own record of them
    unacked_index:<queue>   zset    when each was delivered or renewed last; for delayed ones, when they are due
    deliveries:<queue>      hash    how often each was delivered
    retries:<queue>         hash    how often each was given back with a delay
    owners:<queue>          hash    who holds each: host, process, fetch, and since when
    delayed:<queue>         zset    those that no worker holds and that go back to their list when they are due
    dead:<queue>            list    dead letters, newest first
    dead_unreported:<queue> list    dead letters that nobody was told of yet

Beside each list of a queue lies `<list>:arriving`: messages that woke an idle worker, for the moment until it fetches them.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipefleet import foreign
from pipefleet.connection import answers
from pipefleet.connection.failover import leave_replicas
from pipefleet.connection.rights import ROLES, refused_command
from pipefleet.connection.wrong_type import wrong_type
from pipefleet.contract.messages import (
    MAX_MESSAGE_BYTES,
    TASK_NAME,
    JobMessage,
    Priority,
    encode_json,
)
from pipefleet.errors import ContractError, ServiceFullError, ServiceUnavailableError, UsageError
from pipefleet.queues.trace_context import trace_headers
from pipefleet.settings import Settings, without_credentials
from pipefleet.settings.redis_urls import celery_url

if TYPE_CHECKING:
    from celery import Celery
    from redis import Redis

PRIORITY_STEPS = (0, 3, 6, 9)
PRIORITY_SEPARATOR = "\x06\x16"
ARRIVING = ":arriving"
KEY = "pipefleet:"
CANCELLED_CHANNEL = f"{KEY}cancelled"
REVISIONS_KEY = f"{KEY}revisions"
REVISION_MARK = "@"
"""What stands in the name of a revision's queue between the queue of its pool and the rest."""
COST_HEADER, TIME_HEADER = "pipefleet-cost", "pipefleet-at"
"""What a message costs, see `JobMessage.work`, and when it was queued (the server's seconds since 1970): read without its body."""
SHARD_HEADER = "pipefleet-shard"
"""Messages with it are delivered again however often they failed: the consumer finds the one item that is to blame."""


def job_key(job_id: str) -> str:
    """The hash of a single job."""
    return f"{KEY}job:{job_id}"


def run_key(run_id: str, part: str = "") -> str:
    """The hash of a run, or one of its bitmaps (`items`, `failed`, `parts`)."""
    return f"{KEY}run:{run_id}" + (f":{part}" if part else "")


def reply_channel(client_id: str) -> str:
    """The channel on which a client hears of its jobs."""
    return f"{KEY}done:{client_id}"


def idempotency_key(key: str) -> str:
    """Where the job of an idempotency key is remembered."""
    return f"{KEY}idempotency:{key}"


def queue_lists(queue: str) -> list[str]:
    """The Redis lists behind a queue, highest priority first."""
    return [queue if step == 0 else f"{queue}{PRIORITY_SEPARATOR}{step}" for step in PRIORITY_STEPS]


def arriving_lists(queue: str) -> list[str]:
    """For each of `queue_lists` the list of those of its messages that woke a worker, which has not fetched them yet."""
    return [name + ARRIVING for name in queue_lists(queue)]


def queue_list(queue: str, priority: int) -> str:
    """The Redis list that jobs of one priority wait in."""
    step = max(step for step in PRIORITY_STEPS if step <= max(0, int(priority)))
    return queue_lists(queue)[PRIORITY_STEPS.index(step)]


def unacked_keys(queue: str) -> dict[str, str]:
    """The ledger of delivered messages as transport options, apart for each pool: one never restores another's.

    The queues of a pool's revisions share it, so what a dead worker left comes back whichever revision its neighbours serve.
    The first three are Celery's own; its stock transport leaves the others alone.
    """
    queue = base_queue(queue)
    names = ("unacked", "unacked_index", "unacked_mutex", "deliveries", "retries", "owners", "delayed", "dead")
    keys = {f"{name}_key": f"{KEY}{name}:{queue}" for name in names}
    return {**keys, "unreported_key": f"{KEY}dead_unreported:{queue}"}


def base_queue(queue: str) -> str:
    """The queue of a pool, from that of one of its revisions."""
    return queue.partition(REVISION_MARK)[0]


_NOTE = "redis.call('PERSIST', KEYS[1]) return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])"
"""The first write takes no memory: see `records.NEEDS_NO_MEMORY`."""


def note_revision(redis: Any, queue: str, model: str | None, revision: str | None, *, now: float | None = None) -> None:
    """Note which revision `queue` is for, so that `queues_of` finds it; a pool's own needs none.

    `now` is in seconds since 1970 by the server's clock, which is asked where it is not given; with it `redis` may be a pipeline.
    """
    if REVISION_MARK in queue:
        at = server_time(redis) if now is None else now
        note = encode_json({"model": model, "revision": revision, "at": at})
        redis.eval(_NOTE, 1, REVISIONS_KEY, queue, note)


def known_revisions(redis: Redis) -> dict[str, tuple[str, str | None]]:
    """Model and revision of every queue that is for one. Entries that cannot be read are passed over, which is said once."""
    entries: Any = redis.hgetall(REVISIONS_KEY)
    found = {}
    for name, value in entries.items():
        try:
            note = foreign.read_object(value)
            known = foreign.names(note, "model", "revision")
            found[foreign.own_queue(name.decode())] = (known["model"] or "", known["revision"])
        except (ValueError, LookupError):
            foreign.passed.say(REVISIONS_KEY, name)
    return found


def queues_of(redis: Redis, queue: str) -> list[str]:
    """Every queue of a pool: its own, which any Celery client may use, and those of the revisions that are known of."""
    base = base_queue(queue)
    known = (name for name in known_revisions(redis) if base_queue(name) == base)
    return list(dict.fromkeys([base, queue, *known]))


def server_time(redis: Redis) -> float:
    """Seconds since 1970 by the clock of the Redis server, the one clock that all parts of a fleet share."""
    seconds, micros = _all(redis.time())
    return int(seconds) + int(micros) / 1e6


class Reading:
    """Commands that only read, sent together in one transaction: `execute` returns their answers.

    A server of Redis before 7.2 that is full queues no command of a transaction, not even these. There they are sent one by one.
    """

    def __init__(self, redis: Any) -> None:
        self._redis = redis
        self._commands: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self._commands.append((name, args, kwargs))

    def execute(self) -> list[Any]:
        """The answers, in order. Raises what redis-py raises."""
        from redis.exceptions import ResponseError

        try:
            return self._send(transaction=True)
        except ResponseError as error:
            if answers.word_of(error) != answers.FULL:
                raise
            return self._send(transaction=False)

    def _send(self, *, transaction: bool) -> list[Any]:
        pipe = self._redis.pipeline(transaction=transaction)
        for name, args, kwargs in self._commands:
            getattr(pipe, name)(*args, **kwargs)
        return list(pipe.execute())


def reading(redis: Any) -> Any:
    """A `Reading` that takes commands as a pipeline of redis-py does."""
    return Reading(redis)


@contextmanager
def redis_errors(url: str) -> Iterator[None]:
    """Turn what redis-py raises inside into ServiceUnavailableError that names the URL without credentials.

    That is ServiceFullError where the server is at `maxmemory`. Raises UsageError for a node of a Redis Cluster, and for
    a database that the server does not have.
    """
    from redis.exceptions import RedisError

    try:
        yield
    except (RedisError, OSError) as error:
        word, place = answers.word_of(error), without_credentials(url)
        if answers.is_of_cluster(word):
            raise UsageError(f"Redis at {place} {answers.CLUSTER}") from None
        if word == answers.NO_DATABASE:
            raise UsageError(f"Redis at {place} {answers.DATABASE}") from None
        kind = ServiceFullError if word == answers.FULL else ServiceUnavailableError
        raise kind(_explained(error, word, place)) from None


_REFUSED = {
    "AuthenticationError": "refuses access ({name}); check the password in PIPEFLEET_REDIS_URL",
}


def _explained(error: Exception, word: str | None, url: str) -> str:
    """One sentence. The server's own words are left out: they may repeat what was sent."""
    from redis.exceptions import ConnectionError as NoConnectionError
    from redis.exceptions import TimeoutError as NoAnswerError

    if trouble := wrong_type(error):
        return f"Redis at {url} cannot be used: {trouble}"
    name = type(error).__name__
    command = refused_command(error)
    if command is not None:
        right = f"the right to run {command}" if command else "a right that this needs"
        return f"Redis at {url} refuses access ({name}): its user lacks {right}; see the roles in {ROLES}"
    refused = next((_REFUSED[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _REFUSED), None)
    if known := answers.sentence_of(word) or refused:
        return f"Redis at {url} {known.format(name=name)}"
    if isinstance(error, NoConnectionError | NoAnswerError | OSError):
        return f"cannot reach Redis at {url} ({name}); start one with `pipefleet up`, or set PIPEFLEET_REDIS_URL"
    return f"Redis at {url} answered with an error ({name}); see its log, and `pipefleet doctor`"


def connect(settings: Settings) -> Redis:
    """A thread-safe Redis client that connects at its first command, not here.

    A command waits for at most twice `redis_timeout`, its connection included.

    Raises UsageError for a URL with an option that redis-py does not take.
    """
    from redis import Redis

    from pipefleet.connection.retries import BoundedRetry

    try:
        redis = Redis.from_url(
            settings.redis_url,
            socket_timeout=settings.redis_timeout,
            socket_connect_timeout=min(5.0, settings.redis_timeout),
            health_check_interval=30,
            retry=BoundedRetry(settings.redis_timeout),
        )
        leave_replicas(redis)
    except ValueError as error:
        raise UsageError(f"PIPEFLEET_REDIS_URL cannot be used: {error}") from None
    return redis


_left_to_parents: list[Any] = []
"""Pools of connections that forked processes inherited: closing one could wait for a lock that a thread of the parent held."""


def renew_connections(redis: Redis, settings: Settings) -> None:
    """In a forked process: give `redis` connections of its own, and leave the parent's alone. Opens none here."""
    fresh = connect(settings)
    fresh.auto_close_connection_pool = False
    _left_to_parents.append(redis.connection_pool)
    redis.connection_pool = fresh.connection_pool


@contextmanager
def subscribed(redis: Redis, channel: str) -> Iterator[Any]:
    """A redis-py PubSub that listens on one channel."""
    listener: Any = redis.pubsub()  # type: ignore[no-untyped-call]
    with listener:
        listener.subscribe(channel)
        yield listener


def celery_app(
    settings: Settings,
    *,
    queue: str | None = None,
    revision_queue: str | None = None,
    transport: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Celery:
    """The Celery application; with `queue`, one that consumes it, and `revision_queue`, and keeps its own ledger of deliveries.

    `transport` names another than Celery's own for Redis, `options` are added to its options. With Celery's own, a dead worker's
    messages come back after `visibility_timeout` seconds.
    """
    from celery import Celery
    from kombu import Exchange, Queue

    app = Celery("pipefleet", broker=celery_url(settings.redis_url))
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_protocol=2,
        task_default_priority=int(Priority.NORMAL),
        task_send_sent_event=False,
        worker_prefetch_multiplier=1,
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "priority_steps": list(PRIORITY_STEPS),
            "sep": PRIORITY_SEPARATOR,
            "queue_order_strategy": "round_robin",  # of queues; a higher priority comes first in any case
            "visibility_timeout": 3600,
            **(unacked_keys(queue) if queue else {}),
            **(options or {}),
        },
    )
    if transport:
        app.conf.broker_transport = transport
    if queue:
        app.conf.task_queues = [Queue(queue)]
        if revision_queue:  # with an exchange of its own, or what is sent to the first queue would reach both
            further = Queue(revision_queue, Exchange(revision_queue), routing_key=revision_queue)
            app.conf.task_queues.append(further)
        app.conf.task_default_queue = queue
    return app


@functools.cache
def _template() -> dict[str, Any]:
    """Headers and properties of a protocol 2 message as this Celery writes them, made once and filled in per job."""
    from celery import Celery

    message = Celery("pipefleet", set_as_current=False).amqp.as_task_v2(
        "", TASK_NAME, args=(), kwargs={}, argsrepr="", kwargsrepr="{}", ignore_result=True
    )
    return {"headers": dict(message.headers), "properties": dict(message.properties)}


def celery_message(job: JobMessage, queue: str, priority: Priority, *, now: float | None = None) -> str:
    """`job` as the JSON text that Celery's Redis transport keeps in a list.

    `now` is when it is queued, in seconds since 1970 by the server's clock (default: by the local one).
    Raises ContractError above MAX_MESSAGE_BYTES: larger inputs belong in the object store.
    """
    template = _template()
    body = encode_json([[job.to_json()], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    size = len(body.encode())
    if size > MAX_MESSAGE_BYTES:
        raise ContractError(f"a message of {size} bytes is above the bound of {MAX_MESSAGE_BYTES}")
    headers = {**template["headers"], "id": job.id, "root_id": job.id, "argsrepr": repr((job.task,))}
    headers.update({COST_HEADER: job.work, TIME_HEADER: time.time() if now is None else now, **trace_headers()})
    if job.shard is not None:
        headers[SHARD_HEADER] = True
    properties = {
        **template["properties"],
        "correlation_id": job.id,
        "delivery_mode": 2,
        "delivery_tag": str(uuid.uuid4()),
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": int(priority),
        # Without body_encoding the body is the JSON text itself: readable with redis-cli, a third smaller.
    }
    return encode_json(
        {
            "body": body,
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": headers,
            "properties": properties,
        }
    )


def push(pipe: Any, job: JobMessage, queue: str, priority: Priority, *, now: float | None = None) -> None:
    """Queue `job` in a redis pipeline; the caller executes it. `now` as in `celery_message`."""
    now = time.time() if now is None else now
    note_revision(pipe, queue, job.model, job.revision, now=now)
    pipe.lpush(queue_list(queue, priority), celery_message(job, queue, priority, now=now))


def waiting_lists(queue: str) -> list[str]:
    """Every list in which messages of a queue wait: `queue_lists`, then `arriving_lists`, each with the highest priority first."""
    return [*queue_lists(queue), *arriving_lists(queue)]


def queued_ids(redis: Redis, queue: str) -> Iterator[str]:
    """Ids of the jobs of a pool, of whichever revision, that wait, are with a worker or are delayed.

    In no order; reads a thousand at a time.
    """
    lists = zip(*map(waiting_lists, queues_of(redis, queue)), strict=True)
    for name in itertools.chain(*lists):
        start = 0
        while batch := _all(redis.lrange(name, start, start + 999)):
            yield from _ids(batch)
            start += len(batch)
    for _, raw in redis.hscan_iter(unacked_keys(queue)["unacked_key"], count=1000):
        yield from _ids([raw])


def _all(value: Any) -> list[bytes]:
    return list(value)


def _ids(raw_messages: Iterable[bytes]) -> Iterator[str]:
    for raw in raw_messages:
        try:
            message = json.loads(raw)
            message = message[0] if isinstance(message, list) else message
            yield str(message["headers"]["id"])
        except (ValueError, LookupError, TypeError, RecursionError):
            continue  # not one of ours; a worker will say so when it meets it


def message_id(raw: bytes) -> str | None:
    """The id of the job of a message as it lies in Redis; None for what is no message of ours."""
    return next(_ids([raw]), None)


def depth(redis: Redis, queue: str) -> Mapping[str, int]:
    """How many messages of a pool wait, by priority, are with workers (`unacked`), and wait to be tried again (`delayed`).

    Those of all its revisions together; see `pipefleet.fleet.revisions` for each by itself.
    """
    keys = unacked_keys(queue)
    pipe = redis.pipeline(transaction=False)
    for name in (name for one in queues_of(redis, queue) for name in waiting_lists(one)):
        pipe.llen(name)
    pipe.hlen(keys["unacked_key"])
    pipe.zcard(keys["delayed_key"])
    *lengths, unacked, delayed = pipe.execute()
    return {**by_priority(lengths), "unacked": max(0, unacked - delayed), "delayed": delayed}


def by_priority(lengths: Sequence[int]) -> dict[str, int]:
    """The lengths of lists by priority; these are `queue_lists` or `waiting_lists` of one queue or more, one after the other."""
    high, normal, middle, low = (sum(lengths[step :: len(PRIORITY_STEPS)]) for step in range(len(PRIORITY_STEPS)))
    return {"high": high, "normal": normal + middle, "low": low}
