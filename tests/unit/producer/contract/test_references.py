"""The grammar of `s3://` URIs, and references in JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipefleet.contract.references import (
    MAX_KEY_BYTES,
    StorageRef,
    directory_uri,
    is_ref,
    is_text_uri,
    is_uri,
    join_uri,
    map_refs,
    refs_in,
    split_uri,
)
from pipefleet.errors import ContractError, InputError

BUCKETS = st.from_regex(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]", fullmatch=True)
KEYS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=200)
REFERENCES = st.builds(
    StorageRef,
    st.builds("s3://{}/{}".format, BUCKETS, KEYS),
    st.none() | st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=40),
    st.none() | st.integers(0, 2**50),
    st.none() | st.text(max_size=40),
)


@given(BUCKETS, KEYS)
def test_a_uri_is_split_into_what_it_was_joined_from(bucket: str, key: str) -> None:
    uri = f"s3://{bucket}/{key}"
    assert split_uri(uri) == (bucket, key)
    reference = StorageRef.of(uri)
    assert (reference.bucket, reference.key) == (bucket, key)


@given(REFERENCES)
def test_a_reference_survives_the_wire(reference: StorageRef) -> None:
    travelled = json.loads(json.dumps(reference.to_json()))
    assert is_ref(travelled)
    assert StorageRef.from_json(travelled) == reference


@given(st.lists(REFERENCES, max_size=4))
def test_references_are_found_wherever_they_stand_and_in_order(references: list[StorageRef]) -> None:
    value = {
        "a": [one.to_json() for one in references[:2]],
        "b": {"c": [[one.to_json()] for one in references[2:]]},
        "d": 1,
    }
    assert refs_in(value) == references
    assert map_refs(value, StorageRef.to_json) == value


def test_a_value_without_references_is_copied_as_it_is() -> None:
    value = {"text": "see s3://media/cat.jpg", "numbers": [1, 2.5, None, True]}
    assert map_refs(value, lambda _: pytest.fail("no reference here")) == value


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://media", ("media", "")),
        ("s3://media/", ("media", "")),
        ("s3://media/a/b.jpg", ("media", "a/b.jpg")),
        ("s3://media//a", ("media", "/a")),
        ("s3://media/a?x=1#y%20z", ("media", "a?x=1#y%20z")),
        ("s3://a.b-c/ü ñ/日本", ("a.b-c", "ü ñ/日本")),
    ],
)
def test_keys_are_taken_literally(uri: str, parts: tuple[str, str]) -> None:
    assert split_uri(uri) == parts


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("", "not an s3:// URI"),
        ("media/a", "not an s3:// URI"),
        ("S3://media/a", "not an s3:// URI"),
        ("https://media/a", "not an s3:// URI"),
        ("file:///etc/passwd", "not an s3:// URI"),
        ("s3:///a", "not a bucket name"),
        ("s3://ab/a", "not a bucket name"),
        ("s3://Media/a", "not a bucket name"),
        ("s3://me_dia/a", "not a bucket name"),
        ("s3://-media/a", "not a bucket name"),
        ("s3://user:secret@media/a", "not a bucket name"),
        (f"s3://{'b' * 64}/a", "not a bucket name"),
        (f"s3://media/{'ü' * 513}", "not an object key"),
        ("s3://media/a\x00b", "not an object key"),
        ("s3://media/a\ud800b", "not an object key"),
    ],
)
def test_what_is_no_uri_is_refused_with_its_reason(uri: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        split_uri(uri)
    with pytest.raises(InputError, match=reason):
        StorageRef.of(uri)
    with pytest.raises(ContractError, match=reason):
        StorageRef.from_json({"$ref": uri})


def test_a_key_may_be_as_long_as_s3_allows() -> None:
    assert len(split_uri("s3://media/" + "k" * MAX_KEY_BYTES)[1]) == MAX_KEY_BYTES


@pytest.mark.parametrize(
    "value",
    [
        {"$ref": None},
        {"$ref": 1},
        {},
        *(
            {"$ref": "s3://media/a", **wrong}
            for wrong in ({"size": "1"}, {"size": -1}, {"size": True}, {"url": "x"}, {"etag": ["x"]}, {"type": 3})
        ),
    ],
)
def test_a_malformed_reference_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match="not a storage reference"):
        StorageRef.from_json(value)


@pytest.mark.parametrize("name", ["cat.jpg", "CAT.JPG", "a/b c.jpg"])
def test_the_suffix_suggests_the_media_type(name: str) -> None:
    assert StorageRef.of(f"s3://media/{name}").type == "image/jpeg"
    assert StorageRef.of("s3://media/no-suffix").type is None


@pytest.mark.parametrize("value", ["see s3://media/a", "s3", "", b"s3://media/a", None, "S3://media/a", "a s3://b"])
def test_a_text_that_only_mentions_a_uri_is_none(value: object) -> None:
    assert not is_uri(value)
    assert not is_text_uri(value)


@pytest.mark.parametrize("value", ["s3://media/a.txt", "s3://media/my file.txt", "s3://media/a.txt\n"])
def test_what_begins_like_a_uri_is_one_and_where_texts_stand_if_it_is_one_line(value: str) -> None:
    assert is_uri(value)
    assert is_text_uri(value)
    assert is_uri(f"{value}\nand more")
    assert not is_text_uri(f"{value}\nand more")


def test_uris_are_joined_by_one_slash() -> None:
    assert join_uri("s3://out/a/", "/b/", "c.json") == join_uri("s3://out/a", "b", "c.json") == "s3://out/a/b/c.json"
    assert directory_uri("s3://out") == directory_uri("s3://out/") == "s3://out/"
    assert directory_uri("s3://out/a") == directory_uri("s3://out/a//") == "s3://out/a/"
    with pytest.raises(InputError):
        directory_uri("out/")
