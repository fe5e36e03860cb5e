"""Manifests of every format, in the bucket and on disk: each is read as what it is, with bounded memory."""

from __future__ import annotations

import gzip
import itertools
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipefleet.contract.references import refs_in
from pipefleet.errors import ManifestError, ObjectMissingError, SourceError
from pipefleet.inputs.manifests import rows
from pipefleet.inputs.prepare import InputPreparer
from pipefleet.inputs.rows import SourceItem
from pipefleet.inputs.sources import Source, open_source
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import TASKS

CASES = Path(__file__).resolve().parents[3] / "cases"
TEXTS, PICTURES = "text-classification", "image-classification"
LONG = "x" * 200_000


@pytest.fixture(params=["bucket", "disk"])
def manifest(request: pytest.FixtureRequest, store: ObjectStore, prefix: str, tmp_path: Path) -> Callable[..., Source]:
    """A function that opens a manifest with this content, once in the bucket and once as a local file."""

    def write(name: str, content: bytes, task: str = TEXTS, *, strict: bool = False) -> Source:
        where = prefix + name
        if request.param == "disk":
            where = str(tmp_path / name)
            Path(where).write_bytes(content)
        else:
            store.put(where, content)
        preparer = InputPreparer(TASKS[task], store, prefix + "store/", inline_bytes=1000)
        return open_source(where, TASKS[task], store, preparer, output=prefix + "out/", strict=strict)

    return write


def items(source: Source) -> list[SourceItem]:
    source.check()
    return list(source.items(0, None))


def inputs(source: Source) -> list[Any]:
    return [item.inputs for item in items(source)]


READ = {
    "m.ndjson": b'{"inputs": "a"}\n{"inputs": "b"}\n',
    "M.JSONL": b'{"inputs": "a"}\r\n{"inputs": "b"}',
    "m.json": b'["a", {"inputs": "b"}]',
    "lines.json": b'{"inputs": "a"}\n{"inputs": "b"}',
    "pretty.json": b'\xef\xbb\xbf\n[\n  {\n    "inputs": "a"\n  },\n  "b"\n]\n',
    "m.tsv": b'inputs\tid\na\t1\n"b"\t2\n',
    "m.txt": b"a\r\n\n  \nb",
    "Semicolon.CSV": b"id;inputs\r\n1;a\r\n2;b\r\n",
    "excel.csv": "inputs\tid\r\na\t1\r\nb\t2\r\n".encode("utf-16"),
    "big-endian.csv": b"\xfe\xff" + "inputs\na\nb\n".encode("utf-16-be"),
    "m.jsonl.gz": gzip.compress(b'{"inputs": "a"}\n', mtime=0) + gzip.compress(b'{"inputs": "b"}\n', mtime=0),
    "m.csv.GZ": gzip.compress(b"inputs\na\nb\n", mtime=0),
}


@pytest.mark.parametrize("name", READ)
def test_each_format_is_read_as_what_it_is(manifest: Callable[..., Source], name: str) -> None:
    assert inputs(manifest(name, READ[name])) == ["a", "b"]


def test_a_json_array_has_an_item_for_each_element(manifest: Callable[..., Source]) -> None:
    assert inputs(manifest("array.json", (CASES / "array.json").read_bytes())) == ["Hello", "World"]
    rows_ = [{"inputs": "x", "id": 7, "parameters": {"top_k": 1}}, {"text": "a", "text_pair": "b"}]
    found = items(manifest("rows.json", json.dumps(rows_).encode()))
    assert [(item.id, item.inputs, item.parameters) for item in found] == [
        ("7", "x", {"top_k": 1}),
        (None, {"text": "a", "text_pair": "b"}, {}),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", f"inputs\n{LONG}\nb\n"),
        ("m.tsv", f"inputs\n{LONG}\nb\n"),
        ("m.txt", f"{LONG}\nb"),
        ("m.jsonl", f'{{"inputs": "{LONG}"}}\n{{"inputs": "b"}}'),
        ("m.json", f'["{LONG}", "b"]'),
        ("quoted.csv", f'inputs\n"{LONG}"\nb\n'),
    ],
)
def test_a_cell_or_a_line_may_be_long(manifest: Callable[..., Source], name: str, content: str) -> None:
    assert inputs(manifest(name, content.encode())) == [LONG, "b"]


