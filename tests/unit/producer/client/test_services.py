"""Services: `start` and `stop` from any thread, in any order and any number of times; then every class that is one, hammered."""

from __future__ import annotations

import itertools
import random
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest
from redis.exceptions import ConnectionError as AwayError
from redis.exceptions import RedisError

import pipefleet
import pipefleet_workers
from pipefleet.contract.layout import RunLayout
from pipefleet.fleet.file import parse_fleet
from pipefleet.pipelines.streaming import Feeder
from pipefleet.runs.run import Run
from pipefleet.service import Inbox, Service, Services, Stoppable
from pipefleet.settings import Settings
from pipefleet.waiting.callbacks import Callbacks
from pipefleet.waiting.watcher import Watcher
from pipefleet_workers.consume.burials import Burials
from pipefleet_workers.consume.health import Health
from pipefleet_workers.delivery.leases import LeaseKeys, Terms
from pipefleet_workers.delivery.ledger import Ledger
from pipefleet_workers.fleet.scaling.service import ScalerService
from pipefleet_workers.observe.stage_trace import Tracer
from pipefleet_workers.process.watchdog import Watchdog
from pipefleet_workers.results.text_streams import TextStreams
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.worker import Worker
from tests.unit.producer.runs.test_planner import plan
from tests.unit.worker.consume.fakes import AWAY, Bench, single

SECONDS = 20.0
THREADS, ROUNDS = 4, 40


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


class Away:
    """A Redis that does not answer."""

    def __getattr__(self, name: str) -> Any:
        raise AwayError("away")


class Empty:
    """A Redis that holds nothing, as far as a ledger goes."""

    connection_pool = SimpleNamespace(disconnect=lambda: None)

    def eval(self, *_: Any) -> int:
        return 0


class Planner:
    """Plans until it is stopped."""

    def __init__(self) -> None:
        self._stopped = threading.Event()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> bool:
        self._stopped.wait()
        return False


class Quiet:
    """Stands in for everything that a service calls: an object that does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def settings() -> Settings:
    return Settings(redis_url="redis://127.0.0.1:1/0", store="s3://bucket/store/")


Used = tuple[Stoppable, Callable[[], object]]
"""A service, and what else its users do with it meanwhile."""


@contextmanager
def plain(folder: Path) -> Iterator[Used]:
    yield Service("plain", lambda stopping: stopping.wait(), threads=3), lambda: None


@contextmanager
def consumer(folder: Path) -> Iterator[Used]:
    bench, numbers = Bench(start=False), itertools.count()
    yield bench.consumer, lambda: bench.take(single(f"job-{next(numbers)}"))


@contextmanager
def burials(folder: Path) -> Iterator[Used]:
    one = Burials(settings(), cast(Any, Quiet()), queue="queue", allowed=("s3://",), on_refused=lambda *_: None)
    yield one, lambda: None


@contextmanager
def health(folder: Path) -> Iterator[Used]:
    looks = itertools.count()

    def probe() -> None:
        if next(looks) % 2 == 0:
            raise AWAY

    one = Health(probe, sleep=lambda _: None)
    yield one, one.check


@contextmanager
def beside_the_consumer(folder: Path) -> Iterator[Used]:
    pools = {"texts": {"task": "text-classification", "model": "/m"}}
    fleet = parse_fleet({"pools": pools}, base=Path("/"))

    class Waiting(Worker):
        def _announce(self, *_: Any) -> None:
            self._stopping.wait()

        _stay_in_fleet = _listen_for_cancels = _announce

    worker = Waiting(fleet, fleet.pools["texts"], settings(), WorkerSettings())
    built = SimpleNamespace(consumer=Bench(start=False).consumer, facts=None, clock=None)
    yield worker._services(cast(Any, built)), lambda: None


@contextmanager
def ledger(folder: Path) -> Iterator[Used]:
    one = Ledger(cast(Any, Empty()), LeaseKeys(*"abcdefgh"), Terms(60.0, 10.0, 10.0, 0.0, "", ".", (0,)))
    user = SimpleUser()
    yield one, lambda: one.attach(user, [])


class SimpleUser:
    """Takes messages for a ledger."""

    def credit_freed(self) -> None:
        """Has none to take."""


@contextmanager
def tracer(folder: Path) -> Iterator[Used]:
    one = Tracer(str(folder / "trace"))

    def use() -> None:
        with one.span("forward", 1):
            pass

    yield one, use


@contextmanager
def watchdog(folder: Path) -> Iterator[Used]:
    one = Watchdog(lambda code, reason: pytest.fail(reason))
    one.slot("cpu", 60.0)
    yield one, lambda: None


@contextmanager
def scaler(folder: Path) -> Iterator[Used]:
    with_server = ScalerService(cast(Any, Quiet()), interval=0.01)
    yield with_server, lambda: None
    with_server._server.server_close()


@contextmanager
def watcher(folder: Path) -> Iterator[Used]:
    one = Watcher(cast(Any, Away()), "redis://127.0.0.1:1/0", cast(Any, Quiet()))
    yield one, lambda: None


@contextmanager
def callbacks(folder: Path) -> Iterator[Used]:
    one = Callbacks()
    yield one, lambda: one.run(lambda: None)


@contextmanager
def feeder(folder: Path) -> Iterator[Used]:
    yield Feeder(itertools.count(), lambda _: cast(Any, Quiet()), 2), lambda: None


@contextmanager
def planning(folder: Path) -> Iterator[Used]:
    run = Run(cast(Any, Quiet()), RunLayout("s3://bucket/run/"), plan(), cast(Any, Planner()))
    yield run._planning, lambda: run.planning


@contextmanager
def text_streams(folder: Path) -> Iterator[Used]:
    def refuse(transaction: bool) -> NoReturn:
        raise RedisError("away")

    one = TextStreams(SimpleNamespace(pipeline=refuse), lambda unit, tokens: None)
    yield one, lambda: one.ended(cast(Any, SimpleNamespace(id="job", given_back=False)))


EVERY = [
    plain, consumer, burials, health, beside_the_consumer, ledger, tracer, watchdog, scaler, watcher, callbacks, feeder, planning,
    text_streams,
]  # fmt: skip


@pytest.mark.parametrize("make", EVERY)
def test_no_constructor_starts_a_thread(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread.name))
    with make(tmp_path):
        assert started == []


@pytest.mark.parametrize("make", EVERY)
def test_no_order_of_starts_and_stops_leaves_a_thread(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with make(tmp_path) as (service, use):
        before = set(threading.enumerate())

        def hammer(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(ROUNDS):
                chance.choice((service.start, use, lambda: service.stop(0.0), lambda: service.stop(SECONDS)))()

        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(hammer, range(THREADS)))
        assert service.stop(SECONDS)
        assert set(threading.enumerate()) - before == set()
        assert "ended by an error" not in caplog.text


ALLOWED = {
    "service.py",
    "patience.py",  # ends with a call that nothing can stop
    "consumer.py",  # ends with a wait
    "records.py",  # ends with the call that waits for it
    "exit_codes.py",  # ends with the process
    "relay.py",  # ends with the output of a process
}
"""Modules that may make threads: of a service's own, and some that end by themselves."""


def test_every_thread_that_stays_is_a_services() -> None:
    folders = [Path(cast(str, package.__file__)).parent for package in (pipefleet, pipefleet_workers)]
    modules = [module for folder in folders for module in folder.rglob("*.py")]
    making = {module.name for module in modules if re.search(r"\b(Thread|Timer)\(", module.read_text())}
    assert "service.py" in making
    assert making <= ALLOWED
