"""Attacks through the parameters of a call. The tests loop over TASKS, so a new row is covered as soon as it exists."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from pipefleet.errors import ParameterError
from pipefleet.tasks import TASKS, TaskSpec
from pipefleet.tasks.checks import Check
from tests.unit.attacks import EVERY_TASK

DANGEROUS = (
    # run code
    "custom_generate", "trust_remote_code", "code_revision", "pipeline_class", "custom_pipelines", "auto_map",
    "model_kwargs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer",
    "assistant_model", "assistant_tokenizer", "compile_config", "collate_fn", "decoder", "decoder_kwargs", "tokenizer",
    # render templates
    "chat_template", "processor_kwargs", "tools", "documents",
    # reach files, addresses and command lines
    "tesseract_config", "lang", "timeout", "token", "use_auth_token", "revision", "model", "config", "cache_dir",
    "voice_preset", "history_prompt", "url", "path", "proxies", "framework", "device", "device_map", "torch_dtype",
    "image_processor", "feature_extractor", "processor", "vocoder", "num_workers",
)  # fmt: skip


def nested(check: Check) -> Iterator[tuple[str, Check]]:
    """Every name that a check allows at any depth, with its own check: `mapping_of` and its kin keep them in their closures."""
    held = [cell.cell_contents for cell in getattr(check, "__closure__", None) or ()]
    while held:
        one = held.pop()
        if isinstance(one, Mapping):
            for name, inner in one.items():
                yield name, inner
                held.append(inner)
        elif isinstance(one, list | tuple):
            held.extend(one)
        elif isinstance(one, types.FunctionType):
            held.extend(cell.cell_contents for cell in one.__closure__ or ())


def allowed_names(spec: TaskSpec) -> Iterator[tuple[str, Check]]:
    for name, check in spec.parameters.items():
        yield name, check
        yield from nested(check)


def test_names_are_found_at_any_depth() -> None:
    names = {name for name, _ in allowed_names(TASKS["automatic-speech-recognition"])}
    assert {"chunk_length_s", "generate_kwargs", "language", "num_beams"} <= names


@EVERY_TASK
def test_no_row_allows_a_name_that_runs_code_renders_templates_or_reaches_files(spec: TaskSpec) -> None:
    assert not {name for name, _ in allowed_names(spec)} & set(DANGEROUS)


ATTACKS = [
    {"custom_generate": "/tmp/evil", "trust_remote_code": True},
    {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"},
    {"tokenizer_encode_kwargs": {"chat_template": "{{ 1 }}"}},
    {"tesseract_config": "--tessdata-dir /etc", "lang": "eng /etc/passwd"},
    {"__class__": 1},
    {"generate_kwargs": {"generate_kwargs": {"custom_generate": "/tmp/evil"}}},
]


@EVERY_TASK
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: next(iter(attack)))
def test_dangerous_arguments_are_refused_wherever_they_stand(spec: TaskSpec, attack: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        spec.check(attack)
    for name in spec.parameters:
        for inner in (attack, [attack], {"generate_kwargs": attack}):
            with pytest.raises(ParameterError):
                spec.check({name: inner})


@EVERY_TASK
def test_no_parameter_takes_a_value_of_any_length(spec: TaskSpec) -> None:
    for name, check in allowed_names(spec):
        for huge in (
            "x" * 1_000_000,
            ["x"] * 1_000_000,
            {str(i): i for i in range(100_000)},
            10**400,
            1e400,
            [[]] * 10**5,
        ):
            assert check(huge) is not None, f"{name} takes a value without a bound"


TEMPLATES = [
    "{:>3000000}", "{0}", "{0.__class__.__mro__}", "{.__class__}", "{!r}", "{[0]}", "{}{}", "{} {:>9}", "{{}}", "{}{{", "{",
    "nothing", "{}" + "x" * 100_000, "", 3, ["{}"],
]  # fmt: skip


def test_templates_of_hypotheses_hold_one_plain_place() -> None:
    rows = [spec for spec in TASKS.values() if "hypothesis_template" in spec.parameters]
    assert rows
    for spec in rows:
        spec.check({"hypothesis_template": "This is a photo of {}."})
        for attack in TEMPLATES:
            with pytest.raises(ParameterError):
                spec.check({"hypothesis_template": attack})
