"""Turns outcomes into the lines of a part, or the JSON of a single result, and stores artifacts beside them. No state, no acks.

The engine's store stage calls `ResultWriter`; `Shards.close` calls `PartWriter`. A result that JSON or the format cannot hold fails
its item (bad_output), never its shard.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import Shard
from pipefleet.contract.parts import FLOAT32, PartFormat, part_format
from pipefleet.contract.records import JobFailure
from pipefleet.contract.references import join_uri, map_refs
from pipefleet.errors import PipefleetError, RunError, ServiceUnavailableError
from pipefleet_workers.adapters.base import brief
from pipefleet_workers.items import Artifact, Encoded, Finished, ItemError, Outcome, Work
from pipefleet_workers.process.watchdog import waiting
from pipefleet_workers.results.artifacts import TakenApart
from pipefleet_workers.storage.store import WorkerStore

log = logging.getLogger(__name__)
STAGE = "write"
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS

_PLAIN_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS


def dumps(value: Any) -> bytes:
    """JSON of a result. Raises ItemError (bad_output) for values that JSON cannot hold, NaN and infinity included."""
    try:
        body = _encode(value)
        # orjson writes NaN and infinity as null. Walking the value costs far more, so only a value with a null is walked.
        finite = b"null" not in body or _is_finite(value)
    except Exception as error:  # noqa: BLE001 - whatever a value raises while it is written is its own result's failure
        raise ItemError("bad_output", f"the result is not JSON: {brief(error)}", STAGE) from None
    if not finite:
        raise ItemError("bad_output", "the result holds NaN or infinity", STAGE)
    return body


def body_of(outcome: Outcome) -> bytes | JobFailure:
    """The JSON of an item's result, or its failure."""
    if outcome.failure is not None:
        return outcome.failure
    value = outcome.output
    if isinstance(value, Encoded):
        if value.vector is None:
            return value.body
        value = value.vector
    try:
        return dumps(value)
    except ItemError as error:
        return error.failure


def _encode(value: Any) -> bytes:
    return orjson.dumps(value, default=_plain, option=_OPTIONS)


