"""Whether the services are there: asked when one failed, waited for by all, until they are or the worker drains."""

from __future__ import annotations

import threading

from pipefleet.errors import ServiceUnavailableError
from pipefleet_workers.consume.health import FIRST, LONGEST, Health


class Service:
    """A service that a test takes away; `looks` are the pauses before each look at it."""

    def __init__(self) -> None:
        self.away: bool | Exception = False
        self.looks: list[float] = []
        self.look = threading.Semaphore(0)
        self.health = Health(self._probe, sleep=self._sleep)

    def _probe(self) -> None:
        if isinstance(self.away, Exception):
            raise self.away
        if self.away:
            raise ServiceUnavailableError("away")

    def _sleep(self, seconds: float) -> None:
        self.looks.append(seconds)
        self.look.acquire(timeout=20)


def waiting(health: Health) -> tuple[threading.Thread, list[bool]]:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(health.wait()), daemon=True)
    thread.start()
    return thread, found


def test_a_failure_while_the_services_answer_is_no_outage() -> None:
    service = Service()
    assert service.health.check()
    assert service.health.well
    assert service.health.wait()


def test_everybody_waits_until_a_look_finds_it_again() -> None:
    service = Service()
    service.away = True
    assert not service.health.check()
    assert not service.health.check(), "the second one asks nobody"
    threads = [waiting(service.health) for _ in range(3)]
    service.look.release()
    service.away = False
    service.look.release()
    for thread, found in threads:
        thread.join(20)
        assert found == [True]
    assert service.health.well
    assert all(FIRST / 2 <= pause <= LONGEST for pause in service.looks)


def test_a_drain_ends_the_waiting() -> None:
    service = Service()
    service.away = True
    service.health.check()
    thread, found = waiting(service.health)
    service.health.release()
    thread.join(20)
    assert found == [False]
    assert not service.health.wait()


def test_an_error_of_any_kind_is_asked_after_again() -> None:
    service = Service()
    service.away = RuntimeError("a bug")
    assert not service.health.check()
    thread, found = waiting(service.health)
    service.look.release()
    service.away = False
    service.look.release()
    thread.join(20)
    assert found == [True]
