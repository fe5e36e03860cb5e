"""Table questions for a model that writes its answers, whose tokenizer makes a text of a table (TAPEX)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pandas
import pytest
import transformers

from pipefleet_workers.adapters.table import RUNTIME
from tests.checkpoints import cached
from tests.parity.harness import Call, Running, assert_same, recording, running

TASK = "table-question-answering"
TABLE = {"actors": ["brad pitt", "leo"], "age": ["56", "45"]}
BEAMS = {"num_beams": 3, "max_new_tokens": 4}
CALLS: list[tuple[Any, dict[str, Any]]] = [
    ("how old is leo?", {"max_new_tokens": 5}),
    (["how old", "who is it by the way?"], {"max_new_tokens": 5}),
    ("how", BEAMS),
    ("how", {**BEAMS, "num_return_sequences": 2}),
    (["a b", "how are you"], {**BEAMS, "num_return_sequences": 2}),
    (["a b", "how are you"], {"sequential": True, "max_new_tokens": 4}),
    ("how", {"do_sample": True, "top_k": 1, "max_new_tokens": 4}),
]


@pytest.fixture(scope="module")
def pipe() -> Any:
    """BART with a stand-in for the tokenizer of TAPEX, which transformers 5 has no longer."""
    found = transformers.pipeline(TASK, model=str(cached("summarization:bart")), device="cpu", dtype="float32")
    found.model.eval()
    plain = type(found.tokenizer)

    def call(self: Any, table: Any = None, query: Any = None, **arguments: Any) -> Any:
        if not isinstance(table, pandas.DataFrame):
            return plain.__call__(self, table, query, **arguments)
        rows = [f"row {row} : {' | '.join(cells)}" for row, cells in enumerate(table.values.tolist(), 1)]
        flat = f"col : {' | '.join(table.columns)} {' '.join(rows)}"
        queries = query if isinstance(query, list) else [query]
        return plain.__call__(self, [f"{one} {flat}" for one in queries], **arguments)

    found.tokenizer.__class__ = type(plain.__name__, (plain,), {"__call__": call})
    return found


@pytest.fixture
def engine(pipe: Any) -> Iterator[Running]:
    with running(recording(RUNTIME[TASK].adapter, pipe), TASK) as one:
        yield one


def test_answers_that_are_written_are_those_of_transformers(engine: Running, pipe: Any) -> None:
    outcomes = engine.run([Call({"table": TABLE, "query": query}, asked) for query, asked in CALLS])
    for (query, asked), outcome in zip(CALLS, outcomes, strict=True):
        written = copy.copy(pipe)
        written._generate_kwargs = {name: one for name, one in asked.items() if name != "sequential"}
        assert outcome.failure is None, outcome.failure
        assert_same(outcome.output, written({"table": pandas.DataFrame(TABLE), "query": query}))
