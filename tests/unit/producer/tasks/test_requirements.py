"""What an input or its parameters lack is found before anything is queued; what transformers takes stays taken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipefleet.cli import main
from pipefleet.client import Client
from pipefleet.errors import InputError, ParameterError, UsageError
from pipefleet.fleet.pools import Pool
from pipefleet.inputs.rows import item_or_failure
from pipefleet.tasks import task_spec
from pipefleet.tasks.parameters import called_parameters
from pipefleet_workers.inputs.tables import decode_table
from pipefleet_workers.items import Blob

CASES = Path(__file__).resolve().parents[3] / "cases"
PICTURE = "s3://media/a.png"
TABLE = {"a": ["1"]}
CHAT = [{"role": "user", "content": "a"}]
TWICE = {"max_new_tokens": 3, "generate_kwargs": {"max_new_tokens": 4}}
EMPTY = np.zeros(0, dtype="f4")
ZERO, ASR, BOXES = "zero-shot-classification", "automatic-speech-recognition", "document-question-answering"

REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("text-classification", {"text_pair": "a"}, {}, "text is missing"),
    ("text-classification", {}, {}, "text is missing"),
    ("fill-mask", "", {}, "a text with a mask in it"),
    ("fill-mask", "[MASK]", {"targets": []}, "not empty"),
    ("fill-mask", "[MASK]", {"targets": ""}, "not empty"),
    ("fill-mask", "[MASK]", {"targets": [" ", ""]}, "not empty"),
    ("question-answering", {"question": "", "context": "a"}, {}, "a question that is not empty"),
    ("question-answering", {"question": "a", "context": ""}, {}, "a context that is not empty"),
    (ZERO, "", {"candidate_labels": ["a"]}, "a text that is not empty"),
    (ZERO, "a", {"candidate_labels": []}, "1 to 1000 values"),
    (ZERO, "a", {"candidate_labels": " , "}, "not empty"),
    (ZERO, "a", {}, "needs candidate_labels"),
    (ZERO, "a", {"candidate_labels": ["a"], "hypothesis_template": "no place"}, "one {}"),
    ("zero-shot-image-classification", PICTURE, {"candidate_labels": ""}, "not empty"),
    ("zero-shot-image-classification", PICTURE, {}, "needs candidate_labels"),
    ("zero-shot-audio-classification", PICTURE, {}, "needs candidate_labels"),
    ("zero-shot-object-detection", PICTURE, {"candidate_labels": []}, "1 to 1000 values"),
    ("zero-shot-object-detection", {"image": PICTURE, "candidate_labels": []}, {}, "1 to 1000 texts"),
    ("zero-shot-object-detection", {"image": PICTURE}, {}, "needs candidate_labels"),
    ("table-question-answering", {"table": {}, "query": "a"}, {}, "not empty"),
    ("table-question-answering", {"table": "", "query": "a"}, {}, "an empty text"),
    ("image-classification", "", {}, "an empty text"),
    ("table-question-answering", {"table": {"a": []}, "query": "a"}, {}, "not empty"),
    ("table-question-answering", {"table": [], "query": "a"}, {}, "not empty"),
    ("table-question-answering", {"table": TABLE, "query": ""}, {}, "a query that is not empty"),
    ("table-question-answering", {"table": TABLE, "query": []}, {}, "lists of 1 to"),
    ("token-classification", ["a", "b"], {}, "is_split_into_words=True"),
    ("token-classification", "a b", {"is_split_into_words": True}, "lists of words"),
    ("image-text-to-text", "", {}, "prompt of image-text-to-text is empty"),
    ("any-to-any", {"text": ""}, {}, "prompt of any-to-any is empty"),
    ("image-text-to-text", {"text": "a", "images": []}, {}, "one image or more"),
    ("image-text-to-text", [], {}, "chats as lists of messages"),
    ("text-generation", [], {}, "chats as lists of messages"),
    ("image-to-text", {"text": "a"}, {}, "image is missing"),
    ("decision", "no request", {}, "the JSON of a request"),
    ("decision", '{"state": "a"}', {}, "a state and questions"),
    (ASR, EMPTY, {}, "no samples"),
    (ASR, {"raw": EMPTY, "sampling_rate": 16_000}, {}, "no samples"),
    ("audio-classification", b"", {}, "empty"),
    ("image-classification", b"", {}, "empty"),
    (ASR, "s3://media/a.wav", {"chunk_length_s": 1, "stride_length_s": 0.5}, "no longer than the strides"),
    (ASR, "s3://media/a.wav", {"chunk_length_s": 10, "stride_length_s": [1]}, "a list of two"),
    (BOXES, {"image": PICTURE, "question": "a", "word_boxes": [["a", [0, 0, 2000, 10]]]}, {}, "0 <= x0 <= x1 <= 1000"),
    (BOXES, {"image": PICTURE, "question": "a", "word_boxes": [["a", [9, 0, 0, 10]]]}, {}, "0 <= x0 <= x1 <= 1000"),
    (BOXES, {"image": PICTURE, "question": "a", "word_boxes": [["a", [0, 0, 9]]]}, {}, "0 <= x0 <= x1 <= 1000"),
    (BOXES, {"image": PICTURE, "question": "a", "word_boxes": ["a"]}, {}, "0 <= x0 <= x1 <= 1000"),
    (BOXES, {"image": PICTURE, "question": "a", "word_boxes": "abc"}, {}, "0 <= x0 <= x1 <= 1000"),
    (BOXES, {"image": PICTURE, "question": "a", "word_boxes": {"a": [0, 0, 9, 9]}}, {}, "0 <= x0 <= x1 <= 1000"),
    ("image-text-to-text", {"text": CHAT, "images": PICTURE}, {}, "inside its messages"),
    ("any-to-any", {"text": CHAT, "audio": "s3://media/a.wav"}, {}, "inside its messages"),
    ("image-text-to-text", "a", TWICE, "given twice"),
    ("any-to-any", "a", TWICE, "given twice"),
    ("image-to-text", PICTURE, TWICE, "given twice"),
    ("image-text-to-text", "a", {"return_full_text": False, "return_tensors": True}, "not both"),
    ("any-to-any", "a", {"return_full_text": True, "return_tensors": False}, "not both"),
    (BOXES, {"image": PICTURE, "question": "a", "word_boxes": 5}, {}, "0 <= x0 <= x1 <= 1000"),
    ("text-generation", "a", {"return_full_text": True, "return_text": True}, "not both"),
    ("text-generation", "a", {"return_text": True, "return_tensors": True}, "not both"),
    ("image-text-to-text", "a", {"return_full_text": False, "return_tensors": True}, "not both"),
    ("text-generation", "a", {"bad_words_ids": []}, "1 to 1000 values"),
    ("summarization", "a", {"sequence_bias": []}, "1 to 1000 values"),
]

TAKEN: list[tuple[str, Any, dict[str, Any]]] = [
    ("text-classification", "", {}),
    ("text-classification", {"text": "", "text_pair": ""}, {}),
    ("feature-extraction", "", {}),
    ("token-classification", "", {}),
    ("token-classification", ["a", ""], {"is_split_into_words": True}),
    ("text-generation", "", {}),
    ("text-generation", [{"role": "user", "content": ""}], {}),
    ("any-to-any", [{"role": "user", "content": []}], {}),
    ("image-text-to-text", {"text": "", "images": [PICTURE]}, {}),
    ("summarization", "", {}),
    ("summarization", "a", {"return_text": True, "return_tensors": False}),
    ("text-generation", "a", {"return_type": 1, "return_full_text": True}),
    ("text-generation", "a", {"return_text": None, "return_tensors": True}),
    ("translation", "", {}),
    ("text-to-audio", "", {}),
    ("fill-mask", "[MASK]", {"targets": ["sea", ""]}),
    (ZERO, " ", {"candidate_labels": ["a"]}),
    (ZERO, "a", {"candidate_labels": ["a", ""]}),
    (ZERO, "a", {"candidate_labels": "a,,b"}),
    ("zero-shot-image-classification", PICTURE, {"candidate_labels": [""]}),
    ("zero-shot-object-detection", PICTURE, {"candidate_labels": ""}),
    ("zero-shot-object-detection", {"image": PICTURE, "candidate_labels": ["a", ""]}, {}),
    ("question-answering", {"question": " ", "context": " "}, {}),
    ("question-answering", {"question": "s3://media/q.txt", "context": "a"}, {}),
    ("table-question-answering", {"table": TABLE, "query": ["", "a"]}, {}),
    ("visual-question-answering", {"image": PICTURE, "question": ""}, {}),
    (BOXES, {"image": PICTURE, "question": "", "word_boxes": [["", [0, 0, 10, 10.5]]]}, {}),
    (BOXES, {"image": PICTURE, "question": "", "word_boxes": {"$ref": "s3://media/boxes.json"}}, {}),
    ("image-text-to-text", {"text": CHAT, "images": None}, {}),
    ("image-text-to-text", "a", {"max_new_tokens": 3, "generate_kwargs": {"num_beams": 2}}),
    ("any-to-any", "a", {"return_full_text": True, "return_tensors": True, "return_type": 0}),
    (ASR, "s3://media/a.wav", {"chunk_length_s": 0, "stride_length_s": 3}),
    (ASR, "s3://media/a.wav", {"chunk_length_s": 10, "stride_length_s": [4, 2]}),
    ("decision", "s3://media/request.json", {}),
]


def prepared(
    client: Client, task: str, inputs: Any, parameters: Mapping[str, Any], pool: Mapping[str, Any] | None = None
) -> Any:
    """What a call of the task would queue, in a fleet whose pool for it is described."""
    spec = task_spec(task)
    parameters = called_parameters(spec, parameters)
    return client.preparer(spec, Pool("one", task, "/models/one", parameters=pool or {}), parameters).prepare(inputs)


@pytest.mark.parametrize(("task", "inputs", "parameters", "words"), REFUSED)
def test_what_can_only_fail_is_refused_before_it_is_queued(
    client: Client, task: str, inputs: Any, parameters: dict[str, Any], words: str
) -> None:
    with pytest.raises((InputError, ParameterError)) as caught:
        prepared(client, task, inputs, parameters)
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("task", "inputs", "parameters"), TAKEN)
def test_what_transformers_takes_is_taken(client: Client, task: str, inputs: Any, parameters: dict[str, Any]) -> None:
    prepared(client, task, inputs, parameters)


def test_what_the_pool_brings_need_not_come_with_the_call(client: Client) -> None:
    prepared(client, ZERO, "a", {}, {"candidate_labels": ["a"]})
    prepared(client, "token-classification", ["a"], {}, {"is_split_into_words": True})


def test_what_a_pool_that_is_only_announced_may_bring_is_not_missed(
    client: Client,
) -> None:
    client.settings = client.settings.model_copy(update={"fleet": None})
    prepared(client, ZERO, "a", {})


def test_nothing_is_queued_for_an_input_that_is_refused(client: Client) -> None:
    with pytest.raises(ValueError, match="text is missing"):
        client.submit("text-classification", {"text_pair": "a"})
    assert not client.redis.keys("pipefleet*job*")


def test_an_item_of_a_run_fails_alone_and_its_own_parameters_count(client: Client) -> None:
    preparer = client.preparer(task_spec(ZERO), Pool("one", ZERO, "/m"), {"candidate_labels": ["a"]})
    rows: list[dict[str, Any]] = [
        {"inputs": "fine"},
        {"inputs": ""},
        {"inputs": "fine", "parameters": {"candidate_labels": []}},
    ]
    failures = [item_or_failure(row, preparer).failure for row in rows]
    assert failures[0] is None
    assert [bool(one) for one in failures] == [False, True, True]
    bare = client.preparer(task_spec(ZERO), Pool("one", ZERO, "/m"))
    assert item_or_failure({"inputs": "a", "parameters": {"candidate_labels": ["a"]}}, bare).failure is None
    assert "candidate_labels" in (item_or_failure({"inputs": "a"}, bare).failure or "")


def test_an_empty_file_is_refused_by_name(client: Client, tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    for preparer in (client.preparer(task_spec(ASR)), client.preparer(task_spec(ASR)).dry()):
        with pytest.raises(UsageError, match=r"cannot read the input '.*empty\.wav': it is empty"):
            preparer.prepare(str(tmp_path / "empty.wav"))


TABLES: list[Any] = [
    json.loads((CASES / "table_null.json").read_text()),
    {"a": [1, None, 2.5, True], "b": [None, None, None, [1, {"c": None}]]},
    {"n": [1, None], "x": [float("nan"), 2]},
    [{"a": 1, "b": None}, {"b": 2, "c": "x"}],
]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_in_a_file_is_the_same_as_inline(client: Client, table: Any) -> None:
    inline = prepared(client, "table-question-answering", {"table": table, "query": "a"}, {})["table"]
    filed = decode_table(Blob("s3://media/t.json", json.dumps(table).encode(), None), max_bytes=10_000)
    assert decode_table(inline, max_bytes=10_000).to_dict("list") == filed.to_dict("list") == inline
    assert decode_table(table, max_bytes=10_000).to_dict("list") == inline  # of another program, without our producer


def test_a_missing_cell_is_an_empty_one(client: Client) -> None:
    table = json.loads((CASES / "table_null.json").read_text())
    found = prepared(client, "table-question-answering", {"table": table, "query": "a"}, {})["table"]
    assert found == {"Actors": ["Brad", ""], "Age": ["56", ""]}


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"a,b\n1\n,2\n\n3,,\n", {"a": ["1", "", "3"], "b": ["", "2", ""]}),
        (b"\xef\xbb\xbfa;b\r\n1;2\r\n", {"a": ["1"], "b": ["2"]}),
        ("a\tb\n1\t2\n".encode("utf-16"), {"a": ["1"], "b": ["2"]}),
        (b"a,a\n1,2\n", {"a": ["1"], "a.1": ["2"]}),
        (b'a\n"two\nlines"\n' + b"x" * 200_000, {"a": ["two\nlines", "x" * 200_000]}),
    ],
)
def test_a_csv_table_with_missing_cells(content: bytes, wanted: dict[str, list[str]]) -> None:
    assert decode_table(Blob("s3://media/t.csv", content, None), max_bytes=1 << 20).to_dict("list") == wanted


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit", "text-classification", '{"text_pair": "a"}'],
        ["submit", "text-classification", "a", "--param", "top_k=0"],
        ["map", "text-classification", "list.xlsx", "--output", "s3://pipefleet/out/"],
    ],
)
def test_the_command_line_says_so_in_one_sentence_with_exit_code_2(
    client: Client, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("list.xlsx").write_bytes(b"PK")
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)


def test_columns_of_pandas_with_one_name_are_all_kept(client: Client) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame([[1, None]], columns=["a", "a"])
    found = prepared(client, "table-question-answering", {"table": table, "query": "q"}, {})
    assert found["table"] == {"a": ["1"], "a.1": [""]}
