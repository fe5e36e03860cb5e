"""Requests that join and leave at every step: equal to generate() alone, bounded by pages, and in the order of their urgency."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from pipefleet_workers.adapters.writing import continuous as writing
from pipefleet_workers.adapters.writing.continuous import DecoderWriter
from pipefleet_workers.adapters.writing.generate import TextGenerator
from pipefleet_workers.adapters.writing.paged import Pages
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine import continuous as joined
from pipefleet_workers.engine import forward
from pipefleet_workers.items import JobContext, Outcome
from pipefleet_workers.process.exit_codes import BROKEN_DEVICE, HUNG_FORWARD
from pipefleet_workers.settings import WorkerSettings
from tests.parity.cases.case import direct
from tests.parity.harness import Call, Running, finished, load, recording, running, wait_until

TASK = "text-generation"
PAGES = Pages(count=512, size=4, chunk=32, rows=16)
TEXTS = [
    "The quick brown",
    "Yes",
    "In the beginning there was a single server,",
    "A cat is sleeping on the red couch. " * 3,
]
GREEDY = {"do_sample": False}
LONG = {"do_sample": False, "max_new_tokens": 200}


@pytest.fixture(scope="module")
def pipe() -> Any:
    found = load(TASK)
    found.model.generation_config.eos_token_id = None  # a random model may end where it likes
    return found


@pytest.fixture
def batches(pipe: Any) -> Iterator[Running]:
    """An engine of ordinary batches."""
    with running(recording(TextGenerator, pipe), TASK) as one:
        yield one


@contextlib.contextmanager
def joining(pipe: Any, pages: Pages = PAGES, **options: Any) -> Iterator[Running]:
    """An engine whose requests join and leave at every step."""
    adapter = recording(TextGenerator, pipe)
    adapter.continuous = DecoderWriter(adapter, pages)
    with running(adapter, TASK, **options) as one:
        yield one


@pytest.fixture
def engine(pipe: Any) -> Iterator[Running]:
    with joining(pipe) as one:
        yield one


def outputs(outcomes: Sequence[Outcome]) -> list[Any]:
    assert [one.failure for one in outcomes] == [None] * len(outcomes)
    return [one.output for one in outcomes]


@contextlib.contextmanager
def at_step(engine: Running, act: Callable[[int], None]) -> Iterator[None]:
    """`act` gets the number of each step of the writer, before the step, in the device's thread."""
    writer = engine.adapter.continuous
    own, number = writer.step, 0

    def step() -> Any:
        nonlocal number
        number += 1
        act(number)
        return own()

    writer.step = step
    try:
        yield
    finally:
        writer.step = own


def assert_empty(engine: Running) -> None:
    """No unit, row or page is left behind."""
    writer = engine.adapter.continuous
    assert (writer._units, writer._inside, writer._taken) == ({}, {}, 0)
    scheduler = writer._decoder._processor.scheduler
    assert not scheduler.active_requests
    assert not scheduler.waiting_requests


CALLS = [
    *[Call(text, {**GREEDY, "max_new_tokens": most}) for text in TEXTS for most in (1, 2, 17, 40)],
    Call(TEXTS[0], {**GREEDY, "max_new_tokens": 14, "repetition_penalty": 1.5}),
    Call(TEXTS[2], {**GREEDY, "max_new_tokens": 30, "repetition_penalty": 1.2}),
    Call([{"role": "user", "content": "What is the capital of France?"}], {**GREEDY, "max_new_tokens": 9}),
    Call(TEXTS[1], {**GREEDY, "max_new_tokens": 12, "return_full_text": False}),
    Call("", {**GREEDY, "max_new_tokens": 8}),
]
SAMPLED = [
    Call(TEXTS[0], {"do_sample": True, "seed": 1, "max_new_tokens": 12}),
    Call(TEXTS[1], {"do_sample": True, "seed": 1, "max_new_tokens": 30, "temperature": 1.5, "top_k": 0}),
    Call(TEXTS[2], {"do_sample": True, "seed": 2, "max_new_tokens": 8, "top_p": 0.7}),
    Call(TEXTS[3], {"do_sample": True, "seed": -5, "max_new_tokens": 20, "temperature": 2, "top_k": 7, "top_p": 0.9}),
    Call(TEXTS[0], {"do_sample": True, "seed": 3, "max_new_tokens": 20, "min_p": 0.05, "repetition_penalty": 1.3}),
    Call(TEXTS[1], {"do_sample": True, "seed": 4, "max_new_tokens": 15, "num_return_sequences": 3}),
    Call(TEXTS[3], {"do_sample": True, "seed": 5, "max_new_tokens": 15, "typical_p": 0.8}),
]


