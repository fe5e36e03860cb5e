"""The doctor's checks of the workers: the settings that live workers run with, and the workers that S3 refuses.

`report` calls them. Both read the workers' announcements in Redis and return a sentence.
They raise PipefleetError if a needed worker is missing, if S3 refuses a worker, or if Redis is away.
"""

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
    """Dtype, device and batching of each live worker. Raises PipefleetError if no worker lives although one is `needed`."""
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
    """Dtype, device, attention and quantization of a worker's model. Earlier releases announce none; the values may be anything."""
    loaded = facts.get("loaded")
    named = loaded if isinstance(loaded, Mapping) else {}
    found = [printable(f"{name} {one}", 100) for name, one in named.items() if isinstance(one, str)]
    return f"{', '.join(found[:6])}; " if found else ""


def check_access(settings: Settings) -> str:
    """A sentence if S3 refuses no worker. Raises PipefleetError with each refused worker, and the reason or the buckets."""
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
