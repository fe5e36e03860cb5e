"""kombu's Redis transport with leases: one atomic script fetches many messages; each is renewed, fenced and counted.

    app = Celery(broker="redis://…", broker_transport="pipefleet_workers.delivery.transport:Transport")

Celery's event loop calls it. Malformed messages go to the dead letters; errors of the connection let Celery connect again.
Options, in `broker_transport_options`, besides kombu's own (`visibility_timeout` and `unacked_restore_*` have no effect here):

    lease_seconds    20     a dead worker's messages come back this long after its last renewal; must be longer than Python's lock
                            is ever held in one piece, and than a failover of Redis takes; the same in every worker of a queue
    renew_seconds    a fifth of it
    sweep_seconds    2      how often each worker looks for leases that ran out
    ack_seconds      0.003  how long acks wait for each other under load
    max_deliveries   3      a message that would be delivered once more goes to the dead letters; shards never do
    fetch_max        128    most messages in one fetch
    low_prefetch     None   most messages of the lowest priority held at a time; the others are bounded by the prefetch count
    wait_seconds     5      how long one wait on an idle list lasts
    on_dead          None   called with each DeadLetter, at least once, by one thread of any worker of the queue; it
                            raises when it wants to be called again
    only_tasks       None   names of the tasks that are delivered; a message that asks for another goes to the dead letters
    on_lost          None   called with each Lease that was lost, by the ledger's thread
    deliveries_key … the keys beside kombu's `unacked_key`; see `pipefleet.queues.keys.ledger_keys`
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from queue import Empty
from time import monotonic
from typing import Any, NoReturn

from kombu.transport import redis as stock
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from pipefleet.connection.scripts import must_send_text, never_began, note_answer, run_script
from pipefleet_workers.delivery.audience import Audience
from pipefleet_workers.delivery.bells import Bells
from pipefleet_workers.delivery.envelope import MalformedError, check_message, mark, read_envelope
from pipefleet_workers.delivery.fetch import Fetch, Source
from pipefleet_workers.delivery.leases import Lease, is_queue_name
from pipefleet_workers.delivery.ledger import Ledger
from pipefleet_workers.delivery.pace import Pace
from pipefleet_workers.delivery.qos import UNBOUNDED, QoS
from pipefleet_workers.delivery.scripts import FETCH
from pipefleet_workers.delivery.server_errors import is_no_list, retried, retrying
from pipefleet_workers.delivery.shared_ledgers import Callback, ledger_for
from pipefleet_workers.delivery.waiting import LeasePoller

log = logging.getLogger(__name__)


class Channel(stock.Channel):  # type: ignore[misc]
    """One channel with leases. Queues that are consumed without acks use kombu's own way."""

    QoS = QoS
    lease_seconds = 20.0
    renew_seconds: float | None = None
    sweep_seconds = 2.0
    ack_seconds = 0.003
    max_deliveries: int | None = 3
    fetch_max = 128
    low_prefetch: int | None = None
    only_tasks: Sequence[str] | None = None
    wait_seconds = 5.0
    on_dead: Callable[[Any], None] | None = None
    on_lost: Callable[[Any], None] | None = None
    deliveries_key = "unacked_deliveries"
    retries_key = "unacked_retries"
    owners_key = "unacked_owners"
    delayed_key = "unacked_delayed"
    dead_key = "dead_letters"
    unreported_key = "dead_letters_unreported"
    from_transport_options = (
        *stock.Channel.from_transport_options,
        *(
            "lease_seconds",
            "renew_seconds",
            "sweep_seconds",
            "ack_seconds",
            "max_deliveries",
            "fetch_max",
            "low_prefetch",
            "only_tasks",
        ),
        *("wait_seconds", "on_dead", "on_lost", "deliveries_key", "retries_key", "owners_key", "delayed_key"),
        *("dead_key", "unreported_key"),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.starved = self.low_starved = False
        self._receivers: dict[str, Callable[[Any], None]] = {}
        self._without_acks: set[str] = set()
        self.bells = Bells(self)
        self.audience = Audience()
        self.pace = Pace(self)
        self._fetch: Fetch | None = None
        self._refusal: ResponseError | None = None
        """Why the server did not run the last fetch by its digest; the next fetch sends the text."""
        self._ledger: Ledger | None = None
        self._cached: tuple[Any, Any] | None = None
        with retrying():
            super().__init__(*args, **kwargs)
        self._transport = self.connection

    @property
    def ledger(self) -> Ledger:
        """The leases of this process on these keys; its channels share them."""
        if self._ledger is None:
            self._ledger = ledger_for(self)
        return self._ledger

    @property
    def leasing(self) -> bool:
        """Whether this channel has ever taken a message with a lease."""
        return self._ledger is not None

    @property
    def loop(self) -> Any:
        """The event loop of a Celery worker; None without one."""
        return self._transport.loop

    @property
    def fetching(self) -> bool:
        """Whether the answer of a fetch is outstanding."""
        return self._fetch is not None

    @property
    def do_restore(self) -> bool:
        """Whether closing gives messages back: not when a Celery worker only lost its connection, since its tasks go on."""
        if self._transport.loop is None:
            return True
        state = sys.modules.get("celery.worker.state")
        ends = (getattr(state, name, None) for name in ("should_stop", "should_terminate"))
        return any(end is not None and end is not False for end in ends)

    def credit_freed(self) -> None:
        """Wake the event loop if it waits for room. Called by any thread."""
        loop = self._transport.loop
        if self.starved and loop is not None:
            self.starved = False
            loop.call_soon(lambda: None)

    def finish_callbacks(self) -> None:
        """Run the acks that still wait in an ended event loop: at its end it ran only the callbacks that it knew then."""
        loop = self._transport.loop
        for callback in (one for _ in range(8) for one in (loop._pop_ready() if loop is not None else ())):
            try:
                callback()
            except Exception:
                log.exception("what the event loop had left to do failed")

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Any], None], consumer_tag: str, **kwargs: Any
    ) -> Any:
        """Consume from `queue`. Raises ValueError for a name that the Redis records cannot hold."""
        if no_ack:
            self._without_acks.add(queue)
        elif queue not in self._fanout_queues:
            if not is_queue_name(queue):
                raise ValueError(f"the queue name {queue!r} has quotes, backslashes or control characters")
            self._receivers[queue] = callback
            self.ledger.attach(self, [one.name for one in self._lists([queue])])
        return super().basic_consume(queue, no_ack=no_ack, callback=callback, consumer_tag=consumer_tag, **kwargs)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """The next message of `queue`, with a lease unless `no_ack`; None when there is none."""
        if no_ack:
            return super().basic_get(queue, no_ack=True, **kwargs)
        fetch = Fetch(self._lists([queue]), 1, 1)
        self.ledger.attach(self, [one.name for one in fetch.lists])
        answer = run_script(Redis(connection_pool=self.pool), FETCH, *fetch.arguments(self.ledger, self.max_deliveries))
        for lease, raw in self._leases(fetch, answer):
            message = self._opened(lease, raw)
            if message is not None:
                return message
        return None

    def _queue_bind(self, *args: Any, **kwargs: Any) -> None:
        """Note a binding, unless the server is full: messages to a queue by name, or to all workers, need no binding."""
        with retrying(unless_full=True):
            super()._queue_bind(*args, **kwargs)

    def _put_fanout(self, exchange: str, message: Any, routing_key: str, **kwargs: Any) -> None:
        """Publish, and note how many hear it. A channel publishes to one exchange, or its audience counts for all of them."""
        if kwargs.get("_publish_batch") is not None:
            super()._put_fanout(exchange, message, routing_key, **kwargs)
            return
        payload = dumps(message)
        with self.conn_or_acquire() as client:
            heard = [client.publish(topic, payload) for topic in self._get_publish_topics(exchange, routing_key)]
        self.audience.note(routing_key or "", sum(map(int, heard)))

    def _size(self, queue: str) -> int:
        """How many messages wait; 0 when a list's key holds another type. Celery asks at its start."""
        try:
            return int(super()._size(queue))
        except ResponseError as error:
            if not is_no_list(error):
                raise
            log.error("a list of the queue %s holds something else; its messages of that priority wait", queue)
            return 0

    def maybe_refresh_binding_expiry(self) -> None:
        """Keep the bindings of queues that expire."""
        with retrying(unless_full=True):
            super().maybe_refresh_binding_expiry()

    def _receive_one(self, c: Any) -> Any:
        """Take one message of the control channel. An unreadable message is dropped; kombu would end the worker."""
        try:
            return super()._receive_one(c)
        except (Empty, OSError, RedisError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever a hostile message makes kombu raise
            log.error("a control message cannot be read: %s", type(error).__name__)
            raise Empty from None

    def check_bells(self) -> None:
        """Drop waiting connections that a lost server never answered."""
        if self.health_check_interval:
            self.bells.drop_overdue(self.wait_seconds + self.health_check_interval)

    def close(self) -> None:
        """Close the channel; `do_restore` decides whether its messages go back."""
        try:
            super().close()
        finally:
            if self._ledger is not None:
                self._ledger.detach(self)

    def _basic_cancel(self, consumer_tag: str) -> Any:
        done = super()._basic_cancel(consumer_tag)
        for queue in set(self._receivers) - set(self.active_queues):
            del self._receivers[queue]
        if not self.active_queues and self._fetch is not None and self._in_poll:
            try:  # no other code reads this answer, and its messages must not wait until their leases run out
                self._brpop_read()
            except (Empty, *self.connection_errors):
                pass
        if not self.active_queues:
            self.bells.hang_up()
        return done

    def _brpop_start(self, timeout: float | None = None) -> None:
        if self._without_acks.intersection(self.active_queues):
            super()._brpop_start(timeout)
            return
        if self.pace.is_early():
            return
        lists = self._lists(self._queue_cycle.consume(len(self.active_queues)))
        self.low_starved = self.low_prefetch is not None
        low_credit = self._low_credit()
        self.low_starved = low_credit == 0
        self.starved = self.starved or self.low_starved
        if not low_credit:
            lists = [one for one in lists if not one.low]
        if not self.bells.worth_a_fetch(lists):
            self.bells.wait_for(lists)
        else:
            with_text = self._refusal is not None or must_send_text(self.ledger.redis)
            self._send_fetch(Fetch(lists, min(self.fetch_max, self.qos.credit()), low_credit, with_text))

    def _low_credit(self) -> int:
        return UNBOUNDED if self.low_prefetch is None else max(0, self.low_prefetch - self.ledger.held_low)

    def _send_fetch(self, fetch: Fetch) -> None:
        connection = self.client.connection
        self.bells.fetch_sent(fetch)
        self._fetch, self._in_poll, self._brpop_sent_at = fetch, connection, monotonic()
        self.pace.fetched()
        connection.send_command(*fetch.command(self.ledger, self.max_deliveries))

    def _brpop_read(self, **options: Any) -> bool:
        if self._fetch is None:
            return bool(super()._brpop_read(**options))
        fetch, self._fetch = self._fetch, None
        connection = self.client.connection
        try:
            answer = self.client.parse_response(connection, "EVALSHA")
        except self.connection_errors:
            connection.disconnect()
            raise
        except ResponseError as error:
            if fetch.with_text or not never_began(error):
                raise retried(error) from error
            answer = error
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        try:
            if isinstance(answer, ResponseError):
                self._fetch_again(fetch, answer)
            note_answer(self.ledger.redis, self._refusal, answer)
            self._refusal = None
            return self._deliver(fetch, answer)
        finally:
            self.bells.pass_on()

    def _fetch_again(self, fetch: Fetch, refusal: ResponseError) -> NoReturn:
        """Let the next poll send the script's text. Always raises Empty, kombu's word for no delivery."""
        self._refusal = refusal
        self.bells.fetch_failed(fetch)
        raise Empty

    def _deliver(self, fetch: Fetch, answer: Any) -> bool:
        found = self._leases(fetch, answer)
        more = bool(answer[3]) or (self.pace.busy and bool(found))  # a busy channel looks again instead of waiting
        self.bells.fetched(fetch, [lease for lease, _ in found], more=more)
        delivered = False
        for position, (lease, raw) in enumerate(found):
            receive = self._receivers.get(lease.queue)
            if receive is None or self._closing or self._stopping():
                for rest, _ in found[position:]:
                    rest.give_back()
                break
            message = self._opened(lease, raw)
            if message is not None:
                self._hand_over(receive, message, [rest for rest, _ in found[position + 1 :]])
                delivered = True
        if not delivered:
            raise Empty
        self._queue_cycle.rotate(found[-1][0].queue)
        return True

    def _hand_over(self, receive: Callable[[Any], None], message: Any, rest: Sequence[Lease]) -> None:
        try:
            receive(message)
        except BaseException as error:
            ours = not isinstance(error, Exception) or isinstance(error, (*self.connection_errors, MemoryError))
            if ours:
                for lease in rest:
                    lease.give_back()
                raise
            log.exception("a message that its consumer cannot take goes to the dead letters")
            message.lease.dead_letter("its consumer cannot take it")

    def _stopping(self) -> bool:
        return self._transport.loop is not None and self.do_restore

    def _leases(self, fetch: Fetch, answer: Any) -> list[tuple[Lease, bytes]]:
        owner, buried, taken, _ = answer
        if buried:
            self.ledger.nudge()
        found = [(self._lease(fetch.lists[one[0]], bytes_to_str(owner), one), one[2]) for one in taken]
        self.ledger.add(lease for lease, _ in found)
        return found

    def _lease(self, source: Source, owner: str, taken: Sequence[Any]) -> Lease:
        _, tag, _, deliveries, retries = taken
        order = self.ledger.next_order()
        return Lease(
            tag, owner, source.queue, source.name, int(deliveries), int(retries), order, self.ledger, low=source.low
        )

    def _opened(self, lease: Lease, raw: bytes) -> Any:
        """The message of a lease; None when it is malformed, which moves it to the dead letters."""
        try:
            envelope = read_envelope(raw, lambda: lease.taken_at)
            self._check_task(envelope["headers"])
            mark(envelope, lease.deliveries, lease.retries)
            message = self._message(envelope)
            check_message(message)
        except MalformedError as error:
            lease.dead_letter(str(error))
            return None
        message.delivery_tag = lease.key
        message.lease = lease
        return message

    def _check_task(self, headers: Mapping[str, Any]) -> None:
        if self.only_tasks is not None and headers.get("task") not in self.only_tasks:
            raise MalformedError(f"it asks for another task; this worker runs only {', '.join(self.only_tasks)}")

    def _message(self, envelope: dict[str, Any]) -> Any:
        try:
            return self.Message(envelope, channel=self)
        except Exception:  # noqa: BLE001 - whatever a hostile body makes the codecs raise
            raise MalformedError("its body is not what its encoding says") from None

    def has_room(self, name: str) -> bool:
        """Whether this channel may take a message of a list now."""
        if self._closing or self._stopping() or not self.qos.can_consume():
            return False
        return any(one.name == name and (not one.low or self._low_credit()) for one in self._lists(self.active_queues))

    def _on_connection_disconnect(self, connection: Any) -> None:
        self.bells.disconnected(connection)
        client = self.__dict__.get("client")  # a cached property; reading it normally would create the client here
        if client is not None and client.connection is connection:
            self._fetch = None
            self.bells.forget()
        super()._on_connection_disconnect(connection)

    def _close_clients(self) -> None:
        super()._close_clients()
        self.bells.hang_up()

    def _create_client(self, asynchronous: bool = False) -> Any:
        """One client for each pool; kombu would make a client for every publish.

        Its pipelines are no transactions and need none: before Redis 7.2, a full server accepts no command into a transaction.
        """
        if asynchronous:
            return super()._create_client(asynchronous)
        if self._cached is None or self._cached[0] is not self.pool:
            client = super()._create_client()
            pipeline = client.pipeline
            client.pipeline = lambda transaction=False, shard_hint=None: pipeline(transaction, shard_hint)
            self._cached = (self.pool, client)
        return self._cached[1]

    def _lists(self, queues: Sequence[str]) -> list[Source]:
        lowest = max(self.priority_steps)
        prefix = self.global_keyprefix
        return [
            Source(prefix + self._q_for_pri(queue, step), queue, step == lowest)
            for step in self.priority_steps
            for queue in queues
        ]


class Transport(stock.Transport):  # type: ignore[misc]
    """The transport; `broker_transport="pipefleet_workers.delivery.transport:Transport"` with a redis:// or rediss:// URL."""

    Channel = Channel
    loop: Any = None
    """The event loop of a Celery worker, once there is one."""

    def __init__(self, client: Any, **kwargs: Any) -> None:
        options = client.transport_options
        for name in ("on_dead", "on_lost"):
            if options.get(name) is not None and not isinstance(options[name], Callback):
                options[name] = Callback(options[name])
        super().__init__(client, **kwargs)
        self.cycle = LeasePoller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Let a Celery worker's event loop poll this transport."""
        self.loop = self.cycle.loop = loop
        super().register_with_event_loop(connection, loop)
