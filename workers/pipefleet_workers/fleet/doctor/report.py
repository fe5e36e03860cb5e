"""`pipefleet doctor`: is everything there that a fleet needs, and what to do about what is not."""

from __future__ import annotations

import importlib
import importlib.util
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipefleet.connection import rights
from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.contract.references import join_uri
from pipefleet.errors import PipefleetError
from pipefleet.fleet.announcements import announced_fleet, announced_workers
from pipefleet.fleet.identity import Membership
from pipefleet.printable import printable
from pipefleet.settings import Settings, load_settings, without_credentials
from pipefleet.storage.s3_errors import endpoint
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.fleet.doctor.checks import access_of_workers, clocks
from pipefleet_workers.fleet.doctor.entries import check_entries
from pipefleet_workers.fleet.doctor.redis_memory import check_memory
from pipefleet_workers.fleet.doctor.redis_writes import judge_writes

if TYPE_CHECKING:
    from pipefleet.client import Client
    from pipefleet.fleet.pools import Pool
    from pipefleet_workers.fleet.top.read import PoolRow

UNREAD = "pools"
"""The check that stands for those of the pools where they cannot be read."""
RACERS = 50
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail}


def run_checks() -> list[Check]:
    """All checks in the order in which their causes build on each other. Raises UsageError for a wrong setting."""
    settings = load_settings()
    pools = pool_checks(settings)
    checks: list[tuple[str, Callable[[Settings], str]]] = [
        ("redis", _redis),
        ("redis rights", _rights),
        ("redis memory", check_memory),
        ("s3", _store),
        ("s3 conditional writes", _race),
        ("clock", clocks),
        ("fleet", _fleet),
        ("fleet identity", _identity),
        ("entries", check_entries),
        ("workers", lambda settings: _workers(settings, needed=not (pools and all(one.ok for one in pools)))),
        ("workers' access", access_of_workers),
    ]
    here: list[tuple[str, Callable[[Settings], str]]] = [("images", _images), ("audio", _audio), ("device", _device)]
    if not _installed("torch"):
        here = [("this machine", _producer)]
    found = [_checked(name, check, settings) for name, check in checks]
    if [one.name for one in pools] == [UNREAD] and any(not one.ok for one in found if one.name in ("redis", "fleet")):
        pools = []  # that has told why
    return [
        *found,
        *pools,
        *(_checked(name, check, settings) for name, check in here),
    ]


def pool_checks(settings: Settings) -> list[Check]:
    """A check for each pool: does somebody serve it, or need nobody? One failed check where they cannot be read.

    Pools are those of the fleet file, and others that are announced and that messages wait for.
    """
    from pipefleet.client import Client

    try:
        with Client(settings) as client:
            troubles: dict[str, str] = {}
            found = [_pool(row, pool) for row, pool in _pools(client, troubles)] + _unnamed(client, troubles)
            return [*found, *(Check(f"pool {name}", False, trouble) for name, trouble in troubles.items())]
    except PipefleetError as error:
        return [Check(UNREAD, False, str(error))]
    except Exception as error:  # noqa: BLE001 - as in `_checked`
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
    """A check for each revision of the fleet's pools that messages wait for, and that nobody names nor serves."""
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
    """Whether a pool is served, or needs nobody now."""
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


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _checked(name: str, check: Callable[[Settings], str], settings: Settings) -> Check:
    try:
        return Check(name, True, check(settings))
    except PipefleetError as error:
        return Check(name, False, str(error))
    except ModuleNotFoundError as error:
        return Check(name, False, f"{error.name} is not installed; install it with pip install 'pipefleet[workers]'")
    except Exception as error:  # noqa: BLE001 - a check that breaks is a finding, not an end
        return Check(name, False, f"{type(error).__name__}: {error}")


