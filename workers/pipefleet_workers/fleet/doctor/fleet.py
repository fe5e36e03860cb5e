"""Checks of the fleet as a whole: its file, and that Redis and the store belong to one fleet."""

from __future__ import annotations

from pipefleet.connection.connect import connect
from pipefleet.fleet.identity import Membership
from pipefleet.settings import Settings, load_settings
from pipefleet.storage.store import ObjectStore


def check_fleet_file(settings: Settings) -> str:
    """The pools of the fleet file, and those that cannot get work. Raises PipefleetError for a wrong file."""
    from pipefleet.fleet.file import load_fleet

    path = settings.fleet_path
    if path is None:
        return "no fleet file; producers route by what workers announce"
    fleet = load_fleet(path, allow_unpinned=True)
    named = ", ".join(f"{pool.name} ({pool.task})" for pool in fleet.pools.values())
    return "; ".join((f"{path}: {named}", *fleet.idle_pools().values()))


def check_identity(settings: Settings) -> str:
    """Raises PipefleetError where Redis and the store belong to different fleets."""
    return Membership(connect(settings), ObjectStore(), settings).prove()


def adopt_store() -> str:
    """Make the store of these settings that of Redis's fleet; what became of it. Raises PipefleetError."""
    settings = load_settings()
    return Membership(connect(settings), ObjectStore(), settings).adopt()
