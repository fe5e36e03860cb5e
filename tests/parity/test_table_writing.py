"""A model that writes the answer to a question about a table (TAPEX): what generate() is asked for, and what shares a call."""

from __future__ import annotations

from typing import Any

import pandas
import pytest
import torch
import transformers

from pipefleet_workers.adapters.text.table_question_answering import TableReader
from tests.checkpoints import cached
from tests.parity.harness import Call, recording, running

TASK = "table-question-answering"
INPUTS = ["input_ids", "attention_mask"]
QUESTIONS = [
    {"table": {"name": ["a", "b"], "goals": ["1", "2"]}, "query": "Which club?"},
    {"table": {"name": ["a", "b", "c"], "goals": ["1", "2", "5"]}, "query": "What is the sum of goals of all?"},
    {"table": {"name": ["x", "y"], "goals": ["3", "4"]}, "query": "Which club?"},
]
"""The first and the last are of one length."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Transformers 5 has no tokenizer of TAPEX, so this one has that of TAPAS."""
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(cached(TASK))
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 256}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    config = transformers.BartConfig(vocab_size=len(tokenizer), forced_eos_token_id=None, **sizes, **tokens)
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(config).eval()
    found = transformers.pipeline(TASK, model=model, tokenizer=tokenizer, device="cpu")
    found.tokenizer.model_input_names = INPUTS
    return found


def by_hand(pipe: Any, question: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    encoded = pipe.preprocess({**question, "table": pandas.DataFrame(question["table"])})
    written = pipe.model.generate(**{name: encoded[name] for name in INPUTS}, **asked)
    return [pipe.tokenizer.decode(one, skip_special_tokens=True).strip() for one in written]


@pytest.mark.parametrize(
    "asked",
    [
        {"max_new_tokens": 5},
        {"max_new_tokens": 5, "num_beams": 2},
        {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2},
    ],
)
def test_answers_with_beams_are_those_of_generate_alone_and_in_one_call(pipe: Any, asked: dict[str, Any]) -> None:
    adapter = recording(TableReader, pipe)
    with running(adapter, TASK) as engine:
        outcomes = engine.run_together([Call(one, asked) for one in QUESTIONS])
    assert [one.failure for one in outcomes] == [None] * len(QUESTIONS)
    for outcome, question in zip(outcomes, QUESTIONS, strict=True):
        answers = outcome.output if isinstance(outcome.output, list) else [outcome.output]
        assert [one["answer"] for one in answers] == by_hand(pipe, question, asked)
    assert max(len(batch.units) for batch in adapter.batches) == 2
