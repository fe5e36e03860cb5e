"""A shard that may kill its worker: run item by item, and what is found out is kept in Redis for the next worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from redis import Redis

from pipefleet.client import Client
from pipefleet.contract.messages import JobItem, JobMessage, JobState, Shard
from pipefleet.contract.records import JobFailure
from pipefleet.errors import ContractError, ServiceUnavailableError
from pipefleet.fleet.pools import Pool
from pipefleet_workers.consume.held import RevokedError
from pipefleet_workers.consume.jobs import Jobs
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.consume.shards import Contents
from pipefleet_workers.consume.suspects import CODE, Finding, Journal, Suspects
from pipefleet_workers.ending import Ending, before, shard_ending
from pipefleet_workers.items import JobContext, Outcome, Work
from tests.unit.worker.consume.fakes import TASK, FakeEngine, shard

ITEMS = [JobItem(str(index), f"text {index}") for index in range(4)]
MESSAGE = shard(count=len(ITEMS))
SHARD = MESSAGE.shard
assert SHARD is not None


class Death(BaseException):
    """The process dies here."""


class Served:
    """Shards whose items die, fail or succeed as a test says; `passes` are the positions of each call."""

    def __init__(self) -> None:
        self.deadly: set[int] = set()
        self.raises: dict[int, Exception] = {}
        self.part: Sequence[Outcome] | None = None
        self.cancelled = False
        self.passes: list[list[int]] = []

    def open(self, message: JobMessage, shard: Shard) -> Contents | None:
        return None if self.part is not None or self.cancelled else self.read(shard)

    def read(self, shard: Shard) -> Contents:
        return Contents(list(ITEMS), {})

    def process(
        self,
        message: JobMessage,
        items: Sequence[JobItem],
        *,
        without: Mapping[int, JobFailure],
        only: Sequence[int] | None = None,
    ) -> list[Outcome]:
        positions = list(range(len(items)) if only is None else only)
        running = [position for position in positions if position not in without]
        self.passes.append(running)
        if self.deadly.intersection(running):
            raise Death
        for position in running:
            if position in self.raises:
                raise self.raises.pop(position)
        return [outcome(position, items[position], without.get(position)) for position in positions]

    def close(self, shard: Shard, outcomes: Sequence[Outcome]) -> Ending:
        self.part = outcomes
        return shard_ending(outcomes)

    def ended_before(self, shard: Shard) -> Ending:
        return before(JobState.SUCCEEDED)


def outcome(position: int, item: JobItem, failure: JobFailure | None) -> Outcome:
    context = JobContext("run-0", "run", {}, 9, None, Outcomes(()))
    return Outcome(Work(context, position, item, {}, 1), output="x", failure=failure)


class Case:
    """One shard in Redis, and one worker after another that runs it."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.served = Served()
        self.buried: list[tuple[str, str]] = []

    def worker(self) -> Suspects:
        jobs = Jobs(Pool("pool", TASK, "model"), FakeEngine())  # type: ignore[arg-type]
        return Suspects(jobs, self.served, self.journal, self._bury)  # type: ignore[arg-type]

    def journal(self, one: Shard) -> Journal:
        return Journal(self.client.redis, self.client.settings, one)

    def dies(self) -> None:
        """The next worker runs the shard and dies with it, as a process would: nothing is tidied up."""
        suspects = self.worker()
        self.forget = Journal.tried
        Journal.tried = lambda journal: None  # type: ignore[method-assign]
        try:
            with pytest.raises(Death):
                suspects.run(MESSAGE, SHARD)  # type: ignore[arg-type]
        finally:
            Journal.tried = self.forget  # type: ignore[method-assign]

    def runs(self) -> Ending:
        return self.worker().run(MESSAGE, SHARD)  # type: ignore[arg-type]

    def failed(self) -> dict[int, str]:
        assert self.served.part is not None
        return {one.work.position: one.failure.code for one in self.served.part if one.failure is not None}

    def _bury(self, reason: str, message: JobMessage, position: int, item: JobItem) -> None:
        assert str(position) == item.id
        self.buried.append((message.id, item.id))

    @property
    def left(self) -> Any:
        return self.client.redis.keys("pipefleet:*suspects*")


