"""write: outcomes become the lines of a part, the JSON of a single result, and artifacts beside them. No state, no acks."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from pipefleet.contract import Shard
from pipefleet.errors import PipefleetError
from pipefleet.layout import RunLayout
from pipefleet.records import JobFailure
from pipefleet.storage import map_refs
from pipefleet_workers.items import ItemError, Outcome
from pipefleet_workers.objects import WorkerStore

STAGE = "write"
INLINE_NUMBERS = 16_384
"""Longest array that stands in a JSON line; longer ones become .npy artifacts."""


def dumps(value: Any) -> bytes:
    """JSON of a result. Raises ItemError (bad_output) for what JSON cannot hold, NaN and infinity included."""
    try:
        body = orjson.dumps(_plain(value), option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    except (TypeError, ValueError) as error:
        raise ItemError("bad_output", f"the result is not JSON: {error}", STAGE) from None
    return body


def _plain(value: Any) -> Any:
    """`value` with arrays that orjson can write: contiguous, and finite, since it would turn NaN into null."""
    if isinstance(value, np.ndarray):
        if not np.isfinite(value).all():
            raise ItemError("bad_output", "the result holds NaN or infinity", STAGE)
        return np.ascontiguousarray(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class PartWriter:
    """Writes the part of a shard. Thread-safe."""

    def __init__(self, store: WorkerStore, provenance: Mapping[str, Any]) -> None:
        self._store = store
        self._provenance = dict(provenance)

    def write(self, shard: Shard, outcomes: list[Outcome]) -> bool:
        """Write the part with a line for each outcome, in order. False when another worker's part was there first."""
        layout = RunLayout(shard.run_uri)
        lines = [self._line(layout, shard.first + index, outcome) for index, outcome in enumerate(outcomes)]
        body = b"\n".join(lines) + b"\n"
        return self._store.put_new(layout.part(shard.index), body, content_type="application/x-ndjson")

    def _line(self, layout: RunLayout, position: int, outcome: Outcome) -> bytes:
        item = outcome.work.item
        row: dict[str, Any] = {"id": item.id, "input": map_refs(item.inputs, lambda reference: reference.uri)}
        if item.parameters:
            row["parameters"] = dict(item.parameters)
        seconds = {stage: round(value, 6) for stage, value in outcome.work.seconds.items()}
        provenance = {**self._provenance, "seconds": seconds}
        if outcome.failure is None:
            try:
                output = self._with_artifacts(layout, position, outcome.output)
                return dumps({**row, "output": output, "provenance": provenance})
            except ItemError as error:
                return dumps({**row, "error": error.failure.to_json(), "provenance": provenance})
        return dumps({**row, "error": outcome.failure.to_json(), "provenance": provenance})

    def _with_artifacts(self, layout: RunLayout, position: int, output: Any) -> Any:
        if not isinstance(output, np.ndarray) or output.size <= INLINE_NUMBERS:
            return output
        if not np.isfinite(output).all():
            raise ItemError("bad_output", "the result holds NaN or infinity", STAGE)
        uri = layout.artifact(position, "output.npy")
        buffer = io.BytesIO()
        np.save(buffer, output, allow_pickle=False)
        try:
            self._store.put(uri, buffer.getvalue(), content_type="application/x-npy")
        except PipefleetError as error:
            raise ItemError(error.code, str(error), STAGE) from None
        return {"$artifact": uri, "kind": "array", "shape": list(output.shape), "dtype": str(output.dtype)}


def to_failure(error: PipefleetError, stage: str) -> JobFailure:
    """The failure of a job for one of the package's own errors."""
    return JobFailure(error.code, str(error), stage)
