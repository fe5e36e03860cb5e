"""What the engine and the consumer must survive: adapters that raise as a whole, refused items, drains."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipefleet.contract.messages import JobItem, JobMessage
from pipefleet.fleet.pools import Pool
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.adapters.text.encoder import TextClassifier
from pipefleet_workers.consume.held import DrainedError
from pipefleet_workers.consume.jobs import Jobs
from pipefleet_workers.consume.shards import Shards
from pipefleet_workers.consume.tally import Tally
from pipefleet_workers.engine.batcher import BatchLimits
from pipefleet_workers.items import Decoded, ItemError, Unit
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.observe.totals import WorkCount
from pipefleet_workers.settings import WorkerSettings
from tests.parity.harness import Call, assert_same, load, recording, running, wait_until

TASK = "text-classification"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load(TASK)


def test_a_text_without_a_pair_does_not_take_the_pair_of_its_neighbour_away(pipe: Any) -> None:
    calls = [
        Call({"text": "A cat sleeps."}),
        Call({"text": "A cat sleeps.", "text_pair": "An animal rests on the couch."}),
    ]
    with running(recording(TextClassifier, pipe), TASK) as engine:
        outcomes = engine.run(calls)
    assert_same([one.output for one in outcomes], [pipe(call.inputs) for call in calls])


@pytest.mark.parametrize("error", [RuntimeError, BaseException])
def test_items_end_even_when_the_adapter_raises_as_a_whole(pipe: Any, error: type[BaseException]) -> None:

    class Broken(TextClassifier):
        def prepare(self, decoded: Sequence[Decoded]) -> list[list[Unit] | ItemError]:
            if any(one.value == "break" for one in decoded):
                raise error("the whole slice")
            return super().prepare(decoded)

    settings = WorkerSettings(cpu_threads=1)
    with running(recording(Broken, pipe), TASK, settings=settings) as engine:
        _, sink = engine.submit([Call("break"), Call("innocent")])
        sink.wait(5.0)
        complete = sink.complete
        _, after = engine.submit([Call("the next job")])
        after.wait(5.0)
        served = after.complete
        if not served:
            engine.engine.stop = lambda: None  # type: ignore[method-assign]  # would wait for the dead thread
    assert served, "the thread is dead"
    assert complete, "the items of the slice never end"


def shards(engine: Any, task: str = TASK) -> tuple[Jobs, Shards]:
    jobs = Jobs(Pool("pool", task, "model"), engine)
    return jobs, Shards(jobs, None, Tally(Metrics("test"), WorkCount()))  # type: ignore[arg-type]


def test_refused_items_give_back_no_room_they_never_took(pipe: Any) -> None:
    with running(recording(TextClassifier, pipe), TASK) as one:
        items = [JobItem("0", "good"), JobItem("1", "bad", {"no such": 1}), JobItem("2", "bad", {"no such": 1})]
        outcomes = shards(one.engine)[1].process(JobMessage("job", TASK), items)
        assert [bool(outcome.failure) for outcome in outcomes] == [False, True, True]
        assert one.engine._budget.empty


def test_a_malformed_reference_fails_its_item_alone(pipe: Any) -> None:
    with running(recording(TextClassifier, pipe), TASK) as one:
        jobs, served = shards(one.engine)
        items = [JobItem("0", "good"), JobItem("1", {"$ref": "s3://bucket/key", "size": "large"})]
        outcomes = served.process(JobMessage("job", TASK), items)
        assert [bool(outcome.failure) for outcome in outcomes] == [False, True]
        assert not jobs._contexts


def test_a_job_that_is_drained_is_handed_back_and_not_ended_as_cancelled(pipe: Any) -> None:
    adapter = recording(TextClassifier, pipe)
    with running(adapter, TASK) as one:
        (jobs, served), raised = shards(one.engine), []
        adapter.gate.clear()
        one.submit([Call("plug")])
        assert adapter.entered.wait(60)

        def handle() -> None:
            try:
                raised.append(served.process(JobMessage("job", TASK), [JobItem("0", "waits")]))
            except DrainedError as error:
                raised.append(error)

        thread = threading.Thread(target=handle, daemon=True)
        thread.start()
        wait_until(lambda: len(one.engine.room) == 1, "the item waits for the device")
        jobs.give_back_all(DrainedError())
        adapter.gate.set()
        thread.join(60)
    assert isinstance(raised[0], DrainedError), raised


@pytest.mark.parametrize("checkpoint", ["automatic-speech-recognition", "automatic-speech-recognition:ctc-masked"])
def test_recordings_of_ctc_models_share_batches_at_the_default_cost(checkpoint: str) -> None:
    task = "automatic-speech-recognition"
    row = RUNTIME[task]
    adapter = recording(row.adapter, load(checkpoint))
    wave = np.random.default_rng(1).normal(0, 0.1, 16_000 * 5).astype(np.float32)
    calls = [Call(np.roll(wave, 100 * index)) for index in range(8)]
    with running(adapter, task, limits=BatchLimits(row.sizing.cpu_cost, 64)) as engine:
        engine.run_together(calls)
    assert max(len(batch.units) for batch in adapter.batches) >= 4


def test_short_recordings_do_not_make_a_batch_beyond_what_whisper_pads_them_to() -> None:
    task = "automatic-speech-recognition"
    row = RUNTIME[task]
    adapter = recording(row.adapter, load(f"{task}:whisper"))
    wave = np.random.default_rng(1).normal(0, 0.1, 8_000).astype(np.float32)
    with running(adapter, task, limits=BatchLimits(row.sizing.cpu_cost, 64)) as engine:
        engine.run_together(
            [Call(wave + index, {"generate_kwargs": {"max_new_tokens": 2, "num_beams": 1}}) for index in range(40)]
        )
    for batch in adapter.batches:
        frames = sum(unit.features["tensors"]["input_features"].shape[-1] for unit in batch.units)
        assert frames <= row.sizing.cpu_cost, f"{len(batch.units)} clips in one batch"
