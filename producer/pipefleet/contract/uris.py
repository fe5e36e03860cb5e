"""The URIs that a message may name. No network; producers ask here too, so that they send nothing that a worker refuses.

    output of a single job     not inside a run, and not among the uploads and results of the fleet's store
    output of a run            not inside another run either
    list of a shard's items    where the layout of its run has it, and nowhere else

The functions return a sentence that names the fault, or None. A URI lies in a run when it has names of a run's layout, wherever
they stand: no message can be trusted to say which run they belong to. The settings of a worker decide besides whether it may
reach a URI at all.
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

    `.` and `..` between slashes are refused in every spelling: some servers resolve them, and then the object lies elsewhere.
    """
    try:
        _, key = split_uri(uri)
    except InputError as error:
        return str(error)
    if any(unquote(segment) in (".", "..") for segment in key.split("/")):
        return f"{shown(uri)} has . or .. between slashes"
    return None


def lies_in_run(uri: str) -> bool:
    """Whether a URI without a fault has a name of a run's layout: a part, an artifact, `_SUCCESS` or `_run/`.

    `requeued/`, the folder of items that were queued again by themselves, has none of these names. A folder `artifacts/20261231/`
    counts as a date, unless the URI ends like an artifact.
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
    """The names in a key, as servers that fold spellings see them: no empty names, capitals, percent signs or dots at the end."""
    segments = split_uri(uri)[1].split("/")
    return [name for segment in segments if (name := unquote(segment).rstrip(". ").casefold())]


def output_fault(output: str, job_id: str, store: str) -> str | None:
    """Why the result of a single job may not be written to `output`, or None. `store` is the prefix of the fleet's store."""
    uri = join_uri(output, f"{job_id}.json") if output.endswith("/") else output
    return uri_fault(uri) or _place_fault(uri, store)


def run_fault(uri: str, store: str) -> str | None:
    """Why no run may have its output under `uri`, or None. The URI of a run ends with one slash."""
    fault = uri_fault(uri)
    if fault is None and (not uri.endswith("/") or uri.endswith("//")):
        fault = f"{shown(uri)} is no output of a run, which ends with one slash"
    return fault or _place_fault(uri, store)


def shard_fault(shard: Shard, store: str) -> str | None:
    """Why a shard cannot belong to the run that it names, or None. Only the message is checked, not the run's own files."""
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
    """Whether a URI, in any spelling, lies where the fleet keeps uploads and results."""
    above, names = _names(store), _names(uri)
    rest = names[len(above) :]
    same = split_uri(uri)[0] == split_uri(store)[0] and names[: len(above)] == above
    return same and bool(rest) and rest[0] in _OF_THE_STORE
