"""From a job to its queue: pure functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipefleet.errors import UnknownModelError, UnknownTaskError
from pipefleet.fleet.file import parse_fleet
from pipefleet.fleet.pools import Fleet, Pool
from pipefleet.fleet.routing import queue_name, route
from pipefleet.tasks import TASKS

SPEECH = "automatic-speech-recognition"
FLEET = Fleet(
    {
        "texts": Pool("texts", "text-classification", "/texts"),
        "speech": Pool("speech", SPEECH, "/speech", default=True),
        "accurate": Pool("accurate", SPEECH, "org/large", "1"),
        "newest": Pool("newest", SPEECH, "org/large", "2"),
    }
)


@pytest.mark.parametrize(
    ("task", "model", "revision", "queue"),
    [
        ("text-classification", None, None, "pipefleet.text-classification"),
        ("sentiment-analysis", None, None, "pipefleet.text-classification"),
        ("text-classification", "/texts", None, "pipefleet.text-classification"),
        (SPEECH, None, None, f"pipefleet.{SPEECH}"),
        (SPEECH, "/speech", None, f"pipefleet.{SPEECH}"),
        ("text-classification", None, "main", "pipefleet.text-classification"),
        (SPEECH, "org/large", "1", f"pipefleet.{SPEECH}.accurate"),
        (SPEECH, "org/large", "2", f"pipefleet.{SPEECH}.newest"),
    ],
)
def test_a_job_goes_to_the_queue_of_the_pool_that_serves_it(
    task: str, model: str | None, revision: str | None, queue: str
) -> None:
    assert queue_name(route(task, model, revision, FLEET), FLEET) == queue


def test_the_queue_of_a_pool_does_not_depend_on_which_workers_are_alive() -> None:
    accurate = FLEET.pool("accurate")
    announced = Pool.announced("accurate", accurate.to_json() | {"queue": queue_name(accurate, FLEET)})
    alone = Fleet({"accurate": announced})
    assert queue_name(route(SPEECH, "org/large", None, alone), alone) == f"pipefleet.{SPEECH}.accurate"


def test_a_revision_holds_without_a_model_too() -> None:
    pinned = Fleet({"large": FLEET.pool("accurate")})
    assert route(SPEECH, None, "1", pinned).revision == "1"
    with pytest.raises(UnknownModelError, match="org/large@2"):
        route(SPEECH, None, "2", pinned)


def test_a_job_that_nobody_serves_is_refused() -> None:
    with pytest.raises(UnknownTaskError):
        route("speech", None, None, FLEET)
    with pytest.raises(UnknownModelError):
        route("image-classification", None, None, FLEET)
    with pytest.raises(UnknownModelError):
        route("text-classification", "/speech", None, FLEET)


NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,10}", fullmatch=True)


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    tables: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for name in draw(st.lists(NAMES, min_size=1, max_size=8, unique=True)):
        task = draw(st.sampled_from(sorted(TASKS)))
        tables[name] = {"task": task, "model": f"/{name}", "default": task not in seen}
        seen.add(task)
    return parse_fleet({"pools": tables}, base=Path("/"))


@given(fleets())
def test_every_pool_has_a_queue_of_its_own_and_every_job_reaches_its_pool(fleet: Fleet) -> None:
    queues = {queue_name(pool, fleet) for pool in fleet.pools.values()}
    assert len(queues) == len(fleet.pools)
    for pool in fleet.pools.values():
        assert route(pool.task, pool.model, None, fleet) is pool
        default = route(pool.task, None, None, fleet)
        assert queue_name(default, fleet) == f"pipefleet.{pool.task}"
