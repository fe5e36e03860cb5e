"""What the lease transport overrides or uses inside kombu: names and signatures, so that an upgrade shows what it changes."""

from __future__ import annotations

import inspect

import pytest
from kombu.asynchronous.hub import Hub
from kombu.transport import redis as stock
from kombu.transport import virtual

from pipefleet_workers.delivery.qos import QoS
from pipefleet_workers.delivery.transport import Channel, Transport
from pipefleet_workers.delivery.waiting import LeasePoller

SIGNATURES = [
    (stock.Channel, "_brpop_start", "(self, timeout=None)"),
    (stock.Channel, "_brpop_read", "(self, **options)"),
    (stock.Channel, "_basic_cancel", "(self, consumer_tag)"),
    (stock.Channel, "_close_clients", "(self)"),
    (stock.Channel, "_connparams", "(self, asynchronous=False)"),
    (stock.Channel, "_create_client", "(self, asynchronous=False)"),
    (stock.Channel, "_flush_brpop_reauth", "(self)"),
    (stock.Channel, "_on_connection_disconnect", "(self, connection)"),
    (stock.Channel, "_q_for_pri", "(self, queue, pri)"),
    (stock.Channel, "close", "(self)"),
    (stock.Channel, "_receive_one", "(self, c)"),
    (stock.Channel, "_put_fanout", "(self, exchange, message, routing_key, **kwargs)"),
    (stock.Channel, "_get_publish_topics", "(self, exchange, routing_key)"),
    (stock.Channel, "_size", "(self, queue)"),
    (stock.Channel, "_queue_bind", "(self, exchange, routing_key, pattern, queue)"),
    (virtual.Channel, "basic_consume", "(self, queue, no_ack, callback, consumer_tag, **kwargs)"),
    (virtual.Channel, "basic_get", "(self, queue, no_ack=False, **kwargs)"),
    (virtual.QoS, "can_consume", "(self)"),
    (virtual.QoS, "can_consume_max_estimate", "(self)"),
    (virtual.QoS, "_flush", "(self)"),
    (virtual.QoS, "restore_unacked_once", "(self, stderr=None)"),
    (stock.QoS, "ack", "(self, delivery_tag)"),
    (stock.QoS, "reject", "(self, delivery_tag, requeue=False)"),
    (stock.QoS, "restore_unacked", "(self, client=None)"),
    (stock.QoS, "restore_visible", "(self, start=0, num=10, interval=10)"),
    (stock.MultiChannelPoller, "_register", "(self, channel, client, type)"),
    (stock.MultiChannelPoller, "on_readable", "(self, fileno)"),
    (stock.MultiChannelPoller, "handle_event", "(self, fileno, event)"),
    (stock.MultiChannelPoller, "maybe_check_brpop_health", "(self)"),
    (Hub, "_pop_ready", "(self)"),
    (stock.Transport, "register_with_event_loop", "(self, connection, loop)"),
]


@pytest.mark.parametrize(
    ("owner", "name", "signature"), SIGNATURES, ids=lambda value: str(getattr(value, "__name__", value))
)
def test_kombu_has_what_is_overridden(owner: type, name: str, signature: str) -> None:
    assert str(inspect.signature(getattr(owner, name))) == signature


@pytest.mark.parametrize(
    ("ours", "stock_class"),
    [(Channel, stock.Channel), (QoS, stock.QoS), (LeasePoller, stock.MultiChannelPoller), (Transport, stock.Transport)],
)
def test_every_override_of_a_private_name_is_pinned_here(ours: type, stock_class: type) -> None:
    overridden = {name for name, value in vars(ours).items() if callable(value) and hasattr(stock_class, name)}
    private = {name for name in overridden if name.startswith("_") and not name.startswith("__")}
    assert private <= {name for _, name, _ in SIGNATURES}


@pytest.mark.parametrize("name", ["_in_poll", "_brpop_sent_at", "_closing"])
def test_a_channel_has_the_state_that_is_read(name: str) -> None:
    assert hasattr(stock.Channel, name)


def test_a_poller_has_the_maps_that_are_read() -> None:
    poller = stock.MultiChannelPoller()
    assert (poller._fd_to_chan, poller._chan_to_sock, poller._channels) == ({}, {}, set())
    poller.close()


def test_the_transport_still_counts_as_redis_for_celery() -> None:
    assert Transport.driver_type == "redis"
    assert Transport.implements.asynchronous
