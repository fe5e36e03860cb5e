"""`compile = true`: few lengths, the same results, everything compiled beforehand; and the model as it was where that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipefleet.errors import FleetFileError, UsageError
from pipefleet.fleet.file import parse_fleet
from pipefleet.fleet.pools import Pool
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.adapters.text.buckets import SHORTEST, rounded_length
from pipefleet_workers.adapters.text.encoder import TextClassifier
from pipefleet_workers.items import Unit
from pipefleet_workers.models.compiled import compile_forward, require_compilable
from tests.checkpoints.media import image
from tests.parity.harness import Call, assert_same, load, recording, running

TASK = "text-classification"
POOL = Pool("texts", TASK, "/model", compile=True)
TEXTS = [f"text {index} {'word ' * (3 * index % 29)}" for index in range(12)]
LABELS = {"candidate_labels": ["sea", "tree"]}
ENCODERS = {
    "text-classification": [Call(text) for text in TEXTS],
    "feature-extraction": [Call(text, {"pooling": "mean"} if index % 2 else {}) for index, text in enumerate(TEXTS)],
    "token-classification": [Call(text) for text in TEXTS],
    "zero-shot-classification": [Call(text, LABELS) for text in TEXTS],
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def traced(graphs: list[str]) -> Callable[..., Any]:
    """A backend that runs what torch has traced, and notes that it was asked to."""

    def backend(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(module.graph.python_code("self").src)
        return module.forward

    return backend


@given(length=st.integers(1, 5000), bound=st.none() | st.integers(1, 5000))
def test_lengths_are_rounded_up_a_little_and_never_beyond_the_bound(length: int, bound: int | None) -> None:
    rounded = rounded_length(length, bound)
    assert length <= rounded <= max(SHORTEST, length + length // 2)
    assert bound is None or rounded <= max(length, bound)
    assert rounded_length(rounded, bound) == rounded


def test_there_are_few_lengths() -> None:
    assert len({rounded_length(length) for length in range(1, 1025)}) == 13


@pytest.mark.parametrize("task", sorted(ENCODERS))
def test_padding_to_a_rounded_length_changes_no_result(task: str) -> None:
    pipe = load(task)
    adapter = recording(RUNTIME[task].adapter, pipe)
    adapter.rounds_lengths = True
    plain = recording(RUNTIME[task].adapter, pipe)
    calls = ENCODERS[task]
    with running(adapter, task) as engine:
        rounded = engine.run_together(calls)
    with running(plain, task) as engine:
        alone = [engine.run([call])[0] for call in calls]
    assert [one.failure for one in rounded] == [None] * len(calls)
    assert_same([one.output for one in rounded], [one.output for one in alone])


def test_a_compiled_model_gives_the_same_and_compiles_nothing_during_jobs() -> None:
    pipe, graphs = load(TASK), []
    wanted = [pipe(text) for text in TEXTS]
    adapter = recording(TextClassifier, pipe)
    assert compile_forward(adapter, POOL, {}, max_cost=128, backend=traced(graphs))
    assert adapter.rounds_lengths
    compiled = len(graphs)
    assert compiled > 0
    shapes: set[tuple[int, ...]] = set()
    collate = adapter.collate

    def noted(units: Sequence[Unit]) -> dict[str, Any]:
        inputs: dict[str, Any] = collate(units)
        shapes.add(tuple(inputs["input_ids"].shape))
        return inputs

    adapter.collate = noted
    with running(adapter, TASK) as engine:
        outcomes = [*engine.run_together([Call(text) for text in TEXTS]), *engine.run([Call(TEXTS[4])])]
    assert_same([one.output for one in outcomes], [*wanted, wanted[4]])
    assert {length for _, length in shapes} <= {rounded_length(length) for length in range(1, 128)}
    assert len(graphs) == compiled, "a job had to wait for the compiler"


def test_pictures_are_compiled_with_any_number_in_a_batch() -> None:
    pipe, graphs = load("image-classification"), []
    adapter = recording(Adapter, pipe)
    pictures = [image(40, 30, seed) for seed in range(5)]
    wanted = [pipe(picture) for picture in pictures]
    pool = Pool("pictures", "image-classification", "/model", compile=True)
    assert compile_forward(adapter, pool, {}, max_cost=1 << 20, backend=traced(graphs))
    compiled = len(graphs)
    with running(adapter, "image-classification") as engine:
        outcomes = engine.run_together([Call(picture) for picture in pictures])
    assert_same([one.output for one in outcomes], wanted)
    assert len(graphs) == compiled > 0


def test_a_compiler_that_fails_leaves_the_model_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    def broken(module: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler is installed")

    pipe = load(TASK)
    adapter, wanted = TextClassifier(pipe), pipe(TEXTS[5])
    with caplog.at_level(logging.WARNING):
        assert not compile_forward(adapter, POOL, {}, max_cost=128, backend=broken)
    assert "no C++ compiler is installed" in caplog.text
    assert not adapter.rounds_lengths
    assert_same(pipe(TEXTS[5]), wanted)


def test_a_compiler_that_computes_something_else_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    def wrong(module: Any, inputs: Any) -> Any:
        return lambda *values: tuple(
            one + 0.01 if isinstance(one, torch.Tensor) and one.is_floating_point() else one
            for one in module.forward(*values)
        )

    pipe = load(TASK)
    adapter, wanted = TextClassifier(pipe), pipe(TEXTS[5])
    with caplog.at_level(logging.WARNING):
        assert not compile_forward(adapter, POOL, {}, max_cost=128, backend=wrong)
    assert "results differ" in caplog.text
    assert_same(pipe(TEXTS[5]), wanted)


def test_a_model_that_hears_padding_is_compiled_without_rounded_lengths() -> None:
    class Careless(TextClassifier):
        def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
            inputs["attention_mask"][:] = 1
            return super().run(inputs, units, progress)

    adapter = Careless(load(TASK))
    assert compile_forward(adapter, POOL, {}, max_cost=64, backend=traced([]))
    assert not adapter.rounds_lengths


def test_what_cannot_be_compiled_is_refused_by_name() -> None:
    writer = RUNTIME["text-generation"].adapter(load("text-generation"))
    with pytest.raises(UsageError, match=r"pool letters: compile = true .* writes step by step"):
        require_compilable(Pool("letters", "text-generation", "/model", compile=True), writer)
    classifier = TextClassifier(load(TASK))
    with pytest.raises(UsageError, match="device_map"):
        require_compilable(Pool("texts", TASK, "/model", compile=True, device_map="auto"), classifier)


def test_the_fleet_file_takes_it_as_true_or_false(tmp_path: Path) -> None:
    table = {"task": TASK, "model": str(tmp_path)}
    pools = {"a": {**table, "compile": True, "default": True}, "b": table}
    fleet = parse_fleet({"pools": pools}, base=tmp_path)
    assert [fleet.pools[name].compile for name in "ab"] == [True, False]
    with pytest.raises(FleetFileError, match="compile must be true or false"):
        parse_fleet({"pools": {"a": {**table, "compile": "yes"}}}, base=tmp_path)
