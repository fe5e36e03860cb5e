"""The doctor's checks of this machine: the libraries that decode pictures and sound, and the devices, in all and of each pool.

`report` runs the checks that `checks_of_machine` lists. Each check returns a sentence.
A missing library or picture format raises an error, which fails the check. Without torch no worker can run
here: then a single check says so, and no other check runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from pipefleet.errors import FleetFileError, PipefleetError
from pipefleet.fleet.pools import Pool
from pipefleet.installed import is_installed
from pipefleet.settings import Settings
from pipefleet_workers.process.host import Count, absent_devices, host_devices, visible_gpus


def checks_of_machine() -> list[tuple[str, Callable[[Settings], str]]]:
    """Name and function of each check; without torch, a single check that says so."""
    if not is_installed("torch"):
        return [("this machine", _no_torch)]
    return [
        ("images", check_images),
        ("audio", check_audio),
        ("device", check_device),
        ("devices of pools", check_pools),
    ]


def _no_torch(settings: Settings) -> str:
    return "torch is not installed, so no worker can run here; for one: pip install 'pipefleet[workers]'"


def check_images(settings: Settings) -> str:
    """The version and the formats of Pillow. Raises PipefleetError if a format is missing."""
    from PIL import features

    missing = [name for name in ("jpg", "zlib", "webp") if not features.check(name)]
    if missing:
        raise PipefleetError(f"Pillow lacks {', '.join(missing)}; install its binary wheel")
    return f"Pillow {importlib.import_module('PIL').__version__} with JPEG, PNG and WebP"


def check_audio(settings: Settings) -> str:
    """The versions of the libraries that decode sound. Raises ImportError if one is missing."""
    soundfile, av = importlib.import_module("soundfile"), importlib.import_module("av")
    return f"libsndfile {soundfile.__libsndfile_version__}, FFmpeg through PyAV {av.__version__}"


def check_device(settings: Settings) -> str:
    """The GPUs, or the threads of the CPU."""
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return f"torch {torch.__version__}, {torch.cuda.device_count()} x {', '.join(sorted(names))}"
    return f"torch {torch.__version__}, no GPU: models run on {torch.get_num_threads()} CPU threads"


def check_pools(settings: Settings, count: Count = visible_gpus) -> str:
    """The devices of this machine that each pool of the fleet file would use; a warning if the machine has fewer than these."""
    from pipefleet.fleet.file import load_fleet

    path = settings.fleet_path
    try:
        pools = [] if path is None else load_fleet(path, allow_unpinned=True).pools.values()
    except FleetFileError:
        return "the fleet file cannot be read"  # the check of the fleet tells why
    told = [_devices(pool, count) for pool in pools if pool.devices is not None]
    return "; ".join(told) or "no pool of the fleet file has `devices`"


def _devices(pool: Pool, count: Count) -> str:
    assert pool.devices is not None
    wanted, absent = host_devices(pool.devices, count), absent_devices(pool.devices, count)
    here = [name for name in wanted if name not in absent]
    number = pool.workers_per_device
    workers = f"{number} {'worker' if number == 1 else 'workers'} each"
    if not absent:
        return f"{pool.name}: {', '.join(here)}, {workers}"
    return (
        f"WARNING: {pool.name} asks for {len(wanted)} devices, of which this machine has {len(here)} "
        f"({', '.join(here) or 'none'}); its workers for {', '.join(absent)} cannot start here"
    )
