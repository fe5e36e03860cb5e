"""Where the items of a run come from, against a real bucket: prefixes, manifests, folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipefleet.contract.references import refs_in, split_uri
from pipefleet.errors import (
    InputError,
    ManifestError,
    SourceError,
)
from pipefleet.inputs.rows import SourceItem
from pipefleet.inputs.sources import Source
from pipefleet.storage.store import ObjectStore
from tests.unit.producer.inputs.opened import PICTURES, TEXTS, Opener, items


def keys(found: list[SourceItem]) -> list[str]:
    return [refs_in(item.inputs)[0].key for item in found]


def put_all(store: ObjectStore, prefix: str, names: list[str], body: bytes = b"x") -> list[str]:
    """Write objects; their keys, in the order of a listing."""
    for name in names:
        store.put(prefix + name, body)
    return sorted((split_uri(prefix)[1] + name for name in names), key=str.encode)


ODD = [
    "a b.txt",
    "ä/ö.txt",
    "日本.txt",
    "a+b.txt",
    "a%20b.txt",
    "a?b#c.txt",
    "a&b=c;d.txt",
    "😀.txt",
    "'quoted\".txt",
    "~.txt",
]


class TestPrefix:
    def test_every_object_is_an_item_pinned_by_etag_and_size(
        self, opener: Opener, store: ObjectStore, prefix: str
    ) -> None:
        wanted = put_all(store, prefix + "in/", ["b.jpg", "a.jpg", "c/d.png"], b"12345")
        found = items(opener(prefix + "in/", PICTURES))
        assert keys(found) == wanted == [item.id for item in found]
        for item in found:
            reference = refs_in(item.inputs)[0]
            assert store.head(reference.uri) is not None
            assert reference.size == item.size == 5
            assert reference.etag == store.head(reference.uri).etag  # type: ignore[union-attr]
        assert [refs_in(item.inputs)[0].type for item in found] == ["image/jpeg", "image/jpeg", "image/png"]

    def test_keys_with_odd_characters_come_back_as_they_are(
        self, opener: Opener, store: ObjectStore, prefix: str
    ) -> None:
        wanted = put_all(store, prefix + "in/", ODD)
        found = items(opener(prefix + "in/"))
        assert keys(found) == wanted
        assert all(store.get(refs_in(item.inputs)[0].uri) == b"x" for item in found)

    def test_folder_marks_are_passed_over(self, opener: Opener, store: ObjectStore, prefix: str) -> None:
        bucket, inside = split_uri(prefix + "in/")
        for key in (inside, inside + "empty/"):
            store.client.put_object(Bucket=bucket, Key=key, Body=b"")
        wanted = put_all(store, prefix + "in/", ["empty/a.txt", "b.txt"])
        assert keys(items(opener(prefix + "in/"))) == wanted

    @pytest.mark.parametrize("output", ["in/out/", "in/a/"])
    def test_the_output_is_no_input_though_it_lies_under_the_source(
        self, opener: Opener, store: ObjectStore, prefix: str, output: str
    ) -> None:
        put_all(store, prefix + output, ["part-00000.jsonl", "_run/run.json"])
        wanted = put_all(store, prefix + "in/", ["output.txt", "outer/a.txt", "z.txt"])
        assert keys(items(opener(prefix + "in/", output=prefix + output))) == wanted

    def test_an_output_of_the_same_name_in_another_bucket_hides_nothing(
        self, opener: Opener, store: ObjectStore, prefix: str
    ) -> None:
        wanted = put_all(store, prefix + "in/", ["out/a.txt"])
        other = prefix.replace("s3://pipefleet/", "s3://elsewhere/") + "in/out/"
        assert keys(items(opener(prefix + "in/", output=other))) == wanted

    def test_a_listing_of_many_pages_is_read_page_by_page(
        self, opener: Opener, store: ObjectStore, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = put_all(store, prefix + "in/", [f"{number:03d}.txt" for number in range(25)])
        pages = []
        whole = ObjectStore._page

        def small(self: ObjectStore, request: dict[str, Any]) -> Any:
            pages.append(request)
            return whole(self, {**request, "MaxKeys": 4})

        monkeypatch.setattr(ObjectStore, "_page", small)
        source = opener(prefix + "in/")
        lazily = source.items(0, None)
        next(lazily)
        assert len(pages) == 1
        assert len(keys(list(lazily))) == 24
        assert len(pages) >= 7
        last = SourceItem(None, {"$ref": f"s3://pipefleet/{wanted[9]}"}, 0)
        assert keys(list(source.items(10, last))) == wanted[10:]

    @pytest.mark.parametrize("cut", range(len(ODD)))
    def test_it_goes_on_behind_any_item(self, opener: Opener, store: ObjectStore, prefix: str, cut: int) -> None:
        put_all(store, prefix + "in/", ODD)
        source = opener(prefix + "in/")
        every = list(source.items(0, None))
        assert list(source.items(cut + 1, every[cut])) == every[cut + 1 :]

    def test_an_empty_prefix_and_a_missing_bucket_are_refused(self, opener: Opener, prefix: str) -> None:
        with pytest.raises(SourceError, match=f"nothing lies under {prefix}in/; check the prefix"):
            opener(prefix + "in/").check()
        with pytest.raises(SourceError, match=r"no bucket 'no-such-bucket' at http://127\.0\.0\.1:\d+"):
            opener("s3://no-such-bucket/in/").check()
        with pytest.raises(InputError, match="not a bucket name"):
            opener("s3://No_Bucket/in/")

    @pytest.mark.parametrize("output", ["", "in/", "in"])
    def test_an_output_that_holds_the_source_is_refused(
        self, opener: Opener, store: ObjectStore, prefix: str, output: str
    ) -> None:
        put_all(store, prefix + "in/", ["a.txt"])
        with pytest.raises(SourceError, match=r"the output .* holds the source .*; choose another output"):
            opener(prefix + "in/", output=prefix + output.rstrip("/") + "/" * bool(output)).check()

    def test_a_run_remembers_its_prefix(self, opener: Opener, prefix: str) -> None:
        assert opener(prefix + "in/").describe() == prefix + "in/"


@pytest.fixture(params=["bucket", "disk"])
def manifest(
    request: pytest.FixtureRequest, opener: Opener, store: ObjectStore, prefix: str, tmp_path: Path
) -> Callable[..., Source]:
    """A function that opens a manifest with this content, once in the bucket and once as a local file."""

    def write(name: str, content: bytes, task: str = TEXTS, *, strict: bool = False) -> Source:
        if request.param == "disk":
            (tmp_path / name).write_bytes(content)
            return opener(tmp_path / name, task, strict=strict)
        store.put(prefix + name, content)
        return opener(prefix + name, task, strict=strict)

    return write


class TestManifests:
    def test_a_row_has_inputs_and_may_have_an_id_and_parameters(self, manifest: Callable[..., Source]) -> None:
        rows = [
            {"inputs": "good"},
            {"inputs": "bad", "id": "b", "parameters": {"top_k": 2}},
            {"inputs": {"text": "one", "text_pair": "two"}, "id": 7},
            {"inputs": "s3://media/größe 1.txt"},
        ]
        content = "\n\n".join(json.dumps(row) for row in rows).encode()
        found = items(manifest("m.jsonl", content))
        assert [(item.id, item.inputs, item.parameters) for item in found] == [
            (None, "good", {}),
            ("b", "bad", {"top_k": 2}),
            ("7", {"text": "one", "text_pair": "two"}, {}),
            ("größe 1.txt", {"$ref": "s3://media/größe 1.txt", "type": "text/plain"}, {}),
        ]

    @pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
    @pytest.mark.parametrize("last", [b"", b"\n"])
    def test_line_ends_and_byte_order_marks_do_not_matter(
        self, manifest: Callable[..., Source], ending: bytes, mark: bytes, last: bytes
    ) -> None:
        lines = mark + ending.join([b'{"inputs": "\xc3\xa4"}', b'{"inputs": "b"}']) + last
        assert [item.inputs for item in items(manifest("m.jsonl", lines))] == ["ä", "b"]
        table = mark + ending.join([b"id,inputs", b"1,\xc3\xa4", b'2,"b, c"']) + last
        assert [(item.id, item.inputs) for item in items(manifest("m.csv", table))] == [("1", "ä"), ("2", "b, c")]

    def test_a_table_may_hold_quoted_newlines_and_fields(self, manifest: Callable[..., Source]) -> None:
        table = b'text,id,text_pair\n"two\nlines",a,"she said ""no"""\n,b,x\n'
        assert [(item.id, item.inputs) for item in items(manifest("m.csv", table))] == [
            ("a", {"text": "two\nlines", "text_pair": 'she said "no"'}),
            ("b", {"text": "", "text_pair": "x"}),
        ]

    def test_long_lines_and_tables_are_read_in_pieces(self, manifest: Callable[..., Source]) -> None:
        texts = [letter * 100_000 for letter in "abc"]
        lines = "\n".join(json.dumps({"inputs": text}) for text in texts).encode()
        assert [item.inputs for item in items(manifest("m.jsonl", lines))] == texts
        table = ("inputs\n" + "\n".join(texts)).encode()
        assert [item.inputs for item in items(manifest("m.csv", table))] == texts

    @pytest.mark.parametrize("count", range(4))
    def test_it_goes_on_behind_any_row(self, manifest: Callable[..., Source], count: int) -> None:
        source = manifest("m.jsonl", b'{"inputs": "a"}\n\n{"inputs": "b"}\n{"inputs": "c"}\n')
        assert [item.inputs for item in source.items(count, None)] == ["a", "b", "c"][count:]

    WRONG = [
        ("m.jsonl", b"", "is empty"),
        ("m.jsonl", b"\n  \n", "is empty"),
        ("m.jsonl", b'{"inputs": "a"}\n{"inputs": b"}', "line 2, column 12: Expecting value"),
        ("m.jsonl", b'\n\n{"inputs": "a"', "line 3, column 15: Expecting"),
        ("m.jsonl", b'{"inputs": "a"}\n"text"', "line 2, column 1: a JSON object is expected"),
        ("m.jsonl", b'{"inputs": "\xff"}', "line 1, column 13: not UTF-8"),
        (
            "m.jsonl",
            b'{"input": "a", "inptus": "b"}',
            r"line 1, column 1: unknown key 'inptus' \(did you mean 'inputs'\?\)",
        ),
        ("m.jsonl", b'{"id": "a"}', "line 1, column 1: the key 'inputs' is missing"),
        ("m.jsonl", b'{"text": "a"}', "unknown key 'text'; an item is {inputs, id[?], parameters[?]}"),
        ("m.jsonl", b'{"inputs": "a"\r\n', "line 1, column 15: Expecting"),
        ("m.jsonl", b'{"inputs": "a", "id": [1]}', "line 1, column 1: id must be a text"),
        ("m.jsonl", b'{"inputs": "a", "parameters": 3}', "parameters an object"),
        ("m.csv", b"", "line 1, column 1: a column `inputs` is missing"),
        ("m.csv", b"id,inputs\n", "is empty"),
        ("m.csv", b"id\n1", "line 1, column 1: a column `inputs` is missing"),
        ("m.csv", b"id,input\n1,a", r"line 1, column 1: unknown column 'input' \(did you mean 'inputs'\?\)"),
        ("m.csv", b"id,inputs\n1,a\n2", "line 3, column 2: wrong number of columns"),
        ("m.csv", b"id,inputs\n1,a,b", "line 2, column 2: wrong number of columns"),
        ("m.csv", b'id,inputs\n1,"a\n', "unexpected end of data"),
        ("m.csv", b'id,inputs\n1,"a"b\n', "line 2, column 1: ',' expected after"),
        ("m.csv", b"id,inputs\n1,\xff\n2,a\n", "line 2, column 3: not UTF-8"),
        ("m.csv", b"inputs,text\na,b\n", r"either a column `inputs` or its fields \(text\), not both"),
        ("m.csv", b"inputs,inputs\na,b\n", "the column 'inputs' is there twice"),
    ]
    UNUSABLE = [
        ('{"inputs": "a", "parameters": {"topk": 3}}', r"did you mean 'top_k'\?", "a"),
        ('{"inputs": {"$ref": 3}}', "not a storage reference", None),
        ('{"inputs": "\\ud800"}', "not JSON: .*surrogates not allowed", None),
        ('{"inputs": "a", "id": "\\ud800"}', "not JSON", "a"),
        ('{"inputs": NaN}', "not a value of type float", None),
        ('{"inputs": null}', "not a value of type NoneType", None),
        ('{"inputs": 3}', "not a value of type int", 3),
        ('{"inputs": {"text": "a", "pair": "b"}}', "takes no field 'pair'", {"text": "a", "pair": "b"}),
    ]

    @pytest.mark.parametrize(("name", "content", "message"), WRONG)
    def test_a_malformed_line_is_refused_with_line_and_column(
        self, manifest: Callable[..., Source], name: str, content: bytes, message: str
    ) -> None:
        source = manifest(name, content)
        with pytest.raises(SourceError, match=message) as caught:
            source.check()
        assert name in str(caught.value)

    @pytest.mark.parametrize(("line", "reason", "inputs"), UNUSABLE)
    def test_an_item_that_cannot_be_prepared_is_one_that_failed(
        self, manifest: Callable[..., Source], line: str, reason: str, inputs: Any
    ) -> None:
        good, bad, after = items(manifest("m.jsonl", f'{{"inputs": "a"}}\n{line}\n{{"inputs": "b"}}'.encode()))
        assert (good.failure, after.failure, after.inputs) == (None, None, "b")
        assert bad.failure is not None
        assert re.search(reason, bad.failure)
        assert bad.inputs == inputs

    @pytest.mark.parametrize(("line", "reason", "inputs"), UNUSABLE)
    def test_a_strict_manifest_is_refused_for_it_with_line_and_column(
        self, manifest: Callable[..., Source], line: str, reason: str, inputs: Any
    ) -> None:
        source = manifest("m.jsonl", f'{{"inputs": "a"}}\n{line}'.encode(), strict=True)
        with pytest.raises(ManifestError, match=rf"m\.jsonl, line 2, column 1: .*{reason}"):
            source.check()

    def test_a_name_may_hold_spaces(self, manifest: Callable[..., Source]) -> None:
        assert [item.inputs for item in items(manifest("my list.jsonl", b'{"inputs": "a"}'))] == ["a"]

    def test_local_files_that_it_names_are_checked_but_not_uploaded_before_their_turn(
        self, manifest: Callable[..., Source], store: ObjectStore, prefix: str, tmp_path: Path
    ) -> None:
        (tmp_path / "a.jpg").write_bytes(b"picture")
        rows = [json.dumps({"inputs": str(tmp_path / name)}).encode() for name in ("a.jpg", "none.jpg")]
        source = manifest("m.jsonl", rows[0], PICTURES)
        source.check()
        assert not list(store.list(prefix + "store/"))
        (item,) = source.items(0, None)
        assert store.get(refs_in(item.inputs)[0].uri) == b"picture"
        with pytest.raises(ManifestError, match=r"line 2, column 1: cannot read the input .*none\.jpg"):
            manifest("m.jsonl", b"\n".join(rows), PICTURES, strict=True).check()
        _, missing = items(manifest("m.jsonl", b"\n".join(rows), PICTURES))
        assert missing.inputs == str(tmp_path / "none.jpg")
        assert re.match(r"line 2: cannot read the input .*none\.jpg", missing.failure or "")

    def test_a_failures_file_is_a_manifest(self, manifest: Callable[..., Source]) -> None:
        row = {
            "id": "a",
            "inputs": "x",
            "parameters": {"top_k": 1},
            "error": {"code": "c", "message": "m", "stage": "s"},
        }
        (found,) = items(manifest("failures.jsonl", json.dumps(row).encode()))
        assert found == SourceItem("a", "x", 21, {"top_k": 1})

    def test_a_run_remembers_where_its_manifest_lies(
        self, manifest: Callable[..., Source], prefix: str, tmp_path: Path
    ) -> None:
        assert manifest("m.jsonl", b'{"inputs": "a"}').describe() in (prefix + "m.jsonl", str(tmp_path / "m.jsonl"))
