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

from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import MAX_SHARD_ITEMS, Shard
from pipefleet.contract.references import join_uri, split_uri
from pipefleet.errors import InputError
from pipefleet.printable import printable

_PART = re.compile(r"part-\d{5,}\.(?:jsonl|parquet)")
_POSITION = re.compile(r"\d{8,}")
_DATE = re.compile(r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])")
_ARTIFACT = re.compile(r".*\.(?:png|wav|npy)")
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

    The results of items that were queued again by themselves have a folder of their own in a run, `requeued/`, and none of these
    names. A folder `artifacts/20261231/` is taken for one of a date, where no object lies that has the name of an artifact.
    """
    names = _names(uri)
    if any(name in ("_run", "_success") or _PART.fullmatch(name) for name in names):
        return True
    may_be_artifact = bool(names) and _ARTIFACT.fullmatch(names[-1]) is not None
    return any(
        name == "artifacts" and _POSITION.fullmatch(after) and (may_be_artifact or not _DATE.fullmatch(after))
        for name, after in itertools.pairwise(names)
    )


def _names(uri: str) -> list[str]:
    """The names in a key without the disguises that some servers fold: empty ones, capitals, percent signs, dots at the end."""
    segments = split_uri(uri)[1].split("/")
    return [name for segment in segments if (name := unquote(segment).rstrip(". ").casefold())]


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
    if store and _in_store(uri, store):
        return f"{shown(uri)} lies among the uploads and results of the fleet's store; choose another output"
    return None


def _in_store(uri: str, store: str) -> bool:
    """Whether a URI lies where the fleet keeps uploads and results, under any of its disguises."""
    above, names = _names(store), _names(uri)
    rest = names[len(above) :]
    same = split_uri(uri)[0] == split_uri(store)[0] and names[: len(above)] == above
    return same and bool(rest) and rest[0] in _OF_THE_STORE
