"""The identity of a fleet: one Redis belongs to one store. Two fleets on one Redis would get jobs that they cannot run.

    <store>/_fleet.json   a random id of the store, written once with a conditional PUT
    pipefleet:fleet       that id, and the store's URI, its endpoint and the contract's version, as of the writer

The id decides, because an endpoint may have one name inside of a cluster and another outside. When Redis was emptied, the next
process writes the key again. A worker's store replaces a store that only a client has noted: else one client with a wrong setting,
first after Redis was emptied, would end the whole fleet. Clients `check` before they queue; workers `prove` at their start and
look again while they run. FleetMismatchError names both stores.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from pipefleet.connection.errors import redis_errors
from pipefleet.connection.rights import may, require
from pipefleet.connection.scripts import run_script
from pipefleet.contract.messages import CONTRACT_VERSION, encode_json
from pipefleet.contract.references import join_uri
from pipefleet.errors import (
    AccessDeniedError,
    ContractError,
    FleetMismatchError,
    ObjectMissingError,
    ObjectRefusedError,
    ServiceUnavailableError,
    UsageError,
)
from pipefleet.printable import printable
from pipefleet.queues.keys import FLEET_KEY
from pipefleet.settings import Settings, without_credentials
from pipefleet.storage.s3_errors import endpoint
from pipefleet.storage.store import ObjectStore

log = logging.getLogger(__name__)
OBJECT = "_fleet.json"
WORKER, CLIENT = "worker", "client"
_REPLACE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2]) end"
"""KEYS: fleet. ARGV: the expected content, the new content. Of several workers at the same time the first decides."""
AGAIN_SECONDS = 60.0
"""Seconds between a client's look that failed because S3 was away, and the next look."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The content of the key `pipefleet:fleet`."""

    id: str
    store: str
    endpoint: str
    contract: int
    by: str = WORKER
    """The kind of the writer: CLIENT until a worker has written it."""

    @classmethod
    def read(cls, content: bytes | None) -> Identity | None:
        """The identity in the key's content; None for an empty key. Unreadable content is a fleet to which nobody belongs."""
        if content is None:
            return None
        try:
            body = json.loads(content)
            return cls(
                str(body["id"]),
                str(body["store"]),
                str(body["endpoint"]),
                int(body["contract"]),
                str(body.get("by", WORKER)),
            )
        except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
            return cls("", "(unreadable)", "(unreadable)", CONTRACT_VERSION)

    def write(self) -> str:
        """The key's content."""
        return encode_json(asdict(self))


