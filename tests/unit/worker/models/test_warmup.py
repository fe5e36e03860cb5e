"""The warm-up: a model for which padding is not exact gets equal shapes, and a budget is always found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipefleet.tasks import TASKS
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.adapters.text.encoder import TextClassifier
from pipefleet_workers.items import Unit
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
