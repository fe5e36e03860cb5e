"""write: outcomes become the lines of a part, the JSON of a single result, and artifacts beside them. No state, no acks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from pipefleet.contract import Shard
from pipefleet.errors import PipefleetError
from pipefleet.layout import RunLayout
from pipefleet.parts import part_format
from pipefleet.records import JobFailure
from pipefleet.storage import map_refs
from pipefleet_workers.items import ItemError, Outcome
from pipefleet_workers.objects import WorkerStore
from pipefleet_workers.stages.artifacts import ArtifactWriter

STAGE = "write"
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS


def dumps(value: Any) -> bytes:
    """JSON of a result. Raises ItemError (bad_output) for what JSON cannot hold, NaN and infinity included."""
    try:
        body = _encode(value)
    except (TypeError, ValueError) as error:
        raise ItemError("bad_output", f"the result is not JSON: {error}", STAGE) from None
    # orjson writes NaN and infinity as null: only where one stands is the value itself walked, which costs far more.
    if b"null" in body and not _is_finite(value):
        raise ItemError("bad_output", "the result holds NaN or infinity", STAGE)
    return body


def _encode(value: Any) -> bytes:
    return orjson.dumps(value, default=_plain, option=_OPTIONS)


def _plain(value: Any) -> Any:
    """What orjson can write, for what it cannot: arrays that are not contiguous or of a rare type, mappings that are no dict."""
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


class PartWriter:
    """Writes the part of a shard. Thread-safe. Raises what the store raises; a shard can be written again."""

    def __init__(self, store: WorkerStore, provenance: Mapping[str, Any]) -> None:
        self._store = store
        self._artifacts = ArtifactWriter(store)
        self._provenance = dict(provenance)

    def write(self, shard: Shard, outcomes: Sequence[Outcome]) -> bytes | None:
        """Write the part with a row for each outcome, in order; the part. None when another worker's was there first."""
        layout, written_as = RunLayout(shard.run_uri, shard.format), part_format(shard.format)
        lines = [self._line(layout, shard.first + index, outcome) for index, outcome in enumerate(outcomes)]
        body = written_as.encode(lines)
        ours = self._store.put_new(layout.part(shard.index), body, content_type=written_as.media_type)
        return body if ours else None

    def _line(self, layout: RunLayout, position: int, outcome: Outcome) -> bytes:
        """The line of one item; where its input or its result is no JSON, the line says so and the shard goes on."""
        item = outcome.work.item
        seconds = {stage: round(value, 6) for stage, value in outcome.work.seconds.items()}
        tail = {**self._result(layout, position, outcome), "provenance": {**self._provenance, "seconds": seconds}}
        try:
            parameters = {"parameters": dict(item.parameters)} if item.parameters else {}
            return _encode({"id": item.id, "input": _with_uris(item.inputs), **parameters, **tail})
        except (TypeError, ValueError, RecursionError, PipefleetError) as error:
            failure = outcome.failure or JobFailure("bad_input", f"the item cannot be written as JSON: {error}", STAGE)
            row = {"id": item.id, "input": None, **tail, "error": failure.to_json()}
            row.pop("output", None)
            return _encode(_utf8(row))

    def _result(self, layout: RunLayout, position: int, outcome: Outcome) -> dict[str, Any]:
        if outcome.failure is not None:
            return {"error": outcome.failure.to_json()}
        try:
            return {"output": orjson.Fragment(dumps(self._artifacts.store(outcome.output, layout.artifacts(position))))}
        except ItemError as error:
            return {"error": error.failure.to_json()}


def _with_uris(inputs: Any) -> Any:
    return map_refs(inputs, lambda reference: reference.uri)


def _utf8(value: Any) -> Any:
    """`value` with a question mark for each character that UTF-8 cannot hold."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, Mapping):
        return {name: _utf8(item) for name, item in value.items()}
    return value