def test_ragged_requests_give_what_the_pipeline_gives_for_each_alone(pipe: Any, engine: Running) -> None:
    assert outputs(engine.run(CALLS)) == [direct(pipe, call) for call in CALLS]
    assert not engine.adapter.batches, "no ordinary batch ran"
    assert_empty(engine)


def test_a_sampled_request_draws_what_it_draws_in_a_batch(batches: Running, engine: Running) -> None:
    alone = [outputs(batches.run([call]))[0] for call in SAMPLED]
    assert outputs(engine.run(SAMPLED)) == alone
    assert [outputs(engine.run([call]))[0] for call in SAMPLED] == alone
    assert not engine.adapter.batches


def test_stop_strings_end_a_request_where_a_batch_ends_it(batches: Running, engine: Running) -> None:
    stops = ["a", "e", " t", "the"]
    calls = [Call(text, {**GREEDY, "max_new_tokens": 40, "stop": [stop]}) for text in TEXTS for stop in stops]
    calls += [Call(text, {"do_sample": True, "seed": 3, "max_new_tokens": 40, "stop": stops}) for text in TEXTS]
    wanted = outputs(batches.run(calls))
    whole = outputs(engine.run([Call(call.inputs, {**call.parameters, "stop": None}) for call in calls]))
    assert wanted != whole, "some of them were stopped early"
    assert outputs(engine.run(calls)) == wanted
    assert_empty(engine)


def test_requests_that_need_more_run_as_batches_between_the_steps(pipe: Any, engine: Running) -> None:
    calls = [
        Call(TEXTS[0], {**GREEDY, "max_new_tokens": 9, "num_beams": 2, "num_return_sequences": 2}),
        Call(TEXTS[1], {**GREEDY, "max_new_tokens": 12, "no_repeat_ngram_size": 1}),
        Call(TEXTS[2], {**GREEDY, "max_new_tokens": 9, "min_new_tokens": 9}),
        Call(TEXTS[2], {**GREEDY, "max_new_tokens": 30}),
        Call(TEXTS[0], {**GREEDY, "max_new_tokens": 30}),
    ]
    assert outputs(engine.run(calls)) == [direct(pipe, call) for call in calls]
    assert sum(len(batch.units) for batch in engine.adapter.batches) == 3
    assert_empty(engine)


def test_a_long_batch_does_not_stop_the_steps_of_others(engine: Running) -> None:
    """A request with beams runs; one that joins meanwhile ends before it."""
    ended: list[str] = []
    beams = {**GREEDY, "max_new_tokens": 150, "min_new_tokens": 150, "num_beams": 2}
    started: list[Outcomes] = []

    def tick() -> None:
        if not started:
            started.append(engine.submit([Call(TEXTS[1], {**GREEDY, "max_new_tokens": 5})], id="late")[1])
            wait_until(lambda: engine.adapter.prepared_units == 2, "the late one waits for the device")
        elif started[0].complete and not ended:
            ended.append("late")

    engine.adapter.on_tick = tick
    begin = time.perf_counter()
    _, long = engine.submit([Call(TEXTS[0], beams)])
    finished(long)
    assert ended == ["late"]
    busy = engine.engine._instruments.metrics._busy_seconds
    assert 0 < busy <= time.perf_counter() - begin, "no second of the device counts twice"
    outputs(finished(started[0]))


