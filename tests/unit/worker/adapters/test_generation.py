"""The rows of a generate() call: when each ends, what each draws, and which parameters keep requests apart."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from transformers import StopStringCriteria, TopKLogitsWarper, TopPLogitsWarper

from pipefleet.contract.messages import JobItem
from pipefleet.contract.references import is_ref
from pipefleet.errors import InputError, ParameterError
from pipefleet.inputs.prepare import InputPreparer
from pipefleet.pipelines.fleet_pipeline import FleetPipeline
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import TASKS, task_spec
from pipefleet_workers.adapters.writing.generate import TextGenerator
from pipefleet_workers.adapters.writing.rows import (
    Row,
    RowPenalty,
    RowSampler,
    RowStops,
    Sampling,
    default_seed,
    gumbel,
    row_seed,
)
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine.step import Step, Update
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.items import Batch, Blob, Decoded, Fetched, ItemError, JobContext, Unit, Work
from pipefleet_workers.settings import WorkerSettings
from tests.parity.harness import load

TASK = "text-generation"
NOISE = [[0.6579013742528709, -0.19364702647829848], [0.031929494639468994, 0.031929494639468994]]
CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "s3://not/a-reference"}]
VOCABULARY = 50


@pytest.fixture(scope="module")
def adapter() -> TextGenerator:
    return TextGenerator(load(TASK))


def job(**fields: Any) -> JobContext:
    known = {"id": "job", "run_id": None, "parameters": {}, "priority": 3, "deadline": None, "sink": Outcomes(range(1))}
    return JobContext(**{**known, **fields})


def grown(stops: RowStops, ids: torch.Tensor, steps: int) -> list[list[bool]]:
    """What `stops` says of each row after each of `steps` new tokens."""
    said = []
    for step in range(1, steps + 1):
        new = torch.full((len(ids), step), 7)
        said.append(stops(torch.cat([ids, new], 1), None).tolist())
    return said


def test_rows_end_at_their_own_number_of_tokens() -> None:
    stops = RowStops([Row(job(), 1), Row(job(), 3), Row(job(), 2)], 4)
    said = grown(stops, torch.zeros(3, 4, dtype=torch.long), 3)
    assert said == [[True, False, False], [True, False, True], [True, True, True]]
    assert stops.ends() == [1, 3, 2]
    assert not stops.stopped


def test_a_stop_string_ends_its_own_rows_and_may_begin_in_the_prompt(adapter: TextGenerator) -> None:
    tokenizer = adapter.pipe.tokenizer
    prompts = [tokenizer(text)["input_ids"] for text in ("say st", "x", "say st")]
    longest = max(map(len, prompts))
    padded = [[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompts]
    new = tokenizer("op")["input_ids"]
    stop, other = (StopStringCriteria(tokenizer, [text]) for text in ("stop", "never"))
    rows = [Row(job(), 99, longest - len(ids), one) for ids, one in zip(prompts, (stop, stop, other), strict=True)]
    stops = RowStops(rows, longest)
    said = stops(torch.tensor([ids + new for ids in padded]), None)
    assert said.tolist() == [True, False, False]
    assert stops.ends() == [len(new), 0, 0]


def test_padding_is_no_part_of_a_stop_string(adapter: TextGenerator) -> None:
    """The padding token reads `<|pad|>`; alone, the row would have nothing before its prompt."""
    tokenizer = adapter.pipe.tokenizer
    stop = StopStringCriteria(tokenizer, ["|>a"])
    (token,) = tokenizer("a")["input_ids"]
    ids = torch.tensor([[tokenizer.pad_token_id, token], [tokenizer.pad_token_id, token]])
    said = RowStops([Row(job(), 9, padding=1, stop=stop), Row(job(), 9, padding=0, stop=stop)], 1)(ids, None)
    assert said.tolist() == [False, True]


def test_a_deadline_or_a_cancel_ends_the_rows_of_its_job_alone() -> None:
    cancelled, late, fine = job(), job(deadline=time.monotonic() + 3600), job()
    stops = RowStops([Row(one, 9) for one in (cancelled, late, fine)], 2)
    ids = torch.zeros(3, 2, dtype=torch.long)
    assert grown(stops, ids, 1) == [[False] * 3]
    cancelled.cancelled, late.deadline = True, time.monotonic() - 1
    assert grown(stops, ids, 2)[1] == [True, True, False]
    assert {index: failure.code for index, (_, failure) in stops.stopped.items()} == {0: "cancelled", 1: "expired"}
    assert {failure.stage for _, failure in stops.stopped.values()} == {"forward"}
    cancelled.cancelled = False
    assert grown(stops, ids, 1)[0][0], "what has ended stays so"


def test_beams_come_in_groups() -> None:
    stopped = job(cancelled=True)
    stops = RowStops([Row(job(), 5), Row(stopped, 5)], 1)
    assert stops(torch.zeros(6, 3, dtype=torch.long), None).tolist() == [False] * 3 + [True] * 3


def drawn(rows: list[Row], scores: torch.Tensor, step: int = 1) -> list[int]:
    chosen = RowSampler(rows, 4)(torch.zeros(len(rows), 4 + step, dtype=torch.long), scores)
    assert ((chosen == 0).sum(1) == 1).all()
    assert (chosen > -torch.inf).sum() == len(rows)
    return [int(token) for token in chosen.argmax(1)]


def sampled(seed: int, **how: Any) -> Row:
    return Row(job(), 9, sampling=Sampling(**how), seed=row_seed(seed, 0))


@pytest.mark.parametrize("how", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.7}])
def test_draws_follow_the_distribution_of_transformers(how: dict[str, Any]) -> None:
    draws = 20_000
    scores = 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3))
    bounded = (scores / how.get("temperature", 1.0))[None]
    if "top_k" in how:
        bounded = TopKLogitsWarper(how["top_k"])(None, bounded)
    if "top_p" in how:
        bounded = TopPLogitsWarper(how["top_p"])(None, bounded)
    wanted = bounded.softmax(-1)[0]
    found = drawn([sampled(seed, **how) for seed in range(draws)], scores.expand(draws, -1))
    counts = torch.bincount(torch.tensor(found), minlength=VOCABULARY)
    assert not counts[wanted == 0].any()
    kept = wanted > 0
    surprise = ((counts[kept] - draws * wanted[kept]) ** 2 / (draws * wanted[kept])).sum()
    freedom = int(kept.sum()) - 1
    assert float(surprise) < freedom + 5 * (2 * freedom) ** 0.5, "a chi-squared value five deviations above its mean"


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    scores = torch.randn(6, 1000, generator=torch.Generator().manual_seed(1)).half().float()  # with ties
    settings = [{}, {"top_k": 3}, {"top_k": 40, "top_p": 0.5}, {"temperature": 3.0}, {"top_p": 0.2}, {"top_k": 40}]
    rows = [sampled(7, **how) for how in settings]
    together = drawn(rows, scores)
    assert together == [drawn([row], scores[index : index + 1])[0] for index, row in enumerate(rows)]
    assert drawn(rows[::-1], scores.flip(0)) == together[::-1]


def test_steps_seeds_and_sequences_draw_anew() -> None:
    flat = torch.zeros(1, 1000)
    assert len({drawn([sampled(1)], flat, step)[0] for step in range(1, 30)}) > 20
    assert len({drawn([sampled(seed)], flat)[0] for seed in range(30)}) > 20
    assert len({row_seed(5, sequence) for sequence in range(10)}) == 10


def test_the_noise_is_the_same_on_every_machine_and_in_every_release() -> None:
    """A change here changes every sampled answer."""
    noise = gumbel(torch.tensor([row_seed(42, 0), row_seed(-1, 3)]), 2, torch.tensor([[0, 31_999], [5, 5]]))
    assert [row == pytest.approx(wanted, abs=1e-12) for row, wanted in zip(noise.tolist(), NOISE, strict=True)] == [
        True,
        True,
    ]


def test_the_default_seed_is_that_of_the_item_in_its_run() -> None:
    def seed(chunk: int = 0, item: str = "a", **context: Any) -> int:
        return default_seed(Work(job(**context), 0, JobItem(item, ""), {}, 1), chunk)

    assert seed(id="1") == seed(id="1") != seed(id="2")
    assert seed(id="1", run_id="run") == seed(id="2", run_id="run"), "a run that is resumed has other jobs"
    assert len({seed(), seed(item="b"), seed(chunk=1)}) == 3


def unit(adapter: TextGenerator, prompt: Any, **parameters: Any) -> Unit:
    work = Work(job(), 0, JobItem("0", prompt), parameters, 1)
    (prepared,) = adapter.prepare([Decoded(work, prompt)])
    if isinstance(prepared, ItemError):
        raise prepared
    return prepared[0]


PARTS = [{"type": "text", "text": "What is "}, {"type": "text", "text": "the capital?"}]


def test_contents_in_parts_are_read_as_the_template_reads_them(adapter: TextGenerator) -> None:
    joined = unit(adapter, [{"role": "user", "content": "What is the capital?"}])
    parts = unit(adapter, [{"role": "user", "content": PARTS}])
    assert torch.equal(joined.features, parts.features)
    assert parts.assembly.context.prompt.messages == [{"role": "user", "content": PARTS}], (
        "the result repeats what came"
    )


def test_a_template_that_knows_no_parts_gets_texts() -> None:
    pipe = load(TASK)
    told = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    pipe.tokenizer.chat_template = told + "{% if add_generation_prompt %}bot:{% endif %}"
    plain = TextGenerator(pipe)
    parts = unit(plain, [{"role": "user", "content": PARTS}])
    assert pipe.tokenizer.decode(parts.features) == "user: What is the capital?\nbot:"


def test_a_begun_answer_in_parts_is_gone_on_with_as_a_text(adapter: TextGenerator) -> None:
    begun = unit(adapter, [CHAT[1], {"role": "assistant", "content": PARTS}])
    plain = unit(adapter, [CHAT[1], {"role": "assistant", "content": "What is the capital?"}])
    assert torch.equal(begun.features, plain.features)
    begun.assembly.outputs[0] = [adapter.pipe.tokenizer("x")["input_ids"]]
    (record,) = adapter.finish(begun.assembly)
    assert record["generated_text"][-1]["content"] == "What is the capital?x"


SHARED = [
    {"max_new_tokens": 4},
    {"max_new_tokens": 400, "seed": 5},
    {"temperature": 0.1, "top_k": 3, "top_p": 0.5, "stop": ["x"]},
    {"max_length": 100, "return_full_text": False, "do_sample": True},
    {"continue_final_message": False},
]
APART: list[dict[str, Any]] = [
    {"do_sample": False},
    {"num_return_sequences": 2},
    {"repetition_penalty": 1.2},
    {"min_new_tokens": 2},
    {"do_sample": False, "num_beams": 2},
    {"do_sample": False, "num_beams": 2, "max_new_tokens": 4},
    {"do_sample": False, "num_beams": 2, "max_new_tokens": 4, "stop": ["x"]},
    {"do_sample": True, "num_beams": 2},
    {"no_repeat_ngram_size": 2},
]


def test_what_is_a_rows_own_shares_a_batch_and_the_rest_does_not(adapter: TextGenerator) -> None:
    first = unit(adapter, "Yes").key
    assert {unit(adapter, "a much longer prompt", **own).key for own in SHARED} == {first}
    assert unit(adapter, CHAT).key == first
    apart = [unit(adapter, "Yes", **own).key for own in APART]
    assert len({first, *apart}) == 1 + len(APART)
    unequal = [unit(adapter, text, no_repeat_ngram_size=2).key for text in ("Yes", "No, never")]
    assert unequal[0] != unequal[1]


def test_a_repetition_penalty_does_not_hear_padding() -> None:
    """transformers' own lowers the score of the padding's token, in shorter rows of a batch alone."""
    rows = [Row(job(), 5, padding=2), Row(job(), 5)]
    ids, scores = torch.tensor([[3, 3, 1, 2], [4, 5, 1, 2]]), torch.ones(2, 6)
    lowered = RowPenalty(2.0, rows)(ids, scores)
    assert lowered.tolist() == [[1, 0.5, 0.5, 1, 1, 1], [1, 0.5, 0.5, 1, 0.5, 0.5]]
    alone = RowPenalty(2.0, [Row(job(), 5)])(ids[:1, 2:], scores[:1])
    assert torch.equal(lowered[:1], alone)
    beams = RowPenalty(2.0, rows)(ids.repeat_interleave(3, 0), torch.ones(6, 6))
    assert torch.equal(beams, lowered.repeat_interleave(3, 0))


def test_a_token_beyond_the_vocabulary_is_refused_before_it_reaches_a_device(adapter: TextGenerator) -> None:
    size = adapter.pipe.model.config.vocab_size
    for parameters in ({"pad_token_id": size}, {"bad_words_ids": [[1, size]]}, {"sequence_bias": [[[size], 1.0]]}):
        with pytest.raises(ItemError, match="holds the token"):
            unit(adapter, "Yes", **parameters)
    assert unit(adapter, "Yes", eos_token_id=-1).assembly.context.plan.ends == {-1}


def test_the_cost_counts_what_is_read_and_what_may_be_written(adapter: TextGenerator) -> None:
    tokens = len(adapter.pipe.tokenizer("The quick brown")["input_ids"])
    assert unit(adapter, "The quick brown", max_new_tokens=10).length == tokens + 10
    assert unit(adapter, "The quick brown", max_length=90).length == 90
    assert unit(adapter, "The quick brown", max_new_tokens=10, num_return_sequences=3).length == 3 * (tokens + 10)
    assert unit(adapter, "The quick brown", max_new_tokens=10, num_beams=4).length == 4 * (tokens + 10)


@pytest.mark.parametrize("parameters", [{"early_stopping": "soon"}, {"max_new_tokens": 0}])
def test_what_generate_refuses_is_the_items_failure(adapter: TextGenerator, parameters: dict[str, Any]) -> None:
    with pytest.raises(ItemError, match=next(iter(parameters))) as caught:
        unit(adapter, "Yes", **parameters)
    assert caught.value.failure.code == "bad_parameter"


ACCEPTED = {"stop": ["\n", "###"], "seed": -3, "early_stopping": "never", "num_return_sequences": 4, "max_length": 10}
REFUSED: list[dict[str, Any]] = [
    {"stop": "x"}, {"stop": ["x"] * 17}, {"seed": 2**63}, {"seed": True}, {"num_return_sequences": 0}, {"early_stopping": "soon"},
    {"custom_generate": "/x"}, {"generate_kwargs": {}}, {"return_tensors": "pt"}, {"stop_strings": ["x"] * 17}, {"tools": []},
]  # fmt: skip


def test_the_row_lets_through_what_it_names_within_bounds() -> None:
    task_spec(TASK).check(ACCEPTED)
    for parameters in REFUSED:
        with pytest.raises(ParameterError):
            task_spec(TASK).check(parameters)


def decoded(value: Any) -> Any:
    work = Work(job(), 0, JobItem("0", None), {}, 1)
    return Decoder(task_spec(TASK), WorkerSettings(), sampling_rate=None).decode(Fetched(work, value)).value


def test_a_chat_is_decoded_message_by_message() -> None:
    blob = Blob("s3://bucket/long.txt", b"a long question", "text/plain")
    assert decoded(CHAT) == CHAT
    assert decoded("text") == "text"
    assert decoded(blob) == "a long question"
    assert decoded([{"role": "user", "content": blob}]) == [{"role": "user", "content": "a long question"}]


@pytest.mark.parametrize(
    "value",
    [[], ["text"], [{"role": "user"}], [{"role": "user", "content": 5}], [[CHAT[0]]], {"role": "user", "content": "x"},
     [{"role": "user", "content": [{"type": "image", "url": "http://host/x"}]}], [{**CHAT[0], "tool_calls": []}], 5],
)  # fmt: skip
def test_what_is_no_chat_is_refused_by_producer_and_worker(value: Any, store: ObjectStore, prefix: str) -> None:
    with pytest.raises(ItemError) as caught:
        decoded(value)
    assert caught.value.failure.code == "bad_input"
    with pytest.raises(InputError, match="text-generation takes"):
        InputPreparer(TASKS[TASK], store, prefix, inline_bytes=100).prepare(value)


def test_a_chat_travels_whole_and_long_contents_go_to_the_store(store: ObjectStore, prefix: str) -> None:
    preparer = InputPreparer(TASKS[TASK], store, prefix, inline_bytes=100)
    assert preparer.prepare(CHAT) == preparer.prepare(tuple(CHAT)) == CHAT
    assert preparer.spill(CHAT) == CHAT
    long = [*CHAT, {"role": "assistant", "content": "word " * 100}]
    spilled = preparer.spill(preparer.prepare(long))
    assert spilled[:2] == CHAT
    assert is_ref(spilled[2]["content"])
    assert is_ref(preparer.prepare("s3://bucket/prompt.txt"))


class _Client:
    """Notes what is submitted; every result is the input itself."""

    def __init__(self) -> None:
        self.submitted: list[Any] = []
        self.settings = type("Settings", (), {"in_flight": 4})

    def submit_patiently(self, patience: Any, task: str, inputs: Any, **_: Any) -> Any:
        self.submitted.append(inputs)
        return type("Done", (), {"result": lambda *_: inputs, "cancel": lambda _: None, "warnings": []})()


@pytest.mark.parametrize(
    ("inputs", "submitted"),
    [
        (CHAT, [CHAT]),
        (tuple(CHAT), [tuple(CHAT)]),
        ([CHAT, CHAT[1:]], [CHAT, CHAT[1:]]),
        (["one", CHAT], ["one", CHAT]),
        (["one", "two"], ["one", "two"]),
        ("one", ["one"]),
        ([], []),
    ],
)
def test_a_list_that_begins_with_a_message_is_one_input(inputs: Any, submitted: list[Any]) -> None:
    client = _Client()
    pipe = FleetPipeline(client, task_spec(TASK), model=None, revision=None)  # type: ignore[arg-type]
    result = pipe(inputs)
    assert client.submitted == submitted
    assert result == (submitted[0] if inputs and (isinstance(inputs, str) or inputs[0] is CHAT[0]) else submitted)


class Converted(torch.Tensor):
    """Counts the numbers that become Python's."""

    numbers = 0

    def tolist(self) -> Any:
        Converted.numbers += self.numel()
        return super().tolist()