class Membership:
    """Checks that this process belongs to the fleet of its Redis. Not for several threads at once, though nothing breaks.

    Raises FleetMismatchError, which names both stores. If S3 is away or refuses access, nothing is refused: then only the URIs are
    compared, and they cannot tell two servers with stores of the same name.
    """

    def __init__(
        self, redis: Any, store: ObjectStore, settings: Settings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._redis = redis
        self._store = store
        self._settings = settings
        self._clock = clock
        self._compared = False
        """Whether the URIs and versions were compared."""
        self._proved = False
        """Whether everything was compared that these credentials allow."""
        self._next_look = 0.0
        self._seen: bytes | None = None

    def check(self, *, uses_store: bool) -> None:
        """A client's check before it queues. The first call does one Redis read, with `uses_store` also one S3 GET."""
        if self._proved or (self._compared and (not uses_store or self._clock() < self._next_look)):
            return
        if not uses_store:
            self._compare(self._known())
            return
        try:
            self.prove()
        except (ServiceUnavailableError, ObjectMissingError) as error:
            self._next_look = self._clock() + AGAIN_SECONDS
            log.info("the store of the fleet is not compared yet: %s", error)

    def prove(self, *, works: bool = False) -> str:
        """Compare everything. Returns the finding in one sentence. A worker (`works`) also writes its contract's version to Redis.

        Raises ServiceUnavailableError where Redis or S3 is away, ObjectMissingError where there is no bucket.
        """
        known = self._known()
        if works and known is not None and known.by == CLIENT:
            known = self._outranked(known)
        self._compare(known, works=works)
        where = f"{self._settings.store} at {endpoint()}"
        try:
            own = self._own_id(known)
        except (AccessDeniedError, ObjectRefusedError) as error:
            self._proved = True
            log.info("the store is compared by its URI alone: %s", error)
            told = f"its {OBJECT} cannot be read or written ({error})"
            return f"{where} is compared with the fleet's by its URI alone: {told}" if known else f"not noted: {told}"
        known = self._noted(known, own, works=works)
        if known is None:
            return f"Redis holds no identity, and its user may not write one; a worker's start with {where} does"
        if known.id != own:
            raise self._mismatch(known)
        if works and known.contract < CONTRACT_VERSION:
            with self._errors():
                self._redis.set(FLEET_KEY, replace(known, contract=CONTRACT_VERSION).write())
        self._proved = True
        return f"{where} is the store of this Redis's fleet, contract version {known.contract}"

    def changed(self) -> bool:
        """Whether Redis holds another content than at the last `prove`, or `prove` could not compare everything. One Redis read."""
        with self._errors():
            return not self._proved or self._redis.get(FLEET_KEY) != self._seen

    def adopt(self) -> str:
        """Make this process's store the fleet's. Returns one sentence about it. Workers with another store end soon."""
        with self._errors():
            require(self._redis, "--adopt-store", "operator", ("SET", FLEET_KEY, ""))
        mine = self._mine(self._own_id(None), WORKER)
        with self._errors():
            self._redis.set(FLEET_KEY, mine.write())
        return f"{mine.store} at {mine.endpoint} is the store of this Redis's fleet from now on"

    def _known(self) -> Identity | None:
        with self._errors():
            self._seen = self._redis.get(FLEET_KEY)
        return Identity.read(self._seen)

    def _compare(self, known: Identity | None, *, works: bool = False) -> None:
        """Compare URIs and versions, without the store."""
        self._compared = False
        self._check_names(known, works=works)
        self._compared = True

    def _check_names(self, known: Identity | None, *, works: bool) -> None:
        if known is None:
            return
        if known.store != self._settings.store:
            raise self._mismatch(known)
        if known.contract < CONTRACT_VERSION and not works:
            raise FleetMismatchError(
                f"the workers of this fleet know contract version {known.contract}, this client writes {CONTRACT_VERSION}: upgrade "
                "the workers first"
            )
        if known.contract > CONTRACT_VERSION and works:
            raise FleetMismatchError(
                f"the fleet is at contract version {known.contract}, this worker knows {CONTRACT_VERSION}: start one of the "
                "fleet's release, or go back with `pipefleet doctor --adopt-store` of this one"
            )

    def _own_id(self, known: Identity | None) -> str:
        """The id in the store. A missing object is written; if it only expired, it gets the id that it had."""
        uri = join_uri(self._settings.store, OBJECT)
        try:
            return _id_in(self._store.get(uri), uri)
        except ObjectMissingError:
            new = known.id if known is not None and self._is_named_alike(known) else uuid.uuid4().hex
            self._store.put_new(uri, encode_json({"id": new}).encode())
            return _id_in(self._store.get(uri), uri)

    def _is_named_alike(self, known: Identity) -> bool:
        """Whether Redis's fleet has a store of this URI at this endpoint, and the endpoint means the same server everywhere."""
        host = urlsplit(known.endpoint).hostname or known.endpoint
        local = host == "localhost" or host.startswith("127.") or host == "::1"
        return known.endpoint == endpoint() and known.store == self._settings.store and not local

    def _outranked(self, known: Identity) -> Identity | None:
        """Replace a client's store in Redis by this worker's. Returns the identity that Redis holds then."""
        try:
            mine = self._mine(self._own_id(known), WORKER)
        except (AccessDeniedError, ObjectRefusedError):
            return known
        if mine.id != known.id:
            log.warning(
                "a client alone has noted the store %s for this Redis; this worker's goes before",
                printable(known.store, 200),
            )
        with self._errors():
            run_script(self._redis, _REPLACE, [FLEET_KEY], self._seen, mine.write())
        return self._known()

    def _noted(self, known: Identity | None, own: str, *, works: bool) -> Identity | None:
        """The identity in Redis; an empty key is written first."""
        if known is not None:
            return known
        with self._errors():
            if may(self._redis, ("SETNX", FLEET_KEY, "")):
                self._redis.setnx(FLEET_KEY, self._mine(own, WORKER if works else CLIENT).write())
        return self._known()

    def _mine(self, own: str, by: str) -> Identity:
        return Identity(own, self._settings.store, endpoint(), CONTRACT_VERSION, by)

    def _mismatch(self, known: Identity) -> FleetMismatchError:
        url = without_credentials(self._settings.redis_url)
        if (known.store, known.endpoint) == (self._settings.store, endpoint()):
            return FleetMismatchError(
                f"{known.store} at {known.endpoint} is not the store that Redis at {url} knows by this name: its {OBJECT} has "
                "another id, so it was emptied or another server answers there; if that was meant, "
                "run `pipefleet doctor --adopt-store`"
            )
        theirs = f"{printable(known.store, 200)} at {printable(known.endpoint, 200)}"
        return FleetMismatchError(
            f"Redis at {url} belongs to a fleet whose store is {theirs}, and this process has {self._settings.store} at "
            f"{endpoint()}: set PIPEFLEET_STORE and AWS_ENDPOINT_URL_S3 to the fleet's, or PIPEFLEET_REDIS_URL to a Redis, or a "
            "database of it, of its own; where the fleet's store was moved, run `pipefleet doctor --adopt-store`"
        )

    def _errors(self) -> Any:
        return redis_errors(self._settings.redis_url)


def _id_in(content: bytes, uri: str) -> str:
    try:
        found = json.loads(content)["id"]
        if isinstance(found, str) and found:
            return found
    except (ValueError, LookupError, TypeError, RecursionError, ContractError):
        pass
    raise UsageError(f"{uri} holds no id of a store; remove it, and it is written anew")
