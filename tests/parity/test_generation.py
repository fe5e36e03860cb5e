"""Requests that share a generate() call: sampled ones next to any neighbours, stopped ones, decoders that are harder to pad."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.adapters.writing.generate import TextGenerator
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.items import JobContext, Outcome
from pipefleet_workers.models.warmup import example_units, warm_up
from pipefleet_workers.observe.service_fit import ServiceFit
from tests.checkpoints.text import llama_config
from tests.checkpoints.vocabularies import chat_tokenizer
from tests.parity.cases.case import direct
from tests.parity.harness import Call, Running, finished, load, recording, running, wait_until

TASK = "text-generation"
PROMPTS = [
    "The quick brown",
    "Yes",
    "In the beginning there was a single server,",
    "A cat is sleeping on the red couch.",
]
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load(TASK)


@pytest.fixture
def engine(pipe: Any) -> Iterator[Running]:
    with running(recording(TextGenerator, pipe), TASK) as one:
        yield one


def outputs(outcomes: Sequence[Outcome]) -> list[Any]:
    assert [one.failure for one in outcomes] == [None] * len(outcomes)
    return [one.output for one in outcomes]


@contextlib.contextmanager
def jobs_waiting(engine: Running, calls: Sequence[Call]) -> Iterator[list[tuple[JobContext, Outcomes]]]:
    """Jobs of one call each, all waiting for the device, which goes on when the block ends: what can share a batch does."""
    adapter = engine.adapter
    adapter.gate.clear()
    adapter.entered.clear()
    _, plug = engine.submit([Call("plug", {"do_sample": False, "max_new_tokens": 1, "min_new_tokens": 1})])
    wait_until(adapter.entered.is_set, "the first batch reaches the device")
    started = [engine.submit([call], id=str(index)) for index, call in enumerate(calls)]
    wait_until(lambda: len(engine.engine.room) == len(calls), "every unit waits for the device")
    adapter.batches.clear()
    yield started
    adapter.gate.set()
    finished(plug)
    for _, sink in started:
        finished(sink)


@contextlib.contextmanager
def at_step(pipe: Any, number: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """`act` is called before the model's forward of this number inside the block; yields a list that grows with each."""
    steps: list[int] = []

    def count(*_: Any) -> None:
        steps.append(len(steps) + 1)
        if len(steps) == number:
            act()

    hook = pipe.model.register_forward_pre_hook(count)
    try:
        yield steps
    finally:
        hook.remove()


def outcome_as_job(engine: Running, index: int, call: Call) -> Any:
    return outputs(finished(engine.submit([call], id=str(index))[1]))[0]


def largest(engine: Running) -> int:
    return max(len(batch.units) for batch in engine.adapter.batches)


SAMPLED = [
    Call(PROMPTS[0], {"seed": 1, "max_new_tokens": 12}),
    Call(PROMPTS[1], {"seed": 1, "max_new_tokens": 30, "temperature": 1.5, "top_k": 0}),
    Call(PROMPTS[2], {"seed": 2, "max_new_tokens": 8, "top_p": 0.7}),
    Call(PROMPTS[3], {"seed": -5, "max_new_tokens": 20, "temperature": 2, "top_k": 7, "top_p": 0.9}),
    Call(CHAT, {"seed": 1, "max_new_tokens": 15, "stop": ["a"]}),
    Call(PROMPTS[0], {"seed": 2, "max_new_tokens": 12}),
]


def test_a_sampled_result_depends_on_its_seed_and_never_on_its_neighbours(engine: Running) -> None:
    alone = [outputs(engine.run([call]))[0] for call in SAMPLED]
    assert alone[0] != alone[5], "another seed, another text"
    assert outputs(engine.run_together(SAMPLED)) == alone
    assert largest(engine) == len(SAMPLED)
    assert outputs(engine.run_together(SAMPLED[::-1])) == alone[::-1]
    assert outputs(engine.run_together([SAMPLED[3], SAMPLED[0]])) == [alone[3], alone[0]]


