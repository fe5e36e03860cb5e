"""Redis as everything here uses it: the Celery app, the wire format, the queues and every key. The one file that imports celery.

Keys, all under `pipefleet:` (queues are Celery's own lists, named in `routing`):

    job:<id>                hash    state, output, error … of a single job; kept for `Settings.result_ttl`
    done:<client>           channel the ids of a client's jobs that reached a final state
    cancelled               channel ids of jobs and runs that were cancelled
    idempotency:<key>       string  the id of the job that was submitted with this key
    run:<id>                hash    shards, cancelled
    run:<id>:items          bitmap  items that are finished, by position
    run:<id>:failed         bitmap  those of them that failed
    run:<id>:parts          bitmap  shards whose part is written
    pools                   hash    what workers announce, by pool; each entry ends with its heartbeat
    unacked:<queue> …       Celery's book-keeping of delivered messages, one set for each queue
"""

from __future__ import annotations

import functools
import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipefleet.contract import (
    MAX_MESSAGE_BYTES,
    TASK_NAME,
    JobMessage,
    Priority,
    encode_json,
)
from pipefleet.errors import ContractError, ServiceUnavailableError, UsageError
from pipefleet.settings import Settings, load_settings, without_credentials

if TYPE_CHECKING:
    from celery import Celery
    from redis import Redis

PRIORITY_STEPS = (0, 3, 6, 9)
PRIORITY_SEPARATOR = "\x06\x16"
KEY = "pipefleet:"
CANCELLED_CHANNEL = f"{KEY}cancelled"
POOLS_KEY = f"{KEY}pools"


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


def queue_list(queue: str, priority: Priority) -> str:
    """The Redis list that jobs of one priority wait in."""
    step = max(step for step in PRIORITY_STEPS if step <= int(priority))
    return queue_lists(queue)[PRIORITY_STEPS.index(step)]


def unacked_keys(queue: str) -> dict[str, str]:
    """Celery's ledger of delivered messages, apart for each queue so that one pool never restores another's."""
    return {
        "unacked_key": f"{KEY}unacked:{queue}",
        "unacked_index_key": f"{KEY}unacked_index:{queue}",
        "unacked_mutex_key": f"{KEY}unacked_mutex:{queue}",
    }


@contextmanager
def redis_errors(url: str) -> Iterator[None]:
    """Turn what redis-py raises inside into ServiceUnavailableError that names the URL without credentials."""
    from redis.exceptions import RedisError

    try:
        yield
    except (RedisError, OSError) as error:
        raise ServiceUnavailableError(_explained(error, without_credentials(url))) from None


_ANSWERS = {
    "AuthenticationError": "refuses access ({name}); check the password in PIPEFLEET_REDIS_URL",
    "NoPermissionError": "refuses access ({name}); check the password in PIPEFLEET_REDIS_URL and the user's rights",
    "OutOfMemoryError": "is out of memory; raise its maxmemory, or let the workers catch up",
    "ReadOnlyError": "is a replica that takes no writes; name the primary in PIPEFLEET_REDIS_URL",
    "BusyLoadingError": "is still loading its data; try again in a moment",
}


def _explained(error: Exception, url: str) -> str:
    """One sentence. The server's own words are left out: they may repeat what was sent."""
    from redis.exceptions import ConnectionError as NoConnectionError
    from redis.exceptions import TimeoutError as NoAnswerError

    name = type(error).__name__
    known = next((_ANSWERS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _ANSWERS), None)
    if known:
        return f"Redis at {url} {known.format(name=name)}"
    if isinstance(error, NoConnectionError | NoAnswerError | OSError):
        return f"cannot reach Redis at {url} ({name}); start one with `pipefleet up`, or set PIPEFLEET_REDIS_URL"
    return f"Redis at {url} answered with an error ({name}); see its log, and `pipefleet doctor`"


def connect(settings: Settings) -> Redis:
    """A thread-safe Redis client with bounded waits. It connects at its first command, not here.

    Raises UsageError for a URL with an option that redis-py does not take.
    """
    from redis import Redis
    from redis.backoff import ExponentialBackoff
    from redis.retry import Retry

    try:
        return Redis.from_url(
            settings.redis_url,
            socket_timeout=settings.redis_timeout,
            socket_connect_timeout=min(5.0, settings.redis_timeout),
            health_check_interval=30,
            retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), 2),
        )
    except ValueError as error:
        raise UsageError(f"PIPEFLEET_REDIS_URL cannot be used: {error}") from None


