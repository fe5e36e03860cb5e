"""Services: `start` and `stop` from any thread, in any order and any number of times."""

from __future__ import annotations

import threading

import pytest

from pipefleet.service import Inbox, Service, Services

SECONDS = 20.0


class Loop:
    """A loop that says when it begins, and ends when it is told to."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.runs = 0
        self.inside = 0
        self.most_inside = 0

    def __call__(self, stopping: threading.Event) -> None:
        self.runs += 1
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.begun.set()
        stopping.wait()
        self.inside -= 1


def test_a_service_starts_once_and_ends_once() -> None:
    loop = Loop()
    service = Service("one", loop)
    service.start()
    service.start()
    assert loop.begun.wait(SECONDS)
    assert service.alive
    assert service.stop(SECONDS)
    assert service.stop(SECONDS)
    assert (loop.runs, service.alive) == (1, False)


def test_a_stop_before_the_start_does_nothing() -> None:
    loop = Loop()
    service = Service("one", loop, wake=lambda: pytest.fail("nobody waits"))
    assert service.stop(SECONDS)
    service.start()
    assert loop.begun.wait(SECONDS)
    service._wake = lambda: None
    assert service.stop(SECONDS)


def test_a_start_after_the_stop_begins_anew_behind_the_thread_before() -> None:
    go_on, begun, inside = threading.Event(), threading.Semaphore(0), []

    def slow(stopping: threading.Event) -> None:
        inside.append(threading.current_thread())
        assert inside == [threading.current_thread()]
        begun.release()
        stopping.wait()
        go_on.wait(SECONDS)
        inside.clear()

    service = Service("slow", slow)
    service.start()
    assert begun.acquire(timeout=SECONDS)
    assert not service.stop(0.0)
    service.start()
    assert not begun.acquire(blocking=False)
    go_on.set()
    assert begun.acquire(timeout=SECONDS)
    assert service.stop(SECONDS)
    assert inside == []


def test_its_own_thread_may_stop_it() -> None:
    found: list[bool] = []
    service: Service

    def loop(stopping: threading.Event) -> None:
        found.append(service.stop())
        assert stopping.is_set()

    service = Service("own", loop)
    service.start()
    assert service.join(SECONDS)
    assert found == [False]


def test_an_error_is_logged_with_the_threads_name_and_told(caplog: pytest.LogCaptureFixture) -> None:
    told: list[BaseException] = []

    def fail(stopping: threading.Event) -> None:
        raise SystemExit("no more")

    service = Service("failing", fail, on_error=told.append)
    service.start()
    assert service.join(SECONDS)
    assert [str(error) for error in told] == ["no more"]
    assert "the thread failing ended by an error" in caplog.text
    service.start()  # anew
    assert service.stop(SECONDS)
    assert len(told) == 2


def test_several_threads_have_numbers_and_work_off_one_inbox() -> None:
    inbox, taken = Inbox[int](), list[int]()
    names = set()

    def loop(stopping: threading.Event) -> None:
        names.add(threading.current_thread().name)
        while numbers := inbox.take(stopping, most=3):
            taken.extend(numbers)

    service = Service("many", loop, threads=3, wake=inbox.wake)
    for number in range(10):
        inbox.put(number)
    service.start()
    assert service.stop(SECONDS)
    assert (sorted(taken), names) == (list(range(10)), {"many-0", "many-1", "many-2"})


def test_an_inbox_waits_no_longer_than_it_is_told() -> None:
    assert Inbox[int]().take(threading.Event(), seconds=0.0) == []


def test_all_of_a_group_are_told_before_any_is_waited_for() -> None:
    first_ended = threading.Event()
    first = Service("first", lambda stopping: second_told.wait(SECONDS) and first_ended.set())
    second_told = threading.Event()
    second = Service("second", lambda stopping: stopping.wait() and second_told.set())
    group = Services(first, second)
    group.start()
    assert group.stop(SECONDS)
    assert first_ended.is_set()


def test_a_forked_child_has_a_stopped_service_that_starts() -> None:
    loop = Loop()
    service = Service("forked", loop)
    service.start()
    [parents] = service._threads
    stopping = service._stopping
    service.after_fork()  # a child calls this, and has no other thread
    assert not service.alive
    service.start()
    assert service.stop(SECONDS)
    assert parents.is_alive()
    stopping.set()
    parents.join(SECONDS)