def test_sampled_sequences_of_one_request_differ_and_are_repeatable(engine: Running) -> None:
    several = [Call(one, {"seed": 3, "max_new_tokens": 10, "num_return_sequences": 3}) for one in PROMPTS]
    (alone,) = outputs(engine.run(several[:1]))
    assert len({one["generated_text"] for one in alone}) == 3
    together = outputs(engine.run_together(several))
    assert together[0] == alone
    assert largest(engine) == 4
    (single,) = outputs(engine.run([Call(PROMPTS[0], {"seed": 3, "max_new_tokens": 10})]))
    assert single == alone[:1]


def test_without_a_seed_a_job_that_runs_again_gives_the_same_answer_and_another_job_another(engine: Running) -> None:
    call = Call("Yes", {"max_new_tokens": 16})
    first, again, other = (outputs(finished(engine.submit([call], id=job)[1])) for job in ("one", "one", "two"))
    assert first == again
    assert first != other
    two_items = outputs(engine.run([call, call]))
    assert two_items[0] != two_items[1]


def test_beams_that_sample_are_repeatable_and_leave_torchs_random_numbers_alone(engine: Running) -> None:
    calls = [Call(one, {"seed": 4, "num_beams": 2, "do_sample": True, "max_new_tokens": 9}) for one in PROMPTS]
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    alone = [outputs(engine.run([call]))[0] for call in calls]
    assert outputs(engine.run_together(calls)) == alone
    assert largest(engine) == 1
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_most_probable_token_is_drawn_when_nothing_else_is_possible(pipe: Any, engine: Running) -> None:
    greedy = [direct(pipe, Call(one, {"do_sample": False, "max_new_tokens": 10})) for one in PROMPTS]
    calls = [Call(one, {"do_sample": True, "top_k": 1, "max_new_tokens": 10}) for one in PROMPTS]
    assert outputs(engine.run_together(calls)) == greedy


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
@pytest.mark.parametrize("extra", [{"do_sample": False}, {"seed": 1}, {"do_sample": False, "num_beams": 2}])
def test_a_stopped_job_ends_its_row_and_no_other(pipe: Any, engine: Running, how: str, extra: dict[str, Any]) -> None:
    calls = [Call(one, {**extra, "max_new_tokens": 40, "min_new_tokens": 40}) for one in PROMPTS]
    wanted = [outcome_as_job(engine, index, call) for index, call in enumerate(calls)]
    started: list[tuple[JobContext, Outcomes]] = []
    value = {"deadline": time.monotonic() - 1, "cancelled": True}[how]
    with at_step(pipe, 6, lambda: setattr(started[1][0], how, value)), jobs_waiting(engine, calls) as jobs:
        started += jobs
    ends = [finished(sink)[0] for _, sink in started]
    code = {"deadline": "expired", "cancelled": "cancelled"}[how]
    assert ends[1].failure is not None
    assert (ends[1].failure.code, ends[1].failure.stage) == (code, "forward")
    assert outputs([ends[0], *ends[2:]]) == [wanted[0], *wanted[2:]]
    assert largest(engine) == 4


def test_a_call_ends_as_soon_as_all_its_jobs_are_stopped(pipe: Any, engine: Running) -> None:
    started: list[tuple[JobContext, Outcomes]] = []

    def stop_all() -> None:
        for job, _ in started:
            job.cancelled = True

    calls = [Call(one, {"do_sample": False, "max_new_tokens": 400, "min_new_tokens": 400}) for one in PROMPTS]
    with at_step(pipe, 6, stop_all) as steps, jobs_waiting(engine, calls) as jobs:
        started += jobs
    assert {finished(sink)[0].failure.code for _, sink in started} == {"cancelled"}  # type: ignore[union-attr]
    assert len(steps) == 6, "the first is the plug's"


def test_a_request_that_has_its_result_before_its_deadline_keeps_it(pipe: Any, engine: Running) -> None:
    short, long = ({"do_sample": False, "max_new_tokens": n, "min_new_tokens": 3} for n in (3, 40))
    calls = [Call("Yes", short), Call(PROMPTS[2], long)]
    wanted = [direct(pipe, call) for call in calls]
    started: list[tuple[JobContext, Outcomes]] = []
    with at_step(pipe, 8, lambda: setattr(started[0][0], "cancelled", True)), jobs_waiting(engine, calls) as jobs:
        started += jobs
    assert outputs([finished(sink)[0] for _, sink in started]) == wanted