def bulk(engine: Running, count: int, most: int = 100) -> list[tuple[JobContext, Outcomes]]:
    calls = [[Call(TEXTS[index % 3], {**GREEDY, "max_new_tokens": most})] for index in range(count)]
    return [engine.submit(call, id=f"bulk-{index}", priority=6) for index, call in enumerate(calls)]


@pytest.mark.parametrize("full", ["rows", "pages"])
def test_an_urgent_request_gets_its_first_token_within_a_few_steps(pipe: Any, full: str) -> None:
    """Bulk fills every row, or every page, with 100 steps to go; the answers of parked requests do not change."""
    pages = Pages(512, 4, 32, 4) if full == "rows" else Pages(4 * 32, 4, 32, 16)
    heard: list[int] = []
    steps = 0
    with joining(pipe, pages) as engine:
        late: list[Outcomes] = []

        def act(number: int) -> None:
            nonlocal steps
            steps = number
            if number == 20:
                assert engine.adapter.continuous._decoder.unread() == 0
                call = Call(TEXTS[3], {**GREEDY, "max_new_tokens": 4})
                late.append(engine.submit([call], id="late", priority=0, read=lambda _: heard.append(steps))[1])
                wait_until(lambda: engine.adapter.prepared_units == 13, "the late one waits for the device")

        with at_step(engine, act):
            waiting = bulk(engine, 12)
            written = [outputs(finished(sink)) for _, sink in waiting]
            outputs(finished(late[0]))
        assert heard[0] <= 20 + 4, "the prompt has 40 tokens: two steps read it"
        assert len(heard) == 4
        assert steps > 100
        assert_empty(engine)
    assert written == [[direct(pipe, Call(TEXTS[index % 3], {**GREEDY, "max_new_tokens": 100}))] for index in range(12)]


def test_many_long_requests_end_with_few_pages(pipe: Any) -> None:
    calls = [Call(text, {**GREEDY, "max_new_tokens": 60 + index}) for index in range(6) for text in TEXTS]
    with joining(pipe, Pages(count=40, size=4, chunk=16, rows=16)) as engine:
        most = 0

        def act(_: int) -> None:
            nonlocal most
            most = max(most, len(engine.adapter.continuous._inside))

        with at_step(engine, act):
            found = outputs(engine.run(calls))
        assert found == [direct(pipe, call) for call in calls]
        assert 1 <= most <= 3, "40 pages hold 160 tokens"
        assert engine.adapter.continuous.bytes <= 42 * 4 * 2 * 2 * 2 * 16 * 4
        assert_empty(engine)


def test_a_request_longer_than_all_pages_runs_as_a_batch(pipe: Any) -> None:
    calls = [Call(TEXTS[0], {**GREEDY, "max_new_tokens": most}) for most in (100, 8)]
    with joining(pipe, Pages(count=16, size=4, chunk=16, rows=16)) as engine:
        assert outputs(engine.run(calls)) == [direct(pipe, call) for call in calls]
        assert [len(batch.units) for batch in engine.adapter.batches] == [1]


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_a_job_that_is_stopped_leaves_at_the_next_step(pipe: Any, engine: Running, how: str) -> None:
    jobs: list[JobContext] = []

    def act(number: int) -> None:
        if number == 10:
            jobs[0].cancelled = how == "cancelled"
            jobs[0].deadline = time.monotonic() if how == "expired" else None
        if number > 10:
            assert len(engine.adapter.continuous._inside) == 1

    call = Call(TEXTS[0], LONG)
    with at_step(engine, act):
        engine.adapter.continuous._most_rows = 0  # both join at once
        job, stopped = engine.submit([call], id="stopped")
        jobs.append(job)
        _, other = engine.submit([call], id="other")
        engine.adapter.continuous._most_rows = 16
        (failed,) = finished(stopped)
        assert outputs(finished(other)) == [direct(pipe, call)]
    assert failed.failure is not None
    assert failed.failure.code == how
    assert_empty(engine)


