"""Slices of texts get the numbers that the tokenizer's own call gives, for any arguments in any order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from pipefleet_workers.adapters.text import slices
from pipefleet_workers.adapters.text.slices import SliceTokenizer
from pipefleet_workers.adapters.text.whole_texts import guard
from pipefleet_workers.items import ItemError
from tests.parity.harness import load

MOST = 1000
_ARGUMENTS = (
    {},
    {"truncation": True, "max_length": 5},
    {"truncation": "longest_first", "max_length": 7},
    {"padding": "max_length", "max_length": 12},
    {"add_special_tokens": False},
)
_CALLS = st.lists(
    st.tuples(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.sampled_from(_ARGUMENTS)), max_size=8
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = copy.deepcopy(load("text-classification").tokenizer)
    guard(found, MOST)
    return found


def expected(tokenizer: Any, texts: list[str], keywords: dict[str, Any]) -> list[dict[str, list[int]]]:
    encoded = copy.deepcopy(tokenizer)(texts, **keywords)
    return [{name: encoded[name][row] for name in encoded} for row in range(len(texts))]


def written_out(rows: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """The rows with a list in place of each number that stands for one."""
    lengths = [len(row["input_ids"]) for row in rows]
    return [
        {name: [one] * length if isinstance(one, int) else one for name, one in row.items()}
        for row, length in zip(rows, lengths, strict=True)
    ]


@settings(max_examples=50, deadline=None)
@given(_CALLS)
def test_slices_get_the_numbers_of_the_tokenizer(tokenizer: Any, calls: list[Any]) -> None:
    sliced = SliceTokenizer(tokenizer, MOST)
    assert sliced._quick
    for texts, keywords in calls:
        assert written_out(sliced.encode(texts, keywords)) == expected(tokenizer, texts, keywords)
        assert written_out(sliced.encode(texts, keywords)) == expected(tokenizer, texts, keywords)


def test_a_call_of_the_tokenizer_between_slices_changes_nothing(tokenizer: Any) -> None:
    sliced = SliceTokenizer(tokenizer, MOST)
    sliced.encode(["the sea was wide"], {})
    tokenizer(["the sea was wide"], truncation=True, max_length=3)
    assert written_out(sliced.encode(["the sea was wide"], {})) == expected(tokenizer, ["the sea was wide"], {})


def test_a_slice_of_too_many_characters_is_refused(tokenizer: Any) -> None:
    sliced = SliceTokenizer(tokenizer, MOST)
    sliced.encode(["short"], {})
    for texts in (["a" * (MOST + 1)], ["\ufdfa" * (MOST // 17)]):
        with pytest.raises(ItemError, match="tokenised at once"):
            sliced.encode(texts, {})


def test_a_tokenizer_that_reads_texts_in_its_own_way_keeps_its_call(tokenizer: Any) -> None:
    class Shouting(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, texts: list[str], **keywords: Any) -> Any:
            return super().__call__([f"{text} the" for text in texts], **keywords)

    own = copy.deepcopy(tokenizer)
    own.__class__ = Shouting
    sliced = SliceTokenizer(own, MOST)
    for _ in range(2):
        assert written_out(sliced.encode(["sea"], {})) == expected(own, ["sea"], {})
    assert not sliced._quick


def test_a_difference_at_the_first_call_ends_the_quick_way(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(slices._PARTS, "token_type_ids", "attention_mask")
    sliced = SliceTokenizer(tokenizer, MOST)
    for _ in range(2):
        assert written_out(sliced.encode(["the sea"], {})) == expected(tokenizer, ["the sea"], {})
    assert not sliced._quick


def test_a_number_stands_for_a_row_of_it(tokenizer: Any) -> None:
    sliced = SliceTokenizer(tokenizer, MOST)
    sliced.encode(["the sea", "the sea was wide"], {})
    (row,) = sliced.encode(["wide"], {})
    assert (row["token_type_ids"], row["attention_mask"]) == (0, 1)


@pytest.mark.parametrize("first", [[""], ["the sea was wide"]])
def test_types_that_depend_on_the_token_stay_lists(tokenizer: Any, first: list[str]) -> None:
    own = copy.deepcopy(tokenizer)
    pieces = [(name, own.convert_tokens_to_ids(name)) for name in (own.cls_token, own.sep_token)]
    template = f"{own.cls_token}:0 $A:1 {own.sep_token}:0"
    own.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=pieces)
    sliced = SliceTokenizer(own, MOST)
    for texts in (first, ["the sea was wide", "a", ""]):
        assert written_out(sliced.encode(texts, {})) == expected(own, texts, {})
    assert sliced._quick
