"""How a written text is shown, as a number of transformers' ReturnType or by its own parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.pipelines import any_to_any, image_text_to_text, text_generation

from pipefleet.errors import ParameterError
from pipefleet.pipelines.fleet_pipeline import FleetPipeline
from pipefleet.tasks import TASKS, task_spec
from pipefleet.tasks.parameters import called_parameters
from pipefleet_workers.adapters.table import RUNTIME
from tests.parity.harness import Call, load, recording, running

KINDS = {"text-generation": text_generation, "image-text-to-text": image_text_to_text, "any-to-any": any_to_any}
BEAMS = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}


@pytest.mark.parametrize("task", KINDS)
def test_a_return_type_shows_what_it_shows_in_transformers(task: str) -> None:
    pipe, chat = load(task), task != "text-generation"
    given = {"generate_kwargs": BEAMS} if chat else BEAMS
    with running(recording(RUNTIME[task].adapter, pipe), task) as engine:
        outcomes = engine.run([Call("one", {**given, "return_type": kind}) for kind in range(3)])
    for kind, outcome in zip(KINDS[task].ReturnType, outcomes, strict=True):
        own = {"generate_kwargs": dict(BEAMS)} if chat else BEAMS
        wanted = pipe(**{"text" if chat else "text_inputs": "one"}, **own, return_type=kind)
        assert outcome.failure is None, outcome.failure
        assert outcome.output == lists(wanted), kind


def lists(records: Any) -> Any:
    return [
        {name: one.tolist() if isinstance(one, torch.Tensor) else one for name, one in record.items()}
        for record in records
    ]


def test_tokens_that_a_return_type_asks_for_are_a_tensor() -> None:
    pipe = FleetPipeline(None, task_spec("image-text-to-text"), model=None, revision=None)  # type: ignore[arg-type]
    for kind in (image_text_to_text.ReturnType.TENSORS, 0):
        (record,) = pipe._restored([{"input_text": "x", "generated_token_ids": [3]}], {"return_type": kind})
        assert torch.equal(record["generated_token_ids"], torch.tensor([3]))


TENSORS = sorted(name for name, spec in TASKS.items() if "return_tensors" in spec.parameters)


@pytest.mark.parametrize("task", TENSORS)
def test_the_name_of_a_library_asks_for_tensors(task: str) -> None:
    spec = task_spec(task)
    for name in ("pt", "np"):
        assert called_parameters(spec, {"return_tensors": name}) == {"return_tensors": True}
    with pytest.raises(ParameterError, match="true or false"):
        called_parameters(spec, {"return_tensors": "tp"})
    with pytest.raises(ParameterError, match="takes no parameter"):
        called_parameters(task_spec("fill-mask"), {"return_tensors": "pt"})


def test_features_named_pt_are_a_tensor() -> None:
    pipe = FleetPipeline(None, task_spec("feature-extraction"), model=None, revision=None)  # type: ignore[arg-type]
    assert torch.equal(pipe._restored([[[0.5]]], {"return_tensors": "pt"}), torch.tensor([[[0.5]]]))