@pytest.mark.parametrize(
    ("parameters", "code", "words"),
    [
        ({"max_length": 2}, "too_long", "max_length is 2"),
        ({"max_new_tokens": 1}, "too_long", "the model takes 512"),
        ({"temperature": 0}, "bad_parameter", "pass do_sample=false"),
        ({"do_sample": False, "num_return_sequences": 2}, "bad_parameter", "num_return_sequences"),
        ({"do_sample": False, "num_beams": 2, "num_return_sequences": 3}, "bad_parameter", "num_return_sequences"),
    ],
)
def test_what_cannot_be_served_fails_alone(engine: Running, parameters: dict[str, Any], code: str, words: str) -> None:
    good = Call(PROMPTS[0], {"do_sample": False, "max_new_tokens": 4})
    prompt = "word " * 600 if "takes" in words else PROMPTS[2]
    bad, fine = engine.run([Call(prompt, parameters), good])
    assert bad.failure is not None
    assert (bad.failure.code, bad.failure.stage) == (code, "preprocess")
    assert words in bad.failure.message
    assert fine.failure is None


def decoder(kind: str, positions: int = 512) -> Any:
    """A decoder whose tokenizer has no padding token, with rotary positions or a table of them."""
    torch.manual_seed(5)
    tokenizer = chat_tokenizer(positions)
    if kind == "llama":
        model: Any = transformers.LlamaForCausalLM(llama_config(tokenizer))
        model.generation_config.pad_token_id = None
    else:
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions, "initializer_range": 0.2}
        tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(tokenizer), **sizes, **tokens))
    tokenizer.pad_token = None
    assert model.generation_config.pad_token_id is None
    return transformers.pipeline(TASK, model=model.eval(), tokenizer=tokenizer, device="cpu")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_without_a_padding_token(kind: str) -> None:
    pipe = decoder(kind)
    sets = [
        {"do_sample": False, "max_new_tokens": 6},
        {"do_sample": False, "max_new_tokens": 14, "repetition_penalty": 1.5},
        {"do_sample": False, "max_new_tokens": 9, "num_beams": 2, "num_return_sequences": 2},
        {"do_sample": False, "max_new_tokens": 12, "no_repeat_ngram_size": 1},
    ]
    calls = [Call(one, own) for one in PROMPTS for own in sets]
    wanted = [direct(pipe, call) for call in calls]
    adapter = recording(TextGenerator, pipe)
    found = warm_up(adapter, task_spec(TASK), {}, ServiceFit(), 4096)
    assert found.pads, found.describe()
    with running(adapter, TASK) as engine:
        assert outputs(engine.run_together(calls)) == wanted
    assert max(len(batch.units) for batch in adapter.batches) == 4


def test_rows_that_have_ended_never_leave_the_table_of_positions() -> None:
    """A long prompt with a short answer beside a short prompt with a long one: 64 positions for both."""
    pipe = decoder("gpt2", 64)
    calls = [
        Call("the " * 25, {"do_sample": False, "max_new_tokens": 2}),
        Call("Yes", {"do_sample": False, "max_new_tokens": 55, "min_new_tokens": 55}),
    ]
    wanted = [direct(pipe, call) for call in calls]
    with running(recording(TextGenerator, pipe), TASK) as engine:
        assert outputs(engine.run_together(calls)) == wanted
        (long,) = outputs(engine.run([Call("the " * 25, {"do_sample": False, "max_new_tokens": 500})]))
        (refused,) = engine.run([Call("the " * 90)])
    assert long[0]["generated_text"].startswith("the the")
    assert refused.failure is not None
    assert refused.failure.code == "too_long"