def _redis(settings: Settings) -> str:
    redis = connect(settings)
    with redis_errors(settings.redis_url):
        begin = time.perf_counter()
        redis.ping()
        milliseconds = (time.perf_counter() - begin) * 1000
        information = _information(redis)
    if information is None:
        return f"{without_credentials(settings.redis_url)}, {milliseconds:.1f} ms; its user may not run INFO, so no more is known"
    version = information.get("valkey_version") or information.get("redis_version")
    judge_writes(information)
    policy = information.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise PipefleetError(f"maxmemory-policy is {policy}: Redis may drop jobs; set it to noeviction")
    return f"{without_credentials(settings.redis_url)}, version {version}, {milliseconds:.1f} ms"


def _information(redis: Any) -> Any:
    from redis.exceptions import NoPermissionError

    try:
        return redis.info()
    except NoPermissionError:
        return None


def _rights(settings: Settings) -> str:
    with redis_errors(settings.redis_url):
        return rights.describe(connect(settings))


def _identity(settings: Settings) -> str:
    return Membership(connect(settings), ObjectStore(), settings).prove()


def adopt_store() -> str:
    """Make the store of these settings that of Redis's fleet; what became of it. Raises PipefleetError."""
    settings = load_settings()
    return Membership(connect(settings), ObjectStore(), settings).adopt()


def _store(settings: Settings) -> str:
    store, uri = ObjectStore(), join_uri(settings.store, f"doctor-{uuid.uuid4().hex}")
    store.require_bucket(settings.store)
    store.put(uri, b"pipefleet")
    try:
        if store.get(uri) != b"pipefleet":
            raise PipefleetError(f"{uri} reads back differently than it was written")
    finally:
        store.delete(uri)
    return f"{settings.store} at {endpoint()} can be written and read"


def _race(settings: Settings) -> str:
    """Fifty writers of one key: exactly one may win, else a part could be replaced."""
    store = ObjectStore()
    with ThreadPoolExecutor(RACERS) as threads:
        for _ in range(ROUNDS):
            uri = join_uri(settings.store, f"doctor-{uuid.uuid4().hex}")
            won = list(threads.map(lambda racer, uri=uri: store.put_new(uri, str(racer).encode()), range(RACERS)))
            body = store.get(uri)
            store.delete(uri)
            if sum(won) != 1 or body != str(won.index(True)).encode():
                raise PipefleetError(
                    f"{sum(won)} of {RACERS} conditional writes of one key won: this server cannot promise that every "
                    "result appears once; upgrade it or use another"
                )
    return f"one of {RACERS} racing writers wins, {ROUNDS} times of {ROUNDS}"


def _fleet(settings: Settings) -> str:
    from pipefleet.fleet.pools import load_fleet

    path = settings.fleet_path
    if path is None:
        return "no fleet file; producers route by what workers announce"
    fleet = load_fleet(path, allow_unpinned=True)
    named = ", ".join(f"{pool.name} ({pool.task})" for pool in fleet.pools.values())
    return "; ".join((f"{path}: {named}", *fleet.idle_pools().values()))


def _producer(settings: Settings) -> str:
    return "torch is not installed, so no worker can run here; for one: pip install 'pipefleet[workers]'"


def _workers(settings: Settings, *, needed: bool) -> str:
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


def _images(settings: Settings) -> str:
    from PIL import features

    missing = [name for name in ("jpg", "zlib", "webp") if not features.check(name)]
    if missing:
        raise PipefleetError(f"Pillow lacks {', '.join(missing)}; install its binary wheel")
    return f"Pillow {importlib.import_module('PIL').__version__} with JPEG, PNG and WebP"


def _audio(settings: Settings) -> str:
    soundfile, av = importlib.import_module("soundfile"), importlib.import_module("av")
    return f"libsndfile {soundfile.__libsndfile_version__}, FFmpeg through PyAV {av.__version__}"


def _device(settings: Settings) -> str:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return f"torch {torch.__version__}, {torch.cuda.device_count()} x {', '.join(sorted(names))}"
    return f"torch {torch.__version__}, no GPU: models run on {torch.get_num_threads()} CPU threads"
