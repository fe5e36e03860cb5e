"""Checks of the workers: what those that are alive run with, and which of them S3 refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.errors import PipefleetError
from pipefleet.fleet.announcements import announced_workers, refused_places
from pipefleet.printable import printable
from pipefleet.settings import Settings


def check_workers(settings: Settings, *, needed: bool) -> str:
    """How each live worker runs its model: dtype, device, batching. Raises PipefleetError if none lives and some are `needed`."""
    with redis_errors(settings.redis_url):
        workers = announced_workers(connect(settings))
    if not workers and not needed:
        return "none is alive, and none is needed now"
    if not workers:
        raise PipefleetError("no worker is alive; start one with `pipefleet worker --pool NAME`, or `pipefleet up`")
    return "; ".join(
        f"{name}: {_runs_with(facts)}{facts.get('batching', '')}" for name, facts in sorted(workers.items())
    )


def _runs_with(facts: Mapping[str, Any]) -> str:
    """Dtype, device, attention and quantization of a worker's model; earlier releases tell none, and others may tell anything."""
    loaded = facts.get("loaded")
    named = loaded if isinstance(loaded, Mapping) else {}
    found = [printable(f"{name} {one}", 100) for name, one in named.items() if isinstance(one, str)]
    return f"{', '.join(found[:6])}; " if found else ""


def check_access(settings: Settings) -> str:
    """Raises PipefleetError that names the workers which take no jobs since S3 refuses them, and why."""
    with redis_errors(settings.redis_url):
        workers = announced_workers(connect(settings))
    barred = {name: str(facts["barred"]) for name, facts in sorted(workers.items()) if facts.get("barred")}
    told = [f"{printable(name)} takes no jobs: {printable(why, 400)}" for name, why in barred.items()]
    for name, facts in sorted(workers.items()):
        if places := refused_places(facts):
            buckets = printable(", ".join(f"s3://{one}/" for one in places), 400)
            told.append(
                f"{printable(name)} gives jobs back whose bucket S3 refuses to it: {buckets}; see what its policy allows"
            )
    if told:
        raise PipefleetError("; ".join(told))
    return f"S3 refuses none of {len(workers)}"
