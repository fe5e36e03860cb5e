"""Iterables as the source of a run, against a real bucket."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from pipefleet.contract.references import refs_in
from pipefleet.errors import (
    AccessDeniedError,
    RunError,
    ServiceUnavailableError,
    SourceError,
)
from pipefleet.inputs.uploads import Uploader
from pipefleet.storage.store import ObjectStore
from tests.unit.producer.inputs.opened import PICTURES, TEXTS, Opener, items


class TestIterables:
    def test_inputs_and_rows_may_be_mixed(self, opener: Opener) -> None:
        values = ["a", {"text": "b"}, {"inputs": "c", "id": 3}, {"inputs": "d", "parameters": {"top_k": 1}}]
        assert [(item.id, item.inputs, item.parameters) for item in items(opener(values))] == [
            (None, "a", {}), (None, {"text": "b"}, {}), ("3", "c", {}), (None, "d", {"top_k": 1}),
        ]  # fmt: skip

    def test_it_is_read_lazily_and_once(self, opener: Opener) -> None:
        numbers = itertools.count()
        source = opener(f"text {number}" for number in numbers)
        source.check()
        found = [item.inputs for item in itertools.islice(source.items(2, None), 3)]
        assert found == ["text 2", "text 3", "text 4"]
        assert next(numbers) == 5
        assert source.describe() is None

    def test_failed_rows_are_rows(self, opener: Opener) -> None:
        row = {"id": "a", "inputs": "x", "error": {"code": "c", "message": "m", "stage": "s"}}
        assert [(item.id, item.inputs) for item in items(opener([row]))] == [("a", "x")]

    def test_parameters_of_a_row_are_checked(self, opener: Opener) -> None:
        for parameters in ({"custom_generate": "x"}, ["top_k"]):
            (found,) = items(opener([{"inputs": "a", "id": "x", "parameters": parameters}]))
            assert found.failure is not None
            assert "parameter" in found.failure
            assert (found.id, found.inputs) == ("x", "a")
            assert found.parameters in (parameters, {})

    def test_what_it_raises_itself_ends_the_run_though_a_retry_might_help(self, opener: Opener) -> None:
        def values() -> Any:
            yield "a"
            raise ServiceUnavailableError("its own service is away")

        source = opener(values()).items(0, None)
        assert next(source).inputs == "a"
        with pytest.raises(RunError, match="the source raised ServiceUnavailableError: its own service is away"):
            next(source)

    def test_no_value_is_lost_when_its_upload_failed(
        self, opener: Opener, monkeypatch: pytest.MonkeyPatch, store: ObjectStore
    ) -> None:
        source = opener(iter([b"a", b"b", b"c"]), PICTURES)
        reading = source.items(0, None)
        found = [next(reading)]
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
            patch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
            store._client = None  # it is made anew, from the environment
            with pytest.raises(ServiceUnavailableError):
                next(reading)
        store._client = None
        found += source.items(1, found[0])
        assert [store.get(refs_in(item.inputs)[0].uri) for item in found] == [b"a", b"b", b"c"]

    def test_whatever_a_value_raises_when_it_is_read_is_its_own_failure(self, opener: Opener, tmp_path: Path) -> None:
        class Truncated:
            mode = "RGB"

            def save(self, *_: Any, **__: Any) -> None:
                raise AssertionError

            def load(self) -> None:
                raise OSError("image file is truncated")

        values = [b"a", None, Truncated(), tmp_path / "none.jpg", {"inputs": 3, "id": "c"}, b"b"]
        found = items(opener(values, PICTURES))
        assert [one.failure is None for one in found] == [True, False, False, False, False, True]
        assert [(one.id, one.inputs) for one in found[1:5]] == [
            (None, None), (None, None), (None, str(tmp_path / "none.jpg")), ("c", 3),
        ]  # fmt: skip
        assert found[2].failure == "the picture cannot be read: OSError: image file is truncated"

    def test_a_row_that_is_decoded_as_it_is_read_fails_alone(self, opener: Opener) -> None:
        class Lazy(dict[str, Any]):
            def __getitem__(self, name: str) -> Any:
                if name == "inputs":
                    raise OSError("image file is truncated")
                return super().__getitem__(name)

            def get(self, name: str, default: Any = None) -> Any:
                return self[name] if name in self else default  # noqa: SIM401 - it is what is defined here

        class Broken(dict[str, Any]):
            def __iter__(self) -> Any:
                raise RuntimeError("no columns")

        found = items(opener([b"a", Lazy(inputs=b"x", id="lazy"), Broken(inputs=b"x"), b"b"], PICTURES))
        assert [one.failure is None for one in found] == [True, False, False, True]
        assert found[1].failure == "the input cannot be read: OSError: image file is truncated"
        assert [(one.id, one.inputs) for one in found[1:3]] == [("lazy", None), (None, None)]

    def test_a_missing_field_is_named(self, opener: Opener) -> None:
        (found,) = items(opener([{"question": "who?"}], "question-answering"))
        assert found.failure is not None
        assert found.failure.endswith("context is missing")
        assert found.inputs == {"question": "who?"}

    def test_a_service_that_refuses_is_not_the_failure_of_an_item(
        self, opener: Opener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for error in (AccessDeniedError("no"), ServiceUnavailableError("away")):
            monkeypatch.setattr(Uploader, "content", lambda *_, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(type(error)):
                items(opener([b"a"], PICTURES))

    @pytest.mark.parametrize("source", [3, None, b"s3://media/", {"inputs": "a"}])
    def test_what_is_no_iterable_of_inputs_is_refused(self, opener: Opener, source: Any) -> None:
        with pytest.raises(SourceError, match=r"an s3:// URI or an iterable of inputs, not a"):
            opener(source)

    def test_a_local_folder_is_read_in_the_order_of_its_names(
        self, opener: Opener, tmp_path: Path, store: ObjectStore
    ) -> None:
        folder = tmp_path / "pictures"
        for name in ("b.jpg", "a.jpg", "deep/er/c.jpg"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        found = items(opener(str(folder), PICTURES))
        assert [store.get(refs_in(item.inputs)[0].uri).decode() for item in found] == [
            "a.jpg",
            "b.jpg",
            "deep/er/c.jpg",
        ]
        assert [item.id for item in found] == ["a.jpg", "b.jpg", "deep/er/c.jpg"]
        source = opener(str(folder), PICTURES)
        assert list(source.items(1, found[0])) == found[1:]
        assert source.describe() == str(folder)

    def test_a_name_that_is_not_utf8_is_shown_by_its_bytes_and_its_file_is_an_item_like_any_other(
        self, opener: Opener, tmp_path: Path, store: ObjectStore
    ) -> None:
        folder = os.fsencode(tmp_path) + b"/\xff"
        try:
            Path(os.fsdecode(folder)).mkdir()
        except OSError:
            pytest.skip("this file system has no such names")
        for name in (b"caf\xe9.wav", b"other.w\xe4v"):
            Path(os.fsdecode(folder + b"/" + name)).write_bytes(name)
        source = opener(Path(os.fsdecode(folder)), PICTURES)
        found = items(source)
        assert [(item.id, item.failure) for item in found] == [("caf\\xe9.wav", None), ("other.w\\xe4v", None)]
        assert [store.get(refs_in(item.inputs)[0].uri) for item in found] == [b"caf\xe9.wav", b"other.w\xe4v"]
        assert source.describe() == str(tmp_path / "\\xff")
        missing = items(opener([os.fsdecode(b"none\xe9.jpg")], PICTURES))[0]
        assert missing.inputs is None  # another name would be another file
        assert r"cannot read the input 'none\udce9.jpg'" in str(missing.failure)

    @pytest.mark.parametrize("task", [TEXTS, "token-classification", "text-generation"])
    def test_a_text_that_cannot_be_read_does_not_become_the_text_of_its_path(
        self, task: str, opener: Opener, tmp_path: Path
    ) -> None:
        (tmp_path / "empty.txt").touch()
        for source in (tmp_path, [tmp_path / "missing.txt"], [{"inputs": tmp_path / "missing.txt", "id": "a"}]):
            (found,) = items(opener(source, task))
            assert "txt" in str(found.failure)
            (again,) = items(opener([{"inputs": found.inputs, "id": found.id}], task))
            assert again.failure is not None
            assert again.id == found.id

    def test_a_picture_that_cannot_be_read_is_looked_for_again(self, opener: Opener, tmp_path: Path) -> None:
        (tmp_path / "empty.png").touch()
        (found,) = items(opener(tmp_path, PICTURES))
        assert found.inputs == str(tmp_path / "empty.png")
        assert found.failure is not None

    def test_a_folder_of_texts_and_an_empty_one(self, opener: Opener, tmp_path: Path, store: ObjectStore) -> None:
        (tmp_path / "texts").mkdir()
        with pytest.raises(SourceError, match="there is no file in the folder"):
            opener(tmp_path / "texts").check()
        (tmp_path / "texts" / "a.txt").write_text("hello")
        (found,) = items(opener(tmp_path / "texts"))
        assert (found.id, store.get(refs_in(found.inputs)[0].uri)) == ("a.txt", b"hello")

    @pytest.mark.parametrize("name", ["", "none", "none.jsonl", "none/", "http://example.org/list.jsonl"])
    def test_a_name_of_nothing_is_refused(self, opener: Opener, name: str, environment: dict[str, str]) -> None:
        with pytest.raises(SourceError, match=r"no such source .*give an s3:// prefix, a \.jsonl, \.ndjson"):
            opener(name)

    def test_a_local_file_that_is_no_manifest_is_refused(self, opener: Opener, tmp_path: Path) -> None:
        (tmp_path / "photo.jpg").write_bytes(b"x")
        with pytest.raises(SourceError, match=r"photo\.jpg' is no manifest: give an s3:// prefix, a \.jsonl"):
            opener(tmp_path / "photo.jpg", PICTURES)