def test_a_stop_finishes_the_requests_inside_and_waiting(pipe: Any) -> None:
    calls = [Call(text, {**GREEDY, "max_new_tokens": 50}) for text in TEXTS]
    with joining(pipe, Pages(512, 4, 32, 2)) as engine:
        _, sink = engine.submit(calls)
        assert engine.engine.stop(60)
        assert outputs(finished(sink)) == [direct(pipe, call) for call in calls]


def test_a_failing_request_fails_alone(pipe: Any, engine: Running) -> None:
    """A step raises while one request is inside; each runs again alone, where this one fails too."""
    poison = "A cat is sleeping"

    def raising(_: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        text = pipe.tokenizer.decode(ids[0])
        if poison in text or (ids.shape[0] > 1 and any(poison in pipe.tokenizer.decode(row) for row in ids)):
            raise ValueError("this one cannot be computed")

    hook = pipe.model.register_forward_pre_hook(raising, with_kwargs=True)
    try:
        good = [Call(text, {**GREEDY, "max_new_tokens": 20}) for text in TEXTS[:3]]
        results = engine.run([*good[:2], Call(poison, {**GREEDY, "max_new_tokens": 20}), good[2]])
        again = engine.run(good)
    finally:
        hook.remove()
    assert results[2].failure is not None
    assert results[2].failure.code == "model_error"
    wanted = [direct(pipe, call) for call in good]
    assert outputs([results[0], results[1], results[3]]) == wanted
    assert outputs(again) == wanted
    assert_empty(engine)


def test_after_memory_ran_out_fewer_requests_go_on_where_they_stopped(pipe: Any, engine: Running) -> None:
    failed: list[int] = []

    def act(number: int) -> None:
        if number == 8:
            failed.append(len(engine.adapter.continuous._inside))
            raise MemoryError("out of memory")

    calls = [Call(text, {**GREEDY, "max_new_tokens": 30}) for text in TEXTS]
    with at_step(engine, act):
        assert outputs(engine.run(calls)) == [direct(pipe, call) for call in calls]
    assert failed == [4]
    assert engine.adapter.continuous._most_rows == 8
    assert not engine.adapter.batches, "none began again"
    assert_empty(engine)


@pytest.mark.parametrize("how", ["by its length", "by its stop string"])
def test_memory_that_runs_out_while_ends_are_looked_for_loses_no_end(
    pipe: Any, engine: Running, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    own, failed = writing._stopped, list[str]()
    calls = [
        Call(TEXTS[0], {**GREEDY, "max_new_tokens": 6}),
        Call(TEXTS[1], {**GREEDY, "max_new_tokens": 60, "stop": ["e", "a"]}),
        Call(TEXTS[2], {**GREEDY, "max_new_tokens": 80, "stop": ["no such text"]}),
    ]
    wanted = outputs(engine.run(calls))
    assert wanted[1] != direct(pipe, Call(TEXTS[1], {**GREEDY, "max_new_tokens": 60}))
    writer = engine.adapter.continuous

    def stopped(group: Sequence[Any]) -> Any:
        ended, gone = own(group), len(writer._units) - len(writer._inside)
        if not failed and (gone if how == "by its length" else ended):
            failed.append(how)
            raise MemoryError("out of memory")
        return ended

    monkeypatch.setattr(writing, "_stopped", stopped)
    assert outputs(engine.run(calls)) == wanted
    assert failed == [how]
    assert_empty(engine)


def test_a_broken_device_ends_the_process(pipe: Any) -> None:
    ends: list[tuple[int, str]] = []

    def act(_: int) -> None:
        raise RuntimeError(f"CUDA error: {forward._BROKEN[0]} triggered")

    with joining(pipe, on_fatal=lambda code, reason: ends.append((code, reason))) as engine, at_step(engine, act):
        engine.submit([Call(TEXTS[0], GREEDY)])
        wait_until(lambda: ends, "the device's thread reports its end")
    assert ends[0][0] == BROKEN_DEVICE


def test_tokens_are_heard_one_by_one(pipe: Any, engine: Running) -> None:
    ids = pipe.tokenizer(TEXTS[0])["input_ids"]
    for call, count in (
        (Call(TEXTS[0], {**GREEDY, "max_new_tokens": 5}), 5),
        (Call(TEXTS[0], SAMPLED[5].parameters), 15),
    ):
        heard: list[Sequence[int]] = []
        _, sink = engine.submit([call], read=heard.append)
        found = outputs(finished(sink))
        assert pipe.tokenizer.decode([*ids, *heard[-1]], skip_special_tokens=True) == found[0][0]["generated_text"]
        assert heard == [heard[-1][: place + 1] for place in range(count)]


@pytest.mark.parametrize(
    ("seconds", "order"), [(1000.0, ["first", "second", "bulk"]), (0.0, ["first", "bulk", "second"])]
)
def test_a_request_that_was_parked_for_long_is_not_parked_again(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, seconds: float, order: list[str]
) -> None:
    monkeypatch.setattr(joined, "PARKED_SECONDS", seconds)
    sinks: dict[str, Outcomes] = {}
    ended: list[str] = []
    call = Call(TEXTS[0], {**GREEDY, "max_new_tokens": 30})
    with joining(pipe, Pages(512, 4, 32, 1)) as engine:

        def begin(name: str, priority: int) -> None:
            def hear(tokens: Sequence[int]) -> None:
                if len(tokens) == 30:
                    ended.append(name)

            sinks[name] = engine.submit([call], id=name, priority=priority, read=hear)[1]
            wait_until(lambda: engine.adapter.prepared_units == len(sinks), "it waits for the device")

        def act(number: int) -> None:
            name = {5: "first", 45: "second"}.get(number)
            if name is not None:
                begin(name, 0)

        with at_step(engine, act):
            begin("bulk", 6)
            wait_until(lambda: len(sinks) == 3, "all were submitted")
            found = [outputs(finished(sinks[name])) for name in order]
        assert_empty(engine)
    assert ended == order
    assert found == [[direct(pipe, call)]] * 3


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nothing_is_lost_or_changed_by_any_order_of_joins_stops_and_failures(pipe: Any, seed: int) -> None:
    """Jobs of all kinds and priorities come at any step; some are cancelled, and some steps fail."""
    chance = random.Random(seed)
    kinds = [*CALLS[::3], *SAMPLED, Call(TEXTS[1], {**GREEDY, "max_new_tokens": 12, "num_beams": 2})]
    chosen = [chance.choice(kinds) for _ in range(40)]
    with running(recording(TextGenerator, pipe), TASK) as plain:
        wanted = [outputs(plain.run([call]))[0] for call in chosen]
    jobs: dict[int, JobContext] = {}
    sinks: dict[int, Outcomes] = {}
    cancelled: set[int] = set()
    waiting = list(range(len(chosen)))

    def submit() -> None:
        index = waiting.pop()
        jobs[index], sinks[index] = engine.submit([chosen[index]], id=str(index), priority=chance.choice([0, 3, 6]))

    def act(_: int) -> None:
        while waiting and chance.random() < 0.3:
            submit()
        if chance.random() < 0.02:
            index = chance.choice(list(jobs))
            jobs[index].cancelled = True
            cancelled.add(index)
        if chance.random() < 0.02:
            raise chance.choice([MemoryError("out of memory"), ValueError("a step fails")])

    with joining(pipe, Pages(count=60, size=4, chunk=16, rows=6)) as engine, at_step(engine, act):
        while waiting:
            submit()
            finished(sinks[next(reversed(sinks))])
        found = {index: finished(sink)[0] for index, sink in sinks.items()}
        assert_empty(engine)
    for index, one in found.items():
        if one.failure is not None:
            assert index in cancelled
            assert one.failure.code == "cancelled"
        else:
            assert one.output == wanted[index], chosen[index]


def test_an_urgent_prompt_that_is_read_lets_no_other_urgent_one_park_bulk(pipe: Any, engine: Running) -> None:
    """A long urgent prompt is read in ten pieces. The next urgent one waits for it, and the bulk goes on meanwhile."""
    long = Call("the sea " * 80, {**GREEDY, "max_new_tokens": 3})
    late: list[Outcomes] = []

    def act(number: int) -> None:
        if number == 5:
            late.extend(engine.submit([call], id="late", priority=0)[1] for call in (long, long))
            wait_until(lambda: engine.adapter.prepared_units == 6, "both wait for the device")
        if number == 8:
            assert engine.adapter.continuous._decoder.unread() > 2 * PAGES.chunk
            assert len(engine.adapter.continuous._inside) == 5

    with at_step(engine, act):
        written = [outputs(finished(sink)) for _, sink in bulk(engine, 4)]
        assert [outputs(finished(sink)) for sink in late] == [[direct(pipe, long)]] * 2
    assert written == [[direct(pipe, Call(TEXTS[index % 3], {**GREEDY, "max_new_tokens": 100}))] for index in range(4)]


def test_the_common_beginning_of_prompts_is_read_once(pipe: Any, engine: Running) -> None:
    calls = [Call("the sea " * 20 + text, {**GREEDY, "max_new_tokens": 2}) for text in TEXTS]
    read: list[int] = []

    def note(_: Any, __: Any, kwargs: Mapping[str, Any]) -> None:
        read[-1] += kwargs["input_ids"].shape[1]

    wanted = [direct(pipe, call) for call in calls]
    hook = pipe.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        for call, expected in zip(calls, wanted, strict=True):
            read.append(0)
            assert outputs(engine.run([call])) == [expected]
    finally:
        hook.remove()
    assert read[0] > 80
    assert all(later < read[0] - 60 for later in read[1:3])


def test_a_step_that_hangs_ends_the_process_and_names_its_request(pipe: Any) -> None:
    ends: list[tuple[int, str]] = []
    hung = threading.Event()

    def act(number: int) -> None:
        if number == 3:
            assert hung.wait(60)

    def end(code: int, reason: str) -> None:
        ends.append((code, reason))
        hung.set()

    with joining(pipe, settings=WorkerSettings(forward_timeout=2.0), on_fatal=end) as engine, at_step(engine, act):
        _, sink = engine.submit([Call(TEXTS[0], {**GREEDY, "max_new_tokens": 5})], id="hanging")
        finished(sink)
    assert ends[0][0] == HUNG_FORWARD
    assert "hanging" in ends[0][1]


def test_a_batch_that_hangs_between_the_steps_of_others_is_named_itself(pipe: Any) -> None:
    ends: list[tuple[int, str]] = []
    hung = threading.Event()
    late: list[Outcomes] = []

    def end(code: int, reason: str) -> None:
        ends.append((code, reason))
        hung.set()

    with joining(pipe, settings=WorkerSettings(forward_timeout=2.0), on_fatal=end) as engine:

        def tick() -> None:
            if not late:
                most = {"short": 5, "long": 400}
                calls = {name: Call(TEXTS[1], {**GREEDY, "max_new_tokens": count}) for name, count in most.items()}
                late.extend(engine.submit([call], id=name)[1] for name, call in calls.items())
                wait_until(lambda: engine.adapter.prepared_units == 3, "both wait for the device")
            elif late[0].complete and not ends:
                assert hung.wait(60)

        engine.adapter.on_tick = tick
        beams = {**GREEDY, "max_new_tokens": 100, "min_new_tokens": 100, "num_beams": 2}
        _, sink = engine.submit([Call(TEXTS[0], beams)], id="beams")
        finished(sink)
    assert ends[0][0] == HUNG_FORWARD
    assert "of job beams within" in ends[0][1]


def test_a_job_that_is_given_back_leaves_nothing_inside(pipe: Any, engine: Running) -> None:
    jobs: list[JobContext] = []

    def act(number: int) -> None:
        if number == 10:
            jobs[0].give_back(ConnectionError("the store is away"))
        if number > 60:
            assert len(engine.adapter.continuous._units) == 1

    with at_step(engine, act):
        for id in ("given back", "other"):
            job, sink = engine.submit([Call(TEXTS[0], LONG)] * (3 if not jobs else 1), id=id)
            jobs.append(job)
        assert outputs(finished(sink)) == [direct(pipe, Call(TEXTS[0], LONG))]
    assert_empty(engine)
