"""The warm-up: a model for which padding is not exact gets equal shapes, and a budget is always found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from transformers import GenerationMixin

from pipefleet.contract.records import JobFailure
from pipefleet.tasks import TASKS
from pipefleet_workers.adapters.progress import UNOBSERVED, Progress
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.adapters.text.encoder import TextClassifier
from pipefleet_workers.items import Unit
from pipefleet_workers.models import warmup
from pipefleet_workers.models.steps import TIMED_STEPS, seconds_to_write
from pipefleet_workers.models.warmup import example_units, warm_up
from pipefleet_workers.observe.service_fit import ServiceFit
from tests.parity.harness import load

TASK = "text-classification"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load(TASK)


def test_an_encoder_with_a_mask_is_padded_and_measured(pipe: Any) -> None:
    adapter, fit = TextClassifier(pipe), ServiceFit()
    found = warm_up(adapter, TASKS[TASK], {}, fit, 2048)
    assert found.pads
    assert found.difference <= found.tolerance
    assert found.max_cost >= 1024
    assert fit.current() is not None
    assert "padded" in found.describe()


def test_a_model_that_hears_its_neighbours_gets_equal_lengths(pipe: Any) -> None:
    class Careless(TextClassifier):
        """Forgets the attention mask, as models without one do."""

        def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
            inputs["attention_mask"][:] = 1
            return super().run(inputs, units, progress)

    adapter = Careless(pipe)
    found = warm_up(adapter, TASKS[TASK], {}, ServiceFit(), 2048)
    assert not found.pads
    assert found.difference > found.tolerance
    assert "equal shapes only" in found.describe()
    short, long = (example_units(adapter, TASKS[TASK], {}, size)[0] for size in (5, 60))
    assert short.key != long.key


def test_a_model_that_fails_on_examples_still_gets_a_budget(pipe: Any) -> None:
    class Picky(TextClassifier):
        def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
            raise RuntimeError("not these")

    found = warm_up(Picky(pipe), TASKS[TASK], {}, ServiceFit(), 512)
    assert not found.pads
    assert found.max_cost == 512


@pytest.mark.parametrize("task", sorted(RUNTIME))
def test_every_task_has_examples(task: str) -> None:
    checkpoint = "automatic-speech-recognition:whisper" if task == "automatic-speech-recognition" else task
    adapter = RUNTIME[task].adapter(load(checkpoint))
    units = example_units(adapter, TASKS[task], dict(RUNTIME[task].example_parameters), 20)
    assert units
    numbers = adapter.numbers(units) if adapter.pads else []
    assert all(np.isfinite(one).all() for one in numbers)


def test_no_part_of_a_fit_is_negative() -> None:
    for slope in (0.1, 1 / 3, 0.7, 1e-7):
        fit = ServiceFit()
        for cost in range(1, 400):
            fit.add(cost, slope * cost)  # no base at all: rounding decides its sign
            found = fit.current()
            assert found is not None
            assert min(found.base, found.per_cost) >= 0.0


WRITERS = (
    "automatic-speech-recognition:whisper",
    "summarization",
    "translation",
    "text2text-generation",
    "image-to-text",
)


@pytest.mark.parametrize("checkpoint", WRITERS)
def test_a_model_that_writes_is_measured_with_as_many_steps_as_its_answers_take(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, pipe = checkpoint.partition(":")[0], load(checkpoint)
    adapter, fit, calls = RUNTIME[task].adapter(pipe), ServiceFit(), list[Counter[int]]()

    def counted(adapter: Any, units: Sequence[Unit]) -> float:
        calls.append(Counter())
        return seconds_to_write(adapter, units)

    def count(part: Any, _: Any) -> None:
        if calls:
            calls[-1][id(part)] += 1

    monkeypatch.setattr(warmup, "seconds_to_write", counted)
    writers = [part for part in pipe.model.modules() if isinstance(part, GenerationMixin)]
    hooks = [part.register_forward_pre_hook(count) for part in writers]
    found = warm_up(adapter, TASKS[task], {}, fit, default := RUNTIME[task].sizing.cpu_cost)
    for hook in hooks:
        hook.remove()
    forwards = [max(call.values()) for call in calls]
    assert fit.current() is not None
    assert default // 2 <= found.max_cost <= 4 * default
    assert len(forwards) >= 3
    assert set(forwards) == {TIMED_STEPS}, "no made-up input ends early, and no call takes more steps than are timed"
    (unit,) = example_units(adapter, TASKS[task], {}, 20)
    (output,) = adapter.split(adapter.run(adapter.collate([unit]), [unit], UNOBSERVED), [unit])
    assert not isinstance(output, JobFailure), "the measurement leaves nothing behind"


def test_larger_batches_than_a_cpu_can_measure_are_foreseen(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    costs: list[int] = []

    def timed(adapter: Any, units: Sequence[Unit]) -> float:
        costs.append(sum(unit.cost for unit in units))
        return 60.0 + 1.0 * len(units)

    monkeypatch.setattr(warmup, "_timed", timed)
    found = warm_up(TextClassifier(pipe), TASKS[TASK], {}, ServiceFit(), default := 512)
    one = costs[0]
    assert max(costs) == one * 2, "what would end too late is not measured"
    assert found.max_cost == max(one << doublings for doublings in range(20) if one << doublings <= 4 * default)
