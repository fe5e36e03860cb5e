"""The engine in this process, with a tiny model: each item ends exactly once, in its place, and only the culprit fails."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pipefleet.contract.messages import Shard
from pipefleet.contract.records import JobFailure
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.progress import UNOBSERVED, Progress
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.adapters.text.encoder import FeatureExtractor, TextClassifier
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine import simulated
from pipefleet_workers.engine.batcher import BatchLimits
from pipefleet_workers.engine.device import Instruments
from pipefleet_workers.engine.engine import Engine, Stages
from pipefleet_workers.engine.forward import Forward
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.inputs.fetch import Fetcher
from pipefleet_workers.items import Assembly, Batch, Outcome, Unit
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.storage.store import WorkerStore
from tests.parity.harness import SECONDS, Call, assert_same, finished, load, recording, running, wait_until

TASK = "text-classification"
MARK = "fail"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load(TASK)


@pytest.fixture(scope="module")
def embedder() -> Any:
    return load("feature-extraction")


def text_of(unit: Unit) -> str:
    return str(unit.assembly.work.item.inputs)


class Faulty(TextClassifier):
    """Its forward raises when a marked text is in the batch, and its finish for texts that are marked so."""

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        if any(MARK in text_of(unit) for unit in units):
            raise RuntimeError(f"cannot stand {text_of(units[0])!r} and {len(units)} others")
        return super().run(inputs, units, progress)

    def finish(self, assembly: Assembly) -> Any:
        if "unfinished" in str(assembly.work.item.inputs):
            raise KeyError("label")
        return super().finish(assembly)


class Small(TextClassifier):
    """A device that holds at most three rows."""

    rows = 3

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        if len(units) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().run(inputs, units, progress)


class Counting(Outcomes):
    """Counts the outcomes of each item, which `Outcomes` itself hides."""

    def __init__(self, expected: int) -> None:
        super().__init__(expected)
        self.counts: Counter[int] = Counter()
        self.calls: list[int] = []
        self._lock = threading.Lock()

    def deliver(self, *outcomes: Outcome) -> None:
        with self._lock:
            self.counts.update(outcome.work.position for outcome in outcomes)
            self.calls.append(len(outcomes))
        super().deliver(*outcomes)


def codes(outcomes: Sequence[Outcome]) -> list[str]:
    return [one.failure.code if one.failure else "" for one in outcomes]


def stages(outcomes: Sequence[Outcome]) -> set[str]:
    return {one.failure.stage for one in outcomes if one.failure}


def expected(pipe: Any, calls: Sequence[Call]) -> list[Any]:
    return [pipe(call.inputs, **call.parameters) for call in calls]


def test_only_the_culprit_of_a_batch_fails(pipe: Any) -> None:
    calls = [Call(f"text {index} {MARK if index in (2, 5) else 'good'}") for index in range(9)]
    adapter = recording(Faulty, pipe)
    with running(adapter, TASK) as engine:
        outcomes = engine.run_together(calls)
    assert codes(outcomes) == ["model_error" if index in (2, 5) else "" for index in range(9)]
    assert stages(outcomes) == {"forward"}
    good = [index for index in range(9) if index not in (2, 5)]
    assert_same([outcomes[i].output for i in good], expected(pipe, [calls[i] for i in good]))
    assert max(len(batch.units) for batch in adapter.batches) == 9


class Hurdled(TextClassifier):
    """Waits, before it finishes a text with "hurdle", until the outcome of item 0 has been delivered."""

    sink: Counting

    def finish(self, assembly: Assembly) -> Any:
        if "hurdle" in assembly.work.item.inputs:
            wait_until(lambda: self.sink.counts[0] == 1, "the first result leaves")
        return super().finish(assembly)


def test_a_single_result_does_not_wait_for_its_neighbour(pipe: Any) -> None:
    adapter = recording(Hurdled, pipe)
    with running(adapter, TASK) as engine:
        sink = adapter.sink = Counting(range(2))
        engine.submit([Call("quick"), Call("a hurdle in a text that is longer")], sink=sink)
        assert codes(finished(sink)) == ["", ""]


def test_results_of_a_shard_leave_together(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipefleet_workers.engine.engine.TOGETHER_SECONDS", SECONDS)
    shard = Shard("run", "s3://bucket/run/", "s3://bucket/run/0.jsonl", 0, 0, 20)
    sink = Counting(range(20))
    calls = [Call("unfinished" if index == 7 else f"text {index}") for index in range(20)]
    with running(recording(Faulty, pipe), TASK) as engine:
        engine.submit(calls, sink=sink, bulk=True, shard=shard)
        outcomes = finished(sink)
        assert engine.engine._budget.empty
    assert codes(outcomes) == ["model_error" if index == 7 else "" for index in range(20)]
    assert set(sink.counts.values()) == {1}
    assert len(sink.calls) < 20, "one call for each item costs more than the results"
    good = [index for index in range(20) if index != 7]
    assert_same([outcomes[i].output for i in good], expected(pipe, [calls[i] for i in good]))


def test_a_failing_postprocess_fails_alone(pipe: Any) -> None:
    with running(recording(Faulty, pipe), TASK) as engine:
        outcomes = engine.run_together([Call("fine"), Call("unfinished"), Call("fine too")])
    assert codes(outcomes) == ["", "model_error", ""]
    assert stages(outcomes) == {"postprocess"}


def test_out_of_memory_halves_the_batch_until_it_fits(pipe: Any) -> None:
    calls = [Call("word " * (1 + index % 4)) for index in range(16)]
    adapter = recording(Small, pipe)
    with running(adapter, TASK) as engine:
        outcomes = engine.run_together(calls)
    assert codes(outcomes) == [""] * 16
    assert_same([one.output for one in outcomes], expected(pipe, calls))
    assert [len(batch.units) for batch in adapter.batches][1:4] == [16, 8, 4], "halved, not taken apart at once"


def test_one_input_that_does_not_fit_fails_by_name(pipe: Any) -> None:
    class Tiny(Small):
        rows = 0

    with running(recording(Tiny, pipe), TASK) as engine:
        outcomes = engine.run([Call("a"), Call("b")])
    assert codes(outcomes) == ["out_of_memory"] * 2


def test_a_model_that_loses_rows_is_an_error_not_a_wrong_answer(pipe: Any) -> None:
    class Losing(TextClassifier):
        def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
            return super().split(outputs, units)[: max(1, len(units) - 1)]

    with running(recording(Losing, pipe), TASK) as engine:
        outcomes = engine.run_together([Call("a"), Call("b"), Call("c")])
    assert codes(outcomes) == [""] * 3  # each was run again alone


def test_bad_inputs_and_bad_parameters_fail_before_the_device(pipe: Any) -> None:
    calls = [
        Call("good"),
        Call(7),
        Call({"text": "a", "wrong": "b"}),
        Call("good", {"function_to_apply": "no such"}),
        Call(""),
        Call("good", {"truncation": True, "max_length": 4}),
    ]
    with running(recording(TextClassifier, pipe), TASK) as engine:
        outcomes = engine.run(calls)
    assert codes(outcomes) == ["", "bad_input", "bad_input", "bad_parameter", "", ""]
    assert stages(outcomes) == {"decode", "preprocess"}


def test_each_item_has_exactly_one_outcome_and_its_own(pipe: Any) -> None:
    """Good, failing and refused items, many at once, through every way out of the engine."""
    kinds = {
        "good": "",
        MARK: "model_error",
        "unfinished": "model_error",
    }
    with running(recording(Faulty, pipe), TASK, limits=BatchLimits(200, 8)) as engine:
        calls = [Call(f"{list(kinds)[index % 3]} {'word ' * (index % 11)}") for index in range(120)]
        calls[7::30] = [Call(13)] * 4
        sink = Counting(range(len(calls)))
        engine.submit(calls, sink=sink)
        outcomes = finished(sink)
    assert sink.counts == dict.fromkeys(range(120), 1)
    wanted = ["bad_input" if call.inputs == 13 else kinds[str(call.inputs).split()[0]] for call in calls]
    assert codes(outcomes) == wanted
    good = [index for index, code in enumerate(wanted) if not code]
    assert_same([outcomes[i].output for i in good], expected(pipe, [calls[i] for i in good]))


def test_many_threads_with_jobs_of_different_parameters(embedder: Any) -> None:
    """Jobs of many clients share batches; each gets its own results in its own order."""
    ways = [
        {"pooling": "mean"},
        {"pooling": "cls", "normalize": True},
        {},
        {"tokenize_kwargs": {"truncation": True, "max_length": 6}},
    ]
    rng_texts = ["cat " * (1 + (7 * index) % 23) + str(index) for index in range(48)]
    wanted = {text: torch.tensor(embedder(text)) for text in rng_texts}
    cut = {
        text: torch.tensor(embedder(text, tokenize_kwargs={"truncation": True, "max_length": 6})) for text in rng_texts
    }
    sinks: dict[int, Counting] = {}
    settings = WorkerSettings(cpu_threads=4, window_units=32)  # less than two jobs have
    adapter = recording(FeatureExtractor, embedder)
    with running(adapter, "feature-extraction", limits=BatchLimits(256, 8), settings=settings) as engine:
        adapter.gate.clear()
        _, plug = engine.submit([Call("plug")])
        assert adapter.entered.wait(SECONDS)

        def client(number: int) -> None:
            own = rng_texts[number::8] * 3
            sinks[number] = Counting(range(len(own)))
            engine.submit(
                [Call(text, ways[number % 4]) for text in own], sink=sinks[number], priority=(0, 3, 9)[number % 3]
            )

        threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(8)]
        for thread in threads:
            thread.start()
        # A job has 18 units, so batches of 8 cannot hold the units of one job each.
        wait_until(lambda: len(engine.engine.room) >= 32, "two jobs wait for the device")
        adapter.gate.set()
        for thread in threads:
            thread.join(SECONDS)
        results = {number: finished(sinks[number]) for number in range(8)}
        finished(plug)
    for number, outcomes in results.items():
        assert set(sinks[number].counts.values()) == {1}
        for outcome, text in zip(outcomes, rng_texts[number::8] * 3, strict=True):
            assert outcome.failure is None
            full = wanted[text]
            want = [full[0].mean(0), torch.nn.functional.normalize(full[0, 0], dim=-1), full, cut[text]][number % 4]
            assert_same(outcome.output, want.numpy())
    shared = [batch for batch in adapter.batches if len({id(unit.assembly.work.job) for unit in batch.units}) > 1]
    assert shared, "no batch was shared by two jobs"


def test_a_cancelled_job_stops_before_the_device(pipe: Any) -> None:
    adapter = recording(TextClassifier, pipe)
    with running(adapter, TASK) as engine:
        adapter.gate.clear()
        _, plug = engine.submit([Call("plug")])
        assert adapter.entered.wait(SECONDS)
        job, cancelled = engine.submit([Call(f"cancelled {index}") for index in range(5)])
        _, other = engine.submit([Call("other")])
        wait_until(lambda: len(engine.engine.room) == 6, "all wait for the device")
        job.cancelled = True
        adapter.gate.set()
        outcomes = finished(cancelled)
        assert codes(finished(plug) + finished(other)) == ["", ""]
        assert len(engine.engine.room) == 0
    assert codes(outcomes) == ["cancelled"] * 5
    assert stages(outcomes) == {"forward"}
    assert not any(unit.assembly.work.job is job for batch in adapter.batches for unit in batch.units)


def test_a_job_cancelled_before_it_is_admitted_costs_nothing(pipe: Any) -> None:
    adapter = recording(TextClassifier, pipe)
    with running(adapter, TASK) as engine:
        _, sink = engine.submit([Call("a"), Call("b")], cancelled=True)
        assert codes(finished(sink)) == ["cancelled"] * 2
    assert stages(finished(sink)) == {"decode"}
    assert adapter.prepared_items == 0


def test_an_expired_job_stops_and_one_with_time_left_does_not(pipe: Any) -> None:
    adapter = recording(TextClassifier, pipe)
    with running(adapter, TASK) as engine:
        _, late = engine.submit([Call("late")], deadline=time.monotonic() - 1.0)
        _, early = engine.submit([Call("early")], deadline=time.monotonic() + SECONDS)
        assert codes(finished(late)) == ["expired"]
        assert codes(finished(early)) == [""]


def test_a_deadline_that_passes_while_waiting_for_the_device(pipe: Any) -> None:
    adapter = recording(TextClassifier, pipe)
    with running(adapter, TASK) as engine:
        adapter.gate.clear()
        _, plug = engine.submit([Call("plug")])
        assert adapter.entered.wait(SECONDS)
        job, sink = engine.submit([Call("a"), Call("b")], deadline=time.monotonic() + 10 * SECONDS)
        wait_until(lambda: len(engine.engine.room) == 2, "both wait for the device")
        job.deadline = time.monotonic() - 1.0
        adapter.gate.set()
        finished(plug)
        assert codes(finished(sink)) == ["expired"] * 2


def test_stop_finishes_what_is_inside(pipe: Any) -> None:
    with running(recording(TextClassifier, pipe), TASK, limits=BatchLimits(64, 4)) as engine:
        _, sink = engine.submit([Call(f"text {index}") for index in range(100)])
    assert sink.complete
    assert codes(sink.in_order()) == [""] * 100


@pytest.mark.parametrize("bulk", [False, True])
def test_more_work_than_every_queue_holds_does_not_deadlock(pipe: Any, bulk: bool) -> None:
    """All rooms are of size one and a slow consumer of outcomes is not needed: sinks never block."""
    settings = WorkerSettings(cpu_threads=1, fetch_threads=1, finish_threads=1, window_units=1, in_flight_items=1)
    with running(recording(TextClassifier, pipe), TASK, limits=BatchLimits(1, 1), settings=settings) as engine:
        sinks: list[Outcomes] = []

        def client() -> None:
            sinks.append(engine.submit([Call(f"text {index}") for index in range(60)], bulk=bulk)[1])

        threads = [threading.Thread(target=client, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert [codes(finished(sink)) for sink in sinks] == [[""] * 60] * 4


def test_seconds_are_noted_for_every_stage(pipe: Any) -> None:
    with running(recording(TextClassifier, pipe), TASK) as engine:
        (outcome,) = engine.run([Call("a text")])
    assert set(outcome.work.seconds) == {"decode", "preprocess", "forward", "postprocess"}
    assert all(value >= 0 for value in outcome.work.seconds.values())


def test_a_failure_shares_the_time_of_its_batch_and_keeps_its_order() -> None:
    class Odd:
        def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
            return {}

        def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> list[int]:
            if any(unit.length == 3 for unit in units):
                raise ValueError
            return [unit.length for unit in units]

        def split(self, outputs: list[int], units: Sequence[Unit]) -> list[int]:
            return outputs

    from tests.unit.worker.engine.test_batcher import unit

    units = [unit(length) for length in (1, 3, 2)]
    done = Forward(Odd(), lambda cost: None).run(Batch("one", units), UNOBSERVED)  # type: ignore[arg-type]
    assert [one for one, _ in done] == units
    assert [output if isinstance(output, int) else output.code for _, output in done] == [1, "model_error", 2]
    assert isinstance(done[1][1], JobFailure)
    assert all("forward" in one.assembly.work.seconds for one in units)


def test_an_engine_starts_and_stops_in_any_order(pipe: Any) -> None:
    before = set(threading.enumerate())
    with running(recording(TextClassifier, pipe), TASK) as one:
        assert codes(one.run([Call("before")])) == [""]
        one.engine.start()  # nothing: it runs
        assert codes(one.run([Call("twice")])) == [""]
        assert one.engine.stop(SECONDS)
        assert one.engine.stop(SECONDS)
        one.engine.start()
        assert codes(one.run([Call("after"), Call("it stopped")])) == ["", ""]
        assert one.engine.stop(SECONDS)
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not left & {"device", "watchdog", "store-0", "finish-0"}


def test_threads_that_start_and_stop_an_engine_at_once_leave_it_whole(pipe: Any) -> None:
    with running(recording(TextClassifier, pipe), TASK) as one:

        def hammer(number: int) -> None:
            for turn in range(10):
                one.engine.stop() if (turn + number) % 2 else one.engine.start()

        threads = [threading.Thread(target=hammer, args=(number,), daemon=True) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
            assert not thread.is_alive()
        one.engine.start()
        assert codes(one.run([Call("a text")])) == [""]


def test_an_engine_that_never_started_stops(pipe: Any) -> None:
    row = RUNTIME[TASK]
    decoder = Decoder(task_spec(TASK), WorkerSettings(), sampling_rate=None)
    stages = Stages(Fetcher(WorkerStore(), WorkerSettings()), decoder, row.adapter(pipe))
    before = set(threading.enumerate())
    engine = Engine(stages, BatchLimits(64, 4), WorkerSettings(), Instruments(Metrics("test")), slice_items=4)
    assert set(threading.enumerate()) <= before, "a constructor starts no thread"
    assert engine.stop(SECONDS)


def test_a_simulated_device_gives_the_models_results_when_its_time_is_over(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [Call(f"text {index}") for index in range(3)]
    adapter, slept = recording(TextClassifier, pipe), list[float]()
    monkeypatch.setattr(simulated, "sleep", slept.append)
    with running(adapter, TASK, settings=WorkerSettings(simulated_device="1000,0")) as engine:
        outcomes = engine.run(calls)
    assert_same([one.output for one in outcomes], expected(pipe, calls))
    assert len(slept) == len(adapter.batches)
    assert all(SECONDS < seconds <= 1000 for seconds in slept), "the rest of the time, behind the real forward"
