"""What is inside a worker is bounded, and its room comes back as each item ends: no shard is too large for the budget."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from pipefleet.contract.messages import MAX_SHARD_ITEMS, JobItem, JobMessage, Shard
from pipefleet.errors import ContractError, ServiceUnavailableError
from pipefleet.fleet.pools import Pool
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.text.encoder import TextClassifier
from pipefleet_workers.consume import shards
from pipefleet_workers.consume.held import DrainedError
from pipefleet_workers.consume.jobs import UNKNOWN_BYTES, Jobs
from pipefleet_workers.consume.shards import Shards
from pipefleet_workers.items import Assembly, Decoded, Fetched, ItemError, Outcome, Unit
from pipefleet_workers.settings import WorkerSettings
from tests.parity.harness import SECONDS, Running, load, recording, running, wait_until

TASK = "text-classification"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load(TASK)


class Shaky(TextClassifier):
    """Fails the items whose text names a stage, there."""

    def prepare(self, decoded: Sequence[Decoded]) -> list[list[Unit] | ItemError]:
        if any("slice" in str(one.value) for one in decoded):
            raise BaseException("the whole slice")
        return super().prepare(decoded)

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        if any("forward" in str(unit.assembly.work.item.inputs) for unit in units):
            raise RuntimeError("the model does not like it")
        return super().run(inputs, units, progress)

    def finish(self, assembly: Assembly) -> Any:
        if "postprocess" in str(assembly.work.item.inputs):
            raise KeyError("label")
        return super().finish(assembly)


class Bulk:
    """Shards on their way through a small worker, each on a thread of its own."""

    def __init__(self, one: Running) -> None:
        self.engine = one.engine
        self.jobs = Jobs(Pool("pool", TASK, "model"), one.engine)
        self._shards = Shards(self.jobs, None, None)  # type: ignore[arg-type]
        self._ends: list[Any] = []

    def begin(self, inputs: Sequence[Any], name: str = "job") -> Callable[[], Any]:
        """Start a shard; the function waits for its outcomes, or for the error it ended with."""
        ended: list[Any] = []
        items = [JobItem(str(index), one) for index, one in enumerate(inputs)]

        def handle() -> None:
            try:
                ended.append(self._shards.process(JobMessage(name, TASK), items))
            except Exception as error:  # noqa: BLE001 - handed to who waits
                ended.append(error)

        thread = threading.Thread(target=handle, daemon=True)
        thread.start()

        def wait() -> Any:
            thread.join(SECONDS)
            if not ended:  # or the engine's end would wait for ever, too
                self.engine._budget.close()
            assert ended, "the shard hangs"
            return ended[0]

        return wait

    def empty(self) -> bool:
        return self.engine._budget.empty


def codes(outcomes: Sequence[Outcome]) -> list[str]:
    return [one.failure.code if one.failure else "" for one in outcomes]


@pytest.fixture
def small(pipe: Any) -> Iterator[Callable[..., Any]]:
    """A function that starts an engine whose budget is a few items."""
    with contextlib.ExitStack() as stack:

        def start(adapter: Any = None, **settings: Any) -> tuple[Any, Bulk]:
            chosen = adapter or recording(TextClassifier, pipe)
            values = {"in_flight_items": 8, "fetch_threads": 1, "cpu_threads": 1, **settings}
            return chosen, Bulk(stack.enter_context(running(chosen, TASK, settings=WorkerSettings(**values))))

        yield start


def test_a_shard_with_more_items_than_the_budget_ends(small: Any) -> None:
    _, bulk = small()
    assert codes(bulk.begin([f"text {index}" for index in range(100)])()) == [""] * 100
    wait_until(bulk.empty, "all room has come back")


def test_a_shard_with_more_bytes_than_the_budget_ends(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects of unknown size count with a guess, which together is far above the bound."""
    _, bulk = small(in_flight_items=1000, in_flight_bytes=4 * UNKNOWN_BYTES)
    monkeypatch.setattr(bulk.engine._stages.fetcher, "fetch", lambda work: Fetched(work, "what lay there"))
    inputs = [{"text": {"$ref": f"s3://bucket/{index}"}, "text_pair": {"$ref": "s3://bucket/b"}} for index in range(40)]
    outcomes = bulk.begin(inputs)()
    assert codes(outcomes) == [""] * 40
    wait_until(bulk.empty, "all room has come back")


def test_shards_behind_each_other_all_end(small: Any) -> None:
    _, bulk = small()
    ends = [bulk.begin([f"text {index}" for index in range(50)], f"job {job}") for job in range(3)]
    assert [codes(end()) for end in ends] == [[""] * 50] * 3
    wait_until(bulk.empty, "all room has come back")