def test_quoted_line_ends_stay_in_their_cell(manifest: Callable[..., Source]) -> None:
    assert inputs(manifest("m.csv", b'inputs\r\n"one\r\ntwo"\r\nb\r\n')) == ["one\r\ntwo", "b"]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("m.jsonl", b'{"inputs": "a"}\n{"inputs": "\xff"}\n{"inputs": "b"}', "line 2, column 13: not UTF-8"),
        ("m.csv", b"id,inputs\n1,a\n2,\xff\n3,b\n", "line 3, column 3: not UTF-8"),
        ("m.txt", b"a\n\xe4 in Latin-1\nb\n", "line 2, column 1: not UTF-8"),
        ("m.txt", b"a\nwith \x00 in it\nb\n", "line 2, column 6: not UTF-8"),
    ],
)
def test_a_line_that_is_no_text_fails_alone_with_its_number(
    manifest: Callable[..., Source], name: str, content: bytes, place: str
) -> None:
    good, bad, after = items(manifest(name, content))
    assert [(good.inputs, good.failure), (after.inputs, after.failure)] == [("a", None), ("b", None)]
    assert place in (bad.failure or "")
    with pytest.raises(ManifestError, match=place):
        manifest(name, content, strict=True).check()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.json", b'["a"', "line 1: the array is not closed"),
        ("m.json", b'["a",\n "b" "c"]', "line 2: ',' or ']' is expected"),
        ("m.json", b'["a",\n\n b]', "line 3: Expecting value"),
        ("m.json", b'["a"] more', "line 1: something follows the array"),
        ("m.json", b'["a",]', "line 1: Expecting value"),
        ("m.json", b"[]", "is empty"),
        ("m.json", b"[" * 100_000, "nested too deeply"),
        (
            "m.json",
            b'{\n "a": 1\n}',
            r"line 1, column \d+: .*a \.json manifest is one JSON array, or one JSON object a line",
        ),
        ("m.jsonl", b'{"inputs": ' + b"1" * 5000 + b"}", "line 1, column 1: Exceeds the limit"),
        ("m.txt", b"\x89PNG\r\n\x1a\n", "line 1, column 1: not UTF-8"),
        ("m.txt", b" \n\n", "is empty"),
        ("m.txt.gz", b"no gzip", "not a gzip file"),
        ("m.txt.gz", gzip.compress(b"a\nb\n" * 1000, mtime=0)[:-9], "a gzip file that ends too early"),
    ],
)
def test_what_is_no_manifest_is_refused_in_one_sentence(
    manifest: Callable[..., Source], name: str, content: bytes, message: str
) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        items(manifest(name, content))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["list.xlsx", "page.pdf", "photo.png", "notes.md", "list.jsonl.zip", "list", "csv"])
def test_a_file_of_another_format_is_never_one_text(manifest: Callable[..., Source], name: str) -> None:
    with pytest.raises(SourceError, match=r"is no manifest: give .*\.jsonl, \.ndjson, \.json, \.csv, \.tsv or \.txt"):
        manifest(name, b"words").check()


def test_a_picture_may_be_the_source_of_a_task_that_takes_pictures(store: ObjectStore, prefix: str) -> None:
    store.put(prefix + "cat.jpg", b"x")
    preparer = InputPreparer(TASKS[PICTURES], store, prefix + "store/", inline_bytes=1000)
    (found,) = items(open_source(prefix + "cat.jpg", TASKS[PICTURES], store, preparer, output=prefix + "out/"))
    assert refs_in(found.inputs)[0].uri == prefix + "cat.jpg"


def test_a_prefix_that_is_also_a_name_still_stands_for_all_below_it(store: ObjectStore, prefix: str) -> None:
    for name in ("notes", "notes-2"):
        store.put(prefix + name, b"words")
    preparer = InputPreparer(TASKS[TEXTS], store, prefix + "store/", inline_bytes=1000)
    assert len(items(open_source(prefix + "notes", TASKS[TEXTS], store, preparer, output=prefix + "out/"))) == 2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1 << 16])
