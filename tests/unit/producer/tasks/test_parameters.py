"""Which call parameters a task lets through, and above all which not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipefleet.errors import ParameterError
from pipefleet.tasks import TASKS, task_spec
from pipefleet.tasks.checks import Check, boolean, choice, either, integer, list_of, mapping_of, null, number, text

DANGEROUS = {
    "custom_generate": "org/code",
    "trust_remote_code": True,
    "chat_template": "{{ cycler.__init__.__globals__ }}",
    "tokenizer_encode_kwargs": {"chat_template": "{{ 7 * 7 }}"},
    "hypothesis_template": "{0.__class__}",
    "tesseract_config": "-c tessedit_write_images=1",
    "model_kwargs": {"attn_implementation": "org/kernel"},
    "generation_config": "/etc/passwd",
    "assistant_model": "org/model",
    "timeout": 10**9,
    "device": "cuda:0",
    "__class__": "x",
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", DANGEROUS)
def test_no_task_takes_a_parameter_that_could_run_code_or_reach_out(task: str, name: str) -> None:
    taken = f"parameter '{name}' of {task} (must|may not hold 'chat_template')"
    refused = taken if name in TASKS[task].parameters else f"takes no parameter '{name}'"
    with pytest.raises(ParameterError, match=refused):
        TASKS[task].check({name: DANGEROUS[name]})


@pytest.mark.parametrize("name", DANGEROUS)
@pytest.mark.parametrize(("task", "outer"), [("automatic-speech-recognition", "generate_kwargs"),
                                             ("feature-extraction", "tokenize_kwargs")])  # fmt: skip
def test_nor_inside_the_dicts_that_are_handed_on(task: str, outer: str, name: str) -> None:
    with pytest.raises(ParameterError, match=f"'{outer}' of {task} may not hold '{name}'"):
        TASKS[task].check({outer: {name: DANGEROUS[name]}})


ACCEPTED = [
    ("text-classification", {"top_k": None}),
    ("text-classification", {"top_k": 5, "function_to_apply": "sigmoid", "truncation": True, "max_length": 512}),
    ("image-classification", {"top_k": 1, "function_to_apply": None}),
    ("feature-extraction", {"pooling": "mean", "normalize": True, "tokenize_kwargs": {"max_length": 16}}),
    ("automatic-speech-recognition", {"return_timestamps": "word", "chunk_length_s": 30, "stride_length_s": [4, 2.5]}),
    (
        "automatic-speech-recognition",
        {"return_timestamps": False, "generate_kwargs": {"language": "de", "num_beams": 2}},
    ),
]


@pytest.mark.parametrize(("task", "parameters"), ACCEPTED)
def test_what_the_pipeline_call_is_meant_to_take_passes(task: str, parameters: dict[str, Any]) -> None:
    task_spec(task).check(parameters)


REFUSED = [
    ("text-classification", {"top_k": 0}, "top_k.*whole number from 1 to 100000"),
    ("text-classification", {"top_k": True}, "top_k"),
    ("text-classification", {"top_k": "3"}, "top_k"),
    ("text-classification", {"function_to_apply": "exec"}, "one of default, sigmoid, softmax, none"),
    ("text-classification", {"truncation": "yes"}, "must be true or false or must be one of longest_first"),
    ("image-classification", {"topk": 3}, r"did you mean 'top_k'\?.*it takes function_to_apply, top_k"),
    ("feature-extraction", {"pooling": "max"}, "mean, cls, last"),
    ("feature-extraction", {"tokenize_kwargs": "max_length"}, "must be an object"),
    ("automatic-speech-recognition", {"chunk_length_s": float("nan")}, "a number from 0 to 3600"),
    ("automatic-speech-recognition", {"chunk_length_s": float("inf")}, "a number from 0 to 3600"),
    ("automatic-speech-recognition", {"stride_length_s": [1, 2, 3]}, "a list of at most 2 values"),
    ("automatic-speech-recognition", {"generate_kwargs": {"num_beams": 10**6}}, "holds 'num_beams', which must be"),
    ("automatic-speech-recognition", {"generate_kwargs": {"langage": "de"}}, r"did you mean 'language'\?"),
]


@pytest.mark.parametrize(("task", "parameters", "message"), REFUSED)
def test_the_error_names_the_parameter_and_what_it_should_be(
    task: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        task_spec(task).check(parameters)


def test_one_wrong_parameter_among_right_ones_is_enough() -> None:
    with pytest.raises(ParameterError, match="custom_generate"):
        task_spec("text-classification").check({"top_k": 2, "custom_generate": "x"})


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (boolean, [True, False], [0, 1, "true", None]),
        (integer(1, 3), [1, 3], [0, 4, 2.0, True, "1", None]),
        (number(0.5, 2), [0.5, 1, 2], [0.4, 2.1, float("nan"), True, "1"]),
        (choice("a", "b"), ["a", "b"], ["c", "", None, ["a"]]),
        (text(3), ["", "abc"], ["abcd", None, b"a"]),
        (list_of(boolean, 2), [[], [True], (False, True)], [[1], [True] * 3, "ab", {True}]),
        (either(null, integer(1, 1)), [None, 1], [2, "x", False]),
        (mapping_of({"a": boolean}), [{}, {"a": True}], [{"a": 1}, {"b": True}, {1: 2}, [("a", True)], None]),
    ],
)
def test_each_check_at_its_bounds(check: Check, good: list[Any], bad: list[Any]) -> None:
    assert [check(value) for value in good] == [None] * len(good)
    assert all(check(value) for value in bad)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(TASKS)), st.data())
def test_no_value_makes_a_check_raise_anything_but_its_own_error(task: str, data: st.DataObject) -> None:
    names = st.sampled_from(sorted(TASKS[task].parameters) or ["x"]) | st.text(max_size=5)
    given_parameters = data.draw(st.dictionaries(names, ANYTHING, max_size=3))
    try:
        TASKS[task].check(given_parameters)
    except ParameterError:
        pass
    else:
        assert set(given_parameters) <= set(TASKS[task].parameters)
