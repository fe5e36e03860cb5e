"""What older transformers lack: a method for the arguments of generate(), some tasks, image processors at the top."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig

from pipefleet.fleet.pools import Pool
from pipefleet_workers.adapters.arguments import generate_arguments
from pipefleet_workers.models.cache import ModelError
from pipefleet_workers.models.load import load_pipeline
from tests.checkpoints import cached
from tests.parity.harness import load


class Older:
    """A pipeline with a config of its own instead of the method: the model's, with the pipeline's defaults in it."""

    def __init__(self, pipe: Any, **defaults: Any) -> None:
        self.model = pipe.model
        self.generation_config = GenerationConfig.from_dict({**pipe.model.generation_config.to_dict(), **defaults})


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load("text-generation")


def test_a_config_of_the_pipeline_fills_in_what_the_call_leaves_out(pipe: Any) -> None:
    older = Older(pipe, max_new_tokens=256, pad_token_id=3)
    assert generate_arguments(older, {"do_sample": False}) == {
        "do_sample": False,
        **({} if pipe.model.generation_config.pad_token_id == 3 else {"pad_token_id": 3}),
        "max_new_tokens": 256,
    }
    assert generate_arguments(older, {"max_new_tokens": 5})["max_new_tokens"] == 5


def test_a_config_of_the_call_stays_alone(pipe: Any) -> None:
    config = GenerationConfig(max_new_tokens=4)
    found = generate_arguments(Older(pipe, max_new_tokens=256), {"generation_config": config})
    assert found == {"generation_config": config}


def test_what_the_model_itself_sets_is_not_passed_again(pipe: Any) -> None:
    assert generate_arguments(Older(pipe), {}) == {}


def test_both_kinds_of_pipelines_write_the_same(pipe: Any) -> None:
    inputs = pipe.tokenizer("The quick brown", return_tensors="pt")
    asked = {"do_sample": False, "max_new_tokens": 8}
    newer, older = (pipe.model.generate(**inputs, **generate_arguments(one, asked)) for one in (pipe, Older(pipe)))
    assert torch.equal(newer, older)


def test_a_task_that_this_transformers_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(task: str) -> Any:
        raise KeyError(f"Unknown task {task}")

    monkeypatch.setattr("transformers.pipelines.check_task", unknown)
    wanted = f"transformers {transformers.__version__} has no task text-classification; install a newer one"
    with pytest.raises(ModelError, match=wanted):
        load_pipeline(Pool("p", "text-classification", str(cached("text-classification")), device="cpu"))


def test_processors_are_found_where_the_top_of_transformers_has_only_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    class StandIn:
        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> Any:
            raise ImportError("AutoImageProcessor requires the Torchvision library")

    monkeypatch.setattr(transformers, "AutoImageProcessor", StandIn)
    found = load_pipeline(Pool("p", "image-classification", str(cached("image-classification")), device="cpu"))
    assert found.image_processor is not None