@contextmanager
def subscribed(redis: Redis, channel: str) -> Iterator[Any]:
    """A redis-py PubSub that listens on one channel."""
    listener: Any = redis.pubsub()  # type: ignore[no-untyped-call]
    with listener:
        listener.subscribe(channel)
        yield listener


def celery_app(settings: Settings, *, queue: str | None = None) -> Celery:
    """The Celery application; with `queue`, one that consumes it and keeps its own ledger of deliveries.

    Stock Redis transport: a dead worker's messages come back after `visibility_timeout` seconds.
    """
    from celery import Celery
    from kombu import Queue

    app = Celery("pipefleet", broker=settings.redis_url)
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
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "priority_steps": list(PRIORITY_STEPS),
            "sep": PRIORITY_SEPARATOR,
            "queue_order_strategy": "priority",
            "visibility_timeout": 3600,
            **(unacked_keys(queue) if queue else {}),
        },
    )
    if queue:
        app.conf.task_queues = [Queue(queue)]
        app.conf.task_default_queue = queue
    return app


def __getattr__(name: str) -> Any:
    if name == "flower_app":  # `celery --app pipefleet.broker:flower_app flower`
        return celery_app(load_settings())
    raise AttributeError(name)


@functools.cache
def _template() -> dict[str, Any]:
    """Headers and properties of a protocol 2 message as this Celery writes them, made once and filled in per job."""
    from celery import Celery

    message = Celery("pipefleet", set_as_current=False).amqp.as_task_v2(
        "", TASK_NAME, args=(), kwargs={}, argsrepr="", kwargsrepr="{}", ignore_result=True
    )
    return {"headers": dict(message.headers), "properties": dict(message.properties)}


def celery_message(job: JobMessage, queue: str, priority: Priority) -> str:
    """`job` as the JSON text that Celery's Redis transport keeps in a list.

    Raises ContractError above MAX_MESSAGE_BYTES: larger inputs belong in the object store.
    """
    template = _template()
    body = encode_json([[job.to_json()], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    size = len(body.encode())
    if size > MAX_MESSAGE_BYTES:
        raise ContractError(f"a message of {size} bytes is above the bound of {MAX_MESSAGE_BYTES}")
    headers = {**template["headers"], "id": job.id, "root_id": job.id, "argsrepr": repr((job.task,))}
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


def push(pipe: Any, job: JobMessage, queue: str, priority: Priority) -> None:
    """Queue `job` in a redis pipeline. One LPUSH; the caller executes the pipeline."""
    pipe.lpush(queue_list(queue, priority), celery_message(job, queue, priority))


def queued_ids(redis: Redis, queue: str) -> Iterator[str]:
    """Ids of the jobs that wait in a queue or are with a worker, in no order; reads a thousand at a time."""
    for name in queue_lists(queue):
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
        except (ValueError, LookupError, TypeError):
            continue  # not one of ours; a worker will say so when it meets it


def depth(redis: Redis, queue: str) -> Mapping[str, int]:
    """How many messages of a queue wait, by priority, and how many are with workers (`unacked`)."""
    pipe = redis.pipeline(transaction=False)
    for name in queue_lists(queue):
        pipe.llen(name)
    pipe.hlen(unacked_keys(queue)["unacked_key"])
    *lengths, unacked = pipe.execute()
    high, normal, middle, low = lengths
    return {"high": high, "normal": normal + middle, "low": low, "unacked": unacked}


def announced_pools(redis: Redis) -> dict[str, dict[str, Any]]:
    """What the workers that are alive announce, by pool name: task, model, revision, default."""
    entries: Any = redis.hgetall(POOLS_KEY)
    now = time.time()
    announced = {name.decode(): json.loads(value) for name, value in entries.items()}
    return {name: one["pool"] for name, one in announced.items() if one["until"] > now}


def announce_pool(redis: Redis, name: str, fields: Mapping[str, Any], *, seconds: float) -> None:
    """Announce a pool for `seconds`; its workers repeat this well before the time is over."""
    entry = encode_json({"pool": dict(fields), "until": time.time() + seconds})
    redis.hset(POOLS_KEY, name, entry)
