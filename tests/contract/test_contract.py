"""The message contract: golden files for every version, and what a worker refuses."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipefleet.contract.messages import (
    CONTRACT_VERSION,
    ID_FORM,
    MAX_COST,
    MAX_DEADLINE,
    MAX_RUN_ITEMS,
    REPLY_FORM,
    RUN_ID_FORM,
    JobItem,
    JobMessage,
    JobState,
    Priority,
    Shard,
    as_id,
    decode_message,
    encode_json,
    is_id,
    is_reply,
)
from pipefleet.contract.records import JobFailure
from pipefleet.contract.references import StorageRef
from pipefleet.contract.shards import decode_shard_line, encode_shard_line
from pipefleet.errors import ContractError

GOLDEN = Path(__file__).parent / "golden"
SINGLE = JobMessage(
    id="0190f1d2c3b4a5968778695a4b3c2d1e",
    task="image-classification",
    model="org/model",
    revision="5b1d8f4e0c7a",
    parameters={"top_k": 3},
    items=(
        JobItem("0", StorageRef("s3://media/größe/cat 1.jpg", "d41d8cd9", 12345, "image/jpeg").to_json(), {"top_k": 1}),
    ),
    output="s3://results/one.json",
    deadline=1_700_000_060.5,
    cost=1.0,
    reply="pipefleet:done:0123456789abcdef0123456789abcdef",
)
SMALLEST = JobMessage(id="1", task="text-classification", items=(JobItem("0", "Süß — “quoted”\n"),))
SHARD = JobMessage(
    id="run1-00007",
    task="automatic-speech-recognition",
    model="/models/speech",
    parameters={"return_timestamps": "word", "generate_kwargs": {"language": "en"}},
    shard=Shard("run1", "s3://out/run1/", "s3://out/run1/_run/shards/00007.jsonl", 7, 112, 16),
    cost=16.0,
)
STREAMED = JobMessage(id="2", task="text-generation", items=(JobItem("0", "Once"),), stream=True)
MESSAGES = {"single": SINGLE, "smallest": SMALLEST, "shard": SHARD, "streamed": STREAMED}


def golden(name: str) -> bytes:
    return (GOLDEN / f"message-v{CONTRACT_VERSION}-{name}.json").read_bytes()


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_is_written_byte_for_byte_as_its_golden_file(name: str) -> None:
    assert (encode_json(MESSAGES[name].to_json()) + "\n").encode() == golden(name)


@pytest.mark.parametrize("name", MESSAGES)
def test_a_golden_file_is_read_as_the_message_it_was_written_from(name: str) -> None:
    assert decode_message(json.loads(golden(name))) == MESSAGES[name]


def test_every_golden_file_belongs_to_a_message() -> None:
    messages = {f"message-v{CONTRACT_VERSION}-{name}.json" for name in MESSAGES}
    assert {path.name for path in GOLDEN.iterdir()} == {*messages, "shard-v1.jsonl"}


LINES = [
    (7, JobItem("a", "Süß — “quoted”\n"), None),
    (8, JobItem("b", {"$ref": "s3://media/größe/cat 1.jpg", "size": 12345}, {"top_k": 1}), None),
    (9, JobItem("9", None), JobFailure("bad_input", "row 10: image-classification takes images", "plan")),
]


def test_the_lines_of_a_shard_are_written_and_read_as_their_golden_file() -> None:
    lines = (GOLDEN / "shard-v1.jsonl").read_bytes().splitlines()
    assert [encode_shard_line(*one).encode() for one in LINES] == lines
    assert [decode_shard_line(line) for line in lines] == LINES


@pytest.mark.parametrize("failure", ["broken", {"code": "c"}, {"code": 1, "message": "m", "stage": "s"}, []])
def test_a_line_with_a_malformed_failure_is_refused(failure: Any) -> None:
    line = json.dumps({"position": 0, "id": "a", "inputs": "b", "failure": failure}).encode()
    with pytest.raises(ContractError, match="the failure of an item has the texts"):
        decode_shard_line(line)


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
PARAMETERS = st.dictionaries(TEXT, JSON, max_size=3)
ITEMS = st.lists(st.builds(JobItem, TEXT, JSON, PARAMETERS), min_size=1, max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=20)
RUN_IDS = st.from_regex(RUN_ID_FORM, fullmatch=True)
SHARDS = st.builds(Shard, RUN_IDS, TEXT, TEXT, *[st.integers(0, MAX_RUN_ITEMS // 2)] * 3)
COMMON: dict[str, Any] = {
    "id": st.from_regex(ID_FORM, fullmatch=True),
    "task": NAMES,
    "model": st.none() | NAMES,
    "revision": st.none() | NAMES,
    "parameters": PARAMETERS,
    "output": st.none() | TEXT,
    "deadline": st.none() | st.floats(0, 4e9),
    "cost": st.floats(0, 1e12),
    "reply": st.none() | st.from_regex(REPLY_FORM, fullmatch=True),
}


@given(st.one_of(st.builds(JobMessage, items=ITEMS, **COMMON), st.builds(JobMessage, shard=SHARDS, **COMMON)))
def test_every_message_survives_the_wire(message: JobMessage) -> None:
    assert decode_message(json.loads(encode_json(message.to_json()).encode())) == message


@pytest.mark.parametrize("version", [None, 0, 2, "1", 1.0, 1.5, True, [1], 10**30])
def test_another_version_is_refused_before_anything_else_is_looked_at(version: Any) -> None:
    with pytest.raises(ContractError, match=r"contract version 1.*releas"):
        decode_message({"version": version, "what": "a later version may hold anything"})


@pytest.mark.parametrize("value", [None, 1, "text", [], [{}]])
def test_what_is_not_an_object_is_refused(value: Any) -> None:
    with pytest.raises(ContractError):
        decode_message(value)


def wire(**changes: Any) -> dict[str, Any]:
    """The smallest message with `changes`; a value of `...` removes the field."""
    body = {**SMALLEST.to_json(), **changes}
    return {name: value for name, value in body.items() if value is not ...}


SHARD_FIELDS = SHARD.to_json()["shard"]
MALFORMED = {
    "lacks id": wire(id=...),
    "lacks task": wire(task=...),
    "unknown fields: callback": wire(callback="http://example.org"),
    "either items or a shard": wire(items=...),
    "carries either": wire(shard=SHARD_FIELDS),
    "items must be a list that is not empty": wire(items=[]),
    "items must be a list": wire(items={"0": {}}),
    "id must have 1 to 200": wire(id=""),
    "id must have 1 to 200 ": wire(id="x" * 201),
    "id must be a text": wire(id=7),
    "id must have a UTF-8 form": wire(id="lone \ud800"),
    "id must have no control characters": wire(id="a\nb"),
    "id must have no control characters and no line breaks": wire(id="a\u2028b"),
    "id must have no control": wire(id="\x1b[2J"),
    "task must have no control characters": wire(task="text\x00"),
    "model must have at most 1024": wire(model="m" * 1025),
    "revision must have no control characters": wire(revision="main\r"),
    "output must have at most 1100": wire(output="s3://bucket/" + "x" * 1100),
    "cost must be a number, finite and not below 0, at most 1000000000000": wire(cost=1e308),
    "cost must be a number, finite and not below 0, at most": wire(cost=MAX_COST * 1.001),
    "deadline must be a number, finite and not below 0, at most 4102444800": wire(deadline=1e300),
    "deadline must be a number, finite and not below 0, at most": wire(deadline=MAX_DEADLINE + 1),
    "reply must have a UTF-8 form": wire(reply="\ud800"),
    "task must be a text": wire(task=["x"]),
    "model must be a text": wire(model=None),
    "deadline must be a number": wire(deadline="soon"),
    "cost must be a number": wire(cost=True),
    "cost must be a number, finite": wire(cost=float("inf")),
    "cost must be a number, finite ": wire(cost=10**400),
    "cost must be a number, finite and not below 0": wire(cost=-1),
    "deadline must be a number, finite": wire(deadline=float("nan")),
    "parameters must be an object": wire(parameters=[["top_k", 1]]),
    "stream must be true or false": wire(stream=1),
    "an item must be a JSON object": wire(items=["text"]),
    "an item lacks inputs": wire(items=[{"id": "0"}]),
    "an item has unknown fields: code": wire(items=[{"id": "0", "inputs": "x", "code": "y"}]),
    "an item needs a text as id": wire(items=[{"id": 0, "inputs": "x"}]),
    "an object as parameters": wire(items=[{"id": "0", "inputs": "x", "parameters": 3}]),
    "a shard must be a JSON object": wire(items=..., shard="s3://out/"),
    "a shard lacks count": wire(items=..., shard={k: v for k, v in SHARD_FIELDS.items() if k != "count"}),
    "a shard has unknown fields: extra": wire(items=..., shard={**SHARD_FIELDS, "extra": 1}),
    "whole numbers elsewhere": wire(items=..., shard={**SHARD_FIELDS, "first": -1}),
    "whole numbers elsewhere ": wire(items=..., shard={**SHARD_FIELDS, "index": True}),
    "a shard lies within": wire(items=..., shard={**SHARD_FIELDS, "index": 2**32 - 2}),
    "a shard lies within the": wire(items=..., shard={**SHARD_FIELDS, "first": 2**32 - 20}),
    "a shard ends within the 268435456 items": wire(items=..., shard={**SHARD_FIELDS, "count": 10**400}),
    "run_id must have 1 to 100": wire(items=..., shard={**SHARD_FIELDS, "run_id": "other:parts"}),
    "run_id must have": wire(items=..., shard={**SHARD_FIELDS, "run_id": "x" * 101}),
    "run_uri must have a UTF-8 form": wire(items=..., shard={**SHARD_FIELDS, "run_uri": "s3://out/\ud800/"}),
    "uri must have at most 1100": wire(items=..., shard={**SHARD_FIELDS, "uri": "s3://out/" + "x" * 2000}),
    "format must have at most 1024": wire(items=..., shard={**SHARD_FIELDS, "format": "x" * 2000}),
    "texts as run_id": wire(items=..., shard={**SHARD_FIELDS, "uri": None}),
}


@pytest.mark.parametrize("reason", MALFORMED)
def test_a_malformed_message_is_refused_with_its_reason(reason: str) -> None:
    with pytest.raises(ContractError, match=reason.strip()):
        decode_message(MALFORMED[reason])


@given(JSON | st.dictionaries(st.sampled_from([*COMMON, "version", "items", "shard"]), JSON | st.just(1)))
def test_whatever_arrives_is_read_or_refused_but_nothing_else_is_raised(value: Any) -> None:
    with contextlib.suppress(ContractError):
        assert isinstance(decode_message(value), JobMessage)


@pytest.mark.parametrize(
    "reply",
    [
        "/0.celery.pidbox",
        "pipefleet:cancelled",
        "pipefleet:done:",
        "pipefleet:done:" + "0" * 31,
        "pipefleet:done:" + "0" * 33,
        "pipefleet:done:" + "0" * 32 + "\n",
        "pipefleet:done:" + "A" * 32,
        "0" * 32,
        "\ud800",
        "",
    ],
)
def test_a_reply_that_is_no_clients_channel_is_refused(reply: str) -> None:
    assert not is_reply(reply)
    with pytest.raises(ContractError, match="reply must"):
        decode_message(wire(reply=reply))


@pytest.mark.parametrize(
    "message",
    [
        wire(**{"\ud800": 1}),
        wire(**{f"field {number} \ud800\n\x1b[2J" * 50: 1 for number in range(300)}),
        wire(items=[{"id": "0", "inputs": "x", "\udfff": 1}]),
        {"version": "\ud800" * 1000},
        {"version": [[["\ud800"]] * 1000]},
        {"version": 10**5000},
    ],
)
def test_a_refusal_is_of_bounded_length_and_has_a_utf8_form(message: Any) -> None:
    with pytest.raises(ContractError) as caught:
        decode_message(message)
    reason = str(caught.value)
    assert len(reason.encode()) < 500
    assert reason.isprintable()


@given(st.text(max_size=300))
def test_any_text_can_be_made_an_id(text: str) -> None:
    assert as_id(text) == text or not is_id(text)
    assert is_id(as_id("x" + text))


def test_a_refusal_does_not_echo_the_content() -> None:
    with pytest.raises(ContractError) as caught:
        decode_message(wire(items=[{"id": 1, "inputs": "the patient's name"}]))
    assert "patient" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes", object(), "\ud800"])
def test_only_strict_json_is_written(value: Any) -> None:
    with pytest.raises(ContractError, match="not JSON"):
        encode_json({"inputs": value})


def test_the_last_four_states_are_final() -> None:
    assert [state.final for state in JobState] == [False, False, True, True, True, True]


def test_priorities_are_named_and_high_is_served_first_on_redis() -> None:
    assert [Priority.named(name) for name in ("high", "normal", "LOW")] == sorted(Priority)
    with pytest.raises(ContractError, match="high, normal or low"):
        Priority.named("urgent")
