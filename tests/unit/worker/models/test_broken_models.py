"""Folders that are no whole model, or whose files do not fit each other: one sentence says what is wrong, and no job is begun."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipefleet.fleet.pools import Pool
from pipefleet_workers.models.cache import ModelError
from pipefleet_workers.models.load import load_pipeline
from tests.checkpoints import build, cached

TASK = "text-classification"
WRITING = "text-generation"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A classifier of texts that a test may change."""
    return build(TASK, tmp_path / "model")


def refusal(model: Path, task: str = TASK, **fields: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_pipeline(Pool("texts", task, str(model), **fields))
    sentence = str(caught.value)
    assert sentence.startswith("pool texts: ")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "linear"}, "KeyError: 'factor'"),
        ({"rope_type": "foo", "rope_theta": 1e4}, "KeyError: 'foo'"),
        ({"factor": 2.0}, "KeyError: 'rope_type'"),
        ({"rope_type": "linear", "factor": 2.0}, "TypeError"),
    ],
)
def test_what_python_alone_says_of_a_value_is_put_down_to_the_key_of_the_pool(
    rope: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pipefleet_workers"):
        sentence = refusal(cached(WRITING), WRITING, model_kwargs={"rope_parameters": rope})
    assert f"transformers cannot use rope_parameters of model_kwargs ({said}" in sentence
    assert "correct it, or take it out" in sentence
    assert any(record.exc_info for record in caplog.records), "the log has the traceback"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "foo"}, "cannot use a value in its config.json or another of its files (KeyError: 'foo')"),
        ({"id2label": ["a", "b"]}, "cannot use a value in its config.json"),
        ({"dtype": "float17"}, "has no attribute 'float17'"),
        ({"hidden_size": "32"}, "Field 'hidden_size' expected int, got str"),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": ["bert"]}, "which transformers"),
    ],
)
def test_a_config_with_a_wrong_value(folder: Path, changes: dict[str, Any], words: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert words in refusal(folder)


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def only_an_adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')


def under_another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


def only_an_empty_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (write("config.json", "[]"), "the config.json of .* holds no object"),
        (write("config.json", "{"), r"should be JSON and is not .*copy it again"),
        (write("tokenizer.json", "{"), "the tokenizer in .* cannot be read .JSONDecodeError"),
        (write("tokenizer.json", "{}"), "the tokenizer in .* cannot be read .KeyError: 'added_tokens'"),
        (only_an_empty_tokenizer, "holds no tokenizer, which text-classification needs"),
        (only_an_adapter, r"holds an adapter \(LoRA\) and no model; merge the two"),
        (under_another_name, "into model.safetensors or shards with their index"),
    ],
)
def test_a_damaged_folder(folder: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(folder)
    assert re.search(words, refusal(folder))


@pytest.mark.parametrize(
    "task", ["summarization", "translation", "text2text-generation", "text-to-audio", "visual-question-answering"]
)
def test_a_pipeline_that_would_take_any_model_is_given_none_of_another_task(task: str) -> None:
    assert f"is a BertForSequenceClassification, which cannot do {task}" in refusal(cached(TASK), task)