@pytest.fixture
def case(client: Client, redis: Redis) -> Case:
    return Case(client)


def test_an_innocent_shard_runs_item_by_item(case: Case) -> None:
    assert case.runs() == Ending(JobState.SUCCEEDED, "4 succeeded")
    assert case.served.passes == [[0], [1], [2], [3]]
    assert (case.failed(), case.buried, case.left) == ({}, [], [])


def test_a_shard_whose_list_of_items_kills_its_workers_is_refused_in_the_end(case: Case) -> None:
    def dies(message: JobMessage, shard: Shard) -> Contents | None:
        raise Death

    case.served.open, opened = dies, Journal.opened  # type: ignore[method-assign]
    Journal.opened = lambda journal: None  # type: ignore[method-assign] # a process that dies tidies nothing up
    try:
        for _ in range(3):
            with pytest.raises(Death):
                case.runs()
    finally:
        Journal.opened = opened  # type: ignore[method-assign]
    with pytest.raises(ContractError, match="workers died 3 times while they read the list of its items"):
        case.runs()
    assert case.left == []


def test_the_culprit_is_known_to_the_next_worker(case: Case) -> None:
    case.served.deadly = {2}
    case.dies()
    case.served.passes.clear()
    assert case.runs() == Ending(JobState.SUCCEEDED, "3 succeeded, 1 failed")
    assert case.served.passes == [[0, 1, 3]], "the others run as usual"
    assert (case.failed(), case.buried, case.left) == ({2: CODE}, [("run-0", "2")], [])


def test_two_culprits_are_found_one_after_the_other(case: Case) -> None:
    case.served.deadly = {1, 3}
    case.dies()  # at 1
    case.dies()  # the rest, which has 3 in it
    case.dies()  # at 3, item by item without 1
    case.served.passes.clear()
    assert case.runs() == Ending(JobState.SUCCEEDED, "2 succeeded, 2 failed")
    assert case.failed() == {1: CODE, 3: CODE}
    assert case.buried == [("run-0", "1"), ("run-0", "3")]


def test_a_worker_that_lives_convicts_nobody(case: Case) -> None:
    suspects = case.worker()
    case.served.raises = {1: ServiceUnavailableError("away")}
    with pytest.raises(ServiceUnavailableError):
        suspects.run(MESSAGE, SHARD)  # type: ignore[arg-type]
    assert suspects.run(MESSAGE, SHARD).text == "4 succeeded"  # type: ignore[arg-type]
    assert case.failed() == {}


def test_what_a_worker_noted_itself_is_not_held_against_the_item(case: Case) -> None:
    assert SHARD is not None
    journal = case.journal(SHARD)
    journal.tries(2, "me")
    assert journal.read("me") == Finding(None, ())
    assert journal.read("another") == Finding(2, ())


def test_a_revoked_shard_leaves_no_item_under_suspicion(case: Case) -> None:
    case.served.raises = {1: RevokedError()}  # type: ignore[dict-item]
    with pytest.raises(RevokedError):
        case.runs()
    assert case.runs().text == "4 succeeded"
    assert case.failed() == {}


def test_a_shard_whose_part_is_there_buries_its_culprits_and_forgets(case: Case) -> None:
    assert SHARD is not None
    case.journal(SHARD).tries(0, "dead")
    case.journal(SHARD).convict(Finding(0, ()))
    case.served.part = []
    assert case.runs() == before(JobState.SUCCEEDED)
    assert (case.buried, case.left, case.served.passes) == ([("run-0", "0")], [], [])


@pytest.mark.parametrize("trying", ["x:1", "-1:1", "999:1", "1e3:1", "\xff\xfe:1", ":", "0" * 40])
@pytest.mark.parametrize("culprits", ["[", "7", "[[]]", "[-1, 999, null, 1.5, true]", "[" * 5000])
def test_a_journal_of_somebody_else_accuses_nobody(case: Case, trying: str, culprits: str) -> None:
    key = case.journal(SHARD)._key  # type: ignore[arg-type]
    case.client.redis.hset(key, mapping={"trying": trying, "culprits": culprits})
    assert case.runs().state == "succeeded"
    assert (case.failed(), case.buried) == ({}, [])
