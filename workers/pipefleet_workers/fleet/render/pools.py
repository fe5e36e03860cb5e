"""The values of a pool that its deploy files need.

In: the path of a fleet file. Out: a `DeployedPool` for each pool and for each revision that a pool is leaving. `files` calls
`load_pools`. A wrong fleet file, or a pool that no container can run, raises FleetFileError; a wrong option raises UsageError.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipefleet.errors import FleetFileError, UsageError
from pipefleet.fleet.devices import ALL, CPU, number_of
from pipefleet.fleet.pools import Pool
from pipefleet.fleet.routing import queue_name

DRAIN_SECONDS = 45
"""Seconds that started work may take after SIGTERM, unless --drain sets another number."""
GRACE_MARGIN = 15
"""Seconds between the end of the drain and SIGKILL, in which results are written and other messages given back."""
NAMESPACE = "pipefleet"
METRICS_PORT = 9400
"""The port of a container's first worker; the others have the ports after it."""
MOST_WORKERS = 16
"""Workers of one container: Prometheus looks for so many ports. With `devices = "all"` it looks for those of GPUS_OF_A_HOST."""
GPUS_OF_A_HOST = 8
_LONGEST_NAME = 63 - len("pipefleet-worker-")
"""A Kubernetes label has at most 63 characters, and KEDA labels its objects with the name of the Deployment."""
_SCALING = ("workers", "wait_slo")
"""Keys that only the scaler reads."""
_DNS = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """Options that the fleet file does not have: `drain` in whole seconds, and the Kubernetes namespace."""

    drain: int = DRAIN_SECONDS
    namespace: str = NAMESPACE

    def __post_init__(self) -> None:
        if self.drain < 0:
            raise UsageError(f"--drain must be 0 or more seconds, not {self.drain}")
        if not _DNS.fullmatch(self.namespace) or len(self.namespace) > 63:
            raise UsageError(f"--namespace {self.namespace!r} is no name that Kubernetes takes; use a-z, 0-9 and '-'")

    @property
    def grace(self) -> int:
        """Seconds between SIGTERM and SIGKILL."""
        return self.drain + GRACE_MARGIN


@dataclass(frozen=True, slots=True)
class DeployedPool:
    """A pool, or a revision that it is leaving, and the `digest` of its settings. A new digest means that its workers must restart.

    A new range of workers does not change the digest. The end of an old revision does not change the digest of the new revision.
    """

    pool: Pool
    digest: str

    @property
    def name(self) -> str:
        """The name of its Deployment or service: `speech`, or `speech-previous`."""
        return self.pool.key.replace("@", "-")

    @property
    def on_gpu(self) -> bool:
        """True if the pool uses a GPU when one is available."""
        return CPU not in (self.pool.device, *self.names)

    @property
    def gpu(self) -> str | None:
        """N of `device = "cuda:N"`; None for any other device."""
        return self.pool.device.partition(":")[2] or None

    @property
    def names(self) -> tuple[str, ...]:
        """The devices that the fleet file names."""
        return self.pool.devices if isinstance(self.pool.devices, tuple) else ()

    @property
    def gpus(self) -> int | None:
        """The number of GPUs of a container; None for all of its host."""
        if not self.on_gpu:
            return 0
        return 1 if self.pool.devices is None else number_of(self.pool.devices)

    @property
    def workers(self) -> int:
        """The number of workers of a container; with all GPUs of a host, the most that Prometheus looks for."""
        known = self.pool.workers_per_host
        return min(GPUS_OF_A_HOST * self.pool.workers_per_device, MOST_WORKERS) if known is None else known

    @property
    def each(self) -> int:
        """The number of workers that the scaler counts for a container: 1 where only the host knows it."""
        return self.pool.workers_per_host or 1

    @property
    def least(self) -> int:
        """The number of containers with a scaler, at least."""
        return -(-self.pool.workers.min // self.each)

    @property
    def most(self) -> int:
        """The number of containers with a scaler, at most."""
        return max(self.pool.workers.max // self.each, self.least, 1)

    @property
    def replicas(self) -> int:
        """The number of containers without a scaler: the minimum, but at least one."""
        return max(1, self.least)

    def arguments(self, ready_file: str) -> list[str]:
        """The arguments of `pipefleet` in the container, which sees GPUs that were chosen for it as the first GPUs."""
        device = ["--device", "cuda:0"] if self.gpu else []
        if self.names and self.on_gpu:
            device = ["--devices", str(len(self.names))]
        return ["worker", "--pool", self.pool.key, "--ready-file", ready_file, *device]


def load_pools(path: Path) -> list[DeployedPool]:
    """The pools of a fleet file, and the revisions that they are leaving, in its order.

    Raises FleetFileError for a pool that no container can run.
    """
    from pipefleet.fleet.file import load_fleet  # pydantic, which `pipefleet --help` does without

    fleet = load_fleet(path)
    tables = tomllib.loads(path.read_text(encoding="utf-8"))["pools"]
    found = []
    for pool in fleet.revisions.values():
        table = _table(tables[pool.name], pool.generation)
        found.append(DeployedPool(pool, _digest(table, queue_name(pool, fleet))))
        _check(found[-1], table, path)
        if pool.generation and found[-1].name in fleet.pools:
            raise FleetFileError(f"{path}: pools.{pool.key} would be deployed as {found[-1].name}, as another pool is")
    return found


def require_number(one: DeployedPool, path: Path) -> None:
    """Raise FleetFileError unless the pool has a number of GPUs, which is all that a pod can ask for."""
    if one.pool.devices == ALL or (one.names and one.on_gpu):
        raise FleetFileError(
            f"{path}: pools.{one.pool.key}: a pod gets a number of GPUs, neither all nor chosen ones; write devices = N"
        )


def _table(table: Mapping[str, Any], generation: int) -> dict[str, Any]:
    """The table of a pool, or of a revision that it is leaving, as the file has it."""
    previous = table.get("previous", ())
    tables = [previous] if isinstance(previous, Mapping) else previous
    own = {key: value for key, value in table.items() if key != "previous"}
    return {**own, "revision": None, **tables[generation - 1]} if generation else own


def _check(one: DeployedPool, table: Mapping[str, Any], path: Path) -> None:
    pool = one.pool
    where = f"{path}: pools.{pool.key}"
    if not _DNS.fullmatch(one.name) or len(one.name) > _LONGEST_NAME:
        raise FleetFileError(
            f"{where}: a deployed pool's name has at most {_LONGEST_NAME} characters and no '-' at its end"
        )
    foreign = [name for name in (pool.device, *one.names) if name.startswith(("mps", "xpu"))]
    if foreign:
        raise FleetFileError(f"{where}: the images have no {foreign[0]}; use auto, cpu or cuda:N")
    if (number := max(one.workers, pool.workers_per_device)) > MOST_WORKERS:
        raise FleetFileError(
            f"{where}: a container has at most {MOST_WORKERS} workers, not {number}: Prometheus looks for so many ports"
        )
    if pool.model.startswith(("/", "s3://")) and table["model"] == pool.model:
        return
    if not pool.is_hub or table["model"] != pool.model:
        raise FleetFileError(
            f"{where}: the folder {table['model']!r} of this machine is not in the image; name an s3:// prefix, a hub model "
            "or an absolute path that is mounted in the containers"
        )


def _digest(table: Mapping[str, Any], queue: str) -> str:
    """The digest of the file's values, not of the defaults: a new version of pipefleet restarts workers by its image."""
    content = {key: value for key, value in table.items() if key not in _SCALING} | {"queue": queue}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
