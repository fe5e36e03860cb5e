"""`pipefleet doctor`: is everything there that a fleet needs, and what to do about what is not."""

from __future__ import annotations

import importlib
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipefleet import broker
from pipefleet.announcements import announced_workers
from pipefleet.errors import PipefleetError
from pipefleet.objects import ObjectStore, endpoint
from pipefleet.settings import Settings, load_settings, without_credentials
from pipefleet.storage import join_uri

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
    """All checks in the order in which their causes build on each other. Never raises."""
    settings = load_settings()
    checks: list[tuple[str, Callable[[Settings], str]]] = [
        ("redis", _redis),
        ("s3", _store),
        ("s3 conditional writes", _race),
        ("fleet", _fleet),
        ("workers", _workers),
        ("images", _images),
        ("audio", _audio),
        ("device", _device),
    ]
    return [_checked(name, check, settings) for name, check in checks]


def _checked(name: str, check: Callable[[Settings], str], settings: Settings) -> Check:
    try:
        return Check(name, True, check(settings))
    except PipefleetError as error:
        return Check(name, False, str(error))
    except Exception as error:  # noqa: BLE001 - a check that breaks is a finding, not an end
        return Check(name, False, f"{type(error).__name__}: {error}")


def _redis(settings: Settings) -> str:
    redis = broker.connect(settings)
    with broker.redis_errors(settings.redis_url):
        begin = time.perf_counter()
        redis.ping()
        milliseconds = (time.perf_counter() - begin) * 1000
        information: Any = redis.info()
    version = information.get("valkey_version") or information.get("redis_version")
    policy = information.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise PipefleetError(f"maxmemory-policy is {policy}: Redis may drop jobs; set it to noeviction")
    return f"{without_credentials(settings.redis_url)}, version {version}, {milliseconds:.1f} ms"


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
    from pipefleet.fleet import load_fleet

    path = settings.fleet_path
    if path is None:
        return "no fleet file; producers route by what workers announce"
    pools = load_fleet(path, allow_unpinned=True).pools
    return f"{path}: " + ", ".join(f"{pool.name} ({pool.task})" for pool in pools.values())


def _workers(settings: Settings) -> str:
    with broker.redis_errors(settings.redis_url):
        workers = announced_workers(broker.connect(settings))
    if not workers:
        raise PipefleetError("no worker is alive; start one with `pipefleet worker --pool NAME`, or `pipefleet up`")
    return "; ".join(f"{name}: {facts.get('batching', '')}" for name, facts in sorted(workers.items()))


def _images(settings: Settings) -> str:
    from PIL import features

    missing = [name for name in ("jpg", "zlib", "webp") if not features.check(name)]
    if missing:
        raise PipefleetError(f"Pillow lacks {', '.join(missing)}; install its binary wheel")
    return f"Pillow {importlib.import_module('PIL').__version__} with JPEG, PNG and WebP"


def _audio(settings: Settings) -> str:
    soundfile, av = importlib.import_module("soundfile"), importlib.import_module("av")
    importlib.import_module("soxr")
    return f"libsndfile {soundfile.__libsndfile_version__}, FFmpeg through PyAV {av.__version__}, soxr"


def _device(settings: Settings) -> str:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return f"torch {torch.__version__}, {torch.cuda.device_count()} x {', '.join(sorted(names))}"
    return f"torch {torch.__version__}, no GPU: models run on {torch.get_num_threads()} CPU threads"
