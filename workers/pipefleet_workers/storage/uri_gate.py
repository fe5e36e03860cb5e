"""The gate that every URI of a message passes before it is read or written: inputs, outputs, runs, lists of shards.

`Jobs`, `Shards`, `Burials` and the fetcher ask it. It gets a URI, a message or a shard. It refuses with a sentence, or with
AccessDeniedError, InputError or ContractError, and does no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipefleet.contract.messages import JobMessage, Shard
from pipefleet.contract.uris import output_fault, shard_fault, shown, uri_fault
from pipefleet.errors import AccessDeniedError, ContractError, InputError
from pipefleet_workers.settings import WorkerSettings

ANYWHERE = ("s3://",)


class UriGate:
    """Decides which URIs the messages of a worker may name: URIs under `allowed`, except places that only the fleet itself writes.

    `store` is the prefix of the fleet's store; empty if there is no such store. Pure and thread-safe.
    """

    def __init__(self, allowed: Sequence[str] = ANYWHERE, store: str = "") -> None:
        self._allowed = tuple(allowed)
        self._store = store

    def require_reading(self, uri: str) -> None:
        """Raise AccessDeniedError for an input that this worker may not read, InputError for an input that no worker reads."""
        outside, fault = self._outside(uri, "read"), uri_fault(uri)
        if outside is not None:
            raise AccessDeniedError(outside)
        if fault is not None:
            raise InputError(fault)

    def output(self, message: JobMessage) -> str | None:
        """The reason why the output of a single job may not be written, or None."""
        if message.output is None:
            return None
        return output_fault(message.output, message.id, self._store) or self._outside(message.output, "write")

    def shard(self, shard: Shard) -> str | None:
        """The reason why a shard may not run, or None. Its URIs all lie under the URI of its run, so this URI decides."""
        outside = self._outside(shard.run_uri, "write")
        return (f"the output {outside}" if outside else None) or shard_fault(shard, self._store)

    def require_shard(self, shard: Shard) -> None:
        """Raise ContractError for a shard that may not run."""
        fault = self.shard(shard)
        if fault is not None:
            raise ContractError(fault)

    def _outside(self, uri: str, do: str) -> str | None:
        return None if lies_under(uri, self._allowed) else f"{shown(uri)} lies outside what this worker may {do}"


def allowed_prefixes(settings: WorkerSettings) -> tuple[str, ...]:
    """The prefixes that inputs and outputs may lie under."""
    return tuple(prefix.strip() for prefix in settings.allowed_uris.split(",") if prefix.strip())


def lies_under(uri: str, prefixes: Sequence[str]) -> bool:
    """Whether `uri` equals one of `prefixes` or lies below one, by whole path parts: `s3://pipe` is not above `s3://pipefleet/`."""
    return any(uri == prefix or uri.startswith(prefix if prefix.endswith("/") else prefix + "/") for prefix in prefixes)