def _plain(value: Any) -> Any:
    """A form that orjson can write, for arrays that are not contiguous or of a rare type, and for mappings other than dict."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


def _is_finite(value: Any) -> bool:
    """Whether no number in a JSON value, its keys included, is NaN or infinite."""
    if isinstance(value, float | np.floating):
        return math.isfinite(value)
    if isinstance(value, np.ndarray):
        return bool(np.isfinite(value).all()) if value.dtype.kind == "f" else _is_finite(value.tolist())
    if isinstance(value, Mapping):
        return all(_is_finite(name) and _is_finite(item) for name, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_finite(item) for item in value)
    return True


class ResultWriter:
    """Makes results ready to be written: it stores their artifacts, and turns the rest into JSON. Thread-safe.

    Artifacts of a bulk run lie beside its parts; artifacts of a single job lie under `<results>/results/`.
    """

    def __init__(self, store: WorkerStore, results: str) -> None:
        self._store = store
        self._results = results

    @staticmethod
    def plain(output: Any) -> Encoded | None:
        """The JSON of a result that holds no artifact and nothing but JSON, as most do; None for other results."""
        try:
            body = orjson.dumps(output, option=_PLAIN_OPTIONS)
        except Exception:  # noqa: BLE001 - `take_apart` and `write` look closer
            return None
        return None if b"null" in body else Encoded(body)

    def take_apart(self, work: Work, output: Any) -> Finished:
        """The artifacts of a result, and the value that refers to them. Stores nothing. Raises ItemError (bad_output)."""
        try:
            found = TakenApart(output, functools.partial(self._prefix, work))
        except Exception as error:  # noqa: BLE001 - whatever a result raises while it is read is its own failure
            raise _bad_output(error) from None
        return Finished(work, found.value, found.artifacts)

    def write(self, finished: Finished) -> Encoded:
        """Store the artifacts of a result, one after another, and free each.

        Raises ItemError for a value that JSON or a codec cannot hold (bad_output) and for a refusal of the store. Raises
        ServiceUnavailableError when the store stays away.
        """
        if _is_vector(finished):
            return Encoded(vector=finished.value)
        body = dumps(finished.value)
        finished.artifacts.reverse()
        while finished.artifacts:
            artifact = finished.artifacts.pop()
            self._put(artifact, _content(artifact))
        return Encoded(body)

    def _prefix(self, work: Work) -> str:
        shard = work.job.shard
        if shard is None:
            return join_uri(self._results, "results", work.job.id)
        return RunLayout(shard.run_uri).artifacts(shard.first + work.position)

    def _put(self, artifact: Artifact, content: bytes) -> None:
        try:
            with waiting():  # the store has time-outs of its own; the watchdog times only the encoding
                self._store.put(artifact.uri, content, content_type=artifact.media_type)
        except ServiceUnavailableError:
            raise
        except PipefleetError as error:
            raise ItemError(error.code, str(error), STAGE) from None


def _content(artifact: Artifact) -> bytes:
    try:
        return artifact.encode()
    except ItemError:
        raise
    except Exception as error:  # noqa: BLE001 - codecs raise what they like
        raise _bad_output(error) from None


def _bad_output(error: Exception) -> ItemError:
    return ItemError("bad_output", f"the result cannot be written: {brief(error)}", STAGE)


class PartWriter:
    """Writes the part of a shard. Thread-safe. Raises the store's errors; a shard can be written again."""

    def __init__(self, store: WorkerStore, provenance: Mapping[str, Any]) -> None:
        self._store = store
        self._provenance = dict(provenance)

    def write(self, shard: Shard, outcomes: Sequence[Outcome]) -> bytes | None:
        """Write the part, with a row for each outcome, in order.

        Returns the part; None if another worker's part was there first.
        """
        layout, written_as = RunLayout(shard.run_uri, shard.format), part_format(shard.format)
        body = self._of_vectors(written_as, outcomes) or self._encoded(written_as, outcomes)
        ours = self._store.put_new(layout.part(shard.index), body, content_type=written_as.media_type)
        return body if ours else None

    def _encoded(self, written_as: PartFormat, outcomes: Sequence[Outcome]) -> bytes:
        """The part. A row that its format cannot hold fails alone; it is found by writing each row alone."""
        lines = self._lines(outcomes, map(body_of, outcomes))
        try:
            return written_as.encode(lines)
        except RunError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the format's library raises
            log.warning("a part has a row that %s cannot hold: %s", written_as.name, brief(error))
        return written_as.encode([self._that_fits(written_as, *pair) for pair in zip(lines, outcomes, strict=True)])

    def _of_vectors(self, written_as: PartFormat, outcomes: Sequence[Outcome]) -> bytes | None:
        """The part, written from arrays. None unless all results are vectors of one length and all items are JSON."""
        vectors = _vectors(outcomes)
        lines = self._lines(outcomes, itertools.repeat(b"null")) if vectors is not None else []
        if not lines or any(b'"error":' in line for line in lines):
            return None
        try:
            return written_as.encode(lines, vectors)
        except RunError:
            raise
        except Exception:  # noqa: BLE001 - `_encoded` meets the error again, and finds its row
            return None

    def _that_fits(self, written_as: PartFormat, line: bytes, outcome: Outcome) -> bytes:
        """`line`, or the line of a failure if the format cannot hold it.

        The line of a failure has no input if the format cannot hold the input.
        """
        refused = _refusal(written_as, line)
        if refused is None:
            return line
        (line,) = self._lines([outcome], [refused])
        if _refusal(written_as, line) is None:
            return line
        row = {
            "id": str(outcome.work.item.id),
            "input": None,
            "error": refused.to_json(),
            "provenance": self._provenance,
        }
        return _encode(utf8(row))

    def _lines(self, outcomes: Sequence[Outcome], bodies: Iterable[bytes | JobFailure]) -> list[bytes]:
        """The line of each item with its result or failure."""
        told = {id(seconds): seconds for seconds in [one.work.seconds for one in outcomes]}
        shared = {key: self._told(seconds) for key, seconds in told.items()}
        pairs = zip([one.work for one in outcomes], bodies, strict=False)
        return [self._line(work, body, shared[id(work.seconds)]) for work, body in pairs]

    def _told(self, seconds: Mapping[str, float]) -> orjson.Fragment:
        rounded = {stage: round(value, 6) for stage, value in seconds.items()}
        return orjson.Fragment(_encode(utf8({**self._provenance, "seconds": rounded})))

    def _line(self, work: Work, body: bytes | JobFailure, provenance: orjson.Fragment) -> bytes:
        """The line of one item. If its input is no JSON, the line says so and the shard goes on."""
        item = work.item
        result = {"output": orjson.Fragment(body)} if isinstance(body, bytes) else {"error": utf8(body.to_json())}
        warnings = {"warnings": utf8_all(work.warnings)} if work.warnings else {}
        tail = {**result, **warnings, "provenance": provenance}
        try:
            parameters = {"parameters": dict(item.parameters)} if item.parameters else {}
            return _encode({"id": item.id, "input": _with_uris(item.inputs), **parameters, **tail})
        except Exception as error:  # noqa: BLE001 - inputs come from any program that can queue
            failure = body if isinstance(body, JobFailure) else _no_json(error)
            row = {"id": item.id, "input": None, **tail, "error": failure.to_json()}
            row.pop("output", None)
            return _encode(utf8(row))


def _is_vector(finished: Finished) -> bool:
    """Whether a result is a vector, and goes into a part that holds vectors as such. JSON has no NaN and no infinity."""
    shard, value = finished.work.job.shard, finished.value
    return (
        shard is not None
        and part_format(shard.format).vectors
        and isinstance(value, np.ndarray)
        and value.dtype == np.float32
        and value.ndim == 1
        and value.size > 0
        and float(np.abs(value).max()) <= FLOAT32
    )


def _vectors(outcomes: Sequence[Outcome]) -> np.ndarray[Any, Any] | None:
    """The results of a shard as one array; None unless all are vectors of one length."""
    found = [one.output.vector if one.failure is None and isinstance(one.output, Encoded) else None for one in outcomes]
    if any(one is None for one in found) or len({len(one) for one in found if one is not None}) != 1:
        return None
    return np.stack([one for one in found if one is not None])


def _no_json(error: Exception) -> JobFailure:
    return JobFailure("bad_input", f"the item cannot be written as JSON: {brief(error)}", STAGE)


def _refusal(written_as: PartFormat, line: bytes) -> JobFailure | None:
    """The reason why a format cannot hold a row, or None."""
    try:
        written_as.encode([line])
    except Exception as error:  # noqa: BLE001 - whatever the format's library raises
        return JobFailure("bad_output", f"{written_as.name} cannot hold the item: {brief(error)}", STAGE)
    return None


def _with_uris(inputs: Any) -> Any:
    return inputs if isinstance(inputs, str) else map_refs(inputs, lambda reference: reference.uri)


def utf8_all(texts: Sequence[str]) -> list[str]:
    """The texts, each made safe by `utf8`."""
    return [str(utf8(text)) for text in texts]


def utf8(value: Any) -> Any:
    """`value` with a question mark for each character that UTF-8 cannot hold."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, Mapping):
        return {name: utf8(item) for name, item in value.items()}
    return value
