"""The watchdog and the fit of the service time: what ends a process, and what a batch is said to cost."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from pipefleet.contract.messages import JobItem
from pipefleet.errors import UsageError
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.items import JobContext, Work
from pipefleet_workers.observe.service_fit import ServiceFit, ServiceTime
from pipefleet_workers.process.exit_codes import HUNG_FORWARD, HUNG_STAGE
from pipefleet_workers.process.watchdog import LOOKS, Watchdog, listen, waiting, watched, working_on

DEADLINE = 30.0
SECONDS = 100.0


class Looking:
    """A watchdog whose clock goes by hand; `said` is what it ended the process with."""

    def __init__(self) -> None:
        self.now = 0.0
        self.said: list[tuple[int, str]] = []
        self.dog = Watchdog(lambda code, reason: self.said.append((code, reason)), clock=lambda: self.now)

    def passes(self, seconds: float) -> bool:
        """Look as often as the thread would; whether all was well."""
        step = SECONDS / LOOKS
        for _ in range(round(seconds / step)):
            self.now += step
            if not self.dog.look():
                return False
        return True


def work(name: str) -> Work:
    return Work(JobContext("job", None, {}, 3, None, Outcomes(())), 0, JobItem(name, ""), {}, 1)


def in_a_thread(call: Callable[[], None]) -> None:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive()


def test_an_item_that_does_not_end_is_named_with_its_stage_and_job() -> None:
    looking = Looking()
    slot = looking.dog.slot("cpu", SECONDS)
    slot.begin(work("a"))
    assert not looking.passes(2 * SECONDS)
    assert looking.said == [(HUNG_STAGE, "stage cpu has not ended item a of job job within 100 s")]
    assert looking.now <= SECONDS + 2 * SECONDS / LOOKS


def test_a_batch_names_its_first_item_and_says_that_there_are_others() -> None:
    looking = Looking()
    looking.dog.slot("forward", SECONDS, HUNG_FORWARD).begin(work("a"), 3)
    assert not looking.passes(2 * SECONDS)
    assert looking.said == [
        (HUNG_FORWARD, "stage forward has not ended item a of job job, or one of the 3 with it, within 100 s")
    ]


def test_a_slice_of_many_items_does_not_add_up() -> None:
    looking = Looking()
    slot = looking.dog.slot("cpu", SECONDS)
    for index in range(20):
        slot.begin(work(str(index)))
        assert looking.passes(0.9 * SECONDS)
    assert not looking.passes(SECONDS)
    assert "item 19 of" in looking.said[0][1]


def test_signs_of_life_from_inside_the_work_keep_it_alive() -> None:
    looking = Looking()
    slot = looking.dog.slot("forward", SECONDS)
    slot.begin(work("a"))
    for _ in range(20):
        slot.tick()
        assert looking.passes(0.9 * SECONDS)
    assert not looking.passes(SECONDS)


def test_who_rests_or_waits_is_not_hung_and_a_wait_starts_the_time_anew() -> None:
    looking = Looking()
    slot = looking.dog.slot("cpu", SECONDS)
    slot.tick()
    assert looking.passes(5 * SECONDS), "nothing was begun"
    slot.begin(work("a"))
    assert looking.passes(0.9 * SECONDS)
    with slot.waiting():
        assert looking.passes(5 * SECONDS)
    assert looking.passes(0.9 * SECONDS)
    slot.rest()
    assert looking.passes(5 * SECONDS)
    with slot.waiting():
        pass
    assert looking.passes(5 * SECONDS), "waiting began nothing"


def test_one_watchdog_looks_at_every_slot_and_each_has_its_own_time() -> None:
    looking = Looking()
    slow, quick = looking.dog.slot("forward", 10 * SECONDS, HUNG_FORWARD), looking.dog.slot("cpu", SECONDS)
    slow.begin(work("a"))
    assert looking.passes(5 * SECONDS)
    quick.begin(work("b"))
    assert not looking.passes(2 * SECONDS)
    assert [code for code, _ in looking.said] == [HUNG_STAGE]


def test_a_process_that_was_stopped_and_goes_on_is_not_hung() -> None:
    looking = Looking()
    looking.dog.slot("cpu", SECONDS).begin(work("a"))
    assert looking.passes(0.5 * SECONDS)
    looking.now += 50 * SECONDS
    assert looking.dog.look()
    assert not looking.passes(SECONDS)


def test_work_of_a_thread_without_a_slot_is_watched_while_its_context_lasts() -> None:
    said: list[tuple[int, str]] = []
    hung, before = threading.Event(), set(threading.enumerate())

    def on_hang(code: int, reason: str) -> None:
        said.append((code, reason))
        hung.set()

    with watched("warm-up", SECONDS, HUNG_FORWARD, on_hang):
        working_on(None)
    assert not said
    with watched("warm-up", 1.0, HUNG_FORWARD, on_hang):
        assert hung.wait(DEADLINE)
    assert said == [(HUNG_FORWARD, "stage warm-up has not ended what it began within 1 s")]
    assert set(threading.enumerate()) <= before, "nobody watches after the context"


def test_a_thread_says_what_it_works_on_to_whoever_listens_to_it() -> None:
    looking = Looking()
    slot = looking.dog.slot("cpu", SECONDS)

    def run() -> None:
        working_on(work("nobody listens"))
        with waiting():
            assert slot.begun is None
        listen(slot)
        working_on(work("a"), 2)
        assert slot.begun is not None
        with waiting():
            assert slot.begun is None
        assert slot.begun is not None

    in_a_thread(run)
    assert slot.begun is not None
    assert (slot.begun.work and slot.begun.work.item.id, slot.begun.others) == ("a", 2)


def test_its_thread_reports_once() -> None:
    hung = threading.Event()
    codes: list[int] = []

    def on_hang(code: int, reason: str) -> None:
        codes.append(code)
        hung.set()

    watchdog = Watchdog(on_hang)
    watchdog.slot("forward", 0.2, HUNG_FORWARD).begin(None)
    watchdog.start()
    assert hung.wait(DEADLINE)
    assert watchdog.join(DEADLINE)
    assert watchdog.stop(DEADLINE)
    assert codes == [HUNG_FORWARD]


LOCKED = """
import re
from pipefleet_workers.process import watchdog
watchdog.LOCKED_SECONDS = 1.0
dog = watchdog.Watchdog(lambda code, reason: None)
dog.slot("cpu", 0.4).begin(None)
dog.start()
re.match("(a+)+$", "a" * 40 + "b")
"""


def test_code_that_never_lets_go_of_pythons_lock_ends_the_process_and_shows_where() -> None:
    ended = subprocess.run([sys.executable, "-c", LOCKED], stderr=subprocess.PIPE, timeout=60, check=False)
    assert ended.returncode == 1
    assert re.search(rb'Timeout.*"<string>", line 8', ended.stderr, re.DOTALL), ended.stderr


def test_the_fit_finds_base_and_slope() -> None:
    fit = ServiceFit()
    assert fit.current() is None
    for cost in (100, 400, 900, 1600, 2500) * 20:
        fit.add(cost, 0.01 + 0.0002 * cost)
    found = fit.current()
    assert found is not None
    assert found.base == pytest.approx(0.01, rel=1e-6)
    assert found.per_cost == pytest.approx(0.0002, rel=1e-6)


def test_the_fit_follows_a_device_that_gets_slower() -> None:
    fit = ServiceFit()
    for seconds in (0.0001, 0.0003):
        for cost in (100, 700, 2000) * 200:
            fit.add(cost, seconds * cost)
    found = fit.current()
    assert found is not None
    assert found.per_cost == pytest.approx(0.0003, rel=0.01)


def test_one_cost_only_still_gives_a_rate_and_never_a_negative_part() -> None:
    fit = ServiceFit()
    fit.add(500, 0.1)
    fit.add(500, 0.1)
    assert fit.current() == ServiceTime(0.0, pytest.approx(0.0002))
    for cost, seconds in ((100, 0.5), (1000, 0.1)) * 50:  # the longer batch is the faster one: noise
        fit.add(cost, seconds)
    found = fit.current()
    assert found is not None
    assert found.base >= 0
    assert found.per_cost >= 0


@pytest.mark.parametrize("text", ["", "1", "a,b", "-1,0", "1,2,3"])
def test_a_simulated_device_needs_two_numbers(text: str) -> None:
    with pytest.raises(UsageError):
        ServiceTime.parse(text)


BLOCKED = """
import logging, threading
from pipefleet_workers.process import exit_codes
exit_codes.LAST_WORDS_SECONDS = 0.2
class Blocked(logging.Handler):
    def emit(self, record):
        threading.Event().wait()
logging.getLogger().addHandler(Blocked())
exit_codes.end_process(72, "hung")
"""


def test_a_process_that_cannot_say_why_it_ends_still_ends() -> None:
    assert subprocess.run([sys.executable, "-c", BLOCKED], timeout=60, check=False).returncode == HUNG_STAGE
