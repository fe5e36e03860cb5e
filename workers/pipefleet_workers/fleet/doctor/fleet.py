"""The doctor's checks of the fleet as a whole: the fleet file, and that Redis and the store belong to one fleet.

`report` calls the checks, and `command` calls `adopt_store`. Each returns a sentence.
A wrong fleet file, a store of another fleet, or an absent service raises PipefleetError.
"""

from __future__ import annotations

from pipefleet.connection.connect import connect
from pipefleet.fleet.identity import Membership
from pipefleet.settings import Settings, load_settings
from pipefleet.storage.store import ObjectStore


def check_fleet_file(settings: Settings) -> str:
    """The pools of the fleet file, and the pools among them that cannot get work. Raises PipefleetError for a wrong file."""
    from pipefleet.fleet.file import load_fleet

    path = settings.fleet_path
    if path is None:
        return "no fleet file; producers route by what workers announce"
    fleet = load_fleet(path, allow_unpinned=True)
    named = ", ".join(f"{pool.name} ({pool.task})" for pool in fleet.pools.values())
    return "; ".join((f"{path}: {named}", *fleet.idle_pools().values()))


def check_identity(settings: Settings) -> str:
    """A sentence if Redis and the store belong to one fleet. Raises PipefleetError if not."""
    return Membership(connect(settings), ObjectStore(), settings).prove()


def adopt_store() -> str:
    """Make the store of the settings the store of Redis's fleet. Returns the outcome as a sentence. Raises PipefleetError."""
    settings = load_settings()
    return Membership(connect(settings), ObjectStore(), settings).adopt()
