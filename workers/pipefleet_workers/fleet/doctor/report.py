"""The report of `pipefleet doctor`: every check, of the services, the fleet, its pools and this machine.

`command` calls `run_checks`, which reads the settings and returns a list of `Check`. The checks of each subject lie in a module
of this package. A wrong setting raises UsageError; every other error becomes a failed check.
"""

from __future__ import annotations

from collections.abc import Callable

from pipefleet.settings import Settings, load_settings
from pipefleet_workers.fleet.doctor.check import Check, checked
from pipefleet_workers.fleet.doctor.clocks import check_clocks
from pipefleet_workers.fleet.doctor.entries import check_entries
from pipefleet_workers.fleet.doctor.fleet import check_fleet_file, check_identity
from pipefleet_workers.fleet.doctor.machine import checks_of_machine
from pipefleet_workers.fleet.doctor.pools import UNREAD, pool_checks
from pipefleet_workers.fleet.doctor.redis_memory import check_memory
from pipefleet_workers.fleet.doctor.redis_server import check_redis, check_rights
from pipefleet_workers.fleet.doctor.store import check_conditional_writes, check_store
from pipefleet_workers.fleet.doctor.workers import check_access, check_workers


def run_checks() -> list[Check]:
    """All checks, causes before their consequences. Raises UsageError for a wrong setting."""
    settings = load_settings()
    pools = pool_checks(settings)
    checks: list[tuple[str, Callable[[Settings], str]]] = [
        ("redis", check_redis),
        ("redis rights", check_rights),
        ("redis memory", check_memory),
        ("s3", check_store),
        ("s3 conditional writes", check_conditional_writes),
        ("clock", check_clocks),
        ("fleet", check_fleet_file),
        ("fleet identity", check_identity),
        ("entries", check_entries),
        ("workers", lambda settings: check_workers(settings, needed=not (pools and all(one.ok for one in pools)))),
        ("workers' access", check_access),
    ]
    found = [checked(name, check, settings) for name, check in checks]
    if [one.name for one in pools] == [UNREAD] and any(not one.ok for one in found if one.name in ("redis", "fleet")):
        pools = []  # that has told why
    return [
        *found,
        *pools,
        *(checked(name, check, settings) for name, check in checks_of_machine()),
    ]
