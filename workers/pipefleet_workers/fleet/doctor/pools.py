"""The doctor's checks of pools: a pool passes if a worker serves it, or if it needs no worker now.

`report` calls `pool_checks` with the settings and gets a `Check` for each pool. The numbers come from `top.read`.
Nothing is raised: if the pools cannot be read, one failed check gives the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipefleet.connection.errors import redis_errors
from pipefleet.errors import PipefleetError
from pipefleet.fleet.announcements import announced_fleet
from pipefleet.settings import Settings
from pipefleet_workers.fleet.doctor.check import Check

if TYPE_CHECKING:
    from pipefleet.client import Client
    from pipefleet.fleet.pools import Pool
    from pipefleet_workers.fleet.top.read import PoolRow

UNREAD = "pools"
"""The name of the check that replaces the checks of the pools if the pools cannot be read."""


def pool_checks(settings: Settings) -> list[Check]:
    """A check for each pool; one failed check if the pools cannot be read.

    The pools are all pools of the fleet file, and the announced pools and unnamed revisions that messages wait for.
    """
    from pipefleet.client import Client

    try:
        with Client(settings) as client:
            troubles: dict[str, str] = {}
            found = [_pool(row, pool) for row, pool in _pools(client, troubles)] + _unnamed(client, troubles)
            return [*found, *(Check(f"pool {name}", False, trouble) for name, trouble in troubles.items())]
    except PipefleetError as error:
        return [Check(UNREAD, False, str(error))]
    except Exception as error:  # noqa: BLE001 - as in `checked`
        return [Check(UNREAD, False, f"{type(error).__name__}: {error}")]


def _pools(client: Client, troubles: dict[str, str]) -> list[tuple[PoolRow, Pool]]:
    from pipefleet.fleet.pools import Fleet, Pool
    from pipefleet_workers.fleet.top.read import read_fleet

    fleet = client.fleet
    with redis_errors(client.settings.redis_url):
        announced = announced_fleet(client.redis)
    others = Fleet({name: pool for name, pool in announced.pools.items() if name not in fleet.pools})
    named = fleet.revisions
    looks = read_fleet(client, fleet, unnamed=False), read_fleet(client, others, unnamed=False)
    rows = [(row, look is looks[0] and row.pool in named) for look in looks for row in look.pools]
    for look in looks:
        troubles.update(look.troubles)
    return [
        (row, named.get(row.pool) or Pool(row.pool, row.task, row.model))
        for row, is_named in rows
        if is_named or sum(row.messages.values()) > 0
    ]


def _unnamed(client: Client, troubles: dict[str, str]) -> list[Check]:
    """A failed check for each revision that has waiting messages and no worker, and that the fleet file does not name."""
    from pipefleet.fleet.revisions import read_backlogs

    with redis_errors(client.settings.redis_url):
        backlogs = read_backlogs(client.redis, client.fleet, troubles=troubles)
    return [
        Check(f"pool {one.part.key}", False, f"{_waits(sum(one.waiting.values()) + one.held.delayed)}: {one.note}")
        for one in backlogs
        if one.first is not None and not one.part.named and one.note
    ]


def _waits(count: int) -> str:
    return f"{count} {'message waits' if count == 1 else 'messages wait'}"


def _pool(row: PoolRow, pool: Pool) -> Check:
    """Whether a worker serves the pool, or the pool needs no worker now."""
    name, waiting = f"pool {row.pool}", row.messages["queued"] + row.messages["delayed"]
    waits = _waits(waiting)
    start = f"start one with `pipefleet worker --pool {row.pool}`, or `pipefleet up`"
    if row.note:
        return Check(
            name,
            False,
            f"{row.note}; {waits}. Mend its cause, then save the fleet file or send SIGHUP to `pipefleet up`",
        )
    if row.alive:
        return Check(name, True, f"{row.alive} {'worker' if row.alive == 1 else 'workers'}, {waits}")
    if pool.generation and not waiting:
        return Check(name, True, "no worker, and nothing waits for it: it may be taken out of `previous`")
    if pool.workers.min == 0 and row.wanted is not None:
        if not waiting:
            return Check(name, True, "no worker, and no work: a scaler starts one when there is some")
        return Check(
            name, False, f"{waits} and no worker is alive, though a scaler wants {row.wanted}; see what starts them"
        )
    return Check(name, False, f"no worker is alive, {waits}; {start}")