def test_a_shard_that_is_cancelled_in_the_middle_ends_at_once_and_leaves_no_trace(small: Any) -> None:
    adapter, bulk = small()
    adapter.gate.clear()
    end = bulk.begin([f"text {index}" for index in range(100)])
    assert adapter.entered.wait(SECONDS)
    bulk.jobs.cancel("job")
    adapter.gate.set()
    found = codes(end())
    assert set(found) == {"", "cancelled"}
    assert found.count("cancelled") >= 92
    wait_until(bulk.empty, "all room has come back")
    assert codes(bulk.begin(["the next"])()) == [""]


def test_a_shard_that_waits_for_room_hears_that_it_was_cancelled(small: Any) -> None:
    """Although the device does not move."""
    adapter, bulk = small()
    adapter.gate.clear()
    end = bulk.begin([f"text {index}" for index in range(100)])
    assert adapter.entered.wait(SECONDS)
    bulk.jobs.give_back_all(DrainedError())
    assert isinstance(end(), DrainedError)
    adapter.gate.set()
    wait_until(bulk.empty, "all room has come back")


def test_a_shard_that_is_given_back_in_the_middle_leaves_no_trace(small: Any) -> None:
    adapter, bulk = small()
    adapter.gate.clear()
    first = bulk.begin([f"text {index}" for index in range(50)], "first")
    second = bulk.begin([f"text {index}" for index in range(50)], "second")
    assert adapter.entered.wait(SECONDS)
    bulk.jobs.give_back_all(DrainedError())
    adapter.gate.set()
    assert [type(end()) for end in (first, second)] == [DrainedError, DrainedError]
    wait_until(bulk.empty, "all room has come back")
    assert codes(bulk.begin([f"text {index}" for index in range(50)])()) == [""] * 50


@pytest.mark.parametrize(("patient", "is_away"), [(True, False), (False, False), (False, True)])
def test_an_outage_gives_the_room_back(
    small: Any, monkeypatch: pytest.MonkeyPatch, patient: bool, is_away: bool
) -> None:
    _, bulk = small()
    bulk.jobs.is_away = lambda: is_away

    def away(_: Any) -> Any:
        raise ServiceUnavailableError("S3 is away")

    monkeypatch.setattr(bulk.engine._stages.fetcher, "fetch", away)
    items = [JobItem(str(index), {"$ref": f"s3://bucket/{index}"}) for index in range(50)]
    try:
        outcomes = bulk._shards.process(JobMessage("job", TASK), items, patient=patient)
        assert codes(outcomes) == ["unavailable"] * 50
        assert not patient
        assert not is_away
    except ServiceUnavailableError:
        assert patient or is_away, "no try is the last one while a service is away for everybody"
    wait_until(bulk.empty, "all room has come back")


def test_failures_of_every_stage_give_the_room_back(small: Any, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, bulk = small(recording(Shaky, pipe))

    def broken(_: Any) -> Any:
        raise ItemError("not_found", "there is no such object", "fetch")

    monkeypatch.setattr(bulk.engine._stages.fetcher, "fetch", broken)
    kinds = [{"$ref": "s3://bucket/fetch"}, {"wrong": 1}, "slice", "forward", "postprocess", "good", {"text": 7}]
    outcomes = bulk.begin([kind for kind in kinds for _ in range(8)])()
    wait_until(bulk.empty, "all room has come back")
    found = {one.failure.stage if one.failure else "" for one in outcomes}
    assert found == {"fetch", "decode", "cpu", "forward", "postprocess", ""}


def test_what_has_ended_is_told_while_other_items_still_wait_for_room(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []

    class Reporter:
        def progress(self, _: Shard, outcomes: Sequence[Outcome]) -> None:
            told.extend(one.work.position for one in outcomes)
            raise ServiceUnavailableError("Redis is away")

    _, bulk = small()
    bulk._shards._outlets = type("Outlets", (), {"reporter": Reporter()})()
    monkeypatch.setattr(shards, "PROGRESS_SECONDS", 0.0)
    run = "s3://pipefleet/run/"
    message = JobMessage("job", TASK, shard=Shard("run", run, f"{run}shard", 0, 0, 400))
    items = [JobItem(str(index), f"text {index}") for index in range(400)]
    with pytest.raises(ServiceUnavailableError):
        bulk._shards.process(message, items)
    assert told
    assert max(told) < 2 * shards.ADMITTED_AT_ONCE, "the shard was not told of before all of it was in"
    wait_until(bulk.empty, "all room has come back")
    assert bulk.engine._instruments.metrics.totals().failed == 0, "what runs again has not failed"


def test_a_shard_above_the_bound_is_refused_before_it_is_read(small: Any) -> None:
    _, bulk = small()
    run = "s3://pipefleet/run/"
    with pytest.raises(ContractError, match="smaller shard_size"):
        bulk._shards.read(Shard("run", run, f"{run}shard", 0, 0, MAX_SHARD_ITEMS + 1))
