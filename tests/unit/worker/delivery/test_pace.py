"""A busy channel fetches in larger batches; a channel with few jobs waits for nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from pipefleet_workers.delivery import pace as module
from pipefleet_workers.delivery.pace import BUSY, PACE_SECONDS, Pace


class Loop:
    """An event loop that notes what it has to do later."""

    def __init__(self) -> None:
        self.later: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.later.append((seconds, callback))


def paced(held: int, *, low: int = 0, loop: Loop | None = None) -> Pace:
    channel = SimpleNamespace(ledger=SimpleNamespace(held=held, held_low=low), loop=loop)
    return Pace(channel)  # type: ignore[arg-type]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(at=100.0)
    monkeypatch.setattr(module, "monotonic", lambda: clock.at)
    return clock


def test_a_busy_channel_waits_from_fetch_to_fetch_and_the_loop_wakes_once_for_it(now: SimpleNamespace) -> None:
    loop = Loop()
    pace = paced(BUSY, loop=loop)
    assert not pace.is_early(), "the last fetch is long ago"
    pace.fetched()
    now.at += PACE_SECONDS / 4
    assert pace.is_early()
    assert pace.is_early()
    ((seconds, wake),) = loop.later
    assert seconds == pytest.approx(PACE_SECONDS * 3 / 4)
    now.at += seconds
    wake()
    assert not pace.is_early()
    pace.fetched()
    assert pace.is_early()
    assert len(loop.later) == 2


@pytest.mark.parametrize(("held", "low"), [(0, 0), (BUSY - 1, 0), (BUSY + 5, 6)])
def test_few_single_jobs_wait_for_nothing_however_many_shards_are_here(
    now: SimpleNamespace, held: int, low: int
) -> None:
    pace = paced(held, low=low, loop=Loop())
    pace.fetched()
    assert not pace.is_early()


def test_without_an_event_loop_nobody_would_wake_the_channel(now: SimpleNamespace) -> None:
    pace = paced(BUSY)
    pace.fetched()
    assert not pace.is_early()