def written(
    adapter: TextGenerator, units: list[Unit], new: list[list[int]]
) -> tuple[list[Any], list[tuple[int, int, Any]]]:
    """The outputs of a batch whose rows write `new`, and what was handed on before its end: step, unit, sequences."""
    early: list[tuple[int, int, Any]] = []
    step = 0

    def generate(inputs: dict[str, torch.Tensor], stopping_criteria: Any, **_: Any) -> torch.Tensor:
        nonlocal step
        whole = torch.cat([inputs["input_ids"], torch.tensor(new)], dim=1).as_subclass(Converted)  # type: ignore[type-var]
        for step in range(1, len(new[0]) + 1):
            stopping_criteria[0](whole[:, : inputs["input_ids"].shape[1] + step], None)
        return whole

    def note(update: Update) -> None:
        early.extend((step, units.index(one), output) for one, output in update.ended)

    progress = Step(Batch("key", units), lambda: None, note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "_generate", generate)
        return adapter.run(adapter.collate(units), units, progress), early


def test_looking_for_rows_that_have_ended_reads_each_token_once(adapter: TextGenerator) -> None:
    rows, steps = 8, 512
    units = [unit(adapter, "Yes", max_new_tokens=steps) for _ in range(rows)]
    Converted.numbers = 0
    outputs, early = written(adapter, units, [[7] * steps for _ in range(rows)])
    assert [len(one) for (one,) in outputs] == [steps] * rows
    assert [(at, index) for at, index, _ in early] == [(steps, index) for index in range(rows)]
    assert Converted.numbers < 4 * rows * steps, "it grows with the square of the steps"


@pytest.mark.parametrize("copies", [1, 3])
def test_what_is_handed_on_early_is_what_is_handed_on_at_the_end(adapter: TextGenerator, copies: int) -> None:
    """Rows that end by their own bound, by a token that ends them, in either order, or not at all."""
    source, steps = torch.Generator().manual_seed(copies), 64
    (end,) = unit(adapter, "Yes").assembly.context.plan.ends
    bounds = [5, 40, 64, 64, 17, 64]
    units = [unit(adapter, "Yes", max_new_tokens=bound, num_return_sequences=copies) for bound in bounds]
    new = torch.randint(10, 50, (len(units) * copies, steps), generator=source)
    ends = torch.randint(0, 2 * steps, (len(new),), generator=source).tolist()
    for row, at in enumerate(ends):
        new[row, at:] = end
    outputs, early = written(adapter, units, new.tolist())
    assert early
    for at, index, output in early:
        assert output == outputs[index]
        own = range(index * copies, (index + 1) * copies)
        length = max(min(bounds[index], ends[row] + 1) for row in own)
        assert at == -(-length // 8) * 8, "at the first look after its last row has ended"
    late = {index for index in range(len(units))} - {index for _, index, _ in early}
    assert not [index for index in late if bounds[index] <= steps - 8]
