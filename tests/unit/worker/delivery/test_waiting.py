"""A bell: what it asks, when it rings, and that giving a message back is no ringing."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from queue import Empty
from typing import Any

import pytest
from kombu.asynchronous import Hub

from pipefleet_workers.delivery.waiting import Bell, LeasePoller


class FakeConnection:
    """Notes commands; `answers` are read one by one."""

    def __init__(self, *answers: Any) -> None:
        self._sock: object | None = object()
        self.sent: list[tuple[Any, ...]] = []
        self.answers = list(answers)

    def send_command(self, *command: Any) -> None:
        self.sent.append(command)

    def read_response(self) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def belled(*answers: Any) -> tuple[Bell, FakeConnection, list[str]]:
    connection, rung = FakeConnection(*answers), list[str]()
    return Bell(connection, "q", lambda bell: rung.append(bell.name)), connection, rung


def read(bell: Bell) -> None:
    with pytest.raises(Empty):
        bell.read()


def test_the_message_that_wakes_an_idle_worker_goes_aside_in_its_order() -> None:
    bell, connection, rung = belled(b"a message")
    assert bell.idle
    bell.arm(5.0, takes=True)
    assert connection.sent == [("BLMOVE", "q", "q:arriving", "RIGHT", "LEFT", 5.0)]
    assert (bell.armed, bell.idle, bell.takes) == (True, False, True)
    read(bell)
    assert rung == ["q"]
    assert bell.idle


def test_a_worker_with_bulk_inside_is_woken_by_a_message_that_stays() -> None:
    bell, connection, rung = belled(b"a message")
    bell.arm(5.0, takes=False)
    assert connection.sent == [("BLMOVE", "q", "q", "RIGHT", "RIGHT", 5.0)]
    read(bell)
    assert rung == ["q"]
    assert not bell.takes


def test_time_that_is_over_is_no_ringing() -> None:
    bell, _, rung = belled(None)
    bell.arm(5.0, takes=True)
    read(bell)
    assert (rung, bell.armed) == ([], False)


def test_the_answer_to_putting_back_is_no_ringing() -> None:
    bell, connection, rung = belled(b"a message", 1, b"another")
    bell.arm(5.0, takes=True)
    read(bell)
    bell.put_back(["EVAL", "script", 0])
    assert connection.sent[-1] == ("EVAL", "script", 0)
    assert bell.armed
    read(bell)
    assert rung == ["q"]
    bell.arm(5.0, takes=True)
    read(bell)
    assert rung == ["q", "q"]


def test_a_bell_whose_connection_is_gone_waits_for_nothing() -> None:
    bell, connection, rung = belled(ConnectionError())
    bell.arm(5.0, takes=True)
    with pytest.raises(ConnectionError):
        bell.read()
    assert not bell.armed
    bell.arm(5.0, takes=True)
    connection._sock = None
    bell.disconnected()
    assert (bell.armed, bell.idle, rung) == (False, False, [])


def test_an_answer_is_overdue_after_its_time_alone() -> None:
    bell, _, _ = belled()
    assert not bell.overdue(-1.0)
    bell.arm(5.0, takes=True)
    assert bell.overdue(-1.0)
    assert not bell.overdue(1000.0)


class TestEventLoop:
    """The loop is told of each socket once: kombu tells it at every turn."""

    def poller(self, hub: Hub, *sockets: socket.socket) -> LeasePoller:
        poller = LeasePoller()
        poller.loop = hub
        for name, one in enumerate(sockets):
            poller._chan_to_sock[name] = one
            poller._fd_to_chan[one.fileno()] = (None, name)
        return poller

    def told(self, hub: Hub, poller: LeasePoller) -> list[int]:
        fresh = list(poller.fds)
        for fd in fresh:
            hub.add_reader(fd, lambda _: None, fd)
        return fresh

    @pytest.fixture
    def hub(self) -> Iterator[Hub]:
        hub = Hub()
        yield hub
        hub.close()

    def test_a_socket_is_watched_from_its_first_turn_on(self, hub: Hub) -> None:
        one, other = socket.socketpair()
        with one, other:
            poller = self.poller(hub, one)
            assert self.told(hub, poller) == [one.fileno()]
            assert self.told(hub, poller) == []

    def test_a_socket_that_the_loop_left_is_told_again(self, hub: Hub) -> None:
        one, other = socket.socketpair()
        with one, other:
            poller = self.poller(hub, one)
            self.told(hub, poller)
            hub.remove_reader(one.fileno())
            assert self.told(hub, poller) == [one.fileno()]

    def test_a_new_socket_with_an_old_number_is_told(self, hub: Hub) -> None:
        one, other = socket.socketpair()
        with one, other:
            poller = self.poller(hub, one)
            self.told(hub, poller)
            number = one.fileno()
            one.close()
            os.dup2(other.fileno(), number)
            with socket.socket(fileno=number) as new:
                poller._chan_to_sock[0] = new
                assert self.told(hub, poller) == [number]

    def test_without_a_loop_every_socket_is_named(self) -> None:
        one, other = socket.socketpair()
        with one, other:
            poller = self.poller(None, one, other)
            assert set(poller.fds) == set(poller.fds) == {one.fileno(), other.fileno()}
