"""Which URIs a message may name, and what for. Pure; producers ask here too, so that none sends what a worker refuses.

    output of a single job     not inside a run, and not among the uploads and results of the fleet's store
    output of a run            not inside another run either
    list of a shard's items    where the layout of its run has it, and nowhere else

A run is told by the names of its layout, wherever they stand: no message can be trusted to say whose they are. Whether a worker may
reach a URI at all is for its own settings to say.
"""

from __future__ import annotations

import itertools
import re
from urllib.parse import unquote

from pipefleet.contract import MAX_SHARD_ITEMS, Shard
from pipefleet.errors import InputError
from pipefleet.layout import RunLayout
from pipefleet.printable import printable
from pipefleet.storage import join_uri, split_uri

_PART = re.compile(r"part-\d{5,}\.(?:jsonl|parquet)")
_POSITION = re.compile(r"\d{8,}")
_OF_THE_STORE = ("uploads", "results")
"""Below the fleet's store: inputs by content hash, and results by job."""


def shown(uri: str) -> str:
    """A URI for a sentence: on one line, of at most 200 characters."""
    return printable(uri, 200)


def uri_fault(uri: str) -> str | None:
    """Why no message may name a URI, or None.

    `.` and `..` between slashes are refused however they are written: some servers resolve them, so that the object lies elsewhere.
    """
    try:
        _, key = split_uri(uri)
    except InputError as error:
        return str(error)
    if any(unquote(segment) in (".", "..") for segment in key.split("/")):
        return f"{shown(uri)} has . or .. between slashes"
    return None


def lies_in_run(uri: str) -> bool:
    """Whether a URI, which has no fault, has one of the names that make up a run: its parts, artifacts, `_SUCCESS` and `_run/`.

    Empty segments, capitals, percent signs and dots at the end are seen through: some servers fold them. The results of items that
    were queued again by themselves have a folder of their own in a run, `requeued/`, and none of these names.
    """
    _, key = split_uri(uri)
    names = [unquote(segment).rstrip(". ").casefold() for segment in key.split("/") if segment]
    if any(name in ("_run", "_success") or _PART.fullmatch(name) for name in names):
        return True
    return any(name == "artifacts" and _POSITION.fullmatch(after) for name, after in itertools.pairwise(names))


def output_fault(output: str, job_id: str, store: str) -> str | None:
    """Why the result of a single job may not be written to `output`, or None. `store` is the prefix of the fleet's store."""
    uri = join_uri(output, f"{job_id}.json") if output.endswith("/") else output
    return uri_fault(uri) or _place_fault(uri, store)


def run_fault(uri: str, store: str) -> str | None:
    """Why no run may have its output under `uri`, or None; a run's own URI has one slash at its end."""
    fault = uri_fault(uri)
    if fault is None and (not uri.endswith("/") or uri.endswith("//")):
        fault = f"{shown(uri)} is no output of a run, which ends with one slash"
    return fault or _place_fault(uri, store)


def shard_fault(shard: Shard, store: str) -> str | None:
    """Why a shard is none of the run that it names, or None; what the run itself says is not looked at."""
    fault = run_fault(shard.run_uri, store)
    if fault is not None:
        return fault
    if shard.uri != RunLayout(shard.run_uri).shard(shard.index):
        return (
            f"{shown(shard.uri)} is not where the run at {shown(shard.run_uri)} lists the items of shard {shard.index}"
        )
    if shard.count < 1 or not shard.index <= shard.first <= shard.index * MAX_SHARD_ITEMS:
        return f"shard {shard.index} of a run cannot have {shard.count} items from position {shard.first}"
    return None


def _place_fault(uri: str, store: str) -> str | None:
    if lies_in_run(uri):
        return f"{shown(uri)} lies inside the output of a run, which only that run writes; choose another output"
    if store and any(uri.startswith(join_uri(store, name) + "/") for name in _OF_THE_STORE):
        return f"{shown(uri)} lies among the uploads and results of the fleet's store; choose another output"
    return None
