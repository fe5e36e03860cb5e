"""The chaos suite in a short form: the same scenarios as `python -m tests.chaos`, smaller and with leases of three seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos import bounds, culprits, deaths, outages, refusals, rollout, storm, traffic
from tests.chaos.scenario import SCENARIOS, Scale
from tests.chaos.world import World

SHORT = Scale(
    items=1000,
    faults=3,
    messages=2000,
    long_seconds=12.0,
    long_lease=3.0,
    away=2.0,
    jobs=60,
    results=24,
    megabytes=8,
)
CHOSEN = {
    deaths: (
        *("killed-forward", "killed-after-write", "given-twice"),
        *("terminated", "terminated-twice", "told-to-shut-down", "long-job"),
    ),
    outages: ("redis-restarted", "redis-emptied", "s3-503", "refused-worker"),
    culprits: ("poison-item", "hanging-decode", "poison-job"),
    traffic: ("hostile", "cancel-and-expiry", "revoke", "queues-agree"),
    bounds: ("budget-exhausted", "large-results"),
    refusals: ("refused-shards",),
    rollout: ("roll-out", "changed-under-a-run", "old-producer"),
    storm: ("storm",),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Servers of its own, since they are killed."""
    with World(tmp_path_factory.mktemp("chaos"), lease=3.0) as one:
        yield one


@pytest.mark.parametrize("name", [name for names in CHOSEN.values() for name in names])
def test_a_promise_holds(world: World, name: str) -> None:
    SCENARIOS[name](world, SHORT)
