"""Encoder-decoders, tables and decisions beyond what parity shows: languages, bounds, rows of their own, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pandas
import pytest

from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.items import ItemError, Outcome
from tests.parity.harness import Call, Running, load, recording, running

TEXT, SUMMARY, TRANSLATION = "text2text-generation", "summarization:bart", "translation:nllb"
TABLE, DECISION = "table-question-answering", "decision"
FRENCH = {"src_lang": "eng_Latn", "tgt_lang": "fra_Latn", "num_beams": 1, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {key: load(key) for key in (TEXT, SUMMARY, TRANSLATION, TABLE, DECISION)}


@pytest.fixture
def engine(request: pytest.FixtureRequest, pipes: dict[str, Any]) -> Iterator[Running]:
    task = request.param.partition(":")[0]
    with running(recording(RUNTIME[task].adapter, pipes[request.param]), task) as one:
        yield one


def on(key: str) -> Any:
    return pytest.mark.parametrize("engine", [key], indirect=True, ids=[key])


def refused(outcome: Outcome) -> tuple[str, str]:
    assert outcome.failure is not None, f"expected a failure, not {outcome.output}"
    return outcome.failure.code, outcome.failure.message


@on(TRANSLATION)
def test_a_language_that_the_tokenizer_does_not_know_is_refused(engine: Running) -> None:
    unknown, source, missing, good = engine.run(
        [
            Call("ok", {**FRENCH, "tgt_lang": "fr"}),
            Call("ok", {**FRENCH, "src_lang": "</s>"}),
            Call("ok", {"num_beams": 1}),
            Call("ok", FRENCH),
        ]
    )
    assert refused(unknown)[0] == refused(source)[0] == "bad_parameter"
    assert "no language 'fr', but eng_Latn, fra_Latn" in refused(unknown)[1]
    assert "requires a `src_lang` and a `tgt_lang`" in refused(missing)[1]
    assert good.failure is None


@on(TRANSLATION)
def test_texts_for_one_language_share_a_batch_and_texts_for_two_do_not(engine: Running) -> None:
    target = [FRENCH, {**FRENCH, "tgt_lang": "deu_Latn"}, {**FRENCH, "src_lang": "deu_Latn"}]
    engine.run_together([Call(f"text number {index}", target[index % 3]) for index in range(9)])
    languages = [{unit.assembly.context.arguments.forward["forced_bos_token_id"] for unit in batch.units}
                 for batch in engine.adapter.batches]  # fmt: skip
    assert all(len(one) == 1 for one in languages)
    assert max(len(batch.units) for batch in engine.adapter.batches) >= 6, "another source is no other batch"


@on(TEXT)
def test_a_sampled_text_depends_on_its_seed_and_never_on_its_neighbours(engine: Running) -> None:
    sampled = {"do_sample": True, "num_beams": 1, "temperature": 2.0}
    calls = [
        Call("The house is wonderful.", {**sampled, "seed": 1, "max_new_tokens": 9}),
        Call("ok", {**sampled, "seed": 1, "max_new_tokens": 20}),
        Call("The house is wonderful.", {**sampled, "seed": 2, "max_new_tokens": 12, "top_k": 50}),
        Call("A much longer text, which is about ships and the sea.", {**sampled, "seed": 3, "num_return_sequences": 2,
                                                                       "max_new_tokens": 5}),
    ]  # fmt: skip
    alone = [engine.run([call])[0].output for call in calls]
    engine.adapter.batches.clear()
    assert [one.output for one in engine.run_together(calls)] == alone
    assert max(len(batch.units) for batch in engine.adapter.batches) == 3, "all that want one sequence"
    assert alone[0] != alone[2]
    assert [len(one) for one in alone] == [1, 1, 1, 2]


@on(SUMMARY)
def test_a_text_beyond_the_positions_is_refused_and_a_bound_beyond_them_is_lowered(engine: Running) -> None:
    long, cut, bound = engine.run(
        [
            Call("sea " * 300, {"max_new_tokens": 2}),
            Call("sea " * 300, {"max_new_tokens": 2, "truncation": True}),
            Call("sea", {"max_new_tokens": 32_768, "num_beams": 1, "min_new_tokens": 126}),
        ]
    )
    assert refused(long)[0] == "too_long"
    assert "pass truncation=true" in refused(long)[1]
    assert cut.failure is None
    assert bound.failure is None, "a step behind the table of positions would break a GPU"


def test_parameters_of_the_task_give_way_to_those_of_the_call(pipes: dict[str, Any]) -> None:
    pipe = load("summarization")
    adapter = RUNTIME["summarization"].adapter(pipe)
    trained = adapter.parse({}).forward
    assert (trained["max_length"], trained["min_length"], trained["num_beams"]) == (40, 4, 2)
    assert adapter.parse({}).preprocess == {"prefix": "summarize: "}
    own = adapter.parse({"max_new_tokens": 5, "num_beams": 3}).forward
    assert "max_length" not in own
    assert (own["max_new_tokens"], own["num_beams"], own["min_length"]) == (5, 3, 4)


@on(TABLE)
def test_questions_about_one_table_are_units_of_their_own_unless_they_follow_one_another(engine: Running) -> None:
    table = {"Player": ["ada", "bob"], "Goals": ["3", "4"]}
    asked = {"table": table, "query": ["Who?", "How many goals?"]}
    together, sequence, single = engine.run(
        [Call(asked), Call(asked, {"sequential": True}), Call({**asked, "query": "Who?"}, {"sequential": True})]
    )
    assert len(together.output) == len(sequence.output) == 2
    assert single.output == together.output[0] == sequence.output[0]


@on(TABLE)
def test_an_empty_question_fails_alone(engine: Running) -> None:
    table = {"Player": ["ada"]}
    empty, good = engine.run([Call({"table": table, "query": ""}), Call({"table": table, "query": "Who?"})])
    assert "query is empty" in refused(empty)[1]
    assert good.failure is None


def test_a_table_is_refused_when_the_model_has_no_positions_for_it(pipes: dict[str, Any]) -> None:
    adapter = RUNTIME[TABLE].adapter(pipes[TABLE])
    table = pandas.DataFrame({"a": ["the sea was wide"] * 200}, dtype=str)
    with pytest.raises(ItemError, match="the model takes 256; pass truncation=true"):
        adapter._prepare(_decoded({"table": table, "query": "Who?"}, {"truncation": "do_not_truncate"}))


@on(DECISION)
def test_a_request_may_hold_nothing_that_would_be_opened(engine: Running) -> None:
    request = {"state": "It is late.", "questions": {"late": {"type": "noul", "instructions": "Is it late?"}}}
    assets, text, wrong, good = engine.run(
        [
            Call(json.dumps({**request, "assets": {"x": "/etc/passwd"}})),
            Call("It is late."),
            Call({**request, "questions": {"late": {"type": "none"}}}),
            Call(json.dumps(request)),
        ]
    )
    assert refused(assets) == ("bad_input", "a request has a state and questions, and nothing else")
    assert refused(text)[0] == refused(wrong)[0] == "bad_input"
    assert 0.0 < good.output["late"]["noul"] < 1.0


def test_the_tokens_of_decisions_are_there_before_threads_take_their_copies() -> None:
    pipe = load(DECISION)
    before = len(pipe.tokenizer)
    adapter = RUNTIME[DECISION].adapter(pipe)
    assert len(pipe.tokenizer) == len(adapter.copies.get().tokenizer) == before + 2


def _decoded(value: Any, parameters: dict[str, Any]) -> Any:
    from pipefleet.contract.messages import JobItem
    from pipefleet_workers.items import Decoded, JobContext, Work

    context = JobContext("test", None, parameters, 3, None, None)  # type: ignore[arg-type]
    return Decoded(Work(context, 0, JobItem("0", ""), parameters, 0), value)
