"""Sources of a bulk run's items: a bucket prefix, a manifest, a folder, or any iterable. A new source is a `Source` here.

The planner calls `check` once, then `items`. A source yields `SourceItem`s one by one, in a fixed order, with constant memory.
An item that cannot be prepared is yielded with its `failure`. `check` reads a manifest through before anything is written, so a
malformed line refuses the run. SourceError and ManifestError name the fault.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from pipefleet.contract.references import StorageRef, is_uri, refs_in, split_uri
from pipefleet.errors import InputError, ManifestError, RunError, SourceError, UsageError, nearest
from pipefleet.inputs.local_files import is_file, is_folder, why_no_source
from pipefleet.inputs.manifests import ANNOTATIONS, FORMATS, KEYS, Row, Unreadable, rows, suffix_of
from pipefleet.inputs.prepare import InputPreparer, is_table
from pipefleet.inputs.rows import SourceItem, failed_item, in_utf8, item_or_failure, row_item
from pipefleet.storage.store import ListedObject, ObjectStore
from pipefleet.tasks import Media, TaskSpec

_CHUNK = 1 << 16
_ROW = "an item is {inputs, id?, parameters?}, its fields inside inputs"
"""What a row looks like, for messages."""
_ID = (str, int, type(None))
_TEXTS = (Media.TEXT, Media.TEXTS, Media.PROMPT, None)
"""Tasks with such inputs take no single object as a source: it would be one text."""


class Source(Protocol):
    """A source of items. `describe` names it for the run; None says that it cannot be read a second time."""

    def describe(self) -> str | None:
        """The URI or path, for `run.json`."""

    def check(self) -> None:
        """Raise SourceError when the source is missing or malformed. Reads it through if that is needed."""

    def items(self, skip: int, last: SourceItem | None) -> Iterator[SourceItem]:
        """The items after the first `skip`, whose last was `last`. Called again when a service was away."""


@dataclass(frozen=True, slots=True)
class PrefixSource:
    """Every object under an `s3://` prefix, in the order of the keys, without the objects under `exclude`."""

    uri: str
    store: ObjectStore
    exclude: str
    texts: bool = False
    """Whether each object would be one text. Then a URI of a single object is refused: it is more likely a list of texts."""

    def describe(self) -> str:
        """The prefix."""
        return self.uri

    def check(self) -> None:
        """Raise SourceError unless the bucket exists and holds something under the prefix."""
        self.store.require_bucket(self.uri)
        if self.uri.startswith(self.exclude):
            raise SourceError(
                f"the output {self.exclude} holds the source {self.uri}, and nothing below an output is read as input; "
                "choose another output"
            )
        found = list(itertools.islice(self.items(0, None), 2))
        if not found:
            raise SourceError(f"nothing lies under {self.uri}; check the prefix (it is case-sensitive)")
        if self.texts and [_key(one) for one in found] == [split_uri(self.uri)[1]]:
            raise SourceError(
                f"{self.uri} is no manifest: give {FORMATS}, or the prefix above it to take each file as one text"
            )

    def items(self, skip: int, last: SourceItem | None) -> Iterator[SourceItem]:
        """The objects after `last`. A key that ends in a slash marks a folder and is passed over."""
        bucket, _ = split_uri(self.uri)
        excluded_bucket, excluded = split_uri(self.exclude)
        after = _key(last) if last else ""
        for entry in self.store.list(self.uri, after=after):
            inside_output = bucket == excluded_bucket and entry.key.startswith(excluded)
            if entry.key.endswith("/") or inside_output:
                continue
            yield _object_item(bucket, entry)


@dataclass(frozen=True, slots=True)
class ManifestSource:
    """The rows of a manifest (see `pipefleet.inputs.manifests`), in object storage or in a local file."""

    location: str
    store: ObjectStore
    spec: TaskSpec
    preparer: InputPreparer
    strict: bool = False
    """Whether `check` also refuses lines whose items cannot be prepared."""

    def describe(self) -> str:
        """The manifest's URI, or its absolute path."""
        return self.location if is_uri(self.location) else in_utf8(str(Path(self.location).resolve()))

    def check(self) -> None:
        """Read the manifest through, and upload nothing. Raise ManifestError for the first malformed line."""
        dry, count = self.preparer.dry(), 0
        for line, row in self._rows():
            count += 1
            try:
                if isinstance(row, Unreadable):
                    if self.strict or count == 1:  # a file that begins so is not a text file
                        raise ManifestError(f"{self.location}, {row.reason}")
                    continue
                _check_keys(row)
                if self.strict:
                    row_item(row, dry)
            except ManifestError:
                raise
            except UsageError as error:
                raise ManifestError(f"{self.location}, line {line}, column 1: {error}") from None
        if not count:
            raise SourceError(f"the manifest {self.location} is empty")

    def items(self, skip: int, last: SourceItem | None) -> Iterator[SourceItem]:
        """The items after the first `skip` rows. A line that is not text fails alone. Raises ManifestError for a malformed line."""
        for line, row in itertools.islice(self._rows(), skip, None):
            if isinstance(row, Unreadable):
                yield failed_item({}, f"{row.reason}; the line is left out")
                continue
            try:
                _check_keys(row)
            except SourceError as error:
                raise ManifestError(f"{self.location}, line {line}, column 1: {error}") from None
            item = item_or_failure(row, self.preparer)
            yield item if item.failure is None else replace(item, failure=f"line {line}: {item.failure}")

    def _rows(self) -> Iterator[tuple[int, Row]]:
        return rows(self._chunks(), self.location, self.spec)

    def _chunks(self) -> Iterator[bytes]:
        if is_uri(self.location):
            yield from self.store.chunks(self.location)
            return
        try:
            with open(self.location, "rb") as file:
                yield from iter(lambda: file.read(_CHUNK), b"")
        except OSError as error:
            raise SourceError(f"cannot read the manifest {self.location}: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class FolderSource:
    """Every file under a local folder, in the order of names. Each is uploaded; its id is its path in the folder."""

    folder: Path
    preparer: InputPreparer

    def describe(self) -> str:
        """The folder's absolute path."""
        return in_utf8(str(self.folder.resolve()))

    def check(self) -> None:
        """Raise SourceError unless there is a file in the folder, and where a folder in it cannot be read."""
        if not self._files():
            raise SourceError(f"there is no file in the folder {self.folder}")

    def items(self, skip: int, last: SourceItem | None) -> Iterator[SourceItem]:
        """The items after the first `skip` files."""
        for path in self._files()[skip:]:
            identity = in_utf8(path.relative_to(self.folder).as_posix())
            yield item_or_failure({"inputs": path, "id": identity}, self.preparer)

    def _files(self) -> list[Path]:
        found = (Path(folder, name) for folder, _, names in os.walk(self.folder, onerror=_unread) for name in names)
        return sorted(path for path in found if is_file(path))


@dataclass(slots=True)
class IterableSource:
    """Any iterable of inputs, or of rows with the keys of a manifest. It is read once, lazily."""

    values: Iterable[Any]
    preparer: InputPreparer
    _iterator: Iterator[Any] | None = None
    _held: list[Any] = field(default_factory=list)
    """The value that was taken from the iterable and is not an item yet."""

    def describe(self) -> None:
        """None: an iterable cannot be opened again."""
        return

    def check(self) -> None:
        """Nothing: a look would consume values."""

    def items(self, skip: int, last: SourceItem | None) -> Iterator[SourceItem]:
        """The items after the first `skip` values; a second call goes on after the last item, for any `skip`.

        Raises RunError for an error of the iterable itself.
        """
        if self._iterator is None:
            self._iterator = itertools.islice(self.values, skip, None)
        while self._held or self._take(self._iterator):
            (value,) = self._held
            item = item_or_failure(_row_of(value), self.preparer)
            self._held.clear()
            yield item

    def _take(self, iterator: Iterator[Any]) -> bool:
        """Hold the next value. False at the end."""
        try:
            self._held.append(next(iterator))
        except StopIteration:
            return False
        except Exception as error:
            raise RunError(f"the source raised {type(error).__name__}: {error}") from error
        return True


def open_source(
    source: Any, spec: TaskSpec, store: ObjectStore, preparer: InputPreparer, *, output: str, strict: bool = False
) -> Source:
    """The source that a user named. Raises SourceError for a string that is neither a URI nor a local path.

    With `strict`, the `check` of a manifest also refuses items that cannot be prepared.
    """
    if isinstance(source, str | os.PathLike):
        found = _named_source(os.fsdecode(source), spec, store, preparer, output)
        return replace(found, strict=strict) if isinstance(found, ManifestSource) else found
    if is_table(source):
        raise SourceError(
            "a table of pandas is no source, since it yields the names of its columns; pass the column with the inputs, "
            'table["text"], or its rows, table.to_dict("records")'
        )
    if _is_indexed(source):
        source = map(source.__getitem__, range(len(source)))
    if isinstance(source, Mapping | bytes | bytearray | memoryview) or not isinstance(source, Iterable):
        raise SourceError(f"a source is an s3:// URI or an iterable of inputs, not a {type(source).__name__}")
    return IterableSource(source, preparer)


def _named_source(name: str, spec: TaskSpec, store: ObjectStore, preparer: InputPreparer, output: str) -> Source:
    is_manifest = suffix_of(name) is not None
    if name.startswith("s3://"):
        split_uri(name)
        if is_manifest:
            return ManifestSource(name, store, spec, preparer)
        return PrefixSource(name, store, output, texts=spec.media in _TEXTS)
    if name and is_folder(name):
        return FolderSource(Path(name), preparer)
    if is_file(name) and is_manifest:
        return ManifestSource(name, store, spec, preparer)
    raise SourceError(f"{why_no_source(name)}: give an s3:// prefix, {FORMATS}, or a folder")


def _is_indexed(source: Any) -> bool:
    """True for a torch data set without an iterator, such as transformers' KeyDataset. A decoder of a film is one input."""
    indexed = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    return indexed and not hasattr(source, "__iter__") and not hasattr(source, "get_frame_at")


def _unread(error: OSError) -> None:
    """Refuse a folder of which a part would be missing without a word."""
    raise SourceError(f"cannot read the folder {error.filename}: {error.strerror}") from None


def _object_item(bucket: str, entry: ListedObject) -> SourceItem:
    """The item of one object, pinned by its ETag."""
    uri = f"s3://{bucket}/{entry.key}"
    try:
        guess = StorageRef.of(uri)
    except InputError as error:
        return failed_item({"inputs": uri, "id": entry.key}, str(error))
    return SourceItem(entry.key, StorageRef(uri, entry.etag, entry.size, guess.type).to_json(), entry.size)


def _key(item: SourceItem) -> str:
    """The key of an object's item. A failed item has it as its id."""
    references = refs_in(item.inputs)
    return references[0].key if references else item.id or ""


def _row_of(value: Any) -> Mapping[str, Any]:
    """The row of an iterable's value: the value itself if it has the keys of a row; else the value is the inputs."""
    try:
        is_row = isinstance(value, Mapping) and "inputs" in value and set(value) <= KEYS | ANNOTATIONS
    except Exception:  # noqa: BLE001 - a mapping of the user's own may raise anything; preparing it will say so
        is_row = False
    return value if is_row else {"inputs": value}


def _check_keys(row: Mapping[str, Any]) -> None:
    """Raise SourceError unless the keys of a row, and the types of their values, are those of a manifest."""
    if not row.keys() <= KEYS:
        word = sorted(row.keys() - KEYS)[0]
        raise SourceError(f"unknown key {word!r}{nearest(word, KEYS)}; {_ROW}")
    if "inputs" not in row:
        raise SourceError(f"the key 'inputs' is missing; {_ROW}")
    parameters = row.get("parameters")
    if not isinstance(row.get("id"), _ID) or (parameters is not None and not isinstance(parameters, Mapping)):
        raise SourceError("id must be a text, parameters an object")
