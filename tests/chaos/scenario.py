"""`Scenario`: one thing that goes wrong, and the register of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.world import World


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the scenarios are; the tests run a short form."""

    items: int = 20_000
    faults: int = 20
    messages: int = 10_000
    long_seconds: float = 90.0
    long_lease: float = 10.0
    away: float = 10.0
    jobs: int = 300
    results: int = 100
    megabytes: int = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """What a scenario measured: seconds until all was well again, None where nothing was to recover; and a remark."""

    recovery: float | None = None
    note: str = ""


Play = Callable[[World, Scale], Finding]
SCENARIOS: dict[str, Play] = {}


def scenario(name: str) -> Callable[[Play], Play]:
    """Register a scenario; it raises AssertionError where a promise is broken."""

    def register(play: Play) -> Play:
        SCENARIOS[name] = play
        return play

    return register