def test_a_model_whose_results_padding_changes_batches_equal_lengths_only() -> None:
    pipe = decoder("gpt2")

    class Careless(TextGenerator):
        """Hides no padding from the model, as with one that takes no mask."""

        def _padded(self, rows: Sequence[torch.Tensor]) -> dict[str, Any]:
            inputs = super()._padded(rows)
            return {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}

    calls = [Call(one, {"do_sample": False, "max_new_tokens": 6}) for one in [*PROMPTS, *PROMPTS]]
    wanted = [direct(pipe, call) for call in calls]
    adapter = recording(Careless, pipe)
    found = warm_up(adapter, task_spec(TASK), {}, ServiceFit(), 4096)
    assert not found.pads
    with running(adapter, TASK) as engine:
        assert outputs(engine.run_together(calls)) == wanted
    assert max(len(batch.units) for batch in adapter.batches) == 2


def test_an_empty_prompt_begins_with_the_models_own_token(pipe: Any, engine: Running) -> None:
    calls = [Call(one, {"do_sample": False, "max_new_tokens": 8}) for one in ("", *PROMPTS)]
    wanted = [direct(pipe, call) for call in calls]
    assert outputs(engine.run_together(calls)) == wanted
    assert largest(engine) == 5


def test_the_models_own_first_token_belongs_to_the_answer_of_an_empty_prompt(pipe: Any, engine: Running) -> None:
    shown = {"do_sample": False, "max_new_tokens": 8, "skip_special_tokens": False}
    calls = [Call(one, {**shown, **more}) for one in ("", "Y", "Yes") for more in ({}, {"return_full_text": False})]
    assert outputs(engine.run(calls)) == [direct(pipe, call) for call in calls]


def test_a_penalty_for_tokens_of_the_prompt_hears_no_padding(pipe: Any, engine: Running) -> None:
    """transformers names it after encoders, and applies it to decoders as well."""
    own = {"do_sample": False, "max_new_tokens": 12, "encoder_repetition_penalty": 4.0}
    calls = [Call(one, own) for one in (*PROMPTS, CHAT, PROMPTS[0])]
    assert outputs(engine.run_together(calls)) == [direct(pipe, call) for call in calls]
    assert largest(engine) == 2


def test_the_proof_looks_at_steps_that_read_the_prompt_and_that_go_on_from_it(pipe: Any) -> None:
    adapter = TextGenerator(pipe)
    units = [unit for size in (3, 20) for unit in example_units(adapter, task_spec(TASK), {}, size)]
    first, second = adapter.numbers(units)
    assert first.shape == second.shape == (3, pipe.model.config.vocab_size)
    assert np.abs(first[0] - first[1]).max() > 1e-3


@pytest.mark.parametrize("task", [TASK, "image-text-to-text"])
def test_what_has_ended_is_handed_on_while_its_batch_is_still_written(task: str) -> None:
    pipe = load(task)
    pipe.model.generation_config.eos_token_id = None  # a random model may end where it likes
    adapter = recording(RUNTIME[task].adapter, pipe)
    short, long = (
        Call(
            [{"role": "user", "content": [{"type": "text", "text": text}]}],
            {"do_sample": False, "max_new_tokens": most},
        )
        if task != TASK
        else Call(text, {"do_sample": False, "max_new_tokens": most})
        for text, most in (("A cat", 4), ("The sea", 200))
    )
    with running(adapter, task) as engine:
        adapter.gate.clear()
        _, first = engine.submit([short])
        assert adapter.entered.wait(60)
        (_, ended), (_, written) = engine.submit([short]), engine.submit([long])
        wait_until(lambda: len(engine.engine.room) == 2, "both wait for the device")
        steps = [0]

        def counted() -> None:
            steps[0] += 1
            if steps[0] == 100:  # far beyond the short one, far before the end of the long one
                assert ended.wait(60) is not None
                assert ended.complete
                assert not written.complete

        finished_alone = first
        adapter.on_tick = counted
        adapter.gate.set()
        results = [finished(one)[0] for one in (finished_alone, ended, written)]
    assert max(len(batch.units) for batch in adapter.batches) == 2
    assert steps[0] > 150
    assert [one.failure for one in results] == [None] * 3
    assert results[0].output == results[1].output