def test_an_array_is_read_alike_however_it_is_cut_into_pieces(size: int) -> None:
    values = ["ä😀", 12345, -1.5e10, True, None, {"a": [1, {"b": "]"}]}, '\\"[,', [], {}, "x" * 300]
    content = json.dumps(values, indent=1, ensure_ascii=False).encode()
    pieces = (content[start : start + size] for start in range(0, len(content), size))
    found = [row["inputs"] for _, row in rows(pieces, "m.json", TASKS[TEXTS])]  # type: ignore[index]
    assert found == values


@pytest.mark.parametrize(
    ("name", "first", "each", "last"),
    [
        ("m.json", b"[", b'"some words of a text",\n', b'"end"]'),
        ("m.jsonl", b"", b'{"inputs": "some words of a text"}\n', b""),
        ("m.csv", b"inputs\n", b"some words of a text\n", b""),
    ],
)
def test_memory_stays_flat_however_long_a_manifest_is(name: str, first: bytes, each: bytes, last: bytes) -> None:
    def chunks() -> Iterator[bytes]:
        yield first
        for _ in range(20):
            yield each * 2000
        yield last

    tracemalloc.start()
    try:
        count = sum(1 for _ in rows(chunks(), name, TASKS[TEXTS]))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count in (40_000, 40_001)
    assert most < 1 << 20


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mac.csv", b'inputs,id\r"a",1\rb,\r'),
        ("mac.txt", b"a\rb\r"),
        ("mac.jsonl", b'{"inputs": "a", "id": null, "parameters": null}\r{"inputs": "b"}'),
    ],
)
def test_lines_may_end_with_a_carriage_return_alone_and_an_empty_id_is_none(
    manifest: Callable[..., Source], name: str, content: bytes
) -> None:
    assert [(item.inputs, item.id) for item in items(manifest(name, content))] == [
        ("a", "1" if name == "mac.csv" else None),
        ("b", None),
    ]


def test_an_array_with_bytes_that_are_no_text_names_the_line_of_that_element(manifest: Callable[..., Source]) -> None:
    found = items(manifest("m.json", b'["a",\n"\xff",\n"b", [1]]'))
    assert [item.inputs for item in found[:3:2]] == ["a", "b"]
    assert "line 2: not UTF-8" in (found[1].failure or "")
    assert (found[3].failure or "").startswith("line 3: text-classification takes texts")


def test_half_a_character_of_utf_16_fails_its_line(manifest: Callable[..., Source]) -> None:
    found = items(manifest("m.txt", "a\nb\nc".encode("utf-16")[:-1]))
    assert [item.inputs for item in found] == ["a", "b", None]
    assert "line 3, column 1: not UTF-8" in (found[2].failure or "")


@pytest.mark.parametrize("number", ["12.25", "12e+3"])
@pytest.mark.parametrize("cut", range(1, 5))
def test_a_number_that_is_cut_by_a_piece_stays_one(number: str, cut: int) -> None:
    first = "[" + " " * 70_000 + number[:cut]
    found = list(rows(iter([first.encode(), number[cut:].encode() + b"]"]), "m.json", TASKS[TEXTS]))
    assert found == [(1, {"inputs": float(number)})]


def test_a_manifest_that_is_not_there_is_no_matter_of_its_lines(store: ObjectStore, prefix: str) -> None:
    preparer = InputPreparer(TASKS[TEXTS], store, prefix + "store/", inline_bytes=1000)
    with pytest.raises(ObjectMissingError, match=r"^there is no object"):
        open_source(prefix + "m.jsonl", TASKS[TEXTS], store, preparer, output=prefix + "out/").check()


def test_an_element_beyond_measure_is_refused_as_such() -> None:
    pieces = itertools.chain([b'["'], itertools.repeat(b"x" * (1 << 20), 200))
    with pytest.raises(ManifestError, match="line 1: a text has more than 67108864 characters"):
        list(rows(pieces, "m.json", TASKS[TEXTS]))
